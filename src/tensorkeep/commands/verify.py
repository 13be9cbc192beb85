"""`tensorkeep verify`: whether a checkpoint is complete and undamaged."""

from __future__ import annotations

from pathlib import Path

from tensorkeep.commands.shared import Say
from tensorkeep.findings import EXIT, verdict_of
from tensorkeep.formats import table as formats
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView
from tensorkeep.output import size


def verify(checkpoint: str, /, *, say: Say = Say()) -> int:
    """Check that a checkpoint is complete and undamaged: structure, digests, checksums.

    Digests are compared with those of its certificate, manifest or seal, where one lies beside it; formats with
    checksums of their own are compared with these. Exit code 1 when something is wrong.

    Args:
        checkpoint: A file, a folder or a run.
    """
    from tensorkeep.diagnosis.verification import verify as run

    out = say.output()
    with out.progress() as progress:
        findings, view, certified = run(checkpoint, progress)
    verdict = verdict_of(findings)
    if say.json:
        out.document(
            {
                "checkpoint": checkpoint,
                "verdict": verdict,
                "certificate": certified,
                "tensors": len(view) if view is not None else 0,
                "findings": [f.to_json() for f in findings],
            }
        )
        return EXIT[verdict]
    for finding in findings:
        out.line(f"{finding.severity}: {finding.code} {finding.message}")
        if finding.tensors:
            out.line(f"  {', '.join(grouped(finding.tensors)[:6])}")
        if finding.fix:
            out.line(f"  fix: {finding.fix}")
    if view is None and verdict == "ok":
        out.line(f"ok: every byte is there; {_proven(checkpoint)}")
    elif view is not None and verdict == "ok":
        content = _proven(checkpoint) if certified else _unproven(view)
        out.line(f"ok: {len(view)} tensors, {size(sum(r.nbytes for r in view.values()))}, complete; {content}")
    return EXIT[verdict]


def _proven(checkpoint: str) -> str:
    place = Path(checkpoint)
    if (place / "manifest.json").is_file() or (place / "checkpoints").is_dir():
        return "every digest is the manifest's"
    from tensorkeep.formats.saves import saves_in
    from tensorkeep.formats.seals import is_sealed

    sealed = "://" not in checkpoint and any(is_sealed(save.path) for save in saves_in(checkpoint))
    return f"every digest is the {'seal' if sealed else 'certificate'}'s"


def _unproven(view: StateView) -> str:
    if formats.fact(view.format, "CHECKSUMS"):
        return "every byte fits the file's own CRC-32 (no certificate)"
    return "no certificate, so the values themselves cannot be checked"
