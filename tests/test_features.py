import cmath
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from jasper_asr import features as module
from jasper_asr.config import FeatureConfig
from jasper_asr.features import features, hz_to_mel, log_mel, max_duration_frames, mel_to_hz, normalize, valid_frames

CONFIG = FeatureConfig(16000, 0.02, 0.01, "hann", 512, 64, "per_feature", dither=0.0, pad_align=16)
PADDED = replace(CONFIG, max_duration=40.0, pad_to_max_duration=True)


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


# against NVIDIA's own code


@pytest.mark.parametrize("index", range(4))
def test_golden_features(vectors, index):
    n_samples = vectors["audio_lens"][index]
    feats, frames = features(vectors["audio"][index, :n_samples], CONFIG)
    expected = vectors[f"feats_single_{index}"][0]
    assert feats.shape == expected.shape
    assert feats.dtype == np.float32
    assert frames == vectors[f"feat_lens_single_{index}"][0]
    difference = np.abs(feats - expected)
    assert difference.mean() < 1e-5
    assert np.quantile(difference, 0.999) < 5e-4
    assert difference.max() < 5e-3
    assert not feats[:, frames:].any()


# against the definition, in float64 and loops


def reflect(index: int, length: int) -> int:
    """Position in a signal that is mirrored at its first and last sample for ever."""
    if length == 1:
        return 0
    period = 2 * (length - 1)
    index %= period
    return min(index, period - index)


def slaney_hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def mel_filters() -> np.ndarray:
    """Triangle by triangle, bin by bin; 8000 Hz is 15 + 27 log_6.4(8) mel."""
    top = 15 + 27 * math.log(8, 6.4)
    points = [slaney_hz(top * index / 65) for index in range(66)]
    filters = np.zeros((64, 257))
    for band in range(64):
        left, peak, right = points[band : band + 3]
        for position in range(257):
            hz = position * 16000 / 512
            if left < hz <= peak:
                filters[band, position] = (hz - left) / (peak - left)
            elif peak < hz < right:
                filters[band, position] = (right - hz) / (right - peak)
        filters[band] *= 2 / (right - left)
    return filters


FILTERS = mel_filters()
DFT = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(512)) / 512)


def slow_log_mel(samples: np.ndarray) -> np.ndarray:
    """A 320-sample Hann window in the middle of 512 points, centred on every 160th sample of the reflected signal."""
    signal = samples.astype(np.float64)
    emphasised = [signal[0]] + [signal[i] - 0.97 * signal[i - 1] for i in range(1, len(signal))]
    window = np.zeros(512)
    for i in range(320):
        window[96 + i] = 0.5 - 0.5 * math.cos(2 * math.pi * i / 319)
    rows = []
    for frame in range(math.ceil(len(signal) / 160)):
        centre = frame * 160
        points = [emphasised[reflect(centre - 256 + i, len(signal))] for i in range(512)]
        rows.append(np.log(FILTERS @ np.abs(DFT @ (window * points)) ** 2 + 1e-20))
    return np.array(rows).T


@pytest.mark.parametrize(
    "n_samples", [1, 2, 3, 17, 100, 159, 160, 161, 255, 256, 257, 319, 320, 321, 479, 480, 481, 1000, 1601, 4800, 9999]
)
def test_log_mel_is_its_definition(n_samples):
    samples = noise(n_samples, seed=n_samples)
    expected = slow_log_mel(samples)
    found = log_mel(samples, CONFIG)
    assert found.shape == (64, math.ceil(n_samples / 160))
    # energies, not logarithms: one to three samples repeat as a pure tone, most bands hold float32's rounding only
    np.testing.assert_allclose(np.exp(found), np.exp(expected), rtol=2e-4, atol=1e-9 * np.exp(expected.max()))
    normalised, frames = features(samples, CONFIG)
    assert frames == math.ceil(n_samples / 160)
    if frames > 1:
        mean, std = expected.mean(axis=1, keepdims=True), expected.std(axis=1, ddof=1, keepdims=True)
        np.testing.assert_allclose(normalised[:, :frames], (expected - mean) / (std + 1e-5), atol=1e-3)


