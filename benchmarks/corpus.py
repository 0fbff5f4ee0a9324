"""A corpus against the Ascend guide's way: `python benchmarks/corpus.py CHECKPOINT ONNX [--utterances 12]`.

Ours: noise of LibriSpeech dev-clean's lengths (evenly spaced quantiles), from samples to text through ONNX, batch 1
at exact length, best path. The guide's: every utterance padded to 4000 frames, eager PyTorch (our net), network only.
The two alternate. CHECKPOINT and ONNX are the same network. Needs the tests folder for the lengths, and torch.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import jasper_asr
from jasper_asr.model.checkpoint import load_checkpoint
from jasper_asr.model.net import Jasper
from test_buckets import dev_clean_frames

GUIDE_FRAMES = 4000


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("onnx")
    parser.add_argument("--utterances", type=int, default=12)
    parser.add_argument("--eager-runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    middles = (np.arange(options.utterances) + 0.5) / options.utterances
    frames = np.quantile(dev_clean_frames(), middles).astype(int)
    checkpoint = load_checkpoint(options.checkpoint)
    net = Jasper(checkpoint.config).eval()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in checkpoint.weights.items()}, strict=False)
    padded, lens = torch.randn(1, checkpoint.config.in_feats, GUIDE_FRAMES), torch.tensor([GUIDE_FRAMES])
    rng = np.random.default_rng(0)
    ours, guide = [], []
    with jasper_asr.load(options.onnx, greedy=True, threads=options.threads) as transcriber, torch.inference_mode():
        transcriber.transcribe((rng.normal(0, 0.05, 32_000).astype(np.float32), 16_000))
        for index, count in enumerate(frames):
            samples = rng.normal(0, 0.05, count * 160).astype(np.float32)
            started = time.perf_counter()
            transcriber.transcribe((samples, 16_000))
            ours.append(time.perf_counter() - started)
            if index % -(-options.utterances // options.eager_runs) == 0:
                started = time.perf_counter()
                net(padded, lens)
                guide.append(time.perf_counter() - started)
    mine, theirs = statistics.mean(ours), statistics.median(guide)
    print(f"{len(ours)} utterances, {frames.mean() / 100:.2f} s on average: {mine:.3f} s each, audio to text")
    print(f"the guide's way: {theirs:.2f} s each (median of {len(guide)}, {min(guide):.2f} to {max(guide):.2f})")
    print(f"ratio {theirs / mine:.1f}")


if __name__ == "__main__":
    main()
