"""LibriSpeech on a small tree in its layout, and on archives of it served from 127.0.0.1."""

import functools
import hashlib
import io
import json
import re
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

from jasper_asr.data import librispeech
from jasper_asr.data.librispeech import (
    SUBSETS,
    PrepareReport,
    Subset,
    download_librispeech,
    prepare_librispeech,
)
from jasper_asr.data.manifest import read_manifest
from jasper_asr.errors import AudioError, DownloadError, ManifestError, StorageError, UsageError

RATE = 16_000
TEXTS = {
    "dev-clean/84/121123/84-121123-0000": "GO DO YOU HEAR",
    "dev-clean/84/121123/84-121123-0001": "BUT IN LESS THAN FIVE MINUTES",
    "dev-clean/84/121550/84-121550-0000": "HE ISN'T HERE",
    "dev-clean/174/50561/174-50561-0000": "FORGOTTEN TOO THE NAME OF GILLIAN",
    "test-clean/61/70968/61-70968-0000": "HE BEGAN A CONFUSED COMPLAINT",
}
LENGTHS = dict(zip(TEXTS, (8000, 12_345, 16_001, 4001, 7777), strict=True))


def noise(length, seed=0):
    return (np.random.default_rng(seed + length).standard_normal(length) * 3000).astype(np.int16)


@pytest.fixture
def corpus(tmp_path):
    """`<tmp>/LibriSpeech` with five utterances of two subsets, and the files that stand beside them."""
    root = tmp_path / "LibriSpeech"
    for name, text in TEXTS.items():
        audio = root / f"{name}.flac"
        audio.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(audio, noise(LENGTHS[name]), RATE, subtype="PCM_16")
        speaker, chapter, _ = audio.stem.split("-")
        with open(audio.parent / f"{speaker}-{chapter}.trans.txt", "a") as file:
            file.write(f"{audio.stem} {text}\n")
    (root / "SPEAKERS.TXT").write_text("; ID |SEX\n")
    return root


def rows_of(manifest):
    return json.loads(manifest.read_text(encoding="utf-8"))


def flac_row(fname, text, length):
    file = {
        "fname": fname,
        "channels": 1,
        "sample_rate": 16000,
        "bitdepth": 16,
        "encoding": "FLAC",
        "duration": length / 16000,
        "num_samples": length,
        "speed": 1,
    }
    return {
        "transcript": text,
        "files": [file],
        "original_duration": length / 16000,
        "original_num_samples": length,
    }


# --- prepare ----------------------------------------------------------------------------------------------


def test_flacs_are_referred_to_where_they_lie(corpus, tmp_path):
    seen = []
    report = prepare_librispeech(corpus, tmp_path / "m.json", progress=lambda *args: seen.append(args))
    expected = [flac_row(f"LibriSpeech/{name}.flac", TEXTS[name].lower(), LENGTHS[name]) for name in sorted(TEXTS)]
    assert rows_of(tmp_path / "m.json") == expected
    assert report == PrepareReport(tmp_path / "m.json", 5, sum(LENGTHS.values()) / RATE, 0, 0, 0, False)
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("root", [".", "LibriSpeech", "LibriSpeech/dev-clean", "LibriSpeech/dev-clean/84"])
def test_any_folder_of_the_tree_will_do(corpus, tmp_path, root):
    prepare_librispeech(tmp_path / root, tmp_path / "m.json")
    inside = "" if root == "." else f"{root}/"
    expected = [f"LibriSpeech/{n}.flac" for n in sorted(TEXTS) if f"LibriSpeech/{n}".startswith(inside)]
    assert [row["files"][0]["fname"] for row in rows_of(tmp_path / "m.json")] == expected
    assert len(expected) == {".": 5, "LibriSpeech": 5, "LibriSpeech/dev-clean": 4}.get(root, 3)


def test_the_manifest_is_the_same_each_time_and_for_any_number_of_threads(corpus, tmp_path):
    written = []
    for jobs in (1, 1, 3):
        prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=tmp_path / "wav", speeds=[1.1], jobs=jobs)
        written.append((tmp_path / "m.json").read_bytes())
    assert written[0] == written[1] == written[2]


def test_our_reader_reads_it(corpus, tmp_path):
    prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=tmp_path / "wav", speeds=[0.9])
    utterances = read_manifest(tmp_path / "m.json")
    assert [utterance.text for utterance in utterances] == [TEXTS[name].lower() for name in sorted(TEXTS)]
    assert [utterance.duration for utterance in utterances] == [LENGTHS[n] / RATE for n in sorted(TEXTS)]


def test_a_manifest_elsewhere_says_so(corpus, tmp_path):
    (tmp_path / "deep").mkdir()
    report = prepare_librispeech(corpus / "test-clean", tmp_path / "deep" / "m.json")
    assert report.outside
    fname = "../LibriSpeech/test-clean/61/70968/61-70968-0000.flac"
    assert rows_of(tmp_path / "deep" / "m.json")[0]["files"][0]["fname"] == fname


