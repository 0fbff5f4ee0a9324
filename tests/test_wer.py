import functools
import json
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jasper_asr.wer import EditCounts, align_words, count_char_edits, count_edits, count_word_edits

unhurried = settings(deadline=None)  # the first example pays for imports, on a busy machine too
tokens = st.lists(st.sampled_from("abc"), max_size=7)
short = st.lists(st.sampled_from("abc"), max_size=5)
texts = st.text(st.sampled_from("ab \t\u3000"), max_size=24)


def brute_force(reference, hypothesis):
    """(hits, substitutions, deletions, insertions), from every alignment there is."""

    @functools.cache
    def alignments(i, j):
        if i == len(reference) and j == len(hypothesis):
            return {(0, 0, 0, 0)}
        found = set()
        if i < len(reference) and j < len(hypothesis):
            hit = reference[i] == hypothesis[j]
            found |= {(h + hit, s + (not hit), d, n) for h, s, d, n in alignments(i + 1, j + 1)}
        if i < len(reference):
            found |= {(h, s, d + 1, n) for h, s, d, n in alignments(i + 1, j)}
        if j < len(hypothesis):
            found |= {(h, s, d, n + 1) for h, s, d, n in alignments(i, j + 1)}
        return found

    best = min((s + d + n, -h) for h, s, d, n in alignments(0, 0))
    (counts,) = {c for c in alignments(0, 0) if (sum(c[1:]), -c[0]) == best}  # the split is unique
    return counts


def weighted_counts(reference, hypothesis):
    """Counts at sclite's weights; of equal costs it keeps the pair, then the insertion, then the deletion."""

    def cost(counts):
        _, substitutions, deletions, insertions = counts
        return 4 * substitutions + 3 * (deletions + insertions)

    def plus(counts, hit=0, substitution=0, deletion=0, insertion=0):
        h, s, d, n = counts
        return h + hit, s + substitution, d + deletion, n + insertion

    row = [(0, 0, 0, j) for j in range(len(hypothesis) + 1)]
    for i, word in enumerate(reference, start=1):
        above, row = row, [(0, 0, i, 0)]
        for j, other in enumerate(hypothesis, start=1):
            pair = plus(above[j - 1], hit=1) if word == other else plus(above[j - 1], substitution=1)
            row.append(min(pair, plus(row[-1], insertion=1), plus(above[j], deletion=1), key=cost))
    return EditCounts(*row[-1])


def counts_of(pairs):
    kinds = Counter(
        "deletion" if h is None else "insertion" if r is None else "hit" if r == h else "substitution" for r, h in pairs
    )
    return EditCounts(kinds["hit"], kinds["substitution"], kinds["deletion"], kinds["insertion"])


# The counts


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "data" / "wer.json").read_text()))
def test_corpus_wer_equals_nvidias(case):
    total = EditCounts(0, 0, 0, 0)
    for reference, hypothesis in zip(case["ref"], case["hyp"], strict=True):
        total += count_word_edits(reference, hypothesis)
    rate, errors, words = case["wer_errors_words"]
    assert (total.errors, total.reference_length) == (errors, words)
    assert total.rate == pytest.approx(rate, abs=1e-15)


def test_each_kind_of_edit_is_counted_as_itself():
    assert count_edits("abc", "abc") == EditCounts(hits=3, substitutions=0, deletions=0, insertions=0)
    assert count_edits("abc", "axc") == EditCounts(hits=2, substitutions=1, deletions=0, insertions=0)
    assert count_edits("abc", "ac") == EditCounts(hits=2, substitutions=0, deletions=1, insertions=0)
    assert count_edits("abc", "abxc") == EditCounts(hits=3, substitutions=0, deletions=0, insertions=1)
    assert count_edits("ab", "bc") == EditCounts(hits=1, substitutions=0, deletions=1, insertions=1)


