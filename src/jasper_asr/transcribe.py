"""The spine: audio -> features -> network -> text. The only room that joins the four stages."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from jasper_asr import audio, decode, features
from jasper_asr.align import Word, align
from jasper_asr.backends import Backend, open_backend
from jasper_asr.config import ModelConfig
from jasper_asr.errors import AudioError, JasperError, ModelError, UsageError
from jasper_asr.windows import LongFeatures, exact_halo, plan_windows

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
    """Beam search: `lm` is an n-gram model (a file, or the built-in `mini`), None searches without one.

    A width and weights that are None are those that `jasper_asr.beam` was tuned to. `hotwords` gives words, and
    phrases of several, what is added for each time that they are said.
    """

    lm: str | PathLike[str] | None = None
    width: int | None = None
    lm_weight: float | None = None
    word_bonus: float | None = None
    unknown_penalty: float | None = None
    blank_penalty: float | None = None
    hotwords: Mapping[str, float] | None = None


BUILTIN_LMS = {"mini": Path(__file__).parent / "models" / "mini" / "words.lm"}
"""Language models inside the package, by name."""


@dataclass(frozen=True)
class Transcript:
    """What was recognised in one utterance; `duration` in seconds of audio.

    `words` have times in seconds from its start; they are there when the Transcriber was asked for them.
    """

    text: str
    duration: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Failure:
    """An utterance that could not be transcribed, and why."""

    error: JasperError


Result = Transcript | Failure

Decoder = Callable[[Float32], str]

LONGEST_PASS = 12_000
"""Feature frames that go through the network at once, two minutes; longer audio goes in windows of this length."""


class Transcriber:
    """Features, network and decoder of one model. Make it with `load`; use it as a context manager or `close` it.

    `batch_size` is how many utterances `transcribe_many` gives the network at once; 1 runs each at its exact length.
    `decoder` turns an utterance's log_probs [T', n_classes] into text; by default the best path.
    `with_lm` says that a language model has a say in it, which changes how confident its words are.
    `words` adds times and confidences of words. Audio longer than two minutes, or than the model takes, goes through
    the network in windows with exact halos; `chunk_seconds` sets another length of windows, and `halo_seconds` below
    half the receptive field makes the result approximate.
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
        with_lm: bool = False,
        words: bool = False,
        chunk_seconds: float | None = None,
        halo_seconds: float | None = None,
    ) -> None:
        self._backend = backend
        self._decoder = decoder or (lambda rows: decode.greedy(rows, len(rows), backend.config.labels))
        self.config = backend.config
        self.batch_size = backend.shapes.batch_size or batch_size
        self.trim_silence = self.config.dataset.trim_silence if trim_silence is None else trim_silence
        self.limits = limits
        self.words, self._with_lm = words, with_lm
        stride = self.config.features.window_stride
        self._halo = exact_halo(self.config) if halo_seconds is None else round(halo_seconds / stride)
        self._window = backend.shapes.frames or max(LONGEST_PASS, 4 * self._halo)
        if chunk_seconds is not None:
            self._window = min(self._window, round(chunk_seconds / stride))
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
        items = [self._measured(index, f"<samples {index}>", row) for index, row in enumerate(samples)]
        rows = self._run(items)
        lens = np.array([len(row) for row in rows], np.int32)
        padded = np.zeros((len(rows), int(lens.max(initial=0)), self.config.n_classes), np.float32)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded, lens

    @property
    def fixed_frames(self) -> int | None:
        """Feature frames of every run, for a model of fixed length; None for one that takes any length."""
        return self._backend.shapes.frames

    def run_features(self, feats: Float32) -> Float32:
        """Normalised features float32 [n_filt, T] -> log_probs float32 [T', n_classes], in one pass."""
        return next(self._run_batches([(feats, feats.shape[1])]))

    def transcribe(self, source: Source | Clip) -> Transcript:
        """Transcribe one utterance. Raises AudioError, StorageError or ModelError."""
        item = self._prepare(0, source)
        return self._transcript(item, self._run([item])[0])

    def transcribe_many(
        self,
        sources: Iterable[Source | Clip],
        *,
        progress: Callable[[float], None] | None = None,
        heard: Callable[[float], None] | None = None,
        jobs: int = 0,
    ) -> Iterator[Result]:
        """Results in the order of `sources`; one that cannot be read or run is a Failure and stops nobody else.

        With a batch size above 1 utterances of similar length are run together, so results come in bursts; for a model
        with gears those of one gear are. `progress` is called once for every result, with the seconds of audio that it
        holds: 0 if unreadable; `heard` with the seconds that went through the network, many times in a long file.
        While the network runs, a thread decodes what it gave before, and the next `jobs` sources are read and get
        their features, each in a thread.
        """
        decoding = ThreadPoolExecutor(1)
        results: dict[int, Future[Result]] = {}
        undecoded: deque[Future[Result]] = deque()
        position = 0
        try:
            for index, result in self._run_many(self._prepared(sources, jobs), decoding, heard):
                results[index] = result
                undecoded.append(result)
                while len(undecoded) > self.batch_size:  # the thread is behind: its log_probs must not pile up
                    undecoded.popleft().exception()
                while position in results and results[position].done():
                    yield _finished(results.pop(position), progress)
                    position += 1
            for position in sorted(results):
                yield _finished(results[position], progress)
        finally:
            decoding.shutdown(cancel_futures=True)

    def listen(self, source: Source | Clip) -> Float32:
        """log_probs float32 [T', n_classes] of one utterance, which `transcribe` decodes. Raises as that does."""
        return self._run([self._prepare(0, source)])[0]

    def close(self) -> None:
        """Give back the runtime's memory."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_many(
        self, items: Iterable["_Ready | Failure"], decoding: ThreadPoolExecutor, heard: Callable[[float], None] | None
    ) -> Iterator[tuple[int, Future[Result]]]:
        """(position, result to come) of each of `items`, when the network is done with it."""
        room = self.batch_size * 16 if self.batch_size > 1 else 1
        pending: list[_Ready] = []
        for index, item in enumerate(items):
            if isinstance(item, Failure):
                yield index, _known(item)
                continue
            item = replace(item, index=index)
            if isinstance(item.feats, LongFeatures):
                yield from self._run_batch([item], decoding, heard)  # at once: many would fill the memory
                continue
            pending.append(item)
            if len(pending) >= room:
                batches, pending = self._full_batches(pending)
                for batch in batches:
                    yield from self._run_batch(batch, decoding, heard)
        pending.sort(key=lambda item: item.frames, reverse=True)
        for start in range(0, len(pending), self.batch_size):
            yield from self._run_batch(pending[start : start + self.batch_size], decoding, heard)

    def _full_batches(self, pending: list["_Ready"]) -> tuple[list[list["_Ready"]], list["_Ready"]]:
        """Batches of similar length, none of which mixes gears, and what is left over."""
        groups: dict[int, list[_Ready]] = {}
        for item in sorted(pending, key=lambda item: item.frames):
            gear = min((frames for _, frames in self._backend.shapes.gears if frames >= item.frames), default=0)
            groups.setdefault(gear, []).append(item)
        batches, left = [], []
        for group in groups.values():
            whole = len(group) // self.batch_size * self.batch_size
            batches += [group[start : start + self.batch_size] for start in range(0, whole, self.batch_size)]
            left += group[whole:]
        return batches, left

    def _run_batch(
        self, batch: list["_Ready"], decoding: ThreadPoolExecutor, heard: Callable[[float], None] | None
    ) -> Iterator[tuple[int, Future[Result]]]:
        """As `_run_many`; if a batch fails, each utterance is tried alone, so that only the guilty ones fail."""
        try:
            rows = self._run(batch, heard)
        except JasperError as error:
            if len(batch) == 1:
                yield batch[0].index, _known(Failure(error))
            else:
                for item in batch:
                    yield from self._run_batch([item], decoding, heard)
            return
        for item, row in zip(batch, rows, strict=True):
            yield item.index, decoding.submit(self._result, item, row)

    def _result(self, item: "_Ready", row: Float32) -> Result:
        try:
            return self._transcript(item, row)
        except JasperError as error:
            return Failure(error)

    def _prepared(self, sources: Iterable[Source | Clip], jobs: int) -> Iterator["_Ready | Failure"]:
        """Each source with its features, `jobs` of them ahead of the one that is asked for."""

        def attempt(source: Source | Clip) -> _Ready | Failure:
            try:
                return self._prepare(0, source)
            except JasperError as error:
                return Failure(error)

        if not jobs:
            yield from map(attempt, sources)
            return
        pool = ThreadPoolExecutor(jobs)
        waiting: deque[Future[_Ready | Failure]] = deque()
        try:
            for source in sources:
                waiting.append(pool.submit(attempt, source))
                if len(waiting) > jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, index: int, source: Source | Clip) -> "_Ready":
        clip = source if isinstance(source, Clip) else Clip(source)
        name = str(clip.source) if isinstance(clip.source, str | PathLike) else "<audio>"
        rate = self.config.features.sample_rate
        samples = audio.load_audio(
            clip.source, offset=clip.offset, duration=clip.duration, limits=self.limits, sample_rate=rate
        )
        start, stop = audio.loud_bounds(samples) if self.trim_silence else (0, len(samples))
        item = self._measured(index, name, samples[start:stop])
        return replace(item, seconds=len(samples) / rate, offset=start / rate)

    def _measured(self, index: int, name: str, samples: Float32) -> "_Ready":
        """Samples float32 [N] with their features: at once, or window by window for long audio."""
        seconds = len(samples) / self.config.features.sample_rate
        frames = features.valid_frames(len(samples), self.feature_config)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found not finite
                if self._goes_in_windows(frames):
                    return _Ready(index, name, LongFeatures(samples, self.feature_config), frames, seconds)
                feats, frames = self.features(samples)
                if self._backend.shapes.frames:
                    feats = feats[:, :frames].copy()  # what it is padded to is made when it runs, not held by many
                return _Ready(index, name, feats, frames, seconds)
        except ValueError as error:
            raise AudioError(f"{name}: {error}; full scale is 1.0") from error

    def _goes_in_windows(self, frames: int) -> bool:
        shapes = self._backend.shapes
        return frames > self._window and (shapes.masked or not shapes.frames)

    def _transcript(self, item: "_Ready", row: Float32) -> Transcript:
        text = self._decoder(row)
        if not self.words:
            return Transcript(text, item.seconds)
        words = align(
            row,
            text,
            self.config.labels,
            seconds_per_frame=self.config.frame_seconds,
            duration=item.seconds,
            offset=item.offset,
            with_lm=self._with_lm,
        )
        return Transcript(text, item.seconds, words)

    def _check_length(self, name: str, frames: int) -> None:
        shapes = self._backend.shapes
        if shapes.frames and not shapes.masked and frames != shapes.frames:
            raise AudioError(f"{name}: this unmasked model takes just {shapes.frames} frames; use a masked one")

    def _run(self, items: list["_Ready"], heard: Callable[[float], None] | None = None) -> list[Float32]:
        """Valid log_probs [T', n_classes] of each utterance."""
        for item in items:
            self._check_length(item.name, item.frames)
        short = [(item.feats, item.frames) for item in items if not isinstance(item.feats, LongFeatures)]
        together = self._run_batches(short)
        rows = []
        for item in items:
            if isinstance(item.feats, LongFeatures):
                row = np.concatenate(list(self._run_windows(item, item.feats, heard)))
            else:
                row = next(together)
                if heard:
                    heard(item.seconds)
            if not np.isfinite(row).all():
                raise ModelError(f"{item.name}: log_probs are not finite; the weights or the precision are unfit")
            rows.append(row)
        return rows

    def _run_batches(self, feats: Sequence[tuple[Float32, int]]) -> Iterator[Float32]:
        """log_probs of each of `feats` (values [n_filt, T], valid frames), in batches that the backend takes."""
        shapes = self._backend.shapes
        # without masks only utterances of equal length can share a batch
        longest = max((frames for _, frames in feats), default=0)
        size = (shapes.most(longest) or len(feats)) if shapes.masked or shapes.frames else 1
        for start in range(0, len(feats), max(size, 1)):
            part = feats[start : start + size]
            log_probs, lens = self._backend.run(*self._pack(part))
            yield from (log_probs[index, : lens[index]] for index in range(len(part)))

    def _run_windows(
        self, item: "_Ready", feats: LongFeatures, heard: Callable[[float], None] | None
    ) -> Iterator[Float32]:
        """log_probs of long audio, piece by piece; see `jasper_asr.windows`."""
        size = self._backend.shapes.most(self._window) or 1
        try:
            windows = list(plan_windows(feats.frames, self._window, self._halo, self.config))
        except UsageError as error:
            raise UsageError(f"{item.name}: {error}") from error
        for start in range(0, len(windows), size):
            part = windows[start : start + size]
            given = [(feats.window(window.start, window.stop), window.stop - window.start) for window in part]
            for window, row in zip(part, self._run_batches(given), strict=True):
                yield row[window.first : window.last].copy()  # the rest of the window's output can go
                if heard:
                    heard((window.last - window.first) * self.config.frame_seconds)

    def _pack(self, feats: Sequence[tuple[Float32, int]]) -> tuple[Float32, NDArray[np.int32]]:
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


def _known(result: Result) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(result)
    return future


def _finished(result: Future[Result], progress: Callable[[float], None] | None) -> Result:
    done = result.result()
    if progress:
        progress(done.duration if isinstance(done, Transcript) else 0.0)
    return done


@dataclass(frozen=True)
class _Ready:
    """An utterance on its way through a batch: features, their valid frames, and where its result belongs.

    `offset` is how many seconds of silence were cut from its start.
    """

    index: int
    name: str
    feats: Float32 | LongFeatures
    frames: int
    seconds: float
    offset: float = 0.0


def load(
    model: str | PathLike[str] = "mini",
    backend: str = "auto",
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    convolution: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    device: int | None = None,
    batch_size: int = 1,
    trim_silence: bool | None = None,
    pad_to: float | None = None,
    beam: BeamOptions | None = None,
    greedy: bool = False,
    words: bool = False,
    chunk_seconds: float | None = None,
    halo_seconds: float | None = None,
) -> Transcriber:
    """A Transcriber for a built-in name (`mini`), an .onnx, .om, .pt, .nemo or .safetensors.

    `config` and `weights` (`ema` or `raw`) matter for checkpoints only; `threads` None lets the runtime choose.
    So does `convolution`: `direct`, `spectral` or `auto` (None), whichever is faster by a cost model. `precision` is
    what the runtime computes in: `f32` (None), `bf16` or `f16` with OpenVINO where the CPU can.
    An .om always runs on the backend `acl`, on the NPU number `device` (0).
    `trim_silence` None does what the config says. `pad_to` (seconds) pads every utterance to that length, as the
    Ascend guide does. A built-in model decodes by beam search with the language model that it ships, others take the
    best path; `beam` or `greedy` say otherwise. `words`, `chunk_seconds` and `halo_seconds`: see Transcriber.
    Raises StorageError, ConfigError, ModelError or UsageError.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: must be at least 1")
    if pad_to is not None and not 0 < pad_to < float("inf"):
        raise UsageError(f"pad_to {pad_to}: must be a number of seconds above 0")
    if greedy and beam:
        raise UsageError("greedy decoding takes no language model and no beam; leave one of them out")
    for name, seconds in (("chunk_seconds", chunk_seconds), ("halo_seconds", halo_seconds)):
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise UsageError(f"{name} {seconds}: must be a number of seconds")
    from jasper_asr.model.export import resolve_model

    path = resolve_model(model)
    if beam is None and not greedy and str(model) in BUILTIN_LMS:
        beam = BeamOptions(lm=str(model))
    lm = _load_lm(beam) if beam else None
    opened = _open_network(
        path,
        backend,
        {"threads": threads, "device": device, "precision": precision},
        config=config,
        weights=weights,
        masked=batch_size > 1 or pad_to is not None,  # alone and at its exact length an utterance needs no masks
        convolution=convolution,
    )
    decoder = _beam_decoder(beam, lm, opened.config) if beam else None
    return Transcriber(
        opened,
        batch_size=batch_size,
        trim_silence=trim_silence,
        pad_to=pad_to,
        decoder=decoder,
        with_lm=lm is not None,
        words=words,
        chunk_seconds=chunk_seconds,
        halo_seconds=halo_seconds,
    )


def _open_network(
    path: Path,
    backend: str,
    options: dict[str, Any],
    *,
    config: ModelConfig | None,
    weights: str,
    masked: bool,
    convolution: str | None,
) -> Backend:
    """An exported model as it is; of a checkpoint the graph that suits, from the cache if it was built before."""
    from jasper_asr.model.cache import open_built

    if path.suffix not in (".onnx", ".om"):
        shape = {"masked": masked, "convolution": convolution or "auto"}
        return open_built(
            path, lambda graph: open_backend(backend, graph, **options), config=config, weights=weights, **shape
        )
    if convolution:
        raise UsageError(f"{path}: keeps the convolutions it was exported with; give a checkpoint")
    return open_backend("acl" if path.suffix == ".om" else backend, path, **options)


def _load_lm(options: BeamOptions) -> "NgramModel | None":
    from jasper_asr.lm import NgramModel

    if options.lm is None:
        return None
    return NgramModel.load(BUILTIN_LMS.get(str(options.lm), Path(options.lm)))


def _beam_decoder(options: BeamOptions, lm: "NgramModel | None", config: ModelConfig) -> Decoder:
    from jasper_asr.beam import BeamSearch

    given = {
        "beam_width": options.width,
        "lm_weight": options.lm_weight,
        "word_bonus": options.word_bonus,
        "unknown_penalty": options.unknown_penalty,
        "blank_penalty": options.blank_penalty,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    search = BeamSearch(config.labels, lm=lm, hotwords=options.hotwords, **chosen)
    return lambda rows: search(rows, len(rows))[0].text
