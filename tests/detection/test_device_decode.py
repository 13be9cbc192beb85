"""Frames decoded on the device that trains: those of the frame table, in the order and with the draws of any other run.

Where torchcodec is not installed a stand-in takes its place that knows no more than torchcodec does: presentation times
and keyframes. On a GPU colours differ by rounding (`TOLERANCE`).
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

av = pytest.importorskip("av")

from dataclasses import replace  # noqa: E402

from tensorkeep.detection.data.asking import Asked, ask  # noqa: E402
from tensorkeep.detection.data.containers import frame_table  # noqa: E402
from tensorkeep.detection.data.device_augment import Uncut, cut_out  # noqa: E402
from tensorkeep.detection.data.device_decode import decode_asked, decoded_ahead, require_decoder  # noqa: E402
from tensorkeep.detection.data.ffmpeg_links import library_path, link_ffmpeg  # noqa: E402
from tensorkeep.detection.data.torchcodec_frames import choose_pictures, decode_pictures  # noqa: E402
from tensorkeep.detection.data.video import decode, fitted  # noqa: E402
from tensorkeep.detection.job import augmented_on_device, build, decoded_on_device  # noqa: E402
from tensorkeep.errors import TensorkeepError  # noqa: E402
from tensorkeep.training import _resume as resuming  # noqa: E402
from tensorkeep.training.distributed import World  # noqa: E402
from tensorkeep.training.loop import fit  # noqa: E402
from tests.detection import films, runs  # noqa: E402
from tests.gpu import needs_gpu  # noqa: E402
from tests.training import assert_same_run  # noqa: E402

CPU = torch.device("cpu")
TOLERANCE = 4.0  # mean difference of a value, of 255: these pictures are coloured noise, films differ by 1 or 2
KINDS: dict[str, dict[str, Any]] = {
    "plain.mp4": {"codec": "libx264"},
    "uneven.mp4": {"codec": "libx264", "times": np.cumsum([0] + [33] * 15 + [200] * 8 + [50] * 16)},
    "uneven.mkv": {"times": np.cumsum([0] + [33] * 15 + [200] * 8 + [50] * 16), "b_frames": 0},
    "late.mp4": {"start": 3.0},
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
}


class StandIn:
    """A `VideoDecoder` that knows of a file what it is told: the pictures of these times, by plain decoding."""

    cpu_fallback = False

    def __init__(self, source: str, *, custom_frame_mappings: str, stream_index: int, **_: Any) -> None:
        self.pts = [row["pts"] for row in json.loads(custom_frame_mappings)["frames"]]
        with av.open(source) as container:
            stream = container.streams[stream_index]
            self.unit = float(stream.time_base)
            self.shown = {f.pts: f.to_ndarray(format="rgb24") for f in container.decode(stream)}

    def get_frames_at(self, places: list[int]) -> Any:
        pts = [self.pts[place] for place in places]
        data = torch.from_numpy(np.stack([self.shown[p] for p in pts])).permute(0, 3, 1, 2)
        return types.SimpleNamespace(data=data, pts_seconds=torch.tensor(pts, dtype=torch.float64) * self.unit)


def stand_in(monkeypatch: pytest.MonkeyPatch, decoder: type) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace(__version__="0.0"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=decoder))


@pytest.fixture(params=["stand-in", "torchcodec"])
def decoders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, and torchcodec on the CPU where it can be used."""
    if request.param == "stand-in":
        stand_in(monkeypatch, StandIn)
        return
    need_torchcodec()


def need_torchcodec() -> None:
    """Skip where torchcodec is not there or does not find FFmpeg (LD_LIBRARY_PATH: docs/reference/decoding.md)."""
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchcodec: {str(error).splitlines()[0]}")


def video(folder: Path, name: str) -> Path:
    if name == "cut.mp4":  # hides the pictures before the cut by an edit list
        return films.copied(films.film(folder / "source.mp4", sound=2.0), folder / name, 0.45, 1.5)
    return films.film(folder / name, **KINDS[name])


def asked_of(path: Path, indices: Any, side: int | None = None) -> Asked:
    asked = ask(str(path), np.asarray(indices), lambda height, width: fitted(height, width, side))
    assert isinstance(asked, Asked)
    return asked._replace(side=min(asked.size))


