"""Durable files: every byte written is the byte asked for, digested; every byte read is compared."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.storage import durable
from tensorkeep.storage.layout import FileLayout, Fixed, Slot

SIZES = st.lists(st.integers(0, 40_000), max_size=8)


def laid_out(head: bytes, sizes: list[int]) -> tuple[FileLayout, dict[str, bytes]]:
    segments: list[Fixed | Slot] = [Fixed(0, head)]
    data, at = {}, len(head)
    for index, size in enumerate(sizes):
        segments.append(Slot(at, size, f"t{index}"))
        data[f"t{index}"] = (bytes([index + 1]) * 7 + b"-") * (size // 8) + b"x" * (size % 8)
        at += size
    return FileLayout("file", segments), data


@pytest.fixture(params=["direct", "page cache"], autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "CHUNK", 16 << 10)
    monkeypatch.setattr(durable, "CACHED", 4 << 10)
    monkeypatch.setattr(durable, "SMALL", 0 if request.param == "direct" else 1 << 40)


@pytest.mark.parametrize("whole", [False, True], ids=["from tensors", "from an image"])
def test_a_file_is_written_and_read_back_byte_for_byte_with_its_digests(tmp_path: Path, whole: bool) -> None:
    number = iter(range(10_000))

    @settings(max_examples=40, deadline=None)
    @given(head=st.binary(max_size=9000), sizes=SIZES)
    def law(head: bytes, sizes: list[int]) -> None:
        path = tmp_path / f"{next(number)}"
        layout, data = laid_out(head, sizes)
        content = head + b"".join(data.values())
        image = durable.allocate(layout.size)
        image[: len(content)] = content
        source = image[: durable.padded(layout.size)] if whole else lambda name: memoryview(data[name])
        done = durable.write_file(path, layout, source)
        assert path.read_bytes() == content and done.size == len(content)
        assert done.tensors == {n: xxhash.xxh3_128(d).hexdigest() for n, d in data.items()}
        chunks = [content[at : at + durable.CHUNK] for at in range(0, len(content), durable.CHUNK)]
        assert done.chunks == [xxhash.xxh3_128(c).hexdigest() for c in chunks]
        room = durable.allocate(len(content))
        assert durable.read_file(path, len(content), done.chunks, room) == []
        assert bytes(room[: len(content)]) == content
        if content:
            harmed = bytearray(content)
            harmed[len(content) // 2] ^= 1
            path.write_bytes(harmed)
            assert durable.read_file(path, len(content), done.chunks) == [len(content) // 2 // durable.CHUNK]
            path.write_bytes(content[:-1])
            assert durable.read_file(path, len(content), done.chunks)[-1] == len(chunks) - 1

    law()


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        durable.write_small(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_an_error_in_one_thread_stops_them_all_and_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, data = laid_out(b"head", [40_000] * 20)
    real, calls, lock = os.pwrite, [0], threading.Lock()

    def fails(*given: object) -> int:
        with lock:
            calls[0] += 1
            if calls[0] == 5:
                raise OSError(errno.EIO, "no")
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", fails)
    before = threading.active_count()
    with pytest.raises(OSError, match="no"):
        durable.write_file(tmp_path / "file", layout, lambda name: memoryview(data[name]))
    assert calls[0] < 15 and threading.active_count() == before


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, data = laid_out(b"head", [40_000] * 3)
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda handle, block, start: real(handle, block[: max(1, len(block) // 2)], start)
    )
    done = durable.write_file(tmp_path / "file", layout, lambda name: memoryview(data[name]))
    assert (tmp_path / "file").read_bytes() == b"head" + b"".join(data.values()) and done.size == 120_004


def test_a_file_system_without_direct_io_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuses(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuses)
    layout, data = laid_out(b"head", [40_000] * 3)
    done = durable.write_file(tmp_path / "file", layout, lambda name: memoryview(data[name]))
    assert durable.read_file(tmp_path / "file", done.size, done.chunks) == []
    assert (tmp_path / "file").read_bytes() == b"head" + b"".join(data.values())


def test_names_of_tensors_with_nan_are_told_whatever_chunk_they_lie_in(tmp_path: Path) -> None:
    import numpy as np

    layout, data = laid_out(b"h" * 64, [40_000] * 4)
    data = dict.fromkeys(data, bytes(40_000))
    array = np.zeros(10_000, np.float32)
    array[9_999] = np.nan
    data["t2"] = array.tobytes()
    done = durable.write_file(tmp_path / "file", layout, lambda n: memoryview(data[n]), dict.fromkeys(data, "F32"))
    assert done.unsound == ["t2"]
