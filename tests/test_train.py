"""Training on tiny data: augmentation, batches, optimisers, exact resume, and a network that learns."""

import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from jasper_asr import features
from jasper_asr.cli.training import _lexicon
from jasper_asr.config import SpecAugmentConfig, SpeedPerturbationConfig, load_config
from jasper_asr.data.manifest import read_manifest
from jasper_asr.errors import ManifestError, ModelError, StorageError, UsageError
from jasper_asr.model.checkpoint import load_checkpoint
from jasper_asr.model.export import BUILTIN_MODELS
from jasper_asr.train import augment
from jasper_asr.train.dataset import BatchPlan, build_cache, fits, make_batch
from jasper_asr.train.phonemes import Lexicon, phoneme_targets, read_lexicon

torch = pytest.importorskip("torch")

from jasper_asr.model.net import Jasper  # noqa: E402
from jasper_asr.train import loop  # noqa: E402
from jasper_asr.train.loop import (  # noqa: E402
    Muon,
    NovoGrad,
    PhonemeHead,
    TrainOptions,
    _consistency_loss,
    _phoneme_loss,
    average_state,
    learning_rate,
    orthogonalized,
    train,
)
from jasper_asr.train.run import _initial_weights, run_training  # noqa: E402

DATA = Path(__file__).parent / "data"
TONES = {"a": 400.0, "b": 900.0, "c": 1800.0, "d": 3200.0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order, whatever else the machine does
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config():
    """The golden tiny network with fewer blocks, no dropout, and its training section."""
    base = load_config(DATA / "jasper_tiny.yaml")
    blocks = tuple(replace(block, dropout=0.1, repeat=1) for block in base.blocks[:2]) + tuple(
        replace(block, dropout=0.1) for block in base.blocks[-1:]
    )
    raw = json.loads(json.dumps(base.raw))
    kept = [0, 1, len(base.blocks) - 1]
    raw["jasper"]["encoder"]["blocks"] = [raw["jasper"]["encoder"]["blocks"][i] for i in kept]
    for block in raw["jasper"]["encoder"]["blocks"]:
        block.update(dropout=0.1, repeat=1)
    return replace(base, blocks=blocks, raw=raw, dataset=replace(base.dataset, trim_silence=False))


def write_corpus(folder: Path, count: int, seed: int = 0) -> Path:
    """Words of tones, one tone a letter: trivially learnable speech. Returns the manifest."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        word = "".join(rng.choice(list(TONES), size=int(rng.integers(2, 5))))
        parts = []
        for letter in word:
            time = np.arange(2400) / 16000
            parts += [0.3 * np.sin(2 * np.pi * TONES[letter] * time), np.zeros(1600)]
        samples = np.concatenate([np.zeros(800), *parts]) + rng.normal(0, 1e-3, 800 + 4000 * len(word))
        soundfile.write(folder / f"{index}.wav", samples, 16000)
        rows.append({"audio_filepath": f"{index}.wav", "duration": len(samples) / 16000, "text": word})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return read_manifest(write_corpus(tmp_path_factory.mktemp("corpus"), 24))


@pytest.fixture(scope="module")
def cache(corpus, config, tmp_path_factory):
    return build_cache([corpus], config, tmp_path_factory.mktemp("cache"), jobs=1)[0]


OPTIONS = TrainOptions(steps=6, batch_seconds=4.0, warmup=2, lr=1e-3, workers=1, noise=0.5, ema=0.9)


# --- augmentation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.85, 0.9, 1.1, 1.15])
def test_speed_in_the_feature_domain_resembles_resampled_audio(config, rate):
    """A chirp-like voice: features of resampled audio against warped features, by correlation a band."""
    soxr = pytest.importorskip("soxr")
    rng = np.random.default_rng(3)
    time = np.arange(32000) / 16000
    pitch = 2 * np.pi * np.cumsum(140 + 30 * np.sin(3 * time)) / 16000
    voice = sum(np.sin(k * pitch) / k for k in range(1, 25)) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))
    voice = (0.1 * voice + rng.normal(0, 1e-3, len(time))).astype(np.float32)
    resampled = soxr.resample(voice, 16000 * rate, 16000).astype(np.float32)
    wanted = features.normalize(features.log_mel(resampled, config.features))
    log_mels = features.log_mel(voice, config.features)
    got = features.normalize(augment.change_speed(log_mels, rate, rate, config.features))
    assert abs(got.shape[1] - wanted.shape[1]) <= 1
    frames = min(got.shape[1], wanted.shape[1])
    middle = slice(4, 52)  # the uppermost bands come from beyond 8 kHz, where there is nothing to take
    alike = np.corrcoef(got[middle, :frames].ravel(), wanted[middle, :frames].ravel())[0, 1]
    plain = features.normalize(log_mels)[:, np.linspace(0, log_mels.shape[1] - 1, frames).astype(int)]
    unwarped = np.corrcoef(plain[middle].ravel(), wanted[middle, :frames].ravel())[0, 1]
    assert alike > 0.85
    assert alike > unwarped


def test_rate_one_changes_nothing(config):
    log_mels = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    assert augment.change_speed(log_mels, 1.0, 1.0, config.features) is log_mels
    np.testing.assert_allclose(augment._warp_matrix(1.0, config.features), np.eye(64), atol=1e-9)


def test_drawn_rates_stay_in_range_and_p_is_their_share():
    rng = np.random.default_rng(0)
    speed = SpeedPerturbationConfig(0.85, 1.15, discrete=False, p=0.3)
    rates = np.array([augment.draw_rate(speed, rng) for _ in range(4000)])
    assert rates.min() >= 0.85
    assert rates.max() <= 1.15
    assert abs((rates != 1.0).mean() - 0.3) < 0.03
    discrete = {augment.draw_rate(replace(speed, discrete=True, p=1.0), rng) for _ in range(100)}
    assert discrete == {0.85, 1.0, 1.15}


@pytest.mark.parametrize("snr", [5.0, 20.0])
def test_noise_power_matches_the_ratio(snr):
    log_mels = np.random.default_rng(1).normal(-4, 2, (64, 800)).astype(np.float32)
    noisy = augment.add_noise(log_mels, snr, np.random.default_rng(2))
    added = np.exp(noisy.astype(np.float64)) - np.exp(log_mels.astype(np.float64))
    ratio = 10 * math.log10(np.exp(log_mels.astype(np.float64)).mean() / added.mean())
    assert added.min() > -1e-6
    assert abs(ratio - snr) < 0.5


def test_a_room_rings_as_long_and_as_loud_as_asked():
    """One frame of sound: its tail holds 10^(-ratio/10) of its energy and is 60 dB down after the decay time."""
    silence = math.log(1e-12)
    click = np.full((64, 400), silence, np.float32)
    click[:, 10] = 0.0
    power = np.exp(augment.add_room(click, decay_seconds=0.5, ratio_db=6.0, hop_seconds=0.01).astype(np.float64))
    tail = power[:, 11:].clip(0)
    np.testing.assert_allclose(power[:, 10], 1.0, rtol=1e-5)
    np.testing.assert_allclose(tail.sum(axis=1), 10**-0.6, rtol=1e-3)
    np.testing.assert_allclose(tail[:, 20] / tail[:, 0], 10 ** (-60 * 0.2 / 0.5 / 10), rtol=2e-2)
    assert (power[:, :10] < 1.3e-12).all()  # nothing rings ahead of its sound


def test_spec_augment_masks_whole_bands_and_frames_and_spares_the_rest():
    masks = SpecAugmentConfig(freq_masks=2, max_freq=10, time_masks=2, max_time=30)
    covered = []
    for seed in range(200):
        values = np.ones((64, 400), np.float32)
        augment.spec_augment(values, masks, np.random.default_rng(seed))
        bands, frames = (values == 0).all(axis=1), (values == 0).all(axis=0)
        assert ((values == 0) == (bands[:, None] | frames[None, :])).all()
        assert bands.sum() <= 20
        assert frames.sum() <= 60
        covered.append((values == 0).mean())
    assert 0.1 < np.mean(covered) < 0.3
    short = np.ones((64, 20), np.float32)
    augment.spec_augment(short, masks, np.random.default_rng(0))
    assert (short != 0).any(axis=0).sum() >= 12  # at most two fifths of the frames go


# --- data -----------------------------------------------------------------------------------------------------


def test_cache_holds_the_features_and_is_found_again(corpus, config, tmp_path):
    calls = []
    first, skipped = build_cache([corpus], config, tmp_path, jobs=2, progress=lambda *done: calls.append(done))
    assert not skipped
    assert calls[-1] == (24, 24)
    again, _ = build_cache([corpus], config, tmp_path, progress=lambda *done: pytest.fail("computed twice"))
    samples, _rate = soundfile.read(corpus[5].audio_path, dtype="float32")
    wanted = features.log_mel(samples, config.features)
    for cache in (first, again):
        np.testing.assert_allclose(cache.log_mels(5), wanted, atol=0.02)
        assert cache.targets[5] == [" abcdefghijklmnopqrstuvwxyz'".index(letter) for letter in corpus[5].text]


def test_a_manifest_listed_twice_counts_twice(corpus, config, tmp_path):
    double, _ = build_cache([corpus[:3], corpus[3:5], corpus[:3]], config, tmp_path)
    assert len(double) == 8
    np.testing.assert_array_equal(double.log_mels(0), double.log_mels(5))
    np.testing.assert_array_equal(double.log_mels(2), double.log_mels(7))


def test_unusable_utterances_are_named(corpus, config, tmp_path):
    bad = [
        replace(corpus[0], audio_path=tmp_path / "missing.wav", audio_filepath="missing.wav"),
        replace(corpus[1], text=None),
        replace(corpus[2], text="abc" * 40),
        replace(corpus[3], text="!!!"),
    ]
    _, skipped = build_cache([bad + list(corpus[4:6])], config, tmp_path / "one")
    assert [row.audio_filepath for row in skipped] == ["missing.wav"] + [row.audio_filepath for row in corpus[1:4]]
    assert "transcript" in skipped[1].reason
    assert "output frames" in skipped[2].reason
    with pytest.raises(ManifestError, match="no usable utterance"):
        build_cache([bad], config, tmp_path / "two")


def test_an_epoch_holds_every_utterance_once_within_the_batch_size():
    frames = np.random.default_rng(0).integers(50, 900, 300)
    plan = BatchPlan(frames, 4000, seed=7)
    first, second = plan.epoch(0), plan.epoch(1)
    for batches in (first, second):
        assert sorted(np.concatenate(batches)) == list(range(300))
        assert all(frames[b].max() * len(b) <= 4000 or len(b) == 1 for b in batches)
        padding = 1 - frames.sum() / sum(frames[b].max() * len(b) for b in batches)
        assert padding < 0.15
    assert [b.tolist() for b in first] != [b.tolist() for b in second]
    assert [b.tolist() for b in first] == [b.tolist() for b in BatchPlan(frames, 4000, seed=7).epoch(0)]


def test_batches_are_padded_with_zeros_and_depend_on_the_seed_alone(cache, config):
    def batch(seed):
        return make_batch(cache, np.arange(6), config, np.random.default_rng(seed), noise=0.5, rooms=0.5)

    one, same, other = batch(1), batch(1), batch(2)
    np.testing.assert_array_equal(one.features, same.features)
    assert one.features.shape != other.features.shape or (one.features != other.features).any()
    for row, length in zip(one.features, one.lens, strict=True):
        assert (row[:, length:] == 0).all()
    assert one.target_lens.sum() == len(one.targets)


def test_a_batch_has_one_tempo(cache, config):
    """So that utterances of one length stay so; the tempo of the next batch is another."""
    speed = SpeedPerturbationConfig(discrete=False, p=1.0, min_rate=0.8, max_rate=1.0)  # slower: CTC always fits
    faster = replace(config, train_dataset=replace(config.train_dataset, speed_perturbation=speed))
    frames, tempos = cache.frames[:6], []
    for seed in range(4):
        lens = make_batch(cache, np.arange(6), faster, np.random.default_rng(seed), noise=0.0).lens
        tempos.append(frames.sum() / lens.sum())
        np.testing.assert_allclose(lens * tempos[-1], frames, atol=1.5)
    assert 0.8 < min(tempos) < max(tempos) - 0.02 < 1.0


def test_views_of_an_utterance_are_augmented_apart_and_stay_in_step(cache, config):
    speed = SpeedPerturbationConfig(discrete=False, p=1.0, min_rate=0.8, max_rate=1.0)
    faster = replace(config, train_dataset=replace(config.train_dataset, speed_perturbation=speed))
    batch = make_batch(cache, np.arange(3), faster, np.random.default_rng(0), noise=0.0, views=2)
    assert batch.views == 2
    np.testing.assert_array_equal(batch.lens[:3], batch.lens[3:])
    np.testing.assert_array_equal(*np.split(batch.targets, 2))
    assert all((one != two).any() for one, two in zip(batch.features[:3], batch.features[3:], strict=True))
    plain = replace(config, train_dataset=replace(config.train_dataset, speed_perturbation=None), spec_augment=None)
    same = make_batch(cache, np.arange(3), plain, np.random.default_rng(0), noise=0.0, views=2)
    np.testing.assert_array_equal(same.features[:3], same.features[3:])


def test_two_processes_may_compute_the_same_features_at_once(corpus, config, tmp_path, monkeypatch):
    """Another process finishes the same file while this one is at work: both get it, and nothing is left over."""

    def interrupted(done, total):
        if done == 3:
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                build_cache([corpus], config, tmp_path, jobs=1)

    built, _ = build_cache([corpus], config, tmp_path, jobs=1, progress=interrupted)
    alone, _ = build_cache([corpus], config, tmp_path / "alone", jobs=1)
    assert len(built) == len(alone) == len(corpus)
    for index in range(len(alone)):
        np.testing.assert_array_equal(built.log_mels(index), alone.log_mels(index))
    assert sorted(p.name for p in tmp_path.glob("features*")) == sorted(p.name for p in (tmp_path / "alone").iterdir())


def test_fits_counts_repeats(config):
    assert config.stride == 2
    assert fits(8, [1, 2, 3, 4], config)
    assert not fits(8, [1, 2, 2, 4], config)
    assert fits(9, [1, 2, 2, 4], config)


# --- phonemes --------------------------------------------------------------------------------------------------


def test_a_lexicon_in_kaldis_layout(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("The DH AH\nthe\tDH  IY\n\ncat  K AE T\nA AH\n", encoding="utf-8")
    lexicon = read_lexicon(path)
    assert lexicon.symbols == ("AE", "AH", "DH", "K", "T")
    assert lexicon.words == {"the": (2, 1), "cat": (3, 0, 4), "a": (1,)}
    assert lexicon.n_classes == 6


def test_the_recipes_lexicon(tmp_path, monkeypatch):
    """With an engine of our own in place of hibari's: stress and length go, what nothing is said of is left out."""
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "mini" / "lexicon.py"))
    said = {"again": "\u0259\u0261\u02c8\u025bn", "by": "b\u02c8I", "--": "-"}
    engine = SimpleNamespace(G2P=lambda: said.get)
    monkeypatch.setitem(sys.modules, "hibari", SimpleNamespace(g2p=engine))
    monkeypatch.setitem(sys.modules, "hibari.g2p", engine)
    (tmp_path / "m.jsonl").write_text('{"text": "by Again --"}\n{"text": "by"}\n')
    monkeypatch.setattr(sys, "argv", ["lexicon.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "lexicon.txt")])
    recipe["main"]()
    assert (tmp_path / "lexicon.txt").read_text() == "again \u0259 \u0261 \u025b n\nby b I\n"
    assert read_lexicon(tmp_path / "lexicon.txt").words.keys() == {"again", "by"}


@pytest.mark.parametrize(
    ("content", "reason"), [(b"the DH AH\ncat\n", "line 2: 'cat' has no phonemes"), (b"\n \n", "holds no word")]
)
def test_a_wrong_lexicon(content, reason, tmp_path):
    (tmp_path / "lexicon.txt").write_bytes(content)
    with pytest.raises(ManifestError, match=reason):
        read_lexicon(tmp_path / "lexicon.txt")


def test_a_lexicon_that_is_no_text(tmp_path):
    (tmp_path / "lexicon.txt").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "lexicon.txt", tmp_path / "none.txt", tmp_path):
        with pytest.raises(StorageError, match=f"^{path}: cannot be read as text"):
            read_lexicon(path)


def test_words_that_a_lexicon_lacks_are_named(corpus, config, tmp_path, capsys):
    path, word = tmp_path / "lexicon.txt", corpus[0].text.split()[0]
    path.write_text(f"{word} A\n", encoding="utf-8")
    assert _lexicon(path, [corpus], config).words == {word: (0,)}
    total = len({word for row in corpus for word in row.text.split()})
    assert f"lacks {total - 1} of {total} words (" in " ".join(capsys.readouterr().err.split())
    path.write_text("other A\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=rf"has none of the {total} words of the transcripts"):
        _lexicon(path, [corpus], config)
    assert _lexicon(path, [[replace(corpus[0], text=None)]], config).words == {"other": (0,)}
    plain = replace(config, train_dataset=replace(config.train_dataset, normalize_transcripts=False))
    _lexicon(path, [[replace(corpus[0], text="Other other")]], plain)
    assert "lacks 1 of 2 words (Other)" in " ".join(capsys.readouterr().err.split())


def test_only_utterances_that_are_known_whole_and_fit_have_phonemes():
    lexicon = Lexicon(("p", "q"), {"a": (0,), "bb": (1, 1), "c": (0, 1)})
    spoken = phoneme_targets(lexicon, ["a bb", "a d", "", "c a", "bb", "c"], [5, 9, 9, 3, 2, 2])
    assert spoken.rows.tolist() == [0, 3, 5]  # "bb" needs a third frame, between its equal phonemes
    assert spoken.targets.tolist() == [0, 1, 1, 0, 1, 0, 0, 1]
    assert spoken.target_lens.tolist() == [3, 3, 2]


def tones(corpus, but=()) -> Lexicon:
    """Each letter a phoneme; words of the corpus except `but`."""
    words = {word for row in corpus for word in row.text.split()} - set(but)
    return Lexicon(tuple("abcd"), {word: tuple("abcd".index(letter) for letter in word) for word in words})


def test_the_loss_of_phonemes_is_that_of_each_utterance_alone(cache, config, corpus):
    """The sum over utterances, a phoneme; one with an unknown word counts for nothing."""
    unknown = corpus[2].text.split()[0]
    lexicon = tones(corpus, but=[unknown])
    batch = make_batch(cache, np.arange(6), config, np.random.default_rng(0), noise=0.0)
    torch.manual_seed(0)
    frames = [config.output_length(int(length)) for length in batch.lens]
    log_probs = torch.randn(6, max(frames), 5).log_softmax(2)
    found = _phoneme_loss(log_probs, torch.tensor(frames), batch, lexicon, config)
    total = count = 0.0
    for row, length, utterance in zip(log_probs, frames, corpus, strict=False):
        if unknown not in utterance.text.split():
            wanted = torch.tensor(["abcd".index(letter) for letter in utterance.text.replace(" ", "")])
            loss = torch.nn.functional.ctc_loss(
                row[:length, None], wanted[None], torch.tensor([length]), torch.tensor([len(wanted)]), 4, "sum"
            )
            total, count = total + float(loss), count + len(wanted)
    assert float(found) == pytest.approx(total / count, rel=1e-5)
    nothing = _phoneme_loss(log_probs.requires_grad_(), torch.tensor(frames), batch, tones([]), config)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert not log_probs.grad.any()


def test_the_head_reads_a_block_part_of_the_way_up(config):
    lexicon = Lexicon(("p", "q"), {"a": (0, 1)})
    assert PhonemeHead(config, lexicon).block == 0
    mini = replace(config, blocks=config.blocks[:1] * 8)
    assert PhonemeHead(mini, lexicon).block == 4


def test_phonemes_are_learnt_resumed_exactly_and_leave_no_trace_in_the_network(cache, config, corpus, tmp_path):
    lexicon, options = tones(corpus), replace(OPTIONS, steps=60, noise=0.0, lr=3e-3)
    whole = train(config, cache, tmp_path / "whole", options, lexicon=lexicon)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["phoneme_loss"] < rows[0]["phoneme_loss"] / 1.2

    def interrupt(_checkpoint):
        raise KeyboardInterrupt

    every_step = replace(options, save_minutes=0.0, validate_steps=30)
    with pytest.raises(KeyboardInterrupt):
        train(config, cache, tmp_path / "killed", every_step, lexicon=lexicon, validate=interrupt)
    for other in (None, Lexicon(tuple("abce"), lexicon.words)):
        with pytest.raises(ModelError, match="other phonemes"):
            train(config, cache, tmp_path / "killed", options, lexicon=other)
    resumed = train(config, cache, tmp_path / "killed", options, lexicon=lexicon)
    assert equal_states(resumed.model.state_dict(), whole.model.state_dict())
    assert equal_states(resumed.phonemes.state_dict(), whole.phonemes.state_dict())
    assert whole.model.state_dict().keys() == Jasper(config).state_dict().keys()


# --- consistency ----------------------------------------------------------------------------------------------


def test_consistency_is_the_divergence_of_the_views_both_ways():
    """Against plain numpy, frame by frame; what lies beyond an utterance's end counts for nothing."""
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(4, 7, 3))
    log_probs = scores - np.log(np.exp(scores).sum(2, keepdims=True))
    lens = [7, 4, 7, 4]
    wanted = 0.0
    for one, two in ((0, 2), (1, 3)):
        for p, q in zip(log_probs[one, : lens[one]], log_probs[two, : lens[two]], strict=True):
            wanted += float(np.exp(p) @ (p - q) + np.exp(q) @ (q - p))
    found = _consistency_loss(torch.from_numpy(log_probs), torch.tensor(lens), 10)
    assert float(found) == pytest.approx(wanted / 10, rel=1e-9)
    alike = torch.from_numpy(log_probs[[0, 1, 0, 1]])
    assert float(_consistency_loss(alike, torch.tensor(lens), 10)) == 0


def test_each_view_moves_towards_the_other_as_it_stands():
    """The gradient by the scores of a frame is p - q, the other view taken as a fixed target."""
    scores = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    _consistency_loss(scores.log_softmax(2), torch.tensor([1, 1]), 1).backward()
    p = scores.detach().softmax(2)
    torch.testing.assert_close(scores.grad, p - p.flip(0))


def test_consistency_draws_the_views_together(cache, config, tmp_path):
    """From one start and through the same batches: with its loss, views of an utterance end nearer to one another."""
    options = replace(OPTIONS, steps=60, noise=1.0, lr=3e-3)
    apart = []
    for weight in (1e-6, 1.0):
        train(config, cache, tmp_path / str(weight), replace(options, consistency=weight))
        rows = [json.loads(line) for line in (tmp_path / str(weight) / "log.jsonl").read_text().splitlines()]
        apart.append(rows[-1]["consistency_loss"])
    assert apart[1] < apart[0] / 2


# --- optimisation ---------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_ends_at_one_percent():
    for schedule in ("cosine", "poly"):
        options = TrainOptions(steps=1000, warmup=100, lr=1.0, schedule=schedule)
        rates = [learning_rate(step, options) for step in range(1001)]
        assert rates[0] == pytest.approx(0.01)
        assert max(rates) == pytest.approx(1.0)
        assert rates[100] == pytest.approx(1.0)
        assert rates[1000] == pytest.approx(0.01)
        assert all(a >= b for a, b in pairwise(rates[100:]))


def test_novograd_matches_the_paper_in_plain_numpy():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=5), rng.normal(size=(4, 5))
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = NovoGrad([parameter], lr=0.1, betas=(0.95, 0.25), weight_decay=0.01)
    weight, second, moment = start.copy(), 0.0, np.zeros(5)
    for index, gradient in enumerate(gradients):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        norm = (gradient**2).sum()
        second = norm if index == 0 else 0.25 * second + 0.75 * norm
        step = gradient / (math.sqrt(second) + 1e-8) + 0.01 * weight
        moment = step if index == 0 else 0.95 * moment + step
        weight = weight - 0.1 * moment
    np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-12)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalized_keeps_singular_vectors_and_levels_values(shape, bf16):
    matrix = torch.tensor(np.random.default_rng(1).normal(size=shape), dtype=torch.float32)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    levelled = left.T @ orthogonalized(matrix, bf16) @ right.T
    diagonal = levelled.diagonal()
    assert values.max() / values.min() > 2.5  # there was something to level
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.25
    assert (levelled - torch.diag(diagonal)).abs().max() < (0.02 if bf16 else 1e-4)
    assert torch.get_float32_matmul_precision() == "highest"  # as it was before


