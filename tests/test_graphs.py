"""Steps recorded as CUDA graphs; without a GPU a stand-in that only runs tries what keeps them static."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.detection._training import launched
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.output import Output
from tensorkeep.training import _graphs as graphs
from tensorkeep.training import loop as train
from tensorkeep.training._graphs import Recorded, capture_step, fill
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.shipped import shipped
from tests.detection import tiny
from tests.gpu import needs_gpu
from tests.helpers import refused
from tests.training import assert_same_run, ranks, relative_l2, small_job

LOOP = Loop(updates=6, batch=4, log_every=1, save_every=2)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording as on a GPU: rehearsals, then every call runs on the tensors that were recorded."""

    def capture(step: Callable[[], Any], warmup: int = 3) -> Callable[[], Any]:
        for _ in range(warmup):
            step()
        return step

    monkeypatch.setattr(graphs, "capture_step", capture)
    monkeypatch.setattr(train, "_possible", lambda job, loop, *_: loop)


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.usefixtures("played")
def test_a_recorded_run_is_the_launched_one_with_every_draw_of_dropout(tmp_path: Path, micro: int | None) -> None:
    """Rehearsals leave no trace: neither gradients nor random numbers, and no loss of another micro-batch."""
    loop = replace(LOOP, micro=micro)
    fit(small_job(), tmp_path / "launched", loop)
    fit(small_job(), tmp_path / "recorded", replace(loop, graph=True))
    assert relative_l2(tmp_path / "launched", tmp_path / "recorded") < 1e-7
    one, other = ([r["loss"] for r in losses(tmp_path / name)] for name in ("launched", "recorded"))
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.usefixtures("played")
def test_a_recorded_run_goes_on_exactly(tmp_path: Path) -> None:
    loop = replace(LOOP, graph=True)
    fit(small_job(), tmp_path / "whole", loop)
    fit(small_job(), tmp_path / "broken", replace(loop, updates=4))
    assert fit(small_job(), tmp_path / "broken", loop, allow=("updates",)).level == "exact"
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.usefixtures("played")
def test_ranks_that_record_add_up_to_the_run_of_one_process(tmp_path: Path) -> None:
    """No DDP: the gradients are added after the graph; micro-batches of two ranks, from the first rank's weights."""

    def work(world: World) -> None:
        torch.set_num_threads(1)
        job = small_job(dropout=0.0)
        if not world.first:
            with torch.no_grad():
                for parameter in (p for g in job.optimizer.param_groups for p in g["params"]):
                    parameter.add_(1.0)
        fit(job, tmp_path / "two", replace(LOOP, batch=8, micro=2, graph=True), world=world)

    assert ranks(2, work) == [0, 0]
    fit(small_job(dropout=0.0), tmp_path / "one", replace(LOOP, batch=8, micro=2))
    assert relative_l2(tmp_path / "two", tmp_path / "one") < 1e-6
    one, other = ([r["loss"] for r in losses(tmp_path / name)] for name in ("two", "one"))
    assert one == pytest.approx(other, rel=1e-6)


def losses(run: Path) -> list[dict[str, Any]]:
    from tensorkeep.training import metrics

    return [row for row in metrics.rows(run / metrics.METRICS) if "loss" in row]


def test_without_a_gpu_kernels_are_launched_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_job(), tmp_path / "asked", replace(LOOP, graph=True), say=Output())
    assert "needs a GPU" in capsys.readouterr().err
    fit(small_job(), tmp_path / "plain", LOOP)
    assert_same_run(tmp_path / "asked", tmp_path / "plain")


def test_left_open_a_step_is_recorded_on_one_gpu_unless_the_job_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, one, loop = small_job(), World(device=torch.device("cuda")), replace(LOOP, graph=None)

    def decided(job: Job, loop: Loop, world: World) -> tuple[bool | None, str]:
        return train._possible(job, loop, world, Output()).graph, capsys.readouterr().err

    assert decided(job, loop, one) == (True, "")
    assert decided(job, loop, World()) == (False, "")  # a CPU has none: nothing to say
    for why, (found, said) in {
        "dropout": decided(replace(job, launched="dropout"), loop, one),
        "compiled": decided(job, replace(loop, compile=True), one),
        "several processes": decided(job, loop, replace(one, size=2)),
    }.items():
        assert found is False and said.count("\n") == 1 and why in said, why
    fit(job, tmp_path / "open", loop)
    fit(small_job(), tmp_path / "plain", LOOP)
    assert_same_run(tmp_path / "open", tmp_path / "plain")


def test_which_of_the_recipes_here_are_recorded() -> None:
    """The conditions are those of the parts: dropout that is drawn again, and ways that keep random states."""
    found = {r.name: launched(read_recipe(r.name).model) for r in shipped() if r.kind == "detection"}
    assert {name for name, why in found.items() if why} == {
        "adatad_thumos_videomae_s_lora",  # dropout of its updates
        "adatad_thumos_videomae_s_qlora",
        "adatad_thumos_videomae_v2_g_lora",
        "adatad_thumos_videomae_s_side",  # its ladder
        "adatad_thumos_videomae_v2_g_side",
    }, found


def test_a_batch_of_another_form_is_refused() -> None:
    held = {"x": torch.zeros(2, 3), "y": [torch.zeros(2)]}
    for batch in ({**held, "x": torch.zeros(3, 3)}, {**held, "x": torch.zeros(2, 3).long()}, {**held, "y": []}):
        with refused(None, "where the recorded one held"):
            fill(held, batch)


@needs_gpu
def test_a_recorded_step_trains_as_a_launched_one() -> None:
    losses = []
    for recorded in (False, True):
        torch.manual_seed(0)
        detector = tiny.detector(checkpointing="segments").cuda().train()
        frames, mask, segments, labels = tiny.batch()
        moved = frames.cuda(), mask.cuda(), [s.cuda() for s in segments], [y.cuda() for y in labels]
        optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-3, capturable=True)

        def step() -> torch.Tensor:
            loss = detector.loss(detector(*moved[:2]), *moved[2:]).cost  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            return loss.detach()

        run = capture_step(step, warmup=2) if recorded else step
        losses.append([run().item() for _ in range(3 if recorded else 5)])
    assert losses[1] == pytest.approx(losses[0][2:], rel=1e-4)


@needs_gpu
def test_a_recorded_backward_adds_to_the_gradients_and_draws_anew() -> None:
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(64, device="cuda"))

        def work(batch: torch.Tensor, divisor: torch.Tensor) -> dict[str, torch.Tensor]:
            loss = torch.nn.functional.dropout(weight * batch).sum() / divisor  # noqa: B023
            loss.backward()
            return {"loss": loss.detach()}

        run = Recorded(work, [weight]) if recorded else work
        batches = [torch.full((64,), float(number), device="cuda") for number in (1, 2, 3)]
        sums = [float(run(batch, torch.tensor(2.0, device="cuda"))["loss"]) for batch in batches]
        found.append((sums, weight.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
