import math
import time

import numpy as np
import pytest

import jasper_asr
from helpers_audio import CHECKPOINT, CONFIG, DATA, sound, tiny_config, tiny_graph, wav, write_model
from jasper_asr import audio
from jasper_asr.backends import BACKENDS, Shapes, open_backend
from jasper_asr.config import load_config
from jasper_asr.decode import greedy
from jasper_asr.errors import AudioError, ModelError, StorageError, UsageError
from jasper_asr.transcribe import Clip, Failure, Transcriber, Transcript, load

SECONDS = [1.3, 0.4, 2.1, 0.9, 0.4, 1.7, 2.9, 0.6, 1.1, 0.8, 2.4, 0.5, 1.9, 0.3, 1.0, 2.6, 0.7]
"""Lengths of 17 clips: one more than the largest batch."""

KINDS = {
    "dynamic": {},
    "static": {"batch_size": 4, "frames": 304},
    "unmasked": {"masked": False},
    "unmasked_batch": {"batch_size": 4, "masked": False},
    "forty_seconds": {"batch_size": 1, "frames": 4000},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / f"{name}.onnx", **shape) for name, shape in KINDS.items()}


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "jasper_tiny.npz") as vectors:
        return dict(vectors)


@pytest.fixture(scope="module")
def clips():
    return [(sound(seconds, seed), 16_000) for seed, seconds in enumerate(SECONDS)]


@pytest.fixture(scope="module")
def singles(models, clips):
    """What each clip gives alone."""
    with load(models["dynamic"]) as transcriber:
        results = [transcriber.transcribe(clip) for clip in clips]
    assert len({result.text for result in results}) == len(clips)  # or a wrong order would not show
    return results


class Recorder:
    """A backend that keeps what it was asked; `spoil` may change its answers."""

    def __init__(self, shapes=None, spoil=None, **graph):
        self.inner = open_backend("ort", tiny_graph(**graph))
        self.config = self.inner.config
        self.shapes = shapes or self.inner.shapes
        self.spoil = spoil
        self.calls = []
        self.closed = 0

    def run(self, feats, lens):
        self.calls.append((feats.copy(), lens.copy()))
        log_probs, out_lens = self.inner.run(feats, lens)
        if self.spoil:
            self.spoil(feats, log_probs)
        return log_probs, out_lens

    def close(self):
        self.closed += 1


# --- every kind of model ----------------------------------------------------------


def golden_samples(golden):
    return [row[:length] for row, length in zip(golden["audio"], golden["audio_lens"], strict=True)]


def golden_texts(golden):
    rows = [golden[f"log_probs_single_{i}"][0] for i in range(4)]
    lens = [int(golden[f"log_prob_lens_single_{i}"][0]) for i in range(4)]
    return [greedy(row, length, tiny_config().labels) for row, length in zip(rows, lens, strict=True)]


@pytest.mark.parametrize("kind", [*KINDS, "checkpoint", "checkpoint_batched"])
def test_golden_audio_through_every_kind_of_model(models, golden, kind):
    options = {"trim_silence": False, "batch_size": 4 if kind == "checkpoint_batched" else 1}
    if kind.startswith("checkpoint"):
        transcriber = load(CHECKPOINT, config=load_config(CONFIG), **options)
    else:
        transcriber = load(models[kind], **options)
    with transcriber:
        samples = golden_samples(golden)
        log_probs, lens = transcriber.log_probs(samples)
        texts = [result.text for result in transcriber.transcribe_many([(row, 16_000) for row in samples])]
    assert log_probs.shape == (4, lens.max(), 29)
    assert log_probs.dtype == np.float32
    assert lens.dtype == np.int32
    for i, length in enumerate(lens):
        assert length == golden[f"log_prob_lens_single_{i}"][0]
        expected = golden[f"log_probs_single_{i}"][0, :length]
        np.testing.assert_allclose(log_probs[i, :length], expected, rtol=0, atol=2e-3)
        assert not log_probs[i, length:].any()
    assert texts == golden_texts(golden)
    assert all(len(text) > 20 for text in texts)


def test_raw_and_ema_weights_differ(golden):
    samples = golden_samples(golden)[:1]
    ema, raw = (
        load(CHECKPOINT, config=tiny_config(), weights=weights, trim_silence=False).log_probs(samples)[0]
        for weights in ("ema", "raw")
    )
    assert np.abs(ema - golden["log_probs_single_0"][:, : ema.shape[1]]).max() < 2e-3
    assert np.abs(raw - ema).max() > 1e-2


