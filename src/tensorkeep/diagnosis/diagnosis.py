"""Diagnose a checkpoint: run every check over it and separate causes from what they explain.

Nothing here imports torch: names, bytes, configs and statistics are enough to name a cause. What needs a model in
memory (B01, L01) is in `live`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorkeep.diagnosis import checks
from tensorkeep.diagnosis.checks import CODES, rank
from tensorkeep.diagnosis.evidence import opening
from tensorkeep.diagnosis.evidence.case import Case, Target, message_of
from tensorkeep.errors import Inconclusive, TensorkeepError
from tensorkeep.findings import EXIT, Finding, Verdict, verdict_of
from tensorkeep.storage.files import Progress

_SEVERITIES = {"error": 0, "warning": 1, "info": 2}


@dataclass
class Diagnosis:
    """The result of a diagnosis.

    Attributes:
        checkpoint: The path that was diagnosed.
        reference: The path it was compared with, or None.
        verdict: "findings" where there is an error, "inconclusive" where a check that matters could not run, else "ok".
        causes: The codes of errors that no other error explains, in order of precedence.
        findings: Everything found, causes first.
        forward: What a forward pass showed, where one was asked for.
        totals: Number of parameters in the "reference" and in the "checkpoint", None where unknown.
        case: The opened checkpoint with all evidence, for repair; no part of the document.
    """

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
        """The exit code of `tensorkeep diagnose`: 0 ok, 1 findings, 3 inconclusive."""
        return EXIT[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `tensorkeep diagnose --json`, without its schema number."""
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
    """Find out what is wrong with a checkpoint, and what caused it.

    Args:
        path: The checkpoint, of any format and naming.
        reference: A sound checkpoint to compare with: the original, or the model it was trained from. Without one,
            only what the file itself shows is found.
        target: The program that is to load it: "hf", "flame" or "torchtitan".
        progress: Called with what is being done, the bytes done and the bytes in all.

    Returns:
        The verdict, the causes, and every finding.

    Raises:
        TensorkeepError: Where a path is no checkpoint at all, or the reference cannot be read. Damage of the
            checkpoint itself is a finding.

    Example:
        >>> diagnose("out", "base").causes                      # doctest: +SKIP
        ['O01']
    """
    case = opening.open_case(path, reference, target)
    case.progress = progress
    opening.compare_sides(case)
    findings, open_questions = run_checks(case)
    return conclude(case, findings, open_questions)


def run_checks(case: Case) -> tuple[list[Finding], bool]:
    """Run every check; return the findings in order of precedence, and whether a check that matters could not run."""
    findings: list[Finding] = []
    inconclusive = False
    for code in CODES:
        check = checks.module(code)
        if hasattr(check, "LIVE"):  # these need a model in memory: `check_loaded` and `--forward`
            continue
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
            findings.append(Finding(error.code, "error", message_of(error), error.tensors, fix=error.hint))
    stopped = case.read_error
    if stopped is not None and not any(f.code == stopped.code and f.severity == "error" for f in findings):
        findings.insert(
            0, Finding(stopped.code or "F07", "error", message_of(stopped), stopped.tensors, fix=stopped.hint)
        )
    return findings, inconclusive


def conclude(
    case: Case, findings: Sequence[Finding], inconclusive: bool, forward: dict[str, Any] | None = None
) -> Diagnosis:
    """Draw the verdict and the causes from findings.

    A cause is an error that no other error explains; where there is no error, a warning that no other explains.

    Args:
        case: The case that was looked at.
        findings: What the checks found.
        inconclusive: Whether a check that matters could not run.
        forward: What a forward pass showed, as a document.

    Returns:
        The diagnosis: causes first, then the other findings by severity.
    """
    errors = [f for f in findings if f.severity == "error"] or [f for f in findings if f.severity == "warning"]
    explained = {code for f in errors for code in f.explains if code != f.code}
    causes = sorted(dict.fromkeys(f.code for f in errors if f.code not in explained), key=rank)
    ordered = sorted(
        findings,
        key=lambda f: (
            f.code not in causes or f.severity == "info",
            _SEVERITIES[f.severity],
            rank(f.code),
            -len(f.tensors),
        ),
    )
    totals = {"reference": opening.parameters(case, 1), "checkpoint": opening.parameters(case, 0)}
    reference = case.reference.path if case.reference is not None else None
    return Diagnosis(case.path, reference, verdict_of(findings, inconclusive), causes, ordered, forward, totals, case)
