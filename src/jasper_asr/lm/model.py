"""Back-off models, scored word by word."""

import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from jasper_asr.errors import ModelError, StorageError, UsageError
from jasper_asr.files import write_whole
from jasper_asr.lm import files, kenlm
from jasper_asr.lm.trie import END, LN10, START, UNKNOWN, Level

State = tuple[int, ...]
"""The words so far, as far as they matter: the node of the last word, of the last two, and so on; -1 for none.

Equal states score every continuation alike, so they may be merged.
"""


class NgramModel:
    """A back-off model over `words` (sorted; the index is the word's id), whatever its file was.

    A word outside the vocabulary scores as `<unk>`; in a model without one, as its rarest word.
    """

    def __init__(self, words: Sequence[str], levels: Sequence[Level]) -> None:
        self.words = words
        self.levels = levels
        self.order = len(levels)
        self._start, self._end, self._unknown = map(self._find, (START, END, UNKNOWN))
        # memoryviews give plain Python numbers, several times faster than scalars of numpy
        self._words = [level.words.data for level in levels]
        self._log_probs = [level.log_probs.data for level in levels]
        self._backoffs = [level.backoffs.data for level in levels]
        self._first = [level.first.data for level in levels]
        spoken = np.delete(levels[0].log_probs, self._start)
        self._rarest = float(spoken.min())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read our own format, ARPA text (also gzipped) or a KenLM binary, told apart by the first bytes.

        A vocabulary all in capitals, as LibriSpeech's models have it, is read in lower case. A KenLM file with hash
        tables stays on disk, mapped; such a model scores as any other, but only its unigrams are in `levels`.
        Raises StorageError if the file cannot be read, ModelError if it is damaged or of another kind.
        """
        try:
            data = files.contents(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StorageError(f"{path}: cannot be read ({reason}); check the path") from error
        try:
            found = files.read(data)
            return _HashedModel(found) if isinstance(found, kenlm.HashedNgrams) else cls(*found)  # type: ignore[return-value]
        except files.BadFileError as error:
            raise ModelError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write our own format, with 8 bits for a log-probability or back-off. Raises StorageError."""
        write_whole(Path(path), [files.packed(self.words, self.levels)])

    def save_arpa(self, path: str | os.PathLike[str]) -> None:
        """Write ARPA text, for other tools; nothing is quantised. Raises StorageError."""
        write_whole(Path(path), (line.encode() for line in files.arpa_lines(self.words, self.levels)))

    @property
    def counts(self) -> tuple[int, ...]:
        """How many n-grams of each order there are."""
        return tuple(len(level.words) for level in self.levels)

    def start(self) -> State:
        """The state before the first word of a sentence."""
        return (self._start,)[: self.order - 1]

    def advance(self, state: State, word: str) -> tuple[State, float]:
        """The state after `word`, and its log-probability given what came before."""
        return self.advance_id(state, self.word_id(word))

    def finish(self, state: State) -> float:
        """Log-probability that the sentence ends here."""
        return self.advance_id(state, self._end)[1]

    def score(self, words: Iterable[str]) -> float:
        """Log-probability of a whole sentence, its end included."""
        state, total = self.start(), 0.0
        for word in words:
            state, log_prob = self.advance(state, word)
            total += log_prob
        return total + self.finish(state)

    def perplexity(self, texts: Iterable[str]) -> float:
        """exp of the mean negative log-probability of a token: words, unknown ones too, and ends of sentence."""
        total, tokens = 0.0, 0
        for text in texts:
            words = text.split()
            total += self.score(words)
            tokens += len(words) + 1
        return math.exp(-total / tokens)

    def __contains__(self, word: str) -> bool:
        return self._find(word) >= 0

    def word_id(self, word: str) -> int:
        """The id of `word`, that of `<unk>` if it is not in the vocabulary, -1 if there is no `<unk>` either."""
        index = self._find(word)
        return index if index >= 0 else self._unknown

    def advance_id(self, state: State, word: int) -> tuple[State, float]:
        """`advance` for what `word_id` gave."""
        if word < 0:
            return (), self._rarest
        log_prob, backoff = self._log_probs[0][word], 0.0
        following = [word]
        for length, node in enumerate(state, start=1):
            child = self._child(length, node, word)
            if child >= 0:
                log_prob, backoff = self._log_probs[length][child], 0.0
            elif node >= 0:
                backoff += self._backoffs[length - 1][node]
            following.append(child)
        del following[self.order - 1 :]
        while following and following[-1] < 0:
            following.pop()
        return tuple(following), log_prob + backoff

    def _find(self, word: str) -> int:
        index = bisect_left(self.words, word)
        return index if index < len(self.words) and self.words[index] == word else -1

    def _child(self, length: int, node: int, word: int) -> int:
        """The node that `word` leads to from `node` of order `length`, or -1."""
        if node < 0:
            return -1
        first, words = self._first[length - 1], self._words[length]
        end = first[node + 1]
        index = bisect_left(words, word, first[node], end)
        return index if index < end and words[index] == word else -1


class _HashedModel(NgramModel):
    """A model of which only hashes of the n-grams are known, so that it can be asked but not listed.

    A state holds the ids of the last words, the latest first, as many as the model has as an n-gram.
    """

    def __init__(self, file: kenlm.HashedNgrams) -> None:
        names = files.lower_if_capitals(file.words)
        self._numbers = sorted(range(len(names)), key=names.__getitem__)
        unigrams = np.arange(len(names), dtype=np.int32)
        log_probs, backoffs = (
            (LN10 * values[self._numbers].astype(np.float64)).astype(np.float32)
            for values in (file.log_probs, file.backoffs)
        )
        words, level = sorted(names), Level(unigrams, log_probs, backoffs, np.zeros(len(names) + 1, np.int64))
        files.check(words, [level])
        super().__init__(words, [level])
        self.order = len(file.counts)
        self._tables, self._counts = file.tables, file.counts

    @property
    def counts(self) -> tuple[int, ...]:
        return self._counts

    def save(self, path: str | os.PathLike[str]) -> None:
        raise UsageError(f"{path}: a KenLM model of hash tables cannot be converted; give its ARPA file")

    save_arpa = save

    def advance_id(self, state: State, word: int) -> tuple[State, float]:
        if word < 0:
            return (), self._rarest
        log_prob: float = self._log_probs[0][word]
        key, length = self._numbers[word], 1
        for table, before in zip(self._tables, state, strict=False):
            key = kenlm.combine(key, self._numbers[before])
            found = table.find(key)
            if found is None:
                break
            log_prob, length = LN10 * found[0], length + 1
        following = (word, *state)[: min(length, self.order - 1)]
        return following, log_prob + self._backoff(state, length)

    def _backoff(self, state: State, length: int) -> float:
        """What it costs that only an n-gram of `length` was found: the back-offs of the contexts that are longer."""
        if length > len(state):
            return 0.0
        total, key = 0.0, self._numbers[state[0]]
        if length == 1:
            total += self._backoffs[0][state[0]]
        for longer, (table, before) in enumerate(zip(self._tables, state[1:], strict=False), start=2):
            key = kenlm.combine(key, self._numbers[before])
            if longer >= length and (found := table.find(key)):
                total += LN10 * found[1]
        return total
