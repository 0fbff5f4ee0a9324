"""`jasper export`, `compile` and `info`: what handles a model as a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jasper_asr.cli.common import Variadic, check_writable, given_config, note, read_manifests
from jasper_asr.errors import ManifestError, UsageError

if TYPE_CHECKING:
    from jasper_asr.deploy.buckets import Padding

OPSETS = (11, 21)
"""What model/graph.py writes; stated again because importing that takes longer than a wrong number deserves."""


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), help="Fix the batch size (default: any).")
@click.option("--frames", type=click.IntRange(1), help="Fix the number of feature frames (default: any).")
@click.option("--opset", type=click.IntRange(*OPSETS), help="Default: 13, for --target ascend 11.")
@click.option("--target", type=click.Choice(["onnx", "ascend"]), default="onnx", show_default=True)
@click.option("--max-frames", type=click.IntRange(1), help="Longest input of --target ascend without --frames. [4000]")
@click.option(
    "--convolution",
    type=click.Choice(["auto", "direct", "spectral"]),
    help="spectral: small transforms as matrix products, faster for large models. [auto, for --target ascend direct]",
)
@click.option("--exact-lengths", is_flag=True, help="Leave the masks out: every utterance must fill all frames.")
@click.option("--half", is_flag=True, help="Store .safetensors weights as float16.")
def export(
    checkpoint: Path, out: Path, config: Path | None, weights: str, target: str, half: bool, **shape: Any
) -> None:
    """Write a checkpoint (.pt, .nemo, .safetensors or a built-in name) as a self-describing .onnx, or as .safetensors.

    --target ascend writes only what Ascend's compiler takes; see jasper compile.
    """
    if out.suffix not in (".onnx", ".safetensors"):
        raise UsageError(f"{out}: the output must end in .onnx or .safetensors")
    if half and out.suffix == ".onnx":
        raise UsageError(f"{out}: --half is for .safetensors only")
    exact_lengths = shape.pop("exact_lengths")
    shape = {name: value for name, value in shape.items() if value is not None}
    if target == "ascend" and (exact_lengths or out.suffix != ".onnx"):
        raise UsageError("--target ascend writes .onnx with masks; leave out --exact-lengths")
    if target == "ascend" and shape.pop("convolution", "direct") == "spectral":
        raise UsageError("--target ascend takes direct convolutions only; leave out --convolution")
    if out.suffix == ".safetensors" and "convolution" in shape:
        raise UsageError(f"{out}: --convolution is for .onnx only")
    if target == "onnx" and "max_frames" in shape:
        raise UsageError("--max-frames is for --target ascend")
    check_writable(out)
    source: dict[str, Any] = {"config": given_config(config), "weights": weights}
    if target == "ascend":
        from jasper_asr.deploy import ascend

        sizes: dict[str, Any] = {"batch_size": None, "frames": None} | shape
        summary = ascend.export_for_ascend(checkpoint, out, **source, **sizes)
    else:
        from jasper_asr.model import export as exports

        if out.suffix == ".safetensors":
            summary = exports.export_safetensors(checkpoint, out, **source, half=half)
        else:
            summary = exports.export_onnx(
                checkpoint, out, **source, **{"convolution": "auto"} | shape, masked=not exact_lengths
            )
    note(f"{out}: {summary}")


@click.command("compile", cls=Variadic)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["ascend"]), default="ascend", show_default=True)
@click.option("--soc", required=True, help="Chip, such as Ascend310 or Ascend310P3.")
@click.option("--output", "out", type=click.Path(path_type=Path), help="The .om to write (default: beside the model).")
@click.option("--precision", help="A value of atc's --precision_mode_v2 or --precision_mode.")
@click.option("--keep-fp32", multiple=True, help="Nodes, ONNX ops or Ascend op types to keep in float32.")
@click.option("--gears", help="Sizes of an open dimension: 1,4,8,16 (batch) or 1024,2048,4000 (frames).")
@click.option(
    "--buckets",
    help="Gears in time, by the durations in --manifest: auto, how many (2 to 100), or their frames 1024,2048,4000.",
)
@click.option("--manifest", "manifests", multiple=True, type=click.Path(path_type=Path), help="For --buckets.")
@click.option("--batch-size", type=click.IntRange(1), help="Fix the batch of a model that leaves it open.")
@click.option("--atc", type=click.Path(path_type=Path), help="The compiler (default: on PATH or ASCEND_TOOLKIT_HOME).")
@click.option("--timeout", type=float, default=3600.0, show_default=True, help="Seconds.")
@click.option("--dry-run", is_flag=True, help="Print the atc command and stop.")
def compile_model(
    model: Path,
    target: str,
    gears: str | None,
    buckets: str | None,
    manifests: tuple[Path, ...],
    dry_run: bool,
    **options: Any,
) -> None:
    """Compile an .onnx of `jasper export --target ascend` to an .om for Ascend NPUs, by atc.

    Contract-tested against a double of atc, not yet run with the real one.
    """
    from jasper_asr.deploy import ascend

    if buckets is not None and gears is not None:
        raise UsageError("--buckets and --gears exclude each other")
    if manifests and buckets is None:
        raise UsageError("--manifest is for --buckets")
    ascend.check_soc(options["soc"])
    parsed: Sequence[ascend.Gear] | None = ascend.parse_gears(gears) if gears else None
    if buckets is not None:
        parsed = _bucket_lengths(model, buckets, manifests, options["batch_size"])
    report = ascend.compile_om(
        model, gears=parsed, dry_run=dry_run, progress=lambda line: click.echo(line, err=True), **options
    )
    click.echo(report.shell if dry_run else str(report.om))


def _bucket_lengths(model: Path, buckets: str, manifests: tuple[Path, ...], batch_size: int | None) -> Sequence[int]:
    from jasper_asr.deploy import ascend

    wanted = ascend.parse_buckets(buckets)
    if not manifests:
        if isinstance(wanted, list):
            return wanted
        raise UsageError(f"--buckets {buckets} needs --manifest: the durations to choose the lengths for")
    padding = ascend.plan_buckets(model, _durations(manifests), wanted, batch_size=batch_size)
    note(f"padding: {_padding_line(padding)}")
    return padding.lengths


def _durations(manifests: tuple[Path, ...]) -> list[float]:
    """Seconds of each utterance; where the audio lies does not matter."""
    rows = read_manifests(manifests, None, True)
    missing = next((row for row in rows if row.duration is None), None)
    if missing:
        raise ManifestError(f"{missing.source}: key duration is missing; add it")
    return [row.duration for row in rows if row.duration is not None]


def _padding_line(padding: "Padding") -> str:
    lengths = ", ".join(map(str, padding.lengths))
    with_them = "with the model's gears" if padding.own else "with lengths"
    line = (
        f"{padding.before:.1%} of the computed frames with {padding.utterances:,} utterances at {padding.length}, "
        f"{padding.after:.1%} {with_them} {lengths}"
    )
    if padding.longer:
        line += f"; {padding.longer:,} utterances are longer and go through the network in windows"
    return line


@click.command()
@click.argument("model", default="mini")
@click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True)
@click.option(
    "--manifest",
    "manifests",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Also say how much of the work on these utterances is padding, and with which lengths how much would be.",
)
@click.option("--format", "layout", type=click.Choice(["text", "json"]), default="text", show_default=True)
def info(model: str, config: Path | None, weights: str, manifests: tuple[Path, ...], layout: str) -> None:
    """What a model is: parameters, stride, receptive field, shapes, labels, provenance."""
    if Path(model).suffix == ".om":
        from jasper_asr.backends.acl import describe_om

        facts = describe_om(Path(model))
    else:
        from jasper_asr.model.export import describe

        facts = describe(model, config=given_config(config), weights=weights)
    padding = _model_padding(facts, manifests)
    if layout == "json":
        if padding:
            facts["padding"] = asdict(padding)
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:<{width}}  {_readable(value)}")
    if padding:
        click.echo(f"{'padding':<{width}}  {_padding_line(padding)}")


def _model_padding(facts: dict[str, Any], manifests: tuple[Path, ...]) -> "Padding | None":
    from jasper_asr.deploy.buckets import model_padding

    return model_padding(_durations(manifests), facts) if manifests else None


def _readable(value: object) -> str:
    """A fact as text: grouped digits, lists in brackets, a list of characters as one word."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(part)}" for key, part in value.items())
    if isinstance(value, list) and all(isinstance(part, str) and len(part) == 1 for part in value) and len(value) > 3:
        return "".join(value).replace(" ", "␣")
    return f"[{', '.join(map(_readable, value))}]" if isinstance(value, list) else str(value)
