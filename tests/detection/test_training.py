"""Training a detector: its loss is the original's, its runs survive kills to the bit, and no split changes them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorkeep.detection._training import Collate, DetectionLoss, Normalizer, count_positives, positives_of
from tensorkeep.detection.data.batches import collate
from tensorkeep.detection.inference import MeanAveragePrecision, _batches_of
from tensorkeep.detection.job import build
from tensorkeep.detection.start import make_detector, open_detector
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.modules import quantized_layers
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.batches import Stream
from tensorkeep.training.distributed import World
from tensorkeep.training.live_state import stored_tensors
from tensorkeep.training.loop import fit
from tensorkeep.training.randomness import generator
from tests.detection import runs, tiny
from tests.threads import one_thread  # noqa: F401
from tests.training import assert_same_run, ranks, relative_l2, rows

QLORA = {
    "training__quantize_backbone": "nf4",
    "model__backbone__lora": {"lora_r": 4, "lora_dropout": 0.1},
    "model__backbone__vit__drop_path": 0.2,
    "model__projection__drop_path": 0.1,
    "optimizer__groups": [{"pattern": "adapter", "lr": 2e-3}, {"pattern": "lora_*", "lr": 1e-3}],
}
QLORA_ADAPTERS = {
    "model__backbone__adapter": {"kind": "qlora", "ratio": 0.5, "lora_r": 4, "lora_dropout": 0.1, "quantize_bits": 4}
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    return runs.dataset(tmp_path_factory.mktemp("synthetic") / "data")


# -- the loss ---------------------------------------------------------------------------------------------------------


def masked_batch(most: int | None = None) -> dict[str, Any]:
    frames, mask, segments, labels = tiny.batch()
    keys = ("inputs", "mask", "segments", "labels")
    samples = [dict(zip(keys, row)) | {"meta": {}} for row in zip(frames, mask, segments, labels)]
    return Collate(tiny.detector().config, most)(samples)


def test_positives_counted_before_a_forward_are_those_of_the_loss() -> None:
    batch, detector = masked_batch(), tiny.detector().eval()
    predictions = detector(batch["inputs"], batch["masks"])
    found = detector.loss(predictions, batch["segments"], batch["labels"]).positives
    assert positives_of(batch) == float(found) > 0


def test_positives_of_an_odd_length_follow_the_levels_of_the_model() -> None:
    detector = tiny.detector(output_length=7)
    mask = torch.ones(1, 7, dtype=torch.bool)
    segments, labels = [torch.tensor([[0.0, 7.0], [1.0, 2.5]])], [torch.tensor([0, 1])]
    out = detector.eval()(torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8), mask)
    assert count_positives(mask, segments, labels, detector.config) == int(
        detector.loss(out, segments, labels).positives
    )


def test_one_process_without_accumulation_computes_the_originals_loss_and_normaliser() -> None:
    batch, detector = masked_batch(), tiny.detector().train()
    other = copy.deepcopy(detector)
    for _ in range(3):
        divisor = Normalizer(detector)(positives_of(batch))
        shares = DetectionLoss(detector)(detector, batch, divisor)
        whole = other.loss(other(batch["inputs"], batch["masks"]), batch["segments"], batch["labels"])
        assert torch.equal(shares["loss"], whole.cost) and torch.equal(shares["reg_loss"], whole.reg_loss)
        assert torch.equal(detector.head.get_buffer("loss_normalizer"), other.head.get_buffer("loss_normalizer"))


@pytest.mark.parametrize("near_ties", [False, True])
@pytest.mark.parametrize("radius", [None, 1.5])
def test_ground_truth_filled_up_to_one_shape_teaches_the_same_to_the_bit(radius: float | None, near_ties: bool) -> None:
    start, found = tiny.detector().train(), []
    start.head.config = replace(start.head.config, centre_radius=radius, near_ties=near_ties)
    for most in (None, 7):
        batch, detector = masked_batch(most), copy.deepcopy(start)
        assert most is None or [tuple(s.shape) for s in batch["segments"]] == [(7, 2)] * 2
        DetectionLoss(detector)(detector, batch, torch.tensor(5.0))["loss"].backward()
        grads = [p.grad for p in detector.parameters() if p.grad is not None]
        found.append((positives_of(batch), grads))
    assert found[0][0] == found[1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(*(grads for _, grads in found)))


def test_a_sample_without_segments_is_filled_up_with_what_nothing_learns() -> None:
    detector = tiny.detector().train()
    nothing = {
        "inputs": torch.zeros(3, 8, 32, 32, dtype=torch.uint8),
        "mask": torch.ones(8, dtype=torch.bool),
        "segments": torch.zeros(0, 2),
        "labels": torch.zeros(0, dtype=torch.long),
        "meta": {},
    }
    shares = []
    for most in (None, 3):
        batch = Collate(detector.config, most)([nothing])
        assert positives_of(batch) == 0
        shares.append(DetectionLoss(detector)(detector, batch, torch.tensor(1.0)))
    assert torch.equal(shares[0]["loss"], shares[1]["loss"]) and float(shares[1]["reg_loss"].detach()) == 0


def test_ground_truth_is_never_cut_to_fit() -> None:
    with pytest.raises(TensorkeepError, match="2 segments, there is room for 1"):
        masked_batch(1)


def test_a_recorded_run_is_the_launched_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one shape, the moving divisor as a tensor, drop path: all of `graph: true` but the graph itself."""

    def capture(step: Any, warmup: int = 3) -> Any:
        for _ in range(warmup):
            step()
        return step

    monkeypatch.setattr("tensorkeep.training._graphs.capture_step", capture)
    monkeypatch.setattr("tensorkeep.training.loop._possible", lambda job, loop, *_: loop)
    for graph in (False, True):
        runs.trained(runs.recipe(data, training__graph=graph, **QLORA), tmp_path / str(graph))
    assert relative_l2(tmp_path / "False", tmp_path / "True") < 1e-6
    one, other = ([r["loss"] for r in rows(tmp_path / name) if "loss" in r] for name in ("False", "True"))
    assert np.allclose(one, other, rtol=1e-6) and len(one) == 8


