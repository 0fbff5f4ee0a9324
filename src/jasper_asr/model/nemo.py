"""NeMo's `.nemo` archives of Jasper and QuartzNet: the two members that matter, and NeMo's names for what is in them.

A .nemo is a tar, in old ones a gzipped tar, that holds `model_config.yaml` and `model_weights.ckpt`. Both are read from
the stream into memory under limits of size; nothing is ever extracted, and other members are passed over unread.

NeMo's front end (FilterbankFeatures of NeMo 2.6) differs from NVIDIA's older one in what it adds before the logarithm,
in zeros where that one reflects the signal, and in counting floor(N / hop) frames; NeMo 1 still reflected, and counted
a frame more. Networks are the same, under other names.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from jasper_asr.config import ModelConfig, parse_config
from jasper_asr.errors import ConfigError, ModelError

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
LIMITS = {CONFIG: 1 << 20, WEIGHTS: 4 << 30}
"""Bytes that a member may have: Jasper 10x5 has 1.3 GB of weights."""

_MOST_MEMBERS = 1000
_OTHERS = 256 << 20


def read_archive(path: Path) -> tuple[bytes, BinaryIO]:
    """The config's bytes and the weights' file, in memory. Raises ModelError for what is missing, odd or too large."""
    found: dict[str, bytes] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_unpacked(file, path), mode="r|") as archive:
            for number, member in enumerate(archive):
                if number == _MOST_MEMBERS:
                    raise ModelError(f"{path}: holds over {_MOST_MEMBERS} members; is it a NeMo archive?")
                name = member.name.removeprefix("./")
                if name in LIMITS:
                    _check_member(path, member, name, found)
                    found[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
                    if len(found[name]) != member.size:
                        raise ModelError(f"{path}: {name} ends early; copy or download it again")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ModelError(f"{path}: not a whole NeMo archive ({error}); copy or download it again") from error
    if missing := [name for name in LIMITS if name not in found]:
        raise ModelError(f"{path}: holds no {' and no '.join(missing)}; is it a NeMo archive?")
    return found[CONFIG], io.BytesIO(found.pop(WEIGHTS))


def model_config(text: bytes, path: Path) -> ModelConfig:
    """ModelConfig from model_config.yaml; `path` names the archive in errors. Raises ConfigError.

    Whatever would change the network's or the front end's results, and is not what Jasper and QuartzNet have, is an
    error that names its key.
    """
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{path}: {CONFIG}: not plain YAML ({cause[:200]}); save the model again") from error
    return parse_config(_Translator(f"{path}: {CONFIG}").config(raw, path.stem), str(path))


def v2_name(name: str, family: str) -> str | None:
    """Our name for a tensor of NeMo's state dict; None for what is not the network's."""
    if name.startswith(_NOT_THE_NETWORK):
        return None
    if match := _LAYER.fullmatch(name):
        block, branch, place, part = match.groups()
        inside = branch if branch == "res" or family == "quartznet" else "conv"
        return f"encoder.layers.{block}.{inside}.{place}.{part}"
    return name.replace("decoder.decoder_layers.", "decoder.layers.", 1)


_NOT_THE_NETWORK = ("preprocessor.", "spec_augmentation.", "loss.", "_wer.", "wer.")
_LAYER = re.compile(r"encoder\.encoder\.(\d+)\.(mconv|res)\.(\d+(?:\.\d+)?)\.(?:conv\.)?(\w+)")
"""With masks a convolution is wrapped in another module, hence `conv.`; without them it is not."""


def _unpacked(file: BinaryIO, path: Path) -> Any:
    """A tar's bytes, whether gzipped or not; no more of them than a tar of the two members may have."""
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return _Limited(gzip.GzipFile(fileobj=file) if gzipped else file, path)


class _Limited:
    """A file that ends with an error after as many bytes as the two members may have, and some more for others."""

    def __init__(self, file: BinaryIO | gzip.GzipFile, path: Path) -> None:
        self._file, self._path = file, path
        self._left = sum(LIMITS.values()) + _OTHERS

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ModelError(f"{self._path}: is larger than any Jasper or QuartzNet; is it one?")
        return data


