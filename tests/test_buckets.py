"""Choosing lengths: against brute force, on the published durations of LibriSpeech dev-clean, and for speed."""

import itertools
import math
import time

import numpy as np
import pytest

from jasper_asr.config import builtin_config
from jasper_asr.deploy.buckets import assign, choose_buckets, frame_counts, padding_waste
from jasper_asr.errors import UsageError

FEATURES = builtin_config("jasper10x5dr").features


def total(frames: list[int], buckets: tuple[int, ...] | list[int]) -> float:
    """Padded frames, computed one utterance at a time; infinite when one fits nowhere."""
    return sum(min((bucket for bucket in buckets if bucket >= length), default=math.inf) for length in frames)


def brute_force(frames: list[int], max_buckets: int, align: int, max_frames: int) -> float:
    lengths = [length for length in range(1, max_frames + 1) if length % align == 0 or length == max_frames]
    choices = (itertools.combinations(lengths, k) for k in range(1, max_buckets + 1))
    return min(total(frames, choice) for choice in itertools.chain.from_iterable(choices))


class TestChoose:
    @pytest.mark.parametrize("seed", range(30))
    def test_equals_brute_force(self, seed):
        rng = np.random.default_rng(seed)
        align = int(rng.choice([1, 3, 4]))
        max_frames = int(rng.integers(10, 22))
        frames = rng.integers(1, max_frames + 1, rng.integers(1, 12)).tolist()
        max_buckets = int(rng.integers(1, 5))
        buckets = choose_buckets(frames, max_buckets=max_buckets, align=align, max_frames=max_frames)
        assert total(frames, buckets) == brute_force(frames, max_buckets, align, max_frames)
        assert 1 <= len(buckets) <= max_buckets
        assert buckets == sorted(set(buckets))
        assert all(bucket % align == 0 or bucket == max_frames for bucket in buckets)
        assert all(type(bucket) is int for bucket in buckets)

    @pytest.mark.parametrize("seed", range(5))
    def test_one_more_bucket_never_costs_and_each_one_saves(self, seed):
        frames = np.random.default_rng(seed).integers(1, 4001, 300)
        costs = []
        for count in range(1, 12):
            buckets = choose_buckets(frames, max_buckets=count, max_frames=4000)
            assert len(buckets) == count
            costs.append(total(frames.tolist(), buckets))
        assert all(after < before for before, after in itertools.pairwise(costs))

    def test_no_more_lengths_than_pay(self):
        assert choose_buckets([100, 100, 97], max_buckets=6, max_frames=4000) == [112]
        assert choose_buckets([100, 700], max_buckets=6, max_frames=4000) == [112, 704]

    def test_the_largest_length_need_not_be_aligned(self):
        assert choose_buckets([4001, 100], max_buckets=2, max_frames=4001) == [112, 4001]
        assert choose_buckets([4000], max_buckets=1, max_frames=4000) == [4000]

    def test_what_is_too_long_does_not_count(self):
        assert choose_buckets([100, 4001, 9000], max_buckets=3, max_frames=4000) == [112]
        with pytest.raises(
            UsageError, match=r"^no utterance has 4000 frames or fewer; nothing to choose lengths from$"
        ):
            choose_buckets([4001], max_buckets=3, max_frames=4000)

    def test_order_and_copies_do_not_matter(self):
        frames = np.random.default_rng(0).integers(1, 4001, 200)
        expected = choose_buckets(frames, max_buckets=4, max_frames=4000)
        assert choose_buckets(np.tile(frames[::-1], 3), max_buckets=4, max_frames=4000) == expected

    def test_a_hundred_thousand_utterances_take_no_time(self):
        frames = np.random.default_rng(0).integers(1, 4001, 100_000)
        started = time.process_time()
        buckets = choose_buckets(frames, max_buckets=6, max_frames=4000)
        assert time.process_time() - started < 1
        np.testing.assert_allclose(buckets, [667, 1333, 2000, 2667, 3333, 4000], atol=20)  # uniform: equal steps

    @pytest.mark.parametrize("sizes", [(0, 16, 4000), (2, 0, 4000), (2, 16, 0)])
    def test_sizes_begin_at_one(self, sizes):
        with pytest.raises(UsageError, match=r"^max-buckets, align and max-frames must be at least 1$"):
            choose_buckets([100], max_buckets=sizes[0], align=sizes[1], max_frames=sizes[2])

    @pytest.mark.parametrize(
        ("frames", "message"),
        [
            ([0, 5], "every utterance must have at least 1 frame"),
            ([7.2, 5.0], "frames must be a list of whole numbers; frame_counts makes them from seconds"),
            ([[1, 2]], "frames must be a list of whole numbers; frame_counts makes them from seconds"),
            ([], "no utterance has 4000 frames or fewer; nothing to choose lengths from"),
        ],
    )
    def test_refuses_what_are_no_frames(self, frames, message):
        with pytest.raises(UsageError, match=f"^{message}$"):
            choose_buckets(frames, max_buckets=2, max_frames=4000)


