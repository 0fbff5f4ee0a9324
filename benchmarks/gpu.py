"""Jasper 10x5 on a GPU: `python benchmarks/gpu.py [--seconds 7 16.7 40] [--batch-sizes 1 16] [--rounds 20]`.

Random weights, our network in torch: eager and compiled, with direct and with spectral convolution, in fp32, tf32, bf16
and fp16; and onnxruntime's CUDA provider where it is installed. Everything is checked against eager fp32 (the share of
frames with the same likeliest class) before it is timed; all take turns. Prints a Markdown table of median milliseconds
(quartiles), how many times faster than eager fp32, and times real time. Not yet run on a GPU; `--device cpu --tiny`
shows that it works.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jasper_asr.benchmark import describe_machine
from jasper_asr.config import ModelConfig, builtin_config, load_config
from jasper_asr.model.checkpoint import Checkpoint, random_weights
from jasper_asr.model.export import BUILTIN_MODELS, write_graph
from jasper_asr.model.net import Jasper
from jasper_asr.model.spectral import spectra, transforms

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Run = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Parse, build, check, time in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[7.0, 16.7, 40.0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tile", type=int, default=28, help="frames in a tile of the spectral convolution")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the shape of mini")
    options = parser.parse_args()
    mini = BUILTIN_MODELS["mini"].with_name("config.yaml")
    config = load_config(mini) if options.tiny else builtin_config("jasper10x5dr")
    weights = random_weights(config, seed=0)
    weights["decoder.layers.0.weight"] /= 50  # to where the log-probs of a trained network lie
    checkpoint = Checkpoint(config, weights, "0" * 64, "ema")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine()
    print(f"{name}, torch {torch.__version__}; {options.rounds} rounds in turns\n")
    with tempfile.TemporaryDirectory() as folder:
        runs = torch_runs(checkpoint, device, options) | onnx_runs(checkpoint, Path(folder), device)
        for seconds in options.seconds:
            for batch_size in options.batch_sizes:
                report(runs, config, seconds, batch_size, device, options.rounds)


def torch_runs(checkpoint: Checkpoint, device: torch.device, options: argparse.Namespace) -> dict[str, Run]:
    """Name -> our network in torch, ready to run."""
    direct = Jasper(checkpoint.config).eval().requires_grad_(False)
    tensors = {name: torch.from_numpy(values) for name, values in checkpoint.weights.items()}
    direct.load_state_dict(tensors, strict=False)
    runs: dict[str, Run] = {}
    for kind, net in {"direct": direct, "spectral": with_spectra(direct, options.tile)}.items():
        for precision in options.precisions:
            ready = copy.deepcopy(net).to(device, DTYPES[precision])
            runs[f"eager, {kind}, {precision}"] = runner(ready, precision, device)
            if not options.no_compile:
                compiled = torch.compile(ready, dynamic=False)
                runs[f"compiled, {kind}, {precision}"] = runner(compiled, precision, device)
    return runs


def runner(net: Any, precision: str, device: torch.device) -> Run:
    def run(feats: Tensor, lens: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        with torch.inference_mode():
            log_probs, _ = net(feats.to(DTYPES[precision]), lens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return log_probs  # type: ignore[no-any-return]

    return run


def onnx_runs(checkpoint: Checkpoint, folder: Path, device: torch.device) -> dict[str, Run]:
    """onnxruntime's CUDA provider, fp32, copies to and from the device included; nothing where it is missing."""
    import onnxruntime

    if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return {}
    runs: dict[str, Run] = {}
    for kind in ("direct", "spectral"):
        path = folder / f"{kind}.onnx"
        write_graph(checkpoint, path, convolution=kind)
        session = onnxruntime.InferenceSession(str(path), providers=["CUDAExecutionProvider"])

        def run(feats: Tensor, lens: Tensor, session: Any = session) -> Tensor:
            feeds = {"feats": feats.cpu().numpy(), "feat_lens": lens.cpu().numpy().astype(np.int32)}
            return torch.from_numpy(session.run(["log_probs"], feeds)[0]).to(device)

        runs[f"onnxruntime CUDA, {kind}, fp32"] = run
    return runs


