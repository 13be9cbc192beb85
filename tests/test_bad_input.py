"""Bad input and bad luck: one clear error, the source untouched, nothing half-written under the final name."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.cli import main
from tensorkeep.conversion.execution import convert
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.dcp import METADATA, metadata
from tensorkeep.formats.view import read
from tensorkeep.storage.archive import TENSOR_GLOBALS
from tensorkeep.storage.files import TEMPORARY
from tensorkeep.storage.layout import SinkTensor
from tests.samples import (
    contents,
    plan_of,
    read_all,
    run,
    state,
    write_dcp,
    write_hf,
    write_peft,
    write_pth,
    write_sharded,
)
from tests.test_pickles import Evil, evil_pickles


def refused(do: Callable[[], object], code: str | None, where: object = None, hint: bool = True) -> TensorkeepError:
    """The one error that comes out: its code, the place, a hint, exit code 2, one line."""
    with pytest.raises(TensorkeepError) as caught:
        do()
    error = caught.value
    assert error.code == code and error.exit_code == 2 and "\n" not in error.line
    assert where is None or str(where) in error.line
    assert error.hint or not hint
    return error


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def header(names: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(names).encode()
    return len(text).to_bytes(8, "little") + text + data


def f32(low: int, high: int, count: int | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(high - low) // 4 if count is None else count], "data_offsets": [low, high]}


# -- headers --------------------------------------------------------------------------------------------------------

HEADERS = {
    "truncated": (header({"a": f32(0, 8)}, bytes(7)), "F02", "truncated"),
    "cut in the header": (header({"a": f32(0, 8)}, b"")[:20], "F02", "truncated"),
    "too short for a length": (b"\x01\x02", "F02", "truncated"),
    "overlapping": (header({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)), "F07", "overlap"),
    "the same bytes twice": (header({"a": f32(0, 8), "b": f32(0, 8)}, bytes(8)), "F07", "overlap"),
    "with a hole": (header({"a": f32(0, 8), "b": f32(12, 16)}, bytes(16)), "F07", "no tensor"),
    "with bytes behind": (header({"a": f32(0, 8)}, bytes(9)), "F07", "behind the last"),
    "mis-declared size": (header({"a": f32(0, 8, 3)}, bytes(8)), "F07", "a: 8 bytes for shape"),
    "mis-declared dtype": (header({"a": {**f32(0, 8), "dtype": "F33"}}, bytes(8)), "F07", "unknown dtype"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "F07", "data_offsets"),
    "a name twice": (
        (lambda t: len(t).to_bytes(8, "little") + t + bytes(16))(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
        ),
        "F07",
        "occurs twice",
    ),
    "not JSON": ((5).to_bytes(8, "little") + b"{]}  ", "F07", "not valid"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_wrong_safetensors_header_is_named(kind: str, tmp_path: Path) -> None:
    data, code, what = HEADERS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert what in refused(lambda: read(path), code, path).what


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(change(document) or document))
    return folder


def test_an_index_that_contradicts_its_shards_is_named(tmp_path: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    cases: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
        ("F05", "absent.safetensors", lambda d: d["weight_map"].update(x="absent.safetensors")),
        ("F07", "no shard holds", lambda d: d["weight_map"].update(nowhere=shard)),
        ("F07", "puts g.mask into", lambda d: d["weight_map"].update({"g.mask": shard})),
        ("F07", "no weight_map", lambda d: {"weight_map": [1]}),
        ("F07", "no weight_map", lambda d: {"weight_map": {"a": 3}}),
        *[
            ("F06", "outside", lambda d, n=n: d["weight_map"].update(x=n))
            for n in ("../x", "/etc/passwd", "a\\..\\b", "a\0", "..", "")
        ],
    ]
    for number, (code, what, change) in enumerate(cases):
        folder = edit_index(write_sharded(tmp_path / str(number)), change)
        assert what in refused(lambda f=folder: read(f), code, folder).line
    folder = write_sharded(tmp_path / "lost")
    (folder / shard).unlink()
    assert shard in refused(lambda: read(folder), "F05", folder).what
    (folder / "model.safetensors.index.json").unlink()
    (folder / shard).write_bytes((folder / "model-00002-of-00002.safetensors").read_bytes())
    assert "index" in refused(lambda: read(folder), "F05", folder).line
    write_sharded(folder)
    (folder / shard).write_bytes((folder / "model-00002-of-00002.safetensors").read_bytes())
    refused(lambda: read(folder), "F07", folder)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    for file, folder in (
        ("config.json", write_hf(tmp_path / "a")),
        ("adapter_config.json", write_peft(tmp_path / "b")),
    ):
        for data in (b"{", b"\xff\xfe", b"[" * 100_000):
            (folder / file).write_bytes(data)
            assert "JSON" in refused(lambda f=folder: read(f), None, folder / file).what
    (tmp_path / "b" / "adapter_config.json").write_text("[]")
    assert "peft_type" in refused(lambda: read(tmp_path / "b"), None, tmp_path / "b").what


# -- DCP ------------------------------------------------------------------------------------------------------------


def dcp_of(folder: Path, places: dict[str, tuple[str, int, int]]) -> Path:
    folder.mkdir()
    (folder / METADATA).write_bytes(
        metadata([SinkTensor(n, "F32", (2,)) for n in places], {n: {(0,): p} for n, p in places.items()}, None)
    )
    (folder / "__0_0.distcp").write_bytes(bytes(1000))
    return folder


DCP = {
    "file missing": ({"a": ("__1_0.distcp", 0, 100)}, "F05", "not there"),
    "truncated": ({"a": ("__0_0.distcp", 950, 100)}, "F02", "truncated"),
    "overlapping": ({"a": ("__0_0.distcp", 0, 100), "b": ("__0_0.distcp", 50, 100)}, "F07", "overlap"),
    **{
        f"outside {n!r}": ({"a": (n, 0, 100)}, "F06", "outside")
        for n in ("../secret", "/etc/passwd", "x/../../y", "..\\x", "a\0b")
    },
}


@pytest.mark.parametrize("kind", DCP)
def test_dcp_metadata_that_does_not_fit_its_files_is_named(kind: str, tmp_path: Path) -> None:
    places, code, what = DCP[kind]
    (tmp_path / "secret").write_bytes(bytes(1000))
    folder = dcp_of(tmp_path / "x", places)
    assert what in refused(lambda: read(folder), code, folder).line


def test_dcp_data_that_is_not_what_the_metadata_says_is_named(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "x")
    (data,) = folder.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole.replace(b"FloatStorage", b"HalfStorage\n", 1))
    with pytest.raises(TensorkeepError) as error:
        read_all(folder)
    assert error.value.code == "F03" and str(folder) in error.value.line  # the archive's CRC-32, before any name in it
    data.write_bytes(bytes(len(whole)))
    refused(lambda: read_all(folder), "F02", folder)
    data.unlink()
    refused(lambda: read(folder), "F05", folder)
    write_dcp(tmp_path / "y")
    (tmp_path / "y" / METADATA).unlink()
    assert "interrupted" in refused(lambda: read(tmp_path / "y"), "F01", tmp_path / "y").what


# -- hostile pickles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", evil_pickles(Path("x")))
@pytest.mark.parametrize("form", ["bare", "zip", "metadata"])
def test_a_hostile_pickle_is_refused_by_name_and_not_run(kind: str, form: str, tmp_path: Path) -> None:
    import zipfile

    target, path = tmp_path / "made", tmp_path / "x" / ("m.pth" if form != "metadata" else METADATA)
    path.parent.mkdir()
    data = evil_pickles(target)[kind]
    if form == "zip":
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("m/data.pkl", data)
    else:
        path.write_bytes(data)
    if form == "bare" and data[:1] != b"\x80":
        refused(lambda: read(path), "F02", path)  # it is not even taken for a pickle
    else:
        error = refused(lambda: read(path if form != "metadata" else path.parent), "F04", path)
        assert any(name in error.what for name in ("system", "Popen", "getattr")) and "nothing was run" in error.what
    assert not target.exists()


def test_a_hostile_part_of_an_honest_file_is_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "m.pth", tmp_path / "made"
    torch.save({"model": state(), "args": Evil(target)}, path)
    assert "system" in refused(lambda: read(path), "F04", path).what
    torch.save({"model": state(), "args": Evil(target)}, path, _use_new_zipfile_serialization=False)
    refused(lambda: read(path), "F04", path)
    folder = write_dcp(tmp_path / "dcp")
    found = pickle.loads((folder / METADATA).read_bytes())
    found.storage_meta = Evil(target)
    (folder / METADATA).write_bytes(pickle.dumps(found))
    refused(lambda: read(folder), "F04", folder / METADATA)
    assert not target.exists()


def test_nothing_on_the_allow_list_can_run_code() -> None:
    dangerous = {
        "eval",
        "exec",
        "getattr",
        "setattr",
        "__import__",
        "open",
        "compile",
        "apply",
        "system",
        "Popen",
        "input",
        "breakpoint",
    }
    assert not {name.rpartition(".")[2] for name in TENSOR_GLOBALS} & dangerous
    assert not any(
        name.split(".")[0] in ("os", "posix", "subprocess", "sys", "runpy", "importlib", "pty", "shutil")
        for name in TENSOR_GLOBALS
    )


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"\x80", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<html>"], ids=str
)
def test_what_is_no_torch_file_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(data)
    refused(lambda: read(path), "F02", path)


def test_a_folder_without_a_checkpoint_or_no_folder_at_all_is_named(tmp_path: Path) -> None:
    refused(lambda: read(tmp_path), "F05", tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refused(lambda: read(tmp_path), "F05", tmp_path).what
    with pytest.raises(TensorkeepError, match="absent"):
        read(tmp_path / "absent" / "path")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(TensorkeepError):
        read(tmp_path / "loop")
    os.mkfifo(tmp_path / "m.pth")
    refused(lambda: read(tmp_path / "m.pth"), None, tmp_path / "m.pth")


# -- bad luck -------------------------------------------------------------------------------------------------------

SINKS = [("hf", "out"), ("hf", "out.safetensors"), ("dcp", "out"), ("pth", "out.pth")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source")


@contextlib.contextmanager
def as_a_user() -> Iterator[None]:
    """Root may do everything: for a moment be nobody."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permission_denied_is_said() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = write_hf(folder / "source")
        read_all(source)  # nobody may not import from root's folders
        (folder / "locked").mkdir(mode=0o555)
        plan = plan_of(source, "hf")
        with as_a_user():
            error = refused(lambda: convert(plan, str(folder / "locked" / "out"), "hf"), None, folder / "locked")
            assert "permission denied" in error.what
        (source / "model.safetensors").chmod(0)
        with as_a_user():
            assert "permission denied" in refused(lambda: read(source), None, source / "model.safetensors").what
        source.chmod(0)
        with as_a_user():
            assert "permission denied" in refused(lambda: read(source), None, source).what
        source.chmod(0o755)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_sink_folder_that_cannot_be_written_to_is_said(
    number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(source, "hf")

    def no(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", no)
    error = refused(lambda: convert(plan, str(tmp_path / "deep" / "out"), "hf"), None, tmp_path / "deep")
    assert "permission denied" in error.what or "read-only" in error.what
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to, name", SINKS)
def test_a_full_disk_leaves_nothing_and_keeps_the_old_sink(
    to: str, name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "sinks" / name, to)
    before, plan = tree(tmp_path), plan_of(source, to)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for out in (tmp_path / "sinks" / name, tmp_path / f"fresh_{name}"):
        error = refused(lambda out=out: convert(plan, str(out), to, overwrite=True), None, tmp_path)
        assert "disk is full" in error.what
    monkeypatch.undo()
    assert tree(tmp_path) == before


def test_a_file_size_limit_is_said(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1 << 20)}, tmp_path / "m.safetensors")
    plan = plan_of(tmp_path / "m.safetensors", "hf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        error = refused(lambda: convert(plan, str(tmp_path / "out"), "hf"), None, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "larger than is allowed" in error.what and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_really_full_disk_is_said(source: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    try:
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1 << 16)}, tmp_path / "m.safetensors")
        error = refused(lambda: run(tmp_path / "m.safetensors", small / "out", "hf"), None, small)
        assert "disk is full" in error.what and not list(small.iterdir())
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        assert "read-only" in refused(lambda: run(source, small / "out", "hf"), None, small).what
    finally:
        subprocess.run(["umount", small], check=True)


