"""Hold OpenBLAS to one thread while several threads of ours compute: nested threads made merges ten times slower.

(Measured with OpenBLAS on 2 cores.) numpy has no call for it. Its wheels bring OpenBLAS, whose own call is found in
the loaded library; where another BLAS is used, nothing is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

_PREFIXES, SUFFIXES = ("scipy_openblas", "openblas"), ("64_", "")


def _libraries() -> list[ctypes.CDLL]:
    """Return OpenBLAS as it is loaded into this process (on Linux; elsewhere none is found)."""
    maps = Path("/proc/self/maps")
    paths = (
        {line.split()[-1] for line in maps.read_text().splitlines() if "openblas" in line} if maps.exists() else set()
    )
    return [ctypes.CDLL(p) for p in sorted(paths) if p.startswith("/")]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run every matrix product inside the block on the thread that asks for it.

    Yields:
        Nothing.

    Example:
        >>> with one_thread():
        ...     pass
    """
    before = []
    for library in _libraries():
        for prefix, suffix in ((p, s) for p in _PREFIXES for s in SUFFIXES):
            count, change = (getattr(library, f"{prefix}_{verb}_num_threads{suffix}", None) for verb in ("get", "set"))
            if count is not None and change is not None:
                before.append((change, count()))
                change(1)
                break
    try:
        yield
    finally:
        for change, number in before:
            change(number)
