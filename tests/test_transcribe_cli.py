"""`jasper transcribe`: what goes in, where results go and in which formats, what fails, and going on after a kill."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers_audio import nemo_manifest, run, sound, wav, write_model
from jasper_asr import audio
from jasper_asr.cli import transcribing
from jasper_asr.formats import render
from jasper_asr.inputs import find_inputs
from jasper_asr.outputs import JOURNAL, Journal
from jasper_asr.transcribe import load

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a.wav, b.wav, sub/c.wav, tiny.onnx; texts.json has what the model says."""
    folder = tmp_path_factory.mktemp("transcribe")
    write_model(folder / "tiny.onnx")
    (folder / "sub").mkdir()
    names = ["a.wav", "b.wav", "sub/c.wav"]
    for seed, name in enumerate(names):
        wav(folder / name, 1.0 + 0.5 * seed, seed)
    with load(folder / "tiny.onnx", words=True) as transcriber:
        results = {name: transcriber.transcribe(folder / name) for name in names}
    assert all(result.text and result.words for result in results.values())
    return SimpleNamespace(path=folder, results=results, texts={name: result.text for name, result in results.items()})


@pytest.fixture
def here(folder, monkeypatch):
    """The same, as the current folder."""
    monkeypatch.chdir(folder.path)
    return folder


def transcribe(*argv):
    return run("transcribe", *argv, "--model", "tiny.onnx", "--threads", 1)


def rendered(here, format, name, **options):
    result = here.results[name]
    about = {"audio_filepath": name, "duration": result.duration, "text": result.text, "words": result.words}
    return render(format, **about | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- to stdout ------------------------------------------------------------------------------------------------------


def test_one_file_prints_its_text_alone(here):
    for option in ([], ["-f", "txt"], ["--format", "text"]):
        assert transcribe("b.wav", *option) == (0, f"{here.texts['b.wav']}\n", "")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("jobs", [0, 1, 4])
def test_several_files_print_their_paths_in_order_and_once(here, batch_size, jobs):
    names = ["sub/c.wav", "a.wav", "b.wav"]
    expected = "".join(f"{name}\t{here.texts[name]}\n" for name in names)
    options = ("--batch-size", batch_size, "--jobs", jobs)
    assert transcribe(*names, "./a.wav", *options) == (0, expected, "")


def test_a_folder_of_one_prints_its_path(here):
    assert transcribe("sub") == (0, f"sub/c.wav\t{here.texts['sub/c.wav']}\n", "")
    assert transcribe("s*/*")[1] == f"sub/c.wav\t{here.texts['sub/c.wav']}\n"


def test_folders_and_patterns(here):
    two = "".join(f"{name}\t{here.texts[name]}\n" for name in ("a.wav", "b.wav"))
    assert transcribe("*.wav") == (0, two, "")
    three = "".join(f"./{name}\t{here.texts[name]}\n" for name in ("a.wav", "b.wav", "sub/c.wav"))
    assert transcribe(".", "--recursive")[1].replace("./", "") == three.replace("./", "")


def test_stdin(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(Path("b.wav").read_bytes())))
    assert transcribe("-") == (0, f"{here.texts['b.wav']}\n", "")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert transcribe("-") == (3, "", "jasper: error: stdin: is empty (0 bytes); record or copy it again\n")


def test_a_manifest_without_texts(here, tmp_path):
    rows = [{"audio_filepath": "sub/c.wav"}, {"audio_filepath": "a.wav", "offset": 0.25, "duration": 0.5}]
    manifest = nemo_manifest(tmp_path / "m.jsonl", *rows)
    code, out, err = transcribe(manifest, "--audio-root", here.path)
    assert (code, err) == (0, "")
    with load("tiny.onnx") as transcriber:
        samples = audio.load_audio("a.wav", offset=0.25, duration=0.5)
        part = transcriber.transcribe((samples, 16_000)).text
    assert out == f"sub/c.wav\t{here.texts['sub/c.wav']}\na.wav\t{part}\n"
    code, _, err = run("evaluate", manifest, "--model", "tiny.onnx", "--audio-root", here.path)
    assert code == 3
    assert "key 'text' is missing; add it (and 1 more bad row)" in err


@pytest.mark.parametrize("format", ["json", "jsonl", "srt", "vtt", "tsv"])
def test_one_file_in_each_format(here, format):
    assert transcribe("a.wav", "-f", format) == (0, rendered(here, format, "a.wav"), "")


