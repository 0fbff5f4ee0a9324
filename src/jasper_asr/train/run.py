"""`jasper train`: manifests in, checkpoints out; development WER comes from the same Transcriber that users run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jasper_asr.config import ModelConfig
from jasper_asr.data.manifest import Utterance
from jasper_asr.train.dataset import Progress, SkippedUtterance, build_cache
from jasper_asr.train.loop import Report, TrainOptions, TrainState, Validate, join_processes, train
from jasper_asr.train.phonemes import Lexicon


def run_training(
    config: ModelConfig,
    manifests: Sequence[Sequence[Utterance]],
    dev: Sequence[Utterance],
    out: Path,
    options: TrainOptions,
    *,
    init: Path | None = None,
    lexicon: Lexicon | None = None,
    cache_dir: Path | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> tuple[TrainState, list[SkippedUtterance]]:
    """Train on the utterances of `manifests`, validate on `dev`, write into `out`; see `train.loop.train`.

    Without `dev` there is no best.pt.
    `init` is any checkpoint that `load_checkpoint` reads, or `mini`; its weights must fit `config`.
    """
    rank, world = join_processes()
    if rank:
        torch.distributed.barrier()  # the first process computes the features, the others find them
    cache, skipped = build_cache(manifests, config, cache_dir or out, jobs=options.workers, progress=progress)
    if not rank and world > 1:
        torch.distributed.barrier()
    weights = _initial_weights(init, config) if init else None
    validate = _validator(dev) if dev else None
    return train(config, cache, out, options, init=weights, lexicon=lexicon, validate=validate, report=report), skipped


def _initial_weights(path: Path, config: ModelConfig) -> dict[str, Any]:
    from jasper_asr.model.checkpoint import load_checkpoint
    from jasper_asr.model.export import resolve_model

    checkpoint = load_checkpoint(resolve_model(path), config=config)
    tensors = {name: torch.from_numpy(values.copy()) for name, values in checkpoint.weights.items()}
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith("running_mean")]
    return tensors | {f"{name}num_batches_tracked": torch.tensor(0) for name in norms}


def _validator(dev: Sequence[Utterance]) -> Validate:
    def word_error_rate(checkpoint: Path) -> float:
        from jasper_asr import evaluate, transcribe

        with transcribe.load(checkpoint, batch_size=8) as transcriber:
            return evaluate.evaluate(transcriber, dev).wer

    return word_error_rate