def test_features_are_the_golden_ones(models, golden):
    with load(models["dynamic"]) as transcriber:
        feats, frames = transcriber.features(golden_samples(golden)[1])
    assert (feats.shape, feats.dtype, frames) == ((64, 304), np.float32, golden["feat_lens_single_1"][0])
    assert np.abs(feats - golden["feats_single_1"][0])[:, :frames].max() < 5e-3


def test_idle_threads_of_onnxruntime_do_not_spin(models):
    """Else they take the cores from decoding: the default model was 1.7 times slower, files to text, on two cores."""
    with load(next(iter(models.values())), threads=2) as transcriber:
        options = transcriber._backend._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_the_package_offers_load():
    assert jasper_asr.load is load
    assert jasper_asr.Transcriber is Transcriber
    assert jasper_asr.Transcript is Transcript


# --- batches ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_batches_equal_singles_in_the_order_of_the_inputs(models, clips, singles, batch_size):
    with load(models["dynamic"], batch_size=batch_size) as transcriber:
        assert list(transcriber.transcribe_many(clips)) == singles


@pytest.mark.parametrize("kind", ["static", "unmasked", "unmasked_batch"])
def test_other_shapes_equal_singles_and_the_last_batch_may_be_partial(models, clips, singles, kind):
    with load(models[kind], batch_size=7) as transcriber:
        assert transcriber.batch_size == (4 if "batch_size" in KINDS[kind] else 7)
        assert list(transcriber.transcribe_many(clips)) == singles


def test_neighbours_in_a_batch_have_similar_lengths(clips):
    backend = Recorder()
    list(Transcriber(backend, batch_size=4, trim_silence=False).transcribe_many(clips))
    lens = [call[1] for call in backend.calls]
    assert [len(row) for row in lens] == [4, 4, 4, 4, 1]
    frames = [math.ceil(16_000 * seconds / 160 - 1e-9) for seconds in SECONDS]
    assert np.concatenate(lens).tolist() == sorted(frames, reverse=True)  # what is left at the end: longest first


def test_a_static_batch_is_filled_up_with_silence(clips):
    backend = Recorder(batch_size=4, frames=304)
    results = list(Transcriber(backend, trim_silence=False).transcribe_many(clips[:5]))
    assert len(results) == 5
    assert [call[0].shape for call in backend.calls] == [(4, 64, 304)] * 2
    feats, lens = backend.calls[1]
    assert lens[1:].tolist() == [1, 1, 1]
    assert not feats[1:].any()


@pytest.mark.parametrize("kind", ["dynamic", "static", "unmasked_batch"])
def test_an_utterance_does_not_depend_on_its_neighbours(models, clips, kind):
    samples = [clip[0] for clip in clips]
    with load(models[kind]) as transcriber:
        together, lens = transcriber.log_probs(samples)
        reversed_, reversed_lens = transcriber.log_probs(samples[::-1])
        for i, row in enumerate(samples):
            alone, (length,) = transcriber.log_probs([row])
            assert lens[i] == reversed_lens[-1 - i] == length == alone.shape[1]
            np.testing.assert_allclose(together[i, :length], alone[0], rtol=0, atol=1e-5)
            np.testing.assert_allclose(reversed_[-1 - i, :length], alone[0], rtol=0, atol=1e-5)
            assert not together[i, length:].any()


def test_log_probs_are_log_probabilities(models, clips):
    with load(models["dynamic"]) as transcriber:
        log_probs, lens = transcriber.log_probs([clips[2][0]])
    np.testing.assert_allclose(np.exp(log_probs[0, : lens[0]]).sum(axis=1), 1.0, atol=1e-5)


def test_log_probs_of_nothing(models):
    with load(models["dynamic"]) as transcriber:
        log_probs, lens = transcriber.log_probs([])
        assert (log_probs.shape, lens.shape) == ((0, 0, 29), (0,))
        assert list(transcriber.transcribe_many([])) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_order_and_failures_survive_slow_decoding(clips, tmp_path, batch_size):
    """Decoding runs beside the network, in a thread; one that fails, fails alone."""

    def decoder(rows):
        time.sleep(0.02 if len(rows) % 3 else 0.0)
        if len(rows) == 15:  # clip 13
            raise UsageError("no")
        return str(len(rows))

    transcriber = Transcriber(Recorder(), batch_size=batch_size, decoder=decoder, trim_silence=False)
    done = []
    sources = [clips[0], tmp_path / "none.wav", *clips[1:]]
    results = list(transcriber.transcribe_many(sources, progress=done.append))
    texts = [None if isinstance(result, Failure) else int(result.text) for result in results]
    expected = [math.ceil(seconds * 50 - 1e-9) for seconds in SECONDS]
    expected[SECONDS.index(0.3)] = None
    assert texts == [expected[0], None, *expected[1:]]
    assert sum(done) == pytest.approx(sum(SECONDS) - 0.3)
    assert len(done) == len(results)


