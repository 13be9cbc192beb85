"""Decode frames of video files: exactly those asked for, and no more of the file than they need.

Frame i is the i-th picture shown, whatever the frame rate does (see `containers`). Reading starts at the last keyframe
before a frame; pictures that are not asked for and that no other picture refers to are not decoded (H.264, MPEG-4);
scaling and conversion to RGB are one step. A picture that does not come out where the frame table says is looked for
again from the first frame on, with every picture decoded.

Nothing is decoded at a lower resolution inside the codec: H.264, HEVC, VP9 and AV1 cannot, and MPEG-4's way of it
drifts away from the pictures. Needs PyAV (`pip install tensorkeep[detection]`); torchcodec is used on request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorkeep.detection.data.clip_memory import clip_memory
from tensorkeep.detection.data.containers import FrameTable, frame_table
from tensorkeep.detection.data.damage import demuxed
from tensorkeep.detection.data.device_augment import scaled
from tensorkeep.detection.data.hearing import decoder
from tensorkeep.detection.data.opening import MEND, import_av, opened, quarter_turn, sought
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.sizes import Size, fitted
from tensorkeep.detection.data.torchcodec_frames import Pictures, choose_pictures, decode_pictures
from tensorkeep.errors import TensorkeepError

Broken = Literal["error", "keep"]
Picture = NDArray[np.uint8]  # [3, H, W]
_DISPOSABLE = {"h264", "mpeg4"}  # HEVC's "non-reference" pictures may serve a higher temporal layer


def decode(
    path: str | Path,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    size: Size = None,
    threads: int = 1,
    broken: Broken = "error",
    problems: list[Problem] | None = None,
    decoder: Literal["pyav", "torchcodec"] = "pyav",
    stored: set[tuple[int, int]] | None = None,
) -> Tensor:
    """Decode chosen frames of a video.

    Args:
        path: a video file.
        indices: numbers of T frames, in any order; repetitions are allowed.
        size: pixels of the shorter side, or (height, width), scaled bilinearly; None: as stored.
        threads: 1, or 0 for as many as the codec can use; a loader with several processes wants 1.
        broken: "error" raises for a damaged or lacking picture; "keep" keeps damaged ones and puts the picture before
            in the place of lacking ones (at the start of the file the one after).
        problems: gets one entry for each picture that is damaged or lacking.
        decoder: "torchcodec" gives the same frames but for the rounding of colours, and notices no damage.
        stored: gets width and height, as they lie in the file, of the pictures that were decoded.

    Returns:
        uint8 `[T, 3, H, W]`, RGB, turned as they are meant to be seen.

    Raises:
        TensorkeepError: The file has no such frames, or one of them cannot be decoded; file and frame are named.

    Example:
        >>> decode("v_001.mp4", range(0, 3072, 4), size=160).shape  # doctest: +SKIP
        torch.Size([768, 3, 160, 284])
    """
    wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
    if decoder == "torchcodec":
        return _torchcodec_frames(path, wanted, size, threads)
    unique, place = np.unique(wanted, return_inverse=True)
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(len(unique) + 1))
    out: list[NDArray[np.uint8]] = []

    def memory_for(k: int, shape: tuple[int, int]) -> Picture:
        if not out:
            out.append(clip_memory((len(wanted), 3, *shape)))
        slot: Picture = out[0][order[bounds[k]]]
        return slot

    for k, (_, picture) in enumerate(_pictures(path, unique, size, threads, broken, problems, memory_for, stored)):
        for slot in order[bounds[k] + 1 : bounds[k + 1]].tolist():
            out[0][slot] = picture
    if not out:
        raise TensorkeepError("no frame asked for", where=path)
    return torch.from_numpy(out[0])


def stream_windows(
    path: str | Path,
    windows: Iterable[Sequence[int] | NDArray[np.int64]],
    *,
    size: Size = None,
    threads: int = 1,
    broken: Broken = "error",
    problems: list[Problem] | None = None,
) -> Iterator[Tensor]:
    """Decode a video window by window; each picture is decoded once, however many windows show it.

    Memory holds one window and what the next ones share with it, however long the video is.

    Args:
        path: a video file.
        windows: frame numbers of each window, in rising order of their last frames.
        size: pixels of the shorter side, or (height, width), scaled bilinearly; None: as stored.
        threads: 1, or 0 for as many as the codec can use.
        broken: "error", or "keep" for damaged and lacking pictures.
        problems: gets one entry for each of those.

    Yields:
        The frames of each window, uint8 `[T, 3, H, W]`.

    Raises:
        TensorkeepError: As `decode` does.

    Example:
        >>> for frames in stream_windows("long.mp4", [w.frames for w in windows], size=160): ...  # doctest: +SKIP
    """
    lists = [np.asarray(window, dtype=np.int64).reshape(-1).tolist() for window in windows]
    last_use = {index: k for k, window in enumerate(lists) for index in window}
    held: dict[int, Picture] = {}
    k, lacking = 0, set(lists[0]) if lists else set()
    for index, picture in _pictures(path, np.array(sorted(last_use), dtype=np.int64), size, threads, broken, problems):
        held[index] = picture
        lacking.discard(index)
        while not lacking:
            shown = [held[i] for i in lists[k]]
            yield torch.from_numpy(np.stack(shown, out=clip_memory((len(shown), *shown[0].shape))))
            held = {i: kept for i, kept in held.items() if last_use[i] > k}
            k += 1
            if k == len(lists):
                return
            lacking = set(lists[k]) - held.keys()


def find_damage(path: str | Path, frames: int) -> list[Problem]:
    """Decode all `frames` frames of a video once and list those that are damaged or lacking."""
    problems: list[Problem] = []
    for _ in _pictures(path, np.arange(frames), None, 1, "keep", problems):
        pass
    return problems


def _new_memory(number: int, shape: tuple[int, int]) -> Picture:
    """Make memory of its own for a picture of `shape` (height, width)."""
    return np.empty((3, *shape), dtype=np.uint8)


def _pictures(
    path: str | Path,
    indices: NDArray[np.int64],
    size: Size,
    threads: int,
    broken: Broken,
    problems: list[Problem] | None,
    memory_for: Callable[[int, tuple[int, int]], Picture] = _new_memory,
    sizes: set[tuple[int, int]] | None = None,
) -> Iterator[tuple[int, Picture]]:
    """Give `(index, picture [3, H, W])` for each of `indices` (rising, no repetition), in this order; none is left out.

    `memory_for(k, (H, W))` gives the memory that the k-th picture is written to; `sizes` gets those in the file.
    """
    table = frame_table(path)
    if len(indices) and not 0 <= indices[0] <= indices[-1] < len(table.pts):
        what = f"frames {indices[0]} to {indices[-1]} were asked for, it has {len(table.pts)}"
        raise TensorkeepError(what, where=path, hint="frame counts of the annotation and the file differ")
    found = problems if problems is not None else []
    # one for all frames: setting one up costs more than using it
    reformatter = import_av().video.reformatter.VideoReformatter()
    last: Picture | None = None
    waiting: list[int] = []  # frames that did not come, before the first that did
    shape: tuple[int, int] | None = None
    stored: tuple[int, int] | None = None  # width and height in the file, of the frame before
    run: _Run | None = None
    for k, (index, frame, damaged) in enumerate(_frames(path, table, indices, threads, broken)):
        if damaged or frame is None:
            run = _damage(table, k, index, frame is None, run)
            if broken == "error":
                raise TensorkeepError(run.message, where=path, hint=MEND)
            found[len(found) - (run.frames > 1) :] = [Problem("warning", "damaged video", Path(path).stem, run.message)]
        if frame is not None:
            now = (frame.width, frame.height)
            if stored is not None and stored != now:
                what = _other_size(table, index, stored, now)
                found.append(Problem("warning", "size changes", Path(path).stem, what))
                run = None
            stored = now
            if sizes is not None:
                sizes.add(now)
        if frame is None and last is None:
            waiting.append(index)
            continue
        shape = shape or _target(frame, size)
        made = memory_for(k, shape)
        if frame is not None:
            _paint(reformatter, frame, made)
        elif last is not None:
            made[...] = last
        last = made
        for number, early in enumerate(waiting):
            repeated = memory_for(number, shape)
            repeated[...] = last
            yield early, repeated
        waiting = []
        yield index, last
    if waiting:
        raise TensorkeepError(f"none of its frames {waiting[0]} to {waiting[-1]} can be decoded", where=path, hint=MEND)


class _Run(NamedTuple):
    """Frames in a row that are damaged or lacking.

    `last` is the number, among the frames wanted, of the last of them, `first` the first frame, `frames` how many.
    """

    last: int
    first: int
    frames: int
    lacking: bool
    message: str


def _damage(table: FrameTable, number: int, index: int, lacking: bool, run: _Run | None) -> _Run:
    """Say which frames are damaged or lacking: `index`, the `number`th wanted, with those of `run` where it goes on."""
    if run is None or run.last != number - 1 or run.lacking is not lacking:
        run = _Run(number, index, 0, lacking, "")
    what = f"frame {index} ({table.at(index):.2f} s)"
    if run.frames:
        what = f"frames {run.first} to {index} ({table.at(run.first):.2f} to {table.at(index):.2f} s)"
    done = "cannot be decoded" if lacking else ("are damaged" if run.frames else "is damaged")
    return _Run(number, run.first, run.frames + 1, lacking, f"{what} {done}")


def _other_size(table: FrameTable, index: int, before: tuple[int, int], now: tuple[int, int]) -> str:
    """Say that pictures have another size from a frame on; sizes are width and height."""
    what = f"its pictures are {now[0]} x {now[1]} from frame {index} ({table.at(index):.2f} s) on"
    return f"{what}, {before[0]} x {before[1]} before: scaled to one size"


def _frames(
    path: str | Path, table: FrameTable, indices: NDArray[np.int64], threads: int, broken: Broken
) -> Iterator[tuple[int, Any, bool]]:
    """Give `(index, PyAV frame or None, damaged)` in rising order; one that does not come is looked for once more."""
    tries = 3  # a file in which this many searches were in vain is damaged; it is not searched again and again
    with opened(path, threads) as (container, stream):
        for index, frame, damaged in _reach(container, stream, table, indices, broken, path):
            if frame is None and tries and not table.counted:
                frame, damaged = next(_anew(path, table, np.array([index]), threads, broken))[1:]
                tries -= frame is None
            yield index, frame, damaged


def _anew(
    path: str | Path, table: FrameTable, indices: NDArray[np.int64], threads: int, broken: Broken
) -> Iterator[tuple[int, Any, bool]]:
    """Go through the file from its start, with every picture decoded."""
    with opened(path, threads) as (container, stream):
        yield from _reach(container, stream, table, indices, broken, path, from_start=True)


def _reach(
    container: Any,
    stream: Any,
    table: FrameTable,
    indices: NDArray[np.int64],
    broken: Broken,
    path: str | Path,
    *,
    from_start: bool = False,
) -> Iterator[tuple[int, Any, bool]]:
    """Go through the file once, as `_frames`: from keyframe to keyframe, or `from_start` with every picture decoded."""
    simple = from_start or table.counted or stream.pix_fmt == "pal8"  # a palette is told once, before all pictures
    runs = [(-1, indices.tolist())] if simple else _runs(table, indices)
    skips = not simple and stream.codec_context.name in _DISPOSABLE
    for key, run in runs:
        if key >= 0 and not sought(container, stream, table.place(key)):
            yield from _anew(path, table, indices[indices >= run[0]], stream.codec_context.thread_count, broken)
            return
        since = int(table.key_pts[key]) if key > 0 else None
        wanted = {index if table.counted else int(table.pts[index]): index for index in run}
        place, damaged = 0, False
        doubted: set[int] = set()
        for count, frame in enumerate(_decoded(container, stream, wanted, skips, broken, path, table, doubted)):
            stamp = count if table.counted else frame.pts
            # pictures before the keyframe lack what they refer to
            if since is None or (stamp is not None and stamp >= since):
                doubtful = bool(frame.is_corrupt) or frame.pts in doubted
                damaged = doubtful or (damaged and not frame.key_frame)
            index = wanted.get(stamp)
            if index is None or index < run[place]:
                continue
            while run[place] < index:
                yield run[place], None, True
                place += 1
            yield index, frame, damaged
            place += 1
            if place == len(run):
                break
        for index in run[place:]:
            yield index, None, True


def _decoded(
    container: Any,
    stream: Any,
    wanted: dict[int, int],
    skips: bool,
    broken: Broken,
    path: str | Path,
    table: FrameTable,
    doubted: set[int],
) -> Iterator[Any]:
    """Decode pictures from here on, in the order they are shown.

    With `skips` those neither wanted nor referred to may be left out; `doubted` gets times the decoder complains of.
    """
    context, skipping, hear = stream.codec_context, False, decoder(stream)
    for packet in demuxed(container, stream):
        skip = skips and packet.pts is not None and packet.pts not in wanted
        if skip is not skipping:  # said only where it changes: saying it costs a tenth of decoding a small picture
            context.skip_frame, skipping = "NONREF" if skip else "DEFAULT", skip
        heard = hear(packet)
        if heard.complained and packet.pts is not None:
            doubted.add(packet.pts)
        if heard.failed and broken == "error":
            known = packet.pts is not None and not table.counted
            at = f" at {(packet.pts - int(table.pts[0])) * table.time_base:.2f} s" if known else ""
            raise TensorkeepError(f"cannot be decoded{at}: {heard.failed}", where=path, hint=MEND)
        yield from heard.frames


def _runs(table: FrameTable, indices: NDArray[np.int64]) -> list[tuple[int, list[int]]]:
    """Split frames into runs `(keyframe, frames)`, each decoded in one go from its keyframe on.

    A gap of whole keyframe intervals starts the next run.
    """
    keys = np.maximum(np.searchsorted(table.key_pts, table.pts[indices], side="right") - 1, 0)
    runs: list[tuple[int, list[int]]] = []
    previous = -2
    for key, index in zip(keys.tolist(), indices.tolist()):
        if key > previous + 1:
            runs.append((key, []))
        runs[-1][1].append(index)
        previous = key
    return runs


def _torchcodec_frames(path: str | Path, wanted: NDArray[np.int64], size: Size, threads: int) -> Tensor:
    """Decode frames with torchcodec on the CPU: uint8 `[T, 3, H, W]`."""
    table = frame_table(path)
    if table.counted or not len(wanted) or not 0 <= wanted.min() <= wanted.max() < len(table.pts):
        what = f"torchcodec cannot find its frames {wanted.tolist()[:4]}: it has {len(table.pts)}"
        what += ", and its times are of no use" if table.counted else ""
        raise TensorkeepError(what, where=path, hint="leave the decoder at pyav")
    with opened(path) as (container, stream):
        frame, number = next(container.decode(stream)), stream.index
    shown = _target(frame, None)
    pictures = Pictures(str(path), number, table.time_base, shown, *choose_pictures(table.pts, table.key_pts, wanted))
    goal = fitted(*shown, size)
    return decode_pictures(pictures, torch.device("cpu"), lambda frames: scaled(frames, goal).contiguous(), threads)


def _target(frame: Any, size: Size) -> tuple[int, int]:
    """Return height and width of a frame as it will be shown, after rotation and scaling."""
    height, width = frame.height, frame.width
    return fitted(width, height, size) if quarter_turn(frame.rotation) % 180 else fitted(height, width, size)


def _paint(reformatter: Any, frame: Any, out: Picture) -> None:
    """Write a frame to `out [3, H, W]`, scaled to its size and turned as it is meant to be seen."""
    turn = quarter_turn(frame.rotation)
    height, width = out.shape[1:] if turn % 180 == 0 else out.shape[:0:-1]
    # libswscale's unscaled way to planes leaves the last columns of widths that are no multiple of 8 unwritten
    same = (height, width) == (frame.height, frame.width)
    form = "rgb24" if same else "gbrp"  # planes cost half of what interleaved RGB does
    made = reformatter.reformat(frame, width=width, height=height, format=form, interpolation="BILINEAR", threads=1)
    rows = [np.frombuffer(plane, np.uint8).reshape(height, plane.line_size) for plane in made.planes]
    place = np.rot90(out, -turn // 90, axes=(1, 2)) if turn else out  # a view: turned back, it is the picture as stored
    if same:
        place[...] = rows[0][:, : 3 * width].reshape(height, width, 3).transpose(2, 0, 1)
        return
    for channel, k in enumerate((2, 0, 1)):
        place[channel] = rows[k][:, :width]
