"""`jasper quantize`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jasper_asr.cli.common import check_writable, complain, given_config, note, progress
from jasper_asr.errors import UsageError

if TYPE_CHECKING:
    from jasper_asr.data.manifest import Utterance
    from jasper_asr.deploy.quantize import QuantizationReport

GATE_FAILED = 7


@click.command()
@click.argument("model")
@click.option(
    "--calibration",
    required=True,
    type=click.Path(path_type=Path),
    help="Manifest of real speech: up to 200 of its utterances set the scales of int8.",
)
@click.option(
    "--precision",
    type=click.Choice(["int8", "bf16", "fp16"]),
    default="int8",
    show_default=True,
    help="int8: integer convolutions. bf16, fp16: weights stored in 16 bits, arithmetic as the engine likes.",
)
@click.option("--output", "out", type=click.Path(path_type=Path), help="Default: MODEL-PRECISION.onnx.")
@click.option("--dev", type=click.Path(path_type=Path), help="Manifest to measure on (default: that of --calibration).")
@click.option("--max-wer-increase", type=float, help="Points; above it nothing is written, exit 7.  [1.0]")
@click.option("--audio-root", type=click.Path(path_type=Path), help="Where the manifests' paths start.")
@click.option("--allow-outside-root", is_flag=True, help="Accept manifest paths that leave the root.")
@click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime; its own choice by default.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="Write what was measured, JSON.")
def quantize(
    model: str,
    calibration: Path,
    precision: str,
    out: Path | None,
    dev: Path | None,
    max_wer_increase: float | None,
    audio_root: Path | None,
    allow_outside_root: bool,
    config: Path | None,
    weights: str,
    threads: int | None,
    report_path: Path | None,
) -> int:
    """Write a model as an .onnx of lower precision, unless its word error rate rises too much.

    MODEL is a built-in name, a checkpoint or a float .onnx. For bf16 arithmetic on a machine that has it, run the
    float model with --backend openvino --precision bf16; here bf16 says how weights are stored.
    """
    out = out or Path(model).with_name(f"{Path(model).stem}-{precision}.onnx")
    if out.suffix != ".onnx":
        raise UsageError(f"{out}: the output must end in .onnx")
    if max_wer_increase is not None and not (math.isfinite(max_wer_increase) and max_wer_increase >= 0):
        raise UsageError(f"--max-wer-increase {max_wer_increase:g}: must be percentage points of at least 0")
    for path in (out, report_path):
        check_writable(path)
    rows, dev_rows = (_read(path, audio_root, allow_outside_root) if path else None for path in (calibration, dev))
    if max_wer_increase is not None and not any(row.text is not None for row in dev_rows or rows or ()):
        raise UsageError(f"{dev or calibration}: has no transcripts, which --max-wer-increase needs; leave it out")
    from jasper_asr.deploy import quantize as quantizing

    with progress("quantising", None, "utterances") as advance:
        report = quantizing.quantize(
            model,
            out,
            rows or (),
            precision=precision,
            dev=dev_rows,
            max_wer_increase=quantizing.MAX_WER_INCREASE if max_wer_increase is None else max_wer_increase,
            config=given_config(config),
            weights=weights,
            threads=threads,
            progress=lambda done, total: advance(0, done, total),
        )
    if report_path:
        quantizing.write_report(report_path, report)
    return _outcome(report)


def _read(manifest: Path, root: Path | None, outside: bool) -> "list[Utterance]":
    from jasper_asr.data.manifest import read_manifest

    return read_manifest(manifest, audio_root=root, allow_outside_root=outside, labelled=False)


def _outcome(report: "QuantizationReport") -> int:
    for error in report.errors:
        complain(error)
    note(_summary(report))
    if report.refused:
        complain(
            f"{report.output}: not written, WER rises from {report.wer_before:.2f} to {report.wer_after:.2f} %, more "
            f"than {report.max_wer_increase:g} points; calibrate on more speech like that of use, or allow more with "
            "--max-wer-increase"
        )
        return GATE_FAILED
    return 1 if report.errors else 0


def _summary(report: "QuantizationReport") -> str:
    wer = f"WER {report.wer_before:.2f} -> {report.wer_after:.2f} %, " if report.words else "no transcripts, no WER; "
    return (
        f"{report.output}: {report.precision} in {report.quantized} of {report.convolutions} convolutions, "
        f"{report.bytes_before / 1e6:,.1f} -> {report.bytes_after / 1e6:,.1f} MB; {wer}as before are "
        f"{report.frame_agreement:.2f} % of frames and {report.transcript_agreement:.1f} % of transcripts "
        f"({report.utterances} utterances)"
    )
