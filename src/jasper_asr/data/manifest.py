"""Manifests: which audio files hold which words. Two layouts are read, told apart by their content.

NVIDIA  a JSON array of  {"transcript": "...", "original_duration": 2.0,
                          "files": [{"fname": "wav/a.wav", "duration": 2.0, "speed": 1.0}, ...]}
NeMo    JSON lines of    {"audio_filepath": "wav/a.wav", "duration": 2.0, "text": "...", "offset": 0.0}
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jasper_asr.errors import ManifestError, StorageError


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row of a manifest: a stretch of an audio file and its words. Times are in seconds.

    `audio_path` is where the file is, `audio_filepath` how the manifest spells it. `text` is as written, not
    normalised. An `offset`, even of 0, says that the row is `duration` seconds of a longer file; without one the
    file is the utterance. `source` is "manifest:line", for messages.
    """

    audio_path: Path
    audio_filepath: str
    text: str | None = None
    duration: float | None = None
    offset: float | None = None
    speaker: str | None = None
    source: str = ""

    @property
    def part(self) -> tuple[float, float | None]:
        """(offset, duration) of the file to read; a duration of None is all of it."""
        return (0.0, None) if self.offset is None else (self.offset, self.duration)


def read_manifest(
    path: str | os.PathLike[str],
    *,
    audio_root: str | os.PathLike[str] | None = None,
    allow_outside_root: bool = False,
    speed: float | None = 1.0,
    labelled: bool = True,
) -> list[Utterance]:
    """The utterances of an NVIDIA or a NeMo manifest, in its order; the audio itself is not touched.

    Audio paths are relative to `audio_root`, by default the manifest's folder, and must stay inside it, with
    and without following symbolic links, unless `allow_outside_root`. Of the `files` of an NVIDIA row those
    at `speed` are kept (one without a speed is at 1.0), or all, an utterance each, if `speed` is None.
    Every row needs a text and a duration; with `labelled` False, for transcription, it may lack both.

    Raises:
        ManifestError: a row is wrong, named by file, line and key with the count of further bad rows; or the
            file is not UTF-8, or holds no rows.
        StorageError: the manifest or `audio_root` cannot be read.
    """
    manifest = Path(path)
    text = _read_text(manifest)
    resolve = _resolver(manifest, audio_root, allow_outside_root)
    is_array = text.lstrip().startswith("[")
    utterances: list[Utterance] = []
    bad: list[str] = []
    for line, row in _array_rows(text) if is_array else _line_rows(text):
        try:
            fields = _fields(row)
            source = f"{path}:{line}"
            if is_array:
                utterances.extend(_nvidia_utterances(fields, resolve, speed, source, labelled))
            else:
                utterances.append(_nemo_utterance(fields, resolve, source, labelled))
        except _BadRowError as error:
            bad.append(f"{path}:{line}: {error}")
    if bad:
        more = len(bad) - 1
        raise ManifestError(bad[0] + (f" (and {more} more bad row{'s' if more > 1 else ''})" if more else ""))
    if not utterances:
        raise ManifestError(f"{path}: holds no utterances; write one row for each audio file")
    return utterances


def write_nemo_manifest(path: str | os.PathLike[str], utterances: Iterable[Utterance]) -> None:
    """Write JSON lines that `read_manifest` reads back, atomically.

    A path keeps its spelling where that still leads to the same file from the folder of `path`; otherwise it
    is written relative to that folder, or absolute where it lies outside.

    Raises:
        ManifestError: no utterances, or one without text or without a finite duration.
        StorageError: `path` cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    lines = []
    for utterance in utterances:
        row: dict[str, object] = {
            "audio_filepath": _spelling(utterance, folder),
            "duration": utterance.duration,
            "text": utterance.text,
        }
        for key in ("duration", "text"):
            if row[key] is None:
                raise ManifestError(f"{path}: {utterance.audio_filepath} has no {key}; a manifest needs it")
        if utterance.offset is not None:
            row["offset"] = utterance.offset
        if utterance.speaker is not None:
            row["speaker"] = utterance.speaker
        lines.append(_dumped(path, row) + "\n")
    _write(path, lines, "".join(lines))


def write_nvidia_manifest(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a JSON array of `rows`, dicts in NVIDIA's layout, a row a line, atomically.

    Raises:
        ManifestError: no rows, or a value that JSON cannot hold, NaN among them.
        StorageError: `path` cannot be written.
    """
    lines = [_dumped(path, row) for row in rows]
    _write(path, lines, "[\n" + ",\n".join(lines) + "\n]\n")


class _BadRowError(Exception):
    """Why one row cannot be used: `cause; cure`."""


_Row = dict[str, object]
_Resolve = Callable[[str, str], Path]  # (key, path as spelled) -> path

_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_TYPES = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array"}


