"""The Ascend backend against the strict double of `acl`: same numbers as onnxruntime, and no way to fail badly."""

import dataclasses
import json
import sys
import threading
from contextlib import suppress
from functools import cache
from types import ModuleType

import numpy as np
import pytest

import jasper_asr
from acl_double import AclDouble, write_om
from helpers_audio import CHECKPOINT, DATA, sound, tiny_config, write_model
from jasper_asr.backends import Shapes, acl, open_backend
from jasper_asr.backends.acl import AclBackend, describe_om, read_sidecar
from jasper_asr.errors import JasperError, ModelError, StorageError, UsageError

KINDS = {
    "static": ({"batch_size": 4, "frames": 304}, [(4, 304)]),
    "batch": ({"frames": 304}, [(1, 304), (2, 304), (4, 304)]),
    "dims": ({"max_frames": 304}, [(1, 160), (2, 240), (4, 304)]),
}
"""Kind of .om -> (shape of its ONNX, its gears)."""

SMALL = {
    "static": ({"batch_size": 2, "frames": 32}, [(2, 32)]),
    "batch": ({"frames": 32}, [(1, 32), (2, 32)]),
    "dims": ({"max_frames": 32}, [(1, 16), (2, 32)]),
}

HALF = ("float16", "int32", "float16", "int32")
MODES = pytest.mark.parametrize("pipeline", [False, True], ids=["sync", "pipeline"])
ALL_KINDS = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("acl")


def write_sidecar(om, kind, gears, **changes):
    batch, frames = gears[0]
    free = kind != "static"
    row = {
        "format": "jasper-asr om sidecar",
        "version": 1,
        "config": dict(tiny_config().raw),
        "masked": True,
        "inputs": [
            {"name": "feats", "shape": [-1 if free else batch, 64, -1 if kind == "dims" else frames]},
            {"name": "feat_lens", "shape": [-1 if free else batch]},
        ],
        "gears": {
            "static": None,
            "batch": {"batch": [batch for batch, _ in gears]},
            "dims": {"dims": [[batch, 64, frames, batch] for batch, frames in gears]},
        }[kind],
        "onnx": f"{om.stem}.onnx",
        "onnx_sha256": "0" * 64,
        "soc_version": "Ascend310P3",
        "atc_version": "unknown",
        "command": ["atc"],
    }
    om.with_suffix(".json").write_text(json.dumps(row | changes), encoding="utf-8")
    return om


def make_om(path, kind, table=KINDS, **options):
    shape, gears = table[kind]
    write_om(path, write_model(path.with_suffix(".onnx"), **shape), gears, kind, **options)
    return write_sidecar(path, kind, gears)


@pytest.fixture(scope="module")
def oms(folder):
    return {kind: make_om(folder / f"{kind}.om", kind) for kind in KINDS}


@pytest.fixture(scope="module")
def small(folder):
    return {kind: make_om(folder / f"small_{kind}.om", kind, SMALL) for kind in SMALL}


@pytest.fixture(scope="module")
def dynamic(folder):
    return write_model(folder / "dynamic.onnx")


@cache
def reference(om):
    """onnxruntime with the ONNX of an .om."""
    return open_backend("ort", om.with_suffix(".onnx"), threads=1)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """A test that dies with a backend open must not disturb the next."""
    monkeypatch.setattr(acl, "_PROCESS", acl._Process())


@pytest.fixture
def double():
    with AclDouble() as double:
        yield double


