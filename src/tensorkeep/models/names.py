"""Every name that a config's model has, in files and in memory, from transformers' own model on the meta device.

One place for what transformers knows of an architecture: which tensors a file holds and which a live model's
`state_dict()`, how one is made of the other (stacked experts, fused or split projections, renamed modules), which names
share a tensor, what is computed and never stored. What is found out is kept beside the Hub cache, by config and by the
versions of transformers, torch and tensorkeep, so that later commands import neither.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tensorkeep.conversion.fit import Offer
from tensorkeep.conversion.model_names import ModelNames
from tensorkeep.conversion.plan import HfTensor, Part, RowPermutation
from tensorkeep.conversion.row_maps import Run, row_count, taken
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import drops, grouped
from tensorkeep.formats.view import StateView
from tensorkeep.storage.hub import cache_folder
from tensorkeep.storage.record import nbytes

_SCHEMA = 6
_LARGEST = 64 << 20  # bytes of a kept answer


def model_names(config: Mapping[str, Any] | None, stored: int | None = None) -> ModelNames:
    """Return what transformers says of a config's model; kept from an earlier call where it was asked before.

    Args:
        config: as config.json has it.
        stored: bytes of the weights beside it, where there are some: a config may not ask for far more.

    Raises:
        TensorkeepError: no config, transformers is not installed, has no such model or refuses the config. The first
            line says which.

    Example:
        >>> model_names({"model_type": "gpt2"}).tied  # doctest: +SKIP
        {'lm_head.weight': 'transformer.wte.weight'}
    """
    if config is None:
        raise TensorkeepError("no config says which model this is", code="C03")
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError):
        raise TensorkeepError("the config is no plain data", where="config", code="C01") from None
    return _found(text, stored)


def known(config: Mapping[str, Any] | None, stored: int | None = None) -> ModelNames | None:
    """Return what transformers says of a config's model; None where it says nothing.

    Args:
        config: as config.json has it.
        stored: bytes of the weights beside it.
    """
    try:
        return model_names(config, stored)
    except TensorkeepError:
        return None


@lru_cache(maxsize=16)
def _found(text: str, stored: int | None) -> ModelNames:
    """Return the answer of an earlier call, or ask transformers and keep what it says."""
    path = _kept_at(text)
    if path is not None and (kept := _read(path)) is not None:
        return kept
    with _garbage_left():
        asking = importlib.import_module("tensorkeep.models.meta_model")  # imports torch and transformers
        found = asking.facts(asking.build(json.loads(text), stored))
    if path is not None:
        _keep(path, found)
    return _names(found)


@contextlib.contextmanager
def _garbage_left() -> Iterator[None]:
    """Look for no garbage: two thousand modules and a model make objects that all stay, and each look goes over all."""
    looking = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looking:
            gc.enable()


def _kept_at(text: str) -> Path | None:
    """Return where the answer for a config is kept; None where the libraries' versions are unknown."""
    try:
        versions = [metadata.version(package) for package in ("transformers", "torch", "tensorkeep")]
    except metadata.PackageNotFoundError:
        return None
    key = hashlib.sha256("\n".join([str(_SCHEMA), *versions, text]).encode()).hexdigest()[:40]
    return cache_folder().parent / "tensorkeep" / "names" / f"{key}.json"


def _read(path: Path) -> ModelNames | None:
    """Return a kept answer; None where there is none, or it cannot be read."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        return _names(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _keep(path: Path, found: Mapping[str, Any]) -> None:
    """Keep an answer; where the folder cannot be written it is asked for again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(path)


def _names(found: Mapping[str, Any]) -> ModelNames:
    """Make the answer from plain data."""
    given = {f.name: found[f.name] for f in fields(ModelNames)}
    for key in ("live", "file"):
        given[key] = {str(n): tuple(int(x) for x in shape) for n, shape in given[key].items()}
    for key in ("saved", "made"):
        given[key] = {str(n): tuple(_run(*r) for r in parts) for n, parts in given[key].items()}
    lists = {key: tuple(given[key]) for key in ("ignored", "computed", "odd", "inward")}
    return ModelNames(**{**given, **lists})


def _run(name: str, rows: Sequence[int] | None, permute: Sequence[Any] | None, turned: bool) -> Run:
    """Make a run from plain data."""
    span = (int(rows[0]), int(rows[1])) if rows is not None else None
    return Run(name, span, RowPermutation(*permute) if permute is not None else None, bool(turned))


