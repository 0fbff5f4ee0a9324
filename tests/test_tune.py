"""Tuning of the beam search's weights, and hotwords on the command line; clips and language model are the shipped."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import jasper_asr
from helpers_audio import nemo_manifest, run
from jasper_asr import tune
from jasper_asr.beam import Trial, beam_search
from jasper_asr.errors import ManifestError
from jasper_asr.lm import NgramModel, estimate
from jasper_asr.transcribe import BeamOptions, load
from jasper_asr.wer import EditCounts, count_word_edits

MINI = Path(jasper_asr.__file__).parent / "models" / "mini"
GRID = ((0.0, 0.0), (0.5, 1.0), (2.0, 0.0))
TEXTS = {
    "af_nova_2.opus": "it is only four weeks to morrow since i left mansfield",
    "am_echo_1.opus": "for everyone will be salted with fire and every sacrifice will be seasoned with salt",
}

ROWS = [{"audio_filepath": name, "duration": 5.0, "text": text} for name, text in TEXTS.items()]
GONE = {"audio_filepath": "none.wav", "duration": 5.0, "text": "gone"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    for name in TEXTS:
        shutil.copy(MINI / "clips" / name, folder / name)
    return nemo_manifest(folder / "dev.jsonl", *ROWS)


@pytest.fixture(scope="module")
def lm():
    return NgramModel.load(MINI / "words.lm")


# the search


class Valley:
    """In place of beam search: a WER that is lowest at (1.125, 2.25)."""

    def __init__(self, *_, **options):
        weight, bonus = options["lm_weight"], options["word_bonus"]
        self.wrong = round(40 * abs(weight - 1.125) + 10 * abs(bonus - 2.25))

    def __call__(self, rows, length):
        return [SimpleNamespace(text=" ".join(["x"] * self.wrong + ["w"] * (100 - self.wrong)))]


def test_search_goes_down_the_valley(monkeypatch):
    monkeypatch.setattr("jasper_asr.beam.BeamSearch", Valley)
    heard = tune.Heard((np.zeros((1, 29), np.float32),), (" ".join(["w"] * 100),), ())
    trials = list(tune.search(heard, "ab", None))
    pairs = [(trial.lm_weight, trial.word_bonus) for trial in trials]
    assert pairs[:25] == [(weight / 2, bonus) for weight in range(5) for bonus in range(5)]
    assert len(set(pairs)) == len(pairs) <= tune.MOST_TRIALS
    assert tune.best(trials[:25]) == Trial(1.0, 2.0, 0.08)
    assert tune.best(trials) == Trial(1.125, 2.25, 0.0)


def test_no_pair_has_a_negative_weight(monkeypatch):
    monkeypatch.setattr("jasper_asr.tune.tune", lambda *args, **_: (Trial(*p, sum(p)) for p in args[4]))
    heard = tune.Heard((), (), ())
    trials = list(tune.search(heard, "ab", None))
    assert min(trial.lm_weight for trial in trials) == 0
    assert tune.best(trials).word_bonus < 0  # that one may be


def test_of_equals_the_first():
    assert tune.best([Trial(1, 1, 0.5), Trial(2, 2, 0.25), Trial(3, 3, 0.25)]) == Trial(2, 2, 0.25)


def test_trials_are_what_evaluation_would_find(manifest, lm, monkeypatch):
    monkeypatch.setattr(tune, "COARSE", GRID)
    monkeypatch.setattr(tune, "_STEPS", ())
    from jasper_asr.data.manifest import read_manifest

    rows = read_manifest(manifest)
    steps = []
    with load("mini", greedy=True, threads=1) as transcriber:
        heard = tune.hear(transcriber, rows, progress=steps.append)
        labels = transcriber.config.labels
    assert steps == [1, 1]
    assert heard.references == tuple(TEXTS.values())
    trials = list(tune.search(heard, labels, lm, beam_width=4))
    for trial, (weight, bonus) in zip(trials, GRID, strict=True):
        beam = BeamOptions(lm="mini", width=4, lm_weight=weight, word_bonus=bonus)
        counts = EditCounts(0, 0, 0, 0)
        with load("mini", beam=beam, threads=1) as transcriber:
            for row in rows:
                counts += count_word_edits(row.text, transcriber.transcribe(row.audio_path).text)
        assert (trial.lm_weight, trial.word_bonus, trial.wer) == (weight, bonus, counts.rate)
    assert len({trial.wer for trial in trials}) > 1


# the command


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(tune, "COARSE", GRID)
    monkeypatch.setattr(tune, "_STEPS", ())


TUNE = ("tune-lm", "--threads", "1", "--beam-width", "4")


def test_the_table_and_the_best(manifest, small_grid):
    code, out, err = run(*TUNE, manifest)
    assert (code, err) == (0, "")
    head, *rows, blank, best = out.splitlines()
    assert head.split() == ["lm_weight", "word_bonus", "WER", "%"]
    assert [tuple(map(float, row.split()[:2])) for row in rows] == list(GRID)
    lowest = min((row.split() for row in rows), key=lambda row: float(row[2]))
    weight, bonus = float(lowest[0]), float(lowest[1])
    assert blank == ""
    assert best == f"best: --lm-weight {weight:g} --word-bonus {bonus:g}, WER {lowest[2]} %"


def test_unknown_words_cost_what_is_asked(manifest, small_grid, tmp_path):
    """A language model that lacks most words: what an unknown one costs decides what is heard."""
    estimate(["the the a", "a the"], 2).save(tmp_path / "few.lm")
    argv = (*TUNE, manifest, "--lm", str(tmp_path / "few.lm"), "--format", "json", "--unknown-penalty")
    free, dear = (json.loads(run(*argv, penalty)[1])["trials"] for penalty in ("0", "200"))
    assert [row["wer"] for row in free] != [row["wer"] for row in dear]
    assert min(row["wer"] for row in free) < min(row["wer"] for row in dear)


def test_json(manifest, small_grid):
    code, out, _ = run(*TUNE, manifest, "--lm", "mini", "--format", "json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["lm_weight", "word_bonus", "wer", "utterances", "failed", "trials"]
    assert (found["utterances"], found["failed"]) == (2, 0)
    assert [(row["lm_weight"], row["word_bonus"]) for row in found["trials"]] == list(GRID)
    assert found["wer"] == min(row["wer"] for row in found["trials"])


def test_what_cannot_be_read_is_listed_and_left_out(manifest, small_grid, tmp_path):
    for name in TEXTS:
        shutil.copy(manifest.parent / name, tmp_path / name)
    nemo_manifest(tmp_path / "dev.jsonl", GONE, *ROWS)
    code, out, err = run(*TUNE, tmp_path / "dev.jsonl", "--format", "json")
    assert code == 1
    assert err.startswith(f"jasper: error: {tmp_path}/none.wav: ")
    assert (json.loads(out)["utterances"], json.loads(out)["failed"]) == (2, 1)
    nemo_manifest(tmp_path / "dev.jsonl", GONE)
    code, out, err = run(*TUNE, tmp_path / "dev.jsonl")
    assert (code, out) == (3, "")
    assert err.startswith(f"jasper: error: no utterance with words can be read ({tmp_path}/none.wav: ")
    assert err.endswith("; give a manifest of speech with transcripts\n")
    assert err.count("\n") == 1


def test_nothing_heard_without_words(manifest):
    transcriber = SimpleNamespace(
        listen=lambda clip: np.zeros((1, 29), np.float32),
        config=SimpleNamespace(dataset=SimpleNamespace(normalize_transcripts=False), labels="ab"),
    )
    row = SimpleNamespace(text=" ", audio_path="a.wav", part=(0.0, None), source="m:1")
    with pytest.raises(ManifestError, match=r"^no utterance with words can be read; give a manifest of speech"):
        tune.hear(transcriber, [row])


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--lm-weight", "1"], 2, "--lm-weight does not go with tune-lm; leave it out"),
        (["--word-bonus", "1"], 2, "--word-bonus does not go with tune-lm; leave it out"),
        (["--hotword", "a=1"], 2, "--hotword does not go with tune-lm; leave it out"),
        (["--greedy"], 2, "--greedy does not go with tune-lm; leave it out"),
        (["--lm", "none"], 2, "tune-lm needs --lm, an n-gram model to weigh"),
        (["--model", "other.onnx"], 2, "tune-lm needs --lm, an n-gram model to weigh"),
        (["--lm", "none.lm"], 5, "none.lm: cannot be read (no such file or directory); check the path"),
    ],
)
def test_wrong_use(manifest, argv, code, message):
    assert run("tune-lm", manifest, *argv) == (code, "", f"jasper: error: {message}\n")


# hotwords


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["york"], "--hotword 'york': give words and a number, as in 'new york=3'"),
        (["york=much"], "--hotword 'york=much': give words and a number, as in 'new york=3'"),
        (["=3"], "hotword '': must be a word, or words with single spaces between them"),
        (["York=3"], "hotword 'York': the model does not write 'Y'; spell it in its letters"),
        (["york=nan"], "hotword 'york': its weight nan must be a number"),
    ],
)
def test_wrong_hotwords(manifest, argv, message):
    clip = manifest.parent / "af_nova_2.opus"
    assert run("transcribe", clip, "--hotword", *argv) == (2, "", f"jasper: error: {message}\n")


def test_hotwords_reach_the_search(manifest):
    clip = manifest.parent / "af_nova_2.opus"
    hotwords = {"since": 4.0, "four weeks": 3.5}
    with load("mini", greedy=True, threads=1) as transcriber:
        rows, labels = transcriber.listen(clip), transcriber.config.labels
    heard = set()
    for options in ([], ["--lm", "none"]):
        lm = None if options else NgramModel.load(MINI / "words.lm")
        plain, hot = (
            beam_search(rows, len(rows), labels, lm=lm, beam_width=8, hotwords=given)[0].text
            for given in ({}, hotwords)
        )
        argv = ["--hotword", "since=4", "--hotword", "four weeks=3.5", "--beam-width", "8", "--threads", "1"]
        assert run("transcribe", clip, *argv, *options) == (0, f"{hot}\n", "")
        heard.add(plain != hot)
    assert True in heard
