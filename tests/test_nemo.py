"""NeMo archives, made here in NeMo's layout: its names of members, keys and tensors, and its front end."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jasper_asr.config import ModelConfig, parse_config
from jasper_asr.errors import ConfigError, JasperError, ModelError
from jasper_asr.features import features
from jasper_asr.model import nemo
from jasper_asr.model.checkpoint import load_checkpoint, save_safetensors
from jasper_asr.transcribe import load

REMOVED = object()


def nemo_config(config: ModelConfig) -> dict:
    """What NeMo saves beside a model such as ours."""
    separable = {"separable": True} if config.family == "quartznet" else {}
    rows = [
        {
            "dilation": [block.dilation],
            "dropout": block.dropout,
            "filters": block.filters,
            "kernel": [block.kernel_size],
            "repeat": block.repeat,
            "residual": block.residual,
            "stride": [block.stride],
        }
        | ({"residual_dense": True} if block.residual_dense else {})
        | (separable if block.separable else {})
        for block in config.blocks
    ]
    modules = "nemo.collections.asr.modules"
    return {
        "sample_rate": 16000,
        "labels": list(config.labels),
        "train_ds": {"manifest_filepath": "???", "max_duration": 16.7},
        "preprocessor": {
            "_target_": f"{modules}.AudioToMelSpectrogramPreprocessor",
            "normalize": "per_feature",
            "window_size": 0.02,
            "sample_rate": 16000,
            "window_stride": 0.01,
            "window": "hann",
            "features": 64,
            "n_fft": 512,
            "frame_splicing": 1,
            "dither": 1e-5,
        },
        "spec_augment": {"_target_": f"{modules}.SpectrogramAugmentation", "rect_masks": 5},
        "encoder": {
            "_target_": f"{modules}.ConvASREncoder",
            "feat_in": 64,
            "activation": "relu",
            "conv_mask": True,
            "jasper": rows,
        },
        "decoder": {
            "_target_": f"{modules}.ConvASRDecoder",
            "feat_in": config.blocks[-1].filters,
            "num_classes": len(config.labels),
            "vocabulary": list(config.labels),
        },
        "optim": {"name": "novograd", "lr": 0.01},
        "target": "nemo.collections.asr.models.ctc_models.EncDecCTCModel",
        "nemo_version": "2.6.0rc0",
    }


def nemo_name(name: str, shapes: dict, masked: bool = True) -> str:
    """NeMo's name for a tensor of ours: convolutions that mask are wrapped in a module of their own."""
    if name.startswith("decoder."):
        return name.replace("decoder.layers", "decoder.decoder_layers")
    if masked and len(shapes[name]) == 3:
        name = name.removesuffix("weight") + "conv.weight"
    name = name.replace("encoder.layers.", "encoder.encoder.")
    return name.replace(".conv.", ".mconv.", 1) if ".mconv." not in name and ".res." not in name else name


