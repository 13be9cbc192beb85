"""What is wrong with a video file, and where it and its annotation disagree. Needs PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorkeep.detection.data.containers import VideoInfo, probe
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.truth import Video
from tensorkeep.errors import TensorkeepError

UNUSABLE = ("unreadable video", "truncated video", "damaged video")  # kinds of problems with a file itself


def check_video(path: str | Path, video: Video | None = None) -> list[Problem]:
    """List what is odd about a video file and about the annotation that goes with it.

    Args:
        path: a video file; one that cannot be read is one error in the list.
        video: its annotation, to be compared with the file; None: only the file is looked at.

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
    except TensorkeepError as error:
        return [Problem("error", "unreadable video", name, error.line)]
    if info.problem:
        kind = "truncated video" if "cut short" in info.problem else "damaged video"
        problems.append(Problem("error", kind, name, info.problem))
    problems += [Problem("warning", "pause in the video", name, note) for note in info.notes]
    if video is not None:
        problems += _disagreements(info, video)
    return [problem._replace(video=name) for problem in problems]


def _disagreements(info: VideoInfo, video: Video) -> Iterator[Problem]:
    """Compare the frame count and the duration of a file with those of its annotation."""
    if video.frames and video.frames != info.frames:
        message = f"the annotation counts {video.frames} frames, the file has {info.frames}"
        away = abs(video.frames - info.frames) / info.fps
        yield Problem("warning" if away > 1 else "info", "frame count", video.name, message)
    if video.duration and abs(video.duration - info.duration) > max(1.0, 0.01 * info.duration):
        message = f"the annotation says {video.duration:.2f} s, the file lasts {info.duration:.2f} s"
        yield Problem("error", "duration", video.name, f"{message}: segments will lie elsewhere")
