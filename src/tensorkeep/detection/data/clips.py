"""Cut annotated videos (or features of them) into windows: the samples that training and testing read.

A data set is a list of places and a pure function `sample(index, generator)`: same index and same generator state, same
tensors, in any process. Windows are placed in three ways, named as OpenTAD names them:

- `random_trunc` (training): a window of `window_size` grid steps somewhere in the video, one item a video. A video
  shorter than that is cut to a random part of it; in a longer one places are tried until a segment lies in the window
  by `trunc_thresh`. Segments that do are the ground truth, cut to the window.
- `sliding` (testing): every window of every video (`windows.place_windows`).
- `resize` (ActivityNet): the whole video as `window_size` steps.

One grid step is `feature_stride * sample_stride` frames; of a video, `scale_factor` frames are decoded for each. Inputs
are uint8 frames `[3, T, H, W]` or float features `[C, T]`; a mask marks the grid steps that are real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tensorkeep.detection.data.asking import Asked, ask
from tensorkeep.detection.data.augment import augment, centre_crop, draw_augmentation
from tensorkeep.detection.data.device_augment import Uncut, cut_out
from tensorkeep.detection.data.feature_files import file_of
from tensorkeep.detection.data.features import read_side_by_side
from tensorkeep.detection.data.file_ends import digest_of_ends
from tensorkeep.detection.data.frame_cache import FrameCache, Grid, cached_frames
from tensorkeep.detection.data.item import Item, frame_positions, resized_positions
from tensorkeep.detection.data.problems import Problem, done
from tensorkeep.detection.data.readers import FeatureReader, VideoReader, WindowConfig
from tensorkeep.detection.data.sizes import fitted
from tensorkeep.detection.data.video import decode
from tensorkeep.detection.data.windows import (
    Window,
    clip_to_window,
    count_snippets,
    make_window,
    place_windows,
    resized_frames,
)
from tensorkeep.detection.model.resize import linear_resize
from tensorkeep.errors import TensorkeepError

_TRIES = 200  # places tried for a random window, as in OpenTAD
_NAMED = 1000  # most videos with digests of their own


class Place(NamedTuple):
    """Where a sample comes from: a position in `Clips.items`, and the grid steps `first` to `stop` of its window.

    Both are 0 where the window is drawn anew each time, or shows the whole video.
    """

    item: int
    first: int
    stop: int


@dataclass(frozen=True, eq=False)
class Clips:
    """A data set of windows, as `make_clips` makes it: `len`, `sample(index, generator)`, `fingerprint()`.

    `uncut`: the inputs of training samples are `device_augment.Uncut`, for the device to augment.
    `asks`: they are `asking.Asked`, for the device to decode first.
    `kept`: where decoded frames are kept, which changes no sample.
    """

    items: tuple[Item, ...]
    window: WindowConfig
    reader: VideoReader | FeatureReader
    places: tuple[Place, ...] = field(repr=False)
    uncut: bool = False
    asks: bool = False
    kept: FrameCache | None = None

    def __len__(self) -> int:
        return len(self.places)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Make one sample, a pure function of `index` and the state of `generator`.

        Args:
            index: number of the window, below `len(self)`.
            generator: source of all that is random about the sample.

        Returns:
            `inputs` (frames `[3, T, H, W]` uint8, or features `[C, T]`), `mask [window_size]`, `segments [N, 2]` in
            grid steps, `labels [N]`, and `meta`, which turns grid steps back into seconds.

        Raises:
            TensorkeepError: The file cannot be decoded and the reader's `broken` is "error".
        """
        place = self.places[index]
        item, config = self.items[place.item], self.window
        problems: list[Problem] = []
        if config.method == "resize":
            mask = torch.ones(config.window_size, dtype=torch.bool)
            scaled = resized_positions(item, config.window_size)
            kept, start = np.flatnonzero(scaled[:, 1] > scaled[:, 0]), 0
            segments = scaled[kept]
            cut = None
        else:
            cut, segments, kept = self._cut(item, place, generator)
            mask, start = torch.from_numpy(cut.mask), cut.start_frame
        try:
            inputs = _read(item, self, cut, generator, problems)
        except TensorkeepError as error:
            if self.reader.broken == "error":
                raise
            problems.append(Problem("error", "unreadable video", item.name, f"left out: {error.line}"))
            inputs, mask = _nothing(self), torch.zeros_like(mask)
            segments, kept = segments[:0], kept[:0]
        meta = {
            "video": item.name,
            "duration": item.duration,
            "frames": item.frames,
            "fps": item.fps,
            "method": config.method,
            "snippet_stride": config.snippet_stride,
            "offset_frames": config.offset_frames,
            "window_start_frame": start,
            "window_size": config.window_size,
            "problems": [done(problem) for problem in problems],
        }
        if self.kept is not None and self.kept.stopped:
            meta["note"] = self.kept.stopped
        return {
            "inputs": inputs,
            "mask": mask,
            "segments": torch.from_numpy(segments.astype(np.float32)),
            "labels": torch.from_numpy(item.labels[kept]),
            "meta": meta,
        }

    def fingerprint(self) -> str:
        """Return 32 hexadecimal digits that change with the items' names, sizes and ground truth, and the settings.

        Paths and thread numbers do not count: the data may move.
        """
        settings = {**asdict(self.reader), "threads": None, "kind": type(self.reader).__name__}
        settings = {k: v for k, v in settings.items() if v or k not in ("widths", "key")}  # runs before them had none
        rows = [_row(item) for item in self.items]
        text = json.dumps([asdict(self.window), settings, rows, self.places], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())

    @property
    def notes(self) -> set[str]:
        """What a run's output says of the run itself already; of all its data the same set."""
        return set() if self.kept is None else self.kept.said

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests that name what changed, of each video's ground truth and of its file; none of over 1,000 videos.

        Of a file count its size and the first and last 64 KiB: what was cut, replaced or encoded anew differs there,
        and no film is read whole. Neither path nor time counts.
        """
        if len(self.items) > _NAMED:
            return {}
        truth = {f"{i.name} (annotations)": xxhash.xxh3_128_hexdigest(json.dumps(_row(i)).encode()) for i in self.items}
        return (
            {"": "clips 1"}
            | truth
            | {i.name: digest_of_ends([file_of(each) for each in (i.path, *i.beside)]) for i in self.items}
        )

    def _cut(
        self, item: Item, place: Place, generator: torch.Generator
    ) -> tuple[Window, NDArray[np.float64], NDArray[np.int64]]:
        """Return the window, its segments [M, 2] in grid steps, and their numbers [M] among the item's segments."""
        config, stride = self.window, self.window.snippet_stride
        grid = frame_positions(item)
        frames = item.steps * stride if item.steps else item.frames
        if config.method == "sliding":
            window = _window(config, (place.first, place.stop), frames)
            inside, kept = clip_to_window(
                grid, window, snippet_stride=stride, completeness=config.ioa_thresh, offset=config.offset_frames
            )
            return window, inside, kept
        segments = (grid - config.offset_frames) / stride
        first, stop = draw_truncation(_steps(item, config), segments, config, generator)
        kept = np.flatnonzero(_inside(segments, first, stop) >= config.trunc_thresh)
        return _window(config, (first, stop), frames), np.clip(segments[kept], first, stop) - first, kept


