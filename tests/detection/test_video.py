import functools
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from tensorkeep.detection.data import containers, video  # noqa: E402
from tensorkeep.detection.data.annotations import Video  # noqa: E402
from tensorkeep.detection.data.containers import frame_table, probe  # noqa: E402
from tensorkeep.detection.data.picture_checks import check_pictures  # noqa: E402
from tensorkeep.detection.data.synthetic import write_video  # noqa: E402
from tensorkeep.detection.data.video import decode, stream_windows  # noqa: E402
from tensorkeep.detection.data.video_checks import check_video  # noqa: E402
from tensorkeep.errors import TensorkeepError  # noqa: E402

FRAMES, GOP, RATE = 50, 12, 10
TIMES = np.cumsum(np.random.default_rng(1).integers(20, 200, FRAMES)).tolist()
X265 = {"x265-params": "log-level=none"}
KINDS: dict[str, dict[str, object]] = {
    "plain.mp4": {},
    "varying_rate.mp4": {"times": TIMES},
    "varying_rate.mkv": {"times": TIMES},
    "no_count.mkv": {},
    "no_times.avi": {},
    "b_frames.avi": {"codec": "mpeg4"},
    "no_b_frames.avi": {"codec": "mpeg4", "max_b_frames": 0},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "odd.mp4": {"odd": True},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:log-level=none"}},
    "refreshed.mp4": {"options": {"x264-params": "intra-refresh=1:log-level=none"}},
    "stream.ts": {},
}


def pictures(number: int = FRAMES, height: int = 50, width: int = 66) -> list[np.ndarray]:
    """A texture that moves, so that no two frames are alike and every codec has something to predict."""
    texture = np.random.default_rng(0).integers(0, 255, (height * 2, width * 2, 3), dtype=np.uint8)
    return [texture[i % height :][:height, 2 * i % width :][:, :width] for i in range(number)]


def write(path: Path, odd: bool = False, number: int = FRAMES, **options: object) -> Path:
    shape = (51, 67) if odd else (50, 66)
    write_video(path, pictures(number, *shape), RATE, **{"gop_size": GOP, "max_b_frames": 2, **options})  # type: ignore[arg-type]
    return path


