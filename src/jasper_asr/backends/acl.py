"""Huawei Ascend NPUs, through PyACL (the `acl` module that CANN installs).

Contract-tested, not yet run on a board: every call here was checked against a strict double of `acl` (in the tests)
that follows the vendor's documentation. What is only inferred, not documented, is marked [I] and stands in one place:
`_Calls.value` (what calls without a return code give when they fail), `_CURES`, `_holds` (how much a size may exceed
its tensor), `_match_outputs` (names of outputs), `_Calls.lost` (what may be released without a context).

An .om has no room for the model's config, so beside `x.om` stands `x.json`, which the compile step writes:

    {"format": "jasper-asr om sidecar", "version": 1,
     "config": {...},                  the model config, NVIDIA's layout
     "masked": true,                   whether the graph masks what is beyond each length
     "inputs": [{"name": "feats", "shape": [1, 64, 4000]}, {"name": "feat_lens", "shape": [1]}],
                                       as in atc's --input_shape, in that order; -1 where a gear decides
     "gears": null,                    or {"batch": [1, 4, 8, 16]} as in --dynamic_batch_size,
                                       or {"dims": [[1, 64, 1024, 1], ...]} as in --dynamic_dims
     "onnx": "x.onnx", "onnx_sha256": "...", "soc_version": "...", "atc_version": "...", "command": [...]}

All but the last line is required; further keys are kept as facts.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr.backends import Shapes
from jasper_asr.config import ModelConfig, parse_config
from jasper_asr.errors import JasperError, ModelError, StorageError, UsageError

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

GEAR_INPUT = "ascend_mbatch_shape_data"
"""The input that atc adds to a model with gears; the gear setters fill it."""

_H2D, _D2H = 1, 2
_HUGE_FIRST = 0
_REPEATED_INIT, _REPEATED_FINALIZE = 100002, 100037

_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    3: np.dtype(np.int32),
    9: np.dtype(np.int64),
}
"""ACL's data types that our models use."""

_NPY_TYPES = {"float32": 11, "float16": 23, "int32": 5, "int64": 7}
"""NumPy's own type numbers, which `ptr_to_numpy` takes."""

_CURES = {  # [I] causes are documented, cures are our reading of them
    107001: "check the device number with npu-smi info",
    207001: "the device is out of memory: use a smaller batch or fewer gears, or end other processes on it",
    507899: "no driver answers: install the NPU driver and check npu-smi info",
    145013: "compile the model again, its gears are not those of the sidecar",
    145012: "compile the model again, its inputs are not those of the sidecar",
}
_DEFAULT_CURE = "the log that ASCEND_SLOG_PRINT_TO_STDOUT=1 shows says more"


@dataclass(frozen=True)
class Sidecar:
    """What `x.json` says of `x.om`: see the module. `gears` are (batch, frames); `kind` static, batch or dims."""

    config: ModelConfig
    inputs: dict[str, tuple[int, ...]]
    kind: str
    gears: tuple[tuple[int, int], ...]
    masked: bool
    facts: dict[str, Any]

    @property
    def shapes(self) -> Shapes:
        """What `AclBackend.run` takes."""
        batch_size = max(batch for batch, _ in self.gears)
        frames = max(frames for _, frames in self.gears)
        return Shapes(batch_size, frames, self.masked, () if self.kind == "static" else self.gears)


def read_sidecar(om: Path) -> Sidecar:
    """The sidecar of an .om. Raises StorageError without one, ModelError or ConfigError for one that is wrong."""
    path = om.with_suffix(".json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{om}: no {path.name} beside it; copy both files that jasper compile wrote") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read it ({error.strerror}); check the path") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({_one_line(error)}); compile the model again") from error
    try:
        return _parse_sidecar(raw, str(path))
    except JasperError:
        raise
    except KeyError as error:
        raise ModelError(f"{path}: missing key {error.args[0]}; compile the model again") from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"{path}: not a sidecar ({_one_line(error)}); compile the model again") from error


