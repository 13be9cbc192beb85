"""A detector on data: detections do not depend on batches or ranks, and every way to score them gives one figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorkeep import cli
from tensorkeep.detection.data.clips import Clips
from tensorkeep.detection.evaluate_run import evaluate_checkpoint
from tensorkeep.detection.inference import MeanAveragePrecision, Selection, decode_predictions, detect, table_of
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe_data import evaluation_of, read_classes, read_clips
from tensorkeep.detection.results.evaluation import evaluate
from tensorkeep.detection.results.nms import Suppression
from tensorkeep.detection.results.results import read_detections, write_detections
from tensorkeep.detection.start import make_detector, open_detector
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.recipe import to_yaml
from tests.detection import runs
from tests.opentad_names import to_opentad
from tests.threads import one_thread  # noqa: F401
from tests.training import ranks

LOOSE = Selection(0.0, 60, Suppression(limit=60))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    return runs.dataset(tmp_path_factory.mktemp("synthetic") / "data")


@pytest.fixture(scope="module")
def made(data: Path) -> DetectionRecipe:
    return runs.recipe(data, training__ema=0.5, schedule__warmup=0, optimizer__lr=5e-3)


@pytest.fixture(scope="module")
def run(made: DetectionRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained for a while, with its recipe beside it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    runs.trained(made, folder)
    (folder / "recipe.yaml").write_text(to_yaml(made))
    return folder


def clips_of(made: DetectionRecipe) -> Clips:
    return read_clips(made, "test", read_classes(made))


def detector_of(made: DetectionRecipe) -> Any:
    return make_detector(made, None)[0].eval()


def nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


# -- windows and videos -----------------------------------------------------------------------------------------------


def test_windows_are_read_and_videos_given_one_after_another(made: DetectionRecipe) -> None:
    clips, read = clips_of(made), []

    class Watched:
        items, places, window = clips.items, clips.places, clips.window

        def sample(self, index: int, generator: torch.Generator) -> Any:
            read.append(index)
            return clips.sample(index, generator)

    found = detect(detector_of(made), Watched(), LOOSE)  # type: ignore[arg-type]
    first = [i for i, place in enumerate(clips.places) if place.item == 0]
    assert next(found)[0] == 0 and len(first) > 1
    assert read == first  # nothing of the second video was decoded to finish the first
    assert [number for number, _ in found] == list(range(1, len(clips.items)))


def test_detections_do_not_depend_on_batch_or_workers(made: DetectionRecipe) -> None:
    clips, detector = clips_of(made), detector_of(made)
    one = dict(detect(detector, clips, LOOSE))
    other = dict(detect(detector, clips, LOOSE, batch=3, workers=2))
    for number, found in one.items():
        order = np.lexsort(found.segments.T)
        again = np.lexsort(other[number].segments.T)
        assert np.allclose(found.segments[order], other[number].segments[again], atol=1e-4)
        assert np.allclose(found.scores[order], other[number].scores[again], atol=1e-5)


def test_detections_lie_in_the_video_and_fall_in_score(made: DetectionRecipe) -> None:
    clips = clips_of(made)
    for number, found in detect(detector_of(made), clips, LOOSE):
        assert 0 < len(found.scores) <= 60 and (np.diff(found.scores) <= 0).all()
        assert found.segments.min() >= 0 and found.segments.max() <= clips.items[number].duration + 1e-6


def test_a_window_in_the_middle_tells_the_time_of_the_video(made: DetectionRecipe) -> None:
    clips = clips_of(made)
    sample = clips.sample(1, torch.Generator())
    meta = sample["meta"]
    step = meta["snippet_stride"] / meta["fps"]
    detector = detector_of(made)
    with torch.no_grad():
        out = detector(sample["inputs"][None], sample["mask"][None])
    # certain of one thing: the point at grid step 5 sees an action from one step before to two steps after it
    for level in (0, 1):
        out.logits[level].fill_(-20.0)
    out.logits[0][0, 0, 5], out.offsets[0][0, :, 5] = 20.0, torch.tensor([1.0, 2.0])
    (found,) = decode_predictions(out, [meta], Selection(0.5))
    start = meta["window_start_frame"] / meta["fps"]
    assert meta["window_start_frame"] > 0
    assert np.allclose(found.segments, [[start + 4 * step, start + 7 * step]], atol=1e-4)


# -- scores -----------------------------------------------------------------------------------------------------------


ALONE = World()


def scorer(made: DetectionRecipe, world: World = ALONE) -> MeanAveragePrecision:
    return replace(evaluation_of(made, read_classes(made), world, nothing), selection=LOOSE)


def test_every_rank_gets_the_figures_of_one_process(made: DetectionRecipe, run: Path, tmp_path: Path) -> None:
    def work(world: World) -> None:
        numbers = replace(scorer(made, world), loss=True)(open_detector(run).detector)
        (tmp_path / f"{world.size}-{world.rank}").write_text(json.dumps(numbers))

    assert ranks(2, work) == [0, 0]
    work(World())
    first, second, alone = (json.loads((tmp_path / name).read_text()) for name in ("2-0", "2-1", "1-0"))
    assert first == second == alone and alone["loss"] > 0


def test_a_file_of_the_detections_scores_as_the_detector_does(made: DetectionRecipe, run: Path, tmp_path: Path) -> None:
    evaluation, detector = scorer(made), open_detector(run).detector
    found = evaluation.detections(detector)
    rows = {
        video: [(*s, evaluation.classes[k], p) for s, p, k in zip(one.segments.tolist(), one.scores, one.labels)]
        for video, one in found.items()
    }
    write_detections(tmp_path / "found.json", rows, time_decimals=12, score_decimals=12)
    read = evaluate(evaluation.annotations, read_detections(tmp_path / "found.json"), thresholds=(0.3, 0.5))
    assert read.average == pytest.approx(evaluation(detector)["average_mAP"], abs=1e-9)
    assert len(table_of(found, evaluation.classes)) == sum(len(one.scores) for one in found.values())


def test_a_run_scores_as_its_last_evaluation_said(run: Path) -> None:
    found = checkpoint.newest(run)
    assert found is not None
    then = found[0].document["evaluations"]
    from tests.training import rows

    last = [r["evaluation"] for r in rows(run) if "evaluation" in r][-1]
    scored = evaluate_checkpoint(run, best=False)
    assert scored.averaged and scored.step == 8 and len(then) == 1
    assert scored.result.average == last["average_mAP"]


def test_live_and_averaged_weights_are_those_of_the_checkpoint(run: Path) -> None:
    state = checkpoint.load(run / "checkpoints" / "step-000008")
    for ema, tensors in ((True, state.ema), (False, {n: state.model[n] for n in state.ema})):
        opened = open_detector(run / "checkpoints" / "step-000008", ema=ema)
        parameters = dict(opened.detector.named_parameters())
        assert opened.averaged is ema and not opened.detector.training
        assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())


def test_an_opentad_file_is_scored_with_a_recipe_that_is_named(run: Path, tmp_path: Path) -> None:
    live, averaged = (open_detector(run, ema=ema).detector for ema in (False, True))
    states = [{f"module.{n}": t for n, t in to_opentad(d).items()} for d in (live, averaged)]
    torch.save({"epoch": 3, "state_dict": states[0], "state_dict_ema": states[1]}, tmp_path / "epoch_3.pth")
    with pytest.raises(TensorkeepError, match="--recipe"):
        evaluate_checkpoint(tmp_path / "epoch_3.pth")
    for ema in (True, False):
        theirs = evaluate_checkpoint(tmp_path / "epoch_3.pth", run / "recipe.yaml", ema=ema)
        assert theirs.result.average == evaluate_checkpoint(run, ema=ema).result.average
        assert theirs.averaged is ema and theirs.step is None


# -- the command ------------------------------------------------------------------------------------------------------


def test_commands_train_go_on_and_evaluate(
    made: DetectionRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(made))
    train = ["train", "detection", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    short = ["--schedule.stop-epoch", "2"]
    assert cli.main([*train, *short, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == 4 and told["reason"] == "done"
    assert cli.main([*train, "--json"]) == 2  # longer than before, which was not said
    assert "training.epochs was 2.0, is 4.0" in capsys.readouterr().err
    assert cli.main([*train, "--allow", "stop_epoch", "--allow", "updates", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == 8 and told["resumed"] == "exact"
    assert cli.main(["eval", "detection", str(tmp_path / "run"), "--newest", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["average_mAP"] == told["evaluation"]["average_mAP"] and scored["step"] == 8 and scored["ema"]
    assert cli.main(["eval", "detection", str(tmp_path / "run"), "--no-ema", "--tiou", "0.1"]) == 0
    assert "live weights" in (shown := capsys.readouterr().out) and "AP@0.1" in shown


def test_print_recipe_prints_what_would_run(made: DetectionRecipe, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(made))
    flags = ["--quantize-backbone", "nf4", "--window-size", "32", "--print-recipe"]
    assert cli.main(["train", "detection", str(tmp_path / "tiny.yaml"), *flags]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    from tensorkeep.detection.recipe.text import read_recipe

    read = read_recipe(tmp_path / "printed.yaml")
    assert read.data.window_size == 32 and read.training.quantize_backbone == "nf4"


# -- data as recipes have it ------------------------------------------------------------------------------------------


def test_names_of_files_may_differ_from_those_of_videos(data: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for path in (data / "videos").iterdir():
        (tmp_path / "videos" / f"v_{path.stem}_x.mp4").symlink_to(path)
    made = runs.recipe(data, data__file_pattern="v_{video}_x.mp4", data__test__folder=str(tmp_path / "videos"))
    clips = clips_of(made)
    assert [item.name for item in clips.items] == [f"validation_{i:04d}" for i in range(3)]


def test_blocked_videos_and_short_actions_are_left_out(data: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("validation_0001\n")
    made = runs.recipe(data, data__test__blocked=str(tmp_path / "blocked.txt"), data__min_length=12.0)
    assert [item.name for item in clips_of(made).items] == ["validation_0000", "validation_0002"]
    lengths = [
        np.diff(item.segments) * item.frames / item.duration
        for item in read_clips(made, "train", read_classes(made)).items
    ]
    everything = read_clips(runs.recipe(data), "train", read_classes(made)).items
    assert np.concatenate(lengths).min() > 12 > min(np.diff(i.segments).min() * 8 for i in everything)


def test_a_class_agnostic_detector_is_named_by_the_classifier(data: Path, tmp_path: Path) -> None:
    results = {f"validation_{i:04d}": [0.9, 0.1] if i else [0.2, 0.8] for i in range(3)}
    (tmp_path / "named.json").write_text(json.dumps({"results": results, "class": ["blink", "slide"]}))
    made = runs.recipe(
        data,
        data__class_agnostic=True,
        model__head__classes=1,
        data__mode="resized",
        data__trunc_thresh=None,
        post_processing__classifier={"path": str(tmp_path / "named.json"), "top": 1},
    )
    evaluation = evaluation_of(made, read_classes(made), World(), nothing)
    found = evaluation.detections(detector_of(made))
    assert [set(one.labels.tolist()) for one in found.values()] == [{1}, {0}, {0}]
    assert all((one.labels == 0).all() for one in read_clips(made, "train", read_classes(made)).items)


def test_a_head_of_other_classes_is_refused(data: Path) -> None:
    with pytest.raises(TensorkeepError, match="the head has 5"):
        read_classes(runs.recipe(data, model__head__classes=5))
