"""Remote sources and sinks: `memory://` in this process, `s3://` against moto's server on loopback."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from tensorkeep.conversion._remote import write_files
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage.files import TEMPORARY
from tensorkeep.storage.layout import FileLayout, Fixed
from tensorkeep.storage.remote import RemoteFolder, open_remote
from tests.samples import contents, everything, plan_of, read_all, run, state, write_hf

pytest_plugins = ("tests.object_store",)
SINKS = [("hf", "out"), ("hf", "out.safetensors"), ("dcp", "out"), ("pth", "out"), ("pth", "out.pth")]


@pytest.fixture(params=["memory", "s3"])
def base(request: pytest.FixtureRequest) -> str:
    root = "memory://checkpoints" if request.param == "memory" else request.getfixturevalue("bucket")
    return f"{root}/{secrets.token_hex(4)}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source")


def files(url: str) -> dict[str, bytes]:
    system, path = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return {p.removeprefix(path).lstrip("/"): system.cat_file(p) for p in system.find(path)}


@pytest.mark.parametrize("to, name", SINKS)
def test_a_remote_sink_and_source_keep_every_bit(base: str, source: Path, tmp_path: Path, to: str, name: str) -> None:
    result = run(source, f"{base}/{name}", to)
    back = run(f"{base}/{name}", tmp_path / "back", "hf")
    assert back.digests == result.digests
    assert all(torch.equal(tensor, state()[n]) for n, tensor in contents(tmp_path / "back").items())


def test_every_format_is_read_from_a_store_as_from_the_disk(base: str, tmp_path: Path) -> None:
    for kind, path in everything(tmp_path).items():
        system, remote = fsspec.core.url_to_fs(f"{base}/{kind}")
        system.makedirs(remote, exist_ok=True)
        for file in [path] if path.is_file() else path.iterdir():
            system.pipe_file(f"{remote}/{file.name}", file.read_bytes())
        url = f"{base}/{kind}/{path.name}" if path.is_file() else f"{base}/{kind}"
        view, local = read_all(url), read_all(path)
        assert {n: view.digest(n) for n in view} == {n: local.digest(n) for n in local}, kind


@pytest.mark.parametrize("to, name", SINKS)
def test_a_remote_sink_holds_the_same_bytes_as_a_local_one(
    base: str, source: Path, tmp_path: Path, to: str, name: str
) -> None:
    run(source, f"{base}/{name}", to)
    run(source, tmp_path / "local" / name, to)
    there = files(f"{base}/{name}") if "." not in name else {name: files(f"{base}/{name}")[""]}
    here = [p for p in (tmp_path / "local").rglob("*") if p.is_file() and (p.name == name or "." not in name)]
    assert there == {p.name: p.read_bytes() for p in here}


def test_an_existing_remote_sink_is_refused_and_replaced_only_on_request(base: str, source: Path) -> None:
    run(source, f"{base}/out", "dcp")
    before = files(f"{base}/out")
    with pytest.raises(TensorkeepError, match="exists already") as error:
        run(source, f"{base}/out", "hf")
    assert error.value.hint and error.value.exit_code == 2
    assert files(f"{base}/out") == before
    run(source, f"{base}/out", "hf", overwrite=True)
    assert not any(name.endswith((".distcp", ".metadata")) for name in files(f"{base}/out"))
    assert len(read_all(f"{base}/out")) == len(state())


def test_the_certificate_comes_last_and_the_metadata_before_it(
    base: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, _ = fsspec.core.url_to_fs(base)
    placed: list[str] = []
    copy = system.cp_file

    def spy(one: str, two: str, **options: Any) -> Any:
        placed.append(two.rpartition("/")[2])
        return copy(one, two, **options)

    put = system.pipe_file

    def put_spy(path: str, *arguments: Any, **options: Any) -> Any:
        placed.append(path.rpartition("/")[2])
        return put(path, *arguments, **options)

    monkeypatch.setattr(
        system, "cp_file" if base.startswith("memory") else "pipe_file", spy if base.startswith("memory") else put_spy
    )
    run(source, f"{base}/out", "dcp")
    assert placed[-2:] == [".metadata", "tensorkeep.json"]
    run(source, f"{base}/sharded", "hf", shard_size=100)
    assert placed[-2:] == ["model.safetensors.index.json", "tensorkeep.json"]


def test_nothing_stays_where_writing_fails(base: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TensorkeepError("read back, differs", code="F03")

    for module in ("_remote", "_multipart"):
        monkeypatch.setattr(f"tensorkeep.conversion.{module}.prove", fail)
    with pytest.raises(TensorkeepError, match="differs"):
        run(source, f"{base}/deep/out", "hf")
    assert files(base) == {}


@pytest.mark.parametrize("number", range(3))
def test_a_copy_that_fails_leaves_no_sink(source: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    base = f"memory://checkpoints/{secrets.token_hex(4)}"
    system, _ = fsspec.core.url_to_fs(base)
    copy, calls = system.cp_file, [0]

    def broken(one: str, two: str, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > number:
            raise OSError("the store is gone")
        return copy(one, two, **options)

    monkeypatch.setattr(system, "cp_file", broken)
    with pytest.raises(TensorkeepError, match="the store is gone"):
        run(source, f"{base}/out", "dcp")
    assert files(base) == {}


def test_an_overwrite_that_fails_keeps_the_proven_copy_and_names_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"memory://checkpoints/{secrets.token_hex(4)}"
    run(source, f"{base}/out", "dcp")
    system, _ = fsspec.core.url_to_fs(base)

    def broken(*_: object, **__: object) -> None:
        raise OSError("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(system, "cp_file", broken)
        with pytest.raises(TensorkeepError, match="the store is gone") as error:
            run(source, f"{base}/out", "dcp", overwrite=True)
    assert error.value.hint is not None
    (stage,) = [word.rstrip(":") for word in error.value.hint.split() if TEMPORARY in word]
    assert len(read_all(stage)) == len(state())
    run(source, f"{base}/out", "dcp", overwrite=True)
    assert len(read_all(f"{base}/out")) == len(state())


def test_the_sink_may_not_be_the_source_nor_lie_inside_it(base: str, source: Path) -> None:
    run(source, f"{base}/out", "dcp")
    for sink in ("out", "out/inner", "out/"):
        with pytest.raises(TensorkeepError, match="source"):
            run(f"{base}/out", f"{base}/{sink}", "hf", overwrite=True)
    with pytest.raises(TensorkeepError, match="inside the sink"):
        run(f"{base}/out", base, "hf", overwrite=True)


def test_a_source_that_changes_while_it_is_read_is_an_error(base: str, source: Path) -> None:
    run(source, f"{base}/a", "hf")
    plan = plan_of(f"{base}/a", "dcp")
    system, path = fsspec.core.url_to_fs(f"{base}/a/model.safetensors")
    system.pipe_file(path, system.cat_file(path) + b"more")
    with pytest.raises(TensorkeepError, match="changed while it was read"):
        from tensorkeep.conversion.execution import convert

        convert(plan, f"{base}/b", "dcp")
    assert not any(name.startswith("b") for name in files(base))


def test_what_is_absent_or_truncated_is_named(base: str, source: Path) -> None:
    with pytest.raises(TensorkeepError) as error:
        read(f"{base}/nothing")
    assert error.value.code == "F05" and "nothing" in error.value.line
    run(source, f"{base}/a", "hf")
    system, path = fsspec.core.url_to_fs(f"{base}/a/model.safetensors")
    system.pipe_file(path, system.cat_file(path)[:-3])
    with pytest.raises(TensorkeepError) as error:
        read(f"{base}/a")
    assert error.value.code == "F02" and "model.safetensors" in error.value.line and error.value.hint
    with pytest.raises(TensorkeepError, match="truncated"):
        open_remote(f"{base}/a")[0].read("config.json", 0, 10_000)


def test_a_large_file_is_sent_in_parts_of_bounded_size(bucket: str, source: Path) -> None:
    segments = [Fixed(at, bytes([at % 251]) * (1 << 20)) for at in range(0, 40 << 20, 1 << 20)]
    layout = FileLayout("large.bin", segments)
    write_files(fsspec.filesystem("s3"), "checkpoints/large", [layout], plan_of(source, "hf"), lambda *_: None)
    folder, name = open_remote(f"{bucket}/large/large.bin")
    assert name == "large.bin" and folder.size(name) == 40 << 20
    assert all(folder.read(name, s.start, 1 << 20) == s.data for s in segments[::7])


def test_a_wrong_protocol_bucket_or_endpoint_is_one_clear_error(bucket: str, source: Path) -> None:
    for url in ("nosuch://x/y", "s3://absent-bucket/x"):
        with pytest.raises(TensorkeepError) as error:
            read(url)
        assert error.value.hint and url in error.value.line
    with pytest.raises(TensorkeepError, match="no such bucket"):
        run(source, "s3://absent-bucket/x", "hf")
    with pytest.raises(TensorkeepError, match="not a place"):
        run(source, "s3://checkpoints", "hf")


def test_without_fsspec_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(TensorkeepError) as error:
        read("s3://bucket/x")
    assert error.value.hint == "pip install 'tensorkeep[remote]'"


def test_a_file_url_is_a_local_path(source: Path, tmp_path: Path) -> None:
    run(f"file://{source}", f"file://{tmp_path}/out", "dcp")
    assert json.loads((tmp_path / "out" / "tensorkeep.json").read_bytes())["format"] == "dcp"
    assert not isinstance(read(f"file://{tmp_path}/out").folder, RemoteFolder)
