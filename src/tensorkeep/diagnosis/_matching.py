"""Find the tensors of a checkpoint that are the missing ones: under another name, or fused into one.

Content decides: a tensor that was trained further still resembles the reference's. What content cannot tell apart
(norms, biases) follows the rule by which its neighbours were renamed. What stays open is no match: a tensor of a
missing one's shape may then be it or not, and only its owner knows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.bytewise import bits_equal, elements
from tensorkeep.diagnosis.evidence.case import Array, Case, np_dtype_known
from tensorkeep.diagnosis.evidence.originals import ALIKE, SMALLEST, constant
from tensorkeep.diagnosis.evidence.remedy import Piece
from tensorkeep.diagnosis.evidence.statistics import relation
from tensorkeep.formats.names import natural

_CLEARLY = 0.5  # r of content that was trained far, where nothing else comes near
_ELSEWHERE = 0.3  # r below which nothing else comes near
_MOST_PARTS = 4  # tensors that are fused into one: q, k, v and perhaps a gate


def find_missing(case: Case, missing: Collection[str], extra: Collection[str]) -> dict[str, Piece]:
    """Find missing tensors among those that nothing asks for.

    Args:
        case: The case, with a reference.
        missing: Names that the reference has and the checkpoint lacks.
        extra: Names that the checkpoint has and the reference lacks.

    Returns:
        Where each missing tensor is that was found beyond doubt, by its name.
    """
    missing = {n for n in missing if np_dtype_known(case.reference_tensors[n].dtype)}
    extra = {n for n in extra if np_dtype_known(case.tensors[n].dtype)}
    found = {m: Piece(e) for m, e in _by_content(case, missing, extra).items()}
    found |= {m: Piece(e) for m, e in _by_rule(case, found, missing, extra).items()}
    used = {p.name for p in found.values()}
    return found | _split(case, missing - found.keys(), extra - used)


def may_be(case: Case, missing: Collection[str], shapes: dict[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """Find a tensor that is left out and could be, or hold, or be a part of, a missing one, by the number of elements.

    Args:
        case: The case, with a reference.
        missing: Names that the reference has and the checkpoint lacks.
        shapes: Shapes of the tensors that are to be left out, by name.

    Returns:
        The tensor that is left out and the missing one; None where no such pair is.
    """
    wanted = {m: elements(case.reference_tensors[m]) for m in missing}
    left = {e: math.prod(s) for e, s in shapes.items()}
    for many, one, swapped in ((wanted, left, False), (left, wanted, True)):
        groups: dict[str, list[str]] = {}
        for name in many:
            groups.setdefault(_parent(name), []).append(name)
        for name, count in sorted(one.items()):
            for group in groups.values():
                for names in _adding_up(many, group, count):
                    return (names[0], name) if swapped else (name, names[0])
    return None


def _adding_up(counts: dict[str, int], names: list[str], total: int) -> Iterator[tuple[str, ...]]:
    """Yield the names, few at a time, whose counts add up to a total."""
    few = sorted(names, key=natural)[:64]
    for size in range(1, _MOST_PARTS + 1 if len(few) <= 16 else 2):
        yield from (c for c in itertools.combinations(few, size) if sum(counts[n] for n in c) == total)


def _parent(name: str) -> str:
    """Return the module that holds a tensor's module: `layers.0.attn` for `layers.0.attn.q_proj.weight`."""
    return ".".join(name.split(".")[:-2])


# -- renamed ----------------------------------------------------------------------------------------------------------


def _by_content(case: Case, missing: Iterable[str], extra: Collection[str]) -> dict[str, str]:
    """Find renamed tensors by what they hold: one of the same shape that resembles the reference's, and no other."""
    found: dict[str, str] = {}
    for name in sorted(missing, key=natural):
        shape = case.reference_tensors[name].shape
        alike = [e for e in extra if case.tensors[e].shape == shape and e not in found.values()]
        alike.sort(key=lambda e: (-_common_end(e, name), natural(e)))
        match = _best(case, name, alike)
        if match is not None:
            found[name] = match
    return found


def _best(case: Case, name: str, candidates: list[str]) -> str | None:
    """Return the candidate that holds a missing tensor's content; None where none or several may."""
    theirs = case.reference_values(name)
    if constant(theirs):
        return None
    figures: dict[str, float] = {}
    for other in candidates:
        mine = case.values(other)
        if mine.dtype == theirs.dtype and bits_equal(mine, theirs):
            figures[other] = 1.0
        elif theirs.ndim > 1 and theirs.size >= SMALLEST:
            figures[other] = relation(mine, theirs).correlation
            if figures[other] > ALIKE:  # no other matrix does as well
                return other
    ordered = sorted(figures.items(), key=lambda p: -p[1])
    if not ordered or ordered[0][1] < _CLEARLY or (len(ordered) > 1 and ordered[1][1] > _ELSEWHERE):
        return None
    return ordered[0][0]