def test_json_of_several(here):
    both = ("a.wav", "b.wav")
    for format in ("json", "jsonl"):
        assert transcribe(*both, "-f", format)[1] == "".join(rendered(here, format, name) for name in both)
    rows = [json.loads(line) for line in transcribe(*both, "-f", "jsonl")[1].splitlines()]
    assert [row["pred_text"] for row in rows] == [here.texts[name] for name in both]
    assert rows[1]["words"][0]["end"] == round(here.results["b.wav"].words[0].end, 3)


def test_words_and_characters(here):
    bare = rendered(here, "jsonl", "a.wav", words=())
    assert transcribe("a.wav", "-f", "jsonl", "--no-words")[1] == bare
    full = transcribe("a.wav", "-f", "jsonl", "--characters")[1]
    assert full == rendered(here, "jsonl", "a.wav", characters=True)
    characters = [part["character"] for word in json.loads(full)["words"] for part in word["characters"]]
    assert "".join(characters) == here.texts["a.wav"].replace(" ", "")


def test_words_are_aligned_only_where_they_are_asked_for(here, monkeypatch):
    seen = []

    def fake_load(*args, **options):
        seen.append(options["words"])
        return load(*args, **options)

    monkeypatch.setattr("jasper_asr.transcribe.load", fake_load)
    for option in (["-f", "txt"], ["-f", "srt"], ["-f", "json", "--no-words"]):
        transcribe("a.wav", *option)
    assert seen == [False, True, False]


# --- to files -------------------------------------------------------------------------------------------------------


def test_a_file_for_each_recording_and_format(here, tmp_path):
    out = tmp_path / "new" / "out"
    code, printed, err = transcribe(".", "-r", "-o", out, "--format", "srt,vtt", "-f", "json", "-f", "srt")
    assert (code, printed) == (0, "")
    assert err.startswith("jasper: 3 transcribed, 0 kept, 0 failed; 0:00:04.5 of audio in 0:00:0")
    found = contents(out)
    assert found.pop(JOURNAL).count(b"\n") == 3
    assert found == {
        name.replace("wav", format): rendered(here, format, name).encode()
        for name in here.texts
        for format in ("srt", "vtt", "json")
    }


def test_names_that_collide_keep_their_suffix(here, tmp_path):
    (tmp_path / "a.flac").write_bytes(Path("b.wav").read_bytes())  # decoded by its content
    (tmp_path / "a.wav").write_bytes(Path("a.wav").read_bytes())
    assert transcribe(tmp_path, "-o", tmp_path)[0] == 0
    assert (tmp_path / "a.wav.txt").read_text() == f"{here.texts['a.wav']}\n"
    assert (tmp_path / "a.flac.txt").read_text() == f"{here.texts['b.wav']}\n"


def test_one_file_for_all(here, tmp_path):
    assert transcribe("a.wav", "sub", "--output", tmp_path / "all.jsonl")[0] == 0
    expected = rendered(here, "jsonl", "a.wav") + rendered(here, "jsonl", "sub/c.wav")
    assert (tmp_path / "all.jsonl").read_text() == expected
    assert transcribe("a.wav", "--output", tmp_path / "a.srt")[:2] == (0, "")
    assert (tmp_path / "a.srt").read_text() == rendered(here, "srt", "a.wav")
    assert transcribe("a.wav", "b.wav", "--output", tmp_path / "all.txt")[0] == 0
    lines = [f"{name}\t{here.texts[name]}" for name in ("a.wav", "b.wav")]
    assert (tmp_path / "all.txt").read_text().splitlines() == lines


