"""O01 RoPE layout: rows of q and k are interleaved where half-split is expected, or the other way round.

What it is: RoPE turns rows in pairs. transformers pairs row i with row i + d/2 of a head (half-split); Meta's code,
torchtitan's llama and llama.cpp pair 2i with 2i + 1 (interleaved). Every converter between them permutes the rows of
q_proj and k_proj, their biases, and norms over their full width.
How it happens: the permutation was forgotten, done twice, done in the wrong direction, or for another size of head.
How it shows: nothing by name or shape. +2.5 of loss where both q and k are turned, +5.9 where only one is; the loss
does not fall with the position in the text (measured on a 135 M model).
What to do: turn the rows back; the fix below does, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensorkeep.conversion.naming.rope import partial_rotary
from tensorkeep.diagnosis.evidence import architecture
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.rotations import WORDS, Turn, apart, find_turn, pairing, part_of
from tensorkeep.diagnosis.evidence.statistics import rounded
from tensorkeep.findings import Finding

CODE = "O01"
# Measured on one model (facts §2.5): 0.02 to 0.03 in the right layout, 0.28 to 0.38 in the other. Averaging over all
# heads and layers is what separates them.
WRONG = 0.1
_RATIO = 2.5  # how many times worse the stored layout must fit than the other one
_HEADS_NEEDED = 16  # heads over all layers, below which an average says nothing


def check(case: Case) -> Iterator[Finding]:
    """Tensors that equal the reference turned; without one, the layout that the norms of the rows fit."""
    if case.reference is None:
        yield from _by_statistics(case)
        return
    turns: dict[str, Turn] = {}
    for name in case.differing():
        if part_of(name) is not None:
            found = find_turn(name, *case.pair(name), case.model_config)
            if found is not None:
                turns[name] = found
    if not turns:
        return
    case.claim(turns, CODE)
    case.orders["turns"] = turns
    yield _finding(case, turns)


def _finding(case: Case, turns: Mapping[str, Turn]) -> Finding:
    kinds = Counter(t.which or part_of(n) or "" for n, t in turns.items())
    directions, heads = Counter(t.to for t in turns.values()), Counter(t.head for t in turns.values())
    to = directions.most_common(1)[0][0]
    which = " and ".join(sorted(kinds, reverse=True))
    evidence = {
        "which": dict(kinds),
        "direction": dict(directions),
        "head_dim": dict(heads),
        "exact": sum(t.exact for t in turns.values()),
        "rotary": sorted({t.rotary for t in turns.values()}),
    }
    assert case.reference is not None
    return Finding(
        CODE,
        "error",
        f"the rows of {which} in {len(turns)} tensors are {WORDS[to]}; turned back, they are the reference's",
        list(turns),
        evidence,
        explains=["V06", "O04"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}",
    )


def _by_statistics(case: Case) -> Iterator[Finding]:
    config: dict[str, Any] = case.config or {}
    head = architecture.head_dim(config)
    rotary = int(head * partial_rotary(config)) if head else 0
    if rotary < 8 or rotary % 2 or config.get("model_type") not in architecture.FAMILIES:
        return
    for part in ("q", "k"):
        names = [
            n for n, h in case.tensors.items() if part_of(n) == part and len(h.shape) == 2 and h.shape[0] % head == 0
        ]
        names = [n for n in names if n not in case.packed and n not in case.claims]
        heads = sum(case.tensors[n].shape[0] // head for n in names)
        if heads < _HEADS_NEEDED:
            continue
        profiles = [pairing(case.values(n), head, rotary) * (case.tensors[n].shape[0] // head) for n in names]
        figures = apart(np.sum(profiles, axis=0) / heads)
        stored, to = figures[""], min(("pairs", "half"), key=figures.__getitem__)
        if stored > WRONG and stored > _RATIO * figures[to]:
            yield Finding(
                CODE,
                "error",
                f"the rows of {part}_proj are {WORDS[to]}: paired rows differ by {stored:.2f} in log norm, by {figures[to]:.2f} if turned back",
                names,
                {
                    "apart": rounded(stored),
                    "apart_if_turned_back": rounded(figures[to]),
                    "heads": heads,
                    "which": part,
                    "direction": to,
                },
                fix=f"tensorkeep repair {case.path} OUT --reference REF  # or convert again, with the permutation",
            )
