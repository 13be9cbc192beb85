"""Join tensors that lie in the files of several ranks: runs of flat vectors, and values out of their pickles."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats._spans import rectangles
from tensorkeep.formats.pth import Opened, block_of
from tensorkeep.storage.archive import Stored, stored_tensor
from tensorkeep.storage.files import Folder
from tensorkeep.storage.pickle_values import Object
from tensorkeep.storage.record import DTYPES, Block, TensorRecord


class Run(NamedTuple):
    """A run of elements in a file: a flat tensor, or a part of one."""

    file: str
    start: int
    elements: int
    dtype: str


def mapping(value: Any) -> dict[Any, Any]:
    """Return a pickled dict, whichever class of dict it is; {} for anything else.

    Args:
        value: what the pickle holds.
    """
    if isinstance(value, Object):
        value = value.entries if value.entries is not None else {}
    return value if isinstance(value, dict) else {}


def get(value: Any, *keys: Any) -> Any:
    """Return what nested dicts hold under these keys; None where one is not there.

    Args:
        value: what the pickle holds.
        keys: the keys, from the outermost.
    """
    for key in keys:
        value = mapping(value).get(key)
    return value


def tensor_in(value: Any, where: object) -> Stored | None:
    """Return the tensor that a pickled value describes; None where it is none.

    Args:
        value: what the pickle holds.
        where: the file, for messages.
    """
    return stored_tensor(value, where) if isinstance(value, Object) else None


def flat_run(value: Any, name: str, file: str, opened: Opened, folder: Folder) -> Run | None:
    """Return where a flat tensor lies; None where the value is no tensor of one dimension in order.

    Args:
        value: what the pickle holds.
        name: what it is, for messages.
        file: the file.
        opened: what the file holds.
        folder: where it lies.

    Raises:
        TensorkeepError: its storage is not there, or is shorter.
    """
    where = f"{folder.url}/{file}"
    found = tensor_in(value, where)
    if found is None or len(found.shape) != 1 or (found.shape[0] > 1 and found.strides[0] != 1):
        return None
    block = block_of(found, name, file, opened.places, where)
    return Run(file, block.start, found.shape[0], found.dtype)


def record_of(name: str, shape: tuple[int, ...], pieces: Iterable[tuple[int, Run]], where: object) -> TensorRecord:
    """Make the record of a tensor out of runs of its elements in row-major order.

    Args:
        name: its name.
        shape: its sizes.
        pieces: the number of each run's first element in the tensor, and the run; in order.
        where: the checkpoint, for messages.

    Raises:
        TensorkeepError: F07 where the runs are not the whole tensor, or of different dtypes.
    """
    blocks: list[Block] = []
    at, dtype = 0, ""
    for first, run in pieces:
        if first != at or (dtype and run.dtype != dtype):
            break
        dtype, width = run.dtype, DTYPES[run.dtype].bits // 8
        begun = run.start
        for offsets, sizes in rectangles(shape, first, first + run.elements):
            size = math.prod(sizes) * width
            blocks.append(Block(run.file, begun, size, offsets, sizes))
            begun += size
        at += run.elements
    if at != math.prod(shape):
        raise TensorkeepError(
            f"{name}: the ranks' files hold {at} of its {math.prod(shape)} elements",
            where=where,
            code="F07",
            hint="a rank's file is missing or of another save; copy the checkpoint again",
            tensors=[name],
        )
    return TensorRecord(name, dtype or "F32", shape, tuple(blocks))


class Vector(NamedTuple):
    """Runs that follow each other: one long flat tensor.

    Attributes:
        runs: the runs, in order.
        starts: number of the first element of each, and behind the last one that of all.
    """

    runs: Sequence[Run]
    starts: Sequence[int]

    def cut(self, first: int, last: int) -> list[Run]:
        """Return elements `first` to `last`."""
        out = []
        for i in range(max(bisect_right(self.starts, first) - 1, 0), len(self.runs)):
            run, at = self.runs[i], self.starts[i]
            low, high = max(first, at), min(last, at + run.elements)
            if at >= last:
                break
            if low < high:
                start = run.start + (low - at) * DTYPES[run.dtype].bits // 8
                out.append(Run(run.file, start, high - low, run.dtype))
        return out


def vector(runs: Sequence[Run]) -> Vector:
    """Return runs as one long flat tensor.

    Args:
        runs: the runs, in order.
    """
    return Vector(runs, list(accumulate((run.elements for run in runs), initial=0)))


def placed(runs: Iterable[Run]) -> list[tuple[int, Run]]:
    """Number runs that follow each other by their first elements.

    Args:
        runs: the runs, in order.
    """
    out, at = [], 0
    for run in runs:
        out.append((at, run))
        at += run.elements
    return out
