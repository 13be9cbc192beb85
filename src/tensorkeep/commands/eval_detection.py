"""`tensorkeep eval detection`: a trained detector on its test data, or detections of any program against annotations.

The second needs numpy only: no model, no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, prepare
from tensorkeep.detection.data.annotation_checks import check_annotations
from tensorkeep.detection.data.annotations import Annotations
from tensorkeep.detection.data.epic import is_epic
from tensorkeep.detection.results.columns import read_blocked
from tensorkeep.detection.results.epic import evaluate_epic
from tensorkeep.detection.results.error_analysis import PICTURE, ErrorAnalysis, analyse_errors
from tensorkeep.detection.results.evaluation import Evaluation, evaluate, read_files
from tensorkeep.detection.results.protocols import PROTOCOLS
from tensorkeep.detection.results.results import DetectionTable
from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output
from tensorkeep.storage.overwriting import refuse_existing
from tensorkeep.storage.placement import replacing, write_bytes

Changes = tuple[tuple[str, str], ...]
Rules = Literal["activitynet", "opentad", "thumos14", "epic", "ego4d-mq", "multithumos"]
_OF_LAYOUT: dict[str, Rules] = {"epic": "epic", "ego4d": "ego4d-mq"}  # annotations of other layouts: activitynet
Several = Parameter(negative="", consume_multiple=True, show_default=False)


def eval_detection(
    checkpoint: Path | None = None,
    /,
    *,
    annotations: Path | None = None,
    detections: Path | None = None,
    protocol: Rules | None = None,
    tiou: Annotated[tuple[float, ...], Several] = (),
    recall: Annotated[tuple[str, ...], Several] = (),
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
    """Measure the mean average precision of a detector, or of detections of any program, at each temporal IoU.

    Args:
        checkpoint: A run of `train detection`, a step folder of one, or an OpenTAD .pth with --recipe: its detector
            runs on the recipe's test data. Without it, --annotations and --detections.
        annotations: Ground truth: JSON of OpenTAD, ActivityNet, ActionFormer, mmaction or Ego4D's moment queries,
            EPIC-Kitchens-100's CSV, or THUMOS'14's text files.
        detections: ActivityNet's JSON, EPIC-Kitchens' submission, or the text of the THUMOS'14 kit.
        protocol: How to count. activitynet: interpolated, IoU >= threshold. opentad (ActionFormer's too): the same
            without repeated and empty segments; multithumos: so at 0.1 to 0.9. epic: verbs, nouns and actions apart.
            ego4d-mq: recall over all segments. thumos14: not interpolated, IoU > threshold, Ambiguous forgiven.
            Default: the recipe's; of files epic or ego4d-mq for their layouts, else activitynet.
        tiou: Thresholds, e.g. --tiou 0.3 0.4 0.5 0.6 0.7 for THUMOS'14. Default: those of the protocol.
        recall: Also recall at k times as many detections as segments, e.g. --recall 1,5.
        subset: The part of the annotations to score. Default: the one most of the detections belong to.
        blocked: A file of videos to leave out on both sides: a JSON list or one name a line.
        errors: Analyse the errors at this temporal IoU (0.5 is usual): kinds of false positives, what is missed.
        picture: Write the error analysis to this SVG file too.
        overwrite: Replace an existing picture.
        recipe: With a checkpoint: another recipe than the run's. Needed where the checkpoint is of no run.
        ema: With a checkpoint: use the averaged weights where there are some.
        newest: With a run: take its newest checkpoint instead of the best.
        device: With a checkpoint: the device to run on, cpu or cuda. Default: a GPU where there is one.
    """
    out = say.output()
    if picture is not None:
        prepare(out, picture)
        refuse_existing(picture, overwrite, PICTURE)
    names, taken = read_blocked(blocked) if blocked else (), dict[str, Any]()
    if checkpoint is not None and (annotations or detections):
        raise TensorkeepError("a checkpoint finds its own detections", where=checkpoint, hint="leave the files out")
    if checkpoint is not None:
        changes = _changes(protocol, tiou, _whole(recall), subset, blocked)
        scored, taken = _of_checkpoint(checkpoint, recipe, changes, ema, newest, device, out)
        names = taken.pop("blocked")
    else:
        scored = _of_files(annotations, detections, protocol, tiou, _whole(recall), subset, names)
    if scored is not None:  # the first rank tells
        _tell(out, taken, scored, _analysed(scored, names, errors, picture, overwrite))
    return 0


class _Scored(NamedTuple):
    """What was scored; `parts`: the scores of each set of labels where there are several (EPIC), `result` too."""

    truth: Annotations
    found: DetectionTable
    result: Evaluation
    parts: dict[str, Evaluation]


def _tell(out: Output, taken: dict[str, Any], scored: _Scored, analysis: ErrorAnalysis | None) -> None:
    """The document, or tables and notes for people."""
    problems = _problems(scored.truth, scored.result)
    if out.json:
        more: dict[str, Any] = {"errors": analysis.document()} if analysis is not None else {}
        if scored.parts:
            more["parts"] = {name: part.document() for name, part in scored.parts.items()}
        out.document({**taken, **scored.result.document(), "annotation_problems": problems, **more})
        return
    if taken:
        step = "" if taken["step"] is None else f", step {taken['step']}"
        out.line(f"{taken['checkpoint']}{step}, {'averaged' if taken['ema'] else 'live'} weights")
    for name, part in (scored.parts or {"": scored.result}).items():
        _show(out, part, name)
    _show_errors(out, analysis)
    for note in (*scored.result.notes, *problems):
        out.remark(f"note: {note}")


def _of_files(
    annotations: Path | None,
    detections: Path | None,
    protocol: Rules | None,
    tiou: tuple[float, ...],
    recall: tuple[int, ...],
    subset: str | None,
    blocked: Sequence[str],
) -> _Scored:
    """Annotations and detections out of files, and their evaluation."""
    if annotations is None or detections is None:
        hint = "tensorkeep eval detection RUN, or --annotations GT --detections PRED"
        given = "annotations" if annotations is not None else "detections" if detections is not None else ""
        other = "detections" if given == "annotations" else "annotations"
        what = f"--{given} is given, and --{other} is missing" if given else "neither a run nor detections are named"
        raise TensorkeepError(what, hint=hint)
    at = tiou or None
    if is_epic(annotations):
        if subset is not None:
            raise TensorkeepError("EPIC's CSV is one subset", where=annotations, hint="leave --subset out")
        how = protocol or "epic"
        done = evaluate_epic(annotations, detections, protocol=how, thresholds=at, blocked=blocked, recall_at=recall)
        return _Scored(*list(done.values())[-1], {name: score for name, (_, _, score) in done.items()})
    truth, found = read_files(annotations, detections)
    how = protocol or _OF_LAYOUT.get(truth.layout, "activitynet")
    score = evaluate(truth, found, protocol=how, thresholds=at, subset=subset, blocked=blocked, recall_at=recall)
    return _Scored(truth, found, score, {})


def _whole(words: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of `--recall`, given apart or with commas."""
    found = [part.strip() for word in words for part in word.split(",") if part.strip()]
    wrong = [part for part in found if not part.isdecimal() or int(part) < 1]
    if wrong or (words and not found):
        raise TensorkeepError(f"--recall {' '.join(words)}: not whole numbers from 1", hint="--recall 1,5")
    return tuple(map(int, found))


def _analysed(
    scored: _Scored, blocked: Sequence[str], tiou: float | None, picture: Path | None, overwrite: bool
) -> ErrorAnalysis | None:
    """Return the error analysis at an IoU (0.5 where only its picture is wanted) and write the picture, or None."""
    if tiou is None and picture is None:
        return None
    at = 0.5 if tiou is None else tiou
    analysis = analyse_errors(scored.truth, scored.found, subset=scored.result.subset, blocked=blocked, tiou=at)
    if picture is not None:
        with replacing(picture, overwrite, PICTURE) as temporary:
            write_bytes(temporary, analysis.picture().encode())
    return analysis


def _changes(
    protocol: str | None, tiou: Sequence[float], recall: Sequence[int], subset: str | None, blocked: Path | None
) -> Changes:
    """What the flags change in a recipe's section `evaluation`."""
    given = {
        "protocol": protocol,
        "thresholds": list(tiou) or None,
        "recall_at": list(recall) or None,
        "subset": subset,
        "blocked": blocked and str(blocked),
    }
    return tuple((f"evaluation.{name}", json.dumps(value)) for name, value in given.items() if value is not None)


def _of_checkpoint(
    path: Path, recipe: Path | None, changes: Changes, ema: bool, newest: bool, device: str | None, out: Output
) -> tuple[_Scored | None, dict[str, Any]]:
    """What was scored, None on ranks other than the first, and what was taken."""
    from tensorkeep.detection.evaluate_run import evaluate_checkpoint
    from tensorkeep.training import distributed

    world = distributed.start(device)
    try:
        with (out if world.first else Output(quiet=True)).progress("videos") as progress:
            done = evaluate_checkpoint(path, recipe, ema, not newest, world, changes, out.remark, progress)
    finally:
        distributed.stop()
    taken = {"checkpoint": str(path), "step": done.step, "ema": done.averaged, "blocked": done.blocked}
    return _Scored(done.annotations, done.table, done.result, {}) if world.first else None, taken


def _show(out: Output, result: Evaluation, name: str) -> None:
    counts = f"{result.detections:,} detections, {sum(result.segments):,} segments, {len(result.classes)} classes"
    of = f" of {name}s" if name else ""
    out.line(f"protocol {result.protocol}{of}, subset {result.subset}: {counts}")
    header, *rows = result.table()
    out.table(header, rows, right=header[1:])


def _show_errors(out: Output, analysis: ErrorAnalysis | None) -> None:
    if analysis is None:
        return
    out.line(f"errors at tIoU {analysis.tiou:g}, by blocks of G detections (G segments of a class), in percent")
    rows = analysis.table()
    split = next(i for i, row in enumerate(rows) if row[0] == "missed")
    for header, *part in (rows[:split], rows[split:]):
        out.table(header, part, right=header[1:] if len(header) > 4 else header[2:])


def _problems(truth: Annotations, result: Evaluation) -> list[str]:
    """What is wrong with the annotations that were scored against, one line a kind."""
    subset, dropped = result.subset, PROTOCOLS[result.protocol].clean
    inside = {video.name for video in truth.of_subset(subset)} if subset in truth.subsets() else set(truth.videos)
    found = [p for p in check_annotations(truth) if p.severity != "info" and p.video in inside]
    found = [p for p in found if dropped or p.kind not in ("zero length", "duplicate")]  # a note counts those
    count = Counter(problem.kind for problem in found)
    first = {problem.kind: problem for problem in reversed(found)}
    return [f"annotations: {kind} ({count[kind]}), first {p.video}: {p.message}" for kind, p in first.items()]
