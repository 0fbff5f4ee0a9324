import itertools
import math
from itertools import groupby
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jasper_asr import beam
from jasper_asr.beam import BeamSearch, Hypothesis, Trial, beam_search, tune
from jasper_asr.decode import greedy
from jasper_asr.errors import UsageError
from jasper_asr.lm import estimate
from jasper_asr.text import LABELS

FEW = (" ", "a", "b")
UNLIMITED = {"beam_width": 10**9, "token_min_logp": -math.inf, "beam_min_logp": -math.inf}
LM = estimate(["a b", "ab a", "a ab ba", "ba", "bb a a b", "a b a"], 3)
ENGLISH = estimate(["the cat sat", "the cat ran", "a cat sat on the mat", "cut the rope", "the kit"], 3)


def texts_by_enumeration(log_probs, labels):
    """Text -> log-probability, summed over every path of classes: CTC by its definition, spaces tidied."""
    totals = {}
    for path in itertools.product(range(len(labels) + 1), repeat=len(log_probs)):
        text = " ".join("".join(labels[k] for k, _ in groupby(path) if k != len(labels)).split())
        score = sum(row[k] for row, k in zip(log_probs.tolist(), path, strict=True))
        totals.setdefault(text, []).append(score)
    return {text: np.logaddexp.reduce(scores) for text, scores in totals.items()}


def word_scores(text, lm, lm_weight, word_bonus, unknown_penalty, hotwords):
    """What a text scores beyond its acoustic part, by the definition in the module's docstring."""
    words = text.split()
    total = 0.0
    for hotword, weight in hotwords.items():
        parts = hotword.split()
        total += weight * sum(words[i : i + len(parts)] == parts for i in range(len(words)))
    if lm:
        total += lm_weight * lm.score(words) + word_bonus * len(words)
        expected = " ".join(hotwords).split()
        total -= unknown_penalty * sum(word not in lm and word not in expected for word in words)
    return total


def random_log_probs(seed, frames, classes, spread=2.0):
    logits = np.random.default_rng(seed).normal(0, spread, (frames, classes))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def with_less_blank(log_probs, penalty):
    """By way of probabilities, where the search stays among logarithms."""
    probs = np.exp(log_probs)
    probs[:, -1] *= np.exp(-penalty)
    return np.log(probs / probs.sum(axis=1, keepdims=True))


def spell(path, labels=LABELS, best=-0.1, other=-9.0):
    """log_probs whose best path is `path`: `-` is the blank, letters are themselves."""
    ids = [len(labels) if letter == "-" else labels.index(letter) for letter in path]
    log_probs = np.full((len(ids), len(labels) + 1), other, np.float32)
    log_probs[np.arange(len(ids)), ids] = best
    return log_probs


@given(st.integers(0, 5), st.integers(0, 2**32 - 1), st.sampled_from([FEW, ("a", "b")]), st.floats(0.5, 4))
@settings(max_examples=60, deadline=None)
def test_unlimited_beam_equals_enumeration(frames, seed, labels, spread):
    log_probs = random_log_probs(seed, frames, len(labels) + 1, spread)
    expected = texts_by_enumeration(log_probs, labels)
    found = beam_search(log_probs, frames, labels, **UNLIMITED)
    assert {each.text for each in found} == set(expected)
    assert len(found) == len(expected)
    for each in found:
        assert each.acoustic == pytest.approx(expected[each.text], abs=1e-9)
        assert each.score == each.acoustic
    assert found[0].text == max(expected, key=expected.get)
    assert np.logaddexp.reduce([each.acoustic for each in found]) == pytest.approx(0, abs=1e-9)


