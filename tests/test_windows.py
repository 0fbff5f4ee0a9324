"""Long audio: windows give what one pass over the whole gives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers_audio import sound, tiny_config, tiny_graph
from jasper_asr import features
from jasper_asr.backends import open_backend
from jasper_asr.errors import UsageError
from jasper_asr.transcribe import Transcriber
from jasper_asr.windows import LongFeatures, exact_halo, plan_windows

CONFIG = tiny_config()
HALO = exact_halo(CONFIG)


@pytest.fixture(scope="module")
def whole():
    return open_backend("ort", tiny_graph(masked=False), threads=1)


def one_pass(backend, feats):
    log_probs, lens = backend.run(feats[None], np.array([feats.shape[1]], np.int32))
    return log_probs[0, : lens[0]]


def in_windows(backend, feats, window, halo):
    rows = []
    for part in plan_windows(feats.shape[1], window, halo, CONFIG):
        assert part.stop - part.start <= window
        rows.append(one_pass(backend, feats[:, part.start : part.stop])[part.first : part.last])
    return np.concatenate(rows)


@pytest.mark.parametrize("frames", [1, 2, 299, 300, 301, 400, 401, 639, 640, 641, 1200, 1201, 1999])
@pytest.mark.parametrize("window", [2 * HALO + 2, 2 * HALO + 101, 640])
def test_windows_equal_one_pass_at_every_kind_of_length(whole, frames, window):
    feats = np.random.default_rng(frames).normal(size=(CONFIG.in_feats, frames)).astype(np.float32)
    expected = one_pass(whole, feats)
    given = in_windows(whole, feats, window, HALO)
    assert given.shape == expected.shape
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_a_shorter_halo_is_not_exact(whole):
    """So the halo is no larger than it must be by much, and the test above can fail."""
    feats = np.random.default_rng(0).normal(size=(CONFIG.in_feats, 1000)).astype(np.float32)
    expected = one_pass(whole, feats)
    errors = [np.abs(in_windows(whole, feats, 640, halo) - expected).max() for halo in (0, HALO // 2, HALO)]
    assert errors[0] > 0.1
    assert errors[1] > 1e-4
    assert errors[2] < 1e-5


def test_windows_need_room_between_their_halos():
    with pytest.raises(UsageError, match=r"windows of 3 s have no room between halos of 1.5 s"):
        list(plan_windows(1000, 2 * HALO, HALO, CONFIG))


@pytest.mark.parametrize("seconds", [0.5, 61.0, 125.37])
def test_long_features_are_the_features(seconds):
    samples = sound(seconds, 3)
    long = LongFeatures(samples, CONFIG.features)
    expected, frames = features.features(samples, CONFIG.features)
    assert long.frames == frames
    np.testing.assert_allclose(long.window(0, frames), expected[:, :frames], atol=2e-4)
    for start, stop in [(0, 1), (7, 29), (frames // 2, frames // 2 + 13), (max(0, frames - 3), frames)]:
        np.testing.assert_allclose(long.window(start, stop), expected[:, start:stop], atol=2e-4)


def test_long_features_of_a_signal_that_is_not_finite():
    samples = sound(70.0)
    samples[1_000_000] = np.nan
    with pytest.raises(ValueError, match=r"NaN"):
        LongFeatures(samples, CONFIG.features)


def test_ten_minutes_equal_one_pass():
    """The issue's proof: within 1e-4 of one pass over the whole."""
    samples = sound(600.0, 1)
    backend = open_backend("ort", tiny_graph(), threads=1)
    transcriber = Transcriber(backend, trim_silence=False)
    (given,), (length,) = transcriber.log_probs([samples])
    feats, frames = features.features(samples, transcriber.feature_config)
    expected = one_pass(backend, feats[:, :frames])
    assert length == len(expected) == CONFIG.output_length(60_000)
    assert np.abs(given - expected).max() < 1e-4


def test_windows_fill_batches_of_a_fixed_model():
    samples = sound(20.0, 2)
    fixed = open_backend("ort", tiny_graph(batch_size=4, frames=400), threads=1)
    calls = []

    class Counting:
        config, shapes = fixed.config, fixed.shapes

        def run(self, feats, lens):
            calls.append(lens.tolist())
            return fixed.run(feats, lens)

        def close(self):
            fixed.close()

    (given,), _ = Transcriber(Counting(), trim_silence=False).log_probs([samples])
    (expected,), _ = Transcriber(open_backend("ort", tiny_graph(), threads=1), trim_silence=False).log_probs([samples])
    np.testing.assert_allclose(given, expected, atol=1e-4)
    kept = (400 - 2 * HALO) // 2 * 2
    assert sum(length > 1 for lens in calls for length in lens) == -(-2000 // kept)
    assert all(len(lens) == 4 for lens in calls)


def test_progress_within_a_long_file():
    backend = open_backend("ort", tiny_graph(), threads=1)
    heard, done = [], []
    transcriber = Transcriber(backend, trim_silence=False, chunk_seconds=10.0)
    clips = [(sound(45.0), 16_000), (sound(2.0), 16_000)]
    assert len(list(transcriber.transcribe_many(clips, progress=done.append, heard=heard.append))) == 2
    assert done == [45.0, 2.0]
    assert len(heard) > 6
    assert sum(heard) == pytest.approx(47.0, abs=0.05)


def test_an_approximate_halo_changes_little_and_is_the_users_choice():
    backend = open_backend("ort", tiny_graph(), threads=1)
    samples = sound(30.0, 4)
    exact = Transcriber(backend, trim_silence=False).log_probs([samples])[0][0]
    chunked = Transcriber(backend, trim_silence=False, chunk_seconds=10.0).log_probs([samples])[0][0]
    rough = Transcriber(backend, trim_silence=False, chunk_seconds=10.0, halo_seconds=0.1).log_probs([samples])[0][0]
    assert np.abs(chunked - exact).max() < 1e-4
    assert np.abs(rough - exact).max() > 1e-3
    assert (rough.argmax(1) == exact.argmax(1)).mean() > 0.9


@pytest.mark.slow
def test_memory_of_twenty_minutes_is_that_of_two():
    """Peak memory above the samples, each length in a process of its own: within 1.3 times (benchmarks/memory.py)."""
    script = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    argv = [sys.executable, script, "--seconds", "120", "1200"]
    table = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    ratio = float(table[-1].split("|")[4])
    assert table[-1].startswith("| 1200 s")
    assert 0.9 < ratio < 1.3
