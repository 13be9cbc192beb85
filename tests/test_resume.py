"""Exact resume: a run that died and went on is, bit for bit, the run that never died."""

from __future__ import annotations

import gc
import importlib
import mmap
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.output import Output
from tensorkeep.storage import durable
from tensorkeep.training import _resume as resuming
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.saver import Keep, State
from tests.gpu import needs_gpu
from tests.helpers import refused
from tests.training import Died, assert_same_run, dying, lived, relative_l2, rows, small_job


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, so nothing need wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


LOOP = Loop(updates=14, batch=5, save_every=2, log_every=1)  # 23 samples: an epoch ends within update 5 and 10


def cosine(update: int, base: float) -> float:
    return float(base * 0.5 * (1 + torch.cos(torch.tensor(update / 14 * 3.14159))))


# name: (job, loop, forwards after which each start dies)
MATRIX: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "mid-epoch": ({}, {}, (4,)),
    "two resumes in one epoch": ({}, {}, (4, 3)),
    "second epoch": ({}, {}, (8,)),
    "before the first checkpoint": ({}, {}, (2,)),
    "killed again and again": ({}, {}, (6, 4, 4, 3, 4)),
    "accumulation": ({}, {"micro": 1}, (17,)),
    "ragged accumulation": ({}, {"micro": 2}, (11, 9)),
    "in the middle of an accumulated update": ({}, {"micro": 1, "save_every": 1}, (13, 8)),
    "bf16": ({}, {"precision": "bf16"}, (7,)),
    "fp16 with its scaler": ({}, {"precision": "fp16"}, (7, 5)),
    "evaluation inside": ({"evaluate": True}, {"evaluate_every": 3}, (5, 6)),
    "best and retention": ({"evaluate": True}, {"evaluate_every": 1, "best": "-error", "keep": Keep(last=1)}, (5, 6)),
    "early stop": ({"evaluate": True}, {"evaluate_every": 1, "best": "error", "patience": 6}, (3, 4)),
    "no average": ({"ema": False}, {}, (9,)),
    "schedule": ({"schedule": cosine}, {"clip": 0.01}, (6, 6)),
    "saved behind training": ({}, {"background": True}, (6, 6)),
}


@pytest.mark.parametrize("row", MATRIX)
def test_a_run_that_died_ends_bitwise_where_it_would_have(row: str, tmp_path: Path) -> None:
    fields, options, deaths = MATRIX[row]
    given = dict(fields)
    schedule = given.pop("schedule", None)

    def make() -> Job:
        job = small_job(**given)
        return replace(job, schedule=schedule) if schedule else job

    loop = replace(LOOP, **options)
    whole = lived(make, tmp_path / "whole", loop)
    parts = lived(make, tmp_path / "parts", loop, deaths)
    assert parts.reason == whole.reason and parts.step == whole.step and parts.evaluation == whole.evaluation
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    if row == "early stop":
        assert whole.reason == "stopped early" and whole.step < loop.updates


@needs_gpu
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_too_with_saves_behind_training(precision: Any, deterministic: bool, tmp_path: Path) -> None:
    world = World(device=torch.device("cuda:0"))

    def make() -> Job:
        return small_job(evaluate=True, device="cuda:0")

    loop = replace(LOOP, precision=precision, evaluate_every=3, deterministic=deterministic)
    fit(make(), tmp_path / "whole", loop, world=world)
    with pytest.raises(Died):
        fit(dying(make(), 6), tmp_path / "parts", loop, world=world)
    assert fit(make(), tmp_path / "parts", loop, world=world).level == ("exact" if deterministic else "sample-exact")
    if deterministic:
        assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert relative_l2(tmp_path / "whole", tmp_path / "parts") < 1e-5