def with_spectra(net: Jasper, tile: int) -> Jasper:
    """A copy whose dense convolutions of stride 1 and several taps go by spectra in tiles of `tile` frames."""
    changed = copy.deepcopy(net)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 and (child.stride, child.groups) == ((1,), 1):
                setattr(parent, name, SpectralConv1d(child, tile // child.dilation[0]))
    return changed


class SpectralConv1d(nn.Conv1d):
    """A convolution that multiplies spectra, see model/spectral.py: a subclass, so that the network treats it alike."""

    to_spectrum: Tensor
    from_spectrum: Tensor
    kernels: Tensor

    def __init__(self, conv: nn.Conv1d, tile: int) -> None:
        (taps,), (padding,), (dilation,) = conv.kernel_size, conv.padding, conv.dilation
        super().__init__(1, 1, taps, padding=int(padding), dilation=dilation, bias=False, device="meta")
        del self.weight
        self.tile, self.outputs = tile, conv.out_channels
        forward, inverse, _ = transforms(tile, taps)
        self.register_buffer("to_spectrum", torch.from_numpy(forward))
        self.register_buffer("from_spectrum", torch.from_numpy(inverse))
        self.register_buffer("kernels", torch.from_numpy(np.concatenate(list(spectra(conv.weight.numpy(), tile)))))

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, T] -> [B, O, T]; a dilated convolution is that of each phase."""
        (dilation,), taps, tile = self.dilation, self.kernel_size[0], self.tile
        batch, channels, frames = values.shape
        tiles = -(-frames // (tile * dilation))
        padding = int(self.padding[0])
        padded = nn.functional.pad(values, (padding, tiles * tile * dilation - frames + padding))
        phases = padded.unflatten(2, (-1, dilation)).permute(1, 0, 3, 2)  # [C, B, d, .]
        windows = phases.unfold(3, tile + taps - 1, tile)
        columns = windows.reshape(-1, tile + taps - 1) @ self.to_spectrum.T
        found = columns.T.reshape(-1, channels, batch * dilation * tiles)
        mixed = torch.bmm(self.kernels, found).flatten(1)
        result = (mixed.T @ self.from_spectrum.T).view(self.outputs, batch, dilation, tiles * tile)
        return result.permute(1, 0, 3, 2).reshape(batch, self.outputs, -1)[:, :, :frames]


def report(
    runs: dict[str, Run], config: ModelConfig, seconds: float, batch_size: int, device: torch.device, rounds: int
) -> None:
    """One table."""
    frames = round(seconds / config.features.window_stride)
    torch.manual_seed(frames)
    feats = torch.randn(batch_size, config.in_feats, frames, device=device)
    lens = torch.full((batch_size,), frames, device=device)
    agreement: dict[str, float] = {}
    expected = None
    for name, run in runs.items():  # the first run also compiles and warms up
        best = run(feats, lens).float().argmax(2)
        expected = best if expected is None else expected
        agreement[name] = float((best == expected).float().mean())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(feats, lens)
            times[name].append(time.perf_counter() - started)
    print(f"{seconds:g} s, batch {batch_size}\n")
    print("| engine | ms, median (quartiles) | times faster | times real time | frames with the same class |")
    print("|---|---|---|---|---|")
    first = statistics.median(next(iter(times.values())))
    for name, row in times.items():
        median = statistics.median(row)
        real_time = batch_size * seconds / median
        print(f"| {name} | {cell(row)} | {first / median:.2f} | {real_time:.0f} | {agreement[name]:.2%} |", flush=True)
    print()


def cell(times: Sequence[float]) -> str:
    low, median, high = (1000 * value for value in statistics.quantiles(times, n=4))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
