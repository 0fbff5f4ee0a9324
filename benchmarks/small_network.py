"""Which graph the embedded model should run, and how many sources to read ahead of it, all in alternation.

    python benchmarks/small_network.py MANIFEST [...] [--rounds 3] [--limit 20] [--threads 2]

First the network alone, median ms of noise of several lengths; then `transcribe_many` with the language model, median
times real time of each manifest's first utterances. One process, batch 1, onnxruntime.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import jasper_asr
from jasper_asr.data.manifest import read_manifest
from jasper_asr.transcribe import Transcriber

GRAPHS = ("direct", "spectral")
FRAMES = (450, 700, 1000, 1500, 3000)
READ_AHEAD = (0, 1, 2)


def main() -> None:
    """Parse, measure, print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=20, help="utterances of each manifest")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    models = {graph: jasper_asr.load("mini", convolution=graph, threads=options.threads) for graph in GRAPHS}

    print("| network alone |", *(f"{graph}, ms |" for graph in GRAPHS))
    print("|---|---|---|")
    for frames in FRAMES:
        noise = np.random.default_rng(0).standard_normal((64, frames)).astype(np.float32)
        runs = [partial(model.run_features, noise) for model in models.values()]
        print(f"| {frames / 100:g} s |", *(f"{1000 * seconds:.1f} |" for seconds in medians(runs, 5 * options.rounds)))

    for manifest in options.manifests:
        utterances = read_manifest(manifest)[: options.limit]
        paths = [row.audio_path for row in utterances]
        results = list(models["direct"].transcribe_many(paths))
        audio = sum(result.duration for result in results)
        print(f"\n| {manifest.parent.name}, {len(paths)} utterances: read ahead |", *(f"{graph} |" for graph in GRAPHS))
        print("|---|---|---|")
        for jobs in READ_AHEAD:
            runs = [partial(transcribe, model, paths, jobs) for model in models.values()]
            print(f"| {jobs} |", *(f"{audio / seconds:.0f}x |" for seconds in medians(runs, options.rounds)))


def transcribe(model: Transcriber, paths: list[Path], jobs: int) -> None:
    """All of `paths`, to the end."""
    for _ in model.transcribe_many(paths, jobs=jobs):
        pass


def medians(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, in alternation, after one round that does not count."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, seconds in zip(runs, taken, strict=True):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return [float(np.median(seconds[1:])) for seconds in taken]


if __name__ == "__main__":
    main()
