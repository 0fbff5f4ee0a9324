"""ONNX for Huawei's atc: .onnx -> .om and its .json sidecar.

Written against the vendor's documentation and tested against a double of atc; not yet run on a board.
"""

import difflib
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_asr.config import ModelConfig, parse_config
from jasper_asr.deploy import buckets
from jasper_asr.deploy.atc import PLAIN_PATH, atc_version, find_atc, plain_path, run_atc
from jasper_asr.errors import CompileError, ModelError, StorageError, UsageError

if TYPE_CHECKING:
    import onnx

ALLOWED_OPS = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Conv",
        "Div",
        "Less",
        "LogSoftmax",
        "Mul",
        "Relu",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Every op that a model for atc may hold. No Shape, Range, Expand, Where, ConstantOfShape, NonZero, BatchNormalization:
they need shapes at run time or run on the AI CPU."""

SOC_VERSIONS = (
    "Ascend310",
    *(f"Ascend310P{number}" for number in (1, 3, 5, 7)),
    *(f"Ascend310B{number}" for number in (1, 2, 3, 4)),
    *(f"Ascend910{suffix}" for suffix in ("A", "ProA", "ProB", "PremiumA")),
    *(f"Ascend910B{suffix}" for suffix in ("1", "2", "2C", "3", "4", "4-1")),
    *(f"Ascend910_{number}" for number in (9362, 9372, 9381, 9382, 9391, 9392)),
)
"""What `--soc_version` takes."""

PRECISIONS_V2 = ("fp16", "origin", "cube_fp16in_fp32out", "mixed_float16")
"""Values of `--precision_mode_v2`."""

PRECISIONS_V1 = ("force_fp16", "allow_fp32_to_fp16", "allow_mix_precision", "must_keep_origin_dtype")
"""Values of the older `--precision_mode`; atc takes one of the two options, never both."""

MIN_OPSET, MAX_OPSET = 11, 13
"""What we write: 11 is right everywhere, and no Ascend310 takes more than 13."""

MAX_FRAMES = 4000
"""Default longest input: 40 s, as in the Ascend guide."""

MAX_GEARS = 100
"""What atc takes; it takes no fewer than 2."""

Gear = int | tuple[int, int]
"""A size that an .om with gears takes: a batch size, or a number of frames, or (batch size, frames)."""


@dataclass(frozen=True)
class CompileReport:
    """What was compiled, or with a dry run what would be: then `om` and `sidecar` are None and `seconds` is 0."""

    om: Path | None
    sidecar: Path | None
    command: tuple[str, ...]
    shell: str
    """The same, quoted for a shell, with the writing of the --keep_dtype file before it."""
    soc_version: str
    atc_version: str | None
    gears: dict[str, Any] | None
    seconds: float


def export_for_ascend(
    checkpoint: str | os.PathLike[str],
    out: Path,
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    batch_size: int | None = 1,
    frames: int | None = MAX_FRAMES,
    max_frames: int = MAX_FRAMES,
    opset: int = MIN_OPSET,
) -> str:
    """Write an ONNX model that atc takes; returns one line that says what was made.

    None leaves the batch size or the frames open, for gears; open frames go up to `max_frames`. Raises UsageError for
    an opset beyond 13, ModelError when the graph holds what atc cannot take, and what `export_onnx` raises.
    """
    from jasper_asr.model.export import export_onnx

    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset}: Ascend takes {MIN_OPSET} to {MAX_OPSET}; {MIN_OPSET} is right everywhere")
    return export_onnx(
        checkpoint,
        out,
        config=config,
        weights=weights,
        batch_size=batch_size,
        frames=frames,
        max_frames=max_frames if frames is None else None,
        opset=opset,
        check=lambda model: check_ops(model, str(out)),
    )


def check_ops(model: "onnx.ModelProto", source: str | None = None) -> None:
    """Raise ModelError that lists every node atc would refuse or run badly; `source` names the file in it."""
    constants = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    found = [(node.name or node.output[0], _offence(node, constants)) for node in model.graph.node]
    offences = [f"{name} ({offence})" for name, offence in found if offence]
    if offences:
        raise ModelError(
            f"{source or model.graph.name}: {len(offences)} nodes that atc cannot take: {', '.join(offences)}; "
            "make it with jasper export --target ascend"
        )


def compile_om(
    onnx_path: str | os.PathLike[str],
    *,
    soc: str,
    out: Path | None = None,
    precision: str | None = None,
    keep_fp32: Sequence[str] = (),
    gears: Sequence[Gear] | None = None,
    batch_size: int | None = None,
    atc: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    timeout: float = 3600.0,
    progress: Callable[[str], None] | None = None,
) -> CompileReport:
    """Compile an ONNX model to `out` (default: .om beside it) and write the .json sidecar of the same stem.

    `gears`: batch sizes where only the batch is open, frames where only the frames are, (batch size, frames) where both
    are. `batch_size` fixes a batch that the model leaves open. `keep_fp32`: names of nodes, of ONNX ops, or of Ascend's
    op types. `atc`: the program (default: on PATH, else under ASCEND_TOOLKIT_HOME). `progress` gets each line that atc
    prints; `timeout` is in seconds. A dry run looks for no atc and writes nothing. What stood at `out` stays until
    there is something better.

    Raises UsageError for options, StorageError, ModelError for a model that atc cannot take, CompileError when atc is
    missing, fails, or does not deliver.
    """
    started = time.perf_counter()
    job = _plan(Path(onnx_path), soc, out, precision, keep_fp32, gears, batch_size)
    if dry_run:
        return job.report(None, None, 0.0)
    program = find_atc(atc)
    if program is None:
        raise CompileError(
            f"{job.source}: atc is not installed here; install the CANN toolkit and source its set_env.sh, "
            f"or run this where it is: {job.shell()}"
        )
    if not job.out.parent.is_dir():
        raise StorageError(f"{job.out}: no such folder; create it first")
    version = atc_version(program)
    with tempfile.TemporaryDirectory(prefix=".atc-", dir=job.out.parent, ignore_cleanup_errors=True) as folder:
        work = Path(folder).resolve()
        made = job.run(program, work, timeout, progress)
        om = job.out.with_name(made.name.replace(job.work_stem, job.out.stem, 1))
        sidecar = work / "sidecar.json"
        sidecar.write_text(json.dumps(job.sidecar(version), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        om.with_suffix(".json").unlink(missing_ok=True)  # never a new .om beside an old sidecar
        os.replace(made, om)
        if job.keep:
            os.replace(work / job.keep_file(job.work_stem), job.out.with_name(job.keep_file(job.out.stem)))
        os.replace(sidecar, om.with_suffix(".json"))
    return job.report(om, version, time.perf_counter() - started)


def check_soc(soc: str) -> None:
    """Raise UsageError, with a suggestion, unless `soc` is one of SOC_VERSIONS."""
    if soc in SOC_VERSIONS:
        return
    full = soc if soc.lower().startswith("ascend") else f"Ascend{soc}"
    lowered = {name.lower(): name for name in SOC_VERSIONS}
    if full.lower() in lowered:
        raise UsageError(f"soc {soc!r}: write it {lowered[full.lower()]}")
    family = [name for name in SOC_VERSIONS if name.lower().startswith(full.lower())]
    near = difflib.get_close_matches(full, SOC_VERSIONS, n=3, cutoff=0.85)
    if family and full.lower() != "ascend":
        cause, names = "names a family", f"choose {', '.join(family)}"
    elif near:
        cause, names = "unknown", f"did you mean {' or '.join(near)}?"
    else:
        cause, names = "unknown", f"choose {', '.join(SOC_VERSIONS)}"
    raise UsageError(f'soc {soc!r}: {cause}; {names} (it is "Ascend" and the Name that npu-smi info prints)')


def parse_gears(text: str) -> list[Gear]:
    """`1024,2048,4000` -> sizes; `1x1024,16x4000` -> (batch size, frames). Raises UsageError."""
    gears: list[Gear] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*", part, re.ASCII)
        if not match:
            raise UsageError(f"gears {text!r}: {part.strip()!r} is no gear; give 1024,2048 or 1x1024,16x4000")
        first, second = match.groups()
        gears.append((int(first), int(second)) if second else int(first))
    return gears


def parse_buckets(text: str) -> int | list[int] | None:
    """`auto` -> None, `6` -> how many lengths, `1024,2048,4000` -> the lengths in frames. Raises UsageError."""
    if text.strip() == "auto":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part, re.ASCII) for part in parts):
        raise UsageError(f"buckets {text!r}: give auto, how many lengths, or lengths in frames such as 1024,2048,4000")
    numbers = [int(part) for part in parts]
    if len(numbers) > 1:
        return numbers
    if not 2 <= numbers[0] <= MAX_GEARS:
        raise UsageError(f"buckets {text!r}: atc takes 2 to {MAX_GEARS} lengths; frames are given as 1024,2048,4000")
    return numbers[0]


def plan_buckets(
    onnx_path: str | os.PathLike[str],
    durations: Sequence[float],
    wanted: int | list[int] | None = None,
    *,
    batch_size: int | None = None,
) -> "buckets.Padding":
    """Lengths to compile a model with open frames for, and what padding costs with them: `lengths` go to `compile_om`.

    `durations` are seconds of audio; `wanted` as `parse_buckets` gives it: None chooses the fewest lengths that
    `choose_auto` is content with. The padding before is that to the longest input of the model. Utterances beyond it do
    not count. Raises UsageError, StorageError or ModelError.
    """
    path = Path(onnx_path)
    model = _with_batch(path, _read_model(path), batch_size)
    batch, _, frames = model.shapes["feats"]
    if frames > 0 or batch < 0:
        cure = "--frames, with --max-frames" if frames > 0 else "--batch-size here"
        what = f"fixed to {frames} frames; export it without" if frames > 0 else "open in its batch; buckets need"
        raise UsageError(f"{path}: is {what} {cure}")
    longest = model.max_frames or MAX_FRAMES
    counts = buckets.frame_counts(durations, parse_config(model.config, str(path)).features)
    if isinstance(wanted, list):
        lengths = wanted
    elif wanted is None:
        lengths = buckets.choose_auto(counts, max_frames=longest)
    else:
        lengths = buckets.choose_buckets(counts, max_buckets=wanted, max_frames=longest)
    if len(lengths) == 1:  # a gear needs a second one
        lengths = [*lengths, longest]
    _checked_gears(path, model, lengths)
    return buckets.measure_padding(counts, lengths, length=longest)


# the model


_AXES_OPS = ("Squeeze", "Unsqueeze")


def _offence(node: "onnx.NodeProto", constants: dict[str, int]) -> str | None:
    """What is wrong with a node; `constants` gives the rank of each initializer."""
    attributes = {attribute.name for attribute in node.attribute}
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}.{node.op_type} is not an ONNX op"
    if node.op_type not in ALLOWED_OPS:
        return f"{node.op_type} is not allowed"
    if node.op_type == "Conv" and constants.get(node.input[1]) != 4:
        return "Conv without constant 4-D weights"
    if node.op_type == "LogSoftmax" and "axis" not in attributes:
        return "LogSoftmax without axis"
    if node.op_type == "Transpose" and "perm" not in attributes:
        return "Transpose without perm"
    if (
        node.op_type in _AXES_OPS
        and "axes" not in attributes
        and (len(node.input) < 2 or node.input[1] not in constants)
    ):
        return f"{node.op_type} without constant axes"
    if node.op_type == "Slice" and not all(name in constants for name in node.input[1:]):
        return "Slice with bounds that are not constant"
    return None


@dataclass(frozen=True)
class _Model:
    """What compiling needs to know of an ONNX file; open sizes are -1."""

    config: dict[str, Any]
    masked: bool
    max_frames: int | None
    opset: int
    shapes: dict[str, list[int]]
    nodes: frozenset[str]
    sha256: str


def _read_model(path: Path) -> _Model:
    import onnx

    from jasper_asr.model.checkpoint import file_sha256
    from jasper_asr.model.export import embedded_config

    try:
        model = onnx.load(path, load_external_data=False)
        sha256 = file_sha256(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"{path}: cannot read it ({reason}); check the path") from error
    except Exception as error:  # protobuf's own kinds
        raise ModelError(
            f"{path}: not an ONNX model ({' '.join(str(error).split())[:200]}); export it again"
        ) from error
    check_ops(model, str(path))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    shapes = {
        value.name: [size.dim_value or -1 for size in value.type.tensor_type.shape.dim] for value in model.graph.input
    }
    return _Model(
        config=dict(embedded_config(properties, str(path)).raw),
        masked=properties.get("masked", "true") == "true",
        max_frames=int(properties["max_frames"]) if properties.get("max_frames", "").isdecimal() else None,
        opset=max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0),
        shapes=_checked_shapes(path, shapes),
        nodes=frozenset(node.name for node in model.graph.node),
        sha256=sha256,
    )


def _checked_shapes(path: Path, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """`shapes`, if they are feats [B, n_filt, T] and feat_lens [B] in this order."""
    fits = list(shapes) == ["feats", "feat_lens"] and [len(shape) for shape in shapes.values()] == [3, 1]
    if not fits or shapes["feats"][0] != shapes["feat_lens"][0]:
        raise ModelError(f"{path}: inputs are {shapes}, not feats [B, F, T] and feat_lens [B]; export it again")
    return shapes


# the command


@dataclass(frozen=True)
class _Job:
    """One call of atc, checked: everything but where it runs."""

    source: Path
    model: _Model
    out: Path
    soc: str
    precision: tuple[str, ...]
    keep: tuple[str, ...]
    """Lines of the --keep_dtype file."""
    gears: dict[str, Any] | None

    @property
    def work_stem(self) -> str:
        """Stem that atc writes under: the one asked for, unless atc would refuse its letters."""
        return self.out.stem if PLAIN_PATH.fullmatch(self.out.stem) else "model"

    def keep_file(self, stem: str) -> str:
        return f"{stem}.keep_dtype.cfg"

    def argv(self, model: str, output: str) -> list[str]:
        """The exact command, for a model and an output (without .om) at these paths."""
        shapes = ";".join(f"{name}:{','.join(map(str, shape))}" for name, shape in self.model.shapes.items())
        keep = [f"--keep_dtype={self.keep_file(output)}"] if self.keep else []
        return [
            "atc",
            f"--model={model}",
            "--framework=5",
            "--input_format=ND",
            f"--input_shape={shapes}",
            *self.gear_options(),
            f"--output={output}",
            f"--soc_version={self.soc}",
            *self.precision,
            *keep,
            "--output_type=FP32",
            "--log=error",
        ]

    def gear_options(self) -> list[str]:
        if self.gears is None:
            return []
        if "batch" in self.gears:
            return [f"--dynamic_batch_size={','.join(map(str, self.gears['batch']))}"]
        sizes = [size for shape in self.model.shapes.values() for size in shape]
        rows = [
            ",".join(str(value) for value, size in zip(gear, sizes, strict=True) if size < 0)
            for gear in self.gears["dims"]
        ]
        return [f"--dynamic_dims={';'.join(rows)}"]

    def command(self) -> list[str]:
        """What to type, with the paths as the caller gave them."""
        return self.argv(str(self.source), str(self.out.with_suffix("")))

    def shell(self) -> str:
        command = shlex.join(self.command())
        if not self.keep:
            return command
        keep_file = self.keep_file(str(self.out.with_suffix("")))
        return f"printf '%s\\n' {shlex.join(self.keep)} > {shlex.quote(keep_file)} && {command}"

    def run(self, program: str, work: Path, timeout: float, progress: Callable[[str], None] | None) -> Path:
        """Run atc inside `work`, so that what it litters goes with that folder; returns the .om that it wrote there."""
        if self.keep:
            (work / self.keep_file(self.work_stem)).write_text("\n".join(self.keep) + "\n", encoding="utf-8")
        argv = [program, *self.argv(plain_path(self.source, work), self.work_stem)[1:]]
        outcome = run_atc(argv, work, timeout, progress)
        made = [work / f"{self.work_stem}{suffix}.om" for suffix in ("", "_linux_x86_64", "_linux_aarch64")]
        found = next((path for path in made if path.is_file() and path.stat().st_size), None)
        reason = outcome.reason(self.soc)
        if reason is None and found is None:
            reason = "atc reported success but wrote no .om; check the space on the disk and run it again"
        if reason is not None or found is None:
            raise CompileError(f"{self.source}: {reason}")
        return found

    def sidecar(self, atc_version: str | None) -> dict[str, Any]:
        return {
            "format": "jasper-asr om sidecar",
            "version": 1,
            "config": self.model.config,
            "masked": self.model.masked,
            "inputs": [{"name": name, "shape": shape} for name, shape in self.model.shapes.items()],
            "gears": self.gears,
            "onnx": self.source.name,
            "onnx_sha256": self.model.sha256,
            "soc_version": self.soc,
            "atc_version": atc_version,
            "command": self.command(),
        }

    def report(self, om: Path | None, atc_version: str | None, seconds: float) -> CompileReport:
        return CompileReport(
            om=om,
            sidecar=om.with_suffix(".json") if om else None,
            command=tuple(self.command()),
            shell=self.shell(),
            soc_version=self.soc,
            atc_version=atc_version,
            gears=self.gears,
            seconds=seconds,
        )


def _plan(
    source: Path,
    soc: str,
    out: Path | None,
    precision: str | None,
    keep_fp32: Sequence[str],
    gears: Sequence[Gear] | None,
    batch_size: int | None,
) -> _Job:
    check_soc(soc)
    out = source.with_suffix(".om") if out is None else Path(out)
    if out.suffix != ".om":
        raise UsageError(f"{out}: the output must end in .om")
    options = _precision_options(precision, keep_fp32)
    model = _with_batch(source, _read_model(source), batch_size)
    limit = 13 if soc == "Ascend310" else 18
    if model.opset > limit:
        raise ModelError(f"{source}: opset {model.opset}, {soc} takes up to {limit}; export it with --opset 11")
    keep = tuple(_keep_line(model, item) for item in keep_fp32)
    return _Job(source, model, out, soc, options, keep, _checked_gears(source, model, gears))


def _with_batch(source: Path, model: _Model, batch_size: int | None) -> _Model:
    """`model` with its open batch fixed to `batch_size`; None leaves it as it is."""
    batch = model.shapes["feats"][0]
    if batch_size is None or batch_size == batch:
        return model
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: must be at least 1")
    if batch > 0:
        raise UsageError(f"{source}: was exported for batches of {batch}; export it for {batch_size} or for any")
    return replace(model, shapes={name: [batch_size, *shape[1:]] for name, shape in model.shapes.items()})


def _precision_options(precision: str | None, keep_fp32: Sequence[str]) -> tuple[str, ...]:
    if keep_fp32 and precision in (None, "origin", "must_keep_origin_dtype"):
        raise UsageError("keep-fp32 works only with a precision that lowers the others, such as mixed_float16")
    if precision is None:
        return ()
    if precision in PRECISIONS_V2:
        return (f"--precision_mode_v2={precision}",)
    if precision in PRECISIONS_V1:
        return (f"--precision_mode={precision}",)
    raise UsageError(f"precision {precision!r}: choose {', '.join(PRECISIONS_V2 + PRECISIONS_V1)}")


_ASCEND_TYPES = {"Conv": "Conv2D", "LogSoftmax": "LogSoftmaxV2"}
"""ONNX op -> the type that atc makes of it, where the names differ and precision matters."""


def _keep_line(model: _Model, item: str) -> str:
    """A line of the --keep_dtype file: the name of a node, or `OpType::` and a type of Ascend's."""
    if item in model.nodes:
        return item
    name = item.removeprefix("OpType::")
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or re.search(r"_\d+$", name):
        raise UsageError(f"keep-fp32 {item!r}: no such node; give a node's name or an op type such as LogSoftmaxV2")
    return f"OpType::{_ASCEND_TYPES.get(name, name)}"


