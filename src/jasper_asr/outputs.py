"""Results on disk: files for each recording, or one file for all; and a journal, so that a killed run can go on.

What is done is known from the journal alone, an object a line: the input, what its result came from (name, size and
time of the file, a fingerprint of the options), and what was made of it. It counts while all of that is still so.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from jasper_asr.errors import StorageError, UsageError
from jasper_asr.files import write_whole
from jasper_asr.inputs import Input, output_stems

JOURNAL = ".jasper-journal.jsonl"


class Journal:
    """What is done, by input: a `stamp` of what it was made from, and what was made; both are JSON.

    A line that is torn or damaged counts as not there. Raises StorageError when the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read_entries(path)
        if path.exists():  # again, without what is torn, damaged or overtaken
            write_whole(path, (_line(key, *entry) for key, entry in self._entries.items()))

    def find(self, key: str, stamp: Mapping[str, Any]) -> Any:
        """What was made of the input `key` from just this, or None."""
        known, made = self._entries.get(key, (None, None))
        return made if known == stamp else None

    def add(self, key: str, stamp: Mapping[str, Any], made: Any) -> None:
        """Take it down at once, in a single write."""
        try:
            with open(self._path, "ab", buffering=0) as file:
                file.write(_line(key, stamp, made))
        except OSError as error:
            raise _unwritable(self._path, error) from error


class OutputFolder:
    """A file for each input and format, named after the input, below `folder`.

    `render(format, item, result)` gives a file's content; `options` is a fingerprint of all that it depends on beside
    the audio. With `resume` what an earlier run has made is kept if it is intact. `protected` are paths that must not
    be written over. Raises StorageError, and UsageError for names that clash.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[Input],
        formats: Sequence[str],
        render: Callable[[str, Input, Any], str],
        *,
        options: str,
        resume: bool,
        protected: Sequence[str | Path] = (),
    ) -> None:
        self._folder, self._formats, self._render, self._resume = folder, formats, render, resume
        self._stems = dict(zip(map(_key, inputs), output_stems(inputs), strict=True))
        self._stamps = {_key(item): _stamp(item, options) for item in inputs}
        given = {os.path.abspath(path) for path in protected}
        for stem in self._stems.values():
            for name in self._names(stem):
                if os.path.abspath(folder / name) in given:
                    raise UsageError(f"{folder / name}: is an input and would be written over; give another folder")
        _make_folder(folder)
        self._journal = Journal(folder / JOURNAL)

    def holds(self, item: Input) -> bool:
        """Whether the files of `item` are there, whole, and made from the same audio and options."""
        key = _key(item)
        made = self._journal.find(key, self._stamps[key]) if self._resume else None
        names = map(str, self._names(self._stems[key]))
        return made is not None and all(self._is_intact(name, made.get(name)) for name in names)

    def add(self, item: Input, result: Any) -> None:
        key = _key(item)
        made = {}
        for format, name in zip(self._formats, self._names(self._stems[key]), strict=True):
            content = encoded(self._render(format, item, result))
            _make_folder((self._folder / name).parent)
            write_whole(self._folder / name, [content])
            made[str(name)] = hashlib.sha256(content).hexdigest()
        self._journal.add(key, self._stamps[key], made)

    def finish(self) -> None:
        """Nothing is left to do."""

    def _names(self, stem: PurePath) -> list[PurePath]:
        return [stem.with_name(f"{stem.name}.{format}") for format in self._formats]

    def _is_intact(self, name: str, digest: str | None) -> bool:
        try:
            return hashlib.sha256((self._folder / name).read_bytes()).hexdigest() == digest
        except OSError:
            return False


class OutputFile:
    """One file for all inputs, in their order, written whole by `finish`; until then the journal beside it has them.

    Parameters as in OutputFolder. Raises StorageError, and UsageError if `path` is an input.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[Input],
        render: Callable[[Input, Any], str],
        *,
        options: str,
        resume: bool,
        protected: Sequence[str | Path] = (),
    ) -> None:
        if os.path.abspath(path) in {os.path.abspath(name) for name in protected}:
            raise UsageError(f"{path}: is an input and would be written over; give another file")
        self._path, self._render, self._resume = path, render, resume
        self._stamps = {_key(item): _stamp(item, options) for item in inputs}
        self._texts: dict[str, str] = {}
        self._journal = Journal(path.with_name(f".{path.name}.journal"))

    def holds(self, item: Input) -> bool:
        """Whether the journal has the result of `item`, made from the same audio and options."""
        key = _key(item)
        made = self._journal.find(key, self._stamps[key]) if self._resume else None
        if made is None:
            return False
        self._texts[key] = made
        return True

    def add(self, item: Input, result: Any) -> None:
        key, text = _key(item), self._render(item, result)
        self._texts[key] = text
        self._journal.add(key, self._stamps[key], text)

    def finish(self) -> None:
        write_whole(self._path, (encoded(self._texts[key]) for key in self._stamps if key in self._texts))


def encoded(text: str) -> bytes:
    """UTF-8; of a file name that is not text what JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def _key(item: Input) -> str:
    path = "-" if isinstance(item.source, bytes) else os.path.abspath(item.source)
    return path if item.offset is None else f"{path} {item.part}"


def _stamp(item: Input, options: str) -> dict[str, Any]:
    stamp: dict[str, Any] = {"name": item.name, "options": options}
    if isinstance(item.source, bytes):
        return stamp | {"sha256": hashlib.sha256(item.source).hexdigest()}
    with suppress(OSError, ValueError):  # what cannot be read fails when it is transcribed
        status = os.stat(item.source)
        stamp |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return stamp


def _read_entries(path: Path) -> dict[str, tuple[Any, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"{path}: cannot be read ({reason}); remove it to start anew") from error
    entries = {}
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            key, stamp, made = row["input"], row["stamp"], row["made"]
            if _line(key, stamp, made).rstrip() == line:
                entries[key] = (stamp, made)
    return entries


def _line(key: str, stamp: Any, made: Any) -> bytes:
    row = {"input": key, "stamp": stamp, "made": made}
    digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()
    return (json.dumps(row | {"sha256": digest}) + "\n").encode()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(f"{folder}: is a file; give a folder") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError) -> StorageError:
    reason = (error.strerror or str(error)).lower()
    return StorageError(f"{path}: cannot be written ({reason}); check the folder and free space")
