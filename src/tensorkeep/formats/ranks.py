"""Join files of which each holds one rank's parts of DTensors: verl's, and those of `torch_checkpointing`.

Every rank saves its own state dict with torch.save. A DTensor says how the whole was cut, so that the ranks' parts are
put together here without torch; a plain tensor is the same on every rank, and the first one's is taken.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import pth
from tensorkeep.formats._cover import overlapping
from tensorkeep.formats.companions import find_companions
from tensorkeep.formats.view import StateView
from tensorkeep.storage.archive import Stored
from tensorkeep.storage.dtensors import Part, place
from tensorkeep.storage.files import Folder, LocalFolder
from tensorkeep.storage.record import Block, TensorRecord
from tensorkeep.storage.state_dicts import iter_tensors

LOOKS = "a file for each rank (model_world_size_8_rank_0.pt)"
CHECKSUMS, ARCHIVED = True, True
_MANIFEST = "metadata.pkl"  # of torch_checkpointing
# the item that a file holds, and the rank; items under the name that a view gives them
_NUMBERED = re.compile(r"(?P<item>model|optim)_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt")
_BY_ITEM = re.compile(r"(?P<item>[A-Za-z]\w*?)_(?P<rank>\d+)\.pt")
_ITEMS = {"model": "", "optim": "optimizer."}


class _File(NamedTuple):
    name: str
    item: str
    rank: int


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether each of these files is one rank's; `single`: they are one file named by the user."""
    if single:
        return False
    return any(_NUMBERED.fullmatch(n) for n in names) or (_MANIFEST in names and "model_0.pt" in names)


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open the ranks' files as one checkpoint.

    Args:
        folder: where they lie.
        names: the files in it.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: F05 where a rank's file is missing, F07 where the ranks contradict each other, and without a
            code where a tensor was cut in a way that is not followed here.
    """
    form = _BY_ITEM if _MANIFEST in names else _NUMBERED
    found = [(n, m) for n in names if (m := form.fullmatch(n))]
    files = [_File(n, m["item"], int(m["rank"][:9])) for n, m in found]
    worlds = {int(m["world"][:9]) for _, m in found} if form is _NUMBERED else set()
    view = StateView(path, "ranks", folder, {}, metadata={"opaque": set()})
    for item in sorted({f.item for f in files}, key=lambda i: (i != "model", i)):
        own = sorted((f for f in files if f.item == item), key=lambda f: f.rank)
        _read_item(view, own, _ITEMS.get(item, f"{item}."), max(worlds, default=0))
    if isinstance(folder, LocalFolder) and (folder.path / "huggingface").is_dir():
        view.companions += find_companions(LocalFolder(folder.path / "huggingface"), [], described=True)
    count = max((f.rank for f in files if f.item == "model"), default=0) + 1
    view.metadata["files"] = {f.name for f in files}
    view.metadata["about"] = f"{count} ranks joined"
    view.entries.setdefault("world_size", count)
    return view


def _read_item(view: StateView, files: list[_File], prefix: str, world: int) -> None:
    """Join the files of one item (model, optimizer, ...) and put what they hold into the view."""
    blocks: dict[str, list[Block]] = {}
    whole: dict[str, TensorRecord] = {}
    ranks = 0
    for file in files:
        where = f"{view.folder.url}/{file.name}"
        opened = pth.open_value(view.folder, file.name)
        view.metadata["opaque"].update(opened.opaque)
        for name, item in iter_tensors(opened.value, where, prefix.rstrip(".") if not prefix else prefix[:-1]):
            stored = item.local if isinstance(item, Part) else item
            if not isinstance(stored, Stored):
                view.entries.setdefault(name, item)
                continue
            shape = item.shape if isinstance(item, Part) else stored.shape
            known = whole.setdefault(name, TensorRecord(name, stored.dtype, shape, ()))
            if (known.dtype, known.shape) != (stored.dtype, shape):
                raise _differ(name, where)
            block = pth.block_of(stored, name, file.name, opened.places, where)
            if not isinstance(item, Part):
                blocks.setdefault(name, [block])
                continue
            ranks = max(ranks, math.prod(item.mesh))
            at = place(item, file.rank, where)
            if at is not None:
                blocks.setdefault(name, []).append(block._replace(offsets=at[0], shape=at[1]))
    _check_count(view, files, max(world, ranks))
    for name, record in whole.items():
        held = [b for b in blocks.get(name, []) if math.prod(b.shape)]
        if sum(math.prod(b.shape) for b in held) != record.elements or overlapping(held):
            raise _differ(name, view.folder.url)
        view.records[name] = TensorRecord(name, record.dtype, record.shape, tuple(held))


def _check_count(view: StateView, files: list[_File], wanted: int) -> None:
    """Raise F05 where a rank's file is not there."""
    missing = sorted(set(range(wanted)) - {f.rank for f in files})
    if missing:
        raise TensorkeepError(
            f"{files[0].item}: {len(files)} of {wanted} ranks' files are there, rank {missing[0]} is not",
            where=view.folder.url,
            code="F05",
            hint="copy the missing files: each rank holds a part of every weight",
        )


def _differ(name: str, where: Any) -> TensorkeepError:
    return TensorkeepError(
        f"{name}: the ranks' parts are not one whole tensor",
        where=where,
        code="F07",
        hint="the ranks' files are of different saves; copy the checkpoint again",
        tensors=[name],
    )
