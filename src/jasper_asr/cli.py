"""The command `jasper`: parse, make one library call, print. The only room that prints.

Results go to stdout; progress, notes and errors go to stderr. Exit codes: 0 ok; 1 finished with failed items; 2 usage;
3 bad data; 4 bad model; 5 file or disk; 6 network or hash; 7 a gate not met; 130 and 143 interrupted.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from jasper_asr._version import __version__
from jasper_asr.errors import JasperError, StorageError, UsageError

if TYPE_CHECKING:
    from jasper_asr.config import ModelConfig
    from jasper_asr.data.manifest import Utterance
    from jasper_asr.evaluate import ErrorReport, Gate
    from jasper_asr.transcribe import BeamOptions

GATE_FAILED = 7
OPSETS = (11, 21)
"""What model/graph.py writes; stated again because importing that takes longer than a wrong number deserves."""


def main() -> NoReturn:
    """Entry point: turns every expected error into one line and an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be text
    try:
        # not command.main(), which answers a broken pipe and Ctrl-C in its own way
        with command.make_context("jasper", sys.argv[1:]) as context:
            code = command.invoke(context)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(error.format_message() + hint, 2)
    except JasperError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader went away, as with `| head`
        _drop_unwritten()
        sys.exit(0)
    except OSError as error:
        _drop_unwritten()
        _fail(f"{error.filename or 'I/O'}: {(error.strerror or str(error)).lower()}", 5)
    except MemoryError:
        _fail("out of memory; use a smaller --batch-size or shorter audio", 5)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; pip install 'jasper-asr[train]'", 2)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(
    no_args_is_help=False,  # a missing command is one line and exit 2, as every wrong use
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="jasper")
def command() -> None:
    """Jasper speech models from checkpoint to deployment: transcribe, evaluate, export, train."""


class _Variadic(click.Command):
    """Repeatable options of such a command also take several values in a row: `--speed 0.9 1.1`, `--train a b`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        repeatable = {
            flag: param.type for param in self.params if getattr(param, "multiple", False) for flag in param.opts
        }
        expanded: list[str] = []
        current = ""
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in repeatable else ""
            elif current and expanded[-1] != current and _converts(repeatable[current], arg):
                expanded.append(current)
            elif expanded and expanded[-1] != current:
                current = ""  # a value of another kind: an argument of the command
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


def _converts(kind: "click.ParamType[Any]", value: str) -> bool:
    try:
        kind.convert(value, None, None)
    except click.BadParameter:
        return False
    return True


def _existing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options shared by the commands that run a model."""
    for option in reversed(
        [
            click.option(
                "--model",
                default="mini",
                show_default=True,
                help="Built-in name, .onnx, .pt or .safetensors.",
            ),
            click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none."),
            click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True),
            click.option("--backend", default="ort", show_default=True, help="Runtime."),
            click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True),
            click.option(
                "--threads", type=click.IntRange(1), help="Threads of the runtime; its own choice by default."
            ),
            click.option("--device", type=click.IntRange(0), help="Number of the NPU, for an .om."),
            click.option("--lm", help="Beam search with this n-gram model: a file (our .lm, ARPA) or `mini`."),
            click.option("--beam-width", type=click.IntRange(1), help="Beam search with so many prefixes. [64]"),
            click.option("--lm-weight", type=float, help="How much the language model counts."),
            click.option("--word-bonus", type=float, help="Added for each word."),
            click.option(
                "--trim-silence/--no-trim-silence",
                default=None,
                help="Cut silent ends (default: the config's).",
            ),
        ]
    ):
        function = option(function)
    return function


