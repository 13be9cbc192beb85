"""Keep the frames that samples show in a folder, so that a video is decoded once and not in every epoch.

Which frames of a video can be asked for is known before (its grid), so each has a slot in a file of its own
(`frame_store`). A file is found by what decides its pixels: name, size, time of change and both ends of the video, the
pictures' side, the grid, and the versions of what decodes. Of a video in which decoding ever found something odd
nothing is kept, so that damage is told each time. What cannot be kept is decoded each time, which is said once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from tensorkeep.detection.data.containers import probe
from tensorkeep.detection.data.file_ends import digest_of_ends
from tensorkeep.detection.data.frame_store import BARRED, Film, Found, Head, bar, count_slots, read_slots, write_slots
from tensorkeep.detection.data.opening import import_av
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.sizes import fitted
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import TEMPORARY, explained, local_path
from tensorkeep.storage.leftovers import dead_names
from tensorkeep.storage.placement import remove, replacing, write_bytes

MARKER = "tensorkeep-frames.json"
_FORMAT = 1  # of keys and files; another where decoding gives other pixels
_SAID = {"tensorkeep frames": _FORMAT}
_OURS = re.compile(
    r"[0-9a-f]{32}\.frames"
)  # what somebody emptied of all, the marker too, fills again while runs go on
_BETWEEN = 3  # places between both ends of a video that its key knows: raw pictures are as long whatever they show
_SPARE = 8 << 30  # bytes of the disk that are left to others
_ASKED = 8  # videos whose pictures' size is looked up; the others are taken to be alike
_PATIENCE = 20.0  # times as long as a look at the folder took until it is looked at again
Indices = NDArray[np.int64]
Fetch = Callable[[Indices, list[Problem], set[tuple[int, int]]], Tensor]


class Grid(NamedTuple):
    """The frames of a video that can be asked for, rising, and a name that tells them from other choices."""

    frames: Indices
    name: str


@dataclass(eq=False)
class FrameCache:
    """A folder of decoded frames, as `open_cache` opens it; each process has its own.

    Attributes:
        folder: where they lie.
        gib: how much of the disk they may take.
        stopped: why this process keeps no more of them; "": it does.
        said: what a run's output says already.
    """

    folder: Path
    gib: float
    stopped: str = ""
    said: set[str] = field(default_factory=set)
    _seen: tuple[float, float, int] = (0.0, 0.0, 0)  # when the folder was looked at, for how long, bytes in it

    def room(self, more: int) -> bool:
        """Return whether so many bytes more may be kept; where not, no more are from now on.

        What others write is noticed by the next look at the folder.
        """
        if self.stopped:
            return False
        now = time.monotonic()
        last, took, used = self._seen
        if not last or now - last > _PATIENCE * took:
            used = _bytes_in(self.folder)
            last, took = now, time.monotonic() - now
        self._seen = (last, took, used + more)
        if used + more > self.gib * 2**30:
            self.stopped = f"data.cache {self.folder} is full (data.cache_gib {self.gib:g}): other frames are decoded"
        else:
            free = _free(self.folder)
            if free < _SPARE + more:
                left = f"its disk has {_said(free)} free, of which {_said(_SPARE)} are left to others"
                self.stopped = f"data.cache {self.folder}: {left}: other frames are decoded"
        return not self.stopped

    def failed(self, error: OSError) -> None:
        """Keep no more frames, since the system refused something."""
        what = error.strerror or str(error)
        self.stopped = self.stopped or f"data.cache {self.folder}: {what}: other frames are decoded"


def find_cache(folder: str | Path, gib: float) -> FrameCache:
    """Find a folder of decoded frames, which need not be there yet; nothing is made or changed.

    Args:
        folder: the folder.
        gib: how much of the disk it may take.

    Raises:
        TensorkeepError: It holds other things, or frames of another version, or is no folder.
    """
    folder = local_path(folder)
    marker = folder / MARKER
    with explained(folder):
        names = [path.name for path in folder.iterdir()] if os.path.lexists(folder) else []
        marked = os.path.lexists(marker)
        if marked and stat.S_ISREG(marker.lstat().st_mode):
            with marker.open("rb") as file:
                found = parse_json(file.read(1024), marker)
            if found != _SAID:
                what = f"holds frames of another version: {found}, not {_SAID}"
                raise TensorkeepError(what, where=folder, hint="name another folder, or delete this one")
        elif marked or not all(name.endswith(TEMPORARY) or _OURS.fullmatch(name) for name in names):
            hint = f"name a new or empty folder; one of ours has a file {MARKER}"
            raise TensorkeepError("is not empty and holds no decoded frames", where=folder, hint=hint)
    return FrameCache(folder, gib)


def open_cache(folder: str | Path, gib: float) -> FrameCache:
    """Open a folder of decoded frames, or make it; one with other things in it stays as it is.

    Args:
        folder: the folder.
        gib: how much of the disk it may take.

    Raises:
        TensorkeepError: It holds other things, or frames of another version, or cannot be written to.
    """
    with explained(folder):
        local_path(folder).mkdir(parents=True, exist_ok=True)
    kept = find_cache(folder, gib)
    marker = kept.folder / MARKER
    if not marker.exists():
        try:
            with replacing(marker, overwrite=True) as temporary:
                write_bytes(temporary, json.dumps(_SAID).encode())
        except TensorkeepError:
            if not marker.exists():  # nor has another process made it
                raise
    for left in dead_names(kept.folder):
        remove(left)
    return kept


def cached_frames(
    kept: FrameCache, path: str, grid: Grid, wanted: Indices, side: int, fetch: Fetch, problems: list[Problem]
) -> Tensor:
    """Give frames of a video: those that are kept, and the others decoded, which are then kept.

    Args:
        kept: the folder.
        path: the video.
        grid: its frames that can be asked for.
        wanted: [T] those that are.
        side: pixels of a picture's shorter side.
        fetch: decodes frames of these numbers, says what is odd about them and what size they have in the file.
        problems: gets what is odd.

    Returns:
        uint8 `[T, 3, H, W]`, the bytes that `fetch` gives of all of them.

    Raises:
        TensorkeepError: As `fetch` does.
    """
    slots = np.minimum(np.searchsorted(grid.frames, wanted), len(grid.frames) - 1)
    film = film_of(kept, path, grid, side)
    if film is None or not np.array_equal(grid.frames[slots], wanted):
        return fetch(wanted, problems, set())

    def decoded(some: Indices, odd: list[Problem]) -> tuple[Tensor, tuple[int, int] | None]:
        sizes = set[tuple[int, int]]()
        try:
            frames = fetch(grid.frames[some], odd, sizes)
        except TensorkeepError:
            if film == film_of(kept, path, grid, side):
                _bar(kept, film)
            raise
        good = not odd and len(sizes) == 1
        same = film == film_of(kept, path, grid, side)  # nobody changed the video
        if same and not good:
            _bar(kept, film)
        return frames, sizes.pop() if good and same else None

    found = _read(kept, film, slots)
    frames = None if found is None else _completed(kept, film, found, slots, decoded)
    if frames is not None:
        return frames
    odd: list[Problem] = []
    try:
        frames, stored = decoded(slots, odd)
    finally:
        problems += odd
    if stored is not None:
        _keep(kept, film, frames, slots, stored)
    return frames


def _completed(
    kept: FrameCache,
    film: Film,
    found: Found,
    slots: Indices,
    decoded: Callable[[Indices, list[Problem]], tuple[Tensor, tuple[int, int] | None]],
) -> Tensor | None:
    """Decode what is lacking of a clip; None where all of it must be, for the right word about what is odd."""
    frames = torch.from_numpy(found.frames)
    if not len(found.lacking):
        return frames
    try:
        rest, stored = decoded(found.lacking, [])
    except TensorkeepError:
        return None
    if stored != found.head.stored or tuple(rest.shape[2:]) != found.head.shape:
        return None
    _keep(kept, film, rest, found.lacking, stored)
    places = np.minimum(np.searchsorted(found.lacking, slots), len(found.lacking) - 1)
    late = np.flatnonzero(found.lacking[places] == slots)
    for at, place in zip(late.tolist(), places[late].tolist(), strict=True):
        frames[at] = rest[place]
    return frames


def _read(kept: FrameCache, film: Film, slots: Indices) -> Found | None:
    """Read what is kept of a clip; where the system cannot, nothing is."""
    try:
        return read_slots(film, slots)
    except OSError as error:
        kept.failed(error)
        return None


def _bar(kept: FrameCache, film: Film) -> None:
    """Keep nothing of a video."""
    try:
        bar(film)
    except OSError as error:
        kept.failed(error)


def _keep(kept: FrameCache, film: Film, frames: Tensor, slots: Indices, stored: tuple[int, int]) -> None:
    """Keep frames whose size in the video is `stored`, where there is room."""
    head = Head((frames.shape[2], frames.shape[3]), stored)
    try:
        write_slots(film, head, frames.numpy(), slots, kept.room)
    except OSError as error:
        kept.failed(error)


def film_of(kept: FrameCache, path: str, grid: Grid, side: int) -> Film | None:
    """Return what the frames of a video are kept as; None where the video cannot be looked at.

    Args:
        kept: the folder.
        path: the video.
        grid: its frames that can be asked for.
        side: pixels of a picture's shorter side.
    """
    try:
        state = Path(path).stat()
    except OSError:
        return None
    ends = _ends(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    of_video = [Path(path).name, state.st_size, state.st_mtime_ns, ends]
    digest = xxhash.xxh3_128_hexdigest(json.dumps([_versions(), *of_video, side, grid.name]).encode())
    return Film(kept.folder / f"{digest}.frames", int(digest[:16], 16), len(grid.frames), side)


@lru_cache(maxsize=4096)
def _ends(path: str, *state: int) -> str:
    """Return the digest of parts of a video; size, times and inode make a changed file another one to the cache."""
    del state
    return digest_of_ends([Path(path)], _BETWEEN)


@cache
def _versions() -> list[Any]:
    """Return what else decides a pixel: versions, and the processor, for which libswscale has code of its own."""
    av = import_av()
    libraries = sorted((name, list(version)) for name, version in av.library_versions.items())
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return [_FORMAT, sys.modules["tensorkeep"].__version__, av.__version__, libraries, processor]


def _bytes_in(folder: Path) -> int:
    """Return how much of the disk the files of a folder take."""
    found = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # a temporary name of another process, gone since
                found += 512 * entry.stat(follow_symlinks=False).st_blocks
    return found


def _said(size: float) -> str:
    """Say how many bytes these are."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _free(folder: Path) -> int:
    """Return how many bytes of the disk under a folder, which may not be there yet, are free."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    disk = os.statvfs(there)
    return disk.f_bavail * disk.f_frsize


def _limit(kept: FrameCache) -> int:
    """Return how many bytes a folder can come to take, of what it may take and its disk has."""
    try:
        disk = max(_free(kept.folder) - _SPARE, 0) + (_bytes_in(kept.folder) if kept.folder.is_dir() else 0)
    except OSError:  # whoever writes will tell
        return int(kept.gib * 2**30)
    return min(int(kept.gib * 2**30), disk)


def describe(kept: FrameCache, parts: Iterable[tuple[str, Grid, int]]) -> str:
    """Say how many of the frames that can be asked for are kept, and what all of them will take.

    Args:
        kept: the folder.
        parts: path, grid and pictures' side of each video.
    """
    frames = there = measured = covered = asked = barred = 0
    for path, grid, side in parts:
        film, count, head = film_of(kept, path, grid, side), 0, None
        if film is not None:
            with contextlib.suppress(OSError):  # whoever reads it will tell
                count, head = count_slots(film)
        if head == BARRED:
            barred += 1
            continue
        size = 0 if head is None else head.size
        if head is None and asked < _ASKED:
            info = probe(path)
            size, asked = 3 * math.prod(fitted(info.height, info.width, side)), asked + 1
        frames, there = frames + len(grid.frames), there + count
        if size:
            measured, covered = measured + size * len(grid.frames), covered + len(grid.frames)
    whole, part = measured / max(covered, 1) * frames, there / max(frames, 1)
    room = _limit(kept)
    lacking = "" if whole <= room else f"; there is room for {_said(room)}, the others are decoded each time"
    odd = f"; {barred} damaged or odd videos are decoded each time" if barred else ""
    share = f"{part:.0%} of {frames:,} frames lie in {kept.folder}"
    return f"{share}, all are about {_said(whole)} of {kept.gib:g} GiB{lacking}{odd}"
