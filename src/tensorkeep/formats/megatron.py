"""Join Megatron-LM's tensor and pipeline shards (`mp_rank_01_002/model_optim_rng.pt`), where their arguments say how.

Each file holds the arguments of the training. They say how many parts there are; the layer's name says along which
dimension Megatron's parallel layers cut it. What no rule names must be the same on every rank, byte by byte, or the
folder is refused with the program that joins it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import pth
from tensorkeep.formats._joined import get
from tensorkeep.formats.view import StateView
from tensorkeep.storage.archive import Stored
from tensorkeep.storage.files import Folder, LocalFolder
from tensorkeep.storage.pickle_values import Object
from tensorkeep.storage.record import Block, TensorRecord, nbytes
from tensorkeep.storage.state_dicts import iter_tensors

LOOKS = "Megatron-LM's mp_rank_00"
CHECKSUMS, ARCHIVED = True, True
_RANK = re.compile(r"mp_rank_(?P<tp>\d\d)(_(?P<pp>\d\d\d))?(_(?P<ep>\d\d\d))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_states.pt")
_TOOL = "join them with Megatron-LM's tools/checkpoint/convert.py, or export them with Megatron-Bridge"
# ends of names -> the dimension that tensor parallelism cuts; biases behind a cut dimension 1 are whole on every rank
_GATED = re.compile(r"(linear_fc1|dense_h_to_4h)\.(weight|bias)\d*\Z")
_CUT = (
    (re.compile(r"(word_embeddings|output_layer|lm_head|word_embeddings_for_head)\.weight\Z"), 0),
    (
        re.compile(
            r"(linear_qkv|query_key_value|query|key_value|linear_q_proj|linear_(q|kv)_up_proj)\.(weight|bias)\Z"
        ),
        0,
    ),
    (_GATED, 0),
    (re.compile(r"(linear_proj|linear_fc2|dense_4h_to_h|(self_attention|attention)\.dense)\.weight\d*\Z"), 1),
    (re.compile(r"(linear_proj|linear_fc2|dense_4h_to_h|(self_attention|attention)\.dense)\.bias\d*\Z"), None),
)
_LAYER = re.compile(r"(?P<front>(.*\.)?layers\.)(?P<number>\d{1,9})(?P<rest>\..*)")
_SMALL = 1 << 20  # bytes of a tensor that is compared between ranks


class _Part(NamedTuple):
    """A tensor in one rank's file."""

    record: TensorRecord
    file: str


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether this folder holds Megatron-LM's shards; `single`: the user named a file."""
    return not single and isinstance(folder, LocalFolder) and bool(_shards(folder))


def _shards(folder: LocalFolder) -> dict[tuple[int, int], str]:
    """Find the files by tensor-parallel and pipeline rank."""
    out: dict[tuple[int, int], str] = {}
    for entry in folder.path.iterdir():
        match = _RANK.fullmatch(entry.name)
        file = next((f for f in _FILES if (entry / f).is_file()), None) if match else None
        if match and file:
            out[int(match["tp"]), int(match["pp"] or 0)] = f"{entry.name}/{file}"
    return out


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open an `iter_0000100` folder of Megatron-LM.

    Args:
        folder: the folder that holds the ranks' folders.
        names: not used.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: F05 where a rank's file is missing, F07 where the ranks contradict each other or their
            arguments, and without a code where the arguments do not say how the parts are joined.
    """
    assert isinstance(folder, LocalFolder)
    files = _shards(folder)
    view = StateView(path, "megatron", folder, {}, metadata={"opaque": set()})
    opened = {rank: pth.open_value(folder, file) for rank, file in sorted(files.items())}
    arguments = _arguments(next(iter(opened.values())).value)
    tp, pp = _count(arguments, "tensor_model_parallel_size"), _count(arguments, "pipeline_model_parallel_size")
    _check(folder, files, arguments, tp, pp)
    at = 0
    for stage in range(pp):
        parts = [_tensors(folder, files[rank, stage], opened[rank, stage], path) for rank in range(tp)]
        layers = {int(m["number"]) for name in parts[0] if (m := _LAYER.fullmatch(name))}
        for name in parts[0]:
            joined = _numbered(name, at)
            if joined not in view.records:  # a tied head is a copy of the embedding of the first stage
                held = [part[name] for part in parts if name in part]
                view.records[joined] = _joined(view, joined, held, tp, arguments)
        at += max(layers, default=-1) + 1
        view.metadata["opaque"] |= opened[0, stage].opaque
    wanted = arguments.get("num_layers")
    if type(wanted) is int and at and at != wanted:
        raise _unclear(f"{at} layers in the files, {wanted} in their arguments", path)
    iteration = get(next(iter(opened.values())).value, "iteration")
    view.entries.update({"iteration": iteration} if type(iteration) is int else {})
    view.entries["world_size"] = tp * pp
    view.metadata["about"] = f"{tp} tensor-parallel x {pp} pipeline parts joined as the arguments in them say"
    return view


def _arguments(value: Any) -> dict[str, Any]:
    """Return the arguments of the training, which lie in every file."""
    held = get(value, "args")
    state = held.state if isinstance(held, Object) else held
    return state if isinstance(state, dict) else {}


def _count(arguments: dict[str, Any], name: str) -> int:
    found = arguments.get(name)
    return found if type(found) is int and 0 < found <= 4096 else 1


def _check(folder: LocalFolder, files: Iterable[Any], arguments: dict[str, Any], tp: int, pp: int) -> None:
    """Raise where files are missing or the model was cut in other ways too."""
    wanted = {(t, p) for t in range(tp) for p in range(pp)}
    if not arguments and len(list(files)) > 1:
        raise _unclear("no arguments in the files of several ranks", folder.url)
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if _count(arguments, name) > (1 if name.startswith("expert_model") else tp):
            raise _unclear(f"experts cut {_count(arguments, name)} ways ({name})", folder.url)
    if arguments.get("virtual_pipeline_model_parallel_size") not in (None, 1):
        raise _unclear("a virtual pipeline (several model chunks a rank)", folder.url)
    missing = sorted(wanted - set(files))
    if missing:
        raise TensorkeepError(
            f"{len(wanted) - len(missing)} of {len(wanted)} parts are there; tensor rank {missing[0][0]} of pipeline "
            f"rank {missing[0][1]} is not",
            where=folder.url,
            code="F05",
            hint="copy the missing folders: each holds a part of the model",
        )
    if set(files) - wanted:
        raise _unclear(f"{len(set(files))} parts, where the arguments say {tp} x {pp}", folder.url)


def _unclear(what: str, where: object) -> TensorkeepError:
    return TensorkeepError(f"Megatron-LM's shards with {what}: they are not joined here", where=where, hint=_TOOL)


def _tensors(folder: LocalFolder, file: str, opened: pth.Opened, path: str) -> dict[str, _Part]:
    """List the model's tensors in one file, by their names below `model`."""
    where, out = f"{folder.url}/{file}", {}
    for name, item in iter_tensors(get(opened.value, "model"), where):
        if isinstance(item, Stored):
            block = pth.block_of(item, name, file, opened.places, where)
            out[name] = _Part(TensorRecord(name, item.dtype, item.shape, (block,)), file)
    if not out:
        raise _unclear("no tensors under `model`", path)
    return out