@given(
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
    st.floats(0, 3),
    st.floats(-3, 5),
    st.floats(0, 6),
    st.floats(0, 2),
    st.dictionaries(
        st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=3).map(" ".join),
        st.floats(-2, 6),
        max_size=3,
    ),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_unlimited_beam_with_language_model_equals_enumeration(
    frames, seed, lm_weight, word_bonus, unknown_penalty, blank_penalty, hotwords, with_lm
):
    log_probs = random_log_probs(seed, frames, len(FEW) + 1)
    options = {"lm_weight": lm_weight, "word_bonus": word_bonus, "unknown_penalty": unknown_penalty}
    lm = LM if with_lm else None
    heard = with_less_blank(log_probs, blank_penalty) if lm else log_probs
    expected = {
        text: acoustic + word_scores(text, lm, hotwords=hotwords, **options)
        for text, acoustic in texts_by_enumeration(heard, FEW).items()
    }
    before = log_probs.copy()
    options["blank_penalty"] = blank_penalty
    found = beam_search(log_probs, frames, FEW, lm=lm, hotwords=hotwords, **options, **UNLIMITED)
    assert (log_probs == before).all()
    assert {each.text: pytest.approx(each.score, abs=1e-6) for each in found} == expected
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_limited_beam_never_claims_more_than_is_there(frames, seed, width):
    """Pruning loses alignments, so acoustic scores are lower bounds; the words' part is exact at any width."""
    log_probs = random_log_probs(seed, frames, len(FEW) + 1)
    options = {"lm_weight": 0.7, "word_bonus": 1.0, "unknown_penalty": 2.0}
    found = beam_search(log_probs, frames, FEW, lm=LM, beam_width=width, blank_penalty=0.5, **options)
    assert 1 <= len(found) <= width
    assert len({each.text for each in found}) == len(found)
    exact = texts_by_enumeration(with_less_blank(log_probs, 0.5), FEW) if frames <= 5 else {}
    for each in found:
        assert each.text == " ".join(each.text.split())
        words = word_scores(each.text, LM, hotwords={}, **options)
        assert each.score - each.acoustic == pytest.approx(words, abs=1e-5)
        assert each.acoustic <= exact.get(each.text, 0.0) + 1e-9


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("", ""),
        ("----", ""),
        ("hheel-lloo", "hello"),
        ("a-a-a", "aaa"),
        ("  a  - b  ", "a b"),
        (" - ", ""),
        ("it's--", "it's"),
    ],
)
def test_clear_paths_are_read_as_greedy_does(path, text):
    for width in (1, 64):
        found = beam_search(spell(path), len(path), LABELS, beam_width=width)
        assert found[0].text == text == greedy(spell(path), len(path), LABELS)


def test_alignments_add_up_where_greedy_takes_one():
    """Graves' example: blank is likelier in each frame, but three of the four paths read "a"."""
    log_probs = np.log([[0.4, 0.6], [0.4, 0.6]])
    assert greedy(log_probs, 2, ["a"]) == ""
    best = beam_search(log_probs, 2, ["a"])[0]
    assert best.text == "a"
    assert best.acoustic == pytest.approx(math.log(1 - 0.36))


def between(first, second, share):
    """Log-probs of two paths of equal length mixed frame by frame, `share` of it the first."""
    mixed = share * np.exp(spell(first)) + (1 - share) * np.exp(spell(second))
    return np.log(mixed / mixed.sum(axis=1, keepdims=True))


def test_the_language_model_decides_between_words_that_sound_alike():
    log_probs = between("the-kat-sat", "the-cat-sat".replace("-", " "), 0.5)
    log_probs[3] = spell(" ")[0]
    log_probs[7] = spell(" ")[0]
    assert beam_search(log_probs + 0.1 * spell("the kat sat"), 11, LABELS)[0].text == "the kat sat"
    assert beam_search(log_probs + 0.1 * spell("the kat sat"), 11, LABELS, lm=ENGLISH)[0].text == "the cat sat"


def test_hotwords_win_where_the_sound_nearly_allows_them():
    log_probs = between("the cut", "the kit", 0.5)
    log_probs[4:6] = between("cu", "ki", 0.6)

    def best(**options):
        return beam_search(log_probs, 7, LABELS, **options)[0].text

    assert best() == "the cut"
    assert best(hotwords={"kit": 2.0}) == "the kit"
    assert best(hotwords={"kit": 2.0, "cut": 2.0}) == "the cut"
    assert best(hotwords={"kits": 9.0}) == "the cut"  # the weight is for the whole word
    assert best(hotwords={"cit": 3.0}) == "the cit"
    assert best(hotwords={"cit": 9.0}, lm=ENGLISH) == "the cit"  # an unknown word
    assert best(hotwords={"the cit": 9.0}, lm=ENGLISH) == "the cit"
    assert best(hotwords={"cut": -3.0}) != "the cut"


