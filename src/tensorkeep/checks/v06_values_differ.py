"""V06 values differ: scaled, drifted, noisy or trained; the evidence says which fits.

What it is: tensors that differ from the reference and that no other check explains. An error where one simple
operation (a factor, an offset) explains a few tensors, or where a few have moved and the rest has not; an info where
they moved as training moves them: most tensors, the same kinds in every layer, or an adapter's low rank.
How it happens: partial sums of tensor parallelism added twice (x2), an adapter merged into some layers only, an EMA
taken for the weights, noise; or you simply trained.
How it shows: x0.9 on all projections +0.09 of loss, o_proj and down_proj x2 +3.2, 10 % noise +0.7 (measured).
What to do: a factor is divided out by the fix below. Anything else: compare with where the checkpoint came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tensorkeep.case import Case
from tensorkeep.findings import Finding
from tensorkeep.movement import KEPT, Fit, fit, structured, trained_further
from tensorkeep.statistics import rounded
from tensorkeep.words import is_norm

CODE = "V06"


def check(case: Case) -> Iterator[Finding]:
    """What is left, by the operation that fits it."""
    if case.reference is None:
        return
    names = case.differing(floating=False)
    if not names:
        return
    fits = {n: fit(case, n) for n in names}
    simple = {n: f for n, f in fits.items() if f.simple}
    trained = trained_further(case)
    if trained and len(simple) < 0.5 * len(names):
        simple = {n: f for n, f in simple.items() if not is_norm(n) and abs((f.number or 1) - 1) > 0.05 and f.kind == "scale"}
    case.orders["fits"] = simple
    for kind, number in dict.fromkeys((f.kind, rounded(f.number) if f.number is not None else None) for f in simple.values()):
        same = {n: f for n, f in simple.items() if (f.kind, rounded(f.number) if f.number is not None else None) == (kind, number)}
        case.claim(same, CODE)
        by = f" by {number:g}" if number is not None else ""
        yield _finding(case, same, "error", f"{len(same)} tensors are the reference's with a {kind}{by}", f"tensorkeep repair {case.path} OUT --reference {case.reference.path}")
    rest = {n: f for n, f in fits.items() if n not in simple}
    lost = {n: f for n, f in rest.items() if f.kind == "unrelated" and not is_norm(n)}
    if lost:
        case.claim(lost, CODE)
        yield _finding(case, lost, "error", f"{len(lost)} tensors have nothing to do with the reference's", None)
    rest = {n: f for n, f in rest.items() if n not in lost}
    if rest:
        case.claim(rest, CODE)
        yield _moved(case, rest, trained)


def _moved(case: Case, fits: Mapping[str, Fit], trained: bool) -> Finding:
    kinds = [f.kind for f in fits.values()]
    word = max(dict.fromkeys(kinds), key=kinds.count)
    alike = sum(f.relation.correlation > KEPT for f in fits.values()) >= 0.8 * len(fits)
    as_training = alike and (trained or kinds.count("low rank") >= 0.8 * len(fits) or structured(case, list(fits)))
    if as_training:
        return _finding(case, fits, "info", f"{len(fits)} tensors moved as in training ({word})", None)
    return _finding(case, fits, "error", f"{len(fits)} tensors differ from the reference ({word}), the others do not", None)


def _finding(case: Case, fits: Mapping[str, Fit], severity: str, message: str, fix: str | None) -> Finding:
    relative = sorted(f.relation.relative for f in fits.values())
    evidence = {
        "median_relative_difference": rounded(relative[len(relative) // 2]), "largest_relative_difference": rounded(relative[-1]),
        "kinds": {k: sum(f.kind == k for f in fits.values()) for k in dict.fromkeys(f.kind for f in fits.values())},
        "tensors": {n: f.to_json() for n, f in list(fits.items())[:32]},
    }  # fmt: skip
    return Finding(CODE, "error" if severity == "error" else "info", message, list(fits), evidence, fix=fix)
