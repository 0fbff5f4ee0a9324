"""The training loop: CTC, AdamW, NovoGrad or Muon, EMA, bf16 autocast, several processes under torchrun, exact resume.

Nothing random lives outside a batch: the order of an epoch depends on (seed, epoch), augmentation and dropout of a
step on (seed, step). So a run that was killed and resumed takes the very same steps as one that was not.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_asr import text
from jasper_asr.config import ModelConfig
from jasper_asr.errors import ModelError, UsageError
from jasper_asr.model.net import Jasper
from jasper_asr.model.net_spectral import convolve
from jasper_asr.train.dataset import Batch, BatchPlan, FeatureCache, make_batch
from jasper_asr.train.phonemes import WEIGHT, Lexicon, phoneme_targets

Report = Callable[[dict[str, float]], None]
Validate = Callable[[Path], float]


@dataclass(frozen=True)
class TrainOptions:
    """What `jasper train` can set. Learning rates follow a warm-up, then the schedule down to 1 % at the last step."""

    steps: int = 10_000
    batch_seconds: float = 128.0
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 1e-3
    warmup: int = 500
    schedule: str = "cosine"
    ema: float = 0.999
    clip: float = 1.0
    noise: float = 0.0
    rooms: float = 0.0
    consistency: float = 0.0
    average_steps: int = 0
    seed: int = 1
    bf16: bool = False
    workers: int = 2
    save_minutes: float = 3.0
    validate_steps: int = 1000

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "novograd", "muon"):
            raise UsageError(f"optimizer {self.optimizer!r}: use adamw, novograd or muon")
        if self.schedule not in ("cosine", "poly"):
            raise UsageError(f"schedule {self.schedule!r}: use cosine or poly")
        if self.steps < 1 or self.batch_seconds <= 0 or self.lr <= 0:
            raise UsageError("steps, batch-seconds and lr must be above 0")
        if self.average_steps < 0 or self.consistency < 0:
            raise UsageError("average-steps and consistency must be 0 or more")

    @property
    def views(self) -> int:
        """How often an utterance stands in a batch, augmented anew each time."""
        return 2 if self.consistency else 1


@dataclass
class TrainState:
    """Everything that a resume needs, and nothing else."""

    model: Jasper
    ema: Jasper
    phonemes: "PhonemeHead | None"
    optimizer: torch.optim.Optimizer
    step: int = 0
    best_wer: float = math.inf
    audio_seconds: float = 0.0


def train(
    config: ModelConfig,
    cache: FeatureCache,
    out: Path,
    options: TrainOptions,
    *,
    init: dict[str, Tensor] | None = None,
    lexicon: Lexicon | None = None,
    validate: Validate | None = None,
    report: Report | None = None,
) -> TrainState:
    """Train until `options.steps`, from `out/last.pt` if it exists, else from `init` or from scratch.

    With a `lexicon` the encoder learns its phonemes too, see `train.phonemes`.

    Writes `last.pt` every `save_minutes` and at the end, `best.pt` whenever `validate(checkpoint path)` returns a new
    lowest WER (percent), and one line a report to `log.jsonl`. Raises ModelError when the loss is not finite.
    """
    rank, world = join_processes()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(options.seed)
    state = _initial_state(config, options, device, init, lexicon)
    last = out / "last.pt"
    if last.exists():
        load_state(last, state, device)
    network: nn.Module = _Heads(state.model, state.phonemes)
    apart = world > 1 and options.average_steps > 0
    if world > 1 and not apart:
        network = nn.parallel.DistributedDataParallel(network)
    out.mkdir(parents=True, exist_ok=True)
    meter, saved_at = _Meter(), time.monotonic()
    with ThreadPoolExecutor(options.workers) as pool:
        for batch in _batches(cache, config, options, state.step, rank, world, pool):
            losses = _step(network, state, batch, options, device, rank)
            state.audio_seconds += batch.seconds * world  # the others' batches are as large, but for padding
            meter.add(losses, batch.seconds * world)
            done = state.step == options.steps
            judged = validate is not None and (state.step % options.validate_steps == 0 or done)
            together = not apart or done or judged or state.step % options.average_steps == 0
            if apart and together:
                average_state(state, world)
            if rank == 0 and (meter.count == 50 or done):
                row = meter.row(state, options)
                _append(out / "log.jsonl", row)
                if report:
                    report(row)
            if rank == 0 and validate and judged:
                _validate(config, state, out, validate, report)
            if rank == 0 and together and (time.monotonic() - saved_at > options.save_minutes * 60 or done):
                save_state(last, config, state)
                saved_at = time.monotonic()
    return state


def join_processes() -> tuple[int, int]:
    """(rank, world size); joins the process group, once, when torchrun started us."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", "0")), world


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up to `lr`, then a cosine or a quadratic polynomial down to 1 % of it at `options.steps`."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = min(1.0, (step - options.warmup) / max(1, options.steps - options.warmup))
    shape = (1 + math.cos(math.pi * progress)) / 2 if options.schedule == "cosine" else (1 - progress) ** 2
    return options.lr * (0.01 + 0.99 * shape)


