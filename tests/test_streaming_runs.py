"""Runs over a streamed corpus: killed and resumed bitwise, on two ranks and on one, and what a recipe may not ask."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tensorkeep.cli import main
from tensorkeep.language import job as language
from tensorkeep.language.data import streaming
from tensorkeep.language.recipe_text import read_language
from tensorkeep.output import Output
from tensorkeep.storage.run_folder import steps
from tensorkeep.training.distributed import World
from tensorkeep.training.loop import Outcome, fit
from tests.language_files import config, conversations, save_tokenizer, texts
from tests.training import assert_same_run, ranks, relative_l2


@pytest.fixture(scope="module", autouse=True)
def small_units() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SMALLEST_UNIT", 256)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    save_tokenizer(folder / "tok")
    texts(folder / "a.jsonl", 40)
    texts(folder / "b.jsonl", 30)
    document = {
        "version": 2,
        "config": config(),
        "tokenizer": str(folder / "tok"),
        "data": {
            "files": [str(folder / "*.jsonl")],
            "length": 24,
            "packing": "concatenate",
            "streaming": True,
            "shuffle_buffer": 12,
        },
        "training": {"updates": 8, "batch_size": 4, "micro_batch": 2, "save_every": 2, "log_every": 1, "ema": 0.9},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return folder / "recipe.yaml"


def train(recipe: Path, run: Path, world: World | None = None, die: int = 0, **fields: Any) -> Outcome:
    """Train as the command does; with `die` the process kills itself in that forward."""
    made = read_language(str(recipe), [(f"training.{k}", str(v)) for k, v in fields.items()], lambda _: None)
    job = language.build(made, run, world)
    real, calls = job.loss, 0

    def loss(*words: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words)

    return fit(replace(job, loss=loss), run, language.loop_of(made, len(job.data)), world=world, say=Output())


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(recipe, run).step == 8
    assert not (run / "cache").exists()  # nothing is tokenized as a whole
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_it_goes_on_bitwise_and_the_proof_says_so(
    recipe: Path, whole: Path, tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert ranks(1, lambda _: train(recipe, run, die=8, workers=workers) and None) == [-signal.SIGKILL]
    assert steps(run)[0] == 2
    assert ranks(1, lambda _: train(recipe, run, die=11, workers=workers) and None) == [-signal.SIGKILL]
    assert "exact resume confirmed for steps 3" in capfd.readouterr().err
    assert steps(run)[0] == 6
    assert train(recipe, run).level == "exact"
    assert "exact resume confirmed for steps 7" in capfd.readouterr().err
    assert_same_run(run, whole)


def test_two_ranks_go_on_where_one_was_and_one_where_two_were(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe, run, updates=2)
    made = read_language(str(recipe), [("training.updates", "6")], lambda _: None)

    def work(world: World) -> None:
        torch.set_num_threads(1)
        job = language.build(made, run, world)
        fit(job, run, language.loop_of(made, 0), world=world, allow=("updates",))

    assert ranks(2, work) == [0, 0]
    assert json.loads((run / "checkpoints" / "step-000006" / "state.json").read_text())["world_size"] == 2
    made = read_language(str(recipe), [], lambda _: None)
    job = language.build(made, run)
    assert fit(job, run, language.loop_of(made, 0), allow=("updates",)).level == "sample-exact"
    assert relative_l2(whole, run) < 1e-5
    places = [json.loads((r / "checkpoints" / "step-000008" / "state.json").read_text())["flow"] for r in (whole, run)]
    assert places[0] == places[1]


def test_conversations_are_streamed_and_held_out_files_are_read_whole(recipe: Path, tmp_path: Path) -> None:
    conversations(tmp_path / "c.jsonl", times=12)
    words = ["--data.files", str(tmp_path / "c.jsonl"), "--objective", "sft", "--data.packing", "first_fit"]
    words += ["--data.length", "96", "--evaluation.files", str(tmp_path / "c.jsonl"), "--training.updates", "3"]
    assert main(["train", "language", str(recipe), "--out", str(tmp_path / "run"), *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("evaluation" in row for row in rows)


@pytest.mark.parametrize(
    "words",
    [
        ["--training.updates", "null", "--training.epochs", "1"],
        ["--schedule.unit", "epochs"],
        ["--objective", "dpo", "--data.packing", "none"],
        ["--data.shuffle_buffer", "-1"],
    ],
)
def test_what_a_stream_cannot_is_refused(recipe: Path, tmp_path: Path, words: list[str], capsys: Any) -> None:
    assert main(["train", "language", str(recipe), "--out", str(tmp_path / "run"), *words]) == 2
    assert "stream" in capsys.readouterr().err or "shuffle" in words[0]
