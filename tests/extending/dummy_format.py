"""`dummy`: a folder of `weights.dummy`, the bytes of all tensors, and `weights.json`, which says where each lies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import Folder
from tensorkeep.storage.layout import FileLayout, Fixed, SinkTensor, Slot, Trailer, small_file
from tensorkeep.storage.record import Block, TensorRecord, nbytes

LOOKS = "a folder with weights.dummy"
DATA, HEADER = "weights.dummy", "weights.json"


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Return whether the folder holds the data file."""
    return not single and DATA in names


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Return the view that the header describes; `StateView` checks every range against the file."""
    records = {}
    for name, (dtype, shape, start) in json.loads(folder.read(HEADER)).items():
        block = Block(DATA, start, nbytes(dtype, shape), (0,) * len(shape), tuple(shape))
        records[name] = TensorRecord(name, dtype, tuple(shape), (block,))
    return StateView(path, "dummy", folder, records)


def layout(tensors: Sequence[SinkTensor], **_: Any) -> list[FileLayout]:
    """Return the data file, tensor behind tensor, and the header."""
    header: dict[str, Any] = {}
    slots: list[Fixed | Slot | Trailer] = []
    at = 0
    for tensor in tensors:
        header[tensor.name] = [tensor.dtype, list(tensor.shape), at]
        slots.append(Slot(at, tensor.nbytes, tensor.name))
        at += tensor.nbytes
    return [FileLayout(DATA, slots), small_file(HEADER, json.dumps(header).encode())]