def test_rate_over_an_empty_reference():
    assert count_word_edits("", "").rate == 0.0
    assert count_word_edits(" ", "a b") == EditCounts(0, 0, 0, 2)
    assert count_word_edits(" ", "a b").rate == float("inf")
    assert count_word_edits("a", "b c d").rate == 3.0


def test_corpus_rate_is_errors_over_words_not_a_mean_of_rates():
    total = count_word_edits("a", "b") + count_word_edits("a b c", "a b c")
    assert total == EditCounts(3, 1, 0, 0)
    assert total.rate == 0.25


@unhurried
@given(short, short)
def test_counts_equal_every_alignment_tried(reference, hypothesis):
    assert astuple(count_edits(reference, hypothesis)) == brute_force(tuple(reference), tuple(hypothesis))


@unhurried
@given(tokens, tokens)
def test_swapping_texts_swaps_deletions_and_insertions(a, b):
    there, back = count_edits(a, b), count_edits(b, a)
    assert back == EditCounts(there.hits, there.substitutions, there.insertions, there.deletions)
    assert there.reference_length == len(a)
    assert back.reference_length == len(b)


@unhurried
@given(tokens, tokens, tokens)
def test_errors_are_a_metric(a, b, c):
    assert (count_edits(a, b).errors == 0) == (a == b)
    assert count_edits(a, c).errors <= count_edits(a, b).errors + count_edits(b, c).errors


def test_tokens_are_compared_by_value_not_by_hash():
    assert count_edits(["a"], [97]).substitutions == 1
    assert count_edits([-1], [-2]).substitutions == 1
    assert count_edits([("a", 1), None], [("a", 1), None]).hits == 2


def test_weights_hold_where_everything_differs_over_a_long_text():
    assert count_edits("a" * 20_000, "b" * 300) == EditCounts(0, 300, 19_700, 0)
    assert count_edits("a" * 300, "b" * 20_000) == EditCounts(0, 300, 0, 19_700)


# Characters


def test_spaces_between_words_are_characters():
    assert count_char_edits("a b", "ab") == EditCounts(hits=2, substitutions=0, deletions=1, insertions=0)
    assert count_char_edits("it's", "its").rate == 0.25
    assert count_char_edits("né", "ne") == EditCounts(1, 1, 0, 0)


@unhurried
@given(texts, texts)
def test_width_of_white_space_changes_nothing(reference, hypothesis):
    plain = " ".join(reference.split()), " ".join(hypothesis.split())
    assert count_char_edits(reference, hypothesis) == count_edits(*plain)
    assert count_word_edits(reference, hypothesis) == count_word_edits(*plain)


# The alignment


@unhurried
@given(tokens, tokens)
def test_alignment_spells_both_texts_and_has_the_counts(reference, hypothesis):
    pairs = align_words(" ".join(reference), " ".join(hypothesis))
    assert [r for r, _ in pairs if r is not None] == reference
    assert [h for _, h in pairs if h is not None] == hypothesis
    assert (None, None) not in pairs
    assert counts_of(pairs) == count_edits(reference, hypothesis)


def test_alignment_of_a_sentence():
    assert align_words("the cat sat on a mat", "a cat sat on the big mat") == [
        ("the", "a"),
        ("cat", "cat"),
        ("sat", "sat"),
        ("on", "on"),
        (None, "the"),
        ("a", "big"),
        ("mat", "mat"),
    ]
    assert align_words("a b", "b c") == [("a", None), ("b", "b"), (None, "c")]
    assert align_words("a a", "a") == [("a", None), ("a", "a")]
    assert align_words("", "a b") == [(None, "a"), (None, "b")]
    assert align_words("a b", "") == [("a", None), ("b", None)]
    assert align_words("", "") == []


# NIST sclite: hits 0, deletions and insertions 3, substitutions 4, so it minimises 3 errors + substitutions