def _check_member(path: Path, member: tarfile.TarInfo, name: str, found: Iterable[str]) -> None:
    if not member.isreg() or member.issparse():
        raise ModelError(f"{path}: refused, {name} is a link or no plain file; save the model again")
    if name in found:
        raise ModelError(f"{path}: refused, holds {name} twice; save the model again")
    if member.size > LIMITS[name]:
        raise ModelError(f"{path}: refused, {name} has {member.size:,} bytes, too many; is it a NeMo model?")


_OURS: Mapping[str, Mapping[str, Any]] = {
    "preprocessor": {
        "n_window_size": None,
        "n_window_stride": None,
        "log": True,
        "log_zero_guard_type": "add",
        "mag_power": 2.0,
        "exact_pad": False,
        "pad_value": 0,
        "mel_norm": "slaney",
        "use_torchaudio": False,
    },
    "encoder": {"normalization_mode": "batch", "residual_mode": "add", "frame_splicing": 1, "quantize": False},
    "encoder.jasper": {
        "groups": 1,
        "heads": -1,
        "residual_mode": "add",
        "se": False,
        "kernel_size_factor": 1,
        "stride_last": False,
        "future_context": -1,
    },
    "decoder": {"add_blank": True},
}
"""Keys of NeMo that change results, with the one value that our networks and features know: NeMo's own default."""

_WITHOUT_EFFECT = {
    "preprocessor": ("stft_conv", "stft_exact_pad", "rng", "nb_augmentation_prob", "nb_max_freq", "max_duration"),
    "encoder": ("norm_groups",),
    "encoder.jasper": ("se_reduction_ratio", "se_context_size", "se_context_window", "se_interpolation_mode"),
    "decoder": ("init_mode",),
}
"""Keys that NeMo itself ignores, or that matter in training only."""

_FRONT_END = {  # NeMo's key -> ours, and NeMo's default
    "sample_rate": ("sample_rate", 16_000),
    "window_size": ("window_size", 0.02),
    "window_stride": ("window_stride", 0.01),
    "window": ("window", "hann"),
    "n_fft": ("n_fft", None),
    "features": ("n_filt", 64),
    "normalize": ("normalize", "per_feature"),
    "dither": ("dither", 1e-5),
    "frame_splicing": ("frame_splicing", 1),
    "pad_to": ("pad_align", 16),
    "preemph": ("preemph", 0.97),
    "lowfreq": ("lowfreq", 0),
    "highfreq": ("highfreq", None),
    "log_zero_guard_value": ("log_guard", 2.0**-24),
}

_BLOCK = {  # NeMo's key -> ours
    "filters": "filters",
    "repeat": "repeat",
    "kernel": "kernel_size",
    "stride": "stride",
    "dilation": "dilation",
    "dropout": "dropout",
    "residual": "residual",
    "residual_dense": "residual_dense",
    "separable": "separable",
}

_CLASSES = {
    "preprocessor": "AudioToMelSpectrogramPreprocessor",
    "encoder": "ConvASREncoder",
    "decoder": "ConvASRDecoder",
}

_INITS = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")


