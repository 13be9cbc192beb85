"""The page of a run: every figure of its metrics, where it belongs."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tensorkeep.commands.report.run import HEIGHT, LEFT, WIDTH, curve, run_page, write_run_page
from tensorkeep.detection.data.annotations import read_annotations
from tensorkeep.detection.results.results import write_detections
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import metrics
from tensorkeep.training.recipe import to_yaml
from tests.detection import runs


def make_run(folder: Path, steps: int = 10) -> Path:
    for step in range(1, steps + 1):
        metrics.append(folder / "metrics.jsonl", {"step": step, "loss": 2.0 / step, "lr": 1e-4})
        if step % 5 == 0:
            metrics.append(
                folder / "metrics.jsonl", {"step": step, "evaluation": {"average_mAP": 0.4 / step, "mAP@0.5": 0.25}}
            )
    return folder


def test_a_page_tells_the_last_loss_the_best_map_and_every_evaluation(tmp_path: Path) -> None:
    text = run_page(make_run(tmp_path))
    assert "<b>10</b><span>step</span>" in text and "<b>0.2</b><span>last loss</span>" in text
    assert "<b>8.00 %</b><span>best average mAP</span>" in text
    assert re.findall(r"<td class='num'>([^<]*)</td>", text) == ["5", "8.00 %", "25.00 %", "10", "4.00 %", "25.00 %"]
    assert "best: 8 at step 5" in text
    assert "<script" not in text and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_a_curve_goes_through_its_values_and_keeps_every_spike() -> None:
    def line(values: list[tuple[float, float]]) -> list[tuple[float, float]]:
        root = ElementTree.fromstring(curve(values, "x"))
        drawn = next(root.iter("polyline")).attrib["points"].split()
        return [(float(x), float(y)) for x, y in (point.split(",") for point in drawn)]

    assert line([(1, 0.0), (2, 4.0), (5, 2.0)]) == [
        (LEFT, 8 + HEIGHT),
        (LEFT + WIDTH / 4, 8),
        (LEFT + WIDTH, 8 + HEIGHT / 2),
    ]
    assert line([(3, 7.0)]) == [(LEFT, 8)]
    many = [(float(step), 1.0 if step == 54_321 else 0.0) for step in range(100_000)]
    thin = line(many)
    assert len(thin) <= 2 * WIDTH and min(y for _, y in thin) == 8
    assert [x for x, y in thin if y == 8] == pytest.approx([LEFT + 54_321 / 99_999 * WIDTH], abs=0.1)
    assert "no value" in curve([], "x")


def test_predictions_beside_a_run_are_shown_where_their_times_are(tmp_path: Path) -> None:
    rows = {"v1": [(1.0, 2.0, "dive", 0.9), (3.0, 10.0, "jump", 0.5), (0.0, 1.0, "weak", 0.1)], "<b>": []}
    write_detections(make_run(tmp_path) / "predictions" / "detections.json", rows)
    text = run_page(tmp_path)
    assert text.count('class="p"') == 2 and "dive · 0.90 · 0:01.00 to 0:02.00" in text and "weak" not in text
    assert "&lt;b&gt;" in text and "<b>v" not in text


def test_what_is_true_and_how_it_looks_come_from_the_run_s_recipe_and_are_missed_aloud(tmp_path: Path) -> None:
    pytest.importorskip("av")
    data = runs.dataset(tmp_path / "data", videos=1, held_out=2)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(to_yaml(runs.recipe(data)))
    rows = {name: [(1.0, 2.0, "blink", 0.9)] for name in ("validation_0000", "validation_0001", "elsewhere")}
    write_detections(make_run(run) / "predictions" / "detections.json", rows)
    text = run_page(run)
    truth = read_annotations(data / "annotations.json")
    true = sum(len(truth.videos[name].labels) for name in ("validation_0000", "validation_0001"))
    assert text.count('class="p"') == 3 and text.count('class="t"') == true and text.count("<image ") == 20
    assert "img-src data:" in text and "without" not in text
    (data / "videos" / "validation_0001.mp4").unlink()
    assert run_page(run).count("<image ") == 10 and run_page(run).count("without pictures: ") == 1
    (data / "annotations.json").unlink()
    text = run_page(run)
    assert "without true segments and pictures: " in text and text.count('class="p"') == 3 and "<image " not in text


def test_a_run_that_noted_nothing_finite_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": None}) + "\n")
    assert "no value was noted" in run_page(tmp_path)


def test_a_folder_without_metrics_and_a_taken_place_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TensorkeepError, match="no metrics"):
        run_page(tmp_path)
    write_run_page(make_run(tmp_path), tmp_path / "page.html")
    with pytest.raises(TensorkeepError, match="exists already"):
        write_run_page(tmp_path, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == run_page(tmp_path)
