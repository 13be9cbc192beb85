"""`tensorkeep predict`: what happens when in a video, as JSON, subtitles and a picture."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, no_video, prepare
from tensorkeep.errors import TensorkeepError, printable, word
from tensorkeep.output import Output, duration
from tensorkeep.storage.overwriting import PAGE, Kind, refuse_existing
from tensorkeep.storage.placement import replacing, write_bytes

if TYPE_CHECKING:
    from tensorkeep.detection.data.annotations import Annotations
    from tensorkeep.detection.inference import Selection
    from tensorkeep.detection.predict import Film, Predicted, Predictor
    from tensorkeep.detection.recipe.schema import DetectionRecipe
    from tensorkeep.detection.results.subtitles import NamedDetection
    from tensorkeep.detection.start import Opened

_DETECTIONS = "detections.json"
_BESIDE = (".html", ".srt", ".vtt")


def predict(
    checkpoint: Path,
    /,
    *videos: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("predictions"),
    min_score: float = 0.3,
    top: int = 100,
    annotations: Path | None = None,
    classes: Path | None = None,
    recipe: Path | None = None,
    ema: bool = True,
    newest: Flag = False,
    broken: Literal["skip", "fatal", "keep"] = "skip",
    device: str | None = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Find actions in videos, and when they happen: as JSON, subtitles and a timeline.

    Writes detections.json, which `eval detection --detections` reads, and for each video NAME.html (a timeline with
    pictures), NAME.srt and NAME.vtt. Long videos stream: memory does not grow with their length. Exit code 1 where a
    video could not be read, 2 where none could.

    Args:
        checkpoint: A run of `train detection` (its best checkpoint), a step folder of one, or an OpenTAD .pth with
            --recipe.
        videos: Video files, or folders of them; folders below those are looked into.
        out: The folder to write into.
        min_score: The least score of a detection in subtitles and picture; the JSON has all of them.
        top: How many detections of a video the subtitles and the picture show at most, the best ones.
        annotations: Ground truth of any layout that `eval detection` reads; the picture then shows true segments too.
        classes: A file with the names of the classes, one a line in label order, where the recipe's is not here.
        recipe: Another recipe than the run's. Needed where the checkpoint is of no run.
        ema: Use the averaged weights where there are some.
        newest: Take a run's newest checkpoint instead of its best.
        broken: A video that is cut short or damaged is left out, stops the command, or is read as far as it goes.
        device: The device to run on, cpu or cuda. Default: a GPU where there is one.
        overwrite: Replace what earlier predictions left in the folder.
    """
    from tensorkeep.detection.data.annotations import read_annotations
    from tensorkeep.detection.data.finding import find_videos

    printer = say.output()
    _refuse(videos, checkpoint, top)
    paths = find_videos(videos)
    prepare(printer, out / _DETECTIONS)
    for name in (_DETECTIONS, *(name + end for name in paths for end in _BESIDE)):
        refuse_existing(out / name, overwrite, _kind(name))
    truth = read_annotations(annotations) if annotations else None
    opened, predictor = _open(checkpoint, recipe, classes, ema, not newest, broken, device, printer)
    films, broken_ones = _films(predictor, paths, broken == "fatal", printer)
    rules = _Rules(out, min_score, top, truth, overwrite, broken == "fatal")
    found, told = _all(predictor, films, broken_ones, rules, f"{checkpoint}, {_weights(opened)}", opened, printer)
    if not found:
        raise _nothing(len(paths))
    document = {"checkpoint": str(checkpoint), "step": opened.step, "ema": opened.averaged, "videos": told}
    _show(printer, document | _written(out, broken_ones), annotations)
    return 1 if broken_ones else 0


def _refuse(videos: tuple[str, ...], checkpoint: Path, top: int) -> None:
    """Refuse words that leave nothing to predict or to show."""
    if not videos:
        raise no_video("predict", checkpoint, "--out DIR")
    if top < 1:
        raise TensorkeepError(f"{top} must be at least 1", where="--top", hint="--top 100")


def _written(out: Path, broken: Mapping[Path, str]) -> dict[str, Any]:
    """What the document tells of the file of detections and of the videos that are not in it."""
    lost = [{"path": str(path), "message": why} for path, why in broken.items()]
    return {"detections": str(out / _DETECTIONS), "broken": lost}


def _nothing(count: int) -> TensorkeepError:
    what = "the video could not be read" if count == 1 else f"none of the {count} videos could be read"
    return TensorkeepError(what, hint="why stands above; --broken keep reads as far as a file goes")


