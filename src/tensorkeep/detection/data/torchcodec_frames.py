"""Decode frames with torchcodec: on a GPU by its decoder engines (NVDEC), or with FFmpeg on a CPU.

torchcodec is told when each picture is shown and where decoding may start, so that frame i is the picture that the
frame table says; every time that comes back is compared with it. It notices no damage. Needs torchcodec and the shared
libraries of FFmpeg under their own names (`ffmpeg_links`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorkeep.errors import TensorkeepError

UNSUPPORTED = "its pictures are none that the GPU's decoder takes"
_AT_ONCE = 1 << 26  # bytes of pictures, as large as they are stored, that are held at a time
_NEEDS = "torchcodec, and FFmpeg's shared libraries where the loader looks (tensorkeep.detection.data.ffmpeg_links)"


class Pictures(NamedTuple):
    """Chosen pictures of a video file, and those around them that decoding needs.

    Attributes:
        path: the file.
        stream: number of its stream.
        unit: seconds of a unit of time.
        shown: height and width as they are meant to be seen.
        pts: [M] presentation times, rising: from the keyframe before the first picture to the last picture.
        keys: [M] at which of them decoding may start.
        places: [T] which of the M are chosen.
    """

    path: str
    stream: int
    unit: float
    shown: tuple[int, int]
    pts: NDArray[np.int64]
    keys: NDArray[np.bool_]
    places: NDArray[np.int64]


def choose_pictures(
    pts: NDArray[np.int64], key_pts: NDArray[np.int64], indices: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Choose frames of a table: `pts`, `keys` and `places` of `Pictures`.

    Args:
        pts: [N] when each frame is shown, rising.
        key_pts: [K] when each keyframe is shown, hidden ones too, rising.
        indices: [T] numbers of frames, in any order.

    Example:
        >>> choose_pictures(np.arange(0, 80, 10), np.array([0, 40]), np.array([5, 6]))[0]
        array([40, 50, 60])
    """
    first, last = pts[indices.min()], pts[indices.max()]
    earlier = key_pts[key_pts <= first]
    begin = earlier[-1] if len(earlier) else pts[0]
    keys = key_pts[(key_pts >= begin) & (key_pts <= last)]
    every = np.union1d(pts[(pts >= begin) & (pts <= last)], keys)
    return every, np.isin(every, keys), np.searchsorted(every, pts[indices])


def decode_pictures(
    pictures: Pictures, device: torch.device, scale: Callable[[Tensor], Tensor], threads: int = 1
) -> Tensor:
    """Decode pictures, scaling some at a time as they come.

    Args:
        pictures: which ones.
        device: where they are decoded and scaled.
        scale: makes of frames `[n, 3, H, W]` ones of another size.
        threads: of a CPU's decoder.

    Returns:
        uint8 `[T, 3, h, w]` on the device.

    Raises:
        TensorkeepError: torchcodec is not there, cannot decode the file, or gives other pictures than those chosen.
    """
    decoder = open_decoder(pictures, device, threads)
    unique, back = np.unique(pictures.places, return_inverse=True)
    height, width = pictures.shown
    step = max(1, _AT_ONCE // (3 * height * width))
    parts = [scale(_frames(decoder, pictures, unique[at : at + step])) for at in range(0, len(unique), step)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    # with nothing repeated they are in order already where they were asked for in order
    return out if np.array_equal(back, np.arange(len(unique))) else out[torch.from_numpy(back).to(device)]


def _frames(decoder: Any, pictures: Pictures, places: NDArray[np.int64]) -> Tensor:
    """Decode some of the pictures, as large as they are shown, and see that they are those asked for."""
    try:
        found = decoder.get_frames_at(places.tolist())
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise TensorkeepError(f"torchcodec cannot decode it: {_first_line(error)}", where=pictures.path) from error
    times = np.rint(found.pts_seconds.cpu().numpy() / pictures.unit).astype(np.int64)
    wrong = np.flatnonzero(times != pictures.pts[places])
    if len(wrong):
        asked, came = (float(t[wrong[0]]) * pictures.unit for t in (pictures.pts[places], times))
        what = f"torchcodec gave the picture at {came:.3f} s for that at {asked:.3f} s"
        raise TensorkeepError(what, where=pictures.path)
    frames: Tensor = found.data  # [n, 3, H, W]
    shown = tuple(pictures.shown)  # a loader that pins memory may have made a list of it
    if tuple(frames.shape[2:]) != shown:
        height, width = frames.shape[2:]
        what = f"torchcodec's pictures are {width} x {height}, not {shown[1]} x {shown[0]}"
        raise TensorkeepError(what, where=pictures.path)
    return frames


def open_decoder(pictures: Pictures, device: torch.device, threads: int = 1) -> Any:
    """Open a file in torchcodec's `VideoDecoder`.

    Raises:
        TensorkeepError: torchcodec is not there or cannot open it, or the GPU's decoder does not decode it.
    """
    decoders = import_torchcodec()
    steps = np.diff(pictures.pts, append=pictures.pts[-1] + 1)
    rows = zip(pictures.pts.tolist(), steps.tolist(), pictures.keys.tolist())
    frames = [{"pts": pts, "duration": step, "key_frame": int(key)} for pts, step, key in rows]
    try:
        decoder = decoders.VideoDecoder(
            f"file:{Path(pictures.path).absolute()}",
            stream_index=pictures.stream,
            num_ffmpeg_threads=threads,
            device=str(device),
            custom_frame_mappings=json.dumps({"frames": frames}),
        )
    except (RuntimeError, ValueError) as error:
        what = f"torchcodec cannot open it on {device.type}: {_first_line(error)}"
        raise TensorkeepError(what, where=pictures.path) from error
    if device.type == "cuda" and decoder.cpu_fallback:
        why = str(decoder.cpu_fallback).rpartition(": ")[2]
        what = f"{UNSUPPORTED}: {why}" if "not supported" in why else f"the GPU's decoder cannot be used: {why}"
        raise TensorkeepError(what, where=pictures.path)
    return decoder


def import_torchcodec() -> Any:
    """Import torchcodec's decoders; raises TensorkeepError that says what it needs where that fails."""
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError, OSError) as error:  # it fails in each of these ways where FFmpeg does not fit
        hint = f"pip install {_NEEDS}; or leave decoding to PyAV"
        raise TensorkeepError(f"torchcodec cannot be used: {_first_line(error)}", hint=hint) from error


def torchcodec_version() -> str:
    """Return torchcodec's version, for a run's record."""
    return str(importlib.import_module("torchcodec").__version__)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
