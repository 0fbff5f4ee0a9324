"""The mean of the weights of several checkpoints of one network, as .safetensors.

    python recipes/mini/average.py A.pt B.pt [...] --out mean.safetensors [--shares 0.2 0.8] [--half] [--config C]

Of a .pt the EMA weights are taken. All count alike unless `--shares` says otherwise. Running means and variances of
BatchNorm are averaged like all else, so it suits checkpoints of runs that come from one another or from one ancestor,
not unrelated ones.
"""

import argparse
from pathlib import Path

import numpy as np

from jasper_asr.config import load_config
from jasper_asr.model.checkpoint import load_checkpoint, save_safetensors


def main() -> None:
    """Parse, average in float64, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="for checkpoints that carry none, and what the result says")
    parser.add_argument("--shares", type=float, nargs="+", help="of each checkpoint; they are scaled to add up to 1")
    parser.add_argument("--half", action="store_true", help="store float16")
    options = parser.parse_args()
    shares = options.shares or [1.0] * len(options.checkpoints)
    if len(shares) != len(options.checkpoints) or not sum(shares) > 0:
        parser.error("give one share for each checkpoint, with a sum above 0")
    config = load_config(options.config) if options.config else None
    loaded = [load_checkpoint(path, config=config) for path in options.checkpoints]
    shapes = [{name: values.shape for name, values in one.weights.items()} for one in loaded]
    if any(other != shapes[0] for other in shapes):
        parser.error("these checkpoints are of different networks; average those of one config")
    mean = {
        name: np.asarray(
            np.average([one.weights[name].astype(np.float64) for one in loaded], axis=0, weights=shares), np.float32
        )
        for name in shapes[0]
    }
    save_safetensors(options.out, loaded[0].config, mean, half=options.half)
    print(f"{options.out}: the mean of {len(loaded)} checkpoints")


if __name__ == "__main__":
    main()
