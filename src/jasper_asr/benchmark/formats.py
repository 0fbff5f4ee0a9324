"""A benchmark's results as others print them, as a Markdown table, and as a chart."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from jasper_asr.benchmark.report import BenchReport, Comparison, Copies, Rounds
from jasper_asr.errors import UsageError
from jasper_asr.files import write_whole


def pureinfer_summary(report: BenchReport, path: Path) -> str:
    """What the guide's `benchmark.x86_64` shows. [I] Like its successor's, the figures leave copies out."""
    batch, throughput, latency = _pure(report)
    return (
        f"[INFO] Dataset number: {len(batch.values) - 1} finished cost {_six(1e3 * batch.values[-1])}ms\n"
        f"[INFO] PureInfer result saved in {_relative(path)}\n"
        "-----------------PureInfer Performance Summary------------------\n"
        f"[INFO] ave_throughputRate: {throughput}samples/s, ave_latency: {latency}ms\n"
        "----------------------------------------------------------------"
    )


def write_pureinfer(report: BenchReport, folder: Path) -> Path:
    """`result/PureInfer_perf_of_<stem>_in_device_<id>.txt` under `folder`; returns its path. Raises StorageError."""
    _, throughput, latency = _pure(report)
    line = f"ave_throughputRate = {throughput}samples/s, ave_latency = {latency}ms\n"
    path = folder / "result" / f"PureInfer_perf_of_{Path(report.model).stem}_in_device_{report.device}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [line.encode()])
    return path


def ais_bench_summary(report: BenchReport) -> str:
    """What `ais_bench` shows; its throughput leaves copies out."""
    summary = ais_bench_dict(report)
    times = summary["NPU_compute_time"]
    shown = ", ".join(f"{key} = {times[key]}" for key in times if key != "count")
    return (
        "[INFO] -----------------Performance Summary------------------\n"
        f"[INFO] NPU_compute_time (ms): {shown}\n"
        f"[INFO] throughput 1000*batchsize.mean({report.batch_size})/NPU_compute_time.mean({times['mean']}): "
        f"{summary['throughput']}\n"
        "[INFO] ------------------------------------------------------"
    )


def write_ais_bench(report: BenchReport, folder: Path) -> Path:
    """`<time>_summary.json` in `folder`, named by this moment; returns its path. Raises StorageError."""
    path = folder / f"{time.strftime('%Y_%m_%d-%H_%M_%S')}_summary.json"
    write_whole(path, [json.dumps(ais_bench_dict(report)).encode()])
    return path


def ais_bench_dict(report: BenchReport) -> dict[str, Any]:
    """The content of `ais_bench`'s summary file, in milliseconds.

    A backend that cannot tell the copies has all its time in NPU_compute_time, and zeros in the two latencies.
    """
    rounds = len(report.latency.values)
    nothing = Rounds((0.0,) * rounds)
    copies = report.copies or Copies(nothing, report.latency, nothing)
    times = {
        name: {
            "min": 1e3 * part.min,
            "max": 1e3 * part.max,
            "mean": 1e3 * part.mean,
            "median": 1e3 * part.median,
            "percentile(99%)": 1e3 * part.percentile(99),
            "count": rounds,
        }
        for name, part in (
            ("NPU_compute_time", copies.compute),
            ("H2D_latency", copies.h2d),
            ("D2H_latency", copies.d2h),
        )
    }
    return {**times, "throughput": 1000 * report.batch_size / times["NPU_compute_time"]["mean"]}


def markdown_table(comparison: Comparison) -> str:
    """A comparison as a Markdown table, with a line above that says what was measured where."""
    head = (
        f"{comparison.model}, batch {comparison.batch_size}, {comparison.seconds:g} s of audio an utterance; "
        f"{comparison.rounds} rounds in alternation; {comparison.macs / 1e9:.3g} GMAC an utterance (direct), numpy's "
        f"matrix product {comparison.gemm_peak / 1e9:.3g} GMAC/s; {comparison.machine}"
    )
    table = [
        "| engine | median | p10 to p90 | speed | p10 to p90 | times real time | of GEMM peak | off reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in comparison.rows:
        low, middle, high = (1e3 * row.latency.percentile(percent) for percent in (10, 50, 90))
        slow, speed, fast = (row.speed.percentile(percent) for percent in (10, 50, 90))
        real_time = comparison.batch_size * comparison.seconds / row.latency.median
        off = "not compared" if row.check.difference is None else f"{row.check.difference:.1e}"
        table.append(
            f"| {row.engine} | {_three(middle)} ms | {_three(low)} to {_three(high)} ms | {speed:.2f}x | "
            f"{slow:.2f} to {fast:.2f} | {_three(real_time)} | {row.peak:.0%} | {off} |"
        )
    return "\n".join([head, "", *table])


def require_matplotlib(path: Path) -> None:
    """Raises UsageError if `write_chart` could not work: before the measuring, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{path}: a chart needs matplotlib; pip install 'jasper-asr[plot]'") from error


def write_chart(path: Path, comparison: Comparison) -> None:
    """Medians as bars with p10 to p90, as PNG. Raises UsageError without matplotlib, StorageError."""
    require_matplotlib(path)
    from matplotlib.figure import Figure

    rows = comparison.rows[::-1]  # bars grow upwards, tables downwards
    medians = [1e3 * row.latency.median for row in rows]
    reach = [[1e3 * abs(row.latency.percentile(percent) - row.latency.median) for row in rows] for percent in (10, 90)]
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([row.engine for row in rows], medians, xerr=reach, capsize=3)
    for place, row in enumerate(rows):
        label = f"  {_three(medians[place])} ms, {row.speed.median:.2f}x"
        axes.text(1e3 * row.latency.percentile(90), place, label, va="center")
    axes.margins(x=0.3)  # room for the labels
    axes.set_xlabel("ms, median and p10 to p90")
    axes.set_title(f"{comparison.model}, batch {comparison.batch_size}, {comparison.seconds:g} s", loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, [buffer.getvalue()])


def _pure(report: BenchReport) -> tuple[Rounds, str, str]:
    """Times of whole batches, samples a second, milliseconds a sample."""
    batch = report.copies.compute if report.copies else report.latency
    return batch, _six(report.batch_size / batch.mean), _six(1e3 * batch.mean / report.batch_size)


def _relative(path: Path) -> str:
    return str(path) if path.is_absolute() else f"./{path}"


def _six(value: float) -> str:
    """Six significant digits as C++ streams give them, but never an exponent, which scripts do not expect."""
    return np.format_float_positional(value, precision=6, fractional=False, trim="-")


def _three(value: float) -> str:
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")
