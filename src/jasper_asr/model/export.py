"""Checkpoint -> .onnx file, and what a model file says of itself."""

import glob
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jasper_asr._version import __version__
from jasper_asr.config import ModelConfig, parse_config
from jasper_asr.errors import ModelError, StorageError
from jasper_asr.files import write_whole
from jasper_asr.model.checkpoint import Checkpoint, file_sha256, load_checkpoint, parameter_count, save_safetensors

BUILTIN_MODELS = {"mini": Path(__file__).parents[1] / "models" / "mini" / "weights.safetensors"}
"""Models inside the package, by the name that `--model` takes."""


INLINE_BYTES = 2_000_000_000
"""Weights beyond this go to a file of their own: a protobuf message ends at 2**31 bytes, and the nodes need some."""


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """The file of a built-in name or a path. Raises StorageError when there is none, ModelError for an unknown kind."""
    path = BUILTIN_MODELS.get(os.fspath(model), Path(model))
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; give the model file in it")
    if not path.exists():
        raise StorageError(f"{path}: no such model; give a file, or a built-in name ({', '.join(BUILTIN_MODELS)})")
    if path.suffix not in (".onnx", ".om", ".pt", ".pth", ".nemo", ".safetensors"):
        raise ModelError(f"{path}: unknown kind of model; give .onnx, .om, .pt, .nemo or .safetensors")
    return path


def graph_bytes(checkpoint: Checkpoint, **shape: Any) -> bytes:
    """The checkpoint as a serialised ONNX model of less than 2 GB; `shape` goes to `build_graph`."""
    buffer = io.BytesIO()
    buffer.writelines(_inline_pieces(checkpoint, **shape))
    return buffer.getvalue()


