"""Open pages in Chromium at two widths and in both themes, and say what is wrong: exit code 1 where something is.

npm pack axe-core && tar xzf axe-core-*.tgz package/axe.min.js
python -m tests.browser run.html compared.html --axe package/axe.min.js --out shots
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.browser.checks import THEMES, WIDTHS, keyboard, problems
from tests.browser.chromium import browser


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of axe-core")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    axe, wrong = given.axe.read_text(encoding="utf-8"), 0
    with browser() as tab:
        for page in given.pages:
            for width in WIDTHS:
                for theme in THEMES:
                    found = problems(tab, page, width, theme, axe)
                    tab.picture(given.out / f"{page.stem}-{width}-{theme}.png")
                    wrong += len(found)
                    sys.stdout.write(f"{page.name} {width} {theme}: {'; '.join(found) or 'ok'}\n")
                found = keyboard(tab) + tab.complaints()
                wrong += len(found)
                sys.stdout.write(f"{page.name} {width} keyboard: {'; '.join(found) or 'ok'}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