@command.command()
@click.argument("audio", nargs=-1, required=True, type=click.Path(path_type=Path))
@_existing
@click.option("--format", "layout", type=click.Choice(["text", "json"]), default="text", show_default=True)
def transcribe(audio: tuple[Path, ...], layout: str, **options: Any) -> int:
    """Transcribe audio files.

    Prints the text; with several files a line `path<TAB>text` each; with --format json an object a line.
    """
    from jasper_asr.transcribe import Failure

    failures: list[JasperError] = []
    with _load(options) as transcriber, _progress("transcribing", len(audio), "files") as advance:
        results = transcriber.transcribe_many(audio, progress=lambda _seconds: advance(1))
        for path, result in zip(audio, results, strict=True):
            if isinstance(result, Failure):
                failures.append(result.error)
                _complain(str(result.error))
            elif layout == "json":
                row = {
                    "audio_filepath": str(path),
                    "duration": round(result.duration, 3),
                    "pred_text": result.text,
                }
                click.echo(json.dumps(row, ensure_ascii=False))
            else:
                click.echo(f"{path}\t{result.text}" if len(audio) > 1 else result.text)
    if len(audio) > 1:
        return 1 if failures else 0
    return failures[0].exit_code if failures else 0


@command.command()
@click.argument("manifest", nargs=-1, required=True, type=click.Path(path_type=Path))
@_existing
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
        _check_writable(path)
    rows = _read_manifests(manifest, audio_root, allow_outside_root)
    pad_to = max_duration if pad_to_max_duration else None
    with (
        _load(options, pad_to=pad_to) as transcriber,
        _progress("evaluating", len(rows), "utterances") as advance,
    ):
        report = evaluation.evaluate(transcriber, rows, max_duration=max_duration, progress=lambda _seconds: advance(1))
    for item in report.items:
        if item.error:
            _complain(item.error)
    click.echo(f"eval_wer: {report.wer:.2f}")
    _note(_summary(report))
    if save_predictions:
        evaluation.write_predictions(save_predictions, report)
    if report_path:
        evaluation.write_report(report_path, report)
    return _verdict(report, gate)


