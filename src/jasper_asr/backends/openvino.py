"""OpenVINO on the CPU.

Spectral graphs are held once: their weights are used where the file is mapped (4.4 GB for Jasper 10x5, measured). For
direct convolutions OpenVINO packs the weights anew, and drops the file's when it has done so.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jasper_asr.backends.contract import check_finite, check_frames, read_shapes
from jasper_asr.errors import ModelError, StorageError, UsageError
from jasper_asr.model.export import embedded_config

PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""What `precision` may say, in OpenVINO's words -> what the CPU must be capable of."""

HINTS = ("latency", "throughput")


class OpenVinoBackend:
    """An ONNX model that `jasper export` wrote, run by OpenVINO.

    `precision` is what it computes in: `f32` whatever the CPU prefers, `bf16` or `f16` where it can. `hint` is
    `latency`, all threads for one run, or `throughput`, several runs side by side when `run` is called from several
    threads; `streams` says how many. `cache_dir` keeps the compiled graph for the next start.
    Raises StorageError, ModelError, or UsageError for a precision that the CPU has not.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int | None = None,
        precision: str = "f32",
        hint: str = "latency",
        streams: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self._name = str(model) if isinstance(model, Path) else "<graph>"
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams, "CACHE_DIR": cache_dir}
        options = {key: str(value) for key, value in options.items() if value is not None}
        if hint not in HINTS:
            raise UsageError(f"hint {hint!r}: choose {' or '.join(HINTS)}")
        options |= {"PERFORMANCE_HINT": hint.upper(), "INFERENCE_PRECISION_HINT": precision}
        if cache_dir is not None:
            options["CACHE_MODE"] = "OPTIMIZE_SIZE"  # no copy of the weights on disk
        core = _core(precision)
        graph, self._compiled = _compile(core, model, self._name, options)
        self.properties = _properties(graph)
        self.config = embedded_config(self.properties, self._name)
        inputs, outputs = (
            {
                value.any_name: [size.get_length() if size.is_static else None for size in value.partial_shape]
                for value in values
            }
            for values in (graph.inputs, graph.outputs)
        )
        self.shapes = read_shapes(self._name, self.properties, self.config, inputs, outputs)
        self._requests = threading.local()

    def run(self, feats: NDArray[np.float32], lens: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See Backend.run; may be called from several threads. Raises ModelError as OrtBackend.run does."""
        check_frames(self._name, self.properties, feats.shape[2])
        known = (self.shapes.batch_size, self.config.in_feats, self.shapes.frames)
        if any(size not in (None, given) for size, given in zip(known, feats.shape, strict=True)):
            # openvino itself would read beyond the end
            raise ModelError(f"{self._name}: takes feats {_readable(known)}, not {_readable(feats.shape)}")
        try:
            if not hasattr(self._requests, "own"):
                self._requests.own = self._compiled.create_infer_request()
            found = self._requests.own.infer({"feats": feats, "feat_lens": lens})
        except Exception as error:  # OpenVINO raises RuntimeError, TypeError and its own kinds
            raise ModelError(f"{self._name}: openvino failed ({_one_line(error)})") from error
        log_probs, out_lens = found["log_probs"], found["log_prob_lens"]
        check_finite(self._name, log_probs, out_lens)
        return log_probs, out_lens

    def close(self) -> None:
        """Drop the compiled graph; its memory goes with it."""
        self._requests = threading.local()
        self._compiled = None


def _core(precision: str) -> Any:
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: choose {', '.join(PRECISIONS)}")
    try:
        import openvino
    except ImportError as error:
        raise UsageError("backend openvino: is not installed; pip install 'jasper-asr[openvino]'") from error
    core = openvino.Core()
    if PRECISIONS[precision] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        cpu = core.get_property("CPU", "FULL_DEVICE_NAME").strip()
        raise UsageError(f"precision {precision}: this CPU ({cpu}) does not compute in it; use f32")
    return core


def _compile(core: Any, model: Path | bytes, name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """(the graph as read, the graph compiled)."""
    if isinstance(model, Path):
        if not model.is_file():
            raise StorageError(f"{name}: no such file; check the path")
        if model.stat().st_size == 0:
            raise ModelError(f"{name}: the file is empty; export it again")
    try:
        graph = core.read_model(model)
        # from its file, a compiled graph is found in the cache before that is read
        source = model if isinstance(model, Path) and "CACHE_DIR" in options else graph
        return graph, core.compile_model(source, "CPU", options)
    except Exception as error:  # see run
        raise ModelError(f"{name}: not a model that openvino can load ({_one_line(error)}); export it again") from error


def _properties(graph: Any) -> dict[str, str]:
    """The metadata of the ONNX, which OpenVINO keeps as run-time information."""
    info = graph.rt_info
    if "framework" not in info:
        return {}
    return {key: str(value.value) for key, value in info["framework"].items()}


def _readable(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join(str(size or 'any') for size in shape)}]"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[-200:]
