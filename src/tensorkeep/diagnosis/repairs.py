"""Repair a checkpoint: undo the proven causes, write a new one, diagnose it again.

A repair moves the checkpoint's own values: what was turned, exchanged, renamed or fused comes back bit for bit. What a
cause destroyed is taken from the reference only where the caller names it, and never while a tensor that could be the
missing one would be left out. What would be lost is said first, and needs the caller's yes. The broken checkpoint is
never changed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.sink import Result, quiet
from tensorkeep.diagnosis._keeping import losses, words
from tensorkeep.diagnosis._matching import find_missing, may_be
from tensorkeep.diagnosis._remedies import remedies
from tensorkeep.diagnosis.diagnosis import Diagnosis, conclude, diagnose, run_checks
from tensorkeep.diagnosis.evidence import opening
from tensorkeep.diagnosis.evidence.bytewise import elements
from tensorkeep.diagnosis.evidence.case import Array, Case, Target, patterns_for
from tensorkeep.diagnosis.evidence.remedy import Recipe, Remedies
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats import table as formats
from tensorkeep.formats.companions import Companion, travelling
from tensorkeep.formats.names import exactly, grouped, matches
from tensorkeep.formats.view import STREAM_BYTES, StateView
from tensorkeep.storage.files import Progress
from tensorkeep.storage.record import TensorRecord, nbytes

_MOST_TAKEN = 0.5  # part of the elements that may come from the reference: beyond it, use the reference itself


@dataclass
class Repaired:
    """What a repair did.

    `before` and `after` are the diagnoses of the old and the new checkpoint, `done` says in words what was done for
    each code, `taken` names the tensors that came from the reference, `lost` says what of the checkpoint's own values
    is not in the new one, `result` is what the conversion wrote.
    """

    before: Diagnosis
    after: Diagnosis
    done: dict[str, str]
    taken: list[str]
    lost: dict[str, str]
    result: Result


@dataclass(eq=False)
class RepairedView(StateView):
    """A checkpoint as it should have been, in Hugging Face names and layout: tensors as stored or made by recipes."""

    case: Case | None = None
    recipes: dict[str, Recipe] | None = None

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Stream a tensor as it should be: from the file where it is stored so, else made in memory."""
        recipe = (self.recipes or {}).get(name)
        assert self.case is not None
        parts = self.case.tensors[name].parts if recipe is None else ()
        if len(parts) == 1 and parts[0].plain and parts[0].rows is None:  # stored as it is wanted
            yield from self.case.views[0].stream(parts[0].name, rows, granule, chunk)
            return
        values = np.ascontiguousarray(recipe() if recipe is not None else self.case.values(name))
        record = self.records[name]
        row = nbytes(record.dtype, record.shape[1:]) if record.shape else record.nbytes
        first, last = rows or (0, record.shape[0] if record.shape else 1)
        whole = values.reshape(-1).view(np.uint8).data[first * row : last * row]
        step = max(chunk // granule, 1) * granule
        yield from (whole[at : at + step] for at in range(0, len(whole), step))


def repair(
    path: str,
    out: str,
    reference: str,
    target: Target | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    take: Sequence[str] = (),
    yes: bool = False,
) -> Repaired:
    """Write what a broken checkpoint should have been, in its own format and naming.

    Args:
        path: The broken checkpoint; it is not changed.
        out: Where to write the repaired one.
        reference: The checkpoint it came from.
        target: The program that is to load it: "hf", "flame" or "torchtitan".
        overwrite: Replace what is at `out`.
        progress: Called with what is being done, the bytes done and the bytes in all.
        take: Patterns of the tensors and files that may be taken from the reference.
        yes: Go on where values of the checkpoint would be lost.

    Returns:
        What was done, and the diagnoses before and after.

    Raises:
        TensorkeepError: Where there is nothing to repair, where something is lost or ambiguous (it says what is
            needed), or where the result would still have an error. Nothing is left at `out` then.

    Example:
        >>> repair("broken", "mended", "base").after.verdict              # doctest: +SKIP
        'ok'
    """
    before = diagnose(path, reference, target, progress)
    if before.verdict != "findings":
        raise TensorkeepError(
            "nothing to repair: no error was found",
            where=path,
            hint=f"tensorkeep diagnose {word(path)} --reference {word(reference)}",
        )
    case = before.case
    assert case is not None
    plan = remedies(before)
    _refuse(before, plan)
    _find_under_other_names(case, plan)
    _take(case, plan, take)
    lost, view = losses(case, plan), mended(case, plan)
    _rehearse(case, view, plan)
    if lost and not yes:
        raise TensorkeepError(
            f"the repaired checkpoint would lack values of this one; {words(lost)}",
            where=path,
            hint="where nothing of it matters, say so: --yes",
        )
    to = view.format
    naming = case.identity.naming if case.identity is not None and "K06" not in plan.done else "hf"
    root = case.identity.root if case.identity is not None and "K04" not in plan.done and to == "dcp" else None
    made = make_plan([view], to, naming=_named_again(naming), root=root, ask=None)
    result = convert(made, out, to, overwrite=overwrite, progress=progress or quiet)
    return Repaired(before, diagnose(out, reference, target, progress), plan.done, _taken(plan), lost, result)


def _named_again(naming: str | None) -> str | None:
    """The naming of the mended copy: hf where the checkpoint's is only read, or its config was made anew."""
    scheme = namings.module(naming) if naming is not None else None
    return "hf" if hasattr(scheme, "READ_ONLY") or hasattr(scheme, "MAKES_CONFIG") else naming


def _refuse(before: Diagnosis, plan: Remedies) -> None:
    """Raise where a cause has no remedy, saying what it needs instead."""
    if plan.refused:
        code, need = next(iter(plan.refused.items()))
        more = f" ({len(plan.refused) - 1} more: {', '.join(list(plan.refused)[1:])})" if len(plan.refused) > 1 else ""
        raise TensorkeepError(f"cannot be repaired{more}", where=before.checkpoint, code=code, hint=f"it needs {need}")


def _find_under_other_names(case: Case, plan: Remedies) -> None:
    """Plan to rename or split what the checkpoint holds of its missing tensors; refuse where it may and is left out."""
    missing = [n for n in plan.lost if n in case.reference_tensors and n not in case.tensors]
    extra = [n for n in case.tensors if n not in case.reference_tensors and n not in case.tied and n not in case.packed]
    plan.origins = find_missing(case, missing, extra)
    for name, (other, rows) in plan.origins.items():
        plan.recipes[name] = lambda other=other, rows=rows: case.values(other)[slice(*rows or (None,))]  # type: ignore[misc]
        plan.shapes[name] = case.reference_tensors[name].shape
        plan.dropped.add(other)
        del plan.lost[name]
    if plan.origins:
        whole = sum(p.rows is None for p in plan.origins.values())
        split = len(plan.origins) - whole
        what = [f"gave {whole} tensors their names back"] * (whole > 0) + [f"split {split} out of fused ones"] * (
            split > 0
        )
        plan.done["K01"] = " and ".join(what)
    assert case.view is not None
    beside = {s.parts[0].name: case.view[s.parts[0].name].shape for s in case.left_out}
    beside |= {n: case.view[n].shape for n in case.adapter}
    used = {p.name for p in plan.origins.values()}
    shapes = beside | {n: case.tensors[n].shape for n in extra if n not in used}
    doubt = may_be(case, [n for n in missing if n in plan.lost], shapes)
    if doubt is not None:
        other, name = doubt
        stored = case.stored(other)
        raise TensorkeepError(
            f"{name} is missing, and {stored}, which nothing asks for, could be it or hold it",
            where=case.path,
            code="K01",
            tensors=[name, stored],
            hint=f"if it is, save it under its name; if not, leave it out first: {case.convert_command()} "
            f"--drop {shlex.quote(exactly(stored))}",
        )


def _take(case: Case, plan: Remedies, patterns: Sequence[str]) -> None:
    """Plan to take from the reference what the caller named; refuse where more is lost than that."""
    there = {c.name for c in case.reference.companions} if case.reference is not None else set()
    files = {n: "C01" if n == "config.json" else "C02" for n in sorted(plan.companions & there)}
    wanted = {**plan.lost, **plan.elements, **files}
    for pattern in patterns:
        if not any(matches(n, [pattern]) for n in wanted):
            raise TensorkeepError(
                f"--take-from-reference {pattern}: nothing that is lost here is called so",
                where=case.path,
                hint=f"lost: {', '.join(grouped(wanted)[:6])}" if wanted else "leave it out: nothing is lost",
            )
    lacking = [n for n in wanted if n not in case.reference_tensors and n not in files]
    absent = lacking or [n for n in wanted if not matches(n, patterns)]
    if absent:
        named = " ".join(f"--take-from-reference {shlex.quote(p)}" for p in patterns_for(wanted))
        raise TensorkeepError(
            f"what {', '.join(grouped(absent)[:3])} held is lost",
            where=case.path,
            code=wanted[absent[0]],
            hint="it needs the checkpoint before the fault"
            + ("" if lacking else f"; to fill it with the reference's: {named}"),
        )
    _refuse_mixtures(case, plan)
    for name, why in plan.lost.items():
        plan.recipes[name] = lambda name=name: _borrowed(case, name)  # type: ignore[misc]
        plan.shapes[name] = case.reference_tensors[name].shape
        plan.done[why] = f"took {sum(w == why for w in plan.lost.values())} tensors from the reference, as asked"


def _refuse_mixtures(case: Case, plan: Remedies) -> None:
    """Refuse to take most of a model from the reference, or single elements where the others were trained."""
    total = sum(elements(h) for h in case.reference_tensors.values())
    count = sum(elements(case.reference_tensors[n]) for n in plan.lost)
    if count > _MOST_TAKEN * total:
        lost = ", ".join(grouped(plan.lost)[:3])
        code = next(iter(plan.lost.values()))
        raise TensorkeepError(
            f"{count} of {total} values are lost ({lost})", where=case.path, code=code, hint="use the reference itself"
        )
    flipped = [n for n, code in plan.elements.items() if code == "V07"]
    other = [n for n in case.shared() if n not in plan.lost and n not in plan.recipes and case.changed(n)]
    if flipped and other:
        raise TensorkeepError(
            f"which elements of {flipped[0]} were damaged is not known: the checkpoint was trained further "
            f"({other[0]} differs as well)",
            where=case.path,
            code="V07",
            hint="it needs the checkpoint before the fault",
        )


def _taken(plan: Remedies) -> list[str]:
    """Return what came from the reference: tensors, tensors of which it gave elements, and files."""
    return [*plan.lost, *plan.elements, *sorted(plan.companions)]


def _borrowed(case: Case, name: str) -> Array:
    """Return the reference's values, in the checkpoint's dtype where that is to be kept."""
    values = case.reference_values(name)
    return values.astype(case.values(name).dtype) if _stored_like(case, name) else values


def _stored_like(case: Case, name: str) -> bool:
    """Say whether the checkpoint's own dtype for this tensor is to be kept: a plain float of any width."""
    return name in case.tensors and case.tensors[name].dtype in ("F32", "F16", "BF16", "F64")


def mended(case: Case, plan: Remedies) -> RepairedView:
    """Return the repaired checkpoint as a view; nothing is computed before its tensors are read."""
    assert case.view is not None
    names = [n for n in case.tensors if n not in plan.dropped and n not in case.tied]
    names += [n for n in plan.recipes if n not in case.tensors]
    records = {}
    for name in names:
        origin = plan.origins.get(name)
        hub = case.tensors.get(origin.name if origin else name) or case.reference_tensors[name]
        dtype = hub.dtype if name not in plan.lost or _stored_like(case, name) else case.reference_tensors[name].dtype
        records[name] = TensorRecord(name, dtype, plan.shapes.get(name, hub.shape), ())
    companions = [c for c in case.view.companions if c.name not in plan.companions]
    reference = case.reference
    if reference is not None:
        companions += [c for c in travelling(reference.companions) if c.name in plan.companions]
        if "config.json" not in {c.name for c in companions}:
            companions += [c for c in travelling(reference.companions) if c.name == "config.json"]
    config = case.reference_config if "config.json" in plan.companions or case.config is None else case.config
    form = formats.written_again(case.view.format)
    return RepairedView(
        case.view.path,
        form,
        case.view.folder,
        records,
        config,
        [Companion(*c) for c in companions],
        computed=True,
        case=case,
        recipes=plan.recipes,
    )


def _rehearse(case: Case, view: RepairedView, plan: Remedies) -> None:
    """Diagnose the repaired checkpoint before a byte is written; raise where it would still have an error."""
    again = replace(
        case,
        view=view,
        config=view.config,
        tensors={},
        reference_tensors={},
        left_out=[],
        reference_left_out=[],
        tied=frozenset(),
        packed=frozenset(),
        adapter={},
        prefix=None,
        comparisons={},
        broken={},
        claims={},
        results={},
        progress=None,
        target=None if "K04" in plan.done or "K06" in plan.done else case.target,
    )
    opening.compare_sides(again)
    found = conclude(again, *run_checks(again))
    errors = [f for f in found.findings if f.severity == "error" and f.code not in ("K04", "F03", "F08")]
    if errors:
        raise TensorkeepError(
            f"the repair would leave {errors[0].code}: {errors[0].message}",
            where=case.path,
            code=errors[0].code,
            hint="nothing was written; the faults overlap in a way that cannot be undone one by one",
        )
