"""Read DeepSpeed's folders: the fp32 master of ZeRO 1, 2 and 3 joined from all ranks, and universal checkpoints.

Each rank keeps its part of flat vectors; the model states say how parameters follow each other in them. Nothing is
copied: a parameter's record names its runs in the ranks' files, and reading it streams them. The moments of the
optimizer are joined in the same way, as `optimizer.state.NAME.exp_avg`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats import layouts, pth
from tensorkeep.formats._joined import Run, Vector, flat_run, get, mapping, placed, record_of, tensor_in, vector
from tensorkeep.formats.names import natural
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.archive import sizes_of
from tensorkeep.storage.files import Folder, LocalFolder
from tensorkeep.storage.pickle_values import Object
from tensorkeep.storage.record import TensorRecord

LOOKS = "DeepSpeed's *_model_states.pt"
CHECKSUMS, ARCHIVED = True, True
_MODEL = re.compile(r"(zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_JOIN = "join them with DeepSpeed's zero_to_fp32.py (it lies beside the folder) or ds_to_universal.py"


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether these are DeepSpeed's files; `single`: they are one file named by the user."""
    if single:
        return _OPTIM.fullmatch(names[0]) is not None
    return any(_MODEL.fullmatch(n) or _OPTIM.fullmatch(n) for n in names) or _universal(folder)


