"""Videos as people have them: made by `ffmpeg` from numbered pictures, or by rewriting the bytes of a made one.

All are small and whole: each plays to its end. `healthy_videos.txt` names them by kind; `rewritten` adds those that
ffmpeg does not write. Needs the program `ffmpeg` with libx264, libx265, libvpx, libaom, libtheora.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

TABLE = Path(__file__).with_suffix(".txt")
FFMPEG = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-nostdin", "-y"]
WORDS = "1\n00:00:00,200 --> 00:00:02,000\na word\n\n"
OWN = {"n": "72", "rate": "25", "size": "128x64", "sound": ""}


def picture(number: int, width: int, height: int) -> np.ndarray:
    """Draw a moving texture under eight bright or dark squares that are the bits of its number."""
    y, x = np.mgrid[0:height, 0:width]
    base = 96 + 40 * np.sin((x + 3 * number) / 9.0) + 30 * np.cos((y - 2 * number) / 7.0)
    noise = np.random.default_rng(number * 7).integers(-12, 12, base.shape)
    base = np.clip(base.astype(np.uint8) + noise, 0, 255).astype(np.uint8)
    pixels = np.stack([base, np.roll(base, 5, 1), np.roll(base, 9, 0)], -1)
    square = width // 8
    for bit in range(8):
        pixels[:square, bit * square : (bit + 1) * square] = 235 if number >> bit & 1 else 20
    return pixels


@lru_cache(maxsize=8)
def pictures(number: int, size: str) -> bytes:
    """Return the first pictures as raw bytes."""
    width, height = map(int, size.split("x"))
    return b"".join(picture(k, width, height).tobytes() for k in range(number))


def table() -> Iterator[tuple[str, str, list[str]]]:
    """Give kind, name and what ffmpeg is told of each file in the table, in its order."""
    names: dict[str, str] = {}
    for line in TABLE.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(" | ")]
        if len(parts) == 1:
            name, _, value = line.partition(" = ")
            names[f"${name}"] = value
            continue
        told = [word for each in parts[2].split() for word in names.get(each, each).split()]
        yield parts[0], parts[1], told


def make(folder: Path, kind: str, name: str, told: list[str]) -> str:
    """Write one file of the table; returns what ffmpeg says where it cannot."""
    out = folder / kind / name
    if out.exists():
        return ""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f"part.{name}")
    own = OWN | dict(word.split("=") for word in told if word.partition("=")[0] in OWN)
    rest = [word for word in told if word.partition("=")[0] not in OWN]
    rest = [f"{folder}/{word[1:]}" if word.startswith("@") else word for word in rest]
    raw = b""
    if "-i" not in rest:
        raw = pictures(int(own["n"]), own["size"])
        rest = ["-threads", "1", *rest]
        sound = ["-f", "lavfi", "-t", own["sound"], "-i", "sine=440:sample_rate=44100"] if own["sound"] else []
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", own["size"], "-r", own["rate"], "-i", "pipe:"]
        rest = [*source, *sound, *rest]
    ran = subprocess.run([*FFMPEG, *rest, str(made)], input=raw, capture_output=True)
    if ran.returncode or not made.exists() or not made.stat().st_size:
        made.unlink(missing_ok=True)
        return ran.stderr.decode(errors="replace").strip()[-300:] or "an empty file"
    made.replace(out)
    return ""


def make_all(folder: Path, part: str = "") -> None:
    """Write all files to a folder, KIND/NAME; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.srt").write_text(WORDS)
    cover = ["-f", "lavfi", "-i", "color=red:s=64x64:d=0.04", "-frames:v", "1", str(folder / "cover.png")]
    subprocess.run([*FFMPEG, *cover], check=True)
    for kind, name, told in table():
        if failed := make(folder, kind, name, told):
            print(f"not made: {kind}/{name}: {failed}", flush=True)
    for name, (source, rewrite) in rewritten().items():
        if not (folder / source).exists():
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rewrite((folder / source).read_bytes()))


Rewrite = Callable[[bytes], bytes]


