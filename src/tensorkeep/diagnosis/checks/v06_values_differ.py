"""V06 values differ: scaled, drifted, noisy or trained; the evidence says which fits.

What it means
    Tensors differ from the reference in a way that no other check explains. It is an error where one simple operation
    (a factor, an offset) explains a few tensors, or where a few have moved and the rest has not. It is an info where
    they moved as training moves them: most tensors, the same ones in every layer, or by an adapter's low rank.

How it happens
    Partial sums of tensor parallelism were added twice (a factor of 2); an adapter was merged into some layers only;
    an averaged copy (EMA) was taken for the weights; noise; or you simply trained.

How it shows
    Measured: all projections times 0.9, +0.09 of loss; o_proj and down_proj doubled, +3.2; 10 % noise, +0.7.

What to do
    `tensorkeep repair` divides a factor out where it is known beyond rounding. For anything else compare with where the
    checkpoint came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.movement import KEPT, Fit, barely_moved, fit, resembles, structured, trained_further
from tensorkeep.diagnosis.evidence.originals import SMALLEST
from tensorkeep.diagnosis.evidence.remedy import Recipe, Remedies
from tensorkeep.diagnosis.evidence.statistics import rounded
from tensorkeep.diagnosis.evidence.tensor_names import is_norm
from tensorkeep.findings import Finding
from tensorkeep.formats.arrays import np_dtype

CODE = "V06"
_NEAR_POWER = 0.02  # how far training may move the measured factor from the power of two that it is
STRANGE = 0.2  # r below which a tensor among trained ones does not hold the reference's content any more


def check(case: Case) -> Iterator[Finding]:
    """Report the tensors that no other check explained, by the operation that fits them."""
    if case.reference is None:
        return
    names = case.differing(floating=False)
    if not names:
        return
    trained = trained_further(case)
    fits = {n: fit(case, n, closely=not trained) for n in names}
    # the few values of a norm may move alike by chance
    simple = {n: f for n, f in fits.items() if f.simple and not (is_norm(n) and barely_moved(case, n))}
    if trained and len(simple) < 0.5 * len(names):
        simple = {}
    simple |= _outliers(case, {n: f for n, f in fits.items() if n not in simple})
    case.results["fits"] = simple
    for kind, number in dict.fromkeys((f.kind, _short(f)) for f in simple.values()):
        same = {n: f for n, f in simple.items() if (f.kind, _short(f)) == (kind, number)}
        case.claim(same, CODE)
        by = f" by {number:g}" if number is not None else ""
        yield _finding(
            case,
            same,
            "error",
            f"{len(same)} tensors are the reference's with a {kind}{by}",
            case.repair_command(),
        )
    rest = {n: f for n, f in fits.items() if n not in simple}
    lost = {
        n: f
        for n, f in rest.items()
        if not is_norm(n) and (f.kind == "unrelated" or (trained and f.relation.correlation < STRANGE))
    }
    if lost:
        case.claim(lost, CODE)
        yield _finding(case, lost, "error", f"{len(lost)} tensors have nothing to do with the reference's", None)
    rest = {n: f for n, f in rest.items() if n not in lost}
    if rest:
        case.claim(rest, CODE)
        yield _moved(case, rest, trained)


def _short(found: Fit) -> float | None:
    """Return the factor to three digits: tensors of one fault were each rounded on their own."""
    return None if found.number is None else float(f"{found.number:.3g}")


def _outliers(case: Case, fits: Mapping[str, Fit]) -> dict[str, Fit]:
    """Find tensors with a factor of their own among others that were only trained.

    Training does not change the size of one matrix by a fifth and leave the others; and what it changes is not the
    matrix's own direction for the most part. A smaller factor is one where next to nothing else changed, in a tensor of
    many values that stands out among the others.
    """
    scales = {n: f.relation.scale for n, f in fits.items() if not is_norm(n) and f.relation.correlation > KEPT}
    middle = sorted(scales.values())[len(scales) // 2] if scales else 0.0
    if abs(middle - 1) > 0.05:
        return {}
    usual = sorted(abs(s / middle - 1) for s in scales.values())[len(scales) // 2]
    odd = {}
    for name, scale in scales.items():
        apart, found = abs(scale / middle - 1), fits[name].relation
        large = apart > 0.2 and found.correlation > 0.8 and found.residual < 0.5 * apart
        small = apart > max(0.05, 4 * usual) and found.residual < 0.2 * apart
        if large or (small and math.prod(case.tensors[name].shape) >= SMALLEST):
            odd[name] = scale
    return {n: Fit("scale", s, fits[n].relation) for n, s in odd.items()} if len(odd) < 0.5 * len(scales) else {}


def _moved(case: Case, fits: Mapping[str, Fit], trained: bool) -> Finding:
    """Make the finding about tensors that no simple operation explains: an info where training moves them so."""
    kinds = [f.kind for f in fits.values()]
    word = max(dict.fromkeys(kinds), key=kinds.count)
    alike = sum(resembles(f.relation) for f in fits.values()) >= 0.8 * len(fits)
    low_rank = kinds.count("low rank") >= 0.8 * len(fits)
    far = [n for n in fits if not barely_moved(case, n)]
    # gains of norms are large and few: of their training most rounds away, so several that moved are enough
    few = far if len(fits) == 1 else [n for n in far if not is_norm(n)]
    if alike and (trained or low_rank or structured(case, list(fits)) or structured(case, few)):
        return _finding(case, fits, "info", f"{len(fits)} tensors moved as in training ({word})", None)
    return _finding(
        case, fits, "error", f"{len(fits)} tensors differ from the reference ({word}), the others do not", None
    )


def _finding(case: Case, fits: Mapping[str, Fit], severity: str, message: str, fix: str | None) -> Finding:
    """Make a finding with the figures of each tensor."""
    relative = sorted(f.relation.relative for f in fits.values())
    evidence = {
        "median_relative_difference": rounded(relative[len(relative) // 2]),
        "largest_relative_difference": rounded(relative[-1]),
        "kinds": {k: sum(f.kind == k for f in fits.values()) for k in dict.fromkeys(f.kind for f in fits.values())},
        "tensors": {n: f.to_json() for n, f in list(fits.items())[:32]},
    }
    return Finding(CODE, "error" if severity == "error" else "info", message, list(fits), evidence, fix=fix)


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Undo a factor or an offset that is known beyond rounding; anything else is lost."""
    fits: Mapping[str, Any] = case.results.get("fits", {})
    for name in names:
        found = fits.get(name)
        undone = _undone(case, name, found.kind, found.number) if found is not None and found.number else None
        if undone is None:
            out.lose([name], CODE)
            continue
        out.recipes[name] = undone
        out.inverted.add(name)
    if out.inverted:
        out.done[CODE] = f"undid a factor or an offset in {len(out.inverted)} tensors"


