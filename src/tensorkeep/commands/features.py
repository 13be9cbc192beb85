"""`tensorkeep features`: what a backbone sees in videos, as arrays on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, no_video, prepare
from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output, duration
from tensorkeep.storage.overwriting import refuse_existing

if TYPE_CHECKING:
    from tensorkeep.detection.extraction import Written
    from tensorkeep.detection.predict import Film, Predictor
    from tensorkeep.detection.start import Opened


def features(
    checkpoint: str,
    /,
    *videos: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    recipe: Path | None = None,
    ema: bool = True,
    newest: Flag = False,
    broken: Literal["skip", "fatal", "keep"] = "skip",
    device: str | None = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Write the features of videos that a backbone gives, one .npy file a video, as OpenTAD and ActionFormer read them.

    An array is float32 [T, C]: row t stands for frame t * feature_stride * sample_stride of the recipe. features.json
    beside them says what they are made of and how long each video is. The same command goes on after an interruption.
    Exit code 1 where a video could not be read, 2 where none could.

    Args:
        checkpoint: A run of `train detection` (its best checkpoint), a step folder of one, an OpenTAD .pth with
            --recipe, or a recipe with pretrained weights (a YAML file, or the name of one that is shipped).
        videos: Video files, or folders of them; folders below those are looked into.
        out: The folder to write into.
        recipe: Another recipe than the run's. Needed where the checkpoint is of no run.
        ema: Use the averaged weights where there are some.
        newest: Take a run's newest checkpoint instead of its best.
        broken: A video that is cut short or damaged is left out, stops the command, or is read as far as it goes.
        device: The device to run on, cpu or cuda. Default: a GPU where there is one.
        overwrite: Make all features again, and replace those of another backbone or grid.
    """
    from tensorkeep.detection.data.finding import find_videos
    from tensorkeep.detection.extraction import LIST, begin_folder, end_folder, made_of

    printer = say.output()
    if not videos:
        raise no_video("features", checkpoint, "-o DIR")
    paths = find_videos(videos)
    for name in paths:
        prepare(printer, _place(out, name))
    if not (out / LIST).exists():
        for name in paths:
            refuse_existing(_place(out, name), overwrite, _kind())
    opened, predictor, precision = _open(checkpoint, recipe, ema, not newest, broken, device, printer)
    made = made_of(opened.detector, opened.recipe, precision)
    begin_folder(out, made, overwrite)
    told, broken_ones = _all(predictor, paths, out, overwrite, broken == "fatal", printer)
    end_folder(out, made, {row["video"]: {key: row[key] for key in ("frame", "duration", "steps")} for row in told})
    if not told:
        what = "the video could not be read" if len(paths) == 1 else f"none of the {len(paths)} videos could be read"
        raise TensorkeepError(what, hint="why stands above; --broken keep reads as far as a file goes")
    lost = [{"path": str(path), "message": why} for path, why in broken_ones.items()]
    document = {"checkpoint": checkpoint, "step": opened.step, "ema": opened.averaged, "made_of": made}
    _show(printer, {**document, "videos": told, "broken": lost, "list": str(out / LIST)})
    return 1 if broken_ones else 0


def _place(out: Path, name: str) -> Path:
    return out / f"{name}.npy"


def _kind() -> Any:
    from tensorkeep.detection.extraction import FEATURES

    return FEATURES


def _open(
    checkpoint: str,
    recipe: Path | None,
    ema: bool,
    best: bool,
    broken: Literal["skip", "fatal", "keep"],
    device: str | None,
    say: Output,
) -> tuple[Opened, Predictor, str]:
    """The detector, how its backbone is to be used, and in which precision."""
    import torch

    from tensorkeep.detection.data.opening import import_av
    from tensorkeep.detection.data.readers import VideoReader
    from tensorkeep.detection.extraction import open_backbone, side_by_side
    from tensorkeep.detection.inference import Selection
    from tensorkeep.detection.predict import Predictor
    from tensorkeep.detection.recipe_data import window_of
    from tensorkeep.training import distributed
    from tensorkeep.training.precision import HALF_DTYPES

    import_av()  # else what is not installed is said of every video
    world = distributed.start(device)
    if world.size > 1:
        distributed.stop()
        raise TensorkeepError("runs in one process", where="features", hint="start it without torchrun")
    opened = open_backbone(checkpoint, recipe, ema, best, world, say.remark)
    made = opened.recipe
    precision = made.training.precision
    # half precision saves nothing on a CPU, and fp16 is slow there
    half = None if precision == "fp32" or world.device.type == "cpu" else HALF_DTYPES[precision]
    predictor = Predictor(
        opened.detector,
        (),
        window_of(made.data, "test"),
        VideoReader(made.data.crop_size, None, "keep" if broken == "keep" else "error", threads=0),
        Selection(),
        world.device,
        contextlib.nullcontext if half is None else lambda: torch.autocast(world.device.type, dtype=half),
    )
    return opened, side_by_side(predictor), "fp32" if half is None else precision


def _all(
    predictor: Predictor, paths: Mapping[str, Path], out: Path, overwrite: bool, fatal: bool, say: Output
) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """Write the features of each video; gives what is told of each, and why some were left out."""
    from tensorkeep.detection.extraction import write_features

    told: list[dict[str, Any]] = []
    broken: dict[Path, str] = {}
    status, started, frames = say.status(), time.monotonic(), 0
    try:
        for number, (name, path) in enumerate(paths.items()):

            def progress(count: int, name: str = name, number: int = number) -> None:
                nonlocal frames
                frames += count
                if status is not None:
                    rate = frames / max(time.monotonic() - started, 1e-9)
                    status.show(f"{name}  {rate:.0f} frames/s", number, len(paths))

            try:
                film = predictor.open(path, name)
                written = write_features(predictor, film, _place(out, name), overwrite, progress)
            except TensorkeepError as error:
                if fatal:
                    raise
                broken[path] = error.line
                say.remark(f"left out: {error.line}")
                continue
            told.append(_told(film, written, _place(out, name), say))
    finally:
        if status is not None:
            status.close()
    there = sum(not row["new"] for row in told)
    if there:
        say.remark(f"{there} of {len(told)} were there already; --overwrite makes them again")
    return told, broken


def _told(film: Film, written: Written, place: Path, say: Output) -> dict[str, Any]:
    """What the document tells of one video; its problems go to the terminal too."""
    kept = [f"kept: {film.info.problem}"] if film.info.problem else []
    for line in [*written.problems[:3], *kept, *film.info.notes]:
        say.remark(f"{film.name}: {line}")
    return {
        "video": film.name,
        "path": film.info.path,
        "frame": film.info.frames,
        "duration": round(film.seconds, 6),
        "steps": written.steps,
        "channels": written.channels,
        "features": str(place),
        "new": written.new,
        "problems": [*written.problems, *kept],
        "notes": list(film.info.notes),
    }


def _show(out: Output, document: Mapping[str, Any]) -> None:
    if out.json:
        out.document(dict(document))
        return
    columns = ["video", "length", "frames", "steps", "channels"]
    rows = [
        [row["video"], duration(row["duration"]), row["frame"], row["steps"], row["channels"]]
        for row in document["videos"]
    ]
    out.table(columns, rows, right=columns[1:])
    out.line(document["list"])
