"""Turn the state of a run into the files of a checkpoint, and back.

Nothing is translated: a tensor keeps its dtype, shape and bits, a document its JSON values; what cannot be kept so is
refused by name.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import safetensors
from tensorkeep.storage import durable
from tensorkeep.storage.certificate import indented
from tensorkeep.storage.layout import FileLayout, SinkTensor
from tensorkeep.storage.record import DTYPES, FROM_TORCH
from tensorkeep.storage.run_folder import ADAPTER, EMA, MODEL, OPTIMIZER, STATE
from tensorkeep.storage.run_manifest import MANIFEST, Manifest

File = tuple[FileLayout, Mapping[str, Tensor]]


@dataclass
class State:
    """Everything of a run between two updates; its tensors may be on any device, and are not changed.

    Args:
        model: trained parameters and persistent buffers by name (the whole model, where there is no `base`).
        optimizer: `<parameter>/<slot>`, as in `layers.0.w/exp_avg`.
        ema: averages by parameter name.
        document: plain JSON values (step, samples, epoch, world_size, rng, ...); tuples come back as lists.
        base: digest and path of frozen weights stored elsewhere.
        not_captured: names of objects that hold state and could not give it.
        shards: where the tensors are still to be read from (those here then lie on meta); None where they are here.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    document: dict[str, Any]
    base: dict[str, Any] | None = None
    not_captured: tuple[str, ...] = ()
    shards: Any = None


def floating(dtype: str) -> bool:
    """Tell whether a dtype can hold NaN or Inf.

    Args:
        dtype: as safetensors names it.
    """
    return DTYPES[dtype].floating or dtype.startswith("C")


def files_of(state: State, hollow: bool = False) -> list[File]:
    """Lay out the files of a checkpoint.

    Args:
        state: what to save.
        hollow: tensors may lie on meta; for the sizes of the files alone.

    Returns:
        Each file's layout with its tensors.

    Raises:
        TensorkeepError: a tensor cannot be stored as it is, or the state has no step.
    """
    step = state.document.get("step")
    if type(step) is not int or not 0 <= step < 1 << 62:
        raise TensorkeepError(f"the state's step is {step!r}, not a whole number", where="checkpoint")
    parts = [
        (ADAPTER if state.base is not None else MODEL, state.model),
        (OPTIMIZER, state.optimizer),
        (EMA, state.ema),
    ]
    out: list[File] = []
    for name, tensors in parts:
        if not tensors and name in (OPTIMIZER, EMA):
            continue
        out.append(
            (safetensors.file_layout(name, [_sink(n, t, name, hollow) for n, t in tensors.items()]), dict(tensors))
        )
    return out


def _sink(name: str, tensor: Tensor, file: str, hollow: bool) -> SinkTensor:
    """A tensor as the file's format describes it, or an error where it cannot be stored as it is."""
    dtype = FROM_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    whole = tensor.layout == torch.strided and (hollow or not tensor.is_meta) and not hasattr(tensor, "full_tensor")
    if dtype is None or dtype == "C128" or not whole or tensor.is_quantized:
        kind = f"{tensor.dtype}, {tensor.layout}" + (", sharded" if hasattr(tensor, "full_tensor") else "")
        raise TensorkeepError(f"{name} cannot be stored as it is: {kind}", where=file, tensors=[name])
    if name == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise TensorkeepError(f"{name!r} is no name a tensor can be stored under", where=file, tensors=[name])
    return SinkTensor(name, dtype, tuple(tensor.shape))


def raw(tensor: Tensor) -> memoryview:
    """Give the bytes of a contiguous tensor on the CPU, of any shape and dtype, without a copy."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def source_of(tensors: Mapping[str, Tensor]) -> durable.Bytes:
    """Return a function that gives the bytes of a tensor by name.

    Tensors that are not row-major are copied when their turn comes, and let go soon after.

    Args:
        tensors: on the CPU.
    """
    copies: dict[str, Tensor] = {}
    lock = threading.Lock()
    views = {n: raw(t) for n, t in tensors.items() if t.is_contiguous() and not t.is_conj() and not t.is_neg()}

    def give(name: str) -> memoryview:
        if name in views:
            return views[name]
        with lock:
            if name not in copies:
                while len(copies) > 1:
                    copies.pop(next(iter(copies)))
                copies[name] = tensors[name].detach().resolve_conj().resolve_neg().contiguous()
            return raw(copies[name])

    return give


def encoded(document: Mapping[str, Any]) -> bytes:
    """Write the document of a state as state.json; a value that JSON does not give back is refused by its path."""

    def check(value: Any, at: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if type(key) is not str:
                    raise TensorkeepError(f"{at}: the key {key!r} is no text", where=STATE)
                check(inner, f"{at}.{key}")
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                check(inner, f"{at}[{index}]")
        elif not (value is None or type(value) in (bool, int, float, str)):
            raise TensorkeepError(f"{at} is a {type(value).__name__}, which JSON does not keep", where=STATE)

    check(dict(document), "document")
    return (indented(document, quoted=encode_basestring_ascii) + "\n").encode()


# -- and back ---------------------------------------------------------------------------------------------------------


@dataclass
class _Image:
    """A file that is in memory already, for the format's reader."""

    url: str
    data: memoryview

    def names(self) -> list[str]:
        return []

    def changed(self) -> list[str]:
        return []

    def size(self, name: str) -> int:
        return len(self.data)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return bytes(self.data[start : None if length is None else start + length])

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.data[start : start + len(buffer)]


def tensors_in(folder: Path, name: str, image: memoryview, manifest: Manifest) -> dict[str, Tensor]:
    """Make tensors in the memory of their file, without a copy.

    Args:
        folder: the checkpoint, for errors.
        name: the file's name.
        image: its bytes.
        manifest: of the checkpoint; the file's header must say the same.

    Returns:
        Name -> tensor on the CPU; all share the memory of `image`.

    Raises:
        TensorkeepError: header and manifest differ (F07), or torch has no such dtype.
    """
    records, _ = safetensors.read_header(_Image(str(folder), image), name)
    said = {n: (e.dtype, e.shape, e.start) for n, e in manifest.tensors.get(name, {}).items()}
    if {r.name: (r.dtype, r.shape, r.blocks[0].start) for r in records} != said:
        raise TensorkeepError(f"the header is not what {MANIFEST} says", where=folder / name, code="F07")
    out = {}
    for record in records:
        spelled = DTYPES[record.dtype].torch
        if spelled is None or record.dtype == "F4" or not hasattr(torch, spelled):
            raise TensorkeepError(f"torch has no dtype for {record.dtype}", where=f"{folder / name}: {record.name}")
        dtype = getattr(torch, spelled)
        if record.elements == 0:
            out[record.name] = torch.empty(record.shape, dtype=dtype)
            continue
        start = record.blocks[0].start
        flat = torch.frombuffer(image, dtype=dtype, count=record.elements, offset=start)
        out[record.name] = flat.reshape(record.shape)
    return out