def test_muon_takes_the_documented_steps():
    """A matrix moves by its orthogonalised Nesterov momentum at AdamW's scale; the decoder's group by Adam."""
    rng = np.random.default_rng(2)
    weight, vector = (torch.nn.Parameter(torch.tensor(rng.normal(size=size))) for size in [(4, 6, 3), (5,)])
    start = weight.detach().clone(), vector.detach().clone()
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [vector], "orthogonal": False}]
    optimizer = Muon(groups, lr=0.01)
    weight.grad, vector.grad = (torch.tensor(rng.normal(size=p.shape)) for p in (weight, vector))
    optimizer.step()
    nesterov = (0.05 + 0.95 * 0.05) * weight.grad
    update = 0.2 * math.sqrt(18) * orthogonalized(nesterov.flatten(1)).view(4, 6, 3)
    expected = start[0] * (1 - 0.01 * 0.1) - 0.01 * update
    np.testing.assert_allclose(weight.detach().numpy(), expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(vector.detach().numpy(), (start[1] - 0.01 * vector.grad.sign()).numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"optimizer": "sgd"},
        {"schedule": "step"},
        {"steps": 0},
        {"lr": 0.0},
        {"batch_seconds": -1.0},
        {"average_steps": -1},
        {"consistency": -0.1},
    ],
)
def test_wrong_options_are_refused(bad):
    with pytest.raises(UsageError):
        TrainOptions(**bad)


