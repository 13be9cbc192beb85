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

    Attributes:
        updates: How long, in updates; or `epochs`, exactly one of them.
        epochs: How long, in passes over the training data, which need not be whole.
        batch_size: Samples of one update, over all processes and accumulated steps.
        micro_batch: Samples of one forward pass of one process; null: its share of the batch.
        seed: What weights, order and dropout are drawn from.
        workers: Processes that load data, of each training process.
        precision: Of a forward pass.
        clip: The largest norm of the gradient; null: any.
        ema: Decay of the averaged weights; null: no average.
        quantize_backbone: How frozen linears are held; null: as they are.
        quantize_compute: What products of frozen linears with inputs and gradients are computed in while training: fp8
            (in a language model those of 4-bit ones); null: as `precision` says, or the dtype of a backbone.
        pretrained: Weights that a backbone starts from; null: random ones. `FILE@IDENTITY` demands what `tensorkeep
            identify` says of them.
        gradient_checkpointing: Whether each layer is computed again in the backward pass, from its input.
        kept: What of a layer is kept besides its input: nothing, the matrix products no wider than it, or all of them.
        memory: How much a forward pass leaves on the GPU for the backward pass: the `least` (the rest waits in main
            memory or is computed again), `balanced`, or the `most` (nothing is computed again). Null: all of it, or
            what `gradient_checkpointing` and `kept` say.
        memory_limit_gib: GiB of the GPU that training may take: what layers keep, where it waits and how many samples
            go at a time is planned so that it fits, else the run is refused. Null: no limit, nothing is planned.
        compile: Whether the model is compiled.
        graph: Whether forward and backward passes are recorded as one CUDA graph; on GPUs. Null: those of a detection
            run on one GPU, where they can be.
        deterministic: The same bits at every start, on a GPU too; slower.
        parallel: Over several processes, copies of the model (ddp) or shards of it (fsdp).
        replicas: Groups of processes that hold all shards each (fsdp): one group for each host keeps gathering inside.
        unit: What `save_every`, `evaluate_every`, `evaluate_from` and `keep_every` count.
        log_every: Updates between two rows of metrics.
        save_every: Null: at the end only, and before each evaluation.
        evaluate_every: Null: at the end only.
        evaluate_from: No evaluation before it, but always one at the end.
        keep_last: How many of the newest checkpoints stay.
        keep_every: Those of every such step stay for ever.
        background: Save while training goes on; null: where the weights are on a GPU.
        best: The evaluated number whose best checkpoint stays, with a minus where smaller is better: `-loss`.
        patience: Evaluations without a better one before the run stops.
        watchdog: Seconds without progress of any process, or without an answer of one, after which all write their
            stacks into the run's folder and leave with exit code 75; null: never.
        trackers: Who else gets the rows of metrics; wandb and trackio under the project `tensorkeep`.
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
    quantize_compute: Literal["fp8"] | None = None
    pretrained: str | None = None
    gradient_checkpointing: bool = False
    kept: Literal["input", "narrow", "products"] = "input"
    memory: Literal["least", "balanced", "most"] | None = None
    memory_limit_gib: float | None = None
    compile: bool = False
    graph: bool | None = None
    deterministic: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    replicas: int = 1
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
    watchdog: float | None = 600.0
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        if (self.updates is None) is (self.epochs is None):
            what = "says neither updates nor epochs" if self.updates is None else "says both updates and epochs"
            raise TensorkeepError(what, where="training", hint="one of them; the other null")
        for name in (*_AT_LEAST_ONE, "replicas", "keep_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TensorkeepError(f"{name} {value} must be at least 1", where="training")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise TensorkeepError(f"{name} {getattr(self, name)} cannot be negative", where="training")
        for name in ("epochs", "clip", "memory_limit_gib", "watchdog"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TensorkeepError(f"{name} {value} must be positive", where="training")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise TensorkeepError(f"ema {self.ema} must be in [0, 1)", where="training", hint="null switches it off")
        if self.memory is not None and self.memory_limit_gib is not None:
            hint = "one of them: the limit plans what `memory` would say"
            raise TensorkeepError("says both memory and memory_limit_gib", where="training", hint=hint)
        by_hand = self.gradient_checkpointing or self.kept != "input"
        if self.memory_limit_gib is not None and by_hand:
            hint = "memory_limit_gib alone: --training.gradient_checkpointing false --training.kept input"
            raise TensorkeepError("the limit plans what is kept", where="training.memory_limit_gib", hint=hint)
        if self.memory is not None and by_hand:
            hint = "memory alone: --training.gradient_checkpointing false --training.kept input"
            raise TensorkeepError("memory says already what is kept", where="training.memory", hint=hint)
        if self.patience is not None and self.best is None:
            raise TensorkeepError("patience needs to know what is better", where="training", hint="best: -loss")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run's checkpoints lie when its processes run on several hosts.

    Attributes:
        local: Whether every host keeps the shards of its own processes in a folder on its own disk, of the same name or
            another; else all hosts share the run's folder. For `training.parallel: fsdp`.
        replicas: How many further hosts keep a copy of each host's shards, which the next one does: 0 or 1.
    """

    local: bool = False
    replicas: int = 0

    def __post_init__(self) -> None:
        if self.replicas not in (0, 1):
            raise TensorkeepError(f"replicas {self.replicas} must be 0 or 1", where="checkpoint")
        if self.replicas and not self.local:
            hint = "checkpoint.local: true, or replicas: 0"
            raise TensorkeepError("replicas are copies of what hosts keep locally", where="checkpoint", hint=hint)


@dataclass(frozen=True)
class GroupRule:
    """A learning rate and a decay for the trainable parameters whose name fits a pattern.

    Attributes:
        pattern: What the names must fit, as `formats.names.matches` says.
        lr: Their learning rate.
        weight_decay: Their decay; null: the optimizer's.
    """

    pattern: str
    lr: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, in groups of parameters.

    Attributes:
        lr: Learning rate of what no rule takes.
        weight_decay: Decay of what no rule takes, and of rules that say none.
        betas: Of the two moments.
        eps: Beside the root of the second moment.
        decay_all: Whether norms and biases decay, too.
        groups: Rules, tried in order: the first whose pattern fits takes a parameter.
    """

    lr: float = 1e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay_all: bool = False
    groups: tuple[GroupRule, ...] = ()


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves: a warm-up, then as `kind` says, over the run or up to `ends_at`.

    Attributes:
        kind: cosine: from the rate down to `final` times the rate. constant: the rate. wsd: the rate, and over the last
            `decay` in a straight line down to `final` times it (warmup-stable-decay, arXiv 2404.06395). minimind:
            `lr (0.1 + 0.45 (1 + cos(pi t / T)))`, t counted from 1, without warm-up. opentad: a cosine down to the rate
            `floor`, after a warm-up whose first update has the rate 0.
        unit: What `warmup`, `decay` and `ends_at` count; `warmup` and `decay` below 1 are shares of the whole.
        warmup: How long the rate rises from 0.
        decay: How long it falls, of kind wsd.
        final: What it falls to, as a share of the rate, of kinds cosine and wsd.
        floor: What it falls to, of kind opentad.
        ends_at: Where the schedule ends; null: with the run. AdaTAD stops at epoch 60 of a cosine of 100.
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
        reasons: Field -> why this kind refuses every value but the default, and false, which asks for nothing.

    Raises:
        TensorkeepError: Naming the first field that is set, with the reason.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    for name, reason in reasons.items():
        value = getattr(config, name)
        if value != defaults[name] and value is not False:
            raise TensorkeepError(f"{name} is refused: {reason}", where=f"training.{name}", hint="leave it out")


def refuse_local(training: TrainingConfig, checkpoint: CheckpointConfig) -> None:
    """Refuse `checkpoint.local` where processes hold no shards.

    Args:
        training: The section of that name.
        checkpoint: The section of that name.

    Raises:
        TensorkeepError: Saying what goes with it.
    """
    if checkpoint.local and training.parallel != "fsdp":
        hint = "training.parallel: fsdp, or checkpoint.local: false and an --out that all hosts share"
        raise TensorkeepError("only shards are kept by each host", where="checkpoint.local", hint=hint)


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
