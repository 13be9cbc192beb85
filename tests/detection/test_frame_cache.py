"""Frames that are kept are the bytes that decoding gives, whatever happens to the folder; and a run does not change."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.detection.data import frame_cache, frame_store, video
from tensorkeep.detection.data.clips import grid_of
from tensorkeep.detection.data.frame_cache import MARKER, FrameCache, Grid, cached_frames, describe, film_of, open_cache
from tensorkeep.detection.data.frame_store import Film, Head, count_slots, read_slots, write_slots
from tensorkeep.detection.data.item import Item
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.readers import WindowConfig
from tensorkeep.detection.data.video import decode
from tensorkeep.detection.data.windows import make_window, resized_frames
from tensorkeep.detection.job import build, check
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.batches import Stream, batches
from tests.detection import runs
from tests.threads import one_thread  # noqa: F401

from .films import film, picture, torn

FRAMES, SIDE = 40, 24
GRID = Grid(np.arange(0, FRAMES, 2), "every 2 of 40")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return film(tmp_path / "a.mp4", FRAMES)


@pytest.fixture
def kept(tmp_path: Path) -> FrameCache:
    return open_cache(tmp_path / "cache", 1)


class Asked:
    """Decodes, and counts the frames that it was asked for."""

    def __init__(self, path: Path, side: int = SIDE, broken: Any = "error") -> None:
        self.path, self.side, self.broken, self.frames = path, side, broken, 0

    def __call__(self, numbers: Any, odd: list[Problem], stored: set[tuple[int, int]]) -> torch.Tensor:
        self.frames += len(numbers)
        return decode(self.path, numbers, size=self.side, problems=odd, stored=stored, broken=self.broken)

    def through(self, kept: FrameCache, numbers: Any, grid: Grid = GRID) -> tuple[torch.Tensor, list[Problem], int]:
        """Frames, what is odd, and how many were decoded."""
        before, odd = self.frames, list[Problem]()
        got = cached_frames(kept, str(self.path), grid, np.asarray(numbers), self.side, self, odd)
        return got, odd, self.frames - before


def films_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.frames"))


# -- the bytes --------------------------------------------------------------------------------------------------------


def turned(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        for number in range(FRAMES):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), "rgb24")))
        out.mux(stream.encode(None))
    return path


FILMS: dict[str, Callable[[Path], Path]] = {
    "constant rate": lambda p: film(p / "a.mp4", FRAMES),
    "variable rate": lambda p: film(p / "a.mkv", FRAMES, times=np.cumsum(np.arange(FRAMES) % 5 * 30 + 10)),
    "late start": lambda p: film(p / "a.mp4", FRAMES, start=1.5, sound=1.0),
    "turned": lambda p: turned(p / "a.mp4"),
    "H.264 with B-frames": lambda p: film(p / "a.mp4", FRAMES, codec="libx264", gop=8),
}


@pytest.mark.parametrize("name", FILMS)
def test_what_is_kept_is_to_the_bit_what_decoding_gives(name: str, tmp_path: Path, kept: FrameCache) -> None:
    asked = Asked(FILMS[name](tmp_path))
    drawn = np.random.default_rng(0)
    seen: set[int] = set()
    for _ in range(12):
        first, length = int(drawn.integers(0, 20)), int(drawn.integers(1, 20))
        numbers = GRID.frames[first : first + length]
        numbers = np.concatenate([numbers, np.repeat(numbers[-1], int(drawn.integers(0, 4)))])
        got, odd, decoded = asked.through(kept, numbers)
        assert torch.equal(got, decode(asked.path, numbers, size=SIDE)) and odd == []
        assert decoded in (len(set(numbers.tolist()) - seen), len(numbers))
        assert decoded or set(numbers.tolist()) <= seen
        seen |= set(numbers.tolist())
    shuffled = drawn.permutation(np.repeat(GRID.frames, 2))
    asked.through(kept, GRID.frames)
    got, _, decoded = asked.through(kept, shuffled)
    assert decoded == 0 and torch.equal(got, decode(asked.path, shuffled, size=SIDE))
    assert kept.stopped == ""


@pytest.mark.parametrize("window", [WindowConfig(window_size=9, feature_stride=4, scale_factor=2)])
@pytest.mark.parametrize("frames", [1, 7, 39, 40, 41])
def test_every_frame_that_a_window_shows_has_a_slot(window: WindowConfig, frames: int) -> None:
    item = Item("a", "a.mp4", frames, 1.0, 1, 0, np.zeros((0, 2)), np.zeros(0, np.int64))
    steps = -(-frames // 4)
    for first in range(steps):
        shown = make_window((first, min(first + 9, steps)), frames, size=9, snippet_stride=4, scale=2).frames
        assert set(shown.tolist()) <= set(grid_of(item, window).frames.tolist())
    whole = grid_of(item, replace(window, method="resize"))
    assert set(whole.frames.tolist()) == set(resized_frames(frames, 9, 2).tolist())
    assert (np.diff(whole.frames) > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_slots_come_back_as_they_were_written_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    slots = data.draw(st.integers(1, 9))
    height, width = data.draw(st.sampled_from([(4, 4), (4, 7), (9, 4)]))
    store = Film(tmp_path_factory.mktemp("store") / "x.frames", data.draw(st.integers(0, 2**64 - 1)), slots, 4)
    head = Head((height, width), (64, 48))
    whole = np.random.default_rng(slots).integers(0, 256, (slots, 3, height, width)).astype(np.uint8)
    number = st.lists(st.integers(0, slots - 1), min_size=1, max_size=12)
    there: set[int] = set()
    for wanted in data.draw(st.lists(number, min_size=1, max_size=4)):
        places = np.array(wanted)
        write_slots(store, head, whole[places], places, lambda more: True)
        there |= set(wanted)
        asked = np.array(data.draw(number))
        found = read_slots(store, asked)
        assert count_slots(store) == (len(there), head)
        assert found is None or set(found.lacking.tolist()) == set(asked.tolist()) - there
        assert found is not None or not set(asked.tolist()) & there
        for at, slot in enumerate(asked.tolist()):
            assert slot not in there or (found is not None and np.array_equal(found.frames[at], whole[slot]))


def test_another_size_grid_or_video_has_a_file_of_its_own(path: Path, kept: FrameCache) -> None:
    Asked(path).through(kept, GRID.frames)
    for side, grid in ((SIDE, Grid(GRID.frames, "another")), (32, GRID)):
        asked = Asked(path, side)
        got, _, decoded = asked.through(kept, GRID.frames, grid)
        assert decoded == len(GRID.frames) and torch.equal(got, decode(path, GRID.frames, size=side))
    assert len(films_of(kept.folder)) == 3


def test_a_video_of_the_same_name_size_and_time_is_another(path: Path, kept: FrameCache) -> None:
    state = path.stat()
    Asked(path).through(kept, GRID.frames)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size and path.stat().st_mtime_ns == state.st_mtime_ns
    asked = Asked(path, broken="keep")
    got, _, decoded = asked.through(kept, GRID.frames)
    assert decoded == len(GRID.frames)
    assert torch.equal(got, decode(path, GRID.frames, size=SIDE, broken="keep", problems=[]))


def test_frames_of_a_video_that_is_replaced_while_it_is_read_are_not_kept(path: Path, kept: FrameCache) -> None:
    class Replaced(Asked):
        def __call__(self, *args: Any) -> torch.Tensor:
            got = super().__call__(*args)
            film(self.path, FRAMES, gop=4)
            return got

    Replaced(path).through(kept, GRID.frames)
    assert films_of(kept.folder) == []
    asked = Asked(path)
    asked.through(kept, GRID.frames[:4])
    Replaced(path).through(kept, GRID.frames[:9])
    assert [count_slots(Film(p, *film_of(kept, str(path), GRID, SIDE)[1:]))[0] for p in films_of(kept.folder)] == [0]  # type: ignore[index]
    got, _, _ = asked.through(kept, GRID.frames)
    assert torch.equal(got, decode(path, GRID.frames, size=SIDE))


# -- damage -----------------------------------------------------------------------------------------------------------


def test_damage_is_told_each_time_and_nothing_of_its_video_is_kept(tmp_path: Path, kept: FrameCache) -> None:
    path = torn(film(tmp_path / "whole.mp4", 60, b_frames=0), tmp_path / "a.mp4", 2)
    grid, asked = Grid(np.arange(0, 60, 2), "every 2 of 60"), Asked(path, broken="keep")
    windows = [grid.frames[a : a + 10] for a in (0, 2, 5, 8, 10, 14, 20, 0, 8, 10)]
    for window in [*windows, *windows]:
        expected: list[Problem] = []
        frames = decode(path, window, size=SIDE, broken="keep", problems=expected)
        got, odd, _ = asked.through(kept, window, grid)
        assert torch.equal(got, frames) and odd == expected
    assert asked.through(kept, windows[0], grid)[2] == 10 and [p.stat().st_size for p in films_of(kept.folder)] == [40]
    assert describe(kept, [(str(path), grid, SIDE)]).endswith("; 1 damaged or odd videos are decoded each time")
    assert kept.stopped == ""


@pytest.mark.parametrize("first", [slice(0, 8), slice(20, 25)])
def test_a_clip_that_cannot_be_decoded_is_told_as_without_a_cache(
    first: slice, tmp_path: Path, kept: FrameCache
) -> None:
    path = torn(film(tmp_path / "whole.mp4", 60, b_frames=0), tmp_path / "a.mp4", 2)
    grid, asked = Grid(np.arange(0, 60, 2), "every 2 of 60"), Asked(path)
    asked.through(kept, grid.frames[first], grid)
    with pytest.raises(TensorkeepError) as expected:
        decode(path, grid.frames[:25], size=SIDE)
    for _ in range(2):
        with pytest.raises(TensorkeepError) as found:
            asked.through(kept, grid.frames[:25], grid)
        assert str(found.value) == str(expected.value)
    assert [p.stat().st_size for p in films_of(kept.folder)] == [40]


def test_an_interrupted_decoding_bars_nothing(path: Path, kept: FrameCache) -> None:
    class Broken(Asked):
        def __call__(self, *args: Any) -> torch.Tensor:
            raise KeyboardInterrupt

    Asked(path).through(kept, GRID.frames[:4])
    with pytest.raises(KeyboardInterrupt):
        Broken(path).through(kept, GRID.frames)
    assert Asked(path).through(kept, GRID.frames[:4])[2] == 0


def test_pictures_of_another_size_are_told_each_time(tmp_path: Path, kept: FrameCache) -> None:
    for size in ((32, 48), (128, 96)):  # the second ones become pictures of the same size
        small = film(tmp_path / "small.ts", 20, codec="mpeg2video", rate=25, size=size)
        large = film(tmp_path / "large.ts", 20, codec="mpeg2video", rate=25, start=10.0)
        path = tmp_path / f"joined{size[0]}.ts"
        path.write_bytes(large.read_bytes() + small.read_bytes())
        frames = video.frame_table(path).pts
        grid, asked = Grid(np.arange(0, len(frames), 2), "all"), Asked(path)
        for a in (0, len(grid.frames) - 6, 4, 0, len(grid.frames) - 6, 4, 2):
            window, expected = grid.frames[a : a + 8], list[Problem]()
            right = decode(path, window, size=SIDE, problems=expected)
            got, odd, _ = asked.through(kept, window, grid)
            assert torch.equal(got, right) and odd == expected


# -- what happens to files --------------------------------------------------------------------------------------------


def flipped(place: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)

    return flip


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


HARMED: dict[str, Callable[[Path], Any]] = {
    "a slot": flipped(-5),
    "the first slot": flipped(4096),
    "a checksum": flipped(48),
    "the magic": flipped(1),
    "the width": flipped(12),
    "the number of slots": flipped(24),
    "the head's sum": flipped(36),
    "cut short": lambda p: os.truncate(p, p.stat().st_size - 1),
    "cut to nothing": lambda p: os.truncate(p, 0),
    "of a terabyte": lambda p: os.truncate(p, 1 << 40),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "gone": lambda p: p.unlink(),
    "a FIFO": fifo,
}


@pytest.mark.parametrize("name", HARMED)
def test_a_harmed_file_is_not_believed_and_made_right(name: str, path: Path, kept: FrameCache) -> None:
    asked = Asked(path)
    right, _, _ = asked.through(kept, GRID.frames)
    HARMED[name](films_of(kept.folder)[0])
    got, _, decoded = asked.through(kept, GRID.frames)
    assert torch.equal(got, right) and 0 < decoded <= len(GRID.frames)
    got, _, decoded = asked.through(kept, GRID.frames)
    assert torch.equal(got, right) and decoded == 0 and kept.stopped == ""


@pytest.mark.parametrize("harm", [link, lambda p: (p.unlink(), p.mkdir())])
def test_a_link_or_a_folder_in_a_files_place_is_left_alone(harm: Any, path: Path, kept: FrameCache) -> None:
    asked = Asked(path)
    right, _, _ = asked.through(kept, GRID.frames)
    place = films_of(kept.folder)[0]
    harm(place)
    before = sorted((p.name, p.lstat().st_mode, p.lstat().st_mtime_ns) for p in kept.folder.iterdir())
    got, _, decoded = asked.through(kept, GRID.frames)
    assert torch.equal(got, right) and decoded == len(GRID.frames) and "other frames are decoded" in kept.stopped
    assert before == sorted((p.name, p.lstat().st_mode, p.lstat().st_mtime_ns) for p in kept.folder.iterdir())


def test_files_of_two_videos_that_are_exchanged_are_not_believed(tmp_path: Path, kept: FrameCache) -> None:
    asked = [Asked(film(tmp_path / f"{n}.mp4", FRAMES, gop=4 + n)) for n in range(2)]
    right = [one.through(kept, GRID.frames)[0] for one in asked]
    one, other = films_of(kept.folder)
    one.rename(tmp_path / "x")
    other.rename(one)
    (tmp_path / "x").rename(other)
    for _ in range(2):
        assert all(torch.equal(one.through(kept, GRID.frames)[0], frames) for one, frames in zip(asked, right))
    assert all(one.through(kept, GRID.frames)[2] == 0 for one in asked)


def dying(at: int, keep: float) -> Callable[..., int]:
    """`os.pwrite` that writes a part of what it is to write at its `at`-th call, and dies."""
    calls, write = 0, os.pwrite

    def pwrite(handle: int, data: Any, place: int) -> int:
        nonlocal calls
        calls += 1
        if calls == at:
            write(handle, data[: int(len(data) * keep)], place)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data, place)

    return pwrite


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_kill_at_any_write_leaves_nothing_that_is_believed_wrongly(
    keep: float, path: Path, kept: FrameCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_store, "_WRITTEN", 5000)  # two slots at a time
    right = decode(path, GRID.frames, size=SIDE)
    killed = 0
    for at in range(1, 60):
        shutil.rmtree(kept.folder)
        open_cache(kept.folder, 1)
        pid = os.fork()
        if pid == 0:
            os.pwrite = dying(at, keep)  # type: ignore[assignment]
            Asked(path).through(kept, GRID.frames)
            os._exit(0)
        if not os.waitpid(pid, 0)[1]:
            break
        killed += 1
        again = open_cache(kept.folder, 1)
        assert [p.name for p in kept.folder.iterdir() if p.suffix != ".frames"] == [MARKER]
        asked = Asked(path)
        for decodes in (True, False):
            got, odd, decoded = asked.through(again, GRID.frames)
            assert torch.equal(got, right) and odd == [] and bool(decoded) in (decodes, False)
    assert killed == 1 + 2 * len(GRID.frames) // 2  # the head, then data and sums of each piece


def test_processes_that_write_and_read_at_once_agree(path: Path, kept: FrameCache) -> None:
    grid = Grid(np.arange(FRAMES), "all")
    right = decode(path, grid.frames, size=SIDE)

    def work(seed: int) -> None:
        drawn, asked = np.random.default_rng(seed), Asked(path)
        for _ in range(25):
            numbers = drawn.permutation(FRAMES)[: int(drawn.integers(1, FRAMES))]
            assert torch.equal(asked.through(kept, numbers, grid)[0], right[numbers])
            if seed == 0:  # every slot is written again and again while others read
                write_slots(film_of(kept, str(path), grid, SIDE), *again, lambda more: True)  # type: ignore[arg-type]

    again = (Head((24, 32), (64, 48)), right.numpy(), np.arange(FRAMES))
    pids = []
    for seed in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                work(seed)
            except BaseException:
                os._exit(3)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    got, _, decoded = Asked(path).through(kept, grid.frames, grid)
    assert torch.equal(got, right) and decoded == 0 and len(films_of(kept.folder)) == 1


# -- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, 8))
def test_a_full_disk_ends_keeping_and_changes_no_frame(
    at: int, path: Path, kept: FrameCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_store, "_WRITTEN", 5000)
    calls, write = 0, os.pwrite

    def full(handle: int, data: Any, place: int) -> int:
        nonlocal calls
        calls += 1
        if calls < at:
            return write(handle, data, place)
        if calls == at and len(data) > 100:
            return write(handle, data[:50], place)  # a part goes in, as on a disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    right, asked = decode(path, GRID.frames, size=SIDE), Asked(path)
    for _ in range(3):
        got, odd, decoded = asked.through(kept, GRID.frames)
        assert torch.equal(got, right) and odd == [] and decoded
    assert kept.stopped == f"data.cache {kept.folder}: No space left on device: other frames are decoded"
    monkeypatch.setattr(os, "pwrite", write)
    again = replace(kept, stopped="")
    assert torch.equal(asked.through(again, GRID.frames)[0], right)
    assert torch.equal(asked.through(again, GRID.frames)[0], right) and asked.through(again, GRID.frames)[2] == 0


def test_a_file_system_that_is_really_full_is_an_error_and_no_signal(path: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        kept = open_cache(small, 1)
        frame_cache._SPARE, before = -(1 << 30), frame_cache._SPARE
        asked, right = Asked(path), decode(path, GRID.frames, size=SIDE)
        for _ in range(3):
            assert torch.equal(asked.through(kept, GRID.frames)[0], right)
        assert "No space left on device" in kept.stopped
    finally:
        frame_cache._SPARE = before
        subprocess.run(["umount", str(small)], check=True)


def test_no_more_is_kept_than_the_recipe_says_or_the_disk_has(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_store, "_WRITTEN", 5000)
    kept = open_cache(tmp_path / "few", 40_000 / 2**30)
    asked, right = Asked(path), decode(path, GRID.frames, size=SIDE)
    for _ in range(2):
        got, _, decoded = asked.through(kept, GRID.frames)
        assert torch.equal(got, right) and decoded
    assert decoded < len(GRID.frames) and "is full (data.cache_gib" in kept.stopped
    assert sum(512 * p.stat().st_blocks for p in kept.folder.iterdir()) <= 40_000
    monkeypatch.setattr(frame_cache, "_SPARE", 1 << 60)
    kept = open_cache(tmp_path / "none", 1)
    assert torch.equal(asked.through(kept, GRID.frames)[0], right)
    assert "its disk has" in kept.stopped and films_of(kept.folder) == []


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_with_other_things_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(TensorkeepError, match="is not empty and holds no decoded frames"):
        open_cache(tmp_path / "mine", 1)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["a.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(TensorkeepError):
        open_cache(tmp_path / "file", 1)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / MARKER).write_text('{"tensorkeep frames": 0}')
    with pytest.raises(TensorkeepError, match="another version"):
        open_cache(tmp_path / "old", 1)
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / MARKER)
    with pytest.raises(TensorkeepError, match="is not empty"):
        open_cache(tmp_path / "odd", 1)


def test_an_empty_folder_becomes_a_cache_and_opens_again(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        for _ in range(2):
            kept = open_cache(folder, 3)
        assert [p.name for p in folder.iterdir()] == [MARKER]
        assert pickle.loads(pickle.dumps(kept)).folder == folder


def test_processes_that_open_a_new_folder_and_keep_frames_at_once_agree(path: Path, tmp_path: Path) -> None:
    """Temporary names of one come and go while another looks at the folder."""
    right = decode(path, GRID.frames, size=SIDE)

    def work(folder: Path, number: int) -> None:
        kept = open_cache(folder, 1)
        for k in range(30):
            kept._seen = (0.0, 0.0, 0)
            got, _, _ = Asked(path).through(kept, GRID.frames, Grid(GRID.frames, f"{number} {k}"))
            assert torch.equal(got, right) and kept.stopped == ""

    for attempt in range(2):
        pids = []
        for number in range(4):
            pid = os.fork()
            if pid == 0:
                try:
                    work(tmp_path / f"cache{attempt}", number)
                except BaseException:
                    traceback.print_exc()
                    os._exit(3)
                os._exit(0)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
        left = [p.name for p in (tmp_path / f"cache{attempt}").iterdir() if p.suffix != ".frames"]
        assert left == [MARKER] and len(films_of(tmp_path / f"cache{attempt}")) == 120


def test_how_much_is_there_is_said(path: Path, kept: FrameCache) -> None:
    parts = [(str(path), GRID, SIDE)]
    size = f"{20 * 3 * 24 * 32 / 2**20:.3g} MiB"
    assert describe(kept, parts) == f"0% of 20 frames lie in {kept.folder}, all are about {size} of 1 GiB"
    Asked(path).through(kept, GRID.frames[:5])
    assert describe(kept, parts).startswith("25% of 20 frames")


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.dataset(tmp_path_factory.mktemp("synthetic") / "data")


def newest(run: Path) -> Any:
    found = checkpoint.newest(run)
    assert found is not None
    return found[0]


def same(one: Path, other: Path) -> bool:
    a, b = newest(one), newest(other)
    parts = [(getattr(a, part), getattr(b, part)) for part in ("model", "optimizer", "ema")]
    equal = all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in parts)
    return equal and a.document["rng"] == b.document["rng"] and a.document["data"] == b.document["data"]


def trained(made: Any, run: Path) -> Any:
    """The recipe, to its end, without evaluations."""
    job, loop = build(made, run)
    return runs.fit(replace(job, evaluate=None), run, loop)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_to_the_bit_the_same_and_its_second_epoch_opens_no_video(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Videos are shown whole, so that the first epoch shows every frame; two samples make an update, four an epoch."""
    openings = tmp_path / "openings"
    opened = video.opened

    def counted(*args: Any, **kwargs: Any) -> Any:
        with openings.open("a") as file:
            file.write("x")
        return opened(*args, **kwargs)

    changes: dict[str, Any] = {"window_size": 32, "data__crop_ratio": None, "data__augment__crop": "resized"}
    changes |= {"training__workers": workers, "training__evaluate_every": None, "training__best": None}
    changes["training__epochs"] = 3
    trained(runs.recipe(data, **changes), tmp_path / "without")
    cached = runs.recipe(data, **changes, data__cache=str(tmp_path / "cache"))
    runs.killed(cached, tmp_path / "with", 4)  # in the second epoch
    monkeypatch.setattr(video, "opened", counted)
    assert trained(cached, tmp_path / "with").level == "exact"
    assert not openings.exists() and same(tmp_path / "with", tmp_path / "without")
    trained(runs.recipe(data, **changes, data__cache=str(tmp_path / "other")), tmp_path / "anew")
    assert openings.stat().st_size >= 4 and same(tmp_path / "with", tmp_path / "anew")


