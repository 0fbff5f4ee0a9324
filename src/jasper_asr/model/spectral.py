"""Convolution as products of small spectra, written with MatMul alone, so that any ONNX engine runs it.

Overlap-save: time is cut into tiles of M frames; with a halo of K//2 frames on each side a tile holds N = M + K - 1,
and its spectrum times that of the kernel gives M frames of the result. Two choices make this cheap:

- The transform takes odd frequencies, theta_f = 2 pi (f + 1/2) / N, under which convolution wraps round with its sign
  turned (the frames that wrap are dropped either way). For real input and even N there are just F = N/2 different
  frequencies, all complex: none is half used, as 0 and N/2 of the usual transform are.
- A complex product takes three real ones (Gauss): with x = a + ib and v = c + id, let k1 = c (a + b), k2 = a (d - c),
  k3 = b (c + d); then Re xv = k1 - k3 and Im xv = k1 + k2.

Both are linear, so a layer is y = inverse @ (spectra * (forward @ x)), with R = 3F products: `forward` [R, N],
`inverse` [M, R] and `spectra` [R, O, C], the kernel's. Values stay in tiles [M, C, B, n] through the whole encoder,
frame t = tile * M + m of utterance b: channels are the rows and tiles the columns of `spectra @ x`, so an engine reads
the weights in the order in which they lie, once, and copies none of them.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import ModelConfig
from jasper_asr.errors import UsageError
from jasper_asr.model.checkpoint import ConvLayer, block_layers, parameter_count

if TYPE_CHECKING:
    from jasper_asr.model.graph import Graph

CONVOLUTIONS = ("auto", "direct", "spectral")

LONG_FRAMES, SHORT_FRAMES = 1500, 500
"""Feature frames for which a graph of open frames is made: the tile suits 15 s, and spectral must win at 5 s too."""

CLEARLY = 1.5
"""By the cost model, for `auto`. It is one core's, and the many small products of a small network share two badly: for
`mini` at 4.5, 10 and 30 s it says 1.2, 1.7 and 2.1 where two cores measured 0.6, 1.0 and 1.2 (AMD Zen 3)."""

LARGEST_TILE = 32
"""In output frames: weights grow by R/K, to 4.6 GB for Jasper 10x5 at 32, and larger tiles save little time for it."""

_BLOCK = 16_000_000
"""Bytes of spectra that are made at once."""


def choose_tile(
    config: ModelConfig, convolution: str, *, batch_size: int | None = None, frames: int | None = None
) -> int | None:
    """The tile M in output frames of a spectral graph, None for a direct one.

    `auto` takes spectral where the cost model holds it for clearly faster, on one core and at `frames`. A network whose
    last convolutions are strided or grouped (QuartzNet) has no spectral stretch and is direct in any case.
    Raises UsageError for an unknown kind.
    """
    if convolution not in CONVOLUTIONS:
        raise UsageError(f"convolution {convolution!r}: choose {', '.join(CONVOLUTIONS)}")
    layers = _wide_layers(config)
    if convolution == "direct" or not layers:
        return None
    batch, fixed = batch_size or 1, frames is not None

    def speedup(tile: int, frames: int) -> float:
        return predicted_speedup(config, tile, frames, batch_size=batch, fixed=fixed)

    step = 2 * math.lcm(*(layer.dilation for layer in layers))  # each phase of a dilated tile must be even
    tiles = range(step * -(-8 // step), max(LARGEST_TILE, step) + 1, step)
    tile = max(tiles, key=lambda tile: speedup(tile, frames or LONG_FRAMES))
    return tile if convolution == "spectral" or speedup(tile, frames or SHORT_FRAMES) > CLEARLY else None


def predicted_speedup(
    config: ModelConfig, tile: int, frames: int, *, batch_size: int = 1, fixed: bool = False
) -> float:
    """How many times faster than direct the wide convolutions over `frames` feature frames are, by the cost model.

    `fixed`: the graph is for just this length. benchmarks/README.md holds it against measurements.
    """
    layers, length = _wide_layers(config), _length_of_tiles(config, frames)
    # with open frames the last tile and the last panel are half full on average
    tiles = batch_size * (-(-length // tile) if fixed else length / tile + 0.5)
    spectral = sum(_spectral_cost(layer, tile, tiles, whole_panels=fixed) for layer in layers)
    return sum(_direct_cost(layer, length * batch_size) for layer in layers) / spectral


def _length_of_tiles(config: ModelConfig, length: int) -> int:
    for block in config.blocks[: first_spectral_block(config)]:
        length = block.output_length(length)
    return length


def first_spectral_block(config: ModelConfig) -> int:
    """Index of the block from which on all convolutions have stride 1 and one group; the number of blocks if none."""
    index = len(config.blocks)
    for block, layers in reversed(list(zip(config.blocks, block_layers(config), strict=True))):
        if block.stride > 1 or any(layer.groups > 1 for repeat in layers.repeats for layer in repeat):
            break
        index -= 1
    return index


def stored_weights(config: ModelConfig, tile: int | None) -> int:
    """About how many numbers the graph holds: the parameters, or in place of K taps R products."""
    grown = 0
    for layer in _wide_layers(config):
        if tile is None:
            break
        outputs, channels, taps = layer.shape
        grown += outputs * channels * ((tile // layer.dilation + taps - 1) // 2 * 3 - taps)
    return parameter_count(config) + grown


def _wide_layers(config: ModelConfig) -> list[ConvLayer]:
    """The convolutions that a spectral graph transforms."""
    blocks = block_layers(config)[first_spectral_block(config) :]
    return [layer for block in blocks for repeat in block.repeats for layer in repeat if layer.shape[2] > 1]


# The cost model counts multiply-adds at the rate of a large matrix product; `benchmarks/spectral.py` checks it.

_READ = 12
"""Reading a weight from memory costs as much as so many multiply-adds: 40 G of these a second against 14 GB/s."""

_NODE = 200_000
"""Starting a node, about 5 microseconds."""

_PASS = 15
"""Writing a value and reading it again, in the nodes that only move or mask."""

_SLOWER = 1.3
"""How much longer a multiply-add takes here than in a direct convolution of the same engine, measured."""

_PANEL = 16
"""Columns of a product are done in groups: the register tile of the usual AVX2 and AVX-512 kernels."""


def _direct_cost(layer: ConvLayer, columns: int) -> float:
    outputs, channels, taps = layer.shape
    return outputs * channels * taps * (columns + _READ) + 3 * _NODE + 2 * _PASS * outputs * columns


def _spectral_cost(layer: ConvLayer, tile: int, tiles: float, *, whole_panels: bool) -> float:
    outputs, channels, taps = layer.shape
    tile, columns = tile // layer.dilation, tiles * layer.dilation
    size = tile + taps - 1
    products = size // 2 * 3
    panels = -(-columns // _PANEL) * _PANEL if whole_panels else columns + _PANEL / 2
    mixing = products * outputs * channels * (panels + _READ)
    transforms = products * columns * (size * channels + tile * outputs)
    moved = columns * (3 * size * channels + products * (channels + outputs) + 3 * tile * outputs)
    return _SLOWER * (mixing + transforms) + _PASS * moved + 17 * _NODE


def transforms(tile: int, taps: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """(forward [R, N], inverse [M, R], of_kernel [R, K]) for M = `tile` and K = `taps`, as at the top of this file.

    Raises ValueError unless N = M + K - 1 is even.
    """
    size = tile + taps - 1
    if size % 2:
        raise ValueError(f"a tile of {tile} and {taps} taps make an odd transform of {size}")
    angles = 2 * np.pi / size * np.outer(np.arange(size // 2) + 0.5, np.arange(size))
    cos, sin = np.cos(angles), np.sin(angles)
    forward = np.concatenate([cos - sin, cos, -sin])  # a + b, a and b of a + ib = sum_t x_t (cos - i sin)
    real, imaginary = cos.T[:tile] * 2 / size, -sin.T[:tile] * 2 / size  # Re z (cos + i sin), once a conjugate pair
    inverse = np.concatenate([real + imaginary, imaginary, -real], axis=1)  # of k1, k2 and k3
    cos, sin = cos[:, :taps], sin[:, :taps]
    of_kernel = np.concatenate([cos, sin - cos, cos + sin])  # c, d - c, c + d; networks correlate: c + id conjugated
    return forward.astype(np.float32), inverse.astype(np.float32), of_kernel.astype(np.float32)


def spectra(kernel: NDArray[np.float32], tile: int) -> Iterator[NDArray[np.float32]]:
    """The spectra float32 [R, O, C] of a kernel [O, C, K], by products with a small matrix, in blocks of rows.

    Blocks of this size are given the memory of the one before; whole, each would be mapped anew by the system.
    """
    outputs, channels, taps = kernel.shape
    of_kernel, columns = transforms(tile, taps)[2], kernel.reshape(-1, taps).T
    rows = max(1, _BLOCK // (4 * outputs * channels))
    for start in range(0, len(of_kernel), rows):
        yield (of_kernel[start : start + rows] @ columns).reshape(-1, outputs, channels)


class Tiles:
    """Writes the nodes of a stretch of the network whose values lie in tiles float32 [M, C, B, n].

    `flat` is the value [B, C, 1, T] at which the stretch begins; `batch_size` and `frames` are B and T where known.
    """

    def __init__(self, graph: "Graph", tile: int, flat: str, batch_size: int | None, frames: int | None) -> None:
        self.graph = graph
        self.tile = tile
        self.frames = frames
        shape = "" if batch_size and frames else graph.node("Shape", flat)
        self._batch = self._ints(batch_size) if batch_size else self._slice(shape, 0, 1)
        self._length = self._ints(frames) if frames else self._slice(shape, 3, 4)
        self._batch_size = batch_size
        self._shapes: dict[int, str] = {}
        self._transforms: dict[tuple[int, int], tuple[str, str]] = {}

    def enter(self, value: str) -> str:
        """[B, C, 1, T] -> [M, C, B, n], zeros beyond T."""
        graph = self.graph
        if self.frames is None:
            rest = graph.node("Mod", graph.node("Neg", self._length), self._ints(self.tile))
            value = graph.node("Pad", value, graph.node("Concat", self._ints(*[0] * 7), rest, axis=0))
        elif self.frames % self.tile:
            value = graph.node("Pad", value, self._ints(*[0] * 7, -self.frames % self.tile))
        rows = graph.node("Reshape", value, self._ints(0, 0, -1, self.tile))
        return graph.node("Transpose", rows, perm=[3, 1, 0, 2])

    def leave(self, value: str, channels: int) -> str:
        """[M, C, B, n] -> [B, T, C]."""
        graph = self.graph
        rows = graph.node("Transpose", value, perm=[2, 3, 0, 1])
        rows = graph.node("Reshape", rows, self._ints(0, -1, channels))
        return graph.node("Slice", rows, self._ints(0), self._length, self._ints(1))

    def inside(self) -> str:
        """float32 [M, 1, B or 1, n]: 1 on frames before T; empty if T fills all tiles."""
        graph = self.graph
        if self.frames:
            ones = np.ones((1, 1, 1, self.frames), np.float32)
            return self.enter(graph.constant(ones)) if self.frames % self.tile else ""
        shape = graph.node("Concat", self._ints(1, 1, 1), self._length, axis=0)
        zeros = graph.node("ConstantOfShape", shape)
        return self.enter(graph.node("Add", zeros, graph.constant(np.ones(1, np.float32))))

    def pointwise(self, value: str, weight: NDArray[np.float32], bias: NDArray[np.float32], name: str) -> str:
        """A convolution of one tap: weight [O, C], bias [O]."""
        outputs, channels = weight.shape
        columns = self.graph.node("Reshape", value, self._ints(self.tile, channels, -1))
        mixed = self.graph.node("MatMul", self.graph.constant(weight, f"{name}.weight"), columns)
        return self._biased(mixed, outputs, bias, name)

    def convolution(
        self,
        value: str,
        shape: tuple[int, int, int],
        kernel: Callable[[], NDArray[np.float32]],
        bias: NDArray[np.float32],
        name: str,
        dilation: int,
    ) -> str:
        """A convolution of K taps by its spectra; `kernel` [O, C, K], of `shape`, is called when it is written.

        A dilated one is that of each phase: frames r, r + d, r + 2d and so on, the phases side by side as columns.
        """
        graph, (outputs, channels, taps) = self.graph, shape
        tile = self.tile // dilation
        forward, inverse = self._transform(tile, taps)
        count = (tile + taps - 1) // 2 * 3
        halo = self._halo(value, taps // 2 * dilation)
        frames = graph.node("Reshape", halo, self._ints(tile + taps - 1, -1))
        found = graph.node("MatMul", forward, frames)
        if dilation > 1:
            phases = graph.node("Reshape", found, self._ints(count, dilation, channels, -1))
            found = graph.node("Transpose", phases, perm=[0, 2, 1, 3])
        found = graph.node("Reshape", found, self._ints(count, channels, -1))
        weight = graph.tensor(f"{name}.spectra", (count, outputs, channels), lambda: spectra(kernel(), tile))
        mixed = graph.node("Reshape", graph.node("MatMul", weight, found), self._ints(count, -1))
        result = graph.node("MatMul", inverse, mixed)
        if dilation > 1:
            phases = graph.node("Reshape", result, self._ints(tile, outputs, dilation, -1))
            result = graph.node("Transpose", phases, perm=[0, 2, 1, 3])
        return self._biased(result, outputs, bias, name)

    def _transform(self, tile: int, taps: int) -> tuple[str, str]:
        """Names of the forward and inverse matrices, which layers of equal kernels share."""
        key = (tile, taps)
        if key not in self._transforms:
            forward, inverse, _ = transforms(*key)
            names = f"forward_{tile}_{taps}", f"inverse_{tile}_{taps}"
            self._transforms[key] = self.graph.constant(forward, names[0]), self.graph.constant(inverse, names[1])
        return self._transforms[key]

    def _biased(self, value: str, outputs: int, bias: NDArray[np.float32], name: str) -> str:
        if outputs not in self._shapes:
            parts = [self._ints(self.tile, outputs), self._batch, self._ints(-1)]
            known = self._batch_size and self._ints(self.tile, outputs, self._batch_size, -1)
            self._shapes[outputs] = known or self.graph.node("Concat", *parts, axis=0)
        tiles = self.graph.node("Reshape", value, self._shapes[outputs])
        return self.graph.node("Add", tiles, self.graph.constant(bias.reshape(1, -1, 1, 1), f"{name}.bias"))

    def _halo(self, value: str, reach: int) -> str:
        """[M, C, B, n] -> [M + 2 reach, C, B, n]: each tile with the last frames before it and the first after it."""
        around = range(1, -(-reach // self.tile) + 1)
        before = [self._shifted(value, max(0, away * self.tile - reach), self.tile, away) for away in reversed(around)]
        after = [self._shifted(value, 0, min(self.tile, reach - (away - 1) * self.tile), -away) for away in around]
        return self.graph.node("Concat", *before, value, *after, axis=0)

    def _shifted(self, value: str, start: int, end: int, tiles: int) -> str:
        """Frames `start` to `end` of the tile so many places before each (after it, if negative); zeros at the ends.

        Padding comes first, so that no piece is ever negative or empty, whatever n.
        """
        graph = self.graph
        rows = value if end - start == self.tile else self._slice(value, start, end)
        if tiles > 0:
            padded = graph.node("Pad", rows, self._ints(0, 0, 0, tiles, 0, 0, 0, 0))
            return graph.node("Slice", padded, self._ints(0), self._ints(-tiles), self._ints(3))
        padded = graph.node("Pad", rows, self._ints(0, 0, 0, 0, 0, 0, 0, -tiles))
        return graph.node("Slice", padded, self._ints(-tiles), self._ints(_TO_THE_END), self._ints(3))

    def _slice(self, value: str, start: int, end: int) -> str:
        return self.graph.node("Slice", value, self._ints(start), self._ints(end), self._ints(0))

    def _ints(self, *values: int) -> str:
        return self.graph.constant(np.array(values, np.int64))


_TO_THE_END = 2**31 - 1
