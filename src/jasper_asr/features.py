"""Log-mel features, NVIDIA's dialect, in numpy: the one implementation, for inference and training.

The chain (NVIDIA's FilterbankFeatures, and librosa's mel filters, written again from their definitions):
pre-emphasis 0.97 with the first sample kept; STFT with a symmetric Hann window, centred, reflect padding; power;
Slaney mel filters; log(x + 1e-20); per band (x - mean) / (std + 1e-5) over the valid frames, std unbiased.
A signal of N samples has ceil(N / hop) valid frames. Nothing is random: dither is left out.
NeMo's dialect of it differs in three fields of FeatureConfig: zeros for reflections (`pad_mode`), log(x + 2^-24)
(`log_guard`), and floor(N / hop) valid frames (`frame_count`).
Features are computed one utterance at a time, so a batch and a single run agree by construction.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import FeatureConfig

Float32 = NDArray[np.float32]

LOG_GUARD = FeatureConfig.log_guard
"""NVIDIA's, the default."""
STD_GUARD = 1e-5
_BLOCK_FRAMES = 128
"""Frames per FFT call: 128 x 512 float32 stay in the second-level cache, and memory stays flat for long audio."""


def features(samples: Float32, config: FeatureConfig) -> tuple[Float32, int]:
    """Samples float32 [N] -> (normalised features float32 [n_filt, T], valid frames).

    T is 1 + N // hop rounded up to `pad_align`, or at least `max_duration_frames` with `pad_to_max_duration`;
    everything beyond the valid frames is 0. Raises ValueError for an empty or not finite signal.
    """
    normalised = normalize(log_mel(samples, config))
    frames = 1 + len(samples) // config.hop_length  # what a centred STFT yields, padding starts from it
    if config.pad_to_max_duration:
        frames = max(frames, max_duration_frames(config))
    padded = np.zeros((config.n_filt, _round_up(frames, config.pad_align)), np.float32)
    padded[:, : normalised.shape[1]] = normalised
    return padded, normalised.shape[1]


def log_mel(samples: Float32, config: FeatureConfig) -> Float32:
    """Samples float32 [N] -> log-mel energies before normalisation, float32 [n_filt, valid frames]."""
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"samples must be a non-empty [N] array, not {list(samples.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error below, not a warning
        energies = _energies(_emphasise(samples, config.preemph), config)
        np.log(energies + np.float32(config.log_guard), out=energies)
    if not np.isfinite(energies).all():
        raise ValueError("features are not finite: the samples hold NaN, infinity or absurdly large values")
    return np.ascontiguousarray(energies.T)


def normalize(log_mels: Float32) -> Float32:
    """Per band over all frames of [n_filt, T]: (x - mean) / (unbiased std + 1e-5). One frame gives zeros."""
    mean = log_mels.mean(axis=1, keepdims=True, dtype=np.float64)
    centred: Float32 = log_mels - mean.astype(np.float32)
    degrees = max(log_mels.shape[1] - 1, 1)  # NVIDIA's std of a single frame is NaN; 0 here
    std = np.sqrt(np.einsum("ft,ft->f", centred, centred, dtype=np.float64) / degrees) + STD_GUARD
    centred /= std[:, None].astype(np.float32)
    return centred


def max_duration_frames(config: FeatureConfig) -> int:
    """Frames that `pad_to_max_duration` pads to, before `pad_align`: NVIDIA's 1 + ceil((max * rate - win) / hop)."""
    samples = config.max_duration * config.sample_rate
    return 1 + math.ceil((samples - config.win_length) / config.hop_length)


def valid_frames(n_samples: int, config: FeatureConfig) -> int:
    """Valid feature frames of a signal of `n_samples` samples: ceil(N / hop), or floor, but never none."""
    if config.frame_count == "floor":
        return max(n_samples // config.hop_length, 1)
    return -(-n_samples // config.hop_length)


def _energies(samples: Float32, config: FeatureConfig) -> Float32:
    """Power in each mel band, float32 [valid frames, n_filt]."""
    frames, window = _frames(samples, config), _window(config.win_length)
    mel = _mel_filters(config.sample_rate, config.n_fft, config.n_filt, config.lowfreq, config.highfreq).T
    energies = np.empty((len(frames), config.n_filt), np.float32)
    # written over in every block: memory from the system costs more than the transforms
    block = min(_BLOCK_FRAMES, len(frames))
    windowed = np.zeros((block, config.n_fft), np.float32)
    spectrum = np.empty((block, config.n_fft // 2 + 1), np.complex64)
    power, imaginary = np.empty((2, *spectrum.shape), np.float32)
    for start in range(0, len(frames), block):
        rows = slice(min(block, len(frames) - start))
        # NVIDIA centres the 320-sample window in the 512-point FFT; starting it at 0 changes only the phase
        np.multiply(frames[start : start + block], window, out=windowed[rows, : config.win_length])
        np.fft.rfft(windowed[rows], axis=1, out=spectrum[rows])  # type: ignore[arg-type]  # numpy's stubs know no float32
        np.square(spectrum[rows].real, out=power[rows])
        np.square(spectrum[rows].imag, out=imaginary[rows])
        power[rows] += imaginary[rows]
        np.matmul(power[rows], mel, out=energies[start : start + block])
    return energies


def _emphasise(samples: Float32, preemph: float) -> Float32:
    out = np.empty_like(samples)
    out[0] = samples[0]
    np.multiply(samples[:-1], np.float32(-preemph), out=out[1:])
    out[1:] += samples[1:]
    return out


def _frames(samples: Float32, config: FeatureConfig) -> Float32:
    """Overlapping views [valid frames, win] of the signal, continued at both ends as a centred STFT sees it."""
    win, hop = config.win_length, config.hop_length
    reach = win // 2  # the FFT's other n_fft/2 - win/2 reflected samples meet a zero window
    padded = np.pad(samples, (reach, reach), mode=config.pad_mode)  # type: ignore[call-overload]
    windows = np.lib.stride_tricks.sliding_window_view(padded, win)
    return windows[::hop][: valid_frames(len(samples), config)]


@lru_cache
def _window(length: int) -> Float32:
    """Symmetric (`periodic=False`) Hann window."""
    return np.hanning(length).astype(np.float32)


@lru_cache
def _mel_filters(sample_rate: int, n_fft: int, n_filt: int, low: float, high: float | None) -> Float32:
    """Slaney-style triangular filters with area normalisation, float32 [n_filt, n_fft // 2 + 1]."""
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    edges = mel_to_hz(np.linspace(hz_to_mel(low), hz_to_mel(high or sample_rate / 2), n_filt + 2))
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return (triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


# Slaney's Auditory Toolbox scale: linear, 200/3 Hz a mel, up to 1 kHz; above it 27 mels multiply Hz by 6.4.
_HZ_PER_MEL = 200.0 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def hz_to_mel(hz: float) -> float:
    """Slaney's mel value of a frequency in Hz."""
    return hz / _HZ_PER_MEL if hz < _BREAK_HZ else _BREAK_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Frequencies in Hz of Slaney mel values: the inverse of `hz_to_mel`."""
    linear = mel * _HZ_PER_MEL
    return np.where(
        mel < _BREAK_MEL, linear, _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple if multiple > 1 else value
