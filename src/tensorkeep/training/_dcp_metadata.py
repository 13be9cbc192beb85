"""The `.metadata` of a torch.distributed.checkpoint folder, pickled as torch does and read without running anything."""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from tensorkeep.errors import FOREIGN, TensorkeepError, shown
from tensorkeep.formats.dcp import CLASSES

VERSION = "1.0.0"  # of the format: torch's CURRENT_DCP_VERSION
Place = tuple[str, int, int]  # file, first byte, bytes


def pickled(metadata: Metadata, places: dict[MetadataIndex, Place]) -> bytes:
    """Pickle the metadata with the place of every chunk.

    Args:
        metadata: as the planner made it; its storage data are replaced.
        places: where each chunk lies.
    """
    metadata.version = VERSION
    metadata.storage_meta = None
    metadata.storage_data = {index: _StorageInfo(*place) for index, place in places.items()}
    return pickle.dumps(metadata)


def unpickled(data: bytes, where: Path) -> Metadata:
    """Read the metadata; a pickle that names anything but DCP's own classes is refused.

    Args:
        data: the file's bytes.
        where: the file, for errors.

    Raises:
        TensorkeepError: F04 where it names something else, F07 where it is no metadata or chunks make no whole.
    """
    try:
        found = _Reader(io.BytesIO(data), where).load()
    except TensorkeepError:
        raise
    except (*FOREIGN, pickle.PickleError, EOFError, MemoryError) as error:
        raise TensorkeepError(f"cannot be read: {error}", where=where, code="F07", hint="copy it again") from None
    if not isinstance(found, Metadata) or not isinstance(getattr(found, "state_dict_metadata", None), dict):
        raise TensorkeepError("is no metadata of a checkpoint", where=where, code="F07", hint="copy it again")
    try:
        wrong = [name for name, entry in found.state_dict_metadata.items() if not _covered(entry)]
        places = [p.relative_path for p in found.storage_data.values()]
    except (AttributeError, TypeError, ValueError) as error:
        raise TensorkeepError(f"cannot be read: {error}", where=where, code="F07", hint="copy it again") from None
    if wrong or not all(isinstance(place, str) for place in places):
        what = f"the chunks of {', '.join(map(shown, wrong[:4]))} make no whole" if wrong else "places without a file"
        raise TensorkeepError(what, where=where, code="F07", hint="use the checkpoint before it", tensors=wrong)
    return found


def _covered(entry: Any) -> bool:
    """Whether the chunks of a tensor lie in it and have as many elements; those of rows follow each other."""
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    size, chunks = tuple(entry.size), [(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]
    inside = all(
        len(offsets) == len(sizes) == len(size)
        and all(o >= 0 and n >= 0 and o + n <= s for o, n, s in zip(offsets, sizes, size))
        for offsets, sizes in chunks
    )
    filled = sorted(c for c in chunks if 0 not in c[1])
    if not inside or sum(math.prod(sizes) for _, sizes in filled) != math.prod(size):
        return False
    rows = bool(size) and all(sizes[1:] == size[1:] for _, sizes in filled)
    return not rows or all(a[0][0] + a[1][0] == b[0][0] for a, b in pairwise(filled))


class _Reader(pickle.Unpickler):
    """An unpickler that finds DCP's own classes, dtypes and sizes, and nothing else."""

    def __init__(self, file: io.BytesIO, where: Path) -> None:
        super().__init__(file)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        """Find one of the classes that honest metadata names."""
        if module == described.__name__ and name in CLASSES:
            return getattr(described, name)
        if (module, name) == (_StorageInfo.__module__, _StorageInfo.__name__):
            return _StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath"):
            return getattr(pathlib, name)
        raise TensorkeepError(f"names {shown(f'{module}.{name}')}", where=self.where, code="F04", hint="do not load it")
