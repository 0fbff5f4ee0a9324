"""A manifest of untranscribed speech with what a model was surest to have heard in it (pseudo-labels).

    jasper transcribe CLIPS.jsonl --lm mini -f jsonl --output heard.jsonl
    python recipes/mini/heard.py CLIPS.jsonl heard.jsonl --out manifest.jsonl

An utterance is taken if the mean confidence of its words is at least --confidence, and if it has as many letters a
second as speech has (`common_voice.py`). Audio paths stay as CLIPS.jsonl has them: write the manifest beside it.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

from common_voice import CHARS_PER_SECOND


def main() -> None:
    """Match both files by the audio's path, choose, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clips", type=Path)
    parser.add_argument("heard", type=Path)
    parser.add_argument("--confidence", type=float, default=0.71)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    hypotheses = {row["audio_filepath"]: row for row in rows(options.heard)}
    clips = rows(options.clips)
    kept = [
        {**clip, "text": hypothesis["pred_text"]}
        for clip in clips
        if is_sure(hypothesis := hypotheses[clip["audio_filepath"]], clip["duration"], options.confidence)
    ]
    options.out.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
    hours = sum(row["duration"] for row in kept) / 3600
    print(f"{len(kept)} of {len(clips)} utterances, {hours:.2f} h", file=sys.stderr)


def rows(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_sure(hypothesis: dict, duration: float, confidence: float) -> bool:
    """Whether the words of a line of `jasper transcribe -f jsonl` are confident and fill `duration` (seconds)."""
    words = hypothesis["words"]
    spoken = CHARS_PER_SECOND[0] <= len(hypothesis["pred_text"]) / duration <= CHARS_PER_SECOND[1]
    return bool(words) and spoken and fmean(word["confidence"] for word in words) >= confidence


if __name__ == "__main__":
    main()
