"""Decode every picture of a video file to find what is wrong with it. Needs PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tensorkeep.detection.data.containers import VideoInfo, frame_table, probe
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.truth import Video
from tensorkeep.detection.data.video import find_damage
from tensorkeep.detection.data.video_checks import check_video
from tensorkeep.errors import TensorkeepError

_DRIFT = 0.5  # seconds


def check_pictures(path: str | Path, video: Video | None = None) -> list[Problem]:
    """List what `check_video` does, and each picture that is damaged or lacking, and whether the frame rate varies.

    Args:
        path: a video file; one that cannot be read is one error in the list.
        video: its annotation, to be compared with the file; None: only the file is looked at.

    Returns:
        One problem for each thing found; none where the file is sound.

    Example:
        >>> check_pictures("v_001.mp4")  # doctest: +SKIP
        [Problem(severity='warning', kind='damaged video', video='v_001', message='frame 27 (1.08 s) is damaged')]
    """
    problems = check_video(path, video)
    name = video.name if video is not None else Path(path).stem
    try:
        info = probe(path)
        problems += [*find_damage(path, info.frames), *_unsteady(path, info)]
    except TensorkeepError as error:
        return problems or [Problem("error", "unreadable video", name, error.line)]
    return [problem._replace(video=name) for problem in problems]


def _unsteady(path: str | Path, info: VideoInfo) -> Iterator[Problem]:
    """Look for a variable frame rate, which a tool that counts frames at the mean rate gets wrong."""
    shown = frame_table(path).seconds[:-1]
    drift = float(np.abs(shown - np.arange(len(shown)) / info.fps).max())
    if drift > _DRIFT:
        message = (
            f"its frame rate varies: frames are shown up to {drift:.2f} s away from where {info.fps:.3f} a second puts"
        )
        done = "their own times are used; for tools that count at the mean rate: ffmpeg -i FILE -vf fps=30 NEW.mp4"
        yield Problem("warning", "variable frame rate", None, f"{message} them ({done})")
