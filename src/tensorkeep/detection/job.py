"""A detection run from its recipe: `build` makes the live objects and says how the loop is to go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tensorkeep.detection._training import Collate, DetectionLoss, Normalizer, launched, refuse_split, telling
from tensorkeep.detection.check import Checked, check_training, refuse_untrainable, unusable_annotations
from tensorkeep.detection.data.annotations import Annotations, read_annotations
from tensorkeep.detection.data.clips import Clips, kept_parts, most_segments
from tensorkeep.detection.data.device_augment import augment_batch
from tensorkeep.detection.data.device_decode import decoded_ahead, require_decoder
from tensorkeep.detection.data.feature_checks import check_features
from tensorkeep.detection.data.frame_cache import describe, find_cache, open_cache
from tensorkeep.detection.inference import MeanAveragePrecision
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.groups import make_optimizer
from tensorkeep.detection.model.quantization import compute_in_float8
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe.text import kept_of
from tensorkeep.detection.recipe_data import PARTS, evaluation_of, read_classes, read_clips, tell
from tensorkeep.detection.start import make_detector
from tensorkeep.output import Output
from tensorkeep.quantization.modules import check_ranks
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import Progress
from tensorkeep.training import distributed, trackers
from tensorkeep.training import job as training_job
from tensorkeep.training.batches import parts_of
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import Outcome, fit
from tensorkeep.training.precision import autocast
from tensorkeep.training.recipe import plain
from tensorkeep.training.saver import State
from tensorkeep.training.schedules import schedule_of

Remark = Callable[[str], None]
SHOWN = 5  # findings about the training data at the start of a run


def build(
    recipe: DetectionRecipe, run: str | Path, world: World | None = None, remark: Remark = lambda _: None
) -> tuple[Job, Loop]:
    """Build the job and the loop of a recipe, the detector on `world.device`.

    Args:
        recipe: the recipe.
        run: the run's folder; frozen weights that no file holds go into its `base`.
        world: this process among its peers; None: the only one, on the CPU.
        remark: gets a line for each thing worth knowing.

    Returns:
        The job and the loop, for `fit`.

    Raises:
        TensorkeepError: data, weights and recipe do not fit together.

    Example:
        >>> job, loop = build(read_recipe("own_data"), "runs/own")      # doctest: +SKIP
    """
    world = world or World()
    classes = read_classes(recipe)
    clips = read_clips(recipe, "train", classes, remark)
    _say(check_training(clips, *_asked(recipe), classes, recipe.model.head), recipe, remark)
    loop = loop_of(recipe, len(clips))
    refuse_split(recipe.model, world.size * parts_of(loop.batch, world.size, loop.micro or loop.batch))
    if not recipe.data.floor_frames and recipe.data.mode != "resized":
        remark("note: floor_frames: false is not carried out: annotated seconds become whole frames")
    evaluate = evaluation_of(recipe, classes, world, lambda: autocast(loop, world), remark)
    clips, evaluate = with_kept_frames(recipe, clips, evaluate, world, remark)
    detector, base = make_detector(recipe, Path(run), world, remark)
    check_ranks(detector, peers=world.size > 1)
    if recipe.training.quantize_compute == "fp8" and detector.backbone is not None:
        remark(f"quantize_compute: {compute_in_float8(detector.backbone)} linears have products in fp8 while training")
    frames = float(recipe.data.window_size * recipe.data.scale_factor)
    on_gpu = world.device.type == "cuda"
    recorded = loop.graph or (loop.graph is None and on_gpu)  # then batches have one shape
    job = Job(
        model=detector,
        optimizer=make_optimizer(detector, recipe.optimizer),
        data=clips,
        collate=Collate(recipe.model, most_segments(clips) if recorded else None),
        loss=DetectionLoss(detector),
        count=telling(remark, clips.notes),
        divisor=Normalizer(detector),
        schedule=schedule_of(recipe.schedule, recipe.training, len(clips)),
        evaluate=evaluate,
        ema=None if recipe.training.ema is None else Ema(detector, recipe.training.ema),
        base=base,
        recipe=plain(recipe),
        read_recipe=kept_of,
        trackers=trackers.named(recipe.training.trackers, Path(run)) if world.first else [],
        shard=blocks_of,
        pace=("frames", frames) if recipe.data.inputs == "video" else ("samples", 1.0),
        launched=launched(recipe.model),
    )
    job = augmented_on_device(job, recipe) if on_gpu else job
    return decoded_on_device(job, recipe, world.device) if recipe.data.decode == "gpu" else job, loop


def with_kept_frames(
    recipe: DetectionRecipe, clips: Clips, evaluate: MeanAveragePrecision, world: World, remark: Remark
) -> tuple[Clips, MeanAveragePrecision]:
    """Let training and its evaluations keep decoded frames in the recipe's `data.cache`, and take them from there.

    Args:
        recipe: where it names no folder, nothing changes.
        clips: the training data.
        evaluate: the evaluation.
        world: every process must call this.
        remark: gets a line on how many frames are there, and what all of them take.

    Returns:
        The data and the evaluation; their samples are the same.

    Raises:
        TensorkeepError: The folder holds other things, or cannot be made.
    """
    folder, gib = recipe.data.cache, recipe.data.cache_gib
    if folder is None:
        return clips, evaluate
    kept = distributed.together(world, lambda: open_cache(folder, gib))
    clips, tested = replace(clips, kept=kept), replace(evaluate.clips, kept=kept)
    if world.first:
        remark(f"data.cache: {describe(kept, chain(kept_parts(clips), kept_parts(tested)))}")
    return clips, replace(evaluate, clips=tested)


def augmented_on_device(job: Job, recipe: DetectionRecipe) -> Job:
    """Let the processes that load data only decode: training frames are augmented where the model is.

    Args:
        job: of `recipe`.
        recipe: on features, or without augmentation, nothing changes.

    Returns:
        The job with other `data` and `prepare`; the draws are the same.
    """
    if not isinstance(job.data, Clips) or recipe.data.inputs != "video" or recipe.data.augment is None:
        return job
    return replace(job, data=replace(job.data, uncut=True), prepare=partial(augment_batch, size=recipe.data.crop_size))


def decoded_on_device(job: Job, recipe: DetectionRecipe, device: torch.device) -> Job:
    """Let the processes that load data only ask for training frames: the device decodes, scales and augments them.

    Args:
        job: of `recipe`.
        recipe: on videos.
        device: where the model is.

    Returns:
        The job with other `data`, `prepare`, `ahead` and `decoder`; order and draws of the samples are the same.

    Raises:
        TensorkeepError: The device is no GPU, or its decoder cannot be used.
    """
    assert isinstance(job.data, Clips)
    return replace(
        job,
        data=replace(job.data, uncut=True, asks=True),
        prepare=partial(augment_batch, size=recipe.data.crop_size),
        ahead=partial(decoded_ahead, device=device, threads=max(recipe.training.workers, 1)),
        decoder=require_decoder([item.path for item in job.data.items[:SHOWN]], device),
    )


def check(
    recipe: DetectionRecipe, remark: Remark = lambda _: None, progress: Progress = lambda what, done, total: None
) -> Checked:
    """Check what a recipe trains on: its annotations against its files and the grid of its pyramid.

    Args:
        recipe: the recipe; files that cannot be used are told, and left out.
        remark: gets a line for each file that is odd.
        progress: is told how many videos of a part were looked at.

    Returns:
        What is odd, and what can be learned.

    Raises:
        TensorkeepError: Annotations or class map cannot be read, or no file can; or `data.cache` holds other things.

    Example:
        >>> check(read_recipe("own_data")).lost  # doctest: +SKIP
        0
    """
    kept = None if recipe.data.cache is None else find_cache(recipe.data.cache, recipe.data.cache_gib)
    lenient = replace(recipe, data=replace(recipe.data, broken="skip"))
    classes = read_classes(recipe)
    if unusable := unusable_annotations(*_asked(recipe), classes):
        return Checked(unusable, 0, 0, 0, ())
    parts = [read_clips(lenient, part, classes, remark, progress, None) for part in PARTS]
    for part, clips in zip(PARTS, parts, strict=True):
        tell(list(check_features(clips, progress)), part, remark)
    found = check_training(parts[-1], *_asked(recipe), classes, recipe.model.head)
    if kept is None:
        return found
    return found._replace(cache=describe(kept, chain.from_iterable(map(kept_parts, parts))))


def _asked(recipe: DetectionRecipe) -> tuple[Annotations, tuple[str, ...]]:
    """The training annotations, and the subsets of them that are asked for."""
    train, test = recipe.data.train, recipe.data.test
    subsets = (*train.subsets, *(test.subsets if test.annotations == train.annotations else ()))
    return read_annotations(train.annotations), subsets


def _say(checked: Checked, recipe: DetectionRecipe, remark: Remark) -> None:
    """Say what is odd about the training data; refuse it where nothing of it can be learned."""
    refuse_untrainable(checked, recipe.data.train.annotations)
    if checked.lost:
        remark(f"warning: {checked.lost} of {checked.actions} actions cannot be learned")
    for problem in checked.problems[:SHOWN]:
        remark(f"{problem.severity}: {problem.video or 'annotations'}: {problem.message}")
    if len(checked.problems) > SHOWN:
        more = len(checked.problems) - SHOWN
        remark(f"{more} more findings about the training data: tensorkeep check detection RECIPE")


def blocks_of(detector: torch.nn.Module) -> list[torch.nn.Module]:
    """What is sharded piece by piece: the blocks of the backbone, which has most of the weights."""
    assert isinstance(detector, Detector)
    return [] if detector.backbone is None else detector.backbone.parts()


def loop_of(recipe: DetectionRecipe, samples: int) -> Loop:
    """Say how the loop is to go; `samples`: of one epoch."""
    loop = training_job.loop_of(recipe.training, samples, recipe.checkpoint)
    return replace(loop, graph=recipe.training.graph)


def run_detection(
    recipe: DetectionRecipe,
    run: str | Path,
    resume: Any = "auto",
    world: World | None = None,
    allow: tuple[str, ...] = (),
    say: Output | None = None,
) -> Outcome:
    """Train a recipe in the folder `run`, or go on with it: `build` and `train.fit`.

    >>> run_detection(read_recipe("synthetic_tiny"), "runs/tiny").evaluation   # doctest: +SKIP
    {'average_mAP': 0.6, ...}
    """
    say = say or Output(quiet=True)
    job, loop = build(recipe, run, world, say.remark)
    return fit(job, run, loop, resume, world, allow, say)


def continued(
    recipe: DetectionRecipe, path: str, run: str | Path, job: Job, remark: Callable[[str], None] = lambda _: None
) -> State | str:
    """Read what to resume from where an OpenTAD checkpoint is named: its weights, average, moments and epoch.

    A run that has checkpoints of its own goes on from those, so that the same command may be given again.

    Args:
        recipe: the recipe.
        path: OpenTAD's checkpoint.
        run: the run's folder.
        job: the job that `build` made of the recipe.
        remark: gets a line for each thing that is not as it was.

    Returns:
        What `fit` takes as `resume`: the state, or "auto" where the run has checkpoints.
    """
    from tensorkeep.detection.opentad.resume import continue_from

    assert isinstance(job.model, Detector)
    if run_folder.steps(Path(run)):
        return "auto"
    averaged = job.ema is not None
    on = continue_from(
        path,
        job.model,
        recipe.optimizer,
        recipe.schedule,
        len(job.data),
        recipe.training,
        job.base,
        averaged,
    )
    for line in on.remarks:
        remark(line)
    return on.state
