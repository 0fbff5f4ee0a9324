"""Choosing lengths: against brute force, on the published durations of LibriSpeech dev-clean, and for speed."""

import itertools
import math
import time

import numpy as np
import pytest

from jasper_asr.config import builtin_config
from jasper_asr.deploy.buckets import (
    Padding,
    assign,
    choose_auto,
    choose_buckets,
    frame_counts,
    measure_padding,
    model_padding,
    padding_waste,
)
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


HISTOGRAM = """
4 7 12 33 36 51 66 61 85 62 57 69 54 54 54 60 37 59 61 54 59 67 43 46 40 47 34 41 35 40 35 35 44 41
35 31 33 39 27 26 39 28 28 32 24 37 24 20 24 35 25 19 22 20 27 29 20 14 17 17 21 13 16 10 12 15 15
12 4 5 10 6 5 10 7 7 6 7 15 9 5 10 7 4 8 5 5 9 4 8 12 2 4 8 4 9 4 3 5 5 3 5 7 0 3 4 2 0 1 2 4 3 2 0
3 2 0 3 3 4 2 4 2 1 0 0 1 0 1 0 2 0 1 2 2 2 0 3 0 1 0 2 0 2 1 2 0 0 0 0 0 0 0 0 0 0 0 1 0 1 1 0 0 0
0 2 0 0 1 1 1 1 1 0 1 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 0 2 1 1 1 1
"""
"""Utterances of LibriSpeech dev-clean with 145 to 160 frames, 161 to 176, ..., 3265 to 3280: steps of 16.

Counted in the numbers of samples of its 2703 files that nervjack2/HuBERT-Finetuning-Target lists (dev-clean.tsv).
"""

TOTAL_FRAMES = 1_940_211
"""Of the same files: the sum of ceil(samples / 160)."""

