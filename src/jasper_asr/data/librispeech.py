"""LibriSpeech (Panayotov et al., ICASSP 2015): fetch a subset, and write NVIDIA's manifest of it.

The corpus is `LibriSpeech/<subset>/<speaker>/<chapter>/`, each such folder with a `*.trans.txt` (lines of
`<utterance> <TRANSCRIPT>`) and one 16 kHz mono FLAC an utterance.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_asr.errors import AudioError, ManifestError, StorageError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OFFICIAL_MIRROR = "https://www.openslr.org/resources/12"


@dataclass(frozen=True)
class Subset:
    """One archive of the corpus: the md5 of `<name>.tar.gz`, and how many utterances it holds."""

    md5: str
    utterances: int


# The md5 sums are those of OpenSLR's own list (resource 12, md5sum.txt) as two projects that are independent
# of each other repeat them, compared digit by digit: NVIDIA/DeepLearningExamples,
# PyTorch/SpeechRecognition/Jasper/utils/librispeech.csv; and PaddlePaddle/PaddleSpeech,
# dataset/librispeech/librispeech.py. The list itself was not fetched. The counts are those of Paddle's
# DeepSpeech example; the three of training add up to the 281,241 utterances of the "960 hours".
SUBSETS: dict[str, Subset] = {
    "dev-clean": Subset("42e2234ba48799c1f50f24a7926300a1", 2703),
    "dev-other": Subset("c8d0bcc9cca99d4f8b62fcc847357931", 2864),
    "test-clean": Subset("32fa31d27d2e1cad72775fee3f4849a9", 2620),
    "test-other": Subset("fb5a50374b501bb3bac4815ee91d3135", 2939),
    "train-clean-100": Subset("2a93770f6d5c6c964bc36631d331a522", 28539),
    "train-clean-360": Subset("c0e676e450a7ff2f54aeade5171606fa", 104014),
    "train-other-500": Subset("d1a0fd59409feb2c614ce4d30c387708", 148688),
}


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare_librispeech` did.

    `seconds` is the duration of the originals; `written` and `reused` count WAV files; `unlisted` counts
    FLAC files that no transcript names; `outside` says that the manifest names files by way of `..`, which
    its readers refuse unless they are told where the audio is.
    """

    manifest: Path
    utterances: int
    seconds: float
    written: int
    reused: int
    unlisted: int
    outside: bool


def download_librispeech(
    subset: str,
    out_dir: str | os.PathLike[str],
    *,
    mirror: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    unpack_progress: Callable[[int, int | None], None] | None = None,
    keep_archive: bool = False,
) -> Path:
    """Fetch one of SUBSETS, check its md5, unpack it, and return `<out_dir>/LibriSpeech/<subset>`.

    A subset that is there with all its utterances is not fetched again. `mirror` stands for OFFICIAL_MIRROR:
    the archive is `<mirror>/<subset>.tar.gz`. `progress` gets bytes fetched and in all, `unpack_progress`
    bytes of the archive unpacked and in all. The archive is removed after unpacking unless `keep_archive`.

    Raises UsageError (no such subset), DownloadError, StorageError.
    """
    from jasper_asr.data.download import download, extract_tar  # urllib takes 50 ms and more to import

    if subset not in SUBSETS:
        raise UsageError(f"{subset}: no such subset of LibriSpeech; choose from {', '.join(SUBSETS)}")
    known, out_dir = SUBSETS[subset], Path(out_dir)
    folder = out_dir / "LibriSpeech" / subset
    if sum(path.suffix == ".flac" for path in _walk(folder)) == known.utterances:
        return folder
    archive = out_dir / f"{subset}.tar.gz"
    url = f"{(mirror or OFFICIAL_MIRROR).rstrip('/')}/{archive.name}"
    download(url, archive, md5=known.md5, progress=progress)
    extract_tar(archive, out_dir, progress=unpack_progress)
    if not keep_archive:
        archive.unlink()
    return folder


