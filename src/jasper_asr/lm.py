"""Word n-gram language models: estimated from text, stored small, scored word by word. All logarithms are natural.

    model = estimate(sentences, order=3)
    model.save("text.lm")
    NgramModel.load("text.lm").score("the cat sat".split())

A model is a trie of n-grams with back-off weights (Katz 1987): the probability of a word after a context that
the trie lacks is the context's weight times the probability after the context without its first word.
`estimate` gives interpolated modified Kneser-Ney (Chen and Goodman 1999), pruned by relative entropy (Stolcke 1998).

Three kinds of file are read. Ours is a compressed .npz: the vocabulary, and for each order the n-grams sorted as
a trie (word ids, how many n-grams continue each) with log-probabilities and back-offs as 8-bit indices of codebooks.
The others are ARPA text, plain or gzipped, and KenLM's binaries; both have base 10.
"""

import gzip
import io
import math
import os
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from jasper_asr import kenlm
from jasper_asr.errors import ModelError, StorageError, UsageError
from jasper_asr.files import write_whole

START, END, UNKNOWN = "<s>", "</s>", "<unk>"

State = tuple[int, ...]
"""The words so far, as far as they matter: the node of the last word, of the last two, and so on; -1 for none.

Equal states score every continuation alike, so they may be merged.
"""


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
            data = _contents(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StorageError(f"{path}: cannot be read ({reason}); check the path") from error
        try:
            if data[: len(kenlm.MAGIC)] != kenlm.MAGIC:
                return cls(*_read(bytes(data)))
            found = _read_kenlm(data)
            return _HashedModel(found) if isinstance(found, kenlm.HashedNgrams) else cls(*found)  # type: ignore[return-value]
        except _BadFileError as error:
            raise ModelError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write our own format, with 8 bits for a log-probability or back-off. Raises StorageError."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **_pack(self))
        write_whole(Path(path), [buffer.getvalue()])

    def save_arpa(self, path: str | os.PathLike[str]) -> None:
        """Write ARPA text, for other tools; nothing is quantised. Raises StorageError."""
        write_whole(Path(path), (line.encode() for line in _arpa_lines(self)))

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
        names = _lower_if_capitals(file.words)
        self._numbers = sorted(range(len(names)), key=names.__getitem__)
        unigrams = np.arange(len(names), dtype=np.int32)
        log_probs, backoffs = (
            (_LN10 * values[self._numbers].astype(np.float64)).astype(np.float32)
            for values in (file.log_probs, file.backoffs)
        )
        words, level = sorted(names), Level(unigrams, log_probs, backoffs, np.zeros(len(names) + 1, np.int64))
        _check(words, [level])
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
            log_prob, length = _LN10 * found[0], length + 1
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
                total += _LN10 * found[1]
        return total


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


Floats = NDArray[np.float64]


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
    return NgramModel(words, _levels(parents, last, log_probs, weights))


def _log(probs: Floats) -> Floats:
    """Natural logarithms, with ARPA's -99 for impossible <s>."""
    return np.log(probs, out=np.full(len(probs), -99 * _LN10), where=probs > 0)


_LN10 = math.log(10)


def _levels(
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


class _BadFileError(Exception):
    """What is wrong with a file, and the cure; the caller adds the file's name."""


def _contents(path: str | os.PathLike[str]) -> kenlm.Buffer:
    """A file's bytes; those of a KenLM binary, which may be larger than memory, mapped."""
    with open(path, "rb") as file:
        if file.read(len(kenlm.MAGIC)) == kenlm.MAGIC:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
        file.seek(0)
        return file.read()


def _read_kenlm(data: kenlm.Buffer) -> "_Parts | kenlm.HashedNgrams":
    try:
        file = kenlm.read(data)
    except ValueError as error:
        raise _BadFileError(str(error)) from error
    if isinstance(file, kenlm.HashedNgrams):
        return file
    ids = {word: number for number, word in enumerate(file.words)}
    if len(ids) < len(file.words):
        raise _BadFileError(f"damaged vocabulary; {_AGAIN}")
    sections = [_Grams(*parts) for parts in zip(file.grams, file.log_probs, file.backoffs, strict=True)]
    words, levels = _arrange(ids, sections)
    _check(words, levels)
    return words, levels


_AGAIN = "copy or make it again"
_Parts = tuple[list[str], list[Level]]


def _read(data: bytes) -> _Parts:
    words, levels = _parse(data)
    _check(words, levels)
    return words, levels


def _parse(data: bytes) -> _Parts:
    if data.startswith(b"PK"):
        return _unpack(data)
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise _BadFileError(f"damaged gzip file; {_AGAIN}") from error
    except UnicodeDecodeError as error:
        raise _BadFileError("is neither a language model of ours nor ARPA text; give one of these") from error
    return _parse_arpa(text)


def _pack(model: NgramModel) -> dict[str, NDArray[np.generic]]:
    """A model as the arrays of our format; those of order n end in n."""
    arrays: dict[str, NDArray[np.generic]] = {
        "version": np.array([_VERSION, model.order], np.uint8),
        "vocabulary": np.frombuffer("\n".join(model.words).encode(), np.uint8),
    }
    for n, level in enumerate(model.levels, start=1):
        arrays[f"log_probs{n}"], arrays[f"log_prob_book{n}"] = _quantise(level.log_probs)
        if n > 1:
            arrays[f"words{n}"] = _narrow(level.words)
        if n < model.order:
            arrays[f"backoffs{n}"], arrays[f"backoff_book{n}"] = _quantise(level.backoffs)
            arrays[f"continuations{n}"] = _narrow(np.diff(level.first))
    return arrays


_VERSION = 1


def _narrow(values: NDArray[np.integer]) -> NDArray[np.generic]:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _quantise(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes uint8 [N] and a book float32 [at most 256] in which 0, the back-off of most nodes, is exact.

    Lloyd's algorithm from equal shares of the distinct values, which leaves books of up to 255 values as they are.
    """
    distinct, inverse, weights = np.unique(values, return_inverse=True, return_counts=True)
    weights = np.where(distinct == 0, 0, weights)
    others = distinct[distinct != 0]
    book = others[np.linspace(0, len(others) - 1, min(255, len(others))).round().astype(int)].astype(np.float64)
    for _ in range(30):
        cell = _nearest(distinct, book)
        size = np.bincount(cell, weights, len(book))
        total = np.bincount(cell, weights * distinct, len(book))
        book = np.divide(total, size, out=book.copy(), where=size > 0)
    codes = np.where(distinct == 0, 0, _nearest(distinct, book) + 1).astype(np.uint8)
    return codes[inverse], np.append(0, book).astype(np.float32)


def _nearest(values: NDArray[np.float32], book: Floats) -> NDArray[np.int64]:
    return np.searchsorted((book[1:] + book[:-1]) / 2, values).astype(np.int64)


def _unpack(data: bytes) -> _Parts:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = dict(file)
        return _unpack_arrays(arrays)
    except _BadFileError:
        raise
    except Exception as error:  # a broken zip raises nearly anything, NotImplementedError among them
        raise _BadFileError(f"damaged language model; {_AGAIN}") from error


def _unpack_arrays(arrays: dict[str, NDArray[np.generic]]) -> _Parts:
    """What `_pack` packed. Raises where arrays are missing or disagree."""
    version, order = arrays["version"].tolist()[:2]
    if version != _VERSION:
        raise _BadFileError("language model of another version of this package; update the package")
    vocabulary = arrays["vocabulary"].tobytes().decode().split("\n")
    levels: list[Level] = []
    for n in range(1, order + 1):
        words = arrays[f"words{n}"].astype(np.int32) if n > 1 else np.arange(len(vocabulary), dtype=np.int32)
        log_probs = arrays[f"log_prob_book{n}"].astype(np.float32)[arrays[f"log_probs{n}"].astype(np.int64)]
        backoffs, first = np.zeros(len(words), np.float32), np.zeros(len(words) + 1, np.int64)
        if n < order:
            backoffs = arrays[f"backoff_book{n}"].astype(np.float32)[arrays[f"backoffs{n}"].astype(np.int64)]
            np.cumsum(arrays[f"continuations{n}"].astype(np.int64), out=first[1:])
        levels.append(Level(words, log_probs, backoffs, first))
    if not levels:
        raise ValueError("order 0")
    return vocabulary, levels


def _check(words: Sequence[str], levels: Sequence[Level]) -> None:
    """That a trie is whole, so that scoring cannot leave it. Raises _BadFileError."""
    if len(set(words)) < len(words) or list(words) != sorted(words):
        raise _BadFileError(f"damaged vocabulary; {_AGAIN}")
    for mark in (START, END):
        if mark not in words:
            raise _BadFileError(f"has no {mark}; give a model of sentences")
    for level, upper in zip_longest(levels, levels[1:]):
        size, following = len(level.words), len(upper.words) if upper else 0
        if not size == len(level.log_probs) == len(level.backoffs) == len(level.first) - 1:
            raise _BadFileError(f"damaged: its parts differ in size; {_AGAIN}")
        strays = (level.words < 0) | (level.words >= len(words))
        if level.first[-1] != following or (np.diff(level.first) < 0).any() or strays.any():
            raise _BadFileError(f"damaged: n-grams refer to what is not there; {_AGAIN}")
        if not (np.isfinite(level.log_probs).all() and np.isfinite(level.backoffs).all()):
            raise _BadFileError(f"holds numbers that are not finite; {_AGAIN}")
        if (level.log_probs > 1e-3).any():
            raise _BadFileError(f"holds probabilities above 1; {_AGAIN}")


@dataclass(frozen=True, eq=False)
class _Grams:
    """The N n-grams of one order as a file has them: ids int64 [N, order] in reading order, log10 values [N]."""

    ids: NDArray[np.int64]
    log_probs: NDArray[np.floating]
    backoffs: NDArray[np.floating]


class _Section:
    """The n-grams of one order of an ARPA file in its order: n word ids each, log10 values."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.ids, self.log_probs, self.backoffs = array("q"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self.log_probs)

    def add(self, line: str, ids: dict[str, int]) -> None:
        """Take in one line; words of 1-grams are entered into `ids`. Raises ValueError saying what is wrong."""
        fields = line.split()
        if not 0 <= len(fields) - self.order - 1 <= 1:
            raise ValueError(f"not a {self.order}-gram with its log-probability")
        try:
            self.log_probs.append(float(fields[0]))
            self.backoffs.append(float(fields[-1]) if len(fields) > self.order + 1 else 0.0)
        except ValueError as error:
            raise ValueError("a log-probability or back-off is no number") from error
        for word in fields[1 : self.order + 1]:
            word = UNKNOWN if word == "<UNK>" else word
            if self.order == 1 and ids.setdefault(word, len(ids)) < len(self) - 1:
                raise ValueError(f"a second 1-gram {word}")
            if word not in ids:
                raise ValueError(f"{word} is not among the 1-grams")
            self.ids.append(ids[word])

    def grams(self) -> _Grams:
        """All that was added."""
        ids = np.frombuffer(self.ids, np.int64).reshape(-1, self.order)
        return _Grams(ids, np.frombuffer(self.log_probs), np.frombuffer(self.backoffs))


def _parse_arpa(text: str) -> _Parts:
    """Raises _BadFileError naming the line where there is one."""
    sizes: list[int] = []
    sections: list[_Section] = []
    ids: dict[str, int] = {}
    begun = ended = False
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        try:
            if not begun or not line:
                begun = begun or line == "\\data\\"
            elif line == "\\end\\":
                ended = True
                break
            elif line.startswith("\\"):
                sections.append(_Section(len(sections) + 1))
                if line != f"\\{len(sections)}-grams:":
                    raise ValueError(f"expected \\{len(sections)}-grams:")
            elif sections:
                sections[-1].add(line, ids)
            else:
                sizes.append(int(line.partition("=")[2]))
        except ValueError as error:
            raise _BadFileError(f"line {number}: {error}; correct it") from error
    if not begun:
        raise _BadFileError("is neither a language model of ours nor ARPA text; give one of these")
    if not ended or not sections or sizes != [len(section) for section in sections]:
        raise _BadFileError(f"ends early, or announces other numbers of n-grams than it holds; {_AGAIN}")
    return _arrange(ids, [section.grams() for section in sections])


def _arrange(ids: dict[str, int], sections: Sequence[_Grams]) -> _Parts:
    """The n-grams of a file, which may come in any order, as a trie."""
    names = _lower_if_capitals(list(ids))
    ordered = sorted(names)
    rank = np.empty(len(ids), np.int64)
    rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    keys: list[NDArray[np.int64]] = []
    parents, words, log_probs, backoffs = [], [], [], []
    for section in sections:
        grams = rank[section.ids]
        parent = np.zeros(len(grams), np.int64)
        for level, word in zip([*keys, None], grams.T, strict=True):
            key = parent * len(ids) + word
            if level is not None:
                parent = np.searchsorted(level, key)
                if (level[np.minimum(parent, len(level) - 1)] != key).any():
                    raise _BadFileError(f"a {len(keys) + 1}-gram's first words are no n-gram; {_AGAIN}")
        order = np.argsort(key)
        keys.append(key[order])
        if (np.diff(keys[-1]) == 0).any():
            raise _BadFileError(f"holds a {len(keys)}-gram twice; {_AGAIN}")
        parents.append(parent[order])
        words.append(grams[order, -1])
        log_probs.append(_LN10 * section.log_probs[order].astype(np.float64))
        backoffs.append(_LN10 * section.backoffs[order].astype(np.float64))
    return ordered, _levels(parents, words, log_probs, backoffs)


def _lower_if_capitals(names: list[str]) -> list[str]:
    marks = (START, END, UNKNOWN)
    spoken = "".join(name for name in names if name not in marks)
    if spoken != spoken.upper() or spoken == spoken.lower():
        return names
    return [name if name in marks else name.lower() for name in names]


def _arpa_lines(model: NgramModel) -> Iterator[str]:
    """ARPA text, n-grams in the order of the trie."""
    yield "\\data\\\n"
    yield from (f"ngram {n}={count}\n" for n, count in enumerate(model.counts, start=1))
    contexts = [""]
    first = np.array([0, len(model.words)])
    for n, level in enumerate(model.levels, start=1):
        yield f"\n\\{n}-grams:\n"
        parent = np.repeat(np.arange(len(contexts)), np.diff(first)).tolist()
        grams = [contexts[p] + model.words[word] for p, word in zip(parent, level.words.tolist(), strict=True)]
        for gram, log_prob, backoff in zip(grams, level.log_probs / _LN10, level.backoffs / _LN10, strict=True):
            yield f"{log_prob:.7g}\t{gram}" + (f"\t{backoff:.7g}\n" if n < model.order else "\n")
        contexts, first = [gram + " " for gram in grams], level.first
    yield "\n\\end\\\n"
