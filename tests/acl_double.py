"""A strict double of PyACL, the `acl` module of Huawei's CANN, for machines without an NPU.

    with AclDouble() as double:      # sys.modules["acl"] is the double; on leaving, finish() looks for leaks
        ...
    double.calls                     # the names of all calls made

It keeps the contract: exact signatures, return conventions, error codes, per-thread contexts and messages. Where the
real library would corrupt memory, leak or return stale numbers in silence, the double raises AclMisuse; each misuse is
also kept, so that code which swallows exceptions fails in `finish`. Device pointers are numbers that point nowhere.
Asynchronous work runs when its stream is synchronised, and until then its outputs are poisoned. `fail_at=N` makes the
Nth call fail (counted from 1, `get_recent_err_msg` not counted); a release that fails so is taken to have released.

A fake .om (`write_om`) is a JSON file that names an ONNX file, and the shapes and types of each gear; executing it
runs the ONNX in onnxruntime.

[I] inferred, not documented: what calls without a code return when they fail (0, "" or -1); that get_input_dims gives
-1 where gears differ, and get_output_dims the largest gear; that a file which is no .om gives 100000; that utilities
need no initialised acl; that destroy_desc, destroy_dataset and destroy_data_buffer need no context.
"""

import inspect
import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

GEAR_INPUT = "ascend_mbatch_shape_data"

INVALID, UNINITIALISED, REPEATED_INIT, REPEATED_FINALIZE = 100000, 100001, 100002, 100037
BAD_COUNT, BAD_DEVICE, NO_CONTEXT, OTHER_CONTEXT = 107000, 107001, 107002, 107003
SMALL_BUFFER, NO_MODEL, BAD_DIM_COUNT, BAD_GEAR = 145000, 145003, 145012, 145013
OUT_OF_MEMORY, EXECUTE_FAILED = 207001, 507011

ACL_TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4, "int64": 9}
NPY_TYPES = {0: "bool", 1: "int8", 5: "int32", 7: "int64", 11: "float32", 23: "float16"}


class AclMisuse(AssertionError):  # noqa: N818
    """What a board would punish: by a crash, a leak, or numbers that are wrong."""


# --- fake .om files ---------------------------------------------------------------


def write_om(
    path: Path,
    onnx: Path,
    gears: Sequence[tuple[int, int]],
    kind: str = "static",
    *,
    bands: int = 64,
    dtypes: Sequence[str] = ("float32", "int32", "float32", "int32"),
    output_names: Sequence[str] = ("Node_1:0:log_probs", "Node_2:0:log_prob_lens"),
) -> Path:
    """A fake .om of a Jasper ONNX. `gears` are (batch, frames), just one when `kind` is static, else batch or dims.

    `dtypes` are those of feats, feat_lens, log_probs and log_prob_lens.
    """
    rows = [_gear(onnx, [batch, bands, frames]) for batch, frames in gears]
    names = ["feats", "feat_lens", "log_probs", "log_prob_lens"]
    record = {
        "format": "fake om",
        "onnx": str(onnx),
        "kind": kind,
        "inputs": [{"name": name, "dtype": dtype} for name, dtype in zip(names[:2], dtypes[:2], strict=True)],
        "outputs": [
            {"name": name, "onnx": plain, "dtype": dtype}
            for name, plain, dtype in zip(output_names, names[2:], dtypes[2:], strict=True)
        ],
        "gears": rows,
    }
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def _gear(onnx: Path, feats: list[int]) -> dict[str, Any]:
    """Shapes of one gear; what comes out is found by trying."""
    arrays = {"feats": np.zeros(feats, np.float32), "feat_lens": np.full(feats[0], feats[2], np.int32)}
    outputs = _session(str(onnx)).run(["log_probs", "log_prob_lens"], arrays)
    return {"inputs": [feats, [feats[0]]], "outputs": [list(output.shape) for output in outputs]}


@lru_cache(maxsize=16)
def _session(onnx: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class _Tensor:
    """An input or output of a model: dims of each gear, -1 in `dims` where they differ."""

    name: str
    onnx: str
    dtype: str
    per_gear: tuple[tuple[int, ...], ...]

    def size(self, gear: int) -> int:
        return prod(self.per_gear[gear]) * np.dtype(self.dtype).itemsize

    @property
    def largest(self) -> int:
        return max(self.size(gear) for gear in range(len(self.per_gear)))

    @property
    def dims(self) -> list[int]:
        return [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*self.per_gear, strict=True)]


class _Om:
    """The fake .om as loaded."""

    def __init__(self, path: str) -> None:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record["format"] != "fake om":
            raise ValueError("no fake .om")
        self.onnx: str = record["onnx"]
        self.kind: str = record["kind"]
        gears = record["gears"]
        self.inputs = [
            _Tensor(row["name"], row["name"], row["dtype"], tuple(tuple(gear["inputs"][index]) for gear in gears))
            for index, row in enumerate(record["inputs"])
        ]
        self.outputs = [
            _Tensor(row["name"], row["onnx"], row["dtype"], tuple(tuple(gear["outputs"][index]) for gear in gears))
            for index, row in enumerate(record["outputs"])
        ]
        self.batches = [gear["inputs"][0][0] for gear in gears]
        self.flat_dims = [[size for shape in gear["inputs"] for size in shape] for gear in gears]
        if self.kind != "static":
            count = 1 if self.kind == "batch" else len(self.flat_dims[0])
            self.inputs.append(_Tensor(GEAR_INPUT, "", "int32", ((count,),) * len(gears)))

    def compute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        feeds = {
            tensor.onnx: array.astype(np.float32) if array.dtype == np.float16 else array
            for tensor, array in zip(self.inputs, arrays, strict=True)
            if tensor.onnx
        }
        results = _session(self.onnx).run([tensor.onnx for tensor in self.outputs], feeds)
        with np.errstate(over="ignore"):
            return [result.astype(tensor.dtype) for tensor, result in zip(self.outputs, results, strict=True)]


