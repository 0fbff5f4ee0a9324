import json
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from conftest import read_model
from helpers_audio import CHECKPOINT, CONFIG, nemo_manifest, run, tiny_checkpoint, tiny_config, tiny_graph, wav
from jasper_asr.backends.ort import OrtBackend
from jasper_asr.data.manifest import Utterance, read_manifest
from jasper_asr.deploy import quantize as module
from jasper_asr.deploy.quantize import MAX_WEIGHT, quantize
from jasper_asr.errors import ModelError, UsageError
from jasper_asr.model.export import BUILTIN_MODELS, graph_bytes
from jasper_asr.transcribe import load

SECONDS = (1.0, 1.5, 2.2, 3.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips, and manifests of them: with what the float model says, and without transcripts."""
    folder = tmp_path_factory.mktemp("quantize")
    rows = []
    with load(CHECKPOINT, config=tiny_config(), threads=1) as transcriber:
        for seed, seconds in enumerate(SECONDS):
            text = transcriber.transcribe(wav(folder / f"{seed}.wav", seconds, seed)).text
            rows.append({"audio_filepath": f"{seed}.wav", "duration": seconds, "text": text})
    nemo_manifest(folder / "spoken.jsonl", *rows)
    nemo_manifest(folder / "silent.jsonl", *({"audio_filepath": row["audio_filepath"]} for row in rows))
    (folder / "float.onnx").write_bytes(tiny_graph())
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return read_manifest(folder / "spoken.jsonl")


@pytest.fixture(scope="module")
def int8(folder, rows):
    """(path, report) of the tiny model."""
    out = folder / "int8.onnx"
    return out, quantize(CHECKPOINT, out, rows, config=tiny_config(), max_wer_increase=100, threads=1)


def initializers(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def optimized_ops(path, folder):
    """How often onnxruntime runs each operator of `path`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


# --- int8 ---------------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_two_models_do(folder, rows, int8):
    out, report = int8
    paths, texts = [], []
    for model in (folder / "float.onnx", out):
        with load(model, threads=1) as transcriber:
            paths.append(np.concatenate([transcriber.listen(row.audio_path).argmax(axis=1) for row in rows]))
            texts.append([transcriber.transcribe(row.audio_path).text for row in rows])
    assert report.frame_agreement == pytest.approx(100 * np.mean(paths[0] == paths[1]))
    assert report.transcript_agreement == 25 * sum(map(str.__eq__, *texts))
    assert report.frame_agreement > 95
    assert (report.wer_before, report.calibration_utterances, report.utterances, report.errors) == (0, 4, 4, ())
    assert report.words == sum(len(text.split()) for text in texts[0])
    assert report.bytes_after == out.stat().st_size < 0.45 * report.bytes_before


def test_onnxruntime_runs_all_but_the_first_and_the_decoder_in_integers(tmp_path, int8):
    out, report = int8
    ops = optimized_ops(out, tmp_path)
    assert ops["QLinearConv"] == report.quantized == report.convolutions - 2
    assert ops["Conv"] == 2
    assert ops["QLinearMul"] >= 1
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_weights_are_7_bits_with_a_scale_a_channel(int8):
    exact = {node.name: node for node in onnx.load_from_string(tiny_graph()).graph.node if node.op_type == "Conv"}
    before = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(tiny_graph()).graph.initializer
    }
    stored = initializers(int8[0])
    names = [name.removesuffix(".weight.int8") for name in stored if name.endswith(".weight.int8")]
    assert len(names) == int8[1].quantized
    for name in names:
        kernel = before[exact[name].input[1]]
        integers, scales = stored[f"{name}.weight.int8"], stored[f"{name}.weight.scale"]
        assert np.array_equal(np.abs(integers).max(axis=(1, 2, 3)), np.full(len(kernel), MAX_WEIGHT))
        assert (np.abs(integers * scales[:, None, None, None] - kernel).max(axis=(1, 2, 3)) < 0.5001 * scales).all()
    first, *_, decoder = exact.values()
    assert names[0] != first.name
    for node in (first, decoder):
        assert np.array_equal(stored[node.input[1]], before[node.input[1]])


def test_two_products_fit_into_16_bits():
    """x86 without VNNI adds two of uint8 and int8 so, and saturates; without the limit our weights would not fit."""
    assert 2 * 255 * MAX_WEIGHT < 2**15 <= 2 * 255 * (MAX_WEIGHT + 2)


def test_metadata_say_what_it_is(int8, capsys):
    out, report = int8
    properties = OrtBackend(out).properties
    assert {key: properties[key] for key in ("precision", "calibration_utterances", "source_sha256")} == {
        "precision": "int8",
        "calibration_utterances": "4",
        "source_sha256": report.source_sha256,
    }
    assert report.source_sha256 == properties["checkpoint_sha256"] == tiny_checkpoint().sha256
    facts = json.loads(run("info", out, "--format", "json")[1])
    assert (facts["precision"], facts["convolution"], facts["masked"]) == ("int8", "direct", True)


