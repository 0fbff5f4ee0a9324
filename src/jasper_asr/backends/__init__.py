"""Runtimes, one file each. A backend runs a batch that fits its shapes; it neither pads nor decodes.

To add one: a file with a class that fulfils `Backend`, and a line in BACKENDS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import ModelConfig
from jasper_asr.errors import UsageError


@dataclass(frozen=True)
class Shapes:
    """What a backend takes. None: any size. Not masked: every utterance of a batch must fill all frames.

    A model with gears takes just those (batch, frames); `batch_size` and `frames` are then the largest of each, which
    need not be a gear together: ask `most` how many utterances to give, and `fit` what to pad them to.
    """

    batch_size: int | None
    frames: int | None
    masked: bool
    gears: tuple[tuple[int, int], ...] = ()

    def most(self, frames: int) -> int | None:
        """How many utterances of up to `frames` one run takes; None: any number."""
        return max((batch for batch, limit in self.gears if limit >= frames), default=self.batch_size)

    def fit(self, batch: int, frames: int) -> tuple[int, int]:
        """(batch, frames) to pad to: the smallest that holds `batch` utterances. Raises UsageError if none does."""
        if not self.gears:
            return self.batch_size or batch, self.frames or frames
        holding = [gear for gear in self.gears if gear[0] >= batch and gear[1] >= frames]
        if not holding:
            raise UsageError(f"{batch} utterances of {frames} frames fit none of the model's gears {[*self.gears]}")
        return min(holding, key=lambda gear: (gear[0] * gear[1], gear))


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


BACKENDS = {
    "ort": "jasper_asr.backends.ort:OrtBackend",
    "openvino": "jasper_asr.backends.openvino:OpenVinoBackend",
    "acl": "jasper_asr.backends.acl:AclBackend",
    "cann": "jasper_asr.backends.ort:cann_backend",
}


def choose_backend(precision: str | None = None) -> str:
    """What the backend `auto` stands for: openvino where only that computes in `precision`, else ort.

    At float32 onnxruntime was as fast or faster in every case measured; see benchmarks/README.md.
    """
    return "ort" if precision in (None, "f32") else "openvino"


def open_backend(
    name: str,
    model: Path | bytes,
    *,
    threads: int | None = None,
    device: int | None = None,
    precision: str | None = None,
) -> Backend:
    """The backend `name` with `model`: a file, or the bytes of an ONNX. Raises UsageError, StorageError or ModelError.

    `precision` is what it computes in, `f32`, `bf16` or `f16`. The name `auto` leaves the choice to `choose_backend`.
    An option that is None is left to the backend; one that it does not know is a UsageError.
    """
    name = choose_backend(precision) if name == "auto" else name
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r}: choose one of {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    factory: Callable[..., Backend] = getattr(import_module(module), attribute)
    given = {"threads": threads, "device": device, "precision": precision}
    options = {key: value for key, value in given.items() if value is not None}
    if unknown := options.keys() - signature(factory).parameters.keys():
        raise UsageError(f"backend {name}: takes no {', '.join(sorted(unknown))}; leave it out")
    return factory(model, **options)
