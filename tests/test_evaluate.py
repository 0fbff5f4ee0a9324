import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from helpers_audio import tiny_config
from jasper_asr.data.manifest import Utterance, read_manifest
from jasper_asr.errors import AudioError, ManifestError, StorageError, UsageError
from jasper_asr.evaluate import ErrorReport, Gate, Item, evaluate, write_predictions, write_report
from jasper_asr.transcribe import Clip, Failure, Transcript


class Fake:
    """A transcriber that knows what each file holds: text by file name, or an error."""

    words = False

    def __init__(self, answers, normalize=True):
        self.config = replace(tiny_config(), dataset=replace(tiny_config().dataset, normalize_transcripts=normalize))
        self.answers = answers
        self.clips = []

    def transcribe_many(self, clips, *, progress=None, jobs=0):
        for clip in clips:
            self.clips.append(clip)
            answer = self.answers[clip.source.name]
            if progress:
                progress(2.0)
            yield Failure(answer) if isinstance(answer, Exception) else Transcript(answer, 2.0)


def utterance(name, text="a b c", duration=2.0, **more):
    return Utterance(Path("/audio") / name, f"wav/{name}", text, duration, source="m.json:1", **more)


def scored(*pairs, **options):
    """The report of (reference, hypothesis) pairs; a hypothesis may be an error."""
    rows = [utterance(f"{i}.wav", reference) for i, (reference, _) in enumerate(pairs)]
    return evaluate(Fake({f"{i}.wav": hypothesis for i, (_, hypothesis) in enumerate(pairs)}), rows, **options)


def distance(reference, hypothesis):
    """Levenshtein's, by his recurrence."""
    row = list(range(len(hypothesis) + 1))
    for i, token in enumerate(reference, 1):
        above, row = row, [i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (token != other)))
    return row[-1]


UNREADABLE = AudioError("2.wav: holds no samples; record it again")


# --- numbers ----------------------------------------------------------------------


def test_a_hand_counted_corpus():
    report = scored(
        ("the cat sat", "the cat sat"),
        ("a b c d", "a x c d e"),  # one substitution, one insertion
        ("one two three", "three"),  # two deletions
        ("hello", ""),  # one deletion
    )
    assert (report.words, report.errors) == (11, 5)
    assert (report.substitutions, report.insertions, report.deletions) == (1, 1, 3)
    assert report.wer == pytest.approx(100 * 5 / 11, abs=1e-9)
    # characters: 0; b -> x and " e" (3); "one two " (8); "hello" (5), of 11 + 7 + 13 + 5
    assert report.cer == pytest.approx(100 * 16 / 36, abs=1e-9)
    assert [item.wer for item in report.items] == [0.0, 50.0, 66.67, 100.0]
    assert (report.utterances, report.failed, report.skipped, report.audio_seconds) == (4, 0, 0, 8.0)
    assert report.items[1] == Item("wav/1.wav", 2.0, "a b c d", "a x c d e", 50.0, 1, 0, 1, None)
    assert report.rtf == report.seconds / 8.0 >= 0


def test_totals_are_the_sums_of_the_items_and_the_rates_are_not_their_mean():
    rng = random.Random(1)
    pairs = [
        (" ".join(rng.choices("abcd", k=rng.randint(1, 12))), " ".join(rng.choices("abcd", k=rng.randint(0, 12))))
        for _ in range(200)
    ]
    report = scored(*pairs)
    for key in ("insertions", "deletions", "substitutions"):
        assert getattr(report, key) == sum(getattr(item, key) for item in report.items)
    assert report.errors == report.insertions + report.deletions + report.substitutions
    assert report.errors == sum(distance(reference.split(), hypothesis.split()) for reference, hypothesis in pairs)
    assert report.words == sum(len(reference.split()) for reference, _ in pairs)
    assert report.wer == pytest.approx(100 * report.errors / report.words, abs=1e-9)
    assert report.cer == pytest.approx(
        100 * sum(distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs), abs=1e-9
    )
    assert abs(report.wer - sum(item.wer for item in report.items) / 200) > 0.5


def test_a_failed_utterance_counts_as_failed_and_in_no_rate():
    report = scored(("a b", "a b"), ("c d", "c x"), ("e f", UNREADABLE))
    assert (report.utterances, report.failed, report.words, report.errors, report.wer) == (2, 1, 4, 1, 25.0)
    assert report.audio_seconds == 4.0
    assert report.items[2] == Item("wav/2.wav", 2.0, "e f", None, None, error=str(UNREADABLE))