# -- tensors from one side to the other --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Translated:
    """Tensors under the other side's names.

    Args:
        tensors: by name, each with the stored parts that it is made of.
        missing: names that the model has and that nothing was found for; a tied one whose partner is there is no gap.
        unexpected: the given names that the model has no place for.
    """

    tensors: dict[str, HfTensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def to_live(
    config: Mapping[str, Any] | None, tensors: Mapping[str, HfTensor], sources: Sequence[StateView]
) -> Translated:
    """Return a checkpoint's tensors as the live model's `state_dict()` has them.

    What transformers' loader would rename, stack, join or split is made of the stored rows, so that it can be streamed:
    nothing is read here. A tied name whose own tensor is not there shares its partner's (`tied_to`).

    Args:
        config: as config.json has it.
        tensors: under hf names, those of files: today's, or older ones that transformers still loads.
        sources: the views that their parts are in.

    Returns:
        The tensors by live name, in the model's order.

    Raises:
        TensorkeepError: transformers does not know the model; K06 where it rearranges a tensor in a way that is not one
            of rows; S01 where a tensor has too few rows.

    Example:
        >>> to_live(config, hub, [view]).tensors["model.layers.0.mlp.experts.gate_up_proj"].shape  # doctest: +SKIP
        (4, 128, 64)
    """
    names = model_names(config)
    shapes = {n: t.shape for n, t in tensors.items()}
    if not names.problem and _of_today(names, shapes):
        made = {n: names.made.get(n, (Run(n),)) for n in names.live if n not in names.live_tied}
        made.update({n: (Run(f),) for n, f in names.tied_as.items() if f in tensors})
        left: list[str] = []
    else:
        made, left = _loaded(config, shapes)
    out: dict[str, HfTensor] = {}
    for name, shape in names.live.items():
        runs = made.get(name)
        if runs and all(r.name in tensors for r in runs):
            out[name] = joined(name, shape, runs, tensors, sources)
    for name, other in names.live_tied.items():
        for one, two in ((name, other), (other, name)):
            if one not in out and two in out:
                out[one] = replace(out[two], name=one, actions=(*out[two].actions, "tie"), tied_to=two)
    ordered = {n: out[n] for n in names.live if n in out}
    return Translated(ordered, tuple(n for n in names.live if n not in out), tuple(left))


def names_for(config: Mapping[str, Any], offers: Mapping[str, Offer]) -> ModelNames | None:
    """Return what transformers says of a config's model, with live tensors made of those of one certain file.

    Args:
        config: as config.json has it.
        offers: the file's tensors by hf name: those of today, or older ones that transformers still loads.

    Returns:
        The names; None where transformers is not installed, has no such model, or cannot say how it loads this file.
    """
    shapes = {n: tuple(o.shape) for n, o in offers.items()}
    try:
        names = model_names(config, sum(nbytes(o.dtype, o.shape) for o in offers.values()))
        if names.problem and not names.odd:
            return None
        return names if _of_today(names, shapes) else replace(names, made=_loaded(config, shapes)[0])
    except TensorkeepError:
        return None


def _of_today(names: ModelNames, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a file has only names that transformers writes today, and its stacks of matrices are not turned."""
    return all(n in names.file or n in names.tied for n in shapes) and all(
        tuple(names.file.get(n, shape)) == tuple(shape) for n, shape in shapes.items() if len(shape) == 3
    )


def _loaded(
    config: Mapping[str, Any] | None, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Ask transformers' loader itself where it would put the tensors of a file."""
    made: dict[str, tuple[Run, ...]]
    with _garbage_left():
        building, asking = (importlib.import_module(f"tensorkeep.models.{m}") for m in ("meta_model", "meta_rows"))
        made, left = asking.loaded(building.build(config), shapes)
    return made, left


def all_live(
    config: Mapping[str, Any], tensors: Mapping[str, HfTensor], sources: Sequence[StateView]
) -> dict[str, HfTensor]:
    """Return a whole checkpoint's tensors as `model.state_dict()` has them, for a file that it loads strictly.

    Args:
        config: as config.json has it.
        tensors: under hf names.
        sources: the views that their parts are in.

    Raises:
        TensorkeepError: K02 where the model has no place for a tensor; and as `to_live` does. What is missing is told
            by the target's own rules.
    """
    if "quantization_config" in config:  # its codes are the model's own names in memory as well
        return dict(tensors)
    found = to_live(config, tensors, sources)
    if found.unexpected:
        what = f"{config.get('model_type')} has no place in memory for {', '.join(grouped(found.unexpected)[:3])}"
        stored = [tensors[n].parts[0].name for n in found.unexpected]
        hint = f"leave them out by name: {drops(stored, [n for v in sources for n in v])}"
        raise TensorkeepError(what, where=sources[0].path, code="K02", tensors=stored, hint=hint)
    return found.tensors


def to_file(
    config: Mapping[str, Any] | None, tensors: Mapping[str, HfTensor], sources: Sequence[StateView]
) -> Translated:
    """Return a checkpoint's tensors as a file that transformers writes has them.

    Args:
        config: as config.json has it.
        tensors: under live names, or names that transformers' loader still takes.
        sources: the views that their parts are in.

    Returns:
        The tensors by the file's name, in the file's order; a tied one that the checkpoint holds itself last.

    Raises:
        TensorkeepError: as `to_live` does.
    """
    names = model_names(config)
    if names.problem:
        raise TensorkeepError(names.problem, code="K06")
    if all(n in names.live for n in tensors):
        live, unexpected = dict(tensors), tuple[str, ...]()
    else:
        found = to_live(config, tensors, sources)
        live, unexpected = {n: t for n, t in found.tensors.items() if "tie" not in t.actions}, found.unexpected
    out = from_live(names, live, sources)
    missing = tuple(n for n in names.file if n not in out)
    return Translated(out, missing, unexpected)


def from_live(names: ModelNames, live: Mapping[str, HfTensor], sources: Sequence[StateView]) -> dict[str, HfTensor]:
    """Return the tensors that a file has, as far as live ones make them up.

    Args:
        names: of the model.
        live: tensors by live name.
        sources: the views that their parts are in.

    Raises:
        TensorkeepError: S01, S04 or K06 where rows do not fit together.
    """
    out: dict[str, HfTensor] = {}
    for name, shape in names.file.items():
        runs = names.saved.get(name, (Run(name),))
        if all(r.name in live for r in runs):
            out[name] = joined(name, shape, runs, live, sources)
    for own, file in names.tied_as.items():
        if own in live:
            out[file] = replace(live[own], name=file, tied_to=None)
            if names.tied[file] not in out:
                out[names.tied[file]] = replace(live[own], name=names.tied[file], tied_to=None)
    return out | {n: live[n] for n in names.unsaved if n in live and not as_computed(names, live[n], sources)}


def as_computed(names: ModelNames, tensor: HfTensor, sources: Sequence[StateView]) -> bool:
    """Say whether a tensor is one that files leave out, and holds what the model computes.

    Args:
        names: of the model.
        tensor: by its live name.
        sources: the views that its parts are in.

    Returns:
        Whether nothing is lost without it.
    """
    part = tensor.parts[0]
    if tensor.name not in names.unsaved or len(tensor.parts) > 1 or not part.plain or part.rows is not None:
        return False
    view = sources[part.source]
    return names.unsaved[tensor.name].get(view[part.name].dtype) == view.digest(part.name)


def joined(
    name: str,
    shape: Sequence[int],
    runs: Sequence[Run],
    tensors: Mapping[str, HfTensor],
    sources: Sequence[StateView],
) -> HfTensor:
    """Return the tensor that runs of others' rows make up.

    Args:
        name: of the tensor.
        shape: that the model says it has; a whole tensor that is only renamed keeps the one that is stored.
        runs: the rows, in order.
        tensors: that they are taken from.
        sources: the views that those are stored in.

    Raises:
        TensorkeepError: S01 where rows are missing, S04 where the tensors have several dtypes, K06 where rows that are
            reordered would be cut apart.
    """
    first = tensors[runs[0].name]
    if runs[0].turned:
        raise TensorkeepError(f"{name} is {first.name} turned: rows of one are columns of the other", code="K06")
    if len(runs) == 1 and runs[0].rows is None and row_count(first.shape) == row_count(shape):
        parts = taken(runs[0], first, sources)
        renamed = replace(first, name=name, parts=parts, tied_to=None)
        return renamed if runs[0].permute is None else replace(renamed, actions=(*first.actions, "permute"))
    if len({tensors[r.name].dtype for r in runs}) > 1:
        raise TensorkeepError(f"{name} is joined from tensors of several dtypes", code="S04")
    for run in runs:
        if len(shape) > 1 and tensors[run.name].shape[-1:] != tuple(shape[-1:]):
            raise TensorkeepError(
                f"{run.name} is {list(tensors[run.name].shape)}; {name}, which is made of it, is {list(shape)}",
                code="S01",
            )
    found: list[Part] = [p for r in runs for p in taken(r, tensors[r.name], sources)]
    turned = ("permute",) if any(r.permute for r in runs) else ()
    actions = (("fuse",) if len(runs) > 1 else ("split",)) + turned
    return HfTensor(name, first.dtype, tuple(shape), tuple(found), actions)
