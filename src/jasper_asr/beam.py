"""CTC prefix beam search over characters, with a word language model: log_probs -> the best texts.

A text's score is

    acoustic + lm_weight * log P_lm(text) + word_bonus * words - unknown_penalty * unknown words + hotwords,

natural logarithms all; the words of hotwords are not unknown. acoustic is the log-probability of the text under CTC
(Graves et al. 2006), summed over every alignment of every label sequence that reads the same once its spaces are
tidied. With a language model `blank_penalty` is first taken off the blank's log-probability in every frame, which is
then normalised again: a language model makes every word dear, so a search leaves words out; this balances it. With an
unlimited beam the search finds the best text exactly; with a limited one it follows Hannun et al. 2014: prefixes of
texts are extended frame by frame, each with its probability of ending in a blank and of ending in its last label.

The model scores a word when it ends. Until then its prefix counts as the likeliest word that begins so (as a
single word, without context): else words would start for free, and be paid for when the beam has already chosen.
In the same way the words that begin a phrase among the hotwords lend it a share of its weight, until it is whole.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jasper_asr.errors import UsageError
from jasper_asr.lm import UNKNOWN, NgramModel, State
from jasper_asr.wer import EditCounts, count_word_edits

LM_WEIGHT, WORD_BONUS, UNKNOWN_PENALTY = 1.0, 0.5, 20.0  # near the lowest WER on real and synthetic unseen voices
BLANK_PENALTY = 1.0  # likewise; benchmarks/README.md has the table

TOKEN_MIN_LOGP = -4.0  # as few errors as at -5 and -6, or fewer, and faster

BEAM_WIDTH = 40
"""Prefixes that are kept. 64 take nearly twice as long and save up to 0.7 points of WER."""


@dataclass(frozen=True)
class Hypothesis:
    """A text without spaces at its ends or two in a row, its score, and the part of it that CTC gave."""

    text: str
    score: float
    acoustic: float


def beam_search(
    log_probs: NDArray[np.floating], length: int, labels: Sequence[str], **options: Any
) -> list[Hypothesis]:
    """One search with the options of BeamSearch, which many searches had better share."""
    return BeamSearch(labels, **options)(log_probs, length)


class BeamSearch:
    """The search with its options, and what it has learnt of the vocabulary: make one, call it for every utterance.

    Without `lm` its weight, bonus and both penalties count for nothing. `hotwords` gives words, and phrases of several,
    a score, added for each time that one is said. A label less likely than `token_min_logp` in a frame is not tried
    there unless it is the likeliest; a prefix that scores `beam_min_logp` below the best is dropped: -inf turns either
    off.
    None is -16 times the weight of the language model, at most -8: no worse on held-out speech than twice as much.
    Raises UsageError for a hotword that cannot be said or has no number for its weight, and for a beam without width.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        lm: NgramModel | None = None,
        beam_width: int = BEAM_WIDTH,
        lm_weight: float = LM_WEIGHT,
        word_bonus: float = WORD_BONUS,
        unknown_penalty: float = UNKNOWN_PENALTY,
        blank_penalty: float = BLANK_PENALTY,
        hotwords: Mapping[str, float] | None = None,
        token_min_logp: float = TOKEN_MIN_LOGP,
        beam_min_logp: float | None = None,
    ) -> None:
        if beam_width < 1:
            raise UsageError(f"beam width {beam_width}: must be at least 1")
        self._scorer = _Scorer(lm, labels, lm_weight, word_bonus, unknown_penalty, hotwords or {})
        if beam_min_logp is None:
            beam_min_logp = -16.0 * max(0.5, lm_weight)  # the more the language model weighs, the more scores spread
        self._blank_penalty = blank_penalty if lm else 0.0
        self._width, self._token_min_logp, self._beam_min_logp = beam_width, token_min_logp, beam_min_logp

    def __call__(self, log_probs: NDArray[np.floating], length: int) -> list[Hypothesis]:
        """The best texts of log_probs float [T', n_classes], best first; frames from `length` on are padding."""
        scorer = self._scorer
        beam, offset = [scorer.root()], 0.0
        rows = _with_less_blank(log_probs[:length].astype(np.float64), self._blank_penalty)
        floor = -math.inf  # what a prefix scores at least that is kept, if the frame is all blank
        for number, frame in enumerate(_frames(rows, self._token_min_logp)):
            offset += frame.offset
            if frame.choices:
                ranked = _extend(beam, number, frame, floor, scorer)
                beam, scale, floor = _prune(ranked, self._width, self._beam_min_logp, scorer)
                offset += scale
            else:
                _stay(beam, frame, scorer.space)
            if number % _TIDY_EVERY == _TIDY_EVERY - 1:
                _forget_dead_ends(beam)
        return _finish(beam, offset, scorer)


