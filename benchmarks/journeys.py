"""A newcomer's three journeys, timed: in a fresh clone, and from the wheel alone in an empty folder.

    pip install uv build hatchling
    python -m benchmarks.journeys python3.11 --write docs/benchmarks.md
    python -m benchmarks.journeys python3.11 --only weights --from wheel

The weights engineer, the trainer of small language models and the video researcher each install what their guide asks
for into a new environment and carry out its commands word for word, with another HOME and nothing else in the
environment. Minutes are from the beginning of the installation to the end of the last command. What is installed lies
in uv's cache (`UV_CACHE_DIR`), so that they are the machine's and not the network's; `--constraint constraints.txt`
takes the versions that are pinned there. The table lies between two comments of the page; rows of journeys that are
not run again stay.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.wheel import alone, built

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- journeys: benchmarks/journeys.py -->", "<!-- end -->"
HEAD = "| who | guide | from | commands | minutes | of these processors' | longest command | date |"
SAMPLES = "tensorkeep demo samples"  # what stands for the clone's examples/


@dataclass(frozen=True)
class Journey:
    """A guide, its section (all of the page where none is named), its extra, and how its commands are shown."""

    who: str
    page: str
    extra: str
    section: str = ""
    shown: str = "bash"


JOURNEYS = {
    "weights": Journey("weights engineer", "docs/guides/weights.md", "", shown="console"),
    "language": Journey("small-LM trainer", "docs/guides/language.md", "language", section="A first run"),
    "video": Journey("video researcher", "docs/guides/first-detector.md", "detection"),
}


def commands(journey: Journey) -> list[str]:
    """The commands of a guide's blocks, joined where they go on, without comments and output."""
    text = (ROOT / journey.page).read_text(encoding="utf-8")
    if journey.section:
        text = re.split(r"^## ", text.partition(f"\n## {journey.section}")[2], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(rf"^```{journey.shown}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    if journey.shown == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def installed(uv: str, python: str, source: str, extra: str, place: Path, constraint: Path | None) -> float:
    """A new environment with the package; the seconds it took."""
    since = time.perf_counter()
    subprocess.run([uv, "venv", "--quiet", "--seed", "--python", python, place], check=True)
    bound = ["--constraint", constraint] if constraint else []
    words = [uv, "pip", "install", "--quiet", "--python", place, *bound, f"{source}[{extra}]" if extra else source]
    subprocess.run(words, check=True)
    return time.perf_counter() - since


def carried_out(lines: list[str], folder: Path, env: dict[str, str]) -> list[tuple[str, float]]:
    """Every command with its seconds; findings (exit code 1) are what some of them show, all else ends the journey."""
    found = []
    for line in lines:
        since = time.perf_counter()
        done = subprocess.run(line, shell=True, cwd=folder, env=env, capture_output=True, text=True)
        found.append((line, time.perf_counter() - since))
        sys.stderr.write(f"$ {line}\n{done.stdout[-800:]}{done.stderr[-800:]}({found[-1][1]:.0f} s)\n")
        if done.returncode not in (0, 1) or "Traceback" in done.stderr:
            raise SystemExit(f"exit code {done.returncode}: {line}")
    return found


def processors() -> float:
    """The processor seconds of all commands until now: what stays the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def travelled(uv: str, python: str, journey: Journey, wheel: Path | None, constraint: Path | None) -> list[str]:
    """The cells of a journey: from the wheel, or where none is given in a fresh clone of the last commit."""
    lines, before = commands(journey), processors()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        home, folder = place / "home", place / "tensorkeep"
        home.mkdir()
        if wheel:
            folder.mkdir()
            needs = not any(line.startswith(SAMPLES) for line in lines)
            lines = [SAMPLES, *lines] if needs else lines
        else:
            subprocess.run(["git", "clone", "-q", "--local", ROOT, folder], check=True)
        seconds = installed(uv, python, str(wheel or folder), journey.extra, place / "env", constraint)
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "OMP_"))}
        ran = carried_out(lines, folder, passed_on | alone(place / "env" / "bin", home))
    total = sum(spent for _, spent in ran)
    longest = max(ran, key=lambda pair: pair[1])
    name = " ".join(longest[0].split()[:3]).removeprefix("tensorkeep ")
    guide = f"[{Path(journey.page).stem}](guides/{Path(journey.page).name})"
    date = datetime.datetime.now(tz=datetime.timezone.utc).date()
    cells = [journey.who, guide, "the wheel" if wheel else "a clone", f"{len(ran)}", f"{(seconds + total) / 60:.1f}"]
    return [*cells, f"{(processors() - before) / 60:.1f}", f"{name}: {longest[1] / 60:.1f}", str(date)]


def written(page: Path, cells: list[str]) -> None:
    """Put a row into the page's table, in place of the one of the same journey."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in old.strip().splitlines()[2:]]
    rows = {(row[0], row[2]): row for row in [*kept, cells]}
    lines = [HEAD, "|---" * (HEAD.count(" | ") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows.values())]
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Each journey, from each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="an interpreter, by name or path")
    parser.add_argument("--only", choices=sorted(JOURNEYS), nargs="+", default=list(JOURNEYS))
    parser.add_argument("--from", dest="starts", choices=["clone", "wheel"], nargs="+", default=["clone", "wheel"])
    parser.add_argument("--constraint", type=Path, help="versions to install")
    parser.add_argument("--write", type=Path, help="the page that holds the table")
    given = parser.parse_args()
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = built(Path(temporary)) if "wheel" in given.starts else None
        for name in given.only:
            for start in given.starts:
                source = wheel if start == "wheel" else None
                cells = travelled(uv, given.python, JOURNEYS[name], source, given.constraint)
                print(f"| {' | '.join(cells)} |", flush=True)
                if given.write:
                    written(given.write, cells)


if __name__ == "__main__":
    main()
