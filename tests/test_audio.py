import errno
import io
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
import wave

import numpy as np
import pytest
import soundfile
import soxr

from jasper_asr import audio
from jasper_asr.audio import SAMPLE_RATE, AudioLimits, load_audio, trim_silence, write_wav
from jasper_asr.errors import AudioError, StorageError

FLAC_UNKNOWN_LENGTH = 0
FLAC_LONGEST = 2**36 - 1  # 68,719,476,735 frames, all ones in STREAMINFO


def noise(frames: int, channels: int | None = None, seed: int = 0) -> np.ndarray:
    """16-bit values in [-0.5, 0.5), so that PCM_16 and wider formats hold them exactly."""
    shape = (frames,) if channels is None else (frames, channels)
    return (np.random.default_rng(seed).integers(-16384, 16384, shape) / 32768).astype(np.float32)


def speechlike(frames: int, rate: int = SAMPLE_RATE) -> np.ndarray:
    t = np.arange(frames) / rate
    return (0.3 * np.sin(2 * np.pi * 220 * t * (1 + 0.1 * np.sin(t))) + 0.05 * noise(frames)).astype(np.float32)


def encode(samples: np.ndarray, rate: int = SAMPLE_RATE, format: str = "WAV", subtype: str = "PCM_16", **options):
    buffer = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(buffer, "w", rate, channels, subtype, format=format, **options) as file:
        file.write(samples)
    return buffer.getvalue()


def with_flac_length(flac: bytes, frames: int) -> bytes:
    """The same FLAC with STREAMINFO's 36-bit total of samples replaced (bytes 18 to 25 after `fLaC`)."""
    fields = int.from_bytes(flac[18:26], "big")
    return flac[:18] + (fields >> 36 << 36 | frames).to_bytes(8, "big") + flac[26:]


def message(kind: type[Exception], source, **options) -> str:
    with pytest.raises(kind) as caught:
        load_audio(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- numbers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 0.0),
        ("WAV", "PCM_24", 0.0),
        ("WAV", "PCM_32", 0.0),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "ULAW", 0.02),
        ("FLAC", "PCM_16", 0.0),
        ("FLAC", "PCM_24", 0.0),
        ("AIFF", "PCM_16", 0.0),
        ("RF64", "PCM_16", 0.0),
        ("W64", "PCM_16", 0.0),
    ],
)
def test_16_khz_passes_through_bit_exactly(tmp_path, format, subtype, tolerance):
    samples = noise(5000)
    data = encode(samples, format=format, subtype=subtype)
    path = tmp_path / "clip.bin"
    path.write_bytes(data)
    from_path, from_bytes = load_audio(path), load_audio(data)
    assert from_path.dtype == np.float32
    assert from_path.shape == (5000,)
    np.testing.assert_array_equal(from_path, from_bytes)
    np.testing.assert_allclose(from_path, samples, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("format", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_formats_keep_length_and_shape(format, subtype):
    samples = speechlike(48000)
    decoded = load_audio(encode(samples, format=format, subtype=subtype))
    assert decoded.shape == (48000,)
    assert np.corrcoef(decoded, samples)[0, 1] > 0.98


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 44100, 48000, 96000, 192000])
def test_resampled_sine_equals_a_sine_made_at_16_khz(rate):
    source = np.sin(2 * np.pi * 440.0 * np.arange(rate) / rate)
    decoded = load_audio(encode(source, rate, subtype="FLOAT"))
    assert abs(len(decoded) - 16000) <= 1
    expected = np.sin(2 * np.pi * 440.0 * np.arange(len(decoded)) / SAMPLE_RATE)
    np.testing.assert_allclose(decoded[800:-800], expected[800:-800], rtol=0, atol=1e-3)


def test_content_above_8_khz_is_removed_not_folded():
    tone = np.sin(2 * np.pi * 11000.0 * np.arange(48000) / 48000)
    assert np.abs(load_audio((tone, 48000))[800:-800]).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_block_decoding_equals_one_shot_decoding(monkeypatch, rate, channels):
    samples = noise(30011, channels)
    data = encode(samples, rate)
    mono = samples.mean(axis=1)
    expected = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    np.testing.assert_array_equal(load_audio(data), expected)
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    np.testing.assert_array_equal(load_audio(data), expected)
    np.testing.assert_array_equal(load_audio((samples, rate)), expected)


