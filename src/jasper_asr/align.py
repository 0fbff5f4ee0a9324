"""When each word was said: log_probs and a text -> words with start, end and confidence.

The text is laid along the frames by its most likely CTC alignment (Viterbi; Graves et al. 2006), exactly, for texts
and sounds of any length. As in decoding, spaces between words and around the text may stand more than once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from jasper_asr.decode import greedy
from jasper_asr.errors import UsageError

Floats = NDArray[np.floating]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Character:
    """One character of a word; `start` and `end` in seconds, `confidence` in [0, 1]."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Word:
    """One word of a transcript; `start` and `end` in seconds, `confidence` in [0, 1], and its characters."""

    text: str
    start: float
    end: float
    confidence: float
    characters: tuple[Character, ...] = ()


LEAD, TAIL = 0.02, 0.06
"""Seconds that a word begins before its first letter's frame and ends after its last one's.

CTC puts a letter in the middle of its sound rather than at its edges. Measured with the built-in model on synthetic
speech with known word times: the mean error is then about 40 ms at either end.
"""


def align(
    log_probs: Floats,
    text: str,
    labels: Sequence[str],
    *,
    seconds_per_frame: float,
    duration: float,
    offset: float = 0.0,
    with_lm: bool = False,
) -> tuple[Word, ...]:
    """When each word of `text` was said.

    log_probs float [T', n_classes], finite, valid frames only, with the blank last; the first frame is centred
    `offset` seconds into a sound of `duration` seconds, the next ones `seconds_per_frame` apart. Times are monotone
    and between 0 and `duration`; a word's characters follow one another without gaps.

    A character's confidence is the highest posterior that it has in a frame of its own. A word's is their product,
    the probability that all are right: as good as calibrated for the best path. `with_lm` says that a language
    model had a say in `text`; then letters support each other, and their geometric mean is much nearer the truth.

    Raises UsageError when a character of `text` is not a label, or the frames are too few for it.
    """
    words = text.split()
    frames = spans(log_probs, text, labels)
    ids = {label: index for index, label in enumerate(labels)}
    classes = (ids[character] for word in words for character in word)
    peaks = [
        float(np.exp(min(log_probs[first : last + 1, index].max(), 0.0)))
        for (first, last), index in zip(frames.tolist(), classes, strict=True)
    ]
    firsts, lasts = (offset + seconds_per_frame * frames).T
    counts = np.array([len(word) for word in words], np.intp)
    starts, ends = _times(firsts, lasts, np.cumsum(counts) - counts, duration)
    found, begin = [], 0
    for word in words:
        part = slice(begin, begin + len(word))
        found.append(_word(word, starts[part], ends[part], peaks[part], with_lm))
        begin += len(word)
    return tuple(found)


def _times(
    firsts: NDArray[np.float64], lasts: NDArray[np.float64], heads: Indices, duration: float
) -> tuple[list[float], list[float]]:
    """Start and end of every character, from the centres of its first and last frame; words begin at `heads`."""
    starts, ends = firsts - LEAD, lasts + TAIL
    gaps = firsts[1:] - lasts[:-1]
    share = np.full(len(gaps), 0.5)
    share[heads[1:] - 1] = TAIL / (LEAD + TAIL)
    borders = lasts[:-1] + share * gaps
    within = np.ones(len(gaps), bool)
    within[heads[1:] - 1] = gaps[heads[1:] - 1] < LEAD + TAIL
    starts[1:][within] = ends[:-1][within] = borders[within]
    return starts.clip(0, duration).tolist(), ends.clip(0, duration).tolist()


def _word(text: str, starts: Sequence[float], ends: Sequence[float], peaks: Sequence[float], with_lm: bool) -> Word:
    confidence = math.prod(peaks) ** (1 / len(peaks) if with_lm else 1.0)
    characters = tuple(map(Character, text, starts, ends, peaks))
    return Word(text, starts[0], ends[-1], confidence, characters)


def spans(log_probs: Floats, text: str, labels: Sequence[str]) -> Indices:
    """The first and the last frame of every character of `text` but spaces, int [characters, 2].

    log_probs float [T', n_classes], finite, with the blank last. Raises UsageError when a character of `text` is not a
    label, or the frames are too few for it.
    """
    text = " ".join(text.split())
    if text == greedy(log_probs, len(log_probs), labels):
        return _greedy_spans(log_probs, labels)
    chain = _Chain.of(text, labels)
    needed = frames_needed(text)
    if needed > len(log_probs):
        raise UsageError(f"a text of {len(text)} characters: needs {needed} frames, the model gave {len(log_probs)}")
    scores = np.full(len(chain.classes), -np.inf)
    scores[2] = 0.0
    path = _best_path(_emissions(log_probs, labels), chain, scores, len(scores) - 1)
    states = np.array([2 * index + 3 for index, character in enumerate(text) if character != " "], np.intp)
    return np.stack([np.searchsorted(path, states), np.searchsorted(path, states, side="right") - 1], axis=1)


