"""Model configurations: NVIDIA's YAML, with its key names, as frozen dataclasses.

The layout is that of NVIDIA's Jasper and QuartzNet configs (`labels`, `input_val`, `input_train`, and a `jasper` or
`quartznet` section with `encoder.blocks` and `decoder`). Unknown, missing and contradictory keys raise ConfigError,
which names the file and the key.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from jasper_asr.errors import ConfigError, StorageError

FAMILIES = ("jasper", "quartznet")
"""Sections that may hold encoder and decoder; QuartzNet's blocks are separable and its weights are named `mconv`."""

BATCH_NORM_EPS = 1e-3
"""NVIDIA builds every BatchNorm1d with eps=1e-3, momentum=0.1."""


@dataclass(frozen=True)
class FeatureConfig:
    """`filterbank_features`: how samples become log-mel features. Seconds, Hz and frames as named."""

    sample_rate: int
    window_size: float
    window_stride: float
    window: str
    n_fft: int
    n_filt: int
    normalize: str
    dither: float = 1e-5
    frame_splicing: int = 1
    pad_align: int = 8
    preemph: float = 0.97
    lowfreq: float = 0.0
    highfreq: float | None = None
    max_duration: float = math.inf
    pad_to_max_duration: bool = False
    log_guard: float = 1e-20
    """Added to energies before the logarithm; NeMo adds 2^-24."""
    pad_mode: str = "reflect"
    """What a centred frame sees beyond the signal's ends: its reflection, or `constant` zeros, as with NeMo."""
    frame_count: str = "ceil"
    """Valid frames of N samples: ceil(N / hop), or `floor`, as with NeMo."""

    @property
    def win_length(self) -> int:
        """Samples in one window."""
        return int(self.sample_rate * self.window_size)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.window_stride)


@dataclass(frozen=True)
class SpecAugmentConfig:
    """`spec_augment`: counts and widest extents of the masks (mel bands, frames)."""

    freq_masks: int = 0
    min_freq: int = 0
    max_freq: int = 10
    time_masks: int = 0
    min_time: int = 0
    max_time: int = 10


@dataclass(frozen=True)
class SpeedPerturbationConfig:
    """`speed_perturbation`: rates to draw from; `discrete` draws one of min_rate, 1 and max_rate; applied with p."""

    min_rate: float = 0.85
    max_rate: float = 1.15
    discrete: bool = False
    p: float = 0.1


@dataclass(frozen=True)
class DatasetConfig:
    """`audio_dataset`: which utterances are read and how. Durations in seconds."""

    sample_rate: int = 16_000
    trim_silence: bool = False
    normalize_transcripts: bool = True
    min_duration: float = 0.1
    max_duration: float = math.inf
    pad_to_max_duration: bool = False
    ignore_offline_speed_perturbation: bool = False
    speed_perturbation: SpeedPerturbationConfig | None = None


@dataclass(frozen=True)
class BlockConfig:
    """One encoder block: `repeat` times (convolution, BatchNorm, activation, dropout), and its residual."""

    filters: int
    repeat: int
    kernel_size: int
    stride: int
    dilation: int
    dropout: float
    residual: bool
    residual_dense: bool = False
    separable: bool = False

    @property
    def padding(self) -> int:
        """Zeros on each side: "same" padding for odd kernels, as NVIDIA computes it."""
        return self.kernel_size // 2 * self.dilation

    def output_length(self, length: int) -> int:
        """Frames after this block's convolutions for `length` frames in: (L + 2p - d(k-1) - 1) // s + 1, each."""
        for _ in range(self.repeat):
            span = self.dilation * (self.kernel_size - 1) + 1
            length = (length + 2 * self.padding - span) // self.stride + 1
        return length


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: labels, front end, encoder, decoder, and what training adds."""

    name: str
    family: str
    labels: tuple[str, ...]
    features: FeatureConfig
    dataset: DatasetConfig
    in_feats: int
    activation: str
    use_conv_masks: bool
    init: str
    blocks: tuple[BlockConfig, ...]
    train_features: FeatureConfig | None = None
    train_dataset: DatasetConfig | None = None
    spec_augment: SpecAugmentConfig | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The parsed YAML itself; exports and checkpoints carry it along."""

    @property
    def n_classes(self) -> int:
        """Labels and the CTC blank, which is the last class."""
        return len(self.labels) + 1

    @property
    def blank_id(self) -> int:
        """Index of the CTC blank."""
        return len(self.labels)

    @property
    def stride(self) -> int:
        """Feature frames per output frame."""
        return math.prod(block.stride**block.repeat for block in self.blocks)

    @property
    def frame_seconds(self) -> float:
        """Seconds from one output frame to the next."""
        return self.stride * self.features.hop_length / self.features.sample_rate

    def output_length(self, length: int) -> int:
        """Output frames for `length` valid feature frames."""
        for block in self.blocks:
            length = block.output_length(length)
        return length

    def receptive_field(self) -> int:
        """Feature frames that can change one output frame: 1 + the sum over convolutions of (k-1) d (stride so far).

        Residual branches are 1x1 and see no more. Jasper 10x5: 1763.
        """
        extent, jump = 1, 1
        for block in self.blocks:
            for _ in range(block.repeat):
                extent += (block.kernel_size - 1) * block.dilation * jump
                jump *= block.stride
        return extent

    def residual_panes(self) -> list[tuple[int, ...]]:
        """For each block the channel counts of its residual inputs, in order; empty without a residual.

        A dense block sees the inputs of all dense blocks so far and its own; a plain residual block only its own.
        """
        panes: list[int] = []
        result: list[tuple[int, ...]] = []
        channels = self.in_feats
        for block in self.blocks:
            if block.residual_dense:
                panes.append(channels)
            own = tuple(panes) if block.residual_dense else (channels,)
            result.append(own if block.residual else ())
            channels = block.filters
        return result


