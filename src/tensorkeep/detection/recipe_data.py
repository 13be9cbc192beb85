"""The data of a detection recipe: its two parts as clips, its classes, and how it is scored.

What a recipe says and this cannot carry out is refused by the key that says it, or told, never passed over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tensorkeep.detection.data.annotations import Annotations, read_annotations, read_class_map
from tensorkeep.detection.data.clips import Clips, make_clips
from tensorkeep.detection.data.item import Item, frame_lengths
from tensorkeep.detection.data.items import find_items
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.readers import FeatureReader, VideoReader, WindowConfig
from tensorkeep.detection.inference import MeanAveragePrecision, Selection
from tensorkeep.detection.recipe.schema import DataConfig, DetectionRecipe, SplitConfig
from tensorkeep.detection.results.classifiers import read_classifier
from tensorkeep.detection.results.columns import read_blocked
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Progress
from tensorkeep.training.distributed import World

Remark = Callable[[str], None]
Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("test", "train")
WINDOWS = 4  # of one video in a forward of an evaluation: nothing that a start may change, so that figures stay


def read_classes(recipe: DetectionRecipe) -> tuple[str, ...]:
    """Return the class names in label order: of the class map, or of the training annotations.

    Args:
        recipe: its sections `data` and `model.head` count.

    Raises:
        TensorkeepError: the head does not have as many classes.
    """
    data = recipe.data
    classes = _class_map(data.class_map, data) if data.class_map else read_annotations(data.train.annotations).classes
    if not data.class_agnostic and len(classes) != recipe.model.head.classes:
        few = ", ".join(classes[:4])
        raise TensorkeepError(
            f"there are {len(classes)} classes ({few}, ...), the head has {recipe.model.head.classes}",
            where=data.class_map or data.train.annotations,
            hint=f"--model.head.classes {len(classes)}",
        )
    return classes


def _class_map(path: str, data: DataConfig) -> tuple[str, ...]:
    """Read a class map; the labels of the training annotations, where those are here, tell its two forms apart."""
    labels: set[str] = set()
    if Path(data.train.annotations).exists():
        with contextlib.suppress(TensorkeepError):  # whoever needs them will tell
            labels = set(read_annotations(data.train.annotations).classes)
    return read_class_map(path, labels)


def read_clips(
    recipe: DetectionRecipe,
    part: Part,
    classes: Sequence[str],
    remark: Remark = lambda _: None,
    progress: Progress = lambda what, done, total: None,
    most: int | None = 5,
) -> Clips:
    """The training or the test data of a recipe; what is odd about its files goes to `remark`, `most` of it."""
    data = recipe.data
    split: SplitConfig = getattr(data, part)
    reader = _reader_of(recipe, part)
    annotations = _without(read_annotations(split.annotations), split.blocked)
    how: dict[str, Any] = {"pattern": data.file_pattern, "grid": data.grid, "progress": progress}
    items, problems = find_items(annotations, split.subsets, split.folders, reader, classes, **how)
    tell(problems, part, remark, most)
    items = [_adjusted(item, data, part) for item in items]
    steps = max(item.steps for item in items)
    return make_clips(items, window_of(data, part, steps), reader)


def tell(problems: Sequence[Problem], part: str, remark: Remark, most: int | None = None) -> None:
    """Say what is odd about the files of a part of the data, a line each.

    Args:
        problems: what was found.
        part: of the data, which begins each line.
        remark: gets the lines.
        most: how many are told, of more their number; None: all.
    """
    for problem in problems[:most]:
        remark(f"{part}: {f'{problem.video}: ' if problem.video else ''}{problem.message}")
    if most is not None and len(problems) > most:
        remark(f"{part}: {len(problems) - most} more findings of this kind: tensorkeep check detection RECIPE")


def _without(annotations: Annotations, blocked: str | None) -> Annotations:
    gone = set(read_blocked(blocked)) if blocked else set()
    return replace(annotations, videos={name: v for name, v in annotations.videos.items() if name not in gone})


def _adjusted(item: Item, data: DataConfig, part: Part) -> Item:
    """An item with the recipe's rate, classes and shortest action."""
    if data.fps is not None:
        item = item._replace(frames=max(round(item.duration * data.fps), 1))
    if data.min_length is not None and part == "train":
        shares = (item.segments[:, 1] - item.segments[:, 0]) / item.duration
        lengths = shares if data.mode == "resized" else frame_lengths(item)
        kept = np.flatnonzero(lengths > data.min_length)
        item = item._replace(segments=item.segments[kept], labels=item.labels[kept])
    return item._replace(labels=np.zeros_like(item.labels)) if data.class_agnostic else item


