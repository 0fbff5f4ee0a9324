import copy
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from jasper_asr.backends import open_backend
from jasper_asr.config import (
    ModelConfig,
    SpecAugmentConfig,
    SpeedPerturbationConfig,
    builtin_config,
    builtin_configs,
    load_config,
    parse_config,
)
from jasper_asr.errors import ConfigError, StorageError
from jasper_asr.model.checkpoint import parameter_count, random_weights
from jasper_asr.model.graph import build_graph

ALPHABET = (*" abcdefghijklmnopqrstuvwxyz", "'")
REMOVED = object()


def changed(config: ModelConfig, key: str, value: object) -> dict:
    """A deep copy of the config's YAML with one dotted key set (or, for REMOVED, deleted)."""
    raw = copy.deepcopy(dict(config.raw))
    *path, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    node = raw
    for part in path:
        node = node[part]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    return raw


def convolutional(blocks: list[dict], family: str = "jasper") -> ModelConfig:
    """A config with these blocks, each given as what differs from one plain convolution of width 1."""
    plain = {"filters": 8, "repeat": 1, "kernel_size": 1, "stride": 1, "dilation": 1, "dropout": 0.0, "residual": False}
    rows = [plain | row for row in blocks]
    bank = {"sample_rate": 16000, "window_size": 0.02, "window_stride": 0.01, "window": "hann", "n_fft": 512}
    raw = {
        "name": "made up",
        "labels": list(ALPHABET),
        "input_val": {"audio_dataset": {}, "filterbank_features": bank | {"n_filt": 64, "normalize": "per_feature"}},
        family: {
            "encoder": {"in_feats": 64, "activation": "relu", "blocks": rows},
            "decoder": {"in_feats": rows[-1]["filters"]},
        },
    }
    return parse_config(raw, "made-up.yaml")


def quartznet_15x5() -> ModelConfig:
    """Kriman et al., arXiv 1910.10261, table 1: five groups of three blocks, each of five separable convolutions."""
    body = [
        {"filters": filters, "kernel_size": kernel, "repeat": 5, "residual": True, "separable": True}
        for filters, kernel in [(256, 33), (256, 39), (512, 51), (512, 63), (512, 75)]
        for _ in range(3)
    ]
    first = {"filters": 256, "kernel_size": 33, "stride": 2, "separable": True}
    last = [{"filters": 512, "kernel_size": 87, "dilation": 2, "separable": True}, {"filters": 1024}]
    return convolutional([first, *body, *last], "quartznet")


# what is read


def test_tiny_jasper(tiny):
    assert (tiny.name, tiny.family) == ("Jasper", "jasper")
    assert tiny.labels == ALPHABET
    assert (tiny.n_classes, tiny.blank_id, tiny.stride, tiny.frame_seconds) == (29, 28, 2, 0.02)
    assert [block.filters for block in tiny.blocks] == [32, 32, 48, 48, 64, 64]
    assert [block.kernel_size for block in tiny.blocks] == [11, 11, 13, 17, 29, 1]
    assert [block.dilation for block in tiny.blocks] == [1, 1, 1, 1, 2, 1]
    assert [block.dropout for block in tiny.blocks] == [0.2, 0.2, 0.2, 0.2, 0.4, 0.4]
    assert tiny.residual_panes() == [(), (32,), (32, 32), (32, 32, 48), (), ()]
    assert (tiny.features.win_length, tiny.features.hop_length, tiny.features.n_fft) == (320, 160, 512)
    assert (tiny.features.n_filt, tiny.features.preemph, tiny.features.pad_align) == (64, 0.97, 16)
    assert tiny.features.max_duration == math.inf
    assert tiny.dataset.trim_silence is True
    assert tiny.use_conv_masks is True
    assert tiny.receptive_field() == 1 + 10 + 2 * (2 * 10 + 3 * 12 + 2 * 16 + 28 * 2)


def test_tiny_jasper_training_sections(tiny):
    assert tiny.train_features.max_duration == 16.7
    assert tiny.train_features.dither == 1e-5
    assert tiny.features.dither == 0.0
    assert tiny.train_dataset.ignore_offline_speed_perturbation is True
    assert tiny.train_dataset.speed_perturbation == SpeedPerturbationConfig(0.85, 1.15, discrete=False, p=0.1)
    assert tiny.spec_augment == SpecAugmentConfig(freq_masks=2, max_freq=20, time_masks=2, max_time=75)


