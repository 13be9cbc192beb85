"""Read and write torch.save files without torch and without unpickling (`pth`; legacy files are read too).

A `.pth` is often a dict of dicts (`model`, `optimizer`, `epoch`); tensors get dotted names, so
`{"state_dict": {"a.w": t}}` reads as `state_dict.a.w`, and plain values are entries of the view. Tensors that share
a storage are found and kept tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats._index import check_index, read_index
from tensorkeep.formats.layouts import is_state
from tensorkeep.formats.names import natural
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.archive import (
    TENSOR_GLOBALS,
    Entry,
    Stored,
    saved_value,
    storage_bytes,
    zip_entries,
)
from tensorkeep.storage.archive_writing import build_archive, tensor_object
from tensorkeep.storage.dtensors import Part
from tensorkeep.storage.files import Folder
from tensorkeep.storage.layout import FileLayout, SinkTensor
from tensorkeep.storage.pickle_values import Global, Object
from tensorkeep.storage.pickles import parse
from tensorkeep.storage.record import DTYPES, Block, TensorRecord, same_layout
from tensorkeep.storage.state_dicts import iter_tensors

LOOKS = ".pth/.pt/.bin"
ENDINGS = (".pth", ".pt", ".bin", ".ckpt")
NESTS, CHECKSUMS, ARCHIVED = True, True, True
INDEX = ".bin.index.json"
_ENDINGS = (*ENDINGS, ".tar")  # of files that are read
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6 begins with this number, pickled


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether these files are torch.save's; `single`: they are one file named by the user."""
    if single:
        if names[0].endswith(INDEX):
            return True
        head = folder.read(names[0], 0, min(2, folder.size(names[0])))
        return head in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or names[0].endswith(_ENDINGS)
    return any(n.endswith((*_ENDINGS, INDEX)) for n in names)


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open one torch.save file, or shards with an index.

    Args:
        folder: where the files lie.
        names: the files to look at; one of them must be the weights, or the index of them.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: F02 or F07 where it is damaged, F04 where its pickle names what a checkpoint does not need.
    """
    indices = [n for n in names if n.endswith(INDEX)]
    if len(indices) == 1 and "pytorch_model.bin" not in names:
        return _shards(folder, indices[0], path)
    files = [n for n in names if n.endswith(_ENDINGS)] if len(names) > 1 else names
    chosen, taken = weights_of(files) if len(files) > 1 else files, False
    if len(chosen) > 1 and all(n.endswith(".ckpt") for n in chosen):  # Lightning keeps several in one folder
        newest = "last.ckpt" if "last.ckpt" in chosen else max(chosen, key=natural)
        chosen, taken = [newest], True
    if len(chosen) != 1:
        raise _which(chosen or files, path)
    view = open_file(folder, chosen[0], path)
    if indices and len(names) > 1:
        _note_strays(view, [n for n in files if n not in chosen and "-of-" in n], chosen[0])
    if taken:
        view.metadata["taken"] = chosen[0]
        view.notes.append(Note("F08", f"{chosen[0]} is read, of {len(weights_of(files))} such files in the folder"))
    return view


def weights_of(names: Sequence[str]) -> list[str]:
    """Return those of torch.save's files that can be the weights: not what a resume reads beside them.

    Args:
        names: files of one folder.
    """
    files = [n for n in names if n.endswith(_ENDINGS)]
    if "pytorch_model.bin" in files:  # before its shards, as transformers takes it
        return ["pytorch_model.bin"]
    named = [n for n in files if n.startswith(("pytorch_model", "model."))]
    return named if len(files) > 1 and len(named) == 1 else [n for n in files if not is_state(n)] or files


def _which(files: list[str], path: str) -> TensorkeepError:
    shards = [f for f in files if "-of-" in f]
    if len(shards) == len(files):
        hint = f"get the index ({shards[0].partition('-')[0]}{INDEX}) as well: nothing else says which belong together"
        return TensorkeepError(f"{len(files)} shards and no index", where=path, code="F05", hint=hint)
    said = f"holds {len(files)} torch.save files: {', '.join(files[:5])}"
    return TensorkeepError(said, where=path, hint="name one of them")


def _shards(folder: Folder, index: str, path: str) -> StateView:
    """Open shards of torch.save files by their index."""
    where = f"{folder.url}/{index}"
    weight_map = read_index(folder, index)
    view = StateView(path, "pth", folder, {}, metadata={"containers": ()})
    present = set(folder.names())
    for file in sorted(set(weight_map.values())):
        if file not in present:
            raise TensorkeepError(
                f"the index names {file}, which is not there", where=where, code="F05", hint="get the missing shard"
            )
        part = open_file(folder, file, path)
        for name, record in part.records.items():
            if name in view.records:
                said = f"{name} is in {view.records[name].file} and in {file}"
                raise TensorkeepError(said, where=path, code="F07", hint="keep one of the two files")
            view.records[name] = record
        view.entries.update(part.entries)
        view.metadata.setdefault("opaque", set()).update(part.metadata.get("opaque", ()))
    check_index(view, weight_map, index)
    read = set(weight_map.values())
    _note_strays(view, [n for n in present - read if n.startswith("pytorch_model") and n.endswith(".bin")], index)
    return view


def _note_strays(view: StateView, strays: list[str], read: str) -> None:
    """Note files of weights that lie beside the ones that are read."""
    if strays:
        named = sorted(strays)
        said = f"{', '.join(named[:5])} beside what {read} holds, and not read: transformers reads {read} as well"
        view.notes.append(Note("F07", said, tuple(named)))


def open_file(folder: Folder, file: str, path: str) -> StateView:
    """Open one torch.save file.

    Args:
        folder: where it lies.
        file: its name, perhaps with a folder below.
        path: what the user typed, for messages.

    Returns:
        The view; `metadata["opaque"]` names the classes of objects that are no tensors and stay opaque.

    Raises:
        TensorkeepError: F02 or F07 where it is damaged, F04 where its pickle names what could do harm.
    """
    opened = open_value(folder, file)
    view = _view(folder, file, path, opened.value, opened.places)
    view.metadata["opaque"] = opened.opaque
    told = view.entries.get("args")
    held = told.state if isinstance(told, Object) and isinstance(told.state, dict) else {}
    parts = [held.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    if any(type(n) is int and n > 1 for n in parts):
        said = f"holds one of Megatron-LM's {parts[0]} tensor-parallel x {parts[1]} pipeline parts"
        raise TensorkeepError(
            said, where=f"{folder.url}/{file}", hint="name the folder that holds all mp_rank_ folders"
        )
    return view


class Opened(NamedTuple):
    """What a torch.save file holds, as plain data.

    Attributes:
        value: dicts, lists, numbers, and `Object`s for calls.
        places: where each storage lies.
        opaque: names of classes that are nobody's known.
    """

    value: Any
    places: dict[str, Entry]
    opaque: set[str]


def open_value(folder: Folder, file: str) -> Opened:
    """Read what one torch.save file holds, without its tensors' data.

    Args:
        folder: where it lies.
        file: its name.

    Raises:
        TensorkeepError: F02 or F07 where it is damaged, F04 where its pickle names what could do harm.
    """
    opaque: set[str] = set()
    head = folder.read(file, 0, min(4, folder.size(file)))
    if head[:2] == b"PK":
        found = zip_entries(folder, file, 0, folder.size(file))
        value = saved_value(folder, file, found, opaque)
        places = {name.removeprefix("data/"): entry for name, entry in found.items() if name.startswith("data/")}
        return Opened(value, places, opaque)
    if head[:1] == b"\x80":
        return Opened(*_read_legacy(folder, file, opaque), opaque)
    raise TensorkeepError(
        "is neither a torch.save file nor any other checkpoint known here",
        where=f"{folder.url}/{file}",
        code="F02",
        hint="it may be truncated or a Git LFS pointer; copy it again",
    )


def _view(folder: Folder, file: str, path: str, value: Any, places: dict[str, Entry]) -> StateView:
    """Make the view of what a file's pickle describes; `places` says where each storage lies."""
    where = f"{folder.url}/{file}"
    records: dict[str, TensorRecord] = {}
    view = StateView(path, "pth", folder, records, metadata={"containers": _containers(value)})
    seen: dict[tuple[Any, ...], str] = {}
    for name, item in iter_tensors(value, where):
        if name in records or name in view.entries:
            raise TensorkeepError(
                f"{name} occurs twice once nested names are joined", where=where, code="F07", hint="copy the file again"
            )
        if isinstance(item, Part):
            if not item.whole:
                raise TensorkeepError(
                    f"holds one rank's parts: {list(item.local.shape)} of {name} {list(item.shape)}",
                    where=where,
                    hint="name the folder that holds all ranks' files: they are joined",
                )
            item = item.local
        if not isinstance(item, Stored):
            view.entries[name] = item
            continue
        block = block_of(item, name, file, places, where)
        size = block.nbytes
        key = (block.start, item.dtype, item.shape, item.strides)
        tied = seen.setdefault(key, name) if size else name
        records[name] = TensorRecord(name, item.dtype, item.shape, (block,), tied if tied != name else None)
    return view