def prepare_librispeech(
    root: str | os.PathLike[str],
    manifest: str | os.PathLike[str],
    *,
    wav_dir: str | os.PathLike[str] | None = None,
    speeds: Sequence[float] = (),
    progress: Callable[[int, int], None] | None = None,
    jobs: int = 1,
) -> PrepareReport:
    """Write NVIDIA's JSON manifest of all utterances below `root`, sorted by path.

    `root` is a subset's folder, the LibriSpeech folder, or one above. The manifest names files relative to
    its own folder: the FLACs where they lie (of which only headers are read), or with `wav_dir` 16-bit WAVs
    in the same tree there, each also at every one of `speeds` (`-speed0.9`): resampled so that tempo and
    pitch change together, num_samples = round(N / speed). WAVs of the right length are kept as they are.
    `progress` gets utterances done and in all; `jobs` is the number of threads.

    Raises UsageError (speeds without `wav_dir`, or out of 0.5 to 2), ManifestError (no transcripts, a bad
    line, an utterance without its FLAC), AudioError (an unreadable FLAC), StorageError.
    """
    from jasper_asr.data.manifest import write_nvidia_manifest

    root, manifest = Path(root), Path(manifest)
    factors = _check_speeds(manifest, speeds, wav_dir)
    if not manifest.parent.is_dir():  # said now, not after hours of converting
        raise StorageError(f"{manifest}: no folder {manifest.parent}; make it first")
    utterances, unlisted = _find_utterances(root)

    def prepare(utterance: _Utterance) -> _Prepared:
        if wav_dir is None:
            return _refer(utterance, manifest.parent)
        target = Path(wav_dir) / utterance.audio.relative_to(root)
        return _convert(utterance, target, factors, manifest.parent)

    prepared = []
    for item in _map(prepare, utterances, jobs):
        prepared.append(item)
        if progress:
            progress(len(prepared), len(utterances))
    write_nvidia_manifest(manifest, [item.row for item in prepared])
    return PrepareReport(
        manifest=manifest,
        utterances=len(prepared),
        seconds=math.fsum(item.row["original_duration"] for item in prepared),
        written=sum(item.written for item in prepared),
        reused=sum(item.reused for item in prepared),
        unlisted=unlisted,
        outside=any(file["fname"].startswith("../") for item in prepared for file in item.row["files"]),
    )


# --- finding utterances -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Utterance:
    audio: Path
    transcript: str


def _find_utterances(root: Path) -> tuple[list[_Utterance], int]:
    """All utterances below `root`, sorted by path, and the number of FLACs that are none of them."""
    if not root.is_dir():
        raise StorageError(f"{root}: no such folder; give the folder that the archive was unpacked to")
    files = set(_walk(root))
    transcripts = sorted(path for path in files if path.name.endswith(".trans.txt"))
    if not transcripts:
        raise ManifestError(
            f"{root}: holds no *.trans.txt; give the LibriSpeech folder, or one of its subsets, unpacked"
        )
    utterances: dict[Path, _Utterance] = {}
    for path in transcripts:
        for number, name, words in _read_transcripts(path):
            audio = path.parent / f"{name}.flac"
            if audio in utterances:
                raise ManifestError(f"{path}:{number}: {name} is listed twice; remove one of the lines")
            if audio not in files:
                raise ManifestError(f"{path}:{number}: {audio.name} is listed but missing; unpack the archive again")
            utterances[audio] = _Utterance(audio, words)
    unlisted = sum(path.suffix == ".flac" and path not in utterances for path in files)
    return sorted(utterances.values(), key=lambda utterance: utterance.audio.as_posix()), unlisted


def _read_transcripts(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, utterance, lower-case transcript) of every line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; check its permissions") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 at byte {error.start}; unpack the archive again") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, words = line.strip().partition(" ")
        if not words.strip():
            raise ManifestError(f"{path}:{number}: {name} has no transcript; expected `<utterance> <words>`")
        if "/" in name or "\\" in name:
            raise ManifestError(f"{path}:{number}: {name!r} is no utterance; expected a name without slashes")
        yield number, name, words.strip().lower()