def batch_of(batch, frames, seed=0):
    """Random features and lengths of which the last is short; zero beyond, as the spine packs them."""
    rng = np.random.default_rng(seed)
    lens = np.linspace(frames, frames // 2, batch).astype(np.int32)
    feats = rng.standard_normal((batch, 64, frames)).astype(np.float32)
    feats[np.arange(frames) >= lens[:, None, None] + np.zeros((1, 64, 1), np.int32)] = 0
    return feats, lens


def gear_batches(gears, count=5):
    return [batch_of(*gears[index % len(gears)], seed=index) for index in range(count)]


def assert_same(found, expected, atol=1e-6):
    for (log_probs, lens), (wanted, wanted_lens) in zip(found, expected, strict=True):
        assert log_probs.dtype == np.float32
        assert lens.dtype == np.int32
        assert lens.tolist() == wanted_lens.tolist()
        assert log_probs.shape == wanted.shape
        for row, target, length in zip(log_probs, wanted, lens, strict=True):
            assert np.abs(row[:length] - target[:length]).max() <= atol


# --- the numbers ------------------------------------------------------------------


@MODES
@ALL_KINDS
@pytest.mark.parametrize("bytes_api", [True, False])
def test_log_probs_are_those_of_onnxruntime(oms, kind, pipeline, bytes_api):
    batches = gear_batches(KINDS[kind][1])
    expected = [reference(oms[kind]).run(*batch) for batch in batches]
    with AclDouble(bytes_api=bytes_api):
        backend = AclBackend(oms[kind], pipeline=pipeline)
        assert_same([backend.run(*batch) for batch in batches], expected)
        assert_same(list(backend.run_many(batches)), expected)
        assert_same([backend.run(*batches[0])], expected[:1])  # after a pipeline ended
        backend.close()


@ALL_KINDS
def test_log_probs_are_golden(oms, double, kind):
    with np.load(DATA / "jasper_tiny.npz") as vectors:
        feats, lens = vectors["feats"], vectors["feat_lens"]
        expected = [(vectors["log_probs"], vectors["log_prob_lens"])]
    backend = AclBackend(oms[kind])
    assert_same([backend.run(feats, lens)], expected, atol=5e-5)
    backend.close()


@ALL_KINDS
def test_transcripts_are_those_of_onnxruntime(oms, dynamic, double, kind):
    clips = [(sound(seconds, seed), 16_000) for seed, seconds in enumerate([2.9, 0.4, 1.1, 2.1, 0.7, 1.6])]
    with jasper_asr.load(dynamic, batch_size=4) as transcriber:
        expected = list(transcriber.transcribe_many(clips))
    with jasper_asr.load(oms[kind], backend="acl", device=0) as transcriber:
        assert list(transcriber.transcribe_many(clips)) == expected  # four and two: the last batch is not full
        assert transcriber.transcribe(clips[1]) == expected[1]
        log_probs, lens = transcriber.log_probs([clips[0][0]])
        assert (len(log_probs), log_probs.shape[1]) == (1, lens[0])
    assert len({result.text for result in expected}) == len(clips)  # or a wrong order would not show


@MODES
def test_float16_comes_out_as_float32(folder, double, pipeline):
    om = make_om(folder / f"half_{pipeline}.om", "batch", dtypes=HALF)
    feats, lens = batch_of(2, 304)
    log_probs, out_lens = reference(om).run(feats.astype(np.float16).astype(np.float32), lens)
    expected = [(log_probs.astype(np.float16).astype(np.float32), out_lens)]
    backend = AclBackend(om, pipeline=pipeline)
    assert_same(backend.run_many([(feats, lens)]), expected, atol=0.016)  # one step of float16 at 16
    backend.close()


def test_results_stay_when_the_buffers_are_used_again(oms):
    for bytes_api in (True, False):
        with AclDouble(bytes_api=bytes_api):
            backend = AclBackend(oms["static"])
            log_probs, lens = backend.run(*batch_of(4, 304, seed=1))
            kept = log_probs.copy(), lens.copy()
            backend.run(*batch_of(4, 304, seed=2))
            backend.close()
        assert np.array_equal(log_probs, kept[0])
        assert np.array_equal(lens, kept[1])
        assert log_probs.flags.owndata


# --- shapes and gears -------------------------------------------------------------


def test_shapes_name_the_gears(oms, double):
    expected = {
        "static": Shapes(4, 304, True),
        "batch": Shapes(4, 304, True, ((1, 304), (2, 304), (4, 304))),
        "dims": Shapes(4, 304, True, ((1, 160), (2, 240), (4, 304))),
    }
    for kind, shapes in expected.items():
        backend = AclBackend(oms[kind])
        assert backend.shapes == shapes
        assert backend.config == tiny_config()
        backend.close()


@pytest.mark.parametrize(
    ("batch", "frames", "gear"),
    [
        (1, 1, (1, 1024)),
        (1, 1024, (1, 1024)),
        (1, 1025, (1, 2048)),
        (2, 100, (8, 1024)),
        (8, 1024, (8, 1024)),
        (8, 1025, (16, 4000)),
        (9, 10, (16, 4000)),
    ],
)
def test_the_smallest_gear_that_holds_a_batch(batch, frames, gear):
    shapes = Shapes(16, 4000, True, ((16, 4000), (1, 2048), (1, 1024), (8, 1024)))
    assert shapes.fit(batch, frames) == gear
    assert shapes.fit(*gear) == gear


def test_how_many_utterances_a_length_allows():
    shapes = Shapes(16, 4000, True, ((16, 1024), (4, 2048), (1, 4000)))
    assert [shapes.most(frames) for frames in (10, 1024, 1025, 2048, 2049, 4000)] == [16, 16, 4, 4, 1, 1]
    with pytest.raises(UsageError, match="2 utterances of 3000 frames fit none of the model's gears"):
        shapes.fit(2, 3000)
    assert Shapes(4, 304, True).fit(1, 10) == (4, 304)
    assert Shapes(None, None, True).fit(3, 10) == (3, 10)
    assert [Shapes(size, None, True).most(5) for size in (4, None)] == [4, None]


def test_the_spine_runs_the_smallest_gear(oms, double):
    asked = []
    with jasper_asr.load(oms["dims"], backend="acl") as transcriber:
        run = transcriber._backend.run
        transcriber._backend.run = lambda feats, lens: asked.append(feats.shape) or run(feats, lens)
        for seconds in (1.0, 1.9, 2.9):
            transcriber.transcribe((sound(seconds), 16_000))
        list(transcriber.transcribe_many([(sound(1.0), 16_000)] * 6))
    assert asked == [(1, 64, 160), (2, 64, 240), (4, 64, 304), (4, 64, 304), (2, 64, 240)]


def test_the_spine_splits_what_no_gear_holds(folder, double):
    gears = [(4, 160), (1, 304)]
    write_om(folder / "wide.om", write_model(folder / "wide.onnx", max_frames=304), gears, "dims")
    asked = []
    with jasper_asr.load(write_sidecar(folder / "wide.om", "dims", gears)) as transcriber:
        run = transcriber._backend.run
        transcriber._backend.run = lambda feats, lens: asked.append(feats.shape) or run(feats, lens)
        list(transcriber.transcribe_many([(sound(seconds), 16_000) for seconds in (2.5, 1.0, 2.9)]))
    assert asked == [(1, 64, 304)] * 3


@ALL_KINDS
@pytest.mark.parametrize("shape", [(3, 64, 304), (4, 64, 303), (4, 63, 304), (4, 304)])
def test_a_shape_that_the_model_does_not_take(oms, double, kind, shape):
    backend = AclBackend(oms[kind])
    with pytest.raises(ModelError) as error:
        backend.run(np.zeros(shape, np.float32), np.ones(shape[0], np.int32))
    takes = ", ".join(f"[{batch}, 64, {frames}]" for batch, frames in KINDS[kind][1])
    assert str(error.value) == f"{oms[kind]}: feats {list(shape)} with lens [{shape[0]}]; the model takes {takes}"
    backend.close()


# --- the order of calls -----------------------------------------------------------

RUN = ["rt.set_context", "rt.memcpy", "rt.memcpy", "mdl.execute", "rt.memcpy", "rt.memcpy"]


def of_interest(calls):
    """Calls without utilities and questions about the description."""
    return [call for call in calls if not call.startswith(("util.", "mdl.get_"))]


def test_the_order_up_and_down(small, double):
    backend = AclBackend(small["static"])
    up = of_interest(double.calls)
    backend.run(*batch_of(2, 32))
    run = of_interest(double.calls)[len(up) :]
    backend.close()
    down = of_interest(double.calls)[len(up) + len(run) :]
    buffer = ["rt.malloc", "create_data_buffer", "mdl.add_dataset_buffer"]
    assert up == [
        *["init", "rt.set_device", "rt.create_context", "rt.create_stream", "mdl.load_from_file", "mdl.create_desc"],
        *["mdl.create_dataset", *buffer, *buffer] * 2,
        *["rt.malloc_host"] * 2,
    ]
    assert double.calls[double.calls.index("mdl.create_desc") + 1] == "mdl.get_desc"
    assert run == RUN
    assert down == [
        *["rt.set_context", "rt.synchronize_stream", "mdl.unload", "mdl.destroy_desc", "rt.free_host", "rt.free_host"],
        *[*["rt.free", "destroy_data_buffer"] * 2, "mdl.destroy_dataset"] * 2,
        *["rt.destroy_stream", "rt.destroy_context", "rt.reset_device", "finalize"],
    ]


def test_nothing_is_allocated_by_run(small, double):
    for pipeline in (False, True):
        backend = AclBackend(small["dims"], pipeline=pipeline)
        before = len(double.calls)
        list(backend.run_many(gear_batches(SMALL["dims"][1])))
        assert not {"rt.malloc", "rt.malloc_host", "create_data_buffer"} & {*double.calls[before:]}
        backend.close()


def test_the_order_in_a_pipeline(small, double):
    """Start A, upload B, wait, set the gear, start B, download A."""
    backend = AclBackend(small["batch"], pipeline=True)
    before = len(double.calls)
    results = backend.run_many(gear_batches(SMALL["batch"][1], count=3))
    next(results)
    first = [call for call in of_interest(double.calls[before:]) if call != "rt.set_context"]
    start, copies = ["mdl.set_dynamic_batch_size", "mdl.execute_async"], ["rt.memcpy", "rt.memcpy"]
    assert first == [*copies, *start, *copies, "rt.synchronize_stream", *start, *copies]
    assert len(list(results)) == 2
    assert double.calls.count("mdl.execute_async") == double.calls[before:].count("rt.synchronize_stream") == 3
    backend.close()
    assert "mdl.execute" not in double.calls


# --- failures, at every call in turn ----------------------------------------------


def session(om, batches, pipeline):
    """Load, run, close; an error on the way or at close is raised once everything was released."""
    backend = AclBackend(om, pipeline=pipeline)
    try:
        results = list(backend.run_many(batches))
    except JasperError:
        with suppress(JasperError):
            backend.close()
        raise
    backend.close()
    return results


def in_a_thread(work):
    """The result of `work` in another thread, or its exception."""
    outcome = []

    def target():
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error:
        raise error
    return result


def check_failure(double, error, om, number):
    assert type(error) is ModelError
    text = str(error)
    assert text.startswith(f"{om}: acl.{double.injected} failed")
    assert f"(EZ9999: Inner Error! injected failure of call {number}, acl.{double.injected}); " in text
    assert "\n" not in text


@MODES
@ALL_KINDS
@pytest.mark.parametrize("bytes_api", [True, False])
def test_a_failure_at_every_call(small, kind, pipeline, bytes_api):
    batches, om = gear_batches(SMALL[kind][1], count=3), small[kind]
    with AclDouble(bytes_api=bytes_api) as double:
        expected = session(om, batches, pipeline)
    total, seen = len(double.calls), set()
    for number in range(1, total + 1):
        with AclDouble(bytes_api=bytes_api, fail_at=number) as double:
            with pytest.raises(ModelError) as error:
                session(om, batches, pipeline)
            check_failure(double, error.value, om, number)
            seen.add(double.injected)
    assert {"init", "rt.malloc", "rt.memcpy", "mdl.unload", "rt.free", "finalize"} <= seen
    with AclDouble(bytes_api=bytes_api, fail_at=total + 1) as double:
        assert_same(session(om, batches, pipeline), expected)
        assert double.injected == ""


@MODES
@ALL_KINDS
def test_a_backend_survives_a_failed_run(small, kind, pipeline):
    """Whatever call of a run fails, the next run gives the right numbers, and close has nothing to complain of."""
    batches = gear_batches(SMALL[kind][1], count=3)
    with AclDouble() as double:
        backend = AclBackend(small[kind], pipeline=pipeline)
        expected = list(backend.run_many(batches))
        loaded = double.calls.index("rt.set_context")
        count = len(double.calls) - loaded
        for step in range(1, count + 1):
            double.fail_at = len(double.calls) + step
            with pytest.raises(ModelError) as error:
                list(backend.run_many(batches))
            check_failure(double, error.value, small[kind], double.fail_at)
            assert_same(backend.run_many(batches), expected)
        double.fail_at = None
        backend.close()


@MODES
def test_a_failure_at_every_call_of_close_in_another_thread(small, pipeline):
    with AclDouble() as double:
        backend = AclBackend(small["static"], pipeline=pipeline)
        loaded = len(double.calls)
        in_a_thread(backend.close)
        total = len(double.calls)
    for number in range(loaded + 1, total + 1):
        with AclDouble(fail_at=number) as double:
            backend = AclBackend(small["static"], pipeline=pipeline)
            with pytest.raises(ModelError) as error:
                in_a_thread(backend.close)
            check_failure(double, error.value, small["static"], number)
            backend.close()  # all is released, there is nothing left to fail


def test_the_first_of_several_failures_is_told(small, double, monkeypatch):
    backend = AclBackend(small["static"])
    for name in ("destroy_stream", "destroy_context"):
        original = getattr(double.module.rt, name)
        monkeypatch.setattr(double.module.rt, name, lambda handle, original=original: original(handle) or 507899)
    with pytest.raises(ModelError) as error:
        backend.close()
    assert str(error.value) == (
        f"{small['static']}: acl.rt.destroy_stream failed with 507899 (no message); "
        "no driver answers: install the NPU driver and check npu-smi info"
    )


@pytest.mark.parametrize(
    ("setting", "device", "call", "cure"),
    [
        ({"devices": 2}, 2, "acl.rt.set_device failed with 107001", "check the device number with npu-smi info"),
        ({"memory": 5000}, 0, "acl.rt.malloc failed with 207001", "use a smaller batch or fewer gears"),
    ],
)
def test_errors_that_have_a_cure(small, setting, device, call, cure):
    with AclDouble(**setting), pytest.raises(ModelError) as error:
        AclBackend(small["static"], device=device)
    assert str(error.value).startswith(f"{small['static']}: {call} (")
    assert cure in str(error.value)


# --- threads, sharing, ends -------------------------------------------------------


@MODES
def test_any_thread_may_run_and_close(oms, double, pipeline):
    batches = gear_batches(KINDS["batch"][1], count=8)
    expected = [reference(oms["batch"]).run(*batch) for batch in batches]
    backend = AclBackend(oms["batch"], pipeline=pipeline)
    results = [None] * len(batches)
    errors = []

    def work(first):
        try:
            for index in range(first, len(batches), 4):
                results[index] = backend.run(*batches[index])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_same(results, expected)
    in_a_thread(backend.close)
    assert not double.misuses


def test_a_pipeline_may_wander_between_threads(small, double):
    batches = gear_batches(SMALL["dims"][1], count=4)
    backend = in_a_thread(lambda: AclBackend(small["dims"], pipeline=True))
    results = backend.run_many(batches)
    found = [next(results), *(in_a_thread(lambda: next(results)) for _ in range(2)), next(results)]
    assert next(results, None) is None
    assert_same(found, [reference(small["dims"]).run(*batch) for batch in batches])
    backend.close()


@MODES
def test_close_twice_and_use_after_close(small, double, pipeline):
    backend = AclBackend(small["static"], pipeline=pipeline)
    backend.close()
    calls = len(double.calls)
    backend.close()
    closed = f"{small['static']}: the backend is closed; open the model again"
    with pytest.raises(ModelError) as error:
        backend.run(*batch_of(2, 32))
    assert str(error.value) == closed
    with pytest.raises(ModelError) as error:
        next(backend.run_many([batch_of(2, 32)]))
    assert str(error.value) == closed
    assert len(double.calls) == calls


def test_close_while_a_pipeline_is_under_way(small, double):
    backend = AclBackend(small["static"], pipeline=True)
    results = backend.run_many([batch_of(2, 32)] * 3)
    next(results)
    backend.close()
    with pytest.raises(ModelError, match="the backend is closed"):
        next(results)


def test_a_pipeline_that_is_left_early(small, double):
    backend = AclBackend(small["static"], pipeline=True)
    batch = batch_of(2, 32)
    results = backend.run_many([batch] * 3)
    next(results)
    for other in (lambda: backend.run(*batch), lambda: next(backend.run_many([batch]))):
        with pytest.raises(UsageError) as error:
            other()
        assert str(error.value) == f"{small['static']}: run_many is under way; use up or close its iterator first"
    results.close()
    assert_same([backend.run(*batch)], [reference(small["static"]).run(*batch)])
    backend.close()


def test_a_source_of_batches_that_fails(small, double):
    def batches():
        yield batch_of(2, 32)
        yield batch_of(2, 32)
        raise OSError("disk gone")

    backend = AclBackend(small["static"], pipeline=True)
    with pytest.raises(OSError, match="disk gone"):
        list(backend.run_many(batches()))
    assert_same([backend.run(*batch_of(2, 32))], [reference(small["static"]).run(*batch_of(2, 32))])
    backend.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_backends_in_one_process(small, order):
    with AclDouble(devices=2) as double:
        backends = [AclBackend(small["static"], device=device) for device in (0, 0, 1)]
        for index in order:
            for backend in backends[index:]:
                if backend._stack:
                    assert_same([backend.run(*batch_of(2, 32))], [reference(small["static"]).run(*batch_of(2, 32))])
            backends[index].close()
    assert [double.calls.count(name) for name in ("init", "finalize", "rt.set_device", "rt.reset_device")] == [
        1,
        1,
        2,
        2,
    ]


def test_acl_that_somebody_else_initialised(small, double):
    assert double.module.init() == 0
    AclBackend(small["static"]).close()
    assert "finalize" not in double.calls
    assert double.module.finalize() == 0


def test_acl_that_somebody_else_finalized(small, double):
    backend = AclBackend(small["static"])
    original, double.module.finalize = double.module.finalize, lambda: (original(), original())[1]
    backend.close()  # repeated finalize, 100037, is no failure


# --- outputs ----------------------------------------------------------------------


def spoiled(double, change):
    compute = double.compute

    def wrapped(om, arrays):
        log_probs, lens = compute(om, arrays)
        change(log_probs, lens)
        return [log_probs, lens]

    double.compute = wrapped


@MODES
def test_log_probs_that_are_not_finite(small, double, pipeline):
    spoiled(double, lambda log_probs, lens: log_probs.__setitem__((1, 7, 3), np.nan))  # the last valid frame
    backend = AclBackend(small["static"], pipeline=pipeline)
    with pytest.raises(ModelError) as error:
        list(backend.run_many([batch_of(2, 32)]))
    assert str(error.value) == (f"{small['static']}: log_probs are not finite; the weights or the precision are unfit")
    backend.close()


def test_what_stands_beyond_a_length_may_be_anything(small, double):
    spoiled(double, lambda log_probs, lens: log_probs.__setitem__((1, 8, 3), np.nan))
    backend = AclBackend(small["static"])
    assert backend.run(*batch_of(2, 32))[1].tolist() == [16, 8]
    backend.close()


@pytest.mark.parametrize("length", [-1, 17])
def test_output_lengths_that_cannot_be(small, double, length):
    spoiled(double, lambda log_probs, lens: lens.__setitem__(0, length))
    backend = AclBackend(small["static"])
    with pytest.raises(ModelError, match=rf"output lengths \[{length}, 8\] are beyond 16 frames"):
        backend.run(*batch_of(2, 32))
    backend.close()


def test_outputs_without_their_names_are_told_by_type_and_rank(folder, double):
    om = make_om(folder / "plain.om", "static", SMALL, output_names=("output_0", "output_1"))
    backend = AclBackend(om)
    assert_same([backend.run(*batch_of(2, 32))], [reference(om).run(*batch_of(2, 32))])
    backend.close()


def test_outputs_that_cannot_be_told_apart(folder, double):
    om = make_om(
        folder / "strange.om", "static", SMALL, output_names=("a", "b"), dtypes=("float32", "int32") + HALF[:1] * 2
    )
    with pytest.raises(ModelError, match=r"outputs are \['a', 'b'\], not log_probs and log_prob_lens"):
        AclBackend(om)


# --- .om and .json that do not fit ------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "gears", "claimed", "message"),
    [
        ("static", [(2, 32)], ("static", [(2, 48)]), r"feats is [2, 64, 32], the sidecar says [2, 64, 48]"),
        ("static", [(2, 32)], ("static", [(1, 32)]), r"feats is [2, 64, 32], the sidecar says [1, 64, 32]"),
        ("static", [(2, 32)], ("batch", [(2, 32)]), "inputs are ['feat_lens', 'feats'], the sidecar says ['ascend_"),
        ("batch", [(1, 32), (2, 32)], ("static", [(2, 32)]), "inputs are ['ascend_mbatch_shape_data', 'feat_lens'"),
        ("batch", [(1, 32), (2, 32)], ("batch", [(1, 32), (3, 32)]), "feats takes 16384 bytes, the sidecar's largest"),
        ("batch", [(1, 32), (4, 32)], ("batch", [(2, 32), (4, 32)]), "gears are [(1, 32), (4, 32)], the sidecar says"),
        ("dims", [(1, 16), (2, 32)], ("dims", [(1, 24), (2, 32)]), "gears are [(1, 16), (2, 32)], the sidecar says"),
        ("dims", [(1, 32), (2, 32)], ("batch", [(1, 32), (2, 32)]), "gears are [], the sidecar says"),
        ("batch", [(1, 32), (2, 32)], ("dims", [(1, 32), (2, 32)]), "gears are [], the sidecar says"),
    ],
)
def test_a_sidecar_of_another_model(folder, double, dynamic, kind, gears, claimed, message):
    om = write_om(folder / "other.om", dynamic, gears, kind)
    write_sidecar(om, *claimed)
    with pytest.raises(ModelError) as error:
        AclBackend(om)
    assert str(error.value).startswith(f"{om}: {message}")
    assert str(error.value).endswith("; the .om and its .json do not belong together, compile again")


