"""V02 precision lost: the values went through fp16, bf16, fp8 or a quantized form and back.

What it means
    Every value is one that a narrower type can hold, or an 8- or 4-bit code times a factor, although the file stores
    a wider type and the reference has other values. Values that were trained and merely round to the reference's are
    none of this: nothing was lost there.

How it happens
    A tool "saved memory" on the way; a quantized model was dequantized and saved as the original; a cast to fp8
    dropped its scales.

How it shows
    Hardly in the loss (bf16 and fp16 +0.00, fp8 e4m3 +0.06, e5m2 +0.32), and not at all in names, shapes and dtypes;
    but training starts from a worse place.

What to do
    Convert again from the original. The lost bits are not in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tensorkeep.diagnosis.checks.s04_dtype_differs import lossy
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.casts import BY_ROW, GRIDS, Cast, find_cast, lies_on
from tensorkeep.diagnosis.evidence.originals import ALIKE, SMALLEST, relation_of
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

CODE = "V02"
_FEW = 64  # values that do not lie on a narrow grid by chance


def check(case: Case) -> Iterator[Finding]:
    """Report the narrower format that tensors went through, and how many values overflowed or vanished in it."""
    if case.reference is None:
        yield from _alone(case)
        return
    found: dict[str, Cast] = {}
    for name in case.differing():
        through = _encoded(case, name) or find_cast(*case.own_pair(name))
        if through is not None:
            found[name] = through
    found |= _following(case, found)
    for name in case.shared():
        compared = case.comparisons.get(name)
        if compared is None or name in case.claims or name in found:
            continue
        cast = compared.status == "cast" and lossy(case, name)
        if cast or _stored_narrower(case, name):
            stored = f"{DTYPES[case.tensors[name].dtype].torch}, and stored so"
            found[name] = Cast(stored, compared.overflowed, compared.vanished, cast)
    for grid in dict.fromkeys(p.grid for p in found.values()):
        names = [n for n, p in found.items() if p.grid == grid]
        case.claim(names, CODE)
        overflowed, vanished = sum(found[n].overflowed for n in names), sum(found[n].vanished for n in names)
        known = grid.startswith("GGUF")
        message = f"{len(names)} tensors went through {grid}: {overflowed} values overflowed, {vanished} became zero"
        evidence = {
            "grid": grid,
            "overflowed": overflowed,
            "vanished": vanished,
            "exact": all(found[n].exact for n in names),
        }
        yield Finding(CODE, "info" if known else "error", message, names, evidence, explains=["V06"])


def _stored_narrower(case: Case, name: str) -> bool:
    """Say whether a trained tensor is stored in an 8-bit float, without scales, where the reference is wider."""
    mine, theirs = (DTYPES[t[name].dtype] for t in (case.tensors, case.reference_tensors))
    if not (mine.floating and mine.bits == 8 and theirs.floating and theirs.bits >= 16 and case.changed(name)):
        return False
    return case.values(name).size >= SMALLEST and relation_of(case, name).correlation > ALIKE


def _following(case: Case, found: Mapping[str, Cast]) -> dict[str, Cast]:
    """Find tensors on a grid that others went through, where their training hides it or their few values alone would.

    Of a tensor that was trained the reference cannot tell what it was before the rounding; its own values can.
    """
    grids = dict.fromkeys(c.grid for c in found.values() if c.grid in (*GRIDS, BY_ROW))
    out = {}
    for name in case.differing() if grids else ():
        values = case.values(name)
        if name not in found and values.size >= _FEW:
            through = next((g for g in grids if lies_on(values, g)), None)
            if through is not None:
                out[name] = Cast(through, 0, 0, False)
    return out


def _encoded(case: Case, name: str) -> Cast | None:
    """Return the GGUF encoding in which either side stores a tensor: its precision was given up openly.

    None where the tensor does not resemble the reference's: no encoding in use takes that much away.
    """
    if case.values(name).size >= SMALLEST and relation_of(case, name).correlation < ALIKE:
        return None
    for hubs, view in ((case.tensors, case.views[0]), (case.reference_tensors, case.views[1])):
        encoding = view[hubs[name].parts[0].name].encoding
        if encoding != "plain":
            return Cast(f"GGUF's {encoding}", 0, 0, False)
    return None


def _alone(case: Case) -> Iterator[Finding]:
    """Report tensors whose values all lie on the grid of an 8-bit float, without a reference."""
    grids: dict[str, list[str]] = {}
    for name, seen in scan(case).items():
        if seen.grid is not None and name not in case.claims:
            grids.setdefault(seen.grid, []).append(name)
    for grid, names in grids.items():
        case.claim(names, CODE)
        message = f"all values of {len(names)} tensors lie on the grid of {grid}, without scales"
        yield Finding(CODE, "error", message, names, {"grid": grid})


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """What was destroyed is lost."""
    out.lose(names, CODE)