def describe_om(om: Path) -> dict[str, Any]:
    """Facts about an .om from its sidecar, as `model.export.describe` gives them for other kinds; needs no CANN."""
    from jasper_asr.model.checkpoint import file_sha256
    from jasper_asr.model.export import facts

    sidecar = read_sidecar(om)
    shapes = sidecar.shapes
    extra = {"model_sha256": file_sha256(om), "masked": sidecar.masked}
    gears = {"gears": [list(gear) for gear in shapes.gears]} if shapes.gears else {}
    size = [shapes.batch_size, sidecar.config.in_feats, shapes.frames]
    return facts(om, sidecar.config, size, gears | extra | sidecar.facts)


class AclBackend:
    """An .om on one NPU. One session, one stream; safe to use from any thread, one call at a time.

    With `pipeline` batches run asynchronously in two slots, so that `run_many` copies and decodes one while the other
    is computed; without, synchronously. An instance never does both. Raises UsageError, StorageError or ModelError.

    `last_split` holds the seconds of the last `run`: bringing inputs to the device, computing, fetching outputs.
    """

    def __init__(self, model: Path | bytes, *, device: int = 0, pipeline: bool = False) -> None:
        if not isinstance(model, Path) or model.suffix != ".om":
            name = model if isinstance(model, Path) else "<graph>"
            raise UsageError(f"{name}: backend acl runs .om files; make one with jasper compile")
        if device < 0:
            raise UsageError(f"device {device}: must be 0 or more")
        _check_file(model)
        self._sidecar = read_sidecar(model)
        self.config = self._sidecar.config
        self.shapes = self._sidecar.shapes
        self.properties = {key: str(value) for key, value in self._sidecar.facts.items()}
        self._name = str(model)
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._streaming = False
        self._in_flight = False
        self.last_split: tuple[float, float, float] | None = None
        self._calls = _Calls(_import_acl(self._name), self._name)
        self._stack: ExitStack | None = None
        with ExitStack() as stack:
            self._open(device, stack)
            self._stack = stack.pop_all()

    def run(self, feats: Float32, lens: Int32) -> tuple[Float32, Int32]:
        """See Backend.run; feats must have one of the shapes that `shapes` names. Raises ModelError."""
        with self._entered():
            if self._streaming:
                raise UsageError(f"{self._name}: run_many is under way; use up or close its iterator first")
            slot = self._slots[0]
            started = time.perf_counter()
            self._upload(slot, feats, lens)
            uploaded = time.perf_counter()
            self._start(slot)
            self._wait()
            computed = time.perf_counter()
            result = self._download(slot)
            self.last_split = (uploaded - started, computed - uploaded, time.perf_counter() - computed)
            return result

    def run_many(self, batches: Iterable[tuple[Float32, Int32]]) -> Iterator[tuple[Float32, Int32]]:
        """`run` for each batch, in order. In a pipeline the next batch is fetched and copied while one is computed.

        An error ends the iteration; in a pipeline it may come one batch early, and that batch's result is lost.
        """
        if self._pipeline:
            yield from self._stream_batches(batches)
        else:
            for feats, lens in batches:
                yield self.run(feats, lens)

    def close(self) -> None:
        """Give back everything on the device; twice is fine. Raises ModelError, at the end, if some of it failed."""
        with self._lock:
            stack, self._stack = self._stack, None
            if stack is None:
                return
            self._calls.lost = not self._calls.undo("rt.set_context", self._context)
            stack.close()
        if self._calls.failures:
            raise self._calls.failures[0]

    # --- up: in the order that the vendor prescribes; the stack goes down in the order that it prescribes ---

    def _open(self, device: int, stack: ExitStack) -> None:
        calls = self._calls
        _PROCESS.enter(calls, device)
        stack.callback(_PROCESS.leave, calls, device)
        self._context: int = calls.get("rt.create_context", device)
        stack.callback(calls.undo, "rt.destroy_context", self._context)
        self._stream: int = calls.get("rt.create_stream")
        stack.callback(calls.undo_bound, "rt.destroy_stream", self._stream)
        # taken after the model but released after it too: so their place on the stack is kept here
        memory = stack.enter_context(ExitStack())
        description = stack.enter_context(ExitStack())
        self._model: int = calls.get("mdl.load_from_file", self._name)
        stack.callback(calls.undo_bound, "mdl.unload", self._model)
        self._desc: int = calls.value("mdl.create_desc")
        description.callback(calls.undo, "mdl.destroy_desc", self._desc)
        calls.do("mdl.get_desc", self._desc, self._model)
        self._read_description()
        self._slots = [self._make_slot(memory) for _ in range(2 if self._pipeline else 1)]
        stack.callback(calls.undo_bound, "rt.synchronize_stream", self._stream)

    def _read_description(self) -> None:
        self._inputs = self._read_tensors("input")
        self._outputs = self._read_tensors("output")
        self._check_inputs()
        self._gear_index = self._read_gears()
        self._log_probs, self._lens = _match_outputs(self._outputs, self._name)
        if self._sidecar.kind == "static":
            self._check_outputs(self._sidecar.gears[0], self._log_probs.dims, self._lens.dims)

    def _read_tensors(self, kind: str) -> list["_Tensor"]:
        calls, desc = self._calls, self._desc
        tensors = []
        for index in range(calls.value(f"mdl.get_num_{kind}s", desc)):
            name = calls.value(f"mdl.get_{kind}_name_by_index", desc, index, failure="")
            size = calls.value(f"mdl.get_{kind}_size_by_index", desc, index)
            code = calls.value(f"mdl.get_{kind}_data_type", desc, index, failure=-1)
            dims = _dims(calls.get(f"mdl.get_{kind}_dims", desc, index))
            tensors.append(_Tensor(index, name, size, code, dims))
        return tensors

    def _check_inputs(self) -> None:
        """Names, types, dims and sizes that the sidecar says; -1 stands where a gear decides."""
        sidecar = self._sidecar
        by_name = {tensor.name: tensor for tensor in self._inputs}
        expected = {*sidecar.inputs} | ({GEAR_INPUT} if sidecar.kind != "static" else set())
        if set(by_name) != expected:
            raise self._mismatch(f"inputs are {sorted(by_name)}, the sidecar says {sorted(expected)}")
        self._feats, self._feat_lens = by_name["feats"], by_name["feat_lens"]
        largest = {"feats": self._largest_feats(), "feat_lens": self.shapes.batch_size or 0}
        for name, shape in sidecar.inputs.items():
            tensor = by_name[name]
            if sidecar.kind == "static" and tensor.dims != shape:
                raise self._mismatch(f"{name} is {list(tensor.dims)}, the sidecar says {list(shape)}")
            needed = largest[name] * _dtype(tensor, self._name).itemsize
            if not _holds(tensor.size, needed):
                raise self._mismatch(f"{name} takes {tensor.size} bytes, the sidecar's largest shape has {needed}")
        if self._feats.code not in (0, 1) or self._feat_lens.code not in (3, 9):
            raise self._mismatch(f"feats and feat_lens have ACL types {self._feats.code} and {self._feat_lens.code}")

    def _largest_feats(self) -> int:
        return max(batch * self.config.in_feats * frames for batch, frames in self._sidecar.gears)

    def _read_gears(self) -> int:
        """Index of the gear input, -1 for a static model; the model's gears must be the sidecar's."""
        calls, desc, sidecar = self._calls, self._desc, self._sidecar
        if sidecar.kind == "static":
            return -1
        if sidecar.kind == "batch":
            info = calls.get("mdl.get_dynamic_batch", desc)
            frames = sidecar.inputs["feats"][2]
            found = {(batch, frames) for batch in info.get("batch", [])[: info.get("batchCount", 0)]}
        else:
            count = calls.get("mdl.get_input_dynamic_gear_count", desc, -1)
            rows = calls.get("mdl.get_input_dynamic_dims", desc, -1, count) if count else []
            found = {(dims[0], dims[2]) for dims in map(_dims, rows) if len(dims) == 4}
        if found != set(sidecar.gears):
            raise self._mismatch(f"gears are {sorted(found)}, the sidecar says {sorted(sidecar.gears)}")
        index: int = calls.get("mdl.get_input_index_by_name", desc, GEAR_INPUT)
        return index

    def _make_slot(self, memory: ExitStack) -> "_Slot":
        inputs, addresses = self._make_dataset(self._inputs, memory)
        outputs, results = self._make_dataset(self._outputs, memory)
        slot = _Slot(inputs, outputs, addresses, results)
        for tensor in (self._log_probs, self._lens):
            host = self._calls.get("rt.malloc_host", tensor.size)
            memory.callback(self._calls.undo_bound, "rt.free_host", host)
            slot.host[tensor.index] = host
        return slot

    def _make_dataset(self, tensors: list["_Tensor"], memory: ExitStack) -> tuple[int, list[int]]:
        calls = self._calls
        dataset: int = calls.value("mdl.create_dataset")
        memory.callback(calls.undo, "mdl.destroy_dataset", dataset)
        addresses = []
        for tensor in tensors:
            after_free = memory.enter_context(ExitStack())  # memory goes first, then the buffer that names it
            address = calls.get("rt.malloc", tensor.size, _HUGE_FIRST)
            memory.callback(calls.undo_bound, "rt.free", address)
            buffer = calls.value("create_data_buffer", address, tensor.size)
            after_free.callback(calls.undo, "destroy_data_buffer", buffer)
            calls.get("mdl.add_dataset_buffer", dataset, buffer)
            addresses.append(address)
        return dataset, addresses

    # --- one batch: up, start, wait, down ---

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The lock, and the context in this thread, for the time of one step."""
        with self._lock:
            if self._stack is None:
                raise ModelError(f"{self._name}: the backend is closed; open the model again")
            self._calls.do("rt.set_context", self._context)
            yield

    def _upload(self, slot: "_Slot", feats: Float32, lens: Int32) -> None:
        gear = (feats.shape[0], feats.shape[-1])
        wanted = (gear[0], self.config.in_feats, gear[1])
        if gear not in self._sidecar.gears or feats.shape != wanted or lens.shape != wanted[:1]:
            takes = ", ".join(f"[{batch}, {self.config.in_feats}, {frames}]" for batch, frames in self._sidecar.gears)
            raise ModelError(
                f"{self._name}: feats {list(feats.shape)} with lens {list(lens.shape)}; the model takes {takes}"
            )
        for tensor, values in ((self._feats, feats), (self._feat_lens, lens)):
            array = np.ascontiguousarray(values, _dtype(tensor, self._name))
            pointer, owner = self._borrow(array)
            self._calls.do("rt.memcpy", slot.inputs[tensor.index], tensor.size, pointer, array.nbytes, _H2D)
            del owner  # the pointer only borrows: its memory must live until here
        slot.gear = gear

    def _borrow(self, array: NDArray[Any]) -> tuple[int, object]:
        """A pointer to the values of `array`, and the object that must outlive it."""
        if hasattr(self._calls.acl.util, "bytes_to_ptr"):
            content = array.tobytes()
            return self._calls.value("util.bytes_to_ptr", content), content
        return self._calls.value("util.numpy_to_ptr", array), array

    def _start(self, slot: "_Slot") -> None:
        """Set the gear, note what comes out, and execute (or, in a pipeline, enqueue) what was uploaded."""
        calls = self._calls
        batch, frames = slot.gear
        setting = (self._model, slot.input_set, self._gear_index)
        if self._sidecar.kind == "batch":
            calls.do("mdl.set_dynamic_batch_size", *setting, batch)
        elif self._sidecar.kind == "dims":
            dims = [batch, self.config.in_feats, frames, batch]
            calls.do("mdl.set_input_dynamic_dims", *setting, {"name": "", "dimCount": len(dims), "dims": dims})
        slot.log_probs_dims, slot.lens_dims = self._output_dims(slot.gear)
        if self._pipeline:
            calls.do("mdl.execute_async", self._model, slot.input_set, slot.output_set, self._stream)
            self._in_flight = True
        else:
            calls.do("mdl.execute", self._model, slot.input_set, slot.output_set)

    def _output_dims(self, gear: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self._sidecar.kind == "static":
            return self._log_probs.dims, self._lens.dims
        log_probs, lens = (
            _dims(self._calls.get("mdl.get_cur_output_dims", self._desc, tensor.index))
            for tensor in (self._log_probs, self._lens)
        )
        self._check_outputs(gear, log_probs, lens)
        return log_probs, lens

    def _check_outputs(self, gear: tuple[int, int], log_probs: tuple[int, ...], lens: tuple[int, ...]) -> None:
        batch, frames = gear
        expected = (batch, self.config.output_length(frames), self.config.n_classes)
        if log_probs != expected or lens != (batch,):
            raise self._mismatch(f"gives log_probs {list(log_probs)} and lens {list(lens)}, not {list(expected)}")
        for tensor, dims in ((self._log_probs, log_probs), (self._lens, lens)):
            needed = prod(dims) * _dtype(tensor, self._name).itemsize
            fits = _holds(tensor.size, needed) if self._gear_index < 0 else tensor.size >= needed
            if not fits:
                raise self._mismatch(f"{tensor.name} has {tensor.size} bytes for {list(dims)}, not {needed}")

    def _wait(self) -> None:
        if self._in_flight:
            self._in_flight = False  # done or failed, nothing runs after this
            self._calls.do("rt.synchronize_stream", self._stream)

    def _download(self, slot: "_Slot") -> tuple[Float32, Int32]:
        log_probs = self._fetch(slot, self._log_probs, slot.log_probs_dims).astype(np.float32)
        lens = self._fetch(slot, self._lens, slot.lens_dims).astype(np.int32)
        if not ((lens >= 0) & (lens <= log_probs.shape[1])).all():
            raise ModelError(f"{self._name}: output lengths {lens.tolist()} are beyond {log_probs.shape[1]} frames")
        # a row's valid part decides; what stands beyond a length is nobody's business
        if not all(np.isfinite(row[:length]).all() for row, length in zip(log_probs, lens, strict=True)):
            raise ModelError(f"{self._name}: log_probs are not finite; the weights or the precision are unfit")
        return log_probs, lens

    def _fetch(self, slot: "_Slot", tensor: "_Tensor", dims: tuple[int, ...]) -> NDArray[Any]:
        """An output's values, in memory that the next batch may overwrite or, with `bytes`, in memory of their own."""
        calls, host, dtype = self._calls, slot.host[tensor.index], _dtype(tensor, self._name)
        count = prod(dims) * dtype.itemsize
        calls.do("rt.memcpy", host, tensor.size, slot.outputs[tensor.index], count, _D2H)
        if hasattr(calls.acl.util, "ptr_to_bytes"):
            return np.frombuffer(calls.value("util.ptr_to_bytes", host, count), dtype).reshape(dims)
        values: NDArray[Any] = calls.value("util.ptr_to_numpy", host, dims, _NPY_TYPES[dtype.name])
        return values

    # --- the pipeline ---

    def _stream_batches(self, batches: Iterable[tuple[Float32, Int32]]) -> Iterator[tuple[Float32, Int32]]:
        """start A, upload B, wait, start B, download A: the lock is held in each step, not while others decode."""
        with self._entered():
            if self._streaming:
                raise UsageError(f"{self._name}: run_many is under way; use up or close its iterator first")
            self._streaming = True
        running: _Slot | None = None
        try:
            for index, (feats, lens) in enumerate(batches):
                slot = self._slots[index % 2]
                with self._entered():
                    self._upload(slot, feats, lens)
                    self._wait()
                    self._start(slot)
                    result = self._download(running) if running else None
                running = slot
                if result:
                    yield result
            if running:
                with self._entered():
                    self._wait()
                    result = self._download(running)
                yield result
        finally:
            self._drain()

    def _drain(self) -> None:
        """After an early end: nothing may still run when the slots are used again."""
        with self._lock:
            self._streaming = False
            if self._stack and self._in_flight and self._calls.undo("rt.set_context", self._context):
                self._calls.undo("rt.synchronize_stream", self._stream)
                self._in_flight = False

    def _mismatch(self, what: str) -> ModelError:
        return ModelError(f"{self._name}: {what}; the .om and its .json do not belong together, compile again")


