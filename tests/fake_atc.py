#!/usr/bin/env python3
"""A stand-in for atc that behaves as its documentation says; FAKE_ATC chooses how it fails. `install` puts it on disk.

What it writes is the fake .om of tests/acl_double.py, which names the model and its shapes. With --output_type the
lengths become float32 there, as on a board they might [I].

FAKE_ATC: `quick` (succeeds without a look at the model, the .om is empty JSON), `suffix` (the file gains
_linux_x86_64), `no_file`, `empty_file`, `no_success`, `hang`, `child` (hangs with a child that ignores SIGTERM, prints
both ids), `orphan` (succeeds, leaving a child that holds the pipe), `killed` (by SIGKILL), `segfault`, `flood` (10 MB,
in lines), `long_line` (10 MB without an end), `silent` (exit 255, no word), `not_text` (bytes that are no UTF-8), or a
code such as E10016.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

SUCCESS = "ATC run success, welcome to the next use."
PATH = re.compile(r"[A-Za-z0-9_./:\u4e00-\u9fff-]+")
BLOCKS = {
    "E10001": "Value [Ascend999] for parameter [soc_version] is invalid.",
    "E10002": "Value [feats] for parameter [--input_shape] is invalid. Reason: it is not name:dims.",
    "E10016": "Opname [wrong] specified in [--input_shape] is not found in the model.",
    "E10040": "The dimension count in [--dynamic_dims] must match the -1 dims of [--input_shape].",
    "E10041": "Failed to load the model from [jasper.onnx].",
    "E10045": "The number of gears is not within 2 to 100.",
    "E10501": "The environment variable ASCEND_OPP_PATH is not set.",
    "E13010": "Failed to get the path of the operator package.",
    "E16002": "No parser is registered for Op [Range_5, optype ai.onnx::14::Range].",
    "E19999": "Inner Error!",
    "EZ9999": "Inner Error!",
    "E20001": "Failed to compile Op [Slice_4].",
}


def install(folder: Path, name: str = "atc") -> Path:
    """Write an executable that runs this file with the interpreter of the tests."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n')
    program.chmod(0o755)
    return program


def fail(code: str, message: str | None = None) -> None:
    print("ATC run failed, Please check the detail log, Try 'atc --help' for more information")
    print(f"{code}: [PID: {os.getpid()}] 2026-01-02-03:04:05.006.007 {message or BLOCKS[code]}")
    print("        Possible Cause: the vendor's words for the cause.")
    print("        Solution: the vendor's words for the cure.")
    print("        TraceBack (most recent call last):")
    sys.exit(255)


def main() -> None:
    mode = os.environ.get("FAKE_ATC", "ok")
    if record := os.environ.get("FAKE_ATC_RECORD"):
        Path(record).write_text(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd()}))
    print("ATC start working now, please wait for a moment.", flush=True)
    Path("kernel_meta").mkdir(exist_ok=True)  # the real one litters the folder that it runs in
    Path("fusion_result.json").write_text("{}")
    if mode in BLOCKS:
        fail(mode)
    misbehave(mode)
    options = parse(sys.argv[1:])
    if mode not in ("no_file", "empty_file"):
        made = Path(f"{options['output']}{'_linux_x86_64' if mode == 'suffix' else ''}.om")
        if mode in ("ok", "suffix"):
            write(made, options)
        else:
            made.write_text("{}")
    elif mode == "empty_file":
        Path(f"{options['output']}.om").touch()
    if mode != "no_success":
        print(SUCCESS, flush=True)
    if mode == "orphan":
        child = subprocess.Popen(["sleep", "60"])
        print(f"child {child.pid}", flush=True)


def misbehave(mode: str) -> None:
    if mode == "hang":
        time.sleep(60)
    elif mode == "child":
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", stubborn])
        print(f"ids {os.getpid()} {child.pid}", flush=True)
        time.sleep(60)
    elif mode in ("killed", "segfault"):
        os.kill(os.getpid(), signal.SIGKILL if mode == "killed" else signal.SIGSEGV)
    elif mode == "flood":
        for _ in range(100):
            print("x" * 999 + "\n", end="" if _ % 2 else "\n")
            sys.stdout.write(("y" * 999 + "\n") * 100)
    elif mode == "long_line":
        print("." * 10_000_000)
    elif mode == "silent":
        sys.exit(255)
    elif mode == "not_text":
        sys.stdout.flush()
        sys.stdout.buffer.write(b"\xff\xfe \xe6\xa8 broken\r\n")