def test_a_linked_corpus_keeps_the_name_of_the_link(corpus, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "data").symlink_to(corpus / "test-clean")
    report = prepare_librispeech(tmp_path / "work" / "data", tmp_path / "work" / "m.json")
    assert rows_of(tmp_path / "work" / "m.json")[0]["files"][0]["fname"] == "data/61/70968/61-70968-0000.flac"
    assert not report.outside


def test_wavs_hold_the_samples_of_the_flacs(corpus, tmp_path):
    report = prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=tmp_path / "wav")
    assert (report.written, report.reused) == (5, 0)
    for row, name in zip(rows_of(tmp_path / "m.json"), sorted(TEXTS), strict=True):
        assert row["files"] == [
            {
                "fname": f"wav/{name}.wav",
                "channels": 1,
                "sample_rate": 16000,
                "bitdepth": 16,
                "encoding": "Signed Integer PCM",
                "duration": LENGTHS[name] / 16000,
                "num_samples": LENGTHS[name],
                "speed": 1,
            }
        ]
        samples, rate = soundfile.read(tmp_path / "wav" / f"{name}.wav", dtype="int16")
        assert rate == RATE
        np.testing.assert_array_equal(samples, noise(LENGTHS[name]))


def test_speed_variants_have_the_length_of_the_formula(corpus, tmp_path):
    report = prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=tmp_path / "wav", speeds=[1.1, 0.9, 1.0, 0.9])
    assert (report.written, report.reused) == (15, 0)
    assert report.seconds == sum(LENGTHS.values()) / RATE
    for row, name in zip(rows_of(tmp_path / "m.json"), sorted(TEXTS), strict=True):
        length = LENGTHS[name]
        lengths = [length, round(length / 0.9), round(length / 1.1)]
        assert [file["speed"] for file in row["files"]] == [1, 0.9, 1.1]
        assert [file["fname"] for file in row["files"]] == [
            f"wav/{name}{suffix}.wav" for suffix in ("", "-speed0.9", "-speed1.1")
        ]
        assert [file["num_samples"] for file in row["files"]] == lengths
        assert [file["duration"] for file in row["files"]] == [n / 16000 for n in lengths]
        assert (row["original_num_samples"], row["original_duration"]) == (length, length / 16000)
        assert [soundfile.info(tmp_path / file["fname"]).frames for file in row["files"]] == lengths


@pytest.mark.parametrize(("speed", "hertz"), [(0.9, 396.0), (1.1, 484.0), (1.0, 440.0)])
def test_a_tone_changes_its_pitch_with_the_speed(tmp_path, speed, hertz):
    folder = tmp_path / "LibriSpeech" / "dev-clean" / "1" / "2"
    folder.mkdir(parents=True)
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4 * RATE) / RATE)
    soundfile.write(folder / "1-2-0000.flac", tone, RATE, subtype="PCM_16")
    (folder / "1-2.trans.txt").write_text("1-2-0000 AH\n")
    prepare_librispeech(tmp_path, tmp_path / "m.json", wav_dir=tmp_path / "wav", speeds=[speed])
    file = rows_of(tmp_path / "m.json")[0]["files"][-1]
    assert file["speed"] == speed
    samples, _ = soundfile.read(tmp_path / file["fname"])
    middle = samples[4000:-4000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 20))
    assert np.argmax(spectrum) * RATE / (1 << 20) == pytest.approx(hertz, abs=0.05)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)


def test_a_second_run_writes_no_wav_again(corpus, tmp_path):
    wav = tmp_path / "wav"
    prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=wav, speeds=[0.9])
    before = {path: path.stat().st_mtime_ns for path in wav.rglob("*.wav")}
    short, gone, broken = sorted(before)[:3]
    first = (tmp_path / "m.json").read_bytes()
    contents = {path: path.read_bytes() for path in (short, gone, broken)}
    assert prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=wav, speeds=[0.9]).reused == 10
    assert {path: path.stat().st_mtime_ns for path in wav.rglob("*.wav")} == before
    soundfile.write(short, noise(100), RATE)
    gone.unlink()
    broken.write_bytes(b"RIFF")
    report = prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=wav, speeds=[0.9])
    assert (report.written, report.reused) == (3, 7)
    assert {path: path.read_bytes() for path in contents} == contents
    after = {path: path.stat().st_mtime_ns for path in wav.rglob("*.wav")}
    assert {path for path in before if after[path] != before[path]} == {short, gone, broken}
    assert (tmp_path / "m.json").read_bytes() == first
    assert {path.suffix for path in wav.rglob("*") if path.is_file()} == {".wav"}