@contextmanager
def graph_source(checkpoint: Checkpoint, **shape: Any) -> Iterator[Path | bytes]:
    """What a backend opens: bytes or, where protobuf cannot hold them, a temporary file, gone when the block ends.

    A runtime that maps the file keeps what it maps. `shape` goes to `build_graph`. Raises StorageError without room.
    """
    if _fits_inline(checkpoint, **shape):
        yield graph_bytes(checkpoint, **shape)
        return
    room = 5 * stored_bytes(checkpoint, **shape) // 4
    with TemporaryDirectory(prefix="jasper-", dir=_folder_in_memory(room), ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "graph.onnx"
        write_graph(checkpoint, path, **shape)
        yield path


def write_graph(
    checkpoint: Checkpoint, out: Path, check: Callable[[Any], None] | None = None, **shape: Any
) -> dict[str, str]:
    """Write `out` whole or not at all, its weights to a file beside it where protobuf cannot hold them.

    That file, `<stem>-<8 digits>.onnx.data`, comes first, and its name depends on all that decides its content: a
    killed run leaves the old model with its old data. Data of an older model of the same name are removed at the end.
    `check` is given the onnx.ModelProto and raises to refuse it. Returns the metadata of the graph.
    """
    from jasper_asr.model.graph import ExternalWeights, serialize

    weights, kept = None, None
    if not _fits_inline(checkpoint, **shape):
        facts = [checkpoint.sha256, checkpoint.kind, checkpoint.config.raw, __version__, sorted(shape.items())]
        weights = ExternalWeights(f"{out.stem}-{sha256(json.dumps(facts).encode()).hexdigest()[:8]}.onnx.data")
    proto = _build(checkpoint, external=weights, **shape)
    if check:
        check(proto)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    if weights:
        kept = out.with_name(weights.location)
        write_whole(kept, weights.pieces())
    write_whole(out, serialize(proto))
    for data in _data_files(out):
        if data != kept:
            data.unlink(missing_ok=True)
    return properties


def _data_files(model: Path) -> list[Path]:
    """The weights that `write_graph` has put beside `model`."""
    return [*model.parent.glob(glob.escape(model.stem) + "-" + "[0-9a-f]" * 8 + ".onnx.data")]


def _folder_in_memory(size: int) -> Path | None:
    """Linux's file system in memory, if it has room for so many bytes: what is mapped there lies in memory once."""
    folder = Path("/dev/shm")
    return folder if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > size else None


def _fits_inline(checkpoint: Checkpoint, **shape: Any) -> bool:
    return stored_bytes(checkpoint, **shape) < INLINE_BYTES


def stored_bytes(checkpoint: Checkpoint, **shape: Any) -> int:
    """What the weights of a graph take; `shape` as in `build_graph`."""
    from jasper_asr.model.spectral import choose_tile, stored_weights

    sizes = {name: shape.get(name) for name in ("batch_size", "frames")}
    tile = choose_tile(checkpoint.config, shape.get("convolution", "direct"), **sizes)
    return 4 * stored_weights(checkpoint.config, tile and (shape.get("tile") or tile))


def _inline_pieces(checkpoint: Checkpoint, **shape: Any) -> Iterator[bytes]:
    from jasper_asr.model.graph import serialize

    return serialize(_build(checkpoint, **shape))


def _build(checkpoint: Checkpoint, **shape: Any) -> Any:
    from jasper_asr.model.graph import build_graph

    provenance = {"checkpoint_sha256": checkpoint.sha256, "weights": checkpoint.kind}
    return build_graph(checkpoint.config, checkpoint.weights, provenance=provenance, **shape)


def export_onnx(
    model: str | os.PathLike[str],
    out: Path,
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    batch_size: int | None = None,
    frames: int | None = None,
    max_frames: int | None = None,
    opset: int = 13,
    masked: bool = True,
    convolution: str = "direct",
    tile: int | None = None,
    check: Callable[[Any], None] | None = None,
) -> str:
    """Write `out` as `write_graph` does; returns one line that says what was made.

    `check` as in `write_graph`, the rest as in `build_graph`.
    """
    started = time.perf_counter()
    path = resolve_model(model)
    if path.suffix in (".onnx", ".om"):
        raise ModelError(f"{path}: is an {path.suffix[1:].upper()} model already; give a checkpoint")
    checkpoint = load_checkpoint(path, config=config, weights=weights)
    shape = {"batch_size": batch_size, "frames": frames, "max_frames": max_frames}
    options = {"opset": opset, "masked": masked, "convolution": convolution, "tile": tile}
    made = write_graph(checkpoint, out, check, **shape, **options)
    parameters = parameter_count(checkpoint.config)
    size, seconds = sum(path.stat().st_size for path in (out, *_data_files(out))) / 1e6, time.perf_counter() - started
    kind = f", spectral in tiles of {made['tile']}" if "tile" in made else ""
    return (
        f"{checkpoint.config.name}, {parameters:,} parameters, opset {opset}{kind}, feats [{batch_size or 'B'}, "
        f"{checkpoint.config.in_feats}, {frames or 'T'}], {size:,.1f} MB, built in {seconds:.2f} s"
    )


def export_safetensors(
    model: str | os.PathLike[str],
    out: Path,
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    half: bool = False,
) -> str:
    """Write weights (float16 if `half`) and config as .safetensors; returns one line that says what was made."""
    path = resolve_model(model)
    if path.suffix == ".onnx":
        raise ModelError(f"{path}: an ONNX model holds no original weights; give a checkpoint")
    checkpoint = load_checkpoint(path, config=config, weights=weights)
    save_safetensors(out, checkpoint.config, checkpoint.weights, half=half)
    kind = "float16" if half else "float32"
    parameters, megabytes = parameter_count(checkpoint.config), out.stat().st_size / 1e6
    return f"{checkpoint.config.name}, {parameters:,} parameters, {kind}, {megabytes:,.1f} MB"


def describe(
    model: str | os.PathLike[str], *, config: ModelConfig | None = None, weights: str = "ema"
) -> dict[str, Any]:
    """Facts about a model file, in the order in which `jasper info` prints them."""
    path = resolve_model(model)
    if path.suffix == ".onnx":
        return _describe_onnx(path)
    checkpoint = load_checkpoint(path, config=config, weights=weights)
    extra = {"weights": checkpoint.kind, "checkpoint_sha256": checkpoint.sha256}
    return facts(path, checkpoint.config, ["B", checkpoint.config.in_feats, "T"], extra)


def embedded_config(properties: Mapping[str, str], name: str) -> ModelConfig:
    """The config in the metadata of an .onnx; `name` names it in errors. Raises ModelError or ConfigError."""
    if "config" not in properties:
        raise ModelError(f"{name}: carries no jasper config in its metadata; make it with jasper export")
    try:
        raw = json.loads(properties["config"])
    except json.JSONDecodeError as error:
        raise ModelError(f"{name}: the config in its metadata is not JSON ({error}); export it again") from error
    return parse_config(raw, name)


def _describe_onnx(path: Path) -> dict[str, Any]:
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own kinds
        raise ModelError(f"{path}: not an ONNX model; export it again") from error
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    config = embedded_config(properties, str(path))
    shapes = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    if "feats" not in shapes or len(shapes["feats"]) != 3:
        raise ModelError(f"{path}: has no input feats [B, {config.in_feats}, T]; make it with jasper export")
    batch, _, frames = (size.dim_value for size in shapes["feats"])
    del properties["config"]
    size = [batch or "B", config.in_feats, frames or "T"]
    masked = properties.pop("masked", "true") == "true"
    return facts(path, config, size, {"model_sha256": file_sha256(path), "masked": masked} | properties)


def facts(path: Path, config: ModelConfig, size: list[Any], extra: dict[str, Any]) -> dict[str, Any]:
    """What `describe` says of a model file; `size` is the shape of feats, `extra` adds what only its kind knows."""
    field, front_end = config.receptive_field(), config.features
    known = {
        "model": config.name,
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "parameters": parameter_count(config),
        "blocks": len(config.blocks),
        "stride": config.stride,
        "frame_seconds": config.frame_seconds,
        "receptive_field": field,
        "receptive_field_seconds": round(field * front_end.window_stride, 6),
        "inputs": {"feats": size, "feat_lens": size[:1]},
        "outputs": {"log_probs": [size[0], "T'", config.n_classes], "log_prob_lens": size[:1]},
        "labels": list(config.labels),
        "blank": config.blank_id,
        "features": {key: getattr(front_end, key) for key in ("n_filt", "window_size", "window_stride", "sample_rate")},
    }
    return known | {key: value for key, value in extra.items() if key not in known}
