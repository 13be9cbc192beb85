"""The survey: every tensor of two checkpoints compared once, by bytes, before anything dearer is computed.

Most tensors of a broken checkpoint are equal to the reference's. Those are read once and compared as 64-bit words,
which keeps a diagnosis close to the time that reading takes; where dtypes differ, values are compared after the cast
that the narrower side implies.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from tensorkeep.conversion.plan import HfTensor
from tensorkeep.diagnosis.comparison import aligned, hub_bytes, width
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import Folder
from tensorkeep.storage.record import DTYPES

THREADS = min(4, os.cpu_count() or 1)
PIECE = 1 << 19  # bytes a side holds at a time: both fit a core's cache
_LOCAL = threading.local()
SAME = ("equal", "cast")  # statuses in which no value is to be explained


class Sight(NamedTuple):
    """What the survey saw of one tensor: equal, cast (equal after a cast of dtype), values, shape.

    Of a cast: `rounded` values changed by it, `overflowed` became infinite or NaN, `vanished` became zero.
    """

    status: str
    rounded: int = 0
    overflowed: int = 0
    vanished: int = 0


def survey(
    names: Sequence[str],
    mine: Mapping[str, HfTensor],
    theirs: Mapping[str, HfTensor],
    views: tuple[StateView, StateView],
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Sight], dict[str, TensorkeepError]]:
    """What each name's tensor is beside its counterpart, and the errors of those that could not be read.

    Example: `sights, broken = survey(names, case.tensors, case.reference_tensors, case.views)`
    """
    sizes = {n: size_of(mine[n]) + size_of(theirs[n]) for n in names}
    ordered = sorted(names, key=lambda n: -sizes[n])  # the largest first, so that no thread ends alone with it
    sights: dict[str, Sight] = {}
    broken: dict[str, TensorkeepError] = {}
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(THREADS) as pool:
        for name, seen in zip(ordered, pool.map(lambda n: _look(mine[n], theirs[n], views), ordered)):
            if isinstance(seen, TensorkeepError):
                broken[name] = seen
            else:
                sights[name] = seen
            done += sizes[name]
            if progress:
                progress("compare", done, total)
    return sights, broken


def size_of(hub: HfTensor) -> int:
    count = 1
    for side in hub.shape:
        count *= side
    return count * DTYPES[hub.dtype].bits // 8


def _look(a: HfTensor, b: HfTensor, views: tuple[StateView, StateView]) -> Sight | TensorkeepError:
    try:
        if a.shape != b.shape:
            return Sight("shape")
        if a.dtype == b.dtype:
            return Sight("equal" if _equal(a, b, views) else "values")
        return _cast_equal(a, b, views)
    except TensorkeepError as error:
        if error.code is None:
            raise
        return error


def _raw(hub: HfTensor, views: tuple[StateView, StateView]) -> Iterator[memoryview]:
    """The bytes in hf layout, in small pieces where nothing needs to be turned."""
    if len(hub.parts) == 1 and not hub.parts[0].permutes:
        part = hub.parts[0]
        return views[part.source].stream(part.name, part.rows, width(hub.dtype), PIECE)
    return hub_bytes(hub, views)


def _equal(a: HfTensor, b: HfTensor, views: tuple[StateView, StateView]) -> bool:
    ranges = [_spans(hub, views) for hub in (a, b)]
    if ranges[0] is not None and ranges[1] is not None:
        return _equal_ranges(ranges[0], ranges[1])
    return all(_same_bytes(x, y) for x, y in aligned(_raw(a, views), _raw(b, views), width(a.dtype), width(b.dtype)))


Range = tuple[Folder, str, int, int]  # folder, file, first byte, bytes


def _spans(hub: HfTensor, views: tuple[StateView, StateView]) -> list[Range] | None:
    """Where a tensor's bytes lie, if they lie there as they are compared."""
    part = hub.parts[0]
    if len(hub.parts) > 1 or part.permutes or part.rows is not None:
        return None
    view = views[part.source]
    spans = view.spans(part.name)
    return None if spans is None else [(view.folder, file, start, length) for file, start, length, *_ in spans]


def _equal_ranges(a: list[Range], b: list[Range]) -> bool:
    """Two runs of byte ranges compared through two small buffers a thread keeps: no allocation, and both fit a cache."""
    if not hasattr(_LOCAL, "buffers"):
        _LOCAL.buffers = [memoryview(bytearray(PIECE)) for _ in range(2)]
    x, y = _LOCAL.buffers
    ours, theirs = ([*r] for r in (a, b))
    at = [0, 0]
    while ours and theirs:
        take = min(PIECE, ours[0][3] - at[0], theirs[0][3] - at[1])
        for side, (runs, buffer) in enumerate(((ours, x), (theirs, y))):
            folder, file, start, _ = runs[0]
            if take:
                folder.read_into(file, start + at[side], buffer[:take])
            at[side] += take
        if take and not _same_bytes(x[:take], y[:take]):
            return False
        for side, runs in enumerate((ours, theirs)):
            if at[side] == runs[0][3]:
                runs.pop(0)
                at[side] = 0
    return not ours and not theirs


def _same_bytes(x: memoryview, y: memoryview) -> bool:
    """Whether two runs of bytes are equal; as 64-bit words, which is several times faster than byte by byte."""
    whole = len(x) // 8 * 8
    if len(x) != len(y) or x[whole:] != y[whole:]:
        return False
    return bool(np.array_equal(np.frombuffer(x[:whole], np.uint64), np.frombuffer(y[:whole], np.uint64)))


def _cast_equal(a: HfTensor, b: HfTensor, views: tuple[StateView, StateView]) -> Sight:
    """Whether one side is the other after a cast. Only a wide reference and a narrow checkpoint can have lost values."""
    if (
        DTYPES[a.dtype].numpy is None
        or DTYPES[b.dtype].numpy is None
        or DTYPES[a.dtype].floating != DTYPES[b.dtype].floating
    ):
        return Sight("values")
    widened = DTYPES[a.dtype].bits > DTYPES[b.dtype].bits
    rounded = overflowed = vanished = 0
    for x, y in aligned(_raw(a, views), _raw(b, views), width(a.dtype), width(b.dtype)):
        mine, theirs = np.frombuffer(x, np_dtype(a.dtype)), np.frombuffer(y, np_dtype(b.dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            made = theirs.astype(mine.dtype)
            if not bits_equal(made, mine):
                return Sight("values")
            if not widened:
                back = made.astype(theirs.dtype)
                rounded += int(np.count_nonzero(back != theirs))
                overflowed += int(np.count_nonzero(np.isfinite(theirs) & ~np.isfinite(made)))
                vanished += int(np.count_nonzero((theirs != 0) & (made == 0)))
    return Sight("cast", rounded, overflowed, vanished)


def bits_equal(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Equal in every bit, NaN payloads aside: a cast may choose its own NaN."""
    same = a == b
    return bool(same.all()) or bool((same | (np.isnan(a) & np.isnan(b))).all())


def sizes(hubs: Iterable[HfTensor]) -> int:
    return sum(size_of(h) for h in hubs)
