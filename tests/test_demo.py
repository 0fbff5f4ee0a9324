"""The embedded model and `jasper demo`, the first thing that a newcomer runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

import jasper_asr
from helpers_audio import run
from jasper_asr.cli import speech
from jasper_asr.data.manifest import read_manifest

MINI = Path(jasper_asr.__file__).parent / "models" / "mini"


def test_demo_shows_every_clip_and_the_gate_holds():
    code, out, _ = run("demo")
    assert code == 0
    rows = read_manifest(MINI / "clips" / "manifest.jsonl")
    for row in rows:
        assert f"{row.audio_filepath} ({row.speaker}, {row.duration:.1f} s, WER " in out
        assert f"reference   {row.text}" in out
    assert out.count("hypothesis  ") == len(rows) == 12
    assert re.search(r"1\. Graph .* 8,935,453 parameters, opset 13, feats \[B, 64, T\]", out)
    assert "real-time factor" in out
    gate = json.loads((MINI / "gate.json").read_text())
    wer = float(re.search(r"3\. Score +WER ([\d.]+) %", out)[1])
    # the reference is a measured figure, not a generous one: this machine must come out near it
    assert abs(wer - gate["reference_wer"]) <= gate["tolerance"] * gate["reference_wer"]
    assert out.rstrip().endswith("holds")
    assert float(re.search(r"language model \(--lm mini\): WER ([\d.]+) %", out)[1]) < 0.9 * wer


def test_a_gate_that_is_not_met_is_exit_7(monkeypatch, tmp_path):
    """The same package with a stricter gate beside its model."""
    package = tmp_path / "jasper_asr"
    shutil.copytree(MINI / "clips", package / "models" / "mini" / "clips")
    (package / "models" / "mini" / "gate.json").write_text('{"reference_wer": 0.1, "tolerance": 0.0}')
    monkeypatch.setattr(speech, "MINI", package / "models" / "mini")
    code, out, _ = run("demo")
    assert code == 7
    assert out.rstrip().endswith("NOT MET")


def test_clips_are_of_six_voices_and_small():
    rows = read_manifest(MINI / "clips" / "manifest.jsonl")
    assert len({row.speaker for row in rows}) == 6
    sizes = {path.name: path.stat().st_size for path in MINI.rglob("*")}
    assert sizes.pop("weights.safetensors") < 20_000_000
    assert sizes.pop("words.lm") < 8_000_000
    assert sum(sizes.values()) < 1_000_000


@pytest.mark.parametrize("batch_size", [4, 12])
def test_batches_change_no_transcript(batch_size):
    clips = [row.audio_path for row in read_manifest(MINI / "clips" / "manifest.jsonl")]
    with jasper_asr.load("mini") as single, jasper_asr.load("mini", batch_size=batch_size) as batched:
        alone = [result.text for result in single.transcribe_many(clips)]
        together = [result.text for result in batched.transcribe_many(clips)]
    assert alone == together
