"""Read and write safetensors, as one file or as shards with an index; config and tokenizer lie beside (`hf`).

The header is parsed here and not by the safetensors library because a reader of untrusted files must know the byte
ranges (the library does not give them), name what is wrong, and see duplicates. Only files that the index names are
read; strays, which torch's DCP reader would read, are noted (F07). Headers are written in one canonical spelling, so
that the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats._index import check_index, read_index
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.budget import check_json
from tensorkeep.storage.certificate import unique
from tensorkeep.storage.files import Folder
from tensorkeep.storage.layout import SHARD_SIZE, FileLayout, Fixed, SinkTensor, Slot, shards, small_file
from tensorkeep.storage.record import DTYPES, Block, TensorRecord, checked_shape, nbytes

LOOKS = "*.safetensors"
ENDINGS = (".safetensors",)
TIED = "one"
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_INDEX = "model.safetensors.index.json"
_NOT_IN_SAFETENSORS = ("C128",)  # ours, for torch's files; the safetensors library refuses the whole file


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether these files are safetensors; `single`: they are one file named by the user."""
    if single:
        name = names[0]
        return (
            name.endswith(".safetensors")
            or name.endswith(".safetensors.index.json")
            or _looks_like_header(folder, name)
        )
    if ".metadata" in names or "adapter_config.json" in names:
        return False  # a DCP folder, an adapter: their own formats, whatever else lies there
    return any(n.endswith(".safetensors") or n.endswith(".safetensors.index.json") for n in names)


def _looks_like_header(folder: Folder, name: str) -> bool:
    """Tell whether a file without a telling name begins like safetensors: a length, then a JSON object."""
    size = folder.size(name)
    start = folder.read(name, 0, min(size, 9))
    return len(start) == 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open a file or a folder of safetensors.

    Args:
        folder: where the files lie.
        names: the files to look at.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: F02, F05, F06 or F07 where headers, index and files contradict themselves or each other.
    """
    indices = [n for n in names if n.endswith(".safetensors.index.json")]
    if len(indices) > 1:
        raise TensorkeepError(
            f"has {len(indices)} indices: {', '.join(indices)}", where=path, hint="name the index file itself"
        )
    if len(names) == 1 and not indices:
        files, weight_map = names, None
    elif indices:
        weight_map = read_index(folder, indices[0])
        files = sorted(set(weight_map.values()))
        names = folder.names()
    else:
        files, weight_map = _files_without_index(names, path), None
    records: dict[str, TensorRecord] = {}
    metadata: dict[str, Any] = {}
    for file in files:
        if file not in names:
            raise TensorkeepError(
                f"the index names {file}, which is not there",
                where=f"{folder.url}/{indices[0] if indices else ''}",
                code="F05",
                hint="download the missing shard",
            )
        header, found = read_header(folder, file)
        metadata.update(found)
        for record in header:
            if record.name in records:
                raise TensorkeepError(
                    f"{record.name} is in {records[record.name].file} and in {file}",
                    where=path,
                    code="F07",
                    hint="keep one of the two files",
                )
            records[record.name] = record
    view = StateView(path, "hf", folder, records, metadata=metadata)
    if weight_map is not None:
        check_index(view, weight_map, indices[0])
    strays = [n for n in names if n.endswith(".safetensors") and n not in files]
    if strays:
        view.notes.append(Note("F07", _who_reads(strays, files, bool(indices)), tuple(strays)))
    return view


def _who_reads(strays: list[str], files: list[str], indexed: bool) -> str:
    """Say that files lie beside the ones that are read, and which of them other loaders would take."""
    read = "the shards of the index" if indexed else ", ".join(files)
    named = "model.safetensors" if "model.safetensors" in (*strays, *files) else read
    vllm = read if indexed else "every .safetensors file"
    return (
        f"{', '.join(strays[:5])} beside {read}, and nothing but {read} is read here: transformers takes {named}, "
        f"vLLM {vllm}, torchtitan (torch's DCP reader) every .safetensors file"
    )


def _files_without_index(names: list[str], path: str) -> list[str]:
    """Choose the file to read where no index names any."""
    files = [n for n in names if n.endswith(".safetensors")]
    for preferred in ("model.safetensors", "adapter_model.safetensors"):
        if preferred in files:
            return [preferred]
    if len(files) > 1 and any("-of-" in f for f in files):
        raise TensorkeepError(
            f"{len(files)} shards and no {_INDEX}",
            where=path,
            code="F05",
            hint="get the index file as well: without it nothing says which shards belong together",
        )
    if len(files) > 1:
        raise TensorkeepError(
            f"holds {len(files)} safetensors files and no index: {', '.join(files[:5])}",
            where=path,
            hint="name one of them",
        )
    return files


# -- one file -----------------------------------------------------------------------------------------------------


def read_header(folder: Folder, file: str) -> tuple[list[TensorRecord], dict[str, str]]:
    """Read the header of one safetensors file, every offset checked.

    Args:
        folder: where the file lies.
        file: its name.

    Returns:
        The tensors in the order of the header, and the header's `__metadata__`.

    Raises:
        TensorkeepError: F02 where the file is truncated, F07 where the header contradicts itself.
    """
    where = f"{folder.url}/{file}"
    size = folder.size(file)
    if size < 8:
        raise TensorkeepError(
            f"truncated: {size} bytes, a safetensors file has at least 8",
            where=where,
            code="F02",
            hint="download it again",
        )
    length = int.from_bytes(folder.read(file, 0, 8), "little")
    if length > _LARGEST_HEADER or length > size - 8:
        raise TensorkeepError(
            f"truncated or not safetensors: a header of {length} bytes is announced, the file has {size}",
            where=where,
            code="F02",
            hint="download it again",
        )
    data = folder.read(file, 8, length)
    check_json(data, where)
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TensorkeepError(
            f"the header is not valid: {error}", where=where, code="F07", hint="download it again"
        ) from None
    if not isinstance(header, dict):
        raise TensorkeepError("the header is not a JSON object", where=where, code="F07")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        metadata = {}
    start = 8 + length
    records = [_record(name, entry, file, start, where) for name, entry in header.items()]
    _check_tiling(records, start, size, where)
    return records, {str(k): str(v) for k, v in metadata.items()}


def _record(name: str, entry: Any, file: str, start: int, where: str) -> TensorRecord:
    """Turn one header entry into a record."""

    def wrong(what: str) -> TensorkeepError:
        return TensorkeepError(
            f"{name}: {what}", where=where, code="F07", hint="the header is damaged; download the file again"
        )

    if not isinstance(entry, dict):
        raise wrong("its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES or dtype in _NOT_IN_SAFETENSORS:
        raise wrong(f"unknown dtype {shown(dtype)}")
    sizes = checked_shape(shape)
    if sizes is None or not isinstance(shape, list):
        raise wrong(f"shape {shown(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in offsets)
    ):
        raise wrong(f"data_offsets {shown(offsets)}")
    low, high = offsets
    if high - low != nbytes(dtype, sizes) or math.prod(sizes) * DTYPES[dtype].bits % 8:
        raise wrong(f"{high - low} bytes for shape {shape} of {dtype}, which needs {nbytes(dtype, sizes)}")
    block = Block(file, start + low, high - low, (0,) * len(sizes), sizes)
    return TensorRecord(name, dtype, sizes, (block,))


def _check_tiling(records: list[TensorRecord], start: int, size: int, where: str) -> None:
    """Raise F07 unless the tensors' bytes fill the file without gap or overlap, F02 where it ends early."""
    at = start
    for block in sorted((r.blocks[0] for r in records), key=lambda b: (b.start, b.nbytes)):
        if block.start < at:
            raise TensorkeepError(
                f"tensors overlap at byte {block.start}",
                where=where,
                code="F07",
                hint="the header is damaged; download the file again",
            )
        if block.start > at:
            raise TensorkeepError(
                f"{block.start - at} bytes at {at} belong to no tensor",
                where=where,
                code="F07",
                hint="the header is damaged; download the file again",
            )
        at = block.start + block.nbytes
    if at > size:
        raise TensorkeepError(
            f"truncated: the tensors end at byte {at}, the file at {size}",
            where=where,
            code="F02",
            hint="download it again",
        )
    if at < size:
        raise TensorkeepError(
            f"{size - at} bytes behind the last tensor", where=where, code="F07", hint="download it again"
        )


