"""Read ground truth of temporal action detection: which segments of which videos show which class.

Five layouts are read into one structure, chosen by content:

- OpenTAD and ActivityNet: `{"database": {VIDEO: {"subset", "duration", "annotations": [{"segment", "label"}]}}}`;
  mmaction's variant without the outer `database` too,
- ActionFormer: the same with `fps` and `label_id`, whose ids give the class map,
- Ego4D's moment queries: its own `moments_val.json` (videos, clips, annotations; primary labels alone count), or the
  benchmark's file of clips, `{CLIP: {"subset", "annotations": [{"start_time", "end_time", "label"}]}}`,
- a table of actions, or what an annotation program exports: see `sheets`,
- THUMOS: a folder of `CLASS_test.txt` or `CLASS_val.txt` with lines `video start end`, beside `detclasslist.txt`.

Segments are seconds everywhere. `annotation_checks.check_annotations` explains what is wrong with a file. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tensorkeep.detection.data.labelling import is_export
from tensorkeep.detection.data.sheet_rows import Sheet
from tensorkeep.detection.data.sheets import is_sheet, read_sheet, sheet_document, sheet_of_export
from tensorkeep.detection.data.truth import AMBIGUOUS as AMBIGUOUS
from tensorkeep.detection.data.truth import Annotations as Annotations
from tensorkeep.detection.data.truth import Video as Video
from tensorkeep.detection.data.truth import number_segments as number_segments
from tensorkeep.detection.data.truth import unique_segments as unique_segments
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import parse_number, parse_segment, read_json, read_text

CLASS_LIST = "detclasslist.txt"
_THUMOS_SUBSETS = {"test": "test", "val": "validation"}


def read_annotations(path: str | Path) -> Annotations:
    """Read ground truth in any of the layouts that the module describes.

    Odd *content* (a segment past the end, a zero length) is read as it is and left to `check_annotations`.

    Args:
        path: a JSON file, a table (.csv, .tsv, .txt), or a folder of THUMOS text files.

    Returns:
        All videos with their segments in seconds, and the class names in label order.

    Raises:
        TensorkeepError: The file is missing, is no JSON, or has none of the known layouts.

    Example:
        >>> read_annotations("thumos_14_anno.json").of_subset("validation")[0].segments  # doctest: +SKIP
    """
    path = Path(path)
    if path.is_dir():
        return _read_thumos_folder(path)
    if is_sheet(path):
        return _of_sheet(read_sheet(path))
    document = read_json(path)
    return (
        _of_sheet(sheet_of_export(document, str(path)))
        if is_export(document)
        else parse_annotations(document, str(path))
    )


def _of_sheet(sheet: Sheet) -> Annotations:
    """The annotations of a table; all videos are of subset `all` where it says none."""
    return replace(parse_annotations(sheet_document(sheet), source=sheet.source), layout="table")


def parse_annotations(document: object, source: str = "annotations") -> Annotations:
    """Return the annotations of an already parsed JSON document; `source` names it in errors."""
    if isinstance(document, dict) and _is_moments(document.get("videos")):
        document = _clips_of_moments(document["videos"], source)
    database = document.get("database") if isinstance(document, dict) else None
    layout = "opentad"
    if database is None and isinstance(document, dict) and document and all(map(_is_entry, document.values())):
        database, layout = document, "mmaction"
    if not isinstance(database, dict):
        raise TensorkeepError(
            "neither a 'database' nor videos with 'annotations' in it",
            where=source,
            hint="expected JSON of OpenTAD/ActivityNet, ActionFormer, mmaction or Ego4D, a table with the columns "
            "video,start,end,label, an export of VIA 3 or Label Studio, or a folder of THUMOS text",
        )
    ids: dict[str, int] = {}
    videos = {str(name): _parse_video(str(name), entry, ids, source) for name, entry in database.items()}
    if ids:
        layout = "actionformer"
    elif layout == "mmaction" and _in_clip_times(database):
        layout = "ego4d"
    names = {label for video in videos.values() for label in video.labels} - {AMBIGUOUS}
    numbered = all(label.isdecimal() for label in names)  # labels that are numbers are in their order, 2 before 10
    classes = tuple(sorted(names, key=lambda label: (ids.get(label, math.inf), int(label) if numbered else 0, label)))
    return Annotations(videos, classes, layout, source)


def read_class_map(path: str | Path, labels: Collection[str] = ()) -> tuple[str, ...]:
    """Read class names in label order from a text file: one name a line, or `id name` as THUMOS writes it.

    Names may begin with numbers (`5 meter dive`). So lines are ids and names only where the names are among `labels`
    and the whole lines are not; without labels, where the ids count from 0 or 1 or the names are single words.

    Args:
        path: the file.
        labels: class names that annotations use, as far as they are known.

    Returns:
        The names: in the order of the lines, or of the ids.

    Raises:
        TensorkeepError: The file is empty or gives a name twice.

    Example:
        >>> read_class_map("category_idx.txt")  # doctest: +SKIP
        ('BaseballPitch', 'BasketballDunk')
    """
    path = Path(path)
    rows = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    pairs = [row.split(None, 1) for row in rows]
    if rows and all(len(pair) == 2 and pair[0].isdecimal() for pair in pairs):
        ids, names = [int(pair[0]) for pair in pairs], [pair[1] for pair in pairs]
        whole, parts = len(set(rows) & set(labels)), len(set(names) & set(labels))
        counted = sorted(ids) in ([*range(len(ids))], [*range(1, len(ids) + 1)])
        likely = len(set(ids)) == len(ids) and (counted or not any(" " in name for name in names))
        if parts > whole or (parts == whole and likely):
            rows = [name for _, name in sorted(zip(ids, names, strict=True))]
    twice = sorted({row for row in rows if rows.count(row) > 1})
    if not rows or twice:
        what = f"classes listed twice: {', '.join(twice)}" if twice else "no class in it"
        raise TensorkeepError(what, where=path, hint="one class name a line, in label order")
    return tuple(rows)


def read_class_ids(path: str | Path) -> dict[int, str]:
    """Read class names by number from a THUMOS `detclasslist.txt` (`id name` a line).

    Raises:
        TensorkeepError: A line has another form.
    """
    ids: dict[int, str] = {}
    for number, line in enumerate(read_text(Path(path)).splitlines(), 1):
        if not line.strip():
            continue
        head, _, name = line.strip().partition(" ")
        if not head.isdecimal() or not name.strip():
            raise TensorkeepError(f"line {number} is not 'id name': {line[:60]!r}", where=path)
        ids[int(head)] = name.strip()
    return ids


def _is_entry(value: object) -> bool:
    """Return whether a JSON value looks like one annotated video."""
    return isinstance(value, dict) and "annotations" in value


def _is_moments(videos: object) -> bool:
    """Return whether these are the videos of Ego4D's `moments_val.json`."""
    return isinstance(videos, list) and bool(videos) and isinstance(videos[0], dict) and "clips" in videos[0]


