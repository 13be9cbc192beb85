"""A digest of the size and both ends of files, which names what was cut, replaced or encoded anew."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

_END = 1 << 16  # bytes at each end of a file that count


def digest_of_ends(paths: Sequence[Path], between: int = 0) -> str:
    """Return a digest of the size and both ends of files; whoever reads one that cannot be read says so.

    Args:
        paths: the files, in order.
        between: places evenly between the ends that count, too.

    Returns:
        32 hexadecimal digits.
    """
    state = xxhash.xxh3_128()
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            state.update(size.to_bytes(8, "little") + file.read(_END))
            file.seek(max(size - _END, 0))
            state.update(file.read(_END))
            for place in range(between):
                file.seek(max((size - _END) * (place + 1) // (between + 1), 0))
                state.update(file.read(_END))
    return state.hexdigest()
