"""Streaming: what is pushed in pieces ends as what the whole gives, and the way there is sensible."""

import numpy as np
import pytest

import jasper_asr
from helpers_audio import run, sound, tiny_graph
from jasper_asr import features
from jasper_asr.backends import open_backend
from jasper_asr.cli import live
from jasper_asr.data.manifest import read_manifest
from jasper_asr.decode import greedy
from jasper_asr.errors import AudioError, UsageError
from jasper_asr.stream import Stream, _Reading
from jasper_asr.transcribe import BUILTIN_LMS, Transcriber

CLIPS = BUILTIN_LMS["mini"].parent / "clips"
ROWS = read_manifest(CLIPS / "manifest.jsonl")


@pytest.fixture(scope="module")
def tiny():
    return Transcriber(open_backend("ort", tiny_graph(masked=False), threads=1), trim_silence=False)


@pytest.fixture(scope="module")
def mini():
    with jasper_asr.load("mini", threads=1) as transcriber:
        yield transcriber


def pieces(samples, seed):
    """Samples cut at random places, some pieces empty, some long."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(samples), 40))
    return np.split(samples, [cuts[0], *cuts])


def text_of(path, labels):
    """What a path reads, by the decoder: its log-probs are 0 for the class of each frame and low for all others."""
    log_probs = np.full((len(path), len(labels) + 1), -20.0, np.float32)
    log_probs[np.arange(len(path)), path] = 0.0
    return greedy(log_probs, len(path), labels)


@pytest.mark.parametrize("seed", range(20))
def test_reading_in_pieces_is_reading_at_once(tiny, seed):
    """Paths of few classes, so that repeats, spaces and blanks meet at the seams."""
    rng = np.random.default_rng(seed)
    labels = tiny.config.labels
    classes = [labels.index(" "), labels.index("a"), labels.index("b"), tiny.config.blank_id]
    path = rng.choice(classes, 60)
    reading = _Reading(tiny.config)
    for stop in range(61):
        if stop == 60 or rng.random() < 0.3:
            shorter, reading = reading, reading.followed_by(path[reading.frames : stop].tolist())
            assert shorter.frames <= stop  # the old one is as it was
            assert reading.text == text_of(path[:stop], labels)
            quiet = np.isin(path[:stop], [classes[0], classes[3]])
            assert reading.silent_frames == (stop if quiet.all() else int(np.argmin(quiet[::-1])))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_end_is_what_the_whole_gives(tiny, seed, rate):
    samples = sound(7.3, seed)
    stream = Stream(tiny, rate=rate)
    for piece in pieces(samples, seed):
        stream.push(piece)
    assert stream.finish() == tiny.transcribe((samples, rate))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frames_of_pieces_are_the_frames_of_the_whole(tiny, seed):
    samples = sound(6.0, seed)
    stream = Stream(tiny, step=100.0)  # never runs the network, so it forgets no frame
    for piece in pieces(samples, seed):
        stream.push(piece)
    expected = features.log_mel(samples, tiny.config.features)
    known = stream._log_mels
    assert expected.shape[1] - known.shape[1] <= 5
    np.testing.assert_allclose(known, expected[:, : known.shape[1]], atol=1e-3)
    normalised = stream._normaliser.normalised(known)
    np.testing.assert_allclose(normalised, features.normalize(known), atol=1e-3)


def test_settled_frames_are_those_of_one_pass_once_normalisation_has_settled(tiny, monkeypatch):
    """With the whole's mean and deviation, and the network's own right context, nothing is approximate."""
    samples = sound(12.0, 5)
    feats, frames = tiny.features(samples)
    expected = tiny.run_features(feats[:, :frames]).argmax(axis=1)
    log_mels = features.log_mel(samples, tiny.config.features)
    mean, std = log_mels.mean(1, keepdims=True), log_mels.std(1, ddof=1, keepdims=True) + features.STD_GUARD
    stream = Stream(tiny, right_context=1.6)  # the receptive field reaches 1.5 s ahead
    monkeypatch.setattr(stream._normaliser, "normalised", lambda part: ((part - mean) / std).astype(np.float32))
    for piece in pieces(samples, 5):
        stream.push(piece)
    settled = stream._settled
    assert settled.frames > 450
    assert settled.text == text_of(expected[: settled.frames], tiny.config.labels)


def test_what_is_settled_stays(tiny):
    stream, before = Stream(tiny, right_context=0.3), ""
    for piece in np.split(sound(6.0, 2), 60):
        settled = stream.push(piece).settled
        assert settled.startswith(before)
        before = settled
    assert len(before) > 50


def test_memory_of_a_long_stream_is_bounded_but_for_its_samples(tiny):
    stream = Stream(tiny)
    for piece in np.split(sound(60.0, 2), 300):
        stream.push(piece)
    assert stream._log_mels.shape[1] < stream._left + stream._right + 2 * stream._step + 20
    assert len(stream._tail) < 16_000


def test_partials_of_the_embedded_model_grow_into_its_text(mini):
    from jasper_asr.audio import load_audio

    samples = load_audio(ROWS[0].audio_path)
    stream, seen = Stream(mini), []
    for start in range(0, len(samples), 1600):
        seen.append(stream.push(samples[start : start + 1600]))
    assert seen[0].text == ""
    assert len({partial.text for partial in seen}) > 4
    lengths = [len(partial.settled) for partial in seen]
    assert lengths == sorted(lengths)
    assert seen[-1].seconds == pytest.approx(len(samples) / 16_000)
    assert len(seen[-1].text) > 0.5 * len(ROWS[0].text)
    assert stream.finish() == mini.transcribe(ROWS[0].audio_path)


def test_silence_is_counted(mini):
    from jasper_asr.audio import load_audio

    samples = load_audio(ROWS[0].audio_path)
    stream = Stream(mini)
    stream.push(samples)
    quiet = stream.push(np.zeros(32_000, np.float32))
    assert 1.2 < quiet.silence < 3.5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"step": 0.0}, "must be seconds above 0"), ({"right_context": -1.0}, "must be seconds above 0")],
)
def test_wrong_options(tiny, options, message):
    with pytest.raises(UsageError, match=message):
        Stream(tiny, **options)


def test_a_model_of_fixed_length_is_refused():
    fixed = Transcriber(open_backend("ort", tiny_graph(batch_size=1, frames=400), threads=1))
    with pytest.raises(UsageError, match=r"^streaming needs a model of any length; export it without --frames$"):
        Stream(fixed)


def test_wrong_samples(tiny):
    stream = Stream(tiny)
    with pytest.raises(AudioError, match=r"^<stream>: nothing was pushed"):
        stream.finish()
    with pytest.raises(AudioError, match=r"^<stream>: samples are complex128 \[3\]; push"):
        stream.push(np.zeros(3, complex))


def test_listen_to_a_file(mini, tmp_path):
    """Two clips with a pause between them are two utterances."""
    from jasper_asr.audio import load_audio, write_wav

    parts = [load_audio(ROWS[index].audio_path) for index in (0, 1)]
    silence = np.random.default_rng(0).normal(0, 1e-4, 40_000).astype(np.float32)
    write_wav(tmp_path / "two.wav", np.concatenate([parts[0], silence, parts[1], silence]))
    code, out, _ = run("listen", "--source", tmp_path / "two.wav", "--threads", 1)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) >= 2
    words = sum(len(row.text.split()) for row in ROWS[:2])
    assert 0.5 * words < len(out.split()) < 1.5 * words


def test_listen_without_a_microphone(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sounddevice", None)
    code, out, err = run("listen")
    assert (code, out) == (2, "")
    assert err == "jasper: error: listening needs a package: pip install 'jasper-asr[mic]'\n"


def test_listen_to_a_microphone_that_is_a_double(monkeypatch, mini):
    """Blocks of 0.1 s at 16 kHz mono, until Ctrl-C."""
    from jasper_asr.audio import load_audio

    samples = load_audio(ROWS[0].audio_path)

    class Microphone:
        def __init__(self, rate, size, device, channels, dtype):
            assert (rate, size, device, channels, dtype) == (16_000, 1600, 3, 1, "float32")
            self.at = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, size):
            if self.at >= len(samples):
                raise KeyboardInterrupt
            self.at += size
            return samples[self.at - size : self.at][:, None], False

    class Device:
        InputStream, PortAudioError = Microphone, OSError

    monkeypatch.setitem(__import__("sys").modules, "sounddevice", Device)
    code, out, err = run("listen", "--input-device", "3", "--threads", 1, "--pause", 30)
    assert code == 0
    assert out == mini.transcribe((samples, 16_000)).text + "\n"
    assert "listening" in err


def test_partial_text_is_shown_on_terminals_only(capsys):
    live._show("hello")
    assert capsys.readouterr().err == ""