def test_every_saying_of_a_hotword_counts():
    path = "ab ba ab"
    plain = beam_search(spell(path, FEW), 8, FEW)[0]
    hot = beam_search(spell(path, FEW), 8, FEW, hotwords={"ab": 1.5, "b": 7.0})[0]
    assert plain.text == hot.text == path
    assert hot.score - plain.score == pytest.approx(3.0)
    assert hot.acoustic == pytest.approx(plain.acoustic)


def test_phrases_count_where_all_their_words_stand_together():
    path = "a a b a a a b"
    plain = beam_search(spell(path, FEW), len(path), FEW)[0]
    for phrase, said in {"a b": 2, "a a": 3, "a a b": 2, "b a": 1, "a a a": 1, "b b": 0, "aa b": 0}.items():
        hot = beam_search(spell(path, FEW), len(path), FEW, hotwords={phrase: 1.5})[0]
        assert hot.text == path
        assert hot.score - plain.score == pytest.approx(1.5 * said)


def test_a_phrase_wins_where_the_sound_nearly_allows_it():
    log_probs = between("the cut sat", "the kit sat", 0.55)

    def best(**options):
        return beam_search(log_probs, 11, LABELS, **options)[0].text

    assert best() == "the cut sat"
    assert best(hotwords={"kit sat": 3.0}) == "the kit sat"
    assert best(hotwords={"the kit sat": 3.0}) == "the kit sat"
    assert best(hotwords={"kit on": 9.0}) == "the cut sat"
    assert best(hotwords={"the kit": 3.0, "kit sat": -3.0}) == "the cut sat"


def test_what_the_words_of_a_phrase_lend_it():
    follow = beam._Scorer(None, LABELS, 0.5, 1.5, 4.0, {"kit sat": 6.0, "the kit sat on": 8.0, "kit on": -9.0}).follow
    assert follow(("zoo", "the", "kit")) == (("the", "kit"), 4.0, 0.0)
    assert follow(("the", "kit", "sat")) == (("the", "kit", "sat"), 6.0, 6.0)
    assert follow(("cat", "kit")) == (("kit",), 3.0, 0.0)
    assert follow(("kit", "on")) == ((), 0.0, -9.0)
    assert follow(("kit", "zoo")) == ((), 0.0, 0.0)


def test_the_first_words_of_a_phrase_hold_their_place_in_the_beam(monkeypatch):
    """A beam of 2 would drop `kut`, were its weight only given once `sat` has been said."""
    log_probs = between("the cut sat", "the kut sat", 0.85)
    log_probs[8:9] = between("s", "z", 0.55)
    narrow = {"beam_width": 2, "hotwords": {"kut sat": 5.0}}
    assert beam_search(log_probs, 11, LABELS, **narrow)[0].text == "the kut sat"
    follow = beam._Scorer.follow
    monkeypatch.setattr(beam._Scorer, "follow", lambda *args: (follow(*args)[0], 0.0, follow(*args)[2]))
    assert beam_search(log_probs, 11, LABELS, **narrow)[0].text == "the cut sat"


@pytest.mark.parametrize("hotwords", [{}, {"cattle": 6.0, "cup": 9.0}])
def test_promise_of_a_prefix_is_that_of_the_best_word_that_begins_so(hotwords):
    scorer = beam._Scorer(ENGLISH, LABELS, 0.5, 1.5, 4.0, hotwords)
    for word in ("cat", "cut", "cup", "the", "zoo", "on", "cattle"):
        spelling = scorer.empty
        for end, letter in enumerate(word, start=1):
            spelling = scorer.spell(spelling, LABELS.index(letter))
            begun = word[:end]
            known = [w for w in ENGLISH.words if w.startswith(begun)]
            scores = [0.5 * ENGLISH.advance((), w)[1] + 1.5 for w in known]
            scores.append(0.5 * ENGLISH.advance((), "<unk>")[1] + 1.5 - 4.0)
            for hot, weight in hotwords.items():
                if hot.startswith(begun):
                    scores.append(scores[len(known)] + 4.0 + weight * end / len(hot))
            assert spelling.text == begun
            assert spelling.ahead == pytest.approx(max(scores))


