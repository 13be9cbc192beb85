"""Findings: one fact that a check proved, with its code, evidence and fix; codes and their one-line titles.

The order of CODES is the order in which codes speak where two could fit (see the design, §6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
Verdict = Literal["ok", "findings", "inconclusive"]


@dataclass
class Finding:
    """One fact. `tensors` are the names concerned, `evidence` numbers, `fix` a command to paste or None."""

    code: str
    severity: Severity
    message: str
    tensors: Sequence[str] = ()
    evidence: dict[str, Any] = field(default_factory=dict)
    explains: Sequence[str] = ()
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
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


def verdict_of(findings: Sequence[Finding], inconclusive: bool = False) -> Verdict:
    """`ok` when there are only infos and warnings."""
    if any(f.severity == "error" for f in findings):
        return "findings"
    return "inconclusive" if inconclusive else "ok"


EXIT = {"ok": 0, "findings": 1, "inconclusive": 3}