@dataclass(frozen=True)
class Trial:
    """The WER, a fraction, that a pair of weights gives."""

    lm_weight: float
    word_bonus: float
    wer: float


def tune(
    log_probs: Sequence[NDArray[np.floating]],
    references: Sequence[str],
    labels: Sequence[str],
    lm: NgramModel,
    grid: Iterable[tuple[float, float]],
    **options: Any,
) -> Iterator[Trial]:
    """What each (lm_weight, word_bonus) of `grid` gives on utterances [T', n_classes]; more options as BeamSearch's."""
    for weight, bonus in grid:
        search = BeamSearch(labels, lm=lm, lm_weight=weight, word_bonus=bonus, **options)
        counts = EditCounts(0, 0, 0, 0)
        for rows, reference in zip(log_probs, references, strict=True):
            counts += count_word_edits(reference, search(rows, len(rows))[0].text)
        yield Trial(weight, bonus, counts.rate)


_TIDY_EVERY = 256  # frames; bounds the memory of hours of audio
_MOST_SPELLINGS = 200_000  # tens of megabytes


class _Spelling:
    """The letters of a word so far, and what they promise."""

    __slots__ = ("ahead", "children", "high", "low", "text")

    def __init__(self, text: str, low: int, high: int, ahead: float) -> None:
        self.text = text
        self.low, self.high = low, high  # the words of the vocabulary that begin so
        self.ahead = ahead  # the best score that a word beginning so has without its context
        self.children: dict[int, _Spelling] = {}


_Ended = tuple[State, float, tuple[str, ...], float]
"""What the end of a word gives: the language model's state, the word's score; of the last words as many as a phrase
among the hotwords begins with, and the share of its weight that they lend.
"""


class _Prefix:
    """A node in the tree of texts: its parent's text and one more label. The root counts as ending in a space.

    `p_blank` and `p_label` hold the probability, relative to the search's offset, of all alignments so far that end
    in a blank and in the label itself; `next_*` collect those of the frame in work, whose number is `frame`.
    """

    __slots__ = (
        "begun", "children", "frame", "hope", "label", "next_blank", "next_label", "p_blank", "p_label", "parent",
        "promise", "settled", "spelling", "state", "word",
    )  # fmt: skip

    def __init__(
        self,
        parent: "_Prefix | None",
        label: int,
        spelling: _Spelling,
        settled: float,
        state: State,
        begun: tuple[str, ...] = (),
        hope: float = 0.0,
    ) -> None:
        self.parent, self.label, self.spelling, self.state = parent, label, spelling, state
        self.settled = settled  # the score of the finished words
        self.begun, self.hope = begun, hope
        self.promise = settled + hope + spelling.ahead
        self.children: dict[int, _Prefix] = {}
        self.word: _Ended | None = None  # what ending the word here gives, once it is asked for
        self.frame = -1
        self.p_blank = self.p_label = self.next_blank = self.next_label = 0.0


