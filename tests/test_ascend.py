"""The graph that atc gets, node by node and number by number; the command line of atc; and every way in which it fails.

tests/fake_atc.py stands in for atc. What only a board can show is not tested here.
"""

import json
import os
import shlex
import time
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import fake_atc
from acl_double import AclDouble
from conftest import DATA, MODELS, read_model, read_vectors
from jasper_asr.backends.acl import AclBackend
from jasper_asr.deploy import ascend
from jasper_asr.deploy.ascend import ALLOWED_OPS, SOC_VERSIONS, check_ops, check_soc, compile_om, parse_gears
from jasper_asr.errors import CompileError, JasperError, ModelError, StorageError, UsageError
from jasper_asr.model.checkpoint import file_sha256
from jasper_asr.model.export import graph_bytes

STATIC = {"batch_size": 1, "frames": 304}
SHAPES = {
    "static_1": STATIC,
    "static_4": {"batch_size": 4, "frames": 304},
    "guide": {"batch_size": 1, "frames": 4000},
    "batch_gears": {"frames": 304},
    "time_gears": {"batch_size": 1, "max_frames": 304},
    "both_gears": {"max_frames": 304},
}


@cache
def content(name: str = "jasper_v2", opset: int = 11, **shape: int) -> bytes:
    return graph_bytes(read_model(name), opset=opset, **shape)


@cache
def session(name: str, opset: int = 11, **shape: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content(name, opset, **shape), options, providers=["CPUExecutionProvider"])


def run(name: str, feats: np.ndarray, lens: np.ndarray, **shape: int) -> tuple[np.ndarray, np.ndarray]:
    return session(name, **shape).run(["log_probs", "log_prob_lens"], {"feats": feats, "feat_lens": lens})


@pytest.fixture
def model(tmp_path) -> Path:
    """The guide's model in a folder of its own, exported for the tiny network."""
    path = tmp_path / "models" / "jasper_1batch.onnx"
    path.parent.mkdir()
    path.write_bytes(content(batch_size=1, frames=4000))
    return path


@pytest.fixture
def atc(tmp_path, monkeypatch) -> Path:
    """The stand-in, on PATH and alone there but for the shell's own tools."""
    program = fake_atc.install(tmp_path / "cann" / "compiler" / "bin")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setenv("FAKE_ATC_RECORD", str(tmp_path / "record.json"))
    return program


def recorded(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "record.json").read_text())


def write(path: Path, **shape: int) -> Path:
    path.write_bytes(content(**shape))
    return path


