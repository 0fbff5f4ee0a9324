"""New utterances out of old ones: speech cut between words, where it is quiet, and joined with more of the same voice.

    python recipes/mini/splice.py MANIFEST [...] --out DIR --hours 8 [--model mini] [--seed 1] [--any-voice]

A small set that is heard many times is learnt by heart, sentence by sentence. Spliced, its words come in contexts that
no epoch repeats. Words are placed by forced alignment with a model that knows the set. A cut is made at the quietest
moment near the boundary of two words, if it is at least 10 dB below the utterance's median level. Pieces are brought to
one loudness and joined with a fade of 10 ms. Voices are told by the manifest's `speaker` (of Kokoro's mixes, the
first); `--any-voice` joins all with all. DIR receives FLAC files and `manifest.jsonl`. The same seed gives the same
speech.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

import jasper_asr
from jasper_asr.align import align
from jasper_asr.audio import load_audio
from jasper_asr.errors import JasperError
from jasper_asr.transcribe import Transcriber

Audio = NDArray[np.float32]

RATE = 16_000
HOP = RATE // 100
FADE = RATE // 100
QUIETER = 10.0
"""dB below the utterance's median level at which a cut is not heard."""
SMALLEST = RATE // 10
"""Samples of a piece; no word is shorter."""
LONGEST, SHORTEST = 12.0, 3.0
"""Seconds of a new utterance."""


@dataclass(frozen=True)
class Piece:
    """Samples at 16 kHz, what is said in them, and the utterance that they are from."""

    samples: Audio
    text: str
    source: int


def main() -> None:
    """Parse, cut, join."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--model", default="mini", help="the model that aligns")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--any-voice", action="store_true")
    options = parser.parse_args()
    pieces = cut_all(options.manifests, options.model, options.any_voice)
    total = sum(len(voice) for voice in pieces.values())
    print(f"{total} pieces of {len(pieces)} voices", file=sys.stderr, flush=True)
    write(pieces, options.out, options.hours * 3600, np.random.default_rng(options.seed))


def cut_all(manifests: Sequence[Path], model: str, any_voice: bool) -> dict[str, list[Piece]]:
    """Voice -> its pieces."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    count = 0
    with jasper_asr.load(model, greedy=True, threads=1) as transcriber:
        for manifest in manifests:
            for line in manifest.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                count += 1
                voice = "" if any_voice else str(row.get("speaker", "")).split("+")[0]
                try:
                    pieces[voice] += cut(manifest.parent / row["audio_filepath"], row["text"], count, transcriber)
                except JasperError as error:
                    print(f"left out: {error}", file=sys.stderr)
    return pieces


def cut(path: Path, text: str, number: int, transcriber: Transcriber) -> list[Piece]:
    """The pieces of one utterance: as many as there are quiet moments between words."""
    samples = load_audio(path, sample_rate=RATE)
    duration = len(samples) / RATE
    config = transcriber.config
    log_probs = transcriber.listen((samples, RATE))
    words = align(log_probs, text, config.labels, seconds_per_frame=config.frame_seconds, duration=duration)
    level = levels(samples)
    limit = np.median(level) - QUIETER
    starts, first, pieces = [0], 0, []
    for index, (before, after) in enumerate(pairwise(words), start=1):
        low = max(0, int((before.end - 0.04) * 100))
        near = level[low : int((after.start + 0.04) * 100) + 1]
        at = (low + int(near.argmin())) * HOP + HOP // 2 if near.size else 0
        room = min(at - starts[-1], len(samples) - at) >= SMALLEST
        if near.size and near.min() <= limit and room:
            pieces.append(Piece(samples[starts[-1] : at], " ".join(w.text for w in words[first:index]), number))
            starts.append(at)
            first = index
    pieces.append(Piece(samples[starts[-1] :], " ".join(w.text for w in words[first:]), number))
    return pieces


def levels(samples: Audio) -> NDArray[np.float64]:
    """Level in dB every 10 ms, over 20 ms."""
    padded = np.pad(np.square(samples, dtype=np.float64), (HOP // 2, HOP + HOP // 2))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP]
    return np.asarray(10 * np.log10(frames.mean(axis=1) + 1e-10))


def write(pieces: dict[str, list[Piece]], out: Path, seconds: float, rng: np.random.Generator) -> None:
    """Join at random until there are so many seconds; voices in proportion to what they have."""
    out.mkdir(parents=True, exist_ok=True)
    voices = [voice for voice in pieces if len({piece.source for piece in pieces[voice]}) > 1]
    weights = np.array([len(pieces[voice]) for voice in voices], np.float64)
    rows: list[str] = []
    made = 0.0
    while made < seconds:
        voice = voices[int(rng.choice(len(voices), p=weights / weights.sum()))]
        samples, text = join(pieces[voice], rng)
        name = f"{len(rows):06d}.flac"
        soundfile.write(out / name, samples, RATE)
        duration = round(len(samples) / RATE, 3)
        rows.append(json.dumps({"audio_filepath": name, "duration": duration, "text": text, "speaker": voice}))
        made += duration
    (out / "manifest.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} utterances, {made / 3600:.2f} h", file=sys.stderr)


def join(voice: Sequence[Piece], rng: np.random.Generator) -> tuple[Audio, str]:
    """Pieces of different utterances, one after the other, up to a random length."""
    wanted = rng.uniform(SHORTEST, LONGEST) * RATE
    result, words, last = np.zeros(0, np.float32), [], -1
    ramp = np.linspace(0, 1, FADE, dtype=np.float32)
    for index in rng.permutation(len(voice)):
        piece = voice[int(index)]
        if piece.source == last:
            continue
        samples = piece.samples * np.float32(0.05 / (np.sqrt(np.mean(np.square(piece.samples))) + 1e-6))
        if len(result) and len(result) + len(samples) > LONGEST * RATE:
            continue
        samples[:FADE] *= ramp
        samples[-FADE:] *= ramp[::-1]
        result = np.concatenate([result, samples])
        words.append(piece.text)
        last = piece.source
        if len(result) >= wanted:
            break
    peak = float(np.abs(result).max(initial=0))
    return result * np.float32(min(1.0, 0.95 / (peak + 1e-9))), " ".join(words)


if __name__ == "__main__":
    main()
