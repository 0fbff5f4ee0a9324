import html
import itertools
import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jasper_asr.align import Character, Word
from jasper_asr.errors import UsageError
from jasper_asr.formats import FORMATS, render, segments


def speak(text, *, start=0.0, length=0.3, gap=0.05, confidence=0.9):
    """Words of equal length, one after the other."""
    words = []
    for word in text.split():
        letters = tuple(Character(letter, start, start + length, confidence) for letter in word)
        words.append(Word(word, start, start + length, confidence, letters))
        start += length + gap
    return tuple(words)


def write(format, words, *, duration=None, **options):
    duration = (words[-1].end if words else 1.0) if duration is None else duration
    text = " ".join(word.text for word in words)
    return render(format, audio_filepath="a/b.flac", duration=duration, text=text, words=words, **options)


def parse_cues(content, point):
    """(start, end, lines) in milliseconds, by a reading of the format that knows nothing of how we write it."""
    stamp = rf"(\d{{2,}}):([0-5]\d):([0-5]\d){re.escape(point)}(\d{{3}})"
    cues = []
    for block in content.strip("\n").split("\n\n") if content.strip() else []:
        lines = block.split("\n")
        if point == ",":
            assert lines.pop(0) == str(len(cues) + 1)
        found = re.fullmatch(rf"{stamp} --> {stamp}", lines.pop(0))
        assert found
        h1, m1, s1, t1, h2, m2, s2, t2 = map(int, found.groups())
        assert lines
        assert all(lines)
        start = ((h1 * 60 + m1) * 60 + s1) * 1000 + t1
        cues.append((start, ((h2 * 60 + m2) * 60 + s2) * 1000 + t2, lines))
    return cues


def parse_srt(content):
    return parse_cues(content, ",")


def parse_vtt(content):
    header, _, rest = content.partition("\n\n") if "\n\n" in content else (content.strip(), "", "")
    assert header == "WEBVTT"
    assert not re.search(r"[<>]|&(?!amp;|lt;|gt;)", re.sub(r"(?m)^[\d:.]+ --> [\d:.]+$", "", rest))
    return [(start, end, [html.unescape(line) for line in lines]) for start, end, lines in parse_cues(rest, ".")]


@st.composite
def spoken(draw):
    """Words that follow one another, with gaps and pauses, none empty, times as align gives them."""
    time, words = draw(st.floats(0, 4000)), []
    for length in draw(st.lists(st.integers(1, 15), max_size=40)):
        time += draw(st.sampled_from([0.0, 0.0, 0.04, 0.2, 0.5, 3.0]))
        end = time + draw(st.sampled_from([0.08, 0.2, 0.5, 1.0]))
        words.append(Word(draw(st.text(st.sampled_from("ab'<&>-"), min_size=length, max_size=length)), time, end, 0.5))
        time = end
    return tuple(words)


@given(spoken())
@settings(max_examples=50, deadline=None)
def test_segments_keep_every_word_and_fit_a_subtitle(words):
    found = segments(words)
    assert [word for part in found for word in part.words] == list(words)
    for part in found:
        assert (part.start, part.end) == (part.words[0].start, part.words[-1].end)
        assert part.text == " ".join(word.text for word in part.words)
        assert all(two.start - one.end < 0.5 for one, two in pairwise(part.words))
        assert part.end - part.start <= 7.0
        assert len(part.text) <= 85
    for one, two in pairwise(found):
        assert one.end <= two.start


@given(spoken())
@settings(max_examples=50, deadline=None)
def test_no_fewer_segments_would_do(words):
    """Against taking as many words as fit, which gives the fewest."""
    count, begin = 0, 0
    while begin < len(words):
        end = begin + 1
        while end < len(words) and fits(words[begin : end + 1]):
            end += 1
        count, begin = count + 1, end
    assert len(segments(words)) == count


