"""The sections that a language recipe and a detection recipe share: training, optimizer, schedule.

A field means the same in both kinds. Each kind may set other defaults, and says which fields it refuses, and why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tensorkeep.errors import TensorkeepError

Unit = Literal["updates", "epochs"]
_AT_LEAST_ONE = ("updates", "batch_size", "micro_batch", "log_every", "save_every", "evaluate_every", "keep_last")
_NOT_NEGATIVE = ("workers", "evaluate_from")


@dataclass(frozen=True)
class TrainingConfig:
    """How long a run trains, in what portions, and what happens on the way.

    Length: `updates` or `epochs`, exactly one. An epoch is one pass over the training data, and need not be whole.

    Portions: `batch_size` is the samples of one update, over all processes and accumulated steps; `micro_batch` the
    samples of one forward pass of one process (null: its share of the batch). `seed` draws weights, order and dropout;
    `workers` is the processes that load data.

    Arithmetic: `precision` of a forward pass, `clip` of the gradient's norm (null: none), `ema` the decay of averaged
    weights (null: no average), `quantize_backbone` how frozen linears are held, `pretrained` the weights a backbone
    starts from. `gradient_checkpointing` recomputes each layer in the backward pass, keeping its input and what `kept`
    says: nothing more, the matrix products no wider than it, or all of them. `compile` compiles the model; `graph`
    records forward and backward passes as one CUDA graph, on GPUs; `deterministic` asks for the same bits at every start,
    on a GPU too, and is slower. `parallel`: over several processes, copies of the model (ddp) or shards (fsdp).

    On the way: `unit` is what `save_every`, `evaluate_every`, `evaluate_from` and `keep_every` count; null is "at the
    end only". No evaluation before `evaluate_from`, but always one at the end. `log_every` counts updates. The newest
    `keep_last` checkpoints stay, and for ever those of every `keep_every`; `background` saves while training goes on
    (null: where the weights are on a GPU). `best` is the evaluated number whose best checkpoint stays, `-loss` where
    smaller is better; the run stops after `patience` evaluations without a better one. `trackers` also get the rows of
    metrics (wandb: under the project `tensorkeep`).
    """

    updates: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batch: int | None = None
    seed: int = 0
    workers: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip: float | None = 1.0
    ema: float | None = None
    quantize_backbone: Literal["nf4", "fp4", "int8"] | None = None
    pretrained: str | None = None
    gradient_checkpointing: bool = False
    kept: Literal["input", "narrow", "products"] = "input"
    compile: bool = False
    graph: bool = False
    deterministic: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    unit: Unit = "updates"
    log_every: int = 10
    save_every: int | None = None
    evaluate_every: int | None = None
    evaluate_from: int = 0
    keep_last: int = 3
    keep_every: int | None = None
    background: bool | None = None
    best: str | None = None
    patience: int | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if (self.updates is None) is (self.epochs is None):
            what = "says neither updates nor epochs" if self.updates is None else "says both updates and epochs"
            raise TensorkeepError(what, where="training", hint="one of them; the other null")
        for name in (*_AT_LEAST_ONE, "keep_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TensorkeepError(f"{name} {value} must be at least 1", where="training")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise TensorkeepError(f"{name} {getattr(self, name)} cannot be negative", where="training")
        for name in ("epochs", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TensorkeepError(f"{name} {value} must be positive", where="training")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise TensorkeepError(f"ema {self.ema} must be in [0, 1)", where="training", hint="null switches it off")
        if self.patience is not None and self.best is None:
            raise TensorkeepError("patience needs to know what is better", where="training", hint="best: -loss")


@dataclass(frozen=True)
class GroupRule:
    """Trainable parameters whose name fits `pattern` get this rate and decay (null: the optimizer's)."""

    pattern: str
    lr: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, in groups of parameters.

    `groups` are tried in order, and the first whose pattern fits takes a parameter. What is left gets `lr` and
    `weight_decay`; its norms and biases do not decay, unless `decay_all` says so.
    """

    lr: float = 1e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay_all: bool = False
    groups: tuple[GroupRule, ...] = ()


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves: `warmup`, then as `kind` says, over the run or up to `ends_at`.

    `warmup`, `decay` and `ends_at` count what `unit` says; `warmup` and `decay` below 1 are shares of the whole. With
    `ends_at` the schedule ends there and not with the run (AdaTAD stops at epoch 60 of a cosine of 100).

    cosine: from the rate down to `final` times the rate. constant: the rate. wsd: the rate, and over the last `decay` in a
    straight line down to `final` times it (warmup-stable-decay, arXiv 2404.06395). minimind:
    `lr (0.1 + 0.45 (1 + cos(pi t / T)))`, t counted from 1, without warm-up. opentad: a cosine down to the rate
    `floor`, after a warm-up whose first update has the rate 0.
    """

    kind: Literal["cosine", "constant", "wsd", "minimind", "opentad"] = "cosine"
    unit: Unit = "updates"
    warmup: float = 0.0
    decay: float = 0.2
    final: float = 0.1
    floor: float = 1e-8
    ends_at: float | None = None

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.decay < 0 or not 0 <= self.final <= 1:
            what = f"warmup {self.warmup} and decay {self.decay} are not negative, final {self.final} lies in [0, 1]"
            raise TensorkeepError(what, where="schedule")
        if self.ends_at is not None and not self.ends_at > 0:
            raise TensorkeepError(f"ends_at {self.ends_at} must be positive", where="schedule")
        if self.kind == "minimind" and self.warmup:
            raise TensorkeepError("minimind's schedule has no warm-up", where="schedule.warmup", hint="kind: cosine")


def refuse(config: TrainingConfig, reasons: Mapping[str, str]) -> None:
    """Refuse a field of `training` that a kind of run cannot carry out.

    Args:
        config: The section as it was read.
        reasons: Field -> why this kind refuses every value but the default.

    Raises:
        TensorkeepError: Naming the first field that is set, with the reason.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    for name, reason in reasons.items():
        if getattr(config, name) != defaults[name]:
            raise TensorkeepError(f"{name} is refused: {reason}", where=f"training.{name}", hint="leave it out")


def updates_of(config: TrainingConfig, samples: int) -> int:
    """Count the updates of a whole run.

    Args:
        config: Says `updates` or `epochs`.
        samples: Samples of one epoch.

    >>> updates_of(TrainingConfig(epochs=2, batch_size=4), 7)
    4
    """
    if config.updates is not None:
        return config.updates
    return max(1, math.ceil(float(config.epochs or 0) * (samples / config.batch_size)))


def counted(config: TrainingConfig, number: Any, samples: int) -> Any:
    """Turn a number of `config.unit` into updates, at least one; 0 and None stay."""
    if not number or config.unit == "updates":
        return number
    return max(round(number * (samples / config.batch_size)), 1)