@dataclass(frozen=True)
class _Tensor:
    """An input or output as the model describes it; `size` in bytes, of the largest gear; `code` is ACL's type."""

    index: int
    name: str
    size: int
    code: int
    dims: tuple[int, ...]


@dataclass
class _Slot:
    """Buffers for one batch: two datasets, device addresses by index, host addresses of the two outputs."""

    input_set: int
    output_set: int
    inputs: list[int]
    outputs: list[int]
    host: dict[int, int] = field(default_factory=dict)
    gear: tuple[int, int] = (0, 0)
    log_probs_dims: tuple[int, ...] = ()
    lens_dims: tuple[int, ...] = ()


class _Calls:
    """Calls into `acl`, each one checked. `name` is the model file, which errors begin with."""

    def __init__(self, acl: Any, name: str) -> None:
        self.acl = acl
        self.name = name
        self.failures: list[ModelError] = []
        self.lost = False
        """[I] No context: device memory, stream and model go with reset_device; host objects need no context."""

    def do(self, call: str, *args: Any) -> None:
        """A call that returns its code."""
        if code := self._function(call)(*args):
            raise self.error(call, code)

    def get(self, call: str, *args: Any) -> Any:
        """A call that returns (value, code)."""
        value, code = self._function(call)(*args)
        if code:
            raise self.error(call, code)
        return value

    def value(self, call: str, *args: Any, failure: int | str = 0) -> Any:
        """A call that returns its value alone; [I] a failed one gives None or `failure`: a null handle, no size."""
        value = self._function(call)(*args)
        if value is None or (isinstance(value, int | str) and value == failure):
            raise self.error(call, None)
        return value

    def undo(self, call: str, *args: Any) -> bool:
        """A release: its failure stops no other release, it is kept in `failures`. True when it went well."""
        code = self._function(call)(*args)
        if code:
            self.failures.append(self.error(call, code))
        return not code

    def undo_bound(self, call: str, *args: Any) -> None:
        """`undo` of what lives in a context."""
        if not self.lost:
            self.undo(call, *args)

    def error(self, call: str, code: int | None) -> ModelError:
        """Reads acl's message, in the thread of the failure, which also clears it."""
        message = _one_line(self.acl.get_recent_err_msg() or "no message")
        cause = "failed" if code is None else f"failed with {code}"
        return ModelError(f"{self.name}: acl.{call} {cause} ({message}); {_CURES.get(code or 0, _DEFAULT_CURE)}")

    def _function(self, call: str) -> Any:
        target = self.acl
        for part in call.split("."):
            target = getattr(target, part, None)
        if target is None:
            raise ModelError(f"{self.name}: this CANN has no acl.{call}; install a newer one")
        return target


