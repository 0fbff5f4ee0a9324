"""Sounds, the golden tiny network as a model file, and the command line in this process: for the tests of the spine."""

import io
import json
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np

from jasper_asr import cli
from jasper_asr.audio import write_wav
from jasper_asr.config import ModelConfig, load_config, parse_config
from jasper_asr.model.checkpoint import Checkpoint, load_checkpoint
from jasper_asr.model.export import graph_bytes

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "jasper_tiny_v2.pt"
CONFIG = DATA / "jasper_tiny.yaml"


def made_up(blocks: list[dict], bands: int = 8, family: str = "jasper") -> ModelConfig:
    """A small config with these blocks, each given as what differs from one 1x1 convolution of 6 filters."""
    plain = {"filters": 6, "repeat": 1, "kernel_size": 1, "stride": 1, "dilation": 1, "dropout": 0.3, "residual": False}
    rows = [plain | row for row in blocks]
    bank = {"sample_rate": 16000, "window_size": 0.02, "window_stride": 0.01, "window": "hann", "n_fft": 512}
    raw = {
        "name": "made up",
        "labels": list("abc"),
        "input_val": {"audio_dataset": {}, "filterbank_features": bank | {"n_filt": bands, "normalize": "per_feature"}},
        family: {
            "encoder": {"in_feats": bands, "activation": "relu", "blocks": rows},
            "decoder": {"in_feats": rows[-1]["filters"]},
        },
    }
    return parse_config(raw, "made-up.yaml")


@cache
def tiny_config() -> ModelConfig:
    return load_config(CONFIG)


@cache
def tiny_checkpoint() -> Checkpoint:
    return load_checkpoint(CHECKPOINT, config=tiny_config())


@cache
def tiny_graph(**shape) -> bytes:
    """The golden tiny Jasper as ONNX; `shape` goes to `build_graph`."""
    return graph_bytes(tiny_checkpoint(), **shape)


def write_model(path: Path, **shape) -> Path:
    path.write_bytes(tiny_graph(**shape))
    return path


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness and colour wander, so that the tiny network spells something: float32 [N] at 16 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(16_000 * seconds)) / 16_000
    tone = np.sin(2 * np.pi * (300 + 200 * seed) * t * (1 + 0.2 * np.sin(3 * t)))
    loudness = 0.2 + 0.15 * np.sin(2 * np.pi * (1 + seed) * t)
    return (loudness * (tone + 0.3 * rng.standard_normal(len(t)))).astype(np.float32)


def wav(path: Path, seconds: float, seed: int = 0) -> Path:
    write_wav(path, sound(seconds, seed))
    return path


def nemo_manifest(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*argv: object) -> tuple[int, str, str]:
    """`jasper ARGV...` in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    saved, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["jasper", *map(str, argv)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as error:
        return error.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = saved
        signal.signal(signal.SIGTERM, handler)
