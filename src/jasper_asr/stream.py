"""Transcription while somebody speaks: partial texts at once, and at the end what the whole recording gives.

    stream = Stream(transcriber)
    for samples in microphone:
        print(stream.push(samples).text)
    print(stream.finish().text)

Partial texts come from the network with two approximations that `finish` does not have: features are normalised by
the mean and deviation of what was heard so far, and an output frame is settled as soon as `right_context` seconds
after it are known, though the network would look further. They are best-path texts, without a language model.
`finish` transcribes the samples that were pushed, all of them, as `Transcriber.transcribe` does.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr import audio
from jasper_asr.config import ModelConfig
from jasper_asr.errors import AudioError, UsageError
from jasper_asr.features import STD_GUARD, log_mel
from jasper_asr.transcribe import Transcriber, Transcript
from jasper_asr.windows import exact_halo

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Partial:
    """What was understood so far: `text` is `settled` and what may still change; `silence` seconds since a label."""

    text: str
    settled: str
    seconds: float
    silence: float


class Stream:
    """One utterance that arrives in pieces; `push` them, then `finish`.

    `rate` is that of the samples. The network runs whenever `step` seconds of new audio have come, so that is how
    often texts change. Raises UsageError for a model of fixed length, or times that are not above 0.
    """

    def __init__(
        self, transcriber: Transcriber, *, rate: int = 16_000, step: float = 0.4, right_context: float = 1.0
    ) -> None:
        if min(step, right_context) <= 0:
            raise UsageError(f"step {step} and right_context {right_context}: must be seconds above 0")
        if transcriber.fixed_frames:
            raise UsageError("streaming needs a model of any length; export it without --frames")
        self._transcriber, self._rate = transcriber, rate
        self._config = transcriber.config
        self._pushed: list[NDArray[np.generic]] = []
        self._resampler = _resampler(rate, self._config.features.sample_rate)
        self._normaliser = _RunningNormaliser(self._config.in_feats)
        stride = self._config.features.window_stride
        self._step = max(1, round(step / stride))
        self._right = round(right_context / stride)
        self._left = exact_halo(self._config)
        self._tail = np.zeros(0, np.float32)  # samples of incomplete frames, and their past
        self._log_mels = np.zeros((self._config.in_feats, 0), np.float32)  # of the frames from `_first` on
        self._first = self._heard = 0
        self._settled = _Reading(self._config)
        self._shown = self._settled
        self._samples = 0

    @property
    def seconds(self) -> float:
        """Seconds of audio pushed so far."""
        return self._samples / self._rate

    def push(self, samples: NDArray[np.generic]) -> Partial:
        """Add samples [N] or [N, channels], of any length and dtype that `load_audio` takes; what is understood now."""
        samples = np.asarray(samples)
        if samples.ndim not in (1, 2) or samples.dtype.kind not in "iuf":
            raise AudioError(f"<stream>: samples are {samples.dtype} {list(samples.shape)}; push [N] or [N, channels]")
        self._pushed.append(samples.copy())
        self._samples += len(samples)
        self._add_frames(audio.to_mono(samples))
        if self._frames - self._heard >= self._step:
            self._run()
        silence = self._shown.silent_frames * self._config.frame_seconds
        return Partial(self._shown.text, self._settled.text, self.seconds, silence)

    def finish(self) -> Transcript:
        """The transcript of everything pushed: equal to `transcriber.transcribe((samples, rate))`."""
        if not self._pushed:
            raise AudioError("<stream>: nothing was pushed; give it samples first")
        return self._transcriber.transcribe((np.concatenate(self._pushed), self._rate))

    @property
    def _frames(self) -> int:
        return self._first + self._log_mels.shape[1]

    def _add_frames(self, samples: Float32) -> None:
        """Log-mels of the frames that are complete now; the first of a piece are made again with their past."""
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        features = self._config.features
        hop, margin = features.hop_length, features.n_fft // features.hop_length + 1
        self._tail = np.concatenate([self._tail, samples])
        past = min(margin, self._frames)  # frames in `_tail` that are known already
        complete = len(self._tail) // hop - margin
        if complete <= past:
            return
        fresh = log_mel(self._tail, features)[:, past:complete]
        self._normaliser.add(fresh)
        self._log_mels = np.concatenate([self._log_mels, fresh], axis=1)
        self._tail = self._tail[max(0, complete - margin) * hop :]

    def _run(self) -> None:
        """The network over what is not settled and its left context; settles what has its right context."""
        stride = self._config.stride
        settled = self._settled.frames
        start = max(0, settled * stride - self._left)
        self._forget_before(start)
        feats = self._normaliser.normalised(self._log_mels[:, start - self._first :])
        path = self._transcriber.run_features(feats).argmax(axis=1)[settled - start // stride :].tolist()
        ready = max(0, (self._frames - self._right) // stride - settled)
        self._settled = self._settled.followed_by(path[:ready])
        self._shown = self._settled.followed_by(path[ready:])
        self._heard = self._frames

    def _forget_before(self, frame: int) -> None:
        self._log_mels = self._log_mels[:, frame - self._first :]
        self._first = frame


class _Reading:
    """What a best path reads so far; more frames are read without going through the old ones again.

    `frames` were read, the last `silent_frames` of them blanks or spaces.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.text, self.frames, self.silent_frames = "", 0, 0
        self._last = config.blank_id
        self._space = False  # a space was read, and nothing after it

    def followed_by(self, path: list[int]) -> "_Reading":
        """A reading of `path`, a class a frame, after this one."""
        longer, labels, blank = copy(self), self._config.labels, self._config.blank_id
        letters: list[str] = []
        for index in path:
            spoken = index != blank and labels[index] != " "
            longer.silent_frames = 0 if spoken else longer.silent_frames + 1
            if index not in (longer._last, blank):
                if spoken and longer._space and (self.text or letters):
                    letters.append(" ")
                letters += [labels[index]] if spoken else []
                longer._space = not spoken
            longer._last = index
        longer.text += "".join(letters)
        longer.frames += len(path)
        return longer


class _RunningNormaliser:
    """Mean and deviation of each band over all frames so far."""

    def __init__(self, bands: int) -> None:
        self._count, self._sum, self._squares = 0, np.zeros(bands), np.zeros(bands)

    def add(self, log_mels: Float32) -> None:
        values = log_mels.astype(np.float64)
        self._count += values.shape[1]
        self._sum += values.sum(axis=1)
        self._squares += np.square(values).sum(axis=1)

    def normalised(self, log_mels: Float32) -> Float32:
        mean = self._sum / self._count
        variance = np.maximum(self._squares - self._count * mean**2, 0.0) / max(self._count - 1, 1)
        scale = 1.0 / (np.sqrt(variance) + STD_GUARD)
        return ((log_mels - mean[:, None]) * scale[:, None]).astype(np.float32)


def _resampler(rate: int, wanted: int) -> Any:
    if rate == wanted:
        return None
    import soxr  # type: ignore[import-untyped]

    return soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