class _Scorer:
    """What words are worth, and the tree of prefixes that grows by it."""

    def __init__(
        self,
        lm: NgramModel | None,
        labels: Sequence[str],
        lm_weight: float,
        word_bonus: float,
        unknown_penalty: float,
        hotwords: Mapping[str, float],
    ) -> None:
        _check_hotwords(hotwords, labels)
        self.lm, self.labels = lm, labels
        self.hotwords = {word: weight for word, weight in hotwords.items() if " " not in word}
        self.phrases = {tuple(words.split()): weight for words, weight in hotwords.items() if " " in words}
        self.expected = {word for words in hotwords for word in words.split()}
        self.lm_weight, self.word_bonus, self.unknown_penalty = lm_weight, word_bonus, unknown_penalty
        self.space = labels.index(" ") if " " in labels else -1
        self.words: Sequence[str] = lm.words if lm else ()
        self.unknown = lm.word_id(UNKNOWN) if lm else -1
        # what a letter may add to the promise of its word, which hotwords raise letter by letter, others never
        self.surprise = math.inf if hotwords else max(0.0, self.ahead("", 0, len(self.words)))
        self.empty = _Spelling("", 0, len(self.words), 0.0)
        self.spellings = 0

    def root(self) -> _Prefix:
        """The empty text, where a search begins."""
        if self.spellings > _MOST_SPELLINGS:
            self.empty.children.clear()
            self.spellings = 0
        prefix = _Prefix(None, self.space, self.empty, 0.0, self.lm.start() if self.lm else ())
        prefix.p_blank = 1.0
        return prefix

    def ended(self, prefix: _Prefix) -> _Ended:
        """What the end of the word that `prefix` ends with gives."""
        if prefix.word is None:
            word = prefix.spelling.text
            state, score = self.word(prefix.state, word)
            if self.phrases:
                begun, hope, said = self.follow((*prefix.begun, word))
                prefix.word = state, score + said, begun, hope
            else:
                prefix.word = state, score, (), 0.0
        return prefix.word

    def follow(self, words: tuple[str, ...]) -> tuple[tuple[str, ...], float, float]:
        """`begun` and `hope` after `words`, and the weights of the phrases that end with them."""
        begun: tuple[str, ...] = ()
        hope = said = 0.0
        for phrase, weight in self.phrases.items():
            if words[-len(phrase) :] == phrase:
                said += weight
            for length in range(1, len(phrase)):
                if words[-length:] == phrase[:length]:
                    begun = max(begun, phrase[:length], key=len)
                    hope = max(hope, weight * length / len(phrase))
        return begun, hope, said

    def extend(self, prefix: _Prefix, label: int) -> _Prefix:
        """A new child of `prefix`; a space ends the word."""
        if label == self.space:
            state, score, begun, hope = self.ended(prefix)
            child = _Prefix(prefix, label, self.empty, prefix.settled + score, state, begun, hope)
        else:
            spelling = self.spell(prefix.spelling, label)
            child = _Prefix(prefix, label, spelling, prefix.settled, prefix.state, prefix.begun, prefix.hope)
        prefix.children[label] = child
        return child

    def word(self, state: State, word: str) -> tuple[State, float]:
        """The state after `word`, and what it scores there."""
        score = self.hotwords.get(word, 0.0)
        if self.lm is None:
            return state, score
        index = self.lm.word_id(word)
        state, log_prob = self.lm.advance_id(state, index)
        score += self.lm_weight * log_prob + self.word_bonus
        unexpected = index == self.unknown and word not in self.expected
        return state, score - self.unknown_penalty if unexpected else score

    def end(self, prefix: _Prefix) -> float:
        """What all words of a text that ends here score, and its end."""
        state, score = prefix.state, prefix.settled
        if prefix.spelling.text:
            state, last = self.ended(prefix)[:2]
            score += last
        return score + self.lm_weight * self.lm.finish(state) if self.lm else score

    def spell(self, spelling: _Spelling, label: int) -> _Spelling:
        """`spelling` with one more letter."""
        child = spelling.children.get(label)
        if child is None:
            text = spelling.text + self.labels[label]
            low = bisect_left(self.words, text, spelling.low, spelling.high)
            high = bisect_left(self.words, text + chr(0x10FFFF), low, spelling.high)
            child = spelling.children[label] = _Spelling(text, low, high, self.ahead(text, low, high))
            self.spellings += 1
        return child

    def ahead(self, text: str, low: int, high: int) -> float:
        """The best that words low to high, an unknown word, and hotwords beginning with `text` score out of context."""
        best = 0.0
        if self.lm:
            best = self.word((), UNKNOWN)[1]
            if low < high:
                known = float(self.lm.levels[0].log_probs[low:high].max())
                best = max(best, self.lm_weight * known + self.word_bonus)
        for word in self.expected:
            if word.startswith(text):  # its weight comes letter by letter, or each first letter would fill the beam
                held_back = self.hotwords.get(word, 0.0) * (1 - len(text) / len(word))
                best = max(best, self.word((), word)[1] - held_back)
        return best


