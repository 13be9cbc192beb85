"""Make one offline HTML page from the document of `diagnose --json`, and of `diff --json` beside it.

The page holds no script and loads nothing. It follows the reader's light or dark setting. All names and messages come
out of untrusted files and are escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from tensorkeep.commands.report import _heatmap as heatmap
from tensorkeep.commands.report._style import STYLE
from tensorkeep.errors import TensorkeepError, printable
from tensorkeep.formats.names import grouped
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import explained
from tensorkeep.storage.overwriting import PAGE
from tensorkeep.storage.placement import replacing

_VERDICTS = {"ok": "nothing wrong found", "findings": "something is wrong", "inconclusive": "could not be decided"}
_MOST = 12  # groups of tensors, and lines of evidence, before a page hides the rest behind a click


def page(document: Mapping[str, Any], differences: Mapping[str, Any] | None = None) -> str:
    """Return the whole page of a diagnosis, as text.

    >>> "nothing wrong found" in page({"checkpoint": "out", "verdict": "ok", "causes": [], "findings": []})
    True
    """
    found = heatmap.cells(document, differences)
    findings = [f for f in document.get("findings") or [] if isinstance(f, Mapping)]
    causes = [str(c) for c in document.get("causes") or []]
    parts = [_head(document), _totals(document), _causes(findings, causes), _losses(document.get("forward"))]
    if found:
        drawn = heatmap.legend() + heatmap.maps(found) + heatmap.figures_table(found.values())
        parts.append(f"<section><h2>Tensor by tensor</h2>{drawn}</section>")
    first = [f for f in findings if f.get("code") in causes and f.get("severity") != "info"]
    rest = [f for f in findings if not any(f is g for g in first)]
    parts += [_section("Causes", first), _section("Also found" if first else "Findings", rest)]
    title = escape(printable(str(document.get("checkpoint", "")), 200))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Diagnosis of {title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}<footer>Written by tensorkeep report. "
        "Nothing on this page is loaded from elsewhere.</footer></main></body></html>\n"
    )


def write_page(
    path_in: str | Path, path_out: str | Path, differences: str | Path | None = None, overwrite: bool = False
) -> None:
    """Read the document of a diagnosis (and of a diff) and write the page.

    Raises:
        TensorkeepError: for anything but such documents, and where the page exists.
    """
    document = _document(Path(path_in), "findings", "tensorkeep diagnose CKPT --json > findings.json")
    diff = _document(Path(differences), "tensors", "tensorkeep diff A B --json > diff.json") if differences else None
    text = page(document, diff)
    with replacing(Path(path_out), overwrite, PAGE) as temporary, explained(path_out):
        temporary.write_text(text, encoding="utf-8")


def _document(path: Path, wanted: str, hint: str) -> dict[str, Any]:
    """Read a JSON document that must have a list under `wanted`."""
    if path.is_dir():
        raise TensorkeepError("is a folder, not the document of a diagnosis", where=path, hint=hint)
    found = parse_json(read_small(path), path)
    if not isinstance(found, dict) or not isinstance(found.get(wanted), list):
        raise TensorkeepError(f"has no list of {wanted}", where=path, hint=hint)
    if found.get("schema", 1) != 1:
        raise TensorkeepError(
            f"schema {printable(str(found['schema']), 40)} is not known here",
            where=path,
            hint="a newer tensorkeep wrote it",
        )
    return found


# -- head -----------------------------------------------------------------------------------------------------------


def _head(document: Mapping[str, Any]) -> str:
    """Return the page's head: verdict, checkpoint, reference."""
    verdict = str(document.get("verdict", ""))
    word = _VERDICTS.get(verdict, verdict)
    against = document.get("reference")
    reference = (
        f"<dt>reference</dt><dd>{_path(against)}</dd>" if against else "<dt>reference</dt><dd class='muted'>none</dd>"
    )
    kind = verdict if verdict in _VERDICTS else "inconclusive"
    return (
        f"<header><h1>Diagnosis</h1><p class='verdict {kind}'>{escape(printable(word, 80))}</p>"
        f"<dl><dt>checkpoint</dt><dd>{_path(document.get('checkpoint', ''))}</dd>{reference}</dl></header>"
    )


def _path(value: Any) -> str:
    """Return a path as code."""
    return f"<code>{escape(printable(str(value), 400))}</code>"


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
    tiles = [f"<div><b>{v:,}</b><span>{name}</span></div>" for name, v in figures if isinstance(v, int)]
    return f"<div class='tiles'>{''.join(tiles)}</div>" if tiles else ""


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
    for row, (name, value) in enumerate(known):
        length = 360 * (min(max(value / top, 0.0), 1.0) if math.isfinite(value) else 1.0)
        shown = f"{value:.4g}" if math.isfinite(value) else "not finite"
        bars.append(
            f'<text class="label" x="88" y="{row * 34 + 20}" text-anchor="end">{name}</text>'
            f'<rect class="bar {name}" x="96" y="{row * 34 + 4}" width="{length:.1f}" height="24" rx="3"/>'
            f'<text class="value" x="{104 + length:.1f}" y="{row * 34 + 20}">{shown}</text>'
        )
    height = 34 * len(known) + 4
    frame = f'<svg width="540" height="{height}" viewBox="0 0 540 {height}" role="img" aria-label="loss compared">'
    svg = f"{frame}{''.join(bars)}</svg>"
    finite = [v for _, v in known if math.isfinite(v)]
    gap = [f"{finite[0] - finite[1]:+.4g} against the reference"] if len(finite) == 2 else []
    largest = heatmap.number(forward.get("max_logit_difference"))
    gap += [f"largest difference of a logit {largest:.3g}"] if largest is not None else []
    return (
        f"<section><h2>Loss</h2><div class='scroll'>{svg}</div><p class='note'>{escape('; '.join(gap))}</p></section>"
    )


# -- findings -------------------------------------------------------------------------------------------------------


def _section(title: str, findings: list[Mapping[str, Any]]) -> str:
    """Return findings under a title."""
    return f"<section><h2>{title}</h2>{''.join(map(_finding, findings))}</section>" if findings else ""


def _badge(finding: Mapping[str, Any]) -> str:
    """Return a finding's code in its severity's colour."""
    severity = str(finding.get("severity"))
    kind = severity if severity in ("error", "warning", "info") else "info"
    return f"<span class='badge {kind}'>{escape(printable(str(finding.get('code')), 12))}</span>"


def _finding(finding: Mapping[str, Any]) -> str:
    """Return one finding: message, tensors, evidence, fix."""
    severity = escape(printable(str(finding.get("severity")), 20))
    message = escape(printable(str(finding.get("message", "")), 2000))
    parts = [f"<h4>{_badge(finding)} <span class='severity'>{severity}</span> {message}</h4>"]
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
    shown = f"<{tag}>{''.join(items[:_MOST])}</{tag}>"
    rest = (
        f"<details><summary>{len(items) - _MOST} more</summary><{tag}>{''.join(items[_MOST:])}</{tag}></details>"
        if len(items) > _MOST
        else ""
    )
    return f"<div class='part'><h5>{escape(title)}</h5>{shown}{rest}</div>"


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