def _common_end(a: str, b: str) -> int:
    """Count the segments at the end that two names have in common."""
    pairs = zip(reversed(a.split(".")), reversed(b.split(".")))
    return sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))


def _by_rule(case: Case, found: dict[str, Piece], missing: Collection[str], extra: Collection[str]) -> dict[str, str]:
    """Find more renamed tensors by the rules that the found ones follow, where shapes agree and one name alone fits."""
    rules = {_rule(p.name, m) for m, p in found.items()}
    open_, left = set(missing) - found.keys(), sorted(set(extra) - {p.name for p in found.values()})
    made: dict[str, set[str]] = {}
    for other in left:
        names = {n for before, after in rules for n in _renamed(other, before, after)} & open_
        names = {n for n in names if case.reference_tensors[n].shape == case.tensors[other].shape}
        if len(names) == 1:
            made.setdefault(names.pop(), set()).add(other)
    return {m: others.pop() for m, others in made.items() if len(others) == 1}


def _rule(before: str, after: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which segments became which.

    >>> _rule("a.q_proj.base_layer.weight", "a.q_proj.weight")
    (('base_layer',), ())
    """
    a, b = before.split("."), after.split(".")
    end = min(_common_end(before, after), len(a), len(b))
    a, b = a[: len(a) - end], b[: len(b) - end]
    front = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(a, b)))
    return tuple(a[front:]), tuple(b[front:])


def _renamed(name: str, before: tuple[str, ...], after: tuple[str, ...]) -> Iterator[str]:
    """Yield the names that come of putting `after` for `before` at one place."""
    segments = tuple(name.split("."))
    for at in range(len(segments) - len(before) + 1):
        if segments[at : at + len(before)] == before:
            yield ".".join((*segments[:at], *after, *segments[at + len(before) :]))


# -- fused ------------------------------------------------------------------------------------------------------------


def _split(case: Case, missing: Collection[str], extra: Collection[str]) -> dict[str, Piece]:
    """Find missing tensors whose rows lie one after the other in one tensor of the same module.

    Matrices are recognised by content; biases follow the order of their matrices.
    """
    found: dict[str, Piece] = {}
    orders: dict[str, tuple[str, ...]] = {}  # module of the fused tensor -> modules of its parts, in order
    for other in sorted(extra, key=lambda e: (-len(case.tensors[e].shape), natural(e))):
        module = other.rpartition(".")[0]
        for parts in _orders(case, other, set(missing) - found.keys()):
            modules = tuple(p.rpartition(".")[0] for p in parts)
            if orders.get(module, modules) == modules and (module in orders or _holds(case, other, parts)):
                orders[module] = modules
                at = 0
                for part in parts:
                    rows = case.reference_tensors[part].shape[0]
                    found[part] = Piece(other, (at, at + rows))
                    at += rows
                break
    return found


def _orders(case: Case, other: str, missing: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Yield the missing tensors, in every order, that could be the rows of one of the same parent."""
    shape, last = case.tensors[other].shape, other.rpartition(".")[2]
    if not shape:
        return
    fitting = []
    for name in sorted(missing, key=natural):
        theirs = case.reference_tensors[name].shape
        if _parent(name) == _parent(other) and name.endswith(f".{last}") and theirs[1:] == shape[1:] and theirs:
            fitting.append(name)
    for size in range(2, min(len(fitting), _MOST_PARTS) + 1):
        for parts in itertools.permutations(fitting[:8], size):
            if sum(case.reference_tensors[p].shape[0] for p in parts) == shape[0]:
                yield parts


def _holds(case: Case, other: str, parts: tuple[str, ...]) -> bool:
    """Say whether the rows of a tensor resemble the reference's parts in this order."""
    values = case.values(other)
    if values.ndim < 2:
        return False
    at = 0
    for part in parts:
        theirs = case.reference_values(part)
        if not _alike(values[at : at + len(theirs)], theirs):
            return False
        at += len(theirs)
    return True


def _alike(mine: Array, theirs: Array) -> bool:
    """Say whether rows hold a reference tensor's content, trained further or not."""
    return bool(np.shape(mine) == np.shape(theirs) and relation(mine, theirs).correlation > _CLEARLY)
