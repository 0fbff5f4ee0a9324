"""A smaller, faster model from a float one, written only if it still hears as well.

`int8`: 8-bit integer convolutions, as QuantizeLinear and DequantizeLinear round them (QDQ), which onnxruntime and
OpenVINO fuse. Weights have a scale for each output channel, activations a scale each, found on real utterances. What
comes before the time resolution is final (the first, strided convolutions) stays float: it is a small part of the work
and costs the most accuracy; so does the decoder.

`fp16`, `bf16`: weights are stored in 16 bits and cast to float32 when the engine loads them. That halves the file; the
arithmetic is the engine's choice.
"""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr.backends import Shapes
from jasper_asr.backends.ort import OrtBackend
from jasper_asr.config import ModelConfig
from jasper_asr.data.manifest import Utterance
from jasper_asr.decode import greedy
from jasper_asr.errors import JasperError, ManifestError, ModelError, UsageError
from jasper_asr.evaluate import reference_text
from jasper_asr.files import write_whole
from jasper_asr.model.checkpoint import file_sha256, load_checkpoint
from jasper_asr.model.export import graph_bytes, resolve_model
from jasper_asr.transcribe import Clip, Transcriber
from jasper_asr.wer import EditCounts, count_word_edits

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

PRECISIONS = ("int8", "fp16", "bf16")
MAX_WER_INCREASE = 1.0
"""Percentage points by which the WER may rise."""
CALIBRATION_UTTERANCES = 200
"""More of them move the scales no further."""

MAX_WEIGHT = 63
"""7 bits: where there is no VNNI, x86 adds two products of 8 bits in 16, and 2 * 255 * 63 is the most that fits."""

Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class QuantizationReport:
    """What quantising did. WERs and agreements are in percent, on `utterances` utterances, best path.

    `wer_before` and `wer_after` are None where no utterance has a transcript. `frame_agreement` is how many frames
    have their most likely label as before, `transcript_agreement` how many utterances their whole text.
    `quantized` of `convolutions` are in the new precision. Refused, it was not written. `errors`: utterances that
    could not be heard.
    """

    output: str
    precision: str
    source_sha256: str
    calibration_utterances: int
    utterances: int
    words: int
    wer_before: float | None
    wer_after: float | None
    max_wer_increase: float
    frame_agreement: float
    transcript_agreement: float
    convolutions: int
    quantized: int
    bytes_before: int
    bytes_after: int
    refused: bool
    errors: tuple[str, ...]


