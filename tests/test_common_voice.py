"""recipes/mini/common_voice.py: which clips of a Common Voice release are taken, and what their text becomes."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jasper_asr.data.manifest import read_manifest

ROOT = Path(__file__).parents[1]
COLUMNS = ["client_id", "path", "sentence", "up_votes", "down_votes", "age"]


@pytest.fixture(scope="module")
def common_voice():
    spec = importlib.util.spec_from_file_location("common_voice", ROOT / "recipes" / "mini" / "common_voice.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("sentence", "wanted"),
    [
        ("There's no cure, and no \u201cstandard\u201d course.", "there's no cure and no standard course"),
        ("Well-known \u2014 isn\u2019t it?", "well known isn't it"),
        ("'Tis the dogs' bowl", "tis the dogs bowl"),
        ("I am here", "i am here"),
        ("The band of 1992.", ""),
        ("The USA won.", ""),
        ("Mr. Smith left.", ""),
        ("J. Smith left.", ""),
        ("Caf\u00e9 noir today.", ""),
        ("Half & half.", ""),
        ("Hello.", ""),
        ("", ""),
    ],
)
def test_only_sentences_that_are_read_as_they_are_spelt(common_voice, sentence, wanted):
    assert common_voice.transcript(sentence) == wanted


def test_a_release_becomes_two_manifests_with_no_speaker_in_both(common_voice, tmp_path, monkeypatch, capsys):
    (tmp_path / "clips").mkdir()
    rows = []
    for index in range(80):
        soundfile.write(tmp_path / "clips" / f"{index}.flac", np.zeros(32_000, np.float32), 16_000)
        rows.append([f"{index % 40:016x}" + 48 * "0", f"{index}.flac", 'He said "yes" to the crowd.', "2", "0", ""])
    rows[0][3:5] = ["1", "1"]  # undecided
    rows[1][1] = "absent.flac"
    rows[2][2] = "A b."  # one letter a second
    rows[3][2] = "It takes far longer to say all of this than there is time for in two seconds of sound."
    (tmp_path / "clips" / "4.flac").write_bytes(b"not audio")
    table = "\n".join("\t".join(row) for row in [COLUMNS, *rows])
    (tmp_path / "validated.tsv").write_text(table + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["common_voice.py", str(tmp_path)])
    common_voice.main()
    train, dev = (read_manifest(tmp_path / f"manifest-{name}.jsonl") for name in ("train", "dev"))
    assert len(train) + len(dev) == 75
    assert {row.text for row in (*train, *dev)} == {"he said yes to the crowd"}
    assert len(dev) >= 2
    speakers = [
        {json.loads(line)["speaker"] for line in (tmp_path / f"manifest-{name}.jsonl").read_text().splitlines()}
        for name in ("train", "dev")
    ]
    assert not speakers[0] & speakers[1]
    assert "5 clips left out" in capsys.readouterr().err
