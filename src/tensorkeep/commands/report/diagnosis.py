"""Make one offline HTML page from the document of `diagnose --json` or `verify --json`, and of `diff --json` beside it.

All names and messages come out of untrusted files and are escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report import _heatmap as heatmap
from tensorkeep.commands.report._frame import Section
from tensorkeep.errors import printable
from tensorkeep.formats.names import grouped

_VERDICTS = {"ok": "nothing wrong found", "findings": "something is wrong", "inconclusive": "could not be decided"}
_MOST = 12  # groups of tensors, and lines of evidence, before a page hides the rest behind a click
_ALL = 1000  # of those that the page has at all


def page(document: Mapping[str, Any], differences: Mapping[str, Any] | None = None) -> str:
    """Return the whole page of a diagnosis, as text.

    >>> "nothing wrong found" in page({"checkpoint": "out", "verdict": "ok", "causes": [], "findings": []})
    True
    """
    found = heatmap.cells(document, differences)
    findings = [f for f in document.get("findings") or [] if isinstance(f, Mapping)]
    causes = [str(c) for c in document.get("causes") or []]
    drawn = ""
    if found:
        drawn = heatmap.maps(found) + heatmap.layers_table(found) + heatmap.figures_table(found.values())
    first = [f for f in findings if f.get("code") in causes and f.get("severity") != "info"]
    rest = [f for f in findings if not any(f is g for g in first)]
    sections = [
        Section("Causes", "".join(map(_finding, first))),
        Section("Loss", _losses(document.get("forward"))),
        Section("Tensor by tensor", drawn),
        Section("Also found" if first else "Findings", "".join(map(_finding, rest))),
    ]
    title = printable(str(document.get("checkpoint", "")), 180)
    head = _head(document, _causes(findings, causes)) + _totals(document)
    return frame.page(f"{_kind(document)} of {title}", head, sections)


def _kind(document: Mapping[str, Any]) -> str:
    """Return what the command that wrote the document does: `verify` says whether there was a certificate."""
    return "Verification" if "certificate" in document else "Diagnosis"


# -- head -----------------------------------------------------------------------------------------------------------


def _head(document: Mapping[str, Any], causes: str) -> str:
    """Return the page's head: verdict, causes, checkpoint, reference."""
    verdict = str(document.get("verdict", ""))
    kind = verdict if verdict in _VERDICTS else "inconclusive"
    shown = f"<p class='verdict {kind}'>{frame.text(_VERDICTS.get(verdict, verdict), 80)}</p>"
    against = document.get("reference")
    reference = frame.code(against) if against else "<span class='muted'>none</span>"
    facts = [("checkpoint", frame.code(document.get("checkpoint", ""))), ("reference", reference)]
    return frame.top(_kind(document), shown) + causes + frame.listed(facts)


def _totals(document: Mapping[str, Any]) -> str:
    """Return tiles with the numbers of parameters."""
    totals = document.get("parameters")
    if not isinstance(totals, Mapping):
        return ""
    mine, theirs = totals.get("checkpoint"), totals.get("reference")
    figures = [("parameters in the checkpoint", mine), ("parameters in the reference", theirs)]
    if isinstance(mine, int) and isinstance(theirs, int):
        more = "more" if mine > theirs else "fewer"
        figures.append(("difference" if mine == theirs else f"{more} in the checkpoint", abs(mine - theirs)))
    return frame.tiles((frame.figure(v), name) for name, v in figures if isinstance(v, int))


def _causes(findings: list[Mapping[str, Any]], causes: list[str]) -> str:
    """Return one line for each cause, to be read before anything else."""
    lines = []
    for code in causes:
        said = next((f for f in findings if f.get("code") == code), None)
        if said is not None:
            lines.append(f"<li>{_badge(said)} {escape(printable(str(said.get('message', '')), 400))}</li>")
    return f"<ul class='causes'>{''.join(lines)}</ul>" if lines else ""


