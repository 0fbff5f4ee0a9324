"""Convolutional CTC speech recognition, from checkpoint to proven deployment.

    import jasper_asr
    with jasper_asr.load("mini") as transcriber:
        print(transcriber.transcribe("clip.flac").text)

Importing the package loads no runtime; `load` does.
"""

from typing import TYPE_CHECKING, Any

from jasper_asr._version import __version__

if TYPE_CHECKING:
    from jasper_asr.transcribe import Transcriber, Transcript, load

__all__ = ["Transcriber", "Transcript", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Transcriber", "Transcript", "load"):
        from jasper_asr import transcribe

        return getattr(transcribe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
