import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from helpers_audio import made_up
from jasper_asr import load
from jasper_asr._version import __version__
from jasper_asr.backends import BACKENDS, Shapes, open_backend
from jasper_asr.backends.ort import OrtBackend
from jasper_asr.config import ModelConfig, load_config
from jasper_asr.errors import ConfigError, ModelError, StorageError, UsageError
from jasper_asr.model.checkpoint import random_weights, save_safetensors, weight_shapes
from jasper_asr.model.export import describe, export_onnx, graph_bytes, resolve_model
from jasper_asr.model.graph import build_graph, folded, serialize
from jasper_asr.model.net import Jasper, conv_lens

OPSETS = [11, 13, 17, 21]
MASK_NODES = ("Less", "Range", "Cast")


def backend(config: ModelConfig, weights: dict, **options) -> OrtBackend:
    return OrtBackend(build_graph(config, weights, **options).SerializeToString(), threads=1)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def lens_of(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


OWN, DENSE = {"residual": True}, {"residual": True, "residual_dense": True}
VARIANTS = {
    "plain residual": [{"kernel_size": 5, "stride": 2}, {"kernel_size": 7, "repeat": 3, "filters": 9} | OWN, {}],
    "dense residual": [{"kernel_size": 5, "stride": 2}, {"kernel_size": 7, "repeat": 2} | DENSE,
                       {"kernel_size": 3, "filters": 5} | DENSE, {"kernel_size": 3, "dilation": 3}, {}],
    "dense from the first block": [{"kernel_size": 3} | DENSE, {"kernel_size": 3} | DENSE],
    "separable": [{"kernel_size": 5, "stride": 2, "separable": True},
                  {"kernel_size": 7, "repeat": 3, "separable": True} | OWN,
                  {"kernel_size": 5, "dilation": 2, "separable": True}, {}],
    "two strides": [{"kernel_size": 5, "stride": 3, "repeat": 2}, {"kernel_size": 3} | OWN,
                    {"kernel_size": 7, "stride": 2}, {"kernel_size": 3, "repeat": 2}],
    "stride of a 1x1": [{"stride": 2}, {"kernel_size": 9}],
    "quartznet, dense": [{"kernel_size": 3, "separable": True}, {"kernel_size": 5, "separable": True} | DENSE,
                         {"kernel_size": 5, "repeat": 2, "separable": True} | DENSE, {"kernel_size": 3}],
}  # fmt: skip


@pytest.fixture(params=list(VARIANTS))
def variant(request) -> ModelConfig:
    return made_up(VARIANTS[request.param], family="quartznet" if "quartznet" in request.param else "jasper")


# against NVIDIA's own code


@pytest.mark.parametrize("opset", OPSETS)
def test_golden_batch(golden, opset):
    checkpoint, vectors = golden
    run = backend(checkpoint.config, checkpoint.weights, opset=opset).run
    log_probs, lens = run(vectors["feats"], vectors["feat_lens"])
    assert log_probs.shape == vectors["log_probs"].shape
    assert lens.dtype == np.int32
    assert lens.tolist() == vectors["log_prob_lens"].tolist()
    for row, expected, length in zip(log_probs, vectors["log_probs"], lens, strict=True):
        close(row[:length], expected[:length], 1e-4)
        assert (row[:length].argmax(axis=1) == expected[:length].argmax(axis=1)).all()


@pytest.mark.parametrize("opset", OPSETS)
def test_golden_singles(golden, opset):
    checkpoint, vectors = golden
    for masked in (True, False):
        run = backend(checkpoint.config, checkpoint.weights, opset=opset, masked=masked).run
        for index in range(4):
            feats, valid = vectors[f"feats_single_{index}"], vectors[f"feat_lens_single_{index}"]
            if not masked:
                feats = feats[:, :, : valid[0]]
            log_probs, lens = run(feats, valid)
            assert lens.tolist() == vectors[f"log_prob_lens_single_{index}"].tolist()
            close(log_probs[0, : lens[0]], vectors[f"log_probs_single_{index}"][0, : lens[0]], 1e-4)


@pytest.mark.parametrize("opset", OPSETS)
def test_golden_static(golden, opset):
    checkpoint, vectors = golden
    static = backend(checkpoint.config, checkpoint.weights, opset=opset, batch_size=4, frames=304)
    assert static.shapes == Shapes(4, 304, masked=True)
    log_probs, lens = static.run(vectors["feats"], vectors["feat_lens"])
    assert log_probs.shape == (4, 152, 29)
    assert lens.tolist() == vectors["log_prob_lens"].tolist()
    for row, expected, length in zip(log_probs, vectors["log_probs"], lens, strict=True):
        close(row[:length], expected[:length], 1e-4)


@pytest.mark.parametrize("order", [(0,), (3,), (0, 1, 2, 3), (3, 1, 0), (2, 2, 1)], ids=str)
def test_golden_audio_in_any_batch(golden, data, order):
    checkpoint, vectors = golden
    samples = [vectors["audio"][index, : vectors["audio_lens"][index]] for index in order]
    name = "quartznet_tiny" if checkpoint.config.family == "quartznet" else "jasper_tiny"
    with load(data / f"{name}_v2.pt", config=checkpoint.config, batch_size=4, threads=1) as transcriber:
        log_probs, lens = transcriber.log_probs(samples)
    assert log_probs.shape == (len(order), max(lens), 29)
    for row, length, index in zip(log_probs, lens, order, strict=True):
        assert length == vectors[f"log_prob_lens_single_{index}"][0]
        close(row[:length], vectors[f"log_probs_single_{index}"][0, :length], 2e-3)
        assert not row[length:].any()


# what must not matter


@pytest.fixture(scope="module")
def utterances() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.standard_normal((64, length)).astype(np.float32) for length in (120, 1, 2, 55, 299, 16, 77, 200)]


