"""Translate OpenTAD's `dataset` section: what its pipelines do to frames and features, step by step.

A step, a value or a combination that is not done the same way here stays unread, so that it is listed as lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tensorkeep.detection.data.augment import AugmentConfig
from tensorkeep.detection.opentad._config_file import Setting
from tensorkeep.detection.opentad._literals import Section, Unknown
from tensorkeep.detection.recipe.schema import DataConfig, SplitConfig
from tensorkeep.errors import TensorkeepError

Found = dict[str, Any]
DATASET_TYPE = re.compile(r"(\w*?)(Padding|Sliding|Resize)Dataset")
MODES = {"Padding": "whole", "Sliding": "sliding", "Resize": "resized"}
METHODS = {"sliding": ("random_trunc", "sliding_window"), "resized": ("resize", "resize")}
_SHORTEST = {"AnetResize": 0.01}  # annotated actions not longer than this go, where `filter_gt` is set; else 0
_BOTH = ("feature_stride", "sample_stride", "offset_frames", "fps", "class_agnostic", "resize_length", "class_map")
SHARED = ("scale_factor", "file_pattern", "crop_size", "feature_layout", "feature_channels", "inputs")


def data_config(dataset: Section, max_length: int | None, lost: list[Setting]) -> DataConfig:
    """Translate the `dataset` dict of an OpenTAD config.

    Args:
        dataset: the section.
        max_length: grid steps that the detector pads to.
        lost: gets what does not fit together.

    Raises:
        TensorkeepError: The class of a data set is unknown, or frames are read by no known step.
    """
    train, test = dataset["train"], dataset["test"]
    family, kind = _dataset_type(train["type"], "dataset.train")
    mode = MODES[_dataset_type(test["type"], "dataset.test")[1]]
    if kind != ("Resize" if mode == "resized" else "Padding"):
        lost.append(
            Setting("dataset.train.type", "", train["type"], f"training is on random windows for {test['type']}")
        )
    shown, seen = _pipeline(train, max_length), _pipeline(test, max_length)
    for key in _BOTH:
        if train.get(key) != test.get(key):
            lost.append(
                Setting(f"dataset.train.{key}", train.lines.get(key, ""), train.get(key), "differs from the test part")
            )
    for key in SHARED:
        if shown.get(key) != seen.get(key):
            why = f"is {shown.get(key)} in training and {seen.get(key)} in the test pipeline"
            lost.append(Setting("dataset.train.pipeline", train.lines.get("pipeline", ""), key, why))
    for found, part, method in zip((shown, seen), ("train", "test"), METHODS.get(mode, ())):
        if found["inputs"] == "video" and found.get("method") != method:
            lost.append(Setting(f"dataset.{part}.pipeline", "", found.get("method"), f"LoadFrames is {method} here"))
    values = _of_dataset_type(family, mode, train, test, shown, lost)
    values |= _pictures(shown, seen, lost) if shown["inputs"] == "video" else _features(shown)
    values |= {"class_map": train.get("class_map"), "class_agnostic": train.get("class_agnostic", False)}
    if mode != "resized":
        values |= {"feature_stride": train["feature_stride"], "sample_stride": train.get("sample_stride", 1)}
        values["offset_frames"] = train.get("offset_frames", 0)
    if shown["inputs"] == "features" and len(_split(train).folders) > 1:
        values["feature_rows"] = "resized"
    return DataConfig(train=_split(train), test=_split(test), mode=mode, inputs=shown["inputs"], **values)  # type: ignore[arg-type]


def padding_of(part: Section) -> int | None:
    """Return the grid steps that a part of a data set pads features to; None where no step of its pipeline does."""
    steps = (step for step in dict.get(part, "pipeline", ()) if isinstance(step, Section))
    return next((step["length"] for step in steps if dict.get(step, "type") == "Padding"), None)


def expected(section: Section, key: str, *values: object) -> None:
    """Mark `key` as read where it holds one of `values`; anything else stays unread, and so is listed."""
    if any(dict.get(section, key) == value for value in values):
        section.seen.add(key)


def _dataset_type(name: Any, where: str) -> tuple[str, str]:
    """Split the class of a data set into its family ("Anet") and what it does ("Padding", "Sliding", "Resize")."""
    match = DATASET_TYPE.fullmatch(str(name))
    if match is None:
        hint = "known: ...PaddingDataset, ...SlidingDataset, ...ResizeDataset"
        raise TensorkeepError(f"type {name!r} is not a data set that is read here", where=where, hint=hint)
    return match[1], match[2]


def _split(part: Section) -> SplitConfig:
    """Translate where one part of the data lies."""
    subset = part["subset_name"]
    subset, folder = (tuple(v) if isinstance(v, list) else v for v in (subset, part["data_path"]))
    # a list of names in the config itself stays unread
    blocked = part.get("block_list") if isinstance(dict.get(part, "block_list"), str | None) else None
    return SplitConfig(part["ann_file"], subset, folder, blocked)


def _of_dataset_type(family: str, mode: str, train: Section, test: Section, shown: Found, lost: list[Setting]) -> Found:
    """Translate windows, frame rate and filters, which depend on the class of the data set."""
    expected(test, "test_mode", True)
    test.seen.add("filter_gt")  # test windows carry no annotation
    values: Found = {"trunc_thresh": None, "crop_ratio": None} | {
        k: shown[k] for k in ("trunc_thresh", "crop_ratio") if k in shown
    }
    lengths = {
        "sliding": test.get("window_size"),
        "resized": train.get("resize_length"),
        "whole": shown.get("trunc_len"),
    }
    values["window_size"] = lengths[mode]
    if shown.get("trunc_len", lengths[mode]) != lengths[mode]:
        why = f"the test window is {lengths[mode]}"
        lost.append(Setting("dataset.train.pipeline.trunc_len", "", shown["trunc_len"], why))
    if mode == "sliding":
        values["window_overlap_ratio"] = test.get("window_overlap_ratio", 0.25)
    if family == "Anet":
        values["floor_frames"] = mode == "resized"
    if family in ("Anet", "EpicKitchens") and (train.get("fps") or -1) > 0:
        values["fps"] = float(train["fps"])
    elif family not in ("Anet", "EpicKitchens"):
        train.seen.discard("fps")
        test.seen.discard("fps")
    if train.get("filter_gt", False):
        values["min_length"] = _SHORTEST.get(f"{family}{'Resize' if mode == 'resized' else ''}", 0.0)
        if family == "Anet" and mode != "resized":
            why = "actions that begin after the video, or end before it, stay in training here"
            lost.append(Setting("dataset.train.filter_gt", train.lines["filter_gt"], True, why))
    return values


def _pictures(shown: Found, seen: Found, lost: list[Setting]) -> Found:
    """Translate the sizes of frames, and what happens to them in training."""
    size = seen["crop_size"]
    if seen["short_side"] != size or seen.get("crop") != "centre":
        why = f"test frames are shown as the middle square, {size} pixels as their shorter side"
        lost.append(Setting("dataset.test.pipeline", "", seen["short_side"], why))
    augment = AugmentConfig(
        size=shown["crop_size"],
        short_side=shown["short_side"],
        crop=shown.get("crop", "centre"),
        **{key: shown[key] for key in ("area", "aspect") if key in shown},
        flip=shown.get("flip", 0.0),
        operations=shown.get("operations", 0),
        jitter=shown.get("jitter", (0.0,) * 4),
    )
    as_tested = AugmentConfig(size, size, "centre", flip=0.0, operations=0, jitter=(0.0,) * 4)
    values = {"crop_size": size, "augment": None if augment == as_tested else augment}
    return {**values, "scale_factor": seen["scale_factor"], "file_pattern": seen["file_pattern"]}


def _features(shown: Found) -> Found:
    """Translate how features are stored."""
    names = ("file_pattern", "feature_channels")
    return {"feature_layout": shown.get("feature_layout", "ct")} | {k: shown[k] for k in names if k in shown}


def _pipeline(part: Section, max_length: int | None) -> Found:
    """Gather what the steps of a pipeline say."""
    found: Found = {"inputs": "features", "max_length": max_length}
    for step in part["pipeline"]:
        name = None if isinstance(step, Unknown) else str(step["type"]).removeprefix("mmaction.")
        if name in STEPS:
            STEPS[name](step, found)
        elif name is not None:
            step.seen.discard("type")  # listed as lost by its type
    if found["inputs"] == "video":
        for key in ("short_side", "crop_size", "file_pattern", "scale_factor"):
            if key not in found:
                hint = "steps that are read: " + ", ".join(STEPS)
                raise TensorkeepError(
                    f"no step of the pipeline gives {key}", where=part.lines.get("pipeline"), hint=hint
                )
    return found


def _prepare_video(step: Section, found: Found) -> None:
    """Read how a video's file is called."""
    expected(step, "modality", "RGB")
    found["file_pattern"] = f"{step.get('prefix', '')}{{video}}.{step.get('format', 'mp4')}"