def test_a_loss_that_is_no_sum_is_not_split(data: Path, tmp_path: Path) -> None:
    made = runs.recipe(data, model__head__loss_weight=-1.0, training__micro_batch=1)
    with pytest.raises(TensorkeepError, match="ratio"):
        build(made, tmp_path)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_marks_the_best_checkpoint(data: Path, tmp_path: Path) -> None:
    outcome = runs.trained(
        runs.recipe(
            data, optimizer__lr=5e-3, training__epochs=15, training__save_every=15, training__evaluate_every=15
        ),
        tmp_path,
    )
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert outcome.step == 30 and np.mean(losses[-6:]) < 0.75 * np.mean(losses[:6])
    evaluations = {row["step"]: row["evaluation"]["average_mAP"] for row in rows(tmp_path) if "evaluation" in row}
    assert checkpoint.best(tmp_path) == max(evaluations, key=lambda step: (evaluations[step], -step))


def test_options_that_began_with_language_runs_are_carried_out_here_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    compiled: list[bool] = []
    monkeypatch.setattr("tensorkeep.training.trackers.wandb", lambda run, project: told.append)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model.training))
    options = {"best": "-loss", "patience": 1, "keep_last": 1, "keep_every": 2, "compile": True, "clip": None}
    options |= {"trackers": ["wandb"], "evaluate_every": 1, "save_every": 1, "evaluate_from": 2, "background": False}
    # nothing moves, so no evaluation is better than the first
    still: dict[str, Any] = {"schedule__kind": "constant", "schedule__warmup": 0, "optimizer__lr": 0}
    still |= {"optimizer__groups": [{"pattern": "adapter", "lr": 0}], "training__ema": None, "training__updates": 8}
    made = runs.recipe(data, **still, **{f"training__{name}": value for name, value in options.items()})
    outcome = runs.trained(made, tmp_path)
    assert (outcome.reason, outcome.step) == ("stopped early", 3) and "loss" in outcome.evaluation
    assert checkpoint.best(tmp_path) == 2 and checkpoint.steps(tmp_path) == [3, 2] and compiled == [True]
    assert [row["step"] for row in told if "evaluation" in row] == [2, 3]
    assert [row["step"] for row in told if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("changes", [{}, QLORA, QLORA_ADAPTERS], ids=["adapters", "nf4 and LoRA", "QLoRA adapters"])
def test_a_killed_run_ends_bitwise_where_it_would_have_ended(
    data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    made = runs.recipe(data, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.trained(made, whole)
    for at in (4, 4):
        runs.killed(made, broken, at)
    assert runs.trained(made, broken).level == "exact"
    assert_same_run(whole, broken)


def test_a_checkpoint_holds_what_trains_and_buffers_alone(data: Path, tmp_path: Path) -> None:
    runs.trained(runs.recipe(data, **QLORA), tmp_path)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[0].base is not None
    detector, _ = make_detector(runs.recipe(data, **QLORA), tmp_path)
    trainable = {name for name, p in detector.named_parameters() if p.requires_grad}
    assert set(found[0].model) == trainable | {"head.loss_normalizer", "backbone.pos_embed"}
    assert set(found[0].ema) == trainable
    assert set(stored_tensors(detector, base=True)[0]) == set(found[0].model)


def test_micro_batches_make_the_same_updates(data: Path, tmp_path: Path) -> None:
    for micro in (1, 2):
        runs.trained(runs.recipe(data, training__micro_batch=micro), tmp_path / str(micro))
    one, two = ([r for r in rows(tmp_path / m) if "loss" in r] for m in "12")
    assert [r["count"] for r in one] == [r["count"] for r in two]
    assert np.allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-5)
    assert relative_l2(tmp_path / "1", tmp_path / "2") < 1e-5


def names_of(batch: Any) -> list[str]:
    return [meta["video"] for meta in batch["meta"]]


def test_two_ranks_train_as_one_process_does(data: Path, tmp_path: Path) -> None:
    made = runs.recipe(data, training__epochs=5, training__evaluate_every=100)

    def work(world: World) -> None:
        heard: list[list[str]] = []
        place = tmp_path / f"{world.size}"
        job, loop = build(made, place, world)
        fit(runs.listening(job, lambda batch: heard.append(names_of(batch))), place, loop, world=world)
        (tmp_path / f"ids-{world.size}-{world.rank}").write_text(json.dumps(heard))

    assert ranks(2, work) == [0, 0]
    work(World())
    parts = [json.loads((tmp_path / f"ids-2-{rank}").read_text()) for rank in (0, 1)]
    together = [sorted(a + b) for a, b in zip(*parts)]
    alone = [sorted(batch) for batch in json.loads((tmp_path / "ids-1-0").read_text())]
    assert len(alone) == 10 and together == alone
    assert relative_l2(tmp_path / "2", tmp_path / "1") < 1e-5


WHOLE = {
    "model__backbone__adapter": None,
    "model__backbone__tuning": "all",
    "model__backbone__checkpointing": "blocks",
    "optimizer__groups": [{"pattern": "^backbone", "lr": 1e-3, "weight_decay": 0.05}],
}


@pytest.mark.parametrize("changes", [WHOLE, {}], ids=["trained whole", "adapters"])
def test_a_detector_in_shards_is_trained_evaluated_and_gone_on_with(tmp_path: Path, changes: dict[str, Any]) -> None:
    """FSDP on two ranks, of which one has a forward more to evaluate; one process goes on from its checkpoint."""
    data = runs.dataset(tmp_path / "data", held_out=4)
    made = runs.recipe(data, training__parallel="fsdp", **changes)
    evaluate = build(made, tmp_path / "counted")[0].evaluate
    assert isinstance(evaluate, MeanAveragePrecision)
    assert len({len(_batches_of(evaluate.clips, range(rank, 4, 2), evaluate.batch)) for rank in (0, 1)}) == 2

    def work(world: World) -> None:
        torch.set_num_threads(1)
        job, loop = build(made, tmp_path / "shards", world)
        fit(job, tmp_path / "shards", replace(loop, updates=4), world=world)
        assert any(hasattr(p, "full_tensor") for p in job.model.parameters())

    assert ranks(2, work, seconds=60) == [0, 0]
    runs.trained(made, tmp_path / "through", updates=6)
    shutil.copytree(tmp_path / "through", tmp_path / "alone")
    checkpoint.run_folder.delete(tmp_path / "alone", [6])
    assert relative_l2(tmp_path / "shards", tmp_path / "alone") < 1e-5
    both = [[r for r in rows(tmp_path / name) if r["step"] <= 4] for name in ("shards", "alone")]
    one, other = ([r["evaluation"] for r in found if "evaluation" in r] for found in both)
    assert len(one) == len(other) == 1 and one[0] == pytest.approx(other[0], abs=1e-6)
    norms = [[r["grad_norm"] for r in found if "grad_norm" in r] for found in both]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    goes_on_as_if_nothing_had_been(made, tmp_path)


def goes_on_as_if_nothing_had_been(made: Any, folder: Path) -> None:
    """From two processes on one, and from one on two: weights, average, mAP and norms of a run that never stopped."""

    def on(name: str, world: World) -> None:
        torch.set_num_threads(1)
        job, loop = build(made, folder / name, world)
        done = fit(job, folder / name, replace(loop, updates=6), world=world, allow=("updates",))
        assert done.level == "sample-exact" and done.step == 6

    shutil.copytree(folder / "alone", folder / "spread")
    on("shards", World())
    assert ranks(2, lambda world: on("spread", world), seconds=60) == [0, 0]
    wanted = [r for r in rows(folder / "through") if r["step"] > 4]
    for name in ("shards", "spread"):
        assert relative_l2(folder / name, folder / "through") < 1e-5
        found = [r for r in rows(folder / name) if r["step"] > 4]
        assert [sorted(r) for r in found] == [sorted(r) for r in wanted]
        for row, other in zip(found, wanted):
            numbers = row.get("evaluation") or {k: row[k] for k in ("loss", "grad_norm")}
            assert numbers == pytest.approx({k: (other.get("evaluation") or other)[k] for k in numbers}, abs=1e-5)


def test_a_job_proves_its_codes_on_every_process(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[int] = []
    monkeypatch.setattr(
        "tensorkeep.detection.job.check_ranks", lambda model, peers: proven.append(len(quantized_layers(model)))
    )
    build(runs.recipe(data, training__quantize_backbone="nf4"), tmp_path)
    assert len(proven) == 1 and proven[0] > 0


def test_shards_and_a_backbone_that_reaches_into_its_blocks_are_refused(data: Path) -> None:
    with pytest.raises(TensorkeepError, match="checkpointing segments"):
        runs.recipe(data, training__parallel="fsdp", model__backbone__checkpointing="segments")


def test_every_sample_comes_once_an_epoch(data: Path, tmp_path: Path) -> None:
    job, loop = build(runs.recipe(data), tmp_path)
    keys = Stream(loop.seed, len(job.data)).keys(0, loop.updates * loop.batch)
    assert len(keys) == 4 * len(job.data) and len(set(keys)) == len(keys)


def test_a_detector_learns_from_features_without_a_backbone(tmp_path: Path) -> None:
    made = features(tmp_path)
    runs.trained(made, tmp_path / "run")
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None and found[0].base is None
    assert [r for r in rows(tmp_path / "run") if "evaluation" in r]


def features(folder: Path) -> Any:
    """A recipe over features: rows of noise, in which an action is a shift of one channel."""
    noise, database = np.random.default_rng(0), {}
    for number in range(5):
        rows_of = noise.normal(size=(24, 8)).astype(np.float32)
        rows_of[6:12, number % 2] += 3
        np.save(folder / f"v{number}.npy", rows_of)
        database[f"v{number}"] = {
            "subset": "training" if number < 3 else "validation",
            "duration": 24.0,
            "frame": 96,
            "annotations": [{"segment": [6.0, 12.0], "label": "ab"[number % 2]}],
        }
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    document = runs.document(folder)
    document["model"]["backbone"] = None
    document["model"]["projection"]["in_channels"] = 8
    for part in ("train", "test"):
        document["data"][part]["folder"] = str(folder)
    document["data"] |= {
        "inputs": "features",
        "mode": "whole",
        "file_pattern": "{video}.npy",
        "feature_stride": 4,
        "augment": None,
        "class_map": None,
    }
    document["optimizer"]["groups"] = []
    from tensorkeep.detection.recipe.text import detection_recipe

    return detection_recipe(document)


# -- the base ---------------------------------------------------------------------------------------------------------


def test_a_trained_backbone_is_the_base_of_the_next_run(data: Path, tmp_path: Path) -> None:
    whole = {
        "model__backbone__adapter": None,
        "model__backbone__tuning": "all",
        "training__epochs": 2,
        "schedule__warmup": 0,
        "optimizer__groups": [{"pattern": "^backbone", "lr": 1e-3, "weight_decay": 0.05}],
    }
    runs.trained(runs.recipe(data, **whole), tmp_path / "first")
    made = runs.recipe(data, training__pretrained=str(tmp_path / "first"), **QLORA)
    runs.trained(made, tmp_path / "second")
    state = checkpoint.load(tmp_path / "second" / "checkpoints" / "step-000008")
    assert state.base is not None and state.base["path"] == str(tmp_path / "first")
    first = open_detector(tmp_path / "first").detector
    plain, _ = make_detector(runs.recipe(data, training__pretrained=str(tmp_path / "first")), None)
    assert first.backbone is not None and plain.backbone is not None
    for name, tensor in first.backbone.state_dict().items():
        assert torch.equal(plain.backbone.state_dict()[name], tensor), name
    with pytest.raises(TensorkeepError, match="adapters alone"):
        make_detector(runs.recipe(data, training__pretrained=str(tmp_path / "second")), None)


def test_a_resume_on_another_base_is_refused(data: Path, tmp_path: Path) -> None:
    whole = {
        "model__backbone__adapter": None,
        "model__backbone__tuning": "all",
        "training__epochs": 1,
        "schedule__warmup": 0,
        "optimizer__groups": [{"pattern": "^backbone", "lr": 1e-3, "weight_decay": 0.05}],
    }
    for seed in (1, 2):
        runs.trained(runs.recipe(data, training__seed=seed, **whole), tmp_path / f"base{seed}")
    (tmp_path / "base").symlink_to(tmp_path / "base1")
    made = runs.recipe(data, training__pretrained=str(tmp_path / "base"))
    runs.trained(made, tmp_path / "run")
    (tmp_path / "base").unlink()
    (tmp_path / "base").symlink_to(tmp_path / "base2")
    with pytest.raises(TensorkeepError, match=r"base\.digest"):
        runs.trained(made, tmp_path / "run")
    with pytest.raises(TensorkeepError, match="A04"):
        open_detector(tmp_path / "run")


def test_frozen_weights_that_no_file_holds_are_kept_in_the_run(data: Path, tmp_path: Path) -> None:
    made = runs.recipe(data)
    runs.trained(made, tmp_path)
    (tmp_path / "base" / "frozen.safetensors").unlink()
    with pytest.raises(TensorkeepError, match="frozen weights of the run are gone"):
        runs.trained(made, tmp_path)


def test_building_takes_nothing_from_the_processs_random_state(data: Path, tmp_path: Path) -> None:
    made, before = runs.recipe(data), torch.get_rng_state()
    one, _ = make_detector(made, tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    other, _ = make_detector(made, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_a_sample_depends_on_its_key_alone(data: Path, tmp_path: Path) -> None:
    job, _ = build(runs.recipe(data), tmp_path)
    one, other = (job.data.sample(1, generator(3, 2, 1)) for _ in range(2))
    assert torch.equal(one["inputs"], other["inputs"])
    assert collate([one])["meta"] == collate([other])["meta"]
