"""`tensorkeep inspect`: what is in a checkpoint, from its headers."""

from __future__ import annotations

from tensorkeep.commands.shared import Flag, Say
from tensorkeep.conversion import naming as namings
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches, near_pattern
from tensorkeep.formats.view import read

_MOST = 2000  # groups of tensors in a table for a person


def inspect(checkpoint: str, /, *, tensors: str | None = None, digests: Flag = False, say: Say = Say()) -> int:
    """Show what is in a checkpoint: format, naming, tensors, sizes, ties, quantization, step.

    Args:
        checkpoint: A file, a folder, a Hub model id or a URL.
        tensors: Show only the tensors whose names fit this pattern, one line each, e.g. 'q_proj' or 'layers.[0-3]'. How
            patterns work: docs/concepts/patterns.md.
        digests: Read the data too and show each tensor's digest (xxh3_128).
    """
    from tensorkeep.diagnosis import inspection

    out = say.output()
    view = read(checkpoint)
    chosen = [n for n in view if tensors is None or matches(n, [tensors])]
    if tensors and not chosen:
        raise TensorkeepError(
            f"no tensor fits {tensors!r}",
            where=checkpoint,
            hint=near_pattern(tensors, view) or "list them all without --tensors",
        )
    identity = namings.identify(view)
    found: dict[str, str] = {}
    if digests:
        with out.progress() as progress:
            found = inspection.digests(view, chosen, progress)
    if say.json:
        out.document(inspection.document(view, identity, chosen, found))
        return 0
    for line in inspection.summary(view, identity):
        out.line(line)
    columns = ["tensor", "dtype", "shape", "bytes", "file"] + (["xxh3_128"] if digests else [])
    rows = inspection.rows(view, chosen, found, gathered=tensors is None and not digests)
    shown = _MOST if tensors is None else len(rows)
    out.table(columns, rows[:shown], right=["bytes"])
    if rows[shown:]:
        out.line(f"and {len(rows) - shown:,} more rows: --tensors PATTERN shows those that fit, --json all")
    for note in view.notes:
        out.remark(f"note: {note.code} {note.message}")
    return 0