def _checked_gears(source: Path, model: _Model, gears: Sequence[Gear] | None) -> dict[str, Any] | None:
    """The sidecar's `gears`: None, {"batch": [B, ...]} or {"dims": [[B, F, T, B], ...]}, in rising order."""
    batch, bands, frames = model.shapes["feats"]
    is_open = (batch < 0, frames < 0)
    if gears is None:
        if any(is_open):
            raise UsageError(f"{source}: feats is {model.shapes['feats']}; its open sizes (-1) need --gears")
        return None
    if not any(is_open):
        raise UsageError(
            f"{source}: feats is fixed to {model.shapes['feats']}; leave --gears out, or export open sizes"
        )
    wanted, kind = (tuple, "BATCHxFRAMES such as 1x1024") if all(is_open) else (int, "a plain number")
    rows = sorted(set(gears), key=lambda gear: gear if isinstance(gear, tuple) else (gear, 0))
    if not all(isinstance(gear, wanted) for gear in rows):
        raise UsageError(f"{source}: feats is {model.shapes['feats']}; each gear must be {kind}")
    if len(rows) != len(gears) or not 2 <= len(rows) <= MAX_GEARS:
        raise UsageError(
            f"{source}: {len(gears)} gears, {len(rows)} of them different; give 2 to {MAX_GEARS} different ones"
        )
    pairs = [gear if isinstance(gear, tuple) else (gear, frames) if batch < 0 else (batch, gear) for gear in rows]
    if min(min(pair) for pair in pairs) < 1:
        raise UsageError(f"{source}: a gear must be at least 1")
    longest = max(pair[1] for pair in pairs)
    if model.max_frames and longest > model.max_frames:
        raise UsageError(f"{source}: was exported for up to {model.max_frames} frames, a gear asks for {longest}")
    if frames > 0:
        return {"batch": [size for size, _ in pairs]}
    return {"dims": [[size, bands, length, size] for size, length in pairs]}
