"""`jasper listen`: live transcription of a microphone, or of a file as if it were one."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jasper_asr.cli.common import load_model, model_options, note
from jasper_asr.errors import AudioError, UsageError

if TYPE_CHECKING:
    import numpy as np

BLOCK_SECONDS = 0.1


@click.command()
@model_options
@click.option("--source", type=click.Path(path_type=Path), help="Read this file in place of the microphone.")
@click.option("--input-device", help="Number or name of the microphone (default: the system's).")
@click.option("--pause", default=1.0, show_default=True, help="Seconds of silence that end an utterance.")
@click.option("--right-context", default=1.0, show_default=True, help="Seconds heard before a partial text settles.")
@click.option("--max-seconds", default=60.0, show_default=True, help="Longest utterance; then it is cut.")
def listen(
    source: Path | None,
    input_device: str | None,
    pause: float,
    right_context: float,
    max_seconds: float,
    **options: Any,
) -> None:
    """Transcribe the microphone live; Ctrl-C ends it.

    Partial texts go to stderr while you speak, each finished utterance to stdout.
    """
    from jasper_asr.stream import Stream

    if min(pause, max_seconds) <= 0:
        raise UsageError("--pause and --max-seconds must be above 0")
    with load_model(options) as transcriber:
        rate, blocks = _file_blocks(source) if source else _microphone_blocks(input_device)
        stream = Stream(transcriber, rate=rate, right_context=right_context)
        try:
            for block in blocks:
                partial = stream.push(block)
                _show(partial.text)
                if (partial.text and partial.silence >= pause) or partial.seconds >= max_seconds:
                    _finish(stream)
                    stream = Stream(transcriber, rate=rate, right_context=right_context)
        except KeyboardInterrupt:
            pass  # how one stops speaking to a microphone
        _finish(stream)


def _finish(stream: Any) -> None:
    if stream.seconds < 0.1:
        return
    text = stream.finish().text
    _show("")
    if text:
        click.echo(text)
        sys.stdout.flush()


def _show(partial: str) -> None:
    """The end of the partial text on the last line of a terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        click.echo(f"\r\x1b[K{partial[-(width - 1) :]}", err=True, nl=False)


def _file_blocks(path: Path) -> "tuple[int, Iterator[np.ndarray]]":
    from jasper_asr.audio import SAMPLE_RATE, load_audio

    samples = load_audio(path)
    size = round(BLOCK_SECONDS * SAMPLE_RATE)
    return SAMPLE_RATE, (samples[start : start + size] for start in range(0, len(samples), size))


def _microphone_blocks(device: str | None) -> "tuple[int, Iterator[np.ndarray]]":
    try:
        import sounddevice
    except ModuleNotFoundError as error:
        raise UsageError("listening needs a package: pip install 'jasper-asr[mic]'") from error
    except OSError as error:  # the package is there, the system's PortAudio is not
        raise UsageError(f"listening needs the PortAudio library ({error}); install it, or use --source") from error
    return 16_000, _recorded(sounddevice, int(device) if device and device.isdigit() else device)


def _recorded(sounddevice: Any, device: int | str | None) -> "Iterator[np.ndarray]":
    size = round(BLOCK_SECONDS * 16_000)
    try:
        with sounddevice.InputStream(16_000, size, device, channels=1, dtype="float32") as microphone:
            note("listening; Ctrl-C ends it")
            while True:
                yield microphone.read(size)[0][:, 0]
    except sounddevice.PortAudioError as error:
        raise AudioError(f"microphone: {error}; name another one with --input-device, or use --source") from error
