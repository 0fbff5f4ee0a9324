"""Manifest -> word and character error rates, one row an utterance, and the gate."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jasper_asr import text
from jasper_asr.calibrate import CalibrationReport
from jasper_asr.calibrate import calibration as calibrate
from jasper_asr.data.manifest import Utterance
from jasper_asr.errors import ManifestError, UsageError
from jasper_asr.files import write_whole
from jasper_asr.transcribe import Clip, Failure, Transcriber
from jasper_asr.wer import EditCounts, count_char_edits, count_word_edits


@dataclass(frozen=True)
class Item:
    """One utterance: `wer` in percent of its reference words; `error` says why there is no hypothesis."""

    audio_filepath: str
    duration: float | None
    reference: str
    hypothesis: str | None
    wer: float | None
    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0
    error: str | None = None


@dataclass(frozen=True)
class ErrorReport:
    """Totals over a corpus. Rates are percent of reference words or characters; failed utterances count in none.

    `utterances` is how many were transcribed; if none was, the rates are 100. `skipped` were over the duration limit.
    `calibration` is there when the Transcriber gives words.
    """

    wer: float
    cer: float
    words: int
    errors: int
    insertions: int
    deletions: int
    substitutions: int
    utterances: int
    failed: int
    skipped: int
    audio_seconds: float
    seconds: float
    items: tuple[Item, ...]
    calibration: CalibrationReport | None = None

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of work per second of audio."""
        return self.seconds / self.audio_seconds if self.audio_seconds else math.nan


@dataclass(frozen=True)
class Gate:
    """A reference WER (percent) and how far, relatively, the measured one may lie above it."""

    reference_wer: float
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.reference_wer) and self.reference_wer >= 0):
            raise UsageError(f"reference WER {self.reference_wer}: must be a percentage of at least 0")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise UsageError(f"tolerance {self.tolerance}: must be a fraction of at least 0, such as 0.01")

    @property
    def limit(self) -> float:
        """Highest WER, in percent, that passes."""
        return self.reference_wer * (1 + self.tolerance)

    def holds(self, report: ErrorReport) -> bool:
        """Whether nothing failed and the WER is within the limit. A WER below the reference passes."""
        return report.failed == 0 and report.utterances > 0 and report.wer <= self.limit + 1e-9


_READERS = 2
"""Utterances read ahead while the network runs: an Opus decoder takes nearly as long as `mini`."""


def evaluate(
    transcriber: Transcriber,
    utterances: Sequence[Utterance],
    *,
    max_duration: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> ErrorReport:
    """Transcribe all `utterances` and score them against their normalised transcripts.

    Those longer than `max_duration` seconds by their manifest are skipped, as NVIDIA's loader does. Raises
    ManifestError when a transcript is missing or nothing is left; an utterance that cannot be read is a failed item.
    """
    chosen = [row for row in utterances if max_duration is None or row.duration is None or row.duration <= max_duration]
    if not chosen:
        raise ManifestError(f"{_source(utterances)}: no utterance to evaluate; is --max-duration too small?")
    references = [reference_text(row, transcriber) for row in chosen]
    clips = [Clip(row.audio_path, *row.part) for row in chosen]
    started = time.perf_counter()
    results = list(transcriber.transcribe_many(clips, progress=progress, jobs=_READERS))
    seconds = time.perf_counter() - started
    items, words, chars = [], EditCounts(0, 0, 0, 0), EditCounts(0, 0, 0, 0)
    for row, reference, result in zip(chosen, references, results, strict=True):
        if isinstance(result, Failure):
            items.append(Item(row.audio_filepath, row.duration, reference, None, None, error=str(result.error)))
            continue
        counts = count_word_edits(reference, result.text)
        words, chars = words + counts, chars + count_char_edits(reference, result.text)
        items.append(_item(row, result.duration, reference, result.text, counts))
    done = [item for item in items if item.error is None]
    spoken = [
        (item.reference, result.words)
        for item, result in zip(items, results, strict=True)
        if not isinstance(result, Failure)
    ]
    return ErrorReport(
        wer=_percent(words) if done else 100.0,
        cer=_percent(chars) if done else 100.0,
        words=words.reference_length,
        errors=words.errors,
        insertions=words.insertions,
        deletions=words.deletions,
        substitutions=words.substitutions,
        utterances=len(done),
        failed=len(items) - len(done),
        skipped=len(utterances) - len(chosen),
        audio_seconds=math.fsum(item.duration or 0.0 for item in done),
        seconds=seconds,
        items=tuple(items),
        calibration=calibrate(spoken) if transcriber.words else None,
    )


def write_report(path: str | os.PathLike[str], report: ErrorReport) -> None:
    """The report as JSON, whole or not at all."""
    write_whole(Path(path), [(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n").encode()])


def write_predictions(path: str | os.PathLike[str], report: ErrorReport) -> None:
    """One hypothesis a line, in manifest order; an empty line for a failed utterance."""
    write_whole(Path(path), [("".join(f"{item.hypothesis or ''}\n" for item in report.items)).encode()])


def _item(row: Utterance, duration: float, reference: str, hypothesis: str, counts: EditCounts) -> Item:
    return Item(
        row.audio_filepath,
        round(duration, 6),
        reference,
        hypothesis,
        round(_percent(counts), 2),
        counts.insertions,
        counts.deletions,
        counts.substitutions,
    )


def _percent(counts: EditCounts) -> float:
    """Errors against no reference words at all count as 100 percent (JSON has no infinity)."""
    return 100 * counts.rate if math.isfinite(counts.rate) else 100.0


def reference_text(row: Utterance, transcriber: Transcriber) -> str:
    """A row's transcript, normalised if the model's config says so. Raises ManifestError where there is none."""
    if row.text is None:
        raise ManifestError(f"{row.source}: key text is missing; evaluation needs a transcript")
    if not transcriber.config.dataset.normalize_transcripts:
        return row.text
    return text.normalize_transcript(row.text, transcriber.config.labels)


def _source(utterances: Sequence[Utterance]) -> str:
    return utterances[0].source.rsplit(":", 1)[0] if utterances else "manifest"
