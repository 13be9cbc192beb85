"""Bring tensors under the names that files have, so that two checkpoints of one model can be compared by name.

`torch.save(model.state_dict())` writes the names and stacks of memory, older files carry names that transformers has
given up since. Both are translated only where that makes more of the names the file's: what is nobody's stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tensorkeep.conversion import architecture
from tensorkeep.conversion.model_names import ModelNames
from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import HfTensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.formats.whole_config import complete
from tensorkeep.models.names import from_live, known, to_file

Tensors = dict[str, HfTensor]


def rearranges(config: Mapping[str, Any] | None) -> bool:
    """Tell whether a config's model may have other names in memory than in files, as far as can be told without asking.

    Args:
        config: as config.json has it.
    """
    kind = (config or {}).get("model_type")
    family = architecture.FAMILIES.get(kind) if isinstance(kind, str) else None
    return isinstance(kind, str) and (family is None or bool(family.experts))


def from_memory(config: Mapping[str, Any] | None, tensors: Tensors, sources: Sequence[StateView]) -> Tensors:
    """Return tensors that a live model's `state_dict()` names, under the names of files.

    Args:
        config: as config.json has it.
        tensors: by name.
        sources: the views that their parts are in.

    Returns:
        The tensors; as they were where their names are not those of memory, or the model is not known.
    """
    names = _known(config, sources)
    if names is None or names.problem or _count(tensors, names.live) <= _count(tensors, names.file):
        return tensors
    try:
        made = from_live(names, {n: t for n, t in tensors.items() if n in names.live}, sources)
    except TensorkeepError:
        return tensors  # what does not fit together is for the checks to say
    rest = {n: t for n, t in tensors.items() if n not in names.live}
    return _better(names, tensors, {**made, **rest})


def as_loaded(config: Mapping[str, Any] | None, tensors: Tensors, sources: Sequence[StateView]) -> Tensors:
    """Return tensors under names that transformers' loader still takes, under the names of files of today.

    Args:
        config: as config.json has it.
        tensors: by name.
        sources: the views that their parts are in.

    Returns:
        The tensors; as they were where the loader would have no place for some of them.
    """
    names = _known(config, sources)
    if names is None or names.problem or all(n in names.file or n in names.tied for n in tensors):
        return tensors
    try:
        found = to_file(complete(config or {}, (c for v in sources for c in v.companions)), tensors, sources)
    except TensorkeepError:
        return tensors
    return tensors if found.unexpected else _better(names, tensors, dict(found.tensors))


def tied_names(config: Mapping[str, Any] | None, tensors: Collection[str]) -> dict[str, str]:
    """Return which names share another's tensor by the config: head -> embedding, one layer's -> another layer's.

    Args:
        config: as config.json has it.
        tensors: names of the checkpoint; where Llama's embedding is among them, its tables say what they know.
    """
    if config is None:
        return {}
    if hf.EMBEDDING not in tensors:
        names = known(config)
        return dict(names.tied) if names is not None else {}
    head = {hf.HEAD: hf.EMBEDDING} if hf.tied(dict(config)) else {}
    names = known(config) if rearranges(config) else None
    return head | {n: other for n, other in (names.tied if names is not None else {}).items() if n != hf.HEAD}


def _better(names: ModelNames, before: Tensors, after: Tensors) -> Tensors:
    """Return the translated tensors where more of the file's names are among them than before, or fewer others."""
    more = _count(after, names.file) - _count(before, names.file)
    return after if more > 0 or (more == 0 and len(after) < len(before)) else before


def _count(tensors: Collection[str], names: Collection[str]) -> int:
    return sum(n in names for n in tensors)


def _known(config: Mapping[str, Any] | None, sources: Sequence[StateView]) -> ModelNames | None:
    """Return what transformers says of the model whose config lies beside one of the sources."""
    if config is None or not rearranges(config):
        return None
    return known(complete(config, (c for v in sources for c in v.companions)), _stored(sources))


def _stored(sources: Sequence[StateView]) -> int:
    """Return the bytes of the largest checkpoint: a config may not ask for far more."""
    return max((sum(r.nbytes for r in v.records.values()) for v in sources), default=0)


def with_tied(tensors: Tensors, other: Collection[str], ties: Mapping[str, str]) -> list[str]:
    """Let a tensor stand for the tied ones that only the other side stores.

    Args:
        tensors: one side's, changed in place.
        other: names of the other side.
        ties: from `tied_names`.

    Returns:
        The names that were added.
    """
    added = [n for n, source in ties.items() if n in other and n not in tensors and source in tensors]
    tensors.update({n: tensors[ties[n]] for n in added})
    return added