def _kind(name: str) -> Kind:
    """What a file of this name must be to be replaced."""
    from tensorkeep.detection.results.results import DETECTIONS
    from tensorkeep.detection.results.subtitles import SRT, VTT

    return next((k for end, k in ((".html", PAGE), (".srt", SRT), (".vtt", VTT)) if name.endswith(end)), DETECTIONS)


class _Rules(NamedTuple):
    out: Path
    min_score: float
    top: int
    truth: Annotations | None
    overwrite: bool
    fatal: bool


def _open(
    checkpoint: Path,
    recipe: Path | None,
    classes: Path | None,
    ema: bool,
    best: bool,
    broken: Literal["skip", "fatal", "keep"],
    device: str | None,
    say: Output,
) -> tuple[Opened, Predictor]:
    """The detector and how it is to be used."""
    import torch

    from tensorkeep.detection.data.opening import import_av
    from tensorkeep.detection.data.readers import VideoReader
    from tensorkeep.detection.predict import Predictor
    from tensorkeep.detection.recipe_data import window_of
    from tensorkeep.detection.start import open_detector
    from tensorkeep.training import distributed
    from tensorkeep.training.precision import HALF_DTYPES

    import_av()  # else what is not installed is said of every video
    world = distributed.start(device)
    if world.size > 1:
        distributed.stop()
        raise TensorkeepError("runs in one process", where="predict", hint="start it without torchrun")
    changes = (("data.class_map", json.dumps(str(classes))),) if classes else ()
    opened = open_detector(checkpoint, recipe, ema, best, world, changes, say.remark)
    made = opened.recipe
    if made.data.inputs != "video":
        hint = "make features of the video first; tensorkeep eval detection RUN runs on features"
        raise TensorkeepError("the detector reads features, not video", where=checkpoint, hint=hint)
    selection, names = _naming(made, classes, say)
    precision = made.training.precision
    # half precision saves nothing on a CPU, and fp16 is slow there
    half = None if precision == "fp32" or world.device.type == "cpu" else HALF_DTYPES[precision]
    predictor = Predictor(
        opened.detector,
        tuple(names),
        window_of(made.data, "test"),
        VideoReader(made.data.crop_size, None, "keep" if broken == "keep" else "error", threads=0),
        selection,
        world.device,
        contextlib.nullcontext if half is None else lambda: torch.autocast(world.device.type, dtype=half),
    )
    return opened, predictor


def _naming(made: DetectionRecipe, classes: Path | None, say: Output) -> tuple[Selection, Sequence[str]]:
    """How predictions become detections, and the names of their labels."""
    from tensorkeep.detection.inference import Selection
    from tensorkeep.detection.predict import UNNAMED
    from tensorkeep.detection.recipe_data import read_classes, selection_of

    post = made.post_processing
    if post.classifier is not None and not Path(post.classifier.path).exists():
        say.remark(f"note: without {post.classifier.path} every detection is called {UNNAMED!r}")
        return Selection(post.pre_nms_thresh, post.pre_nms_topk, post.nms), (UNNAMED,)
    selection = selection_of(made)
    if selection.classifier is not None:
        return selection, selection.classifier.classes
    try:
        return selection, read_classes(made)
    except TensorkeepError as error:
        error.hint = error.hint if classes else "--classes FILE: names of the classes, one a line in label order"
        raise


def _weights(opened: Opened) -> str:
    step = "" if opened.step is None else f"step {opened.step}, "
    return f"{step}{'averaged' if opened.averaged else 'live'} weights"


def _films(
    predictor: Predictor, paths: Mapping[str, Path], fatal: bool, say: Output
) -> tuple[list[Film], dict[Path, str]]:
    """What can be read, and why the others cannot; the first of these is an error where they are `fatal`."""
    films, broken = [], {}
    for name, path in paths.items():
        try:
            films.append(predictor.open(path, name))
        except TensorkeepError as error:
            if fatal:
                raise
            broken[path] = error.line
            say.remark(f"left out: {error.line}")
    return films, broken


