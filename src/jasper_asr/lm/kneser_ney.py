"""Interpolated modified Kneser-Ney (Chen and Goodman 1999) from text, pruned by relative entropy (Stolcke 1998)."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from jasper_asr.errors import UsageError
from jasper_asr.lm.model import NgramModel
from jasper_asr.lm.trie import END, LN10, START, UNKNOWN, Floats, levels_of


def estimate(sentences: Iterable[str], order: int = 3, *, prune: float = 0.0, min_count: int = 1) -> NgramModel:
    """Interpolated modified Kneser-Ney from `sentences`, words parted by white space.

    `prune` is the relative entropy (nats) below which an n-gram is left to the back-off; 0 keeps all. Words that occur
    less often than `min_count` are counted as `<unk>`; without any, `<unk>` gets the share that smoothing leaves to a
    word never seen. Raises UsageError without a single word.
    """
    if order < 1:
        raise UsageError(f"order {order}: must be at least 1")
    words, tokens, places = _tokens(sentences, min_count)
    counts = _count(tokens, places, words, order)
    probs, backoffs = _smooth(counts)
    if prune > 0:
        kept = _keep(counts, probs, prune, len(tokens))
        backoffs = _rebalance(counts, probs, backoffs, kept)
    else:
        kept = [np.ones(len(level.keys), bool) for level in counts]
    return _assemble(words, counts, probs, backoffs, kept)


@dataclass(frozen=True, eq=False)
class _Counts:
    """The N distinct n-grams of one order, sorted by key = node of the first n - 1 words * vocabulary + last word.

    `parent` and `suffix` are the nodes, one order down, without the last and without the first word; `raw` is how
    often the n-gram occurs, `adjusted` how many different words precede it; `opening` says whether it begins with <s>.
    """

    keys: NDArray[np.int64]
    parent: NDArray[np.int64]
    suffix: NDArray[np.int64]
    raw: NDArray[np.int64]
    adjusted: NDArray[np.int64]
    opening: NDArray[np.bool_]


def _tokens(sentences: Iterable[str], min_count: int = 1) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Sorted vocabulary, word ids of all sentences between their marks, and each one's place in its sentence."""
    ids = {START: 0, END: 1, UNKNOWN: 2}
    tokens = array("i")
    lengths: list[int] = []
    for sentence in sentences:
        if words := sentence.split():
            tokens.append(0)
            tokens.extend([ids.setdefault(word, len(ids)) for word in words])
            tokens.append(1)
            lengths.append(len(words) + 2)
    if not tokens:
        raise UsageError("language model: the text holds no words; give one sentence a line")
    numbers = np.frombuffer(tokens, np.int32)
    frequent = np.bincount(numbers, minlength=len(ids)) >= min_count
    frequent[:3] = True
    ordered = sorted(word for word, number in ids.items() if frequent[number])
    rank = np.full(len(ids), ordered.index(UNKNOWN))
    rank[[ids[word] for word in ordered]] = np.arange(len(ordered))
    ends = np.cumsum(lengths)
    places = np.arange(len(numbers)) - np.repeat(ends - lengths, lengths)
    return ordered, rank[numbers], places


