"""`tensorkeep recipe show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, prepare, recipe_of_kind


def recipe_show(
    name: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    overwrite: Flag = False,
    say: Say = Say(),
) -> int:
    """Print a recipe that is shipped, comments included, or write it to a file to change.

    Parameters
    ----------
    name
        The recipe's name, as `tensorkeep recipe list` prints it.
    out
        A file to write it to. Default: it is printed.
    overwrite
        Replace an existing recipe of that kind.
    """
    import yaml

    from tensorkeep.storage.overwriting import refuse_existing
    from tensorkeep.storage.placement import replacing, write_bytes
    from tensorkeep.training.shipped import shipped_recipe

    printer, found = say.output(), shipped_recipe(name)
    if out is not None:
        prepare(printer, out)
        refuse_existing(out, overwrite, recipe_of_kind(found.kind))
        with replacing(out, overwrite, recipe_of_kind(found.kind)) as temporary:
            write_bytes(temporary, found.text.encode())
    if say.json:
        where = {} if out is None else {"out": str(out)}
        printer.document({"name": found.name, "kind": found.kind, "recipe": yaml.safe_load(found.text), **where})
    else:
        printer.line(found.text.rstrip("\n") if out is None else f"{out}: the recipe {found.name}")
    return 0