def test_a_batch_hides_its_padding(int8, folder, rows):
    """Masks work in integers too: what stands beyond an utterance's end changes nothing."""
    rng = np.random.default_rng(5)
    backend = OrtBackend(int8[0], threads=1)
    feats = rng.standard_normal((2, 64, 160)).astype(np.float32)
    lens = np.array([160, 101], np.int32)
    together, out_lens = backend.run(feats, lens)
    feats[1, :, 101:] = 1e3
    assert np.array_equal(backend.run(feats, lens)[0][1, : out_lens[1]], together[1, : out_lens[1]])
    alone, _ = backend.run(feats[1:, :, :101], lens[1:])
    assert np.mean(alone[0].argmax(axis=1) == together[1, : out_lens[1]].argmax(axis=1)) > 0.97


@pytest.mark.parametrize("shape", [{"masked": False}, {"frames": 400, "batch_size": 2}, {"max_frames": 600}])
def test_any_direct_graph_of_ours(folder, rows, tmp_path, shape):
    source = tmp_path / "source.onnx"
    source.write_bytes(tiny_graph(**shape))
    report = quantize(source, tmp_path / "int8.onnx", rows, max_wer_increase=100, threads=1)
    assert report.frame_agreement > 95
    assert optimized_ops(tmp_path / "int8.onnx", tmp_path)["QLinearConv"] == report.quantized


def test_quartznet(tmp_path, rows):
    source, out = tmp_path / "quartz.onnx", tmp_path / "int8.onnx"
    source.write_bytes(graph_bytes(read_model("quartznet")))
    report = quantize(source, out, rows, max_wer_increase=100, threads=1)
    assert report.frame_agreement > 90
    assert optimized_ops(out, tmp_path)["QLinearConv"] == report.quantized > 5


def test_openvino_says_the_same(int8, rows):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.compile_model(
        core.read_model(int8[0]), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    feats = np.random.default_rng(3).standard_normal((1, 64, 300)).astype(np.float32)
    lens = np.array([300], np.int32)
    ours = OrtBackend(int8[0], threads=1).run(feats, lens)[0]
    theirs = model({"feats": feats, "feat_lens": lens})[model.output("log_probs")]
    assert np.mean(ours.argmax(axis=2) == theirs.argmax(axis=2)) > 0.95


def test_the_default_model_on_its_clips(tmp_path):
    rows = read_manifest(BUILTIN_MODELS["mini"].parent / "clips" / "manifest.jsonl")
    report = quantize("mini", tmp_path / "mini.onnx", rows, max_wer_increase=3, threads=1)
    assert not report.refused
    assert report.frame_agreement > 97
    assert report.bytes_after < 0.35 * report.bytes_before


# --- scales -------------------------------------------------------------------------------------------------------


def test_a_histogram_keeps_its_counts_when_it_grows():
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, scale, (1, 3, 500)).astype(np.float32) for scale in (1e-4, 0.1, 30, 0.5)]
    histogram = module._Histogram()
    for part in parts:
        histogram.add(part)
    values = np.concatenate(parts).ravel()
    edges = np.linspace(-histogram.limit, histogram.limit, 2 * histogram.HALF + 1)
    assert np.array_equal(histogram.counts, np.histogram(values, edges)[0])
    assert (histogram.low, histogram.high) == (values.min(), values.max())


@pytest.mark.parametrize("kind", ["uniform", "normal", "tail"])
def test_the_range_has_the_least_squared_error(kind):
    rng = np.random.default_rng(1)
    values = {
        "uniform": rng.uniform(0, 7, 20_000),
        "normal": rng.normal(0, 1, 20_000),
        "tail": rng.exponential(1, 20_000),
    }[kind].astype(np.float32)
    histogram = module._Histogram()
    histogram.add(values)
    low, high = histogram.range()
    assert (low == 0) == (kind != "normal")

    def error(part):
        scale, zero = module._scale(part * histogram.low, part * histogram.high)
        rounded = (np.round(values / scale + zero).clip(0, 255) - zero) * scale
        return float(((values - rounded) ** 2).sum())

    best = min(map(error, np.linspace(0.2, 1, 81)))
    assert error(high / histogram.high) < 1.1 * best
    assert (high / values.max() > 0.98) == (kind == "uniform")


def test_calibration_takes_all_lengths():
    rows = [Utterance(None, str(seconds), duration=float(seconds)) for seconds in range(1, 1001)]
    chosen = [row.duration for row in module._of_all_lengths(rows[::-1])]
    assert (len(chosen), chosen[0], chosen[-1]) == (200, 1.0, 1000.0)
    assert set(np.diff(chosen)) == {5.0, 6.0}
    assert len(module._of_all_lengths(rows[:7])) == 7


