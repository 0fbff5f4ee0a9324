import hashlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_asr.config import load_config
from jasper_asr.errors import ConfigError, ModelError, StorageError, UsageError
from jasper_asr.model import checkpoint as module
from jasper_asr.model.checkpoint import (
    file_sha256,
    load_checkpoint,
    parameter_count,
    random_weights,
    save_safetensors,
    weight_shapes,
)

V2, V1, QUARTZNET = "jasper_tiny_v2.pt", "jasper_tiny_v1.pt", "quartznet_tiny_v2.pt"


def golden_state(data: Path, key: str = "ema_state_dict") -> dict[str, torch.Tensor]:
    return dict(torch.load(data / V2, weights_only=True)[key])


def save_pt(path: Path, **content: object) -> Path:
    torch.save(content, path)
    return path


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope="module")
def ema(data, tiny):
    return load_checkpoint(data / V2, config=tiny)


# what is read


def test_values_come_from_the_file(data, ema):
    state = golden_state(data)
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    assert sorted(ema.weights) == sorted(names)
    for name in names:
        np.testing.assert_array_equal(ema.weights[name], state[name].numpy())
    assert ema.kind == "ema"
    assert ema.sha256 == hashlib.sha256((data / V2).read_bytes()).hexdigest()


def test_old_and_new_names_are_the_same_network(data, tiny, ema):
    assert_same(load_checkpoint(data / V1, config=tiny).weights, ema.weights)


def test_raw_weights_are_others(data, tiny, ema):
    raw = load_checkpoint(data / V2, config=tiny, weights="raw")
    assert raw.kind == "raw"
    state = golden_state(data, "state_dict")
    for name, value in raw.weights.items():
        np.testing.assert_array_equal(value, state[name].numpy())
    different = [name for name in raw.weights if not np.array_equal(raw.weights[name], ema.weights[name])]
    assert len(different) > len(raw.weights) / 2


def test_quartznet(data, tiny_quartznet):
    weights = load_checkpoint(data / QUARTZNET, config=tiny_quartznet).weights
    assert {name: value.shape for name, value in weights.items()} == weight_shapes(tiny_quartznet)
    assert weights["encoder.layers.0.mconv.0.weight"].shape == (64, 1, 33)
    assert weights["encoder.layers.5.mconv.0.weight"].shape[2] == 1


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8), (torch.float64, 24)])
def test_other_precisions_become_float32(data, tiny, ema, tmp_path, dtype, bits):
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in golden_state(data).items()
    }
    weights = load_checkpoint(save_pt(tmp_path / "half.pt", ema_state_dict=state), config=tiny).weights
    assert list(weights) == list(ema.weights)
    for name, value in weights.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, state[name].float().numpy())
        np.testing.assert_allclose(value, ema.weights[name], rtol=2.0**-bits, atol=2.0**-25)


def test_parameters_buffers_and_prefixes(data, tiny, ema, tmp_path):
    """What DDP and plain `model.state_dict()` leave behind: prefixes, counters, front-end buffers, Parameters."""
    state = OrderedDict(
        (f"module.{name}", torch.nn.Parameter(value) if value.is_floating_point() else value)
        for name, value in golden_state(data).items()
    )
    state["audio_preprocessor.featurizer.fb"] = torch.zeros(1, 64, 257)
    assert_same(load_checkpoint(save_pt(tmp_path / "ddp.pt", ema_state_dict=state), config=tiny).weights, ema.weights)


def test_files_of_before_torch_1_6(data, tiny, ema, tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"ema_state_dict": golden_state(data)}, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_same(load_checkpoint(path, config=tiny).weights, ema.weights)


def test_weights_do_not_change_the_file(data, tiny, ema, tmp_path):
    """The file is mapped, not copied: writing into the arrays must not reach it."""
    path = shutil.copy(data / V2, tmp_path / "m.pt")
    load_checkpoint(path, config=tiny).weights["decoder.layers.0.bias"] += 1
    assert file_sha256(Path(path)) == ema.sha256


# safetensors


