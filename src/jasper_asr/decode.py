"""log_probs -> text: the best path, by greedy choice in every frame."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def greedy(log_probs: NDArray[np.float32], length: int, labels: Sequence[str]) -> str:
    """Best-path CTC decoding (Graves et al. 2006): the most likely class of each frame, repeats merged, blanks dropped.

    log_probs float [T', n_classes] with the blank last; frames from `length` on are padding and never looked at.
    White space is collapsed: a transcript neither starts nor ends with a space, nor holds two in a row.
    """
    path = log_probs[:length].argmax(axis=1)
    changed = np.empty(len(path), bool)
    changed[:1] = True
    np.not_equal(path[1:], path[:-1], out=changed[1:])
    kept = path[changed & (path != len(labels))]
    return " ".join("".join(labels[index] for index in kept).split())
