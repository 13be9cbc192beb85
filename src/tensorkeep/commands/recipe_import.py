"""`tensorkeep recipe import`: a config of OpenTAD as a recipe, and an account of what stayed behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, prepare, recipe_of_kind
from tensorkeep.output import Output
from tensorkeep.storage.overwriting import refuse_existing
from tensorkeep.storage.placement import replacing, write_bytes


def recipe_import(
    config: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Turn a config of OpenTAD, or of the ActionFormer or TriDet release, into a recipe, without executing it.

    Says what was not carried over, and what the config left open. Exit code 1 when something that may change the
    numbers could not be carried over; the recipe is written all the same.

    Parameters
    ----------
    config
        A config of OpenTAD (.py); its _base_ files are read too. Or one of the ActionFormer or TriDet release (.yaml).
    out
        The recipe to write.
    overwrite
        Replace an existing recipe.
    """
    from tensorkeep.detection.opentad.recipe import Imported, import_config, shown
    from tensorkeep.detection.opentad.release import import_release

    printer = say.output()
    prepare(printer, out)
    refuse_existing(out, overwrite, recipe_of_kind("detection"))
    imported: Imported = (import_release if config.suffix in (".yaml", ".yml") else import_config)(config)
    with replacing(out, overwrite, recipe_of_kind("detection")) as temporary:
        write_bytes(temporary, imported.text().encode())
    accounts = {"lost": imported.lost, "left": imported.left, "defaults": imported.defaults}
    rows = {name: [(r.path, r.where, shown(r.value), r.why) for r in found] for name, found in accounts.items()}
    if say.json:
        keys = ("path", "where", "value", "why")
        listed = {name: [dict(zip(keys, row)) for row in found] for name, found in rows.items()}
        printer.document({"config": str(config), "recipe": str(out), **listed})
    else:
        _show(printer, "lost, and it may change the numbers", rows["lost"])
        _show(printer, "not carried over; none of these changes a number", rows["left"])
        _show(printer, "not in the config; the recipe takes", rows["defaults"])
    lost, left, defaults = len(imported.lost), len(imported.left), len(imported.defaults)
    printer.line(f"{out}: {lost} settings lost, {left} not needed, {defaults} defaults filled in")
    return 1 if imported.lost else 0


def _show(printer: Output, title: str, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Rows under a title on stderr, their paths in one column."""
    if rows:
        printer.remark(f"{title}:")
    width = max((len(path) for path, *_ in rows), default=0)
    for path, where, value, why in rows:
        place = f" ({where})" if where else ""
        line = f"  {path:<{width}}  {value}  {why}{place}"
        printer.remark("".join(c if c.isprintable() else "?" for c in line))
