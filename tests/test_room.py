"""Whether a run's checkpoints will fit is found before its first step, from the sizes that its files will have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.cli import main
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import run_folder
from tensorkeep.training import saver as checkpoint
from tensorkeep.training._room import Place as Seen
from tensorkeep.training._room import coming, foreseen, growth, peak
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.saver import Keep, Saver
from tests.language_files import config, save_tokenizer, texts
from tests.training import ranks, small_job

LOOP = Loop(updates=6, batch=4, save_every=1, keep=Keep(last=2))
OPTIMIZERS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True),
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "plain SGD": torch.optim.SGD,
    "Adafactor": torch.optim.Adafactor,
}


def size_of(step: Path) -> int:
    return sum(p.stat().st_size for p in step.iterdir())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_save_needs_is_known_before_the_first_step(name: str, tmp_path: Path) -> None:
    job = small_job()
    job = replace(job, optimizer=OPTIMIZERS[name]([p for p in job.model.parameters() if p.requires_grad], lr=1e-2))
    before, known = foreseen(job, 0)
    assert known
    said = sum(Saver(tmp_path / "other").sizes(before))
    fit(job, tmp_path / "run", replace(LOOP, updates=1))
    state, _ = foreseen(job, 1)
    for part in ("model", "optimizer", "ema"):
        mine, theirs = getattr(before, part), getattr(state, part)
        assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert 0 <= said - size_of(tmp_path / "run/checkpoints/step-000001") <= (1 << 20)


def test_what_every_rank_will_write_is_known_before_the_first_step(tmp_path: Path) -> None:
    loop = replace(LOOP, updates=2, save_every=2, parallel="fsdp")

    def work(world: World) -> None:
        kept: dict[str, Any] = {}
        real = Saver.sizes

        def sizes(self: Saver, state: Any) -> list[int]:
            kept["sizes"], kept["plan"] = real(self, state), self._shards._wanted
            kept["saver"] = self
            return kept["sizes"]

        Saver.sizes = sizes  # type: ignore[method-assign]
        fit(small_job(), tmp_path / "run", loop, world=world)
        assert kept["saver"]._shards._wanted is kept["plan"]  # planned once, for the start and the save
        if world.first:
            (tmp_path / "said.json").write_text(json.dumps(kept["sizes"]))

    assert ranks(2, work) == [0, 0]
    step = tmp_path / "run/checkpoints/step-000002"
    said = json.loads((tmp_path / "said.json").read_text())
    wrote = [(step / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert all(0 <= a - b <= 64 << 10 for a, b in zip(said, wrote)) and 0 <= sum(said) - size_of(step) < 2 << 20


def test_the_most_that_is_there_at_a_time() -> None:
    steps = list(range(1, 30))
    assert peak({}, 100, steps, Keep(last=3), best=False) == 400  # three stay while the next is written
    assert peak({}, 100, steps, Keep(last=3), best=True) == 500
    assert peak({}, 100, [7], Keep(last=3), best=False) == 100
    # those that are there go as others come: one more is needed, and the difference in size
    assert peak({1: 100, 2: 100, 3: 100}, 100, steps[3:], Keep(last=3), best=False) == 100
    assert peak({1: 10, 2: 10, 3: 10}, 100, steps[3:], Keep(last=3), best=False) == 370
    assert coming(Loop(updates=10, batch=1, save_every=4, evaluate_every=3, evaluate_from=5), 0, True) == [
        4,
        6,
        8,
        9,
        10,
    ]
    assert coming(Loop(updates=10, batch=1, evaluate_every=3), 0, False) == [10] and coming(LOOP, 6, False) == []
    (line,) = growth(Seen("h", "run", 500, 100, {}), steps, Keep(every=3))
    assert "keeps 9 checkpoints for ever" in line and growth(Seen("h", "run", 900, 100, {}), steps, Keep(every=3)) == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_disk_that_is_too_small_is_told_with_host_bytes_and_a_remedy(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(run_folder, "free_bytes", lambda _: 3 << 20)  # each needs one and a bit: two, not three

    def work(world: World) -> None:
        monkeypatch.setattr("tensorkeep.training._room.socket.gethostname", lambda: f"host-{world.rank}")
        loop = replace(LOOP, parallel="fsdp" if size > 1 else "ddp")
        steps: list[int] = []
        job = small_job()
        job = replace(job, schedule=lambda update, base: steps.append(update) or base)  # type: ignore[func-returns-value]
        with pytest.raises(TensorkeepError) as caught:
            fit(job, run, loop, world=world)
        what, hint = caught.value.what, str(caught.value.hint)
        assert "too little room on host-0" in what and "3,145,728 are free" in what and "up to 3 are" in what
        assert caught.value.where == str(run) and caught.value.exit_code == 2 and not steps
        assert "free " in hint and "--out" in hint and "--training.keep_last 1" in hint
        fit(small_job(), run, replace(loop, keep=Keep(last=1)), world=world)

    if size == 1:
        work(World())
    else:
        assert ranks(size, work) == [0] * size
    assert checkpoint.steps(run) == [6]


def test_the_command_says_it_and_leaves_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(tmp_path / "tok")
    document = {
        "config": config(),
        "tokenizer": str(tmp_path / "tok"),
        "data": {"files": [str(texts(tmp_path / "a.jsonl"))], "length": 32},
        "training": {"updates": 1, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps({"version": 2, **document}))
    monkeypatch.setattr(run_folder, "free_bytes", lambda _: 4096)
    assert main(["train", "language", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "too little room on" in said and "4,096 are free" in said and "one is added" in said and "hint: free" in said
    assert not list((tmp_path / "run/checkpoints").glob("step-*")) if (tmp_path / "run/checkpoints").exists() else True


def test_a_later_save_that_finds_no_room_names_bytes_and_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def work(world: World) -> None:
        room = iter([1 << 30] * 2 + [4096] * 9)  # at the start, for the first save, for later ones
        monkeypatch.setattr(run_folder, "free_bytes", lambda _: next(room))
        with pytest.raises(TensorkeepError, match=r"the disk is full: a checkpoint needs [\d,]+ bytes, 4,096 are free"):
            fit(small_job(), run, replace(LOOP, parallel="fsdp"), world=world)

    assert ranks(2, work) == [0, 0]
    found = checkpoint.newest(run)
    assert found is not None and found[0].document["step"] == 1 and not found[2] and not run_folder.remains(run)