def _clips_of_moments(videos: list[Any], source: str) -> dict[str, Any]:
    """Return Ego4D's clips as a database: by `clip_uid`, those with a primary label, as its own conversion keeps them.

    A video is `{"split", "clips": [{"clip_uid", "video_start_sec", "video_end_sec", "annotations": [{"labels":
    [{"start_time", "end_time", "label", "primary"}]}]}]}`.
    """
    found: dict[str, Any] = {}
    for place, video in enumerate(videos):
        for clip in _list_in(video, "clips", f"video {place}", source):
            name = clip.get("clip_uid") if isinstance(clip, dict) else None
            if not isinstance(name, str):
                raise TensorkeepError(f"a clip of video {place} has no 'clip_uid'", where=source)
            what = f"clip {name!r}"
            rows = [
                label
                for annotation in _list_in(clip, "annotations", what, source)
                for label in _list_in(annotation, "labels", what, source)
                if isinstance(label, dict) and label.get("primary")
            ]
            start, end = clip.get("video_start_sec"), clip.get("video_end_sec")
            known = isinstance(start, int | float) and isinstance(end, int | float)
            if rows:
                entry = {
                    "subset": video.get("split", ""),
                    "duration": end - start if known else None,
                    "annotations": [],
                }
                found.setdefault(name, entry)["annotations"].extend(rows)
    return found


def _list_in(holder: object, key: str, what: str, source: str) -> list[Any]:
    """Return a list that an object of Ego4D's `moments_val.json` has to hold."""
    found = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(found, list):
        raise TensorkeepError(f"{what} has no list {key!r}", where=source, hint="Ego4D's moments_val.json has one")
    return found


