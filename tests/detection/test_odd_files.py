"""Files that few tools write and every player plays: read whole and at their times; what is no video is named."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av

from tensorkeep.detection.data.containers import frame_table, probe, shown_times
from tensorkeep.detection.data.features import count_features, read_features
from tensorkeep.detection.data.hearing import decoder
from tensorkeep.detection.data.picture_checks import check_pictures
from tensorkeep.detection.data.sheets import read_sheet
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError

from .films import film, number_of, presented


def times_of(path: Path) -> np.ndarray:
    """Seconds at which the frames are shown, by ours."""
    info = probe(path)
    times = shown_times(frame_table(path), info)
    return np.arange(info.frames) / info.fps if times is None else times[:-1]


def read_as_played(path: Path, within: float = 0.002) -> None:
    """Every picture of plain decoding at its time, and nothing is called faulty."""
    seconds, numbers = presented(path)
    times = times_of(path)
    assert len(times) == len(seconds) > 10
    assert np.abs(times - seconds).max() < within
    order = np.random.default_rng(0).permutation(len(times))
    assert [number_of(frame) for frame in decode(path, order)] == [numbers[i] for i in order]
    assert [p for p in check_pictures(path) if p.kind != "variable frame rate"] == []


def timed_anew(source: Path, path: Path, times: list[int]) -> Path:
    """A copy whose packets come at these milliseconds."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        for packet, time in zip(packets, times, strict=True):
            packet.pts = packet.dts = time
            packet.time_base, packet.stream = Fraction(1, 1000), stream
            out.mux(packet)
    return path


def test_two_pictures_of_one_millisecond_keep_the_times_of_all_others(tmp_path):
    steps = [33] * 12 + [0] + [200] * 10 + [0, 0] + [50] * 14
    path = timed_anew(
        film(tmp_path / "source.mkv", b_frames=0), tmp_path / "burst.mkv", np.cumsum([0, *steps]).tolist()
    )
    read_as_played(path)
    assert (np.diff(times_of(path)) > 0).all()


@pytest.mark.parametrize("rate", [15, 24, 50])
def test_bare_pictures_have_the_rate_that_they_state(tmp_path, rate):
    path = film(tmp_path / "bare.h264", rate=rate, codec="libx264", form="h264")
    assert probe(path).fps == pytest.approx(rate)
    assert probe(path).duration == pytest.approx(40 / rate)