def test_words_are_paid_for_while_they_are_spelled():
    """A beam of 2 keeps `the`: its letters are promised a likely word, those of `zhe` only an unknown one."""
    log_probs = between("zzz-hhh-eee", "ttt-hhh-eee", 0.8)
    assert beam_search(log_probs, 11, LABELS, beam_width=2)[0].text == "zhe"
    assert beam_search(log_probs, 11, LABELS, lm=ENGLISH, beam_width=2)[0].text == "the"


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
def test_frames_beyond_the_length_are_never_looked_at(garbage):
    log_probs = spell("ab-c" + "zzzz")
    before = beam_search(log_probs[:4], 4, LABELS)
    log_probs[4:] = garbage
    kept = log_probs.copy()
    assert beam_search(log_probs, 4, LABELS) == before
    assert np.array_equal(log_probs, kept, equal_nan=True)


def test_nothing_said():
    assert beam_search(np.zeros((0, 29)), 0, LABELS) == [Hypothesis("", 0.0, 0.0)]
    (silent,) = beam_search(np.zeros((0, 29)), 0, LABELS, lm=ENGLISH, lm_weight=0.5)
    assert silent == Hypothesis("", 0.5 * ENGLISH.score([]), 0.0)


def test_unlikely_labels_are_left_out_but_the_likeliest_is_always_tried():
    log_probs = np.array([[-6.0, -7.0, -6.5], [-7.0, -6.0, -8.0]])
    found = beam_search(log_probs, 2, ("a", "b"))
    assert found[0].text == "ab"
    assert "b" in {each.text for each in found}  # blank, b
    assert "ba" not in {each.text for each in found}
    assert "ba" in {each.text for each in beam_search(log_probs, 2, ("a", "b"), token_min_logp=-math.inf)}


