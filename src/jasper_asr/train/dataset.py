"""Training data: manifests -> log-mel features cached on disk -> batches that depend only on the seed and the step."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jasper_asr import audio, features, text
from jasper_asr.align import frames_needed
from jasper_asr.config import ModelConfig, SpeedPerturbationConfig
from jasper_asr.data.manifest import Utterance
from jasper_asr.errors import JasperError, ManifestError
from jasper_asr.train import augment

Progress = Callable[[int, int], None]

PAD_FRAMES = 32
"""Batches are padded to a multiple of this, so that few shapes occur: runtimes build new kernels for each shape."""


@dataclass(frozen=True)
class Batch:
    """features float32 [B, n_filt, T] zero beyond lens; targets are the utterances' label ids one after the other.

    Of `views` above 1, rows i, i + B / views, ... are one utterance, augmented anew: of the same length and labels.
    """

    features: NDArray[np.float32]
    lens: NDArray[np.int64]
    targets: NDArray[np.int64]
    target_lens: NDArray[np.int64]
    seconds: float
    views: int = 1


class FeatureCache:
    """Log-mel features before normalisation of all usable utterances, on disk: float16 [frames, n_filt] a manifest.

    float16 keeps log-mels to within 2^-6 or better, well below what augmentation changes.
    """

    def __init__(self, parts: Sequence["CachePart"], n_filt: int) -> None:
        self._values = [np.memmap(part.values, np.float16, "r").reshape(-1, n_filt) for part in parts if part.targets]
        filled = [part for part in parts if part.targets]
        self._part = np.repeat(np.arange(len(filled)), [len(part.targets) for part in filled])
        self._start = np.concatenate([part.offsets[:-1] for part in filled])
        self.frames = np.concatenate([np.diff(part.offsets) for part in filled])
        self.targets = [labels for part in filled for labels in part.targets]

    def __len__(self) -> int:
        return len(self.targets)

    def log_mels(self, index: int) -> NDArray[np.float32]:
        """float32 [n_filt, frames] of utterance `index`."""
        start = self._start[index]
        rows = self._values[self._part[index]][start : start + self.frames[index]]
        return np.ascontiguousarray(rows.T, np.float32)


@dataclass(frozen=True)
class CachePart:
    """Features of one manifest: the file, frame offsets int64 [utterances + 1], label ids, and who was left out."""

    values: Path
    offsets: NDArray[np.int64]
    targets: list[list[int]]
    skipped: list["SkippedUtterance"]


@dataclass(frozen=True)
class SkippedUtterance:
    """An utterance that training leaves out, and why."""

    audio_filepath: str
    reason: str


def build_cache(
    manifests: Sequence[Sequence[Utterance]],
    config: ModelConfig,
    folder: Path,
    *,
    jobs: int = 2,
    progress: Progress | None = None,
) -> tuple[FeatureCache, list[SkippedUtterance]]:
    """Compute, or find from an earlier run, the features of the utterances of each manifest under `folder`.

    A file's name is a hash of the front end and of the rows, so a changed manifest or config makes a new one. Listing
    a manifest twice doubles its weight. Utterances that cannot be read, are outside the config's durations, or have
    more labels than output frames are skipped and returned. Raises ManifestError when none is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_part(utterances, config, folder, jobs, progress) for utterances in manifests]
    skipped = [row for part in parts for row in part.skipped]
    if not any(part.targets for part in parts):
        reason = f"{skipped[0].audio_filepath}: {skipped[0].reason}" if skipped else "they are empty"
        raise ManifestError(f"training manifests: no usable utterance ({reason})")
    return FeatureCache(parts, config.features.n_filt), skipped


