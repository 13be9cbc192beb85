"""Compare every tensor of two checkpoints once, by bytes, before anything slower is computed.

Most tensors of a broken checkpoint are equal to the reference's. Those are read once and compared as 64-bit words,
which keeps a diagnosis close to the time that reading takes; where dtypes differ, values are compared after the cast
that the narrower side implies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tensorkeep.conversion.plan import HfTensor
from tensorkeep.diagnosis.evidence.bytewise import Comparison, aligned, bits_equal, hf_bytes, size_of, width
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import Folder, Progress
from tensorkeep.storage.record import DTYPES
from tensorkeep.storage.spreading import in_threads

PIECE = 1 << 19  # bytes a side holds at a time: both fit a core's cache
_LOCAL = threading.local()


def survey(
    names: Sequence[str],
    mine: Mapping[str, HfTensor],
    theirs: Mapping[str, HfTensor],
    views: tuple[StateView, StateView],
    progress: Progress | None = None,
) -> tuple[dict[str, Comparison], dict[str, TensorkeepError]]:
    """Compare the named tensors of two checkpoints, in threads.

    Args:
        names: Hugging Face names that both sides have.
        mine: The checkpoint's tensors by name.
        theirs: The reference's tensors by name.
        views: Checkpoint and reference.
        progress: Called with "compare", the bytes done and the bytes in all.

    Returns:
        How each tensor compares, and the error of each tensor whose data cannot be read; both by name.

    Raises:
        TensorkeepError: An error without a finding code, such as a file that was taken away meanwhile.
    """
    sizes = {n: size_of(mine[n]) + size_of(theirs[n]) for n in names}
    ordered = sorted(names, key=lambda n: -sizes[n])  # the largest first, so that no thread ends alone with it
    comparisons: dict[str, Comparison] = {}
    broken: dict[str, TensorkeepError] = {}
    done, total = 0, sum(sizes.values())
    compared = in_threads(lambda n: _compare(mine[n], theirs[n], views), ordered, sizes.__getitem__)
    for name, seen in zip(ordered, compared):
        if isinstance(seen, TensorkeepError):
            broken[name] = seen
        else:
            comparisons[name] = seen
        done += sizes[name]
        if progress:
            progress("compare", done, total)
    return comparisons, broken


def _compare(a: HfTensor, b: HfTensor, views: tuple[StateView, StateView]) -> Comparison | TensorkeepError:
    """Compare one tensor; an error of damaged data is returned, not raised."""
    try:
        if a.shape != b.shape:
            return Comparison("shape")
        if a.dtype == b.dtype:
            return Comparison("equal" if _equal(a, b, views) else "values")
        return _cast_equal(a, b, views)
    except TensorkeepError as error:
        if error.code is None:
            raise
        return error


def _raw(hub: HfTensor, views: tuple[StateView, StateView]) -> Iterator[memoryview]:
    """Stream the bytes in Hugging Face layout, in small pieces where no row needs to be moved."""
    if len(hub.parts) == 1 and hub.parts[0].plain and hub.parts[0].inner is None:
        part = hub.parts[0]
        return views[part.source].stream(part.name, part.rows, width(hub.dtype), PIECE)
    return hf_bytes(hub, views)


def _equal(a: HfTensor, b: HfTensor, views: tuple[StateView, StateView]) -> bool:
    """Say whether two tensors of one shape and dtype have the same bytes."""
    ranges = [_spans(hub, views) for hub in (a, b)]
    if ranges[0] is not None and ranges[1] is not None:
        return _equal_ranges(ranges[0], ranges[1])
    return all(_same_bytes(x, y) for x, y in aligned(_raw(a, views), _raw(b, views), width(a.dtype), width(b.dtype)))


Range = tuple[Folder, str, int, int]  # folder, file, first byte, bytes


def _spans(hub: HfTensor, views: tuple[StateView, StateView]) -> list[Range] | None:
    """Return where a tensor's bytes lie; None where they are not stored in the layout in which they are compared."""
    part = hub.parts[0]
    if len(hub.parts) > 1 or not part.plain or part.rows is not None:
        return None
    view = views[part.source]
    spans = view.spans(part.name)
    return None if spans is None else [(view.folder, file, start, length) for file, start, length, *_ in spans]


def _equal_ranges(a: list[Range], b: list[Range]) -> bool:
    """Compare two lists of byte ranges through two small buffers that each thread keeps and that fit its cache."""
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
    """Say whether two pieces are equal; as 64-bit words, which is several times faster than byte by byte."""
    whole = len(x) // 8 * 8
    if len(x) != len(y) or x[whole:] != y[whole:]:
        return False
    return bool(np.array_equal(np.frombuffer(x[:whole], np.uint64), np.frombuffer(y[:whole], np.uint64)))


def _cast_equal(a: HfTensor, b: HfTensor, views: tuple[StateView, StateView]) -> Comparison:
    """Compare tensors of different dtypes: is the checkpoint the reference after a cast, and what did the cast lose?"""
    if (
        DTYPES[a.dtype].numpy is None
        or DTYPES[b.dtype].numpy is None
        or DTYPES[a.dtype].floating != DTYPES[b.dtype].floating
    ):
        return Comparison("values")
    widened = DTYPES[a.dtype].bits > DTYPES[b.dtype].bits
    rounded = overflowed = vanished = 0
    for x, y in aligned(_raw(a, views), _raw(b, views), width(a.dtype), width(b.dtype)):
        mine, theirs = np.frombuffer(x, np_dtype(a.dtype)), np.frombuffer(y, np_dtype(b.dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            made = theirs.astype(mine.dtype)
            if not bits_equal(made, mine):
                return Comparison("values")
            if not widened:
                back = made.astype(theirs.dtype)
                rounded += int(np.count_nonzero(back != theirs))
                overflowed += int(np.count_nonzero(np.isfinite(theirs) & ~np.isfinite(made)))
                vanished += int(np.count_nonzero((theirs != 0) & (made == 0)))
    return Comparison("cast", rounded, overflowed, vanished)
