"""Find the checkpoint of a language run that is meant, and put it into a model."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._optimizer import choose_trainable
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.language.start import Remark, StartingModel
from tensorkeep.storage import run_folder
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.ema import Ema
from tensorkeep.training.live_state import put_tensors
from tensorkeep.training.saver import State


def needs_start_weights(recipe: LanguageRecipe) -> bool:
    """Tell whether a run's checkpoint is not enough without the weights it started from.

    Args:
        recipe: with an adapter the checkpoint holds the adapter alone; dpo compares with the start weights.
    """
    return recipe.adapter is not None or recipe.objective == "dpo"


def run_of(path: Path) -> Path | None:
    """Find the run that a path means: itself, or the one that a step folder lies in.

    Args:
        path: a run's folder or one of its `checkpoints/step-*` folders.

    Returns:
        The run's folder, None where the path is no run of ours.
    """
    for place in (path, path.parent.parent):
        if (place / run_folder.CHECKPOINTS).is_dir() and (place / "recipe.yaml").is_file():
            return place
    return None


def checkpoint_of(run: Path, path: Path, best: bool, remark: Remark = lambda _: None) -> State:
    """Load the checkpoint of a run that is meant: the one named, the best, or the newest valid one.

    Args:
        run: the run's folder.
        path: the run's folder again, or a step folder in it.
        best: take the best checkpoint of the run instead of the newest.
        remark: is told of damaged checkpoints that were passed over.

    Returns:
        The state, its tensors on the CPU.

    Raises:
        TensorkeepError: there is no such checkpoint, or it is damaged.
    """
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


def put_state(
    start: StartingModel, recipe: LanguageRecipe, state: State | None, ema: bool
) -> AbstractContextManager[None]:
    """Put a checkpoint into the model.

    Args:
        start: the model, changed in place.
        recipe: of the run that made the checkpoint.
        state: the checkpoint (None: the model stays as it is).
        ema: use the averaged weights where the checkpoint has some.

    Returns:
        A context within which the model holds the averaged weights. Enter it after the model is on its device; it
        does nothing where the average is not wanted or not there.

    Raises:
        TensorkeepError: the checkpoint's tensors are not the model's.
    """
    if state is None:
        return contextlib.nullcontext()
    choose_trainable(start.model, recipe)
    put_tensors(start.model, state.model, base=state.base is not None)
    if not ema or not state.ema:
        return contextlib.nullcontext()
    average = Ema(start.model, recipe.training.ema or 0.0)
    average.load_state_dict(state.ema, state.document["ema"]["updates"])
    return average.applied(start.model)