def test_when_all_failed_nothing_looks_right():
    report = scored(("a", UNREADABLE))
    assert (report.wer, report.cer, report.utterances, report.failed) == (100.0, 100.0, 0, 1)
    assert math.isnan(report.rtf)


def test_words_against_an_empty_reference():
    report = scored(("", "a b"), ("c", "c"))
    assert (report.insertions, report.words, report.wer) == (2, 1, 200.0)
    assert report.items[0].wer == 100.0
    assert scored(("", "a")).wer == 100.0
    assert scored(("", "")).wer == 0.0


# --- rows -------------------------------------------------------------------------


def test_references_are_normalised_unless_the_config_says_no():
    rows = [utterance("a.wav", "Dr. Smith paid 20, didn't he?")]
    hypothesis = "doctor smith paid twenty didn't he"
    report = evaluate(Fake({"a.wav": hypothesis}), rows)
    assert report.items[0].reference == hypothesis
    assert report.wer == 0.0
    raw = evaluate(Fake({"a.wav": hypothesis}, normalize=False), rows)
    assert raw.items[0].reference == "Dr. Smith paid 20, didn't he?"
    assert raw.errors == 4


def test_nvidia_and_nemo_manifests_give_the_same(tmp_path):
    rows = [("a.wav", 1.5, "Hello, you"), ("b.wav", 2.5, "the end")]
    nvidia, nemo = tmp_path / "nvidia.json", tmp_path / "nemo.json"
    nvidia.write_text(
        json.dumps([{"transcript": t, "files": [{"fname": f, "duration": d, "speed": 1.0}]} for f, d, t in rows])
    )
    nemo.write_text("\n".join(json.dumps({"audio_filepath": f, "duration": d, "text": t}) for f, d, t in rows))
    answers = {"a.wav": "hello you", "b.wav": "the and"}
    first, second = (evaluate(Fake(answers), read_manifest(path)) for path in (nvidia, nemo))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert (first.words, first.errors, first.wer) == (4, 1, 25.0)


def test_too_long_utterances_are_skipped_and_counted():
    rows = [utterance("0.wav", duration=1.0), utterance("1.wav", duration=16.7), utterance("2.wav", duration=16.71)]
    rows.append(utterance("3.wav", duration=None))
    fake = Fake(dict.fromkeys(("0.wav", "1.wav", "2.wav", "3.wav"), "a b c"))
    report = evaluate(fake, rows, max_duration=16.7)
    assert (report.skipped, report.utterances, len(report.items)) == (1, 3, 3)
    assert [item.audio_filepath for item in report.items] == ["wav/0.wav", "wav/1.wav", "wav/3.wav"]
    assert evaluate(fake, rows).skipped == 0


def test_offsets_cut_the_file_and_rows_without_one_take_it_whole():
    fake = Fake({"a.wav": "a b c"})
    parts = [utterance("a.wav", offset=offset, duration=0.5) for offset in (1.5, 0.0, None)]
    evaluate(fake, parts)
    path = Path("/audio/a.wav")
    assert fake.clips == [Clip(path, 1.5, 0.5), Clip(path, 0.0, 0.5), Clip(path, 0.0, None)]


def test_progress_is_passed_on():
    steps = []
    scored(("a", "a"), ("b", UNREADABLE), progress=steps.append)
    assert steps == [2.0, 2.0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [utterance("a.wav"), replace(utterance("b.wav"), text=None, source="m.json:7")],
            {},
            "m.json:7: key text is missing; evaluation needs a transcript",
        ),
        (
            [utterance("a.wav", duration=9.0)],
            {"max_duration": 8.0},
            "m.json: no utterance to evaluate; is --max-duration too small?",
        ),
        ([], {}, "manifest: no utterance to evaluate; is --max-duration too small?"),
    ],
)
def test_manifests_that_cannot_be_scored(rows, options, message):
    fake = Fake({})
    with pytest.raises(ManifestError) as caught:
        evaluate(fake, rows, **options)
    assert str(caught.value) == message
    assert fake.clips == []


# --- the gate ---------------------------------------------------------------------


def report_with(wer, failed=0, utterances=10):
    return ErrorReport(wer, wer, 1000, 0, 0, 0, 0, utterances, failed, 0, 10.0, 1.0, ())


