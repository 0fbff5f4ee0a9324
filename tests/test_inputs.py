"""Which recordings a command line names, where their results go, and sounds inside other containers (PyAV)."""

import io
import json
import os
import sys
from pathlib import Path, PurePath

import numpy as np
import pytest

from helpers_audio import nemo_manifest, sound, wav
from jasper_asr.audio import AudioLimits, load_audio
from jasper_asr.data.manifest import read_manifest
from jasper_asr.errors import AudioError, ManifestError, StorageError, UsageError
from jasper_asr.inputs import Input, find_inputs, output_stems

# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """talks/{a.wav, B.FLAC, c.mp4, notes.txt, .hidden.wav}, talks/x/{d.opus, y/e.wav}, talks/.git/f.wav"""
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "B.FLAC", "c.mp4", "notes.txt", ".hidden.wav", "x/d.opus", "x/y/e.wav", ".git/f.wav"):
        path = tmp_path / "talks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"RIFF")
    return tmp_path


def names(*arguments, **options):
    return [item.name for item in find_inputs(arguments, **options)]


def test_files_keep_their_order_and_spelling_and_come_once(tree):
    absolute = str(tree / "talks" / "a.wav")
    assert names("talks/c.mp4", "talks/a.wav", "./talks/a.wav", absolute, "none.wav", "talks/c.mp4") == [
        "talks/c.mp4",
        "talks/a.wav",
        "none.wav",
    ]


def test_a_folder_gives_its_sounds_sorted(tree):
    assert names("talks") == ["talks/B.FLAC", "talks/a.wav", "talks/c.mp4"]
    assert names("talks/", "talks/a.wav") == ["talks/B.FLAC", "talks/a.wav", "talks/c.mp4"]
    found = find_inputs(["talks"], recursive=True)
    assert [str(item.place) for item in found] == ["B.FLAC", "a.wav", "c.mp4", "x/d.opus", "x/y/e.wav"]
    assert [item.source for item in found] == [Path("talks", item.place) for item in found]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("talks/*.wav", ["talks/a.wav"]),
        ("talks/*", ["talks/B.FLAC", "talks/a.wav", "talks/c.mp4"]),  # sounds, as nothing else is asked for
        ("talks/*.txt", ["talks/notes.txt"]),  # fails later, and says why
        ("talks/[ac].*", ["talks/a.wav", "talks/c.mp4"]),
        ("talks/**/*.wav", ["talks/a.wav", "talks/x/y/e.wav"]),
        ("**/?.opus", ["talks/x/d.opus"]),
        ("talks/**", ["talks/B.FLAC", "talks/a.wav", "talks/c.mp4", "talks/x/d.opus", "talks/x/y/e.wav"]),
    ],
)
def test_patterns(tree, pattern, found):
    assert names(pattern) == found


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree):
    (tree / "take [1].wav").write_bytes(b"RIFF")
    (tree / "take 1.wav").write_bytes(b"RIFF")
    assert names("take [1].wav") == ["take [1].wav"]


def test_a_pattern_keeps_the_folders_below_its_fixed_part(tree):
    found = find_inputs(["talks/x/**/*"])
    assert [str(item.place) for item in found] == ["d.opus", "y/e.wav"]


@pytest.mark.parametrize(
    ("argument", "recursive", "message"),
    [
        ("empty", False, "empty: holds no sound files; name another, or give --recursive to look into its folders"),
        ("empty", True, "empty: holds no sound files; name another"),
        ("empty/*", False, "empty/*: matches no sound file; check the pattern"),
        ("[z].wav", False, "[z].wav: matches no sound file; check the pattern"),
    ],
)
def test_nothing_found_is_an_error(tree, argument, recursive, message):
    (tree / "empty").mkdir()
    (tree / "empty" / "readme.md").write_text("")
    with pytest.raises(AudioError) as caught:
        find_inputs(["talks", argument], recursive=recursive)
    assert str(caught.value) == message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_closed_folder_is_an_error(tree):
    (tree / "talks" / "x").chmod(0)
    with pytest.raises(StorageError, match=r"talks/x: cannot be listed \(permission denied\)"):
        find_inputs(["talks"], recursive=True)