# --- the loop -------------------------------------------------------------------------------------------------


def equal_states(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("consistency", [0.0, 0.2])
def test_a_resumed_run_equals_an_uninterrupted_one(cache, config, tmp_path, consistency):
    options = replace(OPTIONS, consistency=consistency)
    whole = train(config, cache, tmp_path / "whole", options)

    def interrupt(checkpoint):
        if torch.load(checkpoint, weights_only=True)["step"] == 3:
            raise KeyboardInterrupt
        return 100.0

    every_step = replace(options, save_minutes=0.0, validate_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, cache, tmp_path / "killed", every_step, validate=interrupt)
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == 2
    resumed = train(config, cache, tmp_path / "killed", options)
    assert resumed.step == whole.step == 6
    assert equal_states(resumed.model.state_dict(), whole.model.state_dict())
    assert equal_states(resumed.ema.state_dict(), whole.ema.state_dict())


def test_training_learns_tones_and_validates_through_the_transcriber(config, tmp_path):
    corpus = read_manifest(write_corpus(tmp_path / "train", 80, seed=1))
    dev = read_manifest(write_corpus(tmp_path / "dev", 10, seed=2))
    plain = replace(
        config,
        spec_augment=None,
        train_dataset=replace(config.train_dataset, trim_silence=False, speed_perturbation=None),
    )
    rows = []
    options = TrainOptions(
        steps=250, batch_seconds=8.0, warmup=10, lr=3e-3, workers=1, ema=0.95, validate_steps=50, seed=2
    )
    state, skipped = run_training(plain, [corpus], dev, tmp_path / "out", options, report=rows.append)
    losses = [row["loss"] for row in rows if "loss" in row]
    wers = [row["dev_wer"] for row in rows if "dev_wer" in row]
    assert not skipped
    assert losses[-1] < losses[0] / 3
    assert len(wers) == 5
    assert state.best_wer == min(wers) < 15
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert logged == rows
    # best.pt is a checkpoint like any other: the same WER comes out of it
    from jasper_asr import evaluate, load

    with load(tmp_path / "out" / "best.pt") as transcriber:
        assert evaluate.evaluate(transcriber, dev).wer == pytest.approx(state.best_wer)


def test_fine_tuning_starts_from_the_given_weights(cache, config, tmp_path, corpus):
    first = train(config, cache, tmp_path / "a", replace(OPTIONS, steps=3))
    frozen = replace(OPTIONS, steps=1, lr=1e-12, warmup=0, weight_decay=0.0)
    tuned, _ = run_training(config, [corpus], [], tmp_path / "b", frozen, init=tmp_path / "a" / "last.pt")
    for name, value in first.ema.named_parameters():
        torch.testing.assert_close(tuned.model.get_parameter(name), value, atol=1e-6, rtol=0)


def test_fine_tuning_starts_from_the_built_in_model():
    source = BUILTIN_MODELS["mini"]
    found = _initial_weights(Path("mini"), load_config(source.with_name("config.yaml")))
    wanted = load_checkpoint(source).weights
    assert wanted.keys() <= found.keys()
    assert all(np.array_equal(found[name].numpy(), values) for name, values in wanted.items())


def test_another_network_cannot_be_resumed(cache, config, tmp_path):
    train(config, cache, tmp_path, replace(OPTIONS, steps=1))
    wider = replace(config, blocks=(replace(config.blocks[0], filters=40), *config.blocks[1:]))
    with pytest.raises(ModelError, match=r"last\.pt: cannot resume"):
        train(wider, cache, tmp_path, OPTIONS)


def test_a_loss_that_is_not_finite_stops_the_run(cache, config, tmp_path):
    broken = Jasper(config).state_dict()
    broken["decoder.layers.0.bias"][:] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        train(config, cache, tmp_path, OPTIONS, init=broken)
    assert not (tmp_path / "last.pt").exists()


def test_bf16_autocast_takes_a_step(cache, config, tmp_path):
    state = train(config, cache, tmp_path, replace(OPTIONS, steps=2, bf16=True))
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert next(state.model.parameters()).dtype == torch.float32


def test_processes_meet_at_the_mean(cache, config, tmp_path, monkeypatch):
    """Weights, EMA, statistics of norms and moments of the optimizer; counters stay."""
    muon = replace(OPTIONS, steps=2, optimizer="muon")
    mine, other = (train(config, cache, tmp_path / str(seed), replace(muon, seed=seed)) for seed in (1, 2))

    def tensors(state):
        moments = [value for one in state.optimizer.state.values() for value in one.values()]
        values = [*state.model.state_dict().values(), *state.ema.state_dict().values(), *moments]
        return [value for value in values if torch.is_tensor(value) and value.is_floating_point()]

    expected = [(one + two) / 2 for one, two in zip(tensors(mine), tensors(other), strict=True)]
    assert not all(torch.equal(one, two) for one, two in zip(tensors(mine), expected, strict=True))
    others = iter(tensors(other))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.add_(next(others)))
    average_state(mine, world=2)
    assert next(others, None) is None
    assert all(torch.equal(one, two) for one, two in zip(tensors(mine), expected, strict=True))