EDITS = {
    "two": [(600, 0), (600, 1100)],
    "backwards": [(600, 1100), (600, 0)],
    "twice": [(600, 300), (600, 300)],
    "late": [(500, None), (900, 300)],
    "three": [(400, 200), (400, 1000), (400, 1800)],
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("b_frames", [0, 2])
def test_parts_that_an_edit_list_shows_in_turn_are_no_damage(tmp_path, name, b_frames):
    path = film(tmp_path / "source.mp4", b_frames=b_frames)
    with av.open(str(path)) as container:
        unit, shift = container.streams.video[0].time_base, container.streams.video[0].start_time
    data = bytearray(path.read_bytes())
    start, late = data.find(b"edts") - 4, 0 if shift else b_frames and 1
    length = int.from_bytes(data[start : start + 4], "big")
    moved = [
        (ms, -1 if at is None else round((Fraction(at, 1000) + Fraction(late, 20)) / unit)) for ms, at in EDITS[name]
    ]
    rows = b"".join(struct.pack(">IiI", ms, at, 1 << 16) for ms, at in moved)
    made = struct.pack(">I4sI4sII", 24 + len(rows), b"edts", 16 + len(rows), b"elst", 0, len(moved)) + rows
    for box in (b"moov", b"trak"):  # behind the pictures, whose places so stay what they are
        at = data.find(box) - 4
        data[at : at + 4] = struct.pack(">I", int.from_bytes(data[at : at + 4], "big") + len(made) - length)
    data[start : start + length] = made
    path.write_bytes(data)
    read_as_played(path)


def test_an_avi_from_a_pipe_states_no_length_and_is_whole(tmp_path):
    path = film(tmp_path / "piped.avi", b_frames=0)
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff" * 4
    at = data.find(b"strh") + 40  # frames of the stream
    data[at : at + 4] = struct.pack("<I", 1 << 30)
    path.write_bytes(data[: data.rfind(b"idx1")])
    read_as_played(path)


def test_noise_before_the_first_packet_of_a_transport_stream_is_passed_over(tmp_path):
    path = film(tmp_path / "late.ts", codec="mpeg2video")
    path.write_bytes(b"\1\2\3" * 25 + path.read_bytes())
    read_as_played(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "ends within a packet" in str(probe(path).problem)


def test_a_live_recording_that_stops_within_a_picture_is_cut_short(tmp_path):
    path = film(tmp_path / "live.mkv", b_frames=0, live="1")
    read_as_played(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(2000))
    read_as_played(path)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "cut short" in str(probe(path).problem)


def test_what_is_no_video_is_named_by_what_it_is(tmp_path):
    path = film(tmp_path / "clip.mp4")
    data = path.read_bytes()
    for content, said in (
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (data[: data.find(b"moov") - 4], r"without its index \(moov\)"),
        (data[: data.find(b"mdat") + 300], r"without its index \(moov\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(TensorkeepError, match=said):
            probe(path)


def test_what_ffmpeg_calls_an_error_of_the_system_is_said_of_the_file(tmp_path):
    path = film(tmp_path / "source.mkv")
    path.write_bytes(path.read_bytes()[:300])  # FFmpeg: an input/output error
    with pytest.raises(TensorkeepError, match="cannot be read as a video"):
        probe(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(TensorkeepError, match="is no file"):
        probe(tmp_path / "pipe.mp4")


def test_a_feature_file_is_read_whatever_the_case_of_its_ending(tmp_path):
    rows = np.random.default_rng(0).normal(size=(12, 4)).astype("f4")
    for name in ("a.npy", "b.NPY"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, rows)
        assert count_features(tmp_path / name, 4) == 12
        assert np.array_equal(read_features(tmp_path / name, 4).T.numpy(), rows)


def test_a_table_that_puts_a_video_in_two_subsets_is_named_by_its_file(tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("video,start,end,label,split\na,1,2,hop,train\na,3,4,hop,val\n")
    with pytest.raises(TensorkeepError, match=r"times\.csv: row 3: 'a' is in 'val', above in 'train'"):
        read_sheet(path)


def test_a_frame_of_a_transport_stream_is_decoded_from_its_keyframe_on(tmp_path: Path) -> None:
    """FFmpeg searches one by times of decoding, and MPEG-4 is decoded, wrongly, from any picture on."""
    path = film(tmp_path / "a.ts", b_frames=2)
    read_as_played(path)
    frames = len(frame_table(path).pts)
    alone = [number_of(decode(path, [index])[0]) for index in range(frames)]
    assert alone == list(range(frames))


@pytest.mark.parametrize(("codes", "brightest"), [("optimal", 1), ("default", 1), ("default", 256)])
def test_jpegs_one_after_the_other_are_a_video_and_black_ones_are_whole(
    tmp_path: Path, codes: str, brightest: int
) -> None:
    """An encoder that counts how often each code is used writes areas of one colour as zeros."""
    path, pixels = tmp_path / "a.mjpeg", np.random.default_rng(0).integers(0, brightest, (480, 640, 3), np.uint8)
    with av.open(str(path), "w", format="mjpeg") as out:
        stream = out.add_stream("mjpeg", rate=25, options={"huffman": codes})
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuvj420p"
        stream.codec_context.thread_count = 1  # others have no codes of their own
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        out.mux(stream.encode(None))
    assert (bytes(512) in path.read_bytes()) == (codes == "optimal")
    assert (probe(path).frames, probe(path).problem) == (5, None)


def test_an_empty_packet_within_a_file_does_not_end_it(tmp_path: Path) -> None:
    """Theora has one for a picture that stays, and FFmpeg's decoders take it for the end."""
    frames = 0
    with av.open(str(film(tmp_path / "a.mkv", b_frames=0))) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        hear = decoder(stream)
        for packet in container.demux(stream):
            empty = av.Packet()
            empty.stream, empty.dts = stream, packet.dts
            for one in (empty, packet) if packet.size else (packet,):
                heard = hear(one)
                frames += len(heard.frames)
                assert heard.failed is None
    assert frames == 40
