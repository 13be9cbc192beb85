"""Show tensors in memory as a state view, so that one set of checks serves files and state dicts alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import STREAM_BYTES, StateView
from tensorkeep.storage.files import Folder
from tensorkeep.storage.record import DTYPES, FROM_TORCH, Block, TensorRecord


@dataclass(eq=False)
class TensorView(StateView):
    """A `StateView` over tensors in memory; nothing is copied before it is asked for.

    Args:
        tensors: name -> tensor, on any device.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Give the tensor's bytes in row-major order, piece by piece, as `StateView.stream` does."""
        tensor = self.tensors[name].detach()
        tensor = tensor if rows is None else tensor[rows[0] : rows[1]]
        whole = raw_bytes(tensor)
        step = max(chunk // granule, 1) * granule
        yield from (whole[at : at + step] for at in range(0, len(whole), step))

    def tensor(self, name: str) -> Tensor:
        """Return the very tensor, detached; not a copy, and on its own device."""
        return self.tensors[name].detach()


def view_of(tensors: Mapping[str, Tensor], path: str = "state dict") -> TensorView:
    """Make a view of tensors in memory.

    Args:
        tensors: name -> tensor, on any device.
        path: what messages call them.

    Returns:
        The view; it holds the tensors themselves.

    Raises:
        TensorkeepError: a value is no tensor, or of a dtype that is not known here.

    Example:
        >>> view_of({"weight": torch.zeros(2, 3)})["weight"].shape
        (2, 3)
    """
    records = {name: _record(name, tensor, path) for name, tensor in tensors.items()}
    return TensorView(path, "memory", cast(Folder, None), records, tensors=dict(tensors))


def _record(name: str, tensor: Tensor, path: str) -> TensorRecord:
    spelled = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    if not isinstance(tensor, Tensor) or spelled not in FROM_TORCH:
        raise TensorkeepError(f"{name} is {spelled}, no tensor that is known here", where=path)
    shape = tuple(tensor.shape)
    dtype = FROM_TORCH[spelled]
    return TensorRecord(
        name, dtype, shape, (Block("", 0, tensor.numel() * tensor.element_size(), (0,) * len(shape), shape),)
    )


def tensor_of(view: StateView, name: str) -> Tensor:
    """Return one stored tensor on the CPU, without any memory beside its own.

    Args:
        view: the view; of a `TensorView` the very tensor is returned.
        name: name of the tensor.

    Raises:
        TensorkeepError: torch lacks the dtype, or the file is damaged.
    """
    record = view[name]
    spelled = DTYPES[record.dtype].torch
    if isinstance(view, TensorView) or spelled is None or record.dtype == "F4" or not record.elements:
        return view.tensor(name)
    out = torch.empty(record.shape, dtype=getattr(torch, spelled))
    raw, at = raw_bytes(out), 0
    for piece in view.stream(name):
        raw[at : at + len(piece)] = piece
        at += len(piece)
    return out


def rows_of(view: StateView, name: str, at: int) -> Tensor:
    """Return one step of a stored tensor's first dimension on the CPU, without any memory beside its own.

    Args:
        view: the view.
        name: name of the tensor.
        at: which step, an expert of a stack.

    Raises:
        TensorkeepError: torch lacks the dtype, or the file is damaged.
    """
    record = view[name]
    spelled = DTYPES[record.dtype].torch
    if isinstance(view, TensorView) or spelled is None:
        return view.tensor(name)[at]
    out = torch.empty(record.shape[1:], dtype=getattr(torch, spelled))
    raw, start = raw_bytes(out), 0
    for piece in view.stream(name, (at, at + 1)):
        raw[start : start + len(piece)] = piece
        start += len(piece)
    return out


@torch.no_grad()
def fill(out: Tensor, view: StateView, name: str, first: int = 0) -> None:
    """Read elements of a stored tensor into `out`, cast to its dtype, a few megabytes at a time.

    Args:
        out: contiguous, on any device; as many elements as it has are read.
        view: the checkpoint.
        name: name of the stored tensor.
        first: number of the first element that is read, in row-major order.

    Raises:
        TensorkeepError: torch lacks the stored dtype, or the file is shorter than its header says (F02).
    """
    dtype = torch_dtype(view, name)
    flat, at = out.detach().view(-1), 0
    for piece in view.elements(name, first, first + out.numel(), dtype.itemsize):
        some = torch.frombuffer(piece, dtype=dtype)
        flat[at : at + some.numel()].copy_(some)
        at += some.numel()


def torch_dtype(view: StateView, name: str) -> torch.dtype:
    """Return torch's dtype of a stored tensor.

    Args:
        view: the checkpoint.
        name: name of the tensor.

    Raises:
        TensorkeepError: torch has none.
    """
    record = view[name]
    found = getattr(torch, str(DTYPES[record.dtype].torch), None)
    if not isinstance(found, torch.dtype) or record.dtype == "F4":
        raise TensorkeepError(f"torch has no dtype for {record.dtype}", where=f"{view.path}: {name}")
    return found


def digest_of(tensor: Tensor) -> str:
    """Return the xxh3_128 of a tensor's raw little-endian bytes in row-major order, in hex.

    Args:
        tensor: on any device.
    """
    import xxhash

    return xxhash.xxh3_128_hexdigest(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's raw bytes in row-major order.

    Args:
        tensor: on any device.

    Returns:
        Its own memory where it is contiguous on the CPU, so that writing changes the tensor; a copy otherwise.
    """
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