PUBLISHED_QUANTILES = {
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
"""Share of dev-clean -> seconds that it does not exceed, from another hand: k2-fsa/icefall,
egs/librispeech/ASR/local/display_manifest_statistics.py, with mean 7.2 and standard deviation 4.7."""


def dev_clean_frames() -> np.ndarray:
    """The histogram as utterances; those of a step stand evenly in it."""
    frames: list[int] = []
    for step, count in enumerate(map(int, HISTOGRAM.split()), 10):
        frames += [16 * step - (16 * index + 8) // count for index in range(count)]
    return np.array(frames)


class TestDevClean:
    """The durations of the corpus itself, within the 16 frames of a step."""

    def test_histogram_is_that_of_the_corpus(self):
        frames = dev_clean_frames()
        assert len(frames) == 2703
        assert frames.sum() == pytest.approx(TOTAL_FRAMES, rel=1e-3)
        assert frames.mean() / 100 == pytest.approx(7.2, abs=0.05)
        assert frames.std() / 100 == pytest.approx(4.7, abs=0.05)
        found = np.quantile(frames / 100, list(PUBLISHED_QUANTILES))
        np.testing.assert_allclose(found, list(PUBLISHED_QUANTILES.values()), atol=0.16 + 0.05)

    def test_the_guide_wastes_82_percent(self):
        waste = 1 - TOTAL_FRAMES / (2703 * 4000)
        assert waste == pytest.approx(0.8206, abs=5e-5)
        assert padding_waste(dev_clean_frames(), [4000]) == pytest.approx(0.8206, abs=5e-4)

    @pytest.mark.parametrize(
        ("count", "waste", "buckets"),
        [
            (1, 78.1, [3280]),
            (2, 50.3, [1120, 3280]),
            (3, 37.4, [688, 1424, 3280]),
            (4, 28.1, [560, 1040, 1792, 3280]),
            (5, 22.8, [496, 800, 1152, 1792, 3280]),
            (6, 19.4, [400, 624, 880, 1232, 1792, 3280]),
            (7, 16.9, [368, 560, 800, 1056, 1472, 2096, 3280]),
            (8, 14.6, [336, 496, 704, 944, 1216, 1600, 2112, 3280]),
        ],
    )
    def test_the_figures_of_the_docs(self, count, waste, buckets):
        frames = dev_clean_frames()
        assert choose_buckets(frames, max_buckets=count, max_frames=4000) == buckets
        computed = assign(frames, buckets).sum()  # exact: no length cuts a step
        assert 100 * (1 - TOTAL_FRAMES / computed) == pytest.approx(waste, abs=0.05)

    def test_six_lengths_cannot_reach_15_percent_and_eight_do(self):
        frames = dev_clean_frames()
        best = choose_buckets(frames, max_buckets=6, align=1, max_frames=4000)
        assert 0.19 < padding_waste(frames, best) < 0.2  # not even without rounding to 16
        chosen = choose_auto(frames, max_frames=4000)
        assert chosen == [336, 496, 704, 944, 1216, 1600, 2112, 3280]
        measured = measure_padding(frames, chosen, length=4000)
        assert (measured.utterances, measured.longer) == (2703, 0)
        assert measured.before == pytest.approx(0.8206, abs=5e-4)
        assert measured.after < 0.15


class TestAuto:
    def test_takes_the_fewest_lengths_below_15_percent(self):
        rng = np.random.default_rng(0)
        for spread in (5, 300, 1000, 3000):
            frames = rng.integers(900, 900 + spread, 500)
            chosen = choose_auto(frames, max_frames=4000)
            assert padding_waste(frames, chosen) < 0.15
            fewer = choose_buckets(frames, max_buckets=max(len(chosen) - 1, 1), max_frames=4000)
            assert len(chosen) <= 2 or padding_waste(frames, fewer) >= 0.15

    def test_stops_at_eight(self):
        frames = np.geomspace(16, 4000, 64).astype(int)
        chosen = choose_auto(frames, max_frames=4000)
        assert chosen == choose_buckets(frames, max_buckets=8, max_frames=4000)
        assert len(chosen) == 8
        assert padding_waste(frames, chosen) > 0.15

    def test_what_is_too_long_does_not_count(self):
        assert choose_auto([100, 200, 9000], max_frames=4000) == [112, 208]
        with pytest.raises(UsageError, match=r"^no utterance has 4000 frames or fewer"):
            choose_auto([9000], max_frames=4000)


class TestMeasure:
    def test_by_hand(self):
        found = measure_padding([10, 20, 50, 90], [60, 20], length=80)
        assert found == Padding(3, 1, 80, 1 - 80 / 240, (20, 60), 1 - 80 / 100)
        assert measure_padding([90], [100], length=100).before == pytest.approx(0.1)

    def test_nothing_fits(self):
        with pytest.raises(UsageError, match=r"^no utterance has 80 frames or fewer; nothing to measure$"):
            measure_padding([90], [100], length=80)

    @pytest.mark.parametrize(
        ("facts", "length", "lengths", "own"),
        [
            ({"inputs": {"feats": ["B", 64, "T"]}}, 4000, (112, 208), False),
            ({"inputs": {"feats": ["B", 64, "T"]}, "max_frames": "3000"}, 3000, (112, 208), False),
            ({"inputs": {"feats": [1, 64, 2000]}}, 2000, (112, 208), False),
            ({"inputs": {"feats": [4, 64, 304]}, "gears": [[1, 304], [4, 304]]}, 304, (112, 208), False),
            ({"inputs": {"feats": [4, 64, 304]}, "gears": [[4, 304], [4, 160]]}, 4000, (160, 304), True),
            ({"inputs": {"feats": [4, 64, 6000]}, "gears": [[4, 6000], [4, 160]]}, 6000, (160, 6000), True),
        ],
    )
    def test_of_a_model(self, facts, length, lengths, own):
        facts = facts | {"features": {"sample_rate": 16_000, "window_stride": 0.01}}
        found = model_padding([1.0, 2.0], facts)
        assert (found.length, found.lengths, found.own) == (length, lengths, own)
        assert found.before == pytest.approx(1 - 300 / (2 * length))
        assert found.after == pytest.approx(1 - 300 / assign([100, 200], lengths).sum())
