"""Parity with the data sets' own evaluation scripts: `python -m tests.parity.evaluators DIR --python PEER`.

DIR holds the scripts, unmodified: `ActivityNet/Evaluation/{eval_detection,utils}.py` (activitynet/ActivityNet@82304fa),
`C2-Action-Detection/EvaluationCode/evaluate_detection_json_ek100.py` (epic-kitchens, 4835721) and
`episodic-memory/MQ/Evaluation/` (EGO4D, 5275b95). PEER is a Python with numpy, pandas and joblib
(`benchmarks/envs/evaluators.txt`). Random files of each seed, with repeated and empty segments, with videos and classes
on one side only, once without equal scores and once with many: there the scripts' own sort decides, and the figure must
lie within what orders of equal scores can give.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tensorkeep.detection.results.epic import evaluate_epic
from tensorkeep.detection.results.evaluation import evaluate_files
from tests.parity.outcome import Outcome, guarded, report

SAME = 1e-9
TIOU = [0.1, 0.2, 0.3, 0.4, 0.5]
PEER = """
import json, sys, types, contextlib, io
from pathlib import Path
import numpy as np
np.float = float  # its name before numpy 1.24
kind, root, truth, found = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
tiou = np.array(json.loads(sys.argv[5]))
import joblib
class Parallel:  # in one process
    def __init__(self, n_jobs): pass
    def __call__(self, calls): return [f(*a, **k) for f, a, k in calls]
joblib.Parallel = Parallel
said = io.StringIO()
with contextlib.redirect_stdout(said):
    if kind == "activitynet":  # of Python 2: its prints, iteritems and urllib2 are renamed, nothing else
        import re
        sys.modules["urllib2"] = types.ModuleType("urllib2")
        for name in ("utils", "eval_detection"):
            text = (root / "ActivityNet/Evaluation" / (name + ".py")).read_text().replace(".iteritems()", ".items()")
            text = re.sub(r"^( *)print (.*)$", r"\\1pass", text, flags=re.M)
            module = sys.modules[name] = types.ModuleType(name)
            exec(compile(text, name, "exec"), module.__dict__)
        one = sys.modules["eval_detection"].ANETdetection(truth, found, tiou_thresholds=tiou, check_status=False)
        one.evaluate()
        answer = {"mAP": one.mAP.tolist()}
    elif kind == "epic":
        import pandas as pd
        sys.path.insert(0, str(root / "C2-Action-Detection/EvaluationCode"))
        import evaluate_detection_json_ek100 as epic
        annotations, submission = pd.read_csv(truth), json.load(open(found))
        answer = {}
        for label in ("verb", "noun", "action"):
            answer[label] = epic.ANETdetection(annotations, submission, tiou, label, 300).evaluate()[0].tolist()
    else:
        sys.path.insert(0, str(root / "episodic-memory/MQ"))
        from Evaluation.ego4d import eval_detection, get_retrieval_performance
        one = eval_detection.ANETdetection(truth, found, subset="val", tiou_thresholds=tiou)
        answer = {"mAP": one.evaluate()[0].tolist()}
        two = get_retrieval_performance.Moment_Retrieval(truth, found, subset="val")
        answer["recall"] = two.evaluate().tolist()  # [0.3, 0.5, 0.7] x [1 .. 5]
print(json.dumps(answer))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args(argv)

    def all_cases() -> Iterator[Outcome]:
        for seed in range(given.seeds):
            for ties in (False, True):
                for kind, cases in (("activitynet", activitynet), ("epic", epic), ("ego4d-mq", ego4d)):
                    name = f"{kind}/seed{seed}/{'ties' if ties else 'plain'}"
                    with tempfile.TemporaryDirectory() as folder:
                        run = Path(folder)

                        def ask(truth: Path, found: Path, kind: str = kind, run: Path = run) -> Any:
                            words = [kind, given.folder.resolve(), truth.resolve(), found.resolve(), json.dumps(TIOU)]
                            done = subprocess.run(
                                [given.python, "-c", PEER, *map(str, words)], cwd=run, capture_output=True, text=True
                            )
                            assert done.returncode == 0, done.stderr[-600:]
                            return json.loads(done.stdout)

                        yield from guarded(name, lambda c=cases, n=name, r=run, s=seed, t=ties, a=ask: c(n, r, s, t, a))

    return report(all_cases())


def rows_of(seed: int, ties: bool) -> tuple[list[Any], list[Any]]:
    """Segments (video, start, end, verb, noun) and detections (..., score); a fifth of the segments come twice."""
    draw = np.random.default_rng(seed)
    truth, found = [], []
    for number in range(8):
        video = f"P{number:02d}_{100 + number}"
        for _ in range(int(draw.integers(3, 9))):
            start = round(float(draw.uniform(0, 50)), 2)
            end = round(start + float(draw.uniform(0.5, 10)), 2)
            verb, noun = int(draw.integers(0, 4)), int(draw.integers(0, 3))
            truth += [(video, start, end, verb, noun)] * (2 if draw.random() < 0.2 else 1)
            for _ in range(4):
                a, b = sorted((start + float(draw.normal(0, 1.2)), end + float(draw.normal(0, 1.2))))
                score = float(draw.integers(1, 6)) / 8 if ties else float(draw.random())
                label = (verb, noun) if draw.random() < 0.8 else (int(draw.integers(0, 4)), int(draw.integers(0, 3)))
                found.append((video, max(a, 0.0), b + 0.05, *label, score))
    truth += [("P00_100", 3.0, 3.0, 0, 0), ("P90_190", 1.0, 4.0, 1, 1)]
    found += [("P91_191", 1.0, 4.0, 1, 1, 0.5), ("P91_191", 2.0, 5.0, 1, 1, 0.501)]
    return truth, sorted(found, key=lambda row: -row[-1])  # Ego4D's recall takes rows in file order


