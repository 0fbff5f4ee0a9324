import itertools
import json
import math
import tracemalloc
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jasper_asr
from jasper_asr import align as aligning
from jasper_asr.align import LEAD, TAIL, Character, Word, align, spans
from jasper_asr.audio import load_audio
from jasper_asr.decode import greedy
from jasper_asr.errors import UsageError
from jasper_asr.text import LABELS

FEW = (" ", "a", "b")


def random_log_probs(seed, frames, classes, spread=2.0):
    logits = np.random.default_rng(seed).normal(0, spread, (frames, classes))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def spell(path, best=0.9, labels=LABELS):
    """log_probs float32 whose best path is `path`, with probability `best` in every frame; `-` is the blank."""
    ids = [len(labels) if letter == "-" else labels.index(letter) for letter in path]
    probs = np.full((len(ids), len(labels) + 1), (1 - best) / len(labels))
    probs[np.arange(len(ids)), ids] = best
    return np.log(probs).astype(np.float32)


def tidy(path, labels):
    return " ".join("".join(labels[k] for k, _ in groupby(path) if k != len(labels)).split())


def spoken_runs(path, labels):
    """First and last frame of each run of a class that is neither the space nor the blank."""
    runs, frame = [], 0
    for k, group in groupby(path):
        size = len(list(group))
        if k != len(labels) and labels[k] != " ":
            runs.append([frame, frame + size - 1])
        frame += size
    return runs


def best_path_by_enumeration(log_probs, text, labels):
    """The likeliest of all paths of classes that read `text`, or None: the definition."""
    rows = log_probs.tolist()
    paths = itertools.product(range(len(labels) + 1), repeat=len(rows))
    fitting = (path for path in paths if tidy(path, labels) == text)
    return max(fitting, key=lambda path: sum(row[k] for row, k in zip(rows, path, strict=True)), default=None)