def test_safetensors_round_trip(tiny, ema, tmp_path):
    path = tmp_path / "m.safetensors"
    save_safetensors(path, tiny, ema.weights)
    again = load_checkpoint(path)
    assert_same(again.weights, ema.weights)
    assert again.config == tiny
    assert again.config.raw == tiny.raw
    assert again.kind == "safetensors"
    assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_half_safetensors_round_to_nearest(tiny, ema, tmp_path):
    path = tmp_path / "m.safetensors"
    save_safetensors(path, tiny, ema.weights, half=True)
    assert path.stat().st_size < 2.1 * sum(value.size for value in ema.weights.values()) + 20_000
    for name, value in load_checkpoint(path).weights.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, ema.weights[name], rtol=2.0**-11, atol=2.0**-25, err_msg=name)


def test_half_cannot_hold_everything(tiny, ema, tmp_path):
    path = tmp_path / "m.safetensors"
    huge = ema.weights | {"decoder.layers.0.bias": np.full(29, 70_000, np.float32)}
    with pytest.raises(ModelError) as caught:
        save_safetensors(path, tiny, huge, half=True)
    assert str(caught.value) == f"{path}: decoder.layers.0.bias does not fit float16; save float32"
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_file(tiny, ema, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_safetensors(path, tiny, ema.weights)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_folder_that_is_not_there(tiny, ema, tmp_path):
    path = tmp_path / "none" / "m.safetensors"
    with pytest.raises(StorageError) as caught:
        save_safetensors(path, tiny, ema.weights)
    assert str(caught.value).startswith(f"{path}: cannot be written (")
    assert str(caught.value).endswith("; check the folder and free space")


def full_disk(source: object, target: object) -> None:
    raise OSError(28, "No space left on device")


def test_safetensors_by_others(tiny, ema, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "m.safetensors"
    save_file(ema.weights, path)
    assert_same(load_checkpoint(path, config=tiny).weights, ema.weights)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", ConfigError, "the config inside is not JSON (Expecting property name"),
        ("{}", ConfigError, "needs exactly one of the keys jasper and quartznet (found none)"),
        ("[1]", ConfigError, "the config: must be a mapping of keys to values, not list"),
    ],
)
def test_wrong_embedded_configs(ema, tmp_path, text, kind, message):
    from safetensors.numpy import save_file

    path = tmp_path / "m.safetensors"
    save_file(ema.weights, path, metadata={"config": text})
    with pytest.raises(kind) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {message}")


# where the config comes from


def test_config_inside_a_pt(data, tiny, tmp_path):
    path = save_pt(tmp_path / "m.pt", ema_state_dict=golden_state(data), config=json.dumps(tiny.raw))
    assert load_checkpoint(path).config == tiny


@pytest.mark.parametrize("name", ["m.yaml", "config.yaml"])
def test_config_beside(data, tiny, tmp_path, name):
    shutil.copy(data / V2, tmp_path / "m.pt")
    shutil.copy(data / "jasper_tiny.yaml", tmp_path / name)
    assert load_checkpoint(tmp_path / "m.pt").config == tiny


def test_the_same_stem_comes_first(data, tiny, tmp_path):
    shutil.copy(data / V2, tmp_path / "m.pt")
    shutil.copy(data / "jasper_tiny.yaml", tmp_path / "m.yaml")
    shutil.copy(data / "quartznet_tiny.yaml", tmp_path / "config.yaml")
    assert load_checkpoint(tmp_path / "m.pt").config == tiny


def test_the_config_given_wins(data, tiny, tmp_path):
    shutil.copy(data / V2, tmp_path / "m.pt")
    (tmp_path / "m.yaml").write_text("nonsense")
    assert load_checkpoint(tmp_path / "m.pt", config=tiny).config is tiny


def test_builtin_config_by_shapes(data, tiny, tmp_path, monkeypatch):
    configs = {"quartz": load_config(data / "quartznet_tiny.yaml"), "tiny": tiny}
    monkeypatch.setattr(module, "builtin_configs", lambda: list(configs))
    monkeypatch.setattr(module, "builtin_config", configs.__getitem__)
    shutil.copy(data / V2, tmp_path / "m.pt")
    assert load_checkpoint(tmp_path / "m.pt").config is tiny


def test_no_config_fits(data, tmp_path):
    path = shutil.copy(data / V2, tmp_path / "m.pt")
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path)
    names = ", ".join(module.builtin_configs())
    assert str(caught.value) == f"{path}: carries no config and fits none of ours ({names}); give --config YAML"