# --- fp16 and bf16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_weights_of_16_bits(folder, rows, tmp_path, precision, dtype):
    out = tmp_path / "half.onnx"
    report = quantize(folder / "float.onnx", out, rows, precision=precision, max_wer_increase=100, threads=1)
    before, after = initializers(folder / "float.onnx"), initializers(out)
    kernels = [name for name, values in before.items() if values.ndim == 4 and values.dtype == np.float32]
    assert len(kernels) == report.quantized == report.convolutions
    for name in kernels:
        assert np.array_equal(after[f"{name}.{precision}"].astype(np.float32), before[name].astype(dtype).astype("f4"))
    assert report.frame_agreement > 98
    assert report.bytes_after == pytest.approx(report.bytes_before / 2, rel=0.05)
    assert OrtBackend(out).properties["precision"] == precision
    assert "calibration_utterances" not in OrtBackend(out).properties
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_a_weight_beyond_fp16(folder, rows, tmp_path):
    proto = onnx.load(folder / "float.onnx")
    tensor = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] = 70_000
    tensor.raw_data = values.tobytes()
    source = tmp_path / "large.onnx"
    onnx.save(proto, source)
    expected = "has weights beyond 65504, the largest number of fp16; use --precision bf16"
    with pytest.raises(ModelError, match=f"^{source}: {expected}$"):
        quantize(source, tmp_path / "out.onnx", rows, precision="fp16", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["large.onnx"]


# --- the gate and the command -------------------------------------------------------------------------------------


def test_the_command(folder, tmp_path):
    out, report = tmp_path / "small.onnx", tmp_path / "report.json"
    argv = ("--calibration", folder / "spoken.jsonl", "--output", out, "--report", report, "--max-wer-increase", 100)
    code, stdout, err = run("quantize", folder / "float.onnx", *argv, "--threads", 1)
    assert (code, stdout) == (0, "")
    facts = json.loads(report.read_text())
    assert err == (
        f"jasper: {out}: int8 in {facts['quantized']} of {facts['convolutions']} convolutions, 1.2 -> "
        f"{out.stat().st_size / 1e6:.1f} MB; WER 0.00 -> {facts['wer_after']:.2f} %, as before are "
        f"{facts['frame_agreement']:.2f} % of frames and {facts['transcript_agreement']:.1f} % of transcripts "
        "(4 utterances)\n"
    )
    assert facts["refused"] is False
    assert run("transcribe", folder / "0.wav", "--model", out)[0] == 0


def test_a_wer_that_rises_too_much_leaves_the_old_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module._Histogram, "range", lambda self: (0.05 * self.low, 0.05 * self.high))
    out, report = tmp_path / "small.onnx", tmp_path / "report.json"
    out.write_bytes(b"old")
    argv = ("--calibration", folder / "spoken.jsonl", "--output", out, "--report", report, "--threads", 1)
    code, stdout, err = run("quantize", folder / "float.onnx", *argv)
    facts = json.loads(report.read_text())
    assert (code, stdout, out.read_bytes()) == (7, "", b"old")
    assert facts["refused"] is True
    assert facts["wer_after"] > 1
    assert err.splitlines()[-1] == (
        f"jasper: error: {out}: not written, WER rises from 0.00 to {facts['wer_after']:.2f} %, more than 1 points; "
        "calibrate on more speech like that of use, or allow more with --max-wer-increase"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "small.onnx"]


def test_the_limit_is_in_points_and_belongs_to_the_dev_set(folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module._Histogram, "range", lambda self: (0.05 * self.low, 0.05 * self.high))
    model, out = folder / "float.onnx", tmp_path / "small.onnx"
    report = quantize(model, out, rows[:1], dev=rows, max_wer_increase=0, threads=1)
    assert (report.refused, report.calibration_utterances, report.utterances) == (True, 1, 4)
    assert not out.exists()
    rise = report.wer_after - report.wer_before
    assert quantize(model, out, rows[:1], dev=rows, max_wer_increase=rise - 0.01, threads=1).refused
    assert not quantize(model, out, rows[:1], dev=rows, max_wer_increase=rise, threads=1).refused
    assert out.exists()


def test_without_transcripts_there_is_agreement_but_no_wer(folder, tmp_path):
    argv = ("quantize", folder / "float.onnx", "--calibration", folder / "silent.jsonl", "--threads", 1)
    out = tmp_path / "small.onnx"
    code, _, err = run(*argv, "--output", out)
    assert (code, out.exists()) == (0, True)
    assert "MB; no transcripts, no WER; as before are " in err
    out.unlink()
    code, _, err = run(*argv, "--output", out, "--max-wer-increase", 1)
    assert (code, out.exists()) == (2, False)
    assert err == (
        f"jasper: error: {folder}/silent.jsonl: has no transcripts, which --max-wer-increase needs; leave it out\n"
    )