def _count(tokens: NDArray[np.int64], places: NDArray[np.int64], words: Sequence[str], order: int) -> list[_Counts]:
    """Count the n-grams of all orders within sentences."""
    node, every = tokens, np.arange(len(words))
    raw = np.bincount(tokens, minlength=len(words))
    levels = [_Counts(every, every, every, raw, raw, every == words.index(START))]
    for length in range(2, order + 1):
        ends = np.flatnonzero(places >= length - 1)
        keys, at, inverse, raw = np.unique(
            node[ends - 1] * len(words) + tokens[ends], return_index=True, return_inverse=True, return_counts=True
        )
        at = ends[at]
        levels.append(_Counts(keys, keys // len(words), node[at], raw, raw, places[at] == length - 1))
        node = np.full(len(tokens), -1)
        node[ends] = inverse
    for index, (lower, upper) in enumerate(pairwise(levels)):
        preceding = np.bincount(upper.suffix, minlength=len(lower.keys))
        # nothing precedes <s>, so what begins with it keeps its raw count
        levels[index] = replace(lower, adjusted=np.where(lower.opening, lower.raw, preceding))
    levels[0] = replace(levels[0], adjusted=np.where(levels[0].opening, 0, levels[0].adjusted))  # never predicted
    return levels


def _smooth(counts: Sequence[_Counts]) -> tuple[list[Floats], list[Floats]]:
    """Probabilities of all n-grams, and back-off weights of all nodes below the highest order.

    p(w|h) = (c - D(c)) / sum c + backoff(h) p(w|h'), down to a uniform distribution over all words but <s>.
    """
    unigrams = counts[0]
    choices = len(unigrams.keys) - 1
    lower = np.where(unigrams.opening, 0.0, 1 / choices)
    probs: list[Floats] = []
    backoffs: list[Floats] = []
    for length, level in enumerate(counts, start=1):
        contexts = len(counts[length - 2].keys) if length > 1 else 1
        parent = level.parent if length > 1 else np.zeros_like(level.parent)
        discount = _discounts(level.adjusted)[np.minimum(level.adjusted, 3)]
        total = np.bincount(parent, level.adjusted, contexts)
        kept = np.bincount(parent, discount, contexts)
        # a context that nothing follows hands everything down
        weight = np.divide(kept, total, out=np.ones(contexts), where=total > 0)
        if length > 1:
            backoffs.append(weight)
            lower = probs[-1][level.suffix]
        probs.append((level.adjusted - discount) / np.maximum(total, 1)[parent] + weight[parent] * lower)
    return probs, backoffs


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """What is taken off counts of 0, 1, 2, and 3 or more (Chen and Goodman 1999, equation 26).

    Where a text is too small for the formula, 0.5, 1 and 1.5, as other estimators do.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in range(1, 5))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0.0, y, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found[1:] > 0).all():
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])


def _keep(counts: Sequence[_Counts], probs: Sequence[Floats], threshold: float, tokens: int) -> list[NDArray[np.bool_]]:
    """Which n-grams stay: those whose removal would raise the relative entropy by `threshold`, and their contexts.

    A context weighs as much as it occurs in the text; Kneser-Ney's lower orders would misjudge that.
    """
    kept = [np.ones(len(counts[0].keys), bool)]
    needed = np.zeros(len(counts[-1].keys), bool)
    for length in range(len(counts), 1, -1):
        level, prob = counts[length - 1], probs[length - 1]
        lower, contexts = probs[length - 2][level.suffix], len(counts[length - 2].keys)
        free = np.maximum(1 - np.bincount(level.parent, prob, contexts), 1e-12)[level.parent]
        lower_free = np.maximum(1 - np.bincount(level.parent, lower, contexts), 1e-12)[level.parent]
        before, after = np.log(free / lower_free), np.log((free + prob) / (lower_free + lower))
        change = prob * (np.log(lower / prob) + after) + free * (after - before)
        weight = counts[length - 2].raw[level.parent] / tokens
        keep = (-weight * change >= threshold) | needed
        kept.insert(1, keep)
        needed = np.bincount(level.parent[keep], minlength=contexts) > 0
    return kept


def _rebalance(
    counts: Sequence[_Counts], probs: Sequence[Floats], backoffs: Sequence[Floats], kept: Sequence[NDArray[np.bool_]]
) -> list[Floats]:
    """Back-off weights with which the kept n-grams and what they leave to the lower order add up to 1."""
    weights = []
    actual = probs[0]
    for length in range(2, len(counts) + 1):
        level, prob, keep = counts[length - 1], probs[length - 1], kept[length - 1]
        contexts, lower = len(counts[length - 2].keys), actual[level.suffix]
        free = 1 - np.bincount(level.parent, prob * keep, contexts)
        lower_free = 1 - np.bincount(level.parent, lower * keep, contexts)
        # with next to nothing left to share out the quotient is noise, and smoothing's own weight is exact
        sound = (free > 1e-9) & (lower_free > 1e-9)
        weight = np.divide(free, lower_free, out=backoffs[length - 2].copy(), where=sound)
        weights.append(weight)
        actual = np.where(keep, prob, weight[level.parent] * lower)
    return weights


def _assemble(
    words: Sequence[str],
    counts: Sequence[_Counts],
    probs: Sequence[Floats],
    backoffs: Sequence[Floats],
    kept: Sequence[NDArray[np.bool_]],
) -> NgramModel:
    """The model of the kept n-grams, their nodes numbered anew."""
    numbers = [np.cumsum(keep) - 1 for keep in kept]
    parents = [numbers[n - 1][counts[n].parent[kept[n]]] if n else np.zeros(0, np.int64) for n in range(len(counts))]
    last = [level.keys[keep] % len(words) for level, keep in zip(counts, kept, strict=True)]
    log_probs = [_log(prob[keep]) for prob, keep in zip(probs, kept, strict=True)]
    weights = [_log(weight[keep]) for weight, keep in zip(backoffs, kept, strict=False)]
    return NgramModel(words, levels_of(parents, last, log_probs, weights))


def _log(probs: Floats) -> Floats:
    """Natural logarithms, with ARPA's -99 for impossible <s>."""
    return np.log(probs, out=np.full(len(probs), -99 * LN10), where=probs > 0)
