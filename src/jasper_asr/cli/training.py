"""`jasper train`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jasper_asr.cli.common import Variadic, named_config, note, progress, read_manifests
from jasper_asr.config import ModelConfig
from jasper_asr.data.manifest import Utterance
from jasper_asr.errors import ManifestError

if TYPE_CHECKING:
    from jasper_asr.train.phonemes import Lexicon


@click.command(cls=Variadic)
@click.option("--config", required=True, help="Model YAML, or the name of a built-in one.")
@click.option(
    "--train",
    "train_manifests",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Repeatable.",
)
@click.option("--dev", "dev_manifests", multiple=True, type=click.Path(path_type=Path), help="One or more manifests.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder; a run in it is resumed.")
@click.option("--init", type=click.Path(path_type=Path), help="Start from this checkpoint, or mini: fine-tuning.")
@click.option(
    "--lexicon",
    type=click.Path(path_type=Path),
    help="Words and their phonemes, in Kaldi's layout: the encoder learns these too.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for computed features (default: --out).")
@click.option("--audio-root", type=click.Path(path_type=Path))
@click.option("--allow-outside-root", is_flag=True)
@click.option("--steps", default=10_000, show_default=True)
@click.option("--batch-seconds", default=128.0, show_default=True, help="Audio in a batch, padding included.")
@click.option("--optimizer", type=click.Choice(["adamw", "novograd", "muon"]), default="adamw", show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--weight-decay", default=1e-3, show_default=True)
@click.option("--warmup", default=500, show_default=True, help="Steps.")
@click.option("--schedule", type=click.Choice(["cosine", "poly"]), default="cosine", show_default=True)
@click.option("--ema", default=0.999, show_default=True)
@click.option("--noise", default=0.0, show_default=True, help="Share of utterances that get noise added.")
@click.option("--rooms", default=0.0, show_default=True, help="Share of utterances that get a room added.")
@click.option(
    "--consistency",
    default=0.0,
    show_default=True,
    help="Weight of the agreement of two augmentations of each utterance (CR-CTC); 0: each stands once in a batch.",
)
@click.option(
    "--average-steps",
    default=0,
    show_default=True,
    help="Under torchrun, train apart and average the weights every so many steps; 0: average gradients in each.",
)
@click.option("--seed", default=1, show_default=True)
@click.option("--bf16", is_flag=True, help="Autocast to bfloat16.")
@click.option("--workers", default=2, show_default=True, help="Threads that prepare batches.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch on the CPU.")
@click.option("--save-minutes", default=3.0, show_default=True)
@click.option("--validate-steps", default=1000, show_default=True)
def train(
    config: str,
    train_manifests: tuple[Path, ...],
    dev_manifests: tuple[Path, ...],
    out: Path,
    init: Path | None,
    lexicon: Path | None,
    cache: Path | None,
    audio_root: Path | None,
    allow_outside_root: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Train or fine-tune a model with CTC; run it again to resume. Under torchrun it trains on several devices."""
    model_config = named_config(config)
    dataset = model_config.train_dataset
    only_original = dataset is None or dataset.ignore_offline_speed_perturbation
    speed = 1.0 if only_original else None  # None: the speeds that an NVIDIA manifest lists are utterances too
    manifests = [read_manifests((path,), audio_root, allow_outside_root, speed) for path in train_manifests]
    dev = read_manifests(dev_manifests, audio_root, allow_outside_root)

    spoken = _lexicon(lexicon, manifests, model_config) if lexicon else None

    import torch  # seconds, which a wrong path above should not cost

    from jasper_asr.train.loop import TrainOptions
    from jasper_asr.train.run import run_training

    if threads:
        torch.set_num_threads(threads)
    settings = TrainOptions(**options)
    with progress("features", None, "utterances") as advance:
        state, skipped = run_training(
            model_config,
            manifests,
            dev,
            out,
            settings,
            init=init,
            lexicon=spoken,
            cache_dir=cache,
            report=lambda row: click.echo(json.dumps(row), err=True),
            progress=lambda _done, _total: advance(1),
        )
    for row in skipped[:10]:
        note(f"left out {row.audio_filepath}: {row.reason}")
    if len(skipped) > 10:
        note(f"left out {len(skipped) - 10} more")
    click.echo(str(out / ("best.pt" if dev else "last.pt")))
    note(
        f"{state.step} steps, {state.audio_seconds / 3600:.1f} h of audio"
        + (f", dev WER {state.best_wer:.2f} %" if dev else "")
    )


def _lexicon(path: Path, manifests: Sequence[Sequence[Utterance]], config: ModelConfig) -> "Lexicon":
    """The lexicon, with a note of the words of the transcripts that it lacks. Raises ManifestError if it lacks all."""
    from jasper_asr.train.dataset import spelt
    from jasper_asr.train.phonemes import read_lexicon

    lexicon = read_lexicon(path)
    texts = [spelt(row.text, config) for rows in manifests for row in rows if row.text]
    words = {word for text in texts for word in text.split()}
    missing = sorted(words - lexicon.words.keys())
    if words and len(missing) == len(words):  # no words at all: the training says so
        raise ManifestError(f"{path}: has none of the {len(words)} words of the transcripts; is it of this language?")
    if missing:
        note(
            f"{path}: lacks {len(missing)} of {len(words)} words ({', '.join(missing[:3])}); "
            "utterances with these learn letters only"
        )
    return lexicon
