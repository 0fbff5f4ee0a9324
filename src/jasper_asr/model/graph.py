"""(config, weights) -> ONNX, written node by node: no tracing, no torch.

Inputs `feats` float32 [B, n_filt, T] and `feat_lens` int32 [B]; outputs `log_probs` float32 [B, T', n_classes] and
`log_prob_lens` int32 [B]. Inside, convolutions are 2-D on [B, C, 1, T], which every compiler for NPUs takes as it is.
BatchNorm is folded in float64; the residuals of a block are one 1x1 convolution over its concatenated panes; lengths
stay int32; a mask is built once for each time resolution. With `masked=False` the masks are left out: right when every
utterance is given at its exact length, where padding and zeros beyond the end are the same thing.

With `convolution="spectral"` the stretch of stride 1 is written as `jasper_asr.model.spectral` says.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from jasper_asr._version import __version__
from jasper_asr.config import BATCH_NORM_EPS, ModelConfig
from jasper_asr.errors import UsageError
from jasper_asr.model.checkpoint import BlockLayers, ConvLayer, Weights, block_layers
from jasper_asr.model.spectral import Tiles, choose_tile, first_spectral_block

MIN_OPSET, MAX_OPSET = 11, 21
EXTERNAL_BYTES = 1 << 16
"""Weights of this size or more go into the file of ExternalWeights, if there is one."""

_PAGE = 4096
_FLOAT32 = np.dtype(np.float32)
_IR_VERSION = {range(11, 13): 7, range(13, 15): 8, range(15, 19): 8, range(19, 21): 9, range(21, 22): 10}


@dataclass
class ExternalWeights:
    """The large weights of a graph, in a file `location` beside it: protobuf holds no more than 2 GB.

    They are made one by one, while they are written; `size` is that of the file.
    """

    location: str
    size: int = 0
    _arrays: list[Callable[[], Iterable[NDArray[Any]]]] = field(default_factory=list)

    def add(self, proto: onnx.TensorProto, size: int, make: Callable[[], Iterable[NDArray[Any]]]) -> None:
        """Let `proto` refer to the next place, which starts a page so that it can be mapped."""
        proto.data_location = TensorProto.EXTERNAL
        entry = {"location": self.location, "offset": self.size, "length": size}
        for key, value in entry.items():
            proto.external_data.add(key=key, value=str(value))
        self._arrays.append(make)
        self.size += size + -size % _PAGE

    def pieces(self) -> Iterator[memoryview | bytes]:
        """The bytes of the file, a block at a time."""
        for make in self._arrays:
            size = 0
            for block in make():
                content = _little_endian(block)
                size += len(content)
                yield content
            yield bytes(-size % _PAGE)


def build_graph(
    config: ModelConfig,
    weights: Weights,
    *,
    batch_size: int | None = None,
    frames: int | None = None,
    max_frames: int | None = None,
    opset: int = 13,
    masked: bool = True,
    convolution: str = "direct",
    tile: int | None = None,
    external: ExternalWeights | None = None,
    provenance: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """The network as one ONNX model, self-contained unless its large weights are to go to `external`.

    `batch_size` and `frames` fix the input's shape; None leaves a dimension open. `max_frames` bounds open frames, so
    that the masks need no Shape and no Range; a longer input gets wrong masks. `convolution` is `direct`, `spectral`
    or `auto`, see `choose_tile`, whose choice `tile` overrides. `provenance` (for instance `checkpoint_sha256`) joins
    the metadata. Raises UsageError for an opset or a size that cannot be.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset}: choose {MIN_OPSET} to {MAX_OPSET}")
    if any(size is not None and size < 1 for size in (batch_size, frames, max_frames)):
        raise UsageError("batch-size and frames must be at least 1")
    chosen = choose_tile(config, convolution, batch_size=batch_size, frames=frames)
    tile = chosen and (tile or chosen)
    if tile and max_frames and not frames:
        raise UsageError("max-frames is for direct convolution only; leave one of them out")
    model = onnx.ModelProto(
        ir_version=next(version for span, version in _IR_VERSION.items() if opset in span),
        producer_name="jasper-asr",
        producer_version=__version__,
        opset_import=[helper.make_opsetid("", opset)],
    )
    bound = {"max_frames": str(max_frames)} if max_frames and not frames else {}
    helper.set_model_props(model, metadata(config, masked, tile) | bound | (provenance or {}))
    # filled in place: onnx.helper would copy 1.3 GB of Jasper 10x5 three times
    graph = Graph(model.graph, opset, external)
    builder = _Encoder(graph, config, weights, masked, batch_size, frames, max_frames, tile)
    log_probs = builder.run()
    graph.rename(log_probs, "log_probs")
    graph.rename(builder.lens, "log_prob_lens")
    batch = batch_size or "batch"
    out_frames = config.output_length(frames) if frames else "out_frames"
    describe, floats, ints = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT32
    model.graph.name = config.name
    model.graph.input.append(describe("feats", floats, [batch, config.in_feats, frames or "frames"]))
    model.graph.input.append(describe("feat_lens", ints, [batch]))
    model.graph.output.append(describe("log_probs", floats, [batch, out_frames, config.n_classes]))
    model.graph.output.append(describe("log_prob_lens", ints, [batch]))
    return model