def nemo_state(weights: dict[str, np.ndarray], masked: bool = True) -> dict[str, torch.Tensor]:
    shapes = {name: value.shape for name, value in weights.items()}
    state = {"preprocessor.featurizer.window": torch.hann_window(320, periodic=False)}
    state["preprocessor.featurizer.fb"] = torch.zeros(1, 64, 257)
    for name, value in weights.items():
        state[nemo_name(name, shapes, masked)] = torch.from_numpy(value.copy())
        if name.endswith("running_var"):
            state[nemo_name(name, shapes).replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    return state


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def member(name: str, data: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def archive(golden, tmp_path):
    """A golden model (EMA) as an archive of NeMo, and what the archive was made of."""
    model, _ = golden
    config, weights = yaml.safe_dump(nemo_config(model.config)).encode(), saved(nemo_state(model.weights))
    members = member(".", type=tarfile.DIRTYPE), member("./model_config.yaml", config)
    return write_tar(tmp_path / "tiny.nemo", *members, member("./model_weights.ckpt", weights)), model


def small_archive(path: Path, tiny: ModelConfig, **changes: object) -> Path:
    """An archive without weights worth the name, some keys of its config changed: `encoder__jasper__0__se=True`."""
    config = nemo_config(tiny)
    for key, value in changes.items():
        *outer, last = [int(part) if part.isdecimal() else part for part in key.split("__")]
        node = config
        for part in outer:
            node = node[part]
        if value is REMOVED:
            del node[last]
        else:
            node[last] = value
    return write_tar(
        path, member("model_config.yaml", yaml.safe_dump(config).encode()), member("model_weights.ckpt", saved({}))
    )


# what is read


def test_weights_and_blocks_are_those_of_the_same_network(archive):
    path, model = archive
    found = load_checkpoint(path)
    assert found.kind == "nemo"
    assert list(found.weights) == list(model.weights)
    for name, value in model.weights.items():
        np.testing.assert_array_equal(found.weights[name], value)
    config = found.config
    assert (config.name, config.family, config.labels) == ("tiny", model.config.family, model.config.labels)
    assert config.blocks == model.config.blocks
    assert config.use_conv_masks
    front_end = config.features
    assert (front_end.win_length, front_end.hop_length, front_end.n_fft, front_end.n_filt) == (320, 160, 512, 64)
    assert (front_end.preemph, front_end.pad_align, front_end.normalize) == (0.97, 16, "per_feature")
    assert (front_end.log_guard, front_end.pad_mode, front_end.frame_count) == (2.0**-24, "constant", "floor")


def test_log_probs_are_those_of_the_same_network(archive, golden):
    """The golden features through the archive's network give the golden log-probs."""
    from jasper_asr.backends import open_backend
    from jasper_asr.model.export import graph_bytes

    path, _ = archive
    _, vectors = golden
    backend = open_backend("ort", graph_bytes(load_checkpoint(path)), threads=1)
    for index in range(4):
        lens = vectors[f"feat_lens_single_{index}"].astype(np.int32)
        found, _ = backend.run(vectors[f"feats_single_{index}"][:, :, : lens[0]], lens)
        expected = vectors[f"log_probs_single_{index}"]
        np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=2e-4)
    backend.close()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_plain_and_gzipped_with_masks_and_without(golden, tmp_path, mode, prefix):
    model, _ = golden
    config = nemo_config(model.config)
    config["encoder"]["conv_mask"] = False
    path = write_tar(
        tmp_path / "old.nemo",
        member(f"{prefix}model_weights.ckpt", saved(nemo_state(model.weights, masked=False))),
        member(f"{prefix}model_config.yaml", yaml.safe_dump(config).encode()),
        mode=mode,
    )
    found = load_checkpoint(path)
    assert not found.config.use_conv_masks
    for name, value in model.weights.items():
        np.testing.assert_array_equal(found.weights[name], value)


def test_the_config_survives_other_formats(archive, tmp_path):
    """What is exported from an archive has the same front end."""
    path, _ = archive
    found = load_checkpoint(path)
    save_safetensors(tmp_path / "m.safetensors", found.config, found.weights)
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert again.config == found.config
    assert again.config.features.frame_count == "floor"


def test_the_first_releases_wrap_arguments(tiny, tmp_path):
    config = nemo_config(tiny)
    for key in ("preprocessor", "encoder", "decoder"):
        section = config[key]
        config[key] = {"cls": section.pop("_target_"), "params": section}
    assert nemo.model_config(yaml.safe_dump(config).encode(), Path("x.nemo")) == nemo.model_config(
        yaml.safe_dump(nemo_config(tiny)).encode(), Path("x.nemo")
    )


def test_defaults_are_those_of_nemo(tiny):
    config = nemo_config(tiny)
    config["preprocessor"] = {"_target_": config["preprocessor"]["_target_"], "preemph": None, "stft_conv": True}
    config["encoder"]["jasper"][0] |= {"kernel": [10], "se": False, "se_reduction_ratio": 8}
    found = nemo.model_config(yaml.safe_dump(config).encode(), Path("x.nemo"))
    front_end = found.features
    assert (front_end.win_length, front_end.hop_length, front_end.n_fft, front_end.n_filt) == (320, 160, 512, 64)
    assert (front_end.preemph, front_end.dither, front_end.lowfreq, front_end.highfreq) == (0.0, 1e-5, 0.0, None)
    assert found.blocks[0].kernel_size == 11


def test_commands_take_archives(archive, tmp_path, capsys):
    from click.testing import CliRunner

    from jasper_asr.cli import command

    path, model = archive
    shown = CliRunner().invoke(command, ["info", str(path)])
    assert "weights                  nemo" in shown.output
    exported = CliRunner().invoke(command, ["export", str(path), str(tmp_path / "x.onnx")])
    assert exported.exception is None
    samples = np.random.default_rng(0).normal(0, 0.1, 16_100).astype(np.float32)
    with load(path, threads=1) as direct, load(tmp_path / "x.onnx", threads=1) as through_onnx:
        log_probs, lens = direct.log_probs([samples])
        assert lens[0] == model.config.output_length(100)  # NVIDIA's front end counts 101 frames
        np.testing.assert_allclose(through_onnx.log_probs([samples])[0], log_probs, atol=1e-5)


# the front end, against torch operators put together from what NeMo documents


def filter_bank() -> torch.Tensor:
    """librosa's Slaney triangles of unit area, for 16 kHz, 512 points and 64 bands."""
    mel = torch.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 66, dtype=torch.float64)
    hz = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    bins = torch.arange(257, dtype=torch.float64) * 31.25
    up = (bins - hz[:-2, None]) / (hz[1:-1] - hz[:-2])[:, None]
    down = (hz[2:, None] - bins) / (hz[2:] - hz[1:-1])[:, None]
    return (torch.minimum(up, down).clamp(min=0) * (2 / (hz[2:] - hz[:-2]))[:, None]).float()


