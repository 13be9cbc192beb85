"""Every host keeps its own ranks' shards in a folder of its own; forked ranks stand for hosts by GROUP_RANK."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import left_over
from tensorkeep.storage.manifest_hosts import hosts_in
from tensorkeep.storage.run_manifest import manifest_bytes, read_manifest
from tensorkeep.training import _gathering, _shard_work, _transfer, preflight
from tensorkeep.training import saver as checkpoint
from tensorkeep.training._transfer import Piece, exchange
from tensorkeep.training.distributed import World
from tensorkeep.training.hosts import Hosts, connected, find_hosts
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.sections import CheckpointConfig
from tests.training import Net, assert_same_run, ranks, relative_l2, small_job

LOOP = Loop(updates=6, batch=4, micro=1, log_every=1, save_every=2, parallel="fsdp")
STEP = Path("run/checkpoints/step-000006")
HOSTS = (0, 1)  # the host of each rank


def train(
    place: Path,
    of: Sequence[int] = HOSTS,
    copies: int = 0,
    until: int = 6,
    dropout: float = 0.2,
    before: Callable[[World], None] = lambda _: None,
    wrong: str | tuple[str, ...] = (),
    folders: Sequence[str] = ("h0", "h1", "h2", "h3"),
    **fields: Any,
) -> list[int]:
    """Train; each host has the folder `place/h0/run` and so on. `wrong`: what the error of every rank must say."""
    expected = (wrong,) if isinstance(wrong, str) else wrong

    def work(world: World) -> None:
        os.environ["GROUP_RANK"] = str(of[world.rank])
        before(world)
        loop = replace(LOOP, updates=until, checkpoint=CheckpointConfig(True, copies), **fields)
        run = place / folders[of[world.rank]] / "run"
        torch.manual_seed(77 + world.rank)
        try:
            fit(small_job(dropout=dropout), run, loop, world=world, allow=("updates",))
        except tk.TensorkeepError as error:
            if not expected or any(words not in str(error) for words in expected):
                raise
            return
        assert not expected

    return ranks(len(of), work, seconds=60.0)


@pytest.fixture(scope="module", autouse=True)
def _ready_to_fork() -> None:
    """What every forked rank would import for itself, and no threads that a fork would lose."""
    torch.set_num_threads(1)
    small_job()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one folder that all share, to step 6 and on to step 8."""
    place = tmp_path_factory.mktemp("shared")

    def work(until: int) -> Callable[[World], None]:
        def go(world: World) -> None:
            torch.manual_seed(77 + world.rank)
            fit(small_job(), place / f"run-{until}", replace(LOOP, updates=until), world=world, allow=("updates",))

        return go

    assert ranks(2, work(6)) == [0, 0]
    shutil.copytree(place / "run-6", place / "run-8")
    assert ranks(2, work(8)) == [0, 0]
    return place


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("apart")
    assert train(place) == [0, 0]
    return place


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("copied")
    assert train(place, copies=1) == [0, 0]
    return place


@pytest.fixture
def two(apart: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(apart, tmp_path / "two"))


def together(place: Path, to: Path) -> Path:
    """Copy the folders of all hosts into one, as the documentation says."""
    for host in sorted(place.glob("h*")):
        shutil.copytree(host / "run", to, dirs_exist_ok=True)
    return to


