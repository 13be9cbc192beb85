"""Scoring a trained detector on its recipe's test data."""

from __future__ import annotations

import contextlib
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
from tensorkeep.training.distributed import World
from tensorkeep.training.loop import DTYPES


class Scored(NamedTuple):
    """What was found, against what, and how good it is; `step`, `averaged`: which weights."""

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
) -> Scored:
    """mAP of a run, a step folder or another checkpoint (see `open_detector`) on the test data of its recipe; every
    rank of `world` takes its share of the videos and gets the same numbers.

    >>> evaluate_checkpoint("runs/one").result.average                       # doctest: +SKIP
    0.61
    """
    world = world or World()
    opened = open_detector(path, recipe, ema, best, world, changes, remark)
    precision = opened.recipe.training.precision

    def context() -> contextlib.AbstractContextManager[None]:
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(world.device.type, dtype=DTYPES[precision])

    evaluation = evaluation_of(opened.recipe, read_classes(opened.recipe), world, context, remark)
    found = evaluation.detections(opened.detector)
    table = table_of(found, evaluation.classes)
    result = evaluation.score(found)
    return Scored(evaluation.annotations, table, result, evaluation.blocked, opened.step, opened.averaged)


def evaluate_untrained(recipe: DetectionRecipe) -> Evaluation:
    """mAP of the detector that a run of the recipe would start from, on its test data, in float32.

    >>> evaluate_untrained(read_recipe("recipes/detection/synthetic_tiny.yaml")).average      # doctest: +SKIP
    0.0001
    """
    evaluation = evaluation_of(recipe, read_classes(recipe), World(), contextlib.nullcontext)
    return evaluation.score(evaluation.detections(make_detector(recipe, None)[0].eval()))
