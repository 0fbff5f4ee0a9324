"""Make the language model of `mini` from text: one sentence a line, plain or gzipped.

    python recipes/mini/build_lm.py sentences.txt.gz --out mini.lm

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
from pathlib import Path

from jasper_asr.lm import NgramModel, estimate

HELD_OUT_EVERY = 50
SPOKEN = {"mr": "mister", "mrs": "missus", "dr": "doctor"}


def main() -> None:
    """Split, estimate, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--prune", type=float, default=1e-7, help="relative entropy in nats; 0 keeps every n-gram")
    options = parser.parse_args()
    training, held_out = split(options.text)
    started = time.perf_counter()
    estimate(training, options.order, prune=options.prune).save(options.out)
    seconds = time.perf_counter() - started
    model = NgramModel.load(options.out)
    counts = ", ".join(f"{count} {n}-grams" for n, count in enumerate(model.counts, start=1))
    print(f"{options.out}: {counts}, made in {seconds:.0f} s from {len(training)} sentences")
    print(f"{options.out.stat().st_size} bytes, {zipped_size(options.out)} zipped")
    print(f"perplexity {model.perplexity(held_out):.1f} on {len(held_out)} held-out sentences")
    words = [word for sentence in held_out for word in sentence.split()]
    print(f"{100 * sum(word not in model for word in words) / len(words):.2f} % of their words unknown")


def split(path: Path) -> tuple[list[str], list[str]]:
    """Transcripts to train on and transcripts held out, in the file's order."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        pairs = [(zlib.crc32(line.strip().encode()) % HELD_OUT_EVERY == 0, transcript(line)) for line in file]
    held_out = {text for held, text in pairs if held and text}
    return [text for _, text in pairs if text and text not in held_out], list(dict.fromkeys(t for h, t in pairs if h))


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
