"""Videos as people have them are read whole and not blamed; what damage their formats' own counting shows is told.

The whole corpus, and what stays silent: `python -m benchmarks.damaged_videos`.
"""

import itertools
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av
from benchmarks.healthy_videos import dropped, open_clusters, open_dml

from tensorkeep.detection.data.containers import probe
from tensorkeep.detection.data.picture_checks import check_pictures
from tensorkeep.detection.data.stamps import rising, signed
from tensorkeep.detection.data.video import decode

from .films import film, number_of, presented
from .test_odd_files import read_as_played

PAUSE = [*range(20), *range(45, 65)]  # frame times; the sound goes on


def noise(data: bytes, start: int, number: int) -> bytes:
    """The same bytes with some of no meaning in place of theirs."""
    return data[:start] + np.random.default_rng(1).integers(1, 255, number, np.uint8).tobytes() + data[start + number :]


def found(path: Path) -> str:
    """All that is said of a file."""
    return "; ".join(problem.message for problem in check_pictures(path))


@pytest.mark.parametrize(("name", "codec"), [("a.mpg", "mpeg2video"), ("a.vob", "mpeg2video"), ("b.mpg", "mpeg1video")])
def test_a_program_stream_whose_pictures_pause_while_its_sound_goes_on_is_whole(tmp_path, name, codec):
    form = "vob" if name.endswith("vob") else "mpeg"
    path = film(tmp_path / name, rate=25, codec=codec, sound=3, times=PAUSE, unit=Fraction(1, 25), form=form)
    assert probe(path).problem is None
    assert probe(path).frames == 40
    data = path.read_bytes()
    pack = data.find(b"\0\0\1\xba", len(data) // 2)
    path.write_bytes(noise(data, pack, 3000))
    assert probe(path).problem or found(path)


@pytest.mark.parametrize("sound", [1, 3, 5])
@pytest.mark.parametrize("late", [0, 800])
def test_a_wmv_whose_sound_begins_or_ends_elsewhere_is_whole(tmp_path, sound, late):
    path = film(tmp_path / "a.wmv", codec="wmv2", sound=sound, times=[late + 50 * k for k in range(40)], b_frames=0)
    read_as_played(path)


def test_a_packet_of_a_wmv_that_is_overwritten_is_told(tmp_path):
    path = film(tmp_path / "a.wmv", codec="wmv2", sound=2, b_frames=0)
    data = path.read_bytes()
    first = data.find(b"\x82\0\0", data.find(bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")))
    path.write_bytes(noise(data, first + 3 * 3200, 40))
    assert "packets are overwritten" in str(probe(path).problem)


def test_h264_in_asf_is_shown_in_the_order_of_its_pictures(tmp_path):
    """ASF has times of decoding alone, by which the pictures would come in that order."""
    path = film(tmp_path / "a.asf", codec="libx264")
    assert [number_of(one) for one in decode(path, range(40))] == presented(path)[1] == list(range(40))
    assert found(path) == ""


def test_times_that_begin_below_zero_in_ogg_are_what_they_are():
    meant = list(range(-6, 20))
    assert [signed("ogg", time + (1 << 58) if time < 7 else time) for time in meant] == meant
    assert signed("ogg", None) is None
    assert signed("mpegts", 1 << 58) == 1 << 58


def test_a_picture_that_lacks_its_time_gets_the_one_between_its_neighbours():
    times = [None if k == 12 else 3 * k for k in range(30)]
    assert rising(times, 0.01, 25, [], False)[0].tolist() == [3 * k for k in range(30)]
    few = [None if k % 2 else 3 * k for k in range(30)]
    assert rising(few, 0.01, 25, [], False)[0].tolist() == list(range(30))


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4"])
def test_pictures_that_an_avi_leaves_out_anywhere_are_no_damage(tmp_path, codec):
    source = film(tmp_path / "a.avi", codec=codec, b_frames=0).read_bytes()
    for places in ((10, 11, 30), (37, 38, 39)):
        path = tmp_path / f"dropped{places[0]}.avi"
        path.write_bytes(dropped(source, places))
        assert found(path) == ""
        assert probe(path).frames == 37


def test_an_avi_in_parts_is_whole_until_it_is_cut_within_one(tmp_path):
    path = film(tmp_path / "a.avi", codec="mjpeg", sound=2, b_frames=0)
    path.write_bytes(open_dml(path.read_bytes()))
    read_as_played(path)
    path.write_bytes(path.read_bytes()[:-3000])
    assert "cut short" in str(probe(path).problem)


def test_a_webm_whose_clusters_have_no_lengths_is_whole(tmp_path):
    path = film(tmp_path / "a.webm", codec="libvpx", b_frames=0, live="1", cluster_time_limit="500")
    path.write_bytes(open_clusters(path.read_bytes()))
    read_as_played(path)


FRAGMENTS = ["frag_keyframe+empty_moov+default_base_moof", "frag_every_frame+empty_moov", "cmaf", "frag_keyframe"]


@pytest.mark.parametrize("flags", FRAGMENTS)
def test_a_fragmented_mp4_is_told_where_its_parts_do_not_follow_one_another(tmp_path, flags):
    """Players stop there, in silence: of 50 such files of which 8 % were overwritten nothing was said."""
    path = film(tmp_path / "a.mp4", codec="libx264", b_frames=0, movflags=flags)
    read_as_played(path)
    data = path.read_bytes()
    path.write_bytes(data + bytes(3000))
    read_as_played(path)
    parts = [place for place in range(len(data)) if data[place + 4 : place + 8] == b"moof"]
    middle = parts[len(parts) // 2]
    for torn in (noise(data, middle, 30), data[: middle + 200], data[:middle] + data[middle + 500 :]):
        path.write_bytes(torn)
        assert re.search("cut short|fragments are missing", str(probe(path).problem))


def test_a_second_mp4_behind_padding_is_told(tmp_path):
    path = film(tmp_path / "a.mp4")
    data = path.read_bytes()
    path.write_bytes(data + bytes(4000))
    read_as_played(path)
    path.write_bytes(data + bytes(4000) + data)
    assert f"the last {len(data)} bytes" in str(probe(path).problem)


def test_a_part_of_a_matroska_file_that_is_not_what_was_written_is_told(tmp_path):
    """VP8's pictures have nothing by which a decoder would see that they are others."""
    path = film(tmp_path / "a.mkv", codec="libvpx", b_frames=0, cluster_time_limit="500")
    read_as_played(path)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        place = next(p.pos for p in itertools.islice(container.demux(video=0), 25, 26))
    data[place + 60] ^= 1
    path.write_bytes(data)
    assert "checksums of 1 of its 4 parts do not fit, in pictures or in sound, the first near" in str(
        probe(path).problem
    )
    assert int(str(probe(path).problem).split()[-1]) <= 25


def test_an_flv_that_states_no_length_is_told_where_it_ends_within_a_picture(tmp_path):
    path = film(tmp_path / "a.flv", codec="flv", b_frames=0, flvflags="no_duration_filesize")
    read_as_played(path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "cut short" in str(probe(path).problem)


def test_zeros_in_a_gif_are_told_and_zeros_behind_it_are_not(tmp_path):
    path = film(tmp_path / "a.gif", rate=10, codec="gif")
    data = path.read_bytes()
    path.write_bytes(data + bytes(50))
    assert found(path) == ""
    path.write_bytes(data[: len(data) // 2] + bytes(3000) + data[len(data) // 2 + 3000 :])
    assert "no part of a GIF" in str(probe(path).problem)


@pytest.mark.parametrize("fill", [0, 255])
def test_packets_of_a_transport_stream_that_are_overwritten_are_told(tmp_path, fill):
    path = film(tmp_path / "a.ts", codec="libx264", sound=2)
    data = path.read_bytes()
    path.write_bytes(data + bytes([fill]) * 1880)
    assert "overwritten" not in str(probe(path).problem)
    path.write_bytes(data[: 188 * 60 + 50] + bytes([fill]) * 400 + data[188 * 60 + 450 :])
    assert "overwritten" in str(probe(path).problem)
