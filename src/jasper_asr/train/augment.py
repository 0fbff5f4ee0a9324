"""Augmentation on log-mel features, before normalisation: cheap enough to redo for every utterance of every epoch.

Changing speed in the feature domain is an approximation of resampling the audio (a test compares the two): time is
interpolated between frames and frequency along the mel axis. It lets tempo and frequency vary apart from each other,
which is speed perturbation and vocal tract length perturbation (Jaitly and Hinton, 2013) in one step.
"""

import numpy as np
from numpy.typing import NDArray

from jasper_asr.config import FeatureConfig, SpecAugmentConfig, SpeedPerturbationConfig
from jasper_asr.features import LOG_GUARD, hz_to_mel, mel_to_hz

Float32 = NDArray[np.float32]


def draw_rate(config: SpeedPerturbationConfig, rng: np.random.Generator) -> float:
    """A rate as NVIDIA's SpeedPerturbation draws it: 1 with probability 1 - p; above 1 is faster and higher."""
    if rng.random() >= config.p:
        return 1.0
    if config.discrete:
        return float(rng.choice([config.min_rate, 1.0, config.max_rate]))
    return float(rng.uniform(config.min_rate, config.max_rate))


def change_speed(log_mels: Float32, tempo: float, pitch: float, config: FeatureConfig) -> Float32:
    """[n_filt, T] -> [n_filt, round(T / tempo)]; frequencies are multiplied by `pitch`."""
    if pitch != 1.0:
        log_mels = _warp_matrix(pitch, config) @ log_mels
    if tempo != 1.0:
        frames = max(1, round(log_mels.shape[1] / tempo))
        position = np.minimum(np.arange(frames) * tempo, log_mels.shape[1] - 1)
        left = position.astype(np.int64)
        right = np.minimum(left + 1, log_mels.shape[1] - 1)
        weight = (position - left).astype(np.float32)
        log_mels = log_mels[:, left] * (1 - weight) + log_mels[:, right] * weight
    return log_mels


def add_noise(log_mels: Float32, snr_db: float, rng: np.random.Generator) -> Float32:
    """Stationary noise with a random smooth spectrum, `snr_db` below the utterance's mean power.

    Powers add; the power of Gaussian noise in a band is exponentially distributed from frame to frame, less so in
    wide bands, which average several bins: a gamma distribution of shape 3 stands for that.
    """
    bands, frames = log_mels.shape
    power = np.exp(np.minimum(log_mels, 60.0))
    knots = rng.normal(0.0, 2.0, 5)
    shape = np.exp(np.interp(np.arange(bands), np.linspace(0, bands - 1, 5), knots))[:, None]
    level = power.mean() / shape.mean() * 10 ** (-snr_db / 10)
    noise = rng.standard_gamma(3.0, (bands, frames), dtype=np.float32) / np.float32(3)
    noisy: Float32 = np.log(power + noise * (level * shape).astype(np.float32) + np.float32(LOG_GUARD))
    return noisy


def add_room(log_mels: Float32, decay_seconds: float, ratio_db: float, hop_seconds: float) -> Float32:
    """A late reverberation whose energy is `ratio_db` below the speech and falls by 60 dB in `decay_seconds`.

    Energy that arrives late adds to what is said meanwhile, as power: the exponential tail of Polack's model of a room
    (1988), the same in all bands. Early reflections are within a frame and colour only the spectrum.
    """
    power = np.exp(np.minimum(log_mels, 60.0))
    keep = 10 ** (-6.0 * hop_seconds / decay_seconds)
    tail = np.zeros_like(power)
    tail[:, 1:] = (1 - keep) * power[:, :-1]
    reach = 1  # frames that the tail has summed: tail[t] = keep tail[t - 1] + ..., twice as many each time
    while reach < power.shape[1]:
        tail[:, reach:] += keep**reach * tail[:, :-reach]
        reach *= 2
    late: Float32 = np.log(power + tail * 10 ** (-ratio_db / 10)).astype(np.float32)  # log-mels carry the guard
    return late


def spec_augment(features: Float32, config: SpecAugmentConfig, rng: np.random.Generator) -> None:
    """Zero random bands and spans of frames of normalised [n_filt, T] in place (Park et al., arXiv 1904.08779).

    A time mask covers at most a fifth of the utterance, so that short ones keep their words.
    """
    bands, frames = features.shape
    for _ in range(config.freq_masks):
        width = int(rng.integers(config.min_freq, config.max_freq + 1))
        start = int(rng.integers(0, max(1, bands - width)))
        features[start : start + width] = 0
    longest = min(config.max_time, frames // 5)
    for _ in range(config.time_masks):
        width = int(rng.integers(min(config.min_time, longest), longest + 1))
        start = int(rng.integers(0, max(1, frames - width)))
        features[:, start : start + width] = 0


def _warp_matrix(pitch: float, config: FeatureConfig) -> Float32:
    """[n_filt, n_filt]: band at f takes what was at f / pitch, interpolated between the two nearest bands."""
    top = config.highfreq or config.sample_rate / 2
    low, high = hz_to_mel(config.lowfreq), hz_to_mel(top)
    step = (high - low) / (config.n_filt + 1)
    centres = low + step * np.arange(1, config.n_filt + 1, dtype=np.float64)
    wanted = np.array([hz_to_mel(hz / pitch) for hz in mel_to_hz(centres)])
    position = np.clip((wanted - centres[0]) / step, 0, config.n_filt - 1)
    left = np.minimum(position.astype(np.int64), config.n_filt - 2)
    weight = position - left
    matrix = np.zeros((config.n_filt, config.n_filt), np.float32)
    rows = np.arange(config.n_filt)
    matrix[rows, left] = 1 - weight
    matrix[rows, left + 1] += weight
    return matrix
