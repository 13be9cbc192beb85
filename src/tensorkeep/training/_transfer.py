"""Bytes of files from rank to rank, in bounded chunks, beside the training and outside of any collective.

A thread sends while the caller receives. All ranks take their transfers in one order, so that none waits in a circle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained, open_plain

CHUNK = 8 << 20  # bytes


class Piece(NamedTuple):
    """A range of a file on its way to another rank, or from it.

    Attributes:
        peer: the other rank.
        path: the file here.
        start: first byte.
        nbytes: bytes.
    """

    peer: int
    path: Path
    start: int
    nbytes: int


def exchange(group: Any, rank: int, ranks: int, out: Sequence[Piece], into: Sequence[Piece]) -> None:
    """Send and receive ranges of files; what comes is written at the same place of a file here.

    Every rank with a piece for another must call it when that one does, and both must have them in one order.

    Args:
        group: of gloo; nobody else may use it meanwhile.
        rank: of this process.
        ranks: how many there are.
        out: what is sent.
        into: what comes; the files are made where they are not there.

    Raises:
        TensorkeepError: a file cannot be read or written (the peers then get zeros, or are listened to in vain), or a
            peer is gone.
    """
    failed: list[TensorkeepError] = []
    sender = threading.Thread(
        target=_guarded, args=(_send, group, sorted(out, key=lambda p: (p.peer - rank) % ranks), failed)
    )
    sender.start()
    _guarded(_receive, group, sorted(into, key=lambda p: (rank - p.peer) % ranks), failed)
    sender.join()
    if failed:
        raise failed[0]


def _guarded(work: Any, group: Any, pieces: Sequence[Piece], failed: list[TensorkeepError]) -> None:
    """Carry out one direction; what goes wrong is for the caller."""
    buffer = torch.empty(min(CHUNK, max((p.nbytes for p in pieces), default=0)), dtype=torch.uint8)
    try:
        for piece in pieces:
            try:
                work(group, piece, buffer)
            except TensorkeepError as error:  # of this file; the others go on
                failed.append(error)
    except RuntimeError as error:  # of gloo
        peer, line = piece.peer, (str(error).splitlines() or [""])[0]
        what = f"rank {peer} did not take or give its bytes: {line}"
        failed.append(TensorkeepError(what, where=piece.path, hint="look whether that host is alive"))


def _bytes_of(buffer: torch.Tensor) -> memoryview:
    """Give the bytes of a buffer."""
    array: Any = buffer.numpy()
    return memoryview(array)


def _send(group: Any, piece: Piece, buffer: torch.Tensor) -> None:
    """Send a range; where the file fails zeros go out, which no digest fits."""
    error: TensorkeepError | None = None
    handle, room = None, _bytes_of(buffer)
    try:
        with explained(piece.path):
            handle = open_plain(piece.path, os.O_RDONLY)
    except TensorkeepError as caught:
        error = caught
    try:
        for at in range(0, piece.nbytes, CHUNK):
            count = min(CHUNK, piece.nbytes - at)
            if handle is not None and error is None:
                try:
                    with explained(piece.path):
                        _fill(handle, room[:count], piece.start + at)
                except TensorkeepError as caught:
                    error = caught
            if handle is None or error is not None:
                buffer[:count] = 0
            dist.send(buffer[:count], dst=piece.peer, group=group)
    finally:
        if handle is not None:
            os.close(handle)
    if error is not None:
        raise error


def _fill(handle: int, room: memoryview, start: int) -> None:
    """Read a range of a file; what lies beyond its end is zeros."""
    done = 0
    while done < len(room):
        got = os.preadv(handle, [room[done:]], start + done)
        if not got:
            room[done:] = bytes(len(room) - done)
            return
        done += got


def _receive(group: Any, piece: Piece, buffer: torch.Tensor) -> None:
    """Receive a range into a file; all of it is taken off the wire, whatever the disk says."""
    error: TensorkeepError | None = None
    handle, room = None, _bytes_of(buffer)
    try:
        with explained(piece.path):
            handle = open_plain(piece.path, os.O_RDWR | os.O_CREAT)
    except TensorkeepError as caught:
        error = caught
    try:
        for at in range(0, piece.nbytes, CHUNK):
            count = min(CHUNK, piece.nbytes - at)
            dist.recv(buffer[:count], src=piece.peer, group=group)
            if handle is None or error is not None:
                continue
            try:
                with explained(piece.path):
                    _put(handle, room[:count], piece.start + at)
            except TensorkeepError as caught:
                error = caught
    finally:
        if handle is not None:
            os.close(handle)
    if error is not None:
        raise error


def _put(handle: int, data: memoryview, start: int) -> None:
    """Write a range of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], start + done)