def test_leaving_early_stops_the_decoding(clips):
    decoded = []
    transcriber = Transcriber(Recorder(), decoder=lambda rows: decoded.append(1) or "x", trim_silence=False)
    results = transcriber.transcribe_many(clips * 5)
    next(results)
    results.close()
    assert len(decoded) < 5


def test_batches_do_not_mix_gears(clips):
    """Utterances wait for others of their gear; only the last batch is mixed."""
    gears = ((2, 60), (2, 120), (2, 300))
    backend = Recorder(Shapes(2, 300, masked=True, gears=gears))
    results = list(Transcriber(backend, batch_size=2, trim_silence=False).transcribe_many(clips * 4))
    with_none = list(Transcriber(Recorder(), trim_silence=False).transcribe_many(clips * 4))
    assert [result.text for result in results] == [result.text for result in with_none]
    shapes = [call[0].shape[2] for call in backend.calls]
    for frames, lens in zip(shapes[:-3], (call[1] for call in backend.calls), strict=False):
        assert frames == min(limit for _, limit in gears if limit >= lens.min())
    assert len(backend.calls) == len(clips) * 4 // 2


def test_many_come_in_chunks_so_memory_stays_flat(clips):
    taken = []
    sources = (taken.append(i) or clips[1] for i in range(100))
    results = Transcriber(Recorder(), batch_size=2).transcribe_many(sources)
    next(results)
    assert len(taken) == 32
    assert sum(1 for _ in results) == 99


# --- failures ---------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_unreadable_items_fail_in_their_place(models, clips, singles, tmp_path, batch_size):
    corrupt = tmp_path / "corrupt.wav"
    corrupt.write_bytes(b"RIFF????WAVE nonsense")
    sources = [*clips[:2], tmp_path / "missing.wav", *clips[2:5], corrupt, clips[5], b"", *clips[6:]]
    with load(models["dynamic"], batch_size=batch_size) as transcriber:
        results = list(transcriber.transcribe_many(sources))
    failures = {i: result.error for i, result in enumerate(results) if isinstance(result, Failure)}
    assert list(failures) == [2, 6, 8]
    assert [type(error) for error in failures.values()] == [StorageError, AudioError, AudioError]
    assert str(failures[2]) == f"{tmp_path / 'missing.wav'}: no such file; check the path"
    assert str(failures[6]).startswith(f"{corrupt}: not audio that libsndfile can read")
    assert str(failures[8]) == "<bytes>: is empty (0 bytes); record or copy it again"
    assert [result for result in results if isinstance(result, Transcript)] == singles


def test_longer_audio_than_the_model_takes_goes_in_windows(models, clips, singles, tmp_path):
    long = wav(tmp_path / "long.wav", 7.5)
    sources = [clips[0], long, clips[1], clips[2]]
    with load(models["static"], trim_silence=False) as transcriber, load(models["dynamic"]) as whole:
        results = list(transcriber.transcribe_many(sources))
        assert results[1] == whole.transcribe(long)
        assert len(results[1].text) > 10
        assert [results[0], *results[2:]] == singles[:3]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_lengths_round_that_of_the_model(models, extra):
    """304 frames fit; one more, as the 40.0 s clip has 4001 for a model of 4000, goes in windows."""
    clip = (sound(3.04 + extra * 0.01), 16_000)
    with load(models["static"], trim_silence=False) as fixed, load(models["dynamic"]) as whole:
        (given, length), (expected, frames) = fixed.log_probs([clip[0]]), whole.log_probs([clip[0]])
        assert length == frames
        np.testing.assert_allclose(given, expected, atol=1e-5)
        assert fixed.transcribe(clip) == whole.transcribe(clip)