def load_config(path: str | PathLike[str]) -> ModelConfig:
    """Read a YAML file. Raises StorageError when it cannot be read, ConfigError when it is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}); is this a YAML model config?") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"{path}: cannot read the config ({reason}); check the path") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML ({cause})") from error
    return parse_config(raw, str(path))


def parse_config(raw: object, source: str) -> ModelConfig:
    """ModelConfig from parsed YAML or JSON; `source` names the file in errors. Raises ConfigError."""
    return _Parser(source).model(raw)


def builtin_config(name: str) -> ModelConfig:
    """A config that ships with the package, such as `jasper10x5dr`."""
    return load_config(Path(__file__).parent / "configs" / f"{name}.yaml")


def builtin_configs() -> list[str]:
    """Names that `builtin_config` takes."""
    return sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.yaml"))


class _Parser:
    """Turns nested mappings into the dataclasses above; every complaint names the file and the dotted key."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {message}")

    def model(self, raw: object) -> ModelConfig:
        top = self.mapping(raw, "the config")
        family = self.family(top)
        self.check_keys(top, "", required=("name", "labels", "input_val", family), optional=("input_train",))
        features, dataset, _ = self.input(top["input_val"], "input_val")
        train: tuple[FeatureConfig | None, DatasetConfig | None, SpecAugmentConfig | None] = (
            None,
            None,
            None,
        )
        if "input_train" in top:
            train = self.input(top["input_train"], "input_train")
        net = self.mapping(top[family], family)
        self.check_keys(net, family, required=("encoder", "decoder"))
        encoder = self.mapping(net["encoder"], f"{family}.encoder")
        self.check_keys(
            encoder,
            f"{family}.encoder",
            required=("in_feats", "activation", "blocks"),
            optional=("init", "frame_splicing", "use_conv_masks"),
        )
        config = ModelConfig(
            name=self.typed(top["name"], str, "name"),
            family=family,
            labels=self.labels(top["labels"]),
            features=features,
            dataset=dataset,
            in_feats=self.typed(encoder["in_feats"], int, f"{family}.encoder.in_feats"),
            activation=self.typed(encoder["activation"], str, f"{family}.encoder.activation"),
            use_conv_masks=self.typed(encoder.get("use_conv_masks", False), bool, f"{family}.encoder.use_conv_masks"),
            init=self.typed(encoder.get("init", "xavier_uniform"), str, f"{family}.encoder.init"),
            blocks=self.blocks(encoder["blocks"], f"{family}.encoder.blocks"),
            train_features=train[0],
            train_dataset=train[1],
            spec_augment=train[2],
            raw=top,
        )
        self.check_whole(config, encoder, net)
        return config

    def family(self, top: Mapping[str, Any]) -> str:
        present = [family for family in FAMILIES if family in top]
        if len(present) != 1:
            found = ", ".join(present) or "none"
            raise self.fail(f"needs exactly one of the keys {' and '.join(FAMILIES)} (found {found})")
        return present[0]

    def labels(self, raw: object) -> tuple[str, ...]:
        labels = self.typed(raw, list, "labels")
        if not labels or not all(isinstance(label, str) and len(label) == 1 for label in labels):
            raise self.fail("key labels: must be a list of single characters; quote each of them")
        if len(set(labels)) != len(labels):
            raise self.fail("key labels: the same label stands twice")
        return tuple(labels)

    def input(self, raw: object, key: str) -> tuple[FeatureConfig, DatasetConfig, SpecAugmentConfig | None]:
        section = self.mapping(raw, key)
        self.check_keys(section, key, required=("audio_dataset", "filterbank_features"))
        dataset = dict(self.mapping(section["audio_dataset"], f"{key}.audio_dataset"))
        if dataset.get("speed_perturbation") is not None:
            name = f"{key}.audio_dataset.speed_perturbation"
            dataset["speed_perturbation"] = self.build(SpeedPerturbationConfig, dataset["speed_perturbation"], name)
        bank = dict(self.mapping(section["filterbank_features"], f"{key}.filterbank_features"))
        masks = bank.pop("spec_augment", None)
        features = self.build(FeatureConfig, bank, f"{key}.filterbank_features")
        self.check_features(features, f"{key}.filterbank_features")
        spec_augment = None
        if masks is not None:
            spec_augment = self.build(SpecAugmentConfig, masks, f"{key}.filterbank_features.spec_augment")
        return features, self.build(DatasetConfig, dataset, f"{key}.audio_dataset"), spec_augment

    def check_features(self, features: FeatureConfig, key: str) -> None:
        known: dict[str, tuple[object, ...]] = {
            "window": ("hann",),
            "normalize": ("per_feature",),
            "frame_splicing": (1,),
            "pad_mode": ("reflect", "constant"),
            "frame_count": ("ceil", "floor"),
        }
        for name, allowed in known.items():
            if getattr(features, name) not in allowed:
                options = " or ".join(map(str, allowed))
                raise self.fail(f"key {key}.{name}: {getattr(features, name)!r} is not supported; use {options}")
        for name in ("sample_rate", "window_size", "window_stride", "n_fft", "n_filt", "log_guard"):
            if not getattr(features, name) > 0:
                raise self.fail(f"key {key}.{name}: must be above 0")
        for name in ("window_size", "window_stride"):
            if not 1 <= getattr(features, name) * features.sample_rate < math.inf:
                raise self.fail(f"key {key}.{name}: {getattr(features, name):g} s is not a sample or more")
        if features.win_length > features.n_fft:
            raise self.fail(
                f"key {key}.n_fft: {features.n_fft} is shorter than the window of {features.win_length} samples"
            )
        low, top = features.lowfreq, features.sample_rate / 2
        high = features.highfreq or top  # 0 means "all", as it does for NVIDIA
        if not 0 <= low < high <= top:
            raise self.fail(f"key {key}.highfreq: mel bands lie within 0 to {top:g} Hz, not {low:g} to {high:g}")
        if features.pad_to_max_duration and features.max_duration == math.inf:
            raise self.fail(f"key {key}.pad_to_max_duration: needs a max_duration")

    def blocks(self, raw: object, key: str) -> tuple[BlockConfig, ...]:
        rows = self.typed(raw, list, key)
        if not rows:
            raise self.fail(f"key {key}: holds no block")
        return tuple(self.block(row, f"{key}[{index}]") for index, row in enumerate(rows))

    def block(self, raw: object, key: str) -> BlockConfig:
        row = dict(self.mapping(raw, key))
        for name in ("kernel_size", "stride", "dilation"):  # NVIDIA writes these as lists of one
            if isinstance(row.get(name), list) and len(row[name]) == 1:
                row[name] = row[name][0]
        block: BlockConfig = self.build(BlockConfig, row, key)
        for name in ("filters", "repeat", "kernel_size", "stride", "dilation"):
            if getattr(block, name) < 1:
                raise self.fail(f"key {key}.{name}: must be at least 1")
        if block.kernel_size % 2 == 0:
            raise self.fail(f"key {key}.kernel_size: {block.kernel_size} is even; same padding needs an odd one")
        if block.stride > 1 and block.dilation > 1:
            raise self.fail(f"key {key}.stride: stride and dilation cannot both be above 1")
        if block.residual and block.stride > 1:
            raise self.fail(f"key {key}.residual: a residual block cannot have a stride")
        if block.residual_dense and not block.residual:
            raise self.fail(f"key {key}.residual_dense: needs residual: true")
        if not 0 <= block.dropout < 1:
            raise self.fail(f"key {key}.dropout: must be in [0, 1)")
        return block

    def check_whole(self, config: ModelConfig, encoder: Mapping[str, Any], net: Mapping[str, Any]) -> None:
        decoder = self.mapping(net["decoder"], f"{config.family}.decoder")
        self.check_keys(decoder, f"{config.family}.decoder", required=("in_feats",), optional=("init",))
        self.typed(decoder.get("init", "xavier_uniform"), str, f"{config.family}.decoder.init")
        last = config.blocks[-1].filters
        if decoder["in_feats"] != last:
            raise self.fail(
                f"key {config.family}.decoder.in_feats: {decoder['in_feats']} differs from the last block's {last}"
            )
        if config.in_feats != config.features.n_filt:
            raise self.fail(
                f"key {config.family}.encoder.in_feats: {config.in_feats} differs from n_filt {config.features.n_filt}"
            )
        if config.activation != "relu":
            raise self.fail(f"key {config.family}.encoder.activation: {config.activation!r} is not supported; use relu")
        if encoder.get("frame_splicing", 1) != 1:
            raise self.fail(f"key {config.family}.encoder.frame_splicing: only 1 is supported")
        if config.init not in ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"):
            raise self.fail(f"key {config.family}.encoder.init: unknown initialisation {config.init!r}")
        residuals = [block.residual_dense for block in config.blocks if block.residual]
        if any(residuals) and not all(residuals):
            raise self.fail(f"key {config.family}.encoder.blocks: dense and plain residual blocks cannot be mixed")
        dense = [index for index, block in enumerate(config.blocks) if block.residual_dense]
        if dense and dense != list(range(dense[0], dense[-1] + 1)):
            raise self.fail(f"key {config.family}.encoder.blocks: dense residual blocks must follow one another")

    def build(self, cls: type[Any], raw: object, key: str) -> Any:
        """An instance of `cls` from a mapping: fields without a default are required keys, others optional."""
        row = self.mapping(raw, key)
        known = {f.name: f for f in fields(cls)}
        required = [name for name, f in known.items() if f.default is f.default_factory]  # both are MISSING
        self.check_keys(row, key, required=tuple(required), optional=tuple(known))
        return cls(**{name: self.convert(value, str(known[name].type), f"{key}.{name}") for name, value in row.items()})

    def convert(self, value: object, kind: str, key: str) -> object:
        """Check a scalar against the annotation of its field; YAML reads `1e-5` as text, so floats may be text."""
        if "Config" in kind or (value is None and "None" in kind):
            return value
        if "float" in kind and "bool" not in kind:
            return self.real(value, key)
        if "int" in kind:
            return self.typed(value, int, key)
        return self.typed(value, bool if "bool" in kind else str, key)

    def real(self, value: object, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise self.fail(f"key {key}: must be a number, not {type(value).__name__}")
        try:
            number = float(value)
        except ValueError:
            raise self.fail(f"key {key}: must be a number, not {value!r}") from None
        if math.isnan(number):
            raise self.fail(f"key {key}: must be a number, not NaN")
        return number

    def typed(self, value: object, kind: type[Any], key: str) -> Any:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(f"key {key}: must be {_ARTICLE[kind]}, not {type(value).__name__}")
        return value

    def mapping(self, value: object, key: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.fail(f"{key}: must be a mapping of keys to values, not {type(value).__name__}")
        return value

    def check_keys(
        self,
        section: Mapping[str, Any],
        key: str,
        *,
        required: tuple[str, ...],
        optional: tuple[str, ...] = (),
    ) -> None:
        """All missing keys first, then all unknown ones, each with its dotted name."""
        dot = f"{key}." if key else ""
        missing = [f"{dot}{name}" for name in required if name not in section]
        if missing:
            raise self.fail(f"missing key {', '.join(missing)}")
        unknown = [f"{dot}{name}" for name in section if name not in required and name not in optional]
        if unknown:
            raise self.fail(
                f"unknown key {', '.join(unknown)}; known here: {', '.join(sorted({*required, *optional}))}"
            )


_ARTICLE: dict[type[Any], str] = {int: "a whole number", str: "text", bool: "true or false", list: "a list"}
