"""Damage that players pass over in silence is named: cut, joined and overwritten files of each kind of container."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

import av

from tensorkeep.detection.data import hearing
from tensorkeep.detection.data.containers import probe
from tensorkeep.detection.data.hearing import decoder
from tensorkeep.detection.data.opening import opened
from tensorkeep.detection.data.picture_checks import check_pictures
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.video import decode
from tensorkeep.detection.data.video_checks import check_video

from .films import film, number_of

BARE = {"a.h264": ("libx264", "h264"), "a.hevc": ("libx265", "hevc")}


def made(path: Path, **how: Any) -> Path:
    """A healthy file, of which nothing is said."""
    path = film(path, b_frames=0, **how)
    assert probe(path).problem is None and check_pictures(path) == []
    return path


def bare(path: Path, frames: int = 48) -> Path:
    """A stream of H.264 or HEVC without a container; x265 asks for pictures of 64 x 64 at least."""
    codec, form = BARE[path.name]
    with av.open(str(path), "w", format=form) as out:
        stream = out.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        context = stream.codec_context
        context.gop_size, context.thread_count, context.max_b_frames = 12, 1, 0
        quiet = {"x265-params": "log-level=none:pools=none:keyint=12:min-keyint=12:open-gop=0"}
        context.options = {"preset": "ultrafast", **(quiet if codec == "libx265" else {})}
        for number in range(frames):
            shown = np.random.default_rng(number // 12).integers(60, 200, (12, 16, 3)).astype(np.uint8)
            pixels = np.roll(np.kron(shown, np.ones((8, 8, 1), np.uint8)), number, 1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        out.mux(stream.encode(None))
    assert probe(path).problem is None
    return path


def starts(path: Path) -> list[tuple[int, bool]]:
    """Where packets lie, and whether decoding may start there."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("byte", [0, 77])
def test_pictures_of_a_bare_stream_that_noise_or_zeros_overwrite_are_told(tmp_path, name, byte):
    path = bare(tmp_path / name)
    begin, end = [at for at, key in starts(path) if key][2:4]
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(1).integers(1, 255, end - begin, dtype=np.uint8).tobytes()
    data[begin:end] = noise if byte else bytes(end - begin)
    path.write_bytes(data)
    info = probe(path)
    assert info.frames == 36 and "near frame 2" in str(info.problem)
    assert [problem.kind for problem in check_video(path)] == ["damaged video"]


def test_a_bare_stream_that_ends_within_a_picture_is_cut_short(tmp_path):
    path = bare(tmp_path / "a.h264")
    begin, end = [at for at, _ in starts(path)][24:26]
    path.write_bytes(path.read_bytes()[: begin + (end - begin) // 2])
    info = probe(path)
    assert info.frames == 24 and "cut short: 24 whole frames in 1.20 s" in str(info.problem)


CUT = {
    "a.mjpeg": {"codec": "mjpeg", "form": "mjpeg"},
    "a.mkv": {},
    "a.avi": {},
    "a.flv": {"codec": "flv1"},
    "a.mxf": {"codec": "mpeg2video", "rate": 25},
    "a.apng": {"codec": "apng", "form": "apng"},
    "a.ivf": {"codec": "libvpx", "form": "ivf"},
}


def simple(path: Path, frames: int = 40) -> Path:
    """A file of pictures one after the other."""
    how = dict(CUT[path.name])
    if path.suffix not in (".mjpeg", ".apng"):
        return made(path, frames=frames, **how)
    with av.open(str(path), "w", format=how["form"]) as out:
        stream = out.add_stream(how["codec"], rate=20)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb24" if path.suffix == ".apng" else "yuvj420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            pixels = np.roll(np.kron(np.eye(6, 8, dtype=np.uint8) * 200, np.ones((8, 8), np.uint8)), number, 1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([pixels] * 3, -1), "rgb24")))
        out.mux(stream.encode(None))
    assert probe(path).problem is None and check_pictures(path) == []
    return path


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_lacks_its_last_picture_and_no_more_is_cut_short(tmp_path, name):
    path = simple(tmp_path / name)
    last = starts(path)[-1][0]
    keep = last + 30 if path.suffix == ".mjpeg" else last  # pictures alone, whose number nothing says
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut short" in str(probe(path).problem)
    assert [problem.kind for problem in check_video(path)] == ["truncated video"]


