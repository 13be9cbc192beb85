"""A finding: one fact that a check proved about a checkpoint or a model, with its code, evidence and fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
Verdict = Literal["ok", "findings", "inconclusive"]


@dataclass
class Finding:
    """One fact that a check proved.

    Attributes:
        code: e.g. "F03"; `tensorkeep explain CODE` says what it means.
        severity: "error", "warning" or "info".
        message: one sentence.
        tensors: names of the tensors concerned.
        evidence: the numbers behind it.
        explains: codes of other findings that follow from this one.
        fix: a command to paste, or None.
    """

    code: str
    severity: Severity
    message: str
    tensors: Sequence[str] = ()
    evidence: dict[str, Any] = field(default_factory=dict)
    explains: Sequence[str] = ()
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the finding as a document for `--json`."""
        return {
            "code": self.code,
            "severity": self.severity,
            "tensors": list(self.tensors),
            "count": len(self.tensors),
            "message": self.message,
            "evidence": self.evidence,
            "explains": list(self.explains),
            "fix": self.fix,
        }


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    Args:
        number: how many.
        noun: in the singular.

    Example:
        >>> counted(1, "tensor"), counted(2, "tensor")
        ('1 tensor', '2 tensors')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def verdict_of(findings: Sequence[Finding], inconclusive: bool = False) -> Verdict:
    """Sum findings up in one word.

    Args:
        findings: what the checks found.
        inconclusive: whether a check that matters could not run.

    Returns:
        "findings" where one is an error, else "inconclusive" or "ok".

    Example:
        >>> verdict_of([Finding("F07", "warning", "a stray file")])
        'ok'
    """
    if any(f.severity == "error" for f in findings):
        return "findings"
    return "inconclusive" if inconclusive else "ok"


# exit status of a command by verdict; 2 is for errors
EXIT = {"ok": 0, "findings": 1, "inconclusive": 3}
