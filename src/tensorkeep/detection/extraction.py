"""Write the features that a backbone gives of video files: an array `[T, C]` a video, as OpenTAD and ActionFormer read.

Row t stands for grid step t, frame t * stride, as in training on frames: windows of the recipe's length side by side,
the last one moved back so that it ends with the video, each decoded once and gone before the one after the next. So
memory does not grow with a video, nor with their number. In mode `resized` a video is one window of `window_size` rows.

A folder of features is of one backbone and one grid: `features.json` there says which, by the digest of the weights,
and another is refused. An array appears whole or not at all; one that is there, of the video's length and newer than
the video, is not made again, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkeep.detection.data.augment import centre_crop
from tensorkeep.detection.data.problems import Problem, done
from tensorkeep.detection.data.windows import count_snippets
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.predict import Film, Predictor
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.detection.start import Opened, make_detector, open_detector, run_of
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import digest_of
from tensorkeep.storage.certificate import digest_of_all
from tensorkeep.storage.files import explained
from tensorkeep.storage.overwriting import lone_file
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training.distributed import World

FEATURES = lone_file("a feature file", r".NUMPY")
LIST, _LIST_KIND = "features.json", lone_file("a list of features", r'\{\s*"made_of":')
Remark = Callable[[str], None]


class Written(NamedTuple):
    """What was written of a video.

    Attributes:
        steps: rows of the array.
        channels: columns of the array.
        problems: sentences on what is odd about its pictures.
        new: whether it was made now; else it was there.
    """

    steps: int
    channels: int
    problems: list[str]
    new: bool


def open_backbone(
    path: str,
    recipe: str | Path | None = None,
    ema: bool = True,
    best: bool = True,
    world: World | None = None,
    remark: Remark = lambda _: None,
) -> Opened:
    """Open a detector for its backbone's sake.

    Args:
        path: what `open_detector` opens, or a recipe (a file, or the name of one that is shipped), whose pretrained
            weights are taken as they are: its adapters add nothing yet.
        recipe: the recipe of a checkpoint that is of no run.
        ema: whether the averaged weights are taken, where there are some.
        best: whether a run's best checkpoint is taken; else its newest.
        world: the detector is put on its device; None: the CPU.
        remark: gets a line for each thing worth knowing.

    Returns:
        The detector in evaluation mode, and what it was made of.

    Raises:
        TensorkeepError: There is no backbone, or its weights would be random.
    """
    place = Path(path)
    if recipe is not None or run_of(place) is not None or (place.exists() and place.suffix not in (".yaml", ".yml")):
        opened = open_detector(place, recipe, ema, best, world, (), remark)
    else:
        made = read_recipe(path, (), remark)
        if made.model.backbone is not None and made.training.pretrained is None:
            hint = "training.pretrained: a VideoMAE file; or name a run in place of the recipe"
            raise TensorkeepError("names no pretrained weights: features would be random", where=path, hint=hint)
        opened = Opened(make_detector(made, None, world, remark)[0].eval(), made, None, False)
    if opened.detector.backbone is None:
        raise TensorkeepError("its detector reads features and has no backbone", where=path, hint="name another one")
    return opened


def made_of(detector: Detector, recipe: DetectionRecipe, precision: str) -> dict[str, Any]:
    """Return what the features depend on: the digest of the backbone's weights, the grid, and how it computes.

    Args:
        detector: one with a backbone.
        recipe: its section `data` counts.
        precision: in which the backbone computes.
    """
    assert detector.backbone is not None
    held = detector.backbone.state_dict().items()
    digests = {name: digest_of(tensor) for name, tensor in held if isinstance(tensor, torch.Tensor)}
    names = ("mode", "window_size", "feature_stride", "sample_stride", "scale_factor", "crop_size")
    grid = {name: getattr(recipe.data, name) for name in names}
    return {"weights": digest_of_all(digests), **grid, "precision": precision}


def begin_folder(folder: Path, made: Mapping[str, Any], overwrite: bool) -> None:
    """Say in `folder` what its features are made of.

    Args:
        folder: is made where it is not there.
        made: as `made_of` gives it.
        overwrite: whether features of another backbone or grid, and arrays of unknown origin, may be replaced.

    Raises:
        TensorkeepError: The folder holds features of another backbone or grid.
    """
    place = folder / LIST
    if place.exists():
        with explained(place):
            try:
                there = json.loads(place.read_text(encoding="utf-8"))["made_of"]
            except (ValueError, KeyError, TypeError) as error:
                raise TensorkeepError("is no list of features", where=place, hint="choose another folder") from error
        differing = sorted(key for key in {*there, *made} if there.get(key) != made.get(key))
        if not differing:
            return
        if not overwrite:
            what = f"holds features of another {' and '.join(differing)}"
            raise TensorkeepError(what, where=folder, hint="choose another folder, or add --overwrite")
    _write_list(folder, made, {}, overwrite=True)


def end_folder(folder: Path, made: Mapping[str, Any], videos: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the list of a folder's videos beside what they are made of; videos listed there before stay.

    Args:
        folder: that of the features.
        made: as `made_of` gives it.
        videos: for each its `frame`, `duration` and `steps`, as annotations of features need them.
    """
    there = json.loads((folder / LIST).read_text(encoding="utf-8"))["videos"]
    _write_list(folder, made, {**there, **videos}, overwrite=True)


