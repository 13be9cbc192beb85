"""The newcomer's path: run a guide's commands in a fresh clone and time each.

    python -m benchmarks.newcomer --time docs/guides/first-detector.md       # prints the table of minutes
    python -m benchmarks.newcomer --time docs/guides/first-detector.md docs/guides/first-detector.zh.md --write

`--time` clones this checkout's last commit into a temporary folder, and carries out word for word what stands in the
```bash blocks of the first page, with this Python. The table lies between two comments of each page.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- times: benchmarks/newcomer.py -->", "<!-- end -->"


def commands(page: Path) -> list[str]:
    """The lines of a page's ```bash blocks, joined where they go on, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def timed(page: Path) -> list[tuple[str, float]]:
    """Carry out a page's commands in a fresh clone; each with its seconds. Stops at the first that fails."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        clone = Path(place) / "tensorkeep"
        subprocess.run(["git", "clone", "-q", "--local", str(ROOT), str(clone)], check=True)
        programs = Path(place) / "bin"
        programs.mkdir()
        for name, words in (("tensorkeep", "-m tensorkeep "), ("python", "")):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words}"$@"\n')
            (programs / name).chmod(0o755)
        env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{clone / 'src'}"}
        for command in commands(page):
            since = time.perf_counter()
            done = subprocess.run(command, shell=True, cwd=clone, env=env, capture_output=True, text=True)
            found.append((command, time.perf_counter() - since))
            sys.stderr.write(f"$ {command}\n{done.stderr[-1500:]}{done.stdout[-1500:]}({found[-1][1]:.0f} s)\n")
            if done.returncode:
                raise SystemExit(f"exit code {done.returncode}: {command}")
    return found


def table(rows: list[tuple[str, float]]) -> str:
    """The minutes of each command, as Markdown."""
    date = datetime.datetime.now(tz=datetime.timezone.utc).date()
    total = sum(seconds for _, seconds in rows)
    lines = [f"| command | minutes ({date}, {os.cpu_count()} shared cores) |", "|---|---:|"]
    for command, seconds in rows:
        words = command.removeprefix("python -m ").split()
        name = (
            words[0]
            if words[0] != "tensorkeep"
            else " ".join(words[1 : 3 if words[1] in ("check", "train", "eval", "demo") else 2])
        )
        lines.append(f"| {name} | {seconds / 60:.1f} |")
    return "\n".join([*lines, f"| all | {total / 60:.1f} |"])


def main() -> None:
    """Run a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", type=Path, nargs="+", required=True, help="carry out the first page's commands")
    parser.add_argument("--write", action="store_true", help="write the table into the pages")
    given = parser.parse_args()
    text = table(timed(given.time[0]))
    print(text)
    for page in given.time if given.write else ():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
