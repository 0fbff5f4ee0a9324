"""KenLM's binary language models, format version 5, read without KenLM: probing tables and all four kinds of trie.

    file = read(data)    # Ngrams, for a trie, or HashedNgrams
    file.words           # by KenLM's numbers, <unk> first

The layout, as KenLM's sources have it, little-endian: a header (text of the format, test values, order, multiplier of
the hash tables, kind, count of n-grams of each order), the vocabulary's hashes, the n-grams, the words themselves.
KenLM looks n-grams up from their last word to their first, and so are they stored. A trie can be read out. A probing
table only holds hashes, which cannot be turned back into words: it can be asked, not listed. Logarithms have base 10.
"""

import struct
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Buffer = bytes | mmap
Float32 = NDArray[np.float32]

MAGIC = b"mmap lm http://kheafield.com/code "
"""What every file of KenLM begins with."""


@dataclass(frozen=True, eq=False)
class Ngrams:
    """All n-grams of a trie: for each order their words' numbers int64 [N, order] in reading order, and values [N]."""

    words: list[str]
    grams: list[NDArray[np.int64]]
    log_probs: list[Float32]
    backoffs: list[Float32]


@dataclass(frozen=True, eq=False)
class HashedNgrams:
    """Unigrams as arrays [N] by number of the word, and a hash table for each higher order."""

    words: list[str]
    log_probs: Float32
    backoffs: Float32
    tables: list["HashTable"]
    counts: tuple[int, ...]


class HashTable:
    """A probing table: the entry of a key is at key modulo buckets, or in the next places up to the first empty one."""

    def __init__(self, data: Buffer, start: int, buckets: int, values: int) -> None:
        self._data, self._start, self._buckets = data, start, buckets
        self._entry = struct.Struct("<Q" + "f" * values)

    def find(self, key: int) -> tuple[float, ...] | None:
        """The values of `key`: a log-probability, below the highest order its back-off too; None without an entry."""
        place = key % self._buckets
        for _ in range(self._buckets):
            found, *values = self._entry.unpack_from(self._data, self._start + place * self._entry.size)
            if found == key:
                values[0] = -abs(values[0])  # its sign says whether longer n-grams end so
                return tuple(values)
            if not found:
                return None
            place = place + 1 if place + 1 < self._buckets else 0
        return None

    def check(self) -> None:
        """That all values are finite. Raises ValueError."""
        values = (self._entry.size - 8) // 4
        entry = np.dtype([("key", "<u8"), ("values", "<f4", (values,))])
        entries = _array(self._data, entry, self._buckets, self._start)
        for column in range(values):
            _check_finite(entries["values"][:, column])


def combine(key: int, word: int) -> int:
    """The key of an n-gram from that of its end and the number of the word before; a word's own key is its number."""
    return (key * 8978948897894561157 ^ (1 + word) * 17894857484156487943) & 0xFFFFFFFFFFFFFFFF


def read(data: Buffer) -> Ngrams | HashedNgrams:
    """A file's n-grams. Raises ValueError saying what is wrong, and the cure."""
    header = _read_header(data)
    try:
        return _read_trie(data, header) if header.kind in _TRIES else _read_tables(data, header)
    except (struct.error, IndexError, MemoryError, OverflowError) as error:  # sizes beyond the end of the file
        raise ValueError(_DAMAGED) from error


_VERSION = b"format version 5\n\0\0"
_SANITY = struct.Struct("<3f3IQ")
_FIXED = struct.Struct("<B3xfI?3xI")
_SANITY_VALUES = (0.0, 1.0, -0.5, 1, 0xFFFFFFFF, 0, 1)
_PROBING, _TRIES = 0, (2, 3, 4, 5)
_QUANTISED, _ARRAY = (3, 5), (4, 5)
_CURE = "build it again with today's build_binary, or give its ARPA file"
_DAMAGED = "damaged KenLM binary; copy or build it again"
_MOST_ORDERS = 12


@dataclass(frozen=True)
class _Header:
    kind: int
    multiplier: float
    counts: tuple[int, ...]
    size: int