class BatchPlan:
    """Which utterances make up which batch: every epoch each utterance once, neighbours of similar length together."""

    def __init__(self, frames: NDArray[np.int64], batch_frames: int, seed: int) -> None:
        self.frames = frames
        self.batch_frames = batch_frames
        self.seed = seed

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Lists of utterance indices; padded size at most `batch_frames` (a longer utterance is a batch by itself)."""
        rng = np.random.default_rng([self.seed, epoch])
        # lengths jittered by 5 % so that batches mix differently every epoch and still pad little
        order = np.argsort(self.frames * rng.uniform(0.95, 1.05, len(self.frames)), kind="stable")
        batches: list[NDArray[np.int64]] = []
        start, longest = 0, 0
        for end, index in enumerate(order):
            longest = max(longest, int(self.frames[index]))
            if end > start and longest * (end - start + 1) > self.batch_frames:
                batches.append(order[start:end])
                start, longest = end, int(self.frames[index])
        batches.append(order[start:])
        return [batches[i] for i in rng.permutation(len(batches))]


def make_batch(
    cache: FeatureCache,
    indices: NDArray[np.int64],
    config: ModelConfig,
    rng: np.random.Generator,
    *,
    noise: float,
    rooms: float = 0.0,
    views: int = 1,
) -> Batch:
    """Augmented, normalised, padded features of `indices`; `noise`, `rooms`: shares of utterances that get them.

    Pitch is each utterance's own, tempo the whole batch's: utterances that are of one length stay so, and a batch is
    94 % speech where a tempo for each left 88 % (rates from 0.9 to 1.1).
    """
    speed = config.train_dataset.speed_perturbation if config.train_dataset else None
    tempo = augment.draw_rate(speed, rng) if speed else 1.0
    indices = np.tile(indices, views)
    rows = [_augmented(cache, int(index), config, speed, tempo, rng, noise, rooms) for index in indices]
    lens = np.array([row.shape[1] for row in rows], np.int64)
    frames = -(-int(lens.max()) // PAD_FRAMES) * PAD_FRAMES
    padded = np.zeros((len(rows), config.features.n_filt, frames), np.float32)
    for target, row in zip(padded, rows, strict=True):
        target[:, : row.shape[1]] = row
    labels = [cache.targets[int(index)] for index in indices]
    hop_seconds = config.features.hop_length / config.features.sample_rate
    return Batch(
        features=padded,
        lens=lens,
        targets=np.concatenate([np.array(row, np.int64) for row in labels]),
        target_lens=np.array([len(row) for row in labels], np.int64),
        seconds=float(lens.sum() * hop_seconds),
        views=views,
    )


def spelt(transcript: str, config: ModelConfig) -> str:
    """A transcript as it is trained on: normalised, if the config wants that."""
    dataset = config.train_dataset or config.dataset
    return text.normalize_transcript(transcript, config.labels) if dataset.normalize_transcripts else transcript


def fits(frames: int, targets: Sequence[int], config: ModelConfig) -> bool:
    """Whether CTC can align `targets` with `frames` feature frames."""
    return config.output_length(frames) >= frames_needed(targets)


def _augmented(
    cache: FeatureCache,
    index: int,
    config: ModelConfig,
    speed: SpeedPerturbationConfig | None,
    tempo: float,
    rng: np.random.Generator,
    noise: float,
    rooms: float,
) -> NDArray[np.float32]:
    log_mels = cache.log_mels(index)
    if speed is not None:
        pitch = augment.draw_rate(speed, rng)
        if not fits(round(log_mels.shape[1] / tempo), cache.targets[index], config):
            tempo = 1.0
        log_mels = augment.change_speed(log_mels, tempo, pitch, config.features)
    if rooms and rng.random() < rooms:
        hop_seconds = config.features.hop_length / config.features.sample_rate
        decay, ratio = float(rng.uniform(0.15, 0.8)), float(rng.uniform(0, 20))
        log_mels = augment.add_room(log_mels, decay, ratio, hop_seconds)
    if noise and rng.random() < noise:
        log_mels = augment.add_noise(log_mels, float(rng.uniform(5, 30)), rng)
    normalised = features.normalize(log_mels)
    if config.spec_augment is not None:
        augment.spec_augment(normalised, config.spec_augment, rng)
    return normalised


def _fingerprint(utterances: Sequence[Utterance], config: ModelConfig) -> str:
    dataset = asdict(config.train_dataset or config.dataset)
    del dataset["speed_perturbation"]  # drawn anew for every batch, on the cached features
    digest = hashlib.sha256(
        json.dumps([asdict(config.features), dataset, config.labels, config.stride], default=str).encode()
    )
    for row in utterances:
        digest.update(f"{row.audio_path}\t{row.offset or 0.0}\t{row.duration}\t{row.text}\n".encode())
    return digest.hexdigest()[:16]


def _part(
    utterances: Sequence[Utterance], config: ModelConfig, folder: Path, jobs: int, progress: Progress | None
) -> CachePart:
    stem = _fingerprint(utterances, config)
    index_path, values_path = folder / f"features-{stem}.json", folder / f"features-{stem}.f16"
    if not index_path.exists():
        _compute(utterances, config, values_path, index_path, jobs, progress)
    index = json.loads(index_path.read_text())
    skipped = [SkippedUtterance(*row) for row in index["skipped"]]
    return CachePart(values_path, np.array(index["offsets"], np.int64), index["targets"], skipped)


def _compute(
    utterances: Sequence[Utterance],
    config: ModelConfig,
    values_path: Path,
    index_path: Path,
    jobs: int,
    progress: Progress | None,
) -> None:
    offsets, targets, skipped = [0], [], []
    partial = values_path.with_suffix(f".{os.getpid()}.part")  # runs that start side by side make the same file
    with partial.open("wb") as out, ThreadPoolExecutor(jobs) as pool:
        for done, (row, result) in enumerate(
            zip(utterances, pool.map(lambda u: _prepare(u, config), utterances), strict=True)
        ):
            if isinstance(result, str):
                skipped.append((row.audio_filepath, result))
            else:
                log_mels, labels = result
                out.write(np.ascontiguousarray(log_mels.T, np.float16).tobytes())
                offsets.append(offsets[-1] + log_mels.shape[1])
                targets.append(labels)
            if progress:
                progress(done + 1, len(utterances))
    os.replace(partial, values_path)
    temporary = index_path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps({"offsets": offsets, "targets": targets, "skipped": skipped}))
    os.replace(temporary, index_path)


def _prepare(row: Utterance, config: ModelConfig) -> tuple[NDArray[np.float32], list[int]] | str:
    """(log-mels [n_filt, T], label ids), or the reason for leaving the utterance out."""
    dataset = config.train_dataset or config.dataset
    if row.text is None:
        return "it has no transcript"
    try:
        offset, duration = row.part
        samples = audio.load_audio(row.audio_path, offset=offset, duration=duration)
    except JasperError as error:
        return str(error)
    if dataset.trim_silence:
        samples = audio.trim_silence(samples)
    seconds = len(samples) / config.features.sample_rate
    if not dataset.min_duration <= seconds <= dataset.max_duration:
        return f"its {seconds:.2f} s are outside {dataset.min_duration} to {dataset.max_duration} s"
    try:
        labels = text.encode(spelt(row.text, config), config.labels)
    except ValueError as error:
        return str(error)
    log_mels = features.log_mel(samples, config.features)
    if not labels or not fits(log_mels.shape[1], labels, config):
        return f"{len(labels)} labels do not fit its {config.output_length(log_mels.shape[1])} output frames"
    return log_mels, labels
