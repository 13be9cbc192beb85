"""Files: what is read is what is there, and a sink is there whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.errors import TensorkeepError, printable, shown
from tensorkeep.storage import placement
from tensorkeep.storage.files import (
    OPEN_FILES,
    TEMPORARY,
    LocalFolder,
    explained,
    inside,
    left_over,
    local_path,
    refuse_changed,
)
from tensorkeep.storage.placement import replacing, replacing_all, write_bytes


def refused(do: Callable[[], object]) -> TensorkeepError:
    with pytest.raises(TensorkeepError) as error:
        do()
    assert error.value.exit_code == 2 and "\n" not in error.value.line
    return error.value


def open_handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- reading --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=50), st.integers(-2, 60), st.none() | st.integers(-2, 60))
def test_a_ranged_read_gives_exactly_these_bytes_or_says_truncated(data: bytes, start: int, length: int | None) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "f").write_bytes(data)
        folder = LocalFolder(Path(name))
        end = len(data) if length is None else start + length
        if 0 <= start <= end <= len(data):
            assert folder.read("f", start, length) == data[start:end]
        else:
            assert refused(lambda: folder.read("f", start, length)).code == "F02"


def test_thousands_of_files_need_few_handles_and_threads_may_share_them(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}").write_bytes(str(number).encode() * 100)
    folder, wrong = LocalFolder(tmp_path), []
    before = open_handles()

    def read() -> None:
        for number in range(300):
            if folder.read(f"{number}") != str(number).encode() * 100:
                wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(8)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + OPEN_FILES + 20, hard))
    try:
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong and open_handles() <= before + OPEN_FILES + 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    folder.close()
    assert open_handles() <= before + 1


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", ".", "", "a\0b", "..\\x", "C:\\x", "a\ud800"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    for do in (lambda: inside(name, "ckpt"), lambda: LocalFolder(tmp_path).size(name)):
        error = refused(do)
        assert error.code == "F06" and error.hint and error.line.isprintable()


def test_a_link_to_a_file_elsewhere_is_read_as_the_hub_cache_needs_it(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"data")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blob")
    folder = LocalFolder(tmp_path / "snapshot")
    assert folder.names() == ["model.safetensors"] and folder.read("model.safetensors") == b"data"
    (tmp_path / "blob").unlink()
    assert refused(lambda: LocalFolder(tmp_path / "snapshot").size("model.safetensors")).code == "F05"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    folder = LocalFolder(tmp_path)
    for name in ("fifo", "device", "folder"):
        assert "not a regular file" in refused(lambda name=name: folder.read(name)).what
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "loop" in refused(lambda: folder.size("loop")).line


@pytest.mark.parametrize("how", ["grown", "shrunk", "rewritten", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read_is_noticed(how: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345678")
    folder = LocalFolder(tmp_path)
    folder.read("f")
    refuse_changed(folder)
    if how == "replaced":
        (tmp_path / "g").write_bytes(b"12345678")
        (tmp_path / "g").replace(path)
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes({"grown": b"123456789", "shrunk": b"1234", "rewritten": b"87654321"}[how])
        os.utime(path, ns=(1, 1))
    error = refused(lambda: refuse_changed(folder))
    assert "f" in error.what and error.hint and str(tmp_path) in error.line
    if how == "shrunk":
        assert refused(lambda: folder.read("f")).code == "F02"
    folder.close()
    with pytest.raises(TensorkeepError):
        folder.read("f")


@pytest.mark.parametrize("given", ["x" * 5000, "a\0b", "\ud800", "~nosuchuser/x", "loop", "loop/x"], ids=range(6))
def test_what_can_never_be_a_path_is_refused(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    error = refused(lambda: local_path(given))
    assert error.hint and error.line.isprintable()


# -- errors ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(errno.errorcode)))
def test_every_error_of_the_system_becomes_one_of_ours_with_the_path(number: int) -> None:
    def fail() -> None:
        with explained("/some/path"):
            raise OSError(number, os.strerror(number))

    error = refused(fail)
    assert "/some/path" in error.line and error.what


@given(st.text(st.characters(exclude_categories=())))
def test_an_error_is_one_printable_line_whatever_the_name(name: str) -> None:
    error = TensorkeepError(f"no {name}", where=name)
    assert len(error.line.splitlines()) == 1 and error.line.isprintable() and printable(name).isprintable()


deep: list[Any] = []
for _ in range(100_000):
    deep = [deep, deep]


@pytest.mark.parametrize(
    "value", [deep, 10**10_000, "x" * 10**6, [1 << 5000] * 10**6, {1: deep}, ("a", 1.5, None, b"b")], ids=range(6)
)
def test_any_value_is_shown_shortly(value: Any) -> None:
    assert len(shown(value)) < 400


# -- writing --------------------------------------------------------------------------------------------------------


def make(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "a").write_text(text)
        (path / "b").mkdir()
        (path / "b" / "c").write_text(text)
    else:
        path.write_text(text)


def content(path: Path) -> Any:
    return {p.name: content(p) for p in path.iterdir()} if path.is_dir() else path.read_text()


def copy_of(folder: Path) -> Any:
    return content(folder)


KINDS = [
    ("file", None),
    ("folder", None),
    ("file", "file"),
    ("folder", "folder"),
    ("file", "folder"),
    ("folder", "file"),
]


@pytest.mark.parametrize("kind, old", KINDS)
def test_a_sink_is_in_place_after_the_body_and_not_before(kind: str, old: str | None, tmp_path: Path) -> None:
    final = tmp_path / "deep" / "sink"
    final.parent.mkdir()
    if old:
        make(final, old, "old")
    before = copy_of(tmp_path)
    with replacing(final, overwrite=True) as temporary:
        assert temporary.name.endswith(TEMPORARY) and temporary.parent == final.parent
        make(temporary, kind, "new")
        assert content(final) == before["deep"]["sink"] if old else not final.exists()
    assert content(final) == ("new" if kind == "file" else {"a": "new", "b": {"c": "new"}})
    assert [p.name for p in final.parent.iterdir()] == ["sink"]


def failing(number: int, patch: pytest.MonkeyPatch, names: list[tuple[Any, str]]) -> list[str]:
    """Let the call of that number among these functions fail; gives the names of the calls made."""
    calls: list[str] = []
    for owner, name in names:
        real = getattr(owner, name)

        def call(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **options)

        patch.setattr(owner, name, call)
    return calls


STEPS = [(os, "fsync"), (os, "link"), (os, "rename"), (Path, "rename"), (Path, "replace"), (placement, "swap_names")]


@pytest.mark.parametrize("swap", ["in one step", "in three"])
@pytest.mark.parametrize("kind, old", KINDS)
def test_where_any_step_fails_the_old_one_is_back_and_nothing_else_stays(
    kind: str, old: str | None, swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if swap == "in three":
        import ctypes

        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    final, other = tmp_path / "sink", tmp_path / "other"
    if old:
        make(final, old, "old")
        make(other, "file", "old")
    before = copy_of(tmp_path)
    for number in range(1, 30):
        with monkeypatch.context() as patch:
            calls = failing(number, patch, STEPS)
            try:
                with replacing_all([final, other], [True, True], [None, None]) as (one, two):
                    make(one, kind, "new")
                    write_bytes(two, b"new")
            except TensorkeepError as error:
                assert len(calls) >= number and "input/output" in error.what
            else:
                break
        assert copy_of(tmp_path) == before, calls
    assert number > 4 and content(other) == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["other", "sink"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, TensorkeepError("no")])
def test_an_interrupted_body_leaves_no_trace(error: Any, tmp_path: Path) -> None:
    make(tmp_path / "sink", "folder", "old")
    before = copy_of(tmp_path)
    with pytest.raises(BaseException), replacing(tmp_path / "sink", overwrite=True) as temporary:  # noqa: B017
        make(temporary, "folder", "half")
        raise error
    assert copy_of(tmp_path) == before


def test_a_taken_name_is_refused_before_any_work_and_an_empty_folder_is_free(tmp_path: Path) -> None:
    for kind in ("file", "folder"):
        make(tmp_path / kind, kind, "old")
        error = refused(lambda kind=kind: replacing(tmp_path / kind, overwrite=False).__enter__())
        assert "exists already" in error.what and "--overwrite" in str(error.hint)
    (tmp_path / "dangling").symlink_to("nowhere")
    refused(lambda: replacing(tmp_path / "dangling", overwrite=False).__enter__())
    (tmp_path / "empty").mkdir()
    with replacing(tmp_path / "empty", overwrite=False) as temporary:
        make(temporary, "folder", "new")
    assert content(tmp_path / "empty")["a"] == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_taken_while_the_body_ran_is_refused_too(kind: str, tmp_path: Path) -> None:
    def race() -> None:
        with replacing(tmp_path / "sink", overwrite=False) as temporary:
            make(temporary, kind, "new")
            make(tmp_path / "sink", kind, "theirs")

    refused(race)
    assert content(tmp_path / "sink") in ("theirs", {"a": "theirs", "b": {"c": "theirs"}})
    assert [p.name for p in tmp_path.iterdir()] == ["sink"]


def test_links_are_never_written_through(tmp_path: Path) -> None:
    make(tmp_path / "target", "file", "precious")
    make(tmp_path / "folder", "folder", "precious")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "to_folder").symlink_to("folder")
    with replacing(tmp_path / "link", overwrite=True) as temporary:
        make(temporary, "file", "new")
    assert content(tmp_path / "target") == "precious" and content(tmp_path / "link") == "new"
    error = refused(lambda: replacing(tmp_path / "to_folder", overwrite=True).__enter__())
    assert "symbolic link to folder" in error.what and error.hint


@pytest.mark.parametrize(
    "spelled, meant", [("a/b/../c", "a/c"), ("absent/parent/x/", "absent/parent/x"), ("../x", "../x"), ("./y", "y")]
)
def test_odd_spellings_of_a_place_work(
    spelled: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with replacing(Path(spelled), overwrite=False) as temporary:
        make(temporary, "folder", "new")
    assert content(tmp_path / "here" / meant)["a"] == "new"


def test_impossible_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "root folder" in refused(lambda: replacing(Path("/"), overwrite=True).__enter__()).what
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # an empty folder is free, but replacing this one would leave us nowhere
    for spelled in (".", "../here", "x/..", str(tmp_path / "here")):
        assert "you are in" in refused(lambda s=spelled: replacing(Path(s), overwrite=True).__enter__()).what
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rmdir()
    make(tmp_path / "file", "file", "old")
    error = refused(lambda: replacing(tmp_path / "file" / "sink", overwrite=False).__enter__())
    assert str(tmp_path / "file") in error.line
    assert refused(lambda: _write(tmp_path / ("x" * 256))).hint
    _write(tmp_path / ("x" * 255))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x" * 255]


def _write(final: Path) -> None:
    with replacing(final, overwrite=False) as temporary:
        write_bytes(temporary, b"")


def test_a_file_system_without_hard_links_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no)
    with replacing(tmp_path / "sink", overwrite=False) as temporary:
        make(temporary, "file", "new")
    assert content(tmp_path) == {"sink": "new"}


def test_created_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "sink", overwrite=False) as temporary:
            temporary.mkdir()
            write_bytes(temporary / "f", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "sink" / "f").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "sink").stat().st_mode) == 0o750


def test_left_over_names_are_found(tmp_path: Path) -> None:
    (tmp_path / f".x.12{TEMPORARY}").mkdir()
    (tmp_path / "x").mkdir()
    assert left_over(tmp_path) == [f".x.12{TEMPORARY}"] and left_over(tmp_path / "absent") == []
