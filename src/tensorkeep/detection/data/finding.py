"""Find the files of videos by name: with the ending that the pattern gives, or another, in either case; then below.

Two files that fit a name equally well are never chosen between: the name is told with both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from tensorkeep.detection.data.feature_files import SUFFIXES
from tensorkeep.detection.data.hdf5 import CONTAINERS, find_members
from tensorkeep.detection.data.opening import VIDEO_SUFFIXES, refuse_address
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import absent, explained


def find_files(
    folder: str | Path, names: Iterable[str], pattern: str, suffixes: Sequence[str]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the file of each video.

    Args:
        folder: where they lie, or in folders below it; of features, or an HDF5 file that has those of each by name.
        names: of the videos; one with slashes lies in that folder below.
        pattern: what a file is called, `{video}` standing for the name; without an ending, or where no file has the
            one it gives, any of `suffixes` will do.
        suffixes: endings of such files, in lower case.

    Returns:
        name -> file, and for each name without one why not.

    Raises:
        TensorkeepError: `folder` is an address or is no folder.
    """
    refuse_address(folder)
    folder = Path(folder)
    if folder.suffix.lower() in CONTAINERS and CONTAINERS[0] in suffixes and not folder.is_dir():
        return _in_one_file(folder, names, pattern)
    with explained(folder):
        next(folder.iterdir(), None)
    below: dict[str, list[Path]] | None = None
    there: dict[Path, list[Path]] = {}
    strangers: dict[Path, dict[str, str]] = {}
    found: dict[str, Path] = {}
    lacking: dict[str, str] = {}
    for name in names:
        wanted = pattern.replace("{video}", name)
        if (folder / wanted).is_file():
            found[name] = folder / wanted
            continue
        stem, own = _split(wanted)
        parent = (folder / stem).parent
        if parent not in there:
            there[parent] = _media(parent, suffixes) if parent.is_dir() else []
        last = PurePosixPath(stem).name
        fitting = _best([path for path in there[parent] if _split(path.name)[0] == last], own)
        if not fitting:
            if below is None:
                below = _by_stem(folder, suffixes)
            tail = PurePosixPath(stem).parts
            fitting = _best([p for p in below.get(last, []) if (*p.parts[:-1], last)[-len(tail) :] == tail], own)
        if len(fitting) == 1:
            found[name] = fitting[0]
        elif fitting:
            shown = " and ".join(path.relative_to(folder).as_posix() for path in fitting[:3])
            lacking[name] = f"{len(fitting)} files could be {stem}: {shown}; file_pattern can say more of the name"
        else:
            lacking[name] = f"no {wanted}, nor {last} with another ending, in the folder or below it"
            if CONTAINERS[0] in suffixes and (strange := _strange(folder / stem, strangers)):
                lacking[name] = f"{strange} is there, which is not read: features are {', '.join(suffixes)}"
    return found, lacking


def _in_one_file(file: Path, names: Iterable[str], pattern: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the features of each video in an HDF5 file, under its name as the pattern spells it, without an ending."""
    stems = {name: _split(pattern.replace("{video}", name))[0] for name in names}
    members, first = find_members(file, stems.values())
    lacking = {
        name: f"no {stem} in {file.name}, which has {', '.join(first)}, ...; file_pattern says how a name is spelt"
        for name, stem in stems.items()
        if stem not in members
    }
    return {name: members[stem] for name, stem in stems.items() if stem in members}, lacking


def _strange(stem: Path, known: dict[Path, dict[str, str]]) -> str:
    """Return the name of a file beside, of this stem and of an ending that is not read; "" where there is none."""
    if stem.parent not in known:
        there = stem.parent.iterdir() if stem.parent.is_dir() else ()
        known[stem.parent] = {path.stem: path.name for path in there if path.is_file()}
    return known[stem.parent].get(stem.name, "")


def find_videos(places: Sequence[str | Path]) -> dict[str, Path]:
    """List the files named, and the video files (by their ending, sorted) of folders and the folders below them.

    A file that is not there is listed too: reading it will tell, where another one can be read.

    Args:
        places: files and folders.

    Returns:
        name -> file, in the order of `places`. A name is that of the file without its ending; files of one name in
        folders below one that was given are told apart by these folders.

    Raises:
        TensorkeepError: A folder has no video, an address is given, no file is there, or two would get one name.
    """
    roots: dict[Path, Path | None] = {}
    for place in places:
        refuse_address(place)
        path = Path(place)
        if not path.is_dir():
            roots.setdefault(path, None)
            continue
        with explained(path):
            inside = sorted(p for found in _by_stem(path, VIDEO_SUFFIXES).values() for p in found)
        if not inside:
            hint = f"looked here and in folders below for {', '.join(VIDEO_SUFFIXES[:6])} and other endings of videos"
            raise TensorkeepError("holds no video", where=path, hint=hint)
        for one in inside:
            roots.setdefault(one, path)
    if roots and not any(os.path.lexists(path) for path in roots):
        raise absent(next(iter(roots)))
    stems: dict[str, list[Path]] = {}
    for path in roots:
        stems.setdefault(path.stem, []).append(path)
    made: dict[str, Path] = {}
    for path, root in roots.items():
        alone = len(stems[path.stem]) == 1 or root is None
        name = path.stem if alone or root is None else path.relative_to(root).with_suffix("").as_posix()
        other = made.setdefault(name, path)
        if other != path:
            hint = "rename one of them, predict them into two folders, or name the folder above both"
            raise TensorkeepError(f"{other} and {path} would both be called {name!r}", hint=hint)
    return made


def _split(name: str) -> tuple[str, str]:
    """Split a name into what stands before the ending of a video or a feature file, and that ending in lower case."""
    end = PurePosixPath(name).suffix
    return (name[: -len(end)], end.lower()) if end.lower() in (*VIDEO_SUFFIXES, *SUFFIXES) else (name, "")


def _media(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List the files of one folder with one of these endings, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """List the files in a folder and below it with one of these endings, by name without it."""
    made: dict[str, list[Path]] = {}
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in suffixes:
                made.setdefault(_split(name)[0], []).append(Path(root, name))
    return made


def _best(paths: list[Path], ending: str) -> list[Path]:
    """Return the files that end as the pattern says, in either case; all of them where none does."""
    return [path for path in paths if path.suffix.lower() == ending] or paths
