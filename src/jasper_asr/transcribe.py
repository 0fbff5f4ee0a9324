"""The spine: audio -> features -> network -> text. The only room that joins the four stages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from jasper_asr import audio, decode, features
from jasper_asr.backends import Backend, open_backend
from jasper_asr.config import ModelConfig
from jasper_asr.errors import AudioError, JasperError, ModelError, StorageError, UsageError

Float32 = NDArray[np.float32]

Source = str | PathLike[str] | bytes | tuple[NDArray[np.generic], int]
"""What can be transcribed: a path, the bytes of an encoded file, or (samples, rate)."""


@dataclass(frozen=True)
class Clip:
    """A source and the part of it to use; `offset` and `duration` in seconds."""

    source: Source
    offset: float = 0.0
    duration: float | None = None


@dataclass(frozen=True)
class Transcript:
    """What was recognised in one utterance; `duration` in seconds of audio."""

    text: str
    duration: float


@dataclass(frozen=True)
class Failure:
    """An utterance that could not be transcribed, and why."""

    error: JasperError


Result = Transcript | Failure


class Transcriber:
    """Features, network and decoder of one model. Make it with `load`; use it as a context manager or `close` it.

    `batch_size` is how many utterances `transcribe_many` gives the network at once; 1 runs each at its exact length.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        batch_size: int = 1,
        trim_silence: bool | None = None,
        pad_to: float | None = None,
        limits: audio.AudioLimits = audio.DEFAULT_LIMITS,
    ) -> None:
        self._backend = backend
        self.config = backend.config
        self.batch_size = backend.shapes.batch_size or batch_size
        self.trim_silence = self.config.dataset.trim_silence if trim_silence is None else trim_silence
        self.limits = limits
        self.feature_config = replace(
            self.config.features, pad_to_max_duration=pad_to is not None, max_duration=pad_to or float("inf")
        )

    def features(self, samples: Float32) -> tuple[Float32, int]:
        """Samples float32 [N] at the model's rate -> (features float32 [n_filt, T], valid frames)."""
        return features.features(samples, self.feature_config)

    def log_probs(self, samples: Sequence[Float32]) -> tuple[Float32, NDArray[np.int32]]:
        """Samples of B utterances, each float32 [N] -> (log_probs float32 [B, T', n_classes], lens int32 [B]).

        Rows beyond their length are zero. The result for an utterance does not depend on the others.
        """
        rows = self._run([self.features(row) for row in samples])
        lens = np.array([len(row) for row in rows], np.int32)
        padded = np.zeros((len(rows), int(lens.max(initial=0)), self.config.n_classes), np.float32)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded, lens

    def transcribe(self, source: Source | Clip) -> Transcript:
        """Transcribe one utterance. Raises AudioError, StorageError or ModelError."""
        samples = self._read(source)
        return self._decode([self.features(samples)], [len(samples)])[0]

    def transcribe_many(
        self, sources: Iterable[Source | Clip], *, progress: Callable[[float], None] | None = None
    ) -> Iterator[Result]:
        """Results in the order of `sources`; one that cannot be read or run is a Failure and stops nobody else.

        With a batch size above 1 neighbours of similar length are run together, so results come in chunks.
        `progress` is called with the seconds of audio that each finished utterance holds.
        """
        chunk_size = self.batch_size * 16 if self.batch_size > 1 else 1
        chunk: list[Source | Clip] = []
        for source in sources:
            chunk.append(source)
            if len(chunk) == chunk_size:
                yield from self._chunk(chunk, progress)
                chunk = []
        if chunk:
            yield from self._chunk(chunk, progress)

    def close(self) -> None:
        """Give back the runtime's memory."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chunk(self, sources: list[Source | Clip], progress: Callable[[float], None] | None) -> list[Result]:
        results: list[Result | None] = [None] * len(sources)
        ready: list[tuple[int, tuple[Float32, int], int]] = []
        for index, source in enumerate(sources):
            try:
                samples = self._read(source)
                ready.append((index, self.features(samples), len(samples)))
            except JasperError as error:
                results[index] = Failure(error)
        ready.sort(key=lambda item: item[1][1])
        for start in range(0, len(ready), self.batch_size):
            batch = ready[start : start + self.batch_size]
            outcome = self._batch([item[1] for item in batch], [item[2] for item in batch])
            for (index, _, samples_count), result in zip(batch, outcome, strict=True):
                results[index] = result
                if progress:
                    progress(samples_count / self.config.features.sample_rate)
        return [result for result in results if result is not None]

    def _batch(self, feats: list[tuple[Float32, int]], sizes: list[int]) -> Sequence[Result]:
        try:
            return self._decode(feats, sizes)
        except JasperError as error:
            if len(feats) == 1:
                return [Failure(error)]
        return [self._batch([feat], [size])[0] for feat, size in zip(feats, sizes, strict=True)]

    def _read(self, source: Source | Clip) -> Float32:
        clip = source if isinstance(source, Clip) else Clip(source)
        samples = audio.load_audio(
            clip.source,
            offset=clip.offset,
            duration=clip.duration,
            limits=self.limits,
            sample_rate=self.config.features.sample_rate,
        )
        return audio.trim_silence(samples) if self.trim_silence else samples

    def _decode(self, feats: list[tuple[Float32, int]], sizes: list[int]) -> list[Transcript]:
        rate = self.config.features.sample_rate
        return [
            Transcript(decode.greedy(row, len(row), self.config.labels), size / rate)
            for row, size in zip(self._run(feats), sizes, strict=True)
        ]

    def _run(self, feats: list[tuple[Float32, int]]) -> list[Float32]:
        """Valid log_probs [T', n_classes] of each utterance, through batches that the backend's shapes allow."""
        shapes = self._backend.shapes
        size = shapes.batch_size or (len(feats) if shapes.masked else 1)
        rows: list[Float32] = []
        for start in range(0, len(feats), max(size, 1)):
            part = feats[start : start + size]
            packed, lens = self._pack(part, shapes.batch_size or len(part))
            log_probs, out_lens = self._backend.run(packed, lens)
            rows += [row[:length] for row, length in zip(log_probs, out_lens[: len(part)], strict=False)]
        return rows

    def _pack(self, feats: list[tuple[Float32, int]], batch_size: int) -> tuple[Float32, NDArray[np.int32]]:
        """[B, n_filt, T] and lens; rows that only fill up a fixed batch have one silent frame."""
        shapes = self._backend.shapes
        longest = max(length for _, length in feats)
        frames = shapes.frames or (max(feat.shape[1] for feat, _ in feats) if shapes.masked else longest)
        if longest > frames:
            limit = frames * self.config.features.window_stride
            raise AudioError(
                f"the audio has {longest} frames, the model takes {frames} ({limit:g} s); "
                "split it, or export a model without --frames"
            )
        if not shapes.masked and shapes.frames and any(length != frames for _, length in feats):
            raise ModelError("an unmasked model of fixed length takes only audio of exactly that length")
        packed = np.zeros((batch_size, self.config.in_feats, frames), np.float32)
        lens = np.ones(batch_size, np.int32)
        for index, (feat, length) in enumerate(feats):
            packed[index, :, :length] = feat[:, :length]
            lens[index] = length
        return packed, lens


BUILTIN_MODELS = {"mini": Path(__file__).parent / "models" / "mini" / "weights.safetensors"}


def load(
    model: str | PathLike[str] = "mini",
    backend: str = "ort",
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    threads: int | None = None,
    batch_size: int = 1,
    trim_silence: bool | None = None,
    pad_to: float | None = None,
) -> Transcriber:
    """A Transcriber for a built-in name (`mini`), an .onnx, .pt or .safetensors.

    `config` and `weights` (`ema` or `raw`) matter for checkpoints only; `threads` None lets the runtime choose.
    `trim_silence` None does what the config says. `pad_to` (seconds) pads every utterance to that length, as the
    Ascend guide does. Raises StorageError, ConfigError, ModelError or UsageError.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: must be at least 1")
    path = BUILTIN_MODELS[str(model)] if str(model) in BUILTIN_MODELS else Path(model)
    if not path.exists():
        names = ", ".join(BUILTIN_MODELS)
        raise StorageError(f"{path}: no such model; give a file, or one of the built-in names ({names})")
    if path.suffix == ".onnx":
        opened = open_backend(backend, path, threads=threads)
    else:
        masked = batch_size > 1 or pad_to is not None
        opened = open_backend(backend, _graph_bytes(path, config, weights, masked), threads=threads)
    return Transcriber(opened, batch_size=batch_size, trim_silence=trim_silence, pad_to=pad_to)


def _graph_bytes(path: Path, config: ModelConfig | None, weights: str, masked: bool) -> bytes:
    from jasper_asr.model.checkpoint import load_checkpoint
    from jasper_asr.model.graph import build_graph

    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ModelError(f"{path}: unknown kind of model; give .onnx, .pt or .safetensors")
    checkpoint = load_checkpoint(path, config=config, weights=weights)
    serialized: bytes = build_graph(checkpoint.config, checkpoint.weights, masked=masked).SerializeToString()
    return serialized
