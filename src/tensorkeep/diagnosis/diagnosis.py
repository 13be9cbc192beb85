"""Diagnose: run every check over a checkpoint (and a reference), and let causes absorb what they explain.

Tools never import torch: names, bytes, configs and statistics are enough to name a cause. What needs a live model
(B01, L01) is in `loaded.py` and `forward.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorkeep.diagnosis.checks import CODES, LIVE, rank
from tensorkeep.diagnosis.evidence import opening
from tensorkeep.diagnosis.evidence.case import Case, Progress, Target, said
from tensorkeep.errors import Inconclusive, TensorkeepError
from tensorkeep.findings import EXIT, Finding, Verdict, verdict_of

__all__ = ["Case", "Diagnosis", "Inconclusive", "diagnose", "judge"]

SEVERITIES = {"error": 0, "warning": 1, "info": 2}


@dataclass
class Diagnosis:
    """What was found, causes first. `totals`: parameters in the reference and in the checkpoint. `case` is not data."""

    checkpoint: str
    reference: str | None
    verdict: Verdict
    causes: list[str]
    findings: list[Finding]
    forward: dict[str, Any] | None = None
    totals: dict[str, int | None] = field(default_factory=dict)
    case: Case | None = None

    @property
    def exit_code(self) -> int:
        return EXIT[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """The document of `diagnose --json` (design §5), without its schema number."""
        return {
            "checkpoint": self.checkpoint,
            "reference": self.reference,
            "verdict": self.verdict,
            "causes": self.causes,
            "findings": [f.to_json() for f in self.findings],
            "forward": self.forward,
            "parameters": self.totals,
        }


def diagnose(
    path: str, reference: str | None = None, target: Target | None = None, progress: Progress | None = None
) -> Diagnosis:
    """Findings about the checkpoint at `path`, proven against `reference` where one is given.

    `target` names the loader it is meant for: hf, flame or torchtitan. Raises TensorkeepError where a path is no
    checkpoint at all, or the reference cannot be read; damage of the checkpoint itself is a finding.

    >>> diagnose("out", "base").causes                      # doctest: +SKIP
    ['O01']
    """
    case = opening.open_case(path, reference, target)
    case.progress = progress
    opening.look(case)
    findings, open_questions = run_checks(case)
    return judge(case, findings, open_questions)


def run_checks(case: Case) -> tuple[list[Finding], bool]:
    """The findings of every check in order of precedence, and whether one that matters could not run."""
    findings: list[Finding] = []
    inconclusive = False
    for code, place in CODES.items():
        if code in LIVE:  # these need a model: `loaded.py` and `--forward`
            continue
        check = importlib.import_module(place)
        try:
            findings += check.check(case)
        except Inconclusive as why:
            inconclusive = True
            findings.append(
                Finding(code, "info", f"could not be decided: {why.reason}", evidence={"inconclusive": True})
            )
        except TensorkeepError as error:
            # data that turns out to be damaged while a check reads it
            if error.code is None:
                raise
            findings.append(Finding(error.code, "error", said(error), error.tensors, fix=error.hint))
    stopped = case.read_error
    if stopped is not None and not any(f.code == stopped.code and f.severity == "error" for f in findings):
        findings.insert(0, Finding(stopped.code or "F07", "error", said(stopped), stopped.tensors, fix=stopped.hint))
    return findings, inconclusive


def judge(
    case: Case, findings: Sequence[Finding], inconclusive: bool, forward: dict[str, Any] | None = None
) -> Diagnosis:
    """The verdict and the causes. A cause is an error that no other error explains; warnings, where there is no error."""
    errors = [f for f in findings if f.severity == "error"] or [f for f in findings if f.severity == "warning"]
    explained = {code for f in errors for code in f.explains if code != f.code}
    causes = sorted(dict.fromkeys(f.code for f in errors if f.code not in explained), key=rank)
    ordered = sorted(
        findings,
        key=lambda f: (
            f.code not in causes or f.severity == "info",
            SEVERITIES[f.severity],
            rank(f.code),
            -len(f.tensors),
        ),
    )
    totals = {"reference": opening.parameters(case, 1), "checkpoint": opening.parameters(case, 0)}
    reference = case.reference.path if case.reference is not None else None
    return Diagnosis(case.path, reference, verdict_of(findings, inconclusive), causes, ordered, forward, totals, case)