def quantize(
    model: str | os.PathLike[str],
    out: Path,
    calibration: Sequence[Utterance],
    *,
    precision: str = "int8",
    dev: Sequence[Utterance] | None = None,
    max_wer_increase: float = MAX_WER_INCREASE,
    config: ModelConfig | None = None,
    weights: str = "ema",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizationReport:
    """Write `out`, an .onnx, unless its WER is more than `max_wer_increase` points above that of `model`.

    `model` is a built-in name, a checkpoint, or an .onnx of direct convolution, opset 13 or later. Up to
    CALIBRATION_UTTERANCES of `calibration`, of all lengths, set the scales of int8; the WER is measured on `dev`, by
    default on all of `calibration`, and where no transcripts are there is no limit. `progress` gets utterances done
    and to do. Raises UsageError, ManifestError, ModelError or StorageError; nothing is written then.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if not 0 <= max_wer_increase < float("inf"):
        raise UsageError(f"max WER increase {max_wer_increase}: must be a number of percentage points of at least 0")
    source = _read(resolve_model(model), out, config, weights)
    measured = calibration if dev is None else dev
    chosen = _of_all_lengths(calibration) if precision == "int8" else []
    steps = _Steps(len(chosen) + 2 * len(measured), progress)
    before = _listen(OrtBackend(source.graph, threads=threads), measured, steps)
    small, used = _smaller(source, precision, chosen, threads, steps)
    heard = [row for row, result in zip(measured, before.results, strict=True) if result is not None]
    after = _listen(OrtBackend(small, threads=threads), heard, steps)
    if after.errors:  # its float twin could
        raise ModelError(after.errors[0])
    scores = _compare([result for result in before.results if result], [result for result in after.results if result])
    before_wer, after_wer = scores["wer_before"], scores["wer_after"]
    refused = before_wer is not None and after_wer - before_wer > max_wer_increase + 1e-9
    if not refused:
        write_whole(out, [small])
    return QuantizationReport(
        output=str(out),
        precision=precision,
        source_sha256=source.sha256,
        calibration_utterances=used,
        utterances=len(heard),
        max_wer_increase=max_wer_increase,
        convolutions=len(source.plan.kernels),
        quantized=len(source.plan.inside if precision == "int8" else source.plan.kernels),
        bytes_before=len(source.graph),
        bytes_after=len(small),
        refused=refused,
        errors=before.errors,
        **scores,
    )


def write_report(path: str | os.PathLike[str], report: QuantizationReport) -> None:
    """The report as JSON, whole or not at all."""
    write_whole(Path(path), [(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n").encode()])


# --- what a model hears ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """Most likely label of each frame, text, and the reference if there is one."""

    path: NDArray[np.intp]
    text: str
    reference: str | None


@dataclass(frozen=True)
class _Heard:
    """A result for each utterance, None for one that could not be heard, and why not."""

    results: list[_Result | None]
    errors: tuple[str, ...]


@dataclass
class _Steps:
    total: int
    report: Callable[[int, int], None] | None
    done: int = 0

    def advance(self) -> None:
        self.done += 1
        if self.report:
            self.report(self.done, self.total)


def _listen(backend: "OrtBackend | _Observer", rows: Sequence[Utterance], steps: _Steps) -> _Heard:
    """Closes `backend`. Raises ManifestError when nothing can be heard."""
    results: list[_Result | None] = []
    errors = []
    with Transcriber(backend) as transcriber:
        for row in rows:
            try:
                reference = None if row.text is None else reference_text(row, transcriber)
                rows_of_it = transcriber.listen(Clip(row.audio_path, *row.part))
                text = greedy(rows_of_it, len(rows_of_it), backend.config.labels)
                results.append(_Result(rows_of_it.argmax(axis=1), text, reference))
            except JasperError as error:
                results.append(None)
                errors.append(str(error))
            steps.advance()
    if not any(results):
        cause = errors[0] if errors else "it is empty"
        raise ManifestError(f"manifest: no utterance can be heard ({cause}); give a manifest of speech")
    return _Heard(results, tuple(errors))


def _of_all_lengths(rows: Sequence[Utterance]) -> list[Utterance]:
    """At most CALIBRATION_UTTERANCES of `rows`, evenly from the shortest to the longest."""
    ordered = sorted(rows, key=lambda row: row.duration or 0.0)
    places = np.linspace(0, len(rows) - 1, min(len(rows), CALIBRATION_UTTERANCES)).round().astype(int)
    return [ordered[place] for place in places]


def _compare(before: Sequence[_Result], after: Sequence[_Result]) -> dict[str, Any]:
    pairs = list(zip(before, after, strict=True))
    counts = [
        sum(
            (count_word_edits(item.reference, item.text) for item in side if item.reference is not None),
            EditCounts(0, 0, 0, 0),
        )
        for side in (before, after)
    ]
    words = counts[0].reference_length
    frames = sum(len(old.path) for old, _ in pairs)
    same = sum(int((old.path == new.path).sum()) for old, new in pairs)
    return {
        "words": words,
        "wer_before": 100 * counts[0].rate if words else None,
        "wer_after": 100 * counts[1].rate if words else None,
        "frame_agreement": 100 * same / frames,
        "transcript_agreement": 100 * sum(old.text == new.text for old, new in pairs) / len(pairs),
    }


# --- the graph ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """`inside`: the convolutions for int8. `values`: their inputs and outputs, which are to be rounded to 8 bits.

    `kernels`: the weights of all convolutions.
    """

    inside: frozenset[str]
    values: tuple[str, ...]
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A float model: its graph, serialised."""

    name: str
    graph: bytes
    plan: _Plan
    sha256: str


def _read(path: Path, out: Path, config: ModelConfig | None, weights: str) -> _Source:
    """Raises ModelError for a model that cannot be quantised."""
    import onnx

    if out.resolve() == path.resolve():
        raise UsageError(f"{out}: is the model itself; give another output")
    graph = _float_graph(path, config, weights)
    proto = onnx.load_from_string(graph)
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    if opset < 13:
        raise ModelError(f"{path}: opset {opset} has no scales for each channel; export it with --opset 13 or later")
    return _Source(str(path), graph, _plan(str(path), proto.graph), file_sha256(path))


def _float_graph(path: Path, config: ModelConfig | None, weights: str) -> bytes:
    if path.suffix == ".om":
        raise ModelError(f"{path}: is compiled for an NPU; give the .onnx or the checkpoint that it was made from")
    if path.suffix != ".onnx":
        return graph_bytes(load_checkpoint(path, config=config, weights=weights), masked=True)
    backend = OrtBackend(path)  # its checks and their messages
    properties = backend.properties
    backend.close()
    if "precision" in properties:
        raise ModelError(f"{path}: is {properties['precision']} already; give the float model")
    if properties.get("convolution", "direct") != "direct":
        raise ModelError(f"{path}: is of {properties['convolution']} convolution; export it with direct convolution")
    return path.read_bytes()


def _smaller(
    source: _Source, precision: str, calibration: Sequence[Utterance], threads: int | None, steps: _Steps
) -> tuple[bytes, int]:
    """(the new model, how many utterances set its scales)."""
    import onnx

    proto = onnx.load_from_string(source.graph)
    facts, used = {"precision": precision, "source_sha256": source.sha256}, 0
    if precision == "int8":
        observer = _Observer(source, threads)
        used = len(calibration) - len(_listen(observer, calibration, steps).errors)
        _Int8(proto.graph, source.plan, observer.ranges()).rewrite()
        facts["calibration_utterances"] = str(used)
    else:
        _store_in_16_bits(source.name, proto.graph, source.plan.kernels, precision)
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=value)
    return _serialized(proto), used


