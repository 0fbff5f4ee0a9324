"""onnxruntime: on the CPU, or with its CANN provider on Huawei's NPUs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr.backends.contract import check_finite, check_frames, read_shapes
from jasper_asr.errors import ModelError, StorageError, UsageError
from jasper_asr.model.export import embedded_config

Provider = tuple[str, dict[str, int]]

CPU: Provider = ("CPUExecutionProvider", {})


def cann_backend(model: Path | bytes, *, device: int = 0) -> "OrtBackend":
    """A model on the NPU number `device`, never silently on the CPU. Not yet run on a board. Raises ModelError."""
    return OrtBackend(model, provider=("CANNExecutionProvider", {"device_id": device}))


class OrtBackend:
    """An ONNX model that `jasper export` wrote (its metadata carry the config), run by onnxruntime."""

    def __init__(
        self, model: Path | bytes, *, threads: int | None = None, precision: str = "f32", provider: Provider = CPU
    ) -> None:
        if precision != "f32":
            raise UsageError(f"backend ort: computes in f32, not {precision}; use --backend openvino")
        self._name = str(model) if isinstance(model, Path) else "<graph>"
        self._session: Any = _open(model, self._name, threads, provider)
        self.properties: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.config = embedded_config(self.properties, self._name)
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        outputs = {value.name: value.shape for value in self._session.get_outputs()}
        self.shapes = read_shapes(self._name, self.properties, self.config, inputs, outputs)

    def run(self, feats: NDArray[np.float32], lens: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See Backend.run. Raises ModelError when the runtime fails or returns values that are not finite."""
        check_frames(self._name, self.properties, feats.shape[2])
        try:
            log_probs, out_lens = self._session.run(["log_probs", "log_prob_lens"], {"feats": feats, "feat_lens": lens})
        except Exception as error:  # onnxruntime raises its own kinds for each status
            raise ModelError(f"{self._name}: onnxruntime failed ({_one_line(error)})") from error
        check_finite(self._name, log_probs, out_lens)
        return log_probs, out_lens

    def close(self) -> None:
        """Drop the session; its memory goes with it."""
        self._session = None


def _open(model: Path | bytes, name: str, threads: int | None, provider: Provider) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its complaints arrive as exceptions, once
    # threads that wait in a loop take the cores from those that read, decode and search meanwhile
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # a plan of a shape's buffers is a second set of them from its second run on: long audio took 1.44 times the memory
    options.enable_mem_pattern = False
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
