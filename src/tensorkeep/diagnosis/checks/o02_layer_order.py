"""O02 layer order: layers were swapped, shifted, reversed or sorted as text.

What it means
    Every tensor of a layer holds the content of another layer of the reference.

How it happens
    `sorted()` over names puts layers.10 before layers.2; a program that counts from 1 met one that counts from 0; the
    stages of a pipeline were gathered in the wrong order.

How it shows
    Not in names or shapes. Two neighbouring layers swapped in the middle: +0.1 of loss. Text order or a shift: +9.

What to do
    Put them back: `tensorkeep repair` does it where every layer of the reference is there once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.originals import originals
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.tensor_names import layer_of
from tensorkeep.findings import Finding

CODE = "O02"
_AGREED = 0.8  # part of a layer's differing matrices that must hold one and the same other layer


def check(case: Case) -> Iterator[Finding]:
    """Report layers whose tensors, matched by content, belong to another layer."""
    if case.reference is None:
        return
    layered = [n for n in case.differing() if layer_of(n)]
    votes: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    moved: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in layered:
        stack, layer, _ = _split(name)
        moved[stack, layer].append(name)
    for name, original in originals(case, layered).items():
        stack, layer, kind = _split(name)
        other = layer_of(original.name)
        if other is not None and other[0] == stack and other[2] == kind:
            votes[stack, layer][other[1]] += 1
    holds: dict[str, dict[int, int]] = defaultdict(dict)
    names: list[str] = []
    for (stack, layer), counted in votes.items():
        other_layer, times = counted.most_common(1)[0]
        # norms and biases that were trained cannot be matched by content; they follow their layer
        if (
            times >= 2
            and times >= _AGREED * sum(counted.values())
            and times >= _AGREED * len([n for n in moved[stack, layer] if len(case.tensors[n].shape) > 1])
            and times >= 0.5 * _matrices(case, stack, layer)
        ):
            holds[stack][layer] = other_layer
            names += moved[stack, layer]
    if not names:
        return
    case.claim(names, CODE)
    case.results["layers"] = {stack: dict(found) for stack, found in holds.items()}
    for stack, found in holds.items():
        yield _finding(case, stack, found, [n for n in names if _split(n)[0] == stack])


def _split(name: str) -> tuple[str, int, str]:
    """Split the name of a layer's tensor (see `layer_of`)."""
    found = layer_of(name)
    assert found is not None
    return found


def _matrices(case: Case, stack: str, layer: int) -> int:
    """Count the matrices of a layer."""
    return sum(n.startswith(f"{stack}{layer}.") and len(h.shape) > 1 for n, h in case.tensors.items())


def _finding(case: Case, stack: str, found: Mapping[int, int], names: list[str]) -> Finding:
    """Make the finding about one stack of layers."""
    layers = sorted({_split(n)[1] for n in case.tensors if layer_of(n) and _split(n)[0] == stack})
    order = [found.get(n, n) for n in layers]
    assert case.reference is not None
    lost = sorted(set(layers) - set(order))
    message = f"{len(found)} layers of {stack} hold other layers: {_rule(layers, order)}"
    evidence = {"permutation": order, "stack": stack, "rule": _rule(layers, order), **({"lost": lost} if lost else {})}
    return Finding(CODE, "error", message, names, evidence, explains=["O03", "V06"], fix=case.repair_command())


def _rule(layers: list[int], order: list[int]) -> str:
    """Describe an order of layers in words.

    >>> _rule([0, 1, 2], [2, 1, 0]), _rule([0, 1, 2], [1, 2, 0]), _rule([0, 1, 2, 3], [0, 2, 1, 3])
    ('reversed', 'shifted by 1', 'swapped 1 and 2')
    """
    count = len(layers)
    if order == layers[::-1]:
        return "reversed"
    if order in (text := sorted(layers, key=str), [text.index(n) for n in layers]) and order != layers:
        return "sorted as text (0, 1, 10, 11, 2, ...)"
    shifts = {(b - a) % count for a, b in zip(layers, order)}
    if len(shifts) == 1:
        by = shifts.pop()
        return f"shifted by {by if by <= count // 2 else by - count}"
    changed = [n for n, m in zip(layers, order) if n != m]
    if (
        len(changed) == 2
        and order[layers.index(changed[0])] == changed[1]
        and order[layers.index(changed[1])] == changed[0]
    ):
        return f"swapped {changed[0]} and {changed[1]}"
    if len(changed) == 1:
        return f"layer {changed[0]} is a copy of layer {order[layers.index(changed[0])]}"
    return f"layers {order[:32]}{' ...' if count > 32 else ''}"


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Put every tensor back into its layer; one that was overwritten is lost."""
    for stack, holds in case.results["layers"].items():
        mine = [n for n in names if (at := layer_of(n)) is not None and at[0] == stack]
        places = {content: layer for layer, content in holds.items()}
        for name in mine:
            found = layer_of(name)
            assert found is not None
            _, layer, kind = found
            # a layer that was not overwritten may still be where it was
            at = places.get(layer, layer if layer not in holds else None)
            source = f"{stack}{at}.{kind}" if at is not None else None
            if source is None or source not in case.tensors:
                out.lose([name], CODE)
            else:
                out.recipes[name] = lambda source=source: case.values(source)  # type: ignore[misc]
    out.done[CODE] = f"put {len(names)} tensors back into their layers"
