"""Ask transformers of which rows of live tensors it makes a file's, and of which rows of a file's the live ones.

Its own conversions are run over tensors of the same rows, one column wide, that hold the numbers of their rows.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from tensorkeep.conversion.model_names import Shapes
from tensorkeep.conversion.row_maps import Run, numbered, row_count, runs, turned_round
from tensorkeep.errors import TensorkeepError
from tensorkeep.models.refusals import refusals, said

Rows = dict[str, tuple[Run, ...]]
_LAYER = re.compile(r"\.(\d+)\.")

# -- live -> file ------------------------------------------------------------------------------------------------------


def as_saved(model: Any, live: Shapes) -> tuple[Shapes, Rows, str]:
    """Return what a file holds of live tensors.

    Args:
        model: from `meta_model.build`.
        live: shapes by live name.

    Returns:
        Shapes by the file's name, of which live rows each is made, and why that cannot be told of some.
    """
    revert = getattr(sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None)
    same: Rows = {n: (Run(n),) for n in live}
    if revert is None:  # transformers 4: names in memory are those in files
        return dict(live), same, ""
    try:
        hollow = {n: torch.empty(s, device="meta") for n, s in live.items()}
        reverted = {n: _one(t) for n, t in revert(model, dict(hollow)).items()}
        shapes = {n: tuple(t.shape) for n, t in reverted.items()}
        owners = {id(t): n for n, t in hollow.items()}  # what is only renamed is the same object
        whole: Rows = {n: (Run(owners[id(t)]),) for n, t in reverted.items() if id(t) in owners}
        moved = set(live) - {runs[0].name for runs in whole.values()}
        first = _first_of_alike(moved, live)
        out, odd = _probed(revert, model, live, [n for n in live if first.get(_layer(n)) == _layer(n)], shapes)
        more = {} if odd else _repeated(out, first, shapes)
        if {*whole, *out, *more} != set(shapes):  # layers that look alike are not saved alike
            more = {}
            out, odd = _probed(revert, model, live, [n for n in live if n in moved], shapes)
    except refusals() as error:
        return dict(live), same, f"transformers cannot say how it saves {type(model).__name__}: {said(error)}"
    every = {**out, **more, **whole}
    told = f"transformers saves {odd[0]} in another arrangement than rows of the model's" if odd else ""
    return shapes, {n: every[n] for n in shapes if n in every}, told


def _probed(revert: Any, model: Any, live: Shapes, names: list[str], shapes: Shapes) -> tuple[Rows, list[str]]:
    """Return the rows that file tensors are made of, among live tensors of some names; and those that are odd."""
    probes = {n: torch.from_numpy(numbered(i, live[n])) for i, n in enumerate(names)}
    made = {n: _one(t) for n, t in revert(model, probes).items()} if probes else {}
    return _described(made, shapes, names, [live[n] for n in names])


def _layer(name: str) -> tuple[str, str]:
    """Return the path of the list that a tensor's layer is in, and the layer's number; empty for no layer."""
    found = _LAYER.search(name)
    return (name[: found.start()], found.group(1)) if found else ("", "")


def _first_of_alike(names: Collection[str], live: Shapes) -> dict[tuple[str, str], tuple[str, str]]:
    """Return for each layer the first one that has the same names and shapes."""
    held: dict[tuple[str, str], set[tuple[str, tuple[int, ...]]]] = {}
    for name in (n for n in live if n in names):
        held.setdefault(_layer(name), set()).add((_LAYER.sub(".", name, count=1), live[name]))
    firsts: dict[frozenset[Any], tuple[str, str]] = {}
    return {layer: firsts.setdefault(frozenset(own), layer) for layer, own in held.items()}


def _repeated(out: Rows, first: Mapping[tuple[str, str], tuple[str, str]], shapes: Shapes) -> Rows:
    """Return for layers that are like another one what was found for that one; only names and shapes that are there."""
    likes: dict[tuple[str, str], list[str]] = {}
    for layer, like in first.items():
        if layer != like:
            likes.setdefault(like, []).append(layer[1])
    made: Rows = {}
    for name, parts in out.items():
        (path, number), *others = {_layer(r.name) for r in parts}
        for other in [] if others else likes.get((path, number), ()):
            new = name.replace(f".{number}.", f".{other}.", 1)
            if new not in out and shapes.get(new) == shapes[name]:
                cut = len(path)
                old, put = f".{number}.", f".{other}."
                made[new] = tuple(r._replace(name=r.name[:cut] + put + r.name[cut + len(old) :]) for r in parts)
    return made


def _one(value: Any) -> torch.Tensor:
    """Return the tensor of a conversion's result, which may be a list of one."""
    found: torch.Tensor = value[0] if isinstance(value, list) else value
    return found


