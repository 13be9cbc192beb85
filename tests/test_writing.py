"""Files are written side by side, large tensors by several threads: the same bytes and checksums as by one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tensorkeep import TensorkeepError, read
from tensorkeep.conversion import writing
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.safetensors import layout
from tensorkeep.storage.layout import Fixed, SinkTensor

SHAPES = {"model.embed_tokens.weight": (1200, 64), "model.norm.weight": (64,)} | {
    f"model.layers.{n}.mlp.up_proj.weight": (300 + n, 64) for n in range(6)
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    for file in layout([SinkTensor(n, "F32", s) for n, s in SHAPES.items()], shard_size=150_000):
        parts = [
            s.data if isinstance(s, Fixed) else random.standard_normal(s.nbytes // 4, np.float32) for s in file.segments
        ]  # type: ignore[union-attr]
        (folder / file.name).write_bytes(b"".join(bytes(p) for p in parts))
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("to", ["hf", "dcp"])
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_any_number_of_threads_writes_the_same_files(
    to: str, dtype: str | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for threads, cut in ((1, 1 << 30), (7, 100_000)):
        monkeypatch.setattr(writing, "cores", lambda threads=threads: threads)
        monkeypatch.setattr(writing, "_CUT", cut)
        monkeypatch.setattr(writing, "STREAM_BYTES", 20_000)
        out = tmp_path / str(threads)
        result = convert(make_plan([read(source)], to, dtype=dtype), str(out), to, shard_size=100_000)
        made.append((everything(out), result.digests, {n: vars(c) for n, c in result.casts.items()}))
    assert made[0] == made[1]
    assert len(made[0][0]) > 4


def test_what_the_disk_gives_back_is_compared_file_by_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def rotten(handle: int) -> None:
        real(handle)
        if os.fstat(handle).st_size > 100_000:
            at = os.fstat(handle).st_size // 2
            os.pwrite(handle, bytes([os.pread(handle, 1, at)[0] ^ 4]), at)

    monkeypatch.setattr(writing.os, "fsync", rotten)
    with pytest.raises(TensorkeepError) as caught:
        convert(make_plan([read(source)], "hf"), str(tmp_path / "out"), "hf")
    assert caught.value.code == "F03"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_one_thread_ends_all_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def full(handle: int, data: bytes, at: int) -> int:
        calls.append(at)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        return real(handle, data, at)

    monkeypatch.setattr(writing, "cores", lambda: 4)
    monkeypatch.setattr(writing, "_CUT", 100_000)
    monkeypatch.setattr(writing, "STREAM_BYTES", 20_000)
    monkeypatch.setattr(writing.os, "pwrite", full)
    with pytest.raises(TensorkeepError, match="the disk is full"):
        convert(make_plan([read(source)], "hf"), str(tmp_path / "out"), "hf", shard_size=100_000)
    assert list(tmp_path.iterdir()) == []
    held = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert [name for name in held if str(tmp_path) in name] == []


def test_rows_that_are_permuted_are_cut_between_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for threads, cut in ((1, 1 << 30), (5, 1000)):
        monkeypatch.setattr(writing, "cores", lambda threads=threads: threads)
        monkeypatch.setattr(writing, "_CUT", cut)
        monkeypatch.setattr(writing, "STREAM_BYTES", 700)
        out = tmp_path / str(threads)
        convert(make_plan([read("examples/tiny-llama")], "dcp", naming="torchtitan", dtype="F16"), str(out), "dcp")
        made.append(everything(out))
    assert made[0] == made[1]