@pytest.mark.parametrize("band", [10, 21, 42, 59])
def test_a_tone_lands_in_its_band(band):
    hz = slaney_hz((15 + 27 * math.log(8, 6.4)) * (band + 1) / 65)
    tone = np.sin(2 * np.pi * hz * np.arange(16000) / 16000).astype(np.float32)
    assert log_mel(tone, CONFIG)[:, 5:95].mean(axis=1).argmax() == band


def test_white_noise_is_flat_per_hz():
    """Filters of unit area times power of 1/N: the expected energy of every band is sum(w^2) sigma^2 / 31.25 Hz."""
    energies = np.exp(log_mel(noise(160_000), replace(CONFIG, preemph=0.0)).astype(np.float64))[:, 2:-2].mean(axis=1)
    expected = 0.01 * np.sum(np.hanning(320) ** 2) * FILTERS.sum(axis=1)
    np.testing.assert_allclose(energies, expected, rtol=0.12)
    np.testing.assert_allclose(FILTERS.sum(axis=1)[30:] * 31.25, 1.0, atol=0.02)


# mel scale, as librosa documents it


def test_mel_scale():
    assert hz_to_mel(60) == pytest.approx(0.9)
    assert [hz_to_mel(hz) for hz in (110, 220, 440)] == pytest.approx([1.65, 3.3, 6.6])
    assert hz_to_mel(1000) == pytest.approx(15)
    assert hz_to_mel(6400) == pytest.approx(42)
    points = mel_to_hz(np.linspace(0, hz_to_mel(11025), 40))
    documented = {1: 85.317, 11: 938.49, 12: 1024.856, 20: 2071.84, 38: 10096.408, 39: 11025.0}
    assert {index: round(float(points[index]), 3) for index in documented} == documented
    for hz in (0.0, 1.0, 999.9, 1000.0, 1000.1, 7999.0):
        assert float(mel_to_hz(np.array(hz_to_mel(hz)))) == pytest.approx(hz)


def test_mel_filters_are_triangles():
    """Peaks at 46.4 and 92.8 Hz (1.5 and 3.0 bins), 1021.8, 2791.5 and 7626.2 Hz."""
    filters = module._mel_filters(16000, 512, 64, 0.0, None)
    np.testing.assert_allclose(filters, FILTERS, atol=1e-8)
    assert [int(row.argmax()) for row in filters[[0, 1, 21, 42, 63]]] == [1, 3, 33, 89, 244]
    assert (filters >= 0).all()
    assert not filters[:, [0, 256]].any()


def test_mel_filters_within_bounds():
    filters = module._mel_filters(16000, 512, 10, 300.0, 4000.0)
    bins = np.flatnonzero(filters.any(axis=0)) * 31.25
    assert bins.min() > 300
    assert bins.max() < 4000


# normalisation and padding


