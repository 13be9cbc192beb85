"""One file of decoded frames of one video: slots of one size, and a checksum of each.

    magic, height, width of a slot's picture, width and height in the video, slots, checksum of these   40 bytes
    a checksum of each slot (xxh3_64 over its bytes, seeded with the video and the slot), 0: not there   8 bytes each
    from the next multiple of 4096 on the slots [3, height, width] uint8, where nothing was written holes

A slot's bytes are written before its checksum, and every slot that is read is held against it. So all that a writer
that was killed, two writers at once (who write the same bytes), a disk's fault or another's hand can do is that a frame
is not there. Nothing is mapped: a full disk is an error of the call that writes. The file itself appears whole, with no
slot in it, and is made anew where its head or its length is not as expected. A head alone, of pictures without size,
says that nothing of this video is kept.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from tensorkeep.detection.data.clip_memory import clip_memory
from tensorkeep.storage.leftovers import writing_in
from tensorkeep.storage.placement import put_new, temporary_name

Picture = NDArray[np.uint8]
_MAGIC, _HEAD, _PAGE = b"TKFRAME1", struct.Struct("<8sIIIIQQ"), 4096
_HEAD_END = _HEAD.size  # the sums begin at a multiple of 8
_READ, _WRITTEN = 1 << 20, 1 << 24  # bytes at a time: read, so that they are in the cache when summed; written
_LONGEST = 16  # times its shorter side: a picture's longer one
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # no link is followed, no FIFO waited for


class Film(NamedTuple):
    """What the frames of one video are kept as.

    Attributes:
        path: the file, which may not be there.
        seed: of its checksums, another for every video.
        slots: how many frames it has room for.
        side: pixels of a picture's shorter side.
    """

    path: Path
    seed: int
    slots: int
    side: int


class Head(NamedTuple):
    """What a file says of its slots: height and width of the pictures, and width and height as the video has them."""

    shape: tuple[int, int]
    stored: tuple[int, int]

    @property
    def size(self) -> int:
        """Bytes of a slot."""
        return 3 * self.shape[0] * self.shape[1]


BARRED = Head((0, 0), (0, 0))  # of a video of which nothing is kept


class Found(NamedTuple):
    """What was read.

    Attributes:
        frames: [T, 3, H, W], undefined where they are lacking.
        lacking: slots that are not there, rising.
        head: of the file.
    """

    frames: Picture
    lacking: NDArray[np.int64]
    head: Head


def read_slots(film: Film, wanted: NDArray[np.int64]) -> Found | None:
    """Read frames, each held against its checksum.

    Args:
        film: the file.
        wanted: [T] slots, in any order, repetitions allowed.

    Returns:
        What is there; None where nothing is.

    Raises:
        OSError: The system cannot read the file.
    """
    with _opened(film, os.O_RDONLY) as (handle, head):
        if head is None or head == BARRED:
            return None
        slots, places, inverse = np.unique(wanted, return_index=True, return_inverse=True)
        sums = _sums(handle, int(slots[0]), int(slots[-1]) + 1)[slots - slots[0]]
        there = np.flatnonzero(sums)
        if not len(there):
            return None
        frames = clip_memory((len(wanted), 3, *head.shape))
        right = np.zeros(len(slots), dtype=bool)
        first = _first(film.slots)
        for begin, end in _runs(slots[there], places[there], max(1, _READ // head.size)):
            chosen = there[begin:end]
            place = int(places[chosen[0]])
            at = first + int(slots[chosen[0]]) * head.size
            whole = os.preadv(handle, [frames[place : place + len(chosen)].data], at) // head.size
            for k, number in enumerate(chosen[:whole].tolist()):
                right[number] = checksum(film, int(slots[number]), frames[place + k]) == int(sums[number])
    again = np.ones(len(wanted), dtype=bool)
    again[places] = False
    for place in np.flatnonzero(again).tolist():
        frames[place] = frames[places[inverse[place]]]
    return Found(frames, slots[~right], head)


def write_slots(
    film: Film, head: Head, frames: Picture, wanted: NDArray[np.int64], room: Callable[[int], bool]
) -> None:
    """Write frames, and then their checksums; of a file whose pictures have another size nothing is changed.

    Args:
        film: the file, which is made where it is not there.
        head: of the frames.
        frames: [T, 3, H, W].
        wanted: [T] their slots, in any order, repetitions allowed.
        room: is asked before so many bytes are written; where it says no, nothing more is.

    Raises:
        OSError: The system cannot write the file, because the disk is full, say.
    """
    if min(head.shape) != film.side or max(head.shape) > _LONGEST * film.side or not room(_first(film.slots)):
        return
    with _opened(film, os.O_RDONLY) as (handle, known):
        another = handle >= 0
    if known is None:
        _make(film, head, another)
    slots, places = np.unique(wanted, return_index=True)
    with _opened(film, os.O_RDWR) as (handle, known):
        if known != head:
            return
        for begin, end in _runs(slots, places, max(1, _WRITTEN // head.size)):
            rows = frames[places[begin] : places[begin] + end - begin]
            if not room(rows.nbytes):
                return
            slot = int(slots[begin])
            _write(handle, rows.reshape(-1).data, _first(film.slots) + slot * head.size)
            sums = [checksum(film, slot + k, row) for k, row in enumerate(rows)]
            _write(handle, memoryview(struct.pack(f"<{len(sums)}Q", *sums)), _HEAD_END + 8 * slot)


def bar(film: Film) -> None:
    """Let go of all frames of a video, and keep none from now on.

    Args:
        film: the file.

    Raises:
        OSError: The system cannot write the file.
    """
    with _opened(film, os.O_RDONLY) as (_, known):
        pass
    if known != BARRED:
        _make(film, BARRED, another=True)


def count_slots(film: Film) -> tuple[int, Head | None]:
    """Return how many of a video's frames are said to be there, and the head of its file.

    Args:
        film: the file.

    Raises:
        OSError: The system cannot read the file.
    """
    with _opened(film, os.O_RDONLY) as (handle, head):
        if head is None or head == BARRED:
            return 0, head
        return int(np.count_nonzero(_sums(handle, 0, film.slots))), head


def checksum(film: Film, slot: int, picture: Picture) -> int:
    """Return what must be said of a slot's bytes for them to be believed, never 0.

    Args:
        film: the file that they are in.
        slot: their number.
        picture: the bytes.
    """
    return xxhash.xxh3_64_intdigest(picture.data, film.seed ^ slot) or 1


def _first(slots: int) -> int:
    """Return where the slots begin."""
    return -(-(_HEAD_END + 8 * slots) // _PAGE) * _PAGE


def _length(slots: int, head: Head) -> int:
    """Return how long a file is."""
    return _HEAD_END if head == BARRED else _first(slots) + slots * head.size


def _packed(film: Film, head: Head) -> bytes:
    """Return the first bytes of a file."""
    said = _HEAD.pack(_MAGIC, *head.shape, *head.stored, film.slots, 0)[:-8]
    return said + struct.pack("<Q", xxhash.xxh3_64_intdigest(said, film.seed))


@contextlib.contextmanager
def _opened(film: Film, flags: int) -> Iterator[tuple[int, Head | None]]:
    """Open a file; no head where it is not there or is not what was made here for this video."""
    try:
        handle = os.open(film.path, flags | _SAFE)
    except FileNotFoundError:
        yield -1, None
        return
    try:
        yield handle, _head(film, handle)
    finally:
        os.close(handle)


def _head(film: Film, handle: int) -> Head | None:
    """Read the head of a file; None where it, or what kind of file it is, or its length, is not as expected."""
    state = os.fstat(handle)
    if not stat.S_ISREG(state.st_mode):
        return None
    said = os.pread(handle, _HEAD_END, 0)
    if len(said) != _HEAD_END:
        return None
    _, height, width, *stored, _, _ = _HEAD.unpack_from(said)
    head = Head((height, width), (stored[0], stored[1]))
    if said != _packed(film, head) or state.st_size != _length(film.slots, head):
        return None
    good = min(head.shape) == film.side and max(head.shape) <= _LONGEST * film.side
    return head if good or head == BARRED else None


def _make(film: Film, head: Head, another: bool) -> None:
    """Put a file without a slot in its place, of `another` content too; one put there since by a process stays."""
    with contextlib.suppress(FileExistsError), writing_in(film.path.parent):
        temporary = temporary_name(film.path)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o666)
        try:
            _write(handle, memoryview(_packed(film, head)), 0)
            os.ftruncate(handle, _length(film.slots, head))
            if another:
                temporary.rename(film.path)
            else:
                put_new(temporary, film.path)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)


def _sums(handle: int, first: int, stop: int) -> NDArray[np.uint64]:
    """Read the checksums of some slots; those that the file does not have are 0."""
    said = os.pread(handle, 8 * (stop - first), _HEAD_END + 8 * first)
    return np.frombuffer(said.ljust(8 * (stop - first), b"\0"), dtype="<u8")


def _runs(slots: NDArray[np.int64], places: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Split slots into runs that lie one after the other in the file and in the clip, of at most `most`."""
    cuts = np.flatnonzero((np.diff(slots) != 1) | (np.diff(places) != 1)) + 1
    for begin, end in pairwise([0, *cuts.tolist(), len(slots)]):
        for at in range(begin, end, most):
            yield at, min(at + most, end)


def _write(handle: int, data: memoryview, place: int) -> None:
    """Write all of some bytes: a call may take a part of them."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], place + done)