@given(
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.text(st.sampled_from("ab "), max_size=6),
    st.sampled_from([(2**19, 16), (30, 2), (1, 3)]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_enumeration_of_all_paths(frames, seed, text, bounds):
    """Also where the path is found in blocks of blocks."""
    text = " ".join(text.split())
    log_probs = random_log_probs(seed, frames, 4)
    expected = best_path_by_enumeration(log_probs, text, FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligning, "_CELLS", bounds[0])
        patch.setattr(aligning, "_BLOCKS", bounds[1])
        if expected is None:
            with pytest.raises(UsageError, match="characters: needs"):
                spans(log_probs, text, FEW)
        else:
            assert spans(log_probs, text, FEW).tolist() == spoken_runs(expected, FEW)


@given(st.integers(0, 60), st.integers(0, 2**32 - 1), st.floats(0, 4))
@settings(deadline=None)
def test_the_best_path_needs_no_search(frames, seed, blankness):
    log_probs = random_log_probs(seed, frames, len(LABELS) + 1)
    log_probs[:, [0, -1]] += blankness
    text = greedy(log_probs, frames, LABELS)
    known = spans(log_probs, text, LABELS)
    assert known.tolist() == spoken_runs(log_probs.argmax(axis=1).tolist(), LABELS)
    if text:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(aligning, "greedy", lambda *_: None)
            assert np.array_equal(spans(log_probs, text, LABELS), known)


def test_long_texts_take_little_memory():
    """1800 frames x 1203 states: 17 MB of scores, if all were kept. In blocks, the same path takes a fraction."""
    frames = 1800
    letters = np.random.default_rng(3).integers(1, 27, 600)
    text = "".join(LABELS[letter] for letter in letters)
    log_probs = random_log_probs(4, frames, len(LABELS) + 1)
    log_probs[np.arange(1, frames, 3), letters] += 3  # not enough to win everywhere
    tracemalloc.start()
    found = spans(log_probs, text, LABELS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligning, "_CELLS", 10**9)
        assert np.array_equal(spans(log_probs, text, LABELS), found)
    assert (found[:, 0] <= np.arange(1, frames, 3)).mean() > 0.8


def test_times_by_hand():
    words = align(spell("--hii--  -yo-"), "hi yo", LABELS, seconds_per_frame=0.1, duration=1.3)
    assert [word.text for word in words] == ["hi", "yo"]
    hi, yo = words
    assert hi.start == pytest.approx(0.2 - LEAD)
    assert hi.end == pytest.approx(0.4 + TAIL)
    assert yo.start == pytest.approx(1.0 - LEAD)
    assert yo.end == pytest.approx(1.1 + TAIL)
    h, i = hi.characters
    assert (h.text, h.start, i.text, i.end) == ("h", hi.start, "i", hi.end)
    assert h.end == i.start == pytest.approx(0.25)  # midway between h's last frame and i's first


def test_neighbours_share_what_is_too_little_for_both():
    """Two frames of 20 ms from one word to the next: TAIL and LEAD do not fit between, so they shrink alike."""
    one, two = align(spell("a b"), "a b", LABELS, seconds_per_frame=0.02, duration=1.0)
    assert one.end == two.start == pytest.approx(0.04 * TAIL / (TAIL + LEAD))


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_offset_moves_every_time(offset):
    words = align(spell("-a-  b--"), "a b", LABELS, seconds_per_frame=0.1, duration=2.0, offset=offset)
    assert [word.start for word in words] == pytest.approx([0.1 - LEAD + offset, 0.5 - LEAD + offset])


def test_times_stay_inside_the_file():
    words = align(spell("a--b"), "ab", LABELS, seconds_per_frame=0.1, duration=0.32)
    assert (words[0].start, words[0].end) == (0.0, 0.32)


@given(
    st.integers(12, 60),
    st.integers(0, 2**32 - 1),
    st.text(st.sampled_from("ab c"), max_size=9),
    st.sampled_from([0.02, 0.04]),
    st.booleans(),
)
@settings(deadline=None)
def test_monotone_inside_and_complete(frames, seed, text, stride, with_lm):
    assume(len(text) + sum(one == two for one, two in pairwise(text)) <= frames)  # a blank between equal letters
    log_probs = random_log_probs(seed, frames, len(LABELS) + 1)
    duration = (frames - 1) * stride
    words = align(log_probs, text, LABELS, seconds_per_frame=stride, duration=duration, with_lm=with_lm)
    assert [word.text for word in words] == text.split()
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert all(0 <= time <= duration for time in times)
    for word in words:
        assert word.start < word.end
        assert "".join(character.text for character in word.characters) == word.text
        assert (word.characters[0].start, word.characters[-1].end) == (word.start, word.end)
        assert all(one.end == two.start for one, two in pairwise(word.characters))
        assert all(character.start <= character.end for character in word.characters)
        peaks = [character.confidence for character in word.characters]
        assert 0 < word.confidence <= 1
        product = math.prod(peaks)
        assert word.confidence == pytest.approx(product ** (1 / len(peaks)) if with_lm else product)


def test_confidence_is_the_highest_posterior_of_a_letters_own_frames():
    log_probs = spell("aa-b")
    log_probs[1] = spell("a", best=0.7)
    log_probs[3] = spell("b", best=0.5)
    (word,) = align(log_probs, "ab", LABELS, seconds_per_frame=0.1, duration=1.0)
    assert [part.confidence for part in word.characters] == pytest.approx([0.9, 0.5])
    assert word.confidence == pytest.approx(0.45)
    (word,) = align(log_probs, "ab", LABELS, seconds_per_frame=0.1, duration=1.0, with_lm=True)
    assert word.confidence == pytest.approx(math.sqrt(0.45))


def test_confidence_of_a_text_that_is_not_the_best_path():
    (word,) = align(spell("-c-t-"), "cat", LABELS, seconds_per_frame=0.1, duration=1.0)
    assert [part.text for part in word.characters] == ["c", "a", "t"]
    assert [part.confidence for part in word.characters] == pytest.approx([0.9, 0.1 / 28, 0.9])


@pytest.mark.parametrize("text", ["", "   "])
def test_no_words(text):
    assert align(spell("--a-"), text, LABELS, seconds_per_frame=0.1, duration=1.0) == ()
    assert align(spell(""), text, LABELS, seconds_per_frame=0.1, duration=0.0) == ()


def test_white_space_in_the_text_means_nothing():
    times = {"seconds_per_frame": 0.1, "duration": 1.0}
    log_probs = spell(" -a  b- ")
    assert align(log_probs, "  a\n b ", LABELS, **times) == align(log_probs, "a b", LABELS, **times)


def test_other_labels_and_none_for_the_space():
    log_probs = spell("é-ß", labels=("é", "ß"))
    (word,) = align(log_probs, "éß", ("é", "ß"), seconds_per_frame=1.0, duration=3.0)
    assert word.characters[1] == Character("ß", 1.0, 2.0 + TAIL, pytest.approx(0.9))
    assert isinstance(word, Word)


def test_errors():
    times = {"seconds_per_frame": 0.1, "duration": 1.0}
    with pytest.raises(UsageError, match=r"^character 'é': is not a label of the model; normalise the text first$"):
        align(spell("caf-"), "café", LABELS, **times)
    message = r"^a text of 5 characters: needs 6 frames, the model gave 5$"  # a blank between the two l
    with pytest.raises(UsageError, match=message):
        align(spell("-----"), "hello", LABELS, **times)


@pytest.fixture(scope="module")
def mini():
    with jasper_asr.load("mini", threads=1) as transcriber:
        yield transcriber


@pytest.fixture(scope="module")
def clips(data):
    """Synthetic speech (flite; three voices) with the word times that the synthesiser gives."""
    rows = [json.loads(line) for line in (data / "words" / "manifest.jsonl").read_text().splitlines()]
    return [(load_audio(data / "words" / row["audio_filepath"]), row["text"], row["words"]) for row in rows]


def errors(transcriber, samples, text, times):
    """Absolute errors in seconds of the starts and ends of the words of a known text, float [words, 2]."""
    log_probs, lens = transcriber.log_probs([samples])
    seconds_per_frame = transcriber.config.stride * transcriber.config.features.window_stride
    words = align(
        log_probs[0, : lens[0]],
        text,
        transcriber.config.labels,
        seconds_per_frame=seconds_per_frame,
        duration=len(samples) / 16000,
    )
    return np.array([(abs(w.start - start), abs(w.end - end)) for w, (_, start, end) in zip(words, times, strict=True)])


def test_word_times_of_synthetic_speech(mini, clips):
    found = np.concatenate([errors(mini, *clip) for clip in clips])
    assert len(found) == 37
    assert (found.mean(axis=0) < 0.08).all()


def test_word_times_among_known_silences(mini, clips):
    parts, text, times, length = [], [], [], 0
    for index, (samples, words, known) in enumerate(clips):
        silence = np.zeros(16000 + 8000 * index, np.float32)
        length += len(silence)
        times += [(word, start + length / 16000, end + length / 16000) for word, start, end in known]
        length += len(samples)
        parts += [silence, samples]
        text.append(words)
    found = errors(mini, np.concatenate(parts), " ".join(text), times)
    assert (found.mean(axis=0) < 0.08).all()
