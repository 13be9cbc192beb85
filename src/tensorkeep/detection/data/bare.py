"""Find noise between the pictures of a bare H.264 or HEVC stream, which has no times whose gap would show it.

What overwrites whole pictures becomes the end of the packet before them, and decoders stop reading a picture where it
is whole. So packets far larger than others are decoded once more without their second half: where the pictures stay
what they are, that half is none of theirs.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

_LARGE = 6  # times the median of its kind; a picture may be so large
_MOST = 8  # packets that are tried
_AFTER = 20  # packets behind it that are decoded: as many pictures may be held back
_FILLING = (b"\0\0\1", b"\0\0\3\0\0\3", bytes(16))  # in what makes a picture longer on purpose


def swollen(
    opened: Callable[[], AbstractContextManager[tuple[Any, Any]]], sizes: Sequence[int], keys: Sequence[bool]
) -> list[int]:
    """Return the packets, by number, whose second half belongs to no picture.

    Args:
        opened: opens the stream.
        sizes: of its packets.
        keys: whether decoding may start there.

    Example:
        >>> swollen(partial(opened, "bare.h264"), sizes, keys)  # doctest: +SKIP
        [23]
    """
    lengths, key = np.array(sizes), np.array(keys, dtype=bool)
    suspected = np.zeros(len(lengths), dtype=bool)
    for kind in (key, ~key):
        suspected |= kind & (lengths > _LARGE * np.median(lengths[kind])) if kind.any() else False
    tried = sorted(np.flatnonzero(suspected), key=lambda k: -lengths[k])[:_MOST]
    if not tried:
        return []
    found = []
    for number in sorted(int(k) for k in tried):
        starts = np.flatnonzero(key[: number + 1])
        name, extra, data = _packets(opened, int(starts[-1]) if len(starts) else 0, number + _AFTER)
        place = number - (int(starts[-1]) if len(starts) else 0)
        rest = data[place][int(lengths[number]) // 2 :] if place < len(data) else _FILLING[0]
        if any(mark in rest for mark in _FILLING):
            continue
        half = [*data[:place], data[place][: -len(rest)], *data[place + 1 :]]
        whole = _pictures(name, extra, data)
        less = _pictures(name, extra, [*data[:place], *data[place + 1 :]])
        if whole == _pictures(name, extra, half) and whole != less:
            found.append(number)
    return found


def _packets(
    opened: Callable[[], AbstractContextManager[tuple[Any, Any]]], first: int, last: int
) -> tuple[str, bytes | None, list[bytes]]:
    """Return the name of the decoder, what it is told first, and what packets from `first` to `last` hold."""
    with opened() as (container, stream):
        sized = (packet for packet in container.demux(stream) if packet.size)
        data = [bytes(packet) for packet in itertools.islice(sized, last + 1)][first:]
        return stream.codec_context.codec.name, stream.codec_context.extradata, data


def _pictures(name: str, extra: bytes | None, data: Sequence[bytes]) -> list[bytes]:
    """Return the brightness of the pictures that packets decode to, until one cannot be decoded."""
    av = importlib.import_module("av")
    context = av.CodecContext.create(name, "r")
    context.thread_type, context.thread_count = "NONE", 1
    if extra:
        context.extradata = extra
    found = []
    try:
        for each in data:
            found += context.decode(av.Packet(each))
        found += context.decode(None)
    except av.error.FFmpegError:
        pass
    return [bytes(frame.planes[0]) for frame in found]