def _walk(root: Path) -> Iterator[Path]:
    """The files below `root`, but not in hidden folders: one may hold a half-unpacked archive."""

    def stop(error: OSError) -> None:
        raise StorageError(f"{error.filename}: {error.strerror}; check its permissions") from error

    if not root.is_dir():
        return
    for folder, subfolders, names in os.walk(root, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


# --- manifest rows and WAVs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    row: dict[str, Any]
    written: int = 0
    reused: int = 0


def _refer(utterance: _Utterance, base: Path) -> _Prepared:
    """The row of a FLAC that is used as it is."""
    info = _flac_info(utterance.audio)
    subtype = str(info.subtype)
    bits = int(subtype.removeprefix("PCM_")) if subtype in ("PCM_16", "PCM_24") else 8
    file = {
        "fname": _relative(utterance.audio, base),
        "channels": info.channels,
        "sample_rate": info.samplerate,
        "bitdepth": bits,
        "encoding": "FLAC",
        "duration": info.frames / info.samplerate,
        "num_samples": info.frames,
        "speed": 1,
    }
    return _Prepared(_row(utterance, [file], info.frames, info.samplerate))


def _convert(utterance: _Utterance, target: Path, factors: Sequence[float], base: Path) -> _Prepared:
    """The row of an utterance whose WAVs, one a speed, are written where they are not there yet."""
    from jasper_asr.audio import load_audio

    info = _flac_info(utterance.audio)
    rate, samples, files, written = info.samplerate, None, [], 0
    for speed in (1, *factors):
        path = target.with_name(target.stem + ("" if speed == 1 else f"-speed{speed}") + ".wav")
        length = round(info.frames / speed)
        if not _is_finished(path, length, rate):
            samples = load_audio(utterance.audio, sample_rate=rate) if samples is None else samples
            _write_wav(path, _at_speed(samples, speed, length), rate)
            written += 1
        files.append(
            {
                "fname": _relative(path, base),
                "channels": 1,
                "sample_rate": rate,
                "bitdepth": 16,
                "encoding": "Signed Integer PCM",
                "duration": length / rate,
                "num_samples": length,
                "speed": speed,
            }
        )
    return _Prepared(_row(utterance, files, info.frames, rate), written, len(files) - written)


def _row(utterance: _Utterance, files: list[dict[str, Any]], frames: int, rate: int) -> dict[str, Any]:
    return {
        "transcript": utterance.transcript,
        "files": files,
        "original_duration": frames / rate,
        "original_num_samples": frames,
    }


def _flac_info(path: Path) -> Any:
    """What the header says (soundfile's info object), once it is known to be believable."""
    import soundfile

    from jasper_asr.audio import DEFAULT_LIMITS

    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{path}: not a readable FLAC; unpack the archive again") from error
    if info.format != "FLAC":
        raise AudioError(f"{path}: holds {info.format}, not FLAC; unpack the archive again")
    if not 0 < info.frames <= DEFAULT_LIMITS.max_seconds * info.samplerate:
        raise AudioError(f"{path}: its header says {info.frames} samples; unpack the archive again")
    return info


def _write_wav(path: Path, samples: "NDArray[np.float32]", rate: int) -> None:
    from jasper_asr.audio import write_wav

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent}: {error.strerror}; check its permissions") from error
    write_wav(path, samples, rate)


def _at_speed(samples: "NDArray[np.float32]", speed: float, length: int) -> "NDArray[np.float32]":
    """Resampled to `length` samples, to be played at the old rate: what `sox speed` does."""
    if speed == 1:
        return samples
    import numpy as np
    import soxr  # type: ignore[import-untyped]

    resampled = soxr.resample(samples, speed, 1.0)
    fitted = np.zeros(length, dtype=np.float32)  # where soxr rounds a length that ends in .5 the other way
    fitted[: len(resampled)] = resampled[:length]
    return fitted


def _is_finished(path: Path, length: int, rate: int) -> bool:
    """Whether the WAV is there as this module would write it; WAVs are renamed into place when whole."""
    import soundfile

    if not path.is_file():
        return False
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError):
        return False
    found = (info.frames, info.samplerate, info.channels, info.subtype)
    return bool(found == (length, rate, 1, "PCM_16"))


def _relative(path: Path, base: Path) -> str:
    """`path` as seen from `base`, with slashes. By the names given if it lies below; else, as `..` and
    symbolic links do not mix, by where both really are."""
    near = os.path.relpath(path, base)
    if near.split(os.sep)[0] == os.pardir:
        near = os.path.relpath(os.path.realpath(path), os.path.realpath(base))
    return Path(near).as_posix()


def _check_speeds(manifest: Path, speeds: Sequence[float], wav_dir: str | os.PathLike[str] | None) -> list[float]:
    """The factors in rising order, each once, without 1 (the original is always there)."""
    for speed in speeds:
        if not 0.5 <= speed <= 2.0:
            raise UsageError(f"{manifest}: speed {speed:g} is out of bounds; give 0.5 to 2")
    if speeds and wav_dir is None:
        raise UsageError(f"{manifest}: speeds need a folder for the WAVs they make; give one with --wav-dir")
    return sorted({float(speed) for speed in speeds} - {1.0})


def _map(function: Callable[[_Utterance], _Prepared], items: Iterable[_Utterance], jobs: int) -> Iterator[_Prepared]:
    """Results in order. Threads do: decoding, resampling and writing all release the interpreter's lock."""
    if jobs <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(function, items)
