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
    `tensorkeep repair` divides a factor out. For anything else compare with where the checkpoint came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.movement import KEPT, Fit, fit, structured, trained_further
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.statistics import rounded
from tensorkeep.diagnosis.evidence.tensor_names import is_norm
from tensorkeep.findings import Finding
from tensorkeep.formats.arrays import np_dtype

CODE = "V06"
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
    simple = {n: f for n, f in fits.items() if f.simple}
    if trained and len(simple) < 0.5 * len(names):
        simple = _outliers(fits)
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


def _outliers(fits: Mapping[str, Fit]) -> dict[str, Fit]:
    """Find tensors with a factor of their own among others that were only trained.

    Training does not change the size of one matrix by a fifth and leave the others.
    """
    scales = {n: f.relation.scale for n, f in fits.items() if not is_norm(n) and f.relation.correlation > KEPT}
    if not scales or abs(sorted(scales.values())[len(scales) // 2] - 1) > 0.05:
        return {}
    odd = {n: s for n, s in scales.items() if abs(s - 1) > 0.2 and fits[n].relation.correlation > 0.8}
    return {n: Fit("scale", s, fits[n].relation) for n, s in odd.items()} if len(odd) < 0.5 * len(scales) else {}


def _moved(case: Case, fits: Mapping[str, Fit], trained: bool) -> Finding:
    """Make the finding about tensors that no simple operation explains: an info where training moves them so."""
    kinds = [f.kind for f in fits.values()]
    word = max(dict.fromkeys(kinds), key=kinds.count)
    alike = sum(f.relation.correlation > KEPT for f in fits.values()) >= 0.8 * len(fits)
    as_training = alike and (trained or kinds.count("low rank") >= 0.8 * len(fits) or structured(case, list(fits)))
    if as_training:
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
    """Divide a factor out, or take an offset off; anything else is lost."""
    fits: Mapping[str, Any] = case.results.get("fits", {})
    for name in names:
        found = fits.get(name)
        if found is None or found.kind not in ("scale", "offset") or not found.number:
            out.lose([name], CODE)
            continue
        out.recipes[name] = lambda name=name, found=found: _unscaled(case, name, found.kind, found.number)  # type: ignore[misc]
    out.done[CODE] = "divided a factor out"


def _unscaled(case: Case, name: str, kind: str, number: float) -> Array:
    """Undo a factor or an offset; return the reference's own values where they are that up to rounding."""
    mine = case.values(name)
    wide = mine.astype(np.float64)
    made: Array = (wide / number if kind == "scale" else wide - number).astype(np_dtype(case.tensors[name].dtype))
    theirs = case.reference_values(name).astype(mine.dtype)
    close = (
        np.abs(made.astype(np.float64) - theirs.astype(np.float64))
        <= 2.0**-7 * np.abs(theirs.astype(np.float64)) + 1e-30
    )
    return theirs if bool(close.all()) else made
