"""Read a checkpoint's tensors onto a GPU ahead of their use: several threads read, digest and copy while one quantizes.

Each thread has page-locked buffers and a stream of its own, so that reading, digesting and copying overlap. What is on
its way, or waits on the GPU, is bounded. Digests of what was made on the GPU are taken by the same threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorkeep.formats.view import StateView
from tensorkeep.quantization.packed import Packed, packed_digest
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.record import DTYPES

THREADS = 4  # of 4, 8, 12 and 16 the fewest were the fastest on 16 cores: Python holds what lies between the copies
AHEAD = 1 << 29  # bytes that are read ahead, beside one tensor and what the model keeps as it is
PIECE = 8 << 20  # bytes of a buffer


class Arrived(NamedTuple):
    """A tensor on the GPU, and the digest of its bytes."""

    tensor: Tensor
    digest: str


class Ahead:
    """The threads of one load.

    Args:
        view: what is read; safe for several threads.
        names: of the tensors, in the order in which they are taken.
        staying: of those that the model keeps as they are: their memory is the model's, so it does not count.
        device: the GPU.
    """

    def __init__(self, view: StateView, names: Sequence[str], staying: Collection[str], device: torch.device) -> None:
        self.view, self.device, self._staying = view, device, frozenset(staying)
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "read-ahead")
        self._left = deque(names)
        self._waiting: deque[tuple[int, Future[tuple[Arrived, torch.cuda.Event]]]] = deque()

    def take(self, _name: str) -> Arrived:
        """Return the next tensor, once the current stream may use it; later ones are read meanwhile."""
        self._submit()
        _, future = self._waiting.popleft()
        found, event = future.result()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        found.tensor.record_stream(current)
        self._submit()
        return found

    def _submit(self) -> None:
        """Begin to read as much as may be ahead, at least one tensor."""
        ahead = sum(size for size, _ in self._waiting)
        while self._left:
            name = self._left[0]
            size = 0 if name in self._staying else self.view[name].nbytes
            if self._waiting and ahead + size > AHEAD:
                return
            self._left.popleft()
            self._waiting.append((size, self._threads.submit(self._read, name)))
            ahead += size

    def digest(self, packed: Packed) -> Future[bytes]:
        """Begin to take the digest of a quantized weight that the current stream makes."""
        event = torch.cuda.current_stream(self.device).record_event()
        return self._threads.submit(self._digest, packed, event)

    def close(self) -> None:
        """Stop; what was not begun is left undone."""
        self._threads.shutdown(cancel_futures=True)

    def _mine(self) -> tuple[torch.cuda.Stream, list[tuple[Tensor, torch.cuda.Event]]]:
        """The calling thread's stream and buffers."""
        own: Any = self._own
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            event: Any = torch.cuda.Event
            own.buffers = [(torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), event()) for _ in range(2)]
        return own.stream, own.buffers

    def _read(self, name: str) -> tuple[Arrived, torch.cuda.Event]:
        import xxhash

        record, state = self.view[name], xxhash.xxh3_128()
        stream, buffers = self._mine()
        with torch.cuda.stream(stream):
            out = torch.empty(record.shape, dtype=getattr(torch, str(DTYPES[record.dtype].torch)), device=self.device)
            raw, at = out.view(-1).view(torch.uint8), 0
            for number, piece in enumerate(self.view.stream(name, chunk=PIECE)):
                state.update(piece)
                for start in range(0, len(piece), PIECE):
                    some = np.frombuffer(piece[start : start + PIECE], np.uint8)
                    buffer, free = buffers[number % 2]
                    free.synchronize()
                    buffer.numpy()[: len(some)] = some  # torch would share each copy out among many threads
                    raw[at : at + len(some)].copy_(buffer[: len(some)], non_blocking=True)
                    free.record(stream)
                    at += len(some)
                    del some  # the piece's memory is used again
            return Arrived(out, state.hexdigest()), stream.record_event()

    def _digest(self, packed: Packed, event: torch.cuda.Event) -> bytes:
        stream, _ = self._mine()
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            return packed_digest(packed, self._on_host)

    def _on_host(self, tensor: Tensor) -> str:
        """Take the digest of a tensor, wherever it is."""
        import xxhash

        state, raw = xxhash.xxh3_128(), tensor.detach().contiguous().view(-1).view(torch.uint8)
        stream, buffers = self._mine()
        buffer, _ = buffers[0]
        for start in range(0, len(raw), PIECE):
            some = raw[start : start + PIECE]
            buffer[: len(some)].copy_(some, non_blocking=True)
            stream.synchronize()
            state.update(buffer[: len(some)].numpy().data)
        return state.hexdigest()


def reads_ahead(view: StateView, names: Sequence[str], device: torch.device | None) -> bool:
    """Whether tensors of a view are read by threads: plain ones, from files on this machine, onto a GPU.

    Args:
        view: what is read.
        names: of the tensors.
        device: where they go.
    """
    if device is None or device.type != "cuda" or not isinstance(view.folder, LocalFolder):
        return False
    records = [view[name] for name in names]
    return all(
        r.encoding == "plain" and r.elements and r.dtype != "F4" and DTYPES[r.dtype].torch is not None for r in records
    )