def _losses(forward: Any) -> str:
    """Draw two bars: the loss of the checkpoint and of the reference."""
    if not isinstance(forward, Mapping):
        return ""
    pairs = [
        ("checkpoint", heatmap.number(forward.get("loss"))),
        ("reference", heatmap.number(forward.get("reference_loss"))),
    ]
    known = [(n, v) for n, v in pairs if v is not None]
    if not known:
        return ""
    top = max((v for _, v in known if math.isfinite(v)), default=1.0) or 1.0
    bars = []
    for name, value in known:
        length = 100 * (min(max(value / top, 0.0), 1.0) if math.isfinite(value) else 1.0)
        shown = f"{value:.4g}" if math.isfinite(value) else "not finite"
        bar = f'<svg aria-hidden="true"><rect class="value {name}" width="{length:.1f}%" height="18" rx="3"/></svg>'
        bars.append(f"<span>{name}</span>{bar}<span class='num'>{shown}</span>")
    finite = [v for _, v in known if math.isfinite(v)]
    gap = [f"{finite[0] - finite[1]:+.4g} against the reference"] if len(finite) == 2 else []
    largest = heatmap.number(forward.get("max_logit_difference"))
    gap += [f"largest difference of a logit {largest:.3g}"] if largest is not None else []
    return f"<div class='bars'>{''.join(bars)}</div>{frame.note('; '.join(gap)) if gap else ''}"


# -- findings -------------------------------------------------------------------------------------------------------


def _badge(finding: Mapping[str, Any]) -> str:
    """Return a finding's code in its severity's colour."""
    severity = str(finding.get("severity"))
    kind = severity if severity in ("error", "warning", "info") else "info"
    return f"<span class='badge {kind}'>{escape(printable(str(finding.get('code')), 12))}</span>"


def _finding(finding: Mapping[str, Any]) -> str:
    """Return one finding: message, tensors, evidence, fix."""
    severity = escape(printable(str(finding.get("severity")), 20))
    message = escape(printable(str(finding.get("message", "")), 2000))
    parts = [f"<h3>{_badge(finding)} <span class='severity'>{severity}</span> {message}</h3>"]
    tensors = finding.get("tensors")
    names = grouped(map(str, tensors)) if isinstance(tensors, list) else []
    if names:
        items = [f"<li><code>{escape(printable(n, 300))}</code></li>" for n in names]
        parts.append(_folded(items, f"{len(tensors or [])} tensor{'s' if len(tensors or []) != 1 else ''}", "ul"))
    evidence = finding.get("evidence")
    if isinstance(evidence, Mapping) and evidence:
        rows = [
            f"<tr><th>{escape(printable(str(k), 120))}</th><td>{escape(_value(v))}</td></tr>"
            for k, v in evidence.items()
        ]
        parts.append(_folded(rows, "evidence", "table"))
    explains = [str(c) for c in finding.get("explains") or []]
    if explains:
        parts.append(f"<p class='note'>explains {escape(printable(', '.join(explains), 200))}</p>")
    if finding.get("fix"):
        parts.append(f"<p class='fix'><b>fix</b><code>{escape(printable(str(finding['fix']), 2000))}</code></p>")
    return f"<article>{''.join(parts)}</article>"


def _folded(items: list[str], title: str, tag: str) -> str:
    """Return the first items, and the rest behind a click."""
    if len(items) > _ALL:
        title, items = f"{title}; {len(items) - _ALL:,} of them are not listed", items[:_ALL]
    shown = f"<{tag}>{''.join(items[:_MOST])}</{tag}>"
    rest = (
        f"<details><summary>{len(items) - _MOST} more</summary><{tag}>{''.join(items[_MOST:])}</{tag}></details>"
        if len(items) > _MOST
        else ""
    )
    return f"<div class='part'><p class='note'>{escape(title)}</p>{shown}{rest}</div>"


def _value(value: Any) -> str:
    """Return a figure of the evidence as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return printable(
            ", ".join(f"{k}: {_value(v)}" for k, v in list(value.items())[:_MOST])
            + (", …" if len(value) > _MOST else ""),
            1500,
        )
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return printable(text, 500)