def test_links_to_folders_are_not_followed(tree):
    os.symlink(tree / "talks", tree / "talks" / "x" / "round")
    assert len(find_inputs(["talks"], recursive=True)) == 5


def test_stdin(tree):
    (item, other) = find_inputs(["-", "talks/a.wav", "-"], stdin=io.BytesIO(b"RIFFxyz"))
    assert item == Input("-", b"RIFFxyz", PurePath("stdin"))
    assert other.name == "talks/a.wav"

    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    for stdin in (None, Terminal()):
        with pytest.raises(UsageError, match=r"^-: stdin is not a pipe; lead a sound file into it"):
            find_inputs(["-"], stdin=stdin)


# --- manifests ------------------------------------------------------------------------------------------------------


def test_manifests_by_their_content(tree):
    rows = [{"audio_filepath": "talks/a.wav", "duration": 1.0}, {"audio_filepath": "talks/x/d.opus", "text": None}]
    nemo_manifest(tree / "nemo.jsonl", *rows)
    (tree / "list").write_bytes(b"\xef\xbb\xbf\n" + json.dumps([{"files": [{"fname": "talks/c.mp4"}]}]).encode())
    found = find_inputs(["nemo.jsonl", "list", "talks/a.wav"])
    assert [(item.name, str(item.place), item.part) for item in found] == [
        ("talks/a.wav", "talks/a.wav", (0.0, None)),
        ("talks/x/d.opus", "talks/x/d.opus", (0.0, None)),
        ("talks/c.mp4", "talks/c.mp4", (0.0, None)),
    ]
    assert [item.source for item in found] == [tree / item.name for item in found]
    assert names("*.jsonl") == ["talks/a.wav", "talks/x/d.opus"]


def test_parts_of_one_recording_are_inputs_of_their_own(tree):
    row = {"audio_filepath": "talks/a.wav", "duration": 1.5}
    parts = [row | {"offset": 0}, row | {"offset": 1.5}, row | {"offset": 0.0}]
    found = find_inputs([str(nemo_manifest(tree / "parts.jsonl", *parts, {"audio_filepath": "talks/a.wav"}))])
    assert [item.part for item in found] == [(0.0, 1.5), (1.5, 1.5), (0.0, None)]
    assert list(map(str, output_stems(found))) == ["talks/a_0.000-1.500", "talks/a_1.500-3.000", "talks/a"]


def test_a_manifest_stays_inside_its_root_unless_told(tree):
    nemo_manifest(tree / "talks" / "m.jsonl", {"audio_filepath": "../other.wav"})
    with pytest.raises(ManifestError, match=r"leaves the audio root"):
        find_inputs(["talks/m.jsonl"])
    (item,) = find_inputs(["talks/m.jsonl"], allow_outside_root=True)
    assert (item.source, str(item.place)) == (tree / "other.wav", "other.wav")
    nemo_manifest(tree / "m.jsonl", {"audio_filepath": "d.opus"})
    (item,) = find_inputs(["m.jsonl"], audio_root=tree / "talks" / "x")
    assert item.source == tree / "talks" / "x" / "d.opus"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio_filepath": "a.wav", "duration": 1.0}, "key 'text' is missing; add it"),
        ({"audio_filepath": "a.wav", "text": "x"}, "key 'duration' is missing; add it"),
        ({"audio_filepath": "a.wav", "text": None, "duration": 1.0}, "key 'text' is null, not a string; …"),
    ],
)
def test_rows_without_text_are_for_transcription_only(tmp_path, row, message):
    manifest = nemo_manifest(tmp_path / "m.jsonl", row)
    with pytest.raises(ManifestError) as caught:
        read_manifest(manifest)
    assert str(caught.value).startswith(f"{manifest}:1: {message.removesuffix('…')}")
    (utterance,) = read_manifest(manifest, labelled=False)
    assert (utterance.text, utterance.duration) == (row.get("text"), row.get("duration"))


