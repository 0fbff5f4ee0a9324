"""Phonemes as a second target in training: CTC on them half-way up the encoder, beside the letters at its end.

Letters of English say little about sounds, and transcribed speech of many people is scarce. Phonemes can be learnt from
few people; how they are spelt, from any text that an engine reads aloud. A target half-way up keeps the two apart, and
the head is dropped after training: a model costs and is stored as before. Intermediate CTC: Lee and Watanabe,
"Intermediate loss regularization for CTC-based speech recognition", arXiv 2102.03216.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jasper_asr.align import frames_needed
from jasper_asr.errors import ManifestError, StorageError

WEIGHT = 0.4
"""Of the phonemes' loss, in nats a phoneme, beside that of the letters, in nats a letter."""


@dataclass(frozen=True)
class Lexicon:
    """How words sound: `words` gives the ids of their phonemes, which index `symbols`; the blank comes after these."""

    symbols: tuple[str, ...]
    words: dict[str, tuple[int, ...]]

    @property
    def n_classes(self) -> int:
        """Phonemes and the blank, whose id is the last."""
        return len(self.symbols) + 1


@dataclass(frozen=True)
class PhonemeTargets:
    """Of those utterances of a batch that have phonemes: their `rows`, and the ids one utterance after the other."""

    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    target_lens: NDArray[np.int64]


def read_lexicon(path: Path) -> Lexicon:
    """A lexicon in Kaldi's layout: a word and its phonemes a line, between white space; of two lines the first counts.

    Raises StorageError when the file cannot be read, ManifestError for a line without phonemes and for an empty file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read as text ({error})") from error
    spoken: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        word, *phonemes = line.split() or [""]
        if word and not phonemes:
            raise ManifestError(f"{path}, line {number}: {word!r} has no phonemes; write them after it, with spaces")
        if word:
            spoken.setdefault(word.lower(), phonemes)
    if not spoken:
        raise ManifestError(f"{path}: holds no word; a line is a word and its phonemes, with spaces between")
    symbols = tuple(sorted({phoneme for phonemes in spoken.values() for phoneme in phonemes}))
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    return Lexicon(symbols, {word: tuple(ids[phoneme] for phoneme in row) for word, row in spoken.items()})


def phoneme_targets(lexicon: Lexicon, texts: Sequence[str], frames: Sequence[int]) -> PhonemeTargets:
    """Phonemes of the `texts` of a batch, which last so many output frames.

    A text with an unknown word is left out, for it would be taught to skip sounds; so is one that CTC cannot align.
    """
    rows: list[int] = []
    targets: list[tuple[int, ...]] = []
    for index, text in enumerate(texts):
        spoken = [lexicon.words.get(word) for word in text.split()]
        phonemes = tuple(phoneme for word in spoken if word is not None for phoneme in word)
        if phonemes and None not in spoken and frames[index] >= frames_needed(phonemes):
            rows.append(index)
            targets.append(phonemes)
    lens = [len(phonemes) for phonemes in targets]
    joined = [phoneme for phonemes in targets for phoneme in phonemes]
    return PhonemeTargets(np.array(rows, np.int64), np.array(joined, np.int64), np.array(lens, np.int64))
