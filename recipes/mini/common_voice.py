"""A manifest of a Mozilla Common Voice release: real speech of many people, CC0.

    python recipes/mini/common_voice.py FOLDER [--table validated.tsv]

FOLDER is a language's folder as Common Voice packs it (`cv-corpus-13.0-delta-2023-03-09/en`): tables of tab-separated
values and `clips/*.mp3`. Beside the table come `manifest-train.jsonl` and `manifest-dev.jsonl`; one speaker in sixteen
(by a checksum of the client id) is in the second, whole. A clip is taken if more people found it right than wrong, and
if its sentence is certain to be read as it is spelt: no digits or symbols, no words in capitals, no abbreviations.
"""

import argparse
import csv
import json
import re
import sys
import zlib
from pathlib import Path

import soundfile

SHORTEST, LONGEST = 1.0, 16.0
"""Seconds of a clip."""
CHARS_PER_SECOND = (5.0, 25.0)
"""Outside of these something else was said."""
HELD_OUT_EVERY = 16
ABBREVIATION = re.compile(
    r"\b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|no|prof|rev|gen|col|capt|lt|sgt|mt|ft|inc|ltd|co)\.", re.I
)
CAPITALS = re.compile(r"\b(?:[A-Z]\.|[A-Z]{2,})")
UNSPOKEN = re.compile(r"[.,;:!?\"()\u2013\u2014\u201c\u201d-]")


def main() -> None:
    """Read the table, measure the clips, write both manifests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", default="validated.tsv")
    options = parser.parse_args()
    rows, left_out = read(options.folder, options.table)
    for name, held_out in (("train", False), ("dev", True)):
        kept = [row for row in rows if is_held_out(row["speaker"]) == held_out]
        lines = "".join(f"{json.dumps(row)}\n" for row in kept)
        (options.folder / f"manifest-{name}.jsonl").write_text(lines, encoding="utf-8")
        hours = sum(row["duration"] for row in kept) / 3600
        print(
            f"{name}: {len(kept)} clips, {hours:.2f} h, {len({r['speaker'] for r in kept})} speakers", file=sys.stderr
        )
    print(f"{left_out} clips left out", file=sys.stderr)


def read(folder: Path, table: str) -> tuple[list[dict], int]:
    """Rows of a manifest, in the table's order, and how many clips are not among them."""
    rows, left_out = [], 0
    with (folder / table).open(encoding="utf-8", newline="") as file:
        for entry in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            text = transcript(entry["sentence"])
            path = folder / "clips" / entry["path"]
            agreed = int(entry["up_votes"]) > int(entry["down_votes"])
            duration = seconds(path) if text and agreed else 0.0
            if SHORTEST <= duration <= LONGEST and CHARS_PER_SECOND[0] <= len(text) / duration <= CHARS_PER_SECOND[1]:
                speaker = f"cv-{entry['client_id'][:16]}"
                name = f"clips/{entry['path']}"
                rows.append({"audio_filepath": name, "duration": duration, "text": text, "speaker": speaker})
            else:
                left_out += 1
    return rows, left_out


def transcript(sentence: str) -> str:
    """What is said: lower-case words of a-z and apostrophe; empty where the spelling does not tell, or for one word."""
    plain = sentence.replace("\u2019", "'").replace("\u2018", "'")
    if ABBREVIATION.search(plain) or CAPITALS.search(plain):
        return ""
    words = [word.strip("'") for word in UNSPOKEN.sub(" ", plain).lower().split()]
    known = all(re.fullmatch(r"[a-z][a-z']*", word) for word in words)
    return " ".join(words) if known and len(words) > 1 else ""


def seconds(path: Path) -> float:
    """Duration of a clip; 0 for one that is missing or cannot be read."""
    try:
        return round(soundfile.info(path).duration, 3)
    except (OSError, soundfile.LibsndfileError):
        return 0.0


def is_held_out(speaker: str) -> bool:
    """Whether a speaker is for development."""
    return zlib.crc32(speaker.encode()) % HELD_OUT_EVERY == 0


if __name__ == "__main__":
    main()
