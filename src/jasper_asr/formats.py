"""Words with times -> what people keep: plain text, json, NeMo's jsonl, subtitles (srt, vtt), whisper's tsv.

Subtitles follow common practice: at most two lines of 42
characters, 1 to 7 seconds, no more than 17 characters a second where the speaker leaves the time, and two pictures at
25 Hz between one and the next. Segments keep the times at which words were said; only subtitles stay longer.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jasper_asr.align import Word
from jasper_asr.errors import UsageError

LOW_CONFIDENCE = 0.5  # a word below is marked in json: more likely wrong than right


@dataclass(frozen=True)
class Segment:
    """Words that were said without a pause; `start` of the first and `end` of the last, in seconds."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...]


def segments(
    words: Sequence[Word], *, max_chars: int = 84, max_seconds: float = 7.0, pause: float = 0.5
) -> tuple[Segment, ...]:
    """Split where the speaker pauses for `pause` seconds or more, then what is still too long for one subtitle.

    A segment fits on two lines of `max_chars // 2` characters and lasts `max_seconds` at most, unless it is a single
    word. The fewest such segments are taken, and among those the most even ones, with cuts at gaps.
    """
    found: list[Segment] = []
    phrase: list[Word] = []
    for word in words:
        if phrase and word.start - phrase[-1].end >= pause:
            found += _divide(phrase, max_chars // 2, max_seconds)
            phrase = []
        phrase.append(word)
    return (*found, *_divide(phrase, max_chars // 2, max_seconds))


def render(
    format: str,
    *,
    audio_filepath: str,
    duration: float,
    text: str,
    words: Sequence[Word],
    offset: float | None = None,
    characters: bool = False,
    low_confidence: float = LOW_CONFIDENCE,
) -> str:
    """One utterance as the content of a file of `format`, one of FORMATS; ends with a newline unless empty.

    `duration` in seconds, and the `offset` of a part of a file, which json and jsonl name; times count from the part's
    start. `characters` adds those to json and jsonl; words with a confidence below `low_confidence`
    are marked there. jsonl is one line, so lines of several files can follow one another. Raises UsageError for an
    unknown format.
    """
    if format not in _WRITERS:
        raise UsageError(f"format {format!r}: unknown; use one of {', '.join(sorted(FORMATS))}")
    head: _Head = {"audio_filepath": audio_filepath, "duration": round(duration, 3)}
    if offset is not None:
        head["offset"] = round(offset, 3)

    def row(word: Word) -> dict[str, Any]:
        return _word_row(word, characters, low_confidence)

    return _WRITERS[format](head, text, words, row)


_Head = dict[str, Any]
_Row = Callable[[Word], dict[str, Any]]


def _divide(phrase: Sequence[Word], line: int, max_seconds: float) -> list[Segment]:
    """The best way to cut `phrase`: few segments; then even ones, but a gap of 0.2 s is worth a good deal of that."""
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]  # for the first n words: segments, cost, start of the last one
    for end in range(1, len(phrase) + 1):
        options = []
        for start in range(end - 1, -1, -1):
            if start < end - 1 and not _fits(phrase[start:end], line, max_seconds):
                break
            count, cost, _ = best[start]
            gap = phrase[start].start - phrase[start - 1].end if start else 0.0
            fill = len(_text(phrase[start:end])) / (2 * line)
            options.append((count + 1, cost + fill**2 - 2 * gap, start))
        best.append(min(options))
    found: list[Segment] = []
    end = len(phrase)
    while end:
        start = best[end][2]
        words = tuple(phrase[start:end])
        found.append(Segment(words[0].start, words[-1].end, _text(words), words))
        end = start
    return found[::-1]


def _fits(words: Sequence[Word], line: int, max_seconds: float) -> bool:
    if words[-1].end - words[0].start > max_seconds:
        return False
    return all(len(row) <= line for row in _lines(_text(words), line))


def _text(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


_LINE = 42
_SHORTEST, _LONGEST, _GAP = 1000, 7000, 80  # milliseconds
_READING = 17  # characters a second


def _lines(text: str, line: int = _LINE) -> list[str]:
    """`text` on one line if it fits, else on two that are as equal as can be."""
    if len(text) <= line or " " not in text:
        return [text]
    breaks = [index for index, character in enumerate(text) if character == " "]
    middle = min(breaks, key=lambda index: abs(len(text) - 1 - 2 * index))
    return [text[:middle], text[middle + 1 :]]


@dataclass(frozen=True)
class _Cue:
    """A subtitle; times in milliseconds."""

    start: int
    end: int
    lines: list[str]


def _cues(words: Sequence[Word], duration: float) -> list[_Cue]:
    """Subtitles stay as long as reading them takes, if the next one and the end of the file leave the time."""
    parts = segments(words)
    starts = [_milliseconds(part.start) for part in parts]
    cues: list[_Cue] = []
    for number, (part, start) in enumerate(zip(parts, starts, strict=True)):
        last = number == len(parts) - 1
        limit = _milliseconds(duration) if last else starts[number + 1] - min(_GAP, (starts[number + 1] - start) // 2)
        reading = min(max(_SHORTEST, round(1000 * len(part.text) / _READING)), _LONGEST)
        cues.append(_Cue(start, min(max(_milliseconds(part.end), start + reading), limit), _lines(part.text)))
    return cues


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _txt(head: _Head, text: str, words: Sequence[Word], row: _Row) -> str:
    return f"{text}\n"


def _json(head: _Head, text: str, words: Sequence[Word], row: _Row) -> str:
    parts = [
        {**_times(part), "text": part.text, "words": [row(word) for word in part.words]} for part in segments(words)
    ]
    return json.dumps({**head, "text": text, "segments": parts}, ensure_ascii=False, indent=1) + "\n"


def _jsonl(head: _Head, text: str, words: Sequence[Word], row: _Row) -> str:
    return json.dumps({**head, "pred_text": text, "words": [row(word) for word in words]}, ensure_ascii=False) + "\n"


def _srt(head: _Head, text: str, words: Sequence[Word], row: _Row) -> str:
    """SubRip has no escapes: an arrow in the text would be taken for a time line."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{_body(cue.lines).replace('-->', '->')}\n"
        for number, cue in enumerate(_cues(words, head["duration"]), start=1)
    ]
    return "\n".join(blocks)


def _vtt(head: _Head, text: str, words: Sequence[Word], row: _Row) -> str:
    blocks = [
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_escaped(_body(cue.lines))}\n"
        for cue in _cues(words, head["duration"])
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def _tsv(head: _Head, text: str, words: Sequence[Word], row: _Row) -> str:
    rows = [f"{_milliseconds(part.start)}\t{_milliseconds(part.end)}\t{part.text}\n" for part in segments(words)]
    return "".join(["start\tend\ttext\n", *rows])


_WRITERS: dict[str, Callable[[_Head, str, Sequence[Word], _Row], str]] = {
    "txt": _txt,
    "json": _json,
    "jsonl": _jsonl,
    "srt": _srt,
    "vtt": _vtt,
    "tsv": _tsv,
}

FORMATS = frozenset(_WRITERS)
"""The names that `render` takes; each is also the suffix of its files."""


def _word_row(word: Word, characters: bool, low_confidence: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "word": word.text,
        **_times(word),
        "confidence": round(word.confidence, 3),
        "low_confidence": word.confidence < low_confidence,
    }
    if characters:
        row["characters"] = [
            {"character": part.text, **_times(part), "confidence": round(part.confidence, 3)}
            for part in word.characters
        ]
    return row


def _times(part: Any) -> dict[str, float]:
    return {"start": round(part.start, 3), "end": round(part.end, 3)}


def _body(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(milliseconds: int, point: str) -> str:
    seconds, thousandths = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{thousandths:03}"
