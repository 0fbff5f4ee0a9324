"""How far confidences can be trusted: of the words with confidence 0.8, are 80 % right?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jasper_asr.align import Word
from jasper_asr.errors import UsageError
from jasper_asr.wer import align_words


@dataclass(frozen=True)
class Bin:
    """The words whose confidence is from `low` to below `high` (1 is in the last bin).

    `confidence` is their mean, `accuracy` the share of them that is right; both 0 where there are no words.
    """

    low: float
    high: float
    words: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class CalibrationReport:
    """The expected calibration error, a fraction, and the bins that it comes from."""

    ece: float
    bins: tuple[Bin, ...]
    words: int


def calibration(items: Iterable[tuple[str, Sequence[Word]]], bins: int = 10) -> CalibrationReport:
    """The calibration of transcripts, each a normalised reference and the words that were recognised.

    Only recognised words count: a word that was left out has no confidence.
    """
    confidences: list[float] = []
    correct: list[bool] = []
    for reference, words in items:
        confidences += [word.confidence for word in words]
        correct += word_correctness(reference, " ".join(word.text for word in words))
    found = _bins(confidences, correct, bins)
    return CalibrationReport(_error(found), found, len(confidences))


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """The mean distance between confidence and accuracy over `bins` equal bins, by words (Naeini et al. 2015).

    confidences float [N] in [0, 1], correct bool [N]. Without words 0. Raises UsageError for other shapes or values.
    """
    return _error(_bins(confidences, correct, bins))


def word_correctness(reference: str, hypothesis: str) -> list[bool]:
    """For each word of `hypothesis`: whether the alignment that WER counts with pairs it with the same word."""
    return [spoken == heard for spoken, heard in align_words(reference, hypothesis) if heard is not None]


def _bins(confidences: ArrayLike, correct: ArrayLike, bins: int) -> tuple[Bin, ...]:
    values, hits = np.asarray(confidences, np.float64), np.asarray(correct, np.bool_)
    if bins < 1 or values.ndim != 1 or values.shape != hits.shape or not ((values >= 0) & (values <= 1)).all():
        raise UsageError("calibration: needs a bin or more, and for each word a confidence in [0, 1] and a verdict")
    indices = np.minimum((values * bins).astype(np.intp), bins - 1)
    counts = np.bincount(indices, minlength=bins)
    divisors = np.maximum(counts, 1)
    means = np.bincount(indices, values, bins) / divisors
    rates = np.bincount(indices, hits, bins) / divisors
    return tuple(
        Bin(index / bins, (index + 1) / bins, int(counts[index]), float(means[index]), float(rates[index]))
        for index in range(bins)
    )


def _error(bins: Sequence[Bin]) -> float:
    words = sum(part.words for part in bins)
    return sum(part.words * abs(part.confidence - part.accuracy) for part in bins) / max(words, 1)