def serialize(model: onnx.ModelProto) -> Iterator[bytes]:
    """The bytes of `model`, piece by piece, a weight at a time; it is used up.

    `SerializeToString` holds the weights three times, 4 GB for Jasper 10x5. In protobuf's encoding a message is its
    fields one after the other, so weights (field 5 of GraphProto) and graph (field 7 of ModelProto) can come last.
    """
    weights = list(model.graph.initializer)
    model.graph.ClearField("initializer")
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = [_field_head(5, weight.ByteSize()) for weight in weights]
    size = len(graph) + sum(len(head) + weight.ByteSize() for head, weight in zip(heads, weights, strict=True))
    yield model.SerializeToString() + _field_head(7, size) + graph
    for head, weight in zip(heads, weights, strict=True):
        yield head
        yield weight.SerializeToString()


def _field_head(number: int, size: int) -> bytes:
    """Protobuf's key of a length-delimited field (wire type 2), and its length as base-128 digits, lowest first."""
    digits = []
    while size > 127:
        digits.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *digits, size])


def metadata(config: ModelConfig, masked: bool, tile: int | None = None) -> dict[str, str]:
    """What an exported model says of itself; `config` alone is enough to rebuild the front end and the decoder."""
    return {
        "config": json.dumps(config.raw),
        "convolution": "spectral" if tile else "direct",
        **({"tile": str(tile)} if tile else {}),
        "masked": str(masked).lower(),
        "stride": str(config.stride),
        "labels": json.dumps(config.labels),
        "jasper_asr_version": __version__,
    }


def _little_endian(values: NDArray[Any]) -> memoryview:
    ordered = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
    return ordered.reshape(-1).view(np.uint8).data


@dataclass
class Graph:
    """The graph under construction; names are the op and a running number."""

    proto: onnx.GraphProto
    opset: int
    external: ExternalWeights | None = None
    _small: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def constant(self, values: NDArray[Any], name: str | None = None) -> str:
        """Name of an initializer; small equal ones are shared."""
        key = (values.tobytes(), values.shape, values.dtype.str) if values.size <= 16 else None
        if key in self._small:
            return self._small[key]
        name = self.tensor(
            name or f"constant_{len(self.proto.initializer)}", values.shape, lambda: [values], values.dtype
        )
        if key:
            self._small[key] = name
        return name

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        make: Callable[[], Iterable[NDArray[Any]]],
        dtype: np.dtype[Any] = _FLOAT32,
    ) -> str:
        """Name of an initializer whose values `make` gives, in blocks that follow each other, when they are needed.

        That is now, or while they are written.
        """
        proto = self.proto.initializer.add(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
        size = math.prod(shape) * dtype.itemsize
        if self.external and size >= EXTERNAL_BYTES:
            self.external.add(proto, size, make)
        else:
            proto.raw_data = b"".join(map(_little_endian, make()))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op}_{len(self.proto.node)}"
        self.proto.node.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def rename(self, value: str, name: str) -> None:
        """Give a value the name of an output; only an input needs an Identity for that."""
        if not any(value in node.output for node in self.proto.node):
            self.proto.node.append(helper.make_node("Identity", [value], [name], name=name))
            return
        for node in self.proto.node:
            for names in (node.input, node.output):
                for index, found in enumerate(names):
                    names[index] = name if found == value else found

    def unsqueeze(self, value: str, axes: Sequence[int]) -> str:
        return self._axes_node("Unsqueeze", value, axes)

    def squeeze(self, value: str, axes: Sequence[int]) -> str:
        return self._axes_node("Squeeze", value, axes)

    def _axes_node(self, op: str, value: str, axes: Sequence[int]) -> str:
        if self.opset < 13:  # axes became an input in opset 13
            return self.node(op, value, axes=list(axes))
        return self.node(op, value, self.constant(np.array(axes, np.int64)))