def packed(rows: list[np.ndarray], frames: int, garbage: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    feats = garbage * np.random.default_rng(6).standard_normal((len(rows), 64, frames)).astype(np.float32)
    for target, row in zip(feats, rows, strict=True):
        target[:, : row.shape[1]] = row
    return feats, lens_of(*(row.shape[1] for row in rows))


def test_batch_padding_and_garbage_change_nothing(golden, utterances):
    checkpoint, _ = golden
    run = backend(checkpoint.config, checkpoint.weights).run
    alone = [run(row[None], lens_of(row.shape[1]))[0][0] for row in utterances]
    for size in (1, 2, 7, 16):
        for start in range(0, len(utterances), size):
            chosen = [(start + index) % len(utterances) for index in range(size)]
            rows = [utterances[index] for index in chosen]
            widest = max(row.shape[1] for row in rows)
            for extra, garbage in ((0, 0.0), (1, 0.0), (333, 0.0), (16, 1e4)):
                log_probs, lens = run(*packed(rows, widest + extra, garbage))
                for row, length, index in zip(log_probs, lens, chosen, strict=True):
                    assert length == len(alone[index])
                    close(row[:length], alone[index], 1e-5)


def test_masks_change_nothing_at_exact_length(golden, utterances):
    checkpoint, _ = golden
    masked = backend(checkpoint.config, checkpoint.weights)
    unmasked = backend(checkpoint.config, checkpoint.weights, masked=False)
    assert (masked.shapes.masked, unmasked.shapes.masked) == (True, False)
    for row in utterances:
        one, lens = masked.run(row[None], lens_of(row.shape[1]))
        other, same_lens = unmasked.run(row[None], lens_of(row.shape[1]))
        close(one, other, 1e-5)
        assert lens.tolist() == same_lens.tolist() == [one.shape[1]]


def test_masks_are_needed(golden, utterances):
    """Without them, the garbage beyond a length is heard: the test above tests something."""
    checkpoint, _ = golden
    unmasked = backend(checkpoint.config, checkpoint.weights, masked=False)
    row = utterances[0]
    clean, lens = unmasked.run(row[None], lens_of(row.shape[1]))
    dirty, _ = unmasked.run(*packed([row], row.shape[1] + 16, garbage=1.0))
    assert np.abs(dirty[0, : lens[0]] - clean[0]).max() > 0.01


def test_static_and_dynamic_agree(variant):
    weights, frames = random_weights(variant, seed=2), 53
    feats = np.random.default_rng(1).standard_normal((3, 8, frames)).astype(np.float32)
    lens = lens_of(53, 20, 1)
    expected, out_lens = backend(variant, weights).run(feats, lens)
    found, same_lens = backend(variant, weights, batch_size=3, frames=frames).run(feats, lens)
    close(found, expected, 2e-5)
    assert out_lens.tolist() == same_lens.tolist() == [variant.output_length(n) for n in (53, 20, 1)]


# against torch


def torch_net(config: ModelConfig, weights: dict) -> Jasper:
    net = Jasper(config).eval()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=True)
    return net