def nemo_features(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """AudioToMelSpectrogramPreprocessor in evaluation, its defaults written out for one utterance."""
    x = torch.from_numpy(samples)
    frames = (len(x) + 2 * (512 // 2) - 512) // 160
    x = torch.cat([x[:1], x[1:] - 0.97 * x[:-1]])
    window = torch.hann_window(320, periodic=False)
    spectrum = torch.stft(x, 512, 160, 320, window, center=True, pad_mode="constant", return_complex=True)
    x = torch.log(filter_bank() @ spectrum.abs() ** 2.0 + 2**-24)
    valid = x[:, :frames]
    x = (x - valid.mean(1, keepdim=True)) / (valid.std(1, keepdim=True) + 1e-5)
    x[:, frames:] = 0
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).numpy(), frames


@pytest.fixture
def front_end(tiny):
    return nemo.model_config(yaml.safe_dump(nemo_config(tiny)).encode(), Path("x.nemo")).features


@pytest.mark.parametrize("n_samples", [320, 479, 480, 481, 2399, 2400, 2559, 2560, 16_000, 16_159, 50_123])
@pytest.mark.parametrize("scale", [1e-3, 0.1])
def test_features_in_the_dialect_of_nemo(front_end, n_samples, scale):
    samples = np.random.default_rng(n_samples).normal(0, scale, n_samples).astype(np.float32)
    found, frames = features(samples, front_end)
    expected, expected_frames = nemo_features(samples)
    assert (frames, found.shape) == (expected_frames, expected.shape)
    np.testing.assert_allclose(found, expected, atol=5e-3)  # a band that hardly varies magnifies float32's rounding
    assert np.abs(found - expected).mean() < 2e-5


def test_the_dialects_differ(front_end, tiny):
    """Or the test above would show nothing."""
    samples = np.random.default_rng(1).normal(0, 1e-4, 16_159).astype(np.float32)
    found, frames = features(samples, front_end)
    nvidia, nvidia_frames = features(samples, tiny.features)
    assert (frames, nvidia_frames) == (100, 101)
    assert np.abs(found[:, :frames] - nvidia[:, :frames]).max() > 0.1


def test_less_than_a_hop_still_has_a_frame(front_end):
    """NeMo counts none and ends with nothing; ours gives the single frame that a longer clip begins with, zero."""
    found, frames = features(np.ones(100, np.float32), front_end)
    assert (frames, found.shape) == (1, (64, 16))
    assert not found.any()


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder___target_": "a.ConformerEncoder"}, "key encoder: is ConformerEncoder, not ConvASREncoder; "),
        ({"decoder": REMOVED}, "key decoder: missing, or no mapping of keys to values"),
        ({"decoder__vocabulary": None}, "key decoder.vocabulary: must be a list of characters"),
        ({"decoder__num_classes": 27}, "key decoder.num_classes: 27 differs from the 28 labels of the vocabulary"),
        ({"encoder__jasper__2__se": True}, "key encoder.jasper[2].se: True is not supported, only False"),
        ({"encoder__jasper__2__groups": 4}, "key encoder.jasper[2].groups: 4 is not supported, only 1"),
        ({"encoder__jasper__1__residual_mode": "max"}, "key encoder.jasper[1].residual_mode: 'max' is not supported"),
        ({"encoder__jasper__1__wings": 2}, "unknown key encoder.jasper[1].wings"),
        ({"encoder__jasper": {}}, "key encoder.jasper: must be a list of blocks"),
        ({"encoder__jasper__3": "block"}, "key encoder.jasper[3]: must be a mapping of keys to values, not str"),
        ({"encoder__normalization_mode": "layer"}, "key encoder.normalization_mode: 'layer' is not supported"),
        ({"preprocessor__exact_pad": True}, "key preprocessor.exact_pad: True is not supported, only False"),
        ({"preprocessor__mag_power": 1.0}, "key preprocessor.mag_power: 1.0 is not supported, only 2.0"),
        ({"preprocessor__log_zero_guard_type": "clamp"}, "key preprocessor.log_zero_guard_type: 'clamp' is not supp"),
    ],
)
def test_other_networks_and_front_ends(tiny, tmp_path, changes, message):
    path = small_archive(tmp_path / "m.nemo", tiny, **changes)
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: model_config.yaml: {message}")


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder__jasper__2__kernel": "wide"},
        {"encoder__jasper__2__filters": REMOVED},
        {"encoder__activation": "swish"},
        {"encoder__feat_in": 80},
        {"decoder__feat_in": "many"},
        {"decoder__vocabulary": ["the", *"abcdefghijklmnopqrstuvwxyz'"]},
        {"preprocessor__sample_rate": "fast"},
        {"preprocessor__sample_rate": "fast", "preprocessor__n_fft": None},
        {"preprocessor__window_size": float("inf"), "preprocessor__n_fft": None},
        {"preprocessor__window": "hamming"},
        {"preprocessor__normalize": "all_features"},
        {"preprocessor__pad_to": "max"},
        {"preprocessor__log_zero_guard_value": "tiny"},
    ],
)
def test_values_out_of_place(tiny, tmp_path, changes):
    path = small_archive(tmp_path / "m.nemo", tiny, **changes)
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "key " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_runs_nothing(tmp_path):
    trace = tmp_path / "trace"
    text = f"!!python/object/apply:os.mkdir ['{trace}']\n".encode()
    path = write_tar(tmp_path / "m.nemo", member("model_config.yaml", text), member("model_weights.ckpt", saved({})))
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: model_config.yaml: not plain YAML (could not determine a constructor")
    assert not trace.exists()


@pytest.mark.parametrize("text", [b"a: [", b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_yaml(tmp_path, text):
    path = write_tar(tmp_path / "m.nemo", member("model_config.yaml", text), member("model_weights.ckpt", saved({})))
    with pytest.raises(ConfigError, match=r"model_config.yaml: not plain YAML \("):
        load_checkpoint(path)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_run_nothing(tiny, tmp_path, how):
    trace = tmp_path / "trace"
    evil = {"encoder": Malicious(trace)}
    weights = saved(evil) if how == "torch" else pickle.dumps(evil)
    config = yaml.safe_dump(nemo_config(tiny)).encode()
    path = write_tar(tmp_path / "m.nemo", member("model_config.yaml", config), member("model_weights.ckpt", weights))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == (
        f"{path}: refused, it holds Python objects other than tensors, which could run code; "
        "save its state_dict alone and try again"
    )
    assert not trace.exists()


def test_nothing_is_written_and_other_names_are_not_ours(tiny, tmp_path):
    """Members that would land elsewhere are passed over; as replacements for ours they count for nothing."""
    home = tmp_path / "home"
    home.mkdir()
    config = yaml.safe_dump(nemo_config(tiny)).encode()
    names = ["../model_config.yaml", "/model_weights.ckpt", "../../etc/passwd", "model_weights.ckpt/../x"]
    path = write_tar(home / "m.nemo", *(member(name, config) for name in names))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == (f"{path}: holds no model_config.yaml and no model_weights.ckpt; is it a NeMo archive?")
    assert [file.name for file in tmp_path.rglob("*")] == ["home", "m.nemo"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("name", ["model_config.yaml", "./model_weights.ckpt"])
def test_links_and_devices(tmp_path, kind, name):
    path = write_tar(tmp_path / "m.nemo", member(name, type=kind, linkname="/etc/passwd"))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    plain = name.removeprefix("./")
    assert str(caught.value) == f"{path}: refused, {plain} is a link or no plain file; save the model again"


def test_duplicates(tmp_path):
    twice = [member("model_config.yaml", b"a: 1"), member("./model_config.yaml", b"a: 2")]
    path = write_tar(tmp_path / "m.nemo", *twice)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"{path}: refused, holds model_config.yaml twice; save the model again"


def test_huge_members_are_not_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "m.nemo", member("model_config.yaml", b" " * (2 << 20)))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == (
        f"{path}: refused, model_config.yaml has 2,097,152 bytes, too many; is it a NeMo model?"
    )
    # a member whose header promises what the archive does not hold
    info = tarfile.TarInfo("model_weights.ckpt")
    info.size = 5 << 30
    path.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(ModelError, match=r"refused, model_weights\.ckpt has 5,368,709,120 bytes, too many"):
        load_checkpoint(path)


def test_what_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(nemo, "LIMITS", {"model_config.yaml": 1000, "model_weights.ckpt": 1000})
    monkeypatch.setattr(nemo, "_OTHERS", 100_000)
    path = tmp_path / "m.nemo"
    with gzip.open(path, "wb") as file:
        info = tarfile.TarInfo("zeros")
        info.size = 10_000_000
        file.write(info.tobuf() + bytes(info.size + 1024))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"{path}: is larger than any Jasper or QuartzNet; is it one?"


def test_members_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(nemo, "_MOST_MEMBERS", 5)
    path = write_tar(tmp_path / "m.nemo", *(member(f"m{index}") for index in range(6)))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"{path}: holds over 5 members; is it a NeMo archive?"


@pytest.mark.parametrize("compress", [False, True])
def test_cut_short_anywhere(tiny, tmp_path, compress):
    config = yaml.safe_dump(nemo_config(tiny)).encode()
    weights = saved({"decoder.decoder_layers.0.bias": torch.zeros(29)})
    path = write_tar(
        tmp_path / "m.nemo",
        member("model_config.yaml", config),
        member("model_weights.ckpt", weights),
        mode="w:gz" if compress else "w",
    )
    whole = path.read_bytes()
    with pytest.raises(ModelError, match=r"tensors do not fit the config"):
        load_checkpoint(path)
    end = len(whole) if compress else 512 + len(config) + -len(config) % 512 + 512 + len(weights)
    for cut in np.random.default_rng(0).integers(1, end - 1, 40).tolist():
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError) as caught:
            load_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert "tensors do not fit" not in message


def test_bytes_at_random_are_one_clear_error(tiny, tmp_path):
    path = small_archive(tmp_path / "m.nemo", tiny)
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(broken), 20):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        with pytest.raises(JasperError) as caught:
            load_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_no_tensors(tiny, tmp_path):
    config = yaml.safe_dump(nemo_config(tiny)).encode()
    path = tmp_path / "m.nemo"
    for content, message in [
        ([], "model_weights.ckpt holds a list, not tensors by name"),
        ({"decoder.decoder_layers.0.bias": 3}, "decoder.layers.0.bias is not a tensor of real numbers"),
    ]:
        write_tar(path, member("model_config.yaml", config), member("model_weights.ckpt", saved(content)))
        with pytest.raises(ModelError) as caught:
            load_checkpoint(path)
        assert str(caught.value) == f"{path}: {message}"


def test_tensors_of_other_networks_are_listed(archive):
    path, model = archive
    state = nemo_state(model.weights) | {"joint.weight": torch.zeros(1)}
    del state["decoder.decoder_layers.0.bias"]
    config = yaml.safe_dump(nemo_config(model.config)).encode()
    write_tar(path, member("model_config.yaml", config), member("model_weights.ckpt", saved(state)))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == (
        f"{path}: 2 tensors do not fit the config 'tiny': missing decoder.layers.0.bias; unexpected joint.weight; "
        "is it the right --config?"
    )


def test_front_end_fields_are_checked(tiny):
    import copy

    for key, value, message in [
        (
            "pad_mode",
            "wrap",
            "key input_val.filterbank_features.pad_mode: 'wrap' is not supported; use reflect or const",
        ),
        ("frame_count", 3, "key input_val.filterbank_features.frame_count: must be text, not int"),
        ("log_guard", 0, "key input_val.filterbank_features.log_guard: must be above 0"),
    ]:
        raw = copy.deepcopy(dict(tiny.raw))
        raw["input_val"]["filterbank_features"][key] = value
        with pytest.raises(ConfigError) as caught:
            parse_config(raw, "m.yaml")
        assert str(caught.value).startswith(f"m.yaml: {message}")
