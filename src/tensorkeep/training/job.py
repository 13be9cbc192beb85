"""A job: the live objects of a run, and how the loop is to go. `train.fit` runs it; recipes build it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.training._retention import Keep
from tensorkeep.training.batches import Data, Orders
from tensorkeep.training.ema import Ema
from tensorkeep.training.sections import TrainingConfig, counted, updates_of

Precision = Literal["fp32", "bf16", "fp16"]


def at_least_one(count: float) -> float:
    """The usual divisor of a loss: the count itself, 1 for an update in which nothing counts."""
    return max(count, 1.0)


@dataclass
class Job:
    """What trains, on what, towards what.

    `loss(model, batch, divisor)` gives named scalars; `"loss"` is this micro-batch's *share*: sums divided by the
    divisor of the whole update, so that shares add up over micro-batches and ranks to the loss of the global batch.
    `count(batch)` says what a micro-batch adds to that divisor (tokens, positive points) before any forward, and
    `divisor` maps the count of the whole update to what sums are divided by. `schedule(update, base)` is the learning
    rate of update 0, 1, ... for a group whose `base_lr` is `base`. `evaluate(model)` runs on every rank, under the
    average where there is one (with equally many forwards on each where the model is sharded); what it gives on the
    first rank counts. `state`: further objects with `state_dict` and `load_state_dict` of plain JSON. `pace`: what is
    told a second, and how much of it is in a sample (None: what is counted). `read_recipe` turns the recipe of a
    checkpoint, written by this version or an older one, into what `recipe` would be for it.
    """

    model: nn.Module
    optimizer: Optimizer
    data: Data
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any, float], Mapping[str, Tensor]]
    count: Callable[[Any], float]
    schedule: Callable[[int, float], float]
    divisor: Callable[[float], float] = at_least_one
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    ema: Ema | None = None
    base: dict[str, Any] | None = None  # {"digest": ..., "path": ...} of frozen weights that checkpoints leave out
    recipe: dict[str, Any] = field(default_factory=dict)  # plain values; compared on resume, written to recipe.yaml
    read_recipe: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    orders: Orders = field(default_factory=dict)  # epochs whose order comes from elsewhere
    state: dict[str, Any] = field(default_factory=dict)
    pace: tuple[str, float | None] = ("samples", 1.0)
    trackers: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)  # each gets every new row once
    shard: Callable[[nn.Module], Iterable[nn.Module]] | None = None  # FSDP's units; None: the repeated blocks


@dataclass(frozen=True)
class Loop:
    """How long, in what portions, and what happens on the way. All counts are in updates.

    `batch`: samples an update, over all ranks; `micro`: samples a forward on one rank (None: all of the rank's). The
    rest means what the fields of that name in a recipe's section `training` mean (`TrainingConfig`); `keep` is its
    `keep_last` and `keep_every`.
    """

    updates: int
    batch: int
    micro: int | None = None
    seed: int = 0
    workers: int = 0
    clip: float | None = 1.0
    precision: Precision = "fp32"
    compile: bool = False
    graph: bool = False
    deterministic: bool = False
    log_every: int = 10
    save_every: int | None = None
    evaluate_every: int | None = None
    evaluate_from: int = 0
    keep: Keep = Keep()
    best: str | None = None
    patience: int | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    background: bool | None = None  # save behind the training; None: where the weights are on a GPU


def loop_of(config: TrainingConfig, samples: int) -> Loop:
    """Say how the loop is to go, from a recipe's section `training`.

    Args:
        config: The section. Every field of `Loop` follows from it.
        samples: Samples of one epoch. Epochs follow one another without a gap: an update may take its last samples
            from the next one.
    """
    save, evaluate, first, keep = (
        counted(config, number, samples)
        for number in (config.save_every, config.evaluate_every, config.evaluate_from, config.keep_every)
    )
    return Loop(
        updates=updates_of(config, samples),
        batch=config.batch_size,
        micro=config.micro_batch,
        seed=config.seed,
        workers=config.workers,
        clip=config.clip,
        precision=config.precision,
        compile=config.compile,
        graph=config.graph,
        deterministic=config.deterministic,
        log_every=config.log_every,
        save_every=save,
        evaluate_every=evaluate,
        evaluate_from=first,
        keep=Keep(config.keep_last, keep),
        best=config.best,
        patience=config.patience,
        parallel=config.parallel,
        background=config.background,
    )
