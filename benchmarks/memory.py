"""Peak memory and speed against length: `python benchmarks/memory.py [--model mini] [--seconds 1 10 120 600 3600]`.

Each length is a fresh process that transcribes a WAV of noise (16 bits, 16 kHz) of that length by the best path.
Prints a Markdown table: peak resident memory, the same without the samples themselves (float32), and that against the
120 s file, which is the longest that goes through the network at once.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jasper_asr.audio import SAMPLE_RATE, write_wav

CHILD = """
import sys, time
import jasper_asr
with jasper_asr.load(sys.argv[1], sys.argv[2], greedy=True, threads=int(sys.argv[3])) as transcriber:
    started = time.perf_counter()
    transcriber.transcribe(sys.argv[4])
    seconds = time.perf_counter() - started
# VmHWM is of this program alone; ru_maxrss would begin with the peak of the process that started it
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, seconds)
"""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, nargs="+", default=[1, 10, 120, 600, 3600])
    options = parser.parse_args()
    rows = [measure(options, seconds) for seconds in options.seconds]
    base = next((above for seconds, _, above, _ in rows if seconds == 120), None)
    print("| audio | peak MiB | without the samples | against 120 s | times real time |\n|---|---|---|---|---|")
    for seconds, peak, above, took in rows:
        ratio = f"{above / base:.2f}" if base else ""
        print(f"| {seconds:g} s | {peak / 2**20:.0f} | {above / 2**20:.0f} | {ratio} | {seconds / took:.0f} |")


def measure(options: argparse.Namespace, seconds: float) -> tuple[float, float, float, float]:
    """(seconds, peak bytes, peak bytes without the samples, seconds that it took)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.wav"
        count = round(seconds * SAMPLE_RATE)
        write_wav(path, np.random.default_rng(0).normal(0, 0.05, count).astype(np.float32))
        argv = [sys.executable, "-c", CHILD, options.model, options.backend, str(options.threads), str(path)]
        peak, took = map(float, subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    return seconds, peak, peak - 4 * count, took


if __name__ == "__main__":
    main()
