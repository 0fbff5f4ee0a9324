"""The CTC loss of checkpoints on sets that they have or have not heard, and their errors: a compass for training.

    python recipes/mini/losses.py MANIFEST [...] --models A.pt B.safetensors [--limit 60]

A word error rate of 60 utterances moves by a point when nothing has changed; their loss, in nats a letter, does not.
On a set that was trained on beside one that was not, it tells what is learnt by heart. But it also falls when a network
is no more often right and only less sure of itself (`--consistency` does that), so the best path's character error
rate, in percent, stands beside it. One row a manifest (`--limit` utterances of it, evenly spaced), a pair of columns a
checkpoint; EMA weights, batch 1, no augmentation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import ctc_loss

import jasper_asr
from jasper_asr import text
from jasper_asr.audio import load_audio
from jasper_asr.data.manifest import Utterance, read_manifest
from jasper_asr.decode import greedy
from jasper_asr.errors import JasperError
from jasper_asr.train.dataset import spelt
from jasper_asr.transcribe import Transcriber
from jasper_asr.wer import EditCounts, count_char_edits


def main() -> None:
    """Parse, measure, print a table as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--models", nargs="+", default=["mini"])
    parser.add_argument("--limit", type=int, default=60, help="utterances of each manifest")
    options = parser.parse_args()
    transcribers = [jasper_asr.load(model, greedy=True) for model in options.models]
    print("\t".join(["set", *(f"{Path(model).stem}\tCER" for model in options.models)]))
    for manifest in options.manifests:
        utterances = evenly_spaced(read_manifest(manifest), options.limit)
        measured = (measure(transcriber, utterances) for transcriber in transcribers)
        name = manifest.parent.name if manifest.stem == "manifest" else manifest.stem
        print("\t".join([name, *(f"{loss:.3f}\t{100 * cer:.1f}" for loss, cer in measured)]), flush=True)


def evenly_spaced(utterances: Sequence[Utterance], limit: int) -> list[Utterance]:
    """At most `limit` of `utterances`, from the first to the last."""
    count = min(limit, len(utterances))
    return [utterances[i] for i in np.linspace(0, len(utterances) - 1, count).round().astype(int)]


def measure(transcriber: Transcriber, utterances: Sequence[Utterance]) -> tuple[float, float]:
    """Sum of -log p(transcript | audio), CTC, over the sum of their letters; the best path's CER, a fraction."""
    total, letters, edits, config = 0.0, 0, EditCounts(0, 0, 0, 0), transcriber.config
    for row in utterances:
        offset, duration = row.part
        log_probs, lens = transcriber.log_probs([load_audio(row.audio_path, offset=offset, duration=duration)])
        transcript = spelt(row.text or "", config)
        labels = torch.tensor(text.encode(transcript, config.labels))
        frames = torch.from_numpy(np.array(log_probs[0, : lens[0], None], np.float32))
        wanted = labels[None], torch.tensor([len(frames)]), torch.tensor([len(labels)])
        total += float(ctc_loss(frames, *wanted, blank=config.blank_id, reduction="sum"))
        letters += len(labels)
        edits += count_char_edits(transcript, greedy(log_probs[0], int(lens[0]), config.labels))
    return total / letters, edits.rate


if __name__ == "__main__":
    try:
        main()
    except JasperError as error:
        sys.exit(f"losses.py: {error}")
