"""Where the chunks of a DCP folder lie, read out of its `.metadata`: a million of them, written by many ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.storage.archive import is_count
from tensorkeep.storage.files import inside
from tensorkeep.storage.pickle_records import Record, Sizes
from tensorkeep.storage.pickle_values import Object
from tensorkeep.storage.record import checked_shape

MODULE = "torch.distributed.checkpoint.metadata"
STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
# of these objects there is one or more for each chunk; the fields that are read
_MANY = {
    "ChunkStorageMetadata": ("offsets", "sizes"),
    "MetadataIndex": ("fqn", "offset"),
    "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
}
RECORDS = {STORAGE_INFO if n == "_StorageInfo" else f"{MODULE}.{n}": fields for n, fields in _MANY.items()}
Place = tuple[str, int, int]  # file, first byte, bytes of the archive
Storage = dict[str, dict[tuple[int, ...], Place]]  # tensor name -> offsets in the tensor -> archive


def damaged(what: str, where: object) -> TensorkeepError:
    """Make the error for metadata that cannot be (F07)."""
    return TensorkeepError(
        f"the metadata is damaged: {what}", where=where, code="F07", hint="copy the checkpoint again"
    )


def state_of(value: Any, kind: str, where: object) -> dict[str, Any]:
    """Return the attributes of a pickled object, which must be of the named class."""
    if not isinstance(value, Object) or value.call.name != kind or not isinstance(value.state, dict):
        raise damaged(f"expected a {kind}", where)
    return value.state


def size_of(value: Any, where: object, known: dict[Any, tuple[int, ...]]) -> tuple[int, ...]:
    """Turn a pickled torch.Size into a shape; `known` holds those of records that were checked before."""
    if type(value) is Sizes and value in known:
        return known[value]
    if isinstance(value, Object) and value.call.name == "Size" and len(value.args) == 1:
        value = value.args[0]
    shape = checked_shape(value)
    if shape is None:
        raise damaged("sizes that are not whole numbers, or too large", where)
    return known.setdefault(shape, shape)


def fields_of(value: Any, kind: str, where: object) -> Sequence[Any]:
    """Return the fields of one of the many small objects, in the order of `_MANY`."""
    if type(value) is Record and value[0].name == kind:
        return value[1:]
    state = state_of(value, kind, where)
    return [state.get(name) for name in _MANY[kind]]


def storage_of(value: Any, where: object) -> Storage:
    """Read where each chunk lies."""
    if not isinstance(value, dict):
        raise damaged("no storage_data", where)
    out: Storage = {}
    files: dict[str, list[Place]] = {}
    shapes: dict[Any, tuple[int, ...]] = {}
    for index, info in value.items():
        name, offset = fields_of(index, "MetadataIndex", where)
        file, start, length, transforms = fields_of(info, "_StorageInfo", where)
        if transforms:
            raise TensorkeepError(
                f"{shown(name)} is stored through {shown(transforms)}",
                where=where,
                hint="load it with the torch that wrote it and save without storage extensions",
            )
        if not isinstance(file, str) or not is_count(start) or not is_count(length):
            raise damaged(f"the place of {shown(name)}", where)
        if not isinstance(name, str):
            raise damaged("an index without a name", where)
        if file not in files:
            files[inside(file, where)] = []
        at = () if offset is None else size_of(offset, where, shapes)
        of_tensor = out.setdefault(name, {})
        if at in of_tensor:
            raise damaged(f"{name} is stored twice", where)
        of_tensor[at] = place = (file, start, length)
        files[file].append(place)
    _check_overlap(files, out, where)
    return out


def _check_overlap(files: dict[str, list[Place]], storage: Storage, where: object) -> None:
    """Raise F07 where two archives share bytes of a file."""
    for file, places in files.items():
        places.sort()
        for before, after in pairwise(places):
            if before[1] + before[2] > after[1]:
                names = [n for n, chunks in storage.items() for p in chunks.values() if p is before or p is after]
                raise TensorkeepError(
                    f"{names[0]} and {names[-1]} overlap in {file}",
                    where=where,
                    code="F07",
                    hint="copy the checkpoint again",
                )


def place_of(name: str, offset: tuple[int, ...], storage: Storage, sizes: dict[str, int], where: object) -> Place:
    """Return where a chunk's archive lies; it must be inside a file that is there."""
    chunks = storage.get(name, {})
    place = chunks.get(offset) or (chunks.get(()) if not any(offset) else None)
    if place is None:
        raise TensorkeepError(
            f"{name} has metadata but no storage entry{f' at {offset}' if any(offset) else ''}",
            where=where,
            code="F07",
            hint="a writer thread failed while this was saved (pytorch #191391); use the checkpoint before it",
            tensors=[name],
        )
    file, start, length = place
    if file not in sizes:
        raise TensorkeepError(
            f"{name} lies in {file}, which is not there",
            where=where,
            code="F05",
            hint="copy the missing file",
            tensors=[name],
        )
    if start + length > sizes[file]:
        raise TensorkeepError(
            f"{name} is truncated: it ends at byte {start + length} of {file}, the file at {sizes[file]}",
            where=where,
            code="F02",
            hint="copy the file again",
            tensors=[name],
        )
    return place