@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.integers(1, 8), st.floats(0, 6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_letters_that_are_left_out_would_not_have_survived(frames, seed, width, word_bonus, hot):
    """Also where a bonus makes the letters of words welcome, and those of a hotword are worth more one by one."""
    log_probs = random_log_probs(seed, frames, len(FEW) + 1, spread=4.0)
    hotwords = {"bab": 5.0, "a b": 3.0} if hot else {}
    options = {"lm": LM, "beam_width": width, "word_bonus": word_bonus, "unknown_penalty": 2.0, "hotwords": hotwords}
    found = beam_search(log_probs, frames, FEW, **options)
    extend = beam._extend
    with mock.patch.object(beam, "_extend", lambda *args: extend(*args[:3], -math.inf, args[4])):
        expected = beam_search(log_probs, frames, FEW, **options)
    assert [each.text for each in found] == [each.text for each in expected]
    assert [each.score for each in found] == pytest.approx([each.score for each in expected])


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_frames_of_blanks_change_no_prefix(seed, quiet):
    """What such a frame does is what any frame does, and its cheaper way gives the same texts as the long one."""
    loud = random_log_probs(seed, 6, len(FEW) + 1)
    blank = np.log(np.array([[0.003, 0.002, 0.001, 0.994]]))
    log_probs = np.concatenate([loud[:3], np.repeat(blank, quiet, axis=0), loud[3:]])
    options = {"lm": LM, "beam_width": 10**9, "beam_min_logp": -math.inf, "token_min_logp": -5.0, "blank_penalty": 0.0}
    scorer = BeamSearch(FEW, **options)._scorer
    prefixes, offset = [scorer.root()], 0.0
    for number, frame in enumerate(beam._frames(log_probs, -5.0)):
        assert not (frame.choices and 3 <= number < 3 + quiet)
        ranked = beam._extend(prefixes, number, frame, -math.inf, scorer)
        prefixes, scale, _ = beam._prune(ranked, 10**9, -math.inf, scorer)
        offset += frame.offset + scale
    expected = beam._finish(prefixes, offset, scorer)
    found = beam_search(log_probs, len(log_probs), FEW, **options)
    assert {each.text: pytest.approx(each.score, abs=1e-9) for each in found} == {
        each.text: each.score for each in expected
    }


def test_long_audio_neither_underflows_nor_keeps_what_is_over(monkeypatch):
    """3000 frames at e^-50 each are far below what a float holds; the tree must not grow by what the beam has left."""
    rng = np.random.default_rng(0)
    path = "".join(rng.choice(list("-- abt"), 3000))
    log_probs = spell(path, best=-50.0, other=-53.0)
    roots = []
    forget = beam._forget_dead_ends
    monkeypatch.setattr(beam, "_forget_dead_ends", lambda kept: (forget(kept), roots.append(kept[0])))
    options = {
        "lm": LM, "beam_width": 4, "token_min_logp": -math.inf, "unknown_penalty": 0.0, "blank_penalty": 0.0,
    }  # fmt: skip
    found = beam_search(log_probs, 3000, LABELS, **options)
    assert len(roots) == 3000 // beam._TIDY_EVERY
    assert found[0].acoustic == pytest.approx(-50.0 * 3000, rel=0.01)
    monkeypatch.setattr(beam, "_TIDY_EVERY", 10**9)
    assert beam_search(log_probs, 3000, LABELS, **options) == found


def test_a_search_used_again_answers_as_a_new_one(monkeypatch):
    """Also when it has forgotten the spellings that it had gathered."""
    monkeypatch.setattr(beam, "_MOST_SPELLINGS", 20)
    search = BeamSearch(LABELS, lm=ENGLISH, hotwords={"rope": 2.0}, token_min_logp=-9.0)
    sizes = []
    for seed in range(6):
        log_probs = random_log_probs(seed, 12, 29)
        fresh = beam_search(log_probs, 12, LABELS, lm=ENGLISH, hotwords={"rope": 2.0}, token_min_logp=-9.0)
        assert search(log_probs, 12) == fresh
        sizes.append(search._scorer.spellings)
    assert min(sizes) > 20
    assert sizes != sorted(sizes) or max(sizes) < 2 * min(sizes)


def test_dead_ends_are_forgotten():
    scorer = beam._Scorer(None, FEW, 0, 0, 0, {})
    root = scorer.root()
    a, b = scorer.extend(root, 1), scorer.extend(root, 2)
    ab, ba = scorer.extend(a, 2), scorer.extend(b, 1)
    beam._forget_dead_ends([ab, a])
    assert root.children == {1: a}
    assert a.children == {2: ab}
    assert ab.children == {}
    assert ba.parent is b


SPACED = "must be a word, or words with single spaces between them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, "beam width 0: must be at least 1"),
        ({"hotwords": {"new  york": 2.0}}, "hotword 'new  york': " + SPACED),
        ({"hotwords": {" york": 2.0}}, "hotword ' york': " + SPACED),
        ({"hotwords": {"": 2.0}}, "hotword '': " + SPACED),
        (
            {"hotwords": {"York": 2.0}},
            "hotword 'York': the model does not write 'Y'; spell it in its letters",
        ),
        ({"hotwords": {"york": math.nan}}, "hotword 'york': its weight nan must be a number"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError) as error:
        beam_search(spell("a"), 1, LABELS, **options)
    assert str(error.value) == message


def test_trials_of_tuning():
    """Too little weight leaves the unknown kad, too much makes a cat of zip."""
    rows = [between("the kad", "the cat", 0.985), between("a zip", "a cat", 0.99)]
    references = ["the cat", "a zip"]
    grid = [(0.0, 0.0), (1.0, 1.0), (1.2, 1.0), (6.0, 1.0)]
    options = {"lm": ENGLISH, "unknown_penalty": 6.0, "token_min_logp": -5.0}  # the letters of cat have 1 and 1.5 %
    texts = [
        [beam_search(r, len(r), LABELS, lm_weight=weight, word_bonus=bonus, **options)[0].text for r in rows]
        for weight, bonus in grid
    ]
    assert texts == [["the kad", "a zip"], references, references, ["the cat", "a cat"]]
    trials = list(tune(rows, references, LABELS, grid=grid, **options))
    assert trials == [Trial(0.0, 0.0, 0.25), Trial(1.0, 1.0, 0.0), Trial(1.2, 1.0, 0.0), Trial(6.0, 1.0, 0.25)]
