"""Any file or bytes to mono float32 at 16 kHz; the one place where limits on sound live.

libsndfile decodes, block by block, so that a limit stops the work and not only the result; soxr resamples.
What libsndfile does not know, such as the sound of a video, goes through FFmpeg where PyAV (extra `av`) is installed.
What a file holds is decided by its content, never by its extension.
"""

import math
import os
import re
import stat
import uuid
import wave
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jasper_asr.errors import AudioError, JasperError, StorageError

SAMPLE_RATE = 16_000

AudioSource = str | os.PathLike[str] | bytes | tuple[np.ndarray, int]


@dataclass(frozen=True)
class AudioLimits:
    """What `load_audio` accepts: seconds decoded, bytes of an encoded file, Hz, channels."""

    max_seconds: float = 4 * 3600.0
    max_bytes: int = 2 * 1024**3
    min_rate: int = 4_000
    max_rate: int = 192_000
    max_channels: int = 8


DEFAULT_LIMITS = AudioLimits()

_BLOCK = 1 << 18  # frames decoded at a time: 8 MiB of float32 at 8 channels
_MIN_SECONDS = 0.01  # one hop of the features; less than that carries no frame
_UNKNOWN_LENGTH = 1 << 62  # libsndfile's frame count for "the header does not say" is 2**63 - 1
_STREAMED_SIZE = 0x7FFF_F000  # chunk sizes from here up are what writers to a pipe leave behind
_UNKNOWN_TO_SNDFILE = (1, 4)  # SF_ERR_UNRECOGNISED_FORMAT, SF_ERR_UNSUPPORTED_ENCODING
_OPUS_LEAD = 10  # seconds decoded ahead of a part: the decoder is adaptive and settles within a few
_SNDFILE_NAMES = "wav wave flac mp3 mp2 mpga ogg oga opus aif aiff aifc au snd caf w64 rf64 sph nist voc avr"
_AV_NAMES = (
    "mp4 m4a m4b m4v mov 3gp 3g2 mkv mka webm avi flv wma wmv asf aac ac3 eac3 amr ape wv tta ts mts m2ts mpg mpeg "
    "ogv spx rm rmvb"
)
AV_SUFFIXES = frozenset(f".{name}" for name in _AV_NAMES.split())
AUDIO_SUFFIXES = AV_SUFFIXES | {f".{name}" for name in _SNDFILE_NAMES.split()}
"""What sound files are usually called, for those who look through folders; decoding goes by content alone."""

_HEADERLESS = {".raw", ".pcm", ".vox", ".gsm", ".ulaw", ".alaw", ".ul", ".al", ".s16"}


def load_audio(
    source: AudioSource,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    limits: AudioLimits = DEFAULT_LIMITS,
    sample_rate: int = SAMPLE_RATE,
) -> np.ndarray:
    """Read a sound as mono float32 samples [N] at `sample_rate`, full scale being 1.0.

    `source` is a path, the bytes of an encoded file, or (samples, rate) with samples [N] or [N, channels] of
    any integer or float dtype. Integers of b bits are divided by 2**(b-1), unsigned ones after taking off
    their midpoint; floats are taken as they are and never clipped. Channels are averaged. Another rate is
    resampled by soxr (HQ); `sample_rate` itself passes through bit for bit.

    `offset` and `duration` are seconds. The part is cut before resampling, a `duration` that reaches past the
    end stops there, and `limits.max_seconds` counts what is decoded, so a short part of a long recording is
    fine. A part at 16 kHz equals that slice of the whole (within 1e-6 in MP3, after a lead-in in Opus).

    Raises StorageError for a file that cannot be opened, and AudioError for a sound that is not decodable,
    breaks off before its declared end, is not finite, shorter than 10 ms, or over a limit.
    """
    name = _display_name(source)
    _check_part(name, offset, duration)
    _check_rate(name, sample_rate, limits)
    part = (offset, duration)
    if isinstance(source, tuple):
        rate, blocks = _array_blocks(name, source, part, limits)
        return _collect(name, blocks, rate, sample_rate, limits)
    with closing(_open_bytes(name, source, limits)) as handle:
        _check_ogg_end(name, handle)
        with _open_decoder(name, handle) as sound:
            rate, blocks = _decoder_blocks(name, sound, handle, part, limits)
            return _collect(name, blocks, rate, sample_rate, limits)