def error_of(call, *args, **options) -> str:
    with pytest.raises(JasperError) as caught:
        call(*args, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


class TestGraph:
    @pytest.mark.parametrize("opset", [11, 13])
    @pytest.mark.parametrize("shape", list(SHAPES))
    @pytest.mark.parametrize("name", ["jasper_v2", "quartznet"])
    def test_holds_only_what_atc_takes(self, name, shape, opset):
        model = onnx.load_from_string(content(name, opset, **SHAPES[shape]))
        onnx.checker.check_model(model, full_check=True)
        check_ops(model)
        nodes = list(model.graph.node)
        assert {node.op_type for node in nodes} <= ALLOWED_OPS
        assert len({node.name for node in nodes}) == len(nodes)
        assert all(node.name for node in nodes)
        assert model.opset_import[0].version == opset

    @pytest.mark.parametrize("shape", list(SHAPES))
    def test_masks_are_built_once_for_each_resolution(self, shape):
        model = onnx.load_from_string(content(**SHAPES[shape]))
        nodes = list(model.graph.node)
        less = [node for node in nodes if node.op_type == "Less"]
        masks = [
            node.output[0] for node in nodes if node.op_type == "Cast" and node.input[0] in {x.output[0] for x in less}
        ]
        assert len(less) == len(masks) == 2
        sources = {node.input[1] for node in nodes if node.op_type == "Mul"}
        assert sources == set(masks)
        assert sum(node.op_type == "Div" for node in nodes) == 1  # one stride, one halving

    @pytest.mark.parametrize("shape", list(SHAPES))
    def test_types_and_ranks_inside(self, shape):
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content(**SHAPES[shape])), strict_mode=True)
        known = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.output)}
        for node in model.graph.node:
            value = known[node.output[0]]
            if node.op_type == "Conv":
                assert len(value.shape.dim) == 4
            if node.op_type == "Div" or node.output[0] == "log_prob_lens":
                assert value.elem_type == TensorProto.INT32  # lengths never pass through floats
            if node.op_type == "Less":
                assert len(value.shape.dim) == 4
        assert {value.elem_type for value in known.values()} == {TensorProto.FLOAT, TensorProto.INT32, TensorProto.BOOL}

    def test_positions_are_constants_of_each_resolution(self):
        model = onnx.load_from_string(content(batch_size=1, frames=4000))
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        found = [arrays[node.input[0]] for node in model.graph.node if node.op_type == "Less"]
        for positions, length in zip(found, (4000, 2000), strict=True):
            assert positions.dtype == np.int32
            np.testing.assert_array_equal(positions, np.arange(length).reshape(1, 1, 1, length))

    @pytest.mark.parametrize("name", list(MODELS))
    @pytest.mark.parametrize("shape", ["static_4", "batch_gears", "both_gears"])
    def test_golden_batch(self, name, shape):
        golden = read_vectors(MODELS[name][0])
        log_probs, lens = run(name, golden["feats"], golden["feat_lens"], **SHAPES[shape])
        np.testing.assert_array_equal(lens, golden["log_prob_lens"])
        for row, expected, length in zip(log_probs, golden["log_probs"], lens, strict=True):
            np.testing.assert_allclose(row[:length], expected[:length], atol=1e-4)

    @pytest.mark.parametrize("name", list(MODELS))
    @pytest.mark.parametrize("shape", ["static_1", "batch_gears", "time_gears", "both_gears", "guide"])
    def test_golden_singles_whatever_stands_beyond_their_length(self, name, shape):
        golden = read_vectors(MODELS[name][0])
        size = SHAPES[shape].get("frames")
        for index in range(4):
            feats, lens = golden[f"feats_single_{index}"], golden[f"feat_lens_single_{index}"]
            frames = size or feats.shape[2]
            padded = np.full((1, 64, frames), 7.0, np.float32)
            padded[:, :, : lens[0]] = feats[:, :, : lens[0]]
            log_probs, out_lens = run(name, padded, lens, **SHAPES[shape])
            length = int(golden[f"log_prob_lens_single_{index}"][0])
            assert out_lens.tolist() == [length]
            assert log_probs.shape == (1, (frames - 1) // 2 + 1, 29)
            expected = golden[f"log_probs_single_{index}"][0, :length]
            np.testing.assert_allclose(log_probs[0, :length], expected, atol=1e-4)

    @pytest.mark.parametrize("name", ["jasper_v2", "quartznet"])
    @pytest.mark.parametrize("frames", [1, 2, 3, 16, 33, 303, 304])
    def test_masks_of_time_gears_equal_those_by_range(self, name, frames):
        rng = np.random.default_rng(frames)
        feats = rng.standard_normal((3, 64, frames)).astype(np.float32)
        lens = np.array([frames, max(1, frames // 2), 1], np.int32)
        sliced, sliced_lens = run(name, feats, lens, max_frames=304)
        ranged, ranged_lens = run(name, feats, lens)
        np.testing.assert_array_equal(sliced, ranged)
        np.testing.assert_array_equal(sliced_lens, ranged_lens)

    def test_masks_of_time_gears_ignore_the_values_that_they_are_cut_from(self):
        feats = np.random.default_rng(0).standard_normal((2, 64, 48)).astype(np.float32)
        lens = np.array([20, 48], np.int32)
        clean, _ = run("jasper_v2", feats, lens, max_frames=304)
        feats[0, :, 20:] = -1e9
        dirty, _ = run("jasper_v2", feats, lens, max_frames=304)
        np.testing.assert_array_equal(clean[0, :10], dirty[0, :10])

    def test_lengths_beyond_float16_are_exact(self):
        for length in (2047, 2049, 2051, 2052, 3999, 4000):
            _, lens = run(
                "jasper_v2", np.zeros((1, 64, 4000), np.float32), np.array([length], np.int32), **SHAPES["guide"]
            )
            assert lens.tolist() == [(length - 1) // 2 + 1]


def test_allowed_ops_are_those_of_the_contract():
    forbidden = {"Where", "Expand", "Range", "Shape", "ConstantOfShape", "NonZero", "BatchNormalization", "Identity"}
    assert not ALLOWED_OPS & forbidden
    assert len(ALLOWED_OPS) == 13


class TestCheckOps:
    def test_lists_each_node_of_a_graph_with_open_frames(self):
        model = onnx.load_from_string(content())
        names = [node.name for node in model.graph.node if node.op_type in ("Shape", "Gather", "Range")]
        assert len(names) == 6
        listed = ", ".join(f"{name} ({name.split('_')[0]} is not allowed)" for name in names)
        assert error_of(check_ops, model, "m.onnx") == (
            f"ModelError: m.onnx: 6 nodes that atc cannot take: {listed}; make it with jasper export --target ascend"
        )

    @pytest.mark.parametrize(
        ("node", "offence"),
        [
            (helper.make_node("BatchNormalization", ["x"] * 5, ["y"], name="n"), "BatchNormalization is not allowed"),
            (helper.make_node("Identity", ["x"], ["y"], name="n"), "Identity is not allowed"),
            (helper.make_node("Conv", ["x", "w3"], ["y"], name="n"), "Conv without constant 4-D weights"),
            (helper.make_node("Conv", ["x", "x"], ["y"], name="n"), "Conv without constant 4-D weights"),
            (helper.make_node("LogSoftmax", ["x"], ["y"], name="n"), "LogSoftmax without axis"),
            (helper.make_node("Transpose", ["x"], ["y"], name="n"), "Transpose without perm"),
            (helper.make_node("Squeeze", ["x"], ["y"], name="n"), "Squeeze without constant axes"),
            (helper.make_node("Unsqueeze", ["x", "x"], ["y"], name="n"), "Unsqueeze without constant axes"),
            (helper.make_node("Slice", ["x", "i", "x"], ["y"], name="n"), "Slice with bounds that are not constant"),
            (helper.make_node("Relu", ["x"], ["y"], name="n", domain="com.odd"), "com.odd.Relu is not an ONNX op"),
        ],
    )
    def test_finds_one_bad_node(self, node, offence):
        model = onnx.load_from_string(content(**STATIC))
        model.graph.initializer.append(helper.make_tensor("w3", TensorProto.FLOAT, [1, 1, 1], [1.0]))
        model.graph.initializer.append(helper.make_tensor("i", TensorProto.INT64, [1], [0]))
        model.graph.node.insert(5, node)
        assert error_of(check_ops, model, "m.onnx") == (
            f"ModelError: m.onnx: 1 nodes that atc cannot take: n ({offence}); "
            "make it with jasper export --target ascend"
        )

    def test_names_a_nameless_node_by_its_output(self):
        model = onnx.load_from_string(content(**STATIC))
        model.graph.node.append(helper.make_node("Shape", ["feats"], ["its_shape"]))
        assert "its_shape (Shape is not allowed)" in error_of(check_ops, model)


class TestExport:
    def export(self, out: Path, **options) -> str:
        config = read_model("jasper_v2").config
        return ascend.export_for_ascend(DATA / "jasper_tiny_v2.pt", out, config=config, **options)

    def test_default_is_the_guides_model(self, tmp_path):
        out = tmp_path / "jasper_1batch.onnx"
        assert "opset 11, feats [1, 64, 4000]" in self.export(out)
        model = onnx.load(out)
        shapes = [[size.dim_value for size in value.type.tensor_type.shape.dim] for value in model.graph.input]
        assert shapes == [[1, 64, 4000], [1]]
        assert [value.name for value in model.graph.input] == ["feats", "feat_lens"]
        assert [value.name for value in model.graph.output] == ["log_probs", "log_prob_lens"]
        assert [size.dim_value for size in model.graph.output[0].type.tensor_type.shape.dim] == [1, 2000, 29]
        assert "max_frames" not in {entry.key for entry in model.metadata_props}

    @pytest.mark.parametrize("batch_size", [4, 8, 16])
    def test_other_batches_also_give_the_lengths_their_size(self, tmp_path, batch_size):
        self.export(tmp_path / "m.onnx", batch_size=batch_size, frames=1024)
        model = onnx.load(tmp_path / "m.onnx")
        shapes = [[size.dim_value for size in value.type.tensor_type.shape.dim] for value in model.graph.input]
        assert shapes == [[batch_size, 64, 1024], [batch_size]]

    def test_open_frames_carry_their_bound(self, tmp_path):
        self.export(tmp_path / "m.onnx", batch_size=None, frames=None, max_frames=3200, opset=13)
        model = onnx.load(tmp_path / "m.onnx")
        assert {entry.key: entry.value for entry in model.metadata_props}["max_frames"] == "3200"
        check_ops(model)

    @pytest.mark.parametrize("opset", [10, 14])
    def test_refuses_an_opset(self, tmp_path, opset):
        assert error_of(self.export, tmp_path / "m.onnx", opset=opset) == (
            f"UsageError: opset {opset}: Ascend takes 11 to 13; 11 is right everywhere"
        )
        assert not list(tmp_path.iterdir())

    def test_a_refused_graph_is_not_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ascend, "ALLOWED_OPS", ALLOWED_OPS - {"Relu"})
        message = error_of(self.export, tmp_path / "m.onnx")
        assert message.startswith(f"ModelError: {tmp_path / 'm.onnx'}: ")
        assert message.count("(Relu is not allowed)") == 10
        assert not list(tmp_path.iterdir())


def guide_argv(model="jasper_1batch.onnx", output="jasper_1batch") -> list[str]:
    return [
        "atc",
        f"--model={model}",
        "--framework=5",
        "--input_format=ND",
        "--input_shape=feats:1,64,4000;feat_lens:1",
        f"--output={output}",
        "--soc_version=Ascend310",
        "--output_type=FP32",
        "--log=error",
    ]


class TestCommand:
    """Dry runs: they need no atc."""

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", "/nowhere")

    def dry(self, path: str, **options) -> list[str]:
        before = sorted(Path.cwd().iterdir())
        report = compile_om(path, **({"soc": "Ascend310"} | options), dry_run=True)
        assert sorted(Path.cwd().iterdir()) == before
        assert report.om is report.sidecar is report.atc_version is None
        if not options.get("keep_fp32"):
            assert shlex.split(report.shell) == list(report.command)
        return list(report.command)

    def test_static_is_the_guides_command(self):
        write(Path("jasper_1batch.onnx"), batch_size=1, frames=4000)
        assert self.dry("jasper_1batch.onnx") == guide_argv()

    def test_batch_gears(self):
        write(Path("m.onnx"), frames=4000)
        argv = self.dry("m.onnx", gears=[16, 1, 8, 4])
        assert argv[4:6] == ["--input_shape=feats:-1,64,4000;feat_lens:-1", "--dynamic_batch_size=1,4,8,16"]

    def test_gears_of_both(self):
        write(Path("m.onnx"), max_frames=4000)
        argv = self.dry("m.onnx", gears=[(1, 1024), (1, 2048), (16, 4000)])
        shape = "--input_shape=feats:-1,64,-1;feat_lens:-1"
        assert argv[3:6] == ["--input_format=ND", shape, "--dynamic_dims=1,1024,1;1,2048,1;16,4000,16"]

    def test_time_gears_name_only_open_sizes(self):
        write(Path("m.onnx"), batch_size=4, max_frames=4000)
        argv = self.dry("m.onnx", gears=[4000, 1024])
        assert argv[4:6] == ["--input_shape=feats:4,64,-1;feat_lens:4", "--dynamic_dims=1024;4000"]

    @pytest.mark.parametrize(
        ("precision", "option"),
        [
            ("mixed_float16", "--precision_mode_v2=mixed_float16"),
            ("origin", "--precision_mode_v2=origin"),
            ("fp16", "--precision_mode_v2=fp16"),
            ("cube_fp16in_fp32out", "--precision_mode_v2=cube_fp16in_fp32out"),
            ("force_fp16", "--precision_mode=force_fp16"),
            ("allow_fp32_to_fp16", "--precision_mode=allow_fp32_to_fp16"),
            ("allow_mix_precision", "--precision_mode=allow_mix_precision"),
            ("must_keep_origin_dtype", "--precision_mode=must_keep_origin_dtype"),
        ],
    )
    def test_precision_is_one_of_two_options(self, precision, option):
        write(Path("m.onnx"), **STATIC)
        argv = self.dry("m.onnx", precision=precision)
        assert [part for part in argv if "precision" in part] == [option]

    def test_keep_fp32_is_a_file_beside_the_output(self):
        write(Path("m.onnx"), **STATIC)
        keep = ["LogSoftmaxV2", "LogSoftmax", "OpType::ReduceMean", "Div_7"]
        report = compile_om("m.onnx", soc="Ascend310", precision="mixed_float16", keep_fp32=keep, dry_run=True)
        assert "--keep_dtype=m.keep_dtype.cfg" in report.command
        lines = "OpType::LogSoftmaxV2 OpType::LogSoftmaxV2 OpType::ReduceMean Div_7"
        assert report.shell.startswith(f"printf '%s\\n' {lines} > m.keep_dtype.cfg && atc --model=m.onnx ")

    def test_keep_fp32_complaints(self):
        write(Path("m.onnx"), **STATIC)
        assert error_of(self.dry, "m.onnx", precision="fp16", keep_fp32=["Conv_999"]) == (
            "UsageError: keep-fp32 'Conv_999': no such node; give a node's name or an op type such as LogSoftmaxV2"
        )
        for precision in (None, "origin", "must_keep_origin_dtype"):
            assert error_of(self.dry, "m.onnx", precision=precision, keep_fp32=["Conv2D"]) == (
                "UsageError: keep-fp32 works only with a precision that lowers the others, such as mixed_float16"
            )

    def test_output_and_quoting(self):
        folder = Path("mine & yours 模型")
        folder.mkdir()
        write(folder / "it's.onnx", **STATIC)
        report = compile_om(folder / "it's.onnx", soc="Ascend310P3", out=folder / "x.y.om", dry_run=True)
        assert f"--output={folder}/x.y" in report.command
        assert shlex.split(report.shell) == list(report.command)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"out": Path("m.bin")}, "UsageError: m.bin: the output must end in .om"),
            (
                {"precision": "fp61"},
                "UsageError: precision 'fp61': choose fp16, origin, cube_fp16in_fp32out, mixed_float16, force_fp16, "
                "allow_fp32_to_fp16, allow_mix_precision, must_keep_origin_dtype",
            ),
            (
                {"gears": [1024, 2048]},
                "UsageError: m.onnx: feats is fixed to [1, 64, 304]; leave --gears out, or export open sizes",
            ),
        ],
    )
    def test_refuses_options(self, options, message):
        write(Path("m.onnx"), **STATIC)
        assert error_of(self.dry, "m.onnx", **options) == message

    @pytest.mark.parametrize(
        ("shape", "gears", "message"),
        [
            ({"frames": 304}, None, "feats is [-1, 64, 304]; its open sizes (-1) need --gears"),
            ({"frames": 304}, [4], "1 gears, 1 of them different; give 2 to 100 different ones"),
            ({"frames": 304}, [4, 4, 8], "3 gears, 2 of them different; give 2 to 100 different ones"),
            ({"frames": 304}, range(1, 102), "101 gears, 101 of them different; give 2 to 100 different ones"),
            ({"frames": 304}, [0, 4], "a gear must be at least 1"),
            ({"frames": 304}, [(1, 304), (4, 304)], "feats is [-1, 64, 304]; each gear must be a plain number"),
            (
                {"max_frames": 304},
                [160, 304],
                "feats is [-1, 64, -1]; each gear must be BATCHxFRAMES such as 1x1024",
            ),
            (
                {"batch_size": 1, "max_frames": 304},
                [160, 320],
                "was exported for up to 304 frames, a gear asks for 320",
            ),
        ],
    )
    def test_refuses_gears(self, shape, gears, message):
        write(Path("m.onnx"), **shape)
        assert error_of(self.dry, "m.onnx", gears=gears) == f"UsageError: m.onnx: {message}"

    def test_opset_has_a_limit_for_each_chip(self):
        Path("m.onnx").write_bytes(content(opset=14, **STATIC))
        assert self.dry("m.onnx", soc="Ascend310P3")
        assert error_of(self.dry, "m.onnx") == (
            "ModelError: m.onnx: opset 14, Ascend310 takes up to 13; export it with --opset 11"
        )
        Path("m.onnx").write_bytes(content(opset=19, **STATIC))
        assert error_of(self.dry, "m.onnx", soc="Ascend910B3") == (
            "ModelError: m.onnx: opset 19, Ascend910B3 takes up to 18; export it with --opset 11"
        )

    def test_refuses_other_models(self):
        assert error_of(self.dry, "none.onnx") == (
            "StorageError: none.onnx: cannot read it (no such file or directory); check the path"
        )
        Path("m.onnx").write_bytes(b"not a model at all")
        assert error_of(self.dry, "m.onnx").startswith("ModelError: m.onnx: not an ONNX model (")
        model = onnx.load_from_string(content(**STATIC))
        del model.metadata_props[:]
        Path("m.onnx").write_bytes(model.SerializeToString())
        assert error_of(self.dry, "m.onnx") == (
            "ModelError: m.onnx: carries no jasper config in its metadata; make it with jasper export"
        )
        model = onnx.load_from_string(content(**STATIC))
        model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 2  # the guide's own slip, the other way round
        Path("m.onnx").write_bytes(model.SerializeToString())
        assert error_of(self.dry, "m.onnx") == (
            "ModelError: m.onnx: inputs are {'feats': [1, 64, 304], 'feat_lens': [2]}, not feats [B, F, T] and "
            "feat_lens [B]; export it again"
        )
        Path("m.onnx").write_bytes(content())
        assert error_of(self.dry, "m.onnx", gears=[(1, 16), (1, 32)]).startswith(
            "ModelError: m.onnx: 6 nodes that atc "
        )