def _universal(folder: Folder) -> bool:
    return isinstance(folder, LocalFolder) and any(folder.path.glob("zero/*/fp32.pt"))


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open a `global_stepN` folder.

    Args:
        folder: where the files lie.
        names: the files in it.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: F02, F04, F05 or F07 where a rank's file is damaged or not there, and without a code where the
            model was split in a way that only DeepSpeed's own programs join.
    """
    if _universal(folder):
        return _read_universal(folder, path)
    optim = sorted((n for n in names if _OPTIM.fullmatch(n)), key=natural)
    models = sorted((n for n in names if _MODEL.fullmatch(n)), key=natural)
    split = layouts.elsewhere(names)
    if split is not None:
        raise TensorkeepError(f"holds {split.what}; they are not joined here", where=path, hint=split.tool)
    if not models:
        if len(names) == 1:  # named alone
            what = "is one rank's part of DeepSpeed ZeRO's flat vectors"
            raise TensorkeepError(what, where=path, hint="name its folder: the ranks are joined")
        raise TensorkeepError(
            "DeepSpeed's *_model_states.pt is not there", where=path, code="F05", hint="copy the checkpoint again"
        )
    ranks = {m[3] for n in models if (m := _MODEL.fullmatch(n))}
    if len(ranks) > 1:
        what = f"DeepSpeed's states of {len(ranks)} model-parallel ranks; they are not joined here"
        raise TensorkeepError(what, where=path, hint="join them with DeepSpeed's ds_to_universal.py, name its output")
    return _read_zero(folder, models, optim, path)


# -- ZeRO ---------------------------------------------------------------------------------------------------------


class _Rank(NamedTuple):
    """One rank's optimizer file: flat fp32 vectors, and the optimizer's tensors of the same sizes."""

    file: str
    groups: list[Run]
    moments: dict[str, list[Run | None]]
    stage: int
    ranks: int
    opaque: set[str]


def _read_zero(folder: Folder, models: list[str], optim: list[str], path: str) -> StateView:
    """Join what the ranks hold."""
    first = pth.open_value(folder, models[0])
    stage = get(first.value, "ds_config", "zero_optimization", "stage")
    if not optim:
        return _half_precision(folder, models, stage, path)
    ranks = [_rank(folder, file) for file in optim]
    _check_ranks(ranks, models, folder.url)
    where = f"{folder.url}/{models[0]}"
    shapes = _shapes(get(first.value, "param_shapes"), where)
    view = StateView(path, "zero", folder, {}, entries=_position(first.value, len(ranks)))
    view.metadata["opaque"] = first.opaque.union(*(rank.opaque for rank in ranks))
    layout = list(_zero3(shapes, ranks) if ranks[0].stage == 3 else _zero2(shapes, ranks, folder.url))
    for name, shape, runs in layout:
        view.records[name] = record_of(name, shape, placed(runs(None)), folder.url)
    _add_kept(view, folder, models, first, ranks[0].stage)
    for what in ranks[0].moments:
        for name, shape, runs in layout:
            found = runs(what)
            if sum(run.elements for run in found) == math.prod(shape):
                stored = f"optimizer.state.{name}.{what}"
                view.records[stored] = record_of(stored, shape, placed(found), folder.url)
    view.metadata["about"] = f"ZeRO-{ranks[0].stage}, {len(ranks)} ranks joined: their fp32 master weights"
    return view


def _rank(folder: Folder, file: str) -> _Rank:
    """Read one rank's optimizer file."""
    where = f"{folder.url}/{file}"
    opened = pth.open_value(folder, file)
    state = get(opened.value, "optimizer_state_dict")
    stage, count = _plain(get(state, "zero_stage")), get(state, "partition_count")
    count = max(count, default=0) if isinstance(count, list) and all(type(n) is int for n in count) else count
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    listed = get(state, key)
    if type(stage) is not int or type(count) is not int or not isinstance(listed, list):
        raise TensorkeepError("holds no flat weights of ZeRO", where=where, code="F07", hint=_JOIN)
    groups = [flat_run(value, f"{key}[{i}]", file, opened, folder) for i, value in enumerate(listed)]
    if any(run is None for run in groups):
        raise TensorkeepError(f"{key} are no flat tensors", where=where, code="F07", hint=_JOIN)
    whole = [run for run in groups if run is not None]
    base = get(state, "optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    states = mapping(get(base, "state"))
    moments: dict[str, list[Run | None]] = {}
    for number, run in enumerate(whole):
        for what, value in mapping(states.get(number)).items():
            found = flat_run(value, str(what), file, opened, folder)
            if found is not None and found.elements == run.elements and isinstance(what, str):
                moments.setdefault(what, [None] * len(whole))[number] = found
    return _Rank(file, whole, moments, stage, count, opened.opaque)


def _plain(value: Any) -> Any:
    """Return the number of an enum's member, or the value itself."""
    return value.args[0] if isinstance(value, Object) and len(value.args) == 1 else value


def _check_ranks(ranks: list[_Rank], models: list[str], where: str) -> None:
    """Raise where ranks are missing or are of different saves."""
    stage, count = ranks[0].stage, ranks[0].ranks
    if any((r.stage, r.ranks) != (stage, count) for r in ranks):
        raise TensorkeepError("the ranks' files are of different saves", where=where, code="F07", hint="copy it again")
    if len(ranks) != count or (stage == 3 and len(models) not in (1, count)):
        there = len(ranks) if len(ranks) != count else len(models)
        raise TensorkeepError(
            f"{there} of {count} ranks' files are there (DeepSpeed ZeRO-{stage})",
            where=where,
            code="F05",
            hint="copy the missing files: each rank holds a part of every weight",
        )
    if len({len(r.groups) for r in ranks}) != 1:
        raise TensorkeepError("the ranks hold different groups", where=where, code="F07", hint="copy it again")


_Shapes = list[dict[str, tuple[int, ...]]]


def _shapes(value: Any, where: str) -> _Shapes:
    """Read the names and sizes of the parameters, group by group."""
    out: _Shapes = []
    for group in value if isinstance(value, list) else [value]:
        held: dict[str, tuple[int, ...]] = {}
        for name, size in mapping(group).items():
            shape = sizes_of(size)
            if not isinstance(name, str) or shape is None:
                raise TensorkeepError(f"param_shapes: {shown(name)}", where=where, code="F07", hint="copy it again")
            held[name] = shape
        out.append(held)
    return out


_Part = tuple[str, tuple[int, ...], Callable[[str | None], list[Run]]]  # name, sizes, runs of a state (None: weights)


def _zero2(shapes: _Shapes, ranks: list[_Rank], where: str) -> Iterator[_Part]:
    """Give name, sizes and runs of each parameter: a group's vector is the ranks' parts one after another."""
    if len(shapes) != len(ranks[0].groups):
        said = f"{len(shapes)} groups of parameters, {len(ranks[0].groups)} flat vectors"
        raise TensorkeepError(said, where=where, code="F07", hint=_JOIN)
    align = 2 * len(ranks)
    for number, group in enumerate(shapes):
        held = sum(rank.groups[number].elements for rank in ranks)
        wanted = sum(math.prod(shape) for shape in group.values())
        if -(-held // align) != -(-wanted // align):
            said = f"the ranks hold {held} elements, the parameters have {wanted}"
            raise TensorkeepError(said, where=where, code="F07", hint=_JOIN)
        vectors = {what: _across(ranks, what, number) for what in (None, *ranks[0].moments)}
        at = 0
        for name, shape in group.items():
            first, last = at, at + math.prod(shape)
            yield name, shape, partial(_cut, vectors, first, last)
            at = last


def _cut(vectors: dict[str | None, Vector], first: int, last: int, what: str | None) -> list[Run]:
    return vectors[what].cut(first, last)


def _across(ranks: list[_Rank], what: str | None, number: int) -> Vector:
    """Return a group's flat tensor, rank after rank; an empty one where a rank lacks it."""
    if what is None:
        return vector([rank.groups[number] for rank in ranks])
    found = [rank.moments[what][number] if what in rank.moments else None for rank in ranks]
    whole = [run for run in found if run is not None]
    return vector(whole if len(whole) == len(ranks) else [])


def _zero3(shapes: _Shapes, ranks: list[_Rank]) -> Iterator[_Part]:
    """Give name, sizes and runs of each parameter: each rank's vectors hold its part of every parameter."""
    vectors = {what: [_along(rank, what) for rank in ranks] for what in (None, *ranks[0].moments)}
    at = 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        elements = math.prod(shape)
        part = -(-elements // len(ranks))  # the last parts are filled up
        yield name, shape, partial(_gather, vectors, at, part, elements)
        at += part


def _along(rank: _Rank, what: str | None) -> Vector:
    """Return a rank's flat tensors, group after group; an empty one where a group lacks it."""
    found: Sequence[Run | None] = rank.groups if what is None else rank.moments.get(what, [])
    whole = [run for run in found if run is not None]
    return vector(whole if len(whole) == len(rank.groups) else [])


def _gather(vectors: dict[str | None, list[Vector]], at: int, part: int, elements: int, what: str | None) -> list[Run]:
    ends = (max(0, min(part, elements - i * part)) for i in range(len(vectors[what])))
    return [run for own, size in zip(vectors[what], ends) for run in own.cut(at, at + size)]


def _add_kept(view: StateView, folder: Folder, models: list[str], first: pth.Opened, stage: int) -> None:
    """Add what is not in the flat vectors: buffers, frozen parameters, names that share a parameter."""
    where = f"{folder.url}/{models[0]}"
    buffers = get(first.value, "buffer_names") or []
    module = mapping(get(first.value, "module"))
    for name in buffers if isinstance(buffers, list) else []:
        if isinstance(name, str) and (found := tensor_in(module.get(name), where)) is not None:
            block = pth.block_of(found, name, models[0], first.places, where)
            view.records[name] = TensorRecord(name, found.dtype, found.shape, (block,))
    frozen = _shapes(get(first.value, "frozen_param_shapes"), where)[0]
    opened = [(models[0], first)]
    if frozen and stage == 3:
        opened += [(file, pth.open_value(folder, file)) for file in models[1:]]
    for name, shape in frozen.items():
        pieces = [_fragment(folder, file, held, name) for file, held in opened]
        runs = vector([run for run in pieces if run is not None]).cut(0, math.prod(shape))
        view.records[name] = record_of(name, shape, placed(runs), folder.url)
    for name, other in mapping(get(first.value, "shared_params")).items():
        if isinstance(name, str) and isinstance(other, str) and other in view.records and name not in view.records:
            shared = view.records[other]
            view.records[name] = TensorRecord(name, shared.dtype, shared.shape, shared.blocks, tied_to=other)


def _fragment(folder: Folder, file: str, opened: pth.Opened, name: str) -> Run | None:
    """Return where a frozen parameter lies, or a rank's part of it."""
    where = f"{folder.url}/{file}"
    found = tensor_in(get(opened.value, "frozen_param_fragments", name), where)
    if found is None:
        return None
    block = pth.block_of(found, name, file, opened.places, where)
    return Run(file, block.start, math.prod(found.shape), found.dtype) if block.strides is None else None


def _position(value: Any, world: int) -> dict[str, Any]:
    """Return how far the training was."""
    said = {"step": get(value, "global_steps"), "samples": get(value, "global_samples")}
    return {"world_size": world, **{k: v for k, v in said.items() if type(v) is int}}


def _half_precision(folder: Folder, models: list[str], stage: object, path: str) -> StateView:
    """Open the module that lies beside the flat vectors, where these are not there."""
    if len(models) > 1 or models[0].startswith("zero_pp_rank"):
        raise TensorkeepError(
            f"DeepSpeed ZeRO-3 without its *_optim_states.pt, which hold the weights of {len(models)} ranks",
            where=path,
            code="F05",
            hint="copy these files too",
        )
    view = pth.open_file(folder, models[0], path)
    view.metadata["about"] = f"the module of {models[0]}, as it trained"
    if stage in (1, 2):
        said = f"no *_optim_states.pt of ZeRO-{stage}: the weights are those that were computed with, not fp32 masters"
        view.notes.append(Note("F05", said))
    return view


# -- universal ----------------------------------------------------------------------------------------------------


def _read_universal(folder: Folder, path: str) -> StateView:
    """Open a universal checkpoint: a folder for each parameter, in it a file for each state."""
    assert isinstance(folder, LocalFolder)
    view = StateView(path, "zero", folder, {})
    view.metadata["about"] = "a universal checkpoint of DeepSpeed: its fp32 weights"
    opaque: set[str] = set()
    later: list[TensorRecord] = []
    for place in sorted((p for p in (folder.path / "zero").iterdir() if p.is_dir()), key=lambda p: natural(p.name)):
        for file in sorted(place.glob("*.pt")):
            inside = f"zero/{place.name}/{file.name}"
            opened = pth.open_value(folder, inside)
            opaque |= opened.opaque
            where = f"{folder.url}/{inside}"
            found = tensor_in(get(opened.value, "param") or opened.value, where)
            if found is None:
                continue
            name = place.name if file.stem == "fp32" else f"optimizer.state.{place.name}.{file.stem}"
            block = pth.block_of(found, name, inside, opened.places, where)
            record = TensorRecord(name, found.dtype, found.shape, (block,))
            if file.stem == "fp32":
                view.records[name] = record
            else:
                later.append(record)
    view.records.update((record.name, record) for record in later)
    view.metadata["opaque"] = opaque
    return view
