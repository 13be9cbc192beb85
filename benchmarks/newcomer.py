"""The newcomer's path: make five videos and a table of times; run a guide's commands in a fresh clone and time each.

    python -m benchmarks.newcomer --videos data/own                          # videos/clip_1.mp4 ..., times.csv
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

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
FRAMES, RATE, WIDTH, HEIGHT = 1500, 25, 160, 120
BEGIN, END = "<!-- times: benchmarks/newcomer.py -->", "<!-- end -->"
CLASSES = ("slide", "fall")


def picture(frame: int, shown: str | None) -> NDArray[np.uint8]:
    """A grey picture; a red square that slides, or a green disc that falls."""
    pixels = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    if shown == "slide":
        x = 4 * frame % (WIDTH - 24)
        pixels[48:72, x : x + 24] = (220, 60, 60)
    elif shown == "fall":
        rows, columns = np.ogrid[:HEIGHT, :WIDTH]
        pixels[(rows - 4 * frame % (HEIGHT - 24) - 12) ** 2 + (columns - 80) ** 2 < 144] = (60, 220, 60)
    return pixels


def spans(random: np.random.Generator) -> list[tuple[int, int, str]]:
    """First and one-past-last frame of the actions of one video, and their classes."""
    found, at = [], RATE
    while at < FRAMES - 150:
        length = int(random.integers(50, 125))
        found.append((at, at + length, CLASSES[int(random.integers(2))]))
        at += length + int(random.integers(40, 120))
    return found


def make(folder: Path) -> None:
    """Five videos of a minute and `times.csv`, as a spreadsheet program with German settings saves it."""
    import av

    (folder / "videos").mkdir(parents=True, exist_ok=True)
    random, lines = np.random.default_rng(0), ["Video;Start;End;Action"]
    for number in range(1, 6):
        name, actions = f"clip_{number}.mp4", spans(random)
        for start, end, label in actions:
            first, last = (f"0:{t // 60:02.0f}:{t % 60:04.1f}".replace(".", ",") for t in (start / RATE, end / RATE))
            lines.append(f"{name};{first};{last};{label}")
        with av.open(str(folder / "videos" / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for t in range(FRAMES):
                shown = next((label for start, end, label in actions if start <= t < end), None)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture(t, shown), format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode(None):
                container.mux(packet)
    (folder / "times.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")


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
            else " ".join(words[1 : 3 if words[1] in ("check", "train", "eval") else 2])
        )
        lines.append(f"| {name} | {seconds / 60:.1f} |")
    return "\n".join([*lines, f"| all | {total / 60:.1f} |"])


def main() -> None:
    """Make the videos, or run a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, help="make the videos and the table here")
    parser.add_argument("--time", type=Path, nargs="+", help="carry out the first page's commands")
    parser.add_argument("--write", action="store_true", help="write the table into the pages")
    given = parser.parse_args()
    if given.videos:
        make(given.videos)
    if given.time:
        text = table(timed(given.time[0]))
        print(text)
        for page in given.time if given.write else ():
            before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
            page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