# --- what the double keeps --------------------------------------------------------


@dataclass(eq=False)
class _Block:
    """An allocation; `filled` counts the bytes from its start that hold values."""

    address: int
    data: np.ndarray
    device: bool
    context: int
    filled: int = 0

    def poison(self) -> None:
        self.data[:] = 0xFF  # NaN as floating point, -1 as integer
        self.filled = 0


@dataclass(eq=False)
class _Borrowed:
    """A pointer into a Python object that somebody else must keep alive."""

    owner: Any
    size: int

    def abandoned(self) -> bool:
        return sys.getrefcount(self.owner) <= 2  # this attribute and the argument: bytes take no weak reference

    def bytes(self) -> np.ndarray:
        if isinstance(self.owner, bytes):
            return np.frombuffer(self.owner, np.uint8)
        return self.owner.reshape(-1).view(np.uint8)


@dataclass
class _Work:
    """Work in flight on a stream."""

    run: Callable[[], None]
    reads: list[_Block]
    writes: list[_Block]
    model: int = 0
    dataset: int = 0


@dataclass
class _Model:
    om: _Om
    context: int
    current: int | None = None
    """Gear that the last setter chose."""
    set_for: int | None = None
    """Dataset that the last setter prepared; an execute uses it up."""
    mode: str = ""
    busy: bool = False


@dataclass
class _Stream:
    context: int
    queue: list[_Work] = field(default_factory=list)


@dataclass
class _Context:
    device: int


@dataclass
class _Desc:
    om: _Om | None = None
    model: int = 0


@dataclass
class _Dataset:
    buffers: list[int] = field(default_factory=list)


@dataclass
class _Buffer:
    address: int
    size: int


class _Code(Exception):  # noqa: N818
    """An error code on its way to the caller."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class _Spec:
    name: str
    failed: Callable[[int], Any]
    context: bool
    initialised: bool
    release: bool


_FAILED: dict[str, Callable[[int], Any]] = {
    "ret": lambda code: code,
    "int,ret": lambda code: (0, code),
    "dict,ret": lambda code: ({}, code),
    "list,ret": lambda code: ([], code),
    "int": lambda code: 0,
    "type": lambda code: -1,
    "str": lambda code: "",
    "object": lambda code: None,
}


def _api(name: str, returns: str = "ret", *, context: bool = True, initialised: bool = True, release: bool = False):
    """Marks a method as `acl.<name>`; `release`: an injected failure happens after the deed."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        method.spec = _Spec(name, _FAILED[returns], context, initialised, release)
        return method

    return mark