def assert_equals_torch(config: ModelConfig, lengths: list[int], seed: int) -> None:
    weights = random_weights(config, seed)
    feats = np.random.default_rng(seed).standard_normal((len(lengths), config.in_feats, max(lengths) + 5))
    feats = feats.astype(np.float32)
    with torch.inference_mode():
        expected, expected_lens = torch_net(config, weights)(torch.from_numpy(feats), torch.tensor(lengths))
    found, lens = backend(config, weights).run(feats, lens_of(*lengths))
    assert found.shape == expected.shape
    assert lens.tolist() == expected_lens.tolist()
    for row, other, length in zip(found, expected.numpy(), lens, strict=True):
        close(row[:length], other[:length], 1e-4)
        close(np.exp(row[:length]).sum(axis=1), np.ones(length), 1e-5)


def test_graph_equals_torch(variant):
    assert_equals_torch(variant, [40, 39, 17, 3, 2, 1], seed=7)


@pytest.mark.parametrize("name", ["jasper_tiny", "quartznet_tiny"])
def test_tiny_networks_equal_torch(data, name):
    assert_equals_torch(load_config(data / f"{name}.yaml"), [150, 90, 31], seed=8)


def test_torch_names_are_nvidias(variant):
    state = Jasper(variant).state_dict()
    shapes = {name: tuple(v.shape) for name, v in state.items() if not name.endswith("num_batches_tracked")}
    assert shapes == weight_shapes(variant)