def _numbered(name: str, first: int) -> str:
    """Number a layer of a pipeline stage within the whole model."""
    match = _LAYER.fullmatch(name)
    return f"{match['front']}{int(match['number']) + first}{match['rest']}" if match else name


def _joined(view: StateView, name: str, parts: list[_Part], tp: int, arguments: dict[str, Any]) -> TensorRecord:
    """Put the parts of one tensor together."""
    first = parts[0].record
    if len(parts) != tp or any((p.record.dtype, p.record.shape) != (first.dtype, first.shape) for p in parts):
        raise _unclear(f"{name} of different sizes on the ranks", view.path)
    rule = next((cut for pattern, cut in _CUT if pattern.search(name)), "unknown")
    if tp == 1 or rule is None:
        return TensorRecord(name, first.dtype, first.shape, first.blocks)
    if not isinstance(rule, int) or len(first.shape) <= rule:
        if not _same(view, parts):
            raise _unclear(f"{name}, which differs between ranks and whose cut is not known", view.path)
        return TensorRecord(name, first.dtype, first.shape, first.blocks)
    shape = (*first.shape[:rule], first.shape[rule] * tp, *first.shape[rule + 1 :])
    halves = 2 if arguments.get("swiglu") is True and _GATED.search(name) else 1
    blocks = [b for rank, part in enumerate(parts) for b in _placed(part.record, rule, rank, tp, halves, view.path)]
    return TensorRecord(name, first.dtype, shape, tuple(blocks))


def _placed(record: TensorRecord, cut: int, rank: int, tp: int, halves: int, where: str) -> list[Block]:
    """Return where a rank's part lies in the whole; a gated layer's part is half gate and half up."""
    block, size = record.blocks[0], record.shape[cut]
    rest = (0,) * (len(record.shape) - 1 - cut)
    if halves == 1:
        return [block._replace(offsets=(*(0,) * cut, rank * size, *rest))]
    if block.strides is not None or size % 2:
        raise _unclear(f"{record.name}, a gated layer that is not stored row by row", where)
    half = size // 2
    shape = (half, *record.shape[1:])
    length = nbytes(record.dtype, shape)
    return [
        Block(block.file, block.start + i * length, length, ((i * tp + rank) * half, *rest), shape) for i in range(2)
    ]


def _same(view: StateView, parts: list[_Part]) -> bool:
    """Tell whether all ranks hold the same bytes of a small tensor."""
    if nbytes(parts[0].record.dtype, parts[0].record.shape) > _SMALL or not math.prod(parts[0].record.shape):
        return not math.prod(parts[0].record.shape)
    blocks = [part.record.blocks[0] for part in parts]
    return len({(view.folder.read(b.file, b.start, b.nbytes), b.strides) for b in blocks}) == 1
