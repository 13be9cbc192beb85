"""Evaluating a checkpoint on files: of a run with its recipe, under its average; of any other as it is."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.preferences import PreferenceLoss
from tensorkeep.language.job import choose_trainable, evaluation_of
from tensorkeep.language.losses import TokenLoss, plain_head
from tensorkeep.language.recipe import DataConfig, LanguageRecipe, TrainingConfig
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import Remark, Start, start_of
from tensorkeep.storage import run_folder
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.live_state import put_tensors
from tensorkeep.training.saver import State


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
) -> dict[str, Any]:
    """`loss`, `perplexity`, `tokens` of a checkpoint on files (None: those its run evaluates on), and what was used.

    Raises TensorkeepError where there is neither a file nor a recipe that names one.

    >>> evaluate_checkpoint("runs/one", ["held-out.txt"])["perplexity"]           # doctest: +SKIP
    8.1
    """
    world = world or World()
    run = run_of(Path(path))
    state = checkpoint_of(run, Path(path), best, remark) if run is not None else None
    recipe = read_language(run / "recipe.yaml") if run is not None else _bare(path, tuple(files), length, tokenizer)
    files = tuple(files) or (recipe.evaluation.files if recipe.evaluation is not None else ())
    if not files:
        raise TensorkeepError("nothing to evaluate on", where=path, hint="--data FILE")
    recipe = replace(recipe, data=replace(recipe.data, length=length or recipe.data.length))
    recipe = replace(recipe, training=replace(recipe.training, batch=batch * world.size, micro_batch=batch))
    with tempfile.TemporaryDirectory() as scratch:  # tokens of an evaluation are not the run's
        place = Path(scratch)
        start = start_of(recipe, run or place, world, remark, weights=state is None or leans(recipe))
        averaged = put_state(start, recipe, state, ema)
        start.model.to(world.device).eval()
        plain = plain_head(start.model)
        loss: Any = PreferenceLoss(plain, recipe.beta) if recipe.objective == "dpo" else TokenLoss(plain)
        reading = replace(recipe, data=replace(recipe.data, cache=str(place)))
        evaluation = evaluation_of(reading, files, "auto", start, place, world, loss, remark)
        with averaged, torch.no_grad():
            found = evaluation(start.model)
    named = {"checkpoint": path, "step": None if state is None else state.document["step"], "data": list(files)}
    tokens = {"tokens": int(found.pop("count"))} if "count" in found else {}
    return {**named, "ema": ema and state is not None and bool(state.ema), **found, **tokens}


def leans(recipe: LanguageRecipe) -> bool:
    """Whether the checkpoint alone is not enough: a base under an adapter, a reference."""
    return recipe.adapter is not None or recipe.objective == "dpo"


def run_of(path: Path) -> Path | None:
    """The run that a path means: itself, or the one that a step folder lies in; None where it is no run of ours."""
    for place in (path, path.parent.parent):
        if (place / run_folder.CHECKPOINTS).is_dir() and (place / "recipe.yaml").is_file():
            return place
    return None


def checkpoint_of(run: Path, path: Path, best: bool, remark: Remark = lambda _: None) -> State:
    """The checkpoint of a run that is meant: the one named, the best, or the newest valid one."""
    if path.resolve() != run.resolve():
        return checkpoint.load(path)
    if best:
        step = checkpoint.best(run)
        if step is None:
            raise TensorkeepError("no checkpoint was named the best", where=run, hint="leave --best out")
        return checkpoint.load(run_folder.folder_of(run, step))
    found = checkpoint.newest(run)
    if found is None:
        raise TensorkeepError("the run holds no checkpoint", where=run, hint="train it first")
    for finding in found[2]:
        remark(f"skipped: {finding.code} {finding.message}")
    return found[0]


def put_state(start: Start, recipe: LanguageRecipe, state: State | None, ema: bool) -> Any:
    """Put a checkpoint into the model; returns what applies its average."""
    if state is None:
        return contextlib.nullcontext()
    choose_trainable(start.model, recipe)
    put_tensors(start.model, state.model, base=state.base is not None)
    if not ema or not state.ema:
        return contextlib.nullcontext()
    average = Ema(start.model, recipe.training.ema or 0.0)
    average.load_state_dict(state.ema, state.document["ema"]["updates"])
    return _Applied(average, start)


class _Applied(contextlib.AbstractContextManager[None]):
    """The average on the model, entered after both went to their device."""

    def __init__(self, average: Ema, start: Start) -> None:
        self.average, self.start = average, start

    def __enter__(self) -> None:
        self.inner = self.average.applied(self.start.model)
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


def _bare(path: str, files: tuple[str, ...], length: int | None, tokenizer: str | None) -> LanguageRecipe:
    """A recipe for a checkpoint that has none: what the files hold decides the objective."""
    from tensorkeep.language.data.texts import objective_of

    if not files:
        raise TensorkeepError("nothing to evaluate on", where=path, hint="--data FILE")
    objective = objective_of(files[0])
    return LanguageRecipe(
        DataConfig(files, length=length or 512, packing="concatenate" if objective == "pretrain" else "none"),
        TrainingConfig(updates=1),
        model=path,
        tokenizer=tokenizer,
        objective=objective,
    )