# -- writing ------------------------------------------------------------------------------------------------------


def layout(
    tensors: Sequence[SinkTensor],
    *,
    shard_size: int | None = None,
    name: str = "model.safetensors",
    header: Mapping[str, str] | None = None,
    **_: Any,
) -> list[FileLayout]:
    """Lay out one file, or shards of at most `shard_size` bytes and an index.

    Args:
        tensors: the tensors to be written.
        shard_size: most bytes of tensor data per file; 5 GB where it is not given.
        name: name of the file, from which shards and index get theirs.
        header: what each file's header says beside the tensors.

    Raises:
        TensorkeepError: a tensor's dtype is none that safetensors has.
    """
    parts = shards(tensors, shard_size or SHARD_SIZE)
    if len(parts) == 1:
        return [file_layout(name, parts[0], header)]
    stem = name.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    weight_map = {t.name: file for file, part in zip(names, parts) for t in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    files = [file_layout(file, part, header) for file, part in zip(names, parts)]
    return [*files, small_file(f"{stem}.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())]


def file_layout(name: str, tensors: Sequence[SinkTensor], beside: Mapping[str, str] | None = None) -> FileLayout:
    """Lay out one safetensors file.

    Wider dtypes come first, so that every tensor is aligned to its element, and data starts at a multiple of 64 bytes.

    Args:
        name: name of the file.
        tensors: the tensors to be written.
        beside: what the header says beside the tensors.

    Returns:
        The header's bytes, then a slot for each tensor.

    Raises:
        TensorkeepError: a tensor is complex128, which safetensors does not have.
    """
    wide = [t.name for t in tensors if t.dtype in _NOT_IN_SAFETENSORS]
    if wide:
        raise TensorkeepError(
            f"safetensors has no complex128, which {wide[0]} is",
            hint="keep it with --to dcp or pth, or leave it out with --drop",
        )
    ordered = sorted(tensors, key=lambda t: -DTYPES[t.dtype].bits)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(beside or {})}}
    at = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)  # data starts on a cache line, for those who map the file
    start = 8 + len(text)
    segments: list[Fixed | Slot] = [Fixed(0, len(text).to_bytes(8, "little") + text)]
    for tensor in ordered:
        segments.append(Slot(start, tensor.nbytes, tensor.name))
        start += tensor.nbytes
    return FileLayout(name, segments)
