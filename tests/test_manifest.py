import json
import os
import time
from pathlib import Path

import pytest

from jasper_asr.data.manifest import Utterance, read_manifest, write_nemo_manifest, write_nvidia_manifest
from jasper_asr.errors import ManifestError, StorageError

NEMO = {"audio_filepath": "wav/a.wav", "duration": 1.5, "text": "Hello, you"}
NVIDIA = {
    "transcript": "Hello, you",
    "original_duration": 1.5,
    "files": [
        {"fname": "wav/a.wav", "duration": 1.5, "speed": 1.0, "channels": 1},
        {"fname": "wav/a-0.9.wav", "duration": 1.67, "speed": 0.9},
    ],
}


def lines(tmp_path, *rows, name="m.json"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def array(tmp_path, *rows, name="m.jsonl"):  # the wrong suffix, on purpose: content decides
    path = tmp_path / name
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    return path


def error_of(path, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading


def test_nemo_row(tmp_path):
    path = lines(tmp_path, NEMO, {**NEMO, "offset": 2, "speaker": 19, "lang": "en"})
    first, second = read_manifest(path)
    assert first == Utterance(
        audio_path=tmp_path / "wav" / "a.wav",
        audio_filepath="wav/a.wav",
        text="Hello, you",
        duration=1.5,
        offset=None,
        speaker=None,
        source=f"{path}:1",
    )
    assert (second.offset, second.speaker, second.source) == (2.0, "19", f"{path}:2")


def test_nvidia_row(tmp_path):
    path = array(tmp_path, NVIDIA)
    (utterance,) = read_manifest(path)
    assert utterance == Utterance(tmp_path / "wav" / "a.wav", "wav/a.wav", "Hello, you", 1.5, None, None, f"{path}:2")


def test_nvidia_speeds(tmp_path):
    path = array(tmp_path, NVIDIA, {**NVIDIA, "files": [{"fname": "b.wav", "duration": 3}]})
    assert [u.audio_filepath for u in read_manifest(path)] == ["wav/a.wav", "b.wav"]
    every = read_manifest(path, speed=None)
    assert [(u.audio_filepath, u.duration) for u in every] == [
        ("wav/a.wav", 1.5),
        ("wav/a-0.9.wav", 1.67),
        ("b.wav", 3.0),
    ]
    assert error_of(path, speed=0.9) == (
        f"{path}:3: key 'files' has no file at speed 0.9 but at 1.0; ask for one of these"
    )


def test_nvidia_duration_from_the_original(tmp_path):
    files = [{"fname": "a.wav"}, {"fname": "b.wav", "speed": 0.5}]
    path = array(tmp_path, {**NVIDIA, "files": files})
    assert [u.duration for u in read_manifest(path, speed=None)] == [1.5, 3.0]


def test_nvidia_text_filepath(tmp_path):
    (tmp_path / "a.txt").write_text("From a file\n", encoding="utf-8")
    row = {"text_filepath": "a.txt", "files": NVIDIA["files"]}
    path = array(tmp_path, row)
    assert read_manifest(path)[0].text == "From a file"
    (tmp_path / "a.txt").unlink()
    assert error_of(path) == (
        f"{path}:2: key 'text_filepath': 'a.txt' cannot be read: No such file or directory;"
        " mend it or give a transcript"
    )


@pytest.mark.parametrize("text", ["[{}]", " \n\t[\n {} \n ]\n\n", "\ufeff[{}]", "[{},\r\n{}]\r\n"])
def test_array_spacing(tmp_path, text):
    path = tmp_path / "m"
    path.write_text(text.replace("{}", json.dumps(NVIDIA, indent=2)), encoding="utf-8", newline="")
    assert len(read_manifest(path)) == text.count("{}")


@pytest.mark.parametrize("text", ["{}", "{}\n\n\n", "\ufeff{}\n", "{}\r\n{}\r\n", "\n  {}\n"])
def test_line_spacing(tmp_path, text):
    path = tmp_path / "m"
    path.write_text(text.replace("{}", json.dumps(NEMO)), encoding="utf-8", newline="")
    assert len(read_manifest(path)) == text.count("{}")


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    path = tmp_path / "m"
    path.write_text(json.dumps({**NEMO, "text": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert read_manifest(path)[0].text == "a\u2028b"


def test_array_lines_are_those_where_rows_start(tmp_path):
    rows = [{**NVIDIA, "note": "[{ }, \\n]"} for _ in range(5)]
    path = tmp_path / "m"
    text = json.dumps(rows, indent=3)
    path.write_text("\n\n" + text)
    starts = [n for n, line in enumerate(("\n\n" + text).split("\n"), 1) if line == "   {"]
    assert [u.source for u in read_manifest(path)] == [f"{path}:{n}" for n in starts]


def test_a_hundred_thousand_rows(tmp_path):
    count = 20_000
    path = lines(tmp_path, *({**NEMO, "audio_filepath": f"wav/{i % 50}/{i}.wav"} for i in range(count)))
    start = time.process_time()
    utterances = read_manifest(path)
    assert time.process_time() - start < 1.0  # a fifth of them; 0.25 s alone on a core
    assert utterances[-1].source == f"{path}:{count}"


# --- rows that are wrong


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, 'the row is a number, not an object; write it as {"key": value, ...}'),
        (None, 'the row is null, not an object; write it as {"key": value, ...}'),
        (without(NEMO, "audio_filepath"), "key 'audio_filepath' is missing; add it"),
        (without(NEMO, "text"), "key 'text' is missing; add it"),
        (without(NEMO, "duration"), "key 'duration' is missing; add it"),
        ({**NEMO, "text": None}, "key 'text' is null, not a string; write it in quotes"),
        ({**NEMO, "text": ["a"]}, "key 'text' is an array, not a string; write it in quotes"),
        ({**NEMO, "text": "\ud800"}, "key 'text' holds half of a surrogate pair; write it as UTF-8"),
        ({**NEMO, "audio_filepath": ""}, "key 'audio_filepath': '' does not name a file; name one"),
        ({**NEMO, "audio_filepath": "a/.."}, "key 'audio_filepath': 'a/..' does not name a file; name one"),
        ({**NEMO, "audio_filepath": "a\0"}, r"key 'audio_filepath': 'a\x00' does not name a file; name one"),
        ({**NEMO, "duration": "1.5"}, "key 'duration' is a string, not a number; write it without quotes"),
        ({**NEMO, "duration": True}, "key 'duration' is a boolean, not a number; write it without quotes"),
        ({**NEMO, "duration": 0}, "key 'duration' is 0; give a finite number above 0"),
        ({**NEMO, "duration": -1.5}, "key 'duration' is -1.5; give a finite number above 0"),
        ({**NEMO, "duration": float("nan")}, "key 'duration' is nan; give a finite number above 0"),
        ({**NEMO, "duration": float("inf")}, "key 'duration' is inf; give a finite number above 0"),
        ({**NEMO, "duration": 10**400}, "key 'duration' is inf; give a finite number above 0"),
        ({**NEMO, "offset": -0.5}, "key 'offset' is -0.5; give a finite number of 0 or more"),
        ({**NEMO, "offset": {}}, "key 'offset' is an object, not a number; write it without quotes"),
        ({**NEMO, "speaker": 1.5}, "key 'speaker' is a number, not a string; write it in quotes"),
    ],
)
def test_bad_nemo_row(tmp_path, row, message):
    path = lines(tmp_path, NEMO, row, NEMO)
    assert error_of(path) == f"{path}:2: {message}"


def with_file(**changes):
    return {**NVIDIA, "files": [{**NVIDIA["files"][0], **changes}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], 'the row is an array, not an object; write it as {"key": value, ...}'),
        (NEMO, "key 'files' is missing; add it"),
        (without(NVIDIA, "transcript"), "key 'transcript' is missing; add it"),
        ({**NVIDIA, "transcript": 3}, "key 'transcript' is a number, not a string; write it in quotes"),
        ({**NVIDIA, "files": []}, "key 'files' is empty; list the row's audio files there"),
        (
            {**NVIDIA, "files": "a.wav"},
            "key 'files' is a string, not an array; list the row's audio files there",
        ),
        ({**NVIDIA, "files": ["a.wav"]}, "key 'files[0]' is a string, not an object; write it as one"),
        (
            {**NVIDIA, "files": [{"duration": 1, "speed": 1}]},
            "key 'files[0].fname' is missing; add it",
        ),
        (with_file(duration=-1), "key 'files[0].duration' is -1; give a finite number above 0"),
        (with_file(speed=0), "key 'files[0].speed' is 0; give a finite number above 0"),
        (
            with_file(speed=1.1),
            "key 'files' has no file at speed 1.0 but at 1.1; ask for one of these",
        ),
        (
            {"transcript": "a", "files": [{"fname": "a.wav"}]},
            "key 'files[0].duration' is missing; add it",
        ),
        (
            {**NVIDIA, "files": [{"fname": "a.wav"}], "original_duration": 0},
            "key 'original_duration' is 0; give a finite number above 0",
        ),
    ],
)
def test_bad_nvidia_row(tmp_path, row, message):
    path = array(tmp_path, NVIDIA, row, NVIDIA)
    assert error_of(path) == f"{path}:3: {message}"