def _check_hotwords(hotwords: Mapping[str, float], labels: Sequence[str]) -> None:
    for words, weight in hotwords.items():
        if not words or words != " ".join(words.split()):
            raise UsageError(f"hotword {words!r}: must be a word, or words with single spaces between them")
        if strange := [letter for letter in words if letter not in labels]:
            raise UsageError(f"hotword {words!r}: the model does not write {strange[0]!r}; spell it in its letters")
        if not math.isfinite(weight):
            raise UsageError(f"hotword {words!r}: its weight {weight} must be a number")


class _Frame(NamedTuple):
    """Probabilities of all classes in one frame, relative to the likeliest, and the labels worth trying.

    `offset` is the likeliest's log-probability.
    """

    probs: list[float]
    choices: list[tuple[int, float]]
    offset: float


def _with_less_blank(rows: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Log-probabilities [T', n_classes] whose last class is e^-penalty times as likely beside the others."""
    if not penalty:
        return rows
    rows[:, -1] -= penalty
    normalised: NDArray[np.float64] = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    return normalised


def _frames(rows: NDArray[np.float64], token_min_logp: float) -> Iterator[_Frame]:
    offsets = rows.max(axis=1, keepdims=True)
    probs = np.exp(rows - offsets)
    tried = ((rows > token_min_logp) | (rows == offsets))[:, :-1]
    numbers, labels = np.nonzero(tried)
    choices = list(zip(labels.tolist(), probs[numbers, labels].tolist(), strict=True))
    ends = np.cumsum(tried.sum(axis=1)).tolist()
    for row, first, end, offset in zip(probs.tolist(), [0, *ends], ends, offsets[:, 0].tolist(), strict=False):
        yield _Frame(row, choices[first:end], offset)


_Ranked = tuple[float, _Prefix, int, float]
"""Score so far with the promise of unfinished words; a prefix; -1, or the label of a child of it that is yet to be
made, and the child's probability. Most are never made: they do not survive the frame.
"""


def _stay(beam: Sequence[_Prefix], frame: _Frame, space: int) -> None:
    """A frame in which the blank alone is likely: every prefix stays what it is, and as good as it was."""
    probs, p_blank = frame.probs, frame.probs[-1]
    for prefix in beam:
        total, last = prefix.p_blank + prefix.p_label, prefix.label
        prefix.p_label = total * probs[space] if last == space else prefix.p_label * probs[last]
        prefix.p_blank = total * p_blank


def _extend(beam: Sequence[_Prefix], number: int, frame: _Frame, floor: float, scorer: _Scorer) -> list[_Ranked]:
    """What frame `number` can make of `beam`, the `next_*` of existing prefixes complete.

    As many prefixes as are kept score `floor` and more with the blank of this frame: what scores less is left out.
    """
    space, choices, probs, p_blank = scorer.space, frame.choices, frame.probs, frame.probs[-1]
    p_space = probs[space] if space >= 0 else 0.0
    floor = floor + math.log(p_blank) - scorer.surprise if p_blank else -math.inf
    active: list[_Prefix] = []
    ranked: list[_Ranked] = []
    for prefix in beam:
        last, blank, total = prefix.label, prefix.p_blank, prefix.p_blank + prefix.p_label
        if prefix.frame != number:
            prefix.frame, prefix.next_blank, prefix.next_label = number, 0.0, 0.0
            active.append(prefix)
        prefix.next_blank += total * p_blank
        # where a word is yet to begin, spaces change nothing, with blanks between them or not
        prefix.next_label += total * p_space if last == space else prefix.p_label * probs[last]
        hope, settled, spelling = prefix.hope, prefix.settled, prefix.spelling
        children, spellings = prefix.children, spelling.children
        least = math.exp(floor - prefix.promise)
        for label, prob in choices:
            if label == last:
                if label == space or not blank:
                    continue
                gain = blank * prob
            else:
                gain = total * prob
            child = children.get(label)
            if child is not None:
                if child.frame != number:
                    child.frame, child.next_blank, child.next_label = number, 0.0, 0.0
                    active.append(child)
                child.next_label += gain
            elif label == space:
                if gain:
                    _, score, _, hope_then = scorer.ended(prefix)
                    ranked.append((math.log(gain) + settled + score + hope_then, prefix, label, gain))
            elif gain > least:
                promise = (spellings.get(label) or scorer.spell(spelling, label)).ahead + hope
                ranked.append((math.log(gain) + settled + promise, prefix, label, gain))
    for prefix in active:
        if total := prefix.next_blank + prefix.next_label:
            ranked.append((math.log(total) + prefix.promise, prefix, -1, total))
    return ranked


def _prune(ranked: list[_Ranked], width: int, min_logp: float, scorer: _Scorer) -> tuple[list[_Prefix], float, float]:
    """The best of `ranked`, made current, the logarithm of what their probabilities were divided by, and their floor:
    what each would have to score, had they to be chosen again.
    """
    ranked.sort(key=itemgetter(0), reverse=True)
    least = ranked[0][0] + min_logp
    kept = [item for item in ranked[:width] if item[0] >= least]
    scale = max(prob for _, _, _, prob in kept)
    floor = kept[-1][0] if len(kept) == width else least
    beam = []
    for _, prefix, label, prob in kept:
        if label >= 0:
            prefix = scorer.extend(prefix, label)
            prefix.next_label = prob
        prefix.p_blank, prefix.p_label = prefix.next_blank / scale, prefix.next_label / scale
        beam.append(prefix)
    offset = math.log(scale)
    return beam, offset, floor - offset


def _forget_dead_ends(beam: Sequence[_Prefix]) -> None:
    """Leave in the tree only what leads to `beam`."""
    alive: set[_Prefix] = set()
    for prefix in beam:
        node: _Prefix | None = prefix
        while node and node not in alive:
            alive.add(node)
            node = node.parent
    for prefix in alive:
        prefix.children = {label: child for label, child in prefix.children.items() if child in alive}


def _finish(beam: Sequence[_Prefix], offset: float, scorer: _Scorer) -> list[Hypothesis]:
    """Hypotheses of the last frame's beam; a text with and one without a space after it are the same."""
    probs: dict[_Prefix, float] = {}
    for prefix in beam:
        text = prefix.parent if prefix.parent and prefix.label == scorer.space else prefix
        probs[text] = probs.get(text, 0.0) + prefix.p_blank + prefix.p_label
    found = []
    for prefix, prob in probs.items():
        acoustic = math.log(prob) + offset
        found.append(Hypothesis(_text(prefix, scorer.labels), acoustic + scorer.end(prefix), acoustic))
    return sorted(found, key=attrgetter("score"), reverse=True)


def _text(prefix: _Prefix, labels: Sequence[str]) -> str:
    letters = []
    while prefix.parent:
        letters.append(labels[prefix.label])
        prefix = prefix.parent
    return "".join(reversed(letters))
