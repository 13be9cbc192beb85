"""What `tensorkeep recipe import` makes of every config in three trees: tables of config, detector, outcome and reason.

    python -m benchmarks.opentad_configs OPENTAD ACTIONFORMER TRIDET            # on stdout
    python -m benchmarks.opentad_configs OPENTAD ACTIONFORMER TRIDET --write    # into docs/reference/opentad-configs.md

OPENTAD is a checkout of sming256/OpenTAD, ACTIONFORMER one of happyharrycn/actionformer_release, TRIDET one of
dingfengshi/TriDet. Files that others build on (`_base_`) are no configs of their own.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tensorkeep.detection.opentad._config_file import read_config
from tensorkeep.detection.opentad.recipe import import_config
from tensorkeep.detection.opentad.release import import_release
from tensorkeep.errors import TensorkeepError

OUTCOMES = ("imports", "imports, with loss", "refused")
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "opentad-configs.md"
HEAD = """# OpenTAD's configs, and those of ActionFormer and TriDet

What `tensorkeep recipe import` makes of every config of sming256/OpenTAD (3dd7b03), happyharrycn/actionformer_release
(61ea7eb) and dingfengshi/TriDet (764b816). Written by
`python -m benchmarks.opentad_configs OPENTAD ACTIONFORMER TRIDET --write`.

*imports*: nothing that may change a number is left out. *imports, with loss*: the recipe is written and the settings
named here are not carried over, which the recipe says at its end. *refused*: no recipe is written; the reason names the
type that is not built here, or what is wrong with the file.
"""


class Row(NamedTuple):
    """One config: where it lies, the type of its detector, what came of it, and why."""

    config: str
    detector: str
    outcome: str
    reason: str


def rows(tree: Path) -> list[Row]:
    """Import every config below a folder, in the order of their names.

    Args:
        tree: the folder `configs` of a checkout.

    Returns:
        One row a config.
    """
    files = [p for p in sorted(tree.rglob("*")) if p.suffix in (".py", ".yaml") and "_base_" not in p.parts]
    return [Row(path.relative_to(tree).as_posix(), _detector(path), *_outcome(path, tree)) for path in files]


def _detector(path: Path) -> str:
    if path.suffix == ".yaml":
        return "TriDet" if "n_sgp_win_size" in path.read_text() else "ActionFormer"
    try:
        return str(dict.get(read_config(path).values["model"], "type", "?"))
    except (TensorkeepError, KeyError):
        return "?"


def _outcome(path: Path, tree: Path) -> tuple[str, str]:
    try:
        made = (import_config if path.suffix == ".py" else import_release)(path)
    except TensorkeepError as error:
        place = str(error.where or "").removeprefix(str(path)).lstrip(":. ").replace(f"{tree}/", "")
        return "refused", f"{f'`{place}`: ' if place else ''}{error.what}"
    lost = [f"`{row.path}`: {row.why}" if row.why else f"`{row.path}`" for row in made.lost]
    return ("imports, with loss", "; ".join(lost)) if lost else ("imports", "")


def table(name: str, found: list[Row]) -> str:
    """The section of one tree.

    Args:
        name: its heading.
        found: the rows.
    """
    counts = Counter(row.outcome for row in found)
    said = "; ".join(f"{counts[word]} {word.replace(', ', ' ')}" for word in OUTCOMES if counts[word])
    lines = [f"\n## {name}\n", f"{len(found)} configs: {said}.\n"]
    lines += ["| config | detector | outcome | reason |", "|---|---|---|---|"]
    lines += [f"| {r.config} | {r.detector} | {r.outcome} | {r.reason.replace('|', '/')} |" for r in found]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, or write it into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs=3, metavar=("OPENTAD", "ACTIONFORMER", "TRIDET"))
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    names = ("OpenTAD", "ActionFormer's release", "TriDet's release")
    text = HEAD + "".join(table(name, rows(tree / "configs")) for name, tree in zip(names, chosen.trees, strict=True))
    if chosen.write:
        PAGE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
