"""`python -m tests.parity.opentad DIR`: every fixture of DIR against our own maths.

One line a case, `PASS|FAIL name figure tolerance`; exit code 1 where any fails or DIR holds no fixture.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.parity import opentad_model, opentad_post


def cases(folder: Path) -> Iterator[tuple[str, float, float]]:
    """(name, figure, tolerance) of every case; a case passes where the figure is at most the tolerance."""
    yield from opentad_model.cases(folder)
    yield from opentad_post.cases(folder)


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        print("usage: python -m tests.parity.opentad DIR", file=sys.stderr)
        return 2
    count = failed = 0
    for name, figure, tolerance in cases(Path(argv[0])):
        passed = figure <= tolerance  # NaN fails
        count, failed = count + 1, failed + (not passed)
        word = re.sub(r"[\s,]+", "_", name)  # four columns, whatever a name holds
        print(f"{'PASS' if passed else 'FAIL'} {word} {figure:.3g} {tolerance:.3g}", flush=True)
    print(f"{count - failed} of {count} cases pass", file=sys.stderr)
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
