"""The power of a real ext4 file system is cut while a run saves into it: what was acknowledged is there and whole.

Short form of `python -m benchmarks.crash cuts`, which counts the same for other tools too.
"""

from __future__ import annotations

import os
import random
import select
import time
from pathlib import Path

import pytest
from benchmarks import ext4

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable
from tensorkeep.training.saver import Keep, Saver, best, mark_best, newest, save, steps
from tests.run_states import same, state

MISSING = ext4.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no disk whose power can be cut: {MISSING}")
SIZE = 160  # a tensor of 100 KB, moments of 200: one file goes through the page cache, one past it
KEEP = Keep(2)


def saving(run: Path, told: int) -> None:
    """Save for ever; a line in the pipe for each acknowledged step, and for each that is marked as the best."""
    saver = Saver(run, KEEP)
    for step in range(1, 100_000):
        saver.background = step % 2 == 0
        saver.save(state(step, size=SIZE))
        saver.wait()
        os.write(told, f"step {step}\n".encode())
        if step % 3 == 0:
            mark_best(run, step)
            os.write(told, f"best {step}\n".encode())


def cut_while_saving(disk: ext4.Disk, seconds: float) -> tuple[dict[str, int], int]:
    """What was acknowledged before the power went, and how the process ended."""
    get, put = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(get)
            saving(disk.top / "run", put)
        except TensorkeepError:
            os._exit(5)
        finally:
            os._exit(3)
    os.close(put)
    assert select.select([get], [], [], 60)[0]
    time.sleep(seconds)
    disk.cut()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # its next call fails, and it stops
    with os.fdopen(get) as lines:
        told = {line.split()[0]: int(line.split()[1]) for line in lines}
    return told, status


def test_after_a_power_cut_what_was_acknowledged_is_there_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "SMALL", 150 << 10)
    chance = random.Random(time.time_ns())
    with ext4.disk(tmp_path, 256) as disk:
        for _ in range(3):
            disk.fresh()
            run = disk.top / "run"
            told, status = cut_while_saving(disk, chance.uniform(0.2, 1.2))
            assert status == 5  # it was told so, by an error of ours
            disk.back()
            found = newest(run)
            assert found is not None and found[2] == [] and disk.repaired == 0
            step = int(found[0].document["step"])
            assert step >= told["step"] and same(found[0], state(step, size=SIZE))
            assert (best(run) or 0) >= told.get("best", 0) and best(run) in (None, *steps(run))
            save(run, state(step + 1, size=SIZE), KEEP)  # what the cut left is in nobody's way
            again = newest(run)
            assert again is not None and same(again[0], state(step + 1, size=SIZE))


def test_a_writer_that_does_not_fsync_loses_what_it_wrote(tmp_path: Path) -> None:
    """The disk of this test forgets: without this one, the test above could not fail."""
    with ext4.disk(tmp_path, 64) as disk:
        disk.fresh()
        for name, sync in (("lazy", False), ("careful", True)):
            with (disk.top / name).open("wb") as file:
                file.write(b"x" * 100_000)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        (disk.top / "later").write_bytes(b"y" * 100_000)
        disk.cut()
        disk.back()
        left = {p.name: p.stat().st_size for p in disk.top.iterdir() if p.is_file()}
        assert left["careful"] == 100_000 and left.get("later", 0) == 0
