"""Language models as files, of three kinds.

Ours is a compressed .npz: the vocabulary, and for each order the n-grams sorted as a trie (word ids, how many n-grams
continue each) with log-probabilities and back-offs as 8-bit indices of codebooks. The others are ARPA text, plain or
gzipped, and KenLM's binaries; both have base 10.
"""

import gzip
import io
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from mmap import ACCESS_READ, mmap

import numpy as np
from numpy.typing import NDArray

from jasper_asr.lm import kenlm
from jasper_asr.lm.trie import END, LN10, START, UNKNOWN, Floats, Level, levels_of


class BadFileError(Exception):
    """What is wrong with a file, and the cure; the caller adds the file's name."""


def contents(path: str | os.PathLike[str]) -> kenlm.Buffer:
    """A file's bytes; those of a KenLM binary, which may be larger than memory, mapped."""
    with open(path, "rb") as file:
        if file.read(len(kenlm.MAGIC)) == kenlm.MAGIC:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
        file.seek(0)
        return file.read()


Parts = tuple[list[str], list[Level]]
"""Sorted vocabulary and the levels of the trie."""


def read(data: kenlm.Buffer) -> Parts | kenlm.HashedNgrams:
    """What a file holds, checked; of a KenLM file with hash tables the tables. Raises BadFileError."""
    found = _read_kenlm(data) if data[: len(kenlm.MAGIC)] == kenlm.MAGIC else _parse(bytes(data))
    if not isinstance(found, kenlm.HashedNgrams):
        check(*found)
    return found


def _read_kenlm(data: kenlm.Buffer) -> Parts | kenlm.HashedNgrams:
    try:
        file = kenlm.read(data)
    except ValueError as error:
        raise BadFileError(str(error)) from error
    if isinstance(file, kenlm.HashedNgrams):
        return file
    ids = {word: number for number, word in enumerate(file.words)}
    if len(ids) < len(file.words):
        raise BadFileError(f"damaged vocabulary; {_AGAIN}")
    sections = [_Grams(*parts) for parts in zip(file.grams, file.log_probs, file.backoffs, strict=True)]
    return _arrange(ids, sections)


_AGAIN = "copy or make it again"


def _parse(data: bytes) -> Parts:
    if data.startswith(b"PK"):
        return _unpack(data)
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise BadFileError(f"damaged gzip file; {_AGAIN}") from error
    except UnicodeDecodeError as error:
        raise BadFileError("is neither a language model of ours nor ARPA text; give one of these") from error
    return _parse_arpa(text)


def packed(words: Sequence[str], levels: Sequence[Level]) -> bytes:
    """A model in our format: a compressed .npz whose arrays of order n end in n."""
    arrays: dict[str, NDArray[np.generic]] = {
        "version": np.array([_VERSION, len(levels)], np.uint8),
        "vocabulary": np.frombuffer("\n".join(words).encode(), np.uint8),
    }
    for n, level in enumerate(levels, start=1):
        arrays[f"log_probs{n}"], arrays[f"log_prob_book{n}"] = _quantise(level.log_probs)
        if n > 1:
            arrays[f"words{n}"] = _narrow(level.words)
        if n < len(levels):
            arrays[f"backoffs{n}"], arrays[f"backoff_book{n}"] = _quantise(level.backoffs)
            arrays[f"continuations{n}"] = _narrow(np.diff(level.first))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


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


def _unpack(data: bytes) -> Parts:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = dict(file)
        return _unpack_arrays(arrays)
    except BadFileError:
        raise
    except Exception as error:  # a broken zip raises nearly anything, NotImplementedError among them
        raise BadFileError(f"damaged language model; {_AGAIN}") from error


def _unpack_arrays(arrays: dict[str, NDArray[np.generic]]) -> Parts:
    """What `packed` packed. Raises where arrays are missing or disagree."""
    version, order = arrays["version"].tolist()[:2]
    if version != _VERSION:
        raise BadFileError("language model of another version of this package; update the package")
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


