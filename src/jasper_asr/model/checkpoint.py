"""Checkpoints -> config + numpy weights: NVIDIA's .pt (old and new names, EMA or raw), NeMo's .nemo, our .safetensors.

Weights carry NVIDIA's v2 names everywhere. Reading is strict: every missing, unexpected, misshapen or non-finite
tensor is listed. Pickles are only ever read with `weights_only=True`, which runs no code from the file.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import ModelConfig, builtin_config, builtin_configs, load_config, parse_config
from jasper_asr.errors import ConfigError, ModelError, StorageError, UsageError
from jasper_asr.model import nemo

Weights = dict[str, NDArray[np.float32]]

STATE_DICTS = {"ema": "ema_state_dict", "raw": "state_dict"}
"""What `weights` may say -> NVIDIA's key in a .pt."""

NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Checkpoint:
    """A model as read from a file: its config, float32 weights by v2 name, and where they came from."""

    config: ModelConfig
    weights: Weights
    sha256: str
    kind: str
    """`ema` or `raw` for .pt, `nemo` or `safetensors` else."""


@dataclass(frozen=True)
class ConvLayer:
    """One convolution of a block and the BatchNorm after it, by the prefixes of their weight names.

    Depthwise convolutions (QuartzNet) have no norm of their own: `norm` is empty.
    """

    name: str
    norm: str
    shape: tuple[int, int, int]
    stride: int
    dilation: int
    groups: int

    @property
    def padding(self) -> int:
        """Zeros on each side of the input."""
        return self.shape[2] // 2 * self.dilation


@dataclass(frozen=True)
class BlockLayers:
    """The convolutions of one block: `repeats[i]` run one after the other, then ReLU; `residuals` one a pane."""

    repeats: tuple[tuple[ConvLayer, ...], ...]
    residuals: tuple[ConvLayer, ...]


