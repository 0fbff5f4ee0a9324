"""The weights of beam search that suit a model, a language model and a kind of speech: found on a dev manifest.

The network hears every utterance once; then each pair (lm_weight, word_bonus) is a search through what it gave, on a
coarse grid first, then twice around the best pair so far, at half the distance each time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr.beam import Trial, tune
from jasper_asr.data.manifest import Utterance
from jasper_asr.errors import JasperError, ManifestError
from jasper_asr.evaluate import reference_text
from jasper_asr.lm import NgramModel
from jasper_asr.transcribe import Clip, Transcriber

Pair = tuple[float, float]

COARSE: tuple[Pair, ...] = tuple((weight / 2, float(bonus)) for weight in range(5) for bonus in range(5))
"""lm_weight 0 to 2 by 0.5, word_bonus 0 to 4 by 1."""

_STEPS: tuple[Pair, ...] = ((0.25, 0.5), (0.125, 0.25))
MOST_TRIALS = len(COARSE) + 8 * len(_STEPS)
"""How many pairs are tried at most."""


@dataclass(frozen=True)
class Heard:
    """What the network gave, log_probs float32 [T', n_classes], and the references; the errors of other utterances."""

    log_probs: tuple[NDArray[np.float32], ...]
    references: tuple[str, ...]
    errors: tuple[str, ...]


def hear(
    transcriber: Transcriber, utterances: Sequence[Utterance], *, progress: Callable[[int], None] | None = None
) -> Heard:
    """Run the network over `utterances`; `progress` is called with 1 after each.

    Raises ManifestError when a transcript is missing, or when no utterance with words can be read.
    """
    references = [reference_text(row, transcriber) for row in utterances]
    log_probs, kept, errors = [], [], []
    for row, reference in zip(utterances, references, strict=True):
        try:
            log_probs.append(transcriber.listen(Clip(row.audio_path, *row.part)))
            kept.append(reference)
        except JasperError as error:
            errors.append(str(error))
        if progress:
            progress(1)
    if not any(reference.split() for reference in kept):
        first = f" ({errors[0]})" if errors else ""
        raise ManifestError(f"no utterance with words can be read{first}; give a manifest of speech with transcripts")
    return Heard(tuple(log_probs), tuple(kept), tuple(errors))


def search(heard: Heard, labels: Sequence[str], lm: NgramModel, **options: Any) -> Iterator[Trial]:
    """All trials as they are made: COARSE, then what lies around the best so far; other options as BeamSearch's."""
    trials: list[Trial] = []
    for step in (None, *_STEPS):
        tried = {(trial.lm_weight, trial.word_bonus) for trial in trials}
        pairs = [pair for pair in _around(best(trials), step) if pair not in tried] if step else COARSE
        for trial in tune(heard.log_probs, heard.references, labels, lm, pairs, **options):
            trials.append(trial)
            yield trial


def best(trials: Iterable[Trial]) -> Trial:
    """The trial with the lowest WER, of equals the first."""
    return min(trials, key=attrgetter("wer"))


def _around(centre: Trial, step: Pair) -> Iterator[Pair]:
    """The eight neighbours of a pair, without negative weights of the language model."""
    for weight in (-step[0], 0.0, step[0]):
        for bonus in (-step[1], 0.0, step[1]):
            if (weight or bonus) and centre.lm_weight + weight >= 0:
                yield centre.lm_weight + weight, centre.word_bonus + bonus