def test_flacs_that_no_transcript_names_are_counted(corpus, tmp_path):
    soundfile.write(corpus / "dev-clean" / "84" / "121123" / "84-121123-0007.flac", noise(99), RATE)
    soundfile.write(corpus / "stray.flac", noise(99), RATE)
    report = prepare_librispeech(corpus, tmp_path / "m.json")
    assert (report.utterances, report.unlisted) == (5, 2)


def test_a_half_unpacked_archive_is_not_looked_at(corpus, tmp_path):
    hidden = tmp_path / ".dev-clean.tar.gz.unpacking" / "LibriSpeech"
    hidden.mkdir(parents=True)
    (hidden / "1-2.trans.txt").write_text("1-2-0000 NEVER WRITTEN\n")
    assert prepare_librispeech(tmp_path, tmp_path / "m.json").utterances == 5


# --- prepare: what is wrong -------------------------------------------------------------------------------


def test_speeds_without_a_folder_for_them(corpus, tmp_path):
    with pytest.raises(UsageError) as error:
        prepare_librispeech(corpus, tmp_path / "m.json", speeds=[0.9])
    assert str(error.value) == (
        f"{tmp_path / 'm.json'}: speeds need a folder for the WAVs they make; give one with --wav-dir"
    )


@pytest.mark.parametrize("speed", [0.0, -1.0, 0.49, 2.01, float("nan"), float("inf")])
def test_speeds_out_of_bounds(corpus, tmp_path, speed):
    with pytest.raises(UsageError, match=re.escape(f"speed {speed:g} is out of bounds; give 0.5 to 2")):
        prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=tmp_path / "wav", speeds=[1.1, speed])


def test_a_folder_without_transcripts(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError) as error:
        prepare_librispeech(tmp_path / "empty", tmp_path / "m.json")
    assert str(error.value) == (
        f"{tmp_path / 'empty'}: holds no *.trans.txt; give the LibriSpeech folder, or one of its subsets, unpacked"
    )
    with pytest.raises(StorageError, match="none: no such folder; give the folder that the archive was"):
        prepare_librispeech(tmp_path / "none", tmp_path / "m.json")


def test_a_listed_flac_that_is_missing(corpus, tmp_path):
    chapter = corpus / "dev-clean" / "84" / "121123"
    (chapter / "84-121123-0001.flac").unlink()
    with pytest.raises(ManifestError) as error:
        prepare_librispeech(corpus, tmp_path / "m.json")
    assert str(error.value) == (
        f"{chapter / '84-121123.trans.txt'}:2: 84-121123-0001.flac is listed but missing; unpack the archive again"
    )
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n84-121123-0000 A\n84-121123-0000 B\n", ":3: 84-121123-0000 is listed twice; remove one"),
        (b"84-121123-0000\n", ":1: 84-121123-0000 has no transcript; expected"),
        (b"84-121123-0000 \n", ":1: 84-121123-0000 has no transcript; expected"),
        (b"../84-121123-0000 A\n", ":1: '../84-121123-0000' is no utterance; expected"),
        (b"84-121123-0000 caf\xe9\n", ": not UTF-8 at byte 18; unpack the archive again"),
    ],
)
def test_bad_transcripts(corpus, tmp_path, content, message):
    path = corpus / "dev-clean" / "84" / "121123" / "84-121123.trans.txt"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as error:
        prepare_librispeech(corpus, tmp_path / "m.json")
    assert str(error.value).startswith(f"{path}{message}")


def with_frames(flac, frames):
    """The FLAC with another number of samples in its header (36 bits at byte 21 of the file)."""
    return flac[:21] + bytes([flac[21] & 0xF0 | frames >> 32]) + (frames & 0xFFFFFFFF).to_bytes(4, "big") + flac[26:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda flac: b"", "not a readable FLAC; unpack the archive again"),
        (lambda flac: b"\0" * 500, "not a readable FLAC; unpack the archive again"),
        (lambda flac: with_frames(flac, 2**36 - 1), "its header says 68719476735 samples; unpack"),
        (lambda flac: wav_bytes(), "holds WAV, not FLAC; unpack the archive again"),
    ],
)
@pytest.mark.parametrize("wav", [None, "wav"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_damaged_flac_is_named(corpus, tmp_path, damage, message, wav, jobs):
    path = corpus / "dev-clean" / "84" / "121550" / "84-121550-0000.flac"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AudioError) as error:
        prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=wav and tmp_path / wav, jobs=jobs)
    assert str(error.value).startswith(f"{path}: {message}")
    assert not (tmp_path / "m.json").exists()


def wav_bytes():
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(500), RATE, format="WAV")
    return buffer.getvalue()


