"""The parts that a back-off model is made of: a trie of n-grams, sorted, in arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

START, END, UNKNOWN = "<s>", "</s>", "<unk>"

LN10 = math.log(10)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Level:
    """The N n-grams of one order, sorted by the node of their first n - 1 words, then by their last word.

    words int32 [N] the last word, log_probs float32 [N], backoffs float32 [N] (all 0 at the highest order);
    the n-grams that continue node i are nodes first[i] to first[i + 1] of the next order: int64 [N + 1].
    """

    words: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    backoffs: NDArray[np.float32]
    first: NDArray[np.int64]


def levels_of(
    parents: Sequence[NDArray[np.int64]],
    words: Sequence[NDArray[np.int64]],
    log_probs: Sequence[NDArray[np.floating]],
    backoffs: Sequence[NDArray[np.floating]],
) -> list[Level]:
    """Levels of a trie from each order's sorted n-grams: node one order down, last word, values; no top back-offs."""
    levels = []
    for n, word in enumerate(words):
        top = n + 1 == len(words)
        nodes = np.arange(len(word) + 1)
        with np.errstate(over="ignore"):  # infinity is an error of whoever read the values
            prob = log_probs[n].astype(np.float32)
            backoff = np.zeros(len(word), np.float32) if top else backoffs[n].astype(np.float32)
        first = nodes * 0 if top else np.searchsorted(parents[n + 1], nodes)
        levels.append(Level(word.astype(np.int32), prob, backoff, first))
    return levels