class TestGearsText:
    def test_reads_sizes_and_pairs(self):
        assert parse_gears("1024,2048, 4000") == [1024, 2048, 4000]
        assert parse_gears("1x1024,16 x 4000") == [(1, 1024), (16, 4000)]

    @pytest.mark.parametrize(("text", "part"), [("", ""), ("1,", ""), ("1x2x3", "1x2x3"), ("-1,4", "-1"), ("１", "１")])
    def test_refuses_the_rest(self, text, part):
        assert error_of(parse_gears, text) == (
            f"UsageError: gears {text!r}: {part!r} is no gear; give 1024,2048 or 1x1024,16x4000"
        )


class TestSoc:
    def test_takes_each_known_name(self):
        for name in SOC_VERSIONS:
            check_soc(name)
        assert len(SOC_VERSIONS) == 25

    @pytest.mark.parametrize("family", ["910B", "Ascend910B", "ascend910b"])
    def test_a_bare_910b_gets_a_hint(self, family):
        assert error_of(check_soc, family) == (
            f"UsageError: soc {family!r}: names a family; choose Ascend910B1, Ascend910B2, Ascend910B2C, Ascend910B3, "
            'Ascend910B4, Ascend910B4-1 (it is "Ascend" and the Name that npu-smi info prints)'
        )

    @pytest.mark.parametrize(
        ("wrong", "right"), [("ascend310p3", "Ascend310P3"), ("310P3", "Ascend310P3"), ("310", "Ascend310")]
    )
    def test_case_and_prefix(self, wrong, right):
        assert error_of(check_soc, wrong) == f"UsageError: soc {wrong!r}: write it {right}"

    def test_near_and_far_misses(self):
        assert "did you mean Ascend310P3 or Ascend310P" in error_of(check_soc, "Ascend310P33")
        for name in ("", "Ascend", "V100"):
            assert f"soc {name!r}: unknown; choose Ascend310, Ascend310P1" in error_of(check_soc, name)