class TestAssign:
    def test_smallest_that_holds(self):
        assert assign([1, 16, 17, 32, 33, 64], [64, 16, 32]).tolist() == [16, 16, 32, 32, 64, 64]
        assert assign([], [16]).tolist() == []

    def test_refuses(self):
        with pytest.raises(UsageError, match=r"^an utterance of 65 frames fits no bucket; the largest is 64$"):
            assign([65, 3], [16, 64])
        with pytest.raises(UsageError, match=r"^no buckets; give at least one length$"):
            assign([65, 3], [])


class TestWaste:
    def test_by_hand(self):
        assert padding_waste([10, 30], [40]) == 1 - 40 / 80
        assert padding_waste([10, 30], [10, 40]) == 1 - 40 / 50
        assert padding_waste([40], [40]) == 0.0

    def test_no_utterances(self):
        with pytest.raises(UsageError, match=r"^no utterances; waste needs at least one$"):
            padding_waste([], [40])


class TestFrameCounts:
    def test_equals_the_front_end(self):
        from jasper_asr.features import features

        for samples in (1, 159, 160, 161, 16_000, 16_001):
            audio = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
            counted = frame_counts([samples / 16_000], FEATURES).tolist()
            assert counted == [-(-samples // 160)]
            if samples > 512:  # shorter ones cannot be reflected
                assert counted == [features(audio, FEATURES)[1]]

    def test_forty_seconds_are_4000_frames(self):
        assert frame_counts([40.0, 32.6, 7.2], FEATURES).tolist() == [4000, 3260, 720]
        assert frame_counts([1e-6], FEATURES).tolist() == [1]

    @pytest.mark.parametrize("duration", [0.0, -1.0, math.nan, math.inf])
    def test_refuses(self, duration):
        with pytest.raises(UsageError, match=r"^durations must be numbers of seconds above 0$"):
            frame_counts([7.2, duration], FEATURES)


DEV_CLEAN = {
    0.0: 1.4,
    0.001: 1.6,
    0.005: 1.8,
    0.01: 1.9,
    0.05: 2.4,
    0.1: 2.7,
    0.25: 3.8,
    0.5: 5.9,
    0.75: 9.3,
    0.9: 13.3,
    0.95: 16.4,
    0.99: 23.8,
    0.995: 28.5,
    0.999: 32.3,
    1.0: 32.6,
}
"""Share of the 2703 utterances of LibriSpeech dev-clean -> seconds that none of them exceeds.

Published in k2-fsa/icefall, egs/librispeech/ASR/local/display_manifest_statistics.py, with mean 7.2 and std 4.7.
"""


def dev_clean_frames() -> np.ndarray:
    """2703 utterances at equal steps of that distribution, its quantiles joined by straight lines in log(seconds)."""
    shares = (np.arange(2703) + 0.5) / 2703
    seconds = np.exp(np.interp(shares, list(DEV_CLEAN), np.log(list(DEV_CLEAN.values()))))
    return frame_counts(seconds, FEATURES)


class TestDevClean:
    """The corpus itself is not at hand: a histogram from its published quantiles stands for it."""

    def test_histogram_has_the_published_mean_and_spread(self):
        seconds = dev_clean_frames() / 100
        assert seconds.mean() == pytest.approx(7.2, abs=0.1)
        assert seconds.std() == pytest.approx(4.7, abs=0.15)

    def test_the_guide_wastes_82_percent(self):
        assert padding_waste(dev_clean_frames(), [4000]) == pytest.approx(0.82, abs=0.005)

    @pytest.mark.parametrize(
        ("count", "waste", "buckets"),
        [
            (1, 77.7, [3264]),
            (2, 51.1, [1104, 3264]),
            (3, 36.6, [672, 1376, 3264]),
            (4, 28.2, [528, 944, 1632, 3264]),
            (6, 19.9, [416, 640, 928, 1328, 1968, 3264]),
            (8, 14.9, [352, 512, 704, 928, 1248, 1632, 2368, 3264]),
            (12, 10.0, [304, 416, 528, 656, 784, 928, 1120, 1328, 1632, 1968, 2384, 3264]),
        ],
    )
    def test_the_figures_of_the_docs(self, count, waste, buckets):
        frames = dev_clean_frames()
        assert choose_buckets(frames, max_buckets=count, max_frames=4000) == buckets
        assert 100 * padding_waste(frames, buckets) == pytest.approx(waste, abs=0.05)

    def test_no_six_lengths_reach_15_percent(self):
        frames = dev_clean_frames()
        best = choose_buckets(frames, max_buckets=6, align=1, max_frames=4000)
        assert 0.19 < padding_waste(frames, best) < 0.2
