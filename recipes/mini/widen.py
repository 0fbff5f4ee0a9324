"""A wider network that computes what a trained one does, to go on training from.

    python recipes/mini/widen.py mini --config wider.yaml --out wider.safetensors [--seed 1]

Chen, Goodfellow and Shlens, "Net2Net: accelerating learning via knowledge transfer" (arXiv 1511.05641): a layer's new
channels are copies of old ones, and whoever reads a channel with copies divides its weights among them. Here each
weight is divided by chance, into shares of mean 1/2 that may be negative: what the copies are then asked to learn
differs, so they part ways. Both configs must have the same blocks, kernels and strides.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import ModelConfig, load_config
from jasper_asr.model.checkpoint import BlockLayers, ConvLayer, block_layers, load_checkpoint, save_safetensors
from jasper_asr.model.export import resolve_model

Weights = dict[str, NDArray[np.float32]]
Channels = NDArray[np.int64]
"""Old channel that each new channel is a copy of."""

SPREAD = 0.5
"""Standard deviation of a share."""


def main() -> None:
    """Parse, widen, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--config", type=Path, required=True, help="of the wider network")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    old, wider = load_checkpoint(resolve_model(options.checkpoint)), load_config(options.config)
    if shape_of(old.config) != shape_of(wider):
        parser.error(f"{options.config}: not a wider network of the same blocks as {options.checkpoint}")
    weights = widen(old.weights, old.config, wider, np.random.default_rng(options.seed))
    save_safetensors(options.out, wider, weights)
    print(f"{options.out}: {sum(values.size for values in weights.values()):,} numbers")


def shape_of(config: ModelConfig) -> list[tuple[object, ...]]:
    """What must not change: blocks, kernels, strides, dilations, residuals and classes."""
    blocks = [(b.repeat, b.kernel_size, b.stride, b.dilation, b.residual, b.residual_dense) for b in config.blocks]
    return [*blocks, (config.in_feats, config.n_classes, config.family)]


def widen(old: Weights, narrow: ModelConfig, wide: ModelConfig, rng: np.random.Generator) -> Weights:
    """The wide network's weights."""
    weights: Weights = {}
    panes = [np.arange(narrow.in_feats)]
    pairs = zip(block_layers(narrow), block_layers(wide), narrow.residual_panes(), strict=True)
    for block, (before, after, widths) in enumerate(pairs):
        out = copies(narrow.blocks[block].filters, wide.blocks[block].filters, rng)
        values = panes[-1]
        for step, _ in zip(main_path(before), main_path(after), strict=True):
            last = step is main_path(before)[-1]
            channels = out if last else copies(step.shape[0], wide.blocks[block].filters, rng)
            weights |= widened(old, step, values, channels, rng)
            values = channels
        for branch, pane in zip(before.residuals, panes[len(panes) - len(widths) :], strict=True):
            weights |= widened(old, branch, pane, out, rng)
        panes = [*panes, out] if narrow.blocks[block].residual_dense else [out]
    decoder = "decoder.layers.0"
    weights[f"{decoder}.weight"] = shared_out(old[f"{decoder}.weight"], panes[-1], rng)
    weights[f"{decoder}.bias"] = old[f"{decoder}.bias"]
    return weights


def main_path(block: BlockLayers) -> list[ConvLayer]:
    """The convolutions of a block, one after the other."""
    return [layer for repeat in block.repeats for layer in repeat]


def copies(old: int, new: int, rng: np.random.Generator) -> Channels:
    """All old channels, then as many more, chosen by chance, none much more often than others."""
    rounds = [np.arange(old)] + [rng.permutation(old) for _ in range(-(-new // old) - 1)]
    return np.concatenate(rounds)[:new]


def widened(old: Weights, layer: ConvLayer, inputs: Channels, outputs: Channels, rng: np.random.Generator) -> Weights:
    """One convolution and its norm."""
    weights = {f"{layer.name}.weight": shared_out(old[f"{layer.name}.weight"], inputs, rng, outputs)}
    norm = {f"{layer.norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
    return weights | {name: old[name][outputs] for name in norm}


def shared_out(
    weight: NDArray[np.float32], inputs: Channels, rng: np.random.Generator, outputs: Channels | None = None
) -> NDArray[np.float32]:
    """[O, C, K] -> [O', C', K]: rows copied, columns divided among the copies of what they read."""
    rows = weight if outputs is None else weight[outputs]
    members = inputs[None, :] == np.arange(weight.shape[1])[:, None]  # [C, C']
    count = members.sum(axis=1)
    chance = rng.normal(0.0, SPREAD, (rows.shape[0], len(inputs), rows.shape[2]))
    mean = np.einsum("cd,odk->ock", members, chance) / count[:, None]
    shares = 1 / count[inputs][:, None] + chance - mean[:, inputs]
    return (rows[:, inputs].astype(np.float64) * shares).astype(np.float32)


if __name__ == "__main__":
    main()