def by_pyav(asked: Asked, device: torch.device) -> tuple[Uncut, str | None]:
    """What was asked for, by the path that samples take without this one."""
    frames = decode(asked.pictures.path, asked.indices, size=tuple(asked.size))
    assert asked.drawn is not None
    return cut_out(frames.to(device), asked.drawn), None


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_chosen_pictures_are_the_frames_asked_for_and_begin_where_decoding_may(times: list[int], data: Any) -> None:
    pts = np.sort(np.array(times, dtype=np.int64))
    hidden = data.draw(st.lists(st.integers(0, 500), max_size=3))
    some = data.draw(st.lists(st.sampled_from(pts.tolist()), max_size=5))
    keys = np.unique(np.array([pts[0], *hidden, *some], dtype=np.int64))
    indices = np.array(data.draw(st.lists(st.integers(0, len(pts) - 1), min_size=1, max_size=9)))
    every, may, places = choose_pictures(pts, keys, indices)
    assert (every[places] == pts[indices]).all() and (np.diff(every) > 0).all()
    assert set(every[may]) <= set(keys) and (may[0] or pts[indices].min() < keys[0])
    assert set(every) <= set(pts) | set(keys)
    held = pts[(pts >= every[0]) & (pts <= every[-1])]
    assert np.isin(held, every).all()  # none is left out between: the decoder counts on


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("name", [*KINDS, "cut.mp4"])
def test_frames_that_the_device_decodes_are_those_that_pyav_decodes(tmp_path: Path, name: str) -> None:
    path = video(tmp_path, name)
    number = len(frame_table(path).pts)
    for indices in (np.arange(number), np.arange(0, number, 4), np.array([number - 1, 3, 3, number // 2])):
        asked = asked_of(path, indices)
        frames = decode_pictures(asked.pictures, CPU, lambda frames: frames)
        assert torch.equal(frames, decode(path, indices))
        smaller, why = decode_asked(asked_of(path, indices, 24), CPU)
        wanted = decode(path, indices, size=24)[:, :, :, 4:28]
        assert why is None and smaller.frames.shape == wanted.shape
        assert (smaller.frames.float() - wanted.float()).abs().mean() < TOLERANCE


def test_what_the_decoder_gives_wrongly_or_not_at_all_pyav_decodes_and_the_sample_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(StandIn):
        def get_frames_at(self, places: list[int]) -> Any:
            found = super().get_frames_at(places)
            found.pts_seconds = found.pts_seconds + 0.05
            return found

    class Small(StandIn):
        def get_frames_at(self, places: list[int]) -> Any:
            found = super().get_frames_at(places)
            found.data = found.data[..., :-2]
            return found

    class Failing(StandIn):
        def get_frames_at(self, places: list[int]) -> Any:
            raise RuntimeError("\nno such packet\nat line 3")

    path = video(tmp_path, "plain.mp4")
    asked = asked_of(path, [3, 30])
    said = {}
    for decoder in (Late, Small, Failing):
        stand_in(monkeypatch, decoder)
        clip, said[decoder.__name__] = decode_asked(asked, CPU)
        assert torch.equal(clip.frames, decode(path, [3, 30])[..., 8:56])
    assert said == {
        "Late": "decoded on a CPU: torchcodec gave the picture at 0.200 s for that at 0.150 s",
        "Small": "decoded on a CPU: torchcodec's pictures are 62 x 48, not 64 x 48",
        "Failing": "decoded on a CPU: torchcodec cannot decode it: no such packet",
    }


def test_files_whose_pictures_are_counted_damaged_or_lie_in_a_stream_are_not_asked_for(tmp_path: Path) -> None:
    whole = films.film(tmp_path / "whole.mkv")
    (tmp_path / "half.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    counted = films.film(tmp_path / "b.avi")
    stream = films.film(tmp_path / "a.ts", codec="libx264")
    reasons = [ask(str(path), np.array([0]), fitted_to_24) for path in (counted, tmp_path / "half.mkv", stream)]
    assert all(isinstance(why, str) for why in reasons), reasons
    assert "times are of no use" in reasons[0] and "cut short" in reasons[1] and "mpegts" in reasons[2]
    with pytest.raises(TensorkeepError, match="frames 0 to 40 were asked for, it has 40"):
        ask(str(whole), np.array([0, 40]), fitted_to_24)


def fitted_to_24(height: int, width: int) -> tuple[int, int]:
    return fitted(height, width, 24)


def test_updates_come_in_their_order_with_a_few_clips_ahead_and_an_error_is_raised() -> None:
    asked = Asked(None, np.arange(1), (1, 1))  # type: ignore[arg-type]
    begun: list[int] = []

    def parts() -> Iterator[list[Any]]:
        for n in range(9):
            begun.append(n)
            meta = [{"n": n, "problems": []}, {"problems": []}]
            yield [{"inputs": [asked._replace(side=n), asked._replace(side=n)], "meta": meta}, None]

    def made(one: Asked, device: torch.device) -> tuple[Uncut, str | None]:
        if one.side == 7:
            raise TensorkeepError("seven")
        return Uncut(torch.full((1,), one.side), None), "told" if one.side == 2 else None

    found = []
    with pytest.raises(TensorkeepError, match="seven"):
        for batch, nothing in decoded_ahead(parts(), CPU, 3, made):
            assert nothing is None and begun[-1] <= batch["meta"][0]["n"] + 2
            found.append([int(clip.frames) for clip in batch["inputs"]])
            assert batch["meta"][1]["problems"] == (["told"] if batch["meta"][0]["n"] == 2 else [])
    assert found == [[n, n] for n in range(7)]


def test_updates_decoded_elsewhere_do_not_pile_up() -> None:
    """Files that the device does not take come decoded: memory holds a few of them, not those of a whole run."""
    begun: list[int] = []

    def parts() -> Iterator[list[Any]]:
        for n in range(50):
            begun.append(n)
            clip = Uncut(torch.full((1,), n), None)
            yield [None if n % 5 == 0 else {"inputs": [clip], "meta": [{"problems": []}]}]

    for n, (batch,) in enumerate(decoded_ahead(parts(), CPU, 3)):
        assert begun[-1] <= n + 5
        assert (batch is None) == (n % 5 == 0) and (batch is None or int(batch["inputs"][0].frames) == n)


def test_what_is_asked_for_may_come_with_lists_in_place_of_tuples(tmp_path: Path, decoders: None) -> None:
    asked = asked_of(video(tmp_path, "plain.mp4"), [3, 9], 24)
    pinned = asked._replace(size=[*asked.size], pictures=asked.pictures._replace(shown=[*asked.pictures.shown]))  # type: ignore[arg-type]
    clip, why = decode_asked(pinned, CPU)
    assert why is None and torch.equal(clip.frames, decode_asked(asked, CPU)[0].frames)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return runs.dataset(tmp_path_factory.mktemp("data"), videos=3, held_out=1)


CHANGES = {"data__augment": {"size": 32, "short_side": 36, "operations": 2}, "training__workers": 1}


def test_a_run_whose_frames_are_decoded_later_is_the_run_whose_samples_had_them(tmp_path: Path, data: Path) -> None:
    """Order, draws and resume do not depend on who decodes: here it is PyAV, whose pixels are the same."""
    made = runs.recipe(data, **CHANGES, training__epochs=3)
    ahead = partial(decoded_ahead, device=CPU, threads=2, make=by_pyav)

    def cut_off(parts: Iterator[list[Any]]) -> Iterator[list[Any]]:
        for number, part in enumerate(ahead(parts)):
            if number == 2:
                raise TensorkeepError("cut off")
            yield part

    def go(name: str, how: Any) -> None:
        job, loop = build(made, tmp_path / name)
        job = augmented_on_device(job, made)
        if how is not None:
            job = replace(job, data=replace(job.data, asks=True), ahead=how)
        fit(job, tmp_path / name, replace(loop, save_every=1))

    go("host", None)
    go("device", ahead)
    with pytest.raises(TensorkeepError, match="cut off"):
        go("resumed", cut_off)
    go("resumed", ahead)
    assert_same_run(tmp_path / "host", tmp_path / "device")
    assert_same_run(tmp_path / "host", tmp_path / "resumed")


def test_samples_ask_by_the_same_draws_and_without_augmentation_for_the_middle(data: Path) -> None:
    for changes in (CHANGES, {**CHANGES, "data__augment": None}):
        job, _ = build(runs.recipe(data, **changes), data / "unused")
        uncut = replace(job.data, uncut=True)
        asking = replace(uncut, asks=True)
        assert asking.fingerprint() == job.data.fingerprint()
        for index in range(len(job.data)):
            one, other = (d.sample(index, torch.Generator().manual_seed(5)) for d in (uncut, asking))
            asked = other.pop("inputs")
            assert isinstance(asked, Asked) and asked.drawn == one["inputs"].drawn
            assert {k: str(v) for k, v in other.items()} == {k: str(v) for k, v in one.items() if k != "inputs"}
            if asked.drawn is not None:
                assert torch.equal(by_pyav(asked, CPU)[0].frames, one["inputs"].frames)
            else:
                assert (asked.side, asked.size) == (32, (32, 32)) and one["inputs"].frames.shape[2:] == (32, 32)


def test_another_decoder_is_no_exact_resume() -> None:
    job_loop = types.SimpleNamespace(
        parallel="ddp", micro=1, precision="fp32", compile=False, graph=False, deterministic=True, replicas=1
    )
    none, one = (resuming.facts(job_loop, World(), decoder) for decoder in (None, "torchcodec 0.17.0"))  # type: ignore[arg-type]
    for before, now, level in ((none, None, "exact"), (one, "torchcodec 0.17.0", "exact")):
        then = {"facts": before, "optimizer": {}}
        assert resuming._level(job_loop, World(), then, [], now) == (level, [])  # type: ignore[arg-type]
    for before, now in ((none, "torchcodec 0.17.0"), (one, None), (one, "torchcodec 0.18.0")):
        level, why = resuming._level(job_loop, World(), {"facts": before, "optimizer": {}}, [], now)  # type: ignore[arg-type]
        assert level == "sample-exact" and "decoder" in why[0]
    old = {key: value for key, value in none.items() if key != "decoder"}  # from before there was a choice
    assert resuming._level(job_loop, World(), {"facts": old, "optimizer": {}}, [])[0] == "exact"  # type: ignore[arg-type]


def test_a_gpu_that_cannot_decode_is_refused_with_the_reason(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        TensorkeepError, match=r"data\.decode: frames are to be decoded on a GPU, and the run is on the"
    ):
        build(runs.recipe(data, data__decode="gpu"), tmp_path / "run")
    for changes, where in (({"data__broken": "skip"}, "data.broken"), ({"data__inputs": "features"}, "data")):
        with pytest.raises(TensorkeepError, match=where):
            runs.recipe(data, data__decode="gpu", **changes)

    class Fallback(StandIn):
        cpu_fallback = "[CUDA] Fallback status: Falling back due to: NVcuvid unavailable"

    class Unsupported(StandIn):
        cpu_fallback = "[CUDA] Fallback status: Falling back due to: Video not supported"

    path = str(video(tmp_path, "plain.mp4"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(TensorkeepError, match=r"data\.decode: torchcodec cannot be used") as caught:
        require_decoder([path], torch.device("cuda"))
    assert "ffmpeg_links" in str(caught.value.hint)
    stand_in(monkeypatch, Fallback)
    with pytest.raises(TensorkeepError, match=r"data\.decode: the GPU's decoder cannot be used: NVcuvid unavailable"):
        require_decoder([path], torch.device("cuda"))
    stand_in(monkeypatch, Unsupported)  # one video's kind of picture: that video is decoded on the CPU and told
    assert require_decoder([path], torch.device("cuda")) == "torchcodec 0.0"


def test_links_give_pyavs_libraries_the_names_that_torchcodec_looks_for(tmp_path: Path) -> None:
    bundled = Path(av.__file__).parent.parent / "av.libs"
    if not bundled.is_dir():
        with pytest.raises(TensorkeepError, match="no FFmpeg of its own"):
            link_ffmpeg(tmp_path)
        return
    major = av.library_versions["libavcodec"][0]
    for _ in range(2):  # again over what is there
        assert library_path(tmp_path / "links").split(":")[0] == str(tmp_path / "links")
    link = tmp_path / "links" / f"libavcodec.so.{major}"
    assert link.resolve().parent == bundled.resolve() and (tmp_path / "links" / link.resolve().name).exists()


@needs_gpu
@pytest.mark.parametrize("name", [*KINDS, "cut.mp4"])
def test_frames_of_a_gpus_decoder_are_the_cpus_within_the_tolerance(tmp_path: Path, name: str) -> None:
    need_torchcodec()
    large = {"size": (256, 192), "codec": "libx264"}
    path = films.film(tmp_path / name, **{**KINDS.get(name, {}), **large}) if name in KINDS else video(tmp_path, name)
    number = len(frame_table(path).pts)
    for indices in (np.arange(number), np.array([number - 1, 3, 3, number // 2])):
        asked = asked_of(path, indices, 24 if name == "cut.mp4" else 96)
        clip, why = decode_asked(asked, torch.device("cuda", 0))
        height, width = asked.size
        top, left = (height - asked.side) // 2, (width - asked.side) // 2
        wanted = decode(path, indices, size=asked.size)[:, :, top : top + asked.side, left : left + asked.side]
        assert why is None and clip.frames.device.type == "cuda"
        assert (clip.frames.cpu().float() - wanted.float()).abs().mean() < TOLERANCE


@needs_gpu
def test_a_run_on_a_gpu_decodes_there_and_says_with_what(tmp_path: Path, data: Path) -> None:
    need_torchcodec()
    made = runs.recipe(data, **CHANGES, data__decode="gpu", training__epochs=1)
    job, loop = build(made, tmp_path / "run", World(device=torch.device("cuda", 0)))
    assert job.decoder is not None and job.decoder.startswith("torchcodec") and job.ahead is not None
    assert decoded_on_device(job, made, torch.device("cuda", 0)).decoder == job.decoder
    fit(job, tmp_path / "run", loop, world=World(device=torch.device("cuda", 0)))
