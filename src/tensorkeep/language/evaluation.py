"""Evaluate a checkpoint on files: one of a run with its recipe and average, any other as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._dpo import PreferenceLoss
from tensorkeep.language._fits_rows import pack_rows
from tensorkeep.language._held_out import evaluation_of
from tensorkeep.language.checkpoints import checkpoint_of, needs_start_weights, put_state, run_of
from tensorkeep.language.data.texts import objective_of
from tensorkeep.language.losses import TokenLoss, plain_head
from tensorkeep.language.recipe import DataConfig, LanguageRecipe
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import Remark, start_of
from tensorkeep.storage.files import Progress, absent
from tensorkeep.training.distributed import World
from tensorkeep.training.sections import TrainingConfig


def evaluate_checkpoint(
    path: str,
    files: Sequence[str] = (),
    ema: bool = True,
    best: bool = False,
    length: int | None = None,
    batch: int = 8,
    tokenizer: str | None = None,
    world: World | None = None,
    remark: Remark = lambda _: None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure the loss of a checkpoint on held-out files.

    Args:
        path: a run, a step folder in one, or any checkpoint that can be read.
        files: the held-out files (none: those that the run evaluates on).
        ema: use the averaged weights where there are some.
        best: take the run's best checkpoint instead of its newest.
        length: tokens of a row (None: the recipe's, or 512).
        batch: rows of one forward on each rank.
        tokenizer: folder or tokenizer.json, for a checkpoint without one.
        world: this process among its peers (None: the only one, on the CPU).
        remark: is told what was converted, passed over or left out.
        progress: is told how many rows of how many are done.

    Returns:
        `checkpoint`, `step` (None outside a run), `data`, `ema`, then what the objective gives: `loss` in nats a
        token, `perplexity` and `tokens`; for dpo `loss`, `accuracy` and `margin` a pair.

    Raises:
        TensorkeepError: there is neither a file nor a recipe that names one, or the checkpoint cannot be read.

    Example:
        >>> evaluate_checkpoint("runs/one", ["held-out.txt"])["perplexity"]           # doctest: +SKIP
        8.1
    """
    world = world or World()
    run = run_of(Path(path))
    state = checkpoint_of(run, Path(path), best, remark) if run is not None else None
    recipe = read_language(run / "recipe.yaml") if run is not None else _bare(path, tuple(files), length, tokenizer)
    files = tuple(files) or (recipe.evaluation.files if recipe.evaluation is not None else ())
    if not files:
        raise TensorkeepError("no data to evaluate on is named", where=path, hint="add --data FILE")
    recipe = replace(recipe, data=replace(recipe.data, length=length or recipe.data.length))
    recipe = replace(recipe, training=replace(recipe.training, batch_size=batch * world.size, micro_batch=batch))
    with tempfile.TemporaryDirectory() as scratch:  # tokens of an evaluation are not the run's
        place = Path(scratch)
        start = start_of(recipe, run or place, world, remark, weights=state is None or needs_start_weights(recipe))
        averaged = put_state(start, recipe, state, ema)
        plain = plain_head(start.model.to(world.device).eval())
        pack_rows(start.model, recipe, world, remark)
        loss: Any = PreferenceLoss(plain, recipe.beta) if recipe.objective == "dpo" else TokenLoss(plain)
        reading = replace(recipe, data=replace(recipe.data, cache=str(place)))
        evaluation = evaluation_of(reading, files, "auto", start, place, world, loss, remark)
        with averaged, torch.no_grad():
            found = replace(evaluation, progress=progress)(start.model)
    named = {"checkpoint": path, "step": None if state is None else state.document["step"], "data": list(files)}
    tokens = {"tokens": int(found.pop("count"))} if "count" in found else {}
    return {**named, "ema": ema and state is not None and bool(state.ema), **found, **tokens}


def _bare(path: str, files: tuple[str, ...], length: int | None, tokenizer: str | None) -> LanguageRecipe:
    """Make a recipe for a checkpoint that has none: what the first file holds decides the objective."""
    if not files:
        if "/" not in path and not Path(path).exists():
            raise absent(path)
        raise TensorkeepError("no data to evaluate on is named", where=path, hint="add --data FILE")
    objective = objective_of(files[0])
    return LanguageRecipe(
        DataConfig(files, length=length or 512, packing="concatenate" if objective == "pretrain" else "none"),
        TrainingConfig(updates=1),
        model=path,
        tokenizer=tokenizer,
        objective=objective,
    )
