import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers_audio import made_up
from jasper_asr import load
from jasper_asr.backends.ort import OrtBackend
from jasper_asr.config import ModelConfig, builtin_config, load_config
from jasper_asr.errors import StorageError, UsageError
from jasper_asr.model import export
from jasper_asr.model.checkpoint import Checkpoint, parameter_count, random_weights, save_safetensors
from jasper_asr.model.export import BUILTIN_MODELS, describe, export_onnx, graph_source, write_graph
from jasper_asr.model.graph import build_graph
from jasper_asr.model.spectral import (
    choose_tile,
    first_spectral_block,
    predicted_speedup,
    spectra,
    stored_weights,
    transforms,
)

TOLERANCE = 1e-4


def backend(config: ModelConfig, weights: dict, **options) -> OrtBackend:
    return OrtBackend(build_graph(config, weights, **options).SerializeToString(), threads=1)


def lens_of(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


def largest_difference(found: np.ndarray, expected: np.ndarray, lens: np.ndarray) -> float:
    return max(np.abs(row[:n] - other[:n]).max() for row, other, n in zip(found, expected, lens, strict=True))


OWN, DENSE = {"residual": True}, {"residual": True, "residual_dense": True}
SHAPES = {
    "plain residual": [{"kernel_size": 5, "stride": 2}, {"kernel_size": 7, "repeat": 3, "filters": 9} | OWN, {}],
    "dense residual, dilation": [
        {"kernel_size": 5, "stride": 2}, {"kernel_size": 7, "repeat": 2} | DENSE,
        {"kernel_size": 3, "filters": 5} | DENSE, {"kernel_size": 5, "dilation": 3}, {}],
    "no stride": [{"kernel_size": 3} | DENSE, {"kernel_size": 3} | DENSE],
    "strides in the middle": [
        {"kernel_size": 5, "stride": 3}, {"kernel_size": 3} | OWN, {"kernel_size": 7, "stride": 2},
        {"kernel_size": 3, "repeat": 2}],
    "a halo of several tiles": [{"kernel_size": 29, "dilation": 2}, {"kernel_size": 51}],
    "dense panes from before the stretch": [{"kernel_size": 3} | OWN, {"stride": 2}, {"kernel_size": 9} | OWN],
}  # fmt: skip


@pytest.fixture(params=list(SHAPES))
def shape(request) -> ModelConfig:
    return made_up(SHAPES[request.param])


# the arithmetic


@pytest.mark.parametrize(("tile", "taps"), [(2, 1), (2, 3), (8, 3), (12, 29), (24, 25), (32, 11)])
def test_products_of_spectra_are_correlations(tile, taps):
    rng = np.random.default_rng(taps)
    kernel = rng.standard_normal((3, 2, taps)).astype(np.float32)
    x = rng.standard_normal((tile + taps - 1, 2)).astype(np.float32)
    forward, inverse, _ = transforms(tile, taps)
    products = (tile + taps - 1) // 2 * 3
    assert (forward.shape, inverse.shape) == ((products, tile + taps - 1), (tile, products))
    of_kernel = np.concatenate(list(spectra(kernel, tile)))
    assert (of_kernel.shape, of_kernel.dtype) == ((products, 3, 2), np.float32)
    found = inverse @ np.einsum("roc,rc->ro", of_kernel, forward @ x)
    expected = np.array([[np.sum(kernel[o] * x[m : m + taps].T) for o in range(3)] for m in range(tile)])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_transform_must_be_even():
    with pytest.raises(ValueError, match=r"^a tile of 7 and 3 taps make an odd transform of 9$"):
        transforms(7, 3)


# the same log-probs as direct convolution


@pytest.mark.parametrize("tile", [12, 24])
def test_every_length_equals_direct(shape, tile):
    weights = random_weights(shape, seed=3)
    direct, spectral = backend(shape, weights), backend(shape, weights, convolution="spectral", tile=tile)
    unmasked = backend(shape, weights, convolution="spectral", tile=tile, masked=False)
    assert spectral.properties["convolution"] == "spectral"
    assert spectral.properties["tile"] == str(tile)
    rng = np.random.default_rng(4)
    for frames in [*range(1, 60), 95, 96, 97, 143, 144, 145, 400]:
        feats = rng.standard_normal((3, 8, frames)).astype(np.float32)
        lens = lens_of(frames, 1, -(-frames // 2))
        expected, out_lens = direct.run(feats, lens)
        found, same_lens = spectral.run(feats, lens)
        assert found.shape == expected.shape
        assert same_lens.tolist() == out_lens.tolist()
        assert largest_difference(found, expected, out_lens) < TOLERANCE
        alone, _ = unmasked.run(feats[:1], lens[:1])
        assert alone.shape == expected[:1].shape
        assert largest_difference(alone, expected[:1], out_lens[:1]) < TOLERANCE


def test_golden_batch_and_singles(data, tiny):
    from conftest import read_model, read_vectors

    weights, vectors = read_model("jasper_v2").weights, read_vectors("jasper_tiny")
    batch = backend(tiny, weights, convolution="spectral")
    found, lens = batch.run(vectors["feats"], vectors["feat_lens"])
    assert lens.tolist() == vectors["log_prob_lens"].tolist()
    assert found.shape == vectors["log_probs"].shape
    assert largest_difference(found, vectors["log_probs"], lens) < TOLERANCE
    exact = backend(tiny, weights, convolution="spectral", masked=False)
    for index in range(4):
        feats, valid = vectors[f"feats_single_{index}"], vectors[f"feat_lens_single_{index}"]
        expected = vectors[f"log_probs_single_{index}"]
        for run, given in ((batch.run, feats), (exact.run, feats[:, :, : valid[0]])):
            found, lens = run(given, valid)
            assert lens.tolist() == vectors[f"log_prob_lens_single_{index}"].tolist()
            assert largest_difference(found, expected, lens) < TOLERANCE


def test_padding_and_garbage_change_nothing(tiny):
    run = backend(tiny, random_weights(tiny, seed=1), convolution="spectral").run
    rng = np.random.default_rng(2)
    rows = [rng.standard_normal((64, length)).astype(np.float32) for length in (120, 1, 55, 299, 64)]
    alone = [run(row[None], lens_of(row.shape[1]))[0][0] for row in rows]
    for frames, garbage in ((299, 0.0), (331, 1e3), (640, 37.0)):
        feats = garbage * rng.standard_normal((len(rows), 64, frames)).astype(np.float32)
        for target, row in zip(feats, rows, strict=True):
            target[:, : row.shape[1]] = row
        found, lens = run(feats, lens_of(*(row.shape[1] for row in rows)))
        for row, length, expected in zip(found, lens, alone, strict=True):
            assert length == len(expected)
            np.testing.assert_allclose(row[:length], expected, atol=2e-5)


@pytest.mark.parametrize("fixed", [{"batch_size": 2, "frames": 96}, {"frames": 97}, {"batch_size": 2}], ids=str)
def test_fixed_shapes_equal_open_ones(shape, fixed):
    weights = random_weights(shape, seed=5)
    feats = np.random.default_rng(6).standard_normal((2, 8, fixed.get("frames", 50))).astype(np.float32)
    lens = lens_of(feats.shape[2], 7)
    expected, out_lens = backend(shape, weights).run(feats, lens)
    for masked in (True, False):
        model = build_graph(shape, weights, convolution="spectral", masked=masked, **fixed)
        onnx.checker.check_model(model, full_check=True)
        found, _ = OrtBackend(model.SerializeToString(), threads=1).run(feats, lens)
        rows = slice(None) if masked else slice(1)  # the second needs its mask
        assert found.shape == expected.shape
        assert largest_difference(found[rows], expected[rows], out_lens[rows]) < TOLERANCE


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_opsets(tiny, opset):
    model = build_graph(tiny, random_weights(tiny), convolution="spectral", opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert OrtBackend(model.SerializeToString(), threads=1).run(np.zeros((1, 64, 9), np.float32), lens_of(9))[1] == [5]


# what becomes spectral, and how


def mini() -> ModelConfig:
    return load_config(BUILTIN_MODELS["mini"].with_name("config.yaml"))


def test_choices():
    large = builtin_config("jasper10x5dr")
    assert first_spectral_block(large) == 1
    assert choose_tile(large, "auto") == choose_tile(large, "spectral") == 28
    assert [choose_tile(large, "auto", frames=frames) for frames in (30, 700, 1670, 4000)] == [None, 24, 28, 32]
    assert choose_tile(large, "direct") is None
    assert [choose_tile(mini(), "auto", frames=frames) for frames in (None, 50, 4000)] == [None, None, 32]
    assert choose_tile(mini(), "spectral", frames=50) == 8
    with pytest.raises(UsageError, match=r"^convolution 'fast': choose auto, direct, spectral$"):
        choose_tile(large, "fast")


def test_tiles_suit_every_dilation():
    config = made_up([{"kernel_size": 5, "dilation": 3}, {"kernel_size": 5, "dilation": 2}])
    assert choose_tile(config, "spectral") % 12 == 0
    assert choose_tile(made_up([{"kernel_size": 3, "dilation": 25}]), "spectral") == 50


def test_grouped_convolutions_stay_direct(tiny_quartznet):
    model = build_graph(tiny_quartznet, random_weights(tiny_quartznet), convolution="spectral")
    assert model == build_graph(tiny_quartznet, random_weights(tiny_quartznet))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["convolution"] == "direct"
    assert "tile" not in properties


def test_stored_weights_are_those_of_the_graph(tiny):
    for tile in (None, 8, 28):
        options = {"convolution": "spectral", "tile": tile} if tile else {}
        model = build_graph(tiny, random_weights(tiny), **options)
        stored = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.data_type == 1)
        assert 0.97 < stored_weights(tiny, tile) / stored < 1.03
    assert stored_weights(tiny, None) == parameter_count(tiny)


def test_masks_that_are_constants_want_direct_convolution(tiny):
    with pytest.raises(UsageError, match=r"^max-frames is for direct convolution only; leave one of them out$"):
        build_graph(tiny, random_weights(tiny), convolution="spectral", max_frames=100)


# graphs beyond what protobuf holds


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(export, "INLINE_BYTES", 100_000)


@pytest.fixture
def checkpoint(tiny) -> Checkpoint:
    return Checkpoint(tiny, random_weights(tiny, seed=9), "ab" * 32, "ema")


def run_file(path: Path) -> np.ndarray:
    feats = np.random.default_rng(1).standard_normal((1, 64, 50)).astype(np.float32)
    return OrtBackend(path, threads=1).run(feats, lens_of(50))[0]


def test_large_weights_go_beside_the_graph(checkpoint, tmp_path, small_limit, monkeypatch):
    out = tmp_path / "m.onnx"
    write_graph(checkpoint, out, convolution="spectral")
    data, graph = sorted(os.listdir(tmp_path))
    assert graph == "m.onnx"
    assert data.startswith("m-")
    assert data.endswith(".onnx.data")
    onnx.checker.check_model(str(out), full_check=True)
    proto = onnx.load(out, load_external_data=False)
    assert proto.ByteSize() < 200_000 < (tmp_path / data).stat().st_size
    places = [{e.key: e.value for e in tensor.external_data} for tensor in proto.graph.initializer]
    assert {place["location"] for place in places if place} == {data}
    assert all(int(place["offset"]) % 4096 == 0 for place in places if place)
    found = run_file(out)
    assert describe(out)["convolution"] == "spectral"
    monkeypatch.undo()
    write_graph(checkpoint, out, convolution="spectral")
    assert os.listdir(tmp_path) == ["m.onnx"]  # the data of the older model went with it
    np.testing.assert_array_equal(run_file(out), found)


def test_a_failed_export_leaves_the_old_model_and_its_data(checkpoint, tiny, tmp_path, small_limit, monkeypatch):
    out = tmp_path / "m.onnx"
    write_graph(checkpoint, out, convolution="spectral")
    before, old = run_file(out), sorted(os.listdir(tmp_path))
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".onnx"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    other = Checkpoint(tiny, random_weights(tiny, seed=10), "cd" * 32, "ema")
    with pytest.raises(StorageError, match=r"m\.onnx: cannot be written \(no space left on device\)"):
        write_graph(other, out, convolution="spectral")
    assert set(old) < set(os.listdir(tmp_path))
    np.testing.assert_array_equal(run_file(out), before)
    monkeypatch.setattr(os, "replace", replace)
    write_graph(other, out, convolution="spectral")
    assert len(os.listdir(tmp_path)) == 2
    assert np.abs(run_file(out) - before).max() > 0.01


def test_a_graph_to_open_leaves_nothing_behind(checkpoint, small_limit, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_folder_in_memory", lambda size: tmp_path)
    with graph_source(checkpoint, convolution="spectral") as source:
        assert isinstance(source, Path)
        opened = OrtBackend(source, threads=1)
    assert os.listdir(tmp_path) == []
    feats = np.random.default_rng(1).standard_normal((1, 64, 50)).astype(np.float32)
    found = opened.run(feats, lens_of(50))[0]
    with graph_source(checkpoint) as source:
        assert isinstance(source, Path)
    monkeypatch.undo()
    with graph_source(checkpoint) as source:
        assert isinstance(source, bytes)
        np.testing.assert_allclose(OrtBackend(source).run(feats, lens_of(50))[0], found, atol=TOLERANCE)


# from outside


def test_load_and_export_agree(tiny, tmp_path):
    out, source = tmp_path / "m.onnx", tmp_path / "m.safetensors"
    save_safetensors(source, tiny, random_weights(tiny))
    summary = export_onnx(source, out, convolution="spectral")
    assert "opset 13, spectral in tiles of 28, feats [B, 64, T]" in summary
    samples = np.random.default_rng(3).standard_normal(30_000).astype(np.float32) * 0.1
    results = []
    for model, options in ((out, {}), (source, {"convolution": "spectral"})):
        with load(model, threads=1, **options) as transcriber:
            results.append(transcriber.log_probs([samples])[0])
    with load(source, threads=1, convolution="direct") as transcriber:
        expected = transcriber.log_probs([samples])[0]
    for found in results:
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_an_onnx_keeps_its_convolutions(checkpoint, tmp_path):
    out = tmp_path / "m.onnx"
    write_graph(checkpoint, out)
    with pytest.raises(UsageError) as caught:
        load(out, convolution="spectral")
    assert str(caught.value) == f"{out}: keeps the convolutions it was exported with; give a checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.safetensors", "--convolution", "spectral"], "m.safetensors: --convolution is for .onnx only"),
        (
            ["m.onnx", "--target", "ascend", "--convolution", "spectral"],
            "--target ascend takes direct convolutions only; leave out --convolution",
        ),
    ],
)
def test_exports_that_cannot_be(arguments, message, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from jasper_asr.cli import command

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, ["export", "mini", *arguments])
    assert isinstance(result.exception, UsageError)
    assert str(result.exception) == message
    assert os.listdir(tmp_path) == []