def _read_text(manifest: Path) -> str:
    try:
        data = manifest.read_bytes()
    except OSError as error:
        cure = "give the path of a manifest file that can be read"
        raise StorageError(f"{manifest}: cannot be read: {error.strerror}; {cure}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        cause = f"is not UTF-8 text (byte 0x{data[error.start]:02x})"
        raise ManifestError(f"{manifest}:{line}: {cause}; convert the manifest to UTF-8") from None


def _line_rows(text: str) -> Iterator[tuple[int, object]]:
    """(line, value) of every line that is not blank; one that cannot be parsed gives a _BadRowError."""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        try:
            row: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            # The last element is what follows the last newline, so here a writer was stopped.
            is_torn = number == len(lines) and line.startswith("{")
            row = _torn("line") if is_torn else _not_json(error)
        yield number, row


def _array_rows(text: str) -> Iterator[tuple[int, object]]:
    """(line of its start, value) of every element of a JSON array; the first _BadRowError ends it."""
    position = _skip_blank(text, text.index("[") + 1)
    line = text.count("\n", 0, position) + 1
    is_closed = text.startswith("]", position)
    if is_closed:
        rest = _skip_blank(text, position + 1)
        line += text.count("\n", position, rest)
        position = rest
    while not is_closed:
        try:
            row, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, _torn("row") if _at_end(text, error) else _not_json(error)
            return
        yield line, row
        separator = _skip_blank(text, end)
        if text[separator : separator + 1] not in (",", "]"):
            line += text.count("\n", position, separator)
            missing = _BadRowError("a row is not followed by a comma or ]; separate the rows by commas")
            yield line, _torn("row") if separator == len(text) else missing
            return
        is_closed = text[separator] == "]"
        start = _skip_blank(text, separator + 1)
        line += text.count("\n", position, start)
        position = start
    if position < len(text):
        yield line, _BadRowError("text follows the ] that ends the manifest; remove it")


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _at_end(text: str, error: Exception) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())


def _torn(what: str) -> _BadRowError:
    return _BadRowError(f"the last {what} is torn: the file ends inside it; write the manifest again")


def _not_json(error: Exception) -> _BadRowError:
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno} " if error.lineno > 1 else ""
        return _BadRowError(f"is not JSON: {error.msg} at {where}column {error.colno}; mend or remove the row")
    return _BadRowError("is not JSON: a number too long or brackets too deep; mend or remove the row")


def _nemo_utterance(row: _Row, resolve: _Resolve, source: str, labelled: bool) -> Utterance:
    audio_filepath = _string(row, "audio_filepath")
    return Utterance(
        audio_path=resolve("audio_filepath", audio_filepath),
        audio_filepath=audio_filepath,
        text=_string(row, "text") if labelled or _has(row, "text") else None,
        duration=_seconds(row, "duration") if labelled or _has(row, "duration") else None,
        offset=_offset(row),
        speaker=_speaker(row),
        source=source,
    )


def _nvidia_utterances(
    row: _Row, resolve: _Resolve, speed: float | None, source: str, labelled: bool
) -> Iterator[Utterance]:
    files = _required(row, "files")
    if not isinstance(files, list):
        raise _BadRowError(f"key 'files' is {_type(files)}, not an array; list the row's audio files there")
    if not files:
        raise _BadRowError("key 'files' is empty; list the row's audio files there")
    has_text = labelled or _has(row, "transcript") or _has(row, "text_filepath")
    text = _nvidia_text(row, resolve) if has_text else None
    offset, speaker = _offset(row), _speaker(row)
    speeds = []
    for index, entry in enumerate(files):
        prefix = f"files[{index}]."
        if not isinstance(entry, dict):
            raise _BadRowError(f"key 'files[{index}]' is {_type(entry)}, not an object; write it as one")
        speeds.append(_seconds(entry, "speed", prefix) if "speed" in entry else 1.0)
        if speed is not None and speeds[-1] != speed:
            continue
        fname = _string(entry, "fname", prefix)
        yield Utterance(
            audio_path=resolve(f"{prefix}fname", fname),
            audio_filepath=fname,
            text=text,
            duration=_nvidia_duration(row, entry, prefix, speeds[-1], labelled),
            offset=offset,
            speaker=speaker,
            source=source,
        )
    if speed is not None and speed not in speeds:
        found = ", ".join(map(str, speeds))
        raise _BadRowError(f"key 'files' has no file at speed {speed} but at {found}; ask for one of these")


def _nvidia_text(row: _Row, resolve: _Resolve) -> str:
    if row.get("transcript") in (None, "") and "text_filepath" in row:
        name = _string(row, "text_filepath")
        try:
            return resolve("text_filepath", name).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "not UTF-8"
            message = f"key 'text_filepath': {name!r} cannot be read: {cause}; mend it or give a transcript"
            raise _BadRowError(message) from None
    return _string(row, "transcript")


