"""Runtimes, one file each. A backend runs a batch that fits its shapes; it neither pads nor decodes.

To add one: a file with a class that fulfils `Backend`, and a line in BACKENDS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import ModelConfig
from jasper_asr.errors import UsageError


@dataclass(frozen=True)
class Shapes:
    """What a backend takes. None: any size. Not masked: every utterance of a batch must fill all frames."""

    batch_size: int | None
    frames: int | None
    masked: bool


class Backend(Protocol):
    """A loaded network."""

    @property
    def config(self) -> ModelConfig:
        """The config that the model carries."""

    @property
    def shapes(self) -> Shapes:
        """Shapes that `run` takes."""

    def run(self, feats: NDArray[np.float32], lens: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """feats float32 [B, n_filt, T], lens int32 [B] -> (log_probs float32 [B, T', n_classes], lens int32 [B])."""

    def close(self) -> None:
        """Give back what the runtime holds; `run` must not be called afterwards."""


BACKENDS = {"ort": "jasper_asr.backends.ort:OrtBackend"}


def open_backend(name: str, model: Path | bytes, *, threads: int | None = None) -> Backend:
    """The backend `name` with `model`, an .onnx file or its bytes. Raises UsageError or ModelError."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r}: choose one of {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    factory: Callable[..., Backend] = getattr(import_module(module), attribute)
    return factory(model, threads=threads)
