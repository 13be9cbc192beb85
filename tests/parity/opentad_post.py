"""Parity with OpenTAD of everything after the model: suppression, windows, post-processing, mean average precision.

`cases(folder)` finds the fixtures of these kinds in a folder by their names and content and yields one
`(name, figure, tolerance)` for each thing compared; a figure above its tolerance is a failure.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tensorkeep.detection.data.annotations import AMBIGUOUS, number_segments, parse_annotations
from tensorkeep.detection.data.annotations import unique_segments as unique
from tensorkeep.detection.data.windows import (
    clip_to_window,
    count_snippets,
    make_window,
    place_windows,
    resized_frames,
    resized_segments,
    segment_frames,
)
from tensorkeep.detection.results.decode import (
    fuse_classes,
    merge_windows,
    resized_seconds,
    round_detections,
    select_candidates,
    sliding_seconds,
)
from tensorkeep.detection.results.evaluation import evaluate
from tensorkeep.detection.results.nms import Detections, from_opentad, suppress, vote
from tensorkeep.detection.results.results import parse_detections

Case = tuple[str, float, float]


def cases(folder: Path) -> Iterator[Case]:
    """All comparisons for the fixtures of `folder`."""
    for path in sorted(folder.glob("nms*.safetensors")):
        yield from nms_cases(path)
    for path in sorted(folder.glob("postproc_*.json")):
        config = json.loads(path.read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
        compare = sliding_cases if "windows" in config else resized_cases
        yield from compare(path.stem, config, tensors)
    for path in sorted(folder.glob("map_*_expected.json")):
        yield from map_cases(path)
    for path in sorted(folder.glob("dataset_windows*.json")):
        yield from window_cases(path.stem, json.loads(path.read_text()))


def nms_cases(path: Path) -> Iterator[Case]:
    """Kept segments, scores and labels of every case, in order."""
    config, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    detections = Detections(tensors["in/segments"], tensors["in/scores"], tensors["in/labels"])
    for name, options in config["cases"].items():
        kept = suppress(detections, from_opentad(options))
        want = Detections(*(tensors[f"{name}/{part}"] for part in ("segments", "scores", "labels")))
        yield f"{path.stem}/{name}/count", abs(len(kept.scores) - len(want.scores)), 0
        if len(kept.scores) == len(want.scores):
            yield f"{path.stem}/{name}/scores", largest(kept.scores, want.scores), 1e-5
            yield f"{path.stem}/{name}/segments", largest(kept.segments, want.segments), few_units(want.segments)
            yield f"{path.stem}/{name}/labels", float((kept.labels != want.labels).sum()), 0
    if "voting/segments" in tensors:
        want_voted = tensors["voting/segments"]
        kept_segments = tensors["in/segments"][: len(want_voted)]
        voted = vote(kept_segments, detections.segments, detections.scores, config["voting"]["iou_threshold"])
        yield f"{path.stem}/voting", largest(voted, want_voted), few_units(want_voted)


def sliding_cases(stem: str, config: dict[str, Any], tensors: dict[str, Any]) -> Iterator[Case]:
    """Every window before suppression and every video after the merge, as multisets of (label, score, segment)."""
    classes, rule = config["classes"], from_opentad(config["post_cfg"]["nms"])
    windows: dict[str, list[Detections]] = {}
    for entry in config["windows"]:
        meta = entry["meta"]
        video = meta["video_name"]
        raw = f"raw/{video}.{len(windows.get(video, []))}"
        found = select_candidates(
            tensors[f"{raw}.proposals"], tensors[f"{raw}.scores"], config["pre_nms_thresh"], config["pre_nms_topk"]
        )
        times = sliding_seconds(
            found.segments,
            fps=meta["fps"],
            duration=meta["duration"],
            snippet_stride=meta["snippet_stride"],
            window_start=meta["window_start_frame"],
            offset=meta["offset_frames"],
        )
        windows.setdefault(video, []).append(round_detections(found._replace(segments=times)))
        yield f"{stem}/{raw[4:]}", differing(windows[video][-1], classes, entry["results"]), 0
    for video, want in config["merged"].items():
        yield f"{stem}/{video}/merged", differing(merge_windows(windows[video], rule), classes, want), 0


def resized_cases(stem: str, config: dict[str, Any], tensors: dict[str, Any]) -> Iterator[Case]:
    """Every video for every fusion rule, as multisets of (label, score, segment)."""
    classes, rule = config["classifier"]["class"], from_opentad(config["post_cfg"]["nms"])
    stated = [config.get("pre_nms_thresh"), config.get("pre_nms_topk")]  # a sentence where the head has one class
    limits = stated if all(isinstance(value, int | float) for value in stated) else []
    for meta in config["metas"]:
        video = meta["video_name"]
        found = select_candidates(tensors[f"raw/{video}.proposals"], tensors[f"raw/{video}.scores"], *limits)
        kept = suppress(found, rule)
        times = resized_seconds(kept.segments, duration=meta["duration"], length=meta["resize_length"])
        probabilities = np.array(config["classifier"]["results"][video])
        for name, want in config["results"].items():
            top = re.search(r"top(\d+)", name)
            number = int(top[1]) if top else int(config["post_cfg"]["external_cls"]["topk"])
            fusion = "geometric" if "sqrt" in name or "standard" in name else "product"
            fused = fuse_classes(kept._replace(segments=times), probabilities, number, fusion)
            yield f"{stem}/{name}/{video}", differing(fused, classes, want[video]), 0


def map_cases(path: Path) -> Iterator[Case]:
    """mAP, AP by class, counts and recall; where scores tie, the distance to the span of the documented orders."""
    stem = path.name.removesuffix("_expected.json")
    want = json.loads(path.read_text())

    def load(part: str) -> Any:
        return json.loads(path.with_name(f"{stem}_{part}.json").read_text())

    got = evaluate(
        parse_annotations(load("gt")),
        parse_detections(load("pred")),
        protocol="opentad",
        thresholds=want["tiou_thresholds"],
        subset=want.get("subset", "validation"),
        blocked=load("blocked") if want["blocked"] else (),
        recall_at=want["top_k"] or (),
    )
    yield f"{stem}/segments", abs(sum(got.segments) - want["n_gt"]), 0
    yield f"{stem}/detections", abs(got.detections - want["n_pred"]), 0
    if "tie_order_variants" in want:
        spans = np.array([want["mAP"], *(variant["mAP"] for variant in want["tie_order_variants"].values())])
        outside = np.maximum(spans.min(axis=0) - got.map, got.map - spans.max(axis=0))
        yield f"{stem}/mAP outside the span of tie orders", float(np.maximum(outside, 0).max()), 0.02
        return
    yield f"{stem}/mAP", largest(got.map, np.array(want["mAP"])), 1e-9
    yield f"{stem}/average", abs(got.average - want["average_mAP"]), 1e-9
    yield f"{stem}/classes", float(len(set(got.classes) ^ set(want["AP"]))), 0
    ap = dict(zip(got.classes, got.ap, strict=True))
    yield f"{stem}/AP", max(largest(ap[name], np.array(row)) for name, row in want["AP"].items() if name in ap), 1e-9
    for k, recall in got.recall.items():
        wanted = np.array([want["metrics"][f"recall@{threshold}@{k}"] for threshold in want["tiou_thresholds"]])
        yield f"{stem}/recall@{k}", largest(recall, wanted), 1e-9


def window_cases(stem: str, config: dict[str, Any]) -> Iterator[Case]:
    """Windows, frames, masks and the annotated segments in them. Random truncation is compared elsewhere."""
    annotations = parse_annotations(config["annotation"])
    size, scale, classes = config["window_size"], config["scale_factor"], config["class_map"]
    stride = find_stride(config)
    for key, want in config.items():
        kind = re.fullmatch(r"(test|val)_sliding_overlap_([\d.]+)", key)
        if kind:
            got = {
                video.name: sliding_windows(video, size, float(kind[2]), scale, stride, classes, kind[1] == "val")
                for video in annotations.of_subset("validation")
            }
            yield from compare_windows(f"{stem}/{key}", got, want)
    blocked = set(config.get("block_list", ()))
    trained = [
        video.name
        for video in annotations.of_subset("training")
        if video.name not in blocked and set(video.labels) - {AMBIGUOUS}
    ]
    yield f"{stem}/train_videos", float(trained != config["train_videos"]), 0
    for name, wanted in config["train_gt"].items():
        video = annotations.videos[name]
        segments, labels = number_segments(video, classes)
        frames = segment_frames(segments, duration=video.duration or 0, frames=video.frames or 0)
        yield f"{stem}/train_gt/{name}", largest(frames, np.array(wanted["gt_segments_frames"])), 0
        yield f"{stem}/train_gt/{name}/labels", float(labels.tolist() != wanted["gt_labels"]), 0
    for wanted in config["anet_resize"]:
        video, length = annotations.videos[wanted["video_name"]], wanted["resize_length"]
        frames = resized_frames(video.frames or 0, length, config["anet_scale_factor"])
        yield f"{stem}/anet_resize/{video.name}/frames", largest(frames, np.array(wanted["frame_inds"])), 0
        own = video.segments[unique(video.segments, video.labels, 0.0)]
        steps = resized_segments(own, duration=video.duration or 0, length=length)
        yield f"{stem}/anet_resize/{video.name}/segments", largest(steps, np.array(wanted["gt_segments"])), 1e-5


def sliding_windows(
    video: Any, size: int, overlap: float, scale: int, stride: int, classes: list[str], with_segments: bool
) -> list[dict[str, Any]]:
    """One video's windows under the names of the fixture; with segments, windows without any are left out."""
    segments, labels = number_segments(video, classes)
    frames = segment_frames(segments, duration=video.duration, frames=video.frames)
    rows = []
    for bounds in place_windows(count_snippets(video.frames, stride), size, overlap):
        window = make_window(bounds, video.frames, size=size, snippet_stride=stride, scale=scale)
        inside, kept = clip_to_window(frames, window, snippet_stride=stride)
        row = {
            "feature_start_idx": window.first,
            "feature_end_idx": window.last,
            "fps": video.frame_rate(),
            "duration": video.duration,
            "snippet_stride": stride,
            "window_start_frame": window.start_frame,
            "frame_inds": window.frames.tolist(),
            "masks": window.mask.tolist(),
            "gt_segments": inside.tolist(),
            "gt_labels": labels[kept].tolist(),
            "ends_with_video": window.last + 1 == count_snippets(video.frames, stride),
        }
        if len(kept) or not with_segments:
            rows.append(row)
    return rows