def test_what_a_row_says_must_be_right_all_the_same(tmp_path):
    for row in ({"audio_filepath": "a.wav", "text": 5}, {"audio_filepath": "a.wav", "duration": "1"}, {"text": "x"}):
        with pytest.raises(ManifestError):
            read_manifest(nemo_manifest(tmp_path / "m.jsonl", row), labelled=False)
    (tmp_path / "m.json").write_text(json.dumps([{"files": [{"fname": "a.wav"}]}]))
    with pytest.raises(ManifestError, match="key 'transcript' is missing"):
        read_manifest(tmp_path / "m.json")
    assert read_manifest(tmp_path / "m.json", labelled=False)[0].text is None


# --- names of results -----------------------------------------------------------------------------------------------


def stems(*paths):
    return [str(stem) for stem in output_stems(find_inputs(paths))]


def test_results_are_called_as_their_recordings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stems("a.wav", "x/b.wav", "c.tar.flac", "noise") == ["a", "b", "c.tar", "noise"]


def test_the_suffix_stays_where_stems_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stems("a.wav", "b.wav", "a.flac") == ["a.wav", "b", "a.flac"]
    assert stems("a.flac", "b.wav", "a.wav") == ["a.flac", "b", "a.wav"]
    assert stems("a.wav", "a.flac", "a.wav.mp3") == ["a.wav", "a.flac", "a.wav.mp3"]


def test_the_folders_count_where_names_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stems("x/a.wav", "y/a.wav", "x/b.wav") == ["x/a.wav", "y/a.wav", "b"]


def test_results_never_share_a_name():
    rng = np.random.default_rng(3)
    parts = ["a", "b", "a.wav", "b.wav"]
    for _ in range(200):
        paths = {"/".join(rng.choice(parts, rng.integers(1, 4))) + rng.choice([".wav", ".flac", ""]) for _ in range(6)}
        inputs = [Input(path, Path(path), PurePath(path).relative_to(PurePath(path).parent)) for path in sorted(paths)]
        found = output_stems(inputs)
        assert len(set(found)) == len(inputs)
        assert all(not stem.is_absolute() and ".." not in stem.parts for stem in found)


def test_names_that_cannot_be_told_apart(tmp_path):
    twice = [Input("stdin", b"x", PurePath("stdin")), Input("stdin", b"y", PurePath("stdin"))]
    with pytest.raises(UsageError, match=r"^stdin and stdin: their results would share a name; transcribe them apart$"):
        output_stems(twice)


# --- containers that libsndfile does not know -----------------------------------------------------------------------


def container(samples, kind="ipod", codec="alac", rate=16_000, path=None, **options):
    """Samples [N] or [N, 2] as a file of FFmpeg's muxer `kind`."""
    av = pytest.importorskip("av")
    target = io.BytesIO() if path is None else str(path)
    samples = np.atleast_2d(samples.T)
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(target, "w", format=kind, options=options) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
        frame.sample_rate = rate
        for part in [*av.AudioResampler(format=stream.format.name, layout=layout, rate=rate).resample(frame), None]:
            for packet in stream.encode(part):
                file.mux(packet)
    return target.getvalue() if path is None else path.read_bytes()


