"""What an ONNX model of ours promises, whichever runtime has loaded it, and the checks that go with that."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jasper_asr.backends import Shapes
from jasper_asr.config import ModelConfig
from jasper_asr.errors import ModelError

Sizes = Mapping[str, Sequence[object]]
"""Name of an input or output -> its dimensions; those that are no int are open."""


def read_shapes(name: str, properties: Mapping[str, str], config: ModelConfig, inputs: Sizes, outputs: Sizes) -> Shapes:
    """Shapes of a loaded graph; `name` names it in errors. Raises ModelError unless it is as `jasper export` writes."""
    if set(inputs) != {"feats", "feat_lens"} or set(outputs) != {"log_probs", "log_prob_lens"}:
        raise ModelError(
            f"{name}: inputs are {sorted(inputs)} and outputs {sorted(outputs)}, not feats, feat_lens "
            "and log_probs, log_prob_lens; make it with jasper export"
        )
    if len(inputs["feats"]) != 3 or len(outputs["log_probs"]) != 3:
        raise ModelError(
            f"{name}: feats is {inputs['feats']} and log_probs {outputs['log_probs']}, both must have three "
            "dimensions; make it with jasper export"
        )
    batch, bands, frames = inputs["feats"]
    classes = outputs["log_probs"][2]
    if classes != config.n_classes:
        raise ModelError(f"{name}: gives {classes} classes, its own config says {config.n_classes}")
    if bands != config.in_feats:
        raise ModelError(f"{name}: takes {bands} mel bands, its own config says {config.in_feats}")
    fixed = [size if isinstance(size, int) else None for size in (batch, frames)]
    return Shapes(fixed[0], fixed[1], properties.get("masked", "true") == "true")


def check_frames(name: str, properties: Mapping[str, str], frames: int) -> None:
    """An Ascend graph's masks are constants, silently wrong beyond their length: ModelError."""
    limit = int(properties.get("max_frames", 0))
    if 0 < limit < frames:
        raise ModelError(f"{name}: {frames} frames, its masks reach {limit}; export it without --target")


def check_finite(name: str, log_probs: NDArray[np.float32], lens: NDArray[np.int32]) -> None:
    """ModelError unless every row is finite up to its length; what stands beyond is nobody's business."""
    if not all(np.isfinite(row[:length]).all() for row, length in zip(log_probs, lens, strict=True)):
        raise ModelError(f"{name}: log_probs are not finite; the weights or the precision are unfit")