class TestFindAtc:
    def test_without_it_the_error_gives_the_command(self, model, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
        output = model.with_suffix("")
        command = shlex.join(guide_argv(str(model), str(output)))
        assert error_of(compile_om, model, soc="Ascend310") == (
            f"CompileError: {model}: atc is not installed here; install the CANN toolkit and source its set_env.sh, "
            f"or run this where it is: {command}"
        )
        assert CompileError.exit_code == 4

    @pytest.mark.parametrize("folder", ["compiler/bin", "bin"])
    def test_under_the_toolkit(self, tmp_path, model, monkeypatch, folder):
        monkeypatch.setenv("FAKE_ATC", "quick")
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path / "toolkit"))
        fake_atc.install(tmp_path / "toolkit" / folder)
        assert compile_om(model, soc="Ascend310").om == model.with_suffix(".om")

    def test_given_by_its_path(self, tmp_path, model, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "quick")
        monkeypatch.chdir(tmp_path)
        fake_atc.install(Path("else where"), "my atc")
        assert compile_om(model, soc="Ascend310", atc="else where/my atc").om == model.with_suffix(".om")
        assert error_of(compile_om, model, soc="Ascend310", atc="none/atc") == (
            "CompileError: none/atc: no such program; give the path of atc, or leave it out"
        )

    def test_that_is_no_program(self, tmp_path, model):
        broken = tmp_path / "atc"
        broken.write_bytes(b"\x7fELF of another machine")
        broken.chmod(0o755)
        assert error_of(compile_om, model, soc="Ascend310", atc=broken) == (
            f"CompileError: {broken}: cannot be run (exec format error); install the CANN toolkit again"
        )


