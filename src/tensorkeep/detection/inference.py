"""Run a detector on data: from windows to detections, from a video's windows to its detections, from videos to mAP.

A video goes window by window, so memory does not grow with its length. Windows of different videos never share a
batch: what a video gets does not depend on its neighbours, nor on how videos are spread over processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tensorkeep.detection.data.batches import collate
from tensorkeep.detection.data.item import seconds_shown
from tensorkeep.detection.data.problems import Told
from tensorkeep.detection.data.truth import Annotations
from tensorkeep.detection.model.head import Predictions, valid_proposals
from tensorkeep.detection.results.classifiers import VideoClasses
from tensorkeep.detection.results.decode import (
    fuse_classes,
    merge_windows,
    resized_seconds,
    round_detections,
    select_candidates,
    sliding_seconds,
)
from tensorkeep.detection.results.nms import Detections, Suppression, suppress
from tensorkeep.detection.results.results import DetectionTable
from tensorkeep.detection.results.scoring import Evaluation, evaluate
from tensorkeep.storage.files import Progress
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World
from tensorkeep.training.interruption import leave_to_the_parent

if TYPE_CHECKING:
    from tensorkeep.detection.data.clips import Clips

Context = Callable[[], contextlib.AbstractContextManager[Any]]
SeePredictions = Callable[[Predictions, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Selection:
    """How raw predictions become detections.

    Attributes:
        threshold: candidates must score above it.
        limit: most candidates of a window.
        nms: how a video's detections are suppressed.
        classifier: names what a class-agnostic head finds; None: the head names it.
        top: classes of a video that the classifier gives.
        rule: how scores and class probabilities are fused, "product" or "geometric".
        rounded: whether numbers are rounded where OpenTAD rounds them.
    """

    threshold: float = 1e-3
    limit: int = 2000
    nms: Suppression = field(default_factory=Suppression)
    classifier: VideoClasses | None = None
    top: int = 2
    rule: str = "product"
    rounded: bool = False


def decode_predictions(
    predictions: Predictions, metas: Sequence[Mapping[str, Any]], selection: Selection
) -> list[Detections]:
    """Turn the predictions of a batch into detections in seconds, one for each sample.

    Args:
        predictions: of B samples.
        metas: B dicts, as `Clips.sample` gives them under "meta".
        selection: thresholds and suppression.
    """
    found = []
    for (segments, scores), meta in zip(valid_proposals(predictions), metas, strict=True):
        one = select_candidates(segments.cpu().numpy(), scores.cpu().numpy(), selection.threshold, selection.limit)
        if meta["method"] == "resize":
            one = suppress(one, selection.nms)
            times = resized_seconds(one.segments, duration=meta["duration"], length=meta["window_size"])
        else:
            times = sliding_seconds(
                one.segments,
                fps=meta["fps"],
                duration=meta["duration"],
                snippet_stride=meta["snippet_stride"],
                window_start=meta["window_start_frame"],
                offset=meta["offset_frames"],
            )
        one = one._replace(segments=times)
        found.append(round_detections(one) if selection.rounded else one)
    return found


def detect(
    detector: nn.Module,
    clips: Clips,
    selection: Selection,
    videos: Sequence[int] | None = None,
    batch: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    context: Context = contextlib.nullcontext,
    seen: SeePredictions | None = None,
) -> Iterator[tuple[int, Detections]]:
    """Detect actions in each video of a data set, one video after the other.

    The detector is used as it is: put it into evaluation mode first.

    Args:
        detector: from inputs and masks to predictions.
        clips: the windows of the videos.
        selection: how predictions become detections.
        videos: positions in `clips.items`; None: all.
        batch: windows of one video in a forward.
        workers: processes that decode.
        device: where the detector is.
        context: wraps each forward (autocast).
        seen: gets the predictions of every batch, and the batch.

    Yields:
        Position and detections of each video, in seconds and by falling score.

    Example:
        >>> for number, found in detect(detector.eval(), clips, Selection()):  # doctest: +SKIP
        ...     print(clips.items[number].name, len(found.scores))
    """
    groups = _batches_of(clips, videos, batch)
    loader = DataLoader(
        _Windows(clips),
        batch_sampler=[places for _, places, _ in groups],
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_interrupts,
    )
    windows: list[Detections] = []
    for (number, _, last), made in zip(groups, loader, strict=True):
        with torch.no_grad(), context():
            predictions = detector(made["inputs"].to(device), made["masks"].to(device))
        if seen is not None:
            seen(predictions, made)
        windows += decode_predictions(predictions, made["meta"], selection)
        if last:
            yield number, _of_video(windows, clips, number, selection)
            windows = []


def _of_video(windows: list[Detections], clips: Clips, number: int, selection: Selection) -> Detections:
    """Make one video's detections from those of its windows, at seconds at which its frames are shown."""
    item = clips.items[number]
    found = windows[0] if clips.window.method == "resize" else merge_windows(windows, selection.nms)
    if item.times is not None:
        times = seconds_shown(found.segments.astype(np.float64), item.times, item.duration)
        found = found._replace(segments=times.astype(np.float32))
    if clips.window.method != "resize" and selection.rounded:
        found = round_detections(found)
    if selection.classifier is None:
        return found
    probabilities = selection.classifier.of(item.name).astype(np.float32)
    return fuse_classes(found, probabilities, selection.top, selection.rule)