@command.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), help="Fix the batch size (default: any).")
@click.option("--frames", type=click.IntRange(1), help="Fix the number of feature frames (default: any).")
@click.option("--opset", type=click.IntRange(*OPSETS), help="Default: 13, for --target ascend 11.")
@click.option("--target", type=click.Choice(["onnx", "ascend"]), default="onnx", show_default=True)
@click.option("--max-frames", type=click.IntRange(1), help="Longest input of --target ascend without --frames. [4000]")
@click.option("--exact-lengths", is_flag=True, help="Leave the masks out: every utterance must fill all frames.")
@click.option("--half", is_flag=True, help="Store .safetensors weights as float16.")
def export(
    checkpoint: Path, out: Path, config: Path | None, weights: str, target: str, half: bool, **shape: Any
) -> None:
    """Write a checkpoint (.pt, .safetensors or a built-in name) as a self-describing .onnx, or as .safetensors.

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
    if target == "onnx" and "max_frames" in shape:
        raise UsageError("--max-frames is for --target ascend")
    _check_writable(out)
    source: dict[str, Any] = {"config": _config(config), "weights": weights}
    if target == "ascend":
        from jasper_asr.deploy import ascend

        sizes: dict[str, Any] = {"batch_size": None, "frames": None} | shape
        summary = ascend.export_for_ascend(checkpoint, out, **source, **sizes)
    else:
        from jasper_asr.model import export as exports

        if out.suffix == ".safetensors":
            summary = exports.export_safetensors(checkpoint, out, **source, half=half)
        else:
            summary = exports.export_onnx(checkpoint, out, **source, **shape, masked=not exact_lengths)
    _note(f"{out}: {summary}")


@command.command("compile", cls=_Variadic)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["ascend"]), default="ascend", show_default=True)
@click.option("--soc", required=True, help="Chip, such as Ascend310 or Ascend310P3.")
@click.option("--output", "out", type=click.Path(path_type=Path), help="The .om to write (default: beside the model).")
@click.option("--precision", help="A value of atc's --precision_mode_v2 or --precision_mode.")
@click.option("--keep-fp32", multiple=True, help="Nodes, ONNX ops or Ascend op types to keep in float32.")
@click.option("--gears", help="Sizes of an open dimension: 1,4,8,16 (batch) or 1024,2048,4000 (frames).")
@click.option("--atc", type=click.Path(path_type=Path), help="The compiler (default: on PATH or ASCEND_TOOLKIT_HOME).")
@click.option("--timeout", type=float, default=3600.0, show_default=True, help="Seconds.")
@click.option("--dry-run", is_flag=True, help="Print the atc command and stop.")
def compile_model(model: Path, target: str, gears: str | None, dry_run: bool, **options: Any) -> None:
    """Compile an .onnx of `jasper export --target ascend` to an .om for Ascend NPUs, by atc.

    Contract-tested against a double of atc, not yet run with the real one.
    """
    from jasper_asr.deploy import ascend

    parsed = ascend.parse_gears(gears) if gears else None
    report = ascend.compile_om(
        model, gears=parsed, dry_run=dry_run, progress=lambda line: click.echo(line, err=True), **options
    )
    click.echo(report.shell if dry_run else str(report.om))


@command.command()
@click.argument("model", default="mini")
@click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True)
@click.option("--format", "layout", type=click.Choice(["text", "json"]), default="text", show_default=True)
def info(model: str, config: Path | None, weights: str, layout: str) -> None:
    """What a model is: parameters, stride, receptive field, shapes, labels, provenance."""
    if Path(model).suffix == ".om":
        from jasper_asr.backends.acl import describe_om

        facts = describe_om(Path(model))
    else:
        from jasper_asr.model.export import describe

        facts = describe(model, config=_config(config), weights=weights)
    if layout == "json":
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:<{width}}  {_readable(value)}")


@command.command()
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

    folder_of_model = Path(__file__).parent / "models" / "mini"
    gate = Gate(**json.loads((folder_of_model / "gate.json").read_text()))
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "mini.onnx"
        summary = export_onnx("mini", onnx)
        click.echo(f"1. Graph     {summary}")
        options = {"model": str(onnx), "backend": "ort", "batch_size": batch_size}
        rows = read_manifest(folder_of_model / "clips" / "manifest.jsonl")
        click.echo(f"2. Clips     {len(rows)}, transcribed from that graph, best path:\n")
        with _load(options) as transcriber, _progress("transcribing", len(rows), "clips") as advance:
            report = run_evaluation(transcriber, rows, progress=lambda _seconds: advance(1))
        with _load(options | {"lm": "mini"}) as transcriber:
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


@command.command(cls=_Variadic)
@click.option("--config", required=True, help="Model YAML, or the name of a built-in one.")
@click.option(
    "--train",
    "train_manifests",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Repeatable.",
)
@click.option("--dev", "dev_manifests", multiple=True, type=click.Path(path_type=Path), help="One or more manifests.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder; a run in it is resumed.")
@click.option("--init", type=click.Path(path_type=Path), help="Start from this checkpoint: fine-tuning.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for computed features (default: --out).")
@click.option("--audio-root", type=click.Path(path_type=Path))
@click.option("--allow-outside-root", is_flag=True)
@click.option("--steps", default=10_000, show_default=True)
@click.option("--batch-seconds", default=128.0, show_default=True, help="Audio in a batch, padding included.")
@click.option("--optimizer", type=click.Choice(["adamw", "novograd"]), default="adamw", show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--weight-decay", default=1e-3, show_default=True)
@click.option("--warmup", default=500, show_default=True, help="Steps.")
@click.option("--schedule", type=click.Choice(["cosine", "poly"]), default="cosine", show_default=True)
@click.option("--ema", default=0.999, show_default=True)
@click.option("--noise", default=0.0, show_default=True, help="Share of utterances that get noise added.")
@click.option("--seed", default=1, show_default=True)
@click.option("--bf16", is_flag=True, help="Autocast to bfloat16.")
@click.option("--workers", default=2, show_default=True, help="Threads that prepare batches.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch on the CPU.")
@click.option("--save-minutes", default=3.0, show_default=True)
@click.option("--validate-steps", default=1000, show_default=True)
def train(
    config: str,
    train_manifests: tuple[Path, ...],
    dev_manifests: tuple[Path, ...],
    out: Path,
    init: Path | None,
    cache: Path | None,
    audio_root: Path | None,
    allow_outside_root: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Train or fine-tune a model with CTC; run it again to resume. Under torchrun it trains on several devices."""
    model_config = _named_config(config)
    dataset = model_config.train_dataset
    only_original = dataset is None or dataset.ignore_offline_speed_perturbation
    speed = 1.0 if only_original else None  # None: the speeds that an NVIDIA manifest lists are utterances too
    manifests = [_read_manifests((path,), audio_root, allow_outside_root, speed) for path in train_manifests]
    dev = _read_manifests(dev_manifests, audio_root, allow_outside_root)

    import torch  # seconds, which a wrong path above should not cost

    from jasper_asr.train.loop import TrainOptions
    from jasper_asr.train.run import run_training

    if threads:
        torch.set_num_threads(threads)
    settings = TrainOptions(**options)
    with _progress("features", None, "utterances") as advance:
        state, skipped = run_training(
            model_config,
            manifests,
            dev,
            out,
            settings,
            init=init,
            cache_dir=cache,
            report=lambda row: click.echo(json.dumps(row), err=True),
            progress=lambda _done, _total: advance(1),
        )
    for row in skipped[:10]:
        _note(f"left out {row.audio_filepath}: {row.reason}")
    if len(skipped) > 10:
        _note(f"left out {len(skipped) - 10} more")
    click.echo(str(out / ("best.pt" if dev else "last.pt")))
    _note(
        f"{state.step} steps, {state.audio_seconds / 3600:.1f} h of audio"
        + (f", dev WER {state.best_wer:.2f} %" if dev else "")
    )


