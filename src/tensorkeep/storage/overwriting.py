"""What `--overwrite` may replace: what is of the kind that is being written, and nothing else.

The rule is `refuse_existing`, for every local sink; stores ask `refuse_strangers` of it. A kind says what at a place is
no part of it: `formats.earlier` for checkpoints, `lone_file` for pages, subtitles and the like.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError, printable
from tensorkeep.storage.files import explained

_HEAD = 16 << 10  # bytes that must show what a file is


class Kind(NamedTuple):
    """What is written at a place, and may be replaced there.

    Attributes:
        word: what messages call it, "a checkpoint".
        strangers: lists what a path holds that is no part of it, relative to the path; a lone file that is none of the
            kind lists itself. It never follows links.
    """

    word: str
    strangers: Callable[[Path], Sequence[str]]


def refuse_existing(final: Path, overwrite: bool, kind: Kind | None = None) -> None:
    """Raise before any work is done where the place is taken.

    An empty folder counts as free; a link never does.

    Args:
        final: the path to be written.
        overwrite: whether what stands there may be replaced.
        kind: what it must be to be replaced; None for a file that is known by its name alone (a run's own), which
            also replaces a link to a file.

    Raises:
        TensorkeepError: it exists and `overwrite` is not set, it is a link, or it is or holds something else than
            `kind`; the first few strangers are named and all are counted.
    """
    with explained(final):
        if final.is_symlink() and (kind is not None or final.is_dir()):
            raise TensorkeepError(
                f"is a symbolic link to {printable(str(final.readlink()))}",
                where=final,
                hint="name that place itself, or remove the link",
            )
        if not os.path.lexists(final) or (final.is_dir() and not any(final.iterdir())):
            return
        if not overwrite:
            raise TensorkeepError(
                "exists already",
                where=final,
                hint="choose another path, or add --overwrite (the old one stays until the new one is proven)",
            )
        if kind is not None:
            refuse_strangers(kind.word, kind.strangers(final), final.name, final)


def refuse_strangers(word: str, found: Sequence[str], name: str, where: object) -> None:
    """Raise where something would be replaced that is no part of what is written.

    Args:
        word: what is written, "a checkpoint".
        found: what at the place is no part of one.
        name: the place's own name; it stands in `found` where the place is a file of another kind.
        where: the place, for messages.

    Raises:
        TensorkeepError: `found` is not empty.
    """
    if not found:
        return
    if list(found) == [name]:
        what = f"is not {word}, which is all that --overwrite replaces"
    else:
        first = ", ".join(printable(n) for n in found[:4]) + (f" ... ({len(found)} in all)" if len(found) > 4 else "")
        what = f"holds what is no part of {word}: {first}"
    raise TensorkeepError(what, where=where, hint="nothing was changed: choose another path, or move it away first")


def listed(folder: Path) -> list[str]:
    """Return every file, link and empty folder below a folder, relative to it, sorted; links are not followed.

    Args:
        folder: the folder.
    """
    found: list[str] = []
    with explained(folder):
        for place, folders, files in os.walk(folder, onerror=_raise):
            inner = [name for name in folders if os.path.islink(os.path.join(place, name))]  # noqa: PTH118, PTH114
            here = [*files, *inner] or ([] if folders or place == str(folder) else ["."])
            found += [str((Path(place) / name).relative_to(folder)) for name in here]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def lone_file(word: str, pattern: str) -> Kind:
    """Return the kind of a file that is known by how it begins.

    Args:
        word: what messages call it, "a page of tensorkeep".
        pattern: a regular expression that its first 16 KiB begin with. An empty file is of every kind.

    Example:
        >>> lone_file("a script", "#!").strangers(Path("/bin/sh"))      # doctest: +SKIP
        ['sh']
    """
    known = re.compile(pattern, re.DOTALL)

    def strangers(path: Path) -> list[str]:
        if not stat.S_ISREG(path.lstat().st_mode):
            return listed(path) if path.is_dir() else [path.name]
        with path.open("rb") as file:
            head = file.read(_HEAD).decode("utf-8", "replace")
        return [] if not head or known.match(head) else [path.name]

    return Kind(word, strangers)


# every page that we write: a report's, a run's, a video's
PAGE = lone_file(
    "a page of tensorkeep",
    r'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">.*?'
    r"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'",
)
