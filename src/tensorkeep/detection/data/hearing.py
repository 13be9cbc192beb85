"""Decode a packet and hear whether the decoder complains: FFmpeg mends some damage with no flag on the picture.

PyAV keeps FFmpeg's log off. It is on here for the time of one packet, in the thread that decodes it alone, and only
where the decoder has no threads of its own (they would wait for Python's lock); what other threads log meanwhile is
dropped, as it is outside. Needs PyAV (`pip install tensorkeep[detection]`).
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

# what decoders say of sound files too: of headers beside the pictures, of padding, and of pictures before a start
_HARMLESS = re.compile(r"\b(SEI|VPS|SPS|PPS|APP\w*|COM|EXIF|ICC)\b|overread|non-existing|no frame!|Unsupported", re.I)
_NO_PICTURE = re.compile("[Hh]eader packet")  # of the second of two joined recordings, in Ogg
# H.264 after a start that is no IDR picture; its damaged pictures have a flag
_AFTER_SEEKING = re.compile(r"mmco|co located|reference frames|[Rr]eference picture|Frame num|short term|Missing ref")
_ERROR = 16  # FFmpeg's AV_LOG_ERROR; below it is worse
_lock = threading.Lock()
# level and whether repetitions are left out, of before, one for each listener
_inside: list[tuple[int | None, bool]] = []


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


def decoder(stream: Any, *, from_start: bool = False) -> Callable[[Any], Heard]:
    """Make what decodes the packets of a stream.

    Args:
        stream: PyAV's, of video, opened as it will be decoded.
        from_start: whether all packets are decoded in turn, so that nothing that one refers to can be missing.

    Returns:
        Decodes a packet, whatever is wrong with it.
    """
    context, failure = stream.codec_context, importlib.import_module("av.error").FFmpegError
    logging, name, own = importlib.import_module("av.logging"), context.name, context.codec.name
    alone = context.thread_count == 1 and context.thread_type.name == "NONE"

    def decoded(packet: Any) -> Heard:
        if not packet.size and packet.dts is not None:  # Theora's for a picture that stays: FFmpeg takes it for the end
            return Heard([], None, False)
        words: list[tuple[int, str, str]] = []
        frames, failed = [], None
        try:
            if alone:
                with _Listening(logging), logging.Capture(local=False), logging.Capture(local=True) as words:
                    frames = packet.decode()
            else:
                frames = packet.decode()
        except failure as error:
            failed = str(error.strerror)
        if not words:
            return Heard(frames, failed, False)
        said = [message for level, who, message in words if level <= _ERROR and who == own]
        if failed and any(_NO_PICTURE.search(message) for message in said):
            return Heard([], None, False)
        return Heard(frames, failed, any(_counts(name, message, from_start) for message in said))

    return decoded


def _counts(name: str, message: str, from_start: bool) -> bool:
    """Return whether what a decoder says means that a picture is damaged."""
    if _HARMLESS.search(message):
        return False
    return from_start or name != "h264" or not _AFTER_SEEKING.search(message)


class _Listening:
    """Has FFmpeg's errors logged, by whatever thread, as long as one listens."""

    __slots__ = ("logging",)

    def __init__(self, logging: Any) -> None:
        self.logging = logging

    def __enter__(self) -> None:
        with _lock:
            if not _inside:
                level = self.logging.get_level()
                _inside.append((level, self.logging.get_skip_repeated()))
                if level is None or level < _ERROR:
                    self.logging.set_level(_ERROR)
                self.logging.set_skip_repeated(False)
            else:
                _inside.append(_inside[0])

    def __exit__(self, *error: object) -> None:
        with _lock:
            level, skipping = _inside.pop()
            if not _inside:
                self.logging.set_level(level)
                self.logging.set_skip_repeated(skipping)


def _begin_anew() -> None:
    """In a forked process: nobody listens, whatever other threads did when it was made."""
    global _lock
    _lock = threading.Lock()
    _inside.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