def _batches_of(clips: Clips, videos: Sequence[int] | None, batch: int) -> list[tuple[int, list[int], bool]]:
    """List for each forward the video, its windows' numbers in `clips`, and whether these are the video's last."""
    of_video: dict[int, list[int]] = {}
    for index, place in enumerate(clips.places):
        of_video.setdefault(place.item, []).append(index)
    chosen = range(len(clips.items)) if videos is None else videos
    return [
        (number, of_video[number][at : at + batch], at + batch >= len(of_video[number]))
        for number in chosen
        for at in range(0, len(of_video[number]), batch)
    ]


class _Windows(Dataset[Any]):
    """Windows by number; nothing about a test window is random, so the generator does not matter."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, index: int) -> Any:
        return self.clips.sample(index, torch.Generator().manual_seed(0))


def _leave_interrupts(_worker: int) -> None:
    """Leave Ctrl-C to the process that started this one."""
    leave_to_the_parent()


def table_of(found: Mapping[str, Detections], classes: Sequence[str]) -> DetectionTable:
    """Bring detections of videos by name into the evaluator's columns; nothing is rounded.

    Args:
        found: video -> detections in seconds.
        classes: class names in label order.
    """
    parts = list(found.values()) or [
        Detections(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    ]
    segments, scores, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return DetectionTable(
        video_names=tuple(found),
        label_names=tuple(classes),
        videos=np.repeat(np.arange(len(found)), [len(one.scores) for one in found.values()]).astype(np.int64),
        labels=labels.astype(np.int64),
        segments=segments.astype(np.float64),
        scores=scores.astype(np.float64),
        source="the detector",
    )


@dataclass(frozen=True, eq=False)
class MeanAveragePrecision:
    """Scores a detector on `clips` for the training loop; every rank gets the same numbers.

    Of W ranks each takes every W-th video; detections are gathered and scored on each rank.

    Attributes:
        clips: windows of the test videos.
        annotations: the ground truth.
        classes: names in label order.
        selection: how predictions become detections.
        protocol, thresholds, subset, blocked, recall_at: as in `evaluation.evaluate`; no thresholds: the protocol's.
        batch: windows of one video in a forward.
        workers: processes that decode.
        world: the ranks.
        context: wraps each forward (autocast).
        loss: whether the loss on the test windows is computed too, divided by its own number of positives.
        remark: gets a line for each thing that is odd about the pictures of a video.
        progress: is told how many of this rank's videos are done.
    """

    clips: Clips
    annotations: Annotations
    classes: tuple[str, ...]
    selection: Selection
    protocol: str = "opentad"
    thresholds: tuple[float, ...] = ()
    subset: str | None = None
    blocked: tuple[str, ...] = ()
    recall_at: tuple[int, ...] = ()
    batch: int = 1
    workers: int = 0
    world: World = World()  # noqa: RUF009 (frozen)
    context: Context = contextlib.nullcontext
    loss: bool = False
    remark: Callable[[str], None] = lambda _: None
    progress: Progress = lambda what, done, total: None

    def __call__(self, detector: nn.Module) -> dict[str, float]:
        """Return the scores of a detector by name, from its detections on all clips."""
        found, sums = self._gathered(detector)
        result = self.score(found)
        numbers = {"average_mAP": result.average}
        numbers |= {f"mAP@{limit:g}": float(value) for limit, value in zip(result.thresholds, result.map)}
        if self.loss:
            numbers["loss"] = (sums[0] + sums[1]) / max(sums[2], 1.0)  # as eval mode: by the positives themselves
        return numbers

    def detections(self, detector: nn.Module) -> dict[str, Detections]:
        """Return what is found in each video, by name, in the order of the data."""
        return self._gathered(detector)[0]

    def score(self, found: Mapping[str, Detections]) -> Evaluation:
        """Score detections by video name."""
        return evaluate(
            self.annotations,
            table_of(found, self.classes),
            protocol=self.protocol,
            thresholds=self.thresholds or None,
            subset=self.subset,
            blocked=self.blocked,
            recall_at=self.recall_at,
        )

    def _gathered(self, detector: nn.Module) -> tuple[dict[str, Detections], list[float]]:
        """Return the detections of all ranks by video and, where `loss` is set, sums of the losses and positives."""
        own = range(self.world.rank, len(self.clips.items), self.world.size)
        losses: list[list[float]] = []
        told = Told("test", self.remark, notes=self.clips.notes)

        def add(predictions: Predictions, made: Mapping[str, Any]) -> None:
            told(made["meta"])
            if not self.loss:
                return
            device = predictions.logits[0].device
            moved: list[list[Tensor]] = [[t.to(device) for t in made[key]] for key in ("segments", "labels")]
            sums = detector.head.loss_sums(predictions, *moved)  # type: ignore[operator, union-attr]
            losses.append([float(value) for value in sums])

        mine: dict[int, Detections] = {}
        how = (self.batch, self.workers, self.world.device, self.context, add)
        for number, found in detect(detector, self.clips, self.selection, own, *how):
            mine[number] = found
            self.progress("evaluate", len(mine), len(own))
        if hasattr(detector, "set_requires_gradient_sync"):  # in shards: every rank takes part in every forward
            self._idle(detector)
        everyone: dict[int, Detections] = {}
        rows: list[list[float]] = []
        for part, theirs in distributed.gathered(self.world, (mine, losses)):
            everyone |= part
            rows += theirs
        names = {self.clips.items[number].name: everyone[number] for number in sorted(everyone)}
        return names, [math.fsum(row[at] for row in rows) for at in range(3)]  # exact, so in any order

    def _idle(self, detector: nn.Module) -> None:
        """Run forwards on a dummy window while other ranks still have windows: in shards every rank takes part in each.

        How many follows from the data: were it asked for, this rank would wait for an answer from ranks that wait for
        its forwards.
        """
        shares = (range(rank, len(self.clips.items), self.world.size) for rank in range(self.world.size))
        counts = [len(_batches_of(self.clips, share, self.batch)) for share in shares]
        lacking = max(counts) - counts[self.world.rank]
        if lacking:
            made = collate([self.clips.sample(0, torch.Generator().manual_seed(0))])
        for _ in range(lacking):
            with torch.no_grad(), self.context():
                detector(made["inputs"].to(self.world.device), made["masks"].to(self.world.device))
