"""O01 RoPE layout: rows of q and k are interleaved where half-split is expected, or the other way round.

What it means
    Rotary position embedding (RoPE) turns the rows of a head in pairs. transformers pairs row i with row i + d/2
    (half-split); Meta's code, torchtitan's llama and llama.cpp pair row 2i with row 2i + 1 (interleaved). A converter
    between them has to move the rows of q_proj and k_proj, of their biases, and of norms over their full width.

How it happens
    The move was forgotten, done twice, done in the wrong direction, or done for another size of head.

How it shows
    Not in names or shapes. On a model of 135 M parameters the loss rises by 2.5 where both q and k are wrong and by
    5.9 where one is, and it does not fall along the text.

What to do
    Move the rows back: `tensorkeep repair` does it bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensorkeep.conversion import architecture
from tensorkeep.conversion.naming.rope import partial_rotary
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.rotations import (
    DIRECTIONS,
    OPPOSITE,
    Turn,
    find_turn,
    norm_profile,
    pair_distances,
    part_of,
)
from tensorkeep.diagnosis.evidence.statistics import rounded
from tensorkeep.errors import word
from tensorkeep.findings import Finding

CODE = "O01"
# on SmolLM2 (135 M): 0.02 to 0.03 in the right layout, 0.28 to 0.38 in the other; averaging over all heads and layers
# is what separates the two
WRONG = 0.1
_RATIO = 2.5  # how many times worse the stored layout must fit than the other one
_HEADS_NEEDED = 16  # heads over all layers, below which an average says nothing


def check(case: Case) -> Iterator[Finding]:
    """Report tensors that equal the reference rearranged; without a reference, by the norms of the rows."""
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
    turns |= _following(case, turns)
    case.claim(turns, CODE)
    case.results["turns"] = turns
    yield _finding(case, turns)


def _following(case: Case, turns: Mapping[str, Turn]) -> dict[str, Turn]:
    """Find biases and norms that were turned as the matrix of their layer was, and trained further.

    So few values prove no rearrangement by themselves; here only one is asked about.
    """
    of_part = {(n.rsplit(".", 2)[0], part_of(n)): t for n, t in turns.items() if len(case.tensors[n].shape) > 1}
    out = {}
    for name in case.differing():
        turn = of_part.get((name.rsplit(".", 2)[0], part_of(name)))
        mine, theirs = (v.astype(np.float64) for v in case.pair(name))
        if turn is None or name in turns or mine.ndim != 1 or len(turn.origin) % mine.size:
            continue
        origin = turn.origin[: mine.size]
        if max(origin) < mine.size and np.linalg.norm(mine - theirs[list(origin)]) < 0.5 * np.linalg.norm(
            mine - theirs
        ):
            out[name] = turn._replace(origin=origin, exact=False)
    return out


def _finding(case: Case, turns: Mapping[str, Turn]) -> Finding:
    """Make the finding about tensors that equal the reference rearranged."""
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
    kind = (case.model_config or {}).get("model_type")
    asked = case.names if kind is not None and kind not in architecture.FAMILIES else None
    words = OPPOSITE if asked is not None and asked.rope == "pairs" else DIRECTIONS
    message = f"the rows of {which} in {len(turns)} tensors are {words[to]}; turned back, they are the reference's"
    return Finding(CODE, "error", message, list(turns), evidence, explains=["V06", "O04"], fix=case.repair_command())


def _by_statistics(case: Case) -> Iterator[Finding]:
    """Report q or k of a model whose rows fit the other layout better, by their norms over all layers."""
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
        profiles = [norm_profile(case.values(n), head, rotary) * (case.tensors[n].shape[0] // head) for n in names]
        figures = pair_distances(np.sum(profiles, axis=0) / heads)
        stored, to = figures[""], min(("pairs", "half"), key=figures.__getitem__)
        if stored > WRONG and stored > _RATIO * figures[to]:
            message = (
                f"the rows of {part}_proj are {DIRECTIONS[to]}: paired rows differ by {stored:.2f} in log norm, by "
                f"{figures[to]:.2f} if turned back"
            )
            evidence = {
                "apart": rounded(stored),
                "apart_if_turned_back": rounded(figures[to]),
                "heads": heads,
                "which": part,
                "direction": to,
            }
            fix = f"tensorkeep repair {word(case.path)} OUT --reference REF  # or convert again, with the permutation"
            yield Finding(CODE, "error", message, names, evidence, fix=fix)


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Turn the rows back into the layout that the model computes with."""
    turns = case.results["turns"]
    for name in names:
        back = np.argsort(np.asarray(turns[name].origin))
        out.recipes[name] = lambda name=name, back=back: case.values(name)[back]  # type: ignore[misc]
    out.done[CODE] = f"turned the rows of {len(names)} tensors back"
