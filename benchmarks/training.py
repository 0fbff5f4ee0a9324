"""Time of a training step on a CPU: `python benchmarks/training.py [--seconds 6] [--batch 24] [--rounds 7]`.

Forward, CTC loss and backward of the embedded model's network, one thread, in four ways in alternation: float32 and
bfloat16 autocast, each with torch's convolutions and with spectral ones (what `jasper train` does). Prints medians, how
many times faster than real time they are, and ratios to torch's own way in the same type.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F  # noqa: N812

from jasper_asr.config import load_config
from jasper_asr.model import net
from jasper_asr.model.export import BUILTIN_MODELS
from jasper_asr.model.net_spectral import convolve

WAYS = {
    "float32, torch": (torch.float32, lambda conv, values: conv(values)),
    "float32, spectral": (torch.float32, convolve),
    "bfloat16, torch": (torch.bfloat16, lambda conv, values: conv(values)),
    "bfloat16, spectral": (torch.bfloat16, convolve),
}
LETTERS_PER_SECOND = 14


def main() -> None:
    """Parse, time in alternation, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of an utterance")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = net.Jasper(load_config(BUILTIN_MODELS["mini"].with_name("config.yaml"))).train()
    features = torch.randn(options.batch, model.config.in_feats, int(options.seconds * 100))
    letters = int(options.seconds * LETTERS_PER_SECOND)
    targets = torch.randint(0, model.config.blank_id, (options.batch, letters))
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_ in range(options.rounds + 1):
        for way in WAYS:
            seconds = step(model, way, features, targets)
            if round_:  # the first one builds kernels and tables
                times[way].append(seconds)
    audio = options.seconds * options.batch
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, {audio:g} s of audio a step"
    )
    for way, values in times.items():
        plain = statistics.median(times[way.replace("spectral", "torch")])
        low, median, high = statistics.quantiles(values, n=4)
        print(
            f"{way:<20} {median:.3f} s ({low:.3f} to {high:.3f}), {audio / median:.0f} times real time, "
            f"{plain / median:.2f} times torch's speed"
        )


def step(model: net.Jasper, way: str, features: torch.Tensor, targets: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    dtype, net.convolve = WAYS[way]
    lens = torch.full((len(features),), features.shape[2])
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        log_probs, out_lens = model(features, lens)
    sizes = torch.full((len(targets),), targets.shape[1])
    loss = F.ctc_loss(log_probs.transpose(0, 1), targets, out_lens, sizes, blank=model.config.blank_id)
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
