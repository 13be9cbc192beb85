"""Whole files that are read from their start, named in other letters, or damaged in their sound alone, are healthy."""

from __future__ import annotations

import struct
import sys
from enum import Flag
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

import av

from tensorkeep.detection.data import opening
from tensorkeep.detection.data.containers import probe
from tensorkeep.detection.data.picture_checks import check_pictures
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError

from .films import film, number_of, picture


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.mp4", "a.flv"])
def test_a_title_that_is_no_utf_8_is_no_fault_of_a_video(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, codec="flv1" if name == "a.flv" else "mpeg4", b_frames=0)
    titled = tmp_path / f"titled{path.suffix}"
    with av.open(str(path)) as source, av.open(str(titled), "w") as out:
        out.metadata["title"] = "caf\u00e9"
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = titled.read_bytes()
    assert b"caf\xc3\xa9" in data
    titled.write_bytes(data.replace(b"caf\xc3\xa9", b"caf\xe9\xb5"))  # as older programs wrote it
    assert probe(titled).frames == 40
    assert number_of(decode(titled, [33])[0]) == 33


def test_a_video_is_opened_by_what_every_pyav_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV 19 has neither `metadata_errors`, the argument, nor the attribute, by which it is told from those before."""
    path, told = film(tmp_path / "a.mp4"), []

    def taken(file: str, mode: str | None = None, format: str | None = None, options: Any = None, **others: Any) -> Any:
        told.append(others)
        return av.open(file, mode, format, options)

    for container in (SimpleNamespace(metadata_errors=""), SimpleNamespace()):
        kind = SimpleNamespace(open=taken, error=av.error, container=SimpleNamespace(Container=container))
        monkeypatch.setattr(opening, "import_av", lambda kind=kind: kind)
        with opening.opened(path) as (_, stream):
            assert stream.frames == 40
    assert told == [{"metadata_errors": "replace"}, {}]


def test_a_pyav_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose dispositions are flags that are no numbers, or whose streams have none: seen at its import."""
    for stream in (SimpleNamespace(), SimpleNamespace(Disposition=Flag)):
        monkeypatch.setitem(sys.modules, "av", SimpleNamespace(__version__="15.1.0", stream=stream))
        with pytest.raises(TensorkeepError, match=r"needs PyAV 17\.1 or newer: found 15\.1\.0"):
            opening.import_av()


def test_a_file_that_cannot_be_searched_is_read_from_its_start(tmp_path: Path) -> None:
    path = film(tmp_path / "a.m4v", form="m4v")
    info = probe(path)
    assert info.frames == 40 and info.problem is None
    assert [number_of(shown) for shown in decode(path, [3, 30, 39])] == [3, 30, 39]
    assert check_pictures(path) == []


def test_pictures_with_a_palette_have_its_colours(tmp_path: Path) -> None:
    """An AVI tells the palette once, before the first picture."""
    path, palette = tmp_path / "a.avi", np.random.default_rng(0).integers(0, 255, (256, 4)).astype(np.uint8)
    palette[:, 0] = 255  # opaque
    shown = np.random.default_rng(1).integers(0, 256, (20, 48, 64)).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("rawvideo", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for pixels in shown:
            out.mux(stream.encode(av.VideoFrame.from_ndarray((pixels, palette), "pal8")))
        out.mux(stream.encode(None))
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert plain[0].max() > 200
    for number, pixels in zip([0, 19], decode(path, [0, 19]), strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), plain[number])


def test_fragments_whose_times_begin_below_zero_are_whole(tmp_path: Path) -> None:
    """FFmpeg adds the time before 0 to the length of what comes after it."""
    source, path = film(tmp_path / "whole.mp4", sound=2.0, codec="libx264"), tmp_path / "a.mp4"
    with (
        av.open(str(source)) as whole,
        av.open(str(path), "w", options={"movflags": "delay_moov+frag_keyframe"}) as out,
    ):
        kept = {stream.index: out.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            if packet.dts is not None:
                by = round((0.7 if packet.stream.type == "audio" else 0.5) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - by, packet.dts - by, kept[packet.stream.index]
                out.mux(packet)
    assert probe(path).problem is None


def pages(data: bytes) -> list[tuple[int, int, int]]:
    """Where pages of Ogg begin and end, and their stream's number."""
    found, place = [], 0
    while place < len(data):
        parts = data[place + 27 : place + 27 + data[place + 26]]
        end = place + 27 + len(parts) + sum(parts)
        found.append((place, end, struct.unpack("<I", data[place + 14 : place + 18])[0]))
        place = end
    return found


def heard(path: Path) -> Path:
    """A film of VP8 with noise to be heard."""
    with av.open(str(path), "w", options={"page_duration": "200000"}) as out:
        stream, sound = out.add_stream("libvpx", rate=20), out.add_stream("libopus", rate=48000, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, 12
        for number in range(40):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), "rgb24")))
            noise = np.random.default_rng(number).integers(-9999, 9999, (1, 2400)).astype(np.int16)
            samples = av.AudioFrame.from_ndarray(noise, "s16", "mono")
            samples.sample_rate, samples.pts = 48000, number * 2400
            out.mux(sound.encode(samples))
        out.mux(stream.encode(None))
        out.mux(sound.encode(None))
    return path


def test_an_ogg_that_stops_between_two_pages_is_whole_and_one_that_stops_within_is_cut_short(tmp_path: Path) -> None:
    """Recorders that are stopped, and cutters, write no mark of the end."""
    path = heard(tmp_path / "a.ogv")
    data = path.read_bytes()
    found = pages(data)
    path.write_bytes(data[: found[-2][0]])
    assert probe(path).problem is None and check_pictures(path) == []
    path.write_bytes(data[: found[-2][0] + 40])
    assert "cut short" in str(probe(path).problem)
    path.write_bytes(data[: found[-2][0]] + bytes(3000))
    assert "no last page" in str(probe(path).problem)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("of_sound", [False, True])
def test_damage_to_the_sound_of_an_ogg_alone_is_no_damage_to_its_pictures(
    tmp_path: Path, of_sound: bool, head: bool
) -> None:
    path = heard(tmp_path / "a.ogv")
    assert probe(path).problem is None and probe(path).frames == 40
    data = bytearray(path.read_bytes())
    found = pages(bytes(data))
    shown = next(serial for place, _, serial in found if b"OVP80" in data[place : place + 40])
    begin, end, _ = [page for page in found if (page[2] != shown) == of_sound][4]
    begin += 0 if head else 60
    data[begin : begin + 40] = bytes(byte ^ 255 for byte in data[begin : begin + 40])
    assert begin + 40 < end
    path.write_bytes(data)
    info = probe(path)
    assert (info.problem is None and info.frames == 40) is of_sound
    if of_sound:
        assert number_of(decode(path, [39])[0]) == 39 and check_pictures(path) == []


BEHIND = {
    "a.gif": {"codec": "gif"},
    "a.ts": {"codec": "mpeg2video", "rate": 25},
    "a.mp4": {"codec": "libx264", "movflags": "frag_keyframe+empty_moov"},
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_programs_put_behind_a_video_is_no_cut_and_a_cut_is_still_told(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, b_frames=0, **BEHIND[name])
    data = path.read_bytes()
    for more in (b"\n", b"TAG" + bytes(125), b"Recorded by a camera\r\n" * 20):
        path.write_bytes(data + more)
        assert probe(path).problem is None and probe(path).frames == 40
    path.write_bytes(data[: len(data) * 3 // 4 + 1])
    assert "cut short" in str(probe(path).problem)
