"""`tensorkeep eval detection`: detections of any program against annotations. Numpy only: no model, no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tensorkeep.commands import Flag, Say
from tensorkeep.detection.annotation_checks import check_annotations
from tensorkeep.detection.annotations import Annotations
from tensorkeep.detection.columns import read_blocked
from tensorkeep.detection.error_analysis import ErrorAnalysis, analyse_errors
from tensorkeep.detection.evaluation import Evaluation, evaluate, read_files
from tensorkeep.output import Output
from tensorkeep.placement import replacing, write_bytes

Several = Parameter(negative="", consume_multiple=True, show_default=False)


def eval_detection(
    *,
    annotations: Path,
    detections: Path,
    protocol: Literal["activitynet", "thumos14"] = "activitynet",
    tiou: Annotated[tuple[float, ...], Several] = (),
    subset: str | None = None,
    blocked: Path | None = None,
    errors: float | None = None,
    picture: Path | None = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Mean average precision of detections at each temporal IoU, by class; why it is not higher with --errors.

    Parameters
    ----------
    annotations
        Ground truth: OpenTAD, ActivityNet, ActionFormer or mmaction JSON, or a folder of THUMOS'14 text files.
    detections
        ActivityNet JSON ({"results": {VIDEO: [{"segment", "label", "score"}]}}) or the THUMOS'14 kit's text.
    protocol
        activitynet (also OpenTAD's, ActionFormer's, mmaction's): interpolated, IoU >= threshold. thumos14: the
        kit of 2015, not interpolated, IoU > threshold, Ambiguous forgiven.
    tiou
        Thresholds, e.g. --tiou 0.3 0.4 0.5 0.6 0.7 for THUMOS'14. Default: those of the protocol.
    subset
        Which part of the annotations. Default: the one most of the detections belong to.
    blocked
        Videos to leave out on both sides: a JSON list or one name a line.
    errors
        Analyse the errors at this temporal IoU (0.5 is usual): kinds of false positives, what is missed.
    picture
        Write the error analysis there as an SVG picture too.
    overwrite
        Replace an existing picture.
    """
    out = say.output()
    truth, found = read_files(annotations, detections)
    names = read_blocked(blocked) if blocked else ()
    result = evaluate(truth, found, protocol=protocol, thresholds=tiou or None, subset=subset, blocked=names)
    analysis = None
    if errors is not None or picture is not None:
        at = 0.5 if errors is None else errors
        analysis = analyse_errors(truth, found, subset=result.subset, blocked=names, tiou=at)
    if picture is not None and analysis is not None:
        with replacing(picture, overwrite) as temporary:
            write_bytes(temporary, analysis.picture().encode())
    problems = _problems(truth, result.subset)
    if out.json:
        more = {"errors": analysis.document()} if analysis is not None else {}
        out.document({**result.document(), "annotation_problems": problems, **more})
        return 0
    _show(out, result, analysis)
    for note in (*result.notes, *problems):
        out.remark(f"note: {note}")
    return 0


def _show(out: Output, result: Evaluation, analysis: ErrorAnalysis | None) -> None:
    segments = sum(result.segments)
    out.line(
        f"protocol {result.protocol}, subset {result.subset}: {result.detections:,} detections, {segments:,} segments, {len(result.classes)} classes"
    )
    header, *rows = result.table()
    out.table(header, rows, right=header[1:])
    if analysis is None:
        return
    out.line(f"errors at tIoU {analysis.tiou:g}, by blocks of G detections (G segments of a class), in percent")
    rows = analysis.table()
    split = next(i for i, row in enumerate(rows) if row[0] == "missed")
    for header, *part in (rows[:split], rows[split:]):
        out.table(header, part, right=header[1:] if len(header) > 4 else header[2:])


def _problems(truth: Annotations, subset: str) -> list[str]:
    """What is wrong with the annotations that were scored against, one line a kind."""
    inside = {video.name for video in truth.of_subset(subset)} if subset in truth.subsets() else set(truth.videos)
    found = [p for p in check_annotations(truth) if p.severity != "info" and p.video in inside]
    count = Counter(problem.kind for problem in found)
    first = {problem.kind: problem for problem in reversed(found)}
    return [f"annotations: {kind} ({count[kind]}), first {p.video}: {p.message}" for kind, p in first.items()]