# strictness


def test_every_mismatch_is_listed(data, tiny, tmp_path):
    state = golden_state(data)
    del state["encoder.layers.0.conv.0.weight"]
    del state["decoder.layers.0.bias"]
    state["encoder.layers.9.conv.0.weight"] = torch.zeros(1)
    state["decoder.layers.0.weight"] = torch.zeros(29, 63, 1)
    state["encoder.layers.1.conv.1.weight"][3] = float("nan")
    state["encoder.layers.1.conv.0.weight"][1, 2, 3] = -float("inf")
    state["encoder.layers.1.conv.1.running_var"][0] = -1e-9
    path = save_pt(tmp_path / "m.pt", ema_state_dict=state)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path, config=tiny)
    assert str(caught.value) == (
        f"{path}: 7 tensors do not fit the config 'Jasper': "
        "missing encoder.layers.0.conv.0.weight; "
        "missing decoder.layers.0.bias; "
        "unexpected encoder.layers.9.conv.0.weight; "
        "encoder.layers.1.conv.0.weight holds values that are not finite; "
        "encoder.layers.1.conv.1.weight holds values that are not finite; "
        "encoder.layers.1.conv.1.running_var holds a negative variance; "
        "decoder.layers.0.weight is [29, 63, 1], must be [29, 64, 1]; "
        "is it the right --config?"
    )


def test_strict_for_safetensors_too(tiny, ema, tmp_path):
    path = tmp_path / "m.safetensors"
    weights = dict(ema.weights)
    weights["extra"] = weights.pop("decoder.layers.0.bias")
    save_safetensors(path, tiny, weights)
    with pytest.raises(
        ModelError, match=r"2 tensors do not fit .*: missing decoder\.layers\.0\.bias; unexpected extra; "
    ):
        load_checkpoint(path)


def test_another_network(data, tiny_quartznet):
    with pytest.raises(ModelError) as caught:
        load_checkpoint(data / V2, config=tiny_quartznet)
    needed, held = set(weight_shapes(tiny_quartznet)), set(golden_state(data))
    for name in needed - held:
        assert f"missing {name};" in str(caught.value)


def test_tensors_of_whole_numbers_are_no_weights(data, tiny, tmp_path):
    for value in (torch.zeros(29, dtype=torch.int64), [0.0] * 29):
        state = golden_state(data) | {"decoder.layers.0.bias": value}
        path = save_pt(tmp_path / "m.pt", ema_state_dict=state)
        with pytest.raises(ModelError) as caught:
            load_checkpoint(path, config=tiny)
        assert str(caught.value) == f"{path}: decoder.layers.0.bias is not a tensor of real numbers"


def test_one_tensor_under_two_names(data, tiny, tmp_path):
    """After renaming one would silently win."""
    state = golden_state(data)
    state["module.decoder.layers.0.bias"] = state["decoder.layers.0.bias"] + 1
    path = save_pt(tmp_path / "m.pt", ema_state_dict=state)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path, config=tiny)
    assert str(caught.value) == f"{path}: holds decoder.layers.0.bias under two names; keep one"


# files that are no checkpoint


