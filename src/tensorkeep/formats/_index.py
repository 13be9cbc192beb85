"""The index of a sharded checkpoint (`*.index.json`): which file holds which tensor."""

from __future__ import annotations

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import Folder, inside


def read_index(folder: Folder, name: str) -> dict[str, str]:
    """Read an index: tensor name -> file.

    Args:
        folder: where it lies.
        name: the index's name.

    Raises:
        TensorkeepError: F07 where it is none, F06 where a file would lie outside the folder.
    """
    where = f"{folder.url}/{name}"
    document = parse_json(read_small_from(folder, name), where)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise TensorkeepError(
            "has no weight_map from names to files", where=where, code="F07", hint="download the index again"
        )
    return {tensor: inside(file, where) for tensor, file in weight_map.items()}


def check_index(view: StateView, weight_map: dict[str, str], index: str) -> None:
    """Compare index and shards; tensors that the index leaves out are noted.

    Args:
        view: the shards.
        weight_map: what the index says.
        index: the index's name.

    Raises:
        TensorkeepError: F07 where they disagree.
    """
    absent = sorted(n for n in weight_map if n not in view.records)
    if absent:
        raise TensorkeepError(
            f"the index names {len(absent)} tensors that no shard holds, first {absent[0]}",
            where=f"{view.folder.url}/{index}",
            code="F07",
            hint="the shards and the index come from different saves",
        )
    moved = sorted(n for n, f in weight_map.items() if view.records[n].file != f)
    if moved:
        raise TensorkeepError(
            f"the index puts {moved[0]} into {weight_map[moved[0]]}, it lies in {view.records[moved[0]].file}",
            where=f"{view.folder.url}/{index}",
            code="F07",
            hint="the shards and the index come from different saves",
        )
    extra = sorted(n for n in view.records if n not in weight_map)
    if extra:
        view.notes.append(
            Note(
                "F07",
                f"{len(extra)} tensors in the shards are not in the index, first {extra[0]}: "
                "transformers would not load them",
                tuple(extra),
            )
        )
