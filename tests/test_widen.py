"""recipes/mini/widen.py: a wider network that computes the same."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from jasper_asr.model.checkpoint import load_checkpoint, random_weights, save_safetensors

torch = pytest.importorskip("torch")
from jasper_asr.model.net import Jasper  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "recipes" / "mini" / "widen.py"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def log_probs(path: Path, features: torch.Tensor) -> np.ndarray:
    checkpoint = load_checkpoint(path)
    network = Jasper(checkpoint.config).eval()
    tensors = {name: torch.from_numpy(values) for name, values in checkpoint.weights.items()}
    network.load_state_dict(tensors, strict=False)  # all but the norms' counters
    with torch.inference_mode():
        return network(features, torch.tensor([90, 61]))[0].numpy()


def wider(config, path: Path, times: float) -> None:
    loaded = json.loads(json.dumps(config.raw))
    for block in loaded["jasper"]["encoder"]["blocks"]:
        block["filters"] = round(block["filters"] * times)
    loaded["jasper"]["decoder"]["in_feats"] = loaded["jasper"]["encoder"]["blocks"][-1]["filters"]
    path.write_text(yaml.safe_dump(loaded))


@pytest.mark.parametrize("times", [1.25, 2.6])
def test_a_wider_network_computes_the_same(tiny, tmp_path, times):
    narrow, wide = tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors"
    save_safetensors(narrow, tiny, random_weights(tiny, seed=4))
    wider(tiny, tmp_path / "wide.yaml", times)
    done = run(narrow, "--config", tmp_path / "wide.yaml", "--out", wide)
    assert done.returncode == 0, done.stderr
    widths = [block.filters for block in load_checkpoint(wide).config.blocks]
    assert widths == [round(block.filters * times) for block in tiny.blocks]
    features = torch.randn(2, 64, 90, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(log_probs(wide, features), log_probs(narrow, features), atol=2e-3, rtol=1e-4)


def test_copies_are_read_differently(tiny, tmp_path):
    """A channel and its copy get unlike weights, so that training parts them."""
    narrow, wide = tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors"
    save_safetensors(narrow, tiny, random_weights(tiny, seed=4))
    wider(tiny, tmp_path / "wide.yaml", 2.0)
    assert run(narrow, "--config", tmp_path / "wide.yaml", "--out", wide).returncode == 0
    reader = load_checkpoint(wide).weights["decoder.layers.0.weight"][:, :, 0]
    half = reader.shape[1] // 2
    old = load_checkpoint(narrow).weights["decoder.layers.0.weight"][:, :, 0]
    order = np.argsort(np.abs(reader[:, None, half:] + reader[:, :half, None] - old[:, :, None]).max(axis=0), axis=0)[0]
    assert sorted(order) == list(range(half))  # each channel has one copy, and the two weights add up to the old one
    assert np.abs(reader[:, order] - reader[:, half:]).mean() > 0.1 * np.abs(old).mean()


def test_another_network_is_refused(tiny, tiny_quartznet, tmp_path):
    narrow = tmp_path / "narrow.safetensors"
    save_safetensors(narrow, tiny, random_weights(tiny))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(tiny_quartznet.raw))))
    done = run(narrow, "--config", tmp_path / "other.yaml", "--out", tmp_path / "wide.safetensors")
    assert done.returncode == 2
    assert "not a wider network" in done.stderr
    assert not (tmp_path / "wide.safetensors").exists()
