"""Figures only for models that are right: faults are injected, clocks are faked, formats are parsed as scripts do."""

import json
import re
import struct
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from acl_double import AclDouble, write_om
from helpers_audio import CHECKPOINT, CONFIG, made_up, run, tiny_config, write_model
from jasper_asr import benchmark as benchmarks
from jasper_asr.backends import BACKENDS, Shapes, acl, open_backend
from jasper_asr.backends.ort import OrtBackend
from jasper_asr.benchmark import Engine, Rounds, Workload, benchmark, compare, formats, gemm_peak, macs, subject
from jasper_asr.benchmark.report import BenchReport, Check, Copies
from jasper_asr.config import builtin_config, load_config
from jasper_asr.errors import JasperError, ModelError, UsageError
from jasper_asr.model.checkpoint import block_layers, file_sha256, random_weights
from jasper_asr.model.graph import build_graph
from test_acl import write_sidecar

QUICK = Workload(seconds=2.0, rounds=3, warmup=1)
FRAMES = 304
GEARS = {
    "static": ({"batch_size": 2, "frames": FRAMES}, [(2, FRAMES)]),
    "batch": ({"frames": FRAMES}, [(1, FRAMES), (4, FRAMES)]),
    "dims": ({"max_frames": FRAMES}, [(1, 160), (4, FRAMES)]),
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(benchmarks, "_SETTLE", 0)
    monkeypatch.setattr(acl, "_PROCESS", acl._Process())
    monkeypatch.setattr(benchmarks, "gemm_peak", lambda: 1e9)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("benchmark") / "tiny.onnx")


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but for those who call `clock.spend(seconds)`."""
    now = SimpleNamespace(seconds=100.0)
    now.spend = lambda seconds: setattr(now, "seconds", now.seconds + seconds)
    monkeypatch.setattr(subject, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def make_om(folder, kind="static", stem="x", right=None, **options):
    """A fake .om whose ONNX (`right`, for the sidecar) lies beside it."""
    shape, gears = GEARS[kind]
    path = write_model(folder / f"{stem}.onnx", **shape)
    om = write_om(folder / f"{stem}.om", path, gears, kind, **options)
    return write_sidecar(om, kind, gears, onnx_sha256=file_sha256(right or path))


class Broken:
    """onnxruntime with a fault; `open_backend` finds it here by name."""

    fault = staticmethod(lambda log_probs, lens, call: (log_probs, lens))
    split = None
    on_run = staticmethod(lambda name, call: None)
    name = "broken"

    def __init__(self, model, *, threads=None):
        self._inner = OrtBackend(model, threads=1)
        self.config, self.shapes = self._inner.config, self._inner.shapes
        self._calls = count(1)
        self.last_split = self.split

    def run(self, feats, lens):
        call = next(self._calls)
        self.on_run(self.name, call)
        log_probs, out_lens = self._inner.run(feats, lens)
        return self.fault(log_probs.copy(), out_lens.copy(), call)

    def close(self):
        self._inner.close()


class Other(Broken):
    name = "other"


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(BACKENDS, "broken", f"{__name__}:Broken")
    monkeypatch.setitem(BACKENDS, "other", f"{__name__}:Other")

    def set_fault(fault):
        monkeypatch.setattr(Broken, "fault", staticmethod(fault))

    return set_fault


# --- counting ---------------------------------------------------------------------


def test_macs_of_a_network_counted_by_hand():
    config = tiny_config()
    rows = [(b.filters, b.repeat, b.kernel_size, b.stride, b.residual) for b in config.blocks]
    assert rows[0][3] == 2  # halves the frames
    frames, channels, panes, total = 101, 64, [], 0
    for filters, repeat, kernel, stride, residual in rows:
        if residual:
            panes.append(channels)
            total += sum(51 * filters * pane for pane in panes)
        for _ in range(repeat):
            frames = 51 if stride == 2 else frames
            total += frames * filters * channels * kernel
            channels = filters
    total += 51 * 29 * channels
    assert macs(config, 101) == total
    assert macs(config, 1) == pytest.approx(total / 51)


@pytest.mark.parametrize("stem", ["jasper_tiny", "quartznet_tiny"])
def test_macs_are_those_that_torch_does(data, stem):
    torch = pytest.importorskip("torch")
    from jasper_asr.model.net import Jasper

    config = load_config(data / f"{stem}.yaml")
    net, done = Jasper(config).eval(), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(lambda conv, _, out: done.append(out.numel() * conv.weight[0].numel()))
    net(torch.zeros(1, 64, 203), torch.tensor([203], dtype=torch.int32))
    assert macs(config, 203) == sum(done)
    assert len(done) == 1 + sum(len(row.residuals) + sum(map(len, row.repeats)) for row in block_layers(config))


def test_macs_of_jasper_10x5():
    assert macs(builtin_config("jasper10x5dr"), 700) == pytest.approx(116e9, rel=0.01)


def test_gemm_peak_is_that_of_the_best_round(monkeypatch):
    ticks = iter([0.0, 0.5, 1.0, 1.125, 2.0, 2.25])  # products that take 0.5, 0.125 and 0.25 s
    monkeypatch.setattr(benchmarks, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert gemm_peak(size=128, rounds=3) == 128**3 / 0.125


def test_rounds():
    rounds = Rounds(tuple(np.arange(1, 102) / 100))  # 0.01 to 1.01
    assert rounds.as_dict() == pytest.approx(
        {"min": 0.01, "mean": 0.51, "median": 0.51, "p10": 0.11, "p90": 0.91, "p99": 1.0, "max": 1.01}
    )
    assert Rounds((3.0,)).as_dict() == dict.fromkeys(["min", "mean", "median", "p10", "p90", "p99", "max"], 3.0)


# --- what is asked for ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "engine"),
    [
        ("ort", Engine("ort")),
        ("openvino:bf16:spectral", Engine("openvino", "bf16", "spectral")),
        ("openvino:spectral:bf16", Engine("openvino", "bf16", "spectral")),
        ("ort:spectral", Engine("ort", None, "spectral")),
    ],
)
def test_engines(text, engine):
    assert Engine.parse(text) == engine
    assert Engine.parse(str(engine)) == engine


@pytest.mark.parametrize("text", ["ort:fp99", "ort:f32:bf16", "ort::"])
def test_engines_that_are_none(text):
    with pytest.raises(UsageError) as caught:
        Engine.parse(text)
    assert str(caught.value) == (
        f"engine {text!r}: write backend[:precision][:convolution], from f32, f16, bf16, int8, auto, direct, spectral"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 1, "seconds": 1.0}, "give frames or seconds, not both"),
        ({"batch_size": 0}, "batch size 0: must be at least 1"),
        ({"rounds": 0}, "rounds 0: must be at least 1"),
        ({"warmup": -1}, "warmup -1: must be at least 0"),
        ({"seconds": float("nan")}, "seconds nan: must be a number above 0"),
    ],
)
def test_workloads_that_are_none(options, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        Workload(**options)


@pytest.mark.parametrize(
    ("shapes", "asked", "fitted"),
    [
        (Shapes(None, None, True), (None, 500), (1, 500)),
        (Shapes(None, None, True), (7, 500), (7, 500)),
        (Shapes(4, 304, True), (None, 304), (4, 304)),
        (Shapes(4, 304, True), (4, 200), (4, 304)),
        (Shapes(4, 304, True, ((1, 160), (4, 304))), (None, 150), (1, 160)),
        (Shapes(4, 304, True, ((1, 160), (4, 304))), (None, 161), (4, 304)),
    ],
)
def test_sizes(shapes, asked, fitted):
    assert subject._fit("x", shapes, *asked) == fitted


@pytest.mark.parametrize(
    ("shapes", "asked", "message"),
    [
        (Shapes(4, 304, True), (None, 305), "x: takes 304 frames, not 305; leave the length out"),
        (Shapes(4, 304, False), (None, 303), "x: takes 304 frames, not 303; leave the length out"),
        (Shapes(4, 304, True), (1, 304), "x: takes batches of 4, not 1; leave the batch size out"),
        (
            Shapes(4, 304, True, ((1, 304), (4, 304))),
            (2, 304),
            "x: takes batches of 4, not 2; leave the batch size out",
        ),
    ],
)
def test_sizes_that_do_not_fit(shapes, asked, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        subject._fit("x", shapes, *asked)


def test_the_length_is_the_models_own_or_40_seconds(onnx, tmp_path):
    dynamic = open_backend("ort", onnx, threads=1)
    fixed = open_backend("ort", write_model(tmp_path / "fixed.onnx", frames=FRAMES), threads=1)
    assert subject._frames(dynamic, Workload()) == 4000
    assert subject._frames(fixed, Workload()) == FRAMES
    assert subject._frames(fixed, Workload(seconds=1.005)) == 101  # a begun frame is a frame
    assert subject._frames(fixed, Workload(frames=17)) == 17


# --- a model that is right --------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_checkpoint_is_compared_with_its_direct_graph(batch_size):
    called = []
    workload = Workload(batch_size, seconds=2.0, rounds=3, warmup=0)
    report = benchmark(
        CHECKPOINT, Engine(), workload, config=tiny_config(), threads=1, progress=lambda: called.append(1)
    )
    assert (report.model, report.engine, report.batch_size) == ("jasper_tiny_v2.pt", "ort", batch_size)
    assert (report.frames, report.padded_frames, report.seconds) == (200, 200, 2.0)
    assert report.check.reference == "the float32 graph with direct convolutions in onnxruntime"
    assert report.check.difference < 1e-4
    assert len(report.latency.values) == len(called) == 3
    assert report.copies is report.compute_samples_per_second is None
    assert report.samples_per_second == pytest.approx(batch_size / np.mean(report.latency.values))


def test_an_onnx_alone_has_nothing_to_be_compared_with(onnx, tmp_path):
    report = benchmark(onnx, workload=QUICK, threads=1)
    assert (report.check.reference, report.check.difference) == (None, None)
    same = write_model(tmp_path / "same.onnx", batch_size=2, frames=400)
    report = benchmark(onnx, workload=QUICK, threads=1, check_against=same)
    assert report.check.reference == "same.onnx in onnxruntime"
    assert report.check.difference < 1e-4


def test_times_and_rates(onnx, broken, clock, monkeypatch):
    spent = iter([9.0, 9.0, 9.0, 0.1, 0.2, 0.6])  # the check's two runs, one to warm up, three rounds
    monkeypatch.setattr(Broken, "on_run", staticmethod(lambda name, call: clock.spend(next(spent))))
    monkeypatch.setattr(Broken, "split", (0.01, 0.25, 0.02))
    report = benchmark(onnx, Engine("broken"), Workload(4, seconds=2.0, rounds=3, warmup=1))
    assert report.check.reference == "the same file in onnxruntime"
    assert report.latency.values == pytest.approx((0.1, 0.2, 0.6))
    assert report.samples_per_second == pytest.approx(4 / 0.3)
    assert report.audio_seconds_per_second == pytest.approx(2 * 4 / 0.3)
    assert report.copies == Copies(Rounds((0.01,) * 3), Rounds((0.25,) * 3), Rounds((0.02,) * 3))
    assert report.compute_samples_per_second == pytest.approx(16)


@pytest.mark.parametrize("kind", list(GEARS))
def test_an_om(tmp_path, kind):
    om = make_om(tmp_path, kind)
    with AclDouble():
        report = benchmark(om, workload=Workload(rounds=3))
    assert (report.engine, report.frames) == ("acl", FRAMES)
    assert report.batch_size == {"static": 2, "batch": 1, "dims": 4}[kind]
    assert report.check.reference == "x.onnx in onnxruntime"
    assert report.check.difference < 1e-4
    parts = [report.copies.h2d, report.copies.compute, report.copies.d2h]
    assert all(min(part.values) > 0 for part in parts)
    for whole, *split in zip(report.latency.values, *(part.values for part in parts), strict=True):
        assert sum(split) < whole
    assert report.compute_samples_per_second > report.samples_per_second


def test_a_gear_that_is_larger_than_the_utterance(tmp_path):
    with AclDouble():
        report = benchmark(make_om(tmp_path, "dims"), workload=Workload(1, seconds=1.0, rounds=1))
    assert (report.batch_size, report.frames, report.padded_frames, report.seconds) == (1, 100, 160, 1.0)


def test_float16_is_near_enough(tmp_path):
    om = make_om(tmp_path, dtypes=("float16", "int32", "float16", "int32"))
    with AclDouble():
        report = benchmark(om, workload=Workload(rounds=1))
    assert 1e-5 < report.check.difference < 0.1


# --- a model that is wrong --------------------------------------------------------


def shifted(log_probs, lens, call):
    return np.roll(log_probs, 1, axis=2), lens


def not_normalised(log_probs, lens, call):
    return log_probs + np.float32(0.1), lens


def unrepeatable(log_probs, lens, call):
    log_probs[0, 3, 5] += np.float32(1e-4 * call)
    return log_probs, lens


def one_row_off(log_probs, lens, call):
    log_probs[1] = np.roll(log_probs[1], 1, axis=0)
    return log_probs, lens


def not_finite(log_probs, lens, call):
    log_probs[0, 0, 0] = np.nan
    return log_probs, lens


def nan_later(log_probs, lens, call):
    return not_finite(log_probs, lens, call) if call == 2 else (log_probs, lens)


def stuck(log_probs, lens, call):
    return np.repeat(log_probs[:, :1], log_probs.shape[1], axis=1), lens


def too_long(log_probs, lens, call):
    return log_probs, lens + 1


def changing(log_probs, lens, call):
    return (log_probs, lens) if call < 6 else stuck(log_probs, lens, call)


def crashing(log_probs, lens, call):
    if call == 5:
        raise ModelError("tiny.onnx: the runtime failed; start it again")
    return log_probs, lens


FAULTS = [
    (shifted, r"log_probs are off those of the same file in onnxruntime by [\d.]+ of their own changes, 0.0001 is"),
    (not_normalised, r"the probabilities in a frame sum to 1 \+- 0.11 "),
    (unrepeatable, r"log_probs of two runs differ by 0.0001 "),
    (one_row_off, r"log_probs of the same utterance differ by [\d.]+ between the rows of a batch "),
    (not_finite, r"log_probs are not finite "),
    (nan_later, r"log_probs of two runs differ by nan "),
    (stuck, r"log_probs are off those of the same file in onnxruntime by [\d.]+ of their own changes, 0.0001 is"),
    (too_long, r"output lengths are \[101, 101\], not 100 each "),
    (changing, r"the output changed by [\d.]+ while it was timed "),
]


@pytest.mark.parametrize(("fault", "cause"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_wrong_output_has_no_speed(onnx, broken, fault, cause):
    broken(fault)
    words = ("--backend", "broken", "--batch-size", 2, "--seconds", 2, "--rounds", 3)
    for layout in ("text", "json"):
        code, out, err = run("benchmark", onnx, *words, "--format", layout)
        assert (code, out) == (4, "")
        assert re.fullmatch(
            rf"jasper: error: tiny.onnx: {cause}.*\(broken\), so nothing was timed; make the model again\n", err
        )


def test_a_crash_is_no_speed(onnx, broken, tmp_path):
    broken(crashing)
    words = ("--backend", "broken", "--seconds", 2, "--rounds", 3, "--format", "pureinfer", "--output", tmp_path)
    code, out, err = run("benchmark", onnx, *words)
    assert (code, out, err) == (4, "", "jasper: error: tiny.onnx: the runtime failed; start it again\n")
    assert not list(tmp_path.iterdir())


def test_a_lower_precision_may_be_further_off_but_must_say_the_same(onnx, broken):
    def noisy(scale):
        def fault(log_probs, lens, call):
            noise = np.random.default_rng(0).normal(0, scale, log_probs.shape[1:]).astype(np.float32)
            return log_probs + noise - np.log(np.exp(log_probs + noise).sum(axis=2, keepdims=True)), lens

        return fault

    for precision, limit in subject.TOLERANCES.items():
        engine = Engine("broken", precision)
        for scale, passes in ((limit / 20, True), (limit * 20, False)):
            backend = open_backend("ort", onnx, threads=1)
            right = subject.Subject("x", Engine(), backend, QUICK).run()[0]
            expected = subject.Expected(right, backend.config.labels, "y")
            broken(noisy(scale))
            found = subject.Subject("x", engine, Broken(onnx), QUICK)
            if passes:
                found._compare(found.run(), expected)
            else:
                with pytest.raises(ModelError, match=r"of their own changes|says"):
                    found._compare(found.run(), expected)


def test_another_text_within_the_tolerance_is_wrong(onnx):
    """One confident frame that flips hides in the mean; the text shows it."""
    backend = open_backend("ort", onnx, threads=1)
    found = subject.Subject("x", Engine("ort", "int8"), backend, Workload(seconds=20.0))
    wrong = found.run()
    expected = subject.Expected(wrong[0].copy(), backend.config.labels, "y")
    frame = int(np.argmax(np.diff(np.sort(expected.log_probs, axis=1)[:, -2:], axis=1)))
    best = expected.log_probs[frame].argmax()
    wrong[0, frame] = np.roll(expected.log_probs[frame], 3)
    assert wrong[0, frame].argmax() != best
    with pytest.raises(ModelError, match=r"^x: says '.*' where y says '.*' \(ort:int8\), so nothing was timed; "):
        found._compare(wrong, expected)


def test_an_om_with_other_weights(tmp_path):
    """It computes well, but not what its ONNX computes."""
    right = write_model(tmp_path / "x.onnx", **GEARS["static"][0])
    other = tmp_path / "other.onnx"
    weights = random_weights(tiny_config(), seed=1)
    other.write_bytes(build_graph(tiny_config(), weights, **GEARS["static"][0]).SerializeToString())
    om = write_om(tmp_path / "x.om", other, GEARS["static"][1])
    write_sidecar(om, *("static", GEARS["static"][1]), onnx_sha256=file_sha256(right))
    with AclDouble(), pytest.raises(ModelError, match=r"^x\.om: log_probs are off those of x\.onnx in onnxruntime by"):
        benchmark(om)
    with AclDouble():  # without its ONNX nobody can tell
        right.unlink()
        assert benchmark(om, workload=Workload(rounds=1)).check.reference is None


def test_an_onnx_beside_the_om_that_it_was_not_made_from(tmp_path, onnx):
    om = make_om(tmp_path, right=onnx)
    with AclDouble(), pytest.raises(ModelError) as caught:
        benchmark(om)
    assert str(caught.value) == (
        f"{tmp_path}/x.onnx: not the ONNX that x.om was compiled from; give that with --check-against"
    )
    with AclDouble():
        report = benchmark(om, workload=Workload(rounds=1), check_against=onnx)
    assert report.check.reference == "tiny.onnx in onnxruntime"


def test_a_reference_of_another_kind(onnx, tmp_path):
    other, config = tmp_path / "other.onnx", made_up([{"kernel_size": 3, "stride": 2}])
    other.write_bytes(build_graph(config, random_weights(config)).SerializeToString())
    with pytest.raises(UsageError) as caught:
        benchmark(onnx, workload=QUICK, threads=1, check_against=other)
    assert str(caught.value) == (
        "other.onnx in onnxruntime: has other labels, bands or stride than tiny.onnx; give its own .onnx"
    )


# --- formats, as downstream scripts read them -------------------------------------


def report_of(seconds, batch_size=4, copies=None, model="jasper_4batch.om", device=2):
    return BenchReport(
        model=model,
        engine="acl",
        device=device,
        batch_size=batch_size,
        frames=4000,
        padded_frames=4000,
        seconds=40.0,
        warmup=3,
        check=Check("a b", None, None),
        latency=Rounds(tuple(seconds)),
        copies=copies,
    )


def test_pureinfer(tmp_path):
    report = report_of([0.7, 0.8, 0.77])
    path = formats.write_pureinfer(report, tmp_path)
    assert path == tmp_path / "result" / "PureInfer_perf_of_jasper_4batch_in_device_2.txt"
    last = path.read_text().splitlines()[-1]
    throughput = float(re.search(r"ave_throughputRate = ([\d.]+)samples/s", last)[1])
    latency = float(re.search(r"ave_latency = ([\d.]+)ms$", last)[1])
    assert throughput == pytest.approx(12 / 2.27, rel=1e-5)
    assert latency == pytest.approx(1000 * 2.27 / 12, rel=1e-5)  # of a sample, not of a batch
    assert float(last.split("samples/s")[0].split(" = ")[1]) == throughput
    shown = formats.pureinfer_summary(report, Path("result") / path.name).splitlines()
    assert shown == [
        "[INFO] Dataset number: 2 finished cost 770ms",
        "[INFO] PureInfer result saved in ./result/PureInfer_perf_of_jasper_4batch_in_device_2.txt",
        "-----------------PureInfer Performance Summary------------------",
        "[INFO] ave_throughputRate: 5.28634samples/s, ave_latency: 189.167ms",
        "----------------------------------------------------------------",
    ]
    # grep ave_throughputRate log | awk -F ': ' '{print $2}' | tr -cd "[0-9|.]"
    (line,) = [line for line in shown if "ave_throughputRate" in line]
    assert float(re.sub(r"[^0-9|.]", "", line.split(": ")[1])) == throughput


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.2062349, "5.20623"), (192.8944, "192.894"), (1234567.8, "1234570"), (0.00001234, "0.00001234"), (16.0, "16")],
)
def test_numbers_have_six_digits_and_no_exponent(value, text):
    assert formats._six(value) == text


def test_ais_bench(tmp_path):
    compute = Rounds((0.020, 0.022, 0.024))
    copies = Copies(Rounds((0.001,) * 3), compute, Rounds((0.002,) * 3))
    report = report_of([0.030] * 3, batch_size=16, copies=copies)
    shown = formats.ais_bench_summary(report).splitlines()
    assert len(shown) == 4
    assert all(line.startswith("[INFO] ") for line in shown)
    assert re.fullmatch(r"\[INFO\] -+Performance Summary-+", shown[0])
    assert re.fullmatch(r"\[INFO\] -+", shown[3])
    pattern = (
        r"NPU_compute_time \(ms\): min = ([\d.]+), max = ([\d.]+), mean = ([\d.]+), median = ([\d.]+), "
        r"percentile\(99%\) = ([\d.]+)$"
    )
    found = [float(value) for value in re.search(pattern, shown[1]).groups()]
    assert found == pytest.approx([20, 24, 22, 22, 23.96])
    pattern = r"throughput 1000\*batchsize(?:\.mean)?\((\d+)\)/NPU_compute_time\.mean\(([\d.]+)\): ([\d.]+)$"
    batch_size, mean, throughput = map(float, re.search(pattern, shown[2]).groups())
    assert (batch_size, mean) == (16, found[2])
    assert throughput == pytest.approx(16 / 0.022)
    assert float(shown[2].split()[-1]) == throughput  # awk '{print $NF}'
    path = formats.write_ais_bench(report, tmp_path)
    assert [*tmp_path.glob("*_summary.json")] == [path]
    assert re.fullmatch(r"\d{4}(_\d\d){2}-\d\d(_\d\d){2}_summary\.json", path.name)
    content = json.loads(path.read_text())
    assert list(content) == ["NPU_compute_time", "H2D_latency", "D2H_latency", "throughput"]
    assert content["H2D_latency"] == pytest.approx(
        {"min": 1, "max": 1, "mean": 1, "median": 1, "percentile(99%)": 1, "count": 3}
    )
    assert content["throughput"] == throughput


def test_without_copies_all_time_is_computing():
    content = formats.ais_bench_dict(report_of([0.1, 0.3], batch_size=2))
    assert content["NPU_compute_time"]["mean"] == pytest.approx(200)
    assert content["throughput"] == pytest.approx(10)
    assert content["D2H_latency"]["max"] == 0


# --- engines side by side ---------------------------------------------------------


def test_engines_take_turns(onnx, broken, clock, monkeypatch):
    order, timed = [], {"broken": iter([0.2, 0.4, 0.3]), "other": iter([0.1, 0.1, 0.3])}

    def on_run(name, call):
        order.append(name)
        clock.spend(next(timed[name]) if call > 3 else 5.0)

    monkeypatch.setattr(Broken, "on_run", staticmethod(on_run))
    comparison = compare(onnx, [Engine("broken"), Engine("other")], Workload(2, seconds=2.0, rounds=3, warmup=1))
    assert order == ["broken"] * 3 + ["other"] * 3 + ["broken", "other"] * 3
    first, second = comparison.rows
    assert (first.engine, second.engine) == ("broken", "other")
    assert first.speed.values == (1.0, 1.0, 1.0)
    assert second.speed.values == pytest.approx((2.0, 4.0, 1.0))  # pair by pair
    assert first.latency.median == pytest.approx(0.3)
    assert comparison.macs == macs(tiny_config(), 200)
    assert second.peak == pytest.approx(2 * comparison.macs / 0.1 / 1e9)
    assert "onnxruntime" in comparison.machine
    head, empty, *table = formats.markdown_table(comparison).splitlines()
    assert head.startswith("tiny.onnx, batch 2, 2 s of audio an utterance; 3 rounds in alternation; ")
    assert empty == ""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {len(row) for row in cells} == {8}
    assert cells[3][:6] == ["other", "100 ms", "100 to 260 ms", "2.00x", "1.20 to 3.60", "40"]


def test_eager_torch_is_a_row(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    comparison = compare(CHECKPOINT, [Engine(), Engine("torch")], QUICK, config=tiny_config(), threads=1)
    assert [row.engine for row in comparison.rows] == ["ort", "torch"]
    assert all(row.check.difference < 1e-4 for row in comparison.rows)
    assert comparison.rows[0].check.transcript == comparison.rows[1].check.transcript
    assert json.loads(json.dumps(comparison.as_dict()))["rows"][1]["speed"]["median"] > 0


def test_kinds_of_convolution_are_rows():
    engines = [Engine(), Engine("ort", None, "spectral")]
    comparison = compare(CHECKPOINT, engines, QUICK, config=tiny_config(), threads=1)
    direct, spectral = comparison.rows
    assert (direct.engine, spectral.engine) == ("ort", "ort:spectral")
    assert direct.check.difference == 0  # it is the reference
    assert 0 < spectral.check.difference < 1e-4


def test_torch_has_no_kinds():
    with pytest.raises(UsageError, match=r"^engine torch:bf16: torch takes no precision or convolution; leave them"):
        compare(CHECKPOINT, [Engine("torch", "bf16")], QUICK, config=tiny_config())


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        ([], "compare: name at least one engine, and each only once"),
        ([Engine(), Engine()], "compare: name at least one engine, and each only once"),
        ([Engine("torch")], "tiny.onnx: engine torch runs checkpoints; give a .pt or .safetensors"),
        (
            [Engine("ort", None, "spectral")],
            "tiny.onnx: keeps the convolutions it was exported with; give a checkpoint",
        ),
        ([Engine("ort", "bf16")], "backend ort: computes in f32, not bf16; use --backend openvino"),
    ],
)
def test_comparisons_that_are_none(onnx, engines, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        compare(onnx, engines, QUICK)


def test_one_wrong_engine_and_there_is_no_table(onnx, broken):
    broken(stuck)
    code, out, err = run("benchmark", onnx, "--compare", "ort", "--compare", "broken", "--seconds", 2, "--rounds", 1)
    assert (code, out) == (4, "")
    assert "(broken), so nothing was timed" in err


def test_a_chart(onnx, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "chart.png"
    words = ("--seconds", 2, "--rounds", 2, "--threads", 1, "--chart", path)
    code, out, err = run("benchmark", onnx, "--compare", "ort", *words)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("| ort | ")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    assert (width, height) == (1200, 285)


def test_a_chart_without_matplotlib_fails_before_the_work(onnx, tmp_path, monkeypatch, broken):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(benchmarks, "compare", lambda *_, **__: pytest.fail("too late"))
    code, out, err = run("benchmark", onnx, "--compare", "ort", "--chart", tmp_path / "c.png")
    assert (code, out) == (2, "")
    assert err == f"jasper: error: {tmp_path}/c.png: a chart needs matplotlib; pip install 'jasper-asr[plot]'\n"


# --- the command ------------------------------------------------------------------

SHORT = ("--rounds", 2, "--warmup", 0, "--seconds", 2, "--threads", 1)


def test_text(onnx):
    code, out, err = run("benchmark", CHECKPOINT, "--config", CONFIG, *SHORT, "--chips", 4)
    assert (code, err) == (0, "")
    rows = [re.split(r"  +", line, maxsplit=1) for line in out.splitlines()]
    assert [row[0] for row in rows] == ["model", "batch", "check", "rounds", "latency", "throughput", "throughput"]
    found = dict(rows[:5])
    assert found["batch"] == "1 x 2 s of audio (200 frames)"
    assert found["rounds"] == "2 after 0 to warm up"
    number = r"[\d.]+"
    assert re.fullmatch(
        f"min {number}, mean {number}, median {number}, p90 {number}, p99 {number}, max {number} ms a batch",
        found["latency"],
    )
    card, rate = re.fullmatch(
        rf"({number}) samples/s on a card: 4 chips x ({number}), copies included", rows[6][1]
    ).groups()
    assert float(card) == pytest.approx(4 * float(rate), rel=1e-5)


def test_text_of_an_om_tells_the_copies(tmp_path):
    om = make_om(tmp_path)
    with AclDouble():
        code, out, err = run("benchmark", om, "--rounds", 2, "--device", 0, "--seconds", 2)
    assert (code, err) == (0, "")
    assert "2 x 2 s of audio (200 frames, padded to 304)" in out
    names = [line.split("  ")[1] for line in out.splitlines() if line.startswith("  ")]
    assert names == ["host to device", "computing", "device to host"]
    assert re.search(r"samples/s, [\d.]+ audio-seconds/s, copies included\n", out)
    assert re.search(r"samples/s, [\d.]+ audio-seconds/s, copies left out\n", out)


def test_json(onnx):
    code, out, err = run("benchmark", onnx, *SHORT, "--format", "json", "--chips", 2)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["rounds"] == 2
    assert found["samples_per_second"] == pytest.approx(1 / found["latency"]["mean"])
    assert found["card_samples_per_second"] == 2 * found["samples_per_second"]
    assert found["check"]["reference"] is None


def test_pureinfer_from_the_command(tmp_path, monkeypatch):
    om = make_om(tmp_path, stem="jasper_1batch")
    monkeypatch.chdir(tmp_path)
    with AclDouble():
        code, out, err = run("benchmark", om, "--batch-size", 2, "--rounds", 5, "--device", 0, "--format", "pureinfer")
    assert code == 0
    assert "[INFO] Dataset number: 4 finished cost " in out
    shown = float(re.search(r"ave_throughputRate: ([\d.]+)samples/s", out)[1])
    last = (tmp_path / "result" / "PureInfer_perf_of_jasper_1batch_in_device_0.txt").read_text().splitlines()[-1]
    assert float(re.search(r"ave_throughputRate = ([\d.]+)samples/s", last)[1]) == shown
    included, left_out = (float(value) for value in re.findall(r"([\d.]+) samples/s", err))
    assert left_out == shown > included


def test_ais_bench_from_the_command(onnx, tmp_path):
    folder = tmp_path / "a" / "b"
    code, out, err = run("benchmark", onnx, *SHORT, "--format", "ais-bench", "--output", folder, "--chips", 4)
    assert code == 0
    (path,) = folder.glob("*_summary.json")
    assert json.loads(path.read_text())["throughput"] == float(out.splitlines()[2].split()[-1])
    assert f"jasper: {path}: written\n" in err
    assert "samples/s on a card: 4 chips x " in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--output", "x"), 2, "--output is for --format pureinfer and ais-bench"),
        (("--chart", "x.png"), 2, "--chart needs --compare"),
        (("--seconds", 2, "--frames", 3), 2, "give frames or seconds, not both"),
        (("--seconds", -1), 2, "seconds -1: must be a number above 0"),
        (("--backend", "gpu"), 2, f"backend 'gpu': choose one of {', '.join(BACKENDS)}"),
        (("--device", 1), 2, "backend ort: takes no device; leave it out"),
        (
            ("--compare", "ort", "--chips", 4),
            2,
            "--compare goes with --format text or json, and without --backend, --device, --chips",
        ),
        (("--check-against", "/nowhere.onnx"), 5, "/nowhere.onnx: no such file; check the path"),
        (("--compare", "ort", "--chart", "/nowhere/c.png"), 5, "/nowhere/c.png: the folder /nowhere does not exist"),
    ],
)
def test_wrong_use(onnx, words, code, message):
    found, out, err = run("benchmark", onnx, "--rounds", 1, *words)
    assert (found, out) == (code, "")
    assert err.startswith(f"jasper: error: {message}")
    assert err.count("\n") == 1


def test_an_om_is_not_compared(tmp_path):
    om = make_om(tmp_path)
    with pytest.raises(JasperError, match=r"x\.om: an \.om runs on one engine only; give a checkpoint or an \.onnx$"):
        compare(om, [Engine()])


# --- onnxruntime-cann -------------------------------------------------------------

CANN = "CANNExecutionProvider"
FELL_BACK = (
    f"<graph>: onnxruntime has no working {CANN} and would use the CPU; install onnxruntime-cann in place of "
    "onnxruntime, and CANN, and source its set_env.sh"
)


@pytest.fixture
def cann(monkeypatch):
    """An onnxruntime that was built with CANN; `works` says whether the machine has it."""
    import onnxruntime

    fake = SimpleNamespace(works=False, given=None, fallback=True)

    class Session(onnxruntime.InferenceSession):
        def __init__(self, model, options, providers):
            fake.given = providers
            super().__init__(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [fake.given[0][0]] if fake.works else super().get_providers()

        def disable_fallback(self):
            fake.fallback = False
            super().disable_fallback()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CANN, "CPUExecutionProvider"])
    return fake


def test_cann_runs_where_it_is(cann, onnx):
    cann.works = True
    backend = open_backend("cann", onnx, device=3)
    assert cann.given == [(CANN, {"device_id": 3})]
    assert not cann.fallback
    report = benchmark(onnx, Engine("cann"), QUICK)
    assert report.check.reference == "the same file in onnxruntime"
    backend.close()


def test_cann_never_becomes_the_cpu_in_silence(cann, onnx):
    with pytest.raises(ModelError, match=f"^{re.escape(FELL_BACK)}$"):
        open_backend("cann", onnx.read_bytes())
    assert cann.given == [(CANN, {"device_id": 0})]


def test_cann_is_missing_from_the_usual_onnxruntime(onnx):
    with pytest.raises(ModelError, match=f"^{re.escape(FELL_BACK)}$"):
        open_backend("cann", onnx.read_bytes())
    code, out, err = run("benchmark", onnx, "--backend", "cann")
    assert (code, out) == (4, "")
    assert err == f"jasper: error: {FELL_BACK.replace('<graph>', str(onnx))}\n"
