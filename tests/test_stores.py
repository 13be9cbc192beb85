"""S3: uploads that are killed and gone on with, what a store refuses or loses, reading ahead, merges into a store."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tensorkeep.adapters.merging import merge
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.cli import main
from tensorkeep.conversion.execution import convert
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage import _ahead
from tensorkeep.storage._ahead import Ahead
from tensorkeep.storage.multipart import part_size
from tensorkeep.storage.remote import open_remote
from tensorkeep.storage.s3 import Unfinished, parts, unfinished
from tests.helpers import LLAMA, model_tensors
from tests.helpers import write_hf as write_model
from tests.object_store import calls_of, small_parts
from tests.samples import plan_of, run
from tests.test_merging import Q, pair, write_adapter

pytest_plugins = ("tests.object_store",)  # the bucket
PART = 64 << 10
KILLED = """
import os, signal, sys
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read
from tensorkeep.storage import multipart
multipart.PART = int(sys.argv[3])
def progress(what, done, total):
    if what == "write" and done > 0.7 * total:
        os.kill(os.getpid(), signal.SIGKILL)
convert(make_plan([read(sys.argv[1])], "hf"), sys.argv[2], "hf", 400_000, progress=progress)
"""


@pytest.fixture
def there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    small_parts(monkeypatch, PART)
    return f"{bucket}/{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    made = torch.Generator().manual_seed(0)
    save_file({f"w{i}": torch.randn(250, 100, generator=made) for i in range(9)}, folder / "model.safetensors")
    return folder


def store() -> Any:
    return fsspec.filesystem("s3")


def left(url: str) -> list[Unfinished]:
    return unfinished(store(), url.removeprefix("s3://"))


def objects(url: str) -> list[str]:
    store().invalidate_cache()
    return sorted(p.rpartition("/")[2] for p in store().find(url.removeprefix("s3://")))


def test_a_killed_upload_is_gone_on_with_and_nothing_of_it_is_sent_twice(
    there: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), f"{there}/out", str(PART)], check=False)
    assert done.returncode == -9 and objects(there) == []
    sent = {(u.path, n): p for u in left(f"{there}/out") for n, p in parts(store(), u).items()}
    assert sum(p.size for p in sent.values()) > 200_000
    assert main(["inspect", f"{there}/out"]) == 2
    said = capsys.readouterr().err
    assert "F05" in said and "unfinished upload" in said and "abort-multipart-upload" in said
    again: list[tuple[str, int]] = []

    def before(method: str, asked: dict[str, Any]) -> None:
        if method == "upload_part":
            again.append((f"{asked['Bucket']}/{asked['Key']}", asked["PartNumber"]))

    calls_of(store(), monkeypatch, before)
    command = ["convert", str(source), f"{there}/out", "--to", "hf", "--shard-size", "400KB"]
    assert main(command) == 0
    assert "were not sent again" in capsys.readouterr().err
    assert again and not set(again) & set(sent) and left(there) == []
    local = run(source, tmp_path / "local", "hf", shard_size=400_000)
    view = read(f"{there}/out")
    assert {n: view.digest(n) for n in view} == local.digests
    assert objects(f"{there}/out") == sorted(p.name for p in (tmp_path / "local").iterdir())


def test_parts_of_another_source_are_sent_again(there: str, source: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(source), f"{there}/out", str(PART)], check=False)
    with torch.no_grad():
        tensors = {n: torch.from_numpy(read(source).array(n) + 1) for n in read(source)}
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    result = run(tmp_path / "other", f"{there}/out", "hf", shard_size=400_000)
    view = read(f"{there}/out")
    assert result.resumed == 0 and left(there) == []
    assert all(np.array_equal(view.array(n), t.numpy()) for n, t in tensors.items())


def test_a_store_that_fails_keeps_what_it_has_and_the_error_says_so(
    there: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(method: str, asked: dict[str, Any]) -> None:
        if method == "upload_part" and asked["PartNumber"] > 6:
            raise OSError("the store is gone")

    monkeypatch.setattr("tensorkeep.conversion._multipart.LEAST", 1)
    with monkeypatch.context() as patch:
        calls_of(store(), patch, fail)
        with pytest.raises(TensorkeepError, match="the store is gone") as error:
            run(source, f"{there}/out.safetensors", "hf")
    (begun,) = left(there)
    assert begun.abort_command in str(error.value.hint) and "goes on from them" in str(error.value.hint)
    assert run(source, f"{there}/out.safetensors", "hf").resumed == 6 * PART
    assert left(there) == [] and objects(there) == ["out.safetensors", "out.safetensors.tensorkeep.json"]


def test_an_interrupted_upload_says_what_stays(there: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    monkeypatch.setattr("tensorkeep.conversion._multipart.LEAST", 1)
    with pytest.raises(KeyboardInterrupt) as ended:
        convert(plan_of(source, "hf"), f"{there}/out", "hf", progress=stop)
    assert "abort-multipart-upload" in ended.value.left and len(left(there)) == 1  # type: ignore[attr-defined]


def test_a_failure_of_the_data_leaves_no_part(there: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TensorkeepError("a source changed", code="F03")

    monkeypatch.setattr("tensorkeep.conversion.execution.check_sources", fail)
    with pytest.raises(TensorkeepError, match="a source changed"):
        run(source, f"{there}/out", "hf")
    assert left(there) == [] and objects(there) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_command_killed_while_objects_appear_is_gone_on_with(
    there: str, source: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        run(source, f"{there}/out", "dcp")
    count = [0]

    def fail(method: str, asked: dict[str, Any]) -> None:
        count[0] += method == "complete_multipart_upload"
        if method == "complete_multipart_upload" and count[0] > 1:
            raise OSError("the store is gone")

    monkeypatch.setattr("tensorkeep.conversion._multipart.LEAST", 1)
    with monkeypatch.context() as patch:
        calls_of(store(), patch, fail)
        with pytest.raises(TensorkeepError, match="the store is gone"):
            run(source, f"{there}/out", "hf", shard_size=400_000, overwrite=overwrite)
    assert not any(n.endswith((".index.json", ".metadata")) or n == "tensorkeep.json" for n in objects(f"{there}/out"))
    result = run(source, f"{there}/out", "hf", shard_size=400_000, overwrite=overwrite)
    view = read(f"{there}/out")
    assert result.resumed and {n: view.digest(n) for n in view} == result.digests and left(there) == []
    assert not any(name.startswith(".") or name == "placing.json" for name in objects(there))


def test_an_answer_that_is_lost_after_the_object_appeared_is_no_failure(
    there: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, call = store(), store().call_s3

    def losing(method: str, **asked: Any) -> Any:
        answer = call(method, **asked)
        if method == "complete_multipart_upload":
            raise OSError("no answer in time")
        return answer

    monkeypatch.setattr(system, "call_s3", losing, raising=False)
    result = run(source, f"{there}/out", "hf")
    view = read(f"{there}/out")
    assert {n: view.digest(n) for n in view} == result.digests and left(there) == []


def test_beside_another_programs_object_nothing_is_gone_on_with(
    there: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(method: str, asked: dict[str, Any]) -> None:
        if method == "complete_multipart_upload":
            raise OSError("the store is gone")

    with monkeypatch.context() as patch:
        calls_of(store(), patch, fail)
        with pytest.raises(TensorkeepError, match="the store is gone"):
            run(source, f"{there}/out", "hf", shard_size=400_000)
    store().pipe_file(f"{there}/out/notes.txt".removeprefix("s3://"), b"mine")
    with pytest.raises(TensorkeepError, match="exists already"):
        run(source, f"{there}/out", "hf", shard_size=400_000)
    with pytest.raises(TensorkeepError, match="notes"):
        run(source, f"{there}/out", "hf", shard_size=400_000, overwrite=True)


def test_uploads_of_others_to_the_same_place_are_given_up_unless_they_move(
    there: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = there.removeprefix("s3://checkpoints/")

    def begin(key: str) -> dict[str, str]:
        made = store().call_s3("create_multipart_upload", Bucket="checkpoints", Key=key)
        return {"Bucket": "checkpoints", "Key": key, "UploadId": made["UploadId"]}

    dead, living = begin(f"{name}/out/model-00007-of-00009.safetensors"), begin(f"{name}/out/other")
    elsewhere = begin(f"{name}/outer")
    store().call_s3("upload_part", PartNumber=1, Body=b"old", **dead)

    system, call = store(), store().call_s3

    def spy(method: str, **asked: Any) -> Any:
        if method == "complete_multipart_upload":
            call("upload_part", PartNumber=1, Body=b"new", **living)
        return call(method, **asked)

    monkeypatch.setattr(system, "call_s3", spy, raising=False)
    result = run(source, f"{there}/out", "hf")
    assert result.cleared == ["an unfinished upload of model-00007-of-00009.safetensors (1 parts, 3 bytes)"]
    assert {u.upload for u in left(f"{there}/out")} == {living["UploadId"]}
    assert {u.upload for u in left(f"{there}/outer")} == {elsewhere["UploadId"]}


def test_where_the_store_gives_no_md5_the_objects_are_read_back(
    there: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorkeep.storage.multipart.Upload._confirmed", lambda *_: False)
    before = run(source, f"{there}/out", "hf")
    asked: list[str] = []
    fetch = _ahead.Ahead.read_into

    def spy(self: Any, name: str, start: int, buffer: memoryview, size: int) -> None:
        asked.append(name)
        fetch(self, name, start, buffer, size)
        if start > PART:
            buffer[0] ^= 1

    monkeypatch.setattr(_ahead.Ahead, "read_into", spy)
    with pytest.raises(TensorkeepError, match="not what the plan made") as error:
        run(source, f"{there}/flipped", "hf")
    assert error.value.code == "F03" and "model.safetensors" in asked and before.digests
    assert objects(f"{there}/flipped") == [] and left(there) == []


def test_an_object_written_again_while_it_is_read_is_one_clear_error(there: str, source: Path) -> None:
    run(source, f"{there}/a", "hf")
    view = read(f"{there}/a")
    path = f"{there}/a/model.safetensors".removeprefix("s3://")
    data = bytearray(store().cat_file(path))
    data[-1] ^= 1
    store().pipe_file(path, bytes(data))
    with pytest.raises(TensorkeepError, match="changed while it was read") as error:
        view.digest("w8")
    assert error.value.hint and "model.safetensors" in error.value.line


@pytest.mark.parametrize("breaks", [2, 99])
def test_a_connection_that_drops_midway_is_taken_up_again(
    there: str, source: Path, monkeypatch: pytest.MonkeyPatch, breaks: int
) -> None:
    from aiohttp.client_exceptions import ClientPayloadError

    run(source, f"{there}/a", "hf")
    wanted = read(source).digest("w3")
    view, system = read(f"{there}/a"), store()
    call, asked = type(system)._call_s3, list[str]()

    class Broken:
        def __init__(self, body: Any) -> None:
            self.body, self.given = body, False

        async def read(self, size: int) -> bytes:
            if self.given:
                raise ClientPayloadError("the connection is closed")
            self.given = True
            return bytes(await self.body.read(1000))

        def close(self) -> None:
            self.body.close()

    async def dropping(self: Any, method: str, **given: Any) -> Any:
        answer = await call(self, method, **given)
        if method == "get_object":
            asked.append(given["Range"])
            if len(asked) <= breaks:
                answer["Body"] = Broken(answer["Body"])
        return answer

    async def at_once(_: float) -> None:
        return None

    monkeypatch.setattr(type(system), "_call_s3", dropping)
    monkeypatch.setattr("tensorkeep.storage.s3.asyncio.sleep", at_once)
    if breaks < 5:
        assert view.digest("w3") == wanted
        firsts = [int(r.removeprefix("bytes=").partition("-")[0]) for r in asked[:3]]
        assert [at - firsts[0] for at in firsts] == [0, 1000, 2000]
        return
    with pytest.raises(TensorkeepError, match="the connection is closed") as error:
        view.digest("w3")
    assert error.value.hint and "network" in error.value.hint and len(asked) == 5


def test_who_may_not_is_told_so(
    there: str, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, f"{there}/a", "hf")
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on the server asks who it is
    codes = [main(["inspect", f"{there}/a"]), main(["convert", str(source), f"{there}/b", "--to", "hf"])]
    assert codes == [2, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 2 and all("permission denied" in line or "Forbidden" in line for line in lines)


def test_the_commands_take_a_store_for_a_source(there: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, f"{there}/a", "hf")
    assert main(["inspect", f"{there}/a"]) == 0
    assert main(["verify", f"{there}/a"]) == 0
    assert main(["diff", f"{there}/a", str(source)]) == 0
    assert "9 tensors" in capsys.readouterr().out
    path = f"{there}/a/model.safetensors".removeprefix("s3://")
    data = bytearray(store().cat_file(path))
    data[-1] ^= 1
    store().pipe_file(path, bytes(data))
    assert main(["verify", f"{there}/a"]) == 1 and "w8" in capsys.readouterr().out
    assert main(["diff", f"{there}/a", str(source)]) == 1


def test_a_merge_into_and_out_of_a_store_is_the_merge_on_a_disk(there: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", model_tensors(), LLAMA)
    adapter = write_adapter(tmp_path / "adapter", pair(Q))
    store().put(str(base), f"{there}/base".removeprefix("s3://"), recursive=True)
    store().put(str(adapter), f"{there}/adapter".removeprefix("s3://"), recursive=True)

    def merged(base: str, adapter: str, out: str) -> Any:
        return merge(plan_merge(read(base), open_adapters([(read(adapter), 1.0)]), "hf"), out, "hf")

    local = merged(str(base), str(adapter), str(tmp_path / "out"))
    remote = merged(f"{there}/base", f"{there}/adapter", f"{there}/out")
    assert remote.digests == local.digests and remote.base_digest == local.base_digest
    assert objects(f"{there}/out") == sorted(p.name for p in (tmp_path / "out").iterdir())
    for path in [p for p in (tmp_path / "out").iterdir() if p.name != "tensorkeep.json"]:  # it names the base
        assert store().cat_file(f"{there}/out/{path.name}".removeprefix("s3://")) == path.read_bytes(), path.name


def test_parts_are_few_enough_and_depend_on_the_size_alone() -> None:
    for size in (1, 1 << 30, 150 << 30, 1 << 40, 5 << 40):
        assert -(-size // part_size(size)) <= 10_000 and part_size(size) % (1 << 20) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_gives_the_bytes_that_are_there_in_few_requests(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(_ahead, "PART", 8000)
    monkeypatch.setattr(_ahead, "_HELD", 48_000)
    data, asked = os.urandom(200_000), list[int]()

    def fetch(name: str, start: int, length: int) -> bytes:
        asked.append(length)
        return data[start : start + length]

    ahead = Ahead(fetch)

    def work(mine: int) -> None:
        for at in range(mine * 1000, len(data), threads * 1000):
            piece = bytearray(1000)
            ahead.read_into("x", at, memoryview(piece), len(data))
            assert piece == data[at : at + 1000]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert threads > 1 or (len(asked) < 35 and sum(asked) == len(data))
    assert max(asked) <= 8000 and ahead._held <= 48_000
    draw, before = np.random.default_rng(0), sum(asked)
    for _ in range(300):
        at, length = int(draw.integers(0, 190_000)), int(draw.integers(1, 9000))
        piece = bytearray(length)
        ahead.read_into("y", at, memoryview(piece), len(data))
        assert piece == data[at : at + length]
    assert sum(asked) - before < 4 * 300 * 4500


def test_what_is_announced_is_fetched_and_nothing_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ahead, "PART", 8000)
    data, asked = os.urandom(100_000), list[tuple[int, int]]()

    def fetch(name: str, start: int, length: int) -> bytes:
        asked.append((start, length))
        return data[start : start + length]

    ahead = Ahead(fetch)
    for first in range(0, 100_000, 25_000):  # every rank's share of a tensor
        ahead.expect("x", first, 10_000)
        for at in range(first, first + 10_000, 1000):
            ahead.read_into("x", at, memoryview(bytearray(1000)), len(data))
    assert sorted(asked) == [p for f in range(0, 100_000, 25_000) for p in ((f, 8000), (f + 8000, 2000))]


def test_a_failed_read_ahead_is_the_error_of_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ahead, "PART", 8000)
    broken = [True]

    def fetch(name: str, start: int, length: int) -> bytes:
        if start >= 4000 and broken[0]:
            raise TensorkeepError("gone")
        return bytes(length)

    ahead = Ahead(fetch)
    for at in (0, 1000, 2000, 3000):
        ahead.read_into("x", at, memoryview(bytearray(1000)), 50_000)
    with pytest.raises(TensorkeepError, match="gone"):
        for at in range(4000, 20_000, 1000):
            ahead.read_into("x", at, memoryview(bytearray(1000)), 50_000)
    broken[0] = False
    for at in range(4000, 50_000, 1000):
        ahead.read_into("x", at, memoryview(bytearray(1000)), 50_000)


def test_a_large_read_of_a_store_comes_in_several_requests(there: str) -> None:
    data = os.urandom(3 << 20)
    store().pipe_file(f"{there}/x.bin".removeprefix("s3://"), data)
    folder, name = open_remote(f"{there}/x.bin")
    assert name == "x.bin" and folder.read(name) == data and folder.read(name, 5, 70_000) == data[5:70_005]