def _serialized(proto: "ModelProto") -> bytes:
    from jasper_asr.model.graph import serialize

    buffer = io.BytesIO()  # join would hold the pieces and the whole: 2.7 GB for Jasper 10x5
    buffer.writelines(serialize(proto))
    return buffer.getvalue()


def _plan(name: str, graph: "GraphProto") -> _Plan:
    nodes = list(graph.node)
    places = [index for index, node in enumerate(nodes) if node.op_type == "Conv"]
    if len(places) < 3:
        raise ModelError(f"{name}: has no convolutions between its first and its decoder; export it with jasper export")
    # from the last strided convolution on every value has the frames of the output
    start = max(index for index in places if index == places[0] or _stride(nodes[index]) > 1)
    inside = [nodes[index] for index in places if start < index < places[-1]]
    if not inside:
        raise ModelError(f"{name}: has strides down to its last convolution; it cannot be quantised to int8")
    only_relu = _inputs_of_relu_alone(nodes)
    names = {node.name for node in inside}
    rounded = {node.input[0] for node in inside}  # and all that follows from one of them:
    values = []
    for node in nodes[start : places[-1]]:
        output = node.output[0]
        if node.name in names or (node.op_type in ("Relu", "Mul", "Concat", "Add") and rounded & set(node.input)):
            rounded.add(output)
        if output in rounded and output not in only_relu:  # a Relu is absorbed by the rounding after it
            values.append(output)
    kernels = tuple(nodes[index].input[1] for index in places)
    return _Plan(frozenset(names), tuple(values), kernels)


def _stride(node: "NodeProto") -> int:
    return max((max(attribute.ints) for attribute in node.attribute if attribute.name == "strides"), default=1)


def _inputs_of_relu_alone(nodes: "Sequence[NodeProto]") -> set[str]:
    users: dict[str, set[str]] = {}
    for node in nodes:
        for value in node.input:
            users.setdefault(value, set()).add(node.op_type)
    return {value for value, kinds in users.items() if kinds == {"Relu"}}


