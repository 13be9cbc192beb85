"""What annotation programs export, as rows of actions: VIA 3's CSV and project, Label Studio's JSON, Audacity's labels.

BORIS' and ELAN's tables have a header and are read as any other (`sheets`). A row is `(place, video, start, end, label,
frames)`: times as the program has them, `frames` where they count frames. Nothing here knows how long a video is.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import parse_number

Row = tuple[str, str, float, float, str, bool]
VIA_HEADER = "CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata"
_LABELLED = ("timelinelabels", "videolabels", "labels")


def is_via(text: str) -> bool:
    """Return whether a text is VIA 3's CSV: a comment near its start names the columns."""
    return any(VIA_HEADER in line for line in text.splitlines()[:20])


def is_export(document: object) -> bool:
    """Return whether a JSON document is VIA 3's project, or tasks of Label Studio.

    Args:
        document: as it was read.
    """
    if isinstance(document, dict):
        return all(isinstance(document.get(key), dict) for key in ("project", "file", "metadata", "view"))
    return isinstance(document, list) and bool(document) and all(_is_task(task) for task in document)


def read_export(document: object, source: str) -> tuple[list[Row], str]:
    """Read a JSON document that `is_export` knows.

    Args:
        document: as it was read.
        source: the file, for errors.

    Returns:
        The actions, and the program's name with how its times count.

    Raises:
        TensorkeepError: An action has no time, no label or several, or no video.
    """
    if isinstance(document, dict):
        return list(_via_project(document, source)), "VIA 3's project; its times are seconds"
    assert isinstance(document, list)
    rows = [row for number, task in enumerate(document, 1) for row in _of_task(task, f"task {number}", source)]
    framed = any(row[5] for row in rows)
    counts = "its frames count from 1, the last one is part of the action" if framed else "its times are seconds"
    return rows, f"Label Studio's tasks; {counts}"


def read_via(text: str, source: str) -> list[Row]:
    """Read VIA 3's CSV: rows with two temporal coordinates are actions; still pictures and regions are none.

    Args:
        text: of the file.
        source: the file, for errors.

    Raises:
        TensorkeepError: A row has another form, or does not say one label.
    """
    attributes: object = {}
    found: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# ATTRIBUTE"):
            attributes = _json(line.partition("=")[2], f"row {number}", source)
        if not line.strip() or line.startswith("#"):
            continue
        place = f"row {number}"
        cells = next(csv.reader(io.StringIO(line)))
        if cells[:2] == ["metadata_id", "file_list"]:
            continue
        if len(cells) < 6:
            raise TensorkeepError(f"{place} has {len(cells)} cells, VIA writes 6", where=source)
        files, ends, said = (_json(cells[at], f"{place}, column {at + 1}", source) for at in (1, 3, 5))
        if isinstance(ends, list) and len(ends) == 2:
            found.append(_via_row(place, files, ends, said, attributes, source))
    return found


def _via_project(document: Mapping[str, Any], source: str) -> Iterator[Row]:
    """The actions of VIA 3's project."""
    files, views = document["file"], document["view"]
    for name, row in document["metadata"].items():
        ends = row.get("z") if isinstance(row, dict) else None
        if not isinstance(ends, list) or len(ends) != 2:
            continue
        view = views.get(str(row.get("vid")))
        numbers = view.get("fid_list") if isinstance(view, dict) else None
        named = [files.get(str(number)) for number in numbers] if isinstance(numbers, list) else []
        names = [file.get("fname") for file in named if isinstance(file, dict)]
        yield _via_row(f"metadata {name!r}", names, ends, row.get("av"), document.get("attribute"), source)


def _via_row(place: str, files: object, ends: list[Any], said: object, attributes: object, source: str) -> Row:
    """One action of VIA; an attribute that is chosen from options says the option's number."""
    if not isinstance(files, list) or len(files) != 1 or not isinstance(files[0], str):
        raise TensorkeepError(f"{place} does not name one file: {str(files)[:60]}", where=source)
    values = {str(key): value for key, value in said.items()} if isinstance(said, dict) else {}
    values = {key: value for key, value in values.items() if isinstance(value, str) and value.strip()}
    if len(values) != 1:
        what = f"{place} has {len(values)} attributes ({', '.join(values.values())[:60]}), an action has one label"
        raise TensorkeepError(what, where=source, hint="leave one attribute of temporal segments in the project")
    key, label = next(iter(values.items()))
    attribute = attributes.get(key) if isinstance(attributes, dict) else None
    options = attribute.get("options") if isinstance(attribute, dict) else None
    if isinstance(options, dict) and isinstance(options.get(label), str) and options[label]:
        label = options[label]
    start, end = (parse_number(value, f"time of {place}", source) for value in ends)
    return place, files[0], start, end, label.strip(), False


def _is_task(task: object) -> bool:
    """Return whether this is a task of Label Studio, in full or as its JSON-MIN has it."""
    if not isinstance(task, dict):
        return False
    if "data" in task and ("annotations" in task or "completions" in task):
        return True
    return "id" in task and any(_regions_of(task))


def _regions_of(task: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of a task of JSON-MIN that hold regions with times."""
    for key, value in task.items():
        rows = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
        if rows and any(name in value[0] for name in ("ranges", *_LABELLED)):
            yield key, value


def _of_task(task: Mapping[str, Any], place: str, source: str) -> Iterator[Row]:
    """The actions of one task: of its only annotation that was not cancelled."""
    data = task.get("data") if isinstance(task.get("data"), dict) else task
    assert isinstance(data, dict)
    names = [data[key] for key in ("video", "video_url", "url", "audio") if isinstance(data.get(key), str)]
    if not names:
        names = [v for v in data.values() if isinstance(v, str) and re.search(r"\.\w{2,5}$", v)]
    if not names:
        raise TensorkeepError(f"{place} names no video", where=source, hint="expected data.video, as Label Studio's")
    regions: list[Any] = []
    if "data" in task:
        made = task.get("annotations", task.get("completions"))
        made = [a for a in made if isinstance(a, dict) and not a.get("was_cancelled")] if isinstance(made, list) else []
        if len(made) > 1:
            what = f"{place} has {len(made)} annotations, by several people or passes"
            raise TensorkeepError(what, where=source, hint="leave one of them, in Label Studio")
        results = made[0].get("result") if made else []
        regions = [r.get("value") for r in results if isinstance(r, dict)] if isinstance(results, list) else []
    else:
        regions = [region for _, found in _regions_of(task) for region in found]
    for number, value in enumerate(regions, 1):
        if isinstance(value, dict):
            yield from _of_region(value, names[0], f"{place}, region {number}", source)


def _of_region(value: Mapping[str, Any], video: str, place: str, source: str) -> Iterator[Row]:
    """The actions of one region: ranges of frames, or start and end in seconds; boxes and choices are none."""
    labels: list[Any] = next((value[key] for key in _LABELLED if isinstance(value.get(key), list)), [])
    framed = isinstance(value.get("ranges"), list)
    spans = value["ranges"] if framed else [value] if "start" in value and "end" in value else []
    for span in spans:
        if not isinstance(span, dict) or len(labels) != 1:
            raise TensorkeepError(f"{place} has {len(labels)} labels, an action has one", where=source)
        start, end = (parse_number(span.get(key), f"{key} of {place}", source) for key in ("start", "end"))
        yield place, video, start - framed, end, str(labels[0]).strip(), framed


def _json(text: str, place: str, source: str) -> object:
    """JSON in a cell or a comment."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TensorkeepError(f"{place} holds no JSON: {text.strip()[:40]!r}", where=source) from error
    return found
