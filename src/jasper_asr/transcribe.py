"""The spine: audio -> features -> network -> text. The only room that joins the four stages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from jasper_asr import audio, decode, features
from jasper_asr.backends import Backend, open_backend
from jasper_asr.config import ModelConfig
from jasper_asr.errors import AudioError, JasperError, ModelError, UsageError

if TYPE_CHECKING:
    from jasper_asr.lm import NgramModel

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
class BeamOptions:
    """Beam search: `lm` is an n-gram model (our binary, ARPA, or the built-in `mini`), None searches without one.

    Weights that are None are those that `jasper_asr.beam` was tuned to.
    """

    lm: str | PathLike[str] | None = None
    width: int = 64
    lm_weight: float | None = None
    word_bonus: float | None = None


BUILTIN_LMS = {"mini": Path(__file__).parent / "models" / "mini" / "words.lm"}
"""Language models inside the package, by name."""


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

Decoder = Callable[[Float32], str]


class Transcriber:
    """Features, network and decoder of one model. Make it with `load`; use it as a context manager or `close` it.

    `batch_size` is how many utterances `transcribe_many` gives the network at once; 1 runs each at its exact length.
    `decoder` turns an utterance's log_probs [T', n_classes] into text; by default the best path.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        batch_size: int = 1,
        trim_silence: bool | None = None,
        pad_to: float | None = None,
        limits: audio.AudioLimits = audio.DEFAULT_LIMITS,
        decoder: Decoder | None = None,
    ) -> None:
        self._backend = backend
        self._decoder = decoder or (lambda rows: decode.greedy(rows, len(rows), backend.config.labels))
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
        names = [f"<samples {index}>" for index in range(len(samples))]
        feats = [self._finite_features(name, row) for name, row in zip(names, samples, strict=True)]
        rows = self._run(names, feats)
        lens = np.array([len(row) for row in rows], np.int32)
        padded = np.zeros((len(rows), int(lens.max(initial=0)), self.config.n_classes), np.float32)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded, lens

    def transcribe(self, source: Source | Clip) -> Transcript:
        """Transcribe one utterance. Raises AudioError, StorageError or ModelError."""
        return self._decode([self._prepare(0, source)])[0]

    def transcribe_many(
        self, sources: Iterable[Source | Clip], *, progress: Callable[[float], None] | None = None
    ) -> Iterator[Result]:
        """Results in the order of `sources`; one that cannot be read or run is a Failure and stops nobody else.

        With a batch size above 1 neighbours of similar length are run together, so results come in chunks.
        `progress` is called once for every utterance, with the seconds of audio that it holds: 0 if unreadable.
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
        ready: list[_Ready] = []
        for index, source in enumerate(sources):
            try:
                ready.append(self._prepare(index, source))
            except JasperError as error:
                results[index] = Failure(error)
                if progress:
                    progress(0.0)
        ready.sort(key=lambda item: item.frames)
        for start in range(0, len(ready), self.batch_size):
            batch = ready[start : start + self.batch_size]
            for item, result in zip(batch, self._batch(batch), strict=True):
                results[item.index] = result
                if progress:
                    progress(item.seconds)
        return [result for result in results if result is not None]

    def _batch(self, batch: list["_Ready"]) -> list[Result]:
        """Results of a batch; if it fails, each utterance is tried alone, so that only the guilty ones fail."""
        try:
            return list(self._decode(batch))
        except JasperError as error:
            if len(batch) == 1:
                return [Failure(error)]
        return [result for item in batch for result in self._batch([item])]

    def _prepare(self, index: int, source: Source | Clip) -> "_Ready":
        clip = source if isinstance(source, Clip) else Clip(source)
        name = str(clip.source) if isinstance(clip.source, str | PathLike) else "<audio>"
        rate = self.config.features.sample_rate
        samples = audio.load_audio(
            clip.source, offset=clip.offset, duration=clip.duration, limits=self.limits, sample_rate=rate
        )
        kept = audio.trim_silence(samples) if self.trim_silence else samples
        return _Ready(index, name, *self._finite_features(name, kept), seconds=len(samples) / rate)

    def _finite_features(self, name: str, samples: Float32) -> tuple[Float32, int]:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found not finite
                return self.features(samples)
        except ValueError as error:
            raise AudioError(f"{name}: {error}; full scale is 1.0") from error

    def _decode(self, batch: list["_Ready"]) -> list[Transcript]:
        rows = self._run([item.name for item in batch], [(item.feats, item.frames) for item in batch])
        return [Transcript(self._decoder(row), item.seconds) for item, row in zip(batch, rows, strict=True)]

    def _check_length(self, name: str, frames: int) -> None:
        shapes, stride = self._backend.shapes, self.config.features.window_stride
        if shapes.frames and frames > shapes.frames:
            raise AudioError(
                f"{name}: {frames * stride:g} s of audio, the model takes {shapes.frames * stride:g} s; "
                "split it, or use a model exported without --frames"
            )
        if shapes.frames and not shapes.masked and frames != shapes.frames:
            raise AudioError(f"{name}: this unmasked model takes just {shapes.frames} frames; use a masked one")

    def _run(self, names: list[str], feats: list[tuple[Float32, int]]) -> list[Float32]:
        """Valid log_probs [T', n_classes] of each utterance, through batches that the backend's shapes allow."""
        shapes = self._backend.shapes
        for name, (_, frames) in zip(names, feats, strict=True):
            self._check_length(name, frames)
        # without masks only utterances of equal length can share a batch
        longest = max((frames for _, frames in feats), default=0)
        size = (shapes.most(longest) or len(feats)) if shapes.masked or shapes.frames else 1
        rows: list[Float32] = []
        for start in range(0, len(feats), max(size, 1)):
            part = feats[start : start + size]
            log_probs, lens = self._backend.run(*self._pack(part))
            rows += [log_probs[index, : lens[index]] for index in range(len(part))]
        for name, row in zip(names, rows, strict=True):
            if not np.isfinite(row).all():
                raise ModelError(f"{name}: log_probs are not finite; the weights or the precision are unfit")
        return rows

    def _pack(self, feats: list[tuple[Float32, int]]) -> tuple[Float32, NDArray[np.int32]]:
        """[B, n_filt, T] and lens; rows that only fill up a fixed batch have one silent frame."""
        shapes = self._backend.shapes
        # without masks, zeros beyond the end would be taken for sound: cut to the valid frames
        exact = shapes.frames or not shapes.masked
        widest = max(length if exact else feat.shape[1] for feat, length in feats)
        batch_size, frames = shapes.fit(len(feats), widest)
        packed = np.zeros((batch_size, self.config.in_feats, frames), np.float32)
        lens = np.ones(batch_size, np.int32)
        for index, (feat, length) in enumerate(feats):
            packed[index, :, :length] = feat[:, :length]
            lens[index] = length
        return packed, lens


@dataclass(frozen=True)
class _Ready:
    """An utterance on its way through a batch: features, their valid frames, and where its result belongs."""

    index: int
    name: str
    feats: Float32
    frames: int
    seconds: float


def load(
    model: str | PathLike[str] = "mini",
    backend: str = "ort",
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    threads: int | None = None,
    device: int | None = None,
    batch_size: int = 1,
    trim_silence: bool | None = None,
    pad_to: float | None = None,
    beam: BeamOptions | None = None,
) -> Transcriber:
    """A Transcriber for a built-in name (`mini`), an .onnx, .om, .pt or .safetensors.

    `config` and `weights` (`ema` or `raw`) matter for checkpoints only; `threads` None lets the runtime choose.
    An .om always runs on the backend `acl`, on the NPU number `device` (0).
    `trim_silence` None does what the config says. `pad_to` (seconds) pads every utterance to that length, as the
    Ascend guide does. `beam` decodes by beam search; None takes the best path.
    Raises StorageError, ConfigError, ModelError or UsageError.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: must be at least 1")
    if pad_to is not None and not 0 < pad_to < float("inf"):
        raise UsageError(f"pad_to {pad_to}: must be a number of seconds above 0")
    from jasper_asr.model.checkpoint import load_checkpoint
    from jasper_asr.model.export import graph_bytes, resolve_model

    path = resolve_model(model)
    lm = _load_lm(beam) if beam else None
    if path.suffix in (".onnx", ".om"):
        name = "acl" if path.suffix == ".om" else backend
        opened = open_backend(name, path, threads=threads, device=device)
    else:
        # alone and at its exact length an utterance needs no masks
        masked = batch_size > 1 or pad_to is not None
        checkpoint = load_checkpoint(path, config=config, weights=weights)
        opened = open_backend(backend, graph_bytes(checkpoint, masked=masked), threads=threads, device=device)
    decoder = _beam_decoder(beam, lm, opened.config) if beam else None
    return Transcriber(opened, batch_size=batch_size, trim_silence=trim_silence, pad_to=pad_to, decoder=decoder)


def _load_lm(options: BeamOptions) -> "NgramModel | None":
    from jasper_asr.lm import NgramModel

    if options.lm is None:
        return None
    return NgramModel.load(BUILTIN_LMS.get(str(options.lm), Path(options.lm)))


def _beam_decoder(options: BeamOptions, lm: "NgramModel | None", config: ModelConfig) -> Decoder:
    from jasper_asr.beam import BeamSearch

    given = {"lm_weight": options.lm_weight, "word_bonus": options.word_bonus}
    weights: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    search = BeamSearch(config.labels, lm=lm, beam_width=options.width, **weights)
    return lambda rows: search(rows, len(rows))[0].text
