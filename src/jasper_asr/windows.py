"""Long audio in bounded memory: features and network a window at a time, with the result of one pass over the whole.

An output frame of a convolutional network depends on the feature frames within half a receptive field of it and on no
others. So a window of features that reaches that far beyond the frames that are kept, its halo, gives them the very
values that one pass gives; at the ends of the signal the padding is the network's own. Normalisation is the one thing
that looks at the whole signal: its mean and deviation are taken from all frames before the first window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import FeatureConfig, ModelConfig
from jasper_asr.errors import UsageError
from jasper_asr.features import STD_GUARD, log_mel, valid_frames

Float32 = NDArray[np.float32]

_BLOCK_FRAMES = 6000  # a minute at a hop of 10 ms


@dataclass(frozen=True)
class Window:
    """Feature frames `start` to `stop` go in; of the output frames `first` to `last`, counted from the window's own
    first one, are kept.
    """

    start: int
    stop: int
    first: int
    last: int


def exact_halo(config: ModelConfig) -> int:
    """Feature frames on either side of one that can change its output, rounded up to whole output frames."""
    return _round_up(config.receptive_field() // 2, config.stride)


def plan_windows(frames: int, window: int, halo: int, config: ModelConfig) -> Iterator[Window]:
    """Windows of at most `window` feature frames whose kept outputs join to those of all `frames`.

    `halo` feature frames on each side of what is kept are computed and dropped; from `exact_halo` on the result is
    exact. Raises UsageError for windows without room between their halos.
    """
    stride = config.stride
    halo = _round_up(halo, stride)
    kept = (window - 2 * halo) // stride * stride
    if kept < stride:
        seconds = config.features.window_stride
        raise UsageError(
            f"windows of {window * seconds:g} s have no room between halos of {halo * seconds:g} s; "
            "take longer windows or a shorter, approximate halo (--halo-seconds)"
        )
    for begin in range(0, frames, kept):
        start, end = max(0, begin - halo), min(frames, begin + kept)
        stop = min(frames, end + halo)
        first = (begin - start) // stride
        last = config.output_length(stop - start) if end == frames else first + (end - begin) // stride
        yield Window(start, stop, first, last)


class LongFeatures:
    """Normalised features of a long signal, made when they are asked for.

    `samples` float32 [N] at the config's rate. Equal to `features.features` without its padding, within float32
    rounding. Raises ValueError, as that does, for a signal that is not finite.
    """

    def __init__(self, samples: Float32, config: FeatureConfig) -> None:
        self._samples, self._config = samples, config
        self.frames = valid_frames(len(samples), config)
        mean, std = self._statistics()
        self._mean, self._scale = mean.astype(np.float32)[:, None], (std + STD_GUARD).astype(np.float32)[:, None]

    def window(self, start: int, stop: int) -> Float32:
        """Frames `start` to `stop` as float32 [n_filt, stop - start]."""
        values = self._log_mel(start, stop)
        values -= self._mean
        values /= self._scale
        return values

    def _log_mel(self, start: int, stop: int) -> Float32:
        """Log-mels of a part: computed from a few more frames, of which the outer ones see a false end."""
        hop = self._config.hop_length
        margin = -(-self._config.n_fft // hop) + 1
        first = max(0, start - margin)
        part = self._samples[first * hop : (stop + margin) * hop]
        return log_mel(part, self._config)[:, start - first : stop - first]

    def _statistics(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and unbiased deviation of each band, merged block by block (Chan, Golub and LeVeque, 1983)."""
        count, mean, squares = 0, np.zeros(self._config.n_filt), np.zeros(self._config.n_filt)
        for start in range(0, self.frames, _BLOCK_FRAMES):
            block = self._log_mel(start, min(start + _BLOCK_FRAMES, self.frames)).astype(np.float64)
            size = block.shape[1]
            block_mean = block.mean(axis=1)
            block -= block_mean[:, None]
            difference = block_mean - mean
            total = count + size
            mean = mean + difference * (size / total)
            squares = squares + np.einsum("ft,ft->f", block, block) + difference**2 * (count * size / total)
            count = total
        return mean, np.sqrt(squares / max(count - 1, 1))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
