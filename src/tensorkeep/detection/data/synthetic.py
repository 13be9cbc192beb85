"""Make video files with scripted motions and their annotations, so that everything can be tried without a data set.

Shapes of random form, colour, size and place stand on a textured, slowly drifting background. Now and then one of them
acts: it slides to and fro, pulses, blinks, spins or hops. The class lies in the motion alone: any single frame of an
action could be one of rest, and a mirrored video shows the same classes. Two actors act independently, so actions
overlap; distractors drift about all the time and mean nothing; the light changes slowly. With `calm` all of them shine
on a dark, almost even ground: what a ViT of two blocks can learn to tell apart in a minute.

The same arguments give the same pixels, and video `i` is the same however many there are. Needs PyAV.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.annotations import Annotations, read_annotations
from tensorkeep.detection.data.opening import import_av
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.storage.overwriting import Kind, listed
from tensorkeep.storage.placement import replacing

Floats = NDArray[np.float64]
MOTIONS = {"slide": 1.0, "pulse": 1.1, "blink": 1.9, "spin": 0.8, "hop": 1.3}  # name -> cycles a second
CLASSES = ("slide", "pulse", "blink", "spin")
ANNOTATIONS, CLASS_MAP, VIDEOS = "annotations.json", "category_idx.txt", "videos"
_BUSY, _CALM = (70.0, 180.0), (50.0, 90.0)  # greys of a background
_EDGE = 0.7  # width, in pixels, over which a shape's edge fades
_GAP = 1.0  # least seconds between two actions of one actor
_OURS = re.compile(rf"{VIDEOS}/(training|validation)_\d{{4,}}\.mp4|{re.escape(ANNOTATIONS)}|{re.escape(CLASS_MAP)}")
_DATASET = Kind(
    "a data set made here",
    lambda path: [n for n in listed(path) if not _OURS.fullmatch(n)] if path.is_dir() else [path.name],
)


@dataclass(frozen=True)
class SyntheticConfig:
    """What the videos are like.

    Attributes:
        classes: names of the motions shown, some of `MOTIONS`.
        size: side in pixels, even and at least 16.
        fps: frames per second.
        seconds: range of a video's length.
        actions: range of the number of actions in a video.
        action_seconds: range of an action's length.
        actors: shapes that act.
        distractors: shapes that move without meaning.
        calm: whether bright shapes stand on a dark ground of little contrast.
    """

    classes: tuple[str, ...] = CLASSES
    size: int = 64
    fps: int = 10
    seconds: tuple[float, float] = (20.0, 30.0)
    actions: tuple[int, int] = (3, 6)
    action_seconds: tuple[float, float] = (2.0, 5.0)
    actors: int = 2
    distractors: int = 1
    calm: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.classes if name not in MOTIONS]
        if unknown or not self.classes:
            hint = near_misses(unknown[0], MOTIONS) if unknown else None
            raise TensorkeepError(
                f"no motion {', '.join(map(repr, unknown)) or 'at all'}",
                where="synthetic",
                hint=hint or f"there are {', '.join(MOTIONS)}",
            )
        if self.size % 2 or self.size < 16 or self.fps < 4 or self.actors < 1 or self.distractors < 0:
            what = f"size {self.size}, fps {self.fps}, {self.actors} actors, {self.distractors} distractors"
            raise TensorkeepError(what, where="synthetic", hint="size even and at least 16, fps at least 4")
        for low, high in (self.seconds, self.actions, self.action_seconds):
            if not 0 < low <= high:
                raise TensorkeepError(f"({low}, {high}) is no range", where="synthetic")


TINY = SyntheticConfig(  # what a ViT of two blocks learns on one core: four motions, two actors who may act together
    classes=("slide", "pulse", "blink", "hop"),
    size=32,
    fps=10,
    seconds=(12.0, 14.0),
    actions=(2, 4),
    action_seconds=(2.0, 4.0),
    calm=True,
)


class Action(NamedTuple):
    """What one actor does: the motion `label` from `start` to `end` (seconds)."""

    actor: int
    label: str
    start: float
    end: float


class Shape(NamedTuple):
    """A star on the canvas.

    Attributes:
        arms: number of arms.
        colour: [3], 0 to 255.
        radius: in parts of the canvas' side.
        home: [2], place (y, x) in parts of the side.
        drift: [2], parts of the side a second.
        turn: angle in radians.
    """

    arms: int
    colour: Floats
    radius: float
    home: Floats
    drift: Floats
    turn: float


def make_dataset(
    folder: str | Path,
    *,
    videos: int = 24,
    held_out: int = 8,
    seed: int = 0,
    config: SyntheticConfig | None = None,
    overwrite: bool = False,
) -> Annotations:
    """Write a data set into `folder`: video files, their annotations and the class names.

    The folder holds `videos/*.mp4`, `annotations.json` (OpenTAD's layout, subsets `training` and `validation`) and
    `category_idx.txt`.

    Args:
        folder: made anew.
        videos: number of training videos.
        held_out: number of validation videos.
        seed: the same seed gives the same pixels.
        config: what the videos are like.
        overwrite: whether a folder that exists is replaced.

    Returns:
        The annotations.

    Raises:
        TensorkeepError: The folder exists and `overwrite` is not set, or PyAV is missing.

    Example:
        >>> make_dataset("synthetic", videos=2, held_out=1, seed=7).classes  # doctest: +SKIP
        ('blink', 'pulse', 'slide', 'spin')
    """
    config = config or SyntheticConfig()
    if videos < 1 or held_out < 0:
        raise TensorkeepError(f"{videos} training and {held_out} validation videos", where="synthetic")
    database: dict[str, Any] = {}
    with replacing(Path(folder), overwrite, _DATASET) as temporary:
        (temporary / VIDEOS).mkdir(parents=True)
        for subset, number in (("training", videos), ("validation", held_out)):
            for index in range(number):
                name = f"{subset}_{index:04d}"
                rng = np.random.default_rng([seed, index, subset == "validation"])
                frames, actions = make_video(config, rng)
                write_video(temporary / VIDEOS / f"{name}.mp4", frames, config.fps)
                database[name] = {
                    "subset": subset,
                    "duration": len(frames) / config.fps,
                    "frame": len(frames),
                    "annotations": [{"segment": [a.start, a.end], "label": a.label} for a in actions],
                }
        (temporary / ANNOTATIONS).write_text(json.dumps({"database": database}, indent=1) + "\n", encoding="utf-8")
        (temporary / CLASS_MAP).write_text("\n".join(sorted(config.classes)) + "\n", encoding="utf-8")
    return read_annotations(Path(folder) / ANNOTATIONS)


def make_video(config: SyntheticConfig, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[Action]]:
    """Draw one video: frames `[T, H, W, 3]`, and what happens in it in order of time."""
    length = round(float(rng.uniform(*config.seconds)) * config.fps)
    actions = _script(config, length / config.fps, rng)
    return _film(config, length, actions, rng), actions


def make_clip(config: SyntheticConfig, label: str | None, length: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a clip `[length, H, W, 3]` in which one actor does `label` all the time; with None all actors rest."""
    seconds = length / config.fps
    actor, before = int(rng.integers(config.actors)), float(rng.uniform(0, 3))
    actions = [] if label is None else [Action(actor, label, -before, seconds + 1)]
    return _film(config, length, actions, rng)


def _film(
    config: SyntheticConfig, length: int, actions: Sequence[Action], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw the frames in which `actions` happen; how the actors look and where they stand is random."""
    shapes = [_draw_shape(config, rng, place) for place in range(config.actors)]
    others = [_draw_shape(config, rng, None) for _ in range(config.distractors)]
    speeds = {action: MOTIONS[action.label] * float(rng.uniform(0.85, 1.15)) for action in actions}
    texture = _texture(config.size * 2, _CALM if config.calm else _BUSY, rng)
    pan, light = rng.uniform(-1.5, 1.5, 2), rng.uniform(0, 2 * np.pi, 2)
    frames = np.empty((length, config.size, config.size, 3), dtype=np.uint8)
    for t in range(length):
        now = t / config.fps
        offset = np.round(pan * now + 64 * config.size).astype(int) % config.size
        canvas = texture[offset[0] : offset[0] + config.size, offset[1] : offset[1] + config.size].copy()
        for shape in others:
            _paint(canvas, shape, _wander(shape, now), 1.0, shape.turn, 1.0)
        for actor, shape in enumerate(shapes):
            acting = next((a for a in actions if a.actor == actor and a.start <= now < a.end), None)
            _paint(canvas, shape, *_pose(shape, acting, now, speeds))
        canvas *= 1 + 0.1 * np.sin(light[0] + now * 0.5)
        frames[t] = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return frames


def write_video(
    path: str | Path, frames: Iterable[NDArray[np.uint8]], fps: int, *, codec: str = "libx264", **options: Any
) -> None:
    """Write frames to a video file, on one thread so that the same frames give the same bytes.

    Args:
        path: the file; its ending chooses the container.
        frames: `[H, W, 3]` uint8, RGB.
        fps: frames per second.
        codec: FFmpeg's name of it.
        **options: attributes of PyAV's codec context (`gop_size=12`), or `times=`, a list of milliseconds, one a frame,
            for a variable rate.
    """
    av = import_av()
    times: Sequence[int] | None = options.pop("times", None)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        context = stream.codec_context
        context.thread_count = 1
        if codec == "libx264":
            # with x264's mbtree the bytes of very small pictures vary with what lay in memory before
            context.options = {"crf": "18", "preset": "veryfast", "x264-params": "log-level=none:mbtree=0"}
        if times is not None:
            context.time_base = Fraction(1, 1000)
        for key, value in options.items():
            setattr(context, key, value)
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, fps if times is None else 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _script(config: SyntheticConfig, duration: float, rng: np.random.Generator) -> list[Action]:
    """Draw actions, with a gap between two of the same actor; as many as fit."""
    wanted = int(rng.integers(config.actions[0], config.actions[1] + 1))
    actions: list[Action] = []
    for _ in range(100):
        if len(actions) == wanted:
            break
        actor = int(rng.integers(config.actors))
        label = config.classes[int(rng.integers(len(config.classes)))]
        length = min(float(rng.uniform(*config.action_seconds)), duration - 1)
        start = round(float(rng.uniform(0.5, max(0.5, duration - 0.5 - length))), 2)
        end = round(start + length, 2)
        others = [a for a in actions if a.actor == actor]
        if all(end + _GAP <= a.start or a.end + _GAP <= start for a in others):
            actions.append(Action(actor, label, start, end))
    return sorted(actions, key=lambda action: action.start)


def _draw_shape(config: SyntheticConfig, rng: np.random.Generator, place: int | None) -> Shape:
    """Draw a shape: actors stand side by side, distractors (`place` None) are smaller and drift."""
    if config.calm:
        colour = rng.uniform(190, 255, 3)
    else:
        colour = rng.uniform(0, 255, 3)
        colour[int(rng.integers(3))] = rng.choice([15.0, 240.0])  # never the grey of the background
    arms = int(rng.integers(2, 5))
    if place is None:
        return Shape(
            arms,
            colour,
            float(rng.uniform(0.05, 0.09)),
            rng.uniform(0, 1, 2),
            rng.uniform(-0.06, 0.06, 2),
            float(rng.uniform(0, 6)),
        )
    home = np.array([rng.uniform(0.35, 0.65), (place + rng.uniform(0.45, 0.55)) / config.actors])
    return Shape(
        arms, colour, float(rng.uniform(0.16, 0.2)), home, rng.uniform(-0.01, 0.01, 2), float(rng.uniform(0, 6))
    )


def _wander(shape: Shape, now: float) -> Floats:
    """Return where a drifting shape is at time `now`; it turns back at the edges."""
    there = (shape.home + shape.drift * now) % 2
    place: Floats = np.where(there > 1, 2 - there, there)
    return place


def _pose(
    shape: Shape, action: Action | None, now: float, speeds: dict[Action, float]
) -> tuple[Floats, float, float, float]:
    """Return centre (y, x), scale, angle (radians) and opacity of an actor at time `now` (seconds)."""
    centre, scale, angle, opacity = shape.home + 0.02 * np.sin(shape.drift * 40 * now), 1.0, shape.turn, 1.0
    if action is None:
        return centre, scale, angle, opacity
    phase = (now - action.start) * speeds[action] * 2 * np.pi
    if action.label == "slide":
        centre = centre + np.array([0.0, 0.14 * np.sin(phase)])
    elif action.label == "hop":
        centre = centre - np.array([0.2 * abs(np.sin(phase / 2)), 0.0])
    elif action.label == "pulse":
        scale = 1 - 0.45 * float(np.sin(phase))
    elif action.label == "spin":
        angle += float(phase)
    else:
        opacity = float(np.sin(phase) < 0)
    return centre, scale, angle, opacity


def _paint(canvas: Floats, shape: Shape, centre: Floats, scale: float, angle: float, opacity: float) -> None:
    """Paint a shape over `canvas` [H, W, 3], in place."""
    size = len(canvas)
    middle, reach = centre * size, shape.radius * scale * size
    top, left = np.maximum(np.floor(middle - 1.2 * reach), 0).astype(int)
    bottom, right = np.minimum(np.ceil(middle + 1.2 * reach), size).astype(int)
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    dy, dx = y - middle[0], x - middle[1]
    bearing = np.arctan2(dy, dx) - angle
    edge = reach * (0.7 + 0.3 * np.cos(shape.arms * bearing) + 0.2 * np.cos(bearing))
    cover = np.clip((edge - np.hypot(dy, dx)) / _EDGE, 0, 1)[..., None] * opacity
    part = canvas[top:bottom, left:right]
    part += (shape.colour - part) * cover


def _texture(size: int, greys: tuple[float, float], rng: np.random.Generator) -> Floats:
    """Draw a smooth, tinted grey pattern `[size, size, 3]` that repeats after half its size: a panning background."""
    half = size // 2
    coarse = np.kron(rng.uniform(*greys, (8, 8)), np.ones((half // 8 + 1, half // 8 + 1)))[:half, :half]
    for _ in range(3):
        coarse = (coarse + sum(np.roll(coarse, shift, axis) for shift in (-2, 2) for axis in (0, 1))) / 5
    coarse = coarse + rng.normal(0, 4, (half, half))
    tiled: Floats = np.tile(coarse[..., None] + rng.uniform(-15, 15, 3), (2, 2, 1))
    return tiled
