"""`jasper evaluate` and `demo`: what scores a model on speech."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jasper_asr.cli.common import check_writable, complain, load_model, model_options, note, progress, read_manifests
from jasper_asr.errors import UsageError

if TYPE_CHECKING:
    from jasper_asr.calibrate import CalibrationReport
    from jasper_asr.evaluate import ErrorReport, Gate

GATE_FAILED = 7
MINI = Path(__file__).parents[1] / "models" / "mini"


@click.command()
@click.argument("manifest", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options
@click.option(
    "--audio-root",
    type=click.Path(path_type=Path),
    help="Where the manifest's paths start (default: its folder).",
)
@click.option("--allow-outside-root", is_flag=True, help="Accept manifest paths that leave the root.")
@click.option("--max-duration", type=float, help="Skip utterances longer than this many seconds.")
@click.option(
    "--pad-to-max-duration",
    is_flag=True,
    help="Pad every utterance to --max-duration, as the Ascend guide does.",
)
@click.option(
    "--save-predictions",
    type=click.Path(path_type=Path),
    help="Write one hypothesis a line, in manifest order.",
)
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path),
    help="Write totals and one row an utterance, JSON.",
)
@click.option("--calibration", is_flag=True, help="Also say how far the words' confidences can be trusted.")
@click.option(
    "--reference-wer",
    type=float,
    help="Gate: fail (exit 7) unless WER stays within --tolerance of this percentage.",
)
@click.option("--tolerance", type=float, show_default="0.01", help="Relative: 0.01 is one percent of it.")
def evaluate(
    manifest: tuple[Path, ...],
    audio_root: Path | None,
    allow_outside_root: bool,
    max_duration: float | None,
    pad_to_max_duration: bool,
    save_predictions: Path | None,
    report_path: Path | None,
    calibration: bool,
    reference_wer: float | None,
    tolerance: float | None,
    **options: Any,
) -> int:
    """Word error rate of a model on manifests (NVIDIA's JSON or NeMo's JSON lines), with a gate."""
    from jasper_asr import evaluate as evaluation

    if pad_to_max_duration and max_duration is None:
        raise UsageError("--pad-to-max-duration needs --max-duration")
    if max_duration is not None and not (math.isfinite(max_duration) and max_duration > 0):
        raise UsageError(f"--max-duration {max_duration:g}: must be a number of seconds above 0")
    gate = _gate(reference_wer, tolerance)
    for path in (save_predictions, report_path):
        check_writable(path)
    rows = read_manifests(manifest, audio_root, allow_outside_root)
    pad_to = max_duration if pad_to_max_duration else None
    with (
        load_model(options | {"words": calibration}, pad_to=pad_to) as transcriber,
        progress("evaluating", len(rows), "utterances") as advance,
    ):
        report = evaluation.evaluate(transcriber, rows, max_duration=max_duration, progress=lambda _seconds: advance(1))
    for item in report.items:
        if item.error:
            complain(item.error)
    click.echo(f"eval_wer: {report.wer:.2f}")
    note(_summary(report))
    if report.calibration:
        note(_trust(report.calibration))
    if save_predictions:
        evaluation.write_predictions(save_predictions, report)
    if report_path:
        evaluation.write_report(report_path, report)
    return _verdict(report, gate)


@click.command()
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
def demo(batch_size: int) -> int:
    """Run the main job on the embedded model and the shipped clips: export, transcribe, score, check the gate.

    The gate compares with the WER in the model card: it proves that this machine computes what the model's makers saw.
    """
    import tempfile

    from jasper_asr.data.manifest import read_manifest
    from jasper_asr.evaluate import Gate
    from jasper_asr.evaluate import evaluate as run_evaluation
    from jasper_asr.model.export import export_onnx

    gate = Gate(**json.loads((MINI / "gate.json").read_text()))
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "mini.onnx"
        summary = export_onnx("mini", onnx)
        click.echo(f"1. Graph     {summary}")
        options = {"model": str(onnx), "backend": "ort", "batch_size": batch_size, "greedy": True}
        rows = read_manifest(MINI / "clips" / "manifest.jsonl")
        click.echo(f"2. Clips     {len(rows)}, transcribed from that graph, best path:\n")
        with load_model(options) as transcriber, progress("transcribing", len(rows), "clips") as advance:
            report = run_evaluation(transcriber, rows, progress=lambda _seconds: advance(1))
        with load_model(options | {"lm": "mini", "greedy": False}) as transcriber:
            searched = run_evaluation(transcriber, rows)
    for row, item in zip(rows, report.items, strict=True):
        score = f"WER {item.wer:.0f} %" if item.wer is not None else "failed"
        click.echo(f"   {item.audio_filepath} ({row.speaker}, {item.duration:.1f} s, {score})")
        click.echo(f"     reference   {item.reference}")
        click.echo(f"     hypothesis  {item.hypothesis if item.error is None else item.error}")
    click.echo(f"\n3. Score     {_summary(report)}")
    click.echo(f"             with beam search and the language model (--lm mini): WER {searched.wer:.2f} %")
    limit = f"the model card's {gate.reference_wer:g} % + {gate.tolerance:.0%} of it = {gate.limit:.4g} %"
    click.echo(f"4. Gate      WER at most {limit}: {'holds' if gate.holds(report) else 'NOT MET'}")
    return 0 if gate.holds(report) else GATE_FAILED


def _summary(report: "ErrorReport") -> str:
    return (
        f"WER {report.wer:.2f} %, CER {report.cer:.2f} %: {report.errors} errors in {report.words} words "
        f"({report.substitutions} substitutions, {report.deletions} deletions, {report.insertions} insertions); "
        f"{report.utterances} utterances, {report.failed} failed, {report.skipped} skipped; "
        f"{report.audio_seconds:.1f} s of audio in {report.seconds:.2f} s, real-time factor {report.rtf:.4f}"
    )


def _trust(calibration: "CalibrationReport") -> str:
    bins = ", ".join(
        f"{part.low:.1f}-{part.high:.1f}: {part.accuracy:.2f} of {part.words}"
        for part in calibration.bins
        if part.words
    )
    return f"expected calibration error {calibration.ece:.3f} over {calibration.words} words; right are at {bins}"


def _gate(reference_wer: float | None, tolerance: float | None) -> "Gate | None":
    from jasper_asr.evaluate import Gate

    if reference_wer is None:
        if tolerance is not None:
            raise UsageError("--tolerance needs --reference-wer")
        return None
    return Gate(reference_wer) if tolerance is None else Gate(reference_wer, tolerance)


def _verdict(report: "ErrorReport", gate: "Gate | None") -> int:
    if gate is not None:
        limit = f"{gate.reference_wer:g} % + {gate.tolerance:.1%} = {gate.limit:.4g} %"
        if not gate.holds(report):
            cause = (
                f"{report.failed} utterances failed" if report.failed else f"WER {report.wer:.4g} % is above {limit}"
            )
            complain(f"gate not met: {cause}")
            return GATE_FAILED
        note(f"gate holds: WER {report.wer:.2f} % is within {limit}")
    return 1 if report.failed else 0