class TestCompile:
    def test_writes_model_and_sidecar_and_nothing_else(self, tmp_path, model, atc, monkeypatch):
        (atc.parents[1] / "version.info").write_text("package_name=compiler\nVersion=7.3.0.1.231:8.0.RC2\n")
        monkeypatch.chdir(tmp_path)
        lines: list[str] = []
        report = compile_om("models/jasper_1batch.onnx", soc="Ascend310", progress=lines.append)
        assert lines == ["ATC start working now, please wait for a moment.", fake_atc.SUCCESS]
        assert report.om == Path("models/jasper_1batch.om")
        assert report.command == tuple(guide_argv("models/jasper_1batch.onnx", "models/jasper_1batch"))
        assert 0 < report.seconds < 60
        assert sorted(path.name for path in model.parent.iterdir()) == [
            "jasper_1batch.json",
            "jasper_1batch.om",
            "jasper_1batch.onnx",
        ]
        assert not (tmp_path / "kernel_meta").exists()  # atc's litter
        sidecar = json.loads(report.sidecar.read_text(encoding="utf-8"))
        assert sidecar == {
            "format": "jasper-asr om sidecar",
            "version": 1,
            "config": read_model("jasper_v2").config.raw,
            "masked": True,
            "inputs": [{"name": "feats", "shape": [1, 64, 4000]}, {"name": "feat_lens", "shape": [1]}],
            "gears": None,
            "onnx": "jasper_1batch.onnx",
            "onnx_sha256": file_sha256(model),
            "soc_version": "Ascend310",
            "atc_version": "7.3.0.1.231:8.0.RC2",
            "command": guide_argv("models/jasper_1batch.onnx", "models/jasper_1batch"),
        }
        # what ran is the guide's command, in a folder that is gone
        assert recorded(tmp_path)["argv"] == guide_argv(str(model), "jasper_1batch")[1:]
        assert Path(recorded(tmp_path)["cwd"]).parent == model.parent
        made = json.loads(report.om.read_text())
        assert (made["kind"], made["onnx"]) == ("static", str(model))

    def test_batch_gears(self, tmp_path, atc):
        report = compile_om(write(tmp_path / "m.onnx", frames=304), soc="Ascend310P3", gears=[4, 1])
        assert report.gears == json.loads(report.sidecar.read_text())["gears"] == {"batch": [1, 4]}
        made = json.loads(report.om.read_text())
        assert made["kind"] == "batch"
        assert [gear["inputs"] for gear in made["gears"]] == [[[1, 64, 304], [1]], [[4, 64, 304], [4]]]

    @pytest.mark.parametrize(
        ("shape", "gears", "dims"),
        [
            ({"batch_size": 1}, [160, 304], [[1, 64, 160, 1], [1, 64, 304, 1]]),
            ({"batch_size": 4}, [160, 304], [[4, 64, 160, 4], [4, 64, 304, 4]]),
            ({}, [(16, 304), (1, 160)], [[1, 64, 160, 1], [16, 64, 304, 16]]),
        ],
    )
    def test_time_gears(self, tmp_path, atc, shape, gears, dims):
        path = write(tmp_path / "m.onnx", max_frames=304, **shape)
        report = compile_om(path, soc="Ascend910B3", gears=gears)
        assert report.gears == json.loads(report.sidecar.read_text())["gears"] == {"dims": dims}
        made = json.loads(report.om.read_text())
        assert made["kind"] == "dims"
        assert [[*feats, *lens] for feats, lens in (gear["inputs"] for gear in made["gears"])] == dims

    def test_precision_and_its_file(self, tmp_path, model, atc):
        report = compile_om(
            model, soc="Ascend310P3", precision="mixed_float16", keep_fp32=["LogSoftmax"], out=tmp_path / "o.om"
        )
        assert (tmp_path / "o.keep_dtype.cfg").read_text() == "OpType::LogSoftmaxV2\n"
        assert f"--keep_dtype={tmp_path / 'o.keep_dtype.cfg'}" in report.command
        assert "--keep_dtype=o.keep_dtype.cfg" in recorded(tmp_path)["argv"]

    def test_a_suffix_of_the_file_is_reported(self, model, atc, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "suffix")
        report = compile_om(model, soc="Ascend310")
        assert report.om == model.with_name("jasper_1batch_linux_x86_64.om")
        assert report.sidecar == model.with_name("jasper_1batch_linux_x86_64.json")
        assert report.om.is_file()
        assert report.sidecar.is_file()
        assert not model.with_suffix(".om").exists()

    @pytest.mark.parametrize(
        ("folder", "name"),
        [("with space", "模型-1.0"), ("müller", "m"), ("模型", "größe"), ("quote'$(x);&", "jasper 1")],
    )
    def test_any_path(self, tmp_path, atc, folder, name):
        (tmp_path / folder).mkdir()
        path = write(tmp_path / folder / f"{name}.onnx", **STATIC)
        report = compile_om(path, soc="Ascend310", precision="fp16", keep_fp32=["Conv2D"])  # refuses odd paths
        assert report.om == tmp_path / folder / f"{name}.om"
        assert json.loads(report.om.read_text())["onnx"] == str(path)
        assert json.loads(report.sidecar.read_text(encoding="utf-8"))["onnx"] == f"{name}.onnx"
        names = {f"{name}{end}" for end in (".onnx", ".om", ".json", ".keep_dtype.cfg")}
        assert {found.name for found in (tmp_path / folder).iterdir()} == names

    def test_bytes_that_are_no_text_do_no_harm(self, model, atc, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "not_text")
        lines: list[str] = []
        assert compile_om(model, soc="Ascend310", progress=lines.append).om
        assert lines[1] == "\ufffd\ufffd \ufffd broken"

    def test_ten_megabytes_of_lines(self, model, atc, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "flood")
        size = 0

        def count(line: str) -> None:
            nonlocal size
            size += len(line) + 1

        assert compile_om(model, soc="Ascend310", progress=count).om
        assert size > 10_000_000

    def test_ten_megabytes_without_an_end(self, model, atc, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "long_line")
        lines: list[str] = []
        assert compile_om(model, soc="Ascend310", progress=lines.append).om
        assert sum(line.count(".") for line in lines[1:-1]) >= 10_000_000
        assert max(map(len, lines)) <= 1 << 17

    def test_a_child_left_behind_is_ended(self, model, atc, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "orphan")
        lines: list[str] = []
        started = time.monotonic()
        assert compile_om(model, soc="Ascend310", progress=lines.append).om
        assert time.monotonic() - started < 20
        assert gone(int(lines[-1].removeprefix("child ")))

    @pytest.mark.parametrize(
        ("shape", "gears"),
        [
            ({"batch_size": 4, "frames": 304}, None),
            ({"frames": 304}, [1, 4]),
            ({"batch_size": 4, "max_frames": 304}, [160, 304]),
            ({"max_frames": 304}, [(1, 160), (4, 304)]),
        ],
    )
    def test_the_backend_runs_what_was_compiled(self, tmp_path, atc, shape, gears):
        report = compile_om(write(tmp_path / "m.onnx", **shape), soc="Ascend310P3", gears=gears)
        golden = read_vectors("jasper_tiny")
        with AclDouble():
            backend = AclBackend(report.om)
            log_probs, lens = backend.run(golden["feats"], golden["feat_lens"])
            backend.close()
        assert lens.dtype == np.int32
        np.testing.assert_array_equal(lens, golden["log_prob_lens"])
        for row, expected, length in zip(log_probs, golden["log_probs"], lens, strict=True):
            np.testing.assert_allclose(row[:length], expected[:length], atol=1e-4)


