"""What partial texts cost in accuracy: `python benchmarks/streaming.py MANIFEST [--model mini]`.

Streams every utterance in pieces of 0.1 s and scores the text that the stream had settled or shown at the end, for
several right contexts, beside the best path and the default decoding of the whole.
"""

import argparse
from pathlib import Path

import numpy as np

import jasper_asr
from jasper_asr.audio import SAMPLE_RATE, load_audio
from jasper_asr.data.manifest import read_manifest
from jasper_asr.stream import Stream
from jasper_asr.text import normalize_transcript
from jasper_asr.transcribe import Transcriber
from jasper_asr.wer import EditCounts, count_word_edits

PIECE = SAMPLE_RATE // 10


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--right-context", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    options = parser.parse_args()
    rows = [row for row in read_manifest(options.manifest) if row.text]
    sounds = [load_audio(row.audio_path, offset=row.part[0], duration=row.part[1]) for row in rows]
    print("| text | WER |\n|---|---|")
    with jasper_asr.load(options.model, greedy=True, threads=1) as transcriber:
        references = [normalize_transcript(row.text or "", transcriber.config.labels) for row in rows]
        for right in options.right_context:
            texts = [partial(transcriber, samples, right) for samples in sounds]
            print(f"| last partial, {right:g} s of right context | {wer(references, texts):.1f} % |", flush=True)
        texts = [transcriber.transcribe((samples, SAMPLE_RATE)).text for samples in sounds]
        print(f"| the whole, best path | {wer(references, texts):.1f} % |")
    with jasper_asr.load(options.model, threads=1) as transcriber:
        texts = [transcriber.transcribe((samples, SAMPLE_RATE)).text for samples in sounds]
        print(f"| the whole, default decoding (what `finish` gives) | {wer(references, texts):.1f} % |")


def partial(transcriber: Transcriber, samples: np.ndarray, right: float) -> str:
    """The last text that a stream of `samples` shows, a second of silence after them."""
    stream, text = Stream(transcriber, right_context=right), ""
    quiet = np.random.default_rng(0).normal(0, 1e-4, SAMPLE_RATE).astype(np.float32)
    padded = np.concatenate([samples, quiet])
    for start in range(0, len(padded), PIECE):
        text = stream.push(padded[start : start + PIECE]).text
    return text


def wer(references: list[str], texts: list[str]) -> float:
    """Percent."""
    counts = EditCounts(0, 0, 0, 0)
    for reference, text in zip(references, texts, strict=True):
        counts += count_word_edits(reference, text)
    return 100 * counts.rate


if __name__ == "__main__":
    main()
