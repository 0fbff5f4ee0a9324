from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jasper_asr.decode import greedy

LABELS = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]
BLANK = len(LABELS)


def brute_force(log_probs, length, labels):
    """CTC's collapse by its definition: the best class of each frame, groups to one, blanks out, spaces tidied."""
    path = [max(range(len(frame)), key=lambda k: frame[k]) for frame in log_probs[:length].tolist()]
    text = "".join(labels[k] for k, _ in groupby(path) if k != len(labels))
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


def spell(path, classes=BLANK + 1):
    """log_probs [T', classes] whose best path is `path`: `-` is the blank, letters are themselves."""
    ids = [BLANK if letter == "-" else LABELS.index(letter) for letter in path]
    log_probs = np.full((len(ids), classes), -9.0, np.float32)
    log_probs[np.arange(len(ids)), ids] = -0.1
    return log_probs


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("", ""),
        ("-", ""),
        ("------", ""),
        ("a", "a"),
        ("aaa", "a"),
        ("hheel-lloo", "hello"),  # a double letter needs a blank between
        ("helllo", "helo"),
        ("a-a-a", "aaa"),
        ("--c-at--", "cat"),
        ("  a b  ", "a b"),
        (" - -a", "a"),
        ("a- - -b", "a b"),
        ("   ", ""),
        (" - ", ""),
        ("it's", "it's"),
        ("-a--b- -c-", "ab c"),
    ],
)
def test_paths(path, text):
    assert greedy(spell(path), len(path), LABELS) == text


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 2**32 - 1), st.floats(0, 8))
def test_equals_the_definition_on_random_log_probs(frames, length, seed, blankness):
    """`blankness` makes the blank more likely: from never to nearly always."""
    rng = np.random.default_rng(seed)
    log_probs = rng.normal(size=(frames, BLANK + 1)).astype(np.float32)
    log_probs[:, [0, BLANK]] += blankness
    assert greedy(log_probs, min(length, frames), LABELS) == brute_force(log_probs, length, LABELS)


@given(st.text(st.sampled_from(" ab'-"), max_size=40))
def test_equals_the_definition_on_paths_with_long_runs(path):
    assert greedy(spell(path), len(path), LABELS) == brute_force(spell(path), len(path), LABELS)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
def test_frames_beyond_the_length_are_never_looked_at(garbage):
    log_probs = spell("ab-c" + "zzzz")
    log_probs[4:] = garbage
    log_probs[4:, 5] = 9.0
    assert greedy(log_probs, 4, LABELS) == "abc"
    assert greedy(log_probs, 0, LABELS) == ""
    assert greedy(spell("ab-c" + "zzzz"), 8, LABELS) == "abcz"


def test_other_labels():
    log_probs = np.array([[0, -1, -2], [-1, 0, -2], [-2, -1, 0], [-1, 0, -2]], np.float32)
    assert greedy(log_probs, 4, ["é", "ß"]) == "éßß"


def test_the_argument_is_left_alone():
    log_probs = spell("ab-c")
    before = log_probs.copy()
    greedy(log_probs, 3, LABELS)
    assert np.array_equal(log_probs, before)
