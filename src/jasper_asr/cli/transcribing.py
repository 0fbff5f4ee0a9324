"""`jasper transcribe`: recordings to text, subtitles and JSON."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from jasper_asr._version import __version__
from jasper_asr.cli.common import check_writable, complain, load_model, model_options, note
from jasper_asr.errors import JasperError, UsageError

if TYPE_CHECKING:
    from jasper_asr.inputs import Input
    from jasper_asr.transcribe import Result, Transcript

FORMATS = ("txt", "json", "jsonl", "srt", "vtt", "tsv")
"""What formats.py writes; stated again because importing that takes longer than a wrong name deserves."""

_IN_ONE_FILE = ("txt", "jsonl")  # of several recordings, one after another
_SPEED_ONLY = ("threads", "batch_size", "device")  # options that do not change what a result says


def _formats(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """`srt,vtt` or one at a time; `text` is the old name of txt."""
    choice = click.Choice(FORMATS)
    names = [name.strip() for value in given for name in value.split(",")]
    names = [choice.convert("txt" if name == "text" else name, parameter, context) for name in names]
    return tuple(dict.fromkeys(names))


@click.command()
@click.argument("audio", nargs=-1, required=True)
@model_options
@click.option(
    "--format",
    "-f",
    "formats",
    multiple=True,
    callback=_formats,
    help=f"{', '.join(FORMATS)}; several with --output-dir: `srt,vtt`. [txt, or what --output ends in]",
)
@click.option("--output-dir", "-o", type=click.Path(path_type=Path), help="Write a file for each recording and format.")
@click.option("--output", type=click.Path(path_type=Path), help="Write one file in place of stdout, whole at the end.")
@click.option("--resume", is_flag=True, help="Keep what an earlier run with these options has written, if intact.")
@click.option("--recursive", "-r", is_flag=True, help="Look into the folders of folders.")
@click.option(
    "--jobs",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Recordings to read and decode ahead, each in a thread of its own, while the network runs.",
)
@click.option("--words/--no-words", default=True, show_default=True, help="Times and confidences of words.")
@click.option("--characters", is_flag=True, help="Of characters too, in json and jsonl.")
@click.option(
    "--audio-root",
    type=click.Path(path_type=Path),
    help="Where a manifest's paths start (default: its folder).",
)
@click.option("--allow-outside-root", is_flag=True, help="Accept manifest paths that leave the root.")
def transcribe(
    audio: tuple[str, ...],
    formats: tuple[str, ...],
    output_dir: Path | None,
    output: Path | None,
    resume: bool,
    recursive: bool,
    jobs: int,
    words: bool,
    characters: bool,
    audio_root: Path | None,
    allow_outside_root: bool,
    **options: Any,
) -> int:
    """Transcribe recordings: files, folders, quoted patterns, manifests, or - for stdin.

    Prints the text; of several recordings a line `path<TAB>text` each.
    """
    formats = formats or (_implied_format(output),)
    _check_together(formats, output_dir, output, resume=resume, words=words, characters=characters)
    check_writable(output)
    from jasper_asr.inputs import find_inputs

    items = find_inputs(
        audio,
        recursive=recursive,
        audio_root=audio_root,
        allow_outside_root=allow_outside_root,
        stdin=sys.stdin.buffer if "-" in audio else None,
    )
    if len(items) > 1 and output_dir is None:
        _check_one_file_for_all(formats[0], output)
    writer = _Writer(formats, alone=len(items) == 1 and items[0].name == audio[0], characters=characters)
    target = output_dir or output
    place: Destination = _Printed(writer)
    if target:
        settings = {**options, "words": words, "characters": characters}
        place = _kept(target, target is output_dir, items, writer, settings, resume=resume, protected=audio)
    todo = [item for item in items if not place.holds(item)]
    run = _Run(writer.alone, len(items))
    try:
        if todo:
            run.transcribe(todo, place, {**options, "words": words and formats != ("txt",)}, jobs)
        place.finish()
    finally:
        run.list_failures()
    if target:
        note(run.summary(len(items) - len(todo)))
    return run.exit_code


# --- where results go -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    """Results as text. `alone`: just one file, named itself, so that its text needs no path in front."""

    formats: tuple[str, ...]
    alone: bool
    characters: bool

    def file(self, format: str, item: "Input", result: "Transcript") -> str:
        """The content of a file."""
        from jasper_asr.formats import render

        about: dict[str, Any] = {"audio_filepath": item.name, "duration": result.duration, "text": result.text}
        return render(format, **about, words=result.words, offset=item.offset, characters=self.characters)

    def entry(self, item: "Input", result: "Transcript") -> str:
        """What stands for a recording where others follow."""
        text = self.file(self.formats[0], item, result)
        return f"{item.name}\t{text}" if self.formats[0] == "txt" and not self.alone else text


class Destination(Protocol):
    """Where results go: stdout here, or what outputs.py has."""

    def holds(self, item: "Input", /) -> bool:
        """Whether the result of `item` is there already."""

    def add(self, item: "Input", result: "Transcript", /) -> None:
        """Keep a result."""

    def finish(self) -> None:
        """After the last one."""


@dataclass(frozen=True)
class _Printed:
    writer: _Writer

    def holds(self, item: "Input") -> bool:
        return False

    def add(self, item: "Input", result: "Transcript") -> None:
        click.echo(self.writer.entry(item, result), nl=False)

    def finish(self) -> None:
        pass


def _kept(
    target: Path,
    is_folder: bool,
    items: "list[Input]",
    writer: _Writer,
    settings: dict[str, Any],
    *,
    resume: bool,
    protected: tuple[str, ...],
) -> Destination:
    """A file for each recording and format in the folder `target`, or the file `target` for all."""
    from jasper_asr.outputs import OutputFile, OutputFolder

    inputs: list[str | Path] = [*protected, *(item.source for item in items if isinstance(item.source, Path))]
    if is_folder:
        made_by = _fingerprint(settings)
        return OutputFolder(
            target, items, writer.formats, writer.file, options=made_by, resume=resume, protected=inputs
        )
    made_by = _fingerprint({**settings, "format": writer.formats[0], "alone": writer.alone})
    return OutputFile(target, items, writer.entry, options=made_by, resume=resume, protected=inputs)


# --- the work -------------------------------------------------------------------------------------------------------


class _Run:
    """Transcribes, counts, and collects what fails. `alone`: one file, named itself, so its failure is the run's."""

    def __init__(self, alone: bool, total: int) -> None:
        self._alone, self._total = alone, total
        self._failures: list[tuple[Input, JasperError]] = []
        self._done, self._audio, self._seconds = 0, 0.0, 0.0

    def transcribe(self, todo: "Sequence[Input]", place: Destination, options: dict[str, Any], jobs: int) -> None:
        from jasper_asr.transcribe import Clip

        clips = [Clip(item.source, *item.part) for item in todo]
        with load_model(options) as transcriber, _progress(todo) as (finished, heard):
            started = time.perf_counter()
            results = transcriber.transcribe_many(clips, progress=finished, heard=heard, jobs=jobs)
            with closing(results):
                for item, result in zip(todo, results, strict=True):
                    self._take(item, result, place)
            self._seconds = time.perf_counter() - started

    def _take(self, item: "Input", result: "Result", place: Destination) -> None:
        from jasper_asr.transcribe import Failure

        if isinstance(result, Failure):
            self._failures.append((item, result.error))
            return
        place.add(item, result)
        self._done += 1
        self._audio += result.duration

    def list_failures(self) -> None:
        if self._failures and not self._alone:
            note(f"{len(self._failures)} of {self._total} failed:")
        for item, error in self._failures:
            is_stdin = isinstance(item.source, bytes)
            complain(re.sub(r"^<(audio|bytes)>", "stdin", str(error)) if is_stdin else str(error))

    def summary(self, kept: int) -> str:
        speed = f", {self._audio / self._seconds:.1f} times real time" if self._audio else ""
        return (
            f"{self._done} transcribed, {kept} kept, {len(self._failures)} failed; "
            f"{_clock(self._audio)} of audio in {_clock(self._seconds)}{speed}"
        )

    @property
    def exit_code(self) -> int:
        if not self._failures:
            return 0
        return self._failures[0][1].exit_code if self._alone else 1