def frames_needed(targets: Sequence[object]) -> int:
    """The fewest output frames that CTC aligns `targets` with: one each, and a blank between equal neighbours."""
    return len(targets) + sum(one == two for one, two in pairwise(targets))


def _greedy_spans(log_probs: Floats, labels: Sequence[str]) -> Indices:
    """The same for the text that `greedy` finds: no path is likelier than the best class of every frame."""
    path = log_probs.argmax(axis=1)
    firsts = np.flatnonzero(np.diff(path, prepend=-1))
    lasts = np.append(firsts, len(path))[1:] - 1
    spoken = np.array([*(label != " " for label in labels), False])[path[firsts]]
    return np.stack([firsts[spoken], lasts[spoken]], axis=1)


@dataclass(frozen=True)
class _Chain:
    """The states of an alignment in their order: two that nothing enters, then blank, label, blank, ..., label, blank.

    `classes` int [2 n + 3] are columns of `_emissions`. `skips` is 0 where a state may follow the one before the last,
    as a label may follow a different one without a blank, and -inf elsewhere.
    """

    classes: Indices
    skips: NDArray[np.float64]

    @classmethod
    def of(cls, text: str, labels: Sequence[str]) -> "_Chain":
        ids = {label: index for index, label in enumerate(labels)}
        unknown = next((character for character in text if character not in ids), None)
        if unknown is not None:
            raise UsageError(f"character {unknown!r}: is not a label of the model; normalise the text first")
        blank, gap = len(labels), len(labels) + 1
        classes = np.full(2 * len(text) + 3, blank, np.intp)
        classes[2::2] = [gap if " " in pair else blank for pair in pairwise(f" {text} ")]
        classes[3::2] = [ids[character] for character in text]
        skips = np.full(len(classes), -np.inf)
        skips[5::2][classes[5::2] != classes[3:-2:2]] = 0.0
        return cls(classes, skips)


def _emissions(log_probs: Floats, labels: Sequence[str]) -> Floats:
    """log_probs, a column for what may stand between words (a blank or a space), and a last frame that takes anything.

    With that frame every alignment ends in the last state. float [T' + 1, n_classes + 1].
    """
    gap = log_probs[:, -1]
    if " " in labels:
        gap = np.maximum(gap, log_probs[:, labels.index(" ")])
    return np.pad(np.column_stack([log_probs, gap]), ((0, 1), (0, 0)))


_CELLS = 2**19  # scores kept at once, of 8 bytes
_BLOCKS = 16


def _best_path(rows: Floats, chain: _Chain, scores: NDArray[np.float64], last: int) -> Indices:
    """The state in each of `rows` on the best way to state `last` in the last of them; `scores` are those before.

    Where the scores of all states before all rows are too many to keep, they are kept before each of a few blocks;
    then the blocks are gone through again, from the last to the first, with the few states that the way can reach.
    """
    if len(rows) == 1:
        return np.array([last], np.intp)
    block = 1 if len(rows) * len(scores) <= _CELLS else -(-len(rows) // _BLOCKS)
    reached = int(np.flatnonzero(scores > -np.inf)[-1])
    kept = []
    for number, row in enumerate(rows):
        if number % block == 0:
            kept.append(scores)
        low = max(last - 2 * (len(rows) - 1 - number), 2)
        scores = _advance(scores, row, chain, low, min(reached + 2 * number + 3, len(scores)))
    path = np.empty(len(rows), np.intp)
    for index in range(len(kept) - 1, -1, -1):
        part = slice(index * block, (index + 1) * block)
        first = max(last - 2 * len(rows[part]), 0)
        window = slice(first, last + 1)
        states = _Chain(chain.classes[window], chain.skips[window])
        path[part] = first + _best_path(rows[part], states, kept[index][window], last - first)
        last = _before(kept[index], chain, path[index * block])
    return path


def _advance(scores: NDArray[np.float64], row: Floats, chain: _Chain, low: int, high: int) -> NDArray[np.float64]:
    """Scores after one more row, of the states from `low` to below `high`; the others are out of the way."""
    best = scores[low - 2 : high - 2] + chain.skips[low:high]
    np.maximum(best, scores[low - 1 : high - 1], out=best)
    np.maximum(best, scores[low:high], out=best)
    best += row.take(chain.classes[low:high])
    after = np.full(len(scores), -np.inf)
    after[low:high] = best
    return after


def _before(scores: NDArray[np.float64], chain: _Chain, state: int) -> int:
    """Where the best way to `state` was a row earlier, by the scores of then."""
    ways = (scores[state], scores[state - 1], scores[state - 2] + chain.skips[state])
    return int(state - np.argmax(ways))