def _described(
    made: Mapping[str, torch.Tensor], shapes: Shapes, names: list[str], origin: list[tuple[int, ...]]
) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Turn converted probes into runs; also the names of those for which that cannot be done."""
    places = {n: i for i, n in enumerate(names)}
    out: dict[str, tuple[Run, ...]] = {}
    odd: list[str] = []
    for name, probe in made.items():
        shape, found = shapes.get(name, ()), None
        thin = shape if len(shape) < 2 else (*shape[:-1], 1)
        if tuple(probe.shape) == thin and probe.numel():
            found = runs(probe.numpy(), names, origin)
            if len(shape) > 1 and any(origin[places[r.name]][-1:] != shape[-1:] for r in found or ()):
                found = None
        elif len(shape) > 1 and tuple(probe.shape) == (*shape[:-2], 1, shape[-1]) and probe.numel():
            (run, *more) = runs(probe.numpy(), names, origin) or (Run(name, (0, 0)),)
            swapped = (*shape[:-2], shape[-1], shape[-2])
            whole = run == Run(run.name) and not more and tuple(origin[places[run.name]]) == swapped
            found = (Run(run.name, turned=True),) if whole else None
        if found is None:
            odd.append(name)
        else:
            out[name] = found
    return out, odd


def inverted(saved: Mapping[str, tuple[Run, ...]], live: Shapes) -> Rows:
    """Return, from the rows that file tensors are made of, those that live tensors are made of.

    Args:
        saved: live rows by the file's name.
        live: shapes by live name.

    Returns:
        The file's rows by live name, for live tensors that they make up whole.
    """
    found: dict[str, list[tuple[int, int, Run]]] = {}
    for name, parts in saved.items():
        if len(parts) == 1 and parts[0] == Run(parts[0].name, turned=parts[0].turned):
            found[parts[0].name] = [(0, row_count(live[parts[0].name]), Run(name, turned=parts[0].turned))]
            continue
        spans = [r.rows or (0, row_count(live[r.name])) for r in parts]
        total, at = sum(last - first for first, last in spans), 0
        for run, (first, last) in zip(parts, spans):
            rows = (at, at + last - first)
            back = Run(name, rows if rows != (0, total) else None, run.permute.inverse() if run.permute else None)
            found.setdefault(run.name, []).append((first, last, back))
            at = rows[1]
    made = {name: turned_round(pieces, row_count(live[name])) for name, pieces in found.items()}
    return {name: parts for name, parts in made.items() if parts is not None}


# -- file -> live, for names that files had before ---------------------------------------------------------------------


def loaded(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Return which rows of a file's tensors transformers' loader makes the live tensors of.

    Args:
        model: from `build`.
        shapes: of the file's tensors, by name.

    Returns:
        The rows by live name, and the file's names that the loader has no place for.

    Raises:
        TensorkeepError: K06 where the loader rearranges them in a way that is not rows.
    """
    library = sys.modules.get("transformers.core_model_loading")
    mapping = sys.modules.get("transformers.conversion_mapping")
    live = model.state_dict()
    if library is None or mapping is None or not hasattr(library, "rename_source_key"):
        return {n: (Run(n),) for n in shapes if n in live}, [n for n in shapes if n not in live]
    try:
        return _load(library, mapping, model, live, shapes)
    except refusals() as error:
        what = f"transformers cannot say how it loads {type(model).__name__}: {said(error)}"
        raise TensorkeepError(what, code="K06") from None


def _load(
    library: Any, mapping: Any, model: Any, live: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Run, ...]], list[str]]:
    """Run transformers' own conversion over numbered rows, as its loader runs it over weights."""
    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, library.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, library.WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    names = sorted(shapes, key=library.dot_natural_key)
    jobs: dict[str, Any] = {}
    out: dict[str, tuple[Run, ...]] = {}
    strangers: list[str] = []
    prefix = model.base_model_prefix
    for number, name in enumerate(names):
        new, pattern = library.rename_source_key(name, renamings, converters, prefix, live)
        if new not in live and name in live:
            new, pattern = library.rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=live)
        if new not in live:
            strangers.append(name)
        elif pattern is None:
            out[new] = (Run(name),)
        else:
            job = jobs.get(new)
            if job is None:
                job = jobs[new] = copy.deepcopy(by_pattern[pattern])
            if not _fits_as_it_is(job, shapes[name], live[new].shape):
                job.add_tensor(new, name, pattern, torch.from_numpy(numbered(number, shapes[name])))
            else:
                out[new] = (Run(name),)
                del jobs[new]
    sizes = [tuple(shapes[n]) for n in names]
    wanted = {n: tuple(t.shape) for n, t in live.items()}
    for new, job in jobs.items():
        made = {n: _one(t) for n, t in job.convert(new, model=model, config=model.config).items()}
        found, odd = _described(made, wanted, names, sizes)
        if odd:
            raise TensorkeepError(f"transformers' loader rearranges {odd[0]}, not by rows alone", code="K06")
        out.update(found)
    return out, strangers


def _fits_as_it_is(job: Any, stored: Sequence[int], live: Sequence[int]) -> bool:
    """Whether a conversion turns a tensor only where its shape asks for it, and this one's does not.

    The conversion looks at shapes, which numbered rows do not have: where it is to turn, it is told to.
    """
    checking = [o for o in job.operations if getattr(o, "check_dims", False)]
    if checking and tuple(stored) == tuple(live):
        return True
    for operation in checking:
        operation.check_dims = False
    return False
