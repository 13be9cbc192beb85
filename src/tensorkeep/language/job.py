"""A language run from its recipe: `build` makes the live objects, `loop_of` says how the loop is to go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._data import cache_of, make_data, multiple_of, pad_of
from tensorkeep.language._dpo import PreferenceLoss, with_reference
from tensorkeep.language._fits_rows import pack_rows, refuse_rows
from tensorkeep.language._held_out import evaluation_of
from tensorkeep.language._memory import arrange, fitted, hold_frozen, hold_to, refuse_limit
from tensorkeep.language._memory_plan import GIB, said
from tensorkeep.language._optimizer import choose_trainable, make_optimizer
from tensorkeep.language._recompute import lean
from tensorkeep.language._shards import fill
from tensorkeep.language.data.batches import Collate, targets_of
from tensorkeep.language.data.preferences import CollatePairs, Pairs, pairs_of
from tensorkeep.language.losses import TokenLoss, plain_head
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.language.recipe_text import kept, kept_of
from tensorkeep.language.start import Remark, StartingModel, start_of
from tensorkeep.models.language_model import text_config
from tensorkeep.quantization.modules import compute_in_float8
from tensorkeep.training import job as training_job
from tensorkeep.training import trackers
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.fsdp import forget_whole, is_sharded
from tensorkeep.training.job import Job, Loop, Precision
from tensorkeep.training.precision import GATHERED, autocast
from tensorkeep.training.saver import State
from tensorkeep.training.schedules import schedule_of


def build(recipe: LanguageRecipe, run: str | Path, world: World | None = None, remark: Remark = lambda _: None) -> Job:
    """Make the job of a recipe: model, data, loss and optimizer, ready for `fit`.

    Args:
        recipe: what to train, on what, and how.
        run: the run's folder; tokens, config and tokenizer are written there.
        world: this process among its peers (None: the only one, on the CPU); the model goes to its device.
        remark: is told what a person should know: conversions, records left out.

    Returns:
        The job; its loop comes from `loop_of`.

    Raises:
        TensorkeepError: weights, tokenizer, data and recipe do not fit together.

    Example:
        >>> recipe = read_language("smollm2_sft")  # doctest: +SKIP
        >>> job = build(recipe, "runs/one")                                              # doctest: +SKIP
        >>> fit(job, "runs/one", loop_of(recipe, len(job.data)))                         # doctest: +SKIP
    """
    world, run = world or World(), Path(run)
    refuse_limit(recipe, world)
    start = start_of(recipe, run, world, remark, sharded=recipe.training.parallel == "fsdp" and world.size > 1)
    model, dpo = start.model, recipe.objective == "dpo"
    refuse_rows(model, recipe.data.length, recipe.data.packing != "none")
    digest = start.digest(world) if recipe.adapter is not None or dpo else None
    choose_trainable(model, recipe, world.size > 1, remark)
    if recipe.training.memory is not None or recipe.training.memory_limit_gib is not None:
        hold_frozen(model, recipe.training.precision)
    _place(start, recipe, world)
    if recipe.training.quantize_compute == "fp8":
        remark(f"quantize_compute: {len(compute_in_float8(model))} linears have products in fp8 while training")
    with autocast(Loop(0, 1, precision=_gathered(recipe)), world) if is_sharded(model) else nullcontext():
        head = plain_head(model)
    pack_rows(model, recipe, world, remark)
    forget_whole(model)
    pad = pad_of(start.tokenizer)
    data = make_data(recipe, recipe.data, start.tokenizer, start.vocabulary, run, world, remark)
    if isinstance(data, Pairs):
        how = str(digest), world, pad, _micro(recipe, world), remark
        data = with_reference(data, model, head, cache_of(recipe, run), *how)
    micro = _keep_little(model, recipe, world, remark)
    loss: Any = PreferenceLoss(head, recipe.beta) if dpo else TokenLoss(head, router=_router(model))
    return Job(
        model=model,
        optimizer=make_optimizer(model, recipe.optimizer),
        data=data,
        collate=(CollatePairs if dpo else Collate)(pad, multiple_of(recipe)),
        loss=loss,
        count=pairs_of if dpo else targets_of,
        pace=("pairs" if dpo else "tokens", None),
        schedule=schedule_of(recipe.schedule, recipe.training, len(data)),
        evaluate=_evaluation(recipe, start, run, world, loss, remark, micro),
        ema=None if recipe.training.ema is None else Ema(model, recipe.training.ema),
        recipe=kept(recipe),
        read_recipe=kept_of,
        base=None if recipe.adapter is None else start.base(recipe.source, world),
        trackers=trackers.named(recipe.training.trackers, run) if world.first else [],
        micro=micro,
    )


def _keep_little(model: nn.Module, recipe: LanguageRecipe, world: World, remark: Remark) -> int | None:
    """Let decoder layers keep no more than the recipe says; returns the samples of a forward where they are planned."""
    training, length = recipe.training, recipe.data.length * (2 if recipe.objective == "dpo" else 1)
    alone, micro, limit = world.size == 1, _micro(recipe, world), training.memory_limit_gib
    if training.memory is not None:
        remark(arrange(model, decoder_layers(model), training.memory, training.compile, micro * length, alone))
    elif limit is not None:
        layers = decoder_layers(model)
        plan = fitted(model, layers, micro, length, limit, alone, training.ema is not None)
        arrange(model, layers, plan.way, training.compile, plan.micro * length, alone)
        hold_to(limit, world.device)
        remark(said(plan, length, len(layers), round(limit * GIB)))
        return plan.micro
    elif training.gradient_checkpointing:
        lean(decoder_layers(model), training.kept, training.compile)
    return None


def _micro(recipe: LanguageRecipe, world: World) -> int:
    """Samples of one forward pass of one process."""
    return recipe.training.micro_batch or max(recipe.training.batch_size // world.size, 1)


def _place(start: StartingModel, recipe: LanguageRecipe, world: World) -> None:
    """Put the model on the rank's device: all of it, or its part of a sharded one."""
    if start.tensors is None or start.view is None:
        start.model.to(world.device)
        return
    fill(start.model, start.tensors, start.view, world, GATHERED.get(_gathered(recipe)), recipe.training.replicas)