class _Translator:
    """NeMo's config as the mapping that `parse_config` takes; every complaint names the archive and the key."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {message}")

    def config(self, raw: object, name: str) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            raise self.fail(f"must be a mapping of keys to values, not {type(raw).__name__}")
        preprocessor, encoder, decoder = (self.section(raw, key) for key in _CLASSES)
        blocks = [self.block(row, f"encoder.jasper[{index}]") for index, row in enumerate(self.rows(encoder))]
        self.check(encoder, "encoder", "encoder", {"jasper", "activation", "feat_in", "conv_mask", "init_mode"})
        self.check(decoder, "decoder", "decoder", {"feat_in", "num_classes", "vocabulary"})
        init = encoder.get("init_mode")
        family = "quartznet" if any(block.get("separable") is True for block in blocks) else "jasper"
        bank = self.front_end(preprocessor)
        return {
            "name": name,
            "labels": self.vocabulary(decoder),
            "input_val": {"audio_dataset": {"sample_rate": bank["sample_rate"]}, "filterbank_features": bank},
            family: {
                "encoder": {
                    "in_feats": encoder.get("feat_in"),
                    "activation": encoder.get("activation"),
                    "use_conv_masks": encoder.get("conv_mask", True),
                    "init": init if init in _INITS else _INITS[0],
                    "blocks": blocks,
                },
                "decoder": {"in_feats": decoder.get("feat_in")},
            },
        }

    def section(self, raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """A module's arguments. The first releases of NeMo name its class in `cls` and put them into `params`."""
        section = raw.get(key)
        if not isinstance(section, Mapping):
            raise self.fail(f"key {key}: missing, or no mapping of keys to values")
        kind = str(section.get("_target_", section.get("cls", "nothing"))).rpartition(".")[2]
        if kind != _CLASSES[key]:
            raise self.fail(f"key {key}: is {kind}, not {_CLASSES[key]}; only Jasper and QuartzNet are read")
        arguments = section.get("params", section)
        if not isinstance(arguments, Mapping):
            raise self.fail(f"key {key}.params: must be a mapping of keys to values, not {type(arguments).__name__}")
        return {name: value for name, value in arguments.items() if name not in ("_target_", "cls")}

    def rows(self, encoder: Mapping[str, Any]) -> list[Any]:
        rows = encoder.get("jasper")
        if not isinstance(rows, list):
            raise self.fail("key encoder.jasper: must be a list of blocks")
        return rows

    def block(self, row: object, key: str) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise self.fail(f"key {key}: must be a mapping of keys to values, not {type(row).__name__}")
        self.check(row, key, "encoder.jasper", _BLOCK)
        block = {ours: row[theirs] for theirs, ours in _BLOCK.items() if theirs in row}
        kernel = block.get("kernel_size")
        if isinstance(kernel, list) and len(kernel) == 1:
            kernel = kernel[0]
        if isinstance(kernel, int):
            block["kernel_size"] = kernel | 1  # NeMo makes even widths odd
        return block

    def front_end(self, given: Mapping[str, Any]) -> dict[str, Any]:
        self.check(given, "preprocessor", "preprocessor", _FRONT_END)
        bank = {ours: given.get(theirs, default) for theirs, (ours, default) in _FRONT_END.items()}
        bank["preemph"] = 0.0 if bank["preemph"] is None else bank["preemph"]
        if bank["n_fft"] is None:
            bank["n_fft"] = _power_of_two(bank["sample_rate"], bank["window_size"])
        return bank | {"pad_mode": "constant", "frame_count": "floor"}

    def vocabulary(self, decoder: Mapping[str, Any]) -> list[Any]:
        labels, count = decoder.get("vocabulary"), decoder.get("num_classes", -1)
        if not isinstance(labels, list):
            raise self.fail("key decoder.vocabulary: must be a list of characters")
        if isinstance(count, int) and 0 < count != len(labels):
            raise self.fail(f"key decoder.num_classes: {count} differs from the {len(labels)} labels of the vocabulary")
        return labels

    def check(self, given: Mapping[str, Any], key: str, kind: str, known: Iterable[str]) -> None:
        """That keys which we do not translate have no effect, or the effect that ours has."""
        fixed = _OURS[kind]
        for name, value in given.items():
            if name in fixed:
                if value != fixed[name]:
                    raise self.fail(f"key {key}.{name}: {value!r} is not supported, only {fixed[name]!r}")
            elif name not in known and name not in _WITHOUT_EFFECT[kind]:
                raise self.fail(f"unknown key {key}.{name}")


def _power_of_two(rate: Any, seconds: Any) -> int:
    """The FFT that just holds a window; what is no number `parse_config` complains of."""
    try:
        return 1 << (int(rate * seconds) - 1).bit_length()
    except (TypeError, ValueError, OverflowError):
        return 1