def test_a_config_of_another_model(folder, double, dynamic):
    om = write_om(folder / "labels.om", dynamic, [(1, 32)], "static")
    raw = json.loads(json.dumps(dict(tiny_config().raw)))
    raw["labels"] = raw["labels"][:-1]
    write_sidecar(om, "static", [(1, 32)], config=raw)
    with pytest.raises(ModelError, match=r"gives log_probs \[1, 16, 29\] and lens \[1\], not \[1, 16, 28\]"):
        AclBackend(om)


def test_a_data_type_that_no_model_of_ours_has(folder, double):
    om = make_om(folder / "int8.om", "static", SMALL, dtypes=("int8", "int32", "float32", "int32"))
    with pytest.raises(ModelError, match="feats has ACL data type 2, not float32, float16, int32 or int64"):
        AclBackend(om)
    om = make_om(folder / "swapped.om", "static", SMALL, dtypes=("int32", "int32", "float32", "int32"))
    with pytest.raises(ModelError, match="feats and feat_lens have ACL types 3 and 3"):
        AclBackend(om)


def test_a_file_that_is_no_om(folder, double):
    om = write_sidecar(folder / "text.om", "static", [(1, 32)])
    om.write_text("not a model", encoding="utf-8")
    with pytest.raises(ModelError, match=r"text.om: acl.mdl.load_from_file failed with 100000 \(cannot load"):
        AclBackend(om)