class AclDouble:
    """The double; `module` is what `import acl` gives. `bytes_api` chooses the newer or the older `acl.util`."""

    def __init__(
        self,
        *,
        bytes_api: bool = True,
        devices: int = 1,
        memory: int = 1 << 34,
        fail_at: int | None = None,
        fail_code: int = EXECUTE_FAILED,
    ) -> None:
        self.devices, self.memory = devices, memory
        self.fail_at, self.fail_code = fail_at, fail_code
        self.calls: list[str] = []
        self.injected = ""
        """The call that was made to fail; empty if there were fewer calls."""
        self.misuses: list[str] = []
        self.compute: Callable[[_Om, list[np.ndarray]], list[np.ndarray]] = lambda om, arrays: om.compute(arrays)
        """Tests may wrap this, for outputs that are wrong or slow."""
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._messages: dict[int, str] = {}
        self._initialised = False
        self._context_lost = False
        """The last set_context failed: what lives in a context cannot be released, and goes with reset_device."""
        self._set_devices: set[int] = set()
        self._blocks: dict[int, _Block] = {}
        self._freed: dict[int, int] = {}
        self._borrowed: dict[int, _Borrowed] = {}
        self._executing: dict[int, list[_Block]] = {}
        """Blocks of each synchronous execute under way, by model."""
        self._live: dict[str, dict[int, Any]] = {}
        self._dead: dict[int, str] = {}
        self._next = 1
        self._next_address = {True: 0xD000_0000_0000_0000, False: 0xB000_0000_0000_0000, None: 0xC000_0000_0000_0000}
        self.module = self._build(bytes_api)

    # --- installing and finishing ---

    def __enter__(self) -> "AclDouble":
        self._replaced = sys.modules.get("acl")
        sys.modules["acl"] = self.module
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._replaced is None:
            del sys.modules["acl"]
        else:
            sys.modules["acl"] = self._replaced
        if error is None:
            self.finish()

    def finish(self) -> None:
        """Raise AclMisuse for any misuse so far, a leak, a missing finalize, or a message that nobody read."""
        found = list(self.misuses)
        bound = () if self._context_lost else ("stream", "model")
        for kind, table in self._live.items():
            if table and (kind in bound or kind not in ("stream", "model")):
                found.append(f"leak: {len(table)} of {kind}")
        if self._blocks and not self._context_lost:
            places = sorted({"device" if block.device else "host" for block in self._blocks.values()})
            found.append(f"leak: {len(self._blocks)} blocks of {' and '.join(places)} memory")
        if self._set_devices:
            found.append(f"leak: no reset_device of {sorted(self._set_devices)}")
        if self._initialised:
            found.append("no finalize")
        found += [f"nobody read: {message}" for message in self._messages.values()]
        if found:
            raise AclMisuse("; ".join(found))

    def _build(self, bytes_api: bool) -> ModuleType:
        root = ModuleType("acl")
        for part in ("rt", "mdl", "util"):
            setattr(root, part, ModuleType(f"acl.{part}"))
        absent = ("numpy_to_ptr", "ptr_to_numpy") if bytes_api else ("bytes_to_ptr", "ptr_to_bytes")
        for _, method in inspect.getmembers(self, inspect.ismethod):
            spec = getattr(method, "spec", None)
            if spec is None:
                continue
            group, _, name = spec.name.rpartition(".")
            if name not in absent:
                setattr(getattr(root, group) if group else root, name, self._wrapped(spec, method))
        root.get_recent_err_msg = self._get_recent_err_msg
        return root

    def _wrapped(self, spec: _Spec, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with self._lock:
                return self._perform(spec, method, args)

        call.__name__ = spec.name
        return call

    def _perform(self, spec: _Spec, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.calls.append(spec.name)
        self._check_state(spec)
        injected = len(self.calls) == self.fail_at
        try:
            if injected and not spec.release:
                inspect.signature(method).bind(*args)
                self._before_failure(spec, args)
                result = None
            else:
                result = method(*args)
        except _Code as error:
            self._set_message(f"{error}: acl.{spec.name}, code {error.code}")
            return spec.failed(error.code)
        if injected:
            self.injected = spec.name
            self._set_message(f"EZ9999: Inner Error!\n\tinjected failure of call {self.fail_at}, acl.{spec.name}")
            return spec.failed(self.fail_code)
        return result

    def _before_failure(self, spec: _Spec, args: tuple[Any, ...]) -> None:
        """What an injected failure of a call that is no release does all the same."""
        if spec.name == "rt.set_context":
            self._context_lost = True
        elif spec.name == "rt.synchronize_stream":
            self._get("stream", args[0]).queue.clear()  # the work failed: outputs stay poisoned

    def _check_state(self, spec: _Spec) -> None:
        if message := self._messages.get(threading.get_ident()):
            raise self._misuse(f"acl.{spec.name} called before anyone read the message of a failure: {message}")
        if spec.initialised and not self._initialised:
            raise self._misuse(f"acl.{spec.name} called before init or after finalize")
        if spec.context:
            context = getattr(self._thread, "context", 0)
            if not context:
                raise self._misuse(f"acl.{spec.name} called by a thread without a context")
            self._get("context", context)

    def _misuse(self, what: str) -> AclMisuse:
        self.misuses.append(what)
        return AclMisuse(what)

    def _set_message(self, message: str) -> None:
        self._messages[threading.get_ident()] = message

    def _get_recent_err_msg(self) -> str | None:
        """Reads and clears, per thread."""
        with self._lock:
            return self._messages.pop(threading.get_ident(), None)

    # --- handles ---

    def _new(self, kind: str, item: Any) -> int:
        handle = self._next
        self._next += 1
        self._live.setdefault(kind, {})[handle] = item
        return handle

    def _get(self, kind: str, handle: int) -> Any:
        self._integer(handle)
        if handle == 0:
            raise _Code(INVALID, f"null {kind}")
        table = self._live.get(kind, {})
        if handle not in table:
            if self._dead.get(handle) == kind:
                raise self._misuse(f"{kind} {handle} used after destroy")
            if kind == "model":
                raise _Code(NO_MODEL, f"no model {handle}")
            raise self._misuse(f"{handle} is no {kind}")
        return table[handle]

    def _drop(self, kind: str, handle: int) -> Any:
        item = self._get(kind, handle)
        del self._live[kind][handle]
        self._dead[handle] = kind
        return item

    def _integer(self, *values: Any) -> None:
        if not all(type(value) is int for value in values):
            raise TypeError(f"acl takes whole numbers, not {values}")

    def _in_flight(self) -> list[_Work]:
        return [work for stream in self._live.get("stream", {}).values() for work in stream.queue]

    # --- system, device, context, stream ---

    @_api("init", context=False, initialised=False)
    def _init(self, config: str = "", /) -> int:
        if self._initialised:
            raise _Code(REPEATED_INIT, "repeated initialise")
        self._initialised = True
        return 0

    @_api("finalize", context=False, initialised=False, release=True)
    def _finalize(self) -> int:
        if not self._initialised:
            raise _Code(REPEATED_FINALIZE, "repeated finalize")
        if self._set_devices:
            raise self._misuse("finalize before reset_device")
        self._initialised = False
        return 0

    @_api("get_soc_name", "str", context=False)
    def _get_soc_name(self) -> str:
        return "Ascend310P3"

    @_api("rt.set_device", context=False)
    def _set_device(self, device: int, /) -> int:
        self._check_device(device)
        self._set_devices.add(device)
        return 0

    @_api("rt.reset_device", context=False, release=True)
    def _reset_device(self, device: int, /) -> int:
        self._check_device(device)
        if device not in self._set_devices:
            raise self._misuse(f"reset_device of {device}, which is not set")
        if any(context.device == device for context in self._live.get("context", {}).values()):
            raise self._misuse("reset_device before destroy_context")
        self._set_devices.remove(device)
        return 0

    def _check_device(self, device: int) -> None:
        self._integer(device)
        if not 0 <= device < self.devices:
            raise _Code(BAD_DEVICE, f"no device {device}")

    @_api("rt.get_device_count", "int,ret", context=False)
    def _get_device_count(self) -> tuple[int, int]:
        return self.devices, 0

    @_api("rt.get_run_mode", "int,ret")
    def _get_run_mode(self) -> tuple[int, int]:
        return 1, 0

    @_api("rt.create_context", "int,ret", context=False)
    def _create_context(self, device: int, /) -> tuple[int, int]:
        self._check_device(device)
        if device not in self._set_devices:
            raise self._misuse("create_context before set_device")
        self._thread.context = self._new("context", _Context(device))
        return self._thread.context, 0

    @_api("rt.set_context", context=False)
    def _set_context(self, context: int, /) -> int:
        self._get("context", context)
        self._thread.context = context
        self._context_lost = False
        return 0

    @_api("rt.get_context", "int,ret", context=False)
    def _get_context(self) -> tuple[int, int]:
        context = getattr(self._thread, "context", 0)
        if not context:
            raise _Code(NO_CONTEXT, "no context")
        return context, 0

    @_api("rt.destroy_context", context=False, release=True)
    def _destroy_context(self, context: int, /) -> int:
        self._get("context", context)
        if not self._context_lost:
            if any(stream.context == context for stream in self._live.get("stream", {}).values()):
                raise self._misuse("destroy_context before destroy_stream")
            if any(model.context == context for model in self._live.get("model", {}).values()):
                raise self._misuse("destroy_context before unload")
            if any(block.context == context for block in self._blocks.values()):
                raise self._misuse("destroy_context before its memory was freed")
        self._drop("context", context)
        if getattr(self._thread, "context", 0) == context:
            self._thread.context = 0
        return 0

    @_api("rt.create_stream", "int,ret")
    def _create_stream(self) -> tuple[int, int]:
        return self._new("stream", _Stream(self._thread.context)), 0

    @_api("rt.destroy_stream", release=True)
    def _destroy_stream(self, stream: int, /) -> int:
        if self._get_stream(stream).queue:
            raise self._misuse("destroy_stream with work in flight")
        self._drop("stream", stream)
        return 0

    @_api("rt.synchronize_stream")
    def _synchronize_stream(self, stream: int, /) -> int:
        queue = self._get_stream(stream).queue
        while queue:
            work = queue[0]
            try:
                work.run()
            finally:
                queue.pop(0)
        return 0

    def _get_stream(self, stream: int) -> _Stream:
        item: _Stream = self._get("stream", stream)
        if item.context != self._thread.context:
            raise _Code(OTHER_CONTEXT, "the stream belongs to another context")
        return item

    # --- memory ---

    @_api("rt.malloc", "int,ret")
    def _malloc(self, size: int, policy: int, /) -> tuple[int, int]:
        if policy not in (0, 1, 2):
            raise _Code(INVALID, f"policy {policy}")
        return self._allocate(size, device=True), 0

    @_api("rt.malloc_host", "int,ret")
    def _malloc_host(self, size: int, /) -> tuple[int, int]:
        return self._allocate(size, device=False), 0

    def _allocate(self, size: int, *, device: bool) -> int:
        self._integer(size)
        if size <= 0:
            raise _Code(INVALID, f"size {size}")
        if device and size + sum(block.data.size for block in self._blocks.values() if block.device) > self.memory:
            raise _Code(OUT_OF_MEMORY, f"out of memory for {size} bytes")
        address = self._place(size, device)
        self._blocks[address] = _Block(address, np.empty(size, np.uint8), device, self._thread.context)
        self._blocks[address].poison()
        return address

    def _place(self, size: int, region: bool | None) -> int:
        """A new address, 64-byte aligned, never used again, with a gap behind."""
        address = self._next_address[region]
        self._next_address[region] = address + (size + 127) // 64 * 64
        return address

    @_api("rt.free", release=True)
    def _free(self, pointer: int, /) -> int:
        return self._release(pointer, device=True)

    @_api("rt.free_host", release=True)
    def _free_host(self, pointer: int, /) -> int:
        return self._release(pointer, device=False)

    def _release(self, pointer: int, *, device: bool) -> int:
        if pointer == 0:
            raise _Code(INVALID, "null pointer")
        block, _ = self._find(pointer)
        if block is None or block.address != pointer:
            raise self._misuse(f"free of {pointer:#x}, which is no start of a block")
        if block.device != device:
            raise self._misuse("free of host memory" if device else "free_host of device memory")
        if any(block in (*work.reads, *work.writes) for work in self._in_flight()) or self._is_busy(block):
            raise self._misuse("free of memory that work in flight uses")
        del self._blocks[pointer]
        self._freed[pointer] = block.data.size
        block.poison()  # views from ptr_to_numpy now see what a board would show them: anything
        return 0

    def _find(self, pointer: int) -> tuple[_Block | None, int]:
        """The block that holds an address, and the offset in it."""
        self._integer(pointer)
        for block in self._blocks.values():
            if block.address <= pointer < block.address + block.data.size:
                return block, pointer - block.address
        for address, size in self._freed.items():
            if address <= pointer < address + size:
                raise self._misuse(f"{pointer:#x} was freed before")
        return None, 0

    @_api("rt.memcpy")
    def _memcpy(self, target: int, limit: int, source: int, count: int, kind: int, /) -> int:
        return self._copy(target, limit, source, count, kind, None)

    @_api("rt.memcpy_async")
    def _memcpy_async(self, target: int, limit: int, source: int, count: int, kind: int, stream: int, /) -> int:
        return self._copy(target, limit, source, count, kind, self._get_stream(stream))

    def _copy(self, target: int, limit: int, source: int, count: int, kind: int, stream: _Stream | None) -> int:
        self._integer(target, limit, source, count, kind)
        if target == 0 or source == 0 or kind not in (0, 1, 2, 3):
            raise _Code(INVALID, "null pointer or unknown kind")
        if count > limit:
            raise _Code(BAD_COUNT, f"count {count} is above dest_max {limit}")
        written = self._memory(target, limit, "dest_max", device=kind in (1, 3))
        read = self._memory(source, count, "count", device=kind in (2, 3))
        if written is None:
            return self._copy_to_array(self._borrowed[target], read, count, stream)
        block, start = written
        self._check_idle(block, "memcpy into")
        if stream is None:
            self._write(block, start, self._readable(source, count) if read is None else self._values(read, count))
            return 0
        if read is None:
            raise self._misuse("memcpy_async needs memory of malloc_host")
        block.poison()
        work = _Work(lambda: self._write(block, start, self._values(read, count, queued=True)), [read[0]], [block])
        stream.queue.append(work)
        return 0

    def _copy_to_array(
        self, lent: _Borrowed, read: tuple[_Block, int] | None, count: int, stream: _Stream | None
    ) -> int:
        if lent.abandoned():
            raise self._misuse("borrowed pointer used after its object was collected")
        if stream or read is None or not isinstance(lent.owner, np.ndarray) or not lent.owner.flags.writeable:
            raise self._misuse("memcpy into memory that is lent for reading")
        lent.bytes()[:count] = self._values(read, count)
        return 0

    def _memory(self, pointer: int, size: int, what: str, *, device: bool) -> tuple[_Block, int] | None:
        """The block behind a pointer; None for borrowed memory. Checks the kind of memory and its true size."""
        if pointer in self._borrowed:
            if device:
                raise self._misuse("memcpy kind says device, the pointer is to host memory")
            if size > self._borrowed[pointer].size:
                raise self._misuse(f"{what} {size} is beyond the {self._borrowed[pointer].size} bytes of the object")
            return None
        block, start = self._find(pointer)
        if block is None:
            raise self._misuse(f"unknown pointer {pointer:#x}")
        if block.device != device:
            place = "device" if block.device else "host"
            raise self._misuse(f"memcpy kind is wrong: the pointer is to {place} memory")
        if start + size > block.data.size:
            raise self._misuse(f"{what} {size} is beyond the {block.data.size - start} bytes of the block")
        return block, start

    def _values(self, place: tuple[_Block, int], count: int, *, queued: bool = False) -> np.ndarray:
        block, start = place
        if not queued and any(block in work.writes for work in self._in_flight()):
            raise self._misuse("outputs read before synchronize_stream")
        if self._is_busy(block):
            raise self._misuse("memory read while an execute uses it")
        if start + count > block.filled:
            raise self._misuse("memory read that was never written")
        return block.data[start : start + count]

    def _write(self, block: _Block, start: int, content: np.ndarray) -> None:
        block.data[start : start + len(content)] = content
        if start <= block.filled:
            block.filled = max(block.filled, start + len(content))

    def _check_idle(self, block: _Block, what: str) -> None:
        if any(block in (*work.reads, *work.writes) for work in self._in_flight()) or self._is_busy(block):
            raise self._misuse(f"{what} memory that work in flight uses")

    def _is_busy(self, block: _Block) -> bool:
        return any(block in used for used in self._executing.values())

    # --- util ---

    @_api("util.bytes_to_ptr", "int", context=False, initialised=False)
    def _bytes_to_ptr(self, content: bytes, /) -> int:
        if type(content) is not bytes:
            raise TypeError("bytes_to_ptr takes bytes")
        return self._lend(content, len(content))

    @_api("util.numpy_to_ptr", "int", context=False, initialised=False)
    def _numpy_to_ptr(self, array: np.ndarray, /) -> int:
        if not isinstance(array, np.ndarray):
            raise TypeError("numpy_to_ptr takes an array")
        if not array.flags.c_contiguous:
            raise self._misuse("numpy_to_ptr of an array that is not contiguous")
        return self._lend(array, array.nbytes)

    def _lend(self, owner: Any, size: int) -> int:
        pointer = self._place(size, None)
        self._borrowed[pointer] = _Borrowed(owner, size)
        return pointer

    def _readable(self, pointer: int, size: int) -> np.ndarray:
        """Bytes of host memory, borrowed or allocated."""
        if pointer in self._borrowed:
            if self._borrowed[pointer].abandoned():
                raise self._misuse("borrowed pointer used after its object was collected")
            return self._borrowed[pointer].bytes()[:size]
        place = self._memory(pointer, size, "size", device=False)
        assert place
        return self._values(place, size)

    @_api("util.ptr_to_bytes", "object", context=False, initialised=False)
    def _ptr_to_bytes(self, pointer: int, size: int, /) -> bytes:
        self._check_dereference(pointer)
        return self._readable(pointer, size).tobytes()

    @_api("util.ptr_to_numpy", "object", context=False, initialised=False)
    def _ptr_to_numpy(self, pointer: int, shape: tuple[int, ...], kind: int, /) -> np.ndarray:
        if kind not in NPY_TYPES:
            raise self._misuse(f"ptr_to_numpy with {kind}, which is no type number of NumPy's")
        self._check_dereference(pointer)
        dtype = np.dtype(NPY_TYPES[kind])
        return self._readable(pointer, prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def _check_dereference(self, pointer: int) -> None:
        block = None if pointer in self._borrowed else self._find(pointer)[0]
        if block and block.device:
            raise self._misuse("device memory read by the host")

    # --- models and descriptions ---

    @_api("mdl.load_from_file", "int,ret")
    def _load_from_file(self, path: str, /) -> tuple[int, int]:
        if type(path) is not str:
            raise TypeError("load_from_file takes str")
        try:
            om = _Om(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Code(INVALID, f"cannot load {path}") from error
        return self._new("model", _Model(om, self._thread.context)), 0

    @_api("mdl.unload", release=True)
    def _unload(self, model: int, /) -> int:
        self._get_model(model)
        if any(work.model == model for work in self._in_flight()) or self._live["model"][model].busy:
            raise self._misuse("unload with work in flight")
        self._drop("model", model)
        return 0

    def _get_model(self, model: int) -> _Model:
        item: _Model = self._get("model", model)
        if item.context != self._thread.context:
            raise self._misuse("a model is used in another context than it was loaded in")
        return item

    @_api("mdl.create_desc", "int")
    def _create_desc(self) -> int:
        return self._new("desc", _Desc())

    @_api("mdl.get_desc")
    def _get_desc(self, desc: int, model: int, /) -> int:
        item: _Desc = self._get("desc", desc)
        item.om, item.model = self._get_model(model).om, model
        return 0

    @_api("mdl.destroy_desc", context=False, release=True)
    def _destroy_desc(self, desc: int, /) -> int:
        self._drop("desc", desc)
        return 0

    def _om(self, desc: int) -> _Om:
        om: _Om | None = self._get("desc", desc).om
        if om is None:
            raise self._misuse("a description used before get_desc")
        return om

    def _tensor(self, desc: int, index: int, kind: str) -> _Tensor:
        om = self._om(desc)
        tensors = om.inputs if kind == "input" else om.outputs
        self._integer(index)
        if not 0 <= index < len(tensors):
            raise _Code(INVALID, f"no {kind} {index}")
        return tensors[index]

    @_api("mdl.get_num_inputs", "int")
    def _get_num_inputs(self, desc: int, /) -> int:
        return len(self._om(desc).inputs)

    @_api("mdl.get_num_outputs", "int")
    def _get_num_outputs(self, desc: int, /) -> int:
        return len(self._om(desc).outputs)

    @_api("mdl.get_input_size_by_index", "int")
    def _get_input_size_by_index(self, desc: int, index: int, /) -> int:
        return self._tensor(desc, index, "input").largest

    @_api("mdl.get_output_size_by_index", "int")
    def _get_output_size_by_index(self, desc: int, index: int, /) -> int:
        return self._tensor(desc, index, "output").largest

    @_api("mdl.get_input_data_type", "type")
    def _get_input_data_type(self, desc: int, index: int, /) -> int:
        return ACL_TYPES[self._tensor(desc, index, "input").dtype]

    @_api("mdl.get_output_data_type", "type")
    def _get_output_data_type(self, desc: int, index: int, /) -> int:
        return ACL_TYPES[self._tensor(desc, index, "output").dtype]

    @_api("mdl.get_input_name_by_index", "str")
    def _get_input_name_by_index(self, desc: int, index: int, /) -> str:
        return self._tensor(desc, index, "input").name

    @_api("mdl.get_output_name_by_index", "str")
    def _get_output_name_by_index(self, desc: int, index: int, /) -> str:
        return self._tensor(desc, index, "output").name

    @_api("mdl.get_input_dims", "dict,ret")
    def _get_input_dims(self, desc: int, index: int, /) -> tuple[dict[str, Any], int]:
        tensor = self._tensor(desc, index, "input")
        return _dims(tensor.name, tensor.dims), 0

    @_api("mdl.get_output_dims", "dict,ret")
    def _get_output_dims(self, desc: int, index: int, /) -> tuple[dict[str, Any], int]:
        tensor = self._tensor(desc, index, "output")
        return _dims(tensor.name, max(tensor.per_gear, key=prod)), 0

    @_api("mdl.get_cur_output_dims", "dict,ret")
    def _get_cur_output_dims(self, desc: int, index: int, /) -> tuple[dict[str, Any], int]:
        tensor = self._tensor(desc, index, "output")
        model = self._get_model(self._get("desc", desc).model)
        if model.current is None and model.om.kind != "static":
            raise self._misuse("get_cur_output_dims before a gear was set")
        return _dims(tensor.name, tensor.per_gear[model.current or 0]), 0

    @_api("mdl.get_input_index_by_name", "int,ret")
    def _get_input_index_by_name(self, desc: int, name: str, /) -> tuple[int, int]:
        names = [tensor.name for tensor in self._om(desc).inputs]
        if name not in names:
            raise _Code(INVALID, f"no input {name}")
        return names.index(name), 0

    # --- gears ---

    @_api("mdl.get_dynamic_batch", "dict,ret")
    def _get_dynamic_batch(self, desc: int, /) -> tuple[dict[str, Any], int]:
        om = self._om(desc)
        batches = om.batches if om.kind == "batch" else []
        return {"batchCount": len(batches), "batch": list(batches)}, 0

    @_api("mdl.get_input_dynamic_gear_count", "int,ret")
    def _get_input_dynamic_gear_count(self, desc: int, index: int, /) -> tuple[int, int]:
        om = self._om(desc)
        if index != -1:
            raise _Code(INVALID, f"index {index} is not -1")
        return len(om.flat_dims) if om.kind == "dims" else 0, 0

    @_api("mdl.get_input_dynamic_dims", "list,ret")
    def _get_input_dynamic_dims(self, desc: int, index: int, count: int, /) -> tuple[list[dict[str, Any]], int]:
        om = self._om(desc)
        if index != -1 or om.kind != "dims" or count != len(om.flat_dims):
            raise _Code(INVALID, f"index {index} is not -1, or {count} is not the number of gears")
        return [_dims("", dims) for dims in om.flat_dims], 0

    @_api("mdl.set_dynamic_batch_size")
    def _set_dynamic_batch_size(self, model: int, dataset: int, index: int, batch: int, /) -> int:
        item = self._gear_target(model, dataset, index, "batch")
        self._integer(batch)
        if batch not in item.om.batches:
            raise _Code(BAD_GEAR, f"no gear {batch}")
        return self._set_gear(item, dataset, index, item.om.batches.index(batch), [batch])

    @_api("mdl.set_input_dynamic_dims")
    def _set_input_dynamic_dims(self, model: int, dataset: int, index: int, dims: dict[str, Any], /) -> int:
        item = self._gear_target(model, dataset, index, "dims")
        if set(dims) != {"name", "dimCount", "dims"}:
            raise TypeError(f"dims are {dims}")
        wanted = list(dims["dims"])
        if dims["dimCount"] != len(wanted) or len(wanted) != len(item.om.flat_dims[0]):
            raise _Code(BAD_DIM_COUNT, f"{len(wanted)} dims")
        if wanted not in item.om.flat_dims:
            raise _Code(BAD_GEAR, f"no gear {wanted}")
        return self._set_gear(item, dataset, index, item.om.flat_dims.index(wanted), wanted)

    def _gear_target(self, model: int, dataset: int, index: int, kind: str) -> _Model:
        item = self._get_model(model)
        if item.om.kind == "static":
            raise self._misuse("a gear setter called on a static model")
        if item.om.kind != kind:
            raise self._misuse(f"the setter of {kind} called on a model with gears of {item.om.kind}")
        if item.busy or any(work.model == model for work in self._in_flight()):
            raise self._misuse("a gear set while the model runs")
        blocks = self._blocks_of(dataset, item.om.inputs, "input")
        self._integer(index)
        if not 0 <= index < len(blocks) or item.om.inputs[index].name != GEAR_INPUT:
            raise _Code(INVALID, f"input {index} is not {GEAR_INPUT}")
        return item

    def _set_gear(self, item: _Model, dataset: int, index: int, gear: int, values: list[int]) -> int:
        block = self._blocks_of(dataset, item.om.inputs, "input")[index]
        self._write(block, 0, np.array(values, np.int32).view(np.uint8))
        item.current, item.set_for = gear, dataset
        return 0

    # --- datasets, buffers, execution ---

    @_api("mdl.create_dataset", "int")
    def _create_dataset(self) -> int:
        return self._new("dataset", _Dataset())

    @_api("mdl.add_dataset_buffer", "int,ret")
    def _add_dataset_buffer(self, dataset: int, buffer: int, /) -> tuple[int, int]:
        self._get("buffer", buffer)
        self._get("dataset", dataset).buffers.append(buffer)
        return dataset, 0

    @_api("mdl.get_dataset_num_buffers", "int")
    def _get_dataset_num_buffers(self, dataset: int, /) -> int:
        return len(self._get("dataset", dataset).buffers)

    @_api("mdl.get_dataset_buffer", "int")
    def _get_dataset_buffer(self, dataset: int, index: int, /) -> int:
        buffers: list[int] = self._get("dataset", dataset).buffers
        if not 0 <= index < len(buffers):
            raise _Code(INVALID, f"no buffer {index}")
        return buffers[index]

    @_api("mdl.destroy_dataset", context=False, release=True)
    def _destroy_dataset(self, dataset: int, /) -> int:
        self._get("dataset", dataset)
        if any(work.dataset == dataset for work in self._in_flight()):
            raise self._misuse("destroy_dataset with work in flight")
        self._drop("dataset", dataset)
        return 0

    @_api("create_data_buffer", "int")
    def _create_data_buffer(self, pointer: int, size: int, /) -> int:
        self._integer(pointer, size)
        if pointer == 0 or size <= 0:
            raise _Code(INVALID, "null pointer or no size")
        self._memory(pointer, size, "size", device=True)
        return self._new("buffer", _Buffer(pointer, size))

    @_api("destroy_data_buffer", context=False, release=True)
    def _destroy_data_buffer(self, buffer: int, /) -> int:
        self._drop("buffer", buffer)
        return 0

    @_api("get_data_buffer_addr", "int")
    def _get_data_buffer_addr(self, buffer: int, /) -> int:
        address: int = self._get("buffer", buffer).address
        return address

    @_api("get_data_buffer_size_v2", "int")
    def _get_data_buffer_size_v2(self, buffer: int, /) -> int:
        size: int = self._get("buffer", buffer).size
        return size

    def _blocks_of(self, dataset: int, tensors: list[_Tensor], kind: str) -> list[_Block]:
        """Device blocks of a dataset, as many and as large as the model's inputs or outputs."""
        buffers: list[int] = self._get("dataset", dataset).buffers
        if len(buffers) != len(tensors):
            raise self._misuse(f"{len(buffers)} {kind} buffers for {len(tensors)} {kind}s")
        blocks = []
        for tensor, handle in zip(tensors, buffers, strict=True):
            buffer: _Buffer = self._get("buffer", handle)
            place = self._memory(buffer.address, buffer.size, "size", device=True)
            assert place
            if buffer.size < tensor.largest:
                raise _Code(SMALL_BUFFER, f"{buffer.size} bytes for {tensor.name}, which needs {tensor.largest}")
            if buffer.size > tensor.largest:
                raise self._misuse(f"{buffer.size} bytes for {tensor.name}, which takes {tensor.largest}")
            blocks.append(place[0])
        return blocks

    @_api("mdl.execute")
    def _execute(self, model: int, inputs: int, outputs: int, /) -> int:
        work = self._work(model, inputs, outputs, "sync")
        item: _Model = self._live["model"][model]
        item.busy = True
        self._executing[model] = [*work.reads, *work.writes]
        try:
            work.run()
        finally:
            item.busy = False
            del self._executing[model]
        return 0

    @_api("mdl.execute_async")
    def _execute_async(self, model: int, inputs: int, outputs: int, stream: int, /) -> int:
        item = self._get_stream(stream)
        for other in self._live["stream"].values():
            if other is not item and any(work.model == model for work in other.queue):
                raise self._misuse("a model runs on two streams at once")
        work = self._work(model, inputs, outputs, "async")
        for block in work.writes:
            self._check_idle(block, "execute into")
        item.queue.append(work)
        return 0

    def _work(self, model: int, inputs: int, outputs: int, mode: str) -> _Work:
        """What an execute will do, all of it checked now; outputs are poisoned."""
        item = self._get_model(model)
        om = item.om
        if item.busy:
            raise self._misuse("a model runs twice at once")
        if item.mode not in ("", mode):
            raise self._misuse("a model runs both synchronously and asynchronously")
        item.mode = mode
        reads, writes = self._blocks_of(inputs, om.inputs, "input"), self._blocks_of(outputs, om.outputs, "output")
        if om.kind != "static" and item.set_for != inputs:
            raise self._misuse("execute without a gear set for this call")
        gear = 0 if om.kind == "static" else item.current or 0
        item.set_for = None
        for tensor, block in zip(om.inputs, reads, strict=True):
            if block.filled < tensor.size(gear):
                raise self._misuse(f"{tensor.name} holds {block.filled} bytes of {tensor.size(gear)}")
        for block in writes:
            block.poison()
        return _Work(lambda: self._run_model(om, gear, reads, writes), reads, writes, model, inputs)

    def _run_model(self, om: _Om, gear: int, reads: list[_Block], writes: list[_Block]) -> None:
        arrays = [
            block.data[: tensor.size(gear)].view(tensor.dtype).reshape(tensor.per_gear[gear])
            for tensor, block in zip(om.inputs, reads, strict=True)
        ]
        self._lock.release()  # others may call meanwhile, and be caught at it
        try:
            results = self.compute(om, arrays)
        finally:
            self._lock.acquire()
        for block, result in zip(writes, results, strict=True):
            self._write(block, 0, np.ascontiguousarray(result).reshape(-1).view(np.uint8))


def _dims(name: str, dims: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "dimCount": len(dims), "dims": list(dims)}