def block_of(item: Stored, name: str, file: str, places: Mapping[str, Entry], where: object) -> Block:
    """Return where a tensor of a torch.save file lies, as the one block of its record.

    Args:
        item: what the pickle says of it.
        name: its name, for messages.
        file: the file.
        places: where each storage of the file lies.
        where: the file, for messages.

    Raises:
        TensorkeepError: F02 or F07 where its storage is not there, or is shorter.
    """
    place = places.get(item.storage)
    start, size = storage_bytes(item)
    if place is None:
        raise TensorkeepError(
            f"{name}: its storage {item.storage} is not in the file",
            where=where,
            code="F07",
            hint="copy the file again",
        )
    if start + size > place.size:
        raise TensorkeepError(
            f"{name}: truncated, its storage holds {place.size} of {start + size} bytes",
            where=where,
            code="F02",
            hint="copy the file again",
        )
    strides = None if same_layout(item.shape, item.strides) else item.strides
    at = (0,) * len(item.shape)
    return Block(file, place.start + start, size, at, item.shape, strides, crc=place.known_crc(start, size))


def _containers(value: Any) -> tuple[str, ...]:
    """Return the keys under which the file nests values, as training programs keep a model beside their own state."""
    top = value.entries if isinstance(value, Object) and value.is_mapping else value
    nests = (dict, list, tuple)
    return tuple(
        k
        for k, v in (top.items() if isinstance(top, dict) else ())
        if isinstance(k, str) and (isinstance(v, nests) or (isinstance(v, Object) and v.is_mapping))
    )