def activitynet(name: str, folder: Path, seed: int, ties: bool, ask: Any) -> Iterator[Outcome]:
    """mAP of ActivityNet's script."""
    truth, found = rows_of(seed, ties)
    database: dict[str, Any] = {}
    for video, start, end, verb, _ in truth:
        entry = database.setdefault(video, {"subset": "validation", "duration": 70.0, "annotations": []})
        entry["annotations"].append({"segment": [start, end], "label": f"c{verb}"})
    write(folder / "gt.json", {"version": "VERSION 1.3", "taxonomy": [], "database": database})
    write(folder / "found.json", {"version": "VERSION 1.3", "results": results(found), "external_data": {}})
    theirs = ask(folder / "gt.json", folder / "found.json")
    ours = evaluate_files(folder / "gt.json", folder / "found.json", protocol="activitynet", thresholds=TIOU)
    yield outcome(f"{name}/mAP", ours, theirs["mAP"])


def epic(name: str, folder: Path, seed: int, ties: bool, ask: Any) -> Iterator[Outcome]:
    """mAP of verbs, nouns and actions of EPIC-Kitchens' script."""
    truth, found = rows_of(seed, ties)
    with (folder / "EPIC_100_validation.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["narration_id", "video_id", "start_timestamp", "stop_timestamp", "verb_class", "noun_class"])
        for place, (video, start, end, verb, noun) in enumerate(truth):
            rows.writerow([f"{video}_{place}", video, clock(start), clock(end), verb, noun])
    made: dict[str, list[Any]] = {}
    for video, start, end, verb, noun, score in found:
        row = {"verb": verb, "noun": noun, "action": f"{verb},{noun}", "score": score, "segment": [start, end]}
        made.setdefault(video, []).append(row)
    write(folder / "submission.json", {"version": "0.2", "challenge": "action_detection", "results": made})
    theirs = ask(folder / "EPIC_100_validation.csv", folder / "submission.json")
    ours = evaluate_epic(folder / "EPIC_100_validation.csv", folder / "submission.json", thresholds=TIOU)
    for task, (_, _, score) in ours.items():
        yield outcome(f"{name}/{task}", score, theirs[task])


def ego4d(name: str, folder: Path, seed: int, ties: bool, ask: Any) -> Iterator[Outcome]:
    """mAP and recall of Ego4D's scripts; its recall needs a detection in every annotated clip, and no empty segment."""
    truth, found = rows_of(seed, ties)
    truth = [row for row in truth if row[2] > row[1] and row[0] in {other[0] for other in found}]
    clips: dict[str, Any] = {}
    for video, start, end, verb, _ in truth:
        entry = clips.setdefault(video, {"clip_id": video, "video_id": "u", "subset": "val", "annotations": []})
        entry["annotations"].append({"start_time": start, "end_time": end, "label": f"c{verb}"})
    write(folder / "clips.json", clips)
    write(folder / "found.json", {"version": "1.0", "results": results(found), "external_data": {}})
    theirs = ask(folder / "clips.json", folder / "found.json")
    ours = evaluate_files(folder / "clips.json", folder / "found.json", protocol="ego4d-mq", thresholds=TIOU)
    yield outcome(f"{name}/mAP", ours, theirs["mAP"])
    files = folder / "clips.json", folder / "found.json"
    again = evaluate_files(*files, protocol="ego4d-mq", thresholds=[0.3, 0.5, 0.7], recall_at=range(1, 6))
    figures = np.array([again.recall[k] for k in range(1, 6)]).T
    yield Outcome(f"{name}/recall", float(np.abs(figures - np.array(theirs["recall"])).max()), SAME)


def outcome(name: str, ours: Any, theirs: list[float]) -> Outcome:
    """The distance; where equal scores leave an order open, how far their figure lies outside what our note says."""
    figure = float(np.abs(ours.map - np.array(theirs)).max())
    ties = [re.search(r"others (\S+) to (\S+):", note) for note in ours.notes]
    found = next((match for match in ties if match), None)
    if found is None:
        return Outcome(name, figure, SAME)
    low, high = (float(text) / 100 for text in found.groups())
    mean = float(np.mean(theirs))
    more = f"equal scores: {ours.average:.4f} in {low:.4f} to {high:.4f}, theirs {mean:.4f}"
    return Outcome(name, max(low - mean, mean - high, 0.0), 5.1e-5, more)


def results(found: list[Any]) -> dict[str, Any]:
    """Detections as ActivityNet's JSON has them."""
    made: dict[str, list[Any]] = {}
    for video, start, end, verb, _, score in found:
        made.setdefault(video, []).append({"segment": [start, end], "label": f"c{verb}", "score": score})
    return made


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600):02d}:{int(seconds % 3600 // 60):02d}:{seconds % 60:05.2f}"


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
