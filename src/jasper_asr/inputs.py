"""What to transcribe: files, folders, patterns, manifests and stdin become a list of inputs, in order and each once."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import BinaryIO

from jasper_asr.audio import AUDIO_SUFFIXES, DEFAULT_LIMITS
from jasper_asr.data.manifest import Utterance, read_manifest
from jasper_asr.errors import AudioError, StorageError, UsageError

STDIN = "-"


@dataclass(frozen=True)
class Input:
    """A recording, or a part of one: `offset` and `duration` in seconds, an offset of None is all of it.

    `name` is how results and messages call it. `place` is its path below the folder, the fixed part of the pattern or
    the audio root in which it was found, just the file's name if it was named itself: results go to the same place
    below an output folder.
    """

    name: str
    source: Path | bytes
    place: PurePath
    offset: float | None = None
    duration: float | None = None

    @property
    def part(self) -> tuple[float, float | None]:
        """(offset, duration) of the file to read; a duration of None is up to its end."""
        return (0.0, None) if self.offset is None else (self.offset, self.duration)


def find_inputs(
    arguments: Sequence[str],
    *,
    recursive: bool = False,
    audio_root: Path | None = None,
    allow_outside_root: bool = False,
    stdin: BinaryIO | None = None,
) -> list[Input]:
    """The inputs that `arguments` name, in their order, sorted within a folder or pattern; doubles are left out.

    An argument is a sound file, which need not exist; a folder, of which the files with a usual audio suffix are
    taken, with those of its sub-folders if `recursive`; a pattern with `*`, `?`, `[]` or `**`; a manifest of NVIDIA's
    or NeMo's layout, whose rows need no text; or `-`, an encoded file on `stdin`. Hidden files are left out of folders
    and patterns. `audio_root` and `allow_outside_root` as in `read_manifest`.

    Raises AudioError when a folder or pattern holds nothing, ManifestError or StorageError for a manifest or a folder
    that cannot be read, UsageError for `-` without a pipe.
    """
    found: dict[object, Input] = {}
    for argument in arguments:
        if argument == STDIN:
            inputs: Iterable[Input] = [] if STDIN in found else [_from_stdin(stdin)]
        elif os.path.isdir(argument):
            inputs = _in_folder(argument, recursive)
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            inputs = _matching(argument, audio_root, allow_outside_root)
        else:
            inputs = _named(argument, audio_root, allow_outside_root)
        for item in inputs:
            found.setdefault(_identity(item), item)
    return list(found.values())


def output_stems(inputs: Sequence[Input]) -> list[PurePath]:
    """Where the results of each input go below an output folder: a relative path, unique, without a suffix.

    It is the place without its suffix; where several share that the whole name (`a.wav` and `a.flac`), and where
    they share this too the path from the folder that holds all inputs. Raises UsageError if that does not help.
    """
    paths = [os.path.abspath(item.source) for item in inputs if isinstance(item.source, Path)]
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if _share_a_drive(paths) else None
    choices = [_stem_choices(item, common) for item in inputs]
    chosen = [0] * len(inputs)
    while True:
        stems = [names[level] for names, level in zip(choices, chosen, strict=True)]
        counts = Counter(stems)
        shared = [index for index, stem in enumerate(stems) if counts[stem] > 1]
        movable = [index for index in shared if chosen[index] + 1 < len(choices[index])]
        if not shared:
            return stems
        if not movable:
            first, second = [inputs[index].name for index, stem in enumerate(stems) if stem == stems[shared[0]]][:2]
            raise UsageError(f"{first} and {second}: their results would share a name; transcribe them apart")
        for index in movable:
            chosen[index] += 1


# --- each kind of argument ------------------------------------------------------------------------------------------


def _from_stdin(stdin: BinaryIO | None) -> Input:
    if stdin is None or stdin.isatty():
        raise UsageError("-: stdin is not a pipe; lead a sound file into it, as in `jasper transcribe - < a.wav`")
    # one byte over the limit, which is then complained about as in any file
    return Input(STDIN, stdin.read(DEFAULT_LIMITS.max_bytes + 1), PurePath("stdin"))


def _in_folder(folder: str, recursive: bool) -> list[Input]:
    paths = sorted(_walk(folder, recursive), key=lambda path: path.parts)
    if not paths:
        cure = "name another" if recursive else "name another, or give --recursive to look into its folders"
        raise AudioError(f"{folder}: holds no sound files; {cure}")
    return [Input(str(path), path, path.relative_to(folder)) for path in paths]


def _walk(folder: str, recursive: bool) -> Iterator[Path]:
    def complain(error: OSError) -> None:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"{error.filename}: cannot be listed ({reason}); check its permissions") from error

    for parent, folders, files in os.walk(folder, onerror=complain):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        yield from (Path(parent, name) for name in files if _looks_like_audio(name))


def _matching(pattern: str, audio_root: Path | None, allow_outside_root: bool) -> list[Input]:
    """A pattern that ends in a suffix says what it wants, `talks/*` is about its sound files."""
    suffix = PurePath(pattern).suffix
    says_what = suffix != "" and not glob.has_magic(suffix)
    paths = sorted(map(Path, glob.glob(pattern, recursive=True)), key=lambda path: path.parts)
    paths = [path for path in paths if path.is_file() and (says_what or _looks_like_audio(path.name))]
    if not paths:
        raise AudioError(f"{pattern}: matches no sound file; check the pattern")
    parts = PurePath(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    inputs = []
    for path in paths:
        place = PurePath(*path.parts[fixed:])
        inputs += [
            replace(item, place=place) if item.source == path else item
            for item in _named(str(path), audio_root, allow_outside_root)
        ]
    return inputs


def _named(name: str, audio_root: Path | None, allow_outside_root: bool) -> list[Input]:
    if not _is_manifest(name):
        return [Input(name, Path(name), PurePath(os.path.basename(name) or "_"))]
    rows = read_manifest(name, audio_root=audio_root, allow_outside_root=allow_outside_root, labelled=False)
    return [Input(row.audio_filepath, row.audio_path, _place(row), row.offset, row.duration) for row in rows]


def _is_manifest(name: str) -> bool:
    """By content, as no sound starts like JSON; by its name if it is so broken that it does not either."""
    try:
        if not os.path.isfile(name):
            return False
        with open(name, "rb") as file:
            head = file.read(256)
    except OSError:  # reported when it is read as a sound
        return False
    return re.match(rb"(?:\xef\xbb\xbf)?\s*[\[{]", head) is not None or PurePath(name).suffix in (".json", ".jsonl")


# --- places and names -----------------------------------------------------------------------------------------------


def _looks_like_audio(name: str) -> bool:
    return not name.startswith(".") and PurePath(name).suffix.lower() in AUDIO_SUFFIXES


def _place(row: Utterance) -> PurePath:
    spelled = PurePath(row.audio_filepath)
    return PurePath(spelled.name) if spelled.is_absolute() or ".." in spelled.parts else spelled


def _identity(item: Input) -> object:
    if isinstance(item.source, bytes):
        return STDIN
    return os.path.abspath(item.source), *item.part


def _share_a_drive(paths: list[str]) -> bool:
    return len({os.path.splitdrive(path)[0] for path in paths}) == 1


def _stem_choices(item: Input, common: str | None) -> list[PurePath]:
    """Names from the nicest to the safest; a part has its times in each."""
    times = ""
    if item.offset is not None:
        end = "" if item.duration is None else f"{item.offset + item.duration:.3f}"
        times = f"_{item.offset:.3f}-{end}"
    names = [item.place.with_suffix("") if item.place.stem else item.place, item.place]
    if isinstance(item.source, Path) and common is not None:
        names.append(PurePath(os.path.relpath(os.path.abspath(item.source), common)))
    return [name.with_name(name.name + times) for name in names]