def test_tiny_quartznet(tiny_quartznet):
    assert tiny_quartznet.family == "quartznet"
    assert [block.separable for block in tiny_quartznet.blocks] == [True] * 5 + [False]
    own = [(), (tiny_quartznet.blocks[0].filters,), (tiny_quartznet.blocks[1].filters,)]
    assert tiny_quartznet.residual_panes()[:3] == own  # plain residuals see the block's own input only
    assert tiny_quartznet.receptive_field() == 1 + 32 + 2 * (2 * 32 + 3 * 38 + 2 * 50 + 86 * 2)


def test_jasper_10x5():
    config = builtin_config("jasper10x5dr")
    assert parameter_count(config) == 332_632_349
    assert config.receptive_field() == 1763
    assert config.stride == 2
    assert config.labels == ALPHABET
    assert [block.dropout for block in config.blocks] == [0.2] * 7 + [0.3] * 4 + [0.4] * 2
    assert "jasper10x5dr" in builtin_configs()


def test_quartznet_15x5_sees_8057_frames():
    config = quartznet_15x5()
    assert config.receptive_field() == 8057
    assert config.stride == 2
    assert len(config.blocks) == 18


def test_numbers_without_a_dot_are_numbers(tiny):
    """YAML 1.1 reads `1e-5` as text."""
    text = yaml.safe_dump(changed(tiny, "input_val.filterbank_features.dither", 0.5)).replace(
        "dither: 0.5", "dither: 1e-5"
    )
    raw = yaml.safe_load(text)
    assert raw["input_val"]["filterbank_features"]["dither"] == "1e-5"
    assert parse_config(raw, "m.yaml").features.dither == 1e-5


def test_a_whole_number_is_a_float_where_one_is_meant(tiny):
    config = parse_config(changed(tiny, "input_val.filterbank_features.max_duration", 40), "m.yaml")
    assert config.features.max_duration == 40.0


def test_lists_of_one_and_scalars_are_the_same(tiny):
    raw = changed(tiny, "jasper.encoder.blocks.0.kernel_size", 11)
    assert parse_config(raw, "m.yaml") == tiny


def test_equality_ignores_the_raw_yaml(tiny):
    again = load_config(Path(__file__).parent / "data" / "jasper_tiny.yaml")
    assert again == tiny
    assert again.raw == tiny.raw


# lengths


def convolve_length(config: ModelConfig, length: int) -> int:
    """Number of outputs, found by laying every window of every convolution on the padded signal."""
    for block in config.blocks:
        for _ in range(block.repeat):
            span = block.dilation * (block.kernel_size - 1) + 1
            padded = np.zeros(length + 2 * block.padding)
            length = len(np.lib.stride_tricks.sliding_window_view(padded, span)[:: block.stride])
    return length


@pytest.mark.parametrize(
    "blocks",
    [
        [{"kernel_size": 11, "stride": 2}],
        [{"kernel_size": 1, "stride": 2}],
        [{"kernel_size": 3, "stride": 3}, {"kernel_size": 5, "stride": 2}],
        [{"kernel_size": 7, "stride": 2, "repeat": 3}],
        [{"kernel_size": 29, "dilation": 2, "repeat": 2}, {"kernel_size": 33, "stride": 4}],
    ],
    ids=str,
)
def test_output_length_is_what_convolutions_give(blocks):
    config = convolutional(blocks)
    lengths = [*range(1, 130), 299, 300, 301, 1763, 4000, 4001, 4016]
    assert [config.output_length(n) for n in lengths] == [convolve_length(config, n) for n in lengths]


def test_output_length_of_the_golden_network(vectors, tiny):
    assert [tiny.output_length(int(n)) for n in vectors["feat_lens"]] == vectors["log_prob_lens"].tolist()