def _read_legacy(folder: Folder, file: str, opaque: set[str]) -> tuple[Any, dict[str, Entry]]:
    """Read the format before torch 1.6: five pickles one after another, then the storages."""
    where = f"{folder.url}/{file}"
    data = folder.read(file, 0, min(folder.size(file), 64 << 20))  # the pickles alone; storages are read on demand
    magic, at = parse(data, TENSOR_GLOBALS, where)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise TensorkeepError(
            "is a plain pickle, not a torch.save file",
            where=where,
            code="F04",
            hint="ask its author for safetensors; nothing was run",
        )
    _, at = parse(data, TENSOR_GLOBALS, where, at)  # the protocol's version
    system, at = parse(data, TENSOR_GLOBALS, where, at)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise TensorkeepError(
            "was written on a big-endian machine", where=where, hint="save it again on a little-endian one"
        )
    value, at = parse(data, TENSOR_GLOBALS, where, at, opaque)
    keys, at = parse(data, TENSOR_GLOBALS, where, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise TensorkeepError("the list of storages is damaged", where=where, code="F07", hint="copy the file again")
    return value, _legacy_places(folder, file, at, keys, value)


def _legacy_places(folder: Folder, file: str, at: int, keys: list[str], value: Any) -> dict[str, Entry]:
    """Find where each storage of a legacy file lies: one after another, each with its number of elements in front."""
    where = f"{folder.url}/{file}"
    widths = {t.storage: DTYPES[t.dtype].bits // 8 for _, t in iter_tensors(value, where) if isinstance(t, Stored)}
    places: dict[str, Entry] = {}
    for key in keys:
        if key not in widths:
            raise TensorkeepError(
                f"storage {shown(key)} is used by no tensor, so its width is unknown",
                where=where,
                code="F07",
                hint="load it with the torch that wrote it and save it again",
            )
        count = int.from_bytes(folder.read(file, at, 8), "little", signed=True)
        size = count * widths[key]
        if count < 0 or at + 8 + size > folder.size(file):
            raise TensorkeepError(
                f"truncated: storage {shown(key)} ends behind the file",
                where=where,
                code="F02",
                hint="copy the file again",
            )
        places[key] = Entry(at + 8, size, 0)
        at += 8 + size
    return places


def layout(
    tensors: Sequence[SinkTensor],
    *,
    name: str = "model.pth",
    root: str | None = None,
    roots: Sequence[str] = (),
    beside: Mapping[str, Any] | None = None,
    **_: Any,
) -> list[FileLayout]:
    """Lay out one torch.save archive; tied tensors share a storage.

    Args:
        tensors: the tensors to be written.
        name: name of the file.
        root: key under which all tensors are nested: {root: {...}}.
        roots: the names themselves begin with one of these, and each becomes a dict of its own.
        beside: plain values next to those dicts: {"state_dict": {...}, "state_dict_ema": {...}, "epoch": 3}.

    Raises:
        TensorkeepError: torch has no dtype for one of the tensors.
    """
    keys: dict[str, str] = {}
    stored: list[tuple[str, SinkTensor]] = []
    entries: dict[str, dict[str, Object]] = {r: {} for r in roots or (root or "",)}
    for tensor in tensors:
        if tensor.tied_to is None:
            keys[tensor.name] = str(len(stored))
            stored.append((keys[tensor.name], tensor))
    for tensor in tensors:
        head, _dot, rest = tensor.name.partition(".") if roots else (root or "", "", tensor.name)
        entries[head][rest] = tensor_object(tensor, keys[tensor.tied_to or tensor.name])
    states = {r: Object(Global("collections", "OrderedDict"), entries=held) for r, held in entries.items()}
    value: Any = {**(beside or {}), **states} if root or roots else states[""]
    return [FileLayout(name, build_archive(0, value, stored).segments)]
