"""`tensorkeep diagnose`: what is wrong with a checkpoint, proven and shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, known_loader
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped
from tensorkeep.output import Output

if TYPE_CHECKING:
    from tensorkeep.diagnosis.diagnosis import Diagnosis


def diagnose(
    checkpoint: str,
    /,
    *,
    reference: str | None = None,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    forward: Flag = False,
    text: str | None = None,
    say: Say = Say(),
) -> int:
    """Name what is wrong with a checkpoint, with proof, and say what to do.

    Exit code 0 when nothing is wrong, 1 with findings, 3 when a check that matters could not run.

    Args:
        checkpoint: A file, a folder, a Hub model id or a URL.
        reference: The checkpoint that it should equal or was trained from, in any format and naming.
        for_: The program that is to load it: {loaders} (hf is transformers).
        forward: Also load the model and measure its loss on a text (needs the [language] extra).
        text: The text file for --forward.
    """
    from tensorkeep.diagnosis.diagnosis import diagnose as run

    out = say.output()
    known_loader(for_)
    if forward and text is None:
        raise TensorkeepError(
            "--forward needs a text", hint=f"tensorkeep diagnose {word(checkpoint)} --forward --text FILE"
        )
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
    from tensorkeep.diagnosis.checks import l01_loss_too_high
    from tensorkeep.diagnosis.diagnosis import conclude
    from tensorkeep.diagnosis.live.forward import measure
    from tensorkeep.errors import Inconclusive

    case = found.case
    assert case is not None
    open_before = any(f.evidence.get("inconclusive") for f in found.findings)
    if case.view is None or case.read_error is not None:
        return found
    try:
        case.forward = measure(case.view, text, case.reference)
    except Inconclusive as why:
        note = Finding("L01", "info", f"could not be decided: {why.reason}", evidence={"inconclusive": True})
        return conclude(case, [*found.findings, note], True)
    return conclude(case, [*found.findings, *l01_loss_too_high.check(case)], open_before, case.forward.to_json())


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
    from tensorkeep.diagnosis.checks import title

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
