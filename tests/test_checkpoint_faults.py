"""A save is killed, or its disk is full or fails, at any call it makes: nothing that was acknowledged is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable
from tensorkeep.training.saver import Keep, Saver, newest, save, steps
from tests.run_states import Faults, in_child, injected, same, state

KEEP = Keep(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # another thread may be the one that the signal reaches first


SIZES = {"page cache": durable.SMALL, "direct": 4096}  # from how many bytes on a file is written with direct I/O


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, to copy."""
    run = tmp_path_factory.mktemp("first")
    save(run, state(1), KEEP)
    return run


def calls_of_a_save(run: Path, step: int) -> list[str]:
    with injected(Faults()) as counted:
        save(run, state(step), KEEP)
    return [name for name, _ in counted.calls]


def intact(run: Path, *allowed: int) -> int:
    """The step a resume would take; it must be one of these and bit for bit what was saved."""
    found = newest(run)
    assert found is not None
    step = found[0].document["step"]
    assert step in allowed and same(found[0], state(step)) and found[2] == []
    return int(step)


@pytest.mark.parametrize(("way", "step"), [("page cache", 1), ("direct", 2)], ids=["same step", "new step, direct"])
def test_killed_at_every_call_of_a_save_the_run_goes_on(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, step: int
) -> None:
    monkeypatch.setattr(durable, "SMALL", SIZES[way])
    calls = calls_of_a_save(shutil.copytree(first, tmp_path / "counted"), step)
    assert len(calls) > 20
    taken = set()
    for at in range(1, len(calls) + 1):
        run = shutil.copytree(first, tmp_path / f"{at}")

        def killed(run: Path = run, at: int = at) -> None:
            with injected(Faults(at, die)):
                save(run, state(step), KEEP)

        assert in_child(killed) == -signal.SIGKILL
        taken.add(intact(run, 1, step))
        save(run, state(3), KEEP)  # what the kill left is in nobody's way, and goes
        assert intact(run, 3) == 3 and steps(run) == [3]
        assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".step")]
    assert taken == {1, step}


@pytest.mark.parametrize(
    ("way", "number"),
    [("direct", errno.ENOSPC), ("direct", errno.EIO), ("page cache", errno.EIO), ("page cache", errno.EDQUOT)],
)
def test_where_any_call_of_a_save_fails_the_run_goes_on_and_says_so(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, number: int
) -> None:
    monkeypatch.setattr(durable, "SMALL", SIZES[way])
    calls = calls_of_a_save(shutil.copytree(first, tmp_path / "counted"), 2)
    for at in range(1, len(calls) + 1):
        run = shutil.copytree(first, tmp_path / f"{at}")
        faults = Faults(at, _failing(number))
        error: TensorkeepError | None = None
        with injected(faults):
            try:
                save(run, state(2), KEEP)
            except TensorkeepError as caught:
                error = caught
        name, path = faults.calls[at - 1]
        # a folder that is there already need not be made; what cannot be deleted now is deleted by the next save
        assert error is not None or name in ("unlink", "rmdir", "mkdir") or "fsync" not in calls[at:], (at, name)
        if error is not None:
            assert "disk" in error.what or "quota" in error.what
            assert intact(run, 1, 2) == 1 or path.startswith(str(run / "checkpoints"))
            tried = [p for n, p in faults.calls[at:] if n in ("fsync", "pwrite", "ftruncate")]
            assert name != "fsync" or path not in tried, "nothing is tried again on a file whose fsync failed"
        else:
            assert intact(run, 2) == 2
        save(run, state(3), KEEP)
        assert intact(run, 3) == 3 and steps(run) == [3]
        assert not [p for p in (run / "checkpoints").iterdir() if p.name.endswith("tensorkeep-tmp")]


def _failing(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_says_how_much_is_needed_and_how_much_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, state(1), KEEP)
    real = os.statvfs

    def nearly_full(path: object) -> os.statvfs_result:
        found = list(real(path))  # type: ignore[call-overload]
        found[3] = found[4] = 2  # f_bfree, f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(TensorkeepError, match=r"the disk is full: a checkpoint needs [\d,]+ bytes, 8,192 are free"):
        save(tmp_path, state(2), KEEP)
    assert intact(tmp_path, 1) == 1


def test_an_error_in_the_background_is_raised_by_the_next_call_and_training_may_go_on(tmp_path: Path) -> None:
    saver = Saver(tmp_path, KEEP, background=True)
    saver.save(state(1))
    bad = state(2)
    bad.model["layers.0.w"][3, 3] = float("nan")
    saver.save(bad)
    with pytest.raises(TensorkeepError) as caught:
        saver.save(state(3))
    assert caught.value.code == "V01"
    saver.save(state(4))
    saver.close()
    assert intact(tmp_path, 4) == 4 and steps(tmp_path) == [4]


@pytest.mark.parametrize("background", [True, False])
def test_what_must_be_first_is_done_by_the_writer_before_the_checkpoint_is_in_place(
    background: bool, tmp_path: Path
) -> None:
    seen: list[tuple[bool, list[int]]] = []

    def fails() -> None:
        raise TensorkeepError("the rows are gone", where=tmp_path)

    saver = Saver(tmp_path, KEEP, background=background)
    saver.save(state(1), lambda: seen.append((threading.current_thread() is threading.main_thread(), steps(tmp_path))))
    saver.wait()
    assert seen == [(not background, [])] and steps(tmp_path) == [1]
    with pytest.raises(TensorkeepError, match="the rows are gone"):
        saver.save(state(2), fails)
        saver.wait()
    saver.close()
    assert steps(tmp_path) == [1] and intact(tmp_path, 1) == 1


def test_killed_at_random_instants_no_acknowledged_checkpoint_is_lost(tmp_path: Path) -> None:
    chance = random.Random(0)
    reached = 0
    for trial in range(20):
        run = tmp_path / f"{trial}"
        get, put = os.pipe()
        child = os.fork()
        if child == 0:
            saver = Saver(run, Keep(2), background=bool(trial % 2))
            for step in range(1, 10_000):
                saver.save(state(step, size=64))
                if (path := saver.wait()) is not None:
                    os.write(put, bytes([int(path.name[-6:]) % 256]))
            os._exit(0)
        os.close(put)
        acknowledged = b"".join(os.read(get, 1) for _ in range(chance.randint(1, 4)))
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        acknowledged += os.read(get, 1 << 16)
        os.close(get)
        found = newest(run)
        assert found is not None and found[2] == []
        step = found[0].document["step"]
        assert step >= len(acknowledged) and same(found[0], state(step, size=64))
        reached = max(reached, step)
    assert reached > 2