def _row(item: Item) -> list[Any]:
    """Return what an item's sample is made of beside its file."""
    row = [item.name, item.frames, item.duration, item.size, item.steps, item.segments.tolist(), item.labels.tolist()]
    return row + ([] if item.times is None else [item.times.tolist()]) + ([item.counted] if item.counted else [])


def make_clips(items: Sequence[Item], window: WindowConfig, reader: VideoReader | FeatureReader) -> Clips:
    """Make the data set of `items`.

    For training on random windows, videos without a segment are left out, as in OpenTAD.

    Raises:
        TensorkeepError: No video has a segment to train on, or a grid step's frames are no multiple of `scale_factor`.

    Example:
        >>> items, problems = find_items(annotations, "training", "videos", VideoReader())  # doctest: +SKIP
        >>> data = make_clips(items, WindowConfig(), VideoReader(augment=AugmentConfig()))  # doctest: +SKIP
    """
    if window.snippet_stride % window.scale_factor:
        what = f"a stride of {window.snippet_stride} frames is no multiple of scale_factor {window.scale_factor}"
        raise TensorkeepError(what, where="windows")
    if window.method == "random_trunc":
        items = [item for item in items if len(item.labels)]
        if not items:
            raise TensorkeepError("no video has a segment to train on", where="windows")
    return Clips(tuple(items), window, reader, tuple(_places(items, window)))


def most_segments(clips: Clips) -> int:
    """Return the largest number of segments that a sample can hold."""
    return max(len(item.labels) for item in clips.items)


