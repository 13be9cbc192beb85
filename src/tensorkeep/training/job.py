"""A job: the live objects of a run, and how the loop is to go. `train.fit` runs it; recipes build it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.training._retention import Keep
from tensorkeep.training.batches import Data, Flow, Orders
from tensorkeep.training.ema import Ema
from tensorkeep.training.sections import CheckpointConfig, TrainingConfig, counted, updates_of

Precision = Literal["fp32", "bf16", "fp16"]


def at_least_one(count: float) -> float:
    """Return the usual divisor of a loss: the count itself, 1 for an update in which nothing counts.

    Args:
        count: of the whole update.
    """
    return max(count, 1.0)


@dataclass
class Job:
    """What trains, on what, towards what.

    Args:
        model: the model, on its device.
        optimizer: over the parameters that train; a group without a `base_lr` gets its `lr` as one.
        data: the samples of an epoch, by number, or a flow of them that is read in order.
        collate: puts samples into one batch.
        loss: `loss(model, batch, divisor)` gives named scalars; `"loss"` is this micro-batch's *share*: sums divided by
            the divisor of the whole update, so that shares add up over micro-batches and ranks to the loss of the
            global batch.
        count: `count(batch)` says what a micro-batch adds to the divisor (tokens, positive points), before any forward.
        schedule: `schedule(update, base)` is the learning rate of update 0, 1, ... for a group of this `base_lr`.
        divisor: maps the count of the whole update to what sums are divided by.
        evaluate: `evaluate(model)` gives numbers by name; it runs on every rank, under the average where there is one
            (with equally many forwards on each where the model is sharded), and what the first rank gives counts.
        ema: the averaged weights; None: no average.
        base: `{"digest": ..., "path": ...}` of frozen weights that checkpoints leave out; None: they leave out nothing.
        recipe: plain values; compared on resume, written to recipe.yaml.
        read_recipe: turns the recipe of a checkpoint, written by this version or an older one, into what `recipe` would
            be for it.
        orders: epochs whose order comes from elsewhere.
        state: further objects with `state_dict` and `load_state_dict` of plain JSON.
        pace: what is told a second, and how much of it is in a sample (None: what is counted).
        trackers: each is called once with every new row of metrics.
        shard: gives the modules that FSDP shards as units; None: the repeated blocks.
        micro: at most so many samples a forward, where the job was made to fit a GPU; None: as the loop says.
        launched: why its kernels are launched one by one where the loop leaves it open; "": nothing is known against a
            CUDA graph.
        prepare: turns a micro-batch that is on the device into what the loss gets; None: it is that.
        ahead: takes the micro-batches of each update as they are fetched and gives them back, in the same order, with
            what is still to be made of them (frames that the device decodes); None: they are whole.
        decoder: what makes the samples where it is not this package, for the record; None: nothing else.
    """

    model: nn.Module
    optimizer: Optimizer
    data: Data | Flow
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any, float], Mapping[str, Tensor]]
    count: Callable[[Any], float]
    schedule: Callable[[int, float], float]
    divisor: Callable[[float], float] = at_least_one
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    ema: Ema | None = None
    base: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    read_recipe: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    orders: Orders = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    pace: tuple[str, float | None] = ("samples", 1.0)
    trackers: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    shard: Callable[[nn.Module], Iterable[nn.Module]] | None = None
    micro: int | None = None
    launched: str = ""
    prepare: Callable[[Any], Any] | None = None
    ahead: Callable[[Iterator[list[Any]]], Generator[list[Any], None, None]] | None = None
    decoder: str | None = None


@dataclass(frozen=True)
class Loop:
    """How long, in what portions, and what happens on the way.

    Args:
        updates: how long.
        batch: samples of one update, over all ranks.
        micro: samples of one forward on one rank; None: all of the rank's.
        seed: what order and dropout are drawn from.
        workers: processes that load data, of each rank.
        clip: the largest norm of the gradient; None: any.
        precision: of a forward pass.
        compile: whether the model is compiled.
        graph: whether forward and backward passes are recorded as one CUDA graph; None: on one GPU, where the job says
            nothing against it.
        deterministic: the same bits at every start, on a GPU too; slower.
        log_every: updates between two rows of metrics.
        save_every: updates between two checkpoints; None: at the end only, and before each evaluation.
        evaluate_every: updates between two evaluations; None: at the end only.
        evaluate_from: the first update that is evaluated; the last one always is.
        keep: which checkpoints stay.
        best: the evaluated number whose best checkpoint stays, with a minus where smaller is better: `-loss`.
        patience: evaluations without a better one before the run stops; None: it does not.
        parallel: over several ranks, copies of the model (ddp) or shards of it (fsdp).
        replicas: groups of ranks that hold all shards each (fsdp); 1: every rank holds shards of its own.
        background: save behind the training; None: where the weights are on a GPU.
        checkpoint: whether every host keeps its own ranks' shards, and copies of them.
        watchdog: seconds without progress of any rank, or an answer of one, after which all end; None: never.
    """

    updates: int
    batch: int
    micro: int | None = None
    seed: int = 0
    workers: int = 0
    clip: float | None = 1.0
    precision: Precision = "fp32"
    compile: bool = False
    graph: bool | None = False
    deterministic: bool = False
    log_every: int = 10
    save_every: int | None = None
    evaluate_every: int | None = None
    evaluate_from: int = 0
    keep: Keep = Keep()
    best: str | None = None
    patience: int | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    replicas: int = 1
    background: bool | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: float | None = None


def loop_of(config: TrainingConfig, samples: int, checkpoint: CheckpointConfig | None = None) -> Loop:
    """Return how the loop is to go, from a recipe's section `training`.

    Args:
        config: The section. Every field of `Loop` follows from it.
        samples: Samples of one epoch. Epochs follow one another without a gap: an update may take its last samples
            from the next one.
        checkpoint: The section of that name; None: all hosts share the run's folder.
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
        graph=bool(config.graph),
        deterministic=config.deterministic,
        log_every=config.log_every,
        save_every=save,
        evaluate_every=evaluate,
        evaluate_from=first,
        keep=Keep(config.keep_last, keep),
        best=config.best,
        patience=config.patience,
        parallel=config.parallel,
        replicas=config.replicas,
        background=config.background,
        checkpoint=checkpoint or CheckpointConfig(),
        watchdog=config.watchdog,
    )