def test_receptive_field_is_the_frames_that_matter(tiny):
    """Non-negative taps and no bias: nothing cancels and no ReLU hides anything, so the support is exact."""
    field, frames = tiny.receptive_field(), 800
    backend = open_backend("ort", positive_network(tiny), threads=1)
    silence = np.zeros((1, tiny.in_feats, frames), np.float32)
    lens = np.array([frames], np.int32)
    base, _ = backend.run(silence, lens)
    centres = np.arange(base.shape[1]) * tiny.stride
    for frame in (0, 7, 400, 401, 799):
        touched = silence.copy()
        touched[0, :, frame] = 1.0
        seen = np.abs(backend.run(touched, lens)[0] - base)[0].max(axis=1) > 0
        np.testing.assert_array_equal(seen, np.abs(centres - frame) <= field // 2, err_msg=f"frame {frame}")


def positive_network(config: ModelConfig) -> bytes:
    weights = random_weights(config, seed=1)
    for name, value in weights.items():
        if name.endswith((".bias", "running_mean")):
            weights[name] = np.zeros_like(value)
        else:
            weights[name] = np.abs(value)
    return build_graph(config, weights, masked=False).SerializeToString()


# what is refused

BLOCKS = "jasper.encoder.blocks"
BANK = "input_val.filterbank_features"
KNOWN_BANK = (
    "dither, frame_count, frame_splicing, highfreq, log_guard, lowfreq, max_duration, n_fft, n_filt, normalize, "
    "pad_align, pad_mode, pad_to_max_duration, preemph, sample_rate, window, window_size, window_stride"
)
KNOWN_BLOCK = "dilation, dropout, filters, kernel_size, repeat, residual, residual_dense, separable, stride"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("colour", "red", "unknown key colour; known here: input_train, input_val, jasper, labels, name"),
        (f"{BANK}.n_mels", 64, f"unknown key {BANK}.n_mels; known here: {KNOWN_BANK}"),
        (f"{BLOCKS}.2.kernel", 3, f"unknown key {BLOCKS}[2].kernel; known here: {KNOWN_BLOCK}"),
        ("jasper.decoder.bias", True, "unknown key jasper.decoder.bias; known here: in_feats, init"),
        ("name", REMOVED, "missing key name"),
        ("jasper.encoder.in_feats", REMOVED, "missing key jasper.encoder.in_feats"),
        (f"{BLOCKS}.1.stride", REMOVED, f"missing key {BLOCKS}[1].stride"),
        (f"{BANK}.n_filt", REMOVED, f"missing key {BANK}.n_filt"),
        ("input_train.audio_dataset", REMOVED, "missing key input_train.audio_dataset"),
        ("jasper", REMOVED, "needs exactly one of the keys jasper and quartznet (found none)"),
        ("quartznet", {}, "needs exactly one of the keys jasper and quartznet (found jasper, quartznet)"),
        ("name", 5, "key name: must be text, not int"),
        (f"{BLOCKS}.0.filters", "32", f"key {BLOCKS}[0].filters: must be a whole number, not str"),
        (f"{BLOCKS}.0.filters", True, f"key {BLOCKS}[0].filters: must be a whole number, not bool"),
        (f"{BLOCKS}.0.kernel_size", [11, 3], f"key {BLOCKS}[0].kernel_size: must be a whole number, not list"),
        (f"{BLOCKS}.0.residual", "yes", f"key {BLOCKS}[0].residual: must be true or false, not str"),
        (f"{BLOCKS}.0", 7, f"{BLOCKS}[0]: must be a mapping of keys to values, not int"),
        (BLOCKS, {}, f"key {BLOCKS}: must be a list, not dict"),
        (BLOCKS, [], f"key {BLOCKS}: holds no block"),
        ("input_val", [], "input_val: must be a mapping of keys to values, not list"),
        (f"{BANK}.window_size", True, f"key {BANK}.window_size: must be a number, not bool"),
        (f"{BANK}.window_size", "wide", f"key {BANK}.window_size: must be a number, not 'wide'"),
        (f"{BANK}.preemph", math.nan, f"key {BANK}.preemph: must be a number, not NaN"),
        (f"{BLOCKS}.0.dropout", "nan", f"key {BLOCKS}[0].dropout: must be a number, not NaN"),
        (f"{BLOCKS}.0.dropout", 1.0, f"key {BLOCKS}[0].dropout: must be in [0, 1)"),
        (f"{BLOCKS}.0.dropout", -0.1, f"key {BLOCKS}[0].dropout: must be in [0, 1)"),
        (f"{BLOCKS}.0.kernel_size", 10, f"key {BLOCKS}[0].kernel_size: 10 is even; same padding needs an odd one"),
        (f"{BLOCKS}.1.repeat", 0, f"key {BLOCKS}[1].repeat: must be at least 1"),
        (f"{BLOCKS}.1.stride", 2, f"key {BLOCKS}[1].residual: a residual block cannot have a stride"),
        (f"{BLOCKS}.0.dilation", 2, f"key {BLOCKS}[0].stride: stride and dilation cannot both be above 1"),
        (f"{BLOCKS}.4.residual_dense", True, f"key {BLOCKS}[4].residual_dense: needs residual: true"),
        (f"{BLOCKS}.2.residual_dense", False, f"key {BLOCKS}: dense and plain residual blocks cannot be mixed"),
        ("jasper.decoder.in_feats", 32, "key jasper.decoder.in_feats: 32 differs from the last block's 64"),
        ("jasper.encoder.in_feats", 80, "key jasper.encoder.in_feats: 80 differs from n_filt 64"),
        ("jasper.encoder.activation", "gelu", "key jasper.encoder.activation: 'gelu' is not supported; use relu"),
        ("jasper.encoder.frame_splicing", 3, "key jasper.encoder.frame_splicing: only 1 is supported"),
        ("jasper.encoder.init", "zeros", "key jasper.encoder.init: unknown initialisation 'zeros'"),
        ("jasper.decoder.init", 3, "key jasper.decoder.init: must be text, not int"),
        (f"{BANK}.window", "hamming", f"key {BANK}.window: 'hamming' is not supported; use hann"),
        (f"{BANK}.normalize", "all", f"key {BANK}.normalize: 'all' is not supported; use per_feature"),
        (f"{BANK}.frame_splicing", 2, f"key {BANK}.frame_splicing: 2 is not supported; use 1"),
        (f"{BANK}.n_fft", 256, f"key {BANK}.n_fft: 256 is shorter than the window of 320 samples"),
        (f"{BANK}.n_filt", 0, f"key {BANK}.n_filt: must be above 0"),
        (f"{BANK}.window_size", math.inf, f"key {BANK}.window_size: inf s is not a sample or more"),
        (f"{BANK}.window_stride", 1e-5, f"key {BANK}.window_stride: 1e-05 s is not a sample or more"),
        (f"{BANK}.window_size", 1e-5, f"key {BANK}.window_size: 1e-05 s is not a sample or more"),
        (f"{BANK}.pad_to_max_duration", True, f"key {BANK}.pad_to_max_duration: needs a max_duration"),
        (f"{BANK}.highfreq", 9000, f"key {BANK}.highfreq: mel bands lie within 0 to 8000 Hz, not 0 to 9000"),
        (f"{BANK}.lowfreq", 8000, f"key {BANK}.highfreq: mel bands lie within 0 to 8000 Hz, not 8000 to 8000"),
        ("labels", ["a", "b", "a"], "key labels: the same label stands twice"),
        ("labels", ["a", "bc"], "key labels: must be a list of single characters; quote each of them"),
        ("labels", ["a", False], "key labels: must be a list of single characters; quote each of them"),
        ("labels", [], "key labels: must be a list of single characters; quote each of them"),
        ("labels", "abc", "key labels: must be a list, not str"),
    ],
)
def test_wrong_keys(tiny, key, value, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(tiny, key, value), "some/model.yaml")
    assert str(caught.value) == f"some/model.yaml: {message}"


