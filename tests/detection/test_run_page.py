"""The page of a run: every figure of its metrics, where it belongs."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from tensorkeep.cli import main
from tensorkeep.commands.report._curves import HEIGHT, WIDTH, Line, curves
from tensorkeep.commands.report._series import Series, read_figures
from tensorkeep.commands.report.compare import compare_page
from tensorkeep.commands.report.run import run_page, write_run_page
from tensorkeep.detection.data.annotations import read_annotations
from tensorkeep.detection.results.results import write_detections
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import metrics
from tensorkeep.training.recipe import to_yaml
from tests.detection import runs
from tests.test_report import EVIL, is_harmless, plain


def make_run(folder: Path, steps: int = 10, scale: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    for step in range(1, steps + 1):
        row = {"step": step, "samples": 4 * step, "loss": 2.0 * scale / step, "lr": 1e-4, "count": 8, "seconds": 0.5}
        metrics.append(folder / "metrics.jsonl", row)
        if step % 5 == 0:
            numbers = {"average_mAP": 0.4 * scale / step, "mAP@0.5": 0.25}
            metrics.append(folder / "metrics.jsonl", {"step": step, "evaluation": numbers})
    return folder


def cells(text: str) -> list[list[str]]:
    return [plain(row) for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_a_page_tells_the_last_loss_the_best_map_the_pace_and_every_evaluation(tmp_path: Path) -> None:
    text = run_page(make_run(tmp_path))
    is_harmless(text)
    assert "<b>10</b><span>step</span>" in text and "<b>0.2</b><span>last loss</span>" in text
    assert "<b>8</b><span>best average mAP, percent, step 5</span>" in text
    assert ["5", "8.0000", "25.0000"] in cells(text) and ["10", "4.0000", "25.0000"] in cells(text)
    assert "best: 8 at step 5" in text
    figures = read_figures(tmp_path)
    assert {block.mean for block in figures.rate.blocks} == {8.0} and figures.seconds == 5.0
    assert "No resume was noted" in text and "Memory" not in text


def test_a_page_begins_with_what_the_run_found_and_draws_its_memory(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    metrics.append(run / "metrics.jsonl", {"step": 11, "loss": 0.15, "memory": 2.5})
    text = run_page(run)
    said = "Step 11. Loss 2 at step 1, 0.15 at step 11. Best evaluated average mAP 8 %, at step 5."
    assert f"<p class='said'>{said}</p>" in text
    assert "memory in GiB, the most of the process until then" in text and "most: 2.5 GiB at step 11" in text
    (tmp_path / "two").mkdir()
    assert "<p class='said'>Best evaluated average mAP " in compare_page([run, make_run(tmp_path / "two", scale=0.5)])


def drawn(values: list[tuple[int, float]], most: int = 600) -> dict[str, list[tuple[float, float]]]:
    """What is drawn of a series: the line and the band, in the plane's own measure."""
    series = Series(most)
    for step, value in values:
        series.add(step, value)
    found = {}
    for kind, way in re.findall(r'<path class="(band )?[^"]*" d="M([^"Zh]*)[Z"]', curves("x", [Line("x", series)])):
        found[kind or "line"] = [tuple(map(float, point.split(","))) for point in way.split("L")]
    return found


def test_a_curve_goes_through_its_values_and_keeps_every_spike() -> None:
    assert drawn([(1, 0.0), (2, 4.0), (5, 2.0)])["line"] == [(0, HEIGHT), (WIDTH / 4, 0), (WIDTH, HEIGHT / 2)]
    assert drawn([(3, 7.0)])["line"] == [(WIDTH / 2, HEIGHT / 2)]
    found = drawn([(step, 1.0 if step == 11_111 else 0.0) for step in range(20_000)])
    assert len(found["line"]) <= 600 and len(found["band "]) <= 1200
    (spike,) = [x for x, y in found["band "] if y == 0]
    assert spike == pytest.approx(11_111 / 19_999 * WIDTH, abs=2)
    assert "no value" in curves("x", [Line("x", Series())])