def test_exported_by_command(tmp_path, tiny):
    from click.testing import CliRunner

    from jasper_asr.cli import command

    save_safetensors(tmp_path / "m.safetensors", tiny, random_weights(tiny))
    for kind, expected in (("spectral", "spectral"), ("auto", "direct"), ("direct", "direct")):
        arguments = ["export", str(tmp_path / "m.safetensors"), str(tmp_path / "m.onnx"), "--convolution", kind]
        assert CliRunner().invoke(command, arguments).exit_code == 0
        shown = CliRunner().invoke(command, ["info", str(tmp_path / "m.onnx"), "--format", "json"])
        assert json.loads(shown.stdout)["convolution"] == expected


# the real size


@pytest.mark.slow
def test_jasper_10x5(tmp_path):
    """Random weights whose log-probs reach down to -20, as those of a trained network do."""
    config = builtin_config("jasper10x5dr")
    weights = random_weights(config)
    weights["decoder.layers.0.weight"] /= 50
    checkpoint = Checkpoint(config, weights, "0" * 64, "ema")
    paths = {kind: tmp_path / f"{kind}.onnx" for kind in ("direct", "spectral")}
    for kind, path in paths.items():
        write_graph(checkpoint, path, convolution=kind)
    del checkpoint, weights
    rng = np.random.default_rng(0)
    cases = [(1,), (2,), (55,), (56,), (57,), (111, 1), (700, 699, 350), (1670,), (6000,)]
    feats = [rng.standard_normal((len(lens), 64, max(lens))).astype(np.float32) for lens in cases]
    found = {}
    for kind, path in paths.items():
        opened = OrtBackend(path, threads=1)
        found[kind] = [opened.run(x, lens_of(*lens)) for x, lens in zip(feats, cases, strict=True)]
        opened.close()
    assert min(direct.min() for direct, _ in found["direct"]) < -15
    for (direct, lens), (spectral, same) in zip(found["direct"], found["spectral"], strict=True):
        assert lens.tolist() == same.tolist()
        assert largest_difference(spectral, direct, lens) < TOLERANCE


@pytest.mark.parametrize(
    ("frames", "fixed", "measured"),
    [(700, True, 3.02), (1670, True, 3.78), (4000, True, 4.43), (700, False, 2.75), (1670, False, 3.80)],
)
def test_the_cost_model_expects_what_was_measured(frames, fixed, measured):
    """Against benchmarks/README.md, Jasper 10x5 on two AVX2 cores."""
    config = builtin_config("jasper10x5dr")
    tile = choose_tile(config, "spectral", frames=frames if fixed else None)
    assert predicted_speedup(config, tile, frames, fixed=fixed) == pytest.approx(measured, rel=0.2)