def _load_frames(step: Section, found: Found) -> None:
    """Read which frames are decoded."""
    expected(step, "num_clips", 1)
    found |= {"inputs": "video", "method": step.get("method", "resize"), "scale_factor": step.get("scale_factor", 1)}
    _random_window(step, found)


def _random_window(step: Section, found: Found) -> None:
    """Read how a random training window is cut."""
    for key in ("trunc_len", "trunc_thresh", "crop_ratio"):
        value = step.get(key)
        if value is not None:
            found[key] = tuple(value) if isinstance(value, list) else value


def _load_features(step: Section, found: Found) -> None:
    """Read how a feature file is called."""
    ending = dict.get(step, "feat_format", "npy")
    endings = list(ending) if isinstance(ending, list | tuple) else [ending]
    if endings and set(endings) <= {"npy", "npz", "pt", "pkl", "csv"}:
        step.seen.add("feat_format")
    ending = endings[0] if endings else "npy"  # a file with another ending is found where there is none of this
    found["file_pattern"] = f"{step.get('prefix', '')}{{video}}{step.get('suffix', '')}.{ending}"


def _resize(step: Section, found: Found) -> None:
    """Read what frames are resized to, before or after a crop."""
    scale = dict.get(step, "scale")
    if isinstance(scale, list | tuple) and len(scale) == 2:
        if scale[0] == -1 and "crop" not in found:
            found["short_side"] = scale[1]
            step.seen.add("scale")
            expected(step, "keep_ratio", True)
        elif scale[0] == scale[1] and found.get("crop") == "resized":
            found["crop_size"] = scale[1]
            step.seen.add("scale")
            expected(step, "keep_ratio", False)


