"""Golden vectors (NVIDIA's own code, dither off) and the tiny models that made them, shared by several test files."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from jasper_asr.config import ModelConfig, load_config
from jasper_asr.model.checkpoint import Checkpoint, load_checkpoint

DATA = Path(__file__).parent / "data"

os.environ["JASPER_CACHE"] = ""  # tests build their graphs, and leave nothing in the home folder

MODELS = {
    "jasper_v1": ("jasper_tiny", "jasper_tiny_v1.pt"),
    "jasper_v2": ("jasper_tiny", "jasper_tiny_v2.pt"),
    "quartznet": ("quartznet_tiny", "quartznet_tiny_v2.pt"),
}
"""Name in tests -> (stem of the vectors and the config, checkpoint)."""


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@cache
def read_vectors(stem: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{stem}.npz") as vectors:
        return dict(vectors)


@pytest.fixture(scope="session", params=["jasper_tiny", "quartznet_tiny"])
def vectors(request) -> dict[str, np.ndarray]:
    return read_vectors(request.param)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """A Jasper of 6 blocks with dense residuals."""
    return load_config(DATA / "jasper_tiny.yaml")


@pytest.fixture(scope="session")
def tiny_quartznet() -> ModelConfig:
    """A QuartzNet of 6 blocks: separable, each block with its own residual."""
    return load_config(DATA / "quartznet_tiny.yaml")


@cache
def read_model(name: str) -> Checkpoint:
    stem, checkpoint = MODELS[name]
    return load_checkpoint(DATA / checkpoint, config=load_config(DATA / f"{stem}.yaml"))


@pytest.fixture(scope="session", params=list(MODELS))
def golden(request) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    """Each golden checkpoint and the vectors that its EMA weights made."""
    return read_model(request.param), read_vectors(MODELS[request.param][0])