class Malicious:
    """Unpickled without care, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_pickles_run_nothing(data, tiny, tmp_path, how):
    trace, path = tmp_path / "trace", tmp_path / "m.pt"
    content = {"ema_state_dict": golden_state(data), "extra": Malicious(trace)}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"ema_state_dict": Malicious(trace)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path, config=tiny)
    assert str(caught.value) == (
        f"{path}: refused, it holds Python objects other than tensors, which could run code; "
        "save its state_dict alone and try again"
    )
    assert not trace.exists()
    if how == "zip":  # the trap itself works
        torch.load(path, weights_only=False)["extra"].close()
        assert trace.exists()


def test_other_dictionaries(tiny, tmp_path):
    tensors = {"a": torch.zeros(1)}
    cases = {
        "holds no ema_state_dict (keys: state_dict, epoch); use --weights raw": {"state_dict": tensors, "epoch": 3},
        "holds no ema_state_dict (keys: model); is it a model?": {"model": tensors},
        "holds no ema_state_dict (keys: ema_state_dict, state_dict); use --weights raw": {
            "ema_state_dict": None,
            "state_dict": tensors,
        },
    }
    for message, content in cases.items():
        path = save_pt(tmp_path / "m.pt", **content)
        with pytest.raises(ModelError) as caught:
            load_checkpoint(path, config=tiny)
        assert str(caught.value) == f"{path}: {message}"
    path = save_pt(tmp_path / "m.pt", ema_state_dict=tensors)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path, config=tiny, weights="raw")
    assert str(caught.value) == f"{path}: holds no state_dict (keys: ema_state_dict); use --weights ema"


@pytest.mark.parametrize(
    ("content", "kind"), [([1, 2], "list"), (torch.zeros(3), "Tensor"), ("weights", "str"), (None, "NoneType")]
)
def test_not_a_dictionary(tiny, tmp_path, content, kind):
    path = tmp_path / "m.pt"
    torch.save(content, path)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path, config=tiny)
    assert str(caught.value) == f"{path}: holds a {kind}, not a checkpoint with ema_state_dict"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_broken_files(data, tiny, ema, tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    path.touch()
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path, config=tiny)
    assert str(caught.value) == f"{path}: the file is empty; copy or download it again"

    kind = "not a PyTorch checkpoint (" if suffix == ".pt" else "not a safetensors file ("
    if suffix == ".pt":
        whole = (data / V2).read_bytes()
    else:
        save_safetensors(path, tiny, ema.weights)
        whole = path.read_bytes()
    random = np.random.default_rng(0).bytes(5000)
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:100], b"P", b"hello, world\n" * 9, random, whole[4:]):
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            load_checkpoint(path, config=tiny)
        message = str(caught.value)
        assert message.startswith((f"{path}: {kind}", f"{path}: refused"))
        assert "\n" not in message
        assert len(message) < 400 + len(str(path))


def test_any_flipped_byte_is_an_error_or_harmless(data, tiny_quartznet, tmp_path):
    """Damage anywhere in the structure, first 20,000 bytes or last, never surfaces as anything but ModelError."""
    whole = (data / QUARTZNET).read_bytes()
    rng, path = np.random.default_rng(1), tmp_path / "m.pt"
    places = [*rng.integers(0, 20_000, 20), *rng.integers(len(whole) - 20_000, len(whole), 20)]
    caught = []
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_checkpoint(path, config=tiny_quartznet)
        except ModelError as error:
            caught.append(str(error))
    assert len(caught) > 10
    assert all(message.startswith(f"{path}: ") for message in caught)


def test_paths(tiny, tmp_path):
    with pytest.raises(StorageError) as caught:
        load_checkpoint(tmp_path / "none.pt", config=tiny)
    missing = tmp_path / "none.pt"
    assert str(caught.value) == f"{missing}: cannot read it (no such file or directory); check the path"
    with pytest.raises(StorageError) as caught:
        load_checkpoint(tmp_path, config=tiny)
    assert str(caught.value) == f"{tmp_path}: is a folder; give the checkpoint file in it"


def test_unknown_kind_of_weights(data, tiny):
    with pytest.raises(UsageError, match=r"^weights 'best': choose ema or raw$"):
        load_checkpoint(data / V2, config=tiny, weights="best")


def test_without_torch(data, tiny, tmp_path, ema, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(data / V2, config=tiny)
    assert str(caught.value) == f"{data / V2}: reading .pt needs PyTorch; pip install 'jasper-asr[torch]'"
    save_safetensors(tmp_path / "m.safetensors", tiny, ema.weights)  # ours needs none
    assert_same(load_checkpoint(tmp_path / "m.safetensors").weights, ema.weights)


# names, shapes and counts


def test_counts_by_hand(tiny, data):
    state = golden_state(data)
    trained = [value.numel() for name, value in state.items() if "running" not in name and "num_batches" not in name]
    assert parameter_count(tiny) == sum(trained)


def test_random_weights_fit_and_repeat(tiny):
    weights = random_weights(tiny, seed=3)
    assert {name: value.shape for name, value in weights.items()} == weight_shapes(tiny)
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in weights.values())
    assert_same(random_weights(tiny, seed=3), weights)
    assert not np.array_equal(random_weights(tiny, seed=4)["decoder.layers.0.bias"], weights["decoder.layers.0.bias"])