@pytest.mark.parametrize(
    ("format", "subtype"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
)
def test_compressed_blocks_join_without_a_seam(monkeypatch, format, subtype):
    data = encode(speechlike(40000), format=format, subtype=subtype)
    whole = load_audio(data)
    monkeypatch.setattr(audio, "_BLOCK", 777)
    np.testing.assert_array_equal(load_audio(data), whole)


def test_stereo_is_averaged():
    stereo = np.stack([np.full(400, 0.5), np.full(400, -0.25)], axis=1)
    np.testing.assert_array_equal(load_audio(encode(stereo)), np.full(400, 0.125, np.float32))
    np.testing.assert_array_equal(load_audio((stereo, SAMPLE_RATE)), np.full(400, 0.125, np.float32))


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("int8", [-128, 0, 127], [-1.0, 0.0, 127 / 128]),
        ("uint8", [0, 128, 255], [-1.0, 0.0, 127 / 128]),
        ("int16", [-32768, 1, 32767], [-1.0, 1 / 32768, 32767 / 32768]),
        (">i2", [-32768, 1, 32767], [-1.0, 1 / 32768, 32767 / 32768]),
        ("uint16", [0, 32768, 65535], [-1.0, 0.0, 32767 / 32768]),
        ("int32", [-(2**31), 2**30, 1], [-1.0, 0.5, 2.0**-31]),
        ("int64", [-(2**63), 2**62, 0], [-1.0, 0.5, 0.0]),
        ("float16", [-1.5, 0.25, 0.0], [-1.5, 0.25, 0.0]),
        ("float32", [-1.5, 0.1, 0.0], [-1.5, 0.1, 0.0]),
        (">f4", [-1.5, 0.1, 0.0], [-1.5, 0.1, 0.0]),
        ("float64", [-1.5, 0.1, 0.0], [-1.5, 0.1, 0.0]),
    ],
)
def test_array_scale(dtype, values, expected):
    decoded = load_audio((np.tile(np.array(values, dtype), 100), np.int64(SAMPLE_RATE)))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, np.tile(np.array(expected, np.float32), 100))


def test_array_result_does_not_share_memory_with_the_argument():
    samples = noise(1000)
    decoded = load_audio((samples, SAMPLE_RATE))
    np.testing.assert_array_equal(decoded, samples)
    assert not np.shares_memory(decoded, samples)


def test_another_target_rate():
    samples = noise(8000)
    np.testing.assert_array_equal(load_audio(encode(samples, 8000), sample_rate=8000), samples)
    assert len(load_audio(encode(samples, 8000), sample_rate=48000)) == 48000


# --- parts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [("WAV", "PCM_16", 0), ("FLAC", "PCM_16", 0), ("OGG", "VORBIS", 0), ("MP3", "MPEG_LAYER_III", 1e-6)],
)
def test_a_part_equals_a_slice_of_the_whole(format, subtype, tolerance):
    data = encode(speechlike(48000), format=format, subtype=subtype)
    whole = load_audio(data)
    for offset, duration in [(0.0, 1.0), (0.5, 0.25), (1.2345, 1.0), (2.5, None), (2.5, 99.0), (0.0, 1e9)]:
        first = round(offset * SAMPLE_RATE)
        last = None if duration is None else first + round(duration * SAMPLE_RATE)
        part = load_audio(data, offset=offset, duration=duration)
        np.testing.assert_allclose(part, whole[first:last], rtol=0, atol=tolerance)


def test_a_part_of_opus_has_the_right_place():
    data = encode(speechlike(15 * SAMPLE_RATE), format="OGG", subtype="OPUS")
    whole = load_audio(data)
    for offset in (0.5, 2.0, 5.0, 9.99, 13.0):  # a bare seek to 2.0 is off by 0.08
        first = round(offset * SAMPLE_RATE)
        part = load_audio(data, offset=offset, duration=1.0)
        np.testing.assert_array_equal(part, whole[first : first + SAMPLE_RATE])


def test_a_part_of_an_array_and_of_a_flac_of_unknown_length():
    samples = noise(48000)
    unknown = with_flac_length(encode(samples, format="FLAC"), FLAC_UNKNOWN_LENGTH)
    for source in [(samples, SAMPLE_RATE), unknown]:
        np.testing.assert_array_equal(load_audio(source, offset=1.0, duration=0.5), samples[16000:24000])
        np.testing.assert_array_equal(load_audio(source, offset=2.9, duration=5.0), samples[46400:])