def _reader_of(recipe: DetectionRecipe, part: Part) -> VideoReader | FeatureReader:
    """How a sample's frames or features are read. Raises TensorkeepError for a key that cannot be carried out."""
    data = recipe.data
    broken = "error" if data.broken == "fatal" else data.broken
    if data.inputs == "video":
        if data.fps is not None:
            what = "fps is for features: a video file says its own rate"
            raise TensorkeepError(what, where="data.fps", hint="fps: null")
        return VideoReader(data.crop_size, data.augment if part == "train" else None, broken)
    if data.feature_channels is not None:
        what = "a part of the stored channels cannot be read"
        raise TensorkeepError(what, where="data.feature_channels", hint="store that part as files of its own")
    projection, first, resized = recipe.model.projection, data.feature_layout == "ct", data.feature_rows == "resized"
    folders = getattr(data, part).folders
    widths = tuple(taken for taken, _ in getattr(projection, "per_file", ())) if len(folders) > 1 else ()
    if widths and len(widths) != len(folders):
        what = f"{len(folders)} folders of features, model.projection.per_file has {len(widths)}"
        hint = "one folder for each, in its order, or one folder whose files have all channels"
        raise TensorkeepError(what, where=f"data.{part}.folder", hint=hint)
    return FeatureReader(projection.in_channels, first, broken, resized, widths, data.feature_key)


def window_of(data: DataConfig, part: Part, steps: int = 0) -> WindowConfig:
    """Return how windows are placed.

    Args:
        data: the recipe's section.
        part: "train", or another part of the data.
        steps: those of the longest feature file, which mode `whole` tests in one window.

    Raises:
        TensorkeepError: training needs `trunc_thresh` and has none.
    """
    method: Literal["random_trunc", "sliding", "resize"] = "random_trunc" if part == "train" else "sliding"
    if data.mode == "resized":
        method = "resize"
    elif data.trunc_thresh is None and part == "train":
        what = f"mode {data.mode!r} trains on random windows, which need a threshold"
        raise TensorkeepError(what, where="data.trunc_thresh", hint="0.75 is usual; mode: resized needs none")
    whole = data.mode == "whole" and part == "test"
    return WindowConfig(
        method,
        max(steps, 1) if whole else data.window_size,
        data.feature_stride,
        data.sample_stride,
        data.scale_factor,
        float(data.offset_frames),
        0.0 if whole else data.window_overlap_ratio,
        data.trunc_thresh or 0.75,
        data.crop_ratio,
    )


def selection_of(recipe: DetectionRecipe) -> Selection:
    """Return the rules by which predictions become detections.

    Args:
        recipe: its section `post_processing` counts; the classifier's scores are read.
    """
    post = recipe.post_processing
    chosen: dict[str, Any] = {}
    if post.classifier is not None:
        chosen = {
            "classifier": read_classifier(post.classifier.path),
            "top": post.classifier.top,
            "rule": post.classifier.rule,
        }
    return Selection(post.pre_nms_thresh, post.pre_nms_topk, post.nms, rounded=post.round_like_opentad, **chosen)


def evaluation_of(
    recipe: DetectionRecipe, classes: Sequence[str], world: World, context: Any, remark: Remark = lambda _: None
) -> MeanAveragePrecision:
    """The recipe's evaluation on its test data; `context` wraps each forward (autocast)."""
    data, rules, training = recipe.data, recipe.evaluation, recipe.training
    selection = selection_of(recipe)
    names = tuple(classes) if selection.classifier is None else selection.classifier.classes
    blocked = rules.blocked or data.test.blocked
    return MeanAveragePrecision(
        clips=read_clips(recipe, "test", classes, remark),
        annotations=read_annotations(rules.annotations or data.test.annotations),
        classes=names,
        selection=selection,
        protocol=rules.protocol,
        thresholds=rules.thresholds,
        subset=rules.subset or data.test.subsets[0],
        blocked=read_blocked(blocked) if blocked else (),
        recall_at=rules.recall_at,
        batch=min(training.batch_size, WINDOWS),
        workers=training.workers,
        world=world,
        context=context,
        loss=training.best == "-loss",
        remark=remark,
    )
