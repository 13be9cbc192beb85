"""Ranks that do not come or cannot be reached are named, with those that are there, after a time that is said."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorkeep.errors import TensorkeepError
from tensorkeep.training import distributed
from tests.training import free_port


def alone(rank: int, size: int, port: int, work: Callable[[], None]) -> int:
    """Fork one rank of a group in which others may be missing; its process."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    status = 3
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def test_ranks_that_do_not_come_are_named_on_those_that_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORKEEP_JOIN_SECONDS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    port = free_port()

    def work() -> None:
        rank = os.environ["RANK"]
        monkeypatch.setattr(distributed.socket, "gethostname", lambda: f"host-{int(rank) // 2}")
        with pytest.raises(TensorkeepError) as caught:
            distributed.start("cpu")
        (tmp_path / rank).write_text(f"{caught.value.what}\n{caught.value.hint} {caught.value.exit_code}")

    started = [alone(rank, 6, port, work) for rank in (0, 1, 3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started] == [0, 0, 0]
    said = {path.read_text() for path in tmp_path.iterdir()}
    assert len(said) == 1
    what, hint = said.pop().split("\n")
    assert what == ("rank 2, 4, 5 (node 1, 2) of 6 did not come within 1 seconds; here are 0, 1 on host-0; 3 on host-1")
    assert "MASTER_ADDR" in hint and hint.endswith(" 75")


def test_an_address_where_nobody_is_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    there = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**there, "TENSORKEEP_JOIN_SECONDS": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TensorkeepError, match=rf"rank 1 on \S+ finds nobody at 127.0.0.1:{port} within 1 seconds"):
        distributed.start("cpu")


def test_hosts_that_cannot_reach_each_others_network_are_told_which_variable_chooses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()

    def work() -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
        with pytest.raises(TensorkeepError, match=r"rank \d on \S+ does not reach the other ranks") as caught:
            distributed.start("cpu")
        assert "GLOO_SOCKET_IFNAME" in str(caught.value.hint)

    started = [alone(rank, 2, port, work) for rank in (0, 1)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started] == [0, 0]