def frames_of_one_size(path: Path) -> Path:
    """A raw YUV4MPEG or DV file, written by hand: 6 grey pictures."""
    if path.suffix == ".y4m":
        path.write_bytes(b"YUV4MPEG2 W16 H16 F20:1 Ip C420jpeg\n" + (b"FRAME\n" + bytes([90]) * 384) * 6)
        return path
    with av.open(str(path), "w", format="dv") as out:
        stream = out.add_stream("dvvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 720, 576, "yuv420p"
        stream.codec_context.thread_count = 1
        for _ in range(6):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((576, 720, 3), 90, np.uint8), "rgb24")))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["a.y4m", "a.dv"])
def test_frames_of_one_size_are_cut_short_or_overwritten(tmp_path, name):
    path = frames_of_one_size(tmp_path / name)
    assert probe(path).frames == 6 and check_pictures(path) == []
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-50])
    assert "cut short" in str(probe(path).problem)
    half, zeros, said = len(data) // 2, 400, "cannot be read further behind frame 2"
    if name == "a.dv":
        zeros, said = 20_000, "blocks are overwritten"
    data[half : half + zeros] = bytes(zeros)
    path.write_bytes(data)
    info = probe(path)
    assert said in str(info.problem)
    problems: list[Problem] = []
    assert len(decode(path, range(info.frames), broken="keep", problems=problems)) == info.frames


JOINED = {
    "a.mp4": {},
    "a.mov": {"movflags": "faststart"},
    "a.wmv": {"codec": "wmv2", "form": "asf"},
    "a.wtv": {"codec": "mpeg2video", "rate": 25},
}


@pytest.mark.parametrize("name", JOINED)
def test_a_second_file_behind_the_first_is_named_with_its_length(tmp_path, name):
    path = film(tmp_path / name, b_frames=0, **JOINED[name])
    one = path.read_bytes()
    assert probe(path).problem is None
    path.write_bytes(one * 2)
    info = probe(path)
    assert info.frames == 40 and f"the last {len(one)} bytes, behind frame 39" in str(info.problem)
    assert "another recording" in str(info.problem)
    assert number_of(decode(path, [39])[0]) == 39


def test_fragments_with_an_index_before_each_are_whole(tmp_path):
    path = film(tmp_path / "a.mp4", b_frames=0, movflags="frag_keyframe+empty_moov+default_base_moof")
    data = path.read_bytes()
    first = data.find(b"moof") - 4
    second = data.find(b"moof", first + 8) - 4
    path.write_bytes(data[:second] + data[:first] + data[second:])  # as players of live streams save them
    info = probe(path)
    assert info.problem is None and info.frames == 40


def test_packets_that_a_transport_stream_lacks_are_told_by_their_count(tmp_path):
    path = film(tmp_path / "a.ts", 60, codec="libx264", b_frames=0)
    begin, end = [at for at, key in starts(path) if key][2:4]
    data = path.read_bytes()
    path.write_bytes(data[:begin] + data[end:])
    info = probe(path)
    assert "footage is lost" in str(info.problem) and "packets of the stream are missing" in str(info.problem)


def test_what_a_decoder_mends_in_silence_is_heard_and_nothing_else_is_logged(tmp_path, caplog):
    path = film(tmp_path / "a.mkv", codec="ffv1", b_frames=0, write_crc32="0")
    at, end = [at for at, _ in starts(path)][20:22]
    data = bytearray(path.read_bytes())
    data[(at + end) // 2] ^= 255
    path.write_bytes(data)
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    with caplog.at_level(logging.DEBUG):
        problems = [problem.message for problem in check_pictures(path)]
    assert problems == ["frames 20 to 23 (1.00 to 1.15 s) are damaged"]  # the next keyframe mends it
    assert not caplog.records and (av.logging.get_level(), av.logging.get_skip_repeated()) == before
    with opened(path, threads=0) as (container, stream):  # a decoder with threads of its own is not listened to
        hear = decoder(stream)
        assert not any(hear(packet).complained for packet in container.demux(stream))


def test_a_loaders_process_that_is_made_while_a_thread_listens_does_not_wait_for_it(tmp_path):
    path = film(tmp_path / "a.mp4")
    with hearing._lock:  # a decoding thread's, at the moment of an evaluation's fork
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if len(decode(path, [3, 30])) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
