"""Speed of a model whose output has first been shown to be right: latency, throughput, engines side by side.

What is timed is what was checked: a shipped clip of speech, repeated to the length asked for, in every row of the
batch. A failed check raises ModelError, and then there are no figures: a crash is never a speed.

`report` has what goes in and out, `subject` the checking and timing of one engine, `formats` text, files and a chart.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jasper_asr.benchmark.report import BenchReport, Comparison, Engine, Rounds, Row, Workload
from jasper_asr.benchmark.subject import Subject, prepare
from jasper_asr.config import ModelConfig
from jasper_asr.errors import UsageError
from jasper_asr.model.checkpoint import block_layers

_SETTLE = 0.25
"""Seconds between engines in a comparison: idle threads of the last one may still spin (some runtimes: 0.2 s)."""


def benchmark(
    model: str | os.PathLike[str],
    engine: Engine | None = None,
    workload: Workload | None = None,
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    threads: int | None = None,
    device: int | None = None,
    check_against: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> BenchReport:
    """Check `model` (as in `transcribe.load`), then time it; an .om always runs on `acl`.

    `check_against` is the .onnx that gives the right log_probs; without it that is the float32 graph with direct
    convolutions for a checkpoint, the ONNX beside an .om, the same file in onnxruntime for other backends.
    `progress` is called after every timed round. Raises UsageError, StorageError, ConfigError, or ModelError when
    the model fails or its output is wrong.
    """
    workload = workload or Workload()
    engine = Engine("acl") if Path(model).suffix == ".om" else engine or Engine()
    source: dict[str, Any] = {"config": config, "weights": weights, "check_against": check_against}
    with ExitStack() as stack:
        (subject,) = prepare(model, [engine], workload, stack, **source, threads=threads, device=device)
        for _ in range(workload.rounds):
            subject.time()
            if progress:
                progress()
        subject.check_unchanged()
        latency, copies = subject.latencies()
        return BenchReport(
            model=subject.name,
            engine=str(engine),
            device=device or 0,
            batch_size=subject.batch_size,
            frames=subject.frames,
            padded_frames=subject.padded_frames,
            seconds=subject.frames * subject.config.features.window_stride,
            warmup=workload.warmup,
            check=subject.checked,
            latency=latency,
            copies=copies,
        )


def compare(
    model: str | os.PathLike[str],
    engines: Sequence[Engine],
    workload: Workload | None = None,
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    threads: int | None = None,
    check_against: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> Comparison:
    """Check each engine, then time all of them in alternation, A B A B, so that a slow minute hits all alike.

    All engines are open at once. Arguments and errors as in `benchmark`; `progress` is called after each timed run.
    """
    workload = workload or Workload()
    if not engines or len(set(engines)) < len(engines):
        raise UsageError("compare: name at least one engine, and each only once")
    if Path(model).suffix == ".om":
        raise UsageError(f"{model}: an .om runs on one engine only; give a checkpoint or an .onnx")
    source: dict[str, Any] = {"config": config, "weights": weights, "check_against": check_against}
    with ExitStack() as stack:
        subjects = prepare(model, engines, workload, stack, **source, threads=threads, device=None)
        peak = gemm_peak()
        for _ in range(workload.rounds):
            for subject in subjects:
                time.sleep(_SETTLE if len(subjects) > 1 else 0)
                subject.time()
                if progress:
                    progress()
        for subject in subjects:
            subject.check_unchanged()
        return _comparison(subjects, workload.rounds, max(peak, gemm_peak()))


def _comparison(subjects: list[Subject], rounds: int, peak: float) -> Comparison:
    first = subjects[0]
    count = macs(first.config, first.frames)
    rows = []
    for subject in subjects:
        speed = tuple(a / b for a, b in zip(first.seconds, subject.seconds, strict=True))
        latency = Rounds(tuple(subject.seconds))
        share = subject.batch_size * count / latency.median / peak
        rows.append(Row(str(subject.engine), latency, Rounds(speed), share, subject.checked))
    seconds = first.frames * first.config.features.window_stride
    return Comparison(
        first.name, first.batch_size, first.frames, seconds, rounds, count, peak, describe_machine(), tuple(rows)
    )


def macs(config: ModelConfig, frames: int) -> int:
    """Multiply-accumulates of the direct convolutions for one utterance of `frames` feature frames.

    For each convolution: output frames x output channels x input channels (of its group) x kernel size.
    """
    total, length = 0, frames
    for layers in block_layers(config):
        for residual in layers.residuals:  # a block with residuals has no stride: same length in and out
            total += length * prod(residual.shape)
        for repeat in layers.repeats:
            for conv in repeat:
                length = (length + 2 * conv.padding - conv.dilation * (conv.shape[2] - 1) - 1) // conv.stride + 1
                total += length * prod(conv.shape)
    return total + length * config.n_classes * config.blocks[-1].filters


def gemm_peak(size: int = 1536, rounds: int = 7) -> float:
    """MACs a second of numpy's float32 matrix product at its best; numpy uses the threads that its BLAS chooses."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    out = left @ right
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        np.matmul(left, right, out=out)
        best = min(best, time.perf_counter() - started)
    return size**3 / best


def describe_machine() -> str:
    """Processor, number of CPUs that this process may use, and the versions that matter."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    parts = [processor, f"{_usable_cpus()} CPUs", f"Python {platform.python_version()}"]
    for package in ("numpy", "onnxruntime", "openvino", "torch"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
