"""Score a trained detector on its recipe's test data."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tensorkeep.detection.data.annotations import Annotations
from tensorkeep.detection.inference import table_of
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe_data import Remark, evaluation_of, read_classes
from tensorkeep.detection.results.evaluation import Evaluation
from tensorkeep.detection.results.results import DetectionTable
from tensorkeep.detection.start import make_detector, open_detector
from tensorkeep.storage.files import Progress
from tensorkeep.training.distributed import World
from tensorkeep.training.precision import HALF_DTYPES


class Scored(NamedTuple):
    """A detector's detections and their score.

    Attributes:
        annotations: the ground truth.
        table: what was found.
        result: how good it is.
        blocked: names of the videos that were left out.
        step: update of the run whose weights were taken; None: the weights are of no run of ours.
        averaged: whether the averaged weights were taken.
    """

    annotations: Annotations
    table: DetectionTable
    result: Evaluation
    blocked: tuple[str, ...]
    step: int | None
    averaged: bool


def evaluate_checkpoint(
    path: str | Path,
    recipe: str | Path | None = None,
    ema: bool = True,
    best: bool = True,
    world: World | None = None,
    changes: tuple[tuple[str, str], ...] = (),
    remark: Remark = lambda _: None,
    progress: Progress = lambda what, done, total: None,
) -> Scored:
    """Score a run, a step folder or another checkpoint on the test data of its recipe.

    Every rank of `world` takes its share of the videos and gets the same numbers.

    Args:
        path: a run, a step folder of a run, or a checkpoint from elsewhere (OpenTAD's too).
        recipe: the recipe it belongs to; None: the run's own.
        ema: whether the averaged weights are taken, where there are some.
        best: whether a run's best checkpoint is taken; else its newest.
        world: the processes that share the work; None: this one alone.
        changes: (name, value) pairs to change in the recipe, as on the command line.
        remark: gets a line for all that is odd.
        progress: is told how many of this rank's videos are done.

    Returns:
        The score, the detections, and what they were compared with.

    Raises:
        TensorkeepError: Checkpoint, recipe and data do not fit together.

    Example:
        >>> evaluate_checkpoint("runs/one").result.average  # doctest: +SKIP
        0.61
    """
    world = world or World()
    opened = open_detector(path, recipe, ema, best, world, changes, remark)
    precision = opened.recipe.training.precision

    def context() -> contextlib.AbstractContextManager[None]:
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(world.device.type, dtype=HALF_DTYPES[precision])

    evaluation = evaluation_of(opened.recipe, read_classes(opened.recipe), world, context, remark)
    found = replace(evaluation, progress=progress).detections(opened.detector)
    table = table_of(found, evaluation.classes)
    result = evaluation.score(found)
    return Scored(evaluation.annotations, table, result, evaluation.blocked, opened.step, opened.averaged)


def evaluate_untrained(recipe: DetectionRecipe) -> Evaluation:
    """Score the detector that a run of the recipe would start from, on its test data, in float32.

    Args:
        recipe: of detection.

    Returns:
        The mean average precision, as `evaluate` gives it.

    Raises:
        TensorkeepError: Recipe, pretrained weights and data do not fit together.

    Example:
        >>> evaluate_untrained(read_recipe("synthetic_tiny")).average  # doctest: +SKIP
        0.0001
    """
    evaluation = evaluation_of(recipe, read_classes(recipe), World(), contextlib.nullcontext)
    return evaluation.score(evaluation.detections(make_detector(recipe, None)[0].eval()))