def trim_silence(samples: np.ndarray, top_db: float = 60.0) -> np.ndarray:
    """Cut leading and trailing silence of [N] samples: the view between `loud_bounds`."""
    start, stop = loud_bounds(samples, top_db)
    return samples[start:stop]


def loud_bounds(samples: np.ndarray, top_db: float = 60.0) -> tuple[int, int]:
    """First sample of the first loud frame, and the one after the last loud frame, of [N] samples.

    A frame is loud when its RMS lies above `-top_db` dB relative to the loudest frame. Frames hold 2048
    samples, 512 apart, centred with zeros beyond the ends; RMS below 1e-5 counts as 1e-5, so all-quiet input
    comes back whole. Equal to `librosa.effects.trim(y, top_db=top_db)` of librosa 0.11.0. NVIDIA's recipe of
    2020 ran a librosa that padded with the reflected signal (0.8.1 does, 0.9.2 has zeros), which can move a
    cut by a frame or two where a loud passage touches an end of the file.
    """
    hop = 512
    if samples.size == 0:
        return 0, 0
    frames = 1 + len(samples) // hop
    padded = np.zeros((frames + 3) * hop, samples.dtype)
    padded[2 * hop : 2 * hop + len(samples)] = samples
    hops = padded.reshape(-1, hop)
    energy = np.einsum("ij,ij->i", hops, hops, dtype=np.float64)
    power = (energy[:-3] + energy[1:-2] + energy[2:-1] + energy[3:]) / (4 * hop)
    decibels = 10.0 * np.log10(np.maximum(power, 1e-10))
    loud = np.flatnonzero(decibels - decibels.max() > -top_db)
    if loud.size == 0:
        return 0, 0
    return int(loud[0]) * hop, min(len(samples), (int(loud[-1]) + 1) * hop)