def test_evaluations_are_the_same_and_decode_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cached = (runs.recipe(data, training__epochs=2, **c) for c in ({}, {"data__cache": str(tmp_path / "cache")}))
    one = runs.trained(plain, tmp_path / "without")
    for name in ("with", "again"):
        assert runs.trained(cached, tmp_path / name).evaluation == one.evaluation
        monkeypatch.setattr(video, "_frames", None)  # the second run decodes nothing
    assert same(tmp_path / "without", tmp_path / "again")


def test_a_cache_may_come_go_and_move_between_two_starts(data: Path, tmp_path: Path) -> None:
    runs.trained(runs.recipe(data), tmp_path / "whole")
    starts: list[dict[str, Any]] = [{}, {"data__cache": str(tmp_path / "a")}, {"data__cache": str(tmp_path / "b")}]
    for change in starts:
        runs.killed(runs.recipe(data, **change), tmp_path / "broken", 4)
    last = runs.recipe(data, data__cache=str(tmp_path / "b"), data__cache_gib=2)
    assert runs.trained(last, tmp_path / "broken").level == "exact"
    assert same(tmp_path / "whole", tmp_path / "broken")
    plain, _ = build(runs.recipe(data), tmp_path / "x")
    cached, _ = build(runs.recipe(data, data__cache=str(tmp_path / "a")), tmp_path / "x")
    assert plain.data.fingerprint() == cached.data.fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_kept_and_that_no_more_is_are_said_once(data: Path, tmp_path: Path, workers: int) -> None:
    lines: list[str] = []
    changes = {"data__cache": str(tmp_path / "cache"), "data__cache_gib": 60_000 / 2**30}
    made = runs.recipe(data, **changes, training__workers=workers, training__evaluate_every=2, training__epochs=2)
    job, loop = build(made, tmp_path / "run", remark=lines.append)
    runs.fit(job, tmp_path / "run", loop)
    said = [line for line in lines if "cache" in line]
    assert len(said) == 2 and "0% of" in said[0] and "is full (data.cache_gib" in said[1]


