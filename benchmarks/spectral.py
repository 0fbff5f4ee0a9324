"""Direct against spectral convolution: `python benchmarks/spectral.py [--threads 1 2] [--rounds 7] [--tiny]`.

Builds Jasper 10x5 with random weights (seed 0) as graphs of each kind, checks that all give the same log-probs as the
direct one in onnxruntime, and times onnxruntime and OpenVINO at float32 in alternation, one utterance at a time. Each
model runs in a process of its own, so that its memory can be told. Prints a Markdown table: median seconds, quartiles,
and how many times faster than the fastest direct engine. The graphs take 7 GB of disk in --folder.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jasper_asr.backends import open_backend
from jasper_asr.benchmark import describe_machine
from jasper_asr.config import ModelConfig, builtin_config, load_config
from jasper_asr.model.checkpoint import Checkpoint, random_weights
from jasper_asr.model.export import BUILTIN_MODELS, write_graph
from jasper_asr.model.spectral import choose_tile, predicted_speedup

SECONDS = (2.0, 7.0, 16.7, 40.0)
FRAMES_PER_SECOND = 100


def main() -> None:
    """Parse, build, time in alternation, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backends", nargs="+", default=["ort", "openvino"])
    parser.add_argument("--precision", choices=["f32", "bf16", "f16"], default="f32", help="of OpenVINO")
    parser.add_argument("--folder", type=Path, help="Keep the graphs here, and take those that are here.")
    parser.add_argument("--tile", type=int, help="Frames in a tile (default: chosen for open lengths).")
    parser.add_argument("--fit", action="store_true", help="A spectral graph for each length, its tile chosen for it.")
    parser.add_argument("--int8", type=Path, help="Time this too: the direct graph, quantised by `jasper quantize`.")
    parser.add_argument("--tiny", action="store_true", help="A quick run with the shape of mini, to see that it works.")
    parser.add_argument("--worker", nargs=4, metavar=("MODEL", "BACKEND", "THREADS", "PRECISION"))
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    if options.tiny:
        options.seconds, options.rounds, options.threads = options.seconds[:1], 2, [1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        graphs = build(folder, options)
        if options.int8:
            graphs["int8"] = options.int8
        print(f"{describe_machine()}; medians of {options.rounds} rounds in alternation\n")
        for threads in options.threads:
            report(graphs, threads, options)


def build(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Name -> file of each graph."""
    config = network(options)
    kinds: dict[str, dict[str, object]] = {"direct": {"convolution": "direct"}}
    if options.fit:
        for seconds in options.seconds:
            frames = round(seconds * FRAMES_PER_SECOND)
            kinds[f"spectral {seconds:g} s"] = {"convolution": "spectral", "frames": frames, "batch_size": 1}
    else:
        kinds["spectral"] = {"convolution": "spectral", "tile": options.tile}
    paths = {name: folder / f"{config.name}-{name}-{options.tile or ''}.onnx".replace(" ", "_") for name in kinds}
    if all(path.exists() for path in paths.values()):
        return paths
    weights = random_weights(config, seed=0)
    # residuals add up: brought down to where the log-probs of a trained network lie, 0 to about -20
    weights["decoder.layers.0.weight"] /= 50
    checkpoint = Checkpoint(config, weights, "0" * 64, "ema")
    for name, path in paths.items():
        started = time.perf_counter()
        write_graph(checkpoint, path, **kinds[name])
        print(f"{name}: written in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return paths


def report(graphs: dict[str, Path], threads: int, options: argparse.Namespace) -> None:
    """One table: rows are engines, columns lengths."""
    inputs = [round(seconds * FRAMES_PER_SECOND) for seconds in options.seconds]
    workers: dict[tuple[str, str], Worker] = {}
    for name, path in graphs.items():
        for backend in options.backends:
            precision = options.precision if backend == "openvino" else "f32"
            workers[backend, name] = Worker(path, backend, threads, precision)
    times: dict[tuple[str, str], dict[int, list[float]]] = {key: {} for key in workers}
    off: dict[tuple[str, str], float] = {}
    for frames in inputs:
        fitting = {key: worker for key, worker in workers.items() if fits(key[1], frames)}
        for round_ in range(options.rounds + 1):
            for key, worker in fitting.items():
                seconds = worker.run(frames)
                if round_:  # the first warms up
                    times[key].setdefault(frames, []).append(seconds)
        expected = np.load(next(iter(fitting.values())).output)
        for key, worker in fitting.items():
            off[key] = max(off.get(key, 0.0), float(np.abs(np.load(worker.output) - expected).max()))
    print(f"{threads} thread{'s' if threads > 1 else ''}\n")
    heads = [f"{frames / FRAMES_PER_SECOND:g} s" for frames in inputs]
    print(f"| engine | {' | '.join(heads)} | largest difference | start, s | peak GB |")
    print(f"|---|{'---|' * (len(heads) + 3)}")
    best = {
        frames: min(statistics.median(row[frames]) for key, row in times.items() if key[1] == "direct")
        for frames in inputs
    }
    for key, row in times.items():
        cells = [cell(row[frames], best[frames]) if frames in row else "" for frames in inputs]
        worker = workers[key]
        memory = f"{worker.start:.1f} | {worker.gigabytes:.2f}"
        print(f"| {' '.join(key)} | {' | '.join(cells)} | {off.get(key, float('nan')):.1e} | {memory} |", flush=True)
        worker.close()
    print("\nThe cost model expected, against direct:")
    for name in graphs:
        if name.startswith("spectral"):
            lengths = [frames for frames in inputs if fits(name, frames)]
            print(f"- {name}: {', '.join(expectation(name, frames, options) for frames in lengths)}")
    print()


def expectation(name: str, frames: int, options: argparse.Namespace) -> str:
    """What the cost model says of a graph at a length."""
    config, fixed = network(options), name.endswith(" s")
    shape = {"batch_size": 1, "frames": frames} if fixed else {}
    tile = options.tile or choose_tile(config, "spectral", **shape)
    assert tile
    return (
        f"{predicted_speedup(config, tile, frames, fixed=fixed):.2f}x at {frames / FRAMES_PER_SECOND:g} s (tile {tile})"
    )


def network(options: argparse.Namespace) -> ModelConfig:
    mini = BUILTIN_MODELS["mini"].with_name("config.yaml")
    return load_config(mini) if options.tiny else builtin_config("jasper10x5dr")


def fits(name: str, frames: int) -> bool:
    """Whether the graph `name` takes so many frames: `spectral 7 s` takes just 7 seconds."""
    return not name.endswith(" s") or name.endswith(f" {frames / FRAMES_PER_SECOND:g} s")


def cell(times: list[float], best: float) -> str:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return f"{median:.3f} ({low:.3f} to {high:.3f}), {best / median:.2f}x"


class Worker:
    """A process that holds one model, so that its memory can be measured; `start` in seconds."""

    def __init__(self, path: Path, backend: str, threads: int, precision: str) -> None:
        command = [sys.executable, __file__, "--worker", str(path), backend, str(threads), precision]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start, self.output = self.answer("seconds", "output")
        self.gigabytes = 0.0

    def run(self, frames: int) -> float:
        """Seconds of one run."""
        assert self.process.stdin
        print(frames, file=self.process.stdin, flush=True)
        seconds, self.gigabytes = self.answer("seconds", "gigabytes")
        return seconds

    def answer(self, *keys: str) -> list[Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a worker ended; see above")
        return [json.loads(line)[key] for key in keys]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        Path(self.output).unlink(missing_ok=True)


def work(path: str, name: str, threads: str, precision: str) -> None:
    """Load, then for each line with a number of frames run once and answer with JSON."""
    started = time.perf_counter()
    backend = open_backend(name, Path(path), threads=int(threads), precision=precision)
    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        output = file.name
    print(json.dumps({"seconds": time.perf_counter() - started, "output": output}), flush=True)
    for line in sys.stdin:
        frames = int(line)
        shape = (1, backend.config.in_feats, frames)
        feats = np.random.default_rng(frames).standard_normal(shape).astype(np.float32)
        started = time.perf_counter()
        log_probs, _ = backend.run(feats, np.array([frames], np.int32))
        seconds = time.perf_counter() - started
        np.save(output, log_probs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"seconds": seconds, "gigabytes": peak}), flush=True)


if __name__ == "__main__":
    main()