def _gathered(recipe: LanguageRecipe) -> Precision:
    """The precision in which layers are gathered; dpo's reference is computed in float32."""
    return "fp32" if recipe.objective == "dpo" else recipe.training.precision


def _evaluation(
    recipe: LanguageRecipe,
    start: StartingModel,
    run: Path,
    world: World,
    loss: Any,
    remark: Remark,
    micro: int | None,
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """The evaluation that the recipe asks for, or None."""
    asked = recipe.evaluation
    if asked is None:
        return None
    if micro is not None:
        recipe = replace(recipe, training=replace(recipe.training, micro_batch=micro))
    return evaluation_of(recipe, asked.files, asked.format, start, run, world, loss, remark, asked.rows)


def continued(
    recipe: LanguageRecipe, path: str, job: Job, loop: Loop, remark: Remark = lambda _: None
) -> tuple[Job, Loop, State]:
    """Let a job go on from MiniMind's resume file: its weights, moments, position, order and learning rates.

    Args:
        recipe: its `micro_batch` (or `batch_size`) is MiniMind's --batch_size, its `epochs` --epochs; how many
            micro-batches make an update is read off the file.
        path: the resume file, `*_resume.pth`.
        job: the recipe's job; its order, schedule and optimizer settings are changed in place.
        loop: the recipe's loop.
        remark: is told where the file stands, and what it could not give.

    Returns:
        The job, the loop with the file's batch and end, and the state for `fit`'s `resume`.

    Raises:
        TensorkeepError: the file does not belong to the model and data.
    """
    from tensorkeep.language.minimind.continue_from import continue_from

    t = recipe.training
    if recipe.data.streaming:
        what = "a resume file of MiniMind says a position in data of known length"
        raise TensorkeepError(what, where="data.streaming", hint="streaming: false")
    epochs = int(t.epochs) if t.epochs is not None and float(t.epochs).is_integer() else None
    on = continue_from(path, job.model, len(job.data), t.micro_batch or t.batch_size, epochs=epochs, base=job.base)
    job.orders, job.recipe = on.orders, job.recipe | {"continued_from": on.origin}
    job.schedule = on.schedule or job.schedule
    for group in job.optimizer.param_groups:
        group |= {key: value for key, value in on.optimizer.items() if value is not None}
    for line in on.remarks:
        remark(line)
    return job, replace(loop, updates=on.updates or loop.updates, batch=on.batch, micro=on.micro), on.state


def decoder_layers(model: Any) -> list[nn.Module]:
    """List the layers of a transformers model that gradient checkpointing recomputes."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        what = f"{type(model).__name__} has no list of layers to recompute"
        hint = "gradient_checkpointing: false, memory: null and memory_limit_gib: null"
        raise TensorkeepError(what, where="training.gradient_checkpointing, memory", hint=hint)
    return list(layers)


def loop_of(recipe: LanguageRecipe, samples: int) -> Loop:
    """Return a recipe's loop settings: how long, in what portions, when to save and evaluate.

    Args:
        recipe: its training section is read; layers that are recomputed are compiled one by one, not as a whole.
        samples: samples of one epoch, which give the updates where the recipe counts epochs.
    """
    training = recipe.training
    by_layer = training.gradient_checkpointing or training.memory is not None or training.memory_limit_gib is not None
    whole = recipe.training.compile and not by_layer
    return replace(training_job.loop_of(recipe.training, samples, recipe.checkpoint), compile=whole)


def _router(model: Any) -> float:
    """Weight of the load-balancing loss, where the model's config asks for one; else 0."""
    config = text_config(model.config)
    on = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if on else 0.0