def _all(
    predictor: Predictor,
    films: Sequence[Film],
    broken: dict[Path, str],
    rules: _Rules,
    details: str,
    opened: Opened,
    say: Output,
) -> tuple[dict[str, list[NamedDetection]], list[dict[str, Any]]]:
    """Return rows by video, and what is told of each; a video whose pictures are damaged joins `broken`.

    The JSON is written at the end, interrupted or not.
    """
    from tensorkeep.detection.predict import write_predictions
    from tensorkeep.detection.results.timeline import picture_times

    found: dict[str, list[NamedDetection]] = {}
    told: list[dict[str, Any]] = []
    status = say.status()
    total, done, started = sum(len(film.windows) for film in films), 0, time.monotonic()
    frames = 0
    try:
        for film in films:

            def progress(count: int, name: str = film.name) -> None:
                nonlocal done, frames
                done, frames = done + 1, frames + count
                if status is not None:
                    rate = frames / max(time.monotonic() - started, 1e-9)
                    status.show(f"{name}  {rate:.0f} frames/s", done, total)

            try:
                predicted = predictor.run(film, picture_times(film.seconds), progress)
            except TensorkeepError as error:
                if rules.fatal:
                    raise
                broken[Path(film.info.path)] = error.line
                say.remark(f"left out: {error.line}")
                continue
            found[film.name] = predicted.rows
            told.append(_write(film, predicted, rules, details, say))
    finally:
        if status is not None:
            status.close()
        if found:
            lacking = sum(film.name not in found and Path(film.info.path) not in broken for film in films)
            if lacking:
                say.remark(f"stopped: {rules.out / _DETECTIONS} lacks {lacking} of {len(films)} videos")
            write_predictions(
                rules.out / _DETECTIONS,
                found,
                details,
                pretrained=opened.recipe.training.pretrained is not None,
                overwrite=rules.overwrite,
            )
    return found, told


def _write(film: Film, predicted: Predicted, rules: _Rules, details: str, say: Output) -> dict[str, Any]:
    """Subtitles and page of one video; what the document tells of it."""
    from tensorkeep.commands.report.video import video_page
    from tensorkeep.detection.results.subtitles import best_rows, make_cues, to_srt, to_webvtt

    shown = best_rows(predicted.rows, rules.min_score, rules.top)
    true = _true(film.name, rules.truth, say)
    facts = [
        ("video", f"{duration(film.seconds)}, {film.info.frames:,} frames, {film.info.width} × {film.info.height}"),
        ("detector", details),
        ("shown", f"the best {rules.top} detections that score at least {rules.min_score:g}"),
    ]
    cues = make_cues(shown)
    texts = (video_page(film.name, film.seconds, shown, true, predicted.pictures, facts), to_srt(cues), to_webvtt(cues))
    files = {}
    for end, text in zip(_BESIDE, texts, strict=True):
        files[end[1:]] = str(rules.out / (film.name + end))
        (rules.out / film.name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(rules.out / (film.name + end), rules.overwrite, _kind(end)) as temporary:
            write_bytes(temporary, text.encode())
    file_problems = [f"kept: {film.info.problem}"] if film.info.problem else []
    name = printable(film.name)
    for problem in [*predicted.problems[:3], *file_problems, *film.info.notes]:
        say.remark(f"{name}: {problem}")
    best = max((row.score for row in predicted.rows), default=0.0)
    if not shown:
        say.remark(f"{name}: nothing scores at least {rules.min_score:g}, the best is {best:.3g}: see --min-score")
    return {
        "video": film.name,
        "path": film.info.path,
        "seconds": round(film.seconds, 3),
        "frames": film.info.frames,
        "fps": film.info.fps,
        "even": film.times is None,
        "windows": len(film.windows),
        "detections": len(predicted.rows),
        "shown": len(shown),
        "best_score": best,
        "files": files,
        "problems": [*predicted.problems, *file_problems],
        "notes": list(film.info.notes),
    }


def _true(name: str, truth: Annotations | None, say: Output) -> list[NamedDetection]:
    """The annotated segments of a video; ActivityNet's `v_` before a name makes no difference."""
    from tensorkeep.detection.results.subtitles import NamedDetection

    if truth is None:
        return []
    bare = name.removeprefix("v_")
    video = truth.videos.get(name) or truth.videos.get(bare) or truth.videos.get(f"v_{bare}")
    if video is None:
        say.remark(f"{name}: the annotations do not have it")
        return []
    pairs = zip(video.segments.tolist(), video.labels, strict=True)
    return [NamedDetection(start, end, label, 1.0) for (start, end), label in pairs]


def _show(out: Output, document: Mapping[str, Any], annotations: Path | None) -> None:
    if out.json:
        out.document(dict(document))
        return
    columns = ["video", "length", "frames/s", "windows", "detections", "shown", "best score"]
    rows = [
        [
            video["video"],
            duration(video["seconds"]),
            f"{video['fps']:.2f}" + ("" if video["even"] else " (varies)"),
            video["windows"],
            video["detections"],
            video["shown"],
            f"{video['best_score']:.3f}",
        ]
        for video in document["videos"]
    ]
    out.table(columns, rows, right=columns[1:])
    out.line(document["detections"])
    for video in document["videos"]:
        out.line(printable(video["files"]["html"]))
    if annotations is not None:
        out.remark(
            f"mAP: tensorkeep eval detection --annotations {word(annotations)} "
            f"--detections {word(document['detections'])}"
        )
