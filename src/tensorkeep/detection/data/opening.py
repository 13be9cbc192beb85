"""Open video files with PyAV: any container that FFmpeg reads and that lies whole in one file, and nothing else.

Playlists, picture sequences and addresses would have FFmpeg open whatever they name: they are refused by their name.
Needs PyAV (`pip install tensorkeep[detection]`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained

# what a folder's videos end in, in either case; a file that is named is read whatever its ending
VIDEO_SUFFIXES = (
    *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".ts", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob", ".m2ts", ".mts"),
    *(".wmv", ".asf", ".flv", ".f4v", ".ogv", ".gif", ".3gp", ".3g2", ".qt", ".divx", ".mxf", ".dv", ".nut", ".wtv"),
    *(".rm", ".rmvb", ".y4m", ".mjpg", ".mjpeg", ".ivf", ".h264", ".264", ".h265", ".hevc"),
)
MEND = "play it, or write it anew: ffmpeg -i FILE -c:v libx264 NEW.mp4"
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,av1,ivf,mjpeg,flv,live_flv,"
    "asf,ogg,gif,apng,dv,mxf,nut,rm,wtv,yuv4mpegpipe,nsv,swf,vc1,vc1test,dirac,cavsvideo,ea,smk,bink,roq,film_cpk,flic"
)
_ALLOWED = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
_READ = "mp4, mov, mkv, webm, avi, ts, mpg, wmv, flv, ogv, gif and others that FFmpeg reads from one file"
_BOXES = 10_000  # of an MP4 at most are looked at
_ATTACHED = 1024  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: a cover, no video
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://?", re.IGNORECASE)
# the first bytes of what people hand over in place of a video
_OTHERS = (
    (rb"RIFF....WEBP", "a WebP picture"),
    (rb"\x89PNG", "a PNG picture"),
    (rb"\xff\xd8\xff", "a JPEG picture"),
    (rb"BM....\0\0\0\0", "a BMP picture"),
    (rb"(II\*\0|MM\0\*)", "a TIFF picture"),
    (rb"....ftyp(avif|avis|heic|heix|mif1|msf1)", "an AVIF or HEIF picture"),
    (rb"\s*#EXTM3U", "an HLS playlist, no video"),
    (rb"\s*<\?xml.{0,300}<MPD", "a DASH playlist, no video"),
    (rb"\s*<(!doctype html|!DOCTYPE html|html|HTML)", "a web page, no video"),
    (rb"$", "an empty file, no video"),
    (rb"%PDF", "a PDF file"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip file"),
    (rb"(ID3|\xff\xfb|\xff\xf3)", "an MP3 file, no video"),
    (rb"fLaC", "a FLAC file, no video"),
    (rb"RIFF....WAVE", "a WAV file, no video"),
)


@contextlib.contextmanager
def opened(path: str | Path, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """Open a video file; gives PyAV's container and its first stream of moving pictures.

    Args:
        path: the file.
        threads: of the decoder; 0: as many as it can use.

    Raises:
        TensorkeepError: The file is no video or has no video stream, in place of FFmpeg's own errors; or is no file
            (a pipe would be waited for).
    """
    av = import_av()
    if not stat.S_ISREG(file_state(path).st_mode):
        raise TensorkeepError("is no file", where=path, hint="videos are read from files alone")
    opening = True
    with explained(path):
        try:
            name, form = f"file:{Path(path).absolute()}", _bare_jpegs(path)
            with av.open(name, format=form, options=_ALLOWED, **_any_titles(av)) as container:
                opening = False
                yield container, _stream_of(container, path, threads)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):  # of the system, or FFmpeg's word for what lies in the file
                with Path(path).open("rb") as file:
                    file.read(1)
            kind = _other_format(path) if opening else None
            if _lacks_index(path):
                what = "cut short: an MP4 without its index (moov), which is written last"
                raise TensorkeepError(what, where=path, hint="fetch or record it anew") from None
            if kind:
                hint = f"formats that are read: {_READ}"
                raise TensorkeepError(f"is {kind}: its format is not read", where=path, hint=hint) from None
            what = f"cannot be read as a video: {error.strerror}"
            what += f"; formats that are read: {_READ}" if opening else ""
            raise TensorkeepError(what, where=path, hint=MEND) from None


def sought(container: Any, stream: Any, time: int) -> bool:
    """Go to the keyframe at or before a time; return whether it was found, if not the container is of no more use.

    Args:
        container: PyAV's.
        stream: of the container.
        time: in the stream's units.
    """
    try:
        container.seek(time, stream=stream, backward=True)
    except PermissionError:  # FFmpeg's word for a place that it cannot find: not all of its readers can search
        return False
    return True


def _any_titles(av: Any) -> dict[str, str]:
    """Return what `av.open` needs to read titles in any encoding, as older files have them.

    Before version 19 it fails on those that are not UTF-8, if not told; from 19 on it reads all, and cannot be told.
    """
    return {"metadata_errors": "replace"} if hasattr(av.container.Container, "metadata_errors") else {}


def _bare_jpegs(path: str | Path) -> str | None:
    """Return FFmpeg's name for JPEG pictures one after the other, which it takes for a single one otherwise."""
    if Path(path).suffix.lower() not in (".mjpg", ".mjpeg"):
        return None
    with Path(path).open("rb") as file:
        return "mjpeg" if file.read(3) == b"\xff\xd8\xff" else None


