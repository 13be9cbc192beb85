"""Several processes begin only where they share the run's folder and agree on what they train; else one is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tensorkeep.errors import TensorkeepError
from tensorkeep.training import preflight
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tests.training import ranks, small_job


def test_two_hosts_with_folders_of_their_own_are_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever host the first rank is on, and although one of them holds a run to go on from."""
    monkeypatch.setattr(preflight, "_WAIT", 0.3)

    def work(world: World) -> None:
        monkeypatch.setattr(preflight.socket, "gethostname", lambda: f"host-{world.rank}")
        with pytest.raises(TensorkeepError) as caught:
            fit(small_job(), tmp_path / f"host-{world.rank}" / "run", Loop(updates=2, batch=4), world=world)
        assert (
            caught.value.code == "F05"
            and "rank 1 on host-1 does not see what rank 0 on host-0 wrote" in caught.value.what
        )
        assert "all hosts mount" in str(caught.value.hint)

    assert ranks(2, work) == [0, 0]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_shared_folder_is_seen_and_nothing_stays_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".preflight-old").write_text("of a run that died")

    def work(world: World) -> None:
        preflight.shared_folder(tmp_path / "run", world)

    assert ranks(2, work) == [0, 0]
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("what", ["recipe", "data", "torch"])
def test_ranks_that_differ_are_named_on_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def work(world: World) -> None:
        monkeypatch.setattr(preflight.socket, "gethostname", lambda: f"host-{world.rank}")
        job = small_job()
        if world.rank == 1 and what == "recipe":
            job = replace(job, recipe={"seed": 7})
        if world.rank == 1 and what == "data":
            job = replace(job, data=Other(job.data))
        if world.rank == 1 and what == "torch":
            monkeypatch.setattr(preflight.torch, "__version__", "2.0.1")
        with pytest.raises(TensorkeepError, match=f"rank 1 on host-1 has another {what} than rank 0 on host-0"):
            fit(job, tmp_path / "run", Loop(updates=2, batch=4), world=world)

    assert ranks(2, work) == [0, 0]
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


class Other:
    """The same samples under another fingerprint."""

    def __init__(self, data: object) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        return "another"


def test_clocks_far_apart_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(world: World) -> None:
        now = preflight.time.time
        monkeypatch.setattr(preflight.time, "time", lambda: now() + 60 * world.rank)
        (line,) = preflight.agree({"recipe": {"a": 1}}, world)
        assert line.startswith("note: the clock of rank 1 on") and "+60 s" in line

    assert ranks(2, work) == [0, 0]


def test_one_process_asks_nothing(tmp_path: Path) -> None:
    preflight.shared_folder(tmp_path / "absent", World())
    assert preflight.agree({"recipe": None}, World()) == [] and not (tmp_path / "absent").exists()
