"""`tensorkeep identify` of 2 GB beside `sha256sum` of the same bytes, and 1,000 single bits that must be found.

python -m benchmarks.identify [--dir DIR] [--rounds 5] [--flips 1000] [--model DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

from benchmarks.convert import build
from benchmarks.measure import remember, run, versions
from tensorkeep.diagnosis.identity.identify import identify
from tensorkeep.formats.view import read

SIZE = 2 * 10**9


def a_core() -> float:
    """GB/s of SHA-256 on one core, of bytes that are in its cache."""
    piece, rounds = os.urandom(1 << 20), 500
    state, began = hashlib.sha256(), time.perf_counter()
    for _ in range(rounds):
        state.update(piece)
    return rounds * len(piece) / (time.perf_counter() - began) / 1e9


def cost(folder: Path, rounds: int) -> None:
    """Wall and CPU seconds side by side, one after the other in every round."""
    source, dcp = folder / "hf-2.0", folder / "dcp-2.0"
    build(source, SIZE)
    main = [sys.executable, "-m", "tensorkeep"]
    if not dcp.exists():
        run([*main, "convert", "--quiet", str(source), str(dcp), "--to", "dcp"])
    files = [str(p) for p in sorted(source.glob("*.safetensors"))]
    ways = {
        "sha256sum, file by file": ["sha256sum", *files],
        "sha256sum, two files at a time": ["xargs", "-P", "2", "-n", "1", "-a", str(folder / "files"), "sha256sum"],
        "tensorkeep identify HF": [*main, "identify", str(source)],
        "tensorkeep identify DCP": [*main, "identify", str(dcp)],
    }
    (folder / "files").write_text("\n".join(files) + "\n")
    remember(source)
    remember(dcp)
    walls: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(rounds):
        for name, command in ways.items():
            found[name] = run(command)
            walls[name].append(found[name].wall)
    shown = {found[name].out.splitlines()[0] for name in ways if "identify" in name}
    assert len(shown) == 1, shown
    base = statistics.median(walls["sha256sum, file by file"])
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    has = "has" if "sha_ni" in flags else "has no"
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, the CPU {has} SHA instructions; hashlib alone on one core {a_core():.2f} GB/s")
    print("\n| way | wall s | of sha256sum's | CPU s | anonymous MB |\n|---|---|---|---|---|")
    for name, taken in walls.items():
        wall = statistics.median(taken)
        cells = f"{wall:.2f} | {wall / base:.2f} | {found[name].cpu:.2f} | {found[name].anonymous / 1e6:.0f}"
        print(f"| {name} | {cells} |")


def flips(model: Path, folder: Path, count: int) -> None:
    """Flip one bit of one stored tensor at a time; the identity must change and the tensor be named."""
    copy = folder / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy)
    view = read(copy)
    before = identify(copy)
    names, draw, named = list(view), random.Random(17), 0
    for _ in range(count):
        name = draw.choice(names)
        block = view[name].blocks[0]
        at, bit = block.start + draw.randrange(block.nbytes), 1 << draw.randrange(8)
        with (copy / block.file).open("r+b") as file:
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ bit]))
        after = identify(copy)
        changed = [n for n in before.leaves if after.leaves[n] != before.leaves[n]]
        named += changed == [name] and after.identity != before.identity
        with (copy / block.file).open("r+b") as file:
            file.seek(at)
            file.write(old)
    assert identify(copy).identity == before.identity
    shutil.rmtree(copy)
    print(
        f"\n{named} of {count} single bits changed the identity and named their tensor ({model}, {len(names)} tensors)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("build/bench-convert"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-llama"))
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    print(versions("tensorkeep", "numpy"))
    if arguments.rounds:
        cost(arguments.dir, arguments.rounds)
    if arguments.flips:
        flips(arguments.model, arguments.dir, arguments.flips)


if __name__ == "__main__":
    main()