def _write_list(
    folder: Path, made: Mapping[str, Any], videos: Mapping[str, Mapping[str, Any]], overwrite: bool
) -> None:
    with replacing(folder / LIST, overwrite, _LIST_KIND) as temporary:
        write_bytes(temporary, json.dumps({"made_of": dict(made), "videos": dict(videos)}, indent=1).encode())


def side_by_side(predictor: Predictor) -> Predictor:
    """Return a predictor whose windows do not overlap.

    Args:
        predictor: it stays as it is.
    """
    return replace(predictor, window=replace(predictor.window, window_overlap_ratio=0.0))


def write_features(
    predictor: Predictor,
    film: Film,
    path: Path,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _frames: None,
) -> Written:
    """Write the features of a film as an `.npy` file of float32 `[T, C]`, or find them there.

    Args:
        predictor: its detector's backbone is used, its windows do not overlap.
        film: as its `open` gives it.
        path: the file; it appears whole or not at all.
        overwrite: whether features that are there are made again.
        progress: gets the number of frames of each window that is done.

    Returns:
        What was written.

    Raises:
        TensorkeepError: A picture cannot be decoded, a feature is no finite number, or the file is of something else.
    """
    config, detector = predictor.window, predictor.detector
    assert isinstance(detector, Detector)
    steps = config.window_size
    if config.method != "resize":
        steps = count_snippets(film.info.frames, config.snippet_stride)
    channels = detector.config.projection.in_channels
    if not overwrite and _is_done(path, film, (steps, channels)):
        return Written(steps, channels, [], False)
    problems: list[Problem] = []
    with replacing(path, overwrite=True, kind=FEATURES) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, (steps, channels))
        made = 0
        for number, frames in enumerate(predictor.stream(film, problems)):  # [T, 3, H, W]
            inputs = centre_crop(frames, predictor.reader.size).transpose(0, 1).contiguous()[None]
            with torch.no_grad(), predictor.context():
                rows = detector.features(inputs.to(predictor.device))[0].T.float().cpu().numpy()  # [window, C]
            first = film.windows[number][0] // config.snippet_stride
            stop = min(first + len(rows), steps)
            if not np.isfinite(rows[: stop - first]).all():
                what = f"features of steps {first} to {stop - 1} are not finite numbers"
                raise TensorkeepError(what, where=film.info.path, hint="training.precision: fp32 or bf16")
            array[made:stop] = rows[made - first : stop - first]  # what the window before had stays
            made = stop
            progress(len(frames))
        array.flush()
        del array
    return Written(steps, channels, sorted({done(problem) for problem in problems}), True)


def _is_done(path: Path, film: Film, shape: tuple[int, int]) -> bool:
    """Return whether the features of a film are there: of this shape, and newer than the video."""
    if path.is_symlink() or not path.is_file() or path.stat().st_mtime < Path(film.info.path).stat().st_mtime:
        return False
    try:
        there = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError):
        return False
    return isinstance(there, np.ndarray) and there.shape == shape and there.dtype == np.float32