def test_progress_counts_every_pass(folder, rows, tmp_path):
    for precision, total in (("int8", 1 + 2 * 4), ("fp16", 2 * 4)):
        seen = []
        quantize(
            folder / "float.onnx",
            tmp_path / "out.onnx",
            rows[:1],
            dev=rows,
            precision=precision,
            max_wer_increase=100,
            threads=1,
            progress=lambda *step: seen.append(step),  # noqa: B023
        )
        assert seen == [(step, total) for step in range(1, total + 1)]


def test_an_unreadable_clip_is_told_and_the_others_do(folder, tmp_path):
    manifest = nemo_manifest(folder / "torn.jsonl", {"audio_filepath": "0.wav"}, {"audio_filepath": "none.wav"})
    argv = ("quantize", folder / "float.onnx", "--calibration", manifest, "--threads", 1)
    code, _, err = run(*argv, "--output", tmp_path / "x.onnx")
    assert code == 1
    assert err.startswith(f"jasper: error: {folder}/none.wav: no such file; check the path\n")
    assert err.endswith("(1 utterances)\n")
    assert OrtBackend(tmp_path / "x.onnx").properties["calibration_utterances"] == "1"


BAD = {
    "suffix": (("--output", "OUT/x.om"), 2, "OUT/x.om: the output must end in .onnx"),
    "limit": (("--max-wer-increase", "-1"), 2, "--max-wer-increase -1: must be percentage points of at least 0"),
    "not a number": (
        ("--max-wer-increase", "nan"),
        2,
        "--max-wer-increase nan: must be percentage points of at least 0",
    ),
    "folder": (("--output", "OUT/no/x.onnx"), 5, "OUT/no/x.onnx: the folder OUT/no does not exist; make it first"),
    "itself": (("--output", "IN/float.onnx"), 2, "IN/float.onnx: is the model itself; give another output"),
    "manifest": (
        ("--calibration", "IN/none.jsonl"),
        5,
        "IN/none.jsonl: cannot be read: No such file or directory; give the path of a manifest file that can be read",
    ),
    "all silent": (
        ("--calibration", "IN/gone.jsonl"),
        3,
        "manifest: no utterance can be heard (IN/none.wav: no such file; check the path); give a manifest of speech",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(folder, tmp_path, name):
    options, expected, message = BAD[name]
    nemo_manifest(folder / "gone.jsonl", {"audio_filepath": "none.wav"})
    given = [option.replace("OUT", str(tmp_path)).replace("IN", str(folder)) for option in options]
    defaults = ("--calibration", folder / "spoken.jsonl", "--output", tmp_path / "x.onnx")
    code, out, err = run("quantize", folder / "float.onnx", *defaults, *given, "--threads", 1)
    message = message.replace("OUT", str(tmp_path)).replace("IN", str(folder))
    assert (code, out, err) == (expected, "", f"jasper: error: {message}\n")
    assert not list(tmp_path.iterdir())


MODELS = {
    "int8": "is int8 already; give the float model",
    "opset": "opset 11 has no scales for each channel; export it with --opset 13 or later",
    "spectral": "is of spectral convolution; export it with direct convolution",
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_be_quantised(folder, int8, rows, tmp_path, kind):
    source = tmp_path / "source.onnx"
    graph = {
        "int8": int8[0].read_bytes,
        "opset": lambda: tiny_graph(opset=11),
        "spectral": lambda: tiny_graph(convolution="spectral"),
    }
    source.write_bytes(graph[kind]())
    with pytest.raises(ModelError, match=f"^{source}: {MODELS[kind]}$"):
        quantize(source, tmp_path / "out.onnx", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["source.onnx"]


def test_a_compiled_model(tmp_path, rows):
    (tmp_path / "model.om").write_bytes(b"om")
    with pytest.raises(ModelError, match=r"is compiled for an NPU; give the \.onnx or the checkpoint that it was"):
        quantize(tmp_path / "model.om", tmp_path / "out.onnx", rows)


def test_an_unknown_precision(tmp_path, rows):
    with pytest.raises(UsageError, match=r"^precision 'int4': choose one of int8, fp16, bf16$"):
        quantize("mini", tmp_path / "out.onnx", rows, precision="int4")


def test_the_default_output(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = nemo_manifest(folder / "one.jsonl", {"audio_filepath": "0.wav"})
    argv = ("--calibration", manifest, "--precision", "fp16", "--threads", 1)
    assert run("quantize", CHECKPOINT, *argv, "--config", CONFIG, "--output", "a.onnx")[0] == 0
    assert run("quantize", "mini", *argv)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "mini-fp16.onnx"]
