"""`tensorkeep eval detection`: a trained detector on its test data, or detections of any program against annotations.

The second needs numpy only: no model, no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say
from tensorkeep.detection.data.annotation_checks import check_annotations
from tensorkeep.detection.data.annotations import Annotations
from tensorkeep.detection.results.columns import read_blocked
from tensorkeep.detection.results.error_analysis import ErrorAnalysis, analyse_errors
from tensorkeep.detection.results.evaluation import Evaluation, evaluate, read_files
from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output
from tensorkeep.storage.placement import replacing, write_bytes

Changes = tuple[tuple[str, str], ...]
Several = Parameter(negative="", consume_multiple=True, show_default=False)


def eval_detection(
    checkpoint: Path | None = None,
    /,
    *,
    annotations: Path | None = None,
    detections: Path | None = None,
    protocol: Literal["activitynet", "thumos14"] | None = None,
    tiou: Annotated[tuple[float, ...], Several] = (),
    subset: str | None = None,
    blocked: Path | None = None,
    errors: float | None = None,
    picture: Path | None = None,
    overwrite: Flag = False,
    recipe: Path | None = None,
    ema: bool = True,
    newest: Flag = False,
    device: str | None = None,
    say: Say = Say(),
) -> int:
    """Mean average precision of a detector, or of detections, at each temporal IoU, by class.

    Why it is not higher with --errors.

    Parameters
    ----------
    checkpoint
        A run of `train detection`, a step folder of one, or an OpenTAD .pth with --recipe: its detector runs on the
        recipe's test data. Without it, --annotations and --detections.
    annotations
        Ground truth: OpenTAD, ActivityNet, ActionFormer or mmaction JSON, or a folder of THUMOS'14 text files.
    detections
        ActivityNet JSON ({"results": {VIDEO: [{"segment", "label", "score"}]}}) or the THUMOS'14 kit's text.
    protocol
        activitynet (also OpenTAD's, ActionFormer's, mmaction's): interpolated, IoU >= threshold. thumos14: the
        kit of 2015, not interpolated, IoU > threshold, Ambiguous forgiven. Default: the recipe's, or activitynet.
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
    recipe
        With a checkpoint: another recipe than the run's. Needed where the checkpoint is of no run.
    ema
        With a checkpoint: use the averaged weights where there are some.
    newest
        With a run: its newest checkpoint instead of the best.
    device
        With a checkpoint: cpu or cuda. Default: a GPU where there is one.
    """
    out = say.output()
    names = read_blocked(blocked) if blocked else ()
    taken: dict[str, Any] = {}
    if checkpoint is not None:
        if annotations or detections:
            raise TensorkeepError("a checkpoint finds its own detections", where=checkpoint, hint="leave the files out")
        changes = _changes(protocol, tiou, subset, blocked)
        truth, found, result, taken = _of_checkpoint(checkpoint, recipe, changes, ema, newest, device, out)
        names = taken.pop("blocked")
        if result is None:  # another rank tells
            return 0
    elif annotations is None or detections is None:
        hint = "tensorkeep eval detection RUN, or --annotations GT --detections PRED"
        raise TensorkeepError("nothing to evaluate", hint=hint)
    else:
        truth, found = read_files(annotations, detections)
        result = evaluate(
            truth, found, protocol=protocol or "activitynet", thresholds=tiou or None, subset=subset, blocked=names
        )
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
        out.document({**taken, **result.document(), "annotation_problems": problems, **more})
        return 0
    if taken:
        step = "" if taken["step"] is None else f", step {taken['step']}"
        out.line(f"{taken['checkpoint']}{step}, {'averaged' if taken['ema'] else 'live'} weights")
    _show(out, result, analysis)
    for note in (*result.notes, *problems):
        out.remark(f"note: {note}")
    return 0


def _changes(protocol: str | None, tiou: Sequence[float], subset: str | None, blocked: Path | None) -> Changes:
    """What the flags change in a recipe's section `evaluation`."""
    given = {
        "protocol": protocol,
        "thresholds": list(tiou) or None,
        "subset": subset,
        "blocked": blocked and str(blocked),
    }
    return tuple((f"evaluation.{name}", json.dumps(value)) for name, value in given.items() if value is not None)


def _of_checkpoint(
    path: Path, recipe: Path | None, changes: Changes, ema: bool, newest: bool, device: str | None, out: Output
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Annotations, detections and their evaluation, and what was taken; no evaluation on ranks other than the first."""
    from tensorkeep.detection.evaluate_run import evaluate_checkpoint
    from tensorkeep.training import distributed

    world = distributed.start(device)
    try:
        done = evaluate_checkpoint(path, recipe, ema, not newest, world, changes, out.remark)
    finally:
        distributed.stop()
    taken = {"checkpoint": str(path), "step": done.step, "ema": done.averaged, "blocked": done.blocked}
    return done.annotations, done.table, done.result if world.first else None, taken


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
