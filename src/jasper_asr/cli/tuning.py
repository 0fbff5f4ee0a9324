"""`jasper tune-lm`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jasper_asr.cli.common import complain, load_model, model_options, progress, read_manifests
from jasper_asr.errors import UsageError

if TYPE_CHECKING:
    from jasper_asr.beam import Trial
    from jasper_asr.lm import NgramModel


@click.command("tune-lm")
@click.argument("manifest", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options
@click.option(
    "--audio-root", type=click.Path(path_type=Path), help="Where the manifest's paths start (default: its folder)."
)
@click.option("--allow-outside-root", is_flag=True, help="Accept manifest paths that leave the root.")
@click.option("--format", "layout", type=click.Choice(["text", "json"]), default="text", show_default=True)
def tune_lm(
    manifest: tuple[Path, ...], audio_root: Path | None, allow_outside_root: bool, layout: str, **options: Any
) -> int:
    """Find the --lm-weight and --word-bonus that give the lowest word error rate on a manifest of transcribed speech.

    The network runs once; then some forty pairs are tried, first far apart, then around the best.
    """
    for name, flag in _SOUGHT.items():
        if options.pop(name):
            raise UsageError(f"{flag} does not go with tune-lm; leave it out")
    from jasper_asr import tune

    lm = _language_model(options)
    fixed = {name: options.pop(name) for name in ("beam_width", "unknown_penalty", "blank_penalty")}
    fixed = {name: value for name, value in fixed.items() if value is not None}
    rows = read_manifests(manifest, audio_root, allow_outside_root)
    with load_model(options | {"greedy": True}) as transcriber, progress("listening", len(rows), "clips") as advance:
        heard = tune.hear(transcriber, rows, progress=advance)
        labels = transcriber.config.labels
    for error in heard.errors:
        complain(error)
    trials = []
    with progress("searching", tune.MOST_TRIALS, "pairs") as advance:
        for trial in tune.search(heard, labels, lm, **fixed):
            trials.append(trial)
            advance(1)
    _print(trials, tune.best(trials), len(heard.references), len(heard.errors), layout)
    return 1 if heard.errors else 0


_SOUGHT = {"lm_weight": "--lm-weight", "word_bonus": "--word-bonus", "hotwords": "--hotword", "greedy": "--greedy"}


def _language_model(options: dict[str, Any]) -> "NgramModel":
    from jasper_asr.lm import NgramModel
    from jasper_asr.transcribe import BUILTIN_LMS

    name = options.pop("lm") or (options["model"] if options["model"] in BUILTIN_LMS else None)
    if name in (None, "none"):
        raise UsageError("tune-lm needs --lm, an n-gram model to weigh")
    return NgramModel.load(BUILTIN_LMS.get(name, Path(name)))


def _print(trials: "list[Trial]", best: "Trial", utterances: int, failed: int, layout: str) -> None:
    rows = [
        {"lm_weight": trial.lm_weight, "word_bonus": trial.word_bonus, "wer": round(100 * trial.wer, 4)}
        for trial in (best, *trials)
    ]
    if layout == "json":
        report = rows[0] | {"utterances": utterances, "failed": failed, "trials": rows[1:]}
        click.echo(json.dumps(report, indent=1))
        return
    click.echo("lm_weight  word_bonus    WER %")
    for row in sorted(rows[1:], key=lambda row: (row["lm_weight"], row["word_bonus"])):
        click.echo("{lm_weight:9.3f}  {word_bonus:10.2f}  {wer:7.2f}".format(**row))
    click.echo("\nbest: --lm-weight {lm_weight:g} --word-bonus {word_bonus:g}, WER {wer:.2f} %".format(**rows[0]))