@command.group(no_args_is_help=False)
def download() -> None:
    """Fetch a corpus or a checkpoint. The only commands that use the network."""


@download.command("librispeech")
@click.argument("subset")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder that will hold LibriSpeech/SUBSET.")
@click.option("--mirror", help="Base address that holds SUBSET.tar.gz, in place of the official one.")
@click.option("--keep-archive", is_flag=True, help="Keep the .tar.gz after unpacking.")
def download_librispeech(subset: str, out: Path, mirror: str | None, keep_archive: bool) -> None:
    """Fetch and unpack a LibriSpeech SUBSET such as dev-clean; checks the published md5, resumes a broken transfer."""
    from jasper_asr.data import librispeech

    with (
        _progress("downloading", None, "bytes") as advance,
        _progress("unpacking", None, "bytes") as unpacked,
    ):
        folder = librispeech.download_librispeech(
            subset,
            out,
            mirror=mirror,
            keep_archive=keep_archive,
            progress=lambda done, total: advance(0, done, total),
            unpack_progress=lambda done, total: unpacked(0, done, total),
        )
    click.echo(str(folder))


@download.command("checkpoint")
@click.option("--url", help="Address of the .pt, or of a .zip that holds it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--sha256", help="Expected hash, hex.")
@click.option("--md5", help="Expected hash, hex.")
def download_checkpoint(url: str | None, out: Path, sha256: str | None, md5: str | None) -> None:
    """Fetch a published checkpoint. Without a hash it says that nothing was verified."""
    from jasper_asr.data import download as transfers

    with _progress("downloading", None, "bytes") as advance:
        file = transfers.download_checkpoint(
            url, out, sha256=sha256, md5=md5, progress=lambda done, total: advance(0, done, total)
        )
    click.echo(str(file.download.path))
    checked = "hash verified" if file.download.verified else f"NOT verified, sha256 is {file.download.sha256}"
    members = f" holding {', '.join(file.members)}" if file.members else ""
    _note(f"{file.kind}{members}, {file.download.bytes:,} bytes, {checked}")


@command.group(no_args_is_help=False)
def prepare() -> None:
    """Make manifests."""


