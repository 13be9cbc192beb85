"""What is wrong with a video file, and where it and its annotation disagree. Needs PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tensorkeep.detection.data.annotations import Video
from tensorkeep.detection.data.containers import VideoInfo, frame_table, probe
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.video import find_damage
from tensorkeep.errors import TensorkeepError

_DRIFT = 0.5  # seconds


def check_video(path: str | Path, video: Video | None = None, *, thorough: bool = False) -> list[Problem]:
    """List what is odd about a video file and about the annotation that goes with it.

    Args:
        path: a video file; one that cannot be read is one error in the list.
        video: its annotation, to be compared with the file; None: only the file is looked at.
        thorough: also decode every frame, and look at when each is shown.

    Returns:
        One problem for each thing found; none where the file is sound.

    Example:
        >>> check_video("v_001.mp4", annotations.videos["v_001"])  # doctest: +SKIP
        [Problem(severity='warning', kind='frame count', video='v_001', message='...')]
    """
    name = video.name if video is not None else Path(path).stem
    problems: list[Problem] = []
    try:
        info = probe(path)
        if thorough:
            problems += [*find_damage(path, info.frames), *_unsteady(path, info)]
    except TensorkeepError as error:
        return [Problem("error", "unreadable video", name, error.line)]
    if info.problem:
        problems.append(Problem("error", "truncated video", name, info.problem))
    if video is not None:
        problems += _disagreements(info, video)
    return [problem._replace(video=name) for problem in problems]


def _unsteady(path: str | Path, info: VideoInfo) -> Iterator[Problem]:
    """Look for a variable frame rate; annotated seconds are turned into frames as if the rate were constant."""
    table = frame_table(path)
    if table.counted:
        return
    shown = (table.pts - table.pts[0]) * table.time_base
    drift = float(np.abs(shown - np.arange(len(shown)) / info.fps).max())
    if drift > _DRIFT:
        message = (
            f"its frame rate varies: frames are shown up to {drift:.2f} s away from where {info.fps:.3f} a second puts"
        )
        yield Problem("warning", "variable frame rate", None, f"{message} them (ffmpeg -i FILE -vf fps=30 NEW.mp4)")


def _disagreements(info: VideoInfo, video: Video) -> Iterator[Problem]:
    """Compare the frame count and the duration of a file with those of its annotation."""
    if video.frames and video.frames != info.frames:
        message = f"the annotation counts {video.frames} frames, the file has {info.frames}"
        away = abs(video.frames - info.frames) / info.fps
        yield Problem("warning" if away > 1 else "info", "frame count", video.name, message)
    if video.duration and abs(video.duration - info.duration) > max(1.0, 0.01 * info.duration):
        message = f"the annotation says {video.duration:.2f} s, the file lasts {info.duration:.2f} s"
        yield Problem("error", "duration", video.name, f"{message}: segments will lie elsewhere")