def test_a_sound_in_another_container(here, tmp_path):
    pytest.importorskip("av")
    from test_inputs import container

    samples = np.rint(sound(1.0) * 32767) / 32768
    audio.write_wav(tmp_path / "x.wav", samples)
    (tmp_path / "x.m4a").write_bytes(container(samples))
    same = [transcribe(tmp_path / name)[1] for name in ("x.wav", "x.m4a")]
    assert same[0] == same[1] != ""
    (tmp_path / "y.mp4").write_bytes(container(sound(1.5, 1), "mp4", "aac"))
    code, out, err = transcribe(tmp_path / "y.mp4")
    assert (code, err) == (0, "")
    assert out.strip()


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--batch-size", 4], ["--jobs", 0]])
def test_failures_are_listed_at_the_end_and_stop_nobody(here, options):
    code, out, err = transcribe("none.wav", "a.wav", "tiny.onnx", "b.wav", *options)
    assert code == 1
    assert out == "".join(f"{name}\t{here.texts[name]}\n" for name in ("a.wav", "b.wav"))
    head, first, second = err.splitlines()
    assert head == "jasper: 2 of 4 failed:"
    assert first == "jasper: error: none.wav: no such file; check the path"
    assert second.startswith("jasper: error: tiny.onnx: not audio that libsndfile can read")


def test_a_single_failed_file_ends_with_the_code_of_its_error(here):
    assert transcribe("none.wav") == (5, "", "jasper: error: none.wav: no such file; check the path\n")
    assert transcribe("tiny.onnx")[0] == 3


def test_what_failed_is_tried_again_and_the_rest_is_kept(here, tmp_path):
    (tmp_path / "a.wav").write_bytes(Path("a.wav").read_bytes())
    (tmp_path / "b.wav").write_bytes(b"nothing")
    argv = (tmp_path, "--output", tmp_path / "all.jsonl", "--resume")
    code, _, err = transcribe(*argv)
    assert code == 1
    assert err.splitlines()[-1].startswith("jasper: 1 transcribed, 0 kept, 1 failed; ")
    assert (tmp_path / "all.jsonl").read_text().count("\n") == 1
    (tmp_path / "b.wav").write_bytes(Path("b.wav").read_bytes())
    code, _, err = transcribe(*argv)
    assert code == 0
    assert err.startswith("jasper: 1 transcribed, 1 kept, 0 failed; ")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["pred_text"] for row in rows] == [here.texts["a.wav"], here.texts["b.wav"]]


