"""onnxruntime: on the CPU, or with its CANN provider on Huawei's NPUs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr.backends import Shapes
from jasper_asr.config import ModelConfig
from jasper_asr.errors import ModelError, StorageError
from jasper_asr.model.export import embedded_config

Provider = tuple[str, dict[str, int]]

CPU: Provider = ("CPUExecutionProvider", {})


def cann_backend(model: Path | bytes, *, device: int = 0) -> "OrtBackend":
    """A model on the NPU number `device`, never silently on the CPU. Not yet run on a board. Raises ModelError."""
    return OrtBackend(model, provider=("CANNExecutionProvider", {"device_id": device}))


class OrtBackend:
    """An ONNX model that `jasper export` wrote (its metadata carry the config), run by onnxruntime."""

    def __init__(self, model: Path | bytes, *, threads: int | None = None, provider: Provider = CPU) -> None:
        self._name = str(model) if isinstance(model, Path) else "<graph>"
        self._session: Any = _open(model, self._name, threads, provider)
        self.properties: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.config = embedded_config(self.properties, self._name)
        self.shapes = self._read_shapes(self.properties, self.config)

    def run(self, feats: NDArray[np.float32], lens: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See Backend.run. Raises ModelError when the runtime fails or returns values that are not finite."""
        limit = int(self.properties.get("max_frames", 0))
        if 0 < limit < feats.shape[2]:  # an Ascend graph's masks are constants, silently wrong beyond their length
            raise ModelError(
                f"{self._name}: {feats.shape[2]} frames, its masks reach {limit}; export it without --target"
            )
        try:
            log_probs, out_lens = self._session.run(["log_probs", "log_prob_lens"], {"feats": feats, "feat_lens": lens})
        except Exception as error:  # onnxruntime raises its own kinds for each status
            raise ModelError(f"{self._name}: onnxruntime failed ({_one_line(error)})") from error
        # a row's valid part decides; what stands beyond a length is nobody's business
        if not all(np.isfinite(row[:length]).all() for row, length in zip(log_probs, out_lens, strict=True)):
            raise ModelError(f"{self._name}: log_probs are not finite; the weights or the precision are unfit")
        return log_probs, out_lens

    def close(self) -> None:
        """Drop the session; its memory goes with it."""
        self._session = None

    def _read_shapes(self, properties: dict[str, str], config: ModelConfig) -> Shapes:
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        outputs = {value.name: value.shape for value in self._session.get_outputs()}
        if set(inputs) != {"feats", "feat_lens"} or set(outputs) != {"log_probs", "log_prob_lens"}:
            raise ModelError(
                f"{self._name}: inputs are {sorted(inputs)} and outputs {sorted(outputs)}, not feats, feat_lens "
                "and log_probs, log_prob_lens; make it with jasper export"
            )
        if len(inputs["feats"]) != 3 or len(outputs["log_probs"]) != 3:
            raise ModelError(
                f"{self._name}: feats is {inputs['feats']} and log_probs {outputs['log_probs']}, both must have three "
                "dimensions; make it with jasper export"
            )
        batch, bands, frames = inputs["feats"]
        classes = outputs["log_probs"][2]
        if classes != config.n_classes:
            raise ModelError(f"{self._name}: gives {classes} classes, its own config says {config.n_classes}")
        if bands != config.in_feats:
            raise ModelError(f"{self._name}: takes {bands} mel bands, its own config says {config.in_feats}")
        fixed = [size if isinstance(size, int) else None for size in (batch, frames)]
        return Shapes(fixed[0], fixed[1], properties.get("masked", "true") == "true")


def _open(model: Path | bytes, name: str, threads: int | None, provider: Provider) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its complaints arrive as exceptions, once
    if threads is not None:
        options.intra_op_num_threads = threads
    if isinstance(model, Path):
        if not model.is_file():
            raise StorageError(f"{name}: no such file; check the path")
        if model.stat().st_size == 0:
            raise ModelError(f"{name}: the file is empty; export it again")
    if provider[0] not in onnxruntime.get_available_providers():
        raise _fell_back(name, provider)
    try:
        session = onnxruntime.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=[provider]
        )
    except Exception as error:  # see run
        raise ModelError(
            f"{name}: not a model that onnxruntime can load ({_one_line(error)}); export it again"
        ) from error
    if session.get_providers()[0] != provider[0]:  # it lists what it was built with, not what the machine has
        raise _fell_back(name, provider)
    session.disable_fallback()  # else a failure in a run moves it to the CPU
    return session


def _fell_back(name: str, provider: Provider) -> ModelError:
    return ModelError(
        f"{name}: onnxruntime has no working {provider[0]} and would use the CPU; install onnxruntime-cann in place of "
        "onnxruntime, and CANN, and source its set_env.sh"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