def block_layers(config: ModelConfig) -> list[BlockLayers]:
    """All convolutions of the encoder with their weight names, as NVIDIA numbers them.

    A repeat takes four places in the module list (convolution, norm, activation, dropout), five when separable.
    """
    result = []
    channels = config.in_feats
    conv = "mconv" if config.family == "quartznet" else "conv"
    for index, (block, panes) in enumerate(zip(config.blocks, config.residual_panes(), strict=True)):
        prefix = f"encoder.layers.{index}"
        repeats: list[tuple[ConvLayer, ...]] = []
        for repeat in range(block.repeat):
            place = repeat * (5 if block.separable else 4)
            name = f"{prefix}.{conv}"
            if block.separable:
                depthwise = ConvLayer(
                    f"{name}.{place}",
                    "",
                    (channels, 1, block.kernel_size),
                    block.stride,
                    block.dilation,
                    channels,
                )
                pointwise = ConvLayer(
                    f"{name}.{place + 1}", f"{name}.{place + 2}", (block.filters, channels, 1), 1, 1, 1
                )
                repeats.append((depthwise, pointwise))
            else:
                shape = (block.filters, channels, block.kernel_size)
                full = ConvLayer(f"{name}.{place}", f"{name}.{place + 1}", shape, block.stride, block.dilation, 1)
                repeats.append((full,))
            channels = block.filters
        residuals = tuple(
            ConvLayer(f"{prefix}.res.{i}.0", f"{prefix}.res.{i}.1", (block.filters, pane, 1), 1, 1, 1)
            for i, pane in enumerate(panes)
        )
        result.append(BlockLayers(tuple(repeats), residuals))
    return result


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the model needs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layers in block_layers(config):
        for layer in (*(conv for repeat in layers.repeats for conv in repeat), *layers.residuals):
            shapes[f"{layer.name}.weight"] = layer.shape
            if layer.norm:
                shapes |= {f"{layer.norm}.{part}": (layer.shape[0],) for part in NORM_PARTS}
    shapes["decoder.layers.0.weight"] = (config.n_classes, config.blocks[-1].filters, 1)
    shapes["decoder.layers.0.bias"] = (config.n_classes,)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Trainable parameters, as torch counts them: running statistics are not parameters."""
    shapes = weight_shapes(config).items()
    return sum(int(np.prod(shape)) for name, shape in shapes if not name.endswith(("running_mean", "running_var")))


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Sane random weights (He-normal, norms near identity), for timing and for tests of shapes."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 3:
            scale = np.sqrt(2.0 / (shape[1] * shape[2]), dtype=np.float32)
            weights[name] = rng.standard_normal(shape, dtype=np.float32) * scale
        elif name.endswith(("running_var", "weight")):
            weights[name] = rng.uniform(0.8, 1.2, shape).astype(np.float32)
        else:
            weights[name] = rng.normal(0, 0.05, shape).astype(np.float32)
    return weights


def load_checkpoint(
    path: str | os.PathLike[str], *, config: ModelConfig | None = None, weights: str = "ema"
) -> Checkpoint:
    """Read `path` (.pt, .nemo or .safetensors). `weights` is `ema` or `raw` and matters for .pt only.

    Without `config`: the one inside the file, else the .yaml of the same stem or `config.yaml` beside it, else the
    built-in config whose weights have just these names and shapes.
    Raises UsageError, StorageError, ConfigError, or ModelError with every mismatch.
    """
    path = Path(path)
    if weights not in STATE_DICTS:
        raise UsageError(f"weights {weights!r}: choose {' or '.join(STATE_DICTS)}")
    _check_readable(path)
    if path.suffix == ".safetensors":
        found, embedded = _read_safetensors(path)
        kind = "safetensors"
    elif path.suffix == ".nemo":
        found, embedded = _read_nemo(path, config)
        kind = "nemo"
    else:
        found, embedded = _read_pt(path, weights)
        kind = weights
    config = config or embedded or _config_beside(path) or _matching_builtin(path, found)
    return Checkpoint(config, _checked(path, found, config), file_sha256(path), kind)


def save_safetensors(
    path: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, NDArray[Any]],
    *,
    half: bool = False,
) -> None:
    """Write weights (float16 if `half`) and the config into one .safetensors file, whole or not at all.

    Raises ModelError for a value beyond float16's 65,504, StorageError when it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    with np.errstate(over="ignore"):  # an overflow is an error below, not a warning
        tensors = {
            name: np.ascontiguousarray(value, np.float16 if half else np.float32) for name, value in weights.items()
        }
    for name, value in tensors.items():
        if half and not np.isfinite(value).all():
            raise ModelError(f"{path}: {name} does not fit float16; save float32")
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(tensors, temporary, metadata={"config": json.dumps(config.raw)})
        os.replace(temporary, path)
    except SafetensorError as error:  # what a missing folder or a full disk becomes
        raise StorageError(
            f"{path}: cannot be written ({_one_line(error)}); check the folder and free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; give the checkpoint file in it")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise ModelError(f"{path}: the file is empty; copy or download it again")
    except OSError as error:
        raise StorageError(
            f"{path}: cannot read it ({(error.strerror or str(error)).lower()}); check the path"
        ) from error


