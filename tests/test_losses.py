"""recipes/mini/losses.py: CTC losses, held against the forward algorithm written out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jasper_asr
from jasper_asr import text
from jasper_asr.audio import load_audio
from jasper_asr.data.manifest import read_manifest
from jasper_asr.wer import count_char_edits

SCRIPT = Path(__file__).parents[1] / "recipes" / "mini" / "losses.py"
CLIPS = Path(jasper_asr.__file__).parent / "models" / "mini" / "clips" / "manifest.jsonl"


def test_the_loss_is_minus_the_log_probability_of_the_transcripts_a_letter():
    done = subprocess.run(
        [sys.executable, SCRIPT, CLIPS, "--limit", "2"], capture_output=True, text=True, timeout=120, check=True
    )
    header, row = (line.split("\t") for line in done.stdout.splitlines())
    assert header == ["set", "mini", "CER"]
    assert row[0] == "clips"
    clips, transcriber = read_manifest(CLIPS), jasper_asr.load("mini")
    loss = letters = 0.0
    best_path = jasper_asr.load("mini", greedy=True)
    first, last = (count_char_edits(c.text, best_path.transcribe(c.audio_path).text) for c in (clips[0], clips[-1]))
    assert float(row[2]) == pytest.approx(100 * (first + last).rate, abs=0.06)
    for clip in (clips[0], clips[-1]):
        labels = text.encode(clip.text, transcriber.config.labels)
        log_probs, lens = transcriber.log_probs([load_audio(clip.audio_path)])
        loss -= forward(log_probs[0, : lens[0]].astype(np.float64), labels, transcriber.config.blank_id)
        letters += len(labels)
    assert float(row[1]) == pytest.approx(loss / letters, abs=6e-4)


def forward(log_probs: np.ndarray, labels: list[int], blank: int) -> float:
    """log p(labels), Graves et al. 2006, equations 6 to 8, in logarithms."""
    states = [blank, *(state for label in labels for state in (label, blank))]
    may_skip = np.array([i > 1 and s != blank and s != states[i - 2] for i, s in enumerate(states)])
    alpha = np.full(len(states), -np.inf)
    alpha[:2] = log_probs[0, states[:2]]
    for frame in log_probs[1:]:
        one = np.concatenate([[-np.inf], alpha[:-1]])
        two = np.where(may_skip, np.concatenate([[-np.inf, -np.inf], alpha[:-2]]), -np.inf)
        alpha = np.logaddexp(np.logaddexp(alpha, one), two) + frame[states]
    return float(np.logaddexp(alpha[-1], alpha[-2]))
