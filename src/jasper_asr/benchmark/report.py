"""What a benchmark is asked for, and what it answers."""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Self

import numpy as np

from jasper_asr.errors import UsageError

CHOICES = {"precision": ("f32", "f16", "bf16", "int8"), "convolution": ("auto", "direct", "spectral")}
"""Words that may follow a backend's name."""


@dataclass(frozen=True)
class Engine:
    """What runs a model: a backend, or `torch` for our network in eager PyTorch; None leaves a choice to it."""

    backend: str = "ort"
    precision: str | None = None
    convolution: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`openvino:bf16:spectral`: backend, then precision and convolution in any order. Raises UsageError."""
        backend, *rest = text.split(":")
        chosen: dict[str, str] = {}
        for word in rest:
            kind = next((kind for kind, words in CHOICES.items() if word in words), None)
            if kind is None or kind in chosen:
                known = ", ".join(word for words in CHOICES.values() for word in words)
                raise UsageError(f"engine {text!r}: write backend[:precision][:convolution], from {known}")
            chosen[kind] = word
        return cls(backend, **chosen)

    def __str__(self) -> str:
        return ":".join(filter(None, (self.backend, self.precision, self.convolution)))


@dataclass(frozen=True)
class Workload:
    """What is run how often. None: the size that the model has fixed, else batch size 1 and 40 s.

    `frames` (feature frames) or `seconds` of audio in an utterance; a model with a larger fixed size gets it padded.
    Raises UsageError for numbers that make no sense.
    """

    batch_size: int | None = None
    frames: int | None = None
    seconds: float | None = None
    rounds: int = 50
    warmup: int = 3

    def __post_init__(self) -> None:
        if self.frames is not None and self.seconds is not None:
            raise UsageError("give frames or seconds, not both")
        for name in ("batch_size", "frames", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name.replace('_', ' ')} {value}: must be at least 1")
        if self.warmup < 0:
            raise UsageError(f"warmup {self.warmup}: must be at least 0")
        if self.seconds is not None and not (isfinite(self.seconds) and self.seconds > 0):
            raise UsageError(f"seconds {self.seconds:g}: must be a number above 0")


@dataclass(frozen=True)
class Rounds:
    """What was measured, one value a round: seconds of a batch, or a ratio."""

    values: tuple[float, ...]

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def median(self) -> float:
        return self.percentile(50)

    def percentile(self, percent: float) -> float:
        """Between neighbouring rounds it is interpolated linearly."""
        return float(np.percentile(self.values, percent))

    def as_dict(self) -> dict[str, float]:
        """The spread by the names that reports use."""
        ranks = {f"p{percent}": self.percentile(percent) for percent in (10, 90, 99)}
        return {"min": self.min, "mean": self.mean, "median": self.median, **ranks, "max": self.max}


@dataclass(frozen=True)
class Check:
    """How the output was found right: repeatable, finite, normalised, equal in all rows, and near the reference's.

    `reference` says what gave the other log_probs, None if nothing was at hand; `difference` is the largest between
    the two, with log_probs below -10 taken as -10.
    """

    transcript: str
    reference: str | None
    difference: float | None


@dataclass(frozen=True)
class Copies:
    """Seconds of the parts of a batch, where the backend can tell them apart."""

    h2d: Rounds
    compute: Rounds
    d2h: Rounds


@dataclass(frozen=True)
class BenchReport:
    """`frames` of audio in each of `batch_size` utterances, padded to `padded_frames`; `seconds` is their length."""

    model: str
    engine: str
    device: int
    batch_size: int
    frames: int
    padded_frames: int
    seconds: float
    warmup: int
    check: Check
    latency: Rounds
    copies: Copies | None

    @property
    def samples_per_second(self) -> float:
        """Utterances a second, by the mean latency, copies included."""
        return self.batch_size / self.latency.mean

    @property
    def compute_samples_per_second(self) -> float | None:
        """The same with copies left out; None where the backend cannot tell."""
        return self.batch_size / self.copies.compute.mean if self.copies else None

    @property
    def audio_seconds_per_second(self) -> float:
        """How many times faster than real time, copies included."""
        return self.samples_per_second * self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single rounds, for JSON; times in seconds."""
        plain = ("model", "engine", "device", "batch_size", "frames", "padded_frames", "seconds", "warmup")
        split = self.copies.__dict__ if self.copies else {}
        return {name: getattr(self, name) for name in plain} | {
            "rounds": len(self.latency.values),
            "check": self.check.__dict__,
            "latency": self.latency.as_dict(),
            "copies": {name: part.as_dict() for name, part in split.items()} or None,
            "samples_per_second": self.samples_per_second,
            "compute_samples_per_second": self.compute_samples_per_second,
            "audio_seconds_per_second": self.audio_seconds_per_second,
        }


@dataclass(frozen=True)
class Row:
    """One engine of a comparison. `speed`: how many times faster than the first row, one value a round.

    `peak`: the share of the machine's matrix products that the direct convolutions' MACs make up in the median time;
    an engine that needs fewer MACs can be above 1.
    """

    engine: str
    latency: Rounds
    speed: Rounds
    peak: float
    check: Check


@dataclass(frozen=True)
class Comparison:
    """Engines measured in alternation. `macs` are those of one utterance, `gemm_peak` is in MACs a second."""

    model: str
    batch_size: int
    frames: int
    seconds: float
    rounds: int
    macs: int
    gemm_peak: float
    machine: str
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds."""
        rows = [
            {
                "engine": row.engine,
                "latency": row.latency.as_dict(),
                "speed": row.speed.as_dict(),
                "peak": row.peak,
                "check": row.check.__dict__,
            }
            for row in self.rows
        ]
        return self.__dict__ | {"rows": rows}