def _read_header(data: Buffer) -> _Header:
    start = len(MAGIC)
    if data[start : start + len(_VERSION)] != _VERSION:
        said = bytes(data[start : start + 40]).split(b"\n")[0].decode("ascii", "replace")
        raise ValueError(f"is a KenLM binary ({said!r}) other than of format version 5; {_CURE}")
    start = _align(start + len(_VERSION))
    try:
        sanity = _SANITY.unpack_from(data, start)
        order, multiplier, kind, has_words, version = _FIXED.unpack_from(data, start + _SANITY.size)
        counts = struct.unpack_from(f"<{order}Q", data, start + _SANITY.size + _FIXED.size)
    except struct.error as error:
        raise ValueError(_DAMAGED) from error
    if sanity != _SANITY_VALUES:
        raise ValueError(f"is a KenLM binary of another kind of machine; {_CURE}")
    if kind not in (_PROBING, *_TRIES) or version != (kind in _TRIES):
        raise ValueError(f"is a KenLM binary of kind {kind}, version {version}; build it as probing or trie")
    if not has_words:
        raise ValueError(f"is a KenLM binary without its words; {_CURE}")
    if not 2 <= order <= _MOST_ORDERS or not multiplier >= 1 or not 0 < max(counts) < len(data):
        raise ValueError(_DAMAGED)
    return _Header(kind, multiplier, counts, _align(start + _SANITY.size + _FIXED.size + 8 * order))


def _align(size: int) -> int:
    return -(-size // 8) * 8


def _array(data: Buffer | NDArray[np.uint8], kind: npt.DTypeLike, count: int, start: int) -> NDArray[Any]:
    """`count` values from byte `start` on. Raises ValueError where the file has no such part."""
    if count * np.dtype(kind).itemsize > len(data) - start:
        raise ValueError(_DAMAGED)
    return np.frombuffer(data, kind, count, start)


def _read_words(data: Buffer, start: int) -> list[str]:
    """The vocabulary, which ends the file, each word with a null byte."""
    *words, rest = bytes(data[start:]).split(b"\0")
    if rest or not words or words[0] != b"<unk>":
        raise ValueError(_DAMAGED)
    try:
        return [word.decode() for word in words]
    except UnicodeDecodeError as error:
        raise ValueError("has words that are not UTF-8; give an ARPA file in UTF-8") from error


def _check_finite(values: Float32) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"holds numbers that are not finite; {_DAMAGED}")


# probing


def _read_tables(data: Buffer, header: _Header) -> HashedNgrams:
    counts = header.counts
    start = header.size + 8 + _buckets(counts[0], header.multiplier) * 12
    unigrams = _array(data, "<f4", 2 * (counts[0] + 1), start).reshape(-1, 2)
    start += unigrams.nbytes
    tables = []
    for order, count in enumerate(counts[1:], start=2):
        values, buckets = 2 if order < len(counts) else 1, _buckets(count, header.multiplier)
        tables.append(HashTable(data, start, buckets, values))
        start += buckets * (8 + 4 * values)
    if start > len(data):
        raise ValueError(_DAMAGED)
    words = _read_words(data, start)
    if not counts[0] <= len(words) <= counts[0] + 1:  # <unk> is not counted where the ARPA file had none
        raise ValueError(_DAMAGED)
    for table in tables:
        table.check()
    log_probs, backoffs = -np.abs(unigrams[: len(words), 0]), unigrams[: len(words), 1]
    return HashedNgrams(words, log_probs, backoffs, tables, (len(words), *counts[1:]))


def _buckets(count: int, multiplier: float) -> int:
    """Places in a table for `count` entries; the product is one of float32."""
    return max(count + 1, int(np.float32(multiplier) * np.float32(count)))


# tries


@dataclass(frozen=True, eq=False)
class _Books:
    """What codes stand for in a quantised trie: bits and, for each order from 2 on, the values."""

    prob_bits: int
    backoff_bits: int
    probs: list[Float32]
    backoffs: list[Float32]


def _read_trie(data: Buffer, header: _Header) -> Ngrams:
    counts, order = header.counts, len(header.counts)
    array = np.frombuffer(data, np.uint8)
    start = header.size + 8 + 8 * counts[0]
    books = None
    if header.kind in _QUANTISED:
        books, start = _read_books(data, start, order)
    unigrams = _array(data, [("log_prob", "<f4"), ("backoff", "<f4"), ("next", "<u8")], counts[0] + 1, start)
    start += (counts[0] + 2) * unigrams.itemsize
    most_chopped = data[start + 1] if header.kind in _ARRAY else 0
    grams = [np.arange(counts[0])[:, None]]
    log_probs, backoffs = [unigrams["log_prob"][:-1].copy()], [unigrams["backoff"][:-1].copy()]
    first = unigrams["next"].astype(np.int64)
    for n in range(2, order + 1):
        level = _Level(array, header, books, n, start, most_chopped)
        if first[0] != 0 or first[-1] != counts[n - 1] or (np.diff(first) < 0).any():
            raise ValueError(_DAMAGED)
        parent = np.repeat(np.arange(len(first) - 1), np.diff(first))
        word = level.words()
        if (word >= counts[0]).any():
            raise ValueError(_DAMAGED)
        grams.append(np.column_stack([word, grams[-1][parent]]))
        probs, weights = level.values()
        log_probs.append(probs)
        backoffs.append(weights)
        if n < order:
            first = level.first()
        start = level.end
    words = _read_words(data, start)
    if len(words) != counts[0]:
        raise ValueError(_DAMAGED)
    return Ngrams(words, grams, log_probs, backoffs)


