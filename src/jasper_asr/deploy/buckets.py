"""Lengths to compile for: where a network takes only fixed sizes, few well chosen ones save most of the padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jasper_asr.config import FeatureConfig
from jasper_asr.errors import UsageError

TARGET_WASTE = 0.15
"""Share of padding below which `choose_auto` is content."""

FEWEST, MOST = 2, 8
"""How many lengths `choose_auto` takes. atc takes 2 to 100 gears; each makes the model bigger and its compiling longer.
Published durations of LibriSpeech dev-clean need eight of them to come below TARGET_WASTE: see docs/ascend.md."""

GUIDE_SECONDS = 40.0
"""What the Ascend guide pads every utterance to."""


@dataclass(frozen=True)
class Padding:
    """What padding costs on a corpus: `before` and `after` are shares of the computed frames, 0 to 1.

    Before, every utterance is padded to `length` frames; after, to the smallest of `lengths` that holds it. Only the
    `utterances` that fit into both count; `longer` ones do not: they go through the network in windows.
    """

    utterances: int
    longer: int
    length: int
    before: float
    lengths: tuple[int, ...]
    after: float
    own: bool = False
    """The model has these lengths; else they are what it could have."""


def frame_counts(durations: ArrayLike, features: FeatureConfig) -> NDArray[np.int64]:
    """Seconds of audio [N] -> feature frames int64 [N]: ceil(samples / hop), at least 1.

    Raises UsageError for a duration that is not a number above 0.
    """
    return _frame_counts(durations, features.sample_rate, features.hop_length)


def model_padding(durations: ArrayLike, facts: Mapping[str, Any]) -> Padding:
    """What padding utterances of these `durations` (seconds [N]) costs a model.

    `facts` are those that `describe` and `describe_om` give. Before is the model's fixed number of frames, else 40 s or
    the longest input where that is longer. After is with the model's own lengths; for a model that has but one, or
    takes any, with those that `choose_auto` would take. Raises UsageError when no utterance fits.
    """
    rate, stride = facts["features"]["sample_rate"], facts["features"]["window_stride"]
    hop = int(rate * stride)
    frames = _frame_counts(durations, rate, hop)
    size, gears = facts["inputs"]["feats"][2], sorted({gear[1] for gear in facts.get("gears", ())})
    before = int(_frame_counts([GUIDE_SECONDS], rate, hop)[0])
    if isinstance(size, int):
        before = size if len(gears) < 2 else max(size, before)
    else:
        before = int(facts.get("max_frames", before))
    if len(gears) > 1:
        return replace(measure_padding(frames, gears, length=before), own=True)
    return measure_padding(frames, choose_auto(frames, max_frames=before), length=before)


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


def choose_auto(frames: ArrayLike, *, max_frames: int) -> list[int]:
    """The fewest lengths, from two on, that bring the padding below TARGET_WASTE; eight if none of these does.

    Raises UsageError as `choose_buckets`, which also says what counts.
    """
    lengths = _checked(frames)
    counted = lengths[lengths <= max_frames]
    chosen: list[int] = []
    for count in range(FEWEST, MOST + 1):
        chosen = choose_buckets(counted, max_buckets=count, max_frames=max_frames)
        if padding_waste(counted, chosen) < TARGET_WASTE:
            break
    return chosen


def measure_padding(frames: ArrayLike, lengths: Sequence[int], *, length: int) -> Padding:
    """What padding `frames` [N] costs to `length`, and to the smallest of `lengths`. Raises UsageError if none fits."""
    values = _checked(frames)
    fitting = values[values <= min(length, max(lengths, default=0))]
    if not fitting.size:
        raise UsageError(f"no utterance has {min(length, max(lengths, default=0))} frames or fewer; nothing to measure")
    return Padding(
        utterances=len(fitting),
        longer=len(values) - len(fitting),
        length=length,
        before=padding_waste(fitting, [length]),
        lengths=tuple(sorted(set(lengths))),
        after=padding_waste(fitting, lengths),
    )


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


def _frame_counts(durations: ArrayLike, sample_rate: int, hop_length: int) -> NDArray[np.int64]:
    seconds = np.asarray(durations, np.float64)
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise UsageError("durations must be numbers of seconds above 0")
    samples = np.rint(seconds * sample_rate).astype(np.int64)
    return np.maximum(-(-samples // hop_length), 1)


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
