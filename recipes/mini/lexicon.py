"""A pronunciation lexicon of all words of some manifests, for `jasper train --lexicon`.

    python recipes/mini/lexicon.py MANIFEST [...] --out lexicon.txt

A word and its phonemes a line, in Kaldi's layout. The phonemes are those of hibari-tts (`pip install hibari-tts`,
Apache-2.0), American, without stress; each word is spoken alone, so that a word has one pronunciation.
"""

import argparse
import json
import re
from pathlib import Path

STRESS_AND_LENGTH = re.compile("[\u02c8\u02cc\u02d0]")


def main() -> None:
    """Parse, collect the words, write."""
    from hibari.g2p import G2P

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = [line for path in options.manifests for line in path.read_text(encoding="utf-8").splitlines()]
    words = sorted({word for line in lines for word in json.loads(line)["text"].lower().split()})
    pronounce = G2P()
    rows = [row for word in words if (row := lexicon_row(word, pronounce(word)))]
    options.out.write_text("".join(rows), encoding="utf-8")
    print(f"{options.out}: {len(rows)} of {len(words)} words")


def lexicon_row(word: str, spoken: str) -> str:
    """A line of the lexicon; empty if nothing of the word is spoken."""
    phonemes = [letter for letter in STRESS_AND_LENGTH.sub("", spoken) if letter.isalpha()]
    return f"{word} {' '.join(phonemes)}\n" if phonemes else ""


if __name__ == "__main__":
    main()