def test_a_long_run_is_read_in_bounded_memory_and_keeps_least_and_greatest(tmp_path: Path) -> None:
    lines = [
        f'{{"step": {n}, "loss": {9.5 if n == 777 else 0.25 if n == 7_999 else 1.0}, "lr": 0.1}}\n'
        for n in range(8_000)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 8000, "lo')  # torn by a kill
    del lines
    tracemalloc.start()
    figures = read_figures(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    loss = figures.losses["loss"]
    assert figures.rows == 8_000 and sum(block.count for block in loss.blocks) == 8_000 and peak < 1_500_000
    assert 300 <= len(loss.blocks) <= 600 and (loss.best_high, loss.best_low) == ((777, 9.5), (7_999, 0.25))
    assert len(run_page(tmp_path)) < 400_000


def test_rows_that_are_no_rows_are_an_error_and_odd_numbers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\nx\n{"step": 3, "loss": 0.5}\n')
    with pytest.raises(TensorkeepError, match="line 2 is no row"):
        run_page(tmp_path)
    odd = [{"step": 10**30, "loss": 1}, {"step": 2, "loss": 10**400, "seconds": "x", "samples": -1, "lr": True}]
    odd += [{"step": 3, "evaluation": {f"n{n}": n for n in range(500)}}, {"step": 4, "evaluation": 7}]
    odd += [{"step": 5, "loss": None, "seconds": 0, "samples": 2, "count": 1e300}]
    path.write_text("".join(json.dumps(row) + "\n" for row in odd))
    is_harmless(run_page(tmp_path))


def test_resumes_are_listed_with_what_was_proven(tmp_path: Path) -> None:
    make_run(tmp_path)
    place = tmp_path / "checkpoints"
    place.mkdir()
    found = [
        {"step": 4, "equal": True, "steps": [5, 6]},
        {"step": 6, "equal": False, "steps": [7], "was": (0.5).hex(), "now": (0.75).hex(), "differs": ["torch a -> b"]},
        {"step": 8, "equal": None, "steps": []},
        {"step": 9, "equal": True, "steps": EVIL, "was": 7},
    ]
    (place / "resumes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (place / "proof.jsonl").write_text(json.dumps({"checkpoint": 8, "step": 9, "loss": "0x1p-1"}) + "\n")
    text = run_page(tmp_path)
    is_harmless(text)
    assert ["1", "4", "steps 5, 6", "exact: equal to the losses before, bit for bit"] in cells(text)
    assert ["2", "6", "step 7", "not bitwise what it was: loss 0.5, then 0.75; differs in torch a -&gt; b"] in cells(
        text
    )
    nothing = "nothing to compare: no later step had been made before"
    assert ["3", "8", "none", nothing] in cells(text) and ["4", "9", "none", nothing] in cells(text)
    assert "<b>1 of 4</b>" in text and text.count('class="mark"') == 4 and "losses of 1 step after" in text


def test_nothing_of_a_hostile_run_becomes_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<script>window.ran=1;<script>")
    for row in ({"loss": 1, f"{EVIL}loss": 2.0, EVIL: 3.0}, {"evaluation": {EVIL: 0.5}}):
        metrics.append(folder / "metrics.jsonl", {"step": 11, **row})
    (folder / "recipe.yaml").write_text(json.dumps({EVIL: {EVIL: EVIL}}) + "# </pre><script>window.ran=1</script>")
    write_detections(folder / "predictions" / "detections.json", {EVIL: [(0.0, 1.0, EVIL, 0.9)]})
    is_harmless(run_page(folder))
    (folder / "recipe.yaml").write_text(json.dumps({EVIL: {EVIL: EVIL}}))
    is_harmless(compare_page([folder, make_run(tmp_path / "b'\"><img src=x onerror=alert(1)>")]))


def test_runs_are_compared_with_recipes_final_figures_and_spread(tmp_path: Path) -> None:
    for name, seed, lr, scale in (("a0", 0, 0.1, 1.0), ("a1", 1, 0.1, 2.0), ("b0", 0, 0.2, 1.0)):
        recipe = {"training": {"seed": seed, "batch": 4}, "optimizer": {"lr": lr}}
        (make_run(tmp_path / name, scale=scale) / "recipe.yaml").write_text(json.dumps(recipe))
    text = compare_page([tmp_path / name for name in ("a0", "a1", "b0")])
    is_harmless(text)
    assert ["optimizer.lr", "0.1", "0.1", "0.2"] in cells(text) and ["training.seed", "0", "1", "0"] in cells(text)
    assert not [row for row in cells(text) if row[0] == "training.batch"]
    assert ["loss, mean of the last tenth", "0.2", "0.4", "0.2"] in cells(text)
    assert ["loss, mean of the last tenth", "0.3", "0.1414", "0.2", "0.4", "2"] in cells(text)
    assert "<h3>a0, a1</h3>" in text and text.count("one run: no spread") == 1
    (loss,) = re.findall(r"<figure [^>]*><figcaption>loss</figcaption>.*?</figure>", text)
    assert re.findall(r'<g data-line="(\d)"', loss) == ["0", "1", "2"]


def test_a_comparison_is_of_two_runs_or_more_with_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for sources, message in (([run], "1 runs"), ([run] * 25, "25 runs"), ([run, tmp_path / "two"], "no metrics")):
        with pytest.raises(TensorkeepError, match=message):
            compare_page(sources)
    out = str(tmp_path / "page.html")
    assert main(["report", "compare", str(run), str(run), "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "page": out}
    text = Path(out).read_text()
    assert "<span>one (1)</span>" in text and "<span>one (2)</span>" in text and "recipe.yaml" in text


def test_predictions_beside_a_run_are_shown_where_their_times_are(tmp_path: Path) -> None:
    rows = {"v1": [(1.0, 2.0, "dive", 0.9), (3.0, 10.0, "jump", 0.5), (0.0, 1.0, "weak", 0.1)], "<b>": []}
    write_detections(make_run(tmp_path) / "predictions" / "detections.json", rows)
    text = run_page(tmp_path)
    assert text.count('<rect class="p"') == 2 and "dive, score 0.90, 0:01.00 to 0:02.00" in text and "weak" not in text
    assert 'class="p" x="10.00%" width="10.00%"' in text and ["0:01.00", "0:02.00", "dive", "found", "0.900"] in cells(
        text
    )
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
    is_harmless(text)
    truth = read_annotations(data / "annotations.json")
    true = sum(len(truth.videos[name].labels) for name in ("validation_0000", "validation_0001"))
    key = 1  # of the legend
    assert text.count('class="p"') == 3 + key and text.count('class="t"') == true + key
    assert text.count("<img ") == 20 and "without pictures" not in text
    assert "Class by class" in text and "What each kind of error costs" in text
    (data / "videos" / "validation_0001.mp4").unlink()
    assert run_page(run).count("<img ") == 10 and run_page(run).count("without pictures: ") == 1
    (data / "annotations.json").unlink()
    text = run_page(run)
    assert "without true segments and pictures: " in text and text.count('<rect class="p"') == 3 and "<img " not in text


def test_detections_of_any_program_have_a_page_with_their_errors(tmp_path: Path) -> None:
    found, truth = tmp_path / "found.json", tmp_path / "truth.json"
    segments = [{"segment": [0.0, 4.0], "label": "dive"}, {"segment": [6.0, 8.0], "label": EVIL}]
    truth.write_text(json.dumps({"database": {"v": {"subset": "test", "duration": 9.0, "annotations": segments}}}))
    write_detections(found, {"v": [(0.0, 4.0, "dive", 0.9), (6.0, 8.0, "dive", 0.8), (4.5, 5.5, EVIL, 0.7)]})
    out = str(tmp_path / "page.html")
    assert main(["report", str(found), "--annotations", str(truth), "-o", out]) == 0
    text = Path(out).read_text()
    is_harmless(text)
    assert ["dive", "1", "0", "100.00", "1", "0", "0", "0", "0", "0"] in cells(text)
    rows = [row for row in cells(text) if row[1:] == ["1", "1", "0.00", "0", "0", "0", "0", "0", "1"]]
    assert len(rows) == 1
    assert main(["report", str(found), "-o", out, "--overwrite"]) == 0 and "Class by class" not in Path(out).read_text()
    assert main(["report", str(found), "--videos", str(tmp_path), "-o", out, "--overwrite"]) == 2


def test_an_evaluation_s_document_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, truth = tmp_path / "found.json", tmp_path / "truth.json"
    segments = [{"segment": [0.0, 4.0], "label": "dive"}]
    truth.write_text(json.dumps({"database": {"v": {"subset": "test", "duration": 9.0, "annotations": segments}}}))
    write_detections(found, {"v": [(0.0, 4.0, "dive", 0.8), (5.0, 8.0, "dive", 0.9)]})
    words = ["eval", "detection", "--annotations", str(truth), "--detections", str(found), "--json"]
    assert main([*words, "--errors", "0.5"]) == 0
    scored = tmp_path / "scored.json"
    scored.write_text(capsys.readouterr().out)
    assert main(["report", str(scored), "-o", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    is_harmless(text)
    assert ["dive", "1", *["50.00"] * 10] in cells(text)
    assert ["background", "+50.00", "where nothing is annotated"] in cells(text)


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


def rows_of(folder: Path, losses: list[float]) -> Path:
    for step, loss in enumerate(losses, 1):
        folder.mkdir(exist_ok=True)
        metrics.append(folder / metrics.METRICS, {"step": step, "samples": step, "loss": loss, "seconds": 0.1})
    return folder


def test_a_run_whose_loss_is_lost_never_shows_an_earlier_one_as_its_last(tmp_path: Path) -> None:
    lost = rows_of(tmp_path / "lost", [3.0, 2.0, float("nan"), float("nan")])
    said = run_page(lost)
    assert "The loss is no finite number in 2 of 4 rows, the last one too." in said
    assert "<b>no number</b><span>last loss</span>" in said
    found = run_page(rows_of(tmp_path / "found", [3.0, float("inf"), 2.0]))
    assert "in 1 of 3 rows." in found and "<b>2</b><span>last loss</span>" in found


def test_a_comparison_ranks_no_run_that_ended_without_a_loss_and_none_of_equal_ones(tmp_path: Path) -> None:
    lost = rows_of(tmp_path / "lost", [1.0, float("nan")])
    high, low, same = (rows_of(tmp_path / n, [v, v]) for n, v in (("high", 3.0), ("low", 2.0), ("same", 2.0)))
    said = compare_page([lost, high, low])
    assert "Best mean loss of the last tenth 2: low. All 2: 2 to 3. Without it: lost." in said
    assert "The last loss is no finite number: lost." in said
    assert "All 2 are equal: mean loss of the last tenth 2." in compare_page([low, same])
    assert "Best mean loss of the last tenth 2: low, same. All 3" in compare_page([high, low, same])


def test_a_run_before_its_first_update_is_called_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young, old = tmp_path / "young", rows_of(tmp_path / "old", [1.0])
    young.mkdir()
    (young / "status.json").write_text("{}")
    for words in (["report", str(young)], ["report", "compare", str(old), str(young)]):
        assert main([*words, "-o", str(tmp_path / "page.html")]) == 2
        told = capsys.readouterr().err
        assert "young: is a run that has made no update yet" in told and "tensorkeep watch" in told


def test_a_closed_folder_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:  # root may read all: the system's answer is put in its place
        patched.setattr(Path, "is_file", closed)
        code = main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")])
    told = capsys.readouterr()
    assert code == 2 and told.out == "" and told.err.splitlines()[0].endswith("metrics.jsonl: permission denied")