def test_further_bad_rows_are_counted(tmp_path):
    bad = without(NEMO, "text")
    assert error_of(lines(tmp_path, NEMO, bad, bad)).endswith(":2: key 'text' is missing; add it (and 1 more bad row)")
    assert error_of(lines(tmp_path, bad, NEMO, bad, 1, {**NEMO, "duration": 0})).endswith(
        ":1: key 'text' is missing; add it (and 3 more bad rows)"
    )


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"a": 1,}\n', 1, "is not JSON: Expecting property name enclosed in double quotes at column 9"),
        ("NEMO\n\nhello there", 3, "is not JSON: Expecting value at column 1"),
        ("NEMO NEMO\n", 1, "is not JSON: Extra data at column 72"),
        ("NEMO\n" + "[" * 100_000 + "\n", 2, "is not JSON: a number too long or brackets too deep"),
        ("NEMO\n" + "7" * 5000 + "\n", 2, "is not JSON: a number too long or brackets too deep"),
        ("NEMO\nNE", 2, "is not JSON: Expecting value at column 1"),
        ('NEMO\n{"audio_filepath": "b', 2, "the last line is torn: the file ends inside it"),
        ('[NVIDIA,\n{"files": "b', 2, "the last row is torn: the file ends inside it"),
        ('[NVIDIA,\n{"files": \n\n', 2, "the last row is torn: the file ends inside it"),
        ("[NVIDIA,\n", 2, "the last row is torn: the file ends inside it"),
        ("[NVIDIA\n\n", 3, "the last row is torn: the file ends inside it"),
        ("[", 1, "the last row is torn: the file ends inside it"),
        ("[NVIDIA\n NVIDIA]", 2, "a row is not followed by a comma or ]"),
        ('[NVIDIA,\n{\n"a" 1}]', 2, "is not JSON: Expecting ':' delimiter at line 3 column 5"),
        ("[NVIDIA,\n]", 2, "is not JSON: Expecting value at line 2 column 1"),
        ("[NVIDIA]\nNEMO\n", 2, "text follows the ] that ends the manifest"),
        ("[]\n\nNEMO\n", 3, "text follows the ] that ends the manifest"),
    ],
)
def test_what_is_not_json(tmp_path, text, line, message):
    path = tmp_path / "m.json"
    path.write_text(text.replace("NEMO", json.dumps(NEMO)).replace("NVIDIA", json.dumps(NVIDIA)))
    assert error_of(path).startswith(f"{path}:{line}: {message}; ")