def test_each_host_keeps_its_ranks_and_copied_together_they_are_the_shared_run(
    apart: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {".metadata", "manifest.json", "state.json"}
    for host, own in ((0, (0,)), (1, (1,))):
        names = {p.name for p in (apart / f"h{host}" / STEP).iterdir()}
        assert names == small | {f"__{rank}_0.{end}" for rank in own for end in ("distcp", "shards.json")}
    assert len({(apart / f"h{host}" / STEP / "manifest.json").read_bytes() for host in (0, 1)}) == 1
    whole = together(apart, tmp_path / "whole")
    assert_same_run(whole, shared / "run-6")
    assert main(["verify", str(whole)]) == 0 and main(["inspect", str(whole)]) == 0
    assert main(["convert", str(whole), str(tmp_path / "all.pth"), "--to", "pth"]) == 0
    written = torch.load(tmp_path / "all.pth", weights_only=True)
    assert all(torch.equal(written[n], t) for n, t in checkpoint.load(whole / "checkpoints/step-000006").model.items())


def test_the_commands_say_of_one_hosts_folder_that_it_is_a_part(
    apart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = apart / "h1/run"
    for words in (
        ["inspect", str(run)],
        ["inspect", str(apart / "h1" / STEP)],
        ["convert", str(run), "x", "--to", "pth"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "is a part of a checkpoint" in said and "it holds the shards of rank 1" in said
        assert "lacks those of rank 0, which" in said and "(node 0) kept" in said
        assert "hint: copy the folder step-000006 of all hosts into one" in said
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "F05" in said and "is a part of a checkpoint" in said and "fix: copy the folder step-000006" in said


def test_a_run_goes_on_bitwise_with_the_hosts_swapped(two: Path, shared: Path, tmp_path: Path) -> None:
    assert train(two, until=8, folders=("h1", "h0")) == [0, 0]
    assert_same_run(together(two, tmp_path / "whole"), shared / "run-8")  # rows too: they came along
    assert not [p for p in two.rglob("*") if p.name.startswith((".step", ".preflight"))]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks on two hosts, to step 4 with a copy of each host's shards, and from there to the end."""
    place, of = tmp_path_factory.mktemp("four"), (0, 0, 1, 1)
    assert train(place / "begun", of, until=4, dropout=0.0, copies=1) == [0] * 4
    shutil.copytree(place / "begun", place / "done")
    assert train(place / "done", of, dropout=0.0, copies=1) == [0] * 4
    return place


@pytest.mark.parametrize("of", [(0, 1), (0, 1, 2), (0, 0)])
def test_another_number_of_ranks_and_hosts_goes_on(of: Sequence[int], four: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(four / "begun", tmp_path / "other"))
    steps = [other / f"h{host}/run/checkpoints/step-000004" for host in (0, 1)]
    for step in steps:
        assert {p.name for p in step.glob("*.distcp")} == {f"__{rank}_0.distcp" for rank in range(4)}
    if of == (0, 0):
        shutil.rmtree(other / "h1")
    else:  # without the copies every host has half
        gone = [p for step, ranks in zip(steps, ("23", "01")) for rank in ranks for p in step.glob(f"__{rank}_0.*")]
        for path in gone:
            path.unlink()
    assert train(other, of, dropout=0.0) == [0] * len(of)
    a, b = together(four / "done", tmp_path / "one-whole"), together(other, tmp_path / "other-whole")
    assert relative_l2(a, b) < 1e-5


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_is_restored_from_the_copies_on_the_next(
    copied: Path, shared: Path, tmp_path: Path, lost: int
) -> None:
    two = Path(shutil.copytree(copied, tmp_path / "two"))
    assert tk.verify(two / "h0/run")[0] == [] and tk.verify(two / "h1/run")[0] == []  # of two hosts each has all
    shutil.rmtree(two / f"h{lost}")  # another machine in its place
    assert train(two, copies=1, until=8) == [0, 0]
    for host in (0, 1):
        state = checkpoint.load(two / f"h{host}/run/checkpoints/step-000008")
        other = checkpoint.load(shared / "run-8/checkpoints/step-000008")
        assert state.document == other.document
        assert all(torch.equal(t, other.model[n]) for n, t in state.model.items())
        assert all(torch.equal(t, other.optimizer[n]) for n, t in state.optimizer.items())


def test_without_copies_a_lost_host_is_named_and_nothing_is_changed(two: Path) -> None:
    shutil.move(two / "h1", two / "away")
    before = sorted(p.name for p in (two / "h0/run/checkpoints").iterdir())
    wrong = "none of its 3 checkpoints is whole on the 2 hosts of this run; the newest: step-000006: no host of this"
    assert train(two, wrong=(wrong, "rank 1, which", "hint: bring that host back"), until=8) == [0, 0]
    assert sorted(p.name for p in (two / "h0/run/checkpoints").iterdir()) == before
    shutil.rmtree(two / "h1")
    shutil.move(two / "away", two / "h1")
    assert train(two, until=8) == [0, 0]


def test_of_four_hosts_two_may_be_lost_but_no_neighbours(tmp_path: Path) -> None:
    four = (0, 1, 2, 3)
    assert train(tmp_path, four, copies=1, until=2) == [0] * 4
    for host in four:
        names = {p.name for p in (tmp_path / f"h{host}/run/checkpoints/step-000002").glob("*.distcp")}
        assert names == {f"__{rank}_0.distcp" for rank in (host, (host - 1) % 4)}
    shutil.copytree(tmp_path / "h2", tmp_path / "kept")
    for host in ("h1", "h2"):
        shutil.rmtree(tmp_path / host)
    assert train(tmp_path, four, copies=1, until=4, wrong="has the shards of rank 1, which") == [0] * 4
    shutil.rmtree(tmp_path / "h2")
    shutil.rmtree(tmp_path / "h3")
    shutil.move(tmp_path / "kept", tmp_path / "h2")
    assert train(tmp_path, four, copies=1, until=4) == [0] * 4
    assert sorted(p.name for p in tmp_path.glob("h*/run/checkpoints/step-000004/*.distcp")) == sorted(
        f"__{rank}_0.distcp" for rank in (*four, *four)
    )


def test_only_what_a_rank_reads_comes_from_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards of megabytes: in the old order what all ranks read, such as counters; else a rank's own part."""
    monkeypatch.setattr("tests.training.Net", partial(Net, width=512))

    def before(world: World) -> None:
        close = _gathering.Whole.close

        def told(self: _gathering.Whole, failed: bool = False) -> int:
            (tmp_path / f"fetched-{world.rank}").write_text(str(self.fetched))
            return close(self, failed)

        _gathering.Whole.close = told  # type: ignore[method-assign]

    def fetched() -> list[int]:
        return [int((tmp_path / f"fetched-{rank}").read_text()) for rank in range(2)]

    assert train(tmp_path / "run", until=1) == [0, 0]
    share = (tmp_path / "run/h1/run/checkpoints/step-000001/__1_0.distcp").stat().st_size
    assert share > 4 << 20
    assert train(tmp_path / "run", until=2, before=before) == [0, 0]
    assert 0 < sum(fetched()) < 64 << 10
    assert train(tmp_path / "run", until=3, before=before, folders=("h1", "h0")) == [0, 0]
    assert all(share <= size + (64 << 10) and size < share + (64 << 10) for size in fetched())


def killer(where: str, victim: int) -> Callable[[World], None]:
    """Let a rank die at its second save: with its data, before its host's folder gets its name, or amid the copies."""

    def before(world: World) -> None:
        if world.rank != victim:
            return
        calls = 0
        owner: Any = _shard_work if where in ("write", "exchange") else _shard_work.ShardWork
        real = getattr(owner, where)

        def dying(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(owner, where, dying)

    return before


@pytest.mark.parametrize(
    ("where", "victim", "newest"),
    [("write", 1, 2), ("_ready", 1, 2), ("_place", 1, 2), ("_place", 0, 2), ("exchange", 1, 4)],
)
def test_killed_anywhere_in_a_save_the_newest_that_all_committed_is_taken(
    shared: Path, tmp_path: Path, where: str, victim: int, newest: int
) -> None:
    copies = int(where == "exchange")
    assert -signal.SIGKILL in train(tmp_path / "run", copies=copies, before=killer(where, victim))
    whole = checkpoint.newest(together(tmp_path / "run", tmp_path / "then"))
    assert whole is not None and whole[0].document["step"] == newest
    assert train(tmp_path / "run", copies=copies) == [0, 0]
    assert not [p for p in (tmp_path / "run").rglob(".*") if left_over(p.parent)]
    assert_same_run(together(tmp_path / "run", tmp_path / "whole"), shared / "run-6")


def test_a_host_lost_amid_the_copies_leaves_the_checkpoint_before(shared: Path, tmp_path: Path) -> None:
    assert -signal.SIGKILL in train(tmp_path / "run", copies=1, before=killer("exchange", 1))
    torn = tmp_path / "run/h0/run/checkpoints/step-000004/.__1_0.distcp.01234567.tensorkeep-tmp"
    torn.write_bytes(b"half of a copy")
    assert left_over(torn.parent) == [torn.name]
    shutil.rmtree(tmp_path / "run/h1")
    assert train(tmp_path / "run", copies=1) == [0, 0]
    assert_same_run(together(tmp_path / "run", tmp_path / "whole"), shared / "run-6")
    assert not torn.exists()


def test_parts_of_two_saves_of_one_step_are_not_mixed(two: Path, apart: Path) -> None:
    """The step is on both hosts, of two attempts that came to other numbers: neither is whole, and it is made again."""
    other = two.parent / "other"
    assert train(other, dropout=0.5) == [0, 0]
    shutil.rmtree(two / "h1" / STEP)
    shutil.copytree(other / "h1" / STEP, two / "h1" / STEP)
    assert train(two) == [0, 0]
    assert len({(two / host / STEP / "manifest.json").read_bytes() for host in ("h0", "h1")}) == 1
    assert_same_run(together(two, two.parent / "whole"), together(apart, two.parent / "then"))


@pytest.mark.parametrize("copies", [0, 1])
def test_damage_on_one_host_lets_all_go_on_from_the_checkpoint_before(
    apart: Path, copied: Path, shared: Path, tmp_path: Path, copies: int
) -> None:
    two = Path(shutil.copytree(copied if copies else apart, tmp_path / "two"))
    step = two / "h1" / STEP
    shard = max(shards_of_part(step, "__1_0.distcp"), key=lambda s: s.nbytes)
    data = bytearray((step / "__1_0.distcp").read_bytes())
    data[shard.start + 3] ^= 8
    (step / "__1_0.distcp").write_bytes(data)
    assert train(two, copies=copies) == [0, 0]
    assert_same_run(together(two, tmp_path / "whole"), shared / "run-6")


def shards_of_part(step: Path, file: str) -> Any:
    from tensorkeep.storage.run_manifest import shards_in

    return shards_in(step, file, read_manifest(step))


def test_a_copy_that_does_not_arrive_as_it_was_written_is_an_error_and_does_not_stay(tmp_path: Path) -> None:
    def before(world: World) -> None:
        real = _transfer._fill

        def flipping(handle: int, room: memoryview, start: int) -> None:
            real(handle, room, start)
            if world.rank == 1:
                room[len(room) // 2] ^= 1

        _transfer._fill = flipping

    assert train(tmp_path, copies=1, until=2, before=before, wrong="did not arrive as it was written") == [0, 0]
    names = {p.name for p in (tmp_path / "h0/run/checkpoints/step-000002").iterdir()}
    assert not [n for n in names if n.startswith((".__", "__1"))]
    assert checkpoint.newest(together(tmp_path, tmp_path / "whole")) is not None


def test_the_best_and_the_oldest_are_handled_on_every_host(tmp_path: Path) -> None:
    def work(world: World) -> None:
        os.environ["GROUP_RANK"] = str(world.rank)
        keep = checkpoint.Keep(last=1)
        loop = replace(LOOP, evaluate_every=2, best="error", keep=keep, checkpoint=CheckpointConfig(True, 0))
        fit(small_job(evaluate=True), tmp_path / f"h{world.rank}" / "run", loop, world=world)

    assert ranks(2, work) == [0, 0]
    best, there = zip(*((checkpoint.best(r), checkpoint.steps(r)) for r in (tmp_path / "h0/run", tmp_path / "h1/run")))
    assert there[0] == there[1] and best[0] in there[0] and len(there[0]) <= 2 and 6 in there[0]


def test_room_counts_what_a_host_keeps_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(world: World) -> None:
        run_folder.free_bytes = lambda path: 4096 if "h1" in str(path) else 1 << 40
        monkeypatch.setattr("tensorkeep.training._room.socket.gethostname", lambda: f"host-{HOSTS[world.rank]}")

    assert train(tmp_path, before=before, wrong="too little room on host-1") == [0, 0]


# -- before anything is trained ---------------------------------------------------------------------------------------


def test_hosts_that_share_a_folder_are_told_where_each_should_have_its_own(tmp_path: Path) -> None:
    assert train(tmp_path, folders=("h0", "h0"), wrong="is one folder for several hosts: rank 0 on") == [0, 0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_ranks_of_one_host_with_two_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_WAIT", 0.3)

    def work(world: World) -> None:
        os.environ["GROUP_RANK"] = "0"
        with pytest.raises(
            tk.TensorkeepError, match=r"not one folder for all processes of .* 1 does not see what rank 0"
        ):
            preflight.folders(tmp_path / str(world.rank), world, CheckpointConfig(True))

    assert ranks(2, work) == [0, 0]


def test_only_shards_are_kept_by_each_host_and_copies_need_that(tmp_path: Path) -> None:
    made = {"version": 2, "model": "m", "data": {"files": ["a"]}, "training": {"updates": 1}}
    for section, words in (
        ({"local": True}, "only shards"),
        ({"replicas": 1}, "keep locally"),
        ({"replicas": 2}, "0 or 1"),
    ):
        with pytest.raises(tk.TensorkeepError, match=words):
            language_recipe({**made, "checkpoint": section})
    with pytest.raises(tk.TensorkeepError, match="only shards"):
        fit(small_job(), tmp_path, replace(LOOP, parallel="ddp", checkpoint=CheckpointConfig(True)))
    recipe = language_recipe({**made, "training": {"updates": 1, "parallel": "fsdp"}, "checkpoint": {"local": True}})
    assert recipe.checkpoint == CheckpointConfig(True, 0)


def test_what_a_manifest_says_of_hosts_is_checked_and_spelled_for_a_terminal(two: Path) -> None:
    assert hosts_in([], ()) == () and hosts_in([{"name": "a", "files": ["f"]}], ["f"]) == (("a", ("f",)),)
    for entries in (None, {}, [1], [{"name": 1, "files": []}], [{"name": "a", "files": ["x"]}], [{"name": "a"}]):
        assert hosts_in(entries, ["f"]) is None
    step = two / "h0" / STEP
    document = json.loads((step / "manifest.json").read_text())
    document["hosts"][1]["name"] = "\x1b[2Jhost"
    (step / "manifest.json").write_bytes(manifest_bytes(document))
    with pytest.raises(tk.TensorkeepError) as caught:
        tk.read(step)
    assert "which \\x1b[2Jhost kept" in caught.value.what and caught.value.code == "F05"
    document["hosts"][1]["files"] = [7]
    (step / "manifest.json").write_bytes(manifest_bytes(document))
    assert [f.code for f in tk.verify(step)[0]] == ["F07"]


def test_rows_of_a_host_that_was_the_first_before_do_not_pass_for_newer_ones(two: Path) -> None:
    """It wrote rows up to step 6; another went on from step 2 and has rows up to step 4 when the next start comes."""
    for host in ("h0", "h1"):
        for step in ("step-000004", "step-000006"):
            shutil.rmtree(two / host / "run/checkpoints" / step)
    assert train(two, until=4, folders=("h1", "h0"), log_every=4) == [0, 0]
    assert train(two, until=6, folders=("h1", "h0")) == [0, 0]
    rows = [json.loads(line)["step"] for line in (two / "h1/run/metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 4, 5, 6]  # with 3 it would be the other host's


def test_who_keeps_whose_copies() -> None:
    hosts = Hosts((0, 0, 1, 1, 2), ("a", "b", "c"), 0, copies=1)
    assert [hosts.copied_to(rank) for rank in range(5)] == [2, 3, 4, 4, 0]
    assert hosts.copied_from(4) == [2, 3] and hosts.copied_from(1) == []
    assert Hosts((0, 0), ("a",), 0, copies=1).copied_to(0) is None


def test_bytes_go_between_any_ranks_at_once_and_a_lost_file_is_an_error_on_both_ends(tmp_path: Path) -> None:
    """Four ranks, everybody to everybody and more than a chunk; then a file that is not there."""
    size = 3

    def work(world: World) -> None:
        _transfer.CHUNK = 1 << 10
        hosts = connected(replace(find_hosts(world), names=("a", "b")), 0)
        group = hosts.group if hosts is not None else None
        mine = tmp_path / f"from-{world.rank}"
        mine.write_bytes(bytes([world.rank + 1]) * 5000)
        others = [rank for rank in range(size) if rank != world.rank]
        out = [Piece(rank, mine, 10 * rank, 4000) for rank in others]
        into = [Piece(rank, tmp_path / f"{rank}-to-{world.rank}", 100, 4000) for rank in others]
        exchange(group, world.rank, size, out, into)
        for piece in into:
            assert piece.path.read_bytes() == bytes(100) + bytes([piece.peer + 1]) * 4000
        lost = [Piece(1, tmp_path / "absent", 0, 2000)] if world.rank == 0 else []
        kept = [Piece(0, tmp_path / "zeros", 0, 2000)] if world.rank == 1 else []
        if world.rank == 0:
            with pytest.raises(tk.TensorkeepError, match="no such file"):
                exchange(group, world.rank, size, lost, kept)
        else:
            exchange(group, world.rank, size, lost, kept)

    assert ranks(size, work) == [0] * size
    assert (tmp_path / "zeros").read_bytes() == bytes(2000)
