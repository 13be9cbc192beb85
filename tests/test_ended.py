"""Ended by a signal, a command leaves nothing begun; killed, the next one there names what it left, and cleans up."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from tensorkeep.cli import main
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage import leftovers, placement, signals
from tensorkeep.storage.files import TEMPORARY
from tensorkeep.storage.placement import clear_leftovers, replacing, temporary_name
from tests.run_states import in_child
from tests.samples import read_all, run, state, write_hf

FIRST, SECOND = ("hf", "dcp"), ("pth", "pth")  # what stands there, what is written over it
SINKS = {"out": FIRST, "out.pth": SECOND}
STEPS = [
    (os, "pwrite"),
    (os, "fsync"),
    (os, "link"),
    (Path, "rename"),
    (Path, "mkdir"),
    (placement, "swap_names"),
    (placement, "remove"),
    (placement, "refuse_existing"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = write_hf(tmp_path / "source")
    read_all(source)  # what is imported late is imported before the forks
    return source


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def sending(patch: pytest.MonkeyPatch, number: int, at: int, before: bool = True) -> list[str]:
    """Send this process a signal in the call of that number, counted over all steps; gives the calls made."""
    calls: list[str] = []

    def send() -> None:
        usual = (signal.SIG_DFL, signal.default_int_handler)
        assert number == signal.SIGKILL or signal.getsignal(number) not in usual, "nobody would answer"
        os.kill(os.getpid(), number)

    for owner, name in STEPS:
        real = getattr(owner, name)

        def call(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            calls.append(name)
            here = len(calls) == at
            if here and before:
                send()
            made = real(*args, **options)
            if here and not before:
                send()
            return made

        patch.setattr(owner, name, call)
    return calls


def silent() -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def converted(words: list[str], number: int, at: int, before: bool = True) -> int:
    """Run a command that gets a signal in that call; its exit status (200: the call never came).

    It runs in this process, so that no process's end cleans up for it; in a forked one where the signal is a kill.
    """

    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            calls = sending(patch, number, at, before)
            code = main(words)
        return code if code or len(calls) >= at else 200

    def killed() -> None:
        silent()
        os._exit(work())

    return in_child(killed) if number == signal.SIGKILL else work()


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("before", [True, False], ids=["before a step", "after it"])
def test_a_signal_at_any_step_leaves_nothing_begun_and_a_whole_sink(
    name: str, before: bool, source: Path, tmp_path: Path
) -> None:
    """The three signals take turns, and a step meets one before it and another after it."""
    old, new = SINKS[name]
    out = tmp_path / "sinks" / name
    run(source, out, old)
    there = names(out.parent)
    words = ["convert", str(source), str(out), "--to", new, "--overwrite", "--quiet"]
    ended = 0
    for at in range(1, 100):
        number = signals.ENDING[(at + before) % len(signals.ENDING)]
        code = converted(words, number, at, before)
        assert names(out.parent) == there, f"call {at}"
        assert set(read_all(out)) == set(state())
        assert main(["verify", str(out), "--quiet"]) == 0, f"call {at}: the certificate is not the sink's"
        if code == 200:
            break
        assert code in (128 + number, 0), f"call {at}: exit {code}"  # 0: it came when all was done
        ended += code != 0
    assert ended > 8 and at < 99


@pytest.mark.parametrize("name", SINKS)
def test_what_a_kill_leaves_is_named_and_cleaned_by_the_next_command(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = SINKS[name]
    out = tmp_path / "sinks" / name
    run(source, out, old)
    there, dirty = names(out.parent), 0
    words = ["convert", str(source), str(out), "--to", new, "--overwrite", "--quiet"]
    for at in range(1, 100):
        code = converted(words, signal.SIGKILL, at)
        left = sorted(set(names(out.parent)) - set(there))
        dirty += bool(left)
        assert all(n.endswith(TEMPORARY) for n in left) and set(read_all(out)) == set(state())
        capsys.readouterr()
        beside = out if at % 2 else out.with_name(f"beside_{at}{out.suffix}")  # any sink in that folder cleans it
        assert main(["convert", str(source), str(beside), "--to", old, "--overwrite"]) == 0
        said = capsys.readouterr().err
        assert all(n in said for n in left) and ("was killed" in said) == bool(left)
        if beside != out:
            for path in out.parent.glob(f"{beside.name}*"):
                placement.remove(path)
        assert names(out.parent) == there, f"call {at}"
        if code == 200:
            break
        assert code == -signal.SIGKILL
    assert dirty > 5 and at < 99


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "report": lambda place: ["report", str(place / "run"), "-o", str(place / "sinks" / "page.html")],
    "recipe import": lambda place: [
        "recipe",
        "import",
        str(Path(__file__).parent / "data" / "opentad_configs" / "adatad_s.py"),
        "-o",
        str(place / "sinks" / "recipe.yaml"),
    ],
    "merge": lambda place: ["merge", "examples/tiny-llama", "examples/tiny-adapter", str(place / "sinks" / "merged")],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_writes_cleans_up(command: str, tmp_path: Path) -> None:
    (tmp_path / "sinks").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    words = COMMANDS[command](tmp_path)
    torch.set_num_threads(1)  # no threads that a fork would lose
    assert main([*words, "--quiet"]) == 0  # what is imported late is imported before the forks
    for name in names(tmp_path / "sinks"):
        placement.remove(tmp_path / "sinks" / name)
    for at in range(1, 200):
        number = (signal.SIGTERM, signal.SIGHUP)[at % 2]
        code = converted([*words, "--quiet"], number, at)
        left = names(tmp_path / "sinks")
        assert not any(TEMPORARY in n for n in left), f"call {at}: {left}"
        if code not in (128 + number, 0, 1) or not code or code == 1:
            break  # it was over before the signal
        for name in left:
            placement.remove(tmp_path / "sinks" / name)
    assert 2 < at < 199


def test_one_line_and_the_usual_exit_code(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = pytest.MonkeyPatch()
    for number, code, line in (
        (signal.SIGTERM, 143, "ended by SIGTERM\n"),
        (signal.SIGHUP, 129, "ended by SIGHUP\n"),
        (signal.SIGINT, 130, "interrupted\n"),
    ):
        with patch.context() as patched:
            patched.setattr(os, "pwrite", lambda *_, number=number: os.kill(os.getpid(), number))
            assert main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--quiet"]) == code
        assert capsys.readouterr().err == line and names(tmp_path) == ["source"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_a_terminal_that_is_gone_is_no_traceback(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, _: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    monkeypatch.setattr(sys, "stderr", Gone())
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--quiet"]) == 129


def test_what_nohup_ignores_stays_ignored(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, before = os.pwrite, signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def hanging_up(*args: Any) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return real(*args)

    try:
        monkeypatch.setattr(os, "pwrite", hanging_up)
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--quiet"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_sigterm_does_not_cut_the_cleaning_short(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = placement.remove

    def remove(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(path)

    monkeypatch.setattr(placement, "remove", remove)
    monkeypatch.setattr(os, "pwrite", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--quiet"]) == 143
    assert names(tmp_path) == ["source"]


def test_a_forked_child_ends_as_it_would_have(tmp_path: Path) -> None:
    with signals.answered():
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


# -- leftovers --------------------------------------------------------------------------------------------------------


def leave(final: Path, old: bool = False) -> str:
    """Leave what a killed command leaves: a folder under a temporary name."""
    path = temporary_name(final, old)
    path.mkdir(parents=True)
    (path / "part").write_text("half")
    return path.name


def test_what_another_command_writes_now_stays_and_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with replacing(tmp_path / "out", overwrite=False) as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("half")
        other = leave(tmp_path / "other")
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", "hf"]) == 0
        assert f"{temporary.name} stays" in capsys.readouterr().err
        assert (temporary / "part").is_file() and (tmp_path / other).is_dir()
        placement.remove(tmp_path / "out")
    assert clear_leftovers(tmp_path / "out") == ([other], [])
    assert names(tmp_path) == ["out", "source"]


def test_names_that_are_not_ours_stay(tmp_path: Path) -> None:
    for name in (f"thesis{TEMPORARY}", f".x.12{TEMPORARY}", f".x.zzzzzzzz{TEMPORARY}", ".x.01234567.tmp"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    assert clear_leftovers(tmp_path / "x") == ([], []) and names(tmp_path) == before


def test_links_among_what_was_left_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    inside = leave(tmp_path / "out")
    (tmp_path / inside / "link").symlink_to("../precious")
    itself = temporary_name(tmp_path / "out")
    itself.symlink_to("precious")
    assert clear_leftovers(tmp_path / "out") == (sorted([inside, itself.name]), [])
    assert (tmp_path / "precious" / "file").read_text() == "precious"


def test_what_stood_there_comes_back_where_names_cannot_be_swapped_in_one_step(tmp_path: Path) -> None:
    """On such a file system a kill may come when the old one has been moved aside and the new one has no name yet."""
    import ctypes

    (tmp_path / "out").write_text("old")

    def work() -> None:
        ctypes.CDLL = lambda *_, **__: object()  # type: ignore[assignment, misc]
        real, moved = Path.rename, []

        def rename(self: Path, target: Path) -> Path:
            moved.append(target)
            if len(moved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        Path.rename = rename  # type: ignore[method-assign, assignment]
        with replacing(tmp_path / "out", overwrite=True) as temporary:
            temporary.write_text("new")

    assert in_child(work) == -signal.SIGKILL and not (tmp_path / "out").exists()
    (tmp_path / "other").write_text("other")
    clear_leftovers(tmp_path / "other")  # knows nothing of it, and leaves it
    assert clear_leftovers(tmp_path / "out")[1] == []
    assert (tmp_path / "out").read_text() == "old" and names(tmp_path) == ["other", "out"]


@contextlib.contextmanager
def without_locks(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def no(*_: Any) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with patch.context() as patched:
        patched.setattr(fcntl, "flock", no)
        yield


def test_where_a_file_system_has_no_locks_it_is_named_and_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = leave(tmp_path / "out")
    with without_locks(monkeypatch):
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert f"{left} stays" in capsys.readouterr().err and (tmp_path / left).is_dir()


def test_somebody_else_s_lock_on_the_folder_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers.time, "sleep", lambda _: None)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with replacing(tmp_path / "out", overwrite=False) as temporary:
            temporary.write_text("new")
    finally:
        os.close(handle)
    assert (tmp_path / "out").read_text() == "new"


@pytest.mark.parametrize("moved", [False, True])
def test_a_store_s_staged_prefix_goes_once_the_new_one_is_there(
    moved: bool, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"memory://ended/{moved}"
    system, path = fsspec.core.url_to_fs(base)
    stage = f".out.0123abcd{TEMPORARY}"
    system.pipe_file(f"{path}/{stage}/model.safetensors", b"half")
    system.pipe_file(f"{path}/.other.0123abcd{TEMPORARY}/model.safetensors", b"half")
    if moved:  # another command is at work in it
        real = system.cp_file

        def copying(*args: Any, **options: Any) -> Any:
            system.pipe_file(f"{path}/{stage}/model.safetensors", b"more than half")
            return real(*args, **options)

        monkeypatch.setattr(system, "cp_file", copying)
    assert main(["convert", str(source), f"{base}/out", "--to", "hf"]) == 0
    there = {p.removeprefix(f"{path}/").partition("/")[0] for p in system.find(path)}
    assert (stage in there) == moved and f".other.0123abcd{TEMPORARY}" in there
    assert (stage in capsys.readouterr().err) != moved
    assert set(read(f"{base}/out")) == set(state())


def test_a_store_s_stage_is_gone_after_a_signal(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, path = fsspec.core.url_to_fs("memory://ended/signal")
    real = system.open

    def opened(name: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode and TEMPORARY in name:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(name, mode, **options)

    monkeypatch.setattr(system, "open", opened)
    assert main(["convert", str(source), "memory://ended/signal/out", "--to", "hf", "--quiet"]) == 143
    assert system.find(path) == []


def test_a_place_that_may_not_be_written_to_is_still_one_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TensorkeepError):
        run(source, tmp_path / "file" / "out", "hf")
    assert (tmp_path / "file").read_text() == "mine"