@pytest.mark.parametrize("text", ["", "\n \n", "[]", "[\n]\n", "\ufeff"])
def test_empty_manifest(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text(text, encoding="utf-8")
    assert error_of(path) == f"{path}: holds no utterances; write one row for each audio file"


def test_not_utf8(tmp_path):
    path = tmp_path / "m.json"
    path.write_bytes(json.dumps(NEMO).encode() + b'\n{"text": "caf\xe9"}\n')
    assert error_of(path) == f"{path}:2: is not UTF-8 text (byte 0xe9); convert the manifest to UTF-8"
    path.write_bytes(json.dumps(NEMO).encode("utf-16"))
    assert error_of(path) == f"{path}:1: is not UTF-8 text (byte 0xff); convert the manifest to UTF-8"


@pytest.mark.parametrize("cut", range(1, 150, 7))
def test_any_cut_is_an_error_or_whole_rows(tmp_path, cut):
    for whole in (lines(tmp_path, NEMO, NEMO), array(tmp_path, NVIDIA)):
        data = whole.read_bytes()[:-3]
        path = tmp_path / "cut"
        path.write_bytes(data[: max(0, len(data) - cut)])
        try:
            utterances = read_manifest(path)
        except ManifestError:
            continue
        assert [u.text for u in utterances] == ["Hello, you"] * len(utterances)
        assert path.read_bytes().strip().endswith(b"}")


def test_unreadable_files(tmp_path):
    missing = tmp_path / "none.json"
    cure = "give the path of a manifest file that can be read"
    with pytest.raises(StorageError) as caught:
        read_manifest(missing)
    assert str(caught.value) == f"{missing}: cannot be read: No such file or directory; {cure}"
    with pytest.raises(StorageError, match=f"^{tmp_path}: cannot be read: Is a directory; {cure}$"):
        read_manifest(tmp_path)
    with pytest.raises(StorageError, match=r"none: is not a folder; give the folder that holds the audio$"):
        read_manifest(lines(tmp_path, NEMO), audio_root=tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = lines(tmp_path, NEMO)
    path.chmod(0)
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        read_manifest(path)


# --- paths


def path_of(tmp_path, spelling, **options):
    (tmp_path / "set").mkdir(exist_ok=True)
    path = lines(tmp_path / "set", {**NEMO, "audio_filepath": spelling})
    (utterance,) = read_manifest(path, **options)
    assert utterance.audio_filepath == spelling
    return utterance.audio_path


def test_paths_inside_the_root(tmp_path, monkeypatch):
    inside = tmp_path / "set" / "wav" / "a.wav"
    for spelling in ("wav/a.wav", "./wav/x/../a.wav", "../set/wav/a.wav", str(inside)):
        assert path_of(tmp_path, spelling) == inside
    assert path_of(tmp_path, "a.wav", audio_root=tmp_path) == tmp_path / "a.wav"
    monkeypatch.chdir(tmp_path)
    assert path_of(tmp_path, "a.wav", audio_root="set") == tmp_path / "set" / "a.wav"
    assert path_of(tmp_path, "/a.wav", audio_root="/") == Path("/a.wav")
    assert read_manifest("set/m.json", audio_root="/")[0].source == "set/m.json:1"


@pytest.mark.parametrize("spelling", ["../a.wav", "x/../../a.wav", "/elsewhere/a.wav", "../set2/a.wav"])
def test_paths_that_leave_the_root(tmp_path, spelling):
    path = lines(tmp_path / "set", NEMO) if (tmp_path / "set").mkdir() else tmp_path / "set" / "m.json"
    with pytest.raises(ManifestError) as caught:
        path_of(tmp_path, spelling)
    assert str(caught.value) == (
        f"{path}:1: key 'audio_filepath': '{spelling}' leaves the audio root {tmp_path / 'set'};"
        " move it or pass --allow-outside-root"
    )
    allowed = path_of(tmp_path, spelling, allow_outside_root=True)
    assert allowed == Path(os.path.normpath(tmp_path / "set" / spelling))


@pytest.mark.parametrize("key", ["files", "text_filepath"])
def test_nvidia_paths_that_leave_the_root(tmp_path, key):
    row = {"text_filepath": "../a", "files": [{"fname": "../b", "duration": 1}]}
    if key == "files":
        row["transcript"] = "a"
    message = error_of(array(tmp_path, row))
    named = "'files[0].fname': '../b'" if key == "files" else "'text_filepath': '../a'"
    assert f"key {named} leaves the audio root" in message


def test_symbolic_links(tmp_path):
    root, outside = tmp_path / "set", tmp_path / "outside"
    (root / "wav").mkdir(parents=True)
    outside.mkdir()
    (outside / "a.wav").touch()
    (root / "wav" / "b.wav").touch()
    (root / "wav" / "file-out.wav").symlink_to(outside / "a.wav")
    (root / "wav" / "file-in.wav").symlink_to("b.wav")
    (root / "folder-out").symlink_to(outside)
    (root / "folder-in").symlink_to("wav")
    for spelling in ("wav/file-out.wav", "folder-out/a.wav", "folder-out/../a.wav/../folder-out/a.wav"):
        with pytest.raises(ManifestError, match=r"leaves the audio root .*; move it or pass --allow-out"):
            path_of(tmp_path, spelling)
        assert path_of(tmp_path, spelling, allow_outside_root=True).name == Path(spelling).name
    for spelling in ("wav/file-in.wav", "folder-in/b.wav"):
        assert path_of(tmp_path, spelling) == root / spelling
    (tmp_path / "link").symlink_to(root)  # a root that is itself a link is no way out
    assert path_of(tmp_path, "wav/b.wav", audio_root=tmp_path / "link") == tmp_path / "link/wav/b.wav"


# --- writing


def test_nemo_round_trip(tmp_path):
    rows = [
        NEMO,
        {**NEMO, "text": "naïve \u2028 \"q\"", "offset": 0.25, "speaker": "anna"},
        {**NEMO, "audio_filepath": "wav/../b.wav", "duration": 1 / 3, "text": ""},
    ]  # fmt: skip
    before = read_manifest(lines(tmp_path, *rows))
    write_nemo_manifest(tmp_path / "m.json", before)
    assert read_manifest(tmp_path / "m.json") == before
    written = [json.loads(line) for line in (tmp_path / "m.json").read_text("utf-8").split("\n")[:-1]]
    assert written == rows


def test_nemo_manifest_in_another_folder_names_the_same_files(tmp_path):
    (tmp_path / "wav" / "deep").mkdir(parents=True)
    before = read_manifest(lines(tmp_path, NEMO, {**NEMO, "audio_filepath": "c.wav"}))
    write_nemo_manifest(tmp_path / "wav" / "m.json", before)
    after = read_manifest(tmp_path / "wav" / "m.json", allow_outside_root=True)
    assert [u.audio_path for u in after] == [u.audio_path for u in before]
    assert [u.audio_filepath for u in after] == ["a.wav", str(tmp_path / "c.wav")]


def test_nvidia_round_trip(tmp_path):
    rows = [NVIDIA, {**NVIDIA, "transcript": "naïve"}]
    write_nvidia_manifest(tmp_path / "m.json", rows)
    text = (tmp_path / "m.json").read_text("utf-8")
    assert json.loads(text) == rows
    assert "naïve" in text
    utterances = read_manifest(tmp_path / "m.json", speed=None)
    assert [u.source[-2:] for u in utterances] == [":2", ":2", ":3", ":3"]
    assert [u.duration for u in utterances] == [1.5, 1.67] * 2


def test_writers_refuse_what_could_not_be_read(tmp_path):
    path = tmp_path / "m.json"
    path.write_text("old")
    bad = [
        (write_nemo_manifest, [], "there are no rows to write; give at least one"),
        (write_nvidia_manifest, [], "there are no rows to write; give at least one"),
        (write_nemo_manifest, [Utterance(path, "m", "a", None)], "m has no duration; a manifest needs it"),
        (write_nemo_manifest, [Utterance(path, "m", None, 1.0)], "m has no text; a manifest needs it"),
        (write_nvidia_manifest, [{"a": float("nan")}], "a row cannot be written as JSON: "),
        (write_nvidia_manifest, [{"a": path}], "a row cannot be written as JSON: "),
        (write_nvidia_manifest, [{"a": "\ud800"}], "a row holds half of a surrogate pair; "),
    ]
    for write, rows, message in bad:
        with pytest.raises(ManifestError) as caught:
            write(path, rows)
        assert str(caught.value).startswith(f"{path}: {message}")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["m.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = lines(tmp_path, NEMO)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError) as caught:
        write_nvidia_manifest(path, [NVIDIA])
    assert str(caught.value) == f"{path}: cannot be written: No space left on device; check the folder"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.json"]
    with pytest.raises(StorageError, match="cannot be written: No such file or directory"):
        write_nvidia_manifest(tmp_path / "none" / "m.json", [NVIDIA])