@pytest.mark.parametrize(("kind", "codec"), [("ipod", "alac"), ("mov", "pcm_s16le"), ("matroska", "pcm_s16le")])
def test_lossless_sound_comes_out_as_it_went_in(kind, codec):
    samples = np.round(sound(1.3) * 32768) / 32768
    decoded = load_audio(container(samples, kind, codec))
    np.testing.assert_allclose(decoded, samples, atol=1.01 / 32768)  # FFmpeg rounds on the way in
    part = load_audio(container(samples, kind, codec), offset=0.5, duration=0.25)
    assert np.array_equal(part, decoded[8000:12_000])


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("adts", "aac"), ("mpegts", "aac")])
def test_aac_is_close_and_may_have_its_encoder_s_delay(kind, codec):
    samples = np.sin(np.arange(32_000) ** 1.5 / 2000).astype(np.float32) * 0.5
    decoded = load_audio(container(samples, kind, codec))
    assert 32_000 <= len(decoded) <= 35_072  # three frames of 1024
    best = max(
        np.corrcoef(samples, decoded[lag : lag + 32_000])[0, 1] for lag in (0, 1024) if lag <= len(decoded) - 32_000
    )
    assert best > 0.98


def test_channels_are_averaged_and_the_rate_is_changed():
    samples = np.stack([sound(1.0, 0), sound(1.0, 1)], axis=1)
    decoded = load_audio(container(samples, "mov", "pcm_f32le"))
    np.testing.assert_allclose(decoded, samples.mean(axis=1), atol=1e-6)
    assert len(load_audio(container(samples, "mov", "pcm_f32le", rate=8_000))) == 32_000


def refused(data, **options):
    with pytest.raises(AudioError) as caught:
        load_audio(data, **options)
    return str(caught.value)


def test_limits_hold_for_containers():
    data = container(sound(3.0), "mp4", "aac")
    assert refused(data, limits=AudioLimits(max_seconds=1)).startswith("<bytes>: 3 s to decode, the limit is 1 s; ")
    adts = container(sound(3.0), "adts", "aac")
    assert "the limit is 2 s" in refused(adts, limits=AudioLimits(max_seconds=2))
    assert len(load_audio(adts, duration=0.5, limits=AudioLimits(max_seconds=1))) == 8_000
    assert refused(data, limits=AudioLimits(max_bytes=100)).startswith(f"<bytes>: {len(data)} bytes are over the limit")
    assert refused(data, limits=AudioLimits(max_rate=8_000)).startswith("<bytes>: sample rate 16000 Hz is outside ")
    assert refused(data, offset=9.0) == "<bytes>: offset 9 s is beyond its end; choose one within it"


def test_a_container_that_breaks_off(tmp_path):
    whole = container(sound(3.0), "mp4", "aac", path=tmp_path / "a.mp4", movflags="faststart")
    assert len(load_audio(whole)) >= 48_000
    for size in (len(whole) // 2, len(whole) - 1000):
        assert refused(whole[:size]).startswith("<bytes>: breaks off after ")
    assert refused(whole[:40]) == "<bytes>: holds no audio stream; give a file with sound"


def test_a_video_without_sound(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for number in range(3):
            picture = av.VideoFrame.from_ndarray(np.zeros((24, 16), np.uint8), format="yuv420p")
            picture.pts = number
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
    expected = f"{tmp_path / 'v.mp4'}: holds no audio stream; give a file with sound"
    assert refused(tmp_path / "v.mp4") == expected


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_playlists_open_no_other_file(tmp_path, content):
    pytest.importorskip("av")
    path = wav(tmp_path / "secret.wav", 1.0)
    (tmp_path / "list.mp4").write_text(content.format(path=path))
    assert refused(tmp_path / "list.mp4").startswith(f"{tmp_path}/list.mp4: not audio that libsndfile can read")


def test_without_pyav_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(99))
    assert refused(tmp_path / "a.mp4") == (
        f"{tmp_path}/a.mp4: not audio that libsndfile can read (Format not recognised); "
        "pip install 'jasper-asr[av]' for video and more formats, or convert it to WAV or FLAC"
    )
    (tmp_path / "a.wav").write_bytes(b"no sound at all")
    assert refused(tmp_path / "a.wav").endswith("(Format not recognised); convert it to WAV or FLAC")
    assert refused(b"no sound at all").endswith("or convert it to WAV or FLAC")
