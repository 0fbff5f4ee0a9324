"""One engine with its model and its batch: opened, checked, timed."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr import audio, decode, features
from jasper_asr.backends import Backend, Shapes, open_backend
from jasper_asr.benchmark.report import Check, Copies, Engine, Rounds, Workload
from jasper_asr.config import ModelConfig
from jasper_asr.errors import ModelError, UsageError
from jasper_asr.model.checkpoint import Checkpoint, file_sha256, load_checkpoint
from jasper_asr.model.export import graph_bytes, graph_source, resolve_model

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

CLIP = Path(__file__).parents[1] / "models" / "mini" / "clips" / "af_nova_1.opus"
"""The known clip, 4.7 s of speech."""

DEFAULT_SECONDS = 40.0
"""Length of an utterance where neither the caller nor the model says one: the Ascend guide's."""

TOLERANCES = {"f32": 1e-4, "f16": 0.03, "bf16": 0.1, "int8": 0.3}
"""Precision -> how far log_probs may lie from the float32 reference's: RMS, relative to how much those change in time.

Another clip, a stuck output or noise comes out near 1. Lower precisions have a gate of their own, the WER.
"""

FLOOR = -10.0
"""Log_probs below this count as this in comparisons: whether a label has probability 1e-5 or 1e-9 decides nothing."""

ROW_TOLERANCES = {"f32": 1e-4, "f16": 0.1, "bf16": 0.1, "int8": 0.1}
"""Between rows of a batch, which a kernel may round in another order."""

REPEAT_TOLERANCE, SUM_TOLERANCE = 1e-5, 1e-2
"""Between two runs; of the sum of probabilities, which float16 log_probs give to 1e-3."""


@dataclass(frozen=True)
class Source:
    """A model file; `checkpoint` None for .onnx and .om. `name` is what the caller called it."""

    name: str
    path: Path
    checkpoint: Checkpoint | None

    def open(self, engine: Engine, *, masked: bool, threads: int | None, device: int | None) -> Backend:
        # number 0 is what every backend takes by itself, also one that knows no devices
        options: dict[str, Any] = {"threads": threads, "device": device or None, "precision": engine.precision}
        if engine.backend == "torch":
            return self._open_torch(engine, threads)
        if self.checkpoint is None:
            if engine.convolution:
                raise UsageError(f"{self.name}: keeps the convolutions it was exported with; give a checkpoint")
            return open_backend(engine.backend, self.path, **options)
        with graph_source(self.checkpoint, masked=masked, convolution=engine.convolution or "direct") as model:
            return open_backend(engine.backend, model, **options)

    def _open_torch(self, engine: Engine, threads: int | None) -> Backend:
        if self.checkpoint is None:
            raise UsageError(f"{self.name}: engine torch runs checkpoints; give a .pt or .safetensors")
        if engine.precision or engine.convolution:
            raise UsageError(f"engine {engine}: torch takes no precision or convolution; leave them out")
        return _TorchBackend(self.checkpoint, threads)


def prepare(
    model: str | os.PathLike[str],
    engines: Sequence[Engine],
    workload: Workload,
    stack: ExitStack,
    *,
    config: ModelConfig | None,
    weights: str,
    threads: int | None,
    device: int | None,
    check_against: Path | None,
) -> list["Subject"]:
    """Engines that are open, checked and warm; `stack` closes them. Arguments and errors as in `benchmark`."""
    path = resolve_model(model)
    ready = path.suffix in (".onnx", ".om")
    source = Source(Path(model).name, path, None if ready else load_checkpoint(path, config=config, weights=weights))
    # as in transcribe.load: alone and at its exact length an utterance needs no masks
    masked = (workload.batch_size or 1) > 1
    subjects = []
    for engine in engines:
        backend = source.open(engine, masked=masked, threads=threads, device=device)
        stack.callback(backend.close)
        subjects.append(Subject(source.name, engine, backend, workload))
    expected = _expect(source, subjects, check_against, threads)
    for subject in subjects:
        subject.check(expected)
        for _ in range(workload.warmup):
            subject.run()
    return subjects


