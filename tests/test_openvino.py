import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest

from jasper_asr.backends import Shapes, choose_backend, open_backend
from jasper_asr.backends.openvino import OpenVinoBackend
from jasper_asr.backends.ort import OrtBackend
from jasper_asr.errors import ConfigError, ModelError, StorageError, UsageError
from jasper_asr.model.checkpoint import random_weights
from jasper_asr.model.graph import ExternalWeights, build_graph

openvino = pytest.importorskip("openvino")


def opened(config, weights, **options) -> OpenVinoBackend:
    return OpenVinoBackend(build_graph(config, weights, **options).SerializeToString(), threads=1)


def lens_of(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


def largest_difference(found: np.ndarray, expected: np.ndarray, lens: np.ndarray) -> float:
    return max(np.abs(row[:n] - other[:n]).max() for row, other, n in zip(found, expected, lens, strict=True))


@pytest.mark.parametrize("convolution", ["direct", "spectral"])
@pytest.mark.parametrize("opset", [11, 13, 21])
def test_golden(golden, convolution, opset):
    checkpoint, vectors = golden
    run = opened(checkpoint.config, checkpoint.weights, convolution=convolution, opset=opset).run
    found, lens = run(vectors["feats"], vectors["feat_lens"])
    assert found.shape == vectors["log_probs"].shape
    assert (found.dtype, lens.dtype) == (np.float32, np.int32)
    assert lens.tolist() == vectors["log_prob_lens"].tolist()
    assert largest_difference(found, vectors["log_probs"], lens) < 1e-4
    for index in range(4):
        found, lens = run(vectors[f"feats_single_{index}"], vectors[f"feat_lens_single_{index}"])
        assert lens.tolist() == vectors[f"log_prob_lens_single_{index}"].tolist()
        assert largest_difference(found, vectors[f"log_probs_single_{index}"], lens) < 1e-4


@pytest.mark.parametrize("masked", [True, False])
def test_spectral_equals_onnxruntime_at_every_length(tiny, masked):
    weights = random_weights(tiny, seed=1)
    ours = opened(tiny, weights, convolution="spectral", masked=masked)
    other = OrtBackend(build_graph(tiny, weights, masked=masked).SerializeToString(), threads=1)
    assert ours.shapes == other.shapes == Shapes(None, None, masked)
    rng = np.random.default_rng(2)
    for frames in (1, 2, 3, 54, 55, 56, 57, 58, 111, 112, 113, 300):
        feats = rng.standard_normal((2 if masked else 1, 64, frames)).astype(np.float32)
        lens = lens_of(frames, -(-frames // 3))[: len(feats)]
        feats[-1, :, lens[-1] :] = 1e3  # what stands beyond a length is not heard
        expected, out_lens = other.run(feats, lens)
        found, same = ours.run(feats, lens)
        assert found.shape == expected.shape
        assert same.tolist() == out_lens.tolist()
        assert largest_difference(found, expected, out_lens) < 1e-4


def test_fixed_shapes_and_metadata(tiny):
    backend = opened(tiny, random_weights(tiny), batch_size=2, frames=40, convolution="spectral")
    assert backend.shapes == Shapes(2, 40, True)
    assert backend.config == tiny
    assert backend.properties["convolution"] == "spectral"
    assert backend.run(np.zeros((2, 64, 40), np.float32), lens_of(40, 1))[0].shape == (2, 20, 29)


def test_float32_is_what_it_computes_in(tiny):
    backend = opened(tiny, random_weights(tiny))
    assert backend._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_external_weights_and_cache(tiny, tmp_path):
    external = ExternalWeights("m.data")
    model = build_graph(tiny, random_weights(tiny), convolution="spectral", external=external)
    (tmp_path / "m.data").write_bytes(b"".join(external.pieces()))
    assert (tmp_path / "m.data").stat().st_size == external.size
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    feats = np.random.default_rng(1).standard_normal((1, 64, 70)).astype(np.float32)
    expected = opened(tiny, random_weights(tiny), convolution="spectral").run(feats, lens_of(70))[0]
    for options in ({}, {"cache_dir": tmp_path / "cache"}, {"cache_dir": tmp_path / "cache"}):
        found = OpenVinoBackend(tmp_path / "m.onnx", threads=1, **options).run(feats, lens_of(70))[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert 0 < kept < external.size / 2


def test_from_several_threads(tiny):
    model = build_graph(tiny, random_weights(tiny)).SerializeToString()
    backend = OpenVinoBackend(model, threads=1, hint="throughput", streams=1)
    rng = np.random.default_rng(3)
    feats = [rng.standard_normal((1, 64, 50 + index)).astype(np.float32) for index in range(6)]
    expected = [backend.run(x, lens_of(x.shape[2]))[0].copy() for x in feats]
    found = [None] * 6

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = backend.run(feats[index], lens_of(feats[index].shape[2]))[0].copy()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_results_stay_when_it_runs_again(tiny):
    backend = opened(tiny, random_weights(tiny))
    first, _ = backend.run(np.ones((1, 64, 30), np.float32), lens_of(30))
    kept = first.copy()
    backend.run(np.zeros((1, 64, 30), np.float32), lens_of(30))
    np.testing.assert_array_equal(first, kept)


# errors


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_a_precision_that_the_cpu_has_not(tiny, precision, monkeypatch):
    monkeypatch.setattr(
        openvino.Core, "get_property",
        lambda core, device, name: ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else "Some CPU ",
    )  # fmt: skip
    with pytest.raises(UsageError) as caught:
        OpenVinoBackend(b"", precision=precision)
    assert str(caught.value) == f"precision {precision}: this CPU (Some CPU) does not compute in it; use f32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision 'int8': choose f32, bf16, f16"),
        ({"hint": "fast"}, "hint 'fast': choose latency or throughput"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UsageError) as caught:
        OpenVinoBackend(b"", **options)
    assert str(caught.value) == message


def test_files_that_are_no_models(tmp_path, tiny):
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(StorageError, match=r"^.*none\.onnx: no such file; check the path$"):
        OpenVinoBackend(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match=r"^.*empty\.onnx: the file is empty; export it again$"):
        OpenVinoBackend(tmp_path / "empty.onnx")
    with pytest.raises(ModelError, match=r"^.*text\.onnx: not a model that openvino can load \(.*\); export it again$"):
        OpenVinoBackend(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match=r"^<graph>: not a model that openvino can load \(.*\); export it again$"):
        OpenVinoBackend(b"not a model")
    foreign = build_graph(tiny, random_weights(tiny))
    del foreign.metadata_props[:]
    with pytest.raises(ModelError, match=r"^<graph>: carries no jasper config in its metadata; make it with jasper"):
        OpenVinoBackend(foreign.SerializeToString())
    foreign.metadata_props.add(key="config", value="{}")
    with pytest.raises(ConfigError, match=r"^<graph>: needs exactly one of the keys"):
        OpenVinoBackend(foreign.SerializeToString())


def test_weights_that_give_nan(tiny):
    weights = random_weights(tiny)
    weights["decoder.layers.0.bias"] = weights["decoder.layers.0.bias"] * np.float32(np.nan)
    with pytest.raises(ModelError) as caught:
        opened(tiny, weights).run(np.zeros((1, 64, 9), np.float32), lens_of(9))
    assert str(caught.value) == "<graph>: log_probs are not finite; the weights or the precision are unfit"


def test_a_shape_that_does_not_fit(tiny):
    backend = opened(tiny, random_weights(tiny), frames=40)
    for bands, frames in ((64, 9), (64, 41), (63, 40)):
        with pytest.raises(ModelError) as caught:
            backend.run(np.zeros((1, bands, frames), np.float32), lens_of(9))
        assert str(caught.value) == f"<graph>: takes feats [any, 64, 40], not [1, {bands}, {frames}]"


def test_not_installed():
    script = (
        "import sys; sys.modules['openvino'] = None\n"
        "from jasper_asr.backends import open_backend\n"
        "try: open_backend('openvino', b'')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message = "UsageError backend openvino: is not installed; pip install 'jasper-asr[openvino]'\n"
    assert (done.stdout, done.stderr) == (message, "")


def test_a_run_that_fails(tiny, monkeypatch):
    class Broken:
        def create_infer_request(self):
            raise RuntimeError("Exception from core.cpp:1:\nout of memory")

    backend = opened(tiny, random_weights(tiny))
    monkeypatch.setattr(backend, "_compiled", Broken())
    with pytest.raises(ModelError) as caught:
        backend.run(np.zeros((1, 64, 9), np.float32), lens_of(9))
    assert str(caught.value) == "<graph>: openvino failed (Exception from core.cpp:1: out of memory)"


# the choice


def test_auto(tiny):
    model = build_graph(tiny, random_weights(tiny)).SerializeToString()
    assert [choose_backend(precision) for precision in (None, "f32", "bf16", "f16")] == [
        *["ort"] * 2,
        *["openvino"] * 2,
    ]
    assert isinstance(open_backend("auto", model, threads=1), OrtBackend)
    assert isinstance(open_backend("openvino", model, threads=1, precision="f32"), OpenVinoBackend)
    with pytest.raises(UsageError, match=r"^backend ort: computes in f32, not bf16; use --backend openvino$"):
        open_backend("ort", model, precision="bf16")


def test_protobuf_agrees(tiny):
    """What OpenVINO keeps of the metadata is what the file says."""
    model = build_graph(tiny, random_weights(tiny), provenance={"checkpoint_sha256": "12"})
    properties = {
        entry.key: entry.value for entry in onnx.ModelProto.FromString(model.SerializeToString()).metadata_props
    }
    assert OpenVinoBackend(model.SerializeToString(), threads=1).properties == properties
