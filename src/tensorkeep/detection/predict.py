"""Run a detector on any video file: window by window, every picture decoded once, memory independent of the length.

Windows, pictures and suppression are those of an evaluation (`inference.detect`), the reading is not: an evaluation
looks up the windows of annotated videos in any order, here a file streams from its start, and the next window is
decoded while the detector looks at this one.

Seconds count from the first picture. Where frames are not evenly spread, a grid position becomes the time at which that
frame is shown, between two frames linearly; training places annotated seconds the same way.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tensorkeep.detection.data.augment import centre_crop
from tensorkeep.detection.data.containers import VideoInfo, frame_table, probe, shown_times
from tensorkeep.detection.data.item import seconds_shown
from tensorkeep.detection.data.problems import Problem, done
from tensorkeep.detection.data.readers import VideoReader, WindowConfig
from tensorkeep.detection.data.video import stream_windows
from tensorkeep.detection.data.windows import count_snippets, make_window, place_windows, resized_frames
from tensorkeep.detection.inference import Selection, decode_predictions
from tensorkeep.detection.results.decode import fuse_classes, merge_windows
from tensorkeep.detection.results.nms import Detections
from tensorkeep.detection.results.results import DETECTIONS
from tensorkeep.detection.results.subtitles import NamedDetection
from tensorkeep.detection.results.timeline import jpeg
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.placement import replacing, write_bytes

UNNAMED = "action"  # what a class-agnostic detector finds in a video that its classifier does not know


class Film(NamedTuple):
    """A video that can be read.

    Attributes:
        name: what it is called in the results.
        info: what the file holds.
        windows: for each its first frame, its frames [T], and its mask [window_size].
        times: [frames + 1] seconds at which each frame is shown, and the end; None: they are evenly spread.
    """

    name: str
    info: VideoInfo
    windows: list[tuple[int, NDArray[np.int64], NDArray[np.bool_]]]
    times: NDArray[np.float64] | None

    @property
    def seconds(self) -> float:
        """Seconds for which it is shown."""
        return self.info.duration if self.times is None else float(self.times[-1])

    def shown(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turn seconds at the mean rate into seconds at which the frames there are shown."""
        return seconds_shown(seconds, self.times, self.info.duration)


class Predicted(NamedTuple):
    """What a detector found in a video.

    Attributes:
        rows: detections by falling score.
        pictures: thumbnails, each (seconds, JPEG file).
        problems: sentences on what is odd about the file.
    """

    rows: list[NamedDetection]
    pictures: list[tuple[float, bytes]]
    problems: list[str]


