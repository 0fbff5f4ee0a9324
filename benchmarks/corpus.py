"""A corpus against the Ascend guide's way: `python benchmarks/corpus.py CHECKPOINT ONNX [--utterances 24]`.

Ours counts everything from FLAC file to text: reading, features, network, decoding, through `transcribe_many`, for each
combination of --threads, --batch-sizes and --decoding (best path, or beam search with the embedded language model).
Lengths are evenly spaced quantiles of LibriSpeech dev-clean's; the sound is noise, whose loudness comes and goes.
The guide's way pads every utterance to 4000 frames and runs eager PyTorch at batch 1 (our net); network only.
All of them take turns, --rounds times. CHECKPOINT and ONNX are the same network. Needs the tests folder, and torch.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import jasper_asr
from jasper_asr.benchmark import describe_machine
from jasper_asr.model.checkpoint import load_checkpoint
from jasper_asr.transcribe import BeamOptions, Transcript
from test_buckets import dev_clean_frames

GUIDE_FRAMES = 4000
RATE = 16_000


def main() -> None:
    """Parse, time in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("onnx")
    parser.add_argument("--utterances", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--decoding", nargs="+", choices=["greedy", "lm"], default=["greedy", "lm"])
    options = parser.parse_args()
    guide = guide_way(options.checkpoint, max(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        files, seconds = write_corpus(Path(folder), options.utterances)
        combinations = list(itertools.product(options.threads, options.batch_sizes, options.decoding))
        ours: dict[tuple[int, int, str], list[float]] = {combination: [] for combination in combinations}
        theirs = []
        for _ in range(options.rounds):
            theirs.append(guide())
            for combination in combinations:
                ours[combination].append(our_way(options.onnx, files, *combination))
    reference = statistics.median(theirs)
    print(f"{describe_machine()}; {len(files)} utterances, {seconds / len(files):.2f} s on average\n")
    print(
        "| way | threads | batch | decoding | seconds an utterance, median (range) | times faster | times real time |"
    )
    print("|---|---|---|---|---|---|---|")
    print(f"| the guide's | {max(options.threads)} | 1 | none | {cell(theirs)} | 1.0 | |")
    for (threads, batch, decoding), times in ours.items():
        median = statistics.median(times)
        speed = f"{reference / median:.1f} | {seconds / len(files) / median:.1f}"
        print(f"| ours | {threads} | {batch} | {decoding} | {cell(times)} | {speed} |")


def write_corpus(folder: Path, utterances: int) -> tuple[list[Path], float]:
    """FLAC files, shuffled, and their length in seconds."""
    rng = np.random.default_rng(0)
    frames = np.quantile(dev_clean_frames(), (np.arange(utterances) + 0.5) / utterances).astype(int)
    files = []
    for index, count in enumerate(rng.permutation(frames)):
        times = np.arange(count * RATE // 100) / RATE
        samples = rng.normal(0, 0.05, len(times)) * (1 + np.sin(2 * np.pi * 3 * times))
        files.append(folder / f"{index}.flac")
        soundfile.write(files[-1], samples, RATE)
    return files, float(frames.sum()) / 100


def our_way(model: str, files: Sequence[Path], threads: int, batch_size: int, decoding: str) -> float:
    """Seconds an utterance, from file to text."""
    beam = BeamOptions(lm="mini") if decoding == "lm" else None
    with jasper_asr.load(model, threads=threads, batch_size=batch_size, beam=beam, greedy=not beam) as transcriber:
        transcriber.transcribe(files[0])
        started = time.perf_counter()
        results = list(transcriber.transcribe_many(files, jobs=1))
        elapsed = time.perf_counter() - started
    assert all(isinstance(result, Transcript) for result in results)
    return elapsed / len(files)


def guide_way(path: str, threads: int) -> Callable[[], float]:
    """A function that runs one padded utterance and returns its seconds."""
    import torch

    from jasper_asr.model.net import Jasper

    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(path)
    net = Jasper(checkpoint.config).eval()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in checkpoint.weights.items()}, strict=False)
    padded, lens = torch.randn(1, checkpoint.config.in_feats, GUIDE_FRAMES), torch.tensor([GUIDE_FRAMES])

    def once() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            net(padded, lens)
        return time.perf_counter() - started

    once()
    return once


def cell(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


if __name__ == "__main__":
    main()