def _store_in_16_bits(name: str, graph: "GraphProto", kernels: Sequence[str], precision: str) -> None:
    """Convert the initializers `kernels`, and cast each back to float32 in front of all nodes."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        if tensor.name not in kernels:
            continue
        values = numpy_helper.to_array(tensor)
        stored = f"{tensor.name}.{precision}"
        casts.append(
            helper.make_node("Cast", [stored], [tensor.name], name=f"{tensor.name}.cast", to=TensorProto.FLOAT)
        )
        tensor.name = stored
        tensor.data_type = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
        tensor.raw_data = (_half(name, values) if precision == "fp16" else _bfloat16_bits(values)).tobytes()
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _half(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise ModelError(f"{name}: has weights beyond 65504, the largest number of fp16; use --precision bf16")
    return half


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to the nearest, a tie to the even one."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.asarray(rounded, "<u2")


# --- int8 -----------------------------------------------------------------------------------------------------------


class _Histogram:
    """Counts of values in bins over [-limit, limit), a limit that doubles when it must."""

    HALF = 4096  # bins for each sign

    def __init__(self) -> None:
        self.limit = 2.0**-10
        self.counts = np.zeros(2 * self.HALF, np.int64)
        self.low = self.high = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ModelError("activations are not finite; the weights are unfit")
        self.low, self.high = min(self.low, low), max(self.high, high)
        while max(-low, high) >= self.limit:
            quarter = self.HALF // 2
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, (quarter, quarter))
            self.limit *= 2
        bins = np.floor(values * np.float32(self.HALF / self.limit)).astype(np.int64) + self.HALF
        self.counts += np.bincount(bins.ravel(), minlength=2 * self.HALF)

    def range(self) -> tuple[float, float]:
        """The part of [low, high] in whose 255 steps the values have the least squared error.

        Measured on two small models, on 785 s of speech: 98.8 and 98.6 % of frames keep their label, as with the
        percentile 99.99, which is a constant to tune (97.8 and 97.6 with 99.9); 98.7 and 98.2 with [low, high]; 96 and
        95 with the least relative entropy.
        """
        centres = (np.arange(2 * self.HALF) + 0.5 - self.HALF) * (self.limit / self.HALF)
        best = (np.inf, self.low, self.high)
        for part in np.linspace(0.2, 1.0, 81):
            low, high = part * self.low, part * self.high
            step = (high - low) / 255 or 1.0
            rounded = np.round((centres - low) / step).clip(0, 255) * step + low
            best = min(best, (float(self.counts @ (centres - rounded) ** 2), low, high))
        return best[1:]


class _Observer:
    """A float model as a backend that counts the values of some of its activations while it runs."""

    def __init__(self, source: _Source, threads: int | None) -> None:
        import onnx
        import onnxruntime

        plain = OrtBackend(source.graph, threads=threads)
        self._name = source.name
        self.config: ModelConfig = plain.config
        self.shapes: Shapes = plain.shapes
        plain.close()
        proto = onnx.load_from_string(source.graph)
        proto.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, source.plan.values))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or 0
        self._session: Any = onnxruntime.InferenceSession(
            _serialized(proto), options, providers=["CPUExecutionProvider"]
        )
        self._histograms = {value: _Histogram() for value in source.plan.values}

    def run(self, feats: NDArray[np.float32], lens: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See Backend.run."""
        names = ["log_probs", "log_prob_lens", *self._histograms]
        try:
            log_probs, out_lens, *values = self._session.run(names, {"feats": feats, "feat_lens": lens})
        except Exception as error:  # onnxruntime raises its own kinds for each status
            raise ModelError(f"{self._name}: onnxruntime failed ({' '.join(str(error).split())[:200]})") from error
        for histogram, value in zip(self._histograms.values(), values, strict=True):
            for row, length in zip(value, out_lens, strict=True):
                histogram.add(row[..., :length])
        return log_probs, out_lens

    def ranges(self) -> Ranges:
        return {value: histogram.range() for value, histogram in self._histograms.items()}

    def close(self) -> None:
        self._session = None


