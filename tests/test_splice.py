"""recipes/mini/splice.py: what is cut is all there, and what is joined says what its text says."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import jasper_asr
from jasper_asr.audio import load_audio

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / "src" / "jasper_asr" / "models" / "mini" / "clips"


@pytest.fixture(scope="module")
def splice():
    spec = importlib.util.spec_from_file_location("splice", ROOT / "recipes" / "mini" / "splice.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["splice"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in (CLIPS / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pieces(splice, rows):
    with jasper_asr.load("mini", greedy=True, threads=1) as transcriber:
        return [
            splice.cut(CLIPS / row["audio_filepath"], row["text"], index, transcriber)
            for index, row in enumerate(rows[:6])
        ]


def test_the_pieces_of_an_utterance_are_all_of_it(rows, pieces):
    assert sum(len(one) for one in pieces) > 2 * len(pieces)
    for row, one in zip(rows, pieces, strict=False):
        samples = load_audio(CLIPS / row["audio_filepath"], sample_rate=16_000)
        np.testing.assert_array_equal(np.concatenate([piece.samples for piece in one]), samples)
        assert " ".join(piece.text for piece in one) == row["text"]


def test_cuts_are_quiet(splice, rows, pieces):
    for row, one in zip(rows, pieces, strict=False):
        level = splice.levels(load_audio(CLIPS / row["audio_filepath"], sample_rate=16_000))
        at = np.cumsum([len(piece.samples) for piece in one])[:-1] // splice.HOP
        assert (level[at] <= np.median(level) - splice.QUIETER).all()


def test_levels_of_a_sine(splice):
    sine = np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    np.testing.assert_allclose(splice.levels(sine)[5:-5], 10 * np.log10(0.5), atol=0.1)


def test_what_is_joined_comes_from_one_voice_and_repeats(splice, pieces, tmp_path):
    voices = {"a": [*pieces[0], *pieces[1]], "b": [*pieces[2], *pieces[3]], "alone": pieces[4]}
    for name in ("first", "second"):
        splice.write(voices, tmp_path / name, 60, np.random.default_rng(3))
    rows = [json.loads(line) for line in (tmp_path / "first" / "manifest.jsonl").read_text().splitlines()]
    assert sum(row["duration"] for row in rows) >= 60
    for row in rows:
        first, _ = soundfile.read(tmp_path / "first" / row["audio_filepath"])
        second, _ = soundfile.read(tmp_path / "second" / row["audio_filepath"])
        np.testing.assert_array_equal(first, second)
        assert len(first) / 16_000 == pytest.approx(row["duration"], abs=1e-3)
        assert len(first) <= splice.LONGEST * 16_000
        assert np.abs(first).max() > 0.01
        assert row["speaker"] in ("a", "b")
        said = " ".join(piece.text for piece in voices[row["speaker"]]).split()
        assert set(row["text"].split()) <= set(said)
