"""`jasper benchmark`: how fast a model is, and which engine is faster."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jasper_asr.cli.common import check_writable, given_config, note, progress
from jasper_asr.errors import UsageError

if TYPE_CHECKING:
    from jasper_asr.benchmark.report import BenchReport, Engine, Workload

FILES = ("pureinfer", "ais-bench")


@click.command()
@click.argument("model", default="mini")
@click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True)
@click.option("--backend", help="backend[:precision][:convolution]; an .om always runs on acl.  [default: ort]")
@click.option("--batch-size", type=click.IntRange(1), help="Utterances in a run (default: the model's, else 1).")
@click.option("--seconds", type=float, help="Audio in an utterance (default: what the model is made for, else 40).")
@click.option("--frames", type=click.IntRange(1), help="The same in feature frames.")
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Rounds that are not timed.")
@click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="Number of the NPU.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime; its own choice by default.")
@click.option("--chips", type=click.IntRange(1), default=1, help="Also say what a card of so many chips does.")
@click.option("--check-against", type=click.Path(path_type=Path), help="ONNX whose log_probs are right.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["text", "json", *FILES]),
    default="text",
    show_default=True,
    help="The last two print and write what the Ascend tools of these names do.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the file of these two (default: here).")
@click.option(
    "--compare",
    multiple=True,
    metavar="ENGINE",
    help="Repeatable: time these in alternation, each a backend[:precision][:convolution], or torch; prints Markdown.",
)
@click.option("--chart", type=click.Path(path_type=Path), help="With --compare: write a PNG.")
def benchmark(
    model: str,
    config: Path | None,
    backend: str | None,
    device: int,
    chips: int,
    layout: str,
    output: Path | None,
    compare: tuple[str, ...],
    chart: Path | None,
    **options: Any,
) -> None:
    """Latency and throughput of a model, after a check that its output is right.

    Times what the backend does with a batch: no decoding of audio, no features, no text. If the check fails, the exit
    code is 4 and there are no figures.
    """
    from jasper_asr.benchmark.report import Engine, Workload

    sizes = ("batch_size", "frames", "seconds", "rounds", "warmup")
    workload = Workload(**{name: options.pop(name) for name in sizes})
    options["config"] = given_config(config)
    if compare:
        if layout in FILES or output or backend or device or chips > 1:
            raise UsageError("--compare goes with --format text or json, and without --backend, --device, --chips")
        _compare(model, [Engine.parse(text) for text in compare], workload, layout, chart, options)
        return
    if chart:
        raise UsageError("--chart needs --compare")
    if output and layout not in FILES:
        raise UsageError(f"--output is for --format {' and '.join(FILES)}")
    _benchmark(model, Engine.parse(backend or "ort"), workload, layout, output, chips, options | {"device": device})


def _benchmark(
    model: str,
    engine: "Engine",
    workload: "Workload",
    layout: str,
    output: Path | None,
    chips: int,
    options: dict[str, Any],
) -> None:
    from jasper_asr import benchmark as benchmarks
    from jasper_asr.benchmark import formats

    folder = output or Path()
    if layout in FILES:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "summary")
    with progress("benchmarking", workload.rounds, "rounds") as advance:
        report = benchmarks.benchmark(model, engine, workload, progress=lambda: advance(1), **options)
    if layout == "json":
        card = {"chips": chips, "card_samples_per_second": chips * report.samples_per_second}
        click.echo(json.dumps(report.as_dict() | card, ensure_ascii=False, indent=1))
    elif layout == "pureinfer":
        click.echo(formats.pureinfer_summary(report, formats.write_pureinfer(report, folder)))
    elif layout == "ais-bench":
        path = formats.write_ais_bench(report, folder)
        click.echo(formats.ais_bench_summary(report))
        note(f"{path}: written")
    else:
        click.echo(_text(report, chips))
    if layout in FILES:
        for line in _rates(report, chips):
            note(line)


def _compare(
    model: str,
    engines: "list[Engine]",
    workload: "Workload",
    layout: str,
    chart: Path | None,
    options: dict[str, Any],
) -> None:
    from jasper_asr import benchmark as benchmarks
    from jasper_asr.benchmark import formats

    check_writable(chart)
    if chart:
        formats.require_matplotlib(chart)
    with progress("comparing", workload.rounds * len(engines), "runs") as advance:
        comparison = benchmarks.compare(model, engines, workload, progress=lambda: advance(1), **options)
    if chart:
        formats.write_chart(chart, comparison)
    if layout == "json":
        click.echo(json.dumps(comparison.as_dict(), ensure_ascii=False, indent=1))
    else:
        click.echo(formats.markdown_table(comparison))


def _text(report: "BenchReport", chips: int) -> str:
    padded = f", padded to {report.padded_frames}" if report.padded_frames > report.frames else ""
    batch = f"{report.batch_size} x {report.seconds:g} s of audio ({report.frames} frames{padded})"
    lines = [
        ("model", f"{report.model} on {report.engine}, device {report.device}"),
        ("batch", batch),
        ("check", _check(report)),
        ("rounds", f"{len(report.latency.values)} after {report.warmup} to warm up"),
        ("latency", f"{_spread(report.latency.as_dict())} ms a batch"),
    ]
    if report.copies:
        parts = {"host to device": report.copies.h2d, "computing": report.copies.compute}
        parts["device to host"] = report.copies.d2h
        lines += [(f"  {name}", f"{_spread(part.as_dict())} ms") for name, part in parts.items()]
    lines += [("throughput", line) for line in _rates(report, chips)]
    return "\n".join(f"{name:<16}  {value}" for name, value in lines)


def _check(report: "BenchReport") -> str:
    check = report.check
    right = "repeatable, normalised, equal in all rows"
    if check.reference is None:
        return f"{right}; nothing to compare with: give --check-against an .onnx"
    off = f"within {check.difference:.1e} of" if check.difference else "equal to"
    return f"{right}, {off} {check.reference}"


def _spread(seconds: dict[str, float]) -> str:
    names = ("min", "mean", "median", "p90", "p99", "max")
    return ", ".join(f"{name} {1e3 * seconds[name]:.4g}" for name in names)


def _rates(report: "BenchReport", chips: int) -> list[str]:
    """Throughput with copies, without them where that is known, and of a card."""
    rate, without = report.samples_per_second, report.compute_samples_per_second
    lines = [f"{rate:.6g} samples/s, {rate * report.seconds:.4g} audio-seconds/s, copies included"]
    if without is None:
        lines[0] += " where there are any"
    else:
        lines.append(f"{without:.6g} samples/s, {without * report.seconds:.4g} audio-seconds/s, copies left out")
    if chips > 1:
        lines.append(f"{chips * rate:.6g} samples/s on a card: {chips} chips x {rate:.6g}, copies included")
    return lines
