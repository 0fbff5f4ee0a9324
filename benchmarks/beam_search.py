"""Time of the beam search on one core: `python benchmarks/beam_search.py [--lm mini.lm] [--model last.pt]`.

Prints the median, over rounds, of milliseconds of processor time per second of audio: for synthetic log-probs of
words of the language model (peaky as a trained network's, or flat as a poor one's), and for clips through a model.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before numpy: one core

import numpy as np

from jasper_asr.beam import beam_search
from jasper_asr.decode import greedy
from jasper_asr.lm import NgramModel
from jasper_asr.text import LABELS, encode

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", type=Path, default=ROOT / "runs/lm/mini.lm")
    parser.add_argument("--model", type=Path, default=ROOT / "runs/mini/last.pt")
    parser.add_argument("--clips", type=Path, default=ROOT / "src/jasper_asr/models/mini/clips/manifest.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    started = time.process_time()
    lm = NgramModel.load(options.lm)
    print(f"{options.lm.name}: loaded in {1e3 * (time.process_time() - started):.0f} ms")
    rng = np.random.default_rng(0)
    for stride in (0.04, 0.02):
        for name, noise in (("peaky", 0.3), ("flat", 3.0)):
            report(f"{name}, 10 s at {1e3 * stride:g} ms", [synthetic(rng, lm, stride, noise)], 10, lm, options.rounds)
    if options.model.exists():
        log_probs, seconds = through_model(options.model, options.clips)
        report(f"{len(log_probs)} clips through {options.model.name}", log_probs, seconds, lm, options.rounds)


def synthetic(rng: np.random.Generator, lm: NgramModel, stride: float, noise: float) -> np.ndarray:
    """log_probs [T, 29] of 10 s: letters at 14 a second in two frames each, blanks between, logits with noise."""
    words = [word for word in lm.words if word.isalpha() and word.isascii()]
    ids = encode(" ".join(rng.choice(words, 40)))[:140]
    frames = round(10 / stride)
    logits = rng.normal(0, noise, (frames, len(LABELS) + 1))
    logits[:, -1] += 6
    at = np.linspace(0, frames - 2, len(ids)).astype(int)
    logits[at, ids] += 10
    logits[at + 1, ids] += 6
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def through_model(model: Path, clips: Path) -> tuple[list[np.ndarray], float]:
    """log_probs of all clips, and their seconds."""
    import jasper_asr
    from jasper_asr import audio
    from jasper_asr.data.manifest import read_manifest

    with jasper_asr.load(model, threads=1) as transcriber:
        sounds = [audio.load_audio(row.audio_path) for row in read_manifest(clips)]
        batches = [transcriber.log_probs([sound]) for sound in sounds]
    return [rows[0, : lens[0]] for rows, lens in batches], sum(len(sound) for sound in sounds) / 16000


def report(name: str, log_probs: Sequence[np.ndarray], seconds: float, lm: NgramModel, rounds: int) -> None:
    """One line: greedy, and the beam at several widths."""
    times = {"greedy": timed(lambda rows: greedy(rows, len(rows), LABELS), log_probs, rounds)}
    for width in (16, 64, 256):
        times[f"beam {width}"] = timed(
            lambda rows, width=width: beam_search(rows, len(rows), LABELS, lm=lm, beam_width=width), log_probs, rounds
        )
    print(f"{name}: " + ", ".join(f"{key} {1e3 * value / seconds:.1f} ms/s" for key, value in times.items()))


def timed(decode, log_probs: Sequence[np.ndarray], rounds: int) -> float:
    """Median seconds of processor time that decoding everything takes: other processes do not count."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        for rows in log_probs:
            decode(rows)
        times.append(time.process_time() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