def _stream_of(container: Any, path: str | Path, threads: int) -> Any:
    """Return the first stream of moving pictures, its decoder set up. Raises TensorkeepError where there is none."""
    streams = [s for s in container.streams.video if not s.disposition & _ATTACHED]
    if not streams:
        raise TensorkeepError("has no video stream", where=path)
    stream = streams[0]
    if stream.codec_context is None:
        what = f"its pictures are coded in a way that is not decoded here ({container.format.name})"
        raise TensorkeepError(what, where=path, hint=MEND)
    stream.codec_context.thread_type = "AUTO" if threads != 1 else "NONE"
    stream.codec_context.thread_count = threads
    return stream


def _other_format(path: str | Path) -> str | None:
    """Return what a file is by its first bytes, where it is a known thing that is no video."""
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        start = file.read(400)
        return next((name for form, name in _OTHERS if re.match(form, start, re.DOTALL)), None)
    return None


def _lacks_index(path: str | Path) -> bool:
    """Return whether a file begins as an MP4 does, and its boxes end before one that says where its pictures lie."""
    found = [name for name, _ in boxes(path)]
    return found[:1] == [b"ftyp"] and b"mdat" in found and b"moov" not in found


def boxes(path: str | Path) -> Iterator[tuple[bytes, int]]:
    """Give the outermost boxes of an MP4, name and place, at most 10,000.

    Args:
        path: a file; of one that is no MP4 the names mean nothing.
    """
    length, place = Path(path).stat().st_size, 0
    with Path(path).open("rb") as file:
        for _ in range(_BOXES):
            if place + 8 > length:
                return
            file.seek(place)
            head = file.read(16)
            size = int.from_bytes(head[:4], "big")
            size = int.from_bytes(head[8:], "big") if size == 1 else size or length
            yield head[4:8], place
            place += max(size, 8)


def refuse_address(name: str | Path) -> None:
    """Refuse an address in place of a file or a folder; a password in it is not shown.

    Args:
        name: what was given, unchanged: as a path an address has lost a slash.

    Raises:
        TensorkeepError: It is an address.
    """
    if _ADDRESS.match(str(name)) and not Path(name).exists():
        shown = re.sub(r"(?<=//)[^/@]*@", "***@", str(name), count=1)
        raise TensorkeepError("is an address: videos are read from files", where=shown, hint="download it first")


def file_state(path: str | Path) -> os.stat_result:
    """Return size and time of change of a file; a missing file is a TensorkeepError."""
    with explained(path):
        return Path(path).stat()


def quarter_turn(degrees: int) -> int:
    """Return the nearest multiple of 90 degrees in [0, 360): pictures are never turned by less."""
    return round(degrees / 90) * 90 % 360


def import_av() -> Any:
    """Import PyAV.

    Returns:
        The module.

    Raises:
        TensorkeepError: It is missing or too old; it says how to install it.
    """
    hint = "pip install 'tensorkeep[detection]'"
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise TensorkeepError(f"reading videos needs PyAV: {error}", where="video", hint=hint) from error
    # streams have no index before 17.0, which ends Python at some titles; dispositions are no numbers before 17.1
    if not issubclass(getattr(av.stream, "Disposition", object), int):
        what = f"reading videos needs PyAV 17.1 or newer: found {av.__version__}"
        raise TensorkeepError(what, where="video", hint=hint)
    return av
