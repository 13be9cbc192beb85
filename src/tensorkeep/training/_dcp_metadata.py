"""The `.metadata` of a torch.distributed.checkpoint folder, pickled as torch does and read without running anything."""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tensorkeep.errors import TensorkeepError, shown

VERSION = "1.0.0"  # of the format: torch's CURRENT_DCP_VERSION
Place = tuple[str, int, int]  # file, first byte, bytes
_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)


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
        TensorkeepError: F04 where it names something else, F07 where it is no metadata.
    """
    try:
        found = _Reader(io.BytesIO(data), where).load()
    except TensorkeepError:
        raise
    except Exception as error:  # noqa: BLE001  a pickle may fail in any way
        raise TensorkeepError(f"cannot be read: {error}", where=where, code="F07", hint="copy it again") from None
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise TensorkeepError("is no metadata of a checkpoint", where=where, code="F07", hint="copy it again")
    return found


class _Reader(pickle.Unpickler):
    """An unpickler that finds DCP's own classes, dtypes and sizes, and nothing else."""

    def __init__(self, file: io.BytesIO, where: Path) -> None:
        super().__init__(file)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        """Find one of the classes that honest metadata names."""
        if module == described.__name__ and name in _CLASSES:
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