def check(words: Sequence[str], levels: Sequence[Level]) -> None:
    """That a trie is whole, so that scoring cannot leave it. Raises BadFileError."""
    if len(set(words)) < len(words) or list(words) != sorted(words):
        raise BadFileError(f"damaged vocabulary; {_AGAIN}")
    for mark in (START, END):
        if mark not in words:
            raise BadFileError(f"has no {mark}; give a model of sentences")
    for level, upper in zip_longest(levels, levels[1:]):
        size, following = len(level.words), len(upper.words) if upper else 0
        if not size == len(level.log_probs) == len(level.backoffs) == len(level.first) - 1:
            raise BadFileError(f"damaged: its parts differ in size; {_AGAIN}")
        strays = (level.words < 0) | (level.words >= len(words))
        if level.first[-1] != following or (np.diff(level.first) < 0).any() or strays.any():
            raise BadFileError(f"damaged: n-grams refer to what is not there; {_AGAIN}")
        if not (np.isfinite(level.log_probs).all() and np.isfinite(level.backoffs).all()):
            raise BadFileError(f"holds numbers that are not finite; {_AGAIN}")
        if (level.log_probs > 1e-3).any():
            raise BadFileError(f"holds probabilities above 1; {_AGAIN}")


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


def _parse_arpa(text: str) -> Parts:
    """Raises BadFileError naming the line where there is one."""
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
            raise BadFileError(f"line {number}: {error}; correct it") from error
    if not begun:
        raise BadFileError("is neither a language model of ours nor ARPA text; give one of these")
    if not ended or not sections or sizes != [len(section) for section in sections]:
        raise BadFileError(f"ends early, or announces other numbers of n-grams than it holds; {_AGAIN}")
    return _arrange(ids, [section.grams() for section in sections])


def _arrange(ids: dict[str, int], sections: Sequence[_Grams]) -> Parts:
    """The n-grams of a file, which may come in any order, as a trie."""
    names = lower_if_capitals(list(ids))
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
                    raise BadFileError(f"a {len(keys) + 1}-gram's first words are no n-gram; {_AGAIN}")
        order = np.argsort(key)
        keys.append(key[order])
        if (np.diff(keys[-1]) == 0).any():
            raise BadFileError(f"holds a {len(keys)}-gram twice; {_AGAIN}")
        parents.append(parent[order])
        words.append(grams[order, -1])
        log_probs.append(LN10 * section.log_probs[order].astype(np.float64))
        backoffs.append(LN10 * section.backoffs[order].astype(np.float64))
    return ordered, levels_of(parents, words, log_probs, backoffs)


def lower_if_capitals(names: list[str]) -> list[str]:
    marks = (START, END, UNKNOWN)
    spoken = "".join(name for name in names if name not in marks)
    if spoken != spoken.upper() or spoken == spoken.lower():
        return names
    return [name if name in marks else name.lower() for name in names]


def arpa_lines(words: Sequence[str], levels: Sequence[Level]) -> Iterator[str]:
    """ARPA text, n-grams in the order of the trie."""
    yield "\\data\\\n"
    yield from (f"ngram {n}={len(level.words)}\n" for n, level in enumerate(levels, start=1))
    contexts = [""]
    first = np.array([0, len(words)])
    for n, level in enumerate(levels, start=1):
        yield f"\n\\{n}-grams:\n"
        parent = np.repeat(np.arange(len(contexts)), np.diff(first)).tolist()
        grams = [contexts[p] + words[word] for p, word in zip(parent, level.words.tolist(), strict=True)]
        for gram, log_prob, backoff in zip(grams, level.log_probs / LN10, level.backoffs / LN10, strict=True):
            yield f"{log_prob:.7g}\t{gram}" + (f"\t{backoff:.7g}\n" if n < len(levels) else "\n")
        contexts, first = [gram + " " for gram in grams], level.first
    yield "\n\\end\\\n"