def draw_truncation(
    steps: int, segments: NDArray[np.float64], config: WindowConfig, generator: torch.Generator
) -> tuple[int, int]:
    """Draw a random window that shows a segment.

    The last place tried is taken where none of 200 shows one by `trunc_thresh`, as in OpenTAD.

    Args:
        steps: grid steps of the video.
        segments: [N, 2] in grid steps.
        config: `window_size`, `trunc_thresh` and `crop_ratio` count.
        generator: source of the random numbers.

    Returns:
        First and one-past-last grid step of the window.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    length = config.window_size
    if steps <= length:
        if config.crop_ratio is None:
            return 0, steps
        low, high = (round(ratio * steps) for ratio in config.crop_ratio)
        length = draw(max(low, 1), max(min(high, steps), 1))
        if length == steps:
            return 0, steps
    first = 0
    for _ in range(_TRIES):
        first = draw(0, steps - length)
        if (_inside(segments, first, first + length) >= config.trunc_thresh).any():
            break
    return first, first + length


def _inside(segments: NDArray[np.float64], first: int, stop: int) -> NDArray[np.float64]:
    """Return the part of each segment that lies between two grid steps; 0 for one without length."""
    cut = np.clip(segments, first, stop)
    length = segments[:, 1] - segments[:, 0]
    inside: NDArray[np.float64] = (cut[:, 1] - cut[:, 0]) / np.where(length > 0, length, 1)
    return inside


def _steps(item: Item, config: WindowConfig) -> int:
    """Return the grid steps of an item."""
    return item.steps or count_snippets(item.frames, config.snippet_stride)


def _places(items: Sequence[Item], config: WindowConfig) -> Iterator[Place]:
    """List the windows of all items: every sliding one, else one for each item."""
    for number, item in enumerate(items):
        if config.method != "sliding":
            yield Place(number, 0, 0)
            continue
        for first, stop in place_windows(_steps(item, config), config.window_size, config.window_overlap_ratio):
            yield Place(number, first, stop)


def _window(config: WindowConfig, bounds: tuple[int, int], frames: int) -> Window:
    """Make the window that covers grid steps `bounds` of a video of `frames` frames."""
    return make_window(
        bounds, frames, size=config.window_size, snippet_stride=config.snippet_stride, scale=config.scale_factor
    )


def _read(
    item: Item, clips: Clips, cut: Window | None, generator: torch.Generator, problems: list[Problem]
) -> Tensor | Uncut | Asked:
    """Read the inputs of one sample: of the window `cut`, or with None the whole video, resized."""
    reader, config = clips.reader, clips.window
    length = config.window_size
    if isinstance(reader, FeatureReader):
        rows = None if cut is None else (cut.first, cut.last + 1)
        features = read_side_by_side((item.path, *item.beside), reader.channels, item.steps, rows, **reader.stored)
        if cut is None:
            return linear_resize(features, length)
        return F.pad(features, (0, length - features.shape[1]))
    indices = resized_frames(item.frames, length, config.scale_factor) if cut is None else cut.frames
    side = reader.short_side
    broken: Literal["keep", "error"] = "keep" if reader.broken == "keep" else "error"
    if clips.asks:
        asked = ask(item.path, indices, lambda height, width: fitted(height, width, side))
        if isinstance(asked, Asked):
            drawn = None if reader.augment is None else draw_augmentation(reader.augment, *asked.size, generator)
            return asked._replace(broken=broken, drawn=drawn, side=reader.size)
        problems.append(Problem("info", "decoded on a CPU", item.name, f"decoded on a CPU: {asked}"))

    def fetch(numbers: NDArray[np.int64], odd: list[Problem], stored: set[tuple[int, int]] | None = None) -> Tensor:
        how: dict[str, Any] = {"size": side, "threads": reader.threads, "problems": odd, "broken": broken}
        return decode(item.path, numbers, stored=stored, **how)

    if clips.kept is None:
        frames = fetch(indices, problems)
    else:
        frames = cached_frames(clips.kept, item.path, grid_of(item, config), indices, side, fetch, problems)
    if reader.augment is None:
        frames = centre_crop(frames, reader.size)
        if clips.uncut:
            return Uncut(frames, None)
    else:
        drawn = draw_augmentation(reader.augment, frames.shape[2], frames.shape[3], generator)
        if clips.uncut:
            return cut_out(frames, drawn)
        frames = augment(frames, drawn, reader.augment.size)
    return frames.transpose(0, 1).contiguous()  # [3, T, H, W]


def grid_of(item: Item, window: WindowConfig) -> Grid:
    """Return the frames of a video that its samples can show.

    Args:
        item: a video.
        window: how windows are placed.
    """
    if window.method == "resize":
        shown = resized_frames(item.frames, window.window_size, window.scale_factor)
        return Grid(np.unique(shown), f"{window.window_size} x {window.scale_factor} of {item.frames}")
    apart = window.snippet_stride // window.scale_factor
    return Grid(np.arange(0, item.frames, apart), f"every {apart} of {item.frames}")


def kept_parts(clips: Clips) -> Iterator[tuple[str, Grid, int]]:
    """Give path, grid and pictures' side of each video of a data set.

    Args:
        clips: the data set, of videos.
    """
    assert isinstance(clips.reader, VideoReader)
    for item in clips.items:
        yield item.path, grid_of(item, clips.window), clips.reader.short_side


def _nothing(clips: Clips) -> Tensor | Uncut:
    """Make zeros in the shape of a sample's inputs."""
    reader, config = clips.reader, clips.window
    if isinstance(reader, FeatureReader):
        return torch.zeros(reader.channels, config.window_size)
    size = reader.size if reader.augment is None else reader.augment.size
    frames = torch.zeros(config.window_size * config.scale_factor, 3, size, size, dtype=torch.uint8)
    return Uncut(frames, None) if clips.uncut else frames.transpose(0, 1).contiguous()