def compare_windows(name: str, got: dict[str, list[dict[str, Any]]], want: list[dict[str, Any]]) -> Iterator[Case]:
    """Windows of the original that ours lack or give otherwise, and windows of ours that are not the missing tail.

    The original repeats a window that ends exactly with the video, and with small overlaps has none at the end.
    """
    by_place = {(video, row["feature_start_idx"]): row for video, rows in got.items() for row in rows}
    wrong, known = 0, set()
    for entry in want:
        place = (entry["video_name"], entry["feature_start_idx"])
        known.add(place)
        row = by_place.get(place, {})
        wrong += any(key not in row or largest(row[key], entry[key]) > 1e-5 for key in COMPARED if key in entry)
    yield f"{name}/windows that differ", float(wrong), 0
    extra = [row for place, row in by_place.items() if place not in known]
    yield f"{name}/more windows, other than a lost tail", float(sum(not row["ends_with_video"] for row in extra)), 0


COMPARED = (
    "feature_start_idx",
    "feature_end_idx",
    "fps",
    "duration",
    "snippet_stride",
    "window_start_frame",
    "frame_inds",
    "masks",
    "gt_segments",
    "gt_labels",
)


def find_stride(config: dict[str, Any]) -> int:
    """Snippet stride: stated by test windows, elsewhere the distance of a window's first frame per snippet."""
    entries = [entry for key, rows in config.items() if "_sliding_overlap_" in key for entry in rows]
    stated = [int(entry["snippet_stride"]) for entry in entries if "snippet_stride" in entry]
    moved = [
        entry["window_start_frame"] // entry["feature_start_idx"] for entry in entries if entry["feature_start_idx"]
    ]
    return next(iter(stated + moved))


def differing(got: Detections, classes: list[str], want: list[dict[str, Any]]) -> float:
    """How many rounded (label, score, segment) of two multisets have no partner in the other."""
    rounded = round_detections(got)
    ours = Counter(
        (classes[label], round(float(score) * 1e4), round(float(start) * 1e2), round(float(end) * 1e2))
        for (start, end), score, label in zip(*rounded, strict=True)
    )
    theirs = Counter(
        (row["label"], round(row["score"] * 1e4), round(row["segment"][0] * 1e2), round(row["segment"][1] * 1e2))
        for row in want
    )
    return float((ours - theirs).total() + (theirs - ours).total())


def largest(got: Any, want: Any) -> float:
    """Largest absolute difference; infinite where shapes differ."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    if got.shape != want.shape and not got.size == want.size == 0:
        return float("inf")
    return float(np.abs(got - want).max(initial=0.0))


def few_units(values: Any) -> float:
    """1e-5, or four float32 units in the last place of the largest value where that is more.

    The original sums votes in float32 in the order of its matrix product; ours are summed in float64.
    """
    return max(1e-5, 4 * float(np.spacing(np.float32(np.abs(values).max(initial=0.0)))))
