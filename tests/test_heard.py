"""recipes/mini/heard.py: which hypotheses become transcripts of speech that has none."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "recipes" / "mini" / "heard.py"


def test_only_confident_words_at_the_pace_of_speech_are_taken(tmp_path):
    def heard(name: str, text: str, *confidences: float) -> dict:
        return {"audio_filepath": name, "pred_text": text, "words": [{"confidence": c} for c in confidences]}

    hypotheses = [
        heard("sure.flac", "good morning", 0.72, 0.70),  # the mean is 0.71 just so
        heard("unsure.flac", "good morning", 0.71, 0.70),
        heard("slow.flac", "good", 0.99),
        heard("fast.flac", "good morning to all of you here", *[0.99] * 7),
        heard("silent.flac", ""),
    ]
    clips = [
        {"audio_filepath": row["audio_filepath"], "duration": 1.0, "text": "", "speaker": "x"} for row in hypotheses
    ]
    for name, rows in (("clips", clips), ("heard", hypotheses[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = subprocess.run(
        [sys.executable, SCRIPT, "clips.jsonl", "heard.jsonl", "--confidence", "0.7099", "--out", "manifest.jsonl"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert taken == [{"audio_filepath": "sure.flac", "duration": 1.0, "text": "good morning", "speaker": "x"}]
    assert run.stderr == "1 of 5 utterances, 0.00 h\n"