DELETE = object()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a sidecar (format 'other', version 1)"),
        ({"version": 2}, "not a sidecar (format 'jasper-asr om sidecar', version 2)"),
        ({"gears": DELETE}, "missing key gears"),
        ({"config": DELETE}, "missing key config"),
        ({"masked": "yes"}, "not a sidecar (masked 'yes')"),
        ({"inputs": [{"name": "feats", "shape": [1, 64, 32]}]}, "not a sidecar (inputs [{'name': 'feats'"),
        ({"inputs": 3}, "not a sidecar ("),
        ({"gears": {"size": [1]}}, "not a sidecar (gears {'size': [1]})"),
        ({"gears": {"batch": [1, 0]}}, "not a sidecar (shape [0, 64, 32, 0] is not [batch, 64, frames, batch])"),
        ({"gears": {"batch": []}}, "not a sidecar (gears are empty)"),
        ({"gears": {"dims": [[1, 64, 16]]}}, "not a sidecar (shape [1, 64, 16] is not [batch, 64, frames, batch])"),
        ({"gears": {"dims": [[1, 80, 16, 1]]}}, "not a sidecar (shape [1, 80, 16, 1] is not"),
        ({"gears": {"dims": [[1, 64, 16, 2]]}}, "not a sidecar (shape [1, 64, 16, 2] is not"),
    ],
)
def test_a_sidecar_that_is_wrong(tmp_path, changes, message):
    om = write_sidecar(tmp_path / "m.om", "static", [(1, 32)])
    row = json.loads(om.with_suffix(".json").read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in row.items() if value is not DELETE}
    om.with_suffix(".json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(ModelError) as error:
        read_sidecar(om)
    assert str(error.value).startswith(f"{tmp_path / 'm.json'}: {message}")
    assert str(error.value).endswith("; compile the model again")


def test_files_that_are_missing_or_unreadable(tmp_path, double):
    om = tmp_path / "m.om"
    with pytest.raises(StorageError, match=r"m.om: no such file; check the path"):
        AclBackend(om)
    om.write_bytes(b"")
    with pytest.raises(ModelError, match=r"m.om: the file is empty; compile it again"):
        AclBackend(om)
    om.write_bytes(b"x")
    with pytest.raises(StorageError) as error:
        AclBackend(om)
    assert str(error.value) == f"{om}: no m.json beside it; copy both files that jasper compile wrote"
    om.with_suffix(".json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"m.json: not JSON .*; compile the model again"):
        AclBackend(om)
    assert double.calls == []


# --- without CANN, and from the outside -------------------------------------------


def test_without_cann(small):
    with pytest.raises(ModelError) as error:
        jasper_asr.load(small["static"], backend="acl")
    assert str(error.value) == (
        f"{small['static']}: the acl module cannot be imported (No module named 'acl'); an .om needs an Ascend "
        "machine: install CANN there and source its set_env.sh"
    )


def test_another_module_named_acl(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "acl", ModuleType("acl"))
    with pytest.raises(ModelError, match="the module named acl is not CANN's"):
        AclBackend(small["static"])


def test_a_cann_that_is_too_old(small, double, monkeypatch):
    monkeypatch.delattr(double.module.mdl, "get_input_dims")
    with pytest.raises(ModelError) as error:
        AclBackend(small["static"])
    assert str(error.value) == f"{small['static']}: this CANN has no acl.mdl.get_input_dims; install a newer one"


def test_an_om_needs_no_backend_name(small, double):
    with jasper_asr.load(small["static"]) as transcriber:
        assert transcriber.batch_size == 2
    assert double.calls[-1] == "finalize"


def test_options_that_a_backend_does_not_know(small, dynamic):
    with pytest.raises(UsageError, match="backend acl: takes no threads; leave it out"):
        jasper_asr.load(small["static"], backend="acl", threads=2)
    with pytest.raises(UsageError, match="backend ort: takes no device; leave it out"):
        jasper_asr.load(dynamic, device=0)
    with pytest.raises(UsageError, match="device -1: must be 0 or more"):
        AclBackend(small["static"], device=-1)


def test_models_that_are_no_om(dynamic):
    with pytest.raises(UsageError) as error:
        jasper_asr.load(dynamic, backend="acl")
    assert str(error.value) == f"{dynamic}: backend acl runs .om files; make one with jasper compile"
    with pytest.raises(UsageError, match=r"<graph>: backend acl runs .om files"):
        jasper_asr.load(CHECKPOINT, backend="acl", config=tiny_config())


def test_info_of_an_om_needs_no_cann(oms):
    facts = describe_om(oms["dims"])
    assert facts["inputs"] == {"feats": [4, 64, 304], "feat_lens": [4]}
    assert facts["gears"] == [[1, 160], [2, 240], [4, 304]]
    assert facts["soc_version"] == "Ascend310P3"
    assert "gears" not in describe_om(oms["static"])


def test_a_sidecar_is_what_the_module_says(oms):
    sidecar = read_sidecar(oms["batch"])
    assert dataclasses.replace(sidecar, facts={}) == acl.Sidecar(
        tiny_config(), {"feats": (-1, 64, 304), "feat_lens": (-1,)}, "batch", ((1, 304), (2, 304), (4, 304)), True, {}
    )
    assert set(sidecar.facts) == {"onnx", "onnx_sha256", "soc_version", "atc_version", "command"}