def test_a_part_is_cut_before_resampling():
    samples = noise(44100)
    part = load_audio((samples, 44100), offset=0.25, duration=0.5)
    np.testing.assert_array_equal(part, load_audio((samples[11025:33075], 44100)))


@pytest.mark.parametrize("offset", [3.0, 3.5, 1e12])
def test_offset_beyond_the_end(offset):
    data = encode(noise(48000))
    where = f"offset {offset:g} s is beyond its end at 3 s; choose one within it"
    assert message(AudioError, data, offset=offset) == f"<bytes>: {where}"
    assert message(AudioError, (noise(48000), SAMPLE_RATE), offset=offset) == f"<array>: {where}"
    unknown = with_flac_length(encode(noise(48000), format="FLAC"), FLAC_UNKNOWN_LENGTH)
    assert message(AudioError, unknown, offset=3.5, duration=1.0) == (
        "<bytes>: offset 3.5 s is beyond its end; choose one within it"
    )
    assert message(AudioError, unknown, offset=3.0) == "<bytes>: holds no samples; record or export it again"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"offset": -1.0}, "<bytes>: offset is -1.0 s; give a number of seconds from 0"),
        ({"offset": float("nan")}, "<bytes>: offset is nan s; give a number of seconds from 0"),
        ({"duration": 0.0}, "<bytes>: duration is 0.0 s; give a number of seconds above 0"),
        ({"duration": -2.0}, "<bytes>: duration is -2.0 s; give a number of seconds above 0"),
        ({"duration": float("inf")}, "<bytes>: duration is inf s; give a number of seconds above 0"),
        (
            {"duration": 0.001},
            "<bytes>: 16 samples at 16000 Hz is too short for one feature frame; give at least 10 ms",
        ),
        (
            {"offset": 2.999},
            "<bytes>: 16 samples at 16000 Hz is too short for one feature frame; give at least 10 ms",
        ),
        ({"sample_rate": 0}, "<bytes>: sample rate is 0; give a positive whole number of Hz"),
    ],
)
def test_bad_parts(options, expected):
    assert message(AudioError, encode(noise(48000)), **options) == expected


# --- limits -------------------------------------------------------------------


def test_a_flac_that_declares_68_billion_frames_allocates_nothing_for_them():
    lying = with_flac_length(encode(noise(48000), format="FLAC"), FLAC_LONGEST)
    tracemalloc.start()
    try:
        text = message(AudioError, lying)
        _, peak_declared = tracemalloc.get_traced_memory()
        part = load_audio(lying, duration=1.0)
        broken = message(AudioError, lying, limits=AudioLimits(max_seconds=1e9))
        _, peak_decoded = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text == (
        "<bytes>: 4294967 s to decode, the limit is 14400 s; "
        "cut it, pass offset and duration, or raise AudioLimits.max_seconds"
    )
    assert broken == "<bytes>: breaks off after 3.00 s, 68719476735 samples are declared; copy it again"
    np.testing.assert_array_equal(part, noise(48000)[:16000])
    assert peak_declared < 2 << 20
    assert peak_decoded < 16 << 20


