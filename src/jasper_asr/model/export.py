"""Checkpoint -> .onnx file, and what a model file says of itself."""

import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jasper_asr.config import ModelConfig, parse_config
from jasper_asr.errors import ModelError, StorageError
from jasper_asr.files import write_whole
from jasper_asr.model.checkpoint import Checkpoint, file_sha256, load_checkpoint, parameter_count, save_safetensors

BUILTIN_MODELS = {"mini": Path(__file__).parents[1] / "models" / "mini" / "weights.safetensors"}
"""Models inside the package, by the name that `--model` takes."""


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
    """The checkpoint as a serialised ONNX model; `shape` goes to `build_graph`."""
    buffer = io.BytesIO()
    buffer.writelines(_graph_pieces(checkpoint, **shape))
    return buffer.getvalue()


def _graph_pieces(checkpoint: Checkpoint, check: Callable[[Any], None] | None = None, **shape: Any) -> Iterator[bytes]:
    from jasper_asr.model.graph import build_graph, serialize

    provenance = {"checkpoint_sha256": checkpoint.sha256, "weights": checkpoint.kind}
    proto = build_graph(checkpoint.config, checkpoint.weights, provenance=provenance, **shape)
    if check:
        check(proto)
    return serialize(proto)


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
    check: Callable[[Any], None] | None = None,
) -> str:
    """Write `out` whole or not at all; returns one line that says what was made.

    `batch_size`, `frames`, `max_frames`, `opset` and `masked` as in `build_graph`; `check` is given the onnx.ModelProto
    and raises to refuse it.
    """
    started = time.perf_counter()
    path = resolve_model(model)
    if path.suffix in (".onnx", ".om"):
        raise ModelError(f"{path}: is an {path.suffix[1:].upper()} model already; give a checkpoint")
    checkpoint = load_checkpoint(path, config=config, weights=weights)
    shape = {"batch_size": batch_size, "frames": frames, "max_frames": max_frames}
    pieces = _graph_pieces(checkpoint, check, **shape, opset=opset, masked=masked)
    write_whole(out, pieces)
    parameters = parameter_count(checkpoint.config)
    size, seconds = out.stat().st_size / 1e6, time.perf_counter() - started
    return (
        f"{checkpoint.config.name}, {parameters:,} parameters, opset {opset}, feats [{batch_size or 'B'}, "
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