def test_every_missing_key_is_named(tiny):
    raw = changed(tiny, "name", REMOVED)
    del raw["labels"]
    with pytest.raises(ConfigError, match=r"^m\.yaml: missing key name, labels$"):
        parse_config(raw, "m.yaml")


def test_dense_blocks_must_follow_one_another():
    dense = {"residual": True, "residual_dense": True}
    message = r"^made-up\.yaml: key jasper\.encoder\.blocks: dense residual blocks must follow one another$"
    with pytest.raises(ConfigError, match=message):
        convolutional([{}, dense, {}, dense])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8 text (invalid start byte); is this a YAML model config?"),
        (b"", "the config: must be a mapping of keys to values, not NoneType"),
        (b"- a\n- b\n", "the config: must be a mapping of keys to values, not list"),
        (b"RIFF", "the config: must be a mapping of keys to values, not str"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("content", ["name: [", "a: b: c", "name: !!python/object:os.system {}", "name: \x00", "a: *b"])
def test_files_that_are_not_yaml(tmp_path, content):
    path = tmp_path / "model.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: not valid YAML (")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StorageError) as caught:
        load_config(tmp_path / "none.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'none.yaml'}: cannot read the config (no such file or directory); check the path"
    )
    with pytest.raises(StorageError) as caught:
        load_config(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot read the config (is a directory); check the path"
