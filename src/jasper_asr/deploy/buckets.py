"""Lengths to compile for: where a network takes only fixed sizes, few well chosen ones save most of the padding."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jasper_asr.config import FeatureConfig
from jasper_asr.errors import UsageError


def frame_counts(durations: ArrayLike, features: FeatureConfig) -> NDArray[np.int64]:
    """Seconds of audio [N] -> feature frames int64 [N]: ceil(samples / hop), at least 1.

    Raises UsageError for a duration that is not a number above 0.
    """
    seconds = np.asarray(durations, np.float64)
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise UsageError("durations must be numbers of seconds above 0")
    samples = np.rint(seconds * features.sample_rate).astype(np.int64)
    return np.maximum(-(-samples // features.hop_length), 1)


def choose_buckets(frames: ArrayLike, *, max_buckets: int, align: int = 16, max_frames: int) -> list[int]:
    """At most `max_buckets` lengths, rising, for which padding `frames` (int [N]) up to them costs least: exact.

    Lengths are multiples of `align`, or `max_frames`; the largest holds the longest utterance. Utterances beyond
    `max_frames` do not count: they go another way. Fewer lengths are returned where more would save nothing.
    Raises UsageError when no utterance is left to count, or for a size below 1.

    Dynamic programme over the D distinct rounded lengths, O(max_buckets D^2): the cost of the first j lengths with k
    buckets is the least, over i < j, of the cost of the first i with k - 1, and lengths i + 1 to j padded to length j.
    """
    if min(max_buckets, align, max_frames) < 1:
        raise UsageError("max-buckets, align and max-frames must be at least 1")
    lengths = _checked(frames)
    lengths = lengths[lengths <= max_frames]
    if not lengths.size:
        raise UsageError(f"no utterance has {max_frames} frames or fewer; nothing to choose lengths from")
    rounded = np.minimum(-(-lengths // align) * align, max_frames)
    sizes, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # utterances in the first j lengths
    cost = np.concatenate([[0], np.full(len(sizes), np.iinfo(np.int64).max // 2)])
    splits: list[NDArray[np.int64]] = []
    best = None
    for _ in range(min(max_buckets, len(sizes))):
        cost, split = _one_more_bucket(cost, below, sizes)
        if best is not None and cost[-1] >= best:
            break
        best = cost[-1]
        splits.append(split)
    return _trace(splits, sizes)


def assign(frames: ArrayLike, buckets: Sequence[int]) -> NDArray[np.int64]:
    """The smallest bucket that holds each utterance: int64 [N]. Raises UsageError when one fits none."""
    lengths = _checked(frames)
    rising = np.unique(np.asarray(buckets, np.int64))
    if not rising.size:
        raise UsageError("no buckets; give at least one length")
    if lengths.size and lengths.max() > rising[-1]:
        raise UsageError(f"an utterance of {lengths.max()} frames fits no bucket; the largest is {rising[-1]}")
    return rising[np.searchsorted(rising, lengths)]


def padding_waste(frames: ArrayLike, buckets: Sequence[int]) -> float:
    """Share of all computed frames that is padding, 0 to 1. Raises UsageError as `assign`, and for no utterances."""
    lengths = _checked(frames)
    if not lengths.size:
        raise UsageError("no utterances; waste needs at least one")
    return 1.0 - float(lengths.sum()) / float(assign(lengths, buckets).sum())


def _checked(frames: ArrayLike) -> NDArray[np.int64]:
    values = np.asarray(frames)
    if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or not values.size):
        raise UsageError("frames must be a list of whole numbers; frame_counts makes them from seconds")
    if values.size and values.min() < 1:
        raise UsageError("every utterance must have at least 1 frame")
    return values.astype(np.int64)


def _one_more_bucket(
    cost: NDArray[np.int64], below: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Least padded frames of the first j lengths with one bucket more, and where that bucket begins: int64 [D + 1]."""
    more, split = cost.copy(), np.zeros(len(cost), np.int64)
    for j in range(1, len(cost)):
        candidates = cost[:j] + (below[j] - below[:j]) * sizes[j - 1]
        split[j] = candidates.argmin()
        more[j] = candidates[split[j]]
    return more, split


def _trace(splits: list[NDArray[np.int64]], sizes: NDArray[np.int64]) -> list[int]:
    """Buckets from the choices of each round, last round first."""
    end = len(sizes)
    buckets: list[int] = []
    for split in reversed(splits):
        buckets.append(int(sizes[end - 1]))
        end = int(split[end])
    return buckets[::-1]