def test_an_unmasked_model_of_fixed_length_takes_just_that(clips):
    transcriber = Transcriber(Recorder(batch_size=2, frames=100, masked=False), trim_silence=False)
    masked = Transcriber(Recorder(), trim_silence=False)
    exact = [(sound(1.0, seed), 16_000) for seed in range(3)]
    assert list(transcriber.transcribe_many(exact)) == list(masked.transcribe_many(exact))
    with pytest.raises(AudioError, match=r"^<audio>: this unmasked model takes just 100 frames; use a masked one$"):
        transcriber.transcribe((sound(0.9), 16_000))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_probs_that_are_not_finite_fail_alone(clips, singles, value):
    guilty_frames = 40  # clip 1 and clip 4 have 0.4 s

    def spoil(feats, log_probs):
        for row, feat in zip(log_probs, feats, strict=True):
            if np.flatnonzero(feat.any(axis=0))[-1] + 1 == guilty_frames:
                row[3, 5] = value

    transcriber = Transcriber(Recorder(spoil=spoil), batch_size=4, trim_silence=False)
    results = list(transcriber.transcribe_many(clips))
    assert [i for i, result in enumerate(results) if isinstance(result, Failure)] == [1, 4]
    assert [results[i] for i in range(17) if i not in (1, 4)] == [singles[i] for i in range(17) if i not in (1, 4)]
    assert type(results[1].error) is ModelError
    assert str(results[1].error) == "<audio>: log_probs are not finite; the weights or the precision are unfit"
    with pytest.raises(ModelError, match=r"^<samples 0>: log_probs are not finite"):
        transcriber.log_probs([clips[1][0]])


def test_garbage_beyond_the_length_is_nobodys_business(clips, singles):
    def spoil(feats, log_probs):
        for row, feat in zip(log_probs, feats, strict=True):
            row[(np.flatnonzero(feat.any(axis=0))[-1] + 2) // 2 :] = np.nan

    results = list(Transcriber(Recorder(spoil=spoil), batch_size=16).transcribe_many(clips))
    assert results == singles


@pytest.mark.filterwarnings("error")
def test_absurdly_loud_samples_are_an_error_not_a_warning(models, clips):
    loud = (sound(1.0).astype(np.float32) * np.float32(1e30), 16_000)
    with load(models["dynamic"], batch_size=2) as transcriber:
        good, bad = transcriber.transcribe_many([clips[0], loud])
        with pytest.raises(AudioError, match=r"^<samples 0>: features are not finite"):
            transcriber.log_probs([loud[0]])
    assert isinstance(good, Transcript)
    assert str(bad.error) == (
        "<audio>: features are not finite: the samples hold NaN, infinity or absurdly large values; full scale is 1.0"
    )


def test_limits_on_sound(clips):
    transcriber = Transcriber(Recorder(), limits=audio.AudioLimits(max_seconds=1.0))
    with pytest.raises(AudioError, match=r"the limit is 1 s"):
        transcriber.transcribe(clips[0])
    assert transcriber.transcribe(clips[1]).duration == 0.4


# --- sources ----------------------------------------------------------------------


def test_path_bytes_and_samples_agree(models, tmp_path):
    path = wav(tmp_path / "a.wav", 1.5)
    samples = audio.load_audio(path)
    with load(models["dynamic"]) as transcriber:
        results = [transcriber.transcribe(source) for source in (path, str(path), path.read_bytes(), (samples, 16_000))]
    assert results == [results[0]] * 4
    assert results[0].duration == 1.5
    assert results[0].text


def test_another_rate_is_resampled(models):
    t = np.arange(44_100) / 44_100
    with load(models["dynamic"]) as transcriber:
        assert transcriber.transcribe((0.3 * np.sin(2000 * t), 44_100)).duration == 1.0


def test_a_clip_is_a_part_of_its_source(models, tmp_path):
    path = wav(tmp_path / "a.wav", 3.0)
    samples = audio.load_audio(path)
    with load(models["dynamic"], trim_silence=False) as transcriber:
        part = transcriber.transcribe(Clip(path, 0.5, 1.25))
        assert part == transcriber.transcribe((samples[8_000:28_000], 16_000))
        assert transcriber.transcribe(Clip(path, 1.0)) == transcriber.transcribe((samples[16_000:], 16_000))
        with pytest.raises(AudioError, match=r"offset 3 s is beyond its end"):
            transcriber.transcribe(Clip(path, 3.0))
    assert part.duration == 1.25


# --- options ----------------------------------------------------------------------


def test_silence_is_trimmed_as_the_config_says_unless_told():
    silence = np.zeros(16_000, np.float32)
    source = (np.concatenate([silence, sound(1.0), silence]), 16_000)
    frames = {}
    for choice in (None, True, False):
        backend = Recorder()
        transcriber = Transcriber(backend, trim_silence=choice)
        assert transcriber.transcribe(source).duration == 3.0  # of the sound, not of what is left of it
        frames[choice] = int(backend.calls[0][1][0])
    assert tiny_config().dataset.trim_silence is True
    assert frames[None] == frames[True]
    assert 100 <= frames[True] <= 100 + 2 * 2048 / 160
    assert frames[False] == 300


def test_pad_to_changes_the_shape_and_not_the_text(models, clips, singles):
    backend = Recorder()
    forty = (sound(40.0, seed=3), 16_000)
    padded = Transcriber(backend, pad_to=40.0)
    assert [padded.transcribe(clip) for clip in clips[:3]] == singles[:3]
    assert [feats.shape[2] for feats, _ in backend.calls] == [4000] * 3
    expected = Transcriber(backend).transcribe(forty)
    assert padded.transcribe(forty) == expected
    assert (backend.calls[-1][0].shape, backend.calls[-1][1].tolist()) == ((1, 64, 4016), [4000])
    with load(models["forty_seconds"], pad_to=40.0) as static:
        assert static.transcribe(forty) == expected
        assert [static.transcribe(clip) for clip in clips[:3]] == singles[:3]
    assert len(expected.text) > 500


def test_a_checkpoint_padded_or_batched_gets_masks(clips, singles):
    for options in ({"pad_to": 4.0}, {"batch_size": 3}, {}):
        with load(CHECKPOINT, config=tiny_config(), **options) as transcriber:
            assert list(transcriber.transcribe_many(clips[:4])) == singles[:4]
            assert transcriber._backend.shapes == Shapes(None, None, masked=bool(options))


def test_threads(models):
    with load(models["dynamic"], threads=1) as one, load(models["dynamic"], threads=3) as three:
        counts = [model._backend._session.get_session_options().intra_op_num_threads for model in (one, three)]
    assert counts == [1, 3]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_progress_adds_up_to_the_audio(clips, tmp_path, batch_size):
    steps = []
    transcriber = Transcriber(Recorder(), batch_size=batch_size)
    list(transcriber.transcribe_many([*clips, tmp_path / "missing.wav"], progress=steps.append))
    assert len(steps) == len(clips) + 1
    assert steps.count(0.0) == 1
    assert math.fsum(steps) == pytest.approx(math.fsum(SECONDS), abs=1e-9)


def test_close_and_the_context_manager_close_the_backend(models):
    backend = Recorder()
    transcriber = Transcriber(backend)
    transcriber.close()
    assert backend.closed == 1
    with transcriber as same:
        assert same is transcriber
        assert backend.closed == 1
    assert backend.closed == 2
    with pytest.raises(KeyError), transcriber:
        raise KeyError
    assert backend.closed == 3
    with load(models["dynamic"]) as real:
        pass
    assert real._backend._session is None


# --- refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0: must be at least 1"),
        ({"backend": "tpu"}, f"backend 'tpu': choose one of {', '.join(BACKENDS)}"),
        ({"pad_to": 0.0}, "pad_to 0.0: must be a number of seconds above 0"),
        ({"pad_to": math.nan}, "pad_to nan: must be a number of seconds above 0"),
        ({"pad_to": math.inf}, "pad_to inf: must be a number of seconds above 0"),
    ],
)
def test_options_that_cannot_be(models, options, message):
    with pytest.raises(UsageError) as caught:
        load(models["dynamic"], **options)
    assert str(caught.value) == message


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match=r"x\.onnx: no such model; give a file, or a built-in name \(mini\)$"):
        load(tmp_path / "x.onnx")