# --- options --------------------------------------------------------------------------------------------------------


def _implied_format(output: Path | None) -> str:
    suffix = output.suffix[1:].lower() if output else ""
    return suffix if suffix in FORMATS else "txt"


def _check_together(
    formats: Sequence[str],
    output_dir: Path | None,
    output: Path | None,
    *,
    resume: bool,
    words: bool,
    characters: bool,
) -> None:
    timed = [format for format in formats if format in ("srt", "vtt", "tsv")]
    if output_dir and output:
        raise UsageError("--output and --output-dir exclude each other")
    if resume and not (output_dir or output):
        raise UsageError("--resume needs --output-dir or --output")
    if len(formats) > 1 and not output_dir:
        raise UsageError(f"--format {','.join(formats)}: several formats need --output-dir")
    if timed and not words:
        raise UsageError(f"--no-words: {timed[0]} is made of the times of words")
    if characters and not (words and {"json", "jsonl"} & set(formats)):
        raise UsageError("--characters needs --format json or jsonl, with words")


def _check_one_file_for_all(format: str, output: Path | None) -> None:
    if format == "json" and output:
        raise UsageError(f"{output}: json is about one recording; take jsonl for several, or --output-dir")
    if format not in (*_IN_ONE_FILE, "json"):
        raise UsageError(f"--format {format} is about one recording; give --output-dir for several")