def everything(path: Path, **conversion: object) -> torch.Tensor:
    """All frames [T, 3, H, W], decoded in order by PyAV alone."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(**{"format": "rgb24", **conversion}) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("videos")
    for name, options in KINDS.items():
        write(made / name, **options)
    return made


@pytest.mark.parametrize("name", KINDS)
def test_any_frames_equal_those_of_decoding_everything_and_picking(folder, name):
    whole = everything(folder / name)
    assert len(frame_table(folder / name).pts) == len(whole) == FRAMES
    rng = np.random.default_rng(2)
    for number, threads in ((FRAMES, 1), (1, 1), (3, 0), (9, 1), (9, 0)):
        wanted = np.arange(FRAMES) if number == FRAMES else rng.integers(0, FRAMES, number)
        assert torch.equal(decode(folder / name, wanted, threads=threads), whole[wanted]), wanted


@pytest.mark.parametrize("name", ["plain.mp4", "odd.mp4", "varying_rate.mkv"])
def test_reduced_frames_equal_those_of_reducing_everything(folder, name):
    wanted = [40, 3, 3, 17]
    got = decode(folder / name, wanted, size=24)
    height, width = got.shape[2:]
    assert min(height, width) == 24
    whole = everything(folder / name, format="gbrp", width=width, height=height, interpolation="BILINEAR")
    assert torch.equal(got, whole[wanted])
    assert decode(folder / name, [0], size=(20, 30)).shape == (1, 3, 20, 30)


@pytest.mark.parametrize("name", KINDS)
def test_length_and_rate_are_known_with_and_without_a_header_that_says_them(folder, name):
    info = probe(folder / name)
    seconds = (TIMES[-1] - TIMES[0]) / 1000 * FRAMES / (FRAMES - 1) if "varying" in name else FRAMES / RATE
    assert info.frames == FRAMES and info.problem is None
    assert info.duration == pytest.approx(seconds, rel=0.04) and info.fps == pytest.approx(FRAMES / info.duration)
    assert (info.height, info.width) == ((51, 67) if "odd" in name else (50, 66))


@pytest.mark.parametrize("name", ["no_count.mkv", "no_times.avi", "stream.ts"])
def test_a_file_cut_short_gives_the_frames_that_are_whole_and_says_so(folder, tmp_path, name):
    data = (folder / name).read_bytes()
    cut = tmp_path / name
    cut.write_bytes(data[: len(data) * 2 // 3])
    info, whole = probe(cut), everything(cut)
    assert 0 < info.frames < FRAMES
    if not name.endswith("ts"):  # a transport stream has no header that could know better
        assert info.problem and "cut short" in info.problem
        assert [p.kind for p in check_video(cut)] == ["truncated video"]
    wanted = [0, 5, info.frames // 2]
    assert torch.equal(decode(cut, wanted), whole[wanted])
    with pytest.raises(TensorkeepError, match=f"it has {info.frames}"):
        decode(cut, [FRAMES - 1])


def test_a_cut_file_with_its_index_in_front_is_known_without_reading_it(tmp_path):
    path = tmp_path / "front.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 66, 50, "yuv420p"
        for pixels in pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
        container.mux(stream.encode(None))
    assert probe(path).frames == FRAMES
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    info = probe(path)
    assert info.stated == FRAMES and 0 < info.frames < FRAMES and "cut short" in str(info.problem)
    wanted = list(range(info.frames))
    assert torch.equal(decode(path, wanted), everything(path)[wanted])


@pytest.mark.parametrize(
    "content", [b"", b"no video at all, only text " * 20, b"#EXTM3U\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n"]
)
def test_what_is_no_video_is_one_error_that_names_it(folder, content):
    path = folder / "strange.mp4"
    path.write_bytes(content)
    for call in (probe, frame_table, lambda path: decode(path, [0])):
        with pytest.raises(TensorkeepError, match=r"strange\.mp4"):
            call(path)
    assert [p.severity for p in check_video(path)] == ["error"]


def test_a_name_is_a_file_and_never_a_protocol(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("concat:plain.mp4|plain.mp4", "subfile,,start,0,end,0,,:plain.mp4", "missing.mp4"):
        with pytest.raises(TensorkeepError, match="no such file"):
            probe(name)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("size", [None, 24])
def test_frames_stand_as_they_are_meant_to_be_seen(tmp_path, degrees, size):
    flat, turned = tmp_path / "flat.mp4", tmp_path / "turned.mp4"
    for path, angle in ((flat, 0), (turned, degrees)):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 66, 50, "yuv420p"
            if angle:
                stream.set_display_rotation(angle)
            for pixels in pictures(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
            container.mux(stream.encode(None))
    with av.open(str(turned)) as container:
        counterclockwise = next(container.decode(video=0)).rotation
    upright, got = decode(flat, range(6), size=size), decode(turned, range(6), size=size)
    assert counterclockwise % 360 in (degrees, 360 - degrees)
    assert torch.equal(got, torch.rot90(upright, counterclockwise // 90, (2, 3)))
    info = probe(turned)
    assert (info.width, info.height) == ((50, 66) if degrees % 180 else (66, 50))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "damaged.mp4"  # large pictures: damage to a few blocks goes unnoticed
    write_video(path, pictures(60, 180, 320), RATE, gop_size=GOP, max_b_frames=0)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data, (start, size) = bytearray(path.read_bytes()), packets[27]
    for place in range(start + 8, start + size, 7):
        data[place] ^= 0x5A
    path.write_bytes(data)
    return path


def test_a_damaged_picture_stops_the_reading_and_is_named(damaged):
    named = r"damaged\.mp4: (frame \d+ \([\d.]+ s\) (is damaged|cannot)|cannot be decoded)"
    with pytest.raises(TensorkeepError, match=named):
        decode(damaged, range(60))


def test_a_damaged_picture_is_kept_on_request_and_said(damaged):
    problems: list = []
    got = decode(damaged, range(60), broken="keep", problems=problems)
    assert len(got) == 60 and problems and {p.kind for p in problems} == {"damaged video"}
    assert torch.equal(got[:24], decode(damaged, range(24)))  # earlier keyframe intervals are whole
    assert {p.kind for p in check_pictures(damaged)} == {"damaged video"}


def test_only_what_is_needed_is_decoded(folder, monkeypatch):
    count = 0
    original = video._decoded

    def counted(*arguments):
        nonlocal count
        for frame in original(*arguments):
            count += 1
            yield frame

    monkeypatch.setattr(video, "_decoded", counted)
    table = frame_table(folder / "plain.mp4")
    last_key = int(np.searchsorted(table.pts, table.key_pts[-1]))
    assert last_key >= 2 * GOP
    decode(folder / "plain.mp4", [last_key])
    assert 0 < count <= 4  # not the two thirds before it
    count = 0
    decode(folder / "plain.mp4", range(0, FRAMES, 25))
    assert count < FRAMES / 2  # pictures that nothing refers to are left out


def test_every_window_of_a_stream_equals_its_own_decoding(folder):
    windows = [np.arange(k, k + 16) for k in range(0, FRAMES - 16, 8)] + [np.full(4, FRAMES - 1)]
    streamed = list(stream_windows(folder / "varying_rate.mp4", windows, size=24))
    assert len(streamed) == len(windows)
    for frames, window in zip(streamed, windows):
        assert torch.equal(frames, decode(folder / "varying_rate.mp4", window, size=24))
    assert list(stream_windows(folder / "plain.mp4", [])) == []


def test_a_long_video_streams_in_the_memory_of_a_window(tmp_path, monkeypatch):
    path = tmp_path / "long.mp4"
    write_video(path, pictures(600), RATE)
    made: list[weakref.ref] = []
    original = video._new_memory

    def memory_for(number, shape):
        picture = original(number, shape)
        made.append(weakref.ref(picture))
        return picture

    watched = functools.partial(video._pictures, memory_for=memory_for)
    monkeypatch.setattr(video, "_pictures", watched)
    size, most = 32, 0
    for frames in stream_windows(path, [np.arange(k, k + size) for k in range(0, 600 - size + 1, size // 2)]):
        assert len(frames) == size
        most = max(most, sum(reference() is not None for reference in made))
    assert len(made) >= 592 and most <= size + 1  # each picture once, and no more than a window of them alive


def test_disagreement_with_the_annotation_is_a_finding(folder, tmp_path):
    def annotated(frames: int, duration: float) -> Video:
        return Video("plain", "test", np.zeros((0, 2)), (), duration, frames)

    path = folder / "plain.mp4"
    assert check_pictures(path, annotated(FRAMES, FRAMES / RATE)) == []
    short = check_video(path, annotated(FRAMES // 2, FRAMES / RATE))
    assert [(p.severity, p.kind, p.video) for p in short] == [("warning", "frame count", "plain")]
    assert [p.kind for p in check_video(path, annotated(FRAMES, 30.0))] == ["duration"]
    slowing = write(tmp_path / "slowing.mp4", times=[2 * k * k for k in range(FRAMES)])
    assert [p.kind for p in check_pictures(slowing)] == ["variable frame rate"]


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path / "a.mp4", number=20)
    assert probe(path).frames == len(frame_table(path).pts) == 20
    write(path, number=30)
    assert len(frame_table(path).pts) == 30


def test_without_pyav_the_error_says_how_to_get_it(monkeypatch, folder):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(TensorkeepError) as caught:
        probe(folder / "plain.mp4")
    assert "tensorkeep[detection]" in str(caught.value.hint)
    assert containers.quarter_turn(-90) == 270


def test_torchcodec_gives_the_same_frames(folder):
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchcodec: {str(error).splitlines()[0]}")
    wanted = [3, 40, 3]
    ours, theirs = (decode(folder / "plain.mp4", wanted, decoder=kind) for kind in ("pyav", "torchcodec"))
    assert ours.shape == theirs.shape and (ours.float() - theirs.float()).abs().mean() < 3


def test_torchcodec_that_is_not_there_is_said(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    with pytest.raises(TensorkeepError, match="torchcodec cannot be used"):
        decode(folder / "plain.mp4", [0], decoder="torchcodec")
