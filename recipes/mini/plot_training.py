"""Training curve of a run: `python recipes/mini/plot_training.py runs/mini/log.jsonl curve.png` (needs matplotlib)."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main(log: str, picture: str) -> None:
    """Loss a label against hours of audio, and development WER where the log has it."""
    rows = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    losses = [row for row in rows if "loss" in row]
    hours = {row["step"]: row["audio_hours"] for row in losses}
    wers = [(hours[row["step"]], row["dev_wer"]) for row in rows if "dev_wer" in row and row["step"] in hours]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), constrained_layout=True)
    axes.plot([row["audio_hours"] for row in losses], [row["loss"] for row in losses], color="#1f4e79", label="loss")
    axes.set(xlabel="hours of audio seen", ylabel="training loss, nats a label", ylim=(0, None))
    if wers:
        right = axes.twinx()
        right.plot(*zip(*wers, strict=True), "o-", color="#c0504d", label="dev WER")
        right.set(ylabel="dev WER, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:3])