@dataclass(frozen=True)
class Predictor:
    """Runs a detector on video files: `open` a file, then `run` the detector on it.

    Attributes:
        detector: in evaluation mode.
        classes: names of its labels.
        window: how windows are placed.
        reader: how frames are read.
        selection: how predictions become detections.
        device: where the detector is.
        context: wraps each forward (autocast).
        batch: windows of a video in a forward.

    Example:
        >>> window = WindowConfig("sliding")  # doctest: +SKIP
        >>> predictor = Predictor(detector, classes, window, VideoReader(160), Selection())  # doctest: +SKIP
        >>> predictor.run(predictor.open("holiday.mp4")).rows[0]  # doctest: +SKIP
        NamedDetection(start=12.4, end=15.9, label='Diving', score=0.83)
    """

    detector: nn.Module
    classes: tuple[str, ...]
    window: WindowConfig
    reader: VideoReader
    selection: Selection
    device: torch.device | str = "cpu"
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    batch: int = 1

    def open(self, path: str | Path, name: str | None = None) -> Film:
        """Look into a video file and place its windows.

        Args:
            path: the file.
            name: what it is called in the results; None: as the file, without its ending.

        Raises:
            TensorkeepError: The file cannot be read, or it is cut short or damaged and the reader's `broken` is not
                "keep".
        """
        info = probe(path)
        if info.problem and self.reader.broken != "keep":
            raise TensorkeepError(info.problem, where=path, hint="--broken keep reads what is there")
        return Film(name or Path(path).stem, info, self._windows(info), shown_times(frame_table(path), info))

    def run(
        self, film: Film, pictures_at: Sequence[float] = (), progress: Callable[[int], None] = lambda _frames: None
    ) -> Predicted:
        """Detect what happens in a film.

        Args:
            film: as `open` gives it.
            pictures_at: seconds of which thumbnails are wanted.
            progress: gets the number of frames of each window that is done.

        Raises:
            TensorkeepError: A picture cannot be decoded.
        """
        problems: list[Problem] = []
        at = self._pictures_at(film, pictures_at)
        pictures: dict[int, bytes] = {}
        found: list[Detections] = []
        waiting: list[tuple[Tensor, int]] = []
        for number, frames in enumerate(self.stream(film, problems)):  # [T, 3, H, W]
            shown = film.windows[number][1]
            for frame in np.intersect1d(shown, at).tolist():
                if frame not in pictures:
                    pictures[frame] = jpeg(frames[int(np.searchsorted(shown, frame))].numpy())
            waiting.append((centre_crop(frames, self.reader.size).transpose(0, 1), number))
            if len(waiting) == self.batch or number + 1 == len(film.windows):
                found += self._forward(film, waiting)
                waiting = []
            progress(len(shown))
        named = self._named(film, self._merged(found))
        times = [(film.shown(np.array([frame / film.info.fps]))[0], pictures[frame]) for frame in sorted(pictures)]
        return Predicted(named, [(float(s), data) for s, data in times], sorted({done(p) for p in problems}))

    def _windows(self, info: VideoInfo) -> list[tuple[int, NDArray[np.int64], NDArray[np.bool_]]]:
        """Place the windows: for each its first frame, its frames [T], and its mask [window_size]."""
        config = self.window
        if config.method == "resize":
            frames = resized_frames(info.frames, config.window_size, config.scale_factor)
            return [(0, frames, np.ones(config.window_size, dtype=bool))]
        bounds = place_windows(
            count_snippets(info.frames, config.snippet_stride), config.window_size, config.window_overlap_ratio
        )
        size, stride, scale = config.window_size, config.snippet_stride, config.scale_factor
        made = [make_window(b, info.frames, size=size, snippet_stride=stride, scale=scale) for b in bounds]
        return [(window.start_frame, window.frames, window.mask) for window in made]

    def stream(self, film: Film, problems: list[Problem]) -> Iterator[Tensor]:
        """Decode the frames of each window, `[T, 3, H, W]`, the next one while this one is in use.

        Args:
            film: as `open` gives it.
            problems: gets what is odd about its pictures.

        Raises:
            TensorkeepError: A picture cannot be decoded.
        """
        keep = self.reader.broken == "keep"
        windows = stream_windows(
            film.info.path,
            [frames for _, frames, _ in film.windows],
            size=self.reader.size,
            threads=self.reader.threads,
            broken="keep" if keep else "error",
            problems=problems,
        )
        return _ahead(windows)

    def _pictures_at(self, film: Film, seconds: Sequence[float]) -> NDArray[np.int64]:
        """Return, of the frames that are decoded, the one nearest to each of `seconds`."""
        decoded = np.unique(np.concatenate([frames for _, frames, _ in film.windows]))
        wanted = np.asarray(seconds, dtype=np.float64)
        if film.times is None:
            wanted = wanted * film.info.fps
        else:
            wanted = np.interp(wanted, film.times, np.arange(len(film.times)))
        right = np.clip(np.searchsorted(decoded, wanted), 1, max(len(decoded) - 1, 1))
        if len(decoded) == 1:
            return decoded
        left = right - 1
        nearer = np.where(wanted - decoded[left] <= decoded[right] - wanted, left, right)
        chosen: NDArray[np.int64] = np.unique(decoded[nearer])
        return chosen

    def _forward(self, film: Film, waiting: Sequence[tuple[Tensor, int]]) -> list[Detections]:
        """Detect in some windows, each (frames `[3, T, H, W]`, number); times are seconds at the mean rate."""
        config = self.window
        inputs = torch.stack([frames for frames, _ in waiting]).contiguous()  # [B, 3, T, H, W]
        masks = torch.stack([torch.from_numpy(film.windows[number][2]) for _, number in waiting])
        with torch.no_grad(), self.context():
            predictions = self.detector(inputs.to(self.device), masks.to(self.device))
        metas: list[Mapping[str, Any]] = [
            {
                "method": config.method,
                "duration": film.info.duration,
                "fps": film.info.frames / film.info.duration,
                "snippet_stride": config.snippet_stride,
                "offset_frames": config.offset_frames,
                "window_start_frame": film.windows[number][0],
                "window_size": config.window_size,
            }
            for _, number in waiting
        ]
        return decode_predictions(predictions, metas, replace(self.selection, rounded=False))

    def _merged(self, found: list[Detections]) -> Detections:
        """Merge the detections of all windows."""
        return found[0] if self.window.method == "resize" else merge_windows(found, self.selection.nms)

    def _named(self, film: Film, found: Detections) -> list[NamedDetection]:
        """Name detections by class and turn their times into seconds at which the frames are shown."""
        classes, selection = self.classes, self.selection
        if selection.classifier is not None:
            try:
                probabilities = selection.classifier.of(film.name).astype(np.float32)
            except TensorkeepError:  # a video of one's own: what is found stays, without a name
                classes = (UNNAMED,)
            else:
                found = fuse_classes(found, probabilities, selection.top, selection.rule)
        order = np.argsort(-found.scores, kind="stable")
        segments = film.shown(found.segments.astype(np.float64))
        return [
            NamedDetection(
                float(segments[i, 0]), float(segments[i, 1]), classes[found.labels[i]], float(found.scores[i])
            )
            for i in order
        ]


def write_predictions(
    path: str | Path,
    found: Mapping[str, Sequence[NamedDetection]],
    details: str,
    *,
    pretrained: bool,
    overwrite: bool = False,
) -> None:
    """Write detections by video as ActivityNet's JSON; milliseconds and six decimals of the score are kept.

    Args:
        path: the file; it appears whole or not at all.
        found: video -> detections.
        details: what was used, which the layout asks for under `external_data`.
        pretrained: whether pretrained weights were used, which the layout asks for too.
        overwrite: whether a file that exists is replaced.

    Raises:
        TensorkeepError: The file exists and `overwrite` is not set.

    Example:
        >>> found = {"v": [NamedDetection(0.5, 2.25, "Diving", 0.9)]}  # doctest: +SKIP
        >>> write_predictions("detections.json", found, "runs/one", pretrained=True)  # doctest: +SKIP
    """
    results = {
        video: [
            {"label": row.label, "segment": [round(row.start, 3), round(row.end, 3)], "score": round(row.score, 6)}
            for row in rows
        ]
        for video, rows in found.items()
    }
    document = {
        "version": "VERSION 1.3",
        "results": results,
        "external_data": {"used": pretrained, "details": details},
    }
    with replacing(Path(path), overwrite, DETECTIONS) as temporary:
        write_bytes(temporary, json.dumps(document).encode())


def _ahead(windows: Iterator[Tensor]) -> Iterator[Tensor]:
    """Make each window while the one before is in use: one more window in memory, no waiting for the decoder."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, windows, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, windows, None)
            yield window