class _Int8:
    """Rewrites a graph so that the convolutions of a plan take, hold and give 8-bit integers."""

    def __init__(self, graph: "GraphProto", plan: _Plan, ranges: Ranges) -> None:
        from onnx import numpy_helper

        self._graph, self._plan = graph, plan
        self._ranges = dict(ranges)
        for node in graph.node:  # a mask must not change the scale: then it multiplies integers by 0 or 1
            if node.op_type == "Mul" and node.output[0] in ranges:
                self._ranges[node.input[0]] = ranges[node.output[0]]
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._to_array = numpy_helper.to_array
        self._from_array = numpy_helper.from_array
        self._nodes: list[NodeProto] = []
        self._rounded: dict[str, str] = {}  # value -> its name behind the rounding
        self._scales: dict[str, np.float32] = {}

    def rewrite(self) -> None:
        for node in list(self._graph.node):
            if node.op_type == "Mul" and node.input[0] in self._rounded:
                self._round(node.input[1], np.float32(1), 0)
            value = node.input[0] if node.input else ""
            for index, name in enumerate(node.input):
                node.input[index] = self._rounded.get(name, name)
            if node.name in self._plan.inside:
                self._store_weights(node, self._scales[value])
            self._nodes.append(node)
            if node.output[0] in self._plan.values:
                self._round(node.output[0], *_scale(*self._ranges[node.output[0]]))
        used = {name for node in self._nodes for name in node.input}
        tensors = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(self._nodes)
        self._graph.initializer.extend(tensors)

    def _round(self, value: str, scale: np.float32, zero: int) -> None:
        """Let `value` go through 8 bits, unless it does already."""
        if value in self._rounded:
            return
        parameters = [
            self._constant(f"{value}.scale", np.array(scale, np.float32)),
            self._constant(f"{value}.zero", np.array(zero, np.uint8)),
        ]
        self._node("QuantizeLinear", [value, *parameters], f"{value}.uint8")
        self._rounded[value] = self._node("DequantizeLinear", [f"{value}.uint8", *parameters], f"{value}.rounded")
        self._scales[value] = scale

    def _store_weights(self, node: "NodeProto", input_scale: np.float32) -> None:
        kernel = self._to_array(self._weights[node.input[1]])
        bias = self._to_array(self._weights[node.input[2]]) if len(node.input) > 2 else None
        scales = np.abs(kernel).max(axis=(1, 2, 3)) / np.float32(MAX_WEIGHT)
        if bias is not None:  # which has 32 bits, in steps of input_scale * scales
            scales = np.maximum(scales, np.abs(bias) / (input_scale * np.float32(2**30)))
        scales = np.where(scales > 0, scales, 1).astype(np.float32)
        integers = np.round(kernel / scales[:, None, None, None]).astype(np.int8)
        node.input[1] = self._channels(f"{node.name}.weight", integers, scales)
        if bias is not None:
            steps = (input_scale * scales).astype(np.float32)
            node.input[2] = self._channels(f"{node.name}.bias", np.round(bias / steps).astype(np.int32), steps)

    def _channels(self, name: str, integers: NDArray[Any], scales: NDArray[np.float32]) -> str:
        """Name of constant integers times the scale of their channel."""
        zeros = np.zeros(len(scales), integers.dtype)
        stored = [
            self._constant(f"{name}.{integers.dtype}", integers),
            self._constant(f"{name}.scale", scales),
            self._constant(f"{name}.zero", zeros),
        ]
        return self._node("DequantizeLinear", stored, f"{name}.rounded", axis=0)

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self._graph.initializer.append(self._from_array(values, name))
        return name

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output


def _scale(low: float, high: float) -> tuple[np.float32, int]:
    """(scale, zero point) of uint8 for values in [low, high], which holds 0."""
    scale = np.float32((high - low) / 255 or 1.0)
    return scale, round(-low / float(scale))