def test_processes_meet_before_they_are_judged_or_saved(cache, config, tmp_path, monkeypatch):
    """Every 3 steps, and where validation every 2 steps or the end falls between."""
    met, judged, kept = [], [], []
    monkeypatch.setattr(loop, "join_processes", lambda: (0, 2))
    monkeypatch.setattr(loop, "average_state", lambda state, world: met.append(state.step))
    monkeypatch.setattr(loop, "save_state", lambda path, config, state: kept.append((path.name, state.step)))
    monkeypatch.setattr(loop.os, "replace", lambda *paths: None)
    apart = replace(OPTIONS, steps=7, average_steps=3, validate_steps=2, save_minutes=0.0)
    state = train(config, cache, tmp_path, apart, validate=lambda path: judged.append(kept[-1][1]) or 50.0)
    assert met == [2, 3, 4, 6, 7]
    assert judged == [2, 4, 6, 7]
    assert {step for _, step in kept} == set(met)
    assert state.audio_seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("average_steps", [0, 2])
def test_two_processes_train_one_model(tmp_path, config, average_steps):
    """torchrun on two CPUs: runs to the end and writes one checkpoint that loads."""
    import yaml

    manifest = write_corpus(tmp_path / "data", 24)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.raw))))
    (tmp_path / "lexicon.txt").write_text("".join(f"{a}{b} {a} {b}\n" for a in TONES for b in TONES))
    arguments = ["--config", tmp_path / "config.yaml", "--train", manifest, "--out", tmp_path / "out"]
    arguments += ["--lexicon", tmp_path / "lexicon.txt"]
    arguments += ["--steps", "4", "--batch-seconds", "4", "--threads", "1", "--average-steps", average_steps]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "jasper_asr.cli", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert saved["step"] == 4
