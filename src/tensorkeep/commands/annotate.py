"""`tensorkeep annotate`: a table of times and a folder of videos become the annotations that a recipe reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, prepare
from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output

if TYPE_CHECKING:
    from tensorkeep.detection.annotate import Made

Several = Parameter(negative="", consume_multiple=True, show_default=False)


def annotate(
    *tables: Path,
    videos: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    columns: Annotated[tuple[str, ...], Several] = (),
    unit: Literal["seconds", "milliseconds", "frames"] | None = None,
    validation: float | None = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Turn tables of times (CSV, TSV, exports of annotation programs) and their videos into annotations for recipes.

    A table has a row for each action: video, start, end, label, under the names that people give these columns. Times
    are 64.5, 1:04.5 or 0:01:04.5, or frames. Read too: exports of BORIS, ELAN (tab-delimited, with labels of columns),
    VIA 3, Label Studio and Audacity. Rows and columns that are not understood are named, nothing is guessed in silence.
    Times must lie in their videos. Prints how everything was read, and which videos are for validation.

    Parameters
    ----------
    tables
        Tables; one without a column for the video is about the video of its own name.
    videos
        The folder of the videos; names in the table are those of files, with or without ending.
    out
        The annotations to write, in ActivityNet's layout.
    columns
        Which column says what, where its name does not: --columns video=Datei start=von end=bis label=Handlung.
    unit
        Of plain numbers, where no name of a column says it. Default: seconds.
    validation
        Share of the videos that are kept for validation. Default: a fifth, where no column says the subsets.
    overwrite
        Replace existing annotations.
    """
    from tensorkeep.detection.annotate import fields_of, make_annotations
    from tensorkeep.detection.data.sheets import read_sheet
    from tensorkeep.storage.overwriting import lone_file, refuse_existing
    from tensorkeep.storage.placement import replacing, write_bytes

    printer, kind = say.output(), lone_file("annotations", r'\{\s*"database"')
    if not tables:
        raise TensorkeepError("no table is named", hint="tensorkeep annotate times.csv --videos DIR -o NEW.json")
    prepare(printer, out)
    refuse_existing(out, overwrite, kind)
    given = _given(columns)
    with printer.progress("videos") as progress:
        made = make_annotations([read_sheet(table, given, unit) for table in tables], videos, validation, progress)
    with replacing(out, overwrite, kind) as temporary:
        write_bytes(temporary, _text(made.document).encode())
    _tell(printer, out, made, fields_of(out, videos, made))
    return 0


def _tell(printer: Output, out: Path, made: Made, fields: dict[str, str]) -> None:
    """What was read and written: a document, or lines for people."""
    database = made.document["database"]
    counts = dict.fromkeys(made.classes, 0)
    for entry in database.values():
        for row in entry["annotations"]:
            counts[row["label"]] += 1
    subsets = {s: sum(e["subset"] == s for e in database.values()) for s in {e["subset"] for e in database.values()}}
    if printer.json:
        totals = {"videos": len(database), "actions": counts, "subsets": subsets}
        printer.document({"annotations": str(out), **totals, "fields": fields, "notes": list(made.notes)})
        return
    for note in made.notes:
        printer.remark(note)
    split = ", ".join(f"{count} {subset}" for subset, count in sorted(subsets.items()))
    printer.line(f"{out}: {sum(counts.values())} actions in {len(database)} videos ({split}), {len(counts)} classes")
    printer.table(["class", "actions"], [(label, str(count)) for label, count in counts.items()], right=["actions"])
    printer.line("fields of a recipe for them: " + " ".join(f"--{name} {value}" for name, value in fields.items()))


def _text(document: dict[str, Any]) -> str:
    """JSON with a line for each video and each action, for people to look at."""
    videos = []
    for name, entry in document["database"].items():
        rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in entry["annotations"])
        head = json.dumps({**entry, "annotations": []}, ensure_ascii=False).removesuffix("[]}")
        videos.append(f" {json.dumps(name, ensure_ascii=False)}: {head}[" + (f"\n  {rows}" if rows else "") + "]}")
    return '{"database": {\n' + ",\n".join(videos) + "\n}}\n"


def _given(columns: tuple[str, ...]) -> dict[str, str]:
    """Roles of columns as they were given, `role=NAME` each."""
    wrong = [text for text in columns if not text.partition("=")[2].strip()]
    if wrong:
        raise TensorkeepError(f"{wrong[0]!r} is not role=NAME", where="--columns", hint="--columns start=von end=bis")
    return {role.strip(): name.strip() for role, _, name in (text.partition("=") for text in columns)}