class Subject:
    """A backend with its batch, its check and its times."""

    def __init__(self, name: str, engine: Engine, backend: Backend, workload: Workload) -> None:
        self.name, self.engine, self.config = name, engine, backend.config
        self.frames = _frames(backend, workload)
        self.batch_size, self.padded_frames = _fit(name, backend.shapes, workload.batch_size, self.frames)
        self.seconds: list[float] = []
        self._splits: list[tuple[float, float, float]] = []
        self._backend = backend
        self._precision = _precision(backend, engine)
        self._feats = np.zeros((self.batch_size, self.config.in_feats, self.padded_frames), np.float32)
        self._feats[:, :, : self.frames] = _clip_features(self.config, self.frames)
        self._lens = np.full(self.batch_size, self.frames, np.int32)
        self._out_frames = self.config.output_length(self.frames)

    def run(self) -> Float32:
        """Valid log_probs [B, T', n_classes] of the batch."""
        log_probs, lens = self._backend.run(self._feats, self._lens)
        if lens.tolist() != [self._out_frames] * self.batch_size:
            raise self._wrong(f"output lengths are {lens.tolist()}, not {self._out_frames} each")
        return log_probs[:, : self._out_frames]

    def time(self) -> None:
        """One timed run; its output waits for `check_unchanged`."""
        started = time.perf_counter()
        self._last, _ = self._backend.run(self._feats, self._lens)
        self.seconds.append(time.perf_counter() - started)
        if split := getattr(self._backend, "last_split", None):
            self._splits.append(split)

    def check(self, expected: "Expected | None") -> None:
        """See Check. Raises ModelError."""
        self._right = found = self.run()
        if not np.isfinite(found).all():
            raise self._wrong("log_probs are not finite")
        off = float(np.abs(np.exp(found.astype(np.float64)).sum(axis=2) - 1).max(initial=0))
        if off > SUM_TOLERANCE:
            raise self._wrong(f"the probabilities in a frame sum to 1 +- {off:.2g}")
        if not (off := _difference(found, self.run())) <= REPEAT_TOLERANCE:  # so that NaN fails too
            raise self._wrong(f"log_probs of two runs differ by {off:.2g}")
        if (off := _difference(found, found[:1])) > ROW_TOLERANCES[self._precision]:
            raise self._wrong(f"log_probs of the same utterance differ by {off:.2g} between the rows of a batch")
        transcript = decode.greedy(found[0], len(found[0]), self.config.labels)
        difference = self._compare(found, expected) if expected else None
        self.checked = Check(transcript, expected.source if expected else None, difference)

    def check_unchanged(self) -> None:
        """After the timing: the last timed run gave what was checked. Raises ModelError."""
        off = _difference(self._last[:, : self._out_frames], self._right)
        if not off <= REPEAT_TOLERANCE:
            raise self._wrong(f"the output changed by {off:.2g} while it was timed")

    def latencies(self) -> tuple[Rounds, Copies | None]:
        split = [Rounds(part) for part in zip(*self._splits, strict=True)]
        return Rounds(tuple(self.seconds)), Copies(*split) if split else None

    def _compare(self, found: Float32, expected: "Expected") -> float:
        """The largest difference from the reference. Raises ModelError if all of them together are too large."""
        right = np.maximum(expected.log_probs, FLOOR)
        off = np.maximum(found, FLOOR) - right
        scale = max(_rms(right - right.mean(axis=0)), 0.1)  # at least: a single frame does not change in time
        allowed = TOLERANCES[self._precision]
        if not _rms(off) <= allowed * scale:
            raise self._wrong(
                f"log_probs are off those of {expected.source} by {_rms(off) / scale:.2g} of their own changes, "
                f"{allowed:g} is allowed"
            )
        said, wanted = (_text(rows, expected, allowed * scale) for rows in (found[0], expected.log_probs))
        if said != wanted:
            raise self._wrong(f"says {said!r} where {expected.source} says {wanted!r}")
        return float(np.abs(off).max(initial=0))

    def _wrong(self, cause: str) -> ModelError:
        return ModelError(f"{self.name}: {cause} ({self.engine}), so nothing was timed; make the model again")


@dataclass(frozen=True)
class Expected:
    """The right log_probs [T', n_classes] of the utterance, and who says so."""

    log_probs: Float32
    labels: tuple[str, ...]
    source: str


def _expect(
    source: Source, subjects: list[Subject], check_against: Path | None, threads: int | None
) -> Expected | None:
    """Log_probs to compare with, by a session that is closed again before anything is timed."""
    found = _reference(source, {subject.engine.backend for subject in subjects}, check_against)
    if found is None:
        return None
    model, name = found
    backend = open_backend("ort", model, threads=threads)
    try:
        kinds = {(config.in_feats, config.labels, config.stride) for config in (backend.config, subjects[0].config)}
        if len(kinds) > 1:
            raise UsageError(f"{name}: has other labels, bands or stride than {source.name}; give its own .onnx")
        reference = Subject(name, Engine(), backend, Workload(frames=subjects[0].frames))
        return Expected(reference.run()[0].copy(), backend.config.labels, name)
    finally:
        backend.close()