def test_a_flac_that_breaks_off_is_found_when_it_is_converted(corpus, tmp_path):
    path = corpus / "dev-clean" / "84" / "121550" / "84-121550-0000.flac"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(AudioError, match=r"84-121550-0000.flac: "):
        prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=tmp_path / "wav")
    assert not (tmp_path / "wav" / "dev-clean" / "84" / "121550" / "84-121550-0000.wav").exists()


def test_a_manifest_in_no_folder(corpus, tmp_path):
    with pytest.raises(StorageError) as error:
        prepare_librispeech(corpus, tmp_path / "no" / "m.json", wav_dir=tmp_path / "wav")
    assert str(error.value) == f"{tmp_path / 'no' / 'm.json'}: no folder {tmp_path / 'no'}; make it first"
    assert not (tmp_path / "wav").exists()


def test_a_wav_folder_that_cannot_be_made(corpus, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Not a directory; check its permissions"):
        prepare_librispeech(corpus, tmp_path / "m.json", wav_dir=tmp_path / "file")


# --- download ---------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(corpus, tmp_path, monkeypatch):
    """A server with dev-clean.tar.gz as a mirror would have it; its md5 and count stand in SUBSETS."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "www" / "12"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "dev-clean.tar.gz", "w:gz") as tar:
        tar.add(corpus / "SPEAKERS.TXT", "LibriSpeech/SPEAKERS.TXT")
        tar.add(corpus / "dev-clean", "LibriSpeech/dev-clean")
    md5 = hashlib.md5((folder / "dev-clean.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(librispeech.SUBSETS, "dev-clean", Subset(md5, 4))
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/12", folder / "dev-clean.tar.gz", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_subset_is_fetched_checked_and_unpacked(mirror, corpus, tmp_path):
    url, archive, asked = mirror
    fetched, unpacked = [], []
    folder = download_librispeech(
        "dev-clean",
        tmp_path / "out",
        mirror=url + "/",
        progress=lambda *args: fetched.append(args),
        unpack_progress=lambda *args: unpacked.append(args),
    )
    assert folder == tmp_path / "out" / "LibriSpeech" / "dev-clean"
    for path in (corpus / "dev-clean").rglob("*.*"):
        assert (folder / path.relative_to(corpus / "dev-clean")).read_bytes() == path.read_bytes()
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["LibriSpeech"]
    size = archive.stat().st_size
    assert fetched[-1] == unpacked[-1] == (size, size)
    assert prepare_librispeech(folder, tmp_path / "m.json").utterances == 4
    assert asked == ["/12/dev-clean.tar.gz"]
    assert download_librispeech("dev-clean", tmp_path / "out", mirror="http://127.0.0.1:1") == folder
    next(folder.rglob("*.flac")).unlink()
    download_librispeech("dev-clean", tmp_path / "out", mirror=url, keep_archive=True)
    assert len(list(folder.rglob("*.flac"))) == 4
    assert (tmp_path / "out" / "dev-clean.tar.gz").read_bytes() == archive.read_bytes()
    assert len(asked) == 2


def test_a_mirror_with_another_archive_is_refused(mirror, tmp_path):
    url, archive, _ = mirror
    archive.write_bytes(archive.read_bytes()[:-1])
    expected = librispeech.SUBSETS["dev-clean"].md5
    with pytest.raises(DownloadError, match=rf"dev-clean.tar.gz: md5 is [0-9a-f]{{32}}, expected {expected};"):
        download_librispeech("dev-clean", tmp_path / "out", mirror=url)
    assert list((tmp_path / "out").iterdir()) == []


def test_no_such_subset(tmp_path):
    with pytest.raises(UsageError) as error:
        download_librispeech("dev", tmp_path)
    assert str(error.value) == (
        "dev: no such subset of LibriSpeech; choose from dev-clean, dev-other, test-clean, test-other, "
        "train-clean-100, train-clean-360, train-other-500"
    )


def test_the_official_address_is_asked_with_the_known_md5(tmp_path, monkeypatch):
    import jasper_asr.data.download as module

    called = []
    monkeypatch.setattr(module, "download", lambda *args, **options: called.append((args, options)))
    monkeypatch.setattr(module, "extract_tar", lambda archive, *_, **__: archive.write_bytes(b""))
    for subset in SUBSETS:
        download_librispeech(subset, tmp_path)
    assert [args[0] for args, _ in called] == [
        f"https://www.openslr.org/resources/12/{subset}.tar.gz" for subset in SUBSETS
    ]
    assert [options["md5"] for _, options in called] == [known.md5 for known in SUBSETS.values()]
    assert len({known.md5 for known in SUBSETS.values()}) == 7
    assert all(re.fullmatch("[0-9a-f]{32}", known.md5) for known in SUBSETS.values())
    assert sum(SUBSETS[name].utterances for name in SUBSETS if name.startswith("train")) == 281_241
