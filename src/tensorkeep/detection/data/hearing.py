"""Decode a packet and hear whether the decoder complains: FFmpeg mends some damage with no flag on the picture.

PyAV keeps FFmpeg's log off. It is on here for the time of one packet, in the thread that decodes it alone, and only
where the decoder has no threads of its own (they would wait for Python's lock); what other threads log meanwhile is
dropped, as it is outside. Needs PyAV (`pip install tensorkeep[detection]`).
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

# what decoders say of sound files too: of headers beside the pictures, of padding, and of pictures before a start
_HARMLESS = re.compile(r"\b(SEI|VPS|SPS|PPS|APP\w*|COM|EXIF|ICC)\b|overread|non-existing|no frame!|Unsupported", re.I)
_NO_PICTURE = re.compile("[Hh]eader packet")  # of the second of two joined recordings, in Ogg
# H.264 after a start that is no IDR picture; its damaged pictures have a flag
_AFTER_SEEKING = re.compile(r"mmco|co located|reference frames|[Rr]eference picture|Frame num|short term|Missing ref")
_ERROR = 16  # FFmpeg's AV_LOG_ERROR; below it is worse
_lock = threading.Lock()
_inside: list[
    tuple[int | None, bool]
] = []  # level and whether repetitions are left out, of before, one for each listener


class Heard(NamedTuple):
    """What came of a packet.

    Attributes:
        frames: PyAV's, those that came out of the decoder.
        failed: FFmpeg's word for why nothing of it can be decoded; None where it was.
        complained: whether the decoder said that something is wrong with a picture.
    """

    frames: list[Any]
    failed: str | None
    complained: bool


def decoded(packet: Any, *, from_start: bool = False) -> Heard:
    """Decode a packet.

    Args:
        packet: PyAV's, of a video stream.
        from_start: whether everything before it was decoded, so that nothing that it refers to can be missing.
    """
    context, error = packet.stream.codec_context, importlib.import_module("av.error")
    alone = context.thread_count == 1 and context.thread_type.name == "NONE"
    frames, failed = [], None
    listening: AbstractContextManager[list[tuple[int, str, str]]] = _listening() if alone else nullcontext([])
    with listening as words:
        try:
            frames = packet.decode()
        except error.FFmpegError as found:
            failed = str(found.strerror)
    said = [message for level, name, message in words if level <= _ERROR and name == context.codec.name]
    if failed and any(_NO_PICTURE.search(message) for message in said):
        return Heard([], None, False)
    return Heard(frames, failed, any(_counts(context.name, message, from_start) for message in said))


def _counts(name: str, message: str, from_start: bool) -> bool:
    """Return whether what a decoder says means that a picture is damaged."""
    if _HARMLESS.search(message):
        return False
    return from_start or name != "h264" or not _AFTER_SEEKING.search(message)


@contextmanager
def _listening() -> Iterator[list[tuple[int, str, str]]]:
    """Collect the errors that FFmpeg logs in this thread: level, who says it, what."""
    logging = importlib.import_module("av.logging")
    with _lock:
        level = logging.get_level()
        _inside.append((level, logging.get_skip_repeated()) if not _inside else _inside[0])
        if level is None or level < logging.ERROR:
            logging.set_level(logging.ERROR)
        logging.set_skip_repeated(False)
    try:
        with logging.Capture(local=False), logging.Capture(local=True) as words:
            yield words
    finally:
        with _lock:
            level, skipping = _inside.pop()
            if not _inside:
                logging.set_level(level)
                logging.set_skip_repeated(skipping)
