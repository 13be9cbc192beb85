"""Two processes: ranks with different codes are found, DDP makes them one, FSDP2 keeps every key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked

pytestmark = pytest.mark.slow  # two processes of DDP and FSDP2
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has FSDP2 elsewhere")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.quant_ranks"]
    ranks = [
        forked.Popen(
            command,
            cwd=ROOT,
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outs = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), outs[0][1] + outs[1][1]
    made: dict[str, Any] = json.loads(outs[0][0].splitlines()[-1])
    return made


def test_ranks_with_different_codes_are_found_and_ddp_makes_them_equal(found: dict[str, Any]) -> None:
    assert found["apart"]["found"].startswith("Q02 0: is not the same on ranks 0 and 1")
    assert found["apart"]["grads"] == 4 and found["apart"]["equal"]


def test_fully_shard_keeps_every_code_and_scale_and_its_state_loads_everywhere(found: dict[str, Any]) -> None:
    wanted = {"forward": True, "grads": 4, "keys": True, "dcp": True, "fresh": True, "other": True, "layers": 2}
    assert found["sharded"] == wanted