def write_wav(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write [N] samples (full scale 1.0, clipped beyond) as a 16-bit mono WAV file, whole or not at all.

    `load_audio` divides by the same 32768, so samples of a 16-bit file survive a round trip bit for bit.
    Raises AudioError for samples that are not [N] finite numbers, StorageError when nothing can be written.
    """
    name = _printable(os.fspath(path))
    if samples.ndim != 1 or samples.dtype.kind not in "iuf":
        raise AudioError(f"{name}: samples are {_described(samples)}; write [N] numbers")
    values = _to_float(samples)
    if not np.isfinite(values).all():
        raise AudioError(f"{name}: samples are NaN or infinite; mend what computed them")
    pcm = np.clip(np.rint(values * 32768.0), -32768, 32767).astype("<i2")
    encoded = BytesIO()
    with wave.open(encoded, "wb") as file:
        file.setparams((1, 2, sample_rate, len(pcm), "NONE", "not compressed"))
        file.writeframes(pcm.tobytes())
    target = Path(path)
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(encoded.getvalue())
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(
            f"{name}: cannot be written ({_reason(error)}); check the folder, its permissions and free space"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def to_mono(samples: np.ndarray) -> np.ndarray:
    """[N] or [N, channels] of any integer or float dtype to float32 [N], scaled and averaged as `load_audio` does."""
    return _downmix(_to_float(samples))


# --- opening ----------------------------------------------------------------


def _open_bytes(name: str, source: str | os.PathLike[str] | bytes, limits: AudioLimits) -> BinaryIO:
    """The encoded bytes as a seekable file, once their number is known to be within the limit."""
    if isinstance(source, bytes):
        _check_size(name, len(source), limits)
        return BytesIO(source)
    try:
        status = os.stat(source)
        if stat.S_ISDIR(status.st_mode):
            raise StorageError(f"{name}: is a directory; name a sound file in it")
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"{name}: is not a regular file; save the sound to a file first")
        _check_size(name, status.st_size, limits)
        # By descriptor, because soundfile would judge a named handle by its extension.
        return os.fdopen(os.open(source, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    except JasperError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{name}: no such file; check the path") from error
    except PermissionError as error:
        raise StorageError(f"{name}: permission denied; make it readable for this user") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{name}: cannot be opened ({_reason(error)}); check the path") from error


def _open_decoder(name: str, handle: BinaryIO) -> Any:
    """A soundfile.SoundFile that reads strictly forward, or PyAV's container of what libsndfile does not know."""
    import soundfile

    class ForwardSoundFile(soundfile.SoundFile):  # type: ignore[misc]
        # After every read of a seekable file soundfile seeks to where it already is. That restarts the Opus
        # and MP3 decoders (samples lost at the seam) and fails at the end of a FLAC of undeclared length.
        def seekable(self) -> bool:
            return False

    try:
        return ForwardSoundFile(handle)
    except soundfile.LibsndfileError as error:
        has_av, container = _open_container(handle) if error.code in _UNKNOWN_TO_SNDFILE else (True, None)
        if container is not None:
            return container
        cure, suffix = "convert it to WAV or FLAC", Path(name).suffix.lower()
        if not has_av and (suffix in AV_SUFFIXES or not suffix):
            cure = "pip install 'jasper-asr[av]' for video and more formats, or convert it to WAV or FLAC"
        if suffix in _HEADERLESS:
            cure = "headerless sound does not say its rate: wrap it in WAV, or pass (samples, rate)"
        raise AudioError(f"{name}: not audio that libsndfile can read ({_reason(error)}); {cure}") from error


def _open_container(handle: BinaryIO) -> tuple[bool, Any]:
    """Whether PyAV is installed, and an av.container.InputContainer if FFmpeg knows the format."""
    try:
        import av
    except ImportError:
        return False, None
    handle.seek(0)
    try:
        # Playlists and their like make FFmpeg open other files and addresses: only plain containers, no protocols.
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
        return True, av.open(handle, options=options, metadata_errors="replace")
    except av.FFmpegError:
        return True, None


_CONTAINERS = "mov,matroska,avi,asf,flv,mpegts,mpeg,aac,ac3,eac3,amr,ape,wv,tta,caf,ogg,wav,aiff,rm"

# --- decoding ---------------------------------------------------------------


def _decoder_blocks(
    name: str, sound: Any, handle: BinaryIO, part: tuple[float, float | None], limits: AudioLimits
) -> tuple[int, Iterator[np.ndarray]]:
    """The rate and the mono blocks of a part of what `_open_decoder` gave."""
    import soundfile

    if not isinstance(sound, soundfile.SoundFile):
        return _container_blocks(name, sound, part, limits)
    _check_header(name, sound, limits)
    return sound.samplerate, _decoded_blocks(name, sound, handle, part, limits)


def _decoded_blocks(
    name: str, sound: Any, handle: BinaryIO, part: tuple[float, float | None], limits: AudioLimits
) -> Iterator[np.ndarray]:
    """Mono blocks of a file's part; raises when the file ends before its header says."""
    import soundfile

    rate, declared = sound.samplerate, sound.frames
    first, wanted = _part_in_frames(name, part, rate, declared, limits)
    read = 0
    try:
        _go_to(name, sound, first)
        while read < wanted:
            block = sound.read(min(_BLOCK, wanted - read), dtype="float32", always_2d=True)
            if len(block) == 0:
                break
            read += len(block)
            yield _downmix(block)
    except soundfile.LibsndfileError as error:
        raise _breaks_off(name, first + read, rate, f" ({_reason(error)})") from error
    if declared < _UNKNOWN_LENGTH:
        _check_end(name, sound, handle, first + read, wanted - read)


def _container_blocks(
    name: str, container: Any, part: tuple[float, float | None], limits: AudioLimits
) -> tuple[int, Iterator[np.ndarray]]:
    """The rate and the mono blocks of a part of the best audio stream, which is decoded from its start."""
    stream = container.streams.best("audio")
    if stream is None:
        raise AudioError(f"{name}: holds no audio stream; give a file with sound")
    if stream.codec_context is None or not stream.rate:
        raise AudioError(f"{name}: FFmpeg has no decoder for its sound; convert it to WAV or FLAC")
    # The first frame tells the rate: in HE-AAC it can be twice that of the stream.
    frames = _container_frames(name, container, stream)
    head = next(frames, None)
    rate, channels = (head.sample_rate, head.layout.nb_channels) if head else (stream.rate, stream.channels)
    _check_rate(name, rate, limits)
    _check_channels(name, channels, limits)
    declared = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if part[1] is None and declared - part[0] > limits.max_seconds + 1:
        raise _too_long(name, limits, f"{declared - part[0]:.0f} s to decode")
    first, wanted = _part_in_frames(name, part, rate, _UNKNOWN_LENGTH, limits)
    # what other containers declare may be an estimate
    least = round((declared - 0.5) * rate) if container.format.name.startswith("mov") else 0
    blocks = _joined(name, chain([head] if head else [], frames), rate, channels)
    return rate, _cut_blocks(name, blocks, rate, (first, first + wanted), least)


def _container_frames(name: str, container: Any, stream: Any) -> Iterator[Any]:
    """Every av.AudioFrame of the stream."""
    import av

    seconds = 0.0
    try:
        for frame in container.decode(stream):
            seconds += frame.samples / frame.sample_rate
            yield frame
    except av.FFmpegError as error:
        raise _breaks_off(name, round(seconds * 1000), 1000, f" ({_reason(error)})") from error


def _joined(name: str, frames: Iterable[Any], rate: int, channels: int) -> Iterator[np.ndarray]:
    """Mono blocks of _BLOCK samples or a little more: a frame of a codec has about a thousand."""
    held: list[np.ndarray] = []
    samples = 0
    for frame in frames:
        if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
            raise AudioError(f"{name}: its sample rate or channels change on the way; convert it to WAV or FLAC")
        values = frame.to_ndarray()
        held.append(_downmix(_to_float(values.T if frame.format.is_planar else values.reshape(-1, channels))))
        samples += frame.samples
        if samples >= _BLOCK:
            yield np.concatenate(held)
            held, samples = [], 0
    if held:
        yield np.concatenate(held)


def _cut_blocks(
    name: str, blocks: Iterator[np.ndarray], rate: int, bounds: tuple[int, int], least: int
) -> Iterator[np.ndarray]:
    """What lies between the bounds [first, stop); raises when the blocks end before, or before `least` samples."""
    first, stop = bounds
    read = 0
    for block in blocks:
        kept = block[max(0, first - read) : max(0, stop - read)]
        read += len(block)
        if len(kept):
            yield kept
        if read >= stop:
            return
    if read < least:
        raise _breaks_off(name, read, rate, f", {least / rate + 0.5:.2f} s are declared")
    if 0 < read <= first:
        raise AudioError(f"{name}: offset {first / rate:g} s is beyond its end; choose one within it")


def _array_blocks(
    name: str, source: tuple[Any, ...], part: tuple[float, float | None], limits: AudioLimits
) -> tuple[int, Iterator[np.ndarray]]:
    """The rate and the mono blocks of a part of (samples, rate)."""
    if len(source) != 2 or not isinstance(source[0], np.ndarray):
        raise AudioError(f"{name}: not (samples, rate) with a numpy array of samples; pass such a pair")
    samples, rate = source
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "iuf":
        raise AudioError(f"{name}: samples are {_described(samples)}; pass [N] or [N, channels] numbers")
    _check_rate(name, rate, limits)
    _check_channels(name, 1 if samples.ndim == 1 else samples.shape[1], limits)
    rate = int(rate)
    first, wanted = _part_in_frames(name, part, rate, len(samples), limits)
    stop = first + wanted
    blocks = (to_mono(samples[i : min(i + _BLOCK, stop)]) for i in range(first, stop, _BLOCK))
    return rate, blocks


def _collect(name: str, blocks: Iterator[np.ndarray], rate: int, sample_rate: int, limits: AudioLimits) -> np.ndarray:
    """Mono blocks at `rate` joined at `sample_rate`, [N] float32; stops at the first block over the limit."""
    resampler = None
    if rate != sample_rate:
        import soxr  # type: ignore[import-untyped]

        resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
    joined, frames = _Growing(), 0
    for block in blocks:
        finite = np.isfinite(block)
        if not finite.all():
            at = (frames + int(np.argmin(finite))) / rate
            raise AudioError(f"{name}: holds NaN or infinite samples ({at:.3f} s in); export it again")
        frames += len(block)
        if frames > limits.max_seconds * rate:
            raise _too_long(name, limits, "goes on")
        joined.extend(block if resampler is None else resampler.resample_chunk(block))
    if frames == 0:
        raise AudioError(f"{name}: holds no samples; record or export it again")
    if resampler is not None:
        joined.extend(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    if frames < _MIN_SECONDS * rate:
        plural = "" if frames == 1 else "s"
        raise AudioError(
            f"{name}: {frames} sample{plural} at {rate} Hz is too short for one feature frame; "
            f"give at least {_MIN_SECONDS * 1000:.0f} ms"
        )
    return joined.whole()


class _Growing:
    """float32 samples that grow in place: joining hours of blocks at the end would hold them twice."""

    def __init__(self) -> None:
        self._values, self._length = np.empty(_BLOCK, np.float32), 0

    def extend(self, block: np.ndarray) -> None:
        needed = self._length + len(block)
        if needed > len(self._values):
            self._values.resize(max(needed, len(self._values) * 3 // 2), refcheck=False)
        self._values[self._length : needed] = block
        self._length = needed

    def whole(self) -> np.ndarray:
        self._values.resize(self._length, refcheck=False)
        return self._values


def _go_to(name: str, sound: Any, first: int) -> None:
    """Seek to a frame, and decode the way there where a seek alone would not land on the same samples."""
    lead = 0
    if sound.frames >= _UNKNOWN_LENGTH:
        lead = first
    elif sound.subtype == "OPUS":
        lead = min(first, _OPUS_LEAD * sound.samplerate)
    if first > lead:
        sound.seek(first - lead)
    while lead > 0:
        got = len(sound.read(min(_BLOCK, lead), dtype="float32", always_2d=True))
        if got == 0:
            raise AudioError(f"{name}: offset {first / sound.samplerate:g} s is beyond its end; choose one within it")
        lead -= got


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Integers scaled to [-1, 1) in float64; floats as they are, in float32 or wider."""
    if samples.dtype.kind == "f":
        return samples.astype(np.result_type(samples.dtype, np.float32), copy=False)
    scale = 2.0 ** (samples.dtype.itemsize * 8 - 1)
    midpoint = scale if samples.dtype.kind == "u" else 0.0
    return (samples.astype(np.float64) - midpoint) / scale


def _downmix(block: np.ndarray) -> np.ndarray:
    """[N] or [N, channels] floats to mono float32 [N]; an overflow gives infinity, caught later."""
    with np.errstate(over="ignore", invalid="ignore"):
        if block.ndim == 2:
            block = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        return block.astype(np.float32, copy=False)


def _part_in_frames(
    name: str, part: tuple[float, float | None], rate: int, frames: int, limits: AudioLimits
) -> tuple[int, int]:
    """The first frame and the number of frames of (offset, duration) in a sound of so many `frames`."""
    offset, duration = part
    first = round(offset * rate)
    wanted = _UNKNOWN_LENGTH if duration is None else max(1, round(duration * rate))
    if frames >= _UNKNOWN_LENGTH:
        return first, wanted
    if first > 0 and first >= frames:
        raise AudioError(f"{name}: offset {offset:g} s is beyond its end at {frames / rate:g} s; choose one within it")
    wanted = min(wanted, frames - first)
    if wanted > limits.max_seconds * rate:
        raise _too_long(name, limits, f"{wanted / rate:.0f} s to decode")
    return first, wanted


# --- checks -----------------------------------------------------------------


def _check_part(name: str, offset: float, duration: float | None) -> None:
    if not (math.isfinite(offset) and offset >= 0):
        raise AudioError(f"{name}: offset is {offset} s; give a number of seconds from 0")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise AudioError(f"{name}: duration is {duration} s; give a number of seconds above 0")


def _check_size(name: str, size: int, limits: AudioLimits) -> None:
    if size == 0:
        raise AudioError(f"{name}: is empty (0 bytes); record or copy it again")
    if size > limits.max_bytes:
        raise AudioError(
            f"{name}: {size} bytes are over the limit of {limits.max_bytes}; "
            "split the file or raise AudioLimits.max_bytes"
        )


def _check_rate(name: str, rate: Any, limits: AudioLimits) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or rate <= 0:
        raise AudioError(f"{name}: sample rate is {rate!r}; give a positive whole number of Hz")
    if not limits.min_rate <= rate <= limits.max_rate:
        raise AudioError(
            f"{name}: sample rate {rate} Hz is outside {limits.min_rate} to {limits.max_rate} Hz; "
            "check the header or resample"
        )


def _check_channels(name: str, channels: int, limits: AudioLimits) -> None:
    if not 1 <= channels <= limits.max_channels:
        raise AudioError(
            f"{name}: {channels} channels, 1 to {limits.max_channels} are allowed; "
            "pick channels (arrays are [N, channels])"
        )


def _check_header(name: str, sound: Any, limits: AudioLimits) -> None:
    """Rate, channels, and whether an uncompressed file is as long as its header says."""
    _check_rate(name, sound.samplerate, limits)
    _check_channels(name, sound.channels, limits)
    # libsndfile shortens a cut-off file silently and only its parse log tells. The keys are the data chunks
    # of WAV, AIFF and AU, and the whole of W64 and RF64; RIFF is left out, many writers get its size wrong.
    pattern = r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)"
    for declared, present in re.findall(pattern, sound.extra_info, re.MULTILINE):
        if int(present) < int(declared) < _STREAMED_SIZE:
            raise AudioError(f"{name}: is truncated, {present} of {declared} declared bytes are there; copy it again")


def _check_ogg_end(name: str, handle: BinaryIO) -> None:
    """An Ogg stream is whole when its last page is marked as such (RFC 3533, section 6) and complete."""
    head = handle.read(18)
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - (1 << 17)))  # a page has 65307 bytes at most
    tail = handle.read() if head.startswith(b"OggS") else b""
    handle.seek(0)
    page = tail[max(0, tail.rfind(b"OggS\0")) :]
    if not page.startswith(b"OggS"):
        return
    whole = len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    if not (whole and page[5] & 4):
        raise AudioError(f"{name}: is truncated, its Ogg stream has no last page; copy it again")
    if page[14:18] != head[14:18]:
        raise AudioError(f"{name}: holds several Ogg streams and only one can be read; convert it to WAV")


def _check_end(name: str, sound: Any, handle: BinaryIO, frames: int, missing: int) -> None:
    """Whether decoding ended where the header said; an MP3 needs care, as its length may be an estimate."""
    if sound.format != "MP3":
        if missing > 0:
            raise _breaks_off(name, frames, sound.samplerate, f", {sound.frames} samples are declared")
        return
    position = handle.tell()
    if missing > 0 and _mp3_declares_length(handle):
        raise _breaks_off(name, frames, sound.samplerate, f", {sound.frames} samples are declared")
    if missing > 0 or frames < sound.frames:
        return
    handle.seek(0, os.SEEK_END)
    unread = handle.tell() - position
    handle.seek(position)
    # A few frames of padding may follow the end. More frames after it mean that the length was guessed from
    # the start of a variable bit rate, or that files were concatenated; libsndfile stops there all the same.
    if unread > 8192 and re.match(rb"\xff[\xe0-\xff]|ID3", handle.read(3)):
        raise AudioError(
            f"{name}: holds sound beyond the {frames / sound.samplerate:.2f} s that its MP3 header gives; "
            "convert it to WAV or FLAC"
        )


def _mp3_declares_length(handle: BinaryIO) -> bool:
    """Whether the first MP3 frame (after an ID3v2 tag) is a Xing, Info or VBRI header with a frame count."""
    handle.seek(0)
    head = handle.read(10)
    start = 0
    if head.startswith(b"ID3") and len(head) == 10:
        start = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    handle.seek(start)
    found = re.search(rb"(?:Xing|Info)\0\0\0(.)|VBRI", handle.read(256), re.DOTALL)
    return found is not None and (found[1] is None or bool(found[1][0] & 1))


# --- messages ---------------------------------------------------------------


def _too_long(name: str, limits: AudioLimits, fact: str) -> AudioError:
    return AudioError(
        f"{name}: {fact}, the limit is {limits.max_seconds:g} s; "
        "cut it, pass offset and duration, or raise AudioLimits.max_seconds"
    )


def _breaks_off(name: str, frames: int, rate: int, detail: str) -> AudioError:
    return AudioError(f"{name}: breaks off after {frames / rate:.2f} s{detail}; copy it again")


def _reason(error: Exception) -> str:
    """The bare cause: libsndfile's and the system's wording without prefixes and full stops."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).removeprefix("Error : ").strip().rstrip(".")


def _described(samples: np.ndarray) -> str:
    return f"{samples.ndim}-D {samples.dtype}"


def _display_name(source: object) -> str:
    """What messages call the source."""
    if isinstance(source, tuple):
        return "<array>"
    if isinstance(source, bytes):
        return "<bytes>"
    if isinstance(source, str | os.PathLike):
        return _printable(os.fspath(source))
    raise AudioError(f"<{type(source).__name__}>: not a path, bytes or (samples, rate); pass one of these")


def _printable(path: str) -> str:
    """The path as it is, or quoted and escaped where it would break the line."""
    return path if path and path.isprintable() else repr(path)
