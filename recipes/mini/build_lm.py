"""Make the language model of `mini` from texts: one sentence a line, plain or gzipped.

    python recipes/mini/build_lm.py sentences.txt.gz books.txt.gz --out mini.lm

Sentences are spelt as `synthesize.py` spells its transcripts. Those it holds out (crc32(sentence) % 50 == 0, and
whatever has the same transcript) are left out, and measure the model: perplexity counts unknown words and ends of
sentence too. The same text gives the same file, byte for byte.
"""

import argparse
import gzip
import io
import re
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from jasper_asr.lm import NgramModel, estimate

HELD_OUT_EVERY = 50
SPOKEN = {"mr": "mister", "mrs": "missus", "dr": "doctor"}


def main() -> None:
    """Split, estimate, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--prune", type=float, default=1e-7, help="relative entropy in nats; 0 keeps every n-gram")
    parser.add_argument("--min-count", type=int, default=10, help="rarer words are counted as unknown")
    options = parser.parse_args()
    training, held_out = split(options.texts)
    started = time.perf_counter()
    estimate(training, options.order, prune=options.prune, min_count=options.min_count).save(options.out)
    seconds = time.perf_counter() - started
    model = NgramModel.load(options.out)
    counts = ", ".join(f"{count} {n}-grams" for n, count in enumerate(model.counts, start=1))
    print(f"{options.out}: {counts}, made in {seconds:.0f} s from {len(training)} sentences")
    print(f"{options.out.stat().st_size} bytes, {zipped_size(options.out)} zipped")
    print(f"perplexity {model.perplexity(held_out):.1f} on {len(held_out)} held-out sentences")
    words = [word for sentence in held_out for word in sentence.split()]
    print(f"{100 * sum(word not in model for word in words) / len(words):.2f} % of their words unknown")


def split(paths: list[Path]) -> tuple[list[str], list[str]]:
    """Transcripts to train on, in the files' order, and transcripts held out, of the first file."""
    parts = [list(read(path)) for path in paths]
    held_out = dict.fromkeys(text for held, text in parts[0] if held)
    return [text for part in parts for _, text in part if text not in held_out], list(held_out)


def read(path: Path) -> Iterator[tuple[bool, str]]:
    """Whether a line is of those held out, and its transcript, of all lines with words."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            if text := transcript(line):
                yield zlib.crc32(line.strip().encode()) % HELD_OUT_EVERY == 0, text


def transcript(sentence: str) -> str:
    """Lower case; letters, single spaces and the apostrophes that touch a letter."""
    text = re.sub(r"[^a-z']+", " ", sentence.lower().replace("\u2019", "'"))
    words = re.sub(r"(?<![a-z])'(?![a-z])", " ", text).split()
    return " ".join(SPOKEN.get(word, word) for word in words)


def zipped_size(path: Path) -> int:
    """Bytes that the file takes in a wheel."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path)
    return len(buffer.getvalue())


if __name__ == "__main__":
    main()