class Interruption:
    """Lets the n-th of the calls that write raise; counts them."""

    def __init__(self, number: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        for owner, name in ((os, "pwrite"), (os, "fsync"), (os, "link"), (Path, "rename"), (Path, "mkdir")):
            patch.setattr(owner, name, self.wrap(getattr(owner, name), number, error))
        import tensorkeep.storage.placement

        patch.setattr(
            tensorkeep.storage.placement,
            "swap_names",
            self.wrap(tensorkeep.storage.placement.swap_names, number, error),
        )

    def wrap(self, real: Callable[..., Any], number: int, error: BaseException) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == number:
                raise error
            return real(*args, **options)

        return call


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"]
)
@pytest.mark.parametrize("old", [True, False], ids=["overwrite", "fresh"])
@pytest.mark.parametrize("to, name", SINKS)
def test_whichever_step_fails_the_old_sink_stays_and_nothing_else(
    to: str, name: str, old: bool, error: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sinks" / name
    out.parent.mkdir()
    if old:
        run(source, out, "dcp" if "." not in name else to)
    before, plan = tree(tmp_path), plan_of(source, to)
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            spy = Interruption(number, error, patch)
            try:
                convert(plan, str(out), to, overwrite=old)
            except (TensorkeepError, KeyboardInterrupt) as raised:
                assert isinstance(raised, KeyboardInterrupt) == isinstance(error, KeyboardInterrupt)
            else:
                break
        assert tree(tmp_path) == before, f"step {number} of {spy.calls}"
    assert 5 < number < 99 and len(read_all(out)) == len(state())


KILLED = """
import os, signal, sys
from pathlib import Path
import tensorkeep.storage.placement as placement
from tensorkeep.conversion import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read

number, calls = int(sys.argv[1]), 0

def deadly(real):
    def call(*args):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call

os.pwrite, os.fsync, placement.swap_names = deadly(os.pwrite), deadly(os.fsync), deadly(placement.swap_names)
convert(make_plan([read(sys.argv[2])], "dcp"), sys.argv[3], "dcp", overwrite=True)
print("done", calls)
"""


def test_killed_at_any_step_the_final_name_is_whole_and_the_same_command_works_again(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sinks" / "out"
    run(source, out, "hf")
    old, before = tree(out), tree(source)

    def child(number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", KILLED, str(number), source, out], capture_output=True, text=True)

    done = child(0)
    assert done.stdout.startswith("done"), done.stderr
    steps = int(done.stdout.split()[1])
    run(source, out, "hf", overwrite=True)
    for number in sorted({1, 4, steps // 2, steps - 1, steps}):
        assert child(number).returncode == -signal.SIGKILL
        assert tree(source) == before
        left = [p.name for p in out.parent.iterdir() if p != out]
        assert left and all(name.endswith(TEMPORARY) for name in left)
        assert tree(out) == old or len(read_all(out)) == len(state())
    assert child(0).stdout.startswith("done") and read(out).format == "dcp"
    assert all(torch.equal(t, state()[n]) for n, t in contents(out).items())


def test_the_sink_is_never_the_source_nor_inside_it_nor_around_it(source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    file = source / "model.safetensors"
    (tmp_path / "link").symlink_to("source")
    for given, out in (
        (source, source),
        (source, tmp_path / "link"),
        (source, source / "." / ""),
        (file, file),
        (source, source / "inner"),
        (source, source / "inner.pth"),
        (source, source / "a" / ".." / "b"),
        (source, tmp_path),
        (file, source),
        (file, tmp_path),
    ):
        error = refused(
            lambda g=given, o=out: run(g, o, "hf" if "." not in str(o.name) else "pth", overwrite=True), None
        )
        assert "source" in error.what or "symbolic link" in error.what
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before
    run(file, source / "m.pth", "pth")  # beside a source that is a lone file there is no harm


def test_a_source_that_changes_while_it_is_read_gives_no_sink(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, "dcp")
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    error = refused(lambda: convert(plan, str(tmp_path / "out"), "dcp"), None, source)
    assert "changed while it was read" in error.what and not (tmp_path / "out").exists()
    path.write_bytes(data[:-4])
    refused(lambda: convert(plan, str(tmp_path / "out"), "dcp"), "F02", source)


def test_a_disk_that_lies_is_found_out_by_reading_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, real = plan_of(source, "hf"), os.pwritev

    def flip(handle: int, data: Any, at: int) -> int:
        made = [bytearray(piece) for piece in data]
        made[-1][-1] ^= 1  # headers come before the data
        return real(handle, made, at)

    monkeypatch.setattr(os, "pwritev", flip)
    refused(lambda: convert(plan, str(tmp_path / "out"), "hf"), "F03")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_command_line_says_one_line_a_hint_and_exits_with_2(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(HEADERS["truncated"][0])
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Evil(tmp_path / "made"), 2))
    for words in (
        ["inspect", str(tmp_path / "bad.safetensors")],
        ["inspect", str(tmp_path / "bad.pth")],
        ["convert", str(source), str(source), "--to", "hf"],
        ["convert", str(tmp_path / "bad.pth"), str(tmp_path / "o"), "--to", "hf"],
    ):
        assert main(words) == 2
        out = capfd.readouterr()
        lines = [line for line in out.err.splitlines() if line.strip()]
        assert out.out == "" and any("hint:" in line for line in lines) and "Traceback" not in out.err
    assert not (tmp_path / "made").exists() and not (tmp_path / "o").exists()


def test_legacy_files_that_lie_about_their_storages_are_named(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "m.pth", legacy=True)
    data = path.read_bytes()
    at = data.rfind(struct.pack("<q", 24))  # the number of elements before a storage's bytes
    for count in (-1, 1 << 40, 25 << 30):
        path.write_bytes(data[:at] + struct.pack("<q", count) + data[at + 8 :])
        refused(lambda: read_all(path), "F02", path)
    path.write_bytes(data[:-1])
    refused(lambda: read_all(path), "F02", path)


# -- what a file says of itself ----------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_tensors_name_does_not_rename_it(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3), "other": torch.zeros(2)}, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    data[data.find(b"weight")] ^= 2
    (tmp_path / "x.pth").write_bytes(data)
    assert "CRC-32" in refused(lambda: read(tmp_path / "x.pth"), "F03", tmp_path / "x.pth").what


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_a_tensor_saved_lazily_conjugate_or_negative_is_refused(bit: str, tmp_path: Path) -> None:
    plain = torch.tensor([1 + 2j, 3 - 4j])
    lazy = plain.conj() if bit == "conj" else plain.conj().imag
    assert lazy.is_conj() or lazy.is_neg()
    torch.save({"a": lazy}, tmp_path / "x.pth")
    with pytest.raises(TensorkeepError) as error:
        read(tmp_path / "x.pth")
    assert bit in error.value.what and "resolve_conj" in str(error.value.hint)
    torch.save({"a": lazy.resolve_conj().resolve_neg()}, tmp_path / "y.pth")
    assert torch.equal(read(tmp_path / "y.pth").tensor("a"), lazy)


def test_a_name_that_json_gives_twice_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tensorkeep.storage.certificate import parse_json
    from tensorkeep.storage.documents import read_json

    for text in ('{"a": 1, "a": 2}', '{"b": [{"a": 1, "a": 1}]}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(TensorkeepError, match="twice"):
            parse_json(text.encode(), "x")
        with pytest.raises(TensorkeepError, match="twice"):
            read_json(tmp_path / "x.json")
    save_file({"a": torch.ones(2)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "m-2.safetensors")
    index = '{"weight_map": {"a": "m-2.safetensors", "a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(TensorkeepError, match="twice"):
        read(tmp_path)


def test_which_of_two_models_in_a_folder_is_read_and_who_reads_another_is_said(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, file in (("a", "m-1.safetensors"), ("b", "m-2.safetensors"), ("a", "model.safetensors")):
        save_file({name: torch.ones(2)}, tmp_path / file)
    index = '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    view = read(tmp_path)
    (note,) = view.notes
    assert set(view) == {"a", "b"} and note.code == "F07" and note.names == ("model.safetensors",)
    assert "transformers takes model.safetensors" in note.message and "torchtitan" in note.message