def test_normalised_bands_have_mean_0_and_unbiased_std_1():
    feats, frames = features(noise(30_000), CONFIG)
    valid = feats[:, :frames].astype(np.float64)
    np.testing.assert_allclose(valid.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(valid.std(axis=1, ddof=1), 1, atol=1e-4)


def test_normalise_by_hand():
    rows = np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]], np.float32)
    expected = np.array([-2, -1, 3]) / (math.sqrt(7) + 1e-5)
    np.testing.assert_allclose(normalize(rows), [expected, [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("n_samples", [1, 80, 160])
def test_one_valid_frame_gives_zeros(n_samples):
    feats, frames = features(noise(n_samples), CONFIG)
    assert frames == 1
    assert feats.shape == (64, 16)
    assert not feats.any()


def test_silence_gives_zeros():
    feats, frames = features(np.zeros(16000, np.float32), CONFIG)
    assert (frames, feats.shape) == (100, (64, 112))
    assert not feats.any()


def test_loudness_does_not_matter():
    samples = noise(16000)
    np.testing.assert_allclose(features(samples * 0.125, CONFIG)[0], features(samples, CONFIG)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("n_samples", "pad_align", "frames", "padded"),
    [
        (160 * 15, 16, 15, 16),
        (160 * 15 + 1, 16, 16, 16),
        (160 * 16, 16, 16, 32),  # a centred STFT yields a 17th frame: padding starts from it
        (160 * 16 + 1, 16, 17, 32),
        (160 * 16, 8, 16, 24),
        (160 * 16, 1, 16, 17),
        (160 * 16, 0, 16, 17),
    ],
)
def test_padding(n_samples, pad_align, frames, padded):
    feats, valid = features(noise(n_samples), replace(CONFIG, pad_align=pad_align))
    assert (valid, feats.shape) == (frames, (64, padded))
    assert not feats[:, frames:].any()


@pytest.mark.parametrize("n_samples", [1, 16000, 100_000, 639_999])
def test_pad_to_max_duration(n_samples):
    samples = noise(n_samples)
    plain, frames = features(samples, CONFIG)
    padded, valid = features(samples, PADDED)
    assert (valid, padded.shape) == (frames, (64, 4000))
    np.testing.assert_array_equal(padded[:, :frames], plain[:, :frames])
    assert not padded[:, frames:].any()


def test_a_clip_of_just_the_maximum_needs_another_16_frames():
    feats, frames = features(noise(640_000), PADDED)
    assert (frames, feats.shape) == (4000, (64, 4016))


@pytest.mark.parametrize(("seconds", "frames"), [(40.0, 3999), (16.7, 1669), (0.02, 1), (10.005, 1000), (1.0001, 100)])
def test_max_duration_frames(seconds, frames):
    assert max_duration_frames(replace(CONFIG, max_duration=seconds)) == frames


def test_valid_frames():
    lengths = [1, 159, 160, 161, 320, 321, 640_000]
    assert [valid_frames(n, CONFIG) for n in lengths] == [1, 1, 1, 2, 2, 3, 4000]


# invariants


def test_bit_for_bit_repeatable():
    samples = noise(112_000)
    first = features(samples, CONFIG)[0]
    assert samples.tobytes() == noise(112_000).tobytes(), "the samples were changed"
    strided = np.repeat(samples, 2)[::2]
    readonly = samples.copy()
    readonly.setflags(write=False)
    for again in (samples, samples.astype(np.float64), strided, readonly):
        assert features(again, CONFIG)[0].tobytes() == first.tobytes()


def test_the_past_beyond_the_window_does_not_matter():
    samples = noise(20_000)
    whole, tail = log_mel(samples, CONFIG), log_mel(samples[1600:], CONFIG)
    np.testing.assert_allclose(tail[:, 2:], whole[:, 12:], atol=1e-5)


def test_blocks_leave_no_seam(monkeypatch):
    samples = noise(200_000)
    whole = log_mel(samples, CONFIG)
    assert whole.shape[1] > 2 * module._BLOCK_FRAMES
    monkeypatch.setattr(module, "_BLOCK_FRAMES", 7)
    np.testing.assert_allclose(log_mel(samples, CONFIG), whole, atol=1e-5)


def test_other_rates_and_windows():
    config = replace(CONFIG, sample_rate=8000, window_size=0.025, n_fft=256, n_filt=40)
    feats, frames = features(noise(8000), config)
    assert (config.win_length, config.hop_length) == (200, 80)
    assert (frames, feats.shape) == (100, (40, 112))
    assert np.isfinite(feats).all()


def test_dft_of_the_test_is_one():
    assert cmath.isclose(DFT[3, 5], cmath.exp(-2j * cmath.pi * 15 / 512), rel_tol=1e-12)
    np.testing.assert_allclose(DFT @ np.eye(512)[0], np.ones(257))


# what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 3e38])
@pytest.mark.parametrize("position", [0, 777, -2])
def test_values_that_are_not_finite(value, position):
    samples = noise(1600)
    samples[position] = value
    with pytest.raises(
        ValueError, match=r"^features are not finite: the samples hold NaN, infinity or absurdly large values$"
    ):
        features(samples, CONFIG)


@pytest.mark.parametrize(("shape", "text"), [((0,), "[0]"), ((2, 160), "[2, 160]"), ((), "[]")])
def test_wrong_shapes(shape, text):
    with pytest.raises(ValueError, match=r"^samples must be") as caught:
        log_mel(np.zeros(shape, np.float32), CONFIG)
    assert str(caught.value) == f"samples must be a non-empty [N] array, not {text}"


# speed


def test_seven_seconds_take_milliseconds():
    """The bar is 4 ms on a quiet core; ten times that here, so that only a change of kind trips it."""
    samples = noise(112_000)
    features(samples, CONFIG)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        features(samples, CONFIG)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.040