@pytest.mark.parametrize(
    ("wer", "reference", "tolerance", "holds"),
    [
        (3.20, 3.20, 0.01, True),
        (3.232, 3.20, 0.01, True),
        (3.2321, 3.20, 0.01, False),
        (3.24, 3.20, 0.01, False),
        (0.0, 3.20, 0.01, True),
        (3.20, 3.20, 0.0, True),
        (3.2001, 3.20, 0.0, False),
        (4.80, 3.20, 0.5, True),
        (4.81, 3.20, 0.5, False),
        (0.0, 0.0, 0.01, True),
        (0.01, 0.0, 0.01, False),
    ],
)
def test_the_tolerance_is_relative(wer, reference, tolerance, holds):
    assert Gate(reference, tolerance).holds(report_with(wer)) is holds
    assert Gate(reference, tolerance).limit == pytest.approx(reference * (1 + tolerance))


def test_the_gate_sees_the_rate_before_rounding():
    """3234 errors in 100,000 words print as 3.23 and are above 3.232."""
    references = ["a " * 1000] * 100
    hypotheses = ["a " * (1000 - (33 if i < 34 else 32)) for i in range(100)]
    report = scored(*zip(references, hypotheses, strict=True))
    assert report.errors == 3234
    assert f"{report.wer:.2f}" == "3.23"
    assert not Gate(3.20).holds(report)
    assert Gate(3.234 / 1.01).holds(report)


def test_failed_items_fail_the_gate_whatever_the_rate():
    assert Gate(50.0).holds(scored(("a b", "a b")))
    assert not Gate(50.0).holds(scored(("a b", "a b"), ("a b", "a b"), ("c", UNREADABLE)))
    assert not Gate(100.0).holds(scored(("a", UNREADABLE)))
    assert not Gate(100.0).holds(report_with(0.0, utterances=0))


@pytest.mark.parametrize(
    ("reference", "tolerance", "message"),
    [
        (math.nan, 0.01, "reference WER nan: must be a percentage of at least 0"),
        (math.inf, 0.01, "reference WER inf: must be a percentage of at least 0"),
        (-1.0, 0.01, "reference WER -1.0: must be a percentage of at least 0"),
        (3.2, math.nan, "tolerance nan: must be a fraction of at least 0, such as 0.01"),
        (3.2, -0.01, "tolerance -0.01: must be a fraction of at least 0, such as 0.01"),
    ],
)
def test_gates_that_cannot_be(reference, tolerance, message):
    with pytest.raises(UsageError) as caught:
        Gate(reference, tolerance)
    assert str(caught.value) == message


# --- files ------------------------------------------------------------------------


def test_the_report_has_the_promised_keys(tmp_path):
    report = scored(("a b", "a b"), ("c d", "c x"), ("e f", UNREADABLE))
    write_report(tmp_path / "r.json", report)
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    promised = {"wer", "cer", "words", "errors", "insertions", "deletions", "substitutions"}
    promised |= {"utterances", "failed", "audio_seconds", "seconds", "items"}
    assert promised <= set(written)
    assert (written["wer"], written["words"], written["failed"], written["audio_seconds"]) == (25.0, 4, 1, 4.0)
    assert written["items"][1] == {
        "audio_filepath": "wav/1.wav",
        "duration": 2.0,
        "reference": "c d",
        "hypothesis": "c x",
        "wer": 50.0,
        "insertions": 0,
        "deletions": 0,
        "substitutions": 1,
        "error": None,
    }
    assert written["items"][2]["error"] == str(UNREADABLE)
    assert written["items"][2]["hypothesis"] is None


def test_the_report_is_strict_json_even_when_nothing_worked(tmp_path):
    def refuse(name):
        raise AssertionError(name)

    write_report(tmp_path / "r.json", scored(("", "a"), ("b", UNREADABLE)))
    json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)


def test_predictions_are_in_the_order_of_the_manifest_with_an_empty_line_for_a_failure(tmp_path):
    path = tmp_path / "p.txt"
    write_predictions(path, scored(("a", "z é"), ("b", "a"), ("c", UNREADABLE), ("d", ""), ("e", "m")))
    assert path.read_bytes() == "z é\na\n\n\nm\n".encode()


@pytest.mark.parametrize("write", [write_report, write_predictions])
@pytest.mark.parametrize("step", ["os.replace", "pathlib.Path.open"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write, step):
    path = tmp_path / "out"
    path.write_text("old")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device", f"{path}.part")

    monkeypatch.setattr(step, full)
    with pytest.raises(StorageError) as caught:
        write(path, scored(("a", "a")))
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{path}: cannot be written (no space left on device); check the folder and free space"
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