def test_beam_search_decodes_what_the_decoder_function_does(tmp_path):
    """The spine's beam search is `beam.beam_search` on its own log_probs, with and without a language model."""
    from jasper_asr.beam import beam_search
    from jasper_asr.lm import estimate
    from jasper_asr.transcribe import BeamOptions

    model, samples = write_model(tmp_path / "m.onnx"), sound(1.5)
    lm = estimate(["a lunar nap", "nun and a lad"] * 3, order=2)
    lm.save(tmp_path / "words.lm")
    with load(model) as plain:
        rows, lens = plain.log_probs([samples])
        greedy_text = plain.transcribe((samples, 16_000)).text
    texts = []
    for options, given in (
        (BeamOptions(width=8), {}),
        (BeamOptions(tmp_path / "words.lm", 8, lm_weight=2.0, word_bonus=0.5, unknown_penalty=0.1), {"lm": lm}),
        (BeamOptions(tmp_path / "words.lm", 8, lm_weight=2.0, word_bonus=0.5, unknown_penalty=99.0), {"lm": lm}),
    ):
        weights = {"lm_weight": 2.0, "word_bonus": 0.5, "unknown_penalty": options.unknown_penalty} if given else {}
        wanted = beam_search(rows[0], int(lens[0]), plain.config.labels, beam_width=8, **given, **weights)[0].text
        with load(model, beam=options) as transcriber:
            assert transcriber.transcribe((samples, 16_000)).text == wanted
        texts.append(wanted)
    assert len({greedy_text, *texts[1:]}) == 3