@torch.no_grad()
def average_state(state: TrainState, world: int) -> None:
    """Set all that is trained to its mean over the processes: weights, EMA, norms' statistics, the optimizer's moments.

    Local SGD (Stich, arXiv 1805.09767): processes train apart and meet every `average_steps`, so that they neither wait
    for one another nor send gradients in every step.
    """
    modules = [state.model, state.ema, *([state.phonemes] if state.phonemes else [])]
    values = [value for module in modules for value in module.state_dict().values()]
    values += [value for one in state.optimizer.state.values() for value in one.values() if torch.is_tensor(value)]
    for value in values:
        if value.is_floating_point():
            torch.distributed.all_reduce(value)
            value /= world


def save_state(path: Path, config: ModelConfig, state: TrainState) -> None:
    """A checkpoint in NVIDIA's layout, with our config and counters beside; written whole or not at all."""
    saved: dict[str, Any] = {
        "step": state.step,
        "best_wer": state.best_wer,
        "audio_seconds": state.audio_seconds,
        "config": json.dumps(config.raw),
        "state_dict": state.model.state_dict(),
        "ema_state_dict": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    if state.phonemes is not None:
        saved["phonemes"] = list(state.phonemes.lexicon.symbols)
        saved["phoneme_head"] = state.phonemes.state_dict()
    temporary = path.with_name(path.name + ".part")
    torch.save(saved, temporary)
    os.replace(temporary, path)


def load_state(path: Path, state: TrainState, device: torch.device) -> None:
    """Restore what `save_state` wrote. Raises ModelError when it belongs to another network."""
    saved = torch.load(path, map_location=device, weights_only=True)
    phonemes = list(state.phonemes.lexicon.symbols) if state.phonemes else None
    if saved.get("phonemes") != phonemes:
        raise ModelError(f"{path}: cannot resume from it (it was trained with other phonemes); give its own --lexicon")
    try:
        if state.phonemes is not None:
            state.phonemes.load_state_dict(saved["phoneme_head"])
        state.model.load_state_dict(saved["state_dict"])
        state.ema.load_state_dict(saved["ema_state_dict"])
        state.optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: cannot resume from it ({cause}); choose another --out") from error
    state.step, state.best_wer = saved["step"], saved["best_wer"]
    state.audio_seconds = saved["audio_seconds"]


class PhonemeHead(nn.Module):
    """What a block part of the way up the encoder says of a lexicon's phonemes: [B, C, T'] -> log_probs [B, T', P]."""

    def __init__(self, config: ModelConfig, lexicon: Lexicon) -> None:
        super().__init__()
        self.lexicon = lexicon
        self.block = max(0, len(config.blocks) * 5 // 8 - 1)  # the blocks after it are left to spell
        self.layer = nn.Conv1d(config.blocks[self.block].filters, lexicon.n_classes, 1)
        nn.init.xavier_uniform_(self.layer.weight)

    def forward(self, values: Tensor) -> Tensor:
        return F.log_softmax(convolve(self.layer, values).transpose(1, 2).float(), dim=2)


class NovoGrad(torch.optim.Optimizer):
    """Ginsburg et al., "Stochastic gradient methods with layer-wise adaptive moments", arXiv 1905.11286, algorithm 1.

    The second moment is one number a tensor: the norm of its gradient.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.95, 0.25), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                squared = parameter.grad.square().sum()
                second = squared if not state else beta2 * state["second"] + (1 - beta2) * squared
                scaled = parameter.grad / (second.sqrt() + group["eps"]) + group["weight_decay"] * parameter
                moment = scaled if not state else beta1 * state["moment"] + scaled
                state["second"], state["moment"] = second, moment
                parameter -= group["lr"] * moment


class Muon(torch.optim.Optimizer):
    """Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), for convolutions.

    The momentum of a weight, as a matrix [out, in * kernel], is replaced by its nearest semi-orthogonal matrix, scaled
    to the root mean square that AdamW's updates have (0.2: Liu et al., arXiv 2502.16982), so that one learning rate
    serves both. Groups with "orthogonal": False take AdamW's step: vectors and the decoder.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, bf16: bool = False) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "orthogonal": True})
        self.bf16 = bf16

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            update = self._orthogonal if group["orthogonal"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = update(parameter.grad, self.state[parameter], group["momentum"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])

    def _orthogonal(self, gradient: Tensor, state: dict[str, Any], momentum: float) -> Tensor:
        if not state:
            state["moment"] = torch.zeros_like(gradient)
        state["moment"].lerp_(gradient, 1 - momentum)
        matrix = gradient.lerp(state["moment"], momentum).flatten(1)  # Nesterov
        return orthogonalized(matrix, self.bf16).mul_(0.2 * max(matrix.shape) ** 0.5).view_as(gradient)

    def _adam(self, gradient: Tensor, state: dict[str, Any], _momentum: float) -> Tensor:
        beta1, beta2 = 0.9, 0.99
        if not state:
            state.update(step=0, moment=torch.zeros_like(gradient), second=torch.zeros_like(gradient))
        state["step"] += 1
        mean: Tensor = state["moment"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"])
        second: Tensor = state["second"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2 ** state["step"])
        return mean.div_(second.sqrt_().add_(1e-8))


def orthogonalized(matrix: Tensor, bf16: bool = False) -> Tensor:
    """[m, n] -> [m, n] with the same singular vectors and all singular values near 1 (0.7 to 1.2).

    Five Newton-Schulz steps X <- (a + b XX' + c (XX')^2) X with Jordan's coefficients. They are taken on the small
    Gram matrix: every step multiplies X from the left by a polynomial of it, so the long side enters only twice.
    With `bf16` these two products may round what they multiply to bfloat16, as torch thinks fit: half the time on a CPU
    with AVX-512. The small ones may not, for rounding makes eigenvalues of a Gram matrix negative, and these explode.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    with _matmul_precision("medium" if bf16 else "highest"):
        gram = wide @ wide.T
    product = factor = _polynomial(gram)
    for _ in range(4):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    with _matmul_precision("medium" if bf16 else "highest"):
        result: Tensor = product @ wide
    return result if matrix.shape[0] <= matrix.shape[1] else result.T


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _polynomial(gram: Tensor) -> Tensor:
    factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal().add_(3.4445)
    return factor


class _Meter:
    """Means over the steps since the last report."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.count, self.seconds, self.started = 0, 0.0, time.monotonic()
        self.losses: dict[str, float] = {}

    def add(self, losses: dict[str, float], seconds: float) -> None:
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + loss

    def row(self, state: TrainState, options: TrainOptions) -> dict[str, float]:
        row = {
            "step": state.step,
            **{name: round(total / self.count, 4) for name, total in self.losses.items()},
            "lr": float(f"{learning_rate(state.step, options):.3e}"),
            "audio_hours": round(state.audio_seconds / 3600, 3),
            "times_real_time": round(self.seconds / (time.monotonic() - self.started), 1),
        }
        self._reset()
        return row


class _Heads(nn.Module):
    """The network with the phoneme head: one module, so that several processes share the gradients of both."""

    def __init__(self, model: Jasper, phonemes: PhonemeHead | None) -> None:
        super().__init__()
        self.model, self.phonemes = model, phonemes

    def forward(self, features: Tensor, lens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(log_probs, lens) of the letters, then of the phonemes if they are asked for."""
        outputs = self.model.encode(features, lens)
        found = [(self.model.decode(outputs[-1][0]), outputs[-1][1])]
        if self.phonemes is not None:
            values, lens = outputs[self.phonemes.block]
            found.append((self.phonemes(values), lens))
        return found


def _step(
    network: nn.Module, state: TrainState, batch: Batch, options: TrainOptions, device: torch.device, rank: int
) -> dict[str, float]:
    torch.manual_seed((options.seed * 1_000_003 + state.step) * 1009 + rank)  # dropout
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, options)
    network.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        heads = network(torch.from_numpy(batch.features).to(device), torch.from_numpy(batch.lens).to(device))
    config, (log_probs, lens) = state.model.config, heads[0]
    losses = {"loss": _ctc(log_probs, lens, batch.targets, batch.target_lens, config.blank_id)}
    if batch.views > 1:
        losses["consistency_loss"] = _consistency_loss(log_probs, lens, int(batch.target_lens.sum()))
    if state.phonemes is not None:
        log_probs, lens = heads[1]
        losses["phoneme_loss"] = _phoneme_loss(log_probs, lens, batch, state.phonemes.lexicon, config)
    total = losses["loss"] + WEIGHT * losses.get("phoneme_loss", 0.0)
    total = total + options.consistency * losses.get("consistency_loss", 0.0)
    state.optimizer.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(network.parameters(), options.clip)
    if not torch.isfinite(norm):
        raise ModelError(f"step {state.step}: the loss or its gradient is not finite; lower --lr or raise --warmup")
    state.optimizer.step()
    state.step += 1
    _update_ema(state, options.ema)
    return {name: float(loss.detach()) for name, loss in losses.items()}


def _ctc(
    log_probs: Tensor, lens: Tensor, targets: NDArray[np.int64], target_lens: NDArray[np.int64], blank: int
) -> Tensor:
    """CTC loss in nats a label, so that long and short batches weigh alike."""
    device = log_probs.device
    wanted = torch.from_numpy(targets).to(device), lens, torch.from_numpy(target_lens).to(device)
    losses = F.ctc_loss(log_probs.transpose(0, 1), *wanted, blank=blank, reduction="sum")
    return losses / int(target_lens.sum())


def _phoneme_loss(log_probs: Tensor, lens: Tensor, batch: Batch, lexicon: Lexicon, config: ModelConfig) -> Tensor:
    """CTC loss in nats a phoneme, of the utterances that `phoneme_targets` keeps."""
    ends = np.cumsum(batch.target_lens)[:-1]
    texts = [text.decode_ids(row, config.labels) for row in np.split(batch.targets, ends)]
    spoken = phoneme_targets(lexicon, texts, lens.tolist())
    if not len(spoken.rows):
        return log_probs.sum() * 0.0  # still a gradient, for other processes wait for one
    rows = torch.from_numpy(spoken.rows).to(log_probs.device)
    return _ctc(log_probs[rows], lens[rows], spoken.targets, spoken.target_lens, lexicon.n_classes - 1)


def _consistency_loss(log_probs: Tensor, lens: Tensor, labels: int) -> Tensor:
    """How far two views of an utterance, the halves of a batch, are from one another, in nats a label of both.

    Yao et al., "CR-CTC: consistency regularization on CTC for improved speech recognition", arXiv 2410.05101:
    Kullback-Leibler divergences frame by frame, each view's from the other as a fixed target, summed.
    """
    other = log_probs.detach().roll(len(log_probs) // 2, 0)
    divergence = (other.exp() * (other - log_probs)).sum(2)
    valid = torch.arange(log_probs.shape[1], device=lens.device) < lens[:, None]
    return divergence[valid].sum() / labels


@torch.no_grad()
def _update_ema(state: TrainState, decay: float) -> None:
    decay = min(decay, (1 + state.step) / (10 + state.step))  # the first steps are forgotten fast
    for mean, value in zip(state.ema.state_dict().values(), state.model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _batches(
    cache: FeatureCache,
    config: ModelConfig,
    options: TrainOptions,
    step: int,
    rank: int,
    world: int,
    pool: ThreadPoolExecutor,
) -> Iterator[Batch]:
    """Batches of steps `step` to `options.steps`, made ahead by `pool`, in order."""
    hop_seconds = config.features.hop_length / config.features.sample_rate
    plan = BatchPlan(cache.frames, int(options.batch_seconds / options.views / hop_seconds), options.seed)
    make = partial(make_batch, noise=options.noise, rooms=options.rooms, views=options.views)
    pending: list[Future[Batch]] = []
    for number, indices in _schedule(plan, step, options.steps, rank, world):
        rng = np.random.default_rng([options.seed, number, rank])
        pending.append(pool.submit(make, cache, indices, config, rng))
        if len(pending) > 2 * options.workers:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def _schedule(plan: BatchPlan, first: int, steps: int, rank: int, world: int) -> Iterator[tuple[int, Any]]:
    """(step, utterance indices) from step `first` on; in each step the ranks take neighbouring batches of the epoch."""
    step, epoch = 0, 0
    while step < steps:
        batches = plan.epoch(epoch)
        per_rank = max(1, len(batches) // world)
        for index in range(per_rank):
            if first <= step < steps:
                yield step, batches[(index * world + rank) % len(batches)]
            step += 1
        epoch += 1


def _initial_state(
    config: ModelConfig,
    options: TrainOptions,
    device: torch.device,
    init: dict[str, Tensor] | None,
    lexicon: Lexicon | None,
) -> TrainState:
    model, ema = Jasper(config).to(device), Jasper(config).to(device)
    phonemes = PhonemeHead(config, lexicon).to(device) if lexicon else None
    if init is not None:
        model.load_state_dict(init)
    ema.load_state_dict(model.state_dict())
    ema.eval().requires_grad_(False)
    return TrainState(model, ema, phonemes, _optimizer(model, phonemes, options))


def _optimizer(model: Jasper, phonemes: PhonemeHead | None, options: TrainOptions) -> torch.optim.Optimizer:
    heads: list[nn.Module] = [model.decoder, *([phonemes] if phonemes else [])]
    hidden = [p for p in model.encoder.parameters() if p.ndim > 1]
    decoder = [p for head in heads for p in head.parameters() if p.ndim > 1]
    vectors = [p for part in (model.encoder, *heads) for p in part.parameters() if p.ndim <= 1]
    if options.optimizer == "muon":
        kinds = ((hidden, options.weight_decay, True), (decoder, options.weight_decay, False), (vectors, 0.0, False))
        return Muon(
            [{"params": p, "weight_decay": decay, "orthogonal": o} for p, decay, o in kinds],
            lr=options.lr,
            bf16=options.bf16,
        )
    groups = [
        {"params": hidden + decoder, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if options.optimizer == "novograd":
        return NovoGrad(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr)


def _validate(config: ModelConfig, state: TrainState, out: Path, validate: Validate, report: Report | None) -> None:
    candidate = out / "candidate.pt"
    save_state(candidate, config, state)
    wer = validate(candidate)
    row = {"step": state.step, "dev_wer": round(wer, 2)}
    _append(out / "log.jsonl", row)
    if report:
        report(row)
    if wer < state.best_wer:
        state.best_wer = wer
        save_state(candidate, config, state)
        os.replace(candidate, out / "best.pt")
    candidate.unlink(missing_ok=True)


def _append(path: Path, row: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")
