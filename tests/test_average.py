"""recipes/mini/average.py: the mean of checkpoints."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from jasper_asr.model.checkpoint import load_checkpoint, random_weights, save_safetensors

SCRIPT = Path(__file__).parents[1] / "recipes" / "mini" / "average.py"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def saved(config, folder: Path, count: int):
    """Weights of `count` networks, and their files."""
    weights = [random_weights(config, seed=seed) for seed in range(count)]
    files = [folder / f"{seed}.safetensors" for seed in range(count)]
    for path, values in zip(files, weights, strict=True):
        save_safetensors(path, config, values)
    return weights, files


def test_the_mean_of_three(tiny, tmp_path):
    weights, files = saved(tiny, tmp_path, 3)
    out = tmp_path / "mean.safetensors"
    assert run(*files, "--out", out).returncode == 0
    found = load_checkpoint(out)
    assert found.config == tiny
    for name, values in found.weights.items():
        np.testing.assert_allclose(values, sum(one[name] for one in weights) / 3, atol=1e-6)


def test_shares(tiny, tmp_path):
    weights, files = saved(tiny, tmp_path, 2)
    out = tmp_path / "mean.safetensors"
    assert run(*files, "--out", out, "--shares", 1, 3).returncode == 0
    found = load_checkpoint(out)
    for name, values in found.weights.items():
        np.testing.assert_allclose(values, (weights[0][name] + 3 * weights[1][name]) / 4, atol=1e-6)
    done = run(*files, "--out", tmp_path / "none.safetensors", "--shares", 1)
    assert done.returncode == 2
    assert "one share for each checkpoint" in done.stderr
    assert not (tmp_path / "none.safetensors").exists()


def test_networks_that_differ_are_refused(tiny, tiny_quartznet, tmp_path):
    for name, config in (("a", tiny), ("b", tiny_quartznet)):
        save_safetensors(tmp_path / f"{name}.safetensors", config, random_weights(config))
    done = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "c.safetensors")
    assert done.returncode == 2
    assert "different networks" in done.stderr
    assert not (tmp_path / "c.safetensors").exists()