def _nvidia_duration(row: _Row, entry: _Row, prefix: str, speed: float, labelled: bool) -> float | None:
    if "duration" not in entry and "original_duration" in row:
        return _seconds(row, "original_duration") / speed
    if not labelled and not _has(entry, "duration"):
        return None
    return _seconds(entry, "duration", prefix)


def _fields(row: object) -> _Row:
    if isinstance(row, _BadRowError):
        raise row
    if not isinstance(row, dict):
        raise _BadRowError(f'the row is {_type(row)}, not an object; write it as {{"key": value, ...}}')
    return row


def _has(row: _Row, key: str) -> bool:
    return row.get(key) is not None


def _required(row: _Row, key: str, prefix: str = "") -> object:
    if key not in row:
        raise _BadRowError(f"key '{prefix}{key}' is missing; add it")
    return row[key]


def _string(row: _Row, key: str, prefix: str = "") -> str:
    value = _required(row, key, prefix)
    if not isinstance(value, str):
        raise _BadRowError(f"key '{prefix}{key}' is {_type(value)}, not a string; write it in quotes")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRowError(f"key '{prefix}{key}' holds half of a surrogate pair; write it as UTF-8")
    return value


def _seconds(row: _Row, key: str, prefix: str = "", *, least: float | None = None) -> float:
    """A finite number above zero, or from `least` on."""
    value = _required(row, key, prefix)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _BadRowError(f"key '{prefix}{key}' is {_type(value)}, not a number; write it without quotes")
    number = _float(value)
    if math.isfinite(number) and (number > 0 if least is None else number >= least):
        return number
    bound = "above 0" if least is None else f"of {least:g} or more"
    raise _BadRowError(f"key '{prefix}{key}' is {number:g}; give a finite number {bound}")


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no bound
        return math.inf


def _offset(row: _Row) -> float | None:
    return None if row.get("offset") is None else _seconds(row, "offset", least=0)


def _speaker(row: _Row) -> str | None:
    speaker = row.get("speaker")
    if speaker is None:
        return None
    if isinstance(speaker, int) and not isinstance(speaker, bool):
        return str(speaker)
    return _string(row, "speaker")


def _type(value: object) -> str:
    return "null" if value is None else _TYPES.get(type(value), "an object")


def _resolver(manifest: Path, audio_root: str | os.PathLike[str] | None, allow_outside_root: bool) -> _Resolve:
    """A function from a key and its path as spelled to the path below the root."""
    if audio_root is not None and not os.path.isdir(audio_root):
        raise StorageError(f"{audio_root}: is not a folder; give the folder that holds the audio")
    root = os.path.abspath(manifest.parent if audio_root is None else audio_root)
    real_root = os.path.realpath(root)

    # Rows share few folders, so the slow questions to the file system are asked once a folder.
    @cache
    def folder_of(directory: str) -> _Folder:
        path = os.path.normpath(os.path.join(root, directory))
        is_inside = _is_inside(path, root) and _is_inside(os.path.realpath(path), real_root)
        return _Folder(Path(path), is_inside, _links(path) if is_inside else frozenset())

    def resolve(key: str, name: str) -> Path:
        base = name.rpartition("/")[2]
        if base in ("", ".", "..") or "\0" in name:
            raise _BadRowError(f"key '{key}': {name!r} does not name a file; name one")
        folder = folder_of(name[: -len(base)])
        path = folder.path / base
        leads_inside = base not in folder.links or _is_inside(os.path.realpath(path), real_root)
        if allow_outside_root or (folder.is_inside and leads_inside):
            return path
        cure = "move it or pass --allow-outside-root"
        raise _BadRowError(f"key '{key}': {name!r} leaves the audio root {root}; {cure}")

    return resolve


@dataclass(frozen=True, slots=True)
class _Folder:
    path: Path
    is_inside: bool
    links: frozenset[str]  # names of its files that are symbolic links


def _links(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except OSError:  # a folder that is missing or closed is reported when its audio is read
        return frozenset()


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root if root.endswith(os.sep) else root + os.sep)


def _spelling(utterance: Utterance, folder: str) -> str:
    """How a manifest in `folder` names the audio of `utterance`."""
    target = os.path.abspath(utterance.audio_path)
    if os.path.normpath(os.path.join(folder, utterance.audio_filepath)) == target:
        return utterance.audio_filepath
    return os.path.relpath(target, folder) if _is_inside(target, folder) else target


def _dumped(path: str | os.PathLike[str], row: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{path}: a row cannot be written as JSON: {error}; mend its values") from error


def _write(path: str | os.PathLike[str], rows: Sequence[str], text: str) -> None:
    if not rows:
        raise ManifestError(f"{path}: there are no rows to write; give at least one")
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}; check the folder") from error
    except UnicodeEncodeError as error:
        message = f"{path}: a row holds half of a surrogate pair; write its text as UTF-8"
        raise ManifestError(message) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
