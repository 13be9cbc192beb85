"""Runs whose every host keeps its own shards: two agents of torchrun on this machine stand for two hosts.

Which agent a process belongs to says GROUP_RANK; each agent is given a run folder of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tests.run_states import equal
from tests.training import free_port

ROOT = Path(__file__).parent.parent
STEP = "checkpoints/step-000006"


def agents(
    runs: Sequence[Path], *, updates: int = 6, local: bool = True, replicas: int = 0, swapped: bool = False
) -> list[tuple[int, str]]:
    """Train on two agents, the first with the folder `runs[0]`; exit statuses and what they said."""
    port, started = free_port(), []
    for number, run in enumerate(runs):
        node = len(runs) - 1 - number if swapped else number
        how = ["--nnodes", str(len(runs)), "--nproc-per-node", "1", "--node-rank", str(node), "--max-restarts", "0"]
        to = ["--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        words = [str(run), str(updates), str(int(local)), str(replicas)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *how, *to, "-m", "tests.local_program", *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two hosts' folders of a run that is done, with a copy of each one's shards on the other."""
    place = tmp_path_factory.mktemp("two")
    runs = [place / "a/run", place / "b/run"]
    for status, said in agents(runs, replicas=1):
        assert status == 0, said
    return runs


def test_base(hosts: list[Path]) -> None:
    print(list(hosts[0].rglob("*")))
