"""The remedies of a diagnosis: each proven cause is undone by its own check, in the order in which causes speak."""

from __future__ import annotations

from tensorkeep.diagnosis import checks
from tensorkeep.diagnosis.diagnosis import Diagnosis
from tensorkeep.diagnosis.evidence.remedy import Remedies


def remedies(diagnosis: Diagnosis) -> Remedies:
    """Return the inverse of every error of a diagnosis that was made with a reference."""
    case = diagnosis.case
    assert case is not None
    out = Remedies()
    for finding in diagnosis.findings:
        code = finding.code
        check = checks.module(code)
        if finding.severity != "error" or (code not in diagnosis.causes and not hasattr(check, "ALWAYS")):
            continue
        if hasattr(check, "repair"):
            check.repair(case, list(finding.tensors), out)
        else:
            out.refused[code] = getattr(check, "NEEDS", None) or finding.fix or f"see: tensorkeep explain {code}"
    return out