def gone(pid: int) -> bool:
    """Whether a process is no more, or soon: it may wait a moment to be reaped."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.1)
    return False


FAILURES = {
    "E10001": "atc failed with E10001, an option has a bad value: Value [Ascend999] for parameter [soc_version] is "
    "invalid; check --soc and the precision against this CANN version; CANN 8.3 and later know no Ascend310",
    "E10002": "atc failed with E10002, it cannot parse the input shape: Value [feats] for parameter [--input_shape] is "
    "invalid. Reason: it is not name:dims; export the model again with jasper export --target ascend",
    "E10016": "atc failed with E10016, a name is not in the model: Opname [wrong] specified in [--input_shape] is not "
    "found in the model; export the model again, or mend --keep-fp32",
    "E10040": "atc failed with E10040, the gears do not fit the model: The dimension count in [--dynamic_dims] must "
    "match the -1 dims of [--input_shape]; give 2 to 100 gears for the sizes that are open",
    "E10041": "atc failed with E10041, it cannot load the model: Failed to load the model from [jasper.onnx]; export "
    "it again; check the file's rights and the free memory",
    "E10045": "atc failed with E10045, the gears do not fit the model: The number of gears is not within 2 to 100; "
    "give 2 to 100 gears for the sizes that are open",
    "E10501": "atc failed with E10501, its environment is not set: The environment variable ASCEND_OPP_PATH is not "
    "set; source set_env.sh of the CANN toolkit first (ASCEND_OPP_PATH)",
    "E13010": "atc failed with E13010, its environment is not set: Failed to get the path of the operator package; "
    "source set_env.sh of the CANN toolkit first (ASCEND_OPP_PATH)",
    "E16002": "atc failed with E16002, it has no parser for an op at this opset: No parser is registered for Op "
    "[Range_5, optype ai.onnx::14::Range]; export with --target ascend --opset 11",
    "E19999": "atc failed with E19999, an internal error: Inner Error!; run the command by hand with --log=info and "
    "read its log",
    "EZ9999": "atc failed with EZ9999, an internal error: Inner Error!; run the command by hand with --log=info and "
    "read its log",
    "E20001": "atc failed with E20001, an error: Failed to compile Op [Slice_4]; the vendor's words for the cure",
    "killed": "atc was killed by SIGKILL; usually for memory: compile where there is more, or with fewer gears",
    "segfault": "atc was killed by SIGSEGV; usually for memory: compile where there is more, or with fewer gears",
    "silent": "atc failed with exit code 255 (its last words: ATC start working now, please wait for a moment.); run "
    "it by hand with --log=info",
    "no_success": "atc ended without reporting success (its last words: ATC start working now, please wait for a "
    "moment.); run it by hand with --log=info",
    "no_file": "atc reported success but wrote no .om; check the space on the disk and run it again",
    "empty_file": "atc reported success but wrote no .om; check the space on the disk and run it again",
    "hang": "atc did not finish within 2 s and was stopped; give it more time",
}


class TestFailure:
    @pytest.mark.parametrize("mode", list(FAILURES))
    def test_says_why_and_leaves_nothing(self, model, atc, monkeypatch, mode):
        monkeypatch.setenv("FAKE_ATC", mode)
        timeout = 2 if mode == "hang" else 60
        message = error_of(
            compile_om, model, soc="Ascend310", timeout=timeout, precision="fp16", keep_fp32=["LogSoftmaxV2"]
        )
        assert message == f"CompileError: {model}: {FAILURES[mode]}"
        assert [path.name for path in model.parent.iterdir()] == [model.name]

    @pytest.mark.parametrize("mode", ["E10001", "no_file", "no_success", "killed"])
    def test_leaves_what_was_there(self, model, atc, monkeypatch, mode):
        old = {model.with_suffix(end): f"old {end}" for end in (".om", ".json")}
        for path, text in old.items():
            path.write_text(text)
        monkeypatch.setenv("FAKE_ATC", mode)
        with pytest.raises(CompileError):
            compile_om(model, soc="Ascend310")
        assert {path: path.read_text() for path in old} == old
        assert len(list(model.parent.iterdir())) == 3

    def test_a_timeout_ends_the_whole_group(self, model, atc, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "child")
        lines: list[str] = []
        with pytest.raises(CompileError, match="did not finish within 3 s"):
            compile_om(model, soc="Ascend310", timeout=3, progress=lines.append)
        ids = [int(word) for word in lines[-1].split()[1:]]
        assert len(ids) == 2
        assert all(gone(pid) for pid in ids)
        assert [path.name for path in model.parent.iterdir()] == [model.name]

    def test_an_interruption_ends_the_whole_group(self, model, atc, monkeypatch):
        monkeypatch.setenv("FAKE_ATC", "child")
        ids: list[int] = []

        def interrupt(line: str) -> None:
            if line.startswith("ids"):
                ids.extend(int(word) for word in line.split()[1:])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compile_om(model, soc="Ascend310", progress=interrupt)
        assert len(ids) == 2
        assert all(gone(pid) for pid in ids)
        assert [path.name for path in model.parent.iterdir()] == [model.name]

    def test_no_folder_for_the_output(self, tmp_path, model, atc):
        assert error_of(compile_om, model, soc="Ascend310", out=tmp_path / "none" / "m.om") == (
            f"StorageError: {tmp_path}/none/m.om: no such folder; create it first"
        )

    def test_errors_are_their_kinds(self):
        assert issubclass(CompileError, RuntimeError)
        assert issubclass(ModelError, ValueError)
        assert issubclass(UsageError, ValueError)
        assert issubclass(StorageError, OSError)