def test_a_check_says_what_will_be_kept_and_makes_nothing(data: Path, tmp_path: Path) -> None:
    made = runs.recipe(data, data__cache=str(tmp_path / "cache"))
    found = check(made)
    assert found.cache.startswith("0% of ") and found.document()["cache"] == found.cache
    assert not (tmp_path / "cache").exists() and "cache" not in check(runs.recipe(data)).document()


def test_clips_that_are_cut_for_a_gpu_are_the_same_from_other_processes(data: Path, tmp_path: Path) -> None:
    job, _ = build(runs.recipe(data, data__augment__crop="resized", data__cache=str(tmp_path / "c")), tmp_path / "run")
    uncut = replace(job.data, uncut=True)  # type: ignore[type-var]
    made = [
        [part[0] for part in batches(uncut, list, Stream(0, len(uncut)), 0, 8, 1, 1, workers=workers)]
        for workers in (0, 1, 1)
    ]
    for one, *others in zip(*made, strict=True):
        assert all(torch.equal(one[0]["inputs"].frames, other[0]["inputs"].frames) for other in others)
        assert all(other[0]["inputs"].frames.is_contiguous() for other in others)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"data__decode": "gpu"}, "frames that a GPU decodes are not kept"),
        ({"data__cache_gib": 0}, "no room"),
        ({"data__cache": "''"}, "no room"),
        ({"data__inputs": "features", "model__backbone": None}, "features are not decoded"),
    ],
)
def test_what_cannot_be_kept_is_refused(data: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(TensorkeepError, match=where):
        runs.recipe(data, **{"data__cache": "somewhere", **changes})