def fits(words):
    texts = [word.text for word in words]
    two_lines = any(max(len(" ".join(texts[:n])), len(" ".join(texts[n:]))) <= 42 for n in range(len(texts)))
    pause = any(two.start - one.end >= 0.5 for one, two in pairwise(words))
    return two_lines and not pause and words[-1].end - words[0].start <= 7.0


@given(spoken())
@settings(max_examples=50, deadline=None)
def test_subtitles_read_back(words):
    duration = words[-1].end + 0.3 if words else 1.0
    cues = parse_srt(write("srt", words, duration=duration))
    vtt = parse_vtt(write("vtt", words, duration=duration))
    assert [cue[:2] for cue in vtt] == [cue[:2] for cue in cues]
    assert [" ".join(lines) for *_, lines in vtt] == [part.text for part in segments(words)]
    assert [" ".join(lines) for *_, lines in cues] == [part.text.replace("-->", "->") for part in segments(words)]
    for start, end, lines in cues:
        assert start < end <= round(duration * 1000)
        assert end - start <= 7001
        assert len(lines) <= 2
        assert all(len(line) <= 42 for line in lines)
    for (start, end, lines), (following, *_) in pairwise(cues):
        assert end + min(80, (following - start) // 2) <= following
        wanted = min(max(1000, 1000 * len(" ".join(lines)) / 17), 7000)
        assert end - start >= wanted - 1 or following - end <= 80  # as long as reading takes, or until the next


def test_pauses_split():
    words = (*speak("one two"), *speak("three", start=1.3), *speak("four", start=2.0))
    assert [part.text for part in segments(words)] == ["one two", "three four"]
    assert [part.text for part in segments(words, pause=0.39)] == ["one two", "three", "four"]
    assert [part.text for part in segments(words, pause=9)] == ["one two three four"]
    assert segments(()) == ()


def test_limits_are_the_callers():
    words = speak("aa bb cc dd ee ff gg hh")
    assert [part.text for part in segments(words, max_chars=10)] == ["aa bb cc dd", "ee ff gg hh"]
    assert [part.text for part in segments(words, max_seconds=0.9)] == ["aa bb", "cc dd", "ee ff", "gg hh"]


def test_a_cut_falls_where_the_speaker_takes_breath():
    first, second = "this sentence is not quite as long as the other one", "and here goes the one that is the longer"
    words = (*speak(first, length=0.1), *speak(second, start=2.0, length=0.1))
    assert 0.2 < words[11].start - words[10].end < 0.5
    assert [part.text for part in segments(words)] == [first, second]


def test_a_single_word_is_never_cut():
    words = (Word("a" * 90, 0.0, 9.0, 0.5), Word("b", 9.0, 9.1, 0.5))
    assert [part.text for part in segments(words)] == ["a" * 90, "b"]
    assert parse_srt(write("srt", words))[0][2] == ["a" * 90]


def test_lines_are_balanced():
    (cue,) = parse_srt(write("srt", speak("the quick brown fox jumps over the lazy dog and runs", gap=0.0)))
    assert cue[2] == ["the quick brown fox jumps", "over the lazy dog and runs"]
    (cue,) = parse_srt(write("srt", speak("exactly forty two characters are one line")))
    assert cue[2] == ["exactly forty two characters are one line"]


def test_srt():
    words = (*speak("hello there"), *speak("general", start=3661.0006))
    assert write("srt", words, duration=3661.8) == (
        "1\n00:00:00,000 --> 00:00:01,000\nhello there\n\n2\n01:01:01,001 --> 01:01:01,800\ngeneral\n"
    )


def test_vtt():
    words = (Word("a&b", 59.9996, 60.2, 0.5), Word("<i>", 60.2, 60.4, 0.5), Word("-->", 60.4, 61.9999, 0.5))
    assert write("vtt", words, duration=70) == "WEBVTT\n\n00:01:00.000 --> 00:01:02.000\na&amp;b &lt;i&gt; --&gt;\n"


@pytest.mark.parametrize(
    ("seconds", "stamp"),
    [
        (0.0004, "00:00:00,000"),
        (0.9996, "00:00:01,000"),
        (59.9996, "00:01:00,000"),
        (3599.9999, "01:00:00,000"),
        (359999.9994, "99:59:59,999"),
        (360000, "100:00:00,000"),
    ],
)
def test_stamps_round_and_carry(seconds, stamp):
    assert write("srt", (Word("a", seconds, seconds + 2, 0.5),)).split("\n")[1].split(" ")[0] == stamp


def test_tsv_is_in_milliseconds():
    words = (*speak("one two"), *speak("three", start=1.2345))
    assert write("tsv", words) == "start\tend\ttext\n0\t650\tone two\n1234\t1534\tthree\n"


def test_txt():
    assert write("txt", speak("hello there")) == "hello there\n"


def test_json():
    words = (*speak("one two", confidence=0.91234), *speak("three", start=2.0, confidence=0.4999))
    document = json.loads(write("json", words, duration=2.34567))
    assert document == {
        "audio_filepath": "a/b.flac",
        "duration": 2.346,
        "text": "one two three",
        "segments": [
            {
                "start": 0.0,
                "end": 0.65,
                "text": "one two",
                "words": [
                    {"word": "one", "start": 0.0, "end": 0.3, "confidence": 0.912, "low_confidence": False},
                    {"word": "two", "start": 0.35, "end": 0.65, "confidence": 0.912, "low_confidence": False},
                ],
            },
            {
                "start": 2.0,
                "end": 2.3,
                "text": "three",
                "words": [{"word": "three", "start": 2.0, "end": 2.3, "confidence": 0.5, "low_confidence": True}],
            },
        ],
    }


def test_jsonl_is_one_line_with_nemos_names():
    content = write("jsonl", speak("né \u2028"))
    assert content.count("\n") == 1
    assert content.endswith("\n")
    assert json.loads(content) == {
        "audio_filepath": "a/b.flac",
        "duration": 0.3,
        "pred_text": "né",
        "words": [{"word": "né", "start": 0.0, "end": 0.3, "confidence": 0.9, "low_confidence": False}],
    }


@pytest.mark.parametrize("format", ["json", "jsonl"])
def test_characters_and_threshold_by_request(format):
    document = json.loads(write(format, speak("ab"), characters=True, low_confidence=0.95))
    (word,) = document["words"] if format == "jsonl" else document["segments"][0]["words"]
    assert word["low_confidence"] is True
    assert word["characters"] == [{"character": letter, "start": 0.0, "end": 0.3, "confidence": 0.9} for letter in "ab"]


@pytest.mark.parametrize(
    ("format", "content"),
    [("txt", "\n"), ("srt", ""), ("vtt", "WEBVTT\n"), ("tsv", "start\tend\ttext\n")],
)
def test_silence(format, content):
    assert write(format, ()) == content


def test_formats_are_these():
    assert {"txt", "json", "jsonl", "srt", "vtt", "tsv"} == FORMATS
    with pytest.raises(UsageError, match=r"^format 'doc': unknown; use one of json, jsonl, srt, tsv, txt, vtt$"):
        write("doc", ())


def test_an_hour_of_words_is_quick():
    texts = itertools.islice(itertools.cycle(["a", "word", "after", "another"]), 9000)
    words = tuple(Word(text, 0.4 * i, 0.4 * i + 0.4, 0.5) for i, text in enumerate(texts))
    cues = parse_srt(write("srt", words))
    assert " ".join(" ".join(lines) for *_, lines in cues) == " ".join(word.text for word in words)
    assert len(cues) < 1.1 * 3600 / 7


def test_a_part_of_a_file_says_where_it_starts():
    """As in NeMo's manifests; a whole file has no offset."""
    about = {"audio_filepath": "a.wav", "duration": 1.5, "text": "hi", "words": [Word("hi", 0.1, 0.4, 0.9)]}
    assert json.loads(render("jsonl", **about, offset=2.25))["offset"] == 2.25
    assert json.loads(render("json", **about, offset=2.25))["offset"] == 2.25
    assert "offset" not in json.loads(render("jsonl", **about))