@pytest.mark.parametrize("workers", [(0, 1), (2, 0, 1)])
def test_the_number_of_workers_changes_nothing_even_between_starts(workers: tuple[int, ...], tmp_path: Path) -> None:
    lived(small_job, tmp_path / "whole", LOOP)
    lived(small_job, tmp_path / "parts", LOOP, (5, 5)[: len(workers) - 1], workers)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_fp16_skips_it_skips_again(tmp_path: Path) -> None:
    class Overflowing(torch.nn.Module):
        """Gradients overflow at first, so that the scale must come down."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 3e3

    def make() -> Job:
        job = small_job(ema=False)
        model = Overflowing(job.model)
        return replace(job, model=model)

    loop = replace(LOOP, precision="fp16")
    lived(make, tmp_path / "whole", loop)
    lived(make, tmp_path / "parts", loop, (5, 5))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = checkpoint.newest(tmp_path / "whole")
    assert found is not None and found[0].document["scaler"]["scale"] < 65536


def test_an_object_with_state_of_its_own_goes_on(tmp_path: Path) -> None:
    class Counter:
        def __init__(self) -> None:
            self.calls = 0

        def count(self, batch: dict[str, Any]) -> float:
            self.calls += 1
            return float(len(batch["index"]) * (1 + self.calls % 3))

        def state_dict(self) -> dict[str, Any]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.calls = state["calls"]

    def make() -> Job:
        counter = Counter()
        return replace(small_job(), count=counter.count, state={"counter": counter})

    lived(make, tmp_path / "whole", LOOP)
    lived(make, tmp_path / "parts", LOOP, (6, 4))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    # the same object without its declaration is named in the manifest
    fit(replace(make(), state={}), tmp_path / "undeclared", LOOP)
    found = checkpoint.newest(tmp_path / "undeclared")
    assert found is not None and found[0].not_captured == ("count (Counter)",)


def test_extra_state_of_a_module_is_named_as_not_captured(tmp_path: Path) -> None:
    class Extra(torch.nn.Identity):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    job = small_job()
    job.model.add_module("extra", Extra())
    fit(job, tmp_path, replace(LOOP, updates=1))
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[0].not_captured == ("model (extra._extra_state)",)


# -- between a checkpoint, its evaluation and its mark ----------------------------------------------------------------


class Cut:
    """Dies at the n-th call of a function."""

    def __init__(self, real: Any, at: int, after: bool) -> None:
        self.real, self.left, self.after = real, at, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Died
        result = self.real(*args, **kwargs)
        if self.left == 0:
            raise Died
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize(
    "place",
    [
        "tensorkeep.training.metrics.append",
        "tensorkeep.training.metrics.sync",
        "tensorkeep.training.saver.mark_best",
        "tensorkeep.training._evaluating.evaluated",
        "tensorkeep.training.saver.Saver.save",
        "tensorkeep.training.metrics.rewind",
    ],
)
def test_death_between_any_two_records_leaves_nothing_out(
    place: str, at: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Job:
        return small_job(evaluate=True)

    loop = replace(LOOP, updates=6, evaluate_every=2, best="-error", keep=Keep(last=1))
    lived(make, tmp_path / "whole", loop)
    module, _, name = place.rpartition(".")
    owner: Any = checkpoint.Saver if "Saver" in module else importlib.import_module(module)
    cut = Cut(getattr(owner, name), at, after)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, lambda *args, **kwargs: cut(*args, **kwargs))
        died = False
        try:
            fit(make(), tmp_path / "parts", loop)
        except Died:
            died = True
    assert died or place.endswith("rewind")
    fit(make(), tmp_path / "parts", loop)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_damaged_checkpoint_is_passed_over_and_its_rows_are_made_again(tmp_path: Path) -> None:
    def make() -> Job:
        return small_job(evaluate=True)

    loop = replace(LOOP, evaluate_every=4, best="-error")
    lived(make, tmp_path / "whole", loop)
    lived(make, tmp_path / "parts", replace(loop))
    newest = tmp_path / "parts/checkpoints/step-000014/optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[-9] ^= 4
    newest.write_bytes(data)
    outcome = fit(make(), tmp_path / "parts", loop)
    assert outcome.level == "exact"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_gpu_promises_the_same_bits_only_with_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    world = World(device=torch.device("cuda"))
    for on, promised in ((False, "sample-exact"), (True, "exact")):
        loop = replace(LOOP, deterministic=on)
        level, why = resuming._level(loop, world, {"facts": resuming.facts(loop, world), "optimizer": {}}, [])
        assert level == promised and bool(why) is not on


# -- a run that is over, and one that is not the same -----------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True], ids=["moments are kept", "moments are copied"])
def test_no_file_stays_in_memory_that_the_state_does_not_lie_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    """Counters are views into the optimizer's file as well; alone they must not keep it."""
    files: list[tuple[int, weakref.ref[Any]]] = []

    class Memory(mmap.mmap):
        pass

    def noted(size: int, real: Any = durable.allocate) -> memoryview:
        made = real(size, Memory)
        files.append((size, weakref.ref(made.obj)))
        return made

    def job() -> Job:
        made = small_job()
        if turned:  # laid out in another way than in the file
            for parameter in made.model.parameters():
                parameter.data = parameter.data.t().contiguous().t() if parameter.dim() == 2 else parameter.data
        return made

    fit(small_job(), tmp_path, replace(LOOP, updates=4))
    monkeypatch.setattr(durable, "allocate", noted)
    resumed = job()
    fit(resumed, tmp_path, replace(LOOP, updates=4, save_every=None))
    gc.collect()
    left = [size for size, memory in files if memory() is not None]
    used = sum(t.nbytes for slots in resumed.optimizer.state.values() for t in slots.values())
    assert len(files) >= 3 and sum(left) < 2 * used * (not turned) + 1


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    first = fit(small_job(evaluate=True), tmp_path, LOOP)
    fit(small_job(evaluate=True), tmp_path, LOOP)  # proofs of checkpoints that are gone go here
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    again = fit(small_job(evaluate=True), tmp_path, LOOP)
    assert (again.reason, again.step, again.evaluation) == ("done", first.step, first.evaluation)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_longer_run_is_an_explicit_choice(tmp_path: Path) -> None:
    fit(small_job(), tmp_path, LOOP)
    longer = replace(LOOP, updates=20)
    with refused("R04", "updates was 14, is 20"):
        fit(small_job(), tmp_path, longer)
    assert fit(small_job(), tmp_path, longer, allow=("epochs",)).step == 20
    assert fit(small_job(), tmp_path, replace(longer, updates=22), allow=("updates",)).step == 22


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": {"training": {"lr": 1e-2, "dropout": 0.5}}}, "training.dropout was 0.2, is 0.5"),
        ({"recipe": {"training": {"lr": 1e-2}}}, "training.dropout was 0.2, is None"),
        ({"base": {"digest": "x"}}, "base.digest was None, is 'x'"),
    ],
)
def test_a_changed_recipe_is_an_error_that_says_what_changed(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    fit(small_job(), tmp_path, LOOP)
    with refused("R04", words):
        fit(replace(small_job(), **change), tmp_path, LOOP)


def test_changed_data_seed_or_batch_is_an_error(tmp_path: Path) -> None:
    fit(small_job(), tmp_path, LOOP)
    with refused("R04", "batch was 5, is 6; seed was 0, is 1"):
        fit(small_job(), tmp_path, replace(LOOP, batch=6, seed=1))
    job = small_job()
    job.data.fingerprint = lambda: "other"  # type: ignore[method-assign]
    with refused("R04", "data.fingerprint"):
        fit(job, tmp_path, LOOP)


def test_an_order_from_elsewhere_must_come_again(tmp_path: Path) -> None:
    orders = {1: list(range(23))}
    fit(small_job(orders=orders), tmp_path, LOOP)
    assert fit(small_job(orders=orders), tmp_path, LOOP).level == "exact"
    with refused("R04", "data.orders.1"):
        fit(small_job(), tmp_path, LOOP)


def test_what_does_not_change_the_numbers_may_change(tmp_path: Path) -> None:
    recipe = {"training": {"workers": 0, "micro_batch": 5, "log_every": 1, "keep_last": 3}}
    fit(replace(small_job(), recipe=recipe), tmp_path, LOOP)
    other = {"training": {"workers": 2, "micro_batch": None, "log_every": 5, "keep_last": 1}}
    assert fit(replace(small_job(), recipe=other), tmp_path, LOOP).level == "exact"


def test_an_average_that_is_on_in_one_only_is_an_error(tmp_path: Path) -> None:
    fit(small_job(), tmp_path, LOOP)
    with refused("R04", "average"):
        fit(small_job(ema=False), tmp_path, LOOP)


# -- where it starts from ---------------------------------------------------------------------------------------------


def test_never_refuses_a_run_that_has_checkpoints(tmp_path: Path) -> None:
    fit(small_job(), tmp_path, LOOP)
    with refused(None, "holds checkpoints already"):
        fit(small_job(), tmp_path, LOOP, resume="never")


def test_a_run_begun_from_another_goes_on_from_its_own_when_started_again(tmp_path: Path) -> None:
    fit(small_job(), tmp_path / "first", replace(LOOP, updates=6))
    start = tmp_path / "first/checkpoints/step-000006"
    with pytest.raises(Died):
        fit(dying(small_job(), 5), tmp_path / "second", LOOP, resume=start, allow=("updates",))
    said: list[str] = []
    fit(small_job(), tmp_path / "second", LOOP, resume=start, allow=("updates",), say=heard(said))
    assert any("resumed from step-000010" in line for line in said)
    found = checkpoint.newest(tmp_path / "second")
    fit(small_job(), tmp_path / "whole", LOOP)
    whole = checkpoint.newest(tmp_path / "whole")
    assert found is not None and whole is not None and found[0].document == whole[0].document


def test_going_back_inside_a_run_that_has_newer_checkpoints_is_refused(tmp_path: Path) -> None:
    fit(small_job(), tmp_path, LOOP)
    with refused(None, "newer checkpoints"):
        fit(small_job(), tmp_path, LOOP, resume=tmp_path / "checkpoints/step-000010")


def test_a_state_from_elsewhere_starts_a_run_and_says_what_it_lacks(tmp_path: Path) -> None:
    job = small_job()
    weights = {name: torch.full_like(t, 0.01) for name, t in job.model.state_dict().items()}
    state = State(weights, {}, {}, {"step": 3, "samples": 15})
    said: list[str] = []
    outcome = fit(job, tmp_path, replace(LOOP, updates=3), resume=state, say=heard(said))
    assert outcome.level == "weights only" and any("R05" in line for line in said)
    assert all(bool((t == 0.01).all()) for t in job.model.state_dict().values())
    assert job.ema is not None and all(bool((t == 0.01).all()) for t in job.ema.tensors.values())


def heard(lines: list[str]) -> Output:
    """An output that only keeps what it is told."""

    class Heard(Output):
        def remark(self, text: str) -> None:
            lines.append(text)

        def status(self) -> None:
            return None

    return Heard()


# -- the proof --------------------------------------------------------------------------------------------------------


def proof(run: Path) -> list[tuple[int, int, str]]:
    return [(r["checkpoint"], r["step"], r["loss"]) for r in metrics.rows(run / "checkpoints/proof.jsonl")]


def test_a_resume_that_is_exact_says_so_and_notes_nothing_twice(tmp_path: Path) -> None:
    loop = replace(LOOP, save_every=4)
    with pytest.raises(Died):
        fit(dying(small_job(), 8), tmp_path, loop)  # step 7 was made, from checkpoint 4
    said: list[str] = []
    fit(small_job(), tmp_path, loop, say=heard(said))
    assert "exact resume confirmed for steps 5, 6: their losses are equal, bit for bit" in said
    noted = [(c, s) for c, s, _ in proof(tmp_path)]
    assert len(noted) == len(set(noted)) and {(4, 5), (4, 6), (8, 9), (8, 10)} <= set(noted)
    assert list(metrics.stream(tmp_path / "checkpoints/resumes.jsonl")) == [{"step": 4, "equal": True, "steps": [5, 6]}]


def test_a_resume_that_is_not_exact_is_said_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(Died):
        fit(dying(small_job(), 8), tmp_path, LOOP)
    changed = small_job()
    changed.loss = lambda m, b, d: {"loss": (m(b["x"]) - b["y"]).square().sum() / d * 1.0000001}
    said: list[str] = []
    fit(changed, tmp_path, LOOP, say=heard(said))
    assert any("is not bitwise what it was: loss" in line for line in said)
    assert not any("confirmed" in line for line in said)
    for row in (found := list(metrics.stream(tmp_path / "checkpoints/resumes.jsonl"))):
        assert row["equal"] is False and float.fromhex(row["was"]) != float.fromhex(row["now"]) and not row["differs"]
    assert [row["steps"] for row in found] == [[7]]


def test_a_resume_with_nothing_to_compare_is_noted_as_such(tmp_path: Path) -> None:
    loop = replace(LOOP, updates=4)
    fit(small_job(), tmp_path, loop)
    fit(small_job(), tmp_path, replace(LOOP, updates=8), allow=("training",))
    found = list(metrics.stream(tmp_path / "checkpoints/resumes.jsonl"))
    assert found == [{"step": 4, "equal": None, "steps": []}]


def test_a_torn_proof_does_not_stop_a_run(tmp_path: Path) -> None:
    with pytest.raises(Died):
        fit(dying(small_job(), 6), tmp_path, LOOP)
    path = tmp_path / "checkpoints/proof.jsonl"
    path.write_bytes(path.read_bytes() + b'{"checkpoint": 4, "step"')
    said: list[str] = []
    fit(small_job(), tmp_path, LOOP, say=heard(said))
    assert "exact resume confirmed for steps 5: their losses are equal, bit for bit" in said
    assert [s for _, s, _ in proof(tmp_path)] == sorted({s for _, s, _ in proof(tmp_path)})
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 15))