def rewritten() -> dict[str, tuple[str, Rewrite]]:
    """Return the files that are made from the bytes of another: name -> source, and how."""
    made: dict[str, tuple[str, Rewrite]] = {}
    for name in ("h264a.ts", "mpeg2.ts", "hevc.ts", "opengop.ts", "open.ts", "cbr.ts", "stilla.ts", "h264.m2ts"):
        for start in (1, 5_001, 20_011):
            source = f"transport_stream/{name}"
            made[f"transport_stream/from{start}.{name}"] = source, lambda d, s=start: d[min(s, len(d) // 3) :]
    for name in ("mpeg2.mpg", "mpeg2a.mpg", "stilla.mpg", "a.vob", "dvd.vob", "mpeg1a.mpg", "svcd.mpg"):
        for part in (0.2, 0.37, 0.51):
            source = f"mpeg-ps/{name}"
            made[f"mpeg-ps/any{part}.{name}"] = source, lambda d, p=part: d[int(len(d) * p) :]
            made[f"mpeg-ps/from{part}.{name}"] = source, lambda d, p=part: d[_pack(d, p) :]
    for name in ("h264.mkv", "h264a.mkv", "hevc.mkv", "ffv1.mkv", "av1.mkv"):
        made[f"matroska/nocues.{name}"] = f"matroska/{name}", without_cues
    for name in ("jpeg.avi", "mpeg4.avi", "mpeg4a.avi", "jpega.avi", "xvid.avi"):
        made[f"avi/opendml.{name}"] = f"avi/{name}", open_dml
        made[f"avi/dropped.{name}"] = f"avi/{name}", dropped
        made[f"avi/droppedend.{name}"] = f"avi/{name}", lambda d: dropped(d, (68, 69, 70, 71))
    for name in ("mp4/h264.mp4", "mp4/h264a.mp4", "mp4/hevc.mp4", "mp4/mpeg4.mp4"):
        kind, stem = name.split("/")
        for edit, rows in EDITS.items():
            made[f"{kind}/edit{edit}.{stem}"] = name, lambda d, r=rows: edited(d, r)
        made[f"{kind}/free.{stem}"] = name, lambda d: d + struct.pack(">I4s", 1008, b"free") + bytes(1000)
        made[f"{kind}/padded.{stem}"] = name, lambda d: d + bytes(4096)
        made[f"{kind}/uuid.{stem}"] = (
            name,
            lambda d: d + struct.pack(">I4s", 524, b"uuid") + bytes(range(256)) * 2 + b"word",
        )
    for name in ("keyplain.mp4", "key265.mp4", "cmaf264.mp4", "dash265.mp4"):
        made[f"fragmented_mp4/later.{name}"] = f"fragmented_mp4/{name}", later_fragments
    for name in ("h264.h264", "open.h264", "mpeg2.m2v", "mpeg1.m1v", "closed.hevc", "open.hevc"):
        for part in (0.2, 0.37):
            made[f"bare/any{part}.{name}"] = f"bare/{name}", lambda d, p=part: d[int(len(d) * p) :]
    for name in (
        "webm/vp8alive.webm",
        "webm/vp9.webm",
        "webm/h264live.mkv",
        "webm/vp8astilllive.webm",
        "matroska/livea.mkv",
    ):
        kind, stem = name.split("/")
        made[f"{kind}/unknown.{stem}"] = name, open_clusters
    for name in ("moving.gif", "still.gif"):
        made[f"pictures/zeros.{name}"] = f"pictures/{name}", lambda d: d + bytes(100)
    return made


def _pack(data: bytes, part: float) -> int:
    """Return where a program stream's next pack begins."""
    return data.find(b"\0\0\1\xba", int(len(data) * part))


def without_cues(data: bytes) -> bytes:
    """Turn a Matroska file's index into padding."""
    place, out = data.rfind(b"\x1c\x53\xbb\x6b"), bytearray(data)
    width = 9 - data[place + 4].bit_length()
    size = int.from_bytes(data[place + 4 : place + 4 + width], "big") - (1 << 7 * width)
    rest = 4 + width + size - 9
    out[place : place + 9] = b"\xec\x01" + rest.to_bytes(7, "big")
    out[place + 9 : place + 9 + rest] = bytes(rest)
    return bytes(out)


def open_clusters(data: bytes) -> bytes:
    """Leave out the lengths of a WebM's clusters, as browsers do that record."""
    out, place = bytearray(data), data.find(b"\x1f\x43\xb6\x75")
    while place >= 0:
        width = 9 - data[place + 4].bit_length()
        out[place + 4 : place + 4 + width] = bytes([(2 << (8 - width)) - 1]) + b"\xff" * (width - 1)
        place = data.find(b"\x1f\x43\xb6\x75", place + 4)
    return bytes(out)


def _chunks(data: bytes, start: int, end: int) -> list[tuple[bytes, bytes]]:
    found = []
    while start + 8 <= end:
        size = struct.unpack("<I", data[start + 4 : start + 8])[0]
        found.append((data[start : start + 4], data[start + 8 : start + 8 + size]))
        start += 8 + size + size % 2
    return found


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _avi(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return what lies before an AVI's pictures and sound, without its RIFF head, and their chunks."""
    movi = data.find(b"movi") - 8
    size = struct.unpack("<I", data[movi + 4 : movi + 8])[0]
    return data[12:movi], _chunks(data, movi + 12, movi + 8 + size)


def _riff(form: bytes, before: bytes, chunks: list[tuple[bytes, bytes]], *, index: bool = True) -> bytes:
    """Write one RIFF of an AVI with an index of its chunks."""
    body, rows = b"movi", b""
    for name, content in chunks:
        rows += name + struct.pack("<III", 16, len(body), len(content))
        body += _chunk(name, content)
    return _chunk(b"RIFF", form + before + _chunk(b"LIST", body) + (_chunk(b"idx1", rows) if index else b""))


def open_dml(data: bytes) -> bytes:
    """Write an AVI as one of OpenDML: the second half of it in a RIFF of its own, which the old index does not have."""
    before, chunks = _avi(data)
    half = len(chunks) // 2
    return _riff(b"AVI ", before, chunks[:half]) + _riff(b"AVIX", b"", chunks[half:], index=False)


def dropped(data: bytes, places: tuple[int, ...] = (10, 11, 30, 31, 32, 33, 34, 35, 36, 37)) -> bytes:
    """Empty the chunks of some pictures of an AVI, as programs that capture do where one came too late."""
    before, chunks = _avi(data)
    number, out = -1, []
    for name, content in chunks:
        number += name[2:] == b"dc"
        out.append((name, b"" if name[2:] == b"dc" and number in places else content))
    return _riff(b"AVI ", before, out)


EDITS = {
    "two": [(600, 0), (600, 1440)],
    "backwards": [(600, 1440), (600, 0)],
    "twice": [(600, 480), (600, 480)],
    "late": [(500, None), (900, 480)],
    "cut": [(1200, 600)],
    "three": [(400, 200), (400, 1000), (400, 1800)],
    "onegap": [(600, 0), (500, None), (600, 1440)],
}


def edited(data: bytes, rows: list[tuple[int, int | None]]) -> bytes:
    """Give the first track of an MP4 an edit list: milliseconds of each part, and where it lies, None for nothing."""
    out, start = bytearray(data), data.find(b"edts") - 4
    unit = struct.unpack(">I", data[data.find(b"mdhd") + 16 : data.find(b"mdhd") + 20])[0]
    shift = struct.unpack(">i", data[start + 28 : start + 32])[0]
    length = int.from_bytes(data[start : start + 4], "big")
    body = b"".join(
        struct.pack(">IiI", ms, -1 if at is None else at * unit // 1000 + shift, 1 << 16) for ms, at in rows
    )
    made = struct.pack(">I4sI4sII", 24 + len(body), b"edts", 16 + len(body), b"elst", 0, len(rows)) + body
    for box in (b"moov", b"trak"):  # behind the pictures, whose places so stay what they are
        at = data.find(box) - 4
        out[at : at + 4] = struct.pack(">I", int.from_bytes(data[at : at + 4], "big") + len(made) - length)
    out[start : start + length] = made
    return bytes(out)


def later_fragments(data: bytes) -> bytes:
    """Leave out the first fragments of an MP4 behind its header, as who joins a stream late gets it."""
    places, place = [], 0
    while place + 8 <= len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        places += [place] if data[place + 4 : place + 8] == b"moof" else []
        place += max(size, 8)
    return data[: places[0]] + data[places[len(places) // 3] :]
