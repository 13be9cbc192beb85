"""Chapter `detection`: what it trains is the recipe of the docs, and each of its promises can be broken."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("av")

from tensorkeep.commands.demo import detection as demo_detection
from tensorkeep.commands.demo import resume as demo_resume
from tensorkeep.detection.data.annotations import read_annotations
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.detection.results.results import write_detections
from tensorkeep.storage import run_folder
from tensorkeep.training import metrics
from tensorkeep.training.recipe import plain, to_yaml
from tests.detection import runs


def test_the_chapter_trains_the_recipe_that_the_docs_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            demo_detection.detection_recipe(Path("data/synthetic/detection"), Path("data/synthetic/pretrained"))
        )
    )
    assert plain(read_recipe(path)) == plain(read_recipe("synthetic_tiny"))


def test_a_run_that_is_over_before_the_signal_is_not_called_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run, proof = tmp_path / "run", tmp_path / "run" / "checkpoints" / "proof.jsonl"
    sleep = ["python3", "-m", "timeit", "-n1", "-r1", "import time; time.sleep(60)"]
    monkeypatch.setattr(demo_resume, "command", lambda *_: sleep)
    monkeypatch.setattr(run_folder, "steps", lambda _run: [30])
    proof.parent.mkdir(parents=True)
    metrics.append(proof, {"checkpoint": 30, "step": 31})
    assert demo_detection.kill_at_random(Path("r"), run, 0.05, 99, said.append)
    monkeypatch.setattr(run_folder, "steps", lambda _run: [75])  # nearly done, but nothing to compare a resume with
    sleep[-1] = f"""
import time; time.sleep(0.3); open({str(proof)!r}, "a").write('{{"checkpoint": 75, "step": 76}}\\n'); time.sleep(60)"""
    assert demo_detection.kill_at_random(Path("r"), run, 60, 99, said.append)
    assert "75" in proof.read_text()
    monkeypatch.setattr(demo_resume, "command", lambda *_: ["true"])
    assert not demo_detection.kill_at_random(Path("r"), run, 60, 999, said.append)
    assert [line.rpartition(", ")[2] for line in said] == ["0 updates told of"] * 3


def test_a_detector_that_learned_too_little_fails_the_chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = runs.dataset(tmp_path / "data", videos=2, held_out=1)
    made = runs.recipe(data, training__evaluate_every=2, training__epochs=2)
    run, said = tmp_path / "run", list[str]()
    runs.trained(made, run)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(made))
    for name in ("evaluate_checkpoint", "evaluate_untrained"):  # the figures stay, what is asked of them changes
        monkeypatch.setattr(demo_detection, name, functools.cache(getattr(demo_detection, name)))
    assert not demo_detection.evaluated(recipe, run, said.append)
    assert [line.rpartition("  ")[2] for line in said[2:5]] == [
        "untrained",
        "trained, last weights",
        "trained, averaged weights",
    ]
    monkeypatch.setattr(demo_detection, "LEARNED", 0.0)
    monkeypatch.setattr(demo_detection, "UNTRAINED", 1.0)
    assert demo_detection.evaluated(recipe, run, said.append)
    monkeypatch.setattr(demo_detection, "UNTRAINED", 0.0)  # it knew too much before
    assert not demo_detection.evaluated(recipe, run, said.append)


def test_a_detection_stands_beside_the_true_segment_that_it_fits_best(tmp_path: Path) -> None:
    runs.dataset(tmp_path / "videos", videos=1, held_out=1)
    video = read_annotations(tmp_path / "videos" / "annotations.json").videos["validation_0000"]
    (start, end), label = video.segments[0].tolist(), video.labels[0]
    rows: list[Any] = [
        (start, end, label, 0.4),
        (start, end + 0.5, label, 0.9),
        (start, end, "other", 0.8),
        (start, end, label, 0.1),
    ]
    write_detections(tmp_path / "run" / "predictions" / "detections.json", {video.name: rows})
    lines = demo_detection.against_truth(video.name, tmp_path)
    assert len(lines) == 2 + len(video.labels)
    assert lines[1].split()[0] == label and lines[1].endswith("IoU 1.00, score 0.40")
    assert all("nothing that fits" in line for line, other in zip(lines[2:-1], video.labels[1:]) if other != label)
    assert lines[-1].strip() == "and 2 detections more that score 0.3 or better"