@prepare.command("librispeech", cls=_Variadic)
@click.argument("root", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    required=True,
    type=click.Path(path_type=Path),
    help="JSON file to write, in NVIDIA's layout.",
)
@click.option("--wav-dir", type=click.Path(path_type=Path), help="Write 16-bit WAVs here (default: use the FLACs).")
@click.option("--speed", "speeds", multiple=True, type=float, help="Also write these speeds; needs --wav-dir.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True)
def prepare_librispeech(root: Path, manifest: Path, wav_dir: Path | None, speeds: tuple[float, ...], jobs: int) -> None:
    """Manifest of a LibriSpeech folder."""
    from jasper_asr.data import librispeech

    with _progress("preparing", None, "utterances") as advance:
        report = librispeech.prepare_librispeech(
            root,
            manifest,
            wav_dir=wav_dir,
            speeds=speeds,
            jobs=jobs,
            progress=lambda done, total: advance(0, done, total),
        )
    click.echo(str(report.manifest))
    _note(
        f"{report.utterances} utterances, {report.seconds / 3600:.2f} h; "
        f"{report.unlisted} FLACs without transcript left out"
    )
    if report.outside:
        _note("the audio lies outside the manifest's folder: read it with --allow-outside-root or --audio-root")


def _load(options: dict[str, Any], *, pad_to: float | None = None) -> Any:
    from jasper_asr.transcribe import load

    options = dict(options)
    model, backend = options.pop("model"), options.pop("backend")
    options["config"] = _config(options.get("config"))
    return load(model, backend, pad_to=pad_to, beam=_beam(options), **options)


def _beam(options: dict[str, Any]) -> "BeamOptions | None":
    """Takes the beam search's options out of `options`; None if none was given."""
    from jasper_asr.transcribe import BeamOptions

    names = {"lm": "lm", "beam_width": "width", "lm_weight": "lm_weight", "word_bonus": "word_bonus"}
    popped = {new: options.pop(old, None) for old, new in names.items()}
    given = {name: value for name, value in popped.items() if value is not None}
    if not given:
        return None
    if "lm" not in given and given.keys() & {"lm_weight", "word_bonus"}:
        raise UsageError("--lm-weight and --word-bonus need --lm")
    return BeamOptions(**given)


def _config(path: Path | None) -> "ModelConfig | None":
    if path is None:
        return None
    return _named_config(str(path))


def _named_config(name: str) -> "ModelConfig":
    from jasper_asr.config import builtin_config, builtin_configs, load_config

    return builtin_config(name) if name in builtin_configs() else load_config(name)


def _read_manifests(
    paths: tuple[Path, ...], root: Path | None, outside: bool, speed: float | None = 1.0
) -> "list[Utterance]":
    from jasper_asr.data.manifest import read_manifest

    options: dict[str, Any] = {"audio_root": root, "allow_outside_root": outside, "speed": speed}
    return [row for path in paths for row in read_manifest(path, **options)]


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


def _summary(report: "ErrorReport") -> str:
    return (
        f"WER {report.wer:.2f} %, CER {report.cer:.2f} %: {report.errors} errors in {report.words} words "
        f"({report.substitutions} substitutions, {report.deletions} deletions, {report.insertions} insertions); "
        f"{report.utterances} utterances, {report.failed} failed, {report.skipped} skipped; "
        f"{report.audio_seconds:.1f} s of audio in {report.seconds:.2f} s, real-time factor {report.rtf:.4f}"
    )


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
            _complain(f"gate not met: {cause}")
            return GATE_FAILED
        _note(f"gate holds: WER {report.wer:.2f} % is within {limit}")
    return 1 if report.failed else 0


def _check_writable(path: Path | None) -> None:
    """Complain before hours of work, not after them."""
    if path is None:
        return
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; give a file name")
    if not path.parent.is_dir():
        raise StorageError(f"{path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path}: the folder {path.parent} is not writable")


@contextmanager
def _progress(verb: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, on terminals only, shown from the first advance on.

    Call the yielded function with a step, or with (0, done, total) to set both.
    """
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = [
        TextColumn(verb),
        BarColumn(),
        count,
        TextColumn("" if unit == "bytes" else unit),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=total, visible=False)

        def advance(step: int, done: int | None = None, whole: int | None = None) -> None:
            bar.update(task, advance=step, completed=done, total=whole or total, visible=True)

        yield advance


def _note(message: str) -> None:
    click.echo(f"jasper: {message}", err=True)


def _complain(message: str) -> None:
    click.echo(f"jasper: error: {' '.join(message.split())}", err=True)


def _fail(message: str, code: int) -> NoReturn:
    _complain(message)
    sys.exit(code)


def _drop_unwritten() -> None:
    """If stdout takes no more, lead it nowhere: the interpreter would try once again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