@pytest.mark.parametrize("kernel", [1, 3, 11, 29])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_lens_are_what_torch_makes(kernel, stride, dilation):
    conv = torch.nn.Conv1d(1, 1, kernel, stride=stride, padding=kernel // 2 * dilation, dilation=dilation)
    lengths = list(range(1, 70))
    assert conv_lens(torch.tensor(lengths), conv).tolist() == [conv(torch.zeros(1, 1, n)).shape[2] for n in lengths]


def test_lens_of_the_graph(variant):
    net = backend(variant, random_weights(variant))
    lengths = list(range(1, 61))
    _, lens = net.run(np.zeros((60, 8, 60), np.float32), lens_of(*lengths))
    assert lens.tolist() == [variant.output_length(n) for n in lengths]
    for length in (1, 2, 3, 30, 31):
        assert net.run(np.zeros((1, 8, length), np.float32), lens_of(length))[0].shape[1] == lens[length - 1]


def test_batch_norm_is_folded_in_float64(tiny):
    from jasper_asr.model.checkpoint import block_layers

    weights = random_weights(tiny, seed=1)
    layer = block_layers(tiny)[1].repeats[0][0]
    kernel, bias = folded(weights, layer)
    gamma, beta, mean, var = (
        weights[f"encoder.layers.1.conv.1.{part}"].astype(np.longdouble)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(var + np.longdouble("0.001"))
    expected = weights["encoder.layers.1.conv.0.weight"] * scale[:, None, None]
    np.testing.assert_array_equal(kernel, expected.astype(np.float32))
    np.testing.assert_allclose(bias, (beta - mean * scale).astype(np.float32), rtol=2e-7)


# the file


@pytest.mark.parametrize("shape", [{}, {"batch_size": 2, "frames": 64}, {"batch_size": 3}, {"frames": 33}], ids=str)
@pytest.mark.parametrize("opset", OPSETS)
def test_onnx_checker(variant, opset, shape):
    for masked in (True, False):
        model = build_graph(variant, random_weights(variant), opset=opset, masked=masked, **shape)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == opset
        batch, bands, frames = (d.dim_value or d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim)
        assert (batch, bands, frames) == (shape.get("batch_size", "batch"), 8, shape.get("frames", "frames"))


@pytest.mark.parametrize("opset", range(11, 22))
def test_every_opset_runs(tiny_quartznet, opset):
    model = build_graph(tiny_quartznet, random_weights(tiny_quartznet), opset=opset)
    onnx.checker.check_model(model, full_check=True)
    log_probs, lens = OrtBackend(model.SerializeToString(), threads=1).run(np.zeros((1, 64, 7), np.float32), lens_of(7))
    assert (log_probs.shape, lens.tolist()) == ((1, 4, 29), [4])


def count(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


def test_nodes(golden):
    checkpoint, _ = golden
    config = checkpoint.config
    nodes = count(build_graph(config, checkpoint.weights))
    assert nodes["BatchNormalization"] == 0
    assert nodes["Less"] == nodes["Range"] == 2  # one mask at T, one at T/2
    convolutions = sum(block.repeat * (1 + block.separable) for block in config.blocks)
    residuals = sum(block.residual for block in config.blocks)
    assert nodes["Conv"] == convolutions + residuals + 1  # the residuals of a block are one convolution
    assert nodes["Relu"] == sum(block.repeat for block in config.blocks)
    unmasked = count(build_graph(config, checkpoint.weights, masked=False))
    assert not any(unmasked[op] for op in (*MASK_NODES, "Mul"))
    assert unmasked["Conv"] == nodes["Conv"]


def test_one_mask_for_each_time_resolution():
    blocks = [{"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "repeat": 4}, {"kernel_size": 3, "stride": 2}, {}]
    config = made_up(blocks)
    static = count(build_graph(config, random_weights(config), batch_size=1, frames=50))
    assert count(build_graph(config, random_weights(config)))["Less"] == static["Less"] == 3
    assert static["Range"] == 0


def test_weights_are_stored_once(golden):
    checkpoint, _ = golden
    model = build_graph(checkpoint.config, checkpoint.weights)
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(set(names)) == len(names)
    kernels = sum(value.size for value in checkpoint.weights.values() if value.ndim == 3)
    assert 4 * kernels < model.ByteSize() < 4 * kernels + 60_000


def test_serialised_in_pieces_is_the_same_message(golden):
    checkpoint, _ = golden
    options = {"batch_size": 2, "frames": 100, "provenance": {"checkpoint_sha256": "ab"}}
    whole = build_graph(checkpoint.config, checkpoint.weights, **options)
    pieces = list(serialize(build_graph(checkpoint.config, checkpoint.weights, **options)))
    content = b"".join(pieces)
    assert onnx.ModelProto.FromString(content) == whole
    assert len(content) == whole.ByteSize()
    largest = max(tensor.ByteSize() for tensor in whole.graph.initializer)
    assert max(map(len, pieces)) == largest  # no piece holds more than one weight
    assert b"".join(serialize(build_graph(checkpoint.config, checkpoint.weights, **options))) == content


def test_metadata(data, tiny, tmp_path):
    out = tmp_path / "m.onnx"
    source = data / "jasper_tiny_v2.pt"
    for masked in (True, False):
        export_onnx(source, out, config=tiny, weights="raw", masked=masked)
        model = OrtBackend(out, threads=1)
        assert model.config == tiny
        assert model.config.raw == tiny.raw
        assert model.shapes == Shapes(None, None, masked)
        assert {key: value for key, value in model.properties.items() if key != "config"} == {
            "convolution": "direct",
            "masked": str(masked).lower(),
            "stride": "2",
            "labels": json.dumps([*" abcdefghijklmnopqrstuvwxyz", "'"]),
            "jasper_asr_version": __version__,
            "checkpoint_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "weights": "raw",
        }
    assert onnx.load(out).producer_name == "jasper-asr"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 10}, "opset 10: choose 11 to 21"),
        ({"opset": 22}, "opset 22: choose 11 to 21"),
        ({"batch_size": 0}, "batch-size and frames must be at least 1"),
        ({"frames": 0}, "batch-size and frames must be at least 1"),
        ({"batch_size": -1, "frames": 100}, "batch-size and frames must be at least 1"),
    ],
)
def test_options_that_cannot_be(tiny, tmp_path, data, options, message):
    with pytest.raises(UsageError) as caught:
        export_onnx(data / "jasper_tiny_v2.pt", tmp_path / "m.onnx", config=tiny, **options)
    assert str(caught.value) == message
    assert os.listdir(tmp_path) == []


# export


def test_export_says_what_it_made(data, tiny, tmp_path):
    out = tmp_path / "m.onnx"
    summary = export_onnx(data / "jasper_tiny_v2.pt", out, config=tiny, batch_size=1, frames=100, opset=17)
    size = out.stat().st_size / 1e6
    start = f"Jasper, 309,277 parameters, opset 17, feats [1, 64, 100], {size:,.1f} MB, built in "
    assert summary.startswith(start)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_exported_file_equals_the_bytes_that_load_uses(golden, tmp_path):
    checkpoint, vectors = golden
    path = tmp_path / "m.safetensors"
    save_safetensors(path, checkpoint.config, checkpoint.weights)
    export_onnx(path, tmp_path / "m.onnx")
    expected = OrtBackend(graph_bytes(checkpoint), threads=1).run(vectors["feats"], vectors["feat_lens"])
    found = OrtBackend(tmp_path / "m.onnx", threads=1).run(vectors["feats"], vectors["feat_lens"])
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_failed_export_leaves_the_old_file(data, tiny, tmp_path, monkeypatch):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"old")

    def full_disk(source, target):
        assert onnx.load(source).graph.node  # all of it is written before the old file is touched
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(StorageError, match=r"m\.onnx: cannot be written \(no space left on device\)"):
        export_onnx(data / "jasper_tiny_v2.pt", out, config=tiny)
    assert out.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_models_that_are_none(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"x")
    (tmp_path / "m.doc").write_bytes(b"x")
    cases = {
        tmp_path: (StorageError, "is a folder; give the model file in it"),
        tmp_path / "none.onnx": (StorageError, "no such model; give a file, or a built-in name (mini)"),
        tmp_path / "m.doc": (ModelError, "unknown kind of model; give .onnx, .om, .pt, .nemo or .safetensors"),
    }
    for path, (kind, message) in cases.items():
        with pytest.raises(kind) as caught:
            resolve_model(path)
        assert str(caught.value) == f"{path}: {message}"
    with pytest.raises(ModelError) as caught:
        export_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert str(caught.value) == f"{tmp_path / 'm.onnx'}: is an ONNX model already; give a checkpoint"