def _random_crop(step: Section, found: Found) -> None:
    """Read a crop of random area and shape."""
    area, aspect = step.get("area_range", (0.08, 1.0)), step.get("aspect_ratio_range", (3 / 4, 4 / 3))
    found |= {"crop": "resized", "area": tuple(area), "aspect": tuple(aspect)}


def _centre_crop(step: Section, found: Found) -> None:
    """Read a crop of the middle."""
    found |= {"crop": "centre", "crop_size": step["crop_size"]}


def _flip(step: Section, found: Found) -> None:
    """Read how often clips are mirrored."""
    expected(step, "direction", "horizontal")
    found["flip"] = step.get("flip_ratio", 0.5)


def _imgaug(step: Section, found: Found) -> None:
    """Read RandAugment under imgaug's default policy."""
    expected(step, "transforms", "default")
    found["operations"] = AugmentConfig().operations if "transforms" in step.seen else 0


def _jitter(step: Section, found: Found) -> None:
    """Read colour jitter."""
    defaults = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    found["jitter"] = tuple(step.get(key, default) for key, default in defaults.items())


def _rearrange(step: Section, found: Found) -> None:
    """Read the axes of a feature file."""
    expected(step, "keys", ["feats"])
    if re.sub(r"\s+", "", str(dict.get(step, "ops"))) == "tc->ct":
        step.seen.add("ops")
        found["feature_layout"] = "tc"


def _pad(step: Section, found: Found) -> None:
    """Check a padding, which the detector does anyway."""
    expected(step, "length", found["max_length"])  # the detector pads to it anyway
    expected(step, "pad_value", 0)
    expected(step, "channel_first", False)


def _channels(step: Section, found: Found) -> None:
    """Read which channels of a feature file are used."""
    step.seen.add("in_channels")
    found["feature_channels"] = tuple(step["index"])


def _format(step: Section, found: Found) -> None:
    """Check the axes of decoded frames."""
    expected(step, "input_format", "NCTHW")


def _resize_features(step: Section, found: Found) -> None:
    """Check how features of a whole video are resized."""
    expected(step, "tool", "torchvision_align")
    expected(step, "channel_first", False)


def _window_features(step: Section, found: Found) -> None:
    """Check how features of a sliding window are cut."""
    expected(step, "with_mask", True)


def _nothing(step: Section, found: Found) -> None:
    """Mark a step as read whose arguments change no number: decoding threads, which keys are collected."""
    step.seen.update(step)


STEPS: dict[str, Callable[[Section, Found], None]] = {
    "PrepareVideoInfo": _prepare_video,
    "LoadFrames": _load_frames,
    "Resize": _resize,
    "RandomResizedCrop": _random_crop,
    "CenterCrop": _centre_crop,
    "Flip": _flip,
    "ImgAug": _imgaug,
    "ColorJitter": _jitter,
    "FormatShape": _format,
    "LoadFeats": _load_features,
    "Rearrange": _rearrange,
    "RandomTrunc": _random_window,
    "SlidingWindowTrunc": _window_features,
    "ResizeFeat": _resize_features,
    "Padding": _pad,
    "ChannelReduction": _channels,
    **dict.fromkeys(("DecordInit", "DecordDecode", "PyAVInit", "PyAVDecode", "ConvertToTensor", "Collect"), _nothing),
}