def edited_pairs(seed, count=200):
    """Reference of 1 to 25 words, hypothesis with 0 to 60 % of them edited."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(40)]
    pairs = []
    for _ in range(count):
        reference = rng.choices(vocabulary, k=rng.randint(1, 25))
        rate = rng.uniform(0, 0.6)
        hypothesis = []
        for word in reference:
            other = rng.choice(vocabulary)
            edits = [[other], [], [other, word]]
            hypothesis += rng.choice(edits) if rng.random() < rate else [word]
        pairs.append((reference, hypothesis))
    return pairs


def unrelated_pairs(seed, count=200):
    """Texts that have nothing to do with each other, where the choice among alignments is widest."""
    rng = random.Random(seed)
    draw = [f"w{i}" for i in range(12)]
    return [(rng.choices(draw, k=rng.randint(5, 25)), rng.choices(draw, k=rng.randint(0, 25))) for _ in range(count)]


def sclite_command():
    """Debian installs sclite behind `sctk`; a build from source installs it under its own name."""
    if shutil.which("sclite"):
        return ["sclite"]
    return ["sctk", "sclite"] if shutil.which("sctk") else None


needs_sclite = pytest.mark.skipif(
    sclite_command() is None, reason="NIST sclite is missing; on Debian: apt-get install sctk"
)


def sclite(pairs, folder):
    """sclite's counts for each pair, read from its `pra` report."""
    for name, side in (("ref.trn", 0), ("hyp.trn", 1)):
        lines = [f"{' '.join(pair[side])} (s-{i})\n" for i, pair in enumerate(pairs)]
        (folder / name).write_text("".join(lines))
    files = ["-r", folder / "ref.trn", "-h", folder / "hyp.trn", "-i", "rm", "-o", "pra", "stdout"]
    report = subprocess.run([*sclite_command(), *files], capture_output=True, text=True, check=True, timeout=60).stdout
    rows = re.findall(r"^id: \(s-(\d+)\)\nScores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)$", report, flags=re.MULTILINE)
    counts = {int(row): EditCounts(*map(int, numbers)) for row, *numbers in rows}
    assert sorted(counts) == list(range(len(pairs)))
    return [counts[i] for i in range(len(pairs))]


@needs_sclite
@pytest.mark.parametrize("pairs", [edited_pairs(1), unrelated_pairs(1)], ids=["edited", "unrelated"])
def test_every_difference_from_sclite_is_its_weights(pairs, tmp_path):
    ours = [count_edits(*pair) for pair in pairs]
    for pair, our, nist in zip(pairs, ours, sclite(pairs, tmp_path), strict=True):
        assert nist.reference_length == our.reference_length
        assert our.errors <= nist.errors
        assert our == nist or our.errors < nist.errors  # at equal errors the split is equal too
        assert nist == weighted_counts(*pair)


@needs_sclite
def test_corpus_totals_equal_sclites_on_edited_texts(tmp_path):
    pairs = edited_pairs(1)
    ours = sum((count_edits(*pair) for pair in pairs), EditCounts(0, 0, 0, 0))
    nist = sum(sclite(pairs, tmp_path), EditCounts(0, 0, 0, 0))
    assert ours == nist
    assert ours.errors > 500
    assert min(ours.substitutions, ours.deletions, ours.insertions) > 100


@needs_sclite
def test_sclite_spends_an_error_to_save_substitutions(tmp_path):
    pair = list("pqrab"), list("abxyz")
    assert count_edits(*pair) == EditCounts(hits=0, substitutions=5, deletions=0, insertions=0)
    assert sclite([pair], tmp_path) == [EditCounts(hits=2, substitutions=0, deletions=3, insertions=3)]


# Speed


def test_scores_a_librispeech_sized_corpus_within_five_seconds():
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(400)]
    pairs = []
    for _ in range(2703):
        reference = rng.choices(words, k=rng.randint(5, 35))
        pairs.append((" ".join(reference), " ".join(w for w in reference if rng.random() > 0.1)))
    start = time.perf_counter()
    errors = sum(count_word_edits(*pair).errors + count_char_edits(*pair).errors for pair in pairs)
    assert time.perf_counter() - start < 5
    assert errors > 2703