def test_facts(data, tiny, tmp_path):
    path, out = data / "jasper_tiny_v2.pt", tmp_path / "m.onnx"
    export_onnx(path, out, config=tiny, batch_size=2, frames=100)
    facts, exported = describe(path, config=tiny), describe(out)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for found in (facts, exported):
        assert found["parameters"] == 309_277
        assert found["blocks"] == 6
        assert (found["stride"], found["frame_seconds"]) == (2, 0.02)
        assert (found["receptive_field"], found["receptive_field_seconds"]) == (299, 2.99)
        assert (found["labels"], found["blank"]) == (list(tiny.labels), 28)
        assert found["checkpoint_sha256"] == digest
        assert found["features"] == {"n_filt": 64, "window_size": 0.02, "window_stride": 0.01, "sample_rate": 16000}
    assert facts["inputs"] == {"feats": ["B", 64, "T"], "feat_lens": ["B"]}
    assert exported["inputs"] == {"feats": [2, 64, 100], "feat_lens": [2]}
    assert exported["outputs"] == {"log_probs": [2, "T'", 29], "log_prob_lens": [2]}
    assert exported["masked"] is True
    assert exported["model_sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert exported["file_bytes"] == out.stat().st_size


def test_facts_of_foreign_files(tmp_path):
    path = tmp_path / "m.onnx"
    none = "carries no jasper config in its metadata; make it with jasper export"
    stranger = onnx.helper.make_model(onnx.helper.make_graph([], "stranger", [], [])).SerializeToString()
    for content, message in ((b"hello", "not an ONNX model; export it again"), (b"", none), (stranger, none)):
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            describe(path)
        assert str(caught.value) == f"{path}: {message}"


# the runtime's own complaints


def test_foreign_models(tiny, tmp_path):
    model = build_graph(tiny, random_weights(tiny))
    whole = model.SerializeToString()
    path = tmp_path / "m.onnx"

    def complaint(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises((ModelError, ConfigError)) as caught:
            OrtBackend(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")

    assert complaint(b"") == "the file is empty; export it again"
    for content in (b"hello", whole[:-100], whole[: len(whole) // 2], np.random.default_rng(0).bytes(999)):
        assert complaint(content).startswith("not a model that onnxruntime can load (")
    properties = {p.key: p.value for p in model.metadata_props}

    def with_properties(**changes: str) -> bytes:
        onnx.helper.set_model_props(model, {k: v for k, v in (properties | changes).items() if v})
        return model.SerializeToString()

    none = "carries no jasper config in its metadata; make it with jasper export"
    assert complaint(with_properties(config="")) == none
    assert complaint(with_properties(config="{")).startswith("the config in its metadata is not JSON (")
    assert complaint(with_properties(config="{}")) == "needs exactly one of the keys jasper and quartznet (found none)"
    raw = json.loads(properties["config"])
    raw["input_val"]["filterbank_features"]["n_filt"] = raw["jasper"]["encoder"]["in_feats"] = 80
    assert complaint(with_properties(config=json.dumps(raw))) == "takes 64 mel bands, its own config says 80"
    with_properties()
    model.graph.output.pop()
    assert complaint(model.SerializeToString()) == (
        "inputs are ['feat_lens', 'feats'] and outputs ['log_probs'], not feats, feat_lens and log_probs, "
        "log_prob_lens; make it with jasper export"
    )
    missing = tmp_path / "none.onnx"
    with pytest.raises(StorageError) as caught:
        OrtBackend(missing)
    assert str(caught.value) == f"{missing}: no such file; check the path"


def test_log_probs_must_be_finite(tiny):
    net = backend(tiny, random_weights(tiny))
    feats = np.zeros((2, 64, 40), np.float32)
    feats[1, 3, 20] = np.nan
    with pytest.raises(ModelError) as caught:
        net.run(feats, lens_of(40, 40))
    assert str(caught.value) == "<graph>: log_probs are not finite; the weights or the precision are unfit"


def test_wrong_shapes_at_run_time(tiny):
    static = backend(tiny, random_weights(tiny), batch_size=2, frames=40)
    with pytest.raises(ModelError, match=r"^<graph>: onnxruntime failed \(.*invalid dimensions"):
        static.run(np.zeros((2, 64, 41), np.float32), lens_of(40, 40))


def test_unknown_backend(tmp_path):
    with pytest.raises(UsageError) as caught:
        open_backend("abacus", tmp_path / "m.onnx")
    assert str(caught.value) == f"backend 'abacus': choose one of {', '.join(BACKENDS)}"


# the real size

WRITE = """
import sys, torch
from jasper_asr.config import builtin_config
from jasper_asr.model.checkpoint import random_weights
weights = random_weights(builtin_config("jasper10x5dr"))
state = {name: torch.from_numpy(value) for name, value in weights.items()}
torch.save({"epoch": 1, "state_dict": state, "ema_state_dict": state, "optimizer": {}}, sys.argv[1])
"""
EXPORT = """
import sys, time
from pathlib import Path
started = time.perf_counter()
from jasper_asr.model.export import export_onnx
summary = export_onnx(sys.argv[1], Path(sys.argv[2]))
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
print(seconds, peak, summary, sep="|")
"""
RUN = """
import sys
import numpy as np
from pathlib import Path
from jasper_asr.backends.ort import OrtBackend
backend = OrtBackend(Path(sys.argv[1]), threads=1)
feats = np.random.default_rng(0).standard_normal((1, 64, 201)).astype(np.float32)
log_probs, lens = backend.run(feats, np.array([201], np.int32))
print(backend.config.receptive_field(), *log_probs.shape, *lens)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
def test_jasper_10x5_exports_in_a_minute_and_6_gb(tmp_path):
    """Each step in a process of its own: the peak is the export's alone."""

    def python(script: str, *arguments: object) -> str:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    checkpoint, out = tmp_path / "m.pt", tmp_path / "m.onnx"
    python(WRITE, checkpoint)
    seconds, peak, summary = python(EXPORT, checkpoint, out).split("|")
    print(f"export: {float(seconds):.1f} s, {int(peak) / 1e9:.2f} GB")  # seen with pytest -rP
    checkpoint.unlink()
    assert summary.startswith("Jasper, 332,632,349 parameters, opset 13, feats [B, 64, T], 1,330.2 MB")
    assert float(seconds) < 60
    assert int(peak) < 6e9
    assert python(RUN, out) == "1763 1 101 29 101"


def test_a_graph_with_constant_masks_refuses_what_they_do_not_reach(golden):
    graph = graph_bytes(golden[0], max_frames=100, opset=11)
    backend = open_backend("ort", graph)
    rows, lens = backend.run(np.zeros((1, 64, 100), np.float32), np.array([100], np.int32))
    assert (rows.shape[1], lens[0]) == (50, 50)
    with pytest.raises(ModelError, match=r"101 frames, its masks reach 100; export it without --target"):
        backend.run(np.zeros((1, 64, 101), np.float32), np.array([101], np.int32))
