"""The commands of diagnosis: diagnose, explain, repair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from tensorkeep.commands.checkpoint import Say
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped
from tensorkeep.output import Output, size

if TYPE_CHECKING:
    from tensorkeep.diagnose.diagnosis import Diagnosis


def diagnose(
    checkpoint: str,
    /,
    *,
    reference: str | None = None,
    for_: Annotated[Literal["hf", "flame", "torchtitan"] | None, Parameter(name="--for")] = None,
    forward: Annotated[bool, Parameter(negative="")] = False,
    text: str | None = None,
    say: Say = Say(),
) -> int:
    """Name what is wrong with a checkpoint, with proof, and say what to do.

    Exit code 0 when nothing is wrong, 1 with findings, 3 when a check that matters could not run.

    Parameters
    ----------
    checkpoint
        A file, a folder, a Hub model id or a URL.
    reference
        The checkpoint it should equal, or was trained from; any format, any naming.
    for_
        The loader it is meant for: hf (transformers), flame or torchtitan.
    forward
        Also load the model and measure its loss on a text (needs the [language] extra).
    text
        The text file for --forward.
    """
    from tensorkeep.diagnose.diagnosis import diagnose as run

    out = say.output()
    if forward and text is None:
        raise TensorkeepError("--forward needs a text", hint=f"tensorkeep diagnose {checkpoint} --forward --text FILE")
    with out.progress() as progress:
        found = run(checkpoint, reference, for_, progress)
        if forward:
            found = _with_forward(found, Path(str(text)))
    if say.json:
        out.document(found.to_json())
    else:
        show(out, found)
    return found.exit_code


def _with_forward(found: Diagnosis, text: Path) -> Diagnosis:
    """The same diagnosis with what one forward over the text shows, and L01's findings about it."""
    from tensorkeep.diagnose.checks import l01_loss_too_high
    from tensorkeep.diagnose.diagnosis import judge
    from tensorkeep.diagnose.evidence.case import Inconclusive
    from tensorkeep.diagnose.live.forward import measure

    case = found.case
    assert case is not None
    open_before = any(f.evidence.get("inconclusive") for f in found.findings)
    if case.view is None or case.read_error is not None:
        return found
    try:
        case.forward = measure(case.view, text, case.reference)
    except Inconclusive as why:
        note = Finding("L01", "info", f"could not be decided: {why.reason}", evidence={"inconclusive": True})
        return judge(case, [*found.findings, note], True)
    return judge(case, [*found.findings, *l01_loss_too_high.check(case)], open_before, case.forward.to_json())


def show(out: Output, found: Diagnosis) -> None:
    """A diagnosis for people: the table of parameters, then findings, causes first."""
    mine, theirs = found.totals.get("checkpoint"), found.totals.get("reference")
    difference = "-" if mine is None or theirs is None else f"{mine - theirs:+,}" if mine != theirs else "0"
    cells = [["-" if n is None else f"{n:,}" for n in (theirs, mine)]]
    out.table(
        ["parameters in the reference", "in the checkpoint", "difference"],
        [[*cells[0], difference]],
        right=["parameters in the reference", "in the checkpoint", "difference"],
    )
    for finding in found.findings:
        _show_finding(out, finding, found.causes)
    if found.forward:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in found.forward.items() if isinstance(v, (int, float)))
        out.line(f"forward: {figures}")
    words = {
        "ok": "ok: no error found",
        "findings": f"causes: {', '.join(found.causes)}",
        "inconclusive": "inconclusive: see what could not be decided above",
    }
    out.line(words[found.verdict])
    if found.causes:
        out.remark(f"more: tensorkeep explain {found.causes[0]}")


def _show_finding(out: Output, finding: Finding, causes: Sequence[str]) -> None:
    from tensorkeep.diagnose.checks import title

    mark = "cause" if finding.code in causes and finding.severity == "error" else finding.severity
    out.line(f"{mark}: {finding.code} {title(finding.code)}: {finding.message}")
    groups = grouped(finding.tensors)
    for group in groups[:6]:
        out.line(f"  {group}")
    if len(groups) > 6:
        out.line(f"  and {len(groups) - 6} more groups ({len(finding.tensors)} tensors in all)")
    near = finding.evidence.get("near")
    for name, others in list(near.items())[:4] if isinstance(near, dict) else ():
        out.line(f"  {name}: near {', '.join(others)}")
    if finding.fix and finding.severity != "info":
        out.line(f"  fix: {finding.fix}")


def explain(code: str, /, *, say: Say = Say()) -> int:
    """What a finding code means: how it happens, how it shows, what to do.

    Parameters
    ----------
    code
        A code such as K04 or O01.
    """
    from tensorkeep.diagnose.checks import explain as page

    out = say.output()
    text = page(code)
    if say.json:
        out.document({"code": code.upper(), "title": text.splitlines()[0], "text": text})
    out.line(text)
    return 0


def repair(
    checkpoint: str,
    out: str,
    /,
    *,
    reference: str,
    for_: Annotated[Literal["hf", "flame", "torchtitan"] | None, Parameter(name="--for")] = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    say: Say = Say(),
) -> int:
    """Undo the causes that a diagnosis proves, write a new checkpoint, and diagnose that.

    Refuses what is ambiguous or lost, and says what it needs. The broken checkpoint stays as it is.

    Parameters
    ----------
    checkpoint
        The broken checkpoint.
    out
        The new one: a folder, or a file for a checkpoint that is one.
    reference
        The checkpoint that it should equal, or was trained from.
    for_
        The loader it is meant for.
    overwrite
        Replace an existing sink, once the new one is proven.
    """
    from tensorkeep.diagnose.repair import repair as run

    output = say.output()
    with output.progress() as progress:
        made = run(checkpoint, out, reference, for_, overwrite, progress)
    if say.json:
        output.document({
            "checkpoint": checkpoint, "sink": made.result.path, "reference": reference, "causes": made.before.causes, "done": made.done,
            "taken_from_reference": made.taken, "tensors": len(made.result.digests), "bytes": made.result.nbytes, "after": made.after.to_json(),
        })  # fmt: skip
        return made.after.exit_code
    for code, what in made.done.items():
        output.line(f"undone: {code} ({what})")
    if made.taken:
        output.line(f"from the reference: {', '.join(grouped(made.taken)[:6])}")
    output.line(
        f"{made.result.path}: {len(made.result.digests)} tensors, {size(made.result.nbytes)}, proven; diagnosed again: {made.after.verdict}"
    )
    return made.after.exit_code
