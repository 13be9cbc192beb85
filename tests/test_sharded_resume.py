"""A language run in shards goes on: on two ranks bit for bit, from two on one and from one on two as near as 1e-6."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint  # slow to load: once here, and not in each forked rank

from tensorkeep.language.job import build, loop_of
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.loop import fit
from tests.language_files import save_model
from tests.test_language_recipe import assert_same_run, recipe_of, rows
from tests.training import ranks

WAYS: dict[str, dict[str, Any]] = {
    "full": {"training": {"ema": 0.9}},
    "qlora": {
        "adapter": {"lora_r": 4, "lora_alpha": 8, "targets": ["q_proj", "v_proj"]},
        "training": {"quantize_backbone": "nf4", "ema": 0.9},
    },
}


def apart(one: Path, other: Path) -> float:
    """How far weights, moments and averages of the newest checkpoints are apart: the largest of the three, in L2."""
    a, b = (checkpoint.newest(run) for run in (one, other))
    assert a is not None and b is not None
    found = []
    for part in ("model", "optimizer", "ema"):
        mine, theirs = getattr(a[0], part), getattr(b[0], part)
        assert mine.keys() == theirs.keys()
        if mine:
            x, y = (torch.cat([t.double().flatten() for _, t in sorted(held.items())]) for held in (mine, theirs))
            found.append(float((x - y).norm() / y.norm()))
    return max(found)


@pytest.mark.parametrize("way", WAYS)
def test_from_two_on_two_on_one_and_from_one_on_two(way: str, tmp_path: Path) -> None:
    save_model(tmp_path / "llama", "llama", vocab_size=321)
    made = recipe_of(tmp_path, config=None, model=str(tmp_path / "llama"), **WAYS[way])
    made["data"] |= {"packing": "concatenate"}
    made["training"] |= {"parallel": "fsdp", "micro_batch": 2, "save_every": 2}
    recipe = language_recipe(made)

    def go(name: str, until: int, world: World) -> None:
        torch.set_num_threads(1)
        job = build(recipe, tmp_path / name, world)
        loop = replace(loop_of(recipe, len(job.data)), updates=until)
        done = fit(job, tmp_path / name, loop, world=world, allow=("updates",))
        assert done.step == until

    def on_two(name: str, until: int) -> None:
        assert ranks(2, lambda world: go(name, until, world), seconds=60) == [0, 0]

    on_two("whole", 6)
    on_two("parts", 4)
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    on_two("parts", 6)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    go("one", 6, World())
    go("two", 4, World())
    on_two("two", 6)
    for name in ("one", "two"):
        assert apart(tmp_path / name, tmp_path / "whole") < 1e-6
        mine, theirs = ([row["loss"] for row in rows(tmp_path / run)] for run in (name, "whole"))
        assert len(mine) == 6 and mine == pytest.approx(theirs, rel=1e-6)
