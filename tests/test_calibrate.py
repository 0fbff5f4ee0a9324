import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jasper_asr
from helpers_audio import run
from jasper_asr.align import Word
from jasper_asr.calibrate import Bin, calibration, expected_calibration_error, word_correctness
from jasper_asr.errors import UsageError


def test_by_hand():
    """Two bins. Below one half: mean 0.3, 1 of 2 right. Above: mean 0.8, 2 of 3 right."""
    confidences, correct = [0.2, 0.4, 0.7, 0.8, 0.9], [True, False, True, True, False]
    expected = (2 * abs(0.3 - 1 / 2) + 3 * abs(0.8 - 2 / 3)) / 5
    assert expected_calibration_error(confidences, correct, bins=2) == pytest.approx(expected) == pytest.approx(0.16)


@pytest.mark.parametrize(
    ("confidences", "correct", "error"),
    [
        ([], [], 0.0),
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 0.0], [False, True], 1.0),
        ([0.75] * 4, [True, True, True, False], 0.0),
        ([0.95] * 10, [True] * 5 + [False] * 5, 0.45),
    ],
)
def test_ends(confidences, correct, error):
    assert expected_calibration_error(confidences, correct) == pytest.approx(error)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60), st.integers(1, 20))
def test_equals_a_plain_loop(words, bins):
    total = 0.0
    for index in range(bins):
        part = [(c, y) for c, y in words if min(int(c * bins), bins - 1) == index]
        if part:
            total += len(part) * abs(np.mean([c for c, _ in part]) - np.mean([y for _, y in part]))
    error = expected_calibration_error([c for c, _ in words], [y for _, y in words], bins)
    assert error == pytest.approx(total / max(len(words), 1))
    assert 0 <= error <= 1


def test_true_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    confidences = rng.random(20_000)
    assert expected_calibration_error(confidences, rng.random(20_000) < confidences) < 0.02
    assert expected_calibration_error(confidences, rng.random(20_000) < confidences**3) > 0.2


@pytest.mark.parametrize(
    ("reference", "hypothesis", "correct"),
    [
        ("the cat sat", "the bat sat", [True, False, True]),
        ("the cat sat", "the sat", [True, True]),
        ("the cat", "the old cat", [True, False, True]),
        ("", "noise", [False]),
        ("silence", "", []),
    ],
)
def test_word_correctness(reference, hypothesis, correct):
    assert word_correctness(reference, hypothesis) == correct


def words(*pairs):
    return tuple(Word(text, index, index + 0.5, confidence) for index, (text, confidence) in enumerate(pairs))


def test_report():
    items = [("a b", words(("a", 0.9), ("x", 0.3))), ("c d", words(("d", 1.0))), ("e", ())]
    report = calibration(items, bins=2)
    assert report.words == 3
    assert report.bins == (Bin(0.0, 0.5, 1, 0.3, 0.0), Bin(0.5, 1.0, 2, 0.95, 1.0))
    assert report.ece == pytest.approx((0.3 + 2 * 0.05) / 3)


@pytest.mark.parametrize(
    ("confidences", "correct", "bins"),
    [([1.2], [True], 10), ([-0.1], [True], 10), ([np.nan], [True], 10), ([0.5], [], 10), ([0.5], [True], 0)],
)
def test_what_is_no_confidence(confidences, correct, bins):
    message = r"^calibration: needs a bin or more, and for each word a confidence in \[0, 1\] and a verdict$"
    with pytest.raises(UsageError, match=message):
        expected_calibration_error(confidences, correct, bins)


def test_evaluate_reports_calibration(tmp_path):
    """The report's bins hold every recognised word, and its error is that of the bins."""
    manifest = Path(jasper_asr.__file__).parent / "models" / "mini" / "clips" / "manifest.jsonl"
    code, _, err = run("evaluate", manifest, "--calibration", "--report", tmp_path / "r.json", "--threads", 1)
    assert code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    found = report["calibration"]
    words = sum(len(item["hypothesis"].split()) for item in report["items"])
    assert found["words"] == sum(part["words"] for part in found["bins"]) == words
    gaps = [part["words"] * abs(part["confidence"] - part["accuracy"]) for part in found["bins"]]
    assert found["ece"] == pytest.approx(sum(gaps) / words)
    right = sum(part["words"] * part["accuracy"] for part in found["bins"])
    assert right == pytest.approx(report["words"] - report["substitutions"] - report["deletions"])
    assert f"expected calibration error {found['ece']:.3f} over {words} words" in err
    assert run("evaluate", manifest, "--threads", 1)[2].count("calibration") == 0