class _Encoder:
    """Walks the blocks; keeps the current lengths and the mask that belongs to the current time resolution."""

    def __init__(
        self,
        graph: Graph,
        config: ModelConfig,
        weights: Weights,
        masked: bool,
        batch_size: int | None,
        frames: int | None,
        max_frames: int | None,
        tile: int | None,
    ) -> None:
        self.graph = graph
        self.config = config
        self.weights = weights
        self.masked = masked
        self.batch_size = batch_size
        self.frames = frames
        self.max_frames = max_frames
        self.tile = tile
        self.tiles: Tiles | None = None
        self.lens = "feat_lens"
        self.mask = ""

    def run(self) -> str:
        graph = self.graph
        value = graph.unsqueeze("feats", [2])
        self.mask = self.build_mask(value)
        panes = [self.masked_value(value)]
        blocks = block_layers(self.config)
        spectral_from = first_spectral_block(self.config) if self.tile else len(blocks)
        for index, (block, layers) in enumerate(zip(self.config.blocks, blocks, strict=True)):
            if index == spectral_from:
                panes = self.enter_tiles(panes)
            out = self.block(panes, layers)
            # the last block feeds the 1x1 decoder, which looks at no neighbours
            out = out if index == len(blocks) - 1 else self.masked_value(out)
            panes = [*panes, out] if block.residual_dense else [out]
        return graph.node("LogSoftmax", self.decoder(panes[-1]), axis=2)

    def decoder(self, value: str) -> str:
        """Logits [B, T', n_classes]."""
        graph = self.graph
        weight = self.weights["decoder.layers.0.weight"]
        bias = self.weights["decoder.layers.0.bias"]
        if self.tiles:
            logits = self.tiles.pointwise(value, weight[:, :, 0], bias, "decoder")
            return self.tiles.leave(logits, len(bias))
        kernel = graph.constant(weight[:, :, None, :], "decoder.weight")
        logits = graph.node("Conv", value, kernel, graph.constant(bias, "decoder.bias"), kernel_shape=[1, 1])
        return graph.node("Transpose", graph.squeeze(logits, [2]), perm=[0, 2, 1])

    def enter_tiles(self, panes: list[str]) -> list[str]:
        """The panes as tiles; so is the mask, which then also hides what fills up the last tile."""
        assert self.tile
        self.tiles = tiles = Tiles(self.graph, self.tile, panes[-1], self.batch_size, self.frames)
        self.mask = tiles.enter(self.mask) if self.masked else tiles.inside()
        return [tiles.enter(pane) for pane in panes]

    def block(self, panes: list[str], layers: BlockLayers) -> str:
        value = panes[-1]
        for index, repeat in enumerate(layers.repeats):
            if index:
                value = self.masked_value(self.graph.node("Relu", value))
            for position, layer in enumerate(repeat):
                value = self.convolution(value, layer)
                if position < len(repeat) - 1 and repeat[position + 1].shape[2] > 1:
                    value = self.masked_value(value)
        if layers.residuals:
            value = self.graph.node("Add", value, self.residual(panes, layers.residuals))
        return self.graph.node("Relu", value)

    def convolution(self, value: str, layer: ConvLayer) -> str:
        if self.tiles:
            return self.convolution_in_tiles(self.tiles, value, layer)
        kernel, bias = folded(self.weights, layer)
        inputs = [value, self.graph.constant(kernel[:, :, None, :], f"{layer.name}.weight")]
        if layer.norm:
            inputs.append(self.graph.constant(bias, f"{layer.name}.bias"))
        out = self.graph.node(
            "Conv",
            *inputs,
            kernel_shape=[1, layer.shape[2]],
            pads=[0, layer.padding, 0, layer.padding],
            strides=[1, layer.stride],
            dilations=[1, layer.dilation],
            group=layer.groups,
        )
        if layer.stride > 1:
            self.shorten(out, layer)
        return out

    def convolution_in_tiles(self, tiles: Tiles, value: str, layer: ConvLayer) -> str:
        bias = folded_bias(self.weights, layer)
        if layer.shape[2] == 1:
            return tiles.pointwise(value, folded(self.weights, layer)[0][:, :, 0], bias, layer.name)
        return tiles.convolution(
            value, layer.shape, lambda: folded(self.weights, layer)[0], bias, layer.name, layer.dilation
        )

    def residual(self, panes: list[str], layers: tuple[ConvLayer, ...]) -> str:
        parts = [folded(self.weights, layer) for layer in layers]
        kernel = np.concatenate([kernel for kernel, _ in parts], axis=1)
        bias = np.array([bias for _, bias in parts], np.float64).sum(axis=0).astype(np.float32)
        name = layers[0].name.rsplit(".", 2)[0]
        value = panes[0] if len(panes) == 1 else self.graph.node("Concat", *panes, axis=1)
        if self.tiles:
            return self.tiles.pointwise(value, kernel[:, :, 0], bias, name)
        weight = self.graph.constant(kernel[:, :, None, :], f"{name}.weight")
        return self.graph.node("Conv", value, weight, self.graph.constant(bias, f"{name}.bias"), kernel_shape=[1, 1])

    def shorten(self, value: str, layer: ConvLayer) -> None:
        """Lengths and mask after a strided convolution: (L + 2p - d(k-1) - 1) // s + 1, no term below 0 for L >= 1."""
        offset = 2 * layer.padding - layer.dilation * (layer.shape[2] - 1) - 1
        graph = self.graph
        moved = graph.node("Add", self.lens, graph.constant(np.array(offset, np.int32)))
        halved = graph.node("Div", moved, graph.constant(np.array(layer.stride, np.int32)))
        self.lens = graph.node("Add", halved, graph.constant(np.array(1, np.int32)))
        if self.frames:
            self.frames = (self.frames + offset) // layer.stride + 1
        if self.max_frames:
            self.max_frames = (self.max_frames + offset) // layer.stride + 1
        self.mask = self.build_mask(value)

    def build_mask(self, value: str) -> str:
        """float32 [B, 1, 1, T]: 1 on frames before each utterance's length."""
        if not self.masked:
            return ""
        graph = self.graph
        inside = graph.node("Less", self.positions(value), graph.unsqueeze(self.lens, [1, 2, 3]))
        return graph.node("Cast", inside, to=TensorProto.FLOAT)

    def positions(self, value: str) -> str:
        """int32 [1, 1, 1, T] or [T]: 0, 1, 2 and so on for the T frames of `value` [B, C, 1, T]."""
        graph = self.graph
        if self.frames:
            return self.arange(self.frames)
        if self.max_frames:
            # a row of any T values behind the M constants, then the last M cut off, leaves the first T constants
            zeros, ones = (graph.constant(np.full(2, number, np.int64)) for number in (0, 1))
            row = graph.node("Slice", value, zeros, ones, graph.constant(np.array([0, 1], np.int64)))
            row = graph.node("Cast", row, to=TensorProto.INT32)
            both = graph.node("Concat", self.arange(self.max_frames), row, axis=3)
            start, end, axis = (graph.constant(np.array([number], np.int64)) for number in (0, -self.max_frames, 3))
            return graph.node("Slice", both, start, end, axis)
        shape = graph.node("Shape", value)
        length = graph.node("Gather", shape, graph.constant(np.array(3, np.int64)), axis=0)
        zero, one = (graph.constant(np.array(number, np.int64)) for number in (0, 1))
        return graph.node("Cast", graph.node("Range", zero, length, one), to=TensorProto.INT32)

    def arange(self, length: int) -> str:
        """Constant int32 [1, 1, 1, length]."""
        values = np.arange(length, dtype=np.int32).reshape(1, 1, 1, length)
        return self.graph.constant(values, f"positions_{length}")

    def masked_value(self, value: str) -> str:
        return self.graph.node("Mul", value, self.mask) if self.mask else value


def folded(weights: Weights, layer: ConvLayer) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(kernel [O, I/groups, K], bias [O]) with the BatchNorm after the convolution folded in, computed in float64."""
    kernel = weights[f"{layer.name}.weight"]
    if not layer.norm:
        return kernel, np.zeros(layer.shape[0], np.float32)
    scaled = np.empty_like(kernel)
    # numpy casts a piece at a time here: no float64 copy of a large kernel
    np.multiply(kernel, _scale(weights, layer)[:, None, None], out=scaled, dtype=np.float64, casting="same_kind")
    return scaled, folded_bias(weights, layer)


def folded_bias(weights: Weights, layer: ConvLayer) -> NDArray[np.float32]:
    """The bias [O] of `folded` alone."""
    beta, mean = (weights[f"{layer.norm}.{part}"].astype(np.float64) for part in ("bias", "running_mean"))
    return (beta - mean * _scale(weights, layer)).astype(np.float32)


def _scale(weights: Weights, layer: ConvLayer) -> NDArray[np.float64]:
    gamma, var = (weights[f"{layer.norm}.{part}"].astype(np.float64) for part in ("weight", "running_var"))
    return np.asarray(gamma / np.sqrt(var + BATCH_NORM_EPS))