def _fingerprint(settings: dict[str, Any]) -> str:
    """Of all that a result depends on beside the audio; of a file its content counts."""
    from jasper_asr.model.checkpoint import file_sha256
    from jasper_asr.model.export import resolve_model
    from jasper_asr.transcribe import BUILTIN_LMS

    def content(value: Any) -> Any:
        return file_sha256(Path(value)) if isinstance(value, str | Path) and Path(value).is_file() else str(value)

    model, lm = settings["model"], settings["lm"]
    files = {"model": resolve_model(model), "lm": BUILTIN_LMS.get(lm or model, lm)}
    facts = {name: content(value) for name, value in (settings | files).items() if name not in _SPEED_ONLY}
    return hashlib.sha256(json.dumps([__version__, facts], sort_keys=True).encode()).hexdigest()


# --- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(todo: "Sequence[Input]") -> Iterator[tuple[Callable[[float], None], Callable[[float], None]]]:
    """A bar on stderr, on terminals only, with audio time and speed; of a single file it runs along its seconds.

    Gives two functions that take seconds of audio: call one after each recording, the other as it is heard.
    """
    if not sys.stderr.isatty():
        yield (lambda _seconds: None), (lambda _seconds: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    seconds = _header_seconds(todo[0]) if len(todo) == 1 else None
    columns = (TextColumn("transcribing"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=seconds or len(todo))
        files, audio, started = 0, 0.0, time.perf_counter()

        def show() -> None:
            speed = audio / max(time.perf_counter() - started, 1e-3)
            state = f"{files}/{len(todo)} files, {_clock(audio)} of audio, {speed:.0f}x real time"
            bar.update(task, completed=audio if seconds else files, description=state)

        def finished(_seconds: float) -> None:
            nonlocal files
            files += 1
            show()

        def heard(seconds: float) -> None:
            nonlocal audio
            audio += seconds
            show()

        yield finished, heard


def _header_seconds(item: "Input") -> float | None:
    """How long a recording is, if libsndfile can tell without decoding it."""
    import soundfile

    with suppress(RuntimeError, OSError):
        if not isinstance(item.source, bytes):
            return item.duration or float(soundfile.info(item.source).duration)
    return None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}"