def test_a_wav_that_declares_more_than_it_holds_allocates_nothing_for_it():
    data = bytearray(encode(noise(1600)))
    data[40:44] = struct.pack("<I", 2_000_000_000)
    tracemalloc.start()
    try:
        text = message(AudioError, bytes(data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text == "<bytes>: is truncated, 3200 of 2000000000 declared bytes are there; copy it again"
    assert peak < 2 << 20


def test_seconds_are_limited_while_decoding(monkeypatch):
    """A header without a length gives no warning: decoding itself must stop, one block after the limit."""
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    decoded = []
    downmix = audio._downmix
    monkeypatch.setattr(audio, "_downmix", lambda block: decoded.append(len(block)) or downmix(block))
    unknown = with_flac_length(encode(noise(160000), format="FLAC"), FLAC_UNKNOWN_LENGTH)
    assert message(AudioError, unknown, limits=AudioLimits(max_seconds=1.0)) == (
        "<bytes>: goes on, the limit is 1 s; cut it, pass offset and duration, or raise AudioLimits.max_seconds"
    )
    assert 16000 < sum(decoded) <= 17000


def test_seconds_limit_is_inclusive_and_counts_only_the_part():
    limits = AudioLimits(max_seconds=1.0)
    for channels in (1, 2):
        assert len(load_audio(encode(noise(16000, channels)), limits=limits)) == 16000
    assert len(load_audio((noise(16000), SAMPLE_RATE), limits=limits)) == 16000
    assert message(AudioError, (noise(16001), SAMPLE_RATE), limits=limits).startswith("<array>: 1 s to decode,")
    assert len(load_audio(encode(noise(48000)), offset=1.5, duration=1.0, limits=limits)) == 16000


def test_memory_of_long_multichannel_input_is_bounded():
    """The result is 3.8 MB and the decoded input 92 MB; peak is two results and a few blocks."""
    silence = encode(np.zeros((48000 * 60, 8), np.int16), 48000, "FLAC")
    tracemalloc.start()
    try:
        samples = load_audio(silence)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert samples.shape == (960000,)
    assert peak < 40 << 20


def test_bytes_are_limited_before_opening(tmp_path):
    data = encode(noise(1600))
    path = tmp_path / "big.wav"
    path.write_bytes(data)
    limits = AudioLimits(max_bytes=len(data) - 1)
    fact = f"{len(data)} bytes are over the limit of {len(data) - 1}"
    expected = f"{fact}; split the file or raise AudioLimits.max_bytes"
    assert message(AudioError, path, limits=limits) == f"{path}: {expected}"
    assert message(AudioError, data, limits=limits) == f"<bytes>: {expected}"
    assert len(load_audio(path, limits=AudioLimits(max_bytes=len(data)))) == 1600


def test_a_sparse_file_over_the_default_limit_is_refused_at_once(tmp_path):
    path = tmp_path / "huge.wav"
    with path.open("wb") as file:
        file.truncate(3 * 1024**3)
    assert message(AudioError, path).startswith(f"{path}: 3221225472 bytes are over the limit of 2147483648;")


@pytest.mark.parametrize("rate", [3999, 192001, 1, 2**31 - 1])
def test_rate_limits(rate):
    header = bytearray(encode(noise(400)))
    header[24:28] = struct.pack("<I", rate)
    expected = f"sample rate {rate} Hz is outside 4000 to 192000 Hz; check the header or resample"
    assert message(AudioError, bytes(header)) == f"<bytes>: {expected}"
    assert message(AudioError, (noise(400), rate)) == f"<array>: {expected}"


@pytest.mark.parametrize("rate", [0, -16000, 16000.0, "16000", None, True])
def test_rate_of_an_array_must_be_a_positive_whole_number(rate):
    expected = f"<array>: sample rate is {rate!r}; give a positive whole number of Hz"
    assert message(AudioError, (noise(400), rate)) == expected


def test_channel_limits():
    expected = "9 channels, 1 to 8 are allowed; pick channels (arrays are [N, channels])"
    assert message(AudioError, encode(noise(400, 9))) == f"<bytes>: {expected}"
    assert message(AudioError, (noise(400, 9), SAMPLE_RATE)) == f"<array>: {expected}"
    assert message(AudioError, (noise(400, 2).T, SAMPLE_RATE)).startswith("<array>: 400 channels,")
    assert message(AudioError, (np.zeros((400, 0)), SAMPLE_RATE)).startswith("<array>: 0 channels,")
    assert len(load_audio(encode(noise(400, 8)))) == 400


# --- files that cannot be opened ----------------------------------------------


def test_missing_file(tmp_path):
    assert message(StorageError, tmp_path / "no.wav") == f"{tmp_path}/no.wav: no such file; check the path"
    assert message(StorageError, "") == "'': no such file; check the path"


def test_directory(tmp_path):
    assert message(StorageError, tmp_path) == f"{tmp_path}: is a directory; name a sound file in it"


def test_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "secret.wav"
    path.write_bytes(encode(noise(400)))

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)  # not chmod: root may read everything
    assert message(StorageError, path) == f"{path}: permission denied; make it readable for this user"


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "pipe.wav"
    os.mkfifo(path)
    assert message(StorageError, path) == f"{path}: is not a regular file; save the sound to a file first"


def test_names_that_no_file_can_have(tmp_path):
    assert message(StorageError, "a\0b.wav") == ("'a\\x00b.wav': cannot be opened (embedded null byte); check the path")
    assert re.fullmatch(
        r"x{300}: cannot be opened \(File name too long\); check the path", message(StorageError, "x" * 300)
    )
    assert message(StorageError, tmp_path / "two\nlines.wav").endswith("two\\nlines.wav': no such file; check the path")


def test_empty_file(tmp_path):
    path = tmp_path / "empty.wav"
    path.touch()
    assert message(AudioError, path) == f"{path}: is empty (0 bytes); record or copy it again"
    assert message(AudioError, b"") == "<bytes>: is empty (0 bytes); record or copy it again"


@pytest.mark.parametrize("source", [None, 3, io.BytesIO(b""), ["a.wav"]])
def test_other_sources(source):
    expected = f"<{type(source).__name__}>: not a path, bytes or (samples, rate); pass one of these"
    assert message(AudioError, source) == expected


def test_opening_leaves_no_descriptor_behind(tmp_path):
    good, bad = tmp_path / "good.flac", tmp_path / "bad.flac"
    good.write_bytes(encode(noise(4000), format="FLAC"))
    bad.write_bytes(good.read_bytes()[:-50])
    text = tmp_path / "text.wav"
    text.write_text("words " * 100)
    load_audio(good)
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        load_audio(good)
        message(AudioError, bad)
        message(AudioError, text)
    assert len(os.listdir("/dev/fd")) == before


# --- files that are not what they say -----------------------------------------


def test_text_called_wav(tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("these are words, not waves\n" * 40)
    assert message(AudioError, path) == (
        f"{path}: not audio that libsndfile can read (Format not recognised); convert it to WAV or FLAC"
    )


def test_headerless_audio(tmp_path):
    path = tmp_path / "take.raw"
    path.write_bytes(bytes(3200))
    assert message(AudioError, path) == (
        f"{path}: not audio that libsndfile can read (Format not recognised); "
        "headerless sound does not say its rate: wrap it in WAV, or pass (samples, rate)"
    )


@pytest.mark.parametrize(
    ("format", "subtype", "name"),
    [
        ("FLAC", "PCM_16", "a.wav"),
        ("MP3", "MPEG_LAYER_III", "a.flac"),
        ("WAV", "PCM_16", "a.mp3"),
        ("OGG", "OPUS", "a.wav"),
        ("WAV", "PCM_16", "a.raw"),
        ("WAV", "PCM_16", "no extension"),
    ],
)
def test_content_decides_not_the_extension(tmp_path, format, subtype, name):
    data = encode(speechlike(16000), format=format, subtype=subtype)
    (tmp_path / name).write_bytes(data)
    np.testing.assert_array_equal(load_audio(str(tmp_path / name)), load_audio(data))


# --- truncated files ----------------------------------------------------------


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ULAW"])
@pytest.mark.parametrize("lost", [1, 1000])
def test_truncated_wav(tmp_path, subtype, lost):
    data = encode(noise(16000), subtype=subtype)
    size = 16000 * {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4, "ULAW": 1}[subtype]
    path = tmp_path / "cut.wav"
    path.write_bytes(data[:-lost])
    expected = f"is truncated, {size - lost} of {size} declared bytes are there; copy it again"
    assert message(AudioError, path) == f"{path}: {expected}"
    assert message(AudioError, data[:-lost], duration=0.1) == f"<bytes>: {expected}"


@pytest.mark.parametrize("format", ["AIFF", "AU", "W64", "RF64"])
def test_other_uncompressed_files_truncated(format):
    data = encode(noise(16000), format=format)
    assert re.fullmatch(
        r"<bytes>: is truncated, \d+ of \d+ declared bytes are there; copy it again",
        message(AudioError, data[: len(data) // 2]),
    )


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_written_to_a_pipe_has_no_size_and_is_read_to_its_end(size):
    data = bytearray(encode(noise(16000)))
    data[4:8] = data[40:44] = struct.pack("<I", size)
    np.testing.assert_array_equal(load_audio(bytes(data)), noise(16000))


def test_a_wav_whose_riff_size_alone_is_wrong_is_read():
    data = bytearray(encode(noise(16000)))
    data[4:8] = struct.pack("<I", len(data))  # should be 8 less; many writers get this wrong
    np.testing.assert_array_equal(load_audio(bytes(data)), noise(16000))


@pytest.mark.parametrize("keep", [0.5, 0.9, -1])
def test_truncated_flac(keep):
    data = encode(noise(48000), format="FLAC")
    cut = data[: int(len(data) * keep)] if keep > 0 else data[:-1]
    for source in (cut, with_flac_length(cut, FLAC_UNKNOWN_LENGTH)):
        assert re.fullmatch(
            r"<bytes>: breaks off after [012]\.\d\d s \(flac decoder lost sync\); copy it again",
            message(AudioError, source),
        )


def test_flac_cut_within_its_header():
    data = encode(noise(48000), format="FLAC")
    assert "not audio that libsndfile can read" in message(AudioError, data[:60])


def test_flac_that_declares_one_sample_more_than_it_holds():
    data = with_flac_length(encode(noise(48000), format="FLAC"), 48001)
    expected = "<bytes>: breaks off after 3.00 s, 48001 samples are declared; copy it again"
    assert message(AudioError, data) == expected
    assert len(load_audio(data, offset=1.0, duration=2.0)) == 32000


def test_flac_of_undeclared_length_is_read_to_its_end():
    data = with_flac_length(encode(noise(48000), format="FLAC"), FLAC_UNKNOWN_LENGTH)
    np.testing.assert_array_equal(load_audio(data), noise(48000))


def test_damaged_flac():
    data = bytearray(encode(noise(48000), format="FLAC"))
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    assert re.match(r"<bytes>: breaks off after \d\.\d\d s \(.*\); copy it again$", message(AudioError, bytes(data)))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("keep", [60, 0.5, -1])
def test_truncated_ogg(subtype, keep):
    data = encode(speechlike(48000), format="OGG", subtype=subtype)
    cut = data[: int(len(data) * keep)] if 0 < keep < 1 else data[:keep]
    expected = "<bytes>: is truncated, its Ogg stream has no last page; copy it again"
    assert message(AudioError, cut) == expected
    assert len(load_audio(data + bytes(300))) == 48000  # padding after the last page is no harm


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_not_silently_shortened(subtype):
    data = encode(speechlike(32000), format="OGG", subtype=subtype)
    other = bytearray(encode(speechlike(32000), format="OGG", subtype=subtype))
    assert data[14:18] != other[14:18]  # serial numbers
    assert message(AudioError, data + bytes(other)) == (
        "<bytes>: holds several Ogg streams and only one can be read; convert it to WAV"
    )


def test_damaged_opus():
    data = bytearray(encode(speechlike(64000), format="OGG", subtype="OPUS"))
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    assert re.fullmatch(
        r"<bytes>: breaks off after \d\.\d\d s, 64000 samples are declared; copy it again",
        message(AudioError, bytes(data)),
    )


def mp3(seconds: float, **options) -> bytes:
    samples = speechlike(int(seconds * SAMPLE_RATE)) * (np.arange(int(seconds * SAMPLE_RATE)) > 16000)
    return encode(samples, format="MP3", subtype="MPEG_LAYER_III", **options)


def without_length_header(data: bytes) -> bytes:
    """The MP3 without its first frame, which carries the Xing or Info header and no sound."""
    return data[data.index(data[:2], 4) :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_truncated_mp3(mode):
    data = mp3(10, bitrate_mode=mode)
    assert len(load_audio(data)) == 160000
    tag = b"ID3\x03\x00\x00" + bytes([0, 2, 0x1C, 0x20]) + bytes((2 << 14) + (0x1C << 7) + 0x20)
    for whole in (data, tag + data):
        assert re.fullmatch(
            r"<bytes>: breaks off after \d\.\d\d s, 160000 samples are declared; copy it again",
            message(AudioError, whole[: len(whole) - len(data) // 2]),
        )


def test_mp3_of_constant_rate_without_a_header_has_an_estimated_length():
    data = without_length_header(mp3(10, bitrate_mode="CONSTANT"))
    whole = load_audio(data)
    assert 160000 <= len(whole) < 163000
    assert 70000 < len(load_audio(data[: len(data) // 2])) < 90000  # no one can tell that it was cut


def test_mp3_that_libsndfile_would_shorten():
    """Files joined end to end: the first one's length header ends the decoding, whatever follows."""
    loud_first = mp3(1, bitrate_mode="CONSTANT", compression_level=0.0)
    sources = [mp3(10, bitrate_mode="VARIABLE") * 2, loud_first + mp3(10, bitrate_mode="CONSTANT")]
    for source in sources:
        assert re.fullmatch(
            r"<bytes>: holds sound beyond the (10|1)\.00 s that its MP3 header gives; "
            "convert it to WAV or FLAC",
            message(AudioError, source),
        )
    assert len(load_audio(sources[0], duration=5.0)) == 80000


def test_mp3_of_variable_rate_whose_length_is_guessed_too_short():
    loud_then_quiet = np.concatenate([noise(2000), 0.002 * noise(318000)])
    data = encode(loud_then_quiet, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE")
    assert len(load_audio(data)) == 320000
    assert re.fullmatch(
        r"<bytes>: holds sound beyond the \d\.\d\d s that its MP3 header gives; convert it to WAV or FLAC",
        message(AudioError, without_length_header(data)),
    )


# --- samples that are no sound ------------------------------------------------


def test_no_samples():
    assert message(AudioError, encode(noise(0))) == "<bytes>: holds no samples; record or export it again"
    assert message(AudioError, (noise(0), 8000)) == "<array>: holds no samples; record or export it again"


@pytest.mark.parametrize(
    ("frames", "rate", "count"),
    [
        (1, 16000, "1 sample"),
        (159, 16000, "159 samples"),
        (440, 44100, "440 samples"),
        (1, 192000, "1 sample"),
    ],
)
def test_too_short(frames, rate, count):
    expected = f"{count} at {rate} Hz is too short for one feature frame; give at least 10 ms"
    assert message(AudioError, encode(noise(frames), rate)) == f"<bytes>: {expected}"
    assert message(AudioError, (noise(frames), rate)) == f"<array>: {expected}"


@pytest.mark.parametrize(("frames", "rate"), [(160, 16000), (441, 44100), (80, 8000), (1920, 192000)])
def test_just_long_enough_is_one_hop(frames, rate):
    assert len(load_audio((noise(frames), rate))) == 160


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_not_finite(monkeypatch, bad, channels):
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    samples = noise(16000, channels)
    samples[4000, -1] = bad
    expected = "holds NaN or infinite samples (0.250 s in); export it again"
    assert message(AudioError, encode(samples, subtype="FLOAT")) == f"<bytes>: {expected}"
    assert message(AudioError, (samples, SAMPLE_RATE)) == f"<array>: {expected}"


def test_numbers_beyond_float32_are_infinite():
    expected = "<array>: holds NaN or infinite samples (0.000 s in); export it again"
    assert message(AudioError, (np.full(400, 1e300), SAMPLE_RATE)) == expected
    opposite = np.tile([[np.inf, -np.inf]], (400, 1))
    assert message(AudioError, (opposite, SAMPLE_RATE)) == expected


@pytest.mark.parametrize(
    ("samples", "described"),
    [
        (np.zeros(400, complex), "1-D complex128"),
        (np.array(["a"] * 400), "1-D <U1"),
        (np.zeros(400, bool), "1-D bool"),
        (np.zeros(400, object), "1-D object"),
        (np.zeros((4, 4, 4)), "3-D float64"),
        (np.array(1.0), "0-D float64"),
    ],
)
def test_arrays_that_are_no_samples(samples, described):
    expected = f"<array>: samples are {described}; pass [N] or [N, channels] numbers"
    assert message(AudioError, (samples, SAMPLE_RATE)) == expected


@pytest.mark.parametrize("source", [(noise(400),), ([0.0] * 400, SAMPLE_RATE), (), (noise(400), 16000, 1)])
def test_tuples_that_are_not_samples_and_rate(source):
    expected = "<array>: not (samples, rate) with a numpy array of samples; pass such a pair"
    assert message(AudioError, source) == expected


# --- trim_silence -------------------------------------------------------------


def burst(frames: int, start: int, stop: int, quiet: float, loud: float) -> np.ndarray:
    t = np.arange(frames)
    return (np.where((t >= start) & (t < stop), loud, quiet) * np.sin(0.3 * t)).astype(np.float32)


@pytest.mark.parametrize(
    ("samples", "top_db", "interval"),
    [  # intervals given by librosa 0.11.0
        (burst(16000, 4000, 9000, 1e-5, 0.5), 60, (3072, 10240)),
        (burst(16000, 4000, 9000, 1e-3, 0.5), 60, (0, 16000)),
        (burst(16000, 4000, 9000, 1e-3, 0.5), 40, (3072, 10240)),
        (burst(5000, 0, 700, 1e-5, 0.5), 60, (0, 2048)),
        (burst(16001, 15990, 16001, 0, 0.5), 60, (15360, 16001)),
        (burst(16000, 4000, 9000, 1e-7, 1e-3), 60, (0, 16000)),  # quieter than the 1e-5 floor: kept
        (burst(16000, 5000, 6000, 0, 1e-4), 20, (0, 16000)),
        (burst(100, 0, 100, 0.1, 0.1), 60, (0, 100)),
        (burst(16000, 0, 0, 0, 0), 60, (0, 16000)),
    ],
)
def test_trim_silence_equals_librosa(samples, top_db, interval):
    trimmed = trim_silence(samples, top_db)
    np.testing.assert_array_equal(trimmed, samples[slice(*interval)])
    assert np.shares_memory(trimmed, samples)


def test_trim_silence_equals_the_definition_frame_by_frame():
    generator = np.random.default_rng(5)
    for _ in range(20):
        frames = int(generator.integers(1, 20000))
        start, stop = np.sort(generator.integers(0, frames + 1, 2))
        samples = burst(frames, start, stop, 10 ** generator.uniform(-6, -2), 0.3)
        padded = np.pad(samples.astype(float), 1024)
        rms = [np.sqrt(np.mean(padded[t : t + 2048] ** 2)) for t in range(0, frames + 1, 512)]
        level = 20 * np.log10(np.maximum(rms, 1e-5))
        loud = [t for t, value in enumerate(level) if value > level.max() - 60.0]
        expected = samples[loud[0] * 512 : (loud[-1] + 1) * 512]
        np.testing.assert_array_equal(trim_silence(samples), expected)


def test_trim_silence_of_nothing():
    assert trim_silence(np.empty(0, np.float32)).shape == (0,)


# --- write_wav ----------------------------------------------------------------


def test_write_wav_round_trip(tmp_path):
    samples = noise(5000)
    write_wav(tmp_path / "a.wav", samples)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), samples)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 16000, 5000)
    assert os.listdir(tmp_path) == ["a.wav"]


def test_write_wav_clips_and_rounds(tmp_path):
    write_wav(tmp_path / "a.wav", np.tile([2.0, 1.0, -1.0, -2.0, 1.6 / 32768], 40), 8000)
    values, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 8000
    assert values[:5].tolist() == [32767, 32767, -32768, -32768, 2]


def test_write_wav_has_the_usual_permissions(tmp_path):
    (tmp_path / "other").touch()
    write_wav(tmp_path / "a.wav", noise(400))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.wav", "other")}
    assert len(modes) == 1


def test_write_wav_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError) as caught:
        write_wav(path, noise(400))
    assert str(caught.value) == (
        f"{path}: cannot be written (No space left on device); check the folder, its permissions and free space"
    )
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.wav"]


def test_write_wav_errors(tmp_path):
    with pytest.raises(StorageError, match=r"cannot be written \(No such file or directory\); check the folder"):
        write_wav(tmp_path / "no" / "a.wav", noise(400))
    with pytest.raises(AudioError, match=r"a\.wav: samples are 2-D float32; write \[N\] numbers$"):
        write_wav(tmp_path / "a.wav", noise(400, 2))
    with pytest.raises(AudioError, match=r"a\.wav: samples are NaN or infinite; mend what computed them$"):
        write_wav(tmp_path / "a.wav", np.full(400, np.nan))
    assert os.listdir(tmp_path) == []


# --- the room itself ----------------------------------------------------------


def test_threads_do_not_disturb_each_other():
    sources = [encode(noise(20000, seed=seed), 8000, "FLAC") for seed in range(4)]
    expected = [load_audio(source) for source in sources]
    results: list[np.ndarray | None] = [None] * 4

    def work(index: int) -> None:
        results[index] = load_audio(sources[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, one)


def test_importing_audio_loads_no_codec():
    code = "import sys, jasper_asr.audio; print(sorted({'soundfile', 'soxr'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
