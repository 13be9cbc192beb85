"""Memory for the frames of a clip, taken again once nobody holds the clip before.

New memory of tens of megabytes comes as pages to be cleared, which costs a fifth of decoding small pictures.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
from numpy.typing import NDArray

_LEAST, _MOST = 1 << 20, 1 << 28  # bytes of a clip whose memory is kept
_kept: list[NDArray[np.uint8]] = []  # at most one


def clip_memory(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return an array of bytes with undefined content.

    Its memory is used again once the array and everything made of it are gone: slices and tensors hold it.

    Args:
        shape: of the array.
    """
    size = math.prod(shape)
    if not _LEAST <= size <= _MOST:
        return np.empty(shape, dtype=np.uint8)
    try:
        memory = _kept.pop()
    except IndexError:  # no asking before: another thread may be faster
        memory = np.empty(0, dtype=np.uint8)
    if not size <= len(memory) <= 2 * size:
        memory = np.empty(size, dtype=np.uint8)
    # slices of an array over a buffer hold that array; those of a slice of `memory` would hold `memory` alone
    held = np.frombuffer(memory.data, dtype=np.uint8, count=size)
    weakref.finalize(held, _give_back, memory).atexit = False
    return held.reshape(shape)


def _give_back(memory: NDArray[np.uint8]) -> None:
    """Keep memory for the next clip, in place of what is kept."""
    _kept[:] = [memory]
