"""Edit counts between a reference and a hypothesis: the one place where WER and CER come from.

    count_word_edits("the cat sat", "the bat sat")
    -> EditCounts(hits=2, substitutions=1, deletions=0, insertions=0), rate 1/3

A corpus is scored as NVIDIA's `word_error_rate` does it: add up the counts, then divide; its rate is not the
mean of the utterances' rates. Texts are compared as they are: normalise both before.

Many alignments can share the minimum number of errors and still differ in how they split it: `a b` against
`b c` is two substitutions, or a deletion, a hit and an insertion. Here the one with the most hits counts.
With E = S + D + I, hits H, N reference and M hypothesis tokens, 2 H = N + M - E - S, so the most hits means
the fewest substitutions, and D - I = N - M settles the rest: the split is unique.

NIST's sclite minimises 3 (D + I) + 4 S = 3 E + S instead. Whenever its errors are the minimum, its split is
therefore this one; but it accepts an error more where that saves three substitutions or more (at three both
cost the same), so its error count can be above ours, never below.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class EditCounts:
    """What became of the reference's tokens, and what was added; counts add up over utterances with `+`."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """The edit distance: substitutions + deletions + insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_length(self) -> int:
        """Tokens in the reference: hits + substitutions + deletions."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per reference token, a fraction that can exceed 1; over no tokens 0.0, or inf."""
        if self.reference_length == 0:
            return float("inf") if self.errors else 0.0
        return self.errors / self.reference_length

    def __add__(self, other: "EditCounts") -> "EditCounts":
        return EditCounts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


def count_edits(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> EditCounts:
    """Count the edits of the alignment with the fewest errors and, among those, the most hits.

    Tokens are equal as dictionary keys are. Time grows with the product of the two lengths.
    """
    from rapidfuzz.distance import Levenshtein

    reference_ids, hypothesis_ids = _token_ids(reference, hypothesis)
    error = _error_cost(len(reference), len(hypothesis))
    cost = Levenshtein.distance(reference_ids, hypothesis_ids, weights=(error, error, error + 1))
    errors, substitutions = divmod(cost, error)
    surplus = len(reference) - len(hypothesis)  # deletions - insertions, in every alignment
    deletions = (errors - substitutions + surplus) // 2
    return EditCounts(
        hits=len(reference) - substitutions - deletions,
        substitutions=substitutions,
        deletions=deletions,
        insertions=deletions - surplus,
    )


def count_word_edits(reference: str, hypothesis: str) -> EditCounts:
    """Count the edits between two texts' words, split at white space; `.rate` is the WER as a fraction."""
    return count_edits(reference.split(), hypothesis.split())


def count_char_edits(reference: str, hypothesis: str) -> EditCounts:
    """Count the edits between two texts' characters; `.rate` is the CER as a fraction.

    A character is a code point. A space between words counts as one; runs of white space count as one
    space, and white space at either end does not count.
    """
    return count_edits(_collapse_spaces(reference), _collapse_spaces(hypothesis))


def align_words(reference: str, hypothesis: str) -> list[tuple[str | None, str | None]]:
    """Pair the words of two texts, in order, with as many hits and errors of each kind as `count_word_edits`.

    A pair is (reference word, hypothesis word): (word, None) is a deletion, (None, word) an insertion.
    Where several alignments have these counts, the words left alone come as early as they can. For single
    utterances: time and memory (8 bytes a cell) grow with the product of the two word counts.
    """
    reference_words, hypothesis_words = reference.split(), hypothesis.split()
    costs = _cost_table(reference_words, hypothesis_words)
    error = _error_cost(len(reference_words), len(hypothesis_words))
    pairs: list[tuple[str | None, str | None]] = []
    i, j = len(reference_words), len(hypothesis_words)
    while i and j:
        differs = reference_words[i - 1] != hypothesis_words[j - 1]
        if costs[i, j] == costs[i - 1, j - 1] + differs * (error + 1):
            i, j = i - 1, j - 1
            pairs.append((reference_words[i], hypothesis_words[j]))
        elif costs[i, j] == costs[i - 1, j] + error:
            i -= 1
            pairs.append((reference_words[i], None))
        else:
            j -= 1
            pairs.append((None, hypothesis_words[j]))
    pairs.extend((word, None) for word in reversed(reference_words[:i]))
    pairs.extend((None, word) for word in reversed(hypothesis_words[:j]))
    return pairs[::-1]


def _collapse_spaces(text: str) -> str:
    return " ".join(text.split())


def _error_cost(reference_length: int, hypothesis_length: int) -> int:
    """A cost per error so large that the substitutions, at 1 more each, can never add up to one error."""
    return reference_length + hypothesis_length + 1


def _token_ids(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Number the distinct tokens, because rapidfuzz compares hashes, and takes "a" for ord("a")."""
    ids: dict[Hashable, int] = {}
    return (
        [ids.setdefault(token, len(ids)) for token in reference],
        [ids.setdefault(token, len(ids)) for token in hypothesis],
    )


def _cost_table(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Cost of the best alignment of each prefix pair: int64 [N + 1, M + 1], at `count_edits`' weights."""
    error = _error_cost(len(reference), len(hypothesis))
    reference_ids, hypothesis_ids = (np.array(ids, np.int64) for ids in _token_ids(reference, hypothesis))
    insertions = error * np.arange(len(hypothesis) + 1)
    costs = np.empty((len(reference) + 1, len(hypothesis) + 1), np.int64)
    costs[0] = insertions
    for i, token in enumerate(reference_ids, start=1):
        best = costs[i - 1] + error
        best[1:] = np.minimum(best[1:], costs[i - 1, :-1] + (hypothesis_ids != token) * (error + 1))
        # Each cell is the best start to its left plus the insertions since: a running minimum.
        costs[i] = np.minimum.accumulate(best - insertions) + insertions
    return costs