def _read_safetensors(path: Path) -> tuple[Weights, ModelConfig | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not a safetensors file ({_one_line(error)}); copy or download it again") from error
    return weights, _embedded_config(path, metadata.get("config"))


def _read_pt(path: Path, kind: str) -> tuple[Weights, ModelConfig | None]:
    saved = _torch_load(path)
    key = STATE_DICTS[kind]
    if not isinstance(saved, Mapping):
        raise ModelError(f"{path}: holds a {type(saved).__name__}, not a checkpoint with {key}")
    state = saved.get(key)
    if not isinstance(state, Mapping):
        others = [name for name in STATE_DICTS.values() if isinstance(saved.get(name), Mapping)]
        cure = "use --weights raw" if others == ["state_dict"] else "use --weights ema" if others else "is it a model?"
        raise ModelError(f"{path}: holds no {key} (keys: {', '.join(map(str, list(saved)[:8]))}); {cure}")
    return _as_weights(path, _renamed(state)), _embedded_config(path, saved.get("config"))


def _read_nemo(path: Path, config: ModelConfig | None) -> tuple[Weights, ModelConfig | None]:
    text, file = nemo.read_archive(path)
    config = config or nemo.model_config(text, path)
    state = _torch_load(path, file)
    if not isinstance(state, Mapping):
        raise ModelError(f"{path}: {nemo.WEIGHTS} holds a {type(state).__name__}, not tensors by name")
    family = config.family
    renamed = ((nemo.v2_name(str(name), family), value) for name, value in state.items())
    kept = ((name, value) for name, value in renamed if name and not name.endswith("num_batches_tracked"))
    return _as_weights(path, kept), config


def _as_weights(path: Path, named: Iterable[tuple[str, Any]]) -> Weights:
    weights: Weights = {}
    for name, value in named:
        if name in weights:
            raise ModelError(f"{path}: holds {name} under two names; keep one")
        weights[name] = _to_numpy(path, name, value)
    return weights


def _torch_load(path: Path, opened: BinaryIO | None = None) -> Any:
    """What torch saved in `path`, or in `opened`, a part of it."""
    try:
        import torch
    except ImportError as error:
        raise ModelError(f"{path}: reading {path.suffix} needs PyTorch; pip install 'jasper-asr[torch]'") from error
    with path.open("rb") as file:
        # only this layout can be mapped: the optimiser's state stays on disk
        zipped = opened is None and file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings(action="ignore"):  # on old layouts, which it reads all the same
            return torch.load(opened or path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises whatever its unpickler meets
        if "Weights only load failed" in str(error) or "weights_only" in str(error):
            cause = "it holds Python objects other than tensors, which could run code"
            raise ModelError(f"{path}: refused, {cause}; save its state_dict alone and try again") from error
        raise ModelError(f"{path}: not a PyTorch checkpoint ({_one_line(error)}); copy or download it again") from error


_V1_NAMES = (
    (re.compile(r"^jasper_encoder\.encoder\."), "encoder.layers."),
    (re.compile(r"^jasper_decoder\.decoder_layers\."), "decoder.layers."),
)
_NOT_THE_MODEL = ("audio_preprocessor.", "acoustic_model.")


def _renamed(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(v2 name, tensor); DDP's `module.` goes, and so do front-end buffers and batch counters."""
    for name, value in state.items():
        new = str(name).removeprefix("module.")
        if new.startswith(_NOT_THE_MODEL) or new.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in _V1_NAMES:
            new = pattern.sub(replacement, new)
        yield new, value


def _to_numpy(path: Path, name: str, value: Any) -> NDArray[np.float32]:
    if not hasattr(value, "is_floating_point") or not value.is_floating_point():
        raise ModelError(f"{path}: {name} is not a tensor of real numbers")
    return value.detach().float().numpy()  # type: ignore[no-any-return]


def _embedded_config(path: Path, text: object) -> ModelConfig | None:
    if not isinstance(text, str):
        return None
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: the config inside is not JSON ({error}); give --config") from error
    return parse_config(raw, str(path))


def _config_beside(path: Path) -> ModelConfig | None:
    for candidate in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        if candidate.exists():
            return load_config(candidate)
    return None


def _matching_builtin(path: Path, found: Weights) -> ModelConfig:
    shapes = {name: value.shape for name, value in found.items()}
    for name in builtin_configs():
        config = builtin_config(name)
        if weight_shapes(config) == shapes:
            return config
    known = ", ".join(builtin_configs())
    raise ConfigError(f"{path}: carries no config and fits none of ours ({known}); give --config YAML")


def _checked(path: Path, found: Weights, config: ModelConfig) -> Weights:
    """Exactly the needed tensors, in order; or ModelError with all that is wrong."""
    shapes = weight_shapes(config)
    problems = [f"missing {name}" for name in shapes if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in shapes]
    for name, shape in shapes.items():
        if name not in found:
            continue
        value = found[name]
        if value.shape != shape:
            problems.append(f"{name} is {list(value.shape)}, must be {list(shape)}")
        elif not np.isfinite(value).all():
            problems.append(f"{name} holds values that are not finite")
        elif name.endswith("running_var") and (value < 0).any():
            problems.append(f"{name} holds a negative variance")
    if problems:
        raise ModelError(
            f"{path}: {len(problems)} tensors do not fit the config {config.name!r}: {'; '.join(problems)}; "
            "is it the right --config?"
        )
    return {name: found[name] for name in shapes}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
