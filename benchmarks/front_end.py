"""Time of the front end for one clip on one core: `python benchmarks/front_end.py [--seconds 7] [--rounds 200]`.

Prints median and quartiles in milliseconds. With --torch it also times the reference's operations (pre-emphasis,
torch.stft, mel product, log, normalisation) written in torch, in alternation, and prints the ratio of the medians.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before numpy: one core

import numpy as np

from jasper_asr.config import FeatureConfig, builtin_config
from jasper_asr.features import _mel_filters, features


def main() -> None:
    """Parse, time in alternation, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=7.0)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--torch", action="store_true")
    options = parser.parse_args()
    config = builtin_config("jasper10x5dr").features
    samples = (0.1 * np.random.default_rng(0).standard_normal(int(options.seconds * 16000))).astype(np.float32)
    jobs: dict[str, Callable[[], object]] = {"jasper_asr": lambda: features(samples, config)}
    if options.torch:
        jobs["torch"] = reference(samples, config)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(options.rounds + 5):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if round_ >= 5:  # the first rounds build tables and warm caches
                times[name].append((time.perf_counter() - started) * 1e3)
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, {options.seconds:g} s, one thread")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:<12} median {median:.2f} ms  quartiles {low:.2f} to {high:.2f}  fastest {min(values):.2f}")
    if options.torch:
        ratio = statistics.median(times["torch"]) / statistics.median(times["jasper_asr"])
        print(f"torch / jasper_asr {ratio:.2f}")


def reference(samples: np.ndarray, config: FeatureConfig) -> Callable[[], object]:
    """The same chain out of torch's operations, as NVIDIA's featurizer uses them."""
    import torch

    torch.set_num_threads(1)
    window = torch.hann_window(config.win_length, periodic=False)
    filters = torch.from_numpy(_mel_filters(config.sample_rate, config.n_fft, config.n_filt, 0.0, None))
    signal = torch.from_numpy(samples)[None]

    def job() -> object:
        x = torch.cat((signal[:, :1], signal[:, 1:] - 0.97 * signal[:, :-1]), dim=1)
        x = torch.stft(x, config.n_fft, config.hop_length, config.win_length, window, return_complex=True)
        x = torch.log(filters @ torch.view_as_real(x).pow(2).sum(-1) + 1e-20)
        return (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 1e-5)

    return job


if __name__ == "__main__":
    main()