class _Process:
    """acl is initialised once per process and a device set once, however many backends are open: who is last, ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: list[int] = []
        self._ours = False

    def enter(self, calls: _Calls, device: int) -> None:
        with self._lock:
            if not self._devices:
                self._ours = self._initialise(calls)
            try:
                if device not in self._devices:
                    calls.do("rt.set_device", device)
            except BaseException:
                self._finalize(calls)
                raise
            self._devices.append(device)

    def leave(self, calls: _Calls, device: int) -> None:
        with self._lock:
            self._devices.remove(device)
            if device not in self._devices:
                calls.undo("rt.reset_device", device)
            self._finalize(calls)

    def _initialise(self, calls: _Calls) -> bool:
        """False when somebody else in this process did it before: then it is also theirs to finalize."""
        code = calls.acl.init()
        if code == _REPEATED_INIT:
            calls.acl.get_recent_err_msg()
            return False
        if code:
            raise calls.error("init", code)
        return True

    def _finalize(self, calls: _Calls) -> None:
        if self._devices or not self._ours:
            return
        self._ours = False
        code = calls.acl.finalize()
        if code:
            error = calls.error("finalize", code)
            if code != _REPEATED_FINALIZE:
                calls.failures.append(error)


_PROCESS = _Process()


def _import_acl(name: str) -> Any:
    try:
        acl = import_module("acl")
    except ImportError as error:
        raise ModelError(
            f"{name}: the acl module cannot be imported ({_one_line(error)}); an .om needs an Ascend machine: "
            "install CANN there and source its set_env.sh"
        ) from error
    if not (hasattr(acl, "rt") and hasattr(acl, "mdl")):
        raise ModelError(f"{name}: the module named acl is not CANN's; source CANN's set_env.sh, remove the other")
    return acl


def _check_file(model: Path) -> None:
    if not model.is_file():
        raise StorageError(f"{model}: no such file; check the path")
    if model.stat().st_size == 0:
        raise ModelError(f"{model}: the file is empty; compile it again")


def _parse_sidecar(raw: Any, path: str) -> Sidecar:
    if raw["format"] != "jasper-asr om sidecar" or raw["version"] != 1:
        raise ValueError(f"format {raw['format']!r}, version {raw['version']!r}")
    config = parse_config(raw["config"], path)
    inputs = {row["name"]: tuple(row["shape"]) for row in raw["inputs"]}
    if list(inputs) != ["feats", "feat_lens"] or [len(shape) for shape in inputs.values()] != [3, 1]:
        raise ValueError(f"inputs {raw['inputs']}")
    if not isinstance(raw["masked"], bool):
        raise ValueError(f"masked {raw['masked']!r}")
    kind, gears = _parse_gears(raw["gears"], inputs["feats"], inputs["feat_lens"], config.in_feats)
    known = ("format", "version", "config", "masked", "inputs", "gears")
    facts = {key: value for key, value in raw.items() if key not in known}
    return Sidecar(config, inputs, kind, gears, raw["masked"], facts)


def _parse_gears(
    raw: Any, feats: tuple[int, ...], lens: tuple[int, ...], bands: int
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """(kind, (batch, frames) of each gear); all dims of all inputs are flattened in a row of "dims": [B, F, T, B]."""
    if raw is None:
        kind, rows = "static", [[*feats, *lens]]
    elif list(raw) == ["batch"]:
        kind, rows = "batch", [[batch, feats[1], feats[2], batch] for batch in raw["batch"]]
    elif list(raw) == ["dims"]:
        kind, rows = "dims", raw["dims"]
    else:
        raise ValueError(f"gears {raw}")
    for row in rows:
        sound = len(row) == 4 and all(type(size) is int and size > 0 for size in row)
        if not sound or row[0] != row[3] or row[1] != bands:
            raise ValueError(f"shape {row} is not [batch, {bands}, frames, batch]")
    if not rows:
        raise ValueError("gears are empty")
    return kind, tuple((row[0], row[2]) for row in rows)


def _match_outputs(outputs: list[_Tensor], name: str) -> tuple[_Tensor, _Tensor]:
    """(log_probs, lens). [I] An .om calls its outputs `Node:0:onnx_name`: the last field, else type and rank."""
    by_name = {tensor.name.rsplit(":", 1)[-1]: tensor for tensor in outputs}
    if {"log_probs", "log_prob_lens"} <= set(by_name):
        return by_name["log_probs"], by_name["log_prob_lens"]
    log_probs = [tensor for tensor in outputs if tensor.code in (0, 1) and len(tensor.dims) == 3]
    lens = [tensor for tensor in outputs if tensor.code in (3, 9) and len(tensor.dims) == 1]
    if len(log_probs) != 1 or len(lens) != 1:
        raise ModelError(
            f"{name}: outputs are {[tensor.name for tensor in outputs]}, not log_probs and log_prob_lens; "
            "make the ONNX with jasper export"
        )
    return log_probs[0], lens[0]


def _holds(size: int, needed: int) -> bool:
    """Whether `size` is that of a tensor of `needed` bytes. [I] Sizes may be padded to the 64 bytes of an address."""
    return needed <= size < needed + 64


def _dtype(tensor: _Tensor, name: str) -> np.dtype[Any]:
    if tensor.code not in _DTYPES:
        raise ModelError(
            f"{name}: {tensor.name} has ACL data type {tensor.code}, not float32, float16, int32 or int64; "
            "compile it with --output_type=FP32"
        )
    return _DTYPES[tensor.code]


def _dims(raw: dict[str, Any]) -> tuple[int, ...]:
    return tuple(raw["dims"][: raw["dimCount"]])


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