def parse(arguments: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for argument in arguments:
        match = re.fullmatch(r"--(\w+)=(.*)", argument, re.DOTALL)
        if not match or match[1] in options:
            fail("E10001", f"Option [{argument}] cannot be parsed or is given twice.")
        options[match[1]] = match[2]
    known = "model framework input_format input_shape dynamic_batch_size dynamic_dims output soc_version log"
    known += " precision_mode precision_mode_v2 keep_dtype output_type"
    for name in options:
        if name not in known.split():
            fail("E10001", f"Option [--{name}] is unknown.")
    for name, allowed in (("framework", "5"), ("input_format", "ND"), ("log", "error"), ("output_type", "FP32")):
        if options.get(name, allowed) != allowed:
            fail("E10001", f"Value [{options[name]}] for parameter [{name}] is invalid.")
    for name in ("model", "output", "keep_dtype"):
        if name in options and not PATH.fullmatch(options[name]):
            fail("E10001", f"Value [{options[name]}] for parameter [{name}] is invalid: it holds a letter not allowed.")
    return options


def write(path: Path, options: dict[str, str]) -> None:
    """The .om, or the documented failure."""
    from acl_double import write_om

    kind, gears = check(options)
    lens = "float32" if options.get("output_type") == "FP32" else "int32"
    write_om(path, Path(options["model"]).resolve(), gears, kind, dtypes=("float32", "int32", "float32", lens))


def check(options: dict[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """Kind of the .om and its gears as (batch, frames)."""
    import onnx

    if not re.fullmatch(
        r"Ascend(310(P[1357]|B[1-4])?|910(A|Pro[AB]|PremiumA|B(1|2|2C|3|4|4-1)|_93\d\d))", options["soc_version"]
    ):
        fail("E10001")
    if "precision_mode" in options and "precision_mode_v2" in options:
        fail("E10001", "[--precision_mode] and [--precision_mode_v2] cannot be given together.")
    try:
        model = onnx.load(options["model"])
    except Exception:
        fail("E10041")
    if model.opset_import[0].version > (13 if options["soc_version"] == "Ascend310" else 18):
        fail("E16002")
    if "keep_dtype" in options:
        if not {"precision_mode", "precision_mode_v2"} & set(options):
            fail("E10001", "[--keep_dtype] needs a precision mode.")
        names = {node.name for node in model.graph.node}
        for line in Path(options["keep_dtype"]).read_text().splitlines():
            if line not in names and not line.startswith("OpType::"):
                fail("E10016", f"Opname [{line}] specified in [--keep_dtype] is not found in the model.")
    shapes = read_shapes(options["input_shape"])
    declared = {
        value.name: [size.dim_value or -1 for size in value.type.tensor_type.shape.dim] for value in model.graph.input
    }
    for name, shape in shapes.items():
        if name not in declared:
            fail("E10016")
        if len(shape) != len(declared[name]) or any(
            a != b for a, b in zip(shape, declared[name], strict=True) if b > 0
        ):
            fail("E10002", f"[--input_shape] of {name} is {shape}, the model has {declared[name]}.")
    return gears(options, shapes)


def read_shapes(text: str) -> dict[str, list[int]]:
    shapes = {}
    for part in text.split(";"):
        match = re.fullmatch(r"(\w+):(-?\d+(?:,-?\d+)*)", part)
        if not match:
            fail("E10002")
        shapes[match[1]] = [int(size) for size in match[2].split(",")]
    return shapes


def gears(options: dict[str, str], shapes: dict[str, list[int]]) -> tuple[str, list[tuple[int, int]]]:
    sizes = [size for shape in shapes.values() for size in shape]
    places = [index for index, size in enumerate(sizes) if size == -1]
    if "dynamic_batch_size" in options:
        batch = [int(size) for size in options["dynamic_batch_size"].split(",")]
        if any(shape[0] != -1 or -1 in shape[1:] for shape in shapes.values()) or "dynamic_dims" in options:
            fail("E10040")
        if not 2 <= len(set(batch)) == len(batch) <= 100:
            fail("E10045")
        return "batch", [(size, shapes["feats"][2]) for size in batch]
    if "dynamic_dims" not in options:
        if places:
            fail("E10001", "[--input_shape] holds -1 without gears.")
        return "static", [(shapes["feats"][0], shapes["feats"][2])]
    rows = [[int(size) for size in row.split(",")] for row in options["dynamic_dims"].split(";")]
    if any(len(row) != len(places) for row in rows):
        fail("E10040")
    if not 2 <= len(rows) <= 100:
        fail("E10045")
    full = [[*sizes] for _ in rows]
    for target, row in zip(full, rows, strict=True):
        for place, size in zip(places, row, strict=True):
            target[place] = size
    if any(row[0] != row[3] for row in full):
        fail("E10040", "the batch of feats is not that of feat_lens.")
    return "dims", [(row[0], row[2]) for row in full]


if __name__ == "__main__":
    main()
