"""NVIDIA's own eager PyTorch model against ours: `python benchmarks/nvidia_eager.py CLONE CHECKPOINT [ONNX ...]`.

CLONE is a checkout of NVIDIA/DeepLearningExamples. Its Jasper gets CHECKPOINT's config and weights; each ONNX (the same
network, by `jasper export`, direct or spectral) must give its log-probs within 1e-4, and is then timed in alternation
with it, one utterance at a time: median seconds (quartiles), and how many times faster.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jasper_asr.backends import open_backend
from jasper_asr.benchmark import describe_machine
from jasper_asr.model.checkpoint import Checkpoint, load_checkpoint

TOLERANCE = 1e-4
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def main() -> None:
    """Parse, check, time in alternation, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("onnx", type=Path, nargs="*")
    parser.add_argument("--seconds", type=float, nargs="+", default=[7.0, 16.7])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = load_checkpoint(options.checkpoint)
    runs: dict[str, Run] = {"NVIDIA's, eager": nvidia_model(options.clone, checkpoint)}
    for path in options.onnx:
        runs[path.name] = our_model(path, options.threads)
    columns = {seconds: measure(runs, checkpoint, seconds, options.rounds) for seconds in options.seconds}
    print(f"{describe_machine()}, torch {torch.__version__}; {options.threads} threads, {options.rounds} rounds\n")
    print(f"| model | {' | '.join(f'{seconds:g} s' for seconds in columns)} | largest difference |")
    print(f"|---|{'---|' * (len(columns) + 1)}")
    for name in runs:
        cells = [cell(times[name], next(iter(times.values()))) for times, _ in columns.values()]
        print(f"| {name} | {' | '.join(cells)} | {max(off[name] for _, off in columns.values()):.1e} |")


def nvidia_model(clone: Path, checkpoint: Checkpoint) -> Run:
    """NVIDIA's network in evaluation mode, masks as its config says."""
    folder = clone / "PyTorch" / "SpeechRecognition" / "Jasper"
    if not (folder / "jasper" / "model.py").is_file():
        sys.exit(f"{clone}: holds no {folder.relative_to(clone)}/jasper/model.py; clone NVIDIA/DeepLearningExamples")
    sys.path.insert(0, str(folder))
    from jasper.model import Jasper  # type: ignore[import-not-found]

    parts: dict[str, Any] = checkpoint.config.raw["jasper"]
    encoder = parts["encoder"] | {"blocks": [dict(block) for block in parts["encoder"]["blocks"]]}
    net = Jasper(encoder, parts["decoder"] | {"n_classes": checkpoint.config.n_classes}).eval()
    tensors = {name: torch.from_numpy(values) for name, values in checkpoint.weights.items()}
    missing, unexpected = net.load_state_dict(tensors, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        sys.exit(f"{clone}: its model does not take these weights (missing {missing}, unexpected {unexpected})")

    def run(feats: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            log_probs, _ = net.infer(torch.from_numpy(feats), torch.tensor([feats.shape[2]]))
        return log_probs.numpy()  # type: ignore[no-any-return]

    return run


def our_model(path: Path, threads: int) -> Run:
    """An exported graph in onnxruntime."""
    backend = open_backend("ort", path, threads=threads)
    return lambda feats: backend.run(feats, np.array([feats.shape[2]], np.int32))[0]


def measure(
    runs: dict[str, Run], checkpoint: Checkpoint, seconds: float, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each run, largest difference from the first model), by model."""
    frames = round(seconds / checkpoint.config.features.window_stride)
    feats = np.random.default_rng(frames).standard_normal((1, checkpoint.config.in_feats, frames)).astype(np.float32)
    outputs = {name: run(feats) for name, run in runs.items()}
    expected = next(iter(outputs.values()))
    off = {name: float(np.abs(found[:, : expected.shape[1]] - expected).max()) for name, found in outputs.items()}
    if wrong := [f"{name} by {value:.2g}" for name, value in off.items() if not value <= TOLERANCE]:
        sys.exit(f"{seconds:g} s: log-probs differ from NVIDIA's: {', '.join(wrong)}; nothing was timed")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(feats)
            times[name].append(time.perf_counter() - started)
    return times, off


def cell(times: Sequence[float], first: Sequence[float]) -> str:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return f"{median:.3f} ({low:.3f} to {high:.3f}), {statistics.median(first) / median:.2f}x"


if __name__ == "__main__":
    main()