def test_a_full_disk_ends_the_run(here, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr("jasper_asr.files.os.replace", full)
    code, _, err = transcribe("none.wav", "a.wav", "b.wav", "-o", out)
    assert code == 5
    assert err.splitlines() == [
        "jasper: 1 of 3 failed:",
        "jasper: error: none.wav: no such file; check the path",
        f"jasper: error: {out}/a.txt: cannot be written (no space left on device); check the folder and free space",
    ]
    assert contents(out) == {}


USAGE_ERRORS = [
    (["a.wav", "--resume"], "--resume needs --output-dir or --output"),
    (["a.wav", "-f", "srt,vtt"], "--format srt,vtt: several formats need --output-dir"),
    (["a.wav", "-f", "srt", "--no-words"], "--no-words: srt is made of the times of words"),
    (["a.wav", "--characters"], "--characters needs --format json or jsonl, with words"),
    (["a.wav", "-f", "json", "--characters", "--no-words"], "--characters needs --format json or jsonl, with words"),
    (["a.wav", "b.wav", "-f", "srt"], "--format srt is about one recording; give --output-dir for several"),
    (["a.wav", "b.wav", "--output", "x.json"], "x.json: json is about one recording; take jsonl for several, or "),
    (["a.wav", "-o", "x", "--output", "y"], "--output and --output-dir exclude each other"),
    (["a.wav", "--output", "a.wav"], "a.wav: is an input and would be written over; give another file"),
    (
        ["list.json", "a.wav", "-o", ".", "-f", "json"],
        "list.json: is an input and would be written over; give another ",
    ),
    (["a.wav", "-f", "srt,doc"], "Invalid value for '--format' / '-f': 'doc' is not one of 'txt', 'json', "),
    (["a.wav", "-f", ""], "Invalid value for '--format' / '-f': '' is not one of 'txt', 'json', "),
    (["a.wav", "--jobs", "-1"], "Invalid value for '--jobs': -1 is not in the range x>=0. "),
]


@pytest.mark.parametrize(("argv", "message"), USAGE_ERRORS, ids=lambda value: str(value)[:40])
def test_options_that_contradict_each_other(here, tmp_path, monkeypatch, argv, message):
    for name in ("a.wav", "b.wav"):
        os.symlink(here.path / name, tmp_path / name)
    (tmp_path / "list.wav").write_bytes((here.path / "a.wav").read_bytes())
    nemo_manifest(tmp_path / "list.json", {"audio_filepath": "list.wav"})
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    code, out, err = run("transcribe", *argv, "--model", here.path / "tiny.onnx")
    assert (code, out) == (2, "")
    assert err.startswith(f"jasper: error: {message}")
    assert err.count("\n") == 1
    assert contents(tmp_path) == before


def test_outputs_that_cannot_be(here, tmp_path):
    (tmp_path / "file").write_text("")
    assert transcribe("a.wav", "-o", tmp_path / "file")[::2] == (
        5,
        f"jasper: error: {tmp_path}/file: is a file; give a folder\n",
    )
    assert transcribe("a.wav", "--output", tmp_path)[::2] == (
        5,
        f"jasper: error: {tmp_path}: is a folder; give a file name\n",
    )
    code, _, err = transcribe("a.wav", "--output", tmp_path / "no" / "x.txt")
    assert (code, err) == (
        5,
        f"jasper: error: {tmp_path}/no/x.txt: the folder {tmp_path}/no does not exist; make it first\n",
    )


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recordings(here, tmp_path):
    return many(tmp_path / "in", 6)


def many(folder, count):
    """Short recordings, each another one, in two folders."""
    for number in range(count):
        path = folder / str(number % 2) / f"{number:04}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        wav(path, 0.3 + 0.01 * (number % 7), number)
    return folder


def resumed(recordings, out, *options):
    """(transcribed, kept) by a run that goes on."""
    code, _, err = transcribe(recordings, "-r", "-o", out, "--resume", *options)
    assert code == 0
    words = err.split()
    return int(words[1]), int(words[3])


def test_what_is_done_and_intact_is_kept(recordings, tmp_path):
    out = tmp_path / "out"
    assert transcribe(recordings, "-r", "-o", out, "-f", "json,srt")[0] == 0  # --resume is for the run after
    whole = contents(out)
    assert resumed(recordings, out, "-f", "json,srt") == (0, 6)
    assert resumed(recordings, out, "-f", "srt") == (0, 6)
    assert contents(out) == whole
    (out / "0" / "0002.json").write_bytes(whole["0/0002.json"][:-1])
    (out / "1" / "0003.srt").unlink()
    assert resumed(recordings, out, "-f", "json,srt") == (2, 4)
    again = contents(out)
    assert {*again.pop(JOURNAL).splitlines()} == {*whole.pop(JOURNAL).splitlines()}
    assert again == whole


def test_what_came_from_something_else_is_made_again(recordings, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert resumed(recordings, out, "-f", "jsonl") == (6, 0)
    wav(recordings / "0" / "0000.wav", 0.3, 99)
    os.utime(recordings / "1" / "0001.wav", ns=(1, 1))
    assert resumed(recordings, out, "-f", "jsonl") == (2, 4)
    assert resumed(recordings, out, "-f", "jsonl", "--characters") == (6, 0)
    assert resumed(recordings, out, "-f", "jsonl", "--characters", "--no-trim-silence") == (6, 0)
    assert resumed(recordings, out, "-f", "jsonl", "--characters", "--no-trim-silence", "--jobs", 2) == (0, 6)
    assert resumed(recordings, out, "-f", "jsonl", "--batch-size", 2) == (6, 0)  # the options above are gone
    assert resumed(recordings, out, "-f", "jsonl", "--lm", "mini") == (6, 0)
    assert resumed(recordings, out, "-f", "txt", "--lm", "mini") == (6, 0)  # another file
    write_model(tmp_path / "other.onnx", opset=14)
    assert resumed(recordings, out, "-f", "txt", "--lm", "mini", "--model", tmp_path / "other.onnx") == (
        0,
        6,
    )  # last wins


def test_another_spelling_is_another_result(recordings, tmp_path, monkeypatch):
    """The path is part of JSON."""
    out = tmp_path / "out"
    model = ("--model", Path("tiny.onnx").absolute())
    monkeypatch.chdir(tmp_path)
    assert run("transcribe", "in", "-r", "-o", out, "-f", "jsonl", *model)[0] == 0
    err = run("transcribe", tmp_path / "in", "-r", "-o", out, "-f", "jsonl", "--resume", *model)[2]
    assert err.startswith("jasper: 6 transcribed, 0 kept")
    assert json.loads((out / "0" / "0000.jsonl").read_text())["audio_filepath"] == f"{tmp_path}/in/0/0000.wav"


@pytest.mark.parametrize("damage", ["torn", "flipped", "binary", "empty", "list"])
def test_a_damaged_journal_costs_only_the_damaged_lines(recordings, tmp_path, damage):
    out = tmp_path / "out"
    resumed(recordings, out)
    whole = contents(out)
    lines = whole[JOURNAL].splitlines(keepends=True)
    broken = {
        "torn": [*lines[:5], lines[5][: len(lines[5]) // 2]],
        "flipped": [*lines[:2], lines[2].replace(b'.txt": "', b'.txt": "0'), *lines[3:]],
        "binary": [*lines[:4], b"\xff\x00\xfe\n", lines[5]],
        "empty": [],
        "list": [b"[1, 2]\n", b"{}\n", b"7\n", b'{"input": [], "stamp": 1, "made": 2}\n', *lines[1:]],
    }[damage]
    (out / JOURNAL).write_bytes(b"".join(broken))
    assert resumed(recordings, out) == ((6, 0) if damage == "empty" else (1, 5))
    again = contents(out)
    assert sorted(again.pop(JOURNAL).splitlines()) == sorted(whole.pop(JOURNAL).splitlines())
    assert again == whole


def test_the_journal_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "journal"
    stamp = {"size": 1, "mtime_ns": 2**62, "name": "\udcff\n"}
    Journal(path).add("a", stamp, {"x": "y"})
    journal = Journal(path)
    journal.add("b", stamp, "text\n")
    assert journal.find("a", stamp) == {"x": "y"}
    assert journal.find("a", stamp | {"size": 2}) is None
    assert journal.find("c", stamp) is None
    assert Journal(path).find("b", stamp) == "text\n"
    Journal(path).add("a", stamp, "new")
    assert Journal(path).find("a", stamp) == "new"
    Journal(path)
    assert path.read_bytes().count(b"\n") == 2  # what was overtaken is gone


KILLER = """
import os, signal, sys, types
from jasper_asr import cli, files, outputs

fault, count = sys.argv[1], int(sys.argv[2])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def replace(*paths):
    global count
    count -= 1
    count or die()
    os.replace(*paths)

def add(journal, key, stamp, made):
    global count
    count -= 1
    line = outputs._line(key, stamp, made)
    with open(journal._path, "ab", buffering=0) as file:
        file.write(line if count else line[: len(line) // 2])
    count or die()

if fault == "before a rename":
    files.os = types.SimpleNamespace(replace=replace)
if fault == "within a line":
    outputs.Journal.add = add
sys.argv = ["jasper", *sys.argv[3:]]
cli.main()
"""


def killed(fault, count, argv):
    command = [sys.executable, "-c", KILLER, fault, str(count), *map(str, argv)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def same_but_for_the_order_of_the_journal(one, other):
    one, other = contents(one), contents(other)
    journals = [found.pop(JOURNAL) for found in (one, other)]
    assert one == other
    assert sorted(journals[0].splitlines()) == sorted(journals[1].splitlines())


@pytest.mark.parametrize(("fault", "count"), [("before a rename", 13), ("within a line", 7)])
def test_after_a_kill_the_rest_is_done_and_all_is_as_if_nothing_had_happened(here, tmp_path, fault, count):
    recordings, out = many(tmp_path / "in", 20), tmp_path / "out"
    options = ("-r", "-f", "json,srt", "--model", here.path / "tiny.onnx", "--threads", 1)
    running = killed(fault, count, ("transcribe", recordings, "-o", out, *options))
    assert running.wait(timeout=60) == -signal.SIGKILL
    assert 0 < sum(name.endswith(".json") for name in contents(out)) < 20
    done = Journal(out / JOURNAL)._entries
    assert len(done) == 6
    assert any(name.endswith(".part") for name in contents(out)) == (fault == "before a rename")
    assert resumed(recordings, out, *options) == (14, 6)
    assert run("transcribe", recordings, "-o", tmp_path / "whole", *options)[0] == 0
    same_but_for_the_order_of_the_journal(out, tmp_path / "whole")


def test_a_killed_collection_goes_on(here, tmp_path):
    recordings, out = many(tmp_path / "in", 20), tmp_path / "all.jsonl"
    argv = ("transcribe", recordings, "-r", "--model", here.path / "tiny.onnx", "--threads", 1)
    out.write_text("old\n")
    assert killed("within a line", 9, (*argv, "--output", out)).wait(timeout=60) == -signal.SIGKILL
    assert out.read_text() == "old\n"
    code, _, err = run(*argv, "--output", out, "--resume")
    assert code == 0
    assert err.startswith("jasper: 12 transcribed, 8 kept, 0 failed; ")
    assert run(*argv, "--output", tmp_path / "whole.jsonl")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() != b"old\n"
    assert run(*argv, "-f", "txt", "--output", out, "--resume")[2].startswith("jasper: 20 transcribed, 0 kept")


@pytest.mark.slow
def test_a_thousand_files_killed_at_random(here, tmp_path):
    recordings, out = many(tmp_path / "in", 1000), tmp_path / "out"
    argv = ("transcribe", recordings, "-r", "-f", "json,srt", "--model", here.path / "tiny.onnx", "--threads", 1)
    rng = random.Random(4)
    kept = []
    for stop in (50, 300, 301, 700, 950):
        running = killed("", 0, (*argv, "-o", out, "--resume"))
        while not (out / JOURNAL).exists() or (out / JOURNAL).read_bytes().count(b"\n") < stop:
            assert running.poll() is None
            time.sleep(0.001)
        time.sleep(rng.random() / 50)
        running.kill()
        assert running.wait(timeout=60) == -signal.SIGKILL
        kept.append(len(Journal(out / JOURNAL)._entries))
    assert kept == sorted(kept)
    transcribed, held = resumed(recordings, out, *argv[2:])
    assert (transcribed + held, held) == (1000, kept[-1])
    assert run(*argv, "-o", tmp_path / "whole")[0] == 0
    same_but_for_the_order_of_the_journal(out, tmp_path / "whole")


# --- working ahead --------------------------------------------------------------------------------------------------


def test_the_next_recordings_are_decoded_while_the_network_runs(here, monkeypatch):
    decoded = []
    two_more = threading.Event()
    load_audio = audio.load_audio

    def watched(source, **options):
        decoded.append(source)
        if len(decoded) == 3:
            two_more.set()
        return load_audio(source, **options)

    monkeypatch.setattr("jasper_asr.transcribe.audio.load_audio", watched)
    names = ["a.wav", "b.wav", "sub/c.wav"] * 3
    with load("tiny.onnx", threads=1) as transcriber:
        run_network = transcriber._backend.run
        transcriber._backend.run = lambda *args: two_more.wait(20) and run_network(*args)
        results = transcriber.transcribe_many(names, jobs=2)
        assert next(results).text == here.texts["a.wav"]
        time.sleep(0.1)
        assert len(decoded) <= 4  # the one that ran, perhaps the next, and two ahead, no more
        transcriber._backend.run = run_network
        assert [result.text for result in results] == [here.texts[name] for name in names[1:]]
    assert len(decoded) == 9


def test_an_abandoned_run_decodes_no_further(here, monkeypatch):
    with load("tiny.onnx", threads=1) as transcriber:
        results = transcriber.transcribe_many(["a.wav"] * 1000, jobs=2)
        before = threading.active_count()
        next(results)
        results.close()
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before  # the threads end by themselves


# --- progress -------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_has_audio_time_and_speed_on_terminals_only(here, monkeypatch):
    ticks = iter(np.arange(0.0, 100.0, 0.25).tolist())
    monkeypatch.setattr(transcribing.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setenv("COLUMNS", "120")
    items = find_inputs(["a.wav", "b.wav"])
    with redirect_stderr(Terminal()) as shown, transcribing._progress(items) as (finished, heard):
        heard(1.0)
        finished(1.0)
        heard(61.5)
    assert "1/2 files, 0:01:02.5 of audio, " in shown.getvalue()
    assert "x real time" in shown.getvalue()
    with redirect_stderr(io.StringIO()) as shown, transcribing._progress(items) as (finished, heard):
        heard(1.0)
        finished(1.0)
    assert shown.getvalue() == ""


def test_how_long_a_single_recording_is(here, tmp_path):
    (item,) = find_inputs(["sub/c.wav"])
    assert transcribing._header_seconds(item) == 2.0
    assert transcribing._header_seconds(find_inputs(["none.wav"])[0]) is None
    assert transcribing._header_seconds(find_inputs(["tiny.onnx"])[0]) is None
