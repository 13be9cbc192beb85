"""Two agents of torchrun on this machine stand for two hosts: what happens, and what is printed.

Agents and ranks are forked, so that each need not import torch anew; arguments are those of torchrun's command line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.training import distributed, preflight
from tensorkeep.training import saver as checkpoint
from tests.language_files import config, save_tokenizer, texts
from tests.run_states import equal
from tests.training import free_port, small_job

pytest.importorskip("transformers")


def stop() -> None:
    """Wait for the others before the process leaves; taking gloo down aborts now and then."""
    if dist.is_initialized():
        dist.barrier()


def rank(words: Sequence[str]) -> None:
    """Be one rank: the command itself, and its exit status; an agent waits for a return where all went well."""
    status = 3
    try:
        torch.set_num_threads(1)
        distributed.stop, preflight._WAIT = stop, 0.5
        status = main(list(words))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if status:
            os._exit(status)


def agent(arguments: Sequence[str], words: Sequence[str], said: Path) -> int:
    """Fork an agent of torchrun; what it and its ranks print goes into a file."""
    pid = os.fork()
    if pid:
        return pid
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    status = 1
    with contextlib.suppress(BaseException):
        made, _, _ = torchrun.config_from_args(torchrun.parse_args([*arguments, "-m", "tensorkeep"]))
        made.start_method = "fork"
        try:
            elastic_launch(made, rank)(list(words))
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
    os._exit(status)


def words_of(place: Path) -> list[str]:
    """What every start says."""
    return ["train", "language", str(place / "recipe.yaml"), "--device", "cpu"]


def agents(place: Path, runs: Sequence[str], *words: str, updates: int = 2) -> list[tuple[int, str]]:
    """Train on two hosts, `--out` being `runs` in the order of their node ranks; exit statuses and all they said."""
    port, pids = free_port(), []
    train = [*words_of(place), "--training.updates", str(updates), *words]
    said = [place / f"said-{port}-{node}" for node in range(2)]
    for node, run in enumerate(runs):
        arguments = ["--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", f"localhost:{port}"]
        pids.append(agent(arguments, [*train, "--allow", "training.updates", "--out", str(place / run)], said[node]))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [(status, path.read_text()) for status, path in zip(statuses, said)]


@pytest.fixture(scope="module", autouse=True)
def _ready_to_fork() -> None:
    """What every rank would import for itself, and no threads that a fork would lose."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    small_job()
    importlib.import_module("tensorkeep.language.job")
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")


LOCAL = ("--checkpoint.local", "true", "--checkpoint.replicas", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hosts after two updates, each with its shards and a copy of the other's."""
    place = tmp_path_factory.mktemp("agents")
    save_tokenizer(place / "tok")
    document = {
        "version": 2,
        "config": config(),
        "tokenizer": str(place / "tok"),
        "data": {"files": [str(texts(place / "a.jsonl"))], "length": 32},
        "training": {"updates": 2, "batch_size": 2, "parallel": "fsdp", "save_every": 1, "log_every": 1},
    }
    (place / "recipe.yaml").write_text(json.dumps(document))
    for status, said in agents(place, ["a/run", "b/run"], *LOCAL):
        assert status == 0, said
    return place


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "place"))


def test_swapped_nodes_go_on_exactly_and_then_a_lost_host_does(place: Path) -> None:
    (first, said), (second, _) = agents(place, ["b/run", "a/run"], *LOCAL, updates=3)
    assert (first, second) == (0, 0), said
    assert "resumed from step-000002 at step 2, exact" in said and "came from other hosts" not in said
    rows = [json.loads(line)["step"] for line in (place / "b/run/metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3]
    shutil.rmtree(place / "b")
    (first, said), (second, _) = agents(place, ["b/run", "a/run"], *LOCAL, updates=4)
    assert (first, second) == (0, 0), said
    assert "resumed from step-000003 at step 3, exact" in said and "of step-000003 came from other hosts" in said
    states = [checkpoint.load(place / host / "run/checkpoints/step-000004") for host in ("a", "b")]
    assert equal(states[0].model, states[1].model) and equal(states[0].optimizer, states[1].optimizer)
    assert tk.verify(place / "b/run")[0] == []


def test_without_copies_a_lost_host_is_refused_by_name(place: Path) -> None:
    for copy in (place / "a/run/checkpoints").glob("step-*/__1_0.*"):
        copy.unlink()
    shutil.rmtree(place / "b")
    for status, said in agents(place, ["a/run", "b/run"], "--checkpoint.local", "true", updates=3):
        assert status != 0 and "exitcode  : 2" in said
        assert "none of its 2 checkpoints is whole on the 2 hosts of this run; the newest: step-000002:" in said
        assert "no host of this run has the shards of rank 1, which" in said and "(node 1) kept" in said
        assert "hint: bring that host back" in said


def test_folders_that_are_not_shared_are_refused_without_local_and_a_shared_one_trains(place: Path) -> None:
    for status, said in agents(place, ["c/run", "d/run"]):
        assert status != 0 and "exitcode  : 2" in said
        assert "is not one folder for all processes: rank 1 on" in said and "does not see what rank 0 on" in said
        assert "hint: --out on a file system that all hosts mount at the same path, or --checkpoint.local true" in said
    assert not list(place.glob("[cd]/run/checkpoints"))
    (first, said), (second, _) = agents(place, ["e/run", "e/run"])
    assert (first, second) == (0, 0), said
    mine, local = (checkpoint.load(place / run / "run/checkpoints/step-000002") for run in ("a", "e"))
    assert equal(mine.model, local.model) and equal(mine.optimizer, local.optimizer)