def _undone(case: Case, name: str, kind: str, number: float) -> Recipe | None:
    """Return the inverse of a factor or an offset, where it is known beyond rounding; None where it is not.

    It is where the reference's values give the tensor's bits with it, or come within two roundings. A tensor that was
    trained further was measured with its training in the figure, and only a power of two is told apart from it.
    """
    mine, theirs = case.own_pair(name)
    wide, wanted = mine.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(all="ignore"):
        for digits in range(1, 9):
            by = np.float32(f"{number:.{digits}g}")
            made = (theirs.astype(np.float32) * by if kind == "scale" else theirs.astype(np.float32) + by).astype(
                mine.dtype
            )
            if np.array_equal(made, mine):
                return lambda: case.own_pair(name)[1]
        back = wide / number if kind == "scale" else wide - number
        eps = float(ml_dtypes.finfo(np_dtype(case.narrower(name, name))).eps)
        if (np.abs(back - wanted) <= 2 * eps * np.abs(wanted)).all() and not _trained_beside(case):
            return lambda: case.own_pair(name)[1]
        power = float(np.copysign(2.0 ** np.round(np.log2(abs(number))), number))
        if kind == "scale" and abs(number / power - 1) < _NEAR_POWER and power != 1:
            made = (wide / power).astype(mine.dtype)
            if np.array_equal((made.astype(np.float64) * power).astype(mine.dtype), mine):
                return lambda: made
    return None


def _trained_beside(case: Case) -> bool:
    """Say whether tensors that no error explains differ from the reference: the checkpoint was trained further."""
    return any(case.changed(n) and n not in case.results.get("fits", {}) for n in case.shared())
