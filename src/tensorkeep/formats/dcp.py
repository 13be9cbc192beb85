"""Read and write torch.distributed.checkpoint folders without torch (`dcp`).

`.metadata` is a pickle of a few dataclasses: it is read as opcodes into plain data and written from a fixed template.
Data files hold one torch.save archive per chunk; where a chunk's bytes lie within its archive is looked up when the
chunk is first read, so that opening a checkpoint of thousands of shards stays quick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats._cover import overlapping
from tensorkeep.formats._dcp_places import (
    MODULE,
    RECORDS,
    STORAGE_INFO,
    Place,
    Storage,
    damaged,
    fields_of,
    place_of,
    size_of,
    state_of,
    storage_of,
)
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.archive import TENSOR_GLOBALS, lone_tensor, storage_bytes
from tensorkeep.storage.archive_writing import lone_archives
from tensorkeep.storage.files import Folder
from tensorkeep.storage.layout import SHARD_SIZE, FileLayout, Fixed, SinkTensor, Slot, Trailer, shards, small_file
from tensorkeep.storage.pickle_values import Global, Object
from tensorkeep.storage.pickle_writing import HOLE, Pickled, emit, pickled, template
from tensorkeep.storage.pickles import LARGEST_PICKLE, parse
from tensorkeep.storage.record import DTYPES, FROM_TORCH, Block, TensorRecord, same_layout

LOOKS = "a DCP folder with .metadata"
NESTS, CHECKSUMS, TIED = True, True, "both"
RANKS = True  # can be written as several ranks would
METADATA = ".metadata"
CLASSES = [  # of torch.distributed.checkpoint.metadata, as honest metadata names them
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
]
DCP_GLOBALS = TENSOR_GLOBALS | {
    *(f"{MODULE}.{name}" for name in CLASSES),
    STORAGE_INFO,
    *(f"torch.{name}" for name in ("strided", "contiguous_format", "preserve_format", "channels_last")),
}


# what our own metadata names again and again
_KNOWN: tuple[str | Global, ...] = (
    *(Global(MODULE, name) for name in CLASSES),
    Global(*STORAGE_INFO.rsplit(".", 1)),
    Global("torch", "Size"),
    Global("torch.serialization", "_get_layout"),
    *"torch.strided properties size chunks offsets sizes fqn offset index relative_path length".split(),
)


def unfinished(names: list[str]) -> str | None:
    """Say what is wrong where data files are there and the file that is written last is not."""
    torn = any(n.endswith(".distcp") for n in names)
    return "DCP data without its .metadata: the save was interrupted" if torn else None


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether these files are a DCP folder; `single`: they are one file named by the user."""
    return METADATA in names or (single and names[0].endswith(".metadata"))


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open a DCP folder; nothing in the pickle is run.

    Args:
        folder: where the files lie.
        names: the files to look at.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: F02, F04, F05, F06 or F07 where metadata and files contradict themselves or each other.
    """
    where = f"{folder.url}/{METADATA}"
    if folder.size(METADATA) > LARGEST_PICKLE:
        raise damaged(f"{folder.size(METADATA)} bytes, more than {LARGEST_PICKLE}", where)
    opaque: set[str] = set()
    root, _ = parse(folder.read(METADATA), DCP_GLOBALS, where, opaque=opaque, records=RECORDS)
    of_megatron = isinstance(root, Object) and root.call.name == "MCoreMetadata"  # it adds fields that are not read
    fields = state_of(root, "MCoreMetadata" if of_megatron else "Metadata", where)
    storage = storage_of(fields.pop("storage_data", None), where)
    names = folder.names()
    used = {place[0] for chunks in storage.values() for place in chunks.values()}
    sizes = {file: folder.size(file) for file in used.intersection(names)}
    view = StateView(path, "dcp", folder, {}, locate=locate, metadata={"opaque": opaque} if opaque else {})
    described = fields.get("state_dict_metadata")
    if not isinstance(described, dict):
        raise damaged("no state_dict_metadata", where)
    lost: list[TensorkeepError] = []
    shapes: dict[Any, tuple[int, ...]] = {}
    for name, entry in described.items():
        if not isinstance(name, str) or not isinstance(entry, Object):
            raise damaged(f"an entry for {shown(name)}", where)
        try:
            if entry.call.name == "BytesStorageMetadata":
                view.entries[name] = place_of(name, (), storage, sizes, where)
            else:
                view.records[name] = _record(name, entry, storage, sizes, where, shapes)
        except TensorkeepError as error:
            if not error.tensors:
                raise
            lost.append(error)
    if lost:
        raise _together(lost)
    paths = fields.get("planner_data")
    if isinstance(paths, dict):
        view.metadata["paths"] = {n: p for n, p in paths.items() if isinstance(n, str) and _is_path(p)}
    strays = [n for n in names if n.endswith(".distcp") and n not in sizes]
    if strays:
        view.notes.append(
            Note(
                "F07", f"{', '.join(strays)}: data that .metadata does not name, left by an earlier save", tuple(strays)
            )
        )
    return view


def _together(lost: list[TensorkeepError]) -> TensorkeepError:
    """Return the first error, made to name every tensor that is lost in the same way."""
    first = lost[0]
    first.tensors = tuple(name for error in lost if error.code == first.code for name in error.tensors)
    if len(lost) > 1:
        first.what += f" (and {len(lost) - 1} more tensors are lost)"
    return first


def _is_path(value: Any) -> bool:
    """Tell whether this is the path of a value in a nested state dict."""
    return isinstance(value, tuple) and all(type(part) in (str, int) for part in value)


def _record(
    name: str,
    entry: Object,
    storage: Storage,
    sizes: dict[str, int],
    where: object,
    shapes: dict[Any, tuple[int, ...]],
) -> TensorRecord:
    """Turn one entry of the metadata into a record; its chunks must cover the tensor exactly."""
    fields = state_of(entry, "TensorStorageMetadata", where)
    properties = fields.get("properties")
    if not isinstance(properties, Object):
        raise damaged(f"{name} has no properties", where)
    state = properties.state
    spelled = (
        state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    )
    dtype = FROM_TORCH.get(spelled.name) if isinstance(spelled, Global) else None
    if dtype is None:
        raise damaged(f"{name} has an unknown dtype {shown(spelled)}", where)
    shape, chunks, blocks, covered = size_of(fields.get("size"), where, shapes), fields.get("chunks"), [], 0
    if not isinstance(chunks, list):
        raise damaged(f"{name} has no chunks", where)
    for chunk in chunks:
        corner, extent = fields_of(chunk, "ChunkStorageMetadata", where)
        offsets, sizes_ = size_of(corner, where, shapes), size_of(extent, where, shapes)
        if (
            len(offsets) != len(shape)
            or len(sizes_) != len(shape)
            or any(o + n > s for o, n, s in zip(offsets, sizes_, shape))
        ):
            raise damaged(f"{name} has a chunk outside its shape {shape}", where)
        file, start, length = place_of(name, offsets, storage, sizes, where)
        blocks.append(Block(file, start, length, offsets, sizes_, archive=True))
        covered += math.prod(sizes_)
    if covered != math.prod(shape) or overlapping(blocks):
        raise TensorkeepError(
            f"{name}: its chunks hold {covered} of {math.prod(shape)} elements",
            where=where,
            code="F07",
            hint="a rank's file is missing; copy the checkpoint again",
            tensors=[name],
        )
    return TensorRecord(name, dtype, shape, tuple(blocks))


def locate(folder: Folder, record: TensorRecord, block: Block) -> Block:
    """Find where a chunk's raw bytes lie within its torch.save archive.

    Args:
        folder: where the file lies.
        record: the tensor that the chunk belongs to.
        block: the chunk, whose byte range is the whole archive.

    Returns:
        The same rectangle with the byte range of its data.

    Raises:
        TensorkeepError: F02 or F07 where the archive does not hold what the metadata says.
    """
    where = f"{folder.url}/{block.file}: {record.name}"
    tensor, entry = lone_tensor(folder, block.file, block.start, block.nbytes, where)
    if tensor is None:
        raise TensorkeepError("its archive holds no tensor", where=where, code="F07", hint="copy the file again")
    if tensor.shape != block.shape or tensor.dtype != record.dtype:
        raise TensorkeepError(
            f"the data is {tensor.dtype}{list(tensor.shape)}, .metadata says {record.dtype}{list(block.shape)}",
            where=where,
            code="F07",
            hint="the data files and .metadata come from different saves",
        )
    start, size = storage_bytes(tensor)
    if size and (entry is None or start + size > entry.size):
        raise TensorkeepError("its storage is truncated", where=where, code="F02", hint="copy the file again")
    strides = None if same_layout(tensor.shape, tensor.strides) else tensor.strides
    crc = entry.known_crc(start, size) if entry else None
    return Block(block.file, (entry.start if entry else 0) + start, size, block.offsets, block.shape, strides, crc=crc)


# -- writing ------------------------------------------------------------------------------------------------------


def layout(
    tensors: Sequence[SinkTensor],
    *,
    shard_size: int | None = None,
    root: str | None = None,
    ranks: int | None = None,
    **_: Any,
) -> list[FileLayout]:
    """Lay out data files `__0_N.distcp`, or `__R_0.distcp` of each rank, and `.metadata` as the last file.

    Args:
        tensors: the tensors to be written.
        shard_size: most bytes of tensor data per file; 5 GB where it is not given.
        root: name under which DCP nests the tensors: `root.name`.
        ranks: write as so many ranks would whose tensors are sharded by rows (FSDP2); None: whole tensors.

    Raises:
        TensorkeepError: torch has no dtype for one of the tensors.
    """
    numbered = [(f"__0_{n}.distcp", part) for n, part in enumerate(shards(tensors, shard_size or SHARD_SIZE))]
    whole = [(file, [(tensor, (0,) * len(tensor.shape)) for tensor in part]) for file, part in numbered]
    files, places = [], dict[str, dict[tuple[int, ...], Place]]()
    archive = lone_archives()
    for file, chunks in whole if ranks is None else _of_ranks(tensors, ranks):
        at = 0
        segments: list[Fixed | Slot | Trailer] = []
        for chunk, corner in chunks:
            made, end = archive(at, chunk)
            segments += made
            places.setdefault(chunk.name, {})[corner] = (file, at, end - at)
            at = end
        files.append(FileLayout(file, segments))
    return [*files, small_file(METADATA, metadata(tensors, places, root, ranks))]


def chunks_of(shape: tuple[int, ...], ranks: int | None) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a tensor into the chunks that torch saves of it: offsets and sizes.

    Args:
        shape: its sizes.
        ranks: how many ranks share its rows, each `ceil(rows / ranks)` but the last; what is left without rows is one
            empty chunk, as torch has it. None: nobody shares it.

    >>> chunks_of((5, 3), 4)
    [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((4, 0), (1, 3)), ((5, 0), (0, 3))]
    """
    if not shape or ranks is None:
        return [((0,) * len(shape), shape)]
    rows = -(-shape[0] // ranks)
    firsts = list(range(0, shape[0], rows or 1))
    firsts += [shape[0]] if len(firsts) < ranks else []
    rest = (0,) * (len(shape) - 1)
    return [((first, *rest), (min(rows, shape[0] - first), *shape[1:])) for first in firsts]


def _of_ranks(tensors: Sequence[SinkTensor], ranks: int) -> list[tuple[str, list[tuple[SinkTensor, tuple[int, ...]]]]]:
    """Deal the chunks of tensors to ranks: a tensor's n-th to the n-th, an empty one to the last."""
    own: list[list[tuple[SinkTensor, tuple[int, ...]]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for tensor in tensors:
        for number, (corner, extent) in enumerate(chunks_of(tensor.shape, ranks)):
            rank = load.index(min(load)) if not extent else number if extent[0] else ranks - 1
            chunk = SinkTensor(tensor.name, tensor.dtype, extent)
            own[rank].append((chunk, corner))
            load[rank] += chunk.nbytes
    return [(f"__{rank}_0.distcp", mine) for rank, mine in enumerate(own)]


def metadata(
    tensors: Sequence[SinkTensor],
    places: dict[str, dict[tuple[int, ...], Place]],
    root: str | None,
    ranks: int | None = None,
) -> bytes:
    """Make the bytes of `.metadata`: what torch's FileSystemWriter would pickle, less its path and random ids."""
    described, storage, paths = {}, {}, {}
    index = template(_object("MetadataIndex", {"fqn": HOLE, "offset": HOLE, "index": HOLE}), _KNOWN)
    module, _, kind = STORAGE_INFO.rpartition(".")
    state = {"relative_path": HOLE, "offset": HOLE, "length": HOLE}
    info = template(Object(Global(module, kind), state=state), _KNOWN)
    alike: dict[tuple[str, tuple[int, ...]], tuple[Pickled, list[tuple[tuple[int, ...], Pickled]]]] = {}
    for tensor in tensors:
        name = f"{root}.{tensor.name}" if root else tensor.name
        key = tensor.dtype, tensor.shape
        if key not in alike:
            alike[key] = _described(*key, ranks)
        described[name], corners = alike[key]
        for number, (corner, spelled) in enumerate(corners):
            storage[index(name, spelled, number)] = info(*places[tensor.name][corner])
        paths[name] = (root, tensor.name) if root else (tensor.name,)
    return emit(
        _object(
            "Metadata",
            {
                "state_dict_metadata": described,
                "planner_data": paths,
                "storage_data": storage,
                "storage_meta": None,
                "version": "1.0.0",
            },
        ),
        _KNOWN,
    )


def _described(
    dtype: str, shape: tuple[int, ...], ranks: int | None
) -> tuple[Pickled, list[tuple[tuple[int, ...], Pickled]]]:
    """Pickle what the metadata says of every tensor of a dtype and shape, and the offsets of its chunks."""
    cut = chunks_of(shape, ranks)
    chunks = [_object("ChunkStorageMetadata", {"offsets": _torch_size(o), "sizes": _torch_size(n)}) for o, n in cut]
    fields = {"properties": _properties(dtype), "size": _torch_size(shape), "chunks": chunks}
    corners = [(corner, pickled(_torch_size(corner), _KNOWN)) for corner, _ in cut]
    return pickled(_object("TensorStorageMetadata", fields), _KNOWN), corners


def _object(kind: str, state: Any) -> Object:
    """Make a pickled object of one of DCP's metadata classes."""
    return Object(Global(MODULE, kind), state=state)


def _torch_size(shape: tuple[int, ...]) -> Object:
    return Object(Global("torch", "Size"), (tuple(shape),))


def _properties(dtype: str) -> Object:
    """Make a pickled TensorProperties: dtype, layout, gradient, memory format, pinning."""
    spelled = DTYPES[dtype].torch
    if spelled is None:
        raise TensorkeepError(f"torch cannot hold {dtype}", hint="keep it in safetensors (--to hf)")
    strided = Object(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Object(Global(MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    return _object("TensorProperties", (Global("torch", spelled), strided, False, memory_format, False))