def _read_books(data: Buffer, start: int, order: int) -> tuple[_Books, int]:
    """The books and where they end."""
    version, prob_bits, backoff_bits = data[start : start + 3]
    if version != 2 or not (0 < prob_bits <= 25 and 0 < backoff_bits <= 25):
        raise ValueError(f"is a KenLM binary quantised in another way; {_CURE}")
    start += 8
    probs: list[Float32] = []
    backoffs: list[Float32] = []
    for n in range(2, order + 1):
        for bits, values in ((prob_bits, probs), (backoff_bits, backoffs))[: 2 if n < order else 1]:
            values.append(_array(data, "<f4", 1 << bits, start))
            start += 4 << bits
    return _Books(prob_bits, backoff_bits, probs, backoffs), start


class _Level:
    """The entries of one order: the word that comes before the parent's, the values, the first of its own children.

    They are packed bit by bit. With arrays a pointer's upper bits are left out, and a list says from which entry on
    they go up by one.
    """

    def __init__(
        self, data: NDArray[np.uint8], header: _Header, books: _Books | None, n: int, start: int, most_chopped: int
    ) -> None:
        counts, self._n, self._books = header.counts, n, books
        self._count, self._data, self._top = counts[n - 1], data, n == len(counts)
        self._word_bits = counts[0].bit_length()
        prob_bits, backoff_bits = (books.prob_bits, books.backoff_bits) if books else (31, 32)
        self._value_bits = prob_bits if self._top else prob_bits + backoff_bits
        self._next_bits, self._offsets = 0, np.zeros(1, np.int64)
        if not self._top:
            self._next_bits = counts[n].bit_length()
            if header.kind in _ARRAY:
                chopped = _chopped(self._count + 1, counts[n], most_chopped)
                self._next_bits -= chopped
                size = (counts[n] >> self._next_bits) + 1
                aligned = _align(start) + 8
                self._offsets = _array(data, "<u8", size, aligned).astype(np.int64)
                start += 8 * (1 + size) + 7
        self._start = start
        self._total = self._word_bits + self._value_bits + self._next_bits
        self.end = start + ((1 + self._count) * self._total + 7) // 8 + 8
        if self.end > len(data):
            raise ValueError(_DAMAGED)

    def words(self) -> NDArray[np.int64]:
        """int64 [N]."""
        return self._bits(0, self._word_bits, self._count).astype(np.int64)

    def values(self) -> tuple[Float32, Float32]:
        """Log-probabilities and back-offs float32 [N]."""
        at, count, books = self._word_bits, self._count, self._books
        if books:
            backoffs = np.zeros(count, np.float32)
            if not self._top:
                backoffs = books.backoffs[self._n - 2][self._bits(at, books.backoff_bits, count)]
                at += books.backoff_bits
            return books.probs[self._n - 2][self._bits(at, books.prob_bits, count)], backoffs
        probs = (self._bits(at, 31, count) | (1 << 31)).astype(np.uint32).view(np.float32)
        if self._top:
            return probs, np.zeros(count, np.float32)
        return probs, self._bits(at + 31, 32, count).astype(np.uint32).view(np.float32)

    def first(self) -> NDArray[np.int64]:
        """The first child of each entry, and after them the number of children: int64 [N + 1]."""
        count = self._count + 1
        low = self._bits(self._word_bits + self._value_bits, self._next_bits, count).astype(np.int64)
        high = np.searchsorted(self._offsets, np.arange(count), "right") - 1
        return (high << self._next_bits) | low

    def _bits(self, at: int, width: int, count: int) -> NDArray[np.uint64]:
        """Bits `at` to `at` + `width` of the first `count` entries, uint64 [count]; 57 bits at most."""
        values = np.zeros(count, np.uint64)
        for begin in range(0, count, _CHUNK):
            place = np.arange(begin, min(begin + _CHUNK, count)) * self._total + at
            part = values[begin : begin + _CHUNK]
            for byte in range(8):
                part |= self._data[self._start + (place >> 3) + byte].astype(np.uint64) << np.uint64(8 * byte)
            part >>= (place & 7).astype(np.uint64)
        return values & np.uint64((1 << width) - 1)


_CHUNK = 1 << 20


def _chopped(entries: int, most: int, limit: int) -> int:
    """How many upper bits of pointers up to `most` the array takes over: what makes both together smallest."""
    required = most.bit_length()
    return min(range(min(required, limit) + 1), key=lambda chop: (most >> (required - chop)) * 64 - entries * chop)