def _in_clip_times(database: Mapping[str, object]) -> bool:
    """Return whether the first annotation says `start_time`, as Ego4D's files do."""
    entries = [entry for entry in database.values() if isinstance(entry, dict)]
    rows = next((entry["annotations"] for entry in entries if entry.get("annotations")), None)
    return isinstance(rows, list) and isinstance(rows[0], dict) and "start_time" in rows[0]


def _parse_video(name: str, entry: object, ids: dict[str, int], source: str) -> Video:
    """Read one entry of the database; label ids, which ActionFormer's files carry, are added to `ids`."""
    if not isinstance(entry, dict):
        raise TensorkeepError(f"video {name!r} is not an object", where=source)
    rows = entry.get("annotations", [])
    if not isinstance(rows, list):
        raise TensorkeepError(f"'annotations' of video {name!r} is not a list", where=source)
    segments, labels = [], []
    for position, row in enumerate(rows):
        what = f"annotation {position} of video {name!r}"
        if not isinstance(row, dict) or not isinstance(row.get("label"), str | int):
            raise TensorkeepError(
                f"{what} has no 'label'", where=source, hint='{"segment": [start, end], "label": name}'
            )
        ends = row.get("segment")
        if ends is None and "start_time" in row:
            ends = [row["start_time"], row.get("end_time")]
        segments.append(parse_segment(ends, what, source))
        labels.append(str(row["label"]))
        if isinstance(row.get("label_id"), int):
            _note_id(ids, labels[-1], row["label_id"], what, source)

    def optional(*keys: str) -> float | None:
        found = [entry[key] for key in keys if entry.get(key) is not None]
        return parse_number(found[0], f"{keys[0]} of video {name!r}", source) if found else None

    frames = optional("frame", "duration_frame")
    clip = "parent_start_sec" in entry  # a clip of Ego4D, whose fps counts rows of features
    return Video(
        name=name,
        subset=str(entry.get("subset", "")),
        segments=np.array(segments, dtype=np.float64).reshape(-1, 2),
        labels=tuple(labels),
        duration=optional("duration", "duration_second"),
        frames=None if frames is None else int(frames),
        fps=None if clip else optional("fps"),
    )


def _note_id(ids: dict[str, int], label: str, number: int, what: str, source: str) -> None:
    """Remember a label's id; a second, different id is an error."""
    if ids.setdefault(label, number) != number:
        raise TensorkeepError(f"{what}: label {label!r} has id {number}, elsewhere {ids[label]}", where=source)


def _read_thumos_folder(folder: Path) -> Annotations:
    """Read all `CLASS_test.txt` and `CLASS_val.txt` of a folder; the THUMOS kit depends on the order within a file."""
    files = [(path, *path.stem.rpartition("_")[::2]) for path in sorted(folder.glob("*.txt"))]
    files = [entry for entry in files if entry[2] in _THUMOS_SUBSETS and entry[1]]
    if not files:
        raise TensorkeepError(
            "no CLASS_test.txt or CLASS_val.txt in this folder", where=folder, hint="name the annotation file itself"
        )
    rows: dict[str, list[tuple[float, float, str]]] = {}
    subset_of: dict[str, str] = {}
    for path, label, suffix in files:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            words = line.split()
            if not words:
                continue
            what = f"line {number}"
            if len(words) != 3:
                raise TensorkeepError(f"{what} is not 'video start end': {line[:60]!r}", where=path)
            start, end = parse_number(words[1], what, str(path)), parse_number(words[2], what, str(path))
            rows.setdefault(words[0], []).append((start, end, label))
            if subset_of.setdefault(words[0], _THUMOS_SUBSETS[suffix]) != _THUMOS_SUBSETS[suffix]:
                raise TensorkeepError(f"video {words[0]!r} is both in val and in test", where=path)
    listed = folder / CLASS_LIST
    names = sorted({label for _, label, _ in files} - {AMBIGUOUS})
    ids = read_class_ids(listed) if listed.exists() else {}
    classes = tuple(ids[number] for number in sorted(ids)) or tuple(names)
    videos = {
        name: Video(
            name, subset_of[name], np.array([row[:2] for row in found], dtype=np.float64), tuple(r[2] for r in found)
        )
        for name, found in sorted(rows.items())
    }
    return Annotations(videos, classes, "thumos", str(folder))
