"""What the commands share: options of a model, progress, messages on stderr."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from jasper_asr.errors import StorageError, UsageError

if TYPE_CHECKING:
    from jasper_asr.config import ModelConfig
    from jasper_asr.data.manifest import Utterance
    from jasper_asr.transcribe import BeamOptions


class Variadic(click.Command):
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


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options shared by the commands that run a model."""
    for option in reversed(
        [
            click.option(
                "--model",
                default="mini",
                show_default=True,
                help="Built-in name, .onnx, .pt, .nemo or .safetensors.",
            ),
            click.option("--config", type=click.Path(path_type=Path), help="Model YAML, for a .pt that carries none."),
            click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True),
            click.option(
                "--backend", default="auto", show_default=True, help="Runtime: ort, openvino, or the better one."
            ),
            click.option(
                "--convolution",
                type=click.Choice(["auto", "direct", "spectral"]),
                help="How a checkpoint's convolutions are computed; both give the same. [auto: the faster]",
            ),
            click.option(
                "--precision", type=click.Choice(["f32", "bf16", "f16"]), help="Arithmetic; all but f32 needs openvino."
            ),
            click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True),
            click.option(
                "--threads", type=click.IntRange(1), help="Threads of the runtime; its own choice by default."
            ),
            click.option("--device", type=click.IntRange(0), help="Number of the NPU, for an .om."),
            click.option(
                "--greedy",
                is_flag=True,
                help="Best path, in place of the beam search that a built-in model defaults to.",
            ),
            click.option("--lm", help="Beam search with this n-gram model: a file, `mini`, or `none`."),
            click.option("--beam-width", type=click.IntRange(1), help="Beam search with so many prefixes. [40]"),
            click.option("--lm-weight", type=float, help="How much the language model counts."),
            click.option("--word-bonus", type=float, help="Added for each word."),
            click.option(
                "--unknown-penalty", type=float, help="Taken off for each word that the language model does not know."
            ),
            click.option(
                "--blank-penalty", type=float, help="Taken off the blank's log-probability: fewer words are left out."
            ),
            click.option(
                "--hotword",
                "hotwords",
                multiple=True,
                metavar="WORDS=WEIGHT",
                help="Added each time that these words are said, as in 'new york=3'; repeatable.",
            ),
            click.option("--chunk-seconds", type=float, help="Longest piece of long audio in memory. [120]"),
            click.option(
                "--halo-seconds",
                type=float,
                help="Context on each side of a piece; less than half the receptive field is approximate.",
            ),
            click.option(
                "--trim-silence/--no-trim-silence",
                default=None,
                help="Cut silent ends (default: the config's).",
            ),
        ]
    ):
        function = option(function)
    return function


def load_model(options: dict[str, Any], *, pad_to: float | None = None) -> Any:
    from jasper_asr.transcribe import load

    options = dict(options)
    model, backend = options.pop("model"), options.pop("backend")
    options["config"] = given_config(options.get("config"))
    return load(model, backend, pad_to=pad_to, beam=_beam(model, options), **options)


def _beam(model: str, options: dict[str, Any]) -> "BeamOptions | None":
    """Takes the beam search's options out of `options`; None if none was given."""
    from jasper_asr.transcribe import BUILTIN_LMS, BeamOptions

    weights = ("lm_weight", "word_bonus", "unknown_penalty", "blank_penalty")
    names = {"lm": "lm", "beam_width": "width", **{name: name for name in weights}}
    popped = {new: options.pop(old, None) for old, new in names.items()}
    given = {name: value for name, value in popped.items() if value is not None}
    if hotwords := dict(map(_hotword, options.pop("hotwords", ()))):
        given["hotwords"] = hotwords
    if not given:
        return None
    if "lm" not in given and model in BUILTIN_LMS:
        given["lm"] = model
    if given.get("lm") == "none":
        del given["lm"]
    if "lm" not in given and given.keys() & set(weights):
        raise UsageError("--lm-weight, --word-bonus, --unknown-penalty and --blank-penalty need --lm")
    return BeamOptions(**given)


def _hotword(text: str) -> tuple[str, float]:
    words, _, weight = text.rpartition("=")
    try:
        return words, float(weight)
    except ValueError:
        raise UsageError(f"--hotword {text!r}: give words and a number, as in 'new york=3'") from None


def given_config(path: Path | None) -> "ModelConfig | None":
    if path is None:
        return None
    return named_config(str(path))


def named_config(name: str) -> "ModelConfig":
    from jasper_asr.config import builtin_config, builtin_configs, load_config

    return builtin_config(name) if name in builtin_configs() else load_config(name)


def read_manifests(
    paths: tuple[Path, ...], root: Path | None, outside: bool, speed: float | None = 1.0
) -> "list[Utterance]":
    from jasper_asr.data.manifest import read_manifest

    options: dict[str, Any] = {"audio_root": root, "allow_outside_root": outside, "speed": speed}
    return [row for path in paths for row in read_manifest(path, **options)]


def check_writable(path: Path | None) -> None:
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
def progress(verb: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
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


def note(message: str) -> None:
    click.echo(f"jasper: {message}", err=True)


def complain(message: str) -> None:
    click.echo(f"jasper: error: {' '.join(message.split())}", err=True)


def fail(message: str, code: int) -> NoReturn:
    complain(message)
    sys.exit(code)


def drop_unwritten() -> None:
    """If stdout takes no more, lead it nowhere: the interpreter would try once again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
