import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import onnx
import pytest

import jasper_asr
from helpers_audio import CHECKPOINT, CONFIG, nemo_manifest, run, sound, tiny_checkpoint, wav, write_model
from jasper_asr import cli
from jasper_asr.audio import write_wav
from jasper_asr.cli import models
from jasper_asr.errors import DownloadError
from jasper_asr.model import graph
from jasper_asr.model.checkpoint import save_safetensors
from jasper_asr.transcribe import load

JASPER = [sys.executable, "-m", "jasper_asr.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
TINY = ("--config", CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips, a manifest of each layout with what the model says, and the model as ONNX and .safetensors."""
    folder = tmp_path_factory.mktemp("cli")
    model = write_model(folder / "tiny.onnx")
    names = ["a.wav", "b.wav", "c.wav"]
    for seed, name in enumerate(names):
        wav(folder / name, 1.0 + 0.5 * seed, seed)
    checkpoint = tiny_checkpoint()
    save_safetensors(folder / "tiny.safetensors", checkpoint.config, checkpoint.weights)
    with load(model) as transcriber:
        texts = [transcriber.transcribe(folder / name).text for name in names]
    (folder / "texts.json").write_text(json.dumps(texts))
    rows = [
        {"audio_filepath": name, "duration": 1.0 + 0.5 * seed, "text": text}
        for seed, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    nemo_manifest(folder / "nemo.jsonl", *rows)
    nvidia = [
        {"transcript": row["text"], "files": [{"fname": row["audio_filepath"], "duration": row["duration"]}]}
        for row in rows
    ]
    (folder / "nvidia.json").write_text(json.dumps(nvidia))
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    return json.loads((folder / "texts.json").read_text())


@pytest.fixture(scope="module")
def model(folder):
    return ("--model", folder / "tiny.onnx")


def process(*argv, cwd, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*JASPER, *map(str, argv)], cwd=cwd, env=ENVIRONMENT, **options)


def finished(*argv, cwd, **options):
    running = process(*argv, cwd=cwd, **options)
    out, err = running.communicate(timeout=60)
    return running.returncode, out, err


# --- end to end, as a user runs it --------------------------------------------------


def test_from_a_checkpoint_to_a_gate(folder, texts, tmp_path):
    """export -> info -> transcribe -> evaluate, each in a process of its own; an .onnx needs no other flag."""
    code, out, err = finished("export", CHECKPOINT, tmp_path / "m.onnx", *TINY, cwd=tmp_path)
    assert (code, out) == (0, "")
    assert re.fullmatch(
        r"jasper: \S+/m\.onnx: Jasper, 309,277 parameters, opset 13, feats \[B, 64, T\], 1\.2 MB, built in .* s\n", err
    )
    code, out, err = finished("info", "m.onnx", "--format", "json", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert json.loads(out)["parameters"] == 309_277
    os.symlink(folder / "a.wav", tmp_path / "a.wav")
    assert finished("transcribe", "--model", "m.onnx", "a.wav", cwd=tmp_path) == (0, f"{texts[0]}\n", "")
    gate = ("--reference-wer", 3.2, "--tolerance", 0.01)
    code, out, err = finished("evaluate", folder / "nemo.jsonl", "--model", "m.onnx", *gate, cwd=tmp_path)
    assert (code, out) == (0, "eval_wer: 0.00\n")
    assert "gate holds: WER 0.00 % is within 3.2 % + 1.0% = 3.232 %\n" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "m.onnx"]


def test_the_installed_command(folder):
    script = Path(sys.executable).with_name("jasper")
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"jasper, version {jasper_asr.__version__}\n")


# --- transcribe: the options of the model; the rest is in test_transcribe_cli.py --------------------


def test_the_duration_is_that_of_the_file_before_silence_is_cut(folder, model, tmp_path):
    write_wav(tmp_path / "quiet.wav", np.concatenate([np.zeros(16_000, np.float32), sound(1.0)]))
    outputs = [
        run("transcribe", tmp_path / "quiet.wav", *model, "--format", "jsonl", *option)[1]
        for option in ([], ["--trim-silence"], ["--no-trim-silence"])
    ]
    assert [json.loads(out)["duration"] for out in outputs] == [2.0] * 3
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_checkpoint_with_its_config_and_a_safetensors_without(folder, texts):
    assert run("transcribe", folder / "a.wav", "--model", CHECKPOINT, *TINY)[1] == f"{texts[0]}\n"
    assert run("transcribe", folder / "a.wav", "--model", folder / "tiny.safetensors")[1] == f"{texts[0]}\n"
    raw = run("transcribe", folder / "a.wav", "--model", CHECKPOINT, *TINY, "--weights", "raw")
    assert raw[0] == 0
    assert raw[1] != f"{texts[0]}\n"


def test_threads_and_backend_are_passed_on(folder, model, monkeypatch):
    seen = {}

    def fake_load(model, backend, **options):
        seen.update(options, model=model, backend=backend)
        return load(model, backend, **options)

    monkeypatch.setattr("jasper_asr.transcribe.load", fake_load)
    argv = ("transcribe", folder / "a.wav", *model, "--threads", 2, "--backend", "ort", "--batch-size", 3)
    assert run(*argv)[0] == 0
    expected = {
        "model": str(folder / "tiny.onnx"),
        "backend": "ort",
        "config": None,
        "weights": "ema",
        "batch_size": 3,
        "threads": 2,
        "trim_silence": None,
        "pad_to": None,
        "beam": None,
        "greedy": False,
        "words": False,
        "chunk_seconds": None,
        "halo_seconds": None,
        "device": None,
    }
    assert {name: value for name, value in seen.items() if name in expected} == expected


def test_a_file_name_that_is_not_text(folder, tmp_path):
    try:
        os.symlink(folder / "a.wav", os.fsencode(tmp_path) + b"/\xff.wav")
    except OSError:
        pytest.skip("this file system has no such names")
    argv = [*JASPER, "transcribe", "--format", "jsonl", "--model", str(folder / "tiny.onnx"), b"\xff.wav"]
    done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.fsencode(json.loads(done.stdout)["audio_filepath"]) == b"\xff.wav"


# --- evaluate -----------------------------------------------------------------------


@pytest.mark.parametrize("manifest", ["nemo.jsonl", "nvidia.json"])
def test_evaluate_prints_one_line_on_stdout(folder, model, manifest):
    code, out, err = run("evaluate", folder / manifest, *model)
    assert (code, out) == (0, "eval_wer: 0.00\n")
    assert re.fullmatch(
        r"jasper: WER 0\.00 %, CER 0\.00 %: 0 errors in 3 words \(0 substitutions, 0 deletions, 0 insertions\); "
        r"3 utterances, 0 failed, 0 skipped; 4\.5 s of audio in \d+\.\d\d s, real-time factor 0\.\d{4}\n",
        err,
    )


@pytest.fixture
def wrong(folder, tmp_path, texts):
    """A manifest of 4 words where the model gets one wrong: WER 25 %."""
    rows = [
        {"audio_filepath": str(folder / "a.wav"), "duration": 1.0, "text": texts[0]},
        {"audio_filepath": str(folder / "b.wav"), "duration": 1.5, "text": f"{texts[1]} {texts[1]}"},
        {"audio_filepath": str(folder / "c.wav"), "duration": 2.0, "text": texts[2]},
    ]
    return nemo_manifest(tmp_path / "wrong.jsonl", *rows)


@pytest.mark.parametrize(
    ("gate", "code", "verdict"),
    [
        (["--reference-wer", 25], 0, "jasper: gate holds: WER 25.00 % is within 25 % + 1.0% = 25.25 %"),
        (["--reference-wer", 24.8], 0, "jasper: gate holds: WER 25.00 % is within 24.8 % + 1.0% = 25.05 %"),
        (
            ["--reference-wer", 3.2, "--tolerance", 0.01],
            7,
            "jasper: error: gate not met: WER 25 % is above 3.2 % + 1.0% = 3.232 %",
        ),
        (
            ["--reference-wer", 24.8, "--tolerance", 0],
            7,
            "jasper: error: gate not met: WER 25 % is above 24.8 % + 0.0% = 24.8 %",
        ),
    ],
)
def test_the_gate_decides_the_exit_code(wrong, folder, model, gate, code, verdict):
    result = run("evaluate", wrong, *model, *gate, "--audio-root", folder)
    assert result[:2] == (code, "eval_wer: 25.00\n")
    assert result[2].splitlines()[-1] == verdict


def test_failed_utterances_end_with_1_or_fail_the_gate(folder, model, texts, tmp_path):
    rows = [
        {"audio_filepath": str(folder / "a.wav"), "duration": 1.0, "text": texts[0]},
        {"audio_filepath": str(folder / "none.wav"), "duration": 1.0, "text": "hello"},
    ]
    manifest = nemo_manifest(tmp_path / "m.jsonl", *rows)
    code, out, err = run("evaluate", manifest, *model, "--allow-outside-root")
    assert (code, out) == (1, "eval_wer: 0.00\n")
    assert err.splitlines()[0] == f"jasper: error: {folder / 'none.wav'}: no such file; check the path"
    gated = run("evaluate", manifest, *model, "--allow-outside-root", "--reference-wer", 50)
    assert gated[:2] == (7, "eval_wer: 0.00\n")
    assert gated[2].splitlines()[-1] == "jasper: error: gate not met: 1 utterances failed"


def test_predictions_and_report_are_written(wrong, folder, model, texts, tmp_path):
    out, report = tmp_path / "predictions.txt", tmp_path / "report.json"
    out.write_text("old")
    argv = ("evaluate", wrong, *model, "--audio-root", folder, "--save-predictions", out, "--report", report)
    assert run(*argv, "--batch-size", 2)[0] == 0
    assert out.read_text() == "".join(f"{text}\n" for text in texts)
    content = json.loads(report.read_text())
    assert (content["wer"], content["words"], content["errors"], content["deletions"]) == (25.0, 4, 1, 1)
    assert [item["audio_filepath"] for item in content["items"]] == [str(folder / f"{name}.wav") for name in "abc"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.txt", "report.json", "wrong.jsonl"]


def test_several_manifests_are_scored_as_one(folder, model, wrong):
    code, out, err = run("evaluate", folder / "nemo.jsonl", wrong, *model, "--audio-root", folder)
    assert (code, out) == (0, "eval_wer: 14.29\n")
    assert "1 errors in 7 words" in err


def test_max_duration_skips_and_pads(folder, model, monkeypatch):
    code, _, err = run("evaluate", folder / "nemo.jsonl", *model, "--max-duration", 1.5)
    assert code == 0
    assert "2 utterances, 0 failed, 1 skipped; 2.5 s of audio" in err
    seen = []

    def fake_load(*args, **options):
        seen.append(options["pad_to"])
        return load(*args, **options)

    monkeypatch.setattr("jasper_asr.transcribe.load", fake_load)
    padded = run("evaluate", folder / "nemo.jsonl", *model, "--max-duration", 16.7, "--pad-to-max-duration")
    assert padded[:2] == (0, "eval_wer: 0.00\n")
    assert seen == [16.7]


def test_a_report_that_cannot_be_written_still_leaves_the_result_on_stdout(folder, model, tmp_path, monkeypatch):
    report = tmp_path / "r.json"
    report.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jasper_asr.evaluate.os.replace", full)
    code, out, err = run("evaluate", folder / "nemo.jsonl", *model, "--report", report)
    assert (code, out) == (5, "eval_wer: 0.00\n")
    expected = f"jasper: error: {report}: cannot be written (no space left on device); check the folder and free space"
    assert err.splitlines()[-1] == expected
    assert report.read_text() == "old"
    assert list(tmp_path.iterdir()) == [report]


# --- export and info ----------------------------------------------------------------


def test_export_options_reach_the_file(tmp_path):
    out = tmp_path / "m.onnx"
    options = ("--batch-size", 4, "--frames", 304, "--opset", 11, "--exact-lengths", "--weights", "raw")
    assert run("export", CHECKPOINT, out, *TINY, *options)[0] == 0
    proto = onnx.load(out)
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [4, 64, 304]
    assert proto.opset_import[0].version == 11
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert (properties["masked"], properties["weights"]) == ("false", "raw")
    assert len(properties["checkpoint_sha256"]) == 64


def test_opsets_are_those_of_the_graph_builder():
    assert models.OPSETS == (graph.MIN_OPSET, graph.MAX_OPSET)


def test_info_of_every_kind_of_file(folder):
    weights = [value for name, value in tiny_checkpoint().weights.items() if "running_" not in name]
    for arguments in ([folder / "tiny.onnx"], [folder / "tiny.safetensors"], [CHECKPOINT, *TINY]):
        code, out, err = run("info", *arguments, "--format", "json")
        assert (code, err) == (0, "")
        facts = json.loads(out)
        assert facts["model"] == "Jasper"
        assert facts["file"] == str(arguments[0])
        assert facts["file_bytes"] == arguments[0].stat().st_size
        assert facts["parameters"] == sum(value.size for value in weights) == 309_277
        assert {"stride", "receptive_field", "inputs", "outputs", "labels", "features"} <= set(facts)
        assert len(facts["checkpoint_sha256"]) == 64
        code, text, err = run("info", *arguments)
        assert (code, err) == (0, "")
        lines = dict(line.split(maxsplit=1) for line in text.splitlines())
        assert list(lines) == list(facts)
        assert lines["parameters"] == "309,277"
        assert "abcdefghijklmnopqrstuvwxyz" in lines["labels"]


def test_export_to_safetensors(texts, folder, tmp_path):
    whole, half = tmp_path / "m.safetensors", tmp_path / "half.safetensors"
    assert run("export", CHECKPOINT, whole, *TINY)[:2] == (0, "")
    assert run("export", CHECKPOINT, half, *TINY, "--half")[:2] == (0, "")
    assert run("transcribe", folder / "a.wav", "--model", whole) == (0, f"{texts[0]}\n", "")
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    message = f"jasper: error: {tmp_path / 'm.onnx'}: --half is for .safetensors only\n"
    assert run("export", CHECKPOINT, tmp_path / "m.onnx", *TINY, "--half") == (2, "", message)


@pytest.mark.parametrize(
    "name",
    [
        "m.onnx",
        "m.safetensors",
    ],
)
def test_a_full_disk_while_exporting_leaves_the_old_file(folder, tmp_path, name):
    """The kernel stops the write at 500 kB of 1.2 MB."""
    out = tmp_path / name
    out.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        code, stdout, err = run("export", folder / "tiny.safetensors", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, stdout) == (5, "")
    assert re.fullmatch(rf"jasper: error: {re.escape(str(out))}: cannot be written .*[Ff]ile too large.*\n", err)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_killed_export_leaves_the_old_file_or_the_whole_new_one(folder, tmp_path):
    out = tmp_path / "m.onnx"
    started = time.perf_counter()
    assert finished("export", folder / "tiny.safetensors", out, cwd=tmp_path)[0] == 0
    seconds = time.perf_counter() - started
    whole = out.read_bytes()
    rng = random.Random(time.time_ns())
    for _ in range(3):
        out.write_bytes(b"old")
        running = process("export", folder / "tiny.safetensors", out, cwd=tmp_path)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        running.kill()
        running.communicate()
        assert out.read_bytes() in (b"old", whole)


# --- options ------------------------------------------------------------------------


def commands(group=cli.command, path=()):
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def test_there_is_every_command_of_the_contract():
    assert {" ".join(path) for path in commands()} == {
        "",
        "benchmark",
        "compile",
        "demo",
        "download",
        "download checkpoint",
        "download librispeech",
        "evaluate",
        "export",
        "info",
        "listen",
        "prepare",
        "prepare librispeech",
        "quantize",
        "train",
        "transcribe",
        "tune-lm",
    }


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(path, flag):
    code, out, err = run(*path, flag)
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(('jasper', *path))} ")
    assert "-h, --help" in out


PROMISED = {
    "transcribe": "--model --format --batch-size --backend --threads",
    "evaluate": "--model --audio-root --batch-size --max-duration --pad-to-max-duration --save-predictions --report "
    "--reference-wer --tolerance",
    "export": "--config --weights --batch-size --frames --opset",
    "info": "--format",
    "train": "--config --train --dev --out --init",
    "download librispeech": "--out --mirror",
    "prepare librispeech": "--manifest --wav-dir --speed",
}


@pytest.mark.parametrize("command", PROMISED)
def test_help_names_every_promised_option(command):
    out = run(*command.split(), "--help")[1]
    assert [option for option in PROMISED[command].split() if not re.search(rf"{option}\b", out)] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Missing command. (see jasper --help)"),
        (["download"], "Missing command. (see jasper download --help)"),
        (["transcribe"], "Missing argument 'AUDIO...'. (see jasper transcribe --help)"),
        (["nonsense"], "No such command 'nonsense'. (see jasper --help)"),
    ],
)
def test_wrong_use_is_one_line_and_2(argv, message):
    assert run(*argv) == (2, "", f"jasper: error: {message}\n")


@pytest.mark.parametrize("path", [path for path in commands() if path], ids=" ".join)
def test_an_unknown_option_is_one_line_and_2(path):
    code, out, err = run(*path, "--nonsense")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"jasper: error: No such option:? '?--nonsense.*\(see jasper .*--help\)\n", err)


# --- downloads, manifests, training: what is asked of the library ---------------------


def test_prepare_librispeech(monkeypatch, tmp_path):
    seen = {}

    def fake(root, manifest, **options):
        seen.update(options, root=root, manifest=manifest)
        options["progress"](1, 2)
        return SimpleNamespace(manifest=manifest, utterances=2, seconds=1800.0, unlisted=1, outside=True)

    monkeypatch.setattr("jasper_asr.data.librispeech.prepare_librispeech", fake)
    argv = ("prepare", "librispeech", tmp_path, "--manifest", "m.json", "--wav-dir", "w", "--speed", 0.9)
    code, out, err = run(*argv, "1.1", "--jobs", "2")
    assert (code, out) == (0, "m.json\n")
    assert err == (
        "jasper: 2 utterances, 0.50 h; 1 FLACs without transcript left out\n"
        "jasper: the audio lies outside the manifest's folder: read it with --allow-outside-root or --audio-root\n"
    )
    del seen["progress"]
    assert seen == {
        "root": tmp_path,
        "manifest": Path("m.json"),
        "wav_dir": Path("w"),
        "speeds": (0.9, 1.1),
        "jobs": 2,
    }


def test_download_librispeech(monkeypatch, tmp_path):
    seen = {}

    def fake(subset, out, **options):
        options.pop("progress")(5, 10)
        options.pop("unpack_progress")(5, 10)
        seen.update(options, subset=subset, out=out)
        return out / "LibriSpeech" / subset

    monkeypatch.setattr("jasper_asr.data.librispeech.download_librispeech", fake)
    argv = ("download", "librispeech", "dev-clean", "--out", tmp_path, "--mirror", "http://127.0.0.1:1/x")
    assert run(*argv, "--keep-archive") == (0, f"{tmp_path}/LibriSpeech/dev-clean\n", "")
    assert seen == {
        "subset": "dev-clean",
        "out": tmp_path,
        "mirror": "http://127.0.0.1:1/x",
        "keep_archive": True,
    }


@pytest.mark.parametrize(
    ("verified", "note"), [(True, "hash verified"), (False, f"NOT verified, sha256 is {'ab' * 32}")]
)
def test_download_checkpoint(monkeypatch, tmp_path, verified, note):
    seen = {}

    def fake(url, out, **options):
        options.pop("progress")(5, None)
        seen.update(options, url=url)
        download = SimpleNamespace(path=out, verified=verified, sha256="ab" * 32, bytes=12345)
        return SimpleNamespace(download=download, members=("jasper.pt",), kind="zip")

    monkeypatch.setattr("jasper_asr.data.download.download_checkpoint", fake)
    argv = ("download", "checkpoint", "--url", "http://127.0.0.1:1/x.zip", "--out", tmp_path / "x.zip")
    code, out, err = run(*argv, "--sha256", "ab" * 32)
    assert (code, out) == (0, f"{tmp_path / 'x.zip'}\n")
    assert err == f"jasper: zip holding jasper.pt, 12,345 bytes, {note}\n"
    assert seen == {"url": "http://127.0.0.1:1/x.zip", "sha256": "ab" * 32, "md5": None}


def test_a_failed_download_is_one_line_and_6(monkeypatch, tmp_path):
    def fake(*_args, **_options):
        raise DownloadError("http://127.0.0.1:1/x: the md5 differs; download it again")

    monkeypatch.setattr("jasper_asr.data.librispeech.download_librispeech", fake)
    argv = ("download", "librispeech", "dev-clean", "--out", tmp_path)
    assert run(*argv) == (6, "", "jasper: error: http://127.0.0.1:1/x: the md5 differs; download it again\n")


def test_train(monkeypatch, folder, tmp_path):
    pytest.importorskip("torch")
    seen = {}

    def fake(config, train, dev, out, settings, **options):
        seen.update(config=config.name, train=[len(rows) for rows in train], dev=len(dev), out=out, settings=settings)
        seen.update(init=options["init"], cache=options["cache_dir"])
        options["report"]({"step": 1, "loss": 2.5})
        skipped = [SimpleNamespace(audio_filepath=f"{i}.wav", reason="too long") for i in range(12)]
        return SimpleNamespace(step=3, audio_seconds=7200.0, best_wer=12.345), skipped

    monkeypatch.setattr("jasper_asr.train.run.run_training", fake)
    manifests = ("--train", folder / "nemo.jsonl", folder / "nvidia.json", "--dev", folder / "nemo.jsonl")
    options = ("--steps", 3, "--lr", 0.5, "--bf16", "--optimizer", "novograd", "--schedule", "poly", "--ema", 0.9)
    code, out, err = run("train", *TINY, *manifests, "--out", tmp_path, *options, "--init", "start.pt")
    assert (code, out) == (0, f"{tmp_path / 'best.pt'}\n")
    lines = err.splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 2.5}
    assert lines[1] == "jasper: left out 0.wav: too long"
    assert lines[11:] == ["jasper: left out 2 more", "jasper: 3 steps, 2.0 h of audio, dev WER 12.35 %"]
    settings = seen.pop("settings")
    assert (settings.steps, settings.lr, settings.bf16, settings.optimizer) == (3, 0.5, True, "novograd")
    assert (settings.schedule, settings.ema) == ("poly", 0.9)
    assert seen == {
        "config": "Jasper",
        "train": [3, 3],
        "dev": 3,
        "out": tmp_path,
        "init": Path("start.pt"),
        "cache": None,
    }


# --- signals and pipes ----------------------------------------------------------------


@pytest.fixture(scope="module")
def many(folder, tmp_path_factory):
    """A folder with 20,000 names of one clip."""
    many = tmp_path_factory.mktemp("many")
    for number in range(20_000):
        os.symlink(folder / "a.wav", many / f"{number:05}.wav")
    return many


@pytest.mark.parametrize(("number", "code", "err"), [("SIGTERM", 143, ""), ("SIGINT", 130, "interrupted")])
def test_signals_end_with_their_code_and_whole_lines(folder, many, texts, number, code, err):
    running = process("transcribe", "--model", "tiny.onnx", many, cwd=folder)
    assert running.stdout.readline() == f"{many}/00000.wav\t{texts[0]}\n"
    running.send_signal(getattr(signal, number))
    out, complaint = running.communicate(timeout=20)
    assert running.returncode == code
    assert complaint == (f"jasper: error: {err}\n" if err else "")
    count = out.count("\n")
    assert out == "".join(f"{many}/{number:05}.wav\t{texts[0]}\n" for number in range(1, count + 1))
    assert count < 19_999


def test_a_reader_that_goes_away_is_no_error(folder, many, texts):
    running = process("transcribe", "--model", "tiny.onnx", many, cwd=folder)
    assert running.stdout.readline() == f"{many}/00000.wav\t{texts[0]}\n"
    running.stdout.close()
    assert running.wait(timeout=20) == 0
    assert running.stderr.read() == ""
    running.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout(folder):
    with open("/dev/full", "w") as full:
        code, _, err = finished("transcribe", "--model", "tiny.onnx", "a.wav", cwd=folder, stdout=full)
    assert (code, err) == (5, "jasper: error: I/O: no space left on device\n")


def test_running_out_of_memory_is_one_line_and_5(folder, model, monkeypatch):
    def fail(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr("jasper_asr.features.features", fail)
    expected = "jasper: error: out of memory; use a smaller --batch-size or shorter audio\n"
    assert run("transcribe", folder / "a.wav", *model) == (5, "", expected)


def test_a_missing_package_is_one_line_and_2(folder, model, monkeypatch):
    def fail(*_args, **_options):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("jasper_asr.transcribe.load", fail)
    expected = "jasper: error: torch is not installed; pip install 'jasper-asr[train]'\n"
    assert run("transcribe", folder / "a.wav", *model) == (2, "", expected)


# --- Ascend ---------------------------------------------------------------------------------------------------


def test_export_for_ascend_and_the_command_to_compile_it(tmp_path):
    model = tmp_path / "tiny.onnx"
    options = ("--config", CONFIG, "--batch-size", "1", "--frames", "4000", "--opset", "11", "--target", "ascend")
    assert run("export", CHECKPOINT, model, *options)[0] == 0
    code, out, _ = run("compile", model, "--soc", "Ascend310", "--dry-run")
    assert code == 0
    assert "--input_shape=feats:1,64,4000;feat_lens:1" in out
    assert "--soc_version=Ascend310" in out
    code, out, err = run("compile", model, "--soc", "910B")
    assert (code, out) == (2, "")
    assert "Ascend910B1" in err
    code, _, err = run("compile", model, "--soc", "Ascend310", "--atc", tmp_path / "no-atc")
    assert code != 0
    assert err.splitlines()[-1].startswith("jasper: error: ")
    assert not list(tmp_path.glob("*.om*"))


def test_ascend_options_do_not_mix_with_others(tmp_path):
    for extra in (["--exact-lengths"], []):
        target = tmp_path / ("x.onnx" if extra else "x.safetensors")
        code, _, err = run("export", CHECKPOINT, target, "--config", CONFIG, "--target", "ascend", *extra)
        assert code == 2
        assert "--target ascend" in err
    code, _, err = run("export", CHECKPOINT, tmp_path / "x.onnx", "--config", CONFIG, "--max-frames", "100")
    assert code == 2
    assert "--max-frames" in err
    assert not list(tmp_path.iterdir())


def test_beam_search_options(texts, folder):
    clip = folder / "a.wav"
    model = folder / "tiny.onnx"
    code, out, _ = run("transcribe", clip, "--model", model, "--lm", "mini", "--beam-width", "8")
    assert code == 0
    assert out.strip() != texts[0]
    for weight in ("--lm-weight", "--word-bonus", "--unknown-penalty", "--blank-penalty"):
        code, out, err = run("transcribe", clip, "--model", model, weight, "1")
        assert (code, out) == (2, "")
        assert "need --lm" in err
    code, out, err = run("transcribe", clip, "--model", model, "--lm", folder / "none.lm")
    assert (code, out) == (5, "")
    assert "none.lm" in err
