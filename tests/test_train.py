"""The loop: what an update computes, what is written when, and what stops it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training._evaluating import best_step, evaluated, stops_early
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.saver import Keep
from tests.helpers import refused
from tests.training import collate, dying, rows, small_job

LOOP = Loop(updates=6, batch=5, log_every=1)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, so nothing need wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# -- an update --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_accumulation_is_the_gradient_of_the_whole_batch(micro: int, tmp_path: Path) -> None:
    """Also where samples count differently: the divisor is that of the whole batch, not a mean of means."""

    def weigh(job: Job) -> Job:
        def count(batch: Mapping[str, Any]) -> float:
            return float(sum(1 + i % 4 for i in batch["index"]))

        def loss(model: nn.Module, batch: Mapping[str, Any], divisor: float) -> dict[str, Tensor]:
            weights = torch.tensor([1.0 + i % 4 for i in batch["index"]])[:, None]
            return {"loss": ((model(batch["x"]) - batch["y"]).square() * weights).sum() / divisor}

        return replace(job, count=count, loss=loss)

    one, many = weigh(small_job(dropout=0.0)), weigh(small_job(dropout=0.0))
    fit(one, tmp_path / "one", LOOP)
    fit(many, tmp_path / "many", replace(LOOP, micro=micro))
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "many"), strict=True):
        assert a["count"] == b["count"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for a, b in zip(one.model.parameters(), many.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_loop_is_the_loop_one_would_write_by_hand(tmp_path: Path) -> None:
    job, hand = small_job(dropout=0.0, ema=False), small_job(dropout=0.0, ema=False)
    fit(job, tmp_path, replace(LOOP, clip=0.5))
    from tensorkeep.training.randomness import generator, order

    for update in range(6):
        keys = [divmod(p, 23) for p in range(update * 5, update * 5 + 5)]
        picked = [(e, int(order(0, e, 23)[at])) for e, at in keys]
        batch = collate([hand.data.sample(i, generator(0, e, i)) for e, i in picked])
        hand.optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (update + 1) / 10)
        hand.optimizer.zero_grad()
        (hand.model(batch["x"]) - batch["y"]).square().mean().backward()
        nn.utils.clip_grad_norm_([p for p in hand.model.parameters() if p.requires_grad], 0.5)
        hand.optimizer.step()
    for a, b in zip(job.model.parameters(), hand.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_frozen_weights_stay_to_the_bit(tmp_path: Path) -> None:
    job = small_job()
    before = job.model.enter.weight.clone()
    fit(job, tmp_path, LOOP)
    assert torch.equal(before, job.model.enter.weight)


def test_the_schedule_sets_each_group_from_its_own_base(tmp_path: Path) -> None:
    job = small_job(ema=False)
    trained = [p for p in job.model.parameters() if p.requires_grad]
    groups = [{"params": trained[:2], "lr": 1e-3}, {"params": trained[2:], "lr": 1e-1}]
    fit(replace(job, optimizer=torch.optim.SGD(groups)), tmp_path, LOOP)
    assert [r["lr"] for r in rows(tmp_path)] == [pytest.approx(1e-4 * k) for k in range(1, 7)]


# -- what is written --------------------------------------------------------------------------------------------------


def test_rows_say_step_samples_and_numbers(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    fit(small_job(evaluate=True, trackers=[seen.append]), tmp_path, replace(LOOP, log_every=2, evaluate_every=3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "evaluation" in r) for r in lines] == [
        (1, False),
        (2, False),
        (3, True),
        (4, False),
        (6, False),
        (6, True),
    ]
    assert lines == seen
    assert all(r["samples"] == 5 * r["step"] for r in lines)
    assert set(lines[0]) == {"step", "samples", "loss", "lr", "grad_norm", "count", "seconds", "memory"}
    assert all(0 < r["memory"] < 1024 for r in lines if "loss" in r)  # GiB


def test_the_rate_that_a_person_sees_says_of_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_job(), tmp_path / "samples", LOOP, say=Output())
    fit(replace(small_job(), pace=("frames", 1e12)), tmp_path / "frames", LOOP, say=Output())
    first, second = (line for line in capsys.readouterr().err.splitlines() if f"step {LOOP.updates}/" in line)
    assert re.search(r"\d samples/s", first)
    assert int(re.search(r"([\d,]+) frames/s", second)[1].replace(",", "")) > 1e12  # type: ignore[index]


def test_the_recipe_lies_in_the_run(tmp_path: Path) -> None:
    job = small_job()
    fit(job, tmp_path, LOOP)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == job.recipe


def test_evaluation_begins_where_it_is_told_to_and_never_misses_the_end(tmp_path: Path) -> None:
    fit(small_job(evaluate=True), tmp_path, replace(LOOP, evaluate_every=1, evaluate_from=4))
    assert [r["step"] for r in rows(tmp_path) if "evaluation" in r] == [4, 5, 6]
    fit(small_job(evaluate=True), tmp_path / "end", replace(LOOP, evaluate_from=99))
    assert [r["step"] for r in rows(tmp_path / "end") if "evaluation" in r] == [6]


def test_the_best_checkpoint_stays_and_is_named(tmp_path: Path) -> None:
    values = iter([0.3, 0.9, 0.1, 0.9, 0.2, 0.5])
    job = replace(small_job(), evaluate=lambda model: {"mAP": next(values)})
    fit(job, tmp_path, replace(LOOP, evaluate_every=1, best="mAP", keep=Keep(last=1)))
    assert checkpoint.best(tmp_path) == 2 and checkpoint.steps(tmp_path) == [6, 2]


def test_evaluation_sees_the_average_and_changes_nothing(tmp_path: Path) -> None:
    from tensorkeep.training.distributed import World
    from tensorkeep.training.interruption import Wish

    job = small_job()
    assert job.ema is not None
    for tensor in job.ema.tensors.values():
        tensor.fill_(0.25)
    job = replace(
        job, evaluate=lambda m: {"mean": float(m.leave.weight.mean() + torch.rand(()) * 0), "on": float(m.training)}
    )
    before = {n: t.clone() for n, t in job.model.state_dict().items()}
    state = torch.get_rng_state()
    assert evaluated(job, World(), Wish()) == {"mean": 0.25, "on": 0.0}
    assert torch.equal(state, torch.get_rng_state()) and job.model.training
    assert all(torch.equal(before[n], t) for n, t in job.model.state_dict().items())


# -- what stops it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(bad: float, tmp_path: Path) -> None:
    job = small_job()
    calls = 0

    def loss(model: nn.Module, batch: Mapping[str, Any], divisor: float) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {"loss": job.loss(model, batch, divisor)["loss"] * (bad if calls == 4 else 1.0)}

    with refused("V01", "the loss of step 4"):
        fit(replace(job, loss=loss), tmp_path, replace(LOOP, save_every=1))
    assert checkpoint.steps(tmp_path) == [3, 2, 1]
    assert fit(small_job(), tmp_path, replace(LOOP, save_every=1)).level == "exact"


def test_weights_that_are_not_finite_are_not_saved_even_unlogged(tmp_path: Path) -> None:
    job = small_job(ema=False)

    def schedule(update: int, base: float) -> float:
        return float("nan") if update == 2 else base

    with refused("V01"):
        fit(replace(job, schedule=schedule), tmp_path, replace(LOOP, log_every=100, save_every=1))
    assert checkpoint.steps(tmp_path) == [2, 1]


def test_an_error_inside_gives_the_run_back(tmp_path: Path) -> None:
    def fails(model: nn.Module) -> dict[str, float]:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(replace(small_job(), evaluate=fails), tmp_path, replace(LOOP, background=True))
    outcome = fit(small_job(evaluate=True), tmp_path, LOOP)  # neither locked nor broken
    assert outcome.reason == "done" and "error" in outcome.evaluation


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    fit(small_job(), tmp_path, LOOP)
    saver = checkpoint.Saver(tmp_path)
    try:
        (tmp_path / "metrics.jsonl").open("a").write('{"step": 7, "loss": 1.0}\n')
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with refused(None, "saves into it already"):
            fit(small_job(), tmp_path, LOOP)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before  # not rewound under the other's feet
    finally:
        saver.close()


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({}, {"best": "mAP"}, "the job has none"),
        ({"evaluate": True}, {"patience": 2}, "patience needs the number"),
        ({"evaluate": True}, {"best": "mAP"}, "no 'mAP' among"),
        ({}, {"batch": 0}, "must be positive"),
    ],
)
def test_what_cannot_be_meant_is_an_error(
    fields: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(TensorkeepError, match=words):
        fit(small_job(**fields), tmp_path, replace(LOOP, **options))


def test_what_trains_outside_the_model_is_an_error(tmp_path: Path) -> None:
    job = small_job(ema=False)
    stray = nn.Parameter(torch.zeros(3))
    job.optimizer.add_param_group({"params": [stray], "lr": 1e-2})
    with refused(None, "not in the model"):
        fit(job, tmp_path, LOOP)


def test_patience_counts_evaluations_since_the_best() -> None:
    loop = Loop(updates=9, batch=1, best="-loss", patience=2)
    seen = [{"step": s, "loss": v} for s, v in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0))]
    assert [stops_early(loop, seen[:n]) for n in range(5)] == [False, False, False, False, True]
    assert best_step(loop, seen) == 2
    assert stops_early(loop, [{"step": 1, "loss": None}, {"step": 2, "loss": None}])  # never a number: never better


def test_a_dead_run_holds_no_lock_in_its_own_process(tmp_path: Path) -> None:
    with pytest.raises(BaseException):  # noqa: B017
        fit(dying(small_job(), 2), tmp_path, LOOP)
    assert fit(small_job(), tmp_path, LOOP).reason == "done"


@pytest.mark.parametrize("background", [True, False])
def test_rows_are_on_the_disk_before_the_checkpoint_of_their_step(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(
        metrics, "sync", lambda _: seen.append((rows(tmp_path)[-1]["step"], checkpoint.steps(tmp_path)))
    )
    fit(small_job(), tmp_path, replace(LOOP, save_every=2, keep=Keep(9), background=background))
    for step, (newest, there) in zip((2, 4, 6), seen, strict=True):
        assert newest >= step and step not in there and set(there) == set(range(2, step, 2))
