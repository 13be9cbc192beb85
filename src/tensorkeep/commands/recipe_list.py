"""`tensorkeep recipe list`."""

from __future__ import annotations

from tensorkeep.commands.shared import Say


def recipe_list(*, say: Say = Say()) -> int:
    """List the recipes that are shipped: their names, for what kind of run, and what they train.

    Every command that takes a recipe takes such a name: tensorkeep train language smollm2_qlora --out RUN
    """
    from tensorkeep.training.shipped import shipped

    printer, found = say.output(), shipped()
    if say.json:
        printer.document({"recipes": [{"name": r.name, "kind": r.kind, "about": r.about} for r in found]})
    else:
        printer.table(["recipe", "kind", "what it trains"], [(r.name, r.kind, r.about) for r in found])
    return 0