def _reference(source: Source, backends: set[str], check_against: Path | None) -> tuple[Path | bytes, str] | None:
    """The ONNX that gives the right log_probs, and how it is called."""
    if check_against is not None:
        return check_against, f"{check_against.name} in onnxruntime"
    if source.checkpoint:
        return graph_bytes(source.checkpoint, masked=False), "the float32 graph with direct convolutions in onnxruntime"
    if source.path.suffix == ".om":
        return _onnx_of_om(source.path)
    return (source.path, "the same file in onnxruntime") if backends != {"ort"} else None


def _onnx_of_om(om: Path) -> tuple[Path, str] | None:
    """The ONNX that the sidecar names, if it lies beside the .om. Raises ModelError if it is another one."""
    from jasper_asr.backends.acl import read_sidecar

    facts = read_sidecar(om).facts
    path = om.with_name(Path(str(facts.get("onnx", ""))).name or "none")
    if not path.is_file():
        return None
    if file_sha256(path) != facts.get("onnx_sha256"):
        raise ModelError(f"{path}: not the ONNX that {om.name} was compiled from; give that with --check-against")
    return path, f"{path.name} in onnxruntime"


def _frames(backend: Backend, workload: Workload) -> int:
    """Frames of audio in an utterance: asked for, else the model's own, else 40 s."""
    if workload.frames is not None:
        return workload.frames
    if workload.seconds is None and backend.shapes.frames:
        return backend.shapes.frames
    config = backend.config.features
    return features.valid_frames(round((workload.seconds or DEFAULT_SECONDS) * config.sample_rate) or 1, config)


def _fit(name: str, shapes: Shapes, batch_size: int | None, frames: int) -> tuple[int, int]:
    """(batch size, frames) that the model takes for what was asked. Raises UsageError."""
    if shapes.frames and (frames > shapes.frames or (frames < shapes.frames and not shapes.masked)):
        raise UsageError(f"{name}: takes {shapes.frames} frames, not {frames}; leave the length out")
    fitted, padded = shapes.fit(batch_size or 1, frames)
    if batch_size not in (None, fitted):
        raise UsageError(f"{name}: takes batches of {fitted}, not {batch_size}; leave the batch size out")
    return fitted, padded


def _clip_features(config: ModelConfig, frames: int) -> Float32:
    """The known clip, repeated to just so many frames: float32 [n_filt, frames]."""
    front_end = config.features
    samples = audio.load_audio(CLIP, sample_rate=front_end.sample_rate)
    feats, _ = features.features(np.resize(samples, frames * front_end.hop_length), front_end)
    return feats[:, :frames]


def _precision(backend: Backend, engine: Engine) -> str:
    """What the model computes in, as far as it says; NPUs compute in float16 unless told otherwise."""
    own = getattr(backend, "properties", {}).get("precision")
    default = "f16" if engine.backend in ("acl", "cann") else "f32"
    return engine.precision or (own if own in TOLERANCES else default)


def _rms(values: Float32) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _difference(left: Float32, right: Float32) -> float:
    return float(np.abs(left - right).max(initial=0))


def _text(log_probs: Float32, expected: Expected, tie: float) -> str:
    """Best-path text of log_probs [T', n_classes]; where the reference's two best labels lie within `tie`, as there."""
    best = np.sort(expected.log_probs, axis=1)
    undecided = (best[:, -1] - best[:, -2] <= tie)[:, None]
    return decode.greedy(np.where(undecided, expected.log_probs, log_probs), len(log_probs), expected.labels)


class _TorchBackend:
    """Our network in eager PyTorch, as a backend for comparisons: what a user of the checkpoint runs without us."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None) -> None:
        import torch

        from jasper_asr.model.net import Jasper

        if threads:
            torch.set_num_threads(threads)
        self.config = checkpoint.config
        self.shapes = Shapes(None, None, masked=True)
        self._net = Jasper(checkpoint.config).eval().requires_grad_(False)
        self._net.load_state_dict({name: torch.from_numpy(values) for name, values in checkpoint.weights.items()})

    def run(self, feats: Float32, lens: Int32) -> tuple[Float32, Int32]:
        """See Backend.run."""
        import torch

        log_probs, out_lens = self._net(torch.from_numpy(feats), torch.from_numpy(lens))
        return log_probs.numpy(), out_lens.numpy()

    def close(self) -> None:
        """Drop the network."""
        del self._net
