"""`tensorkeep identify` of 2 GB beside `sha256sum` of the same bytes, and 1,000 single bits that must be found.

python -m benchmarks.identify [--dir DIR] [--rounds 5] [--flips 1000] [--model DIR] [--forms DIR] [--architectures]
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
from benchmarks.measure import Run, remember, run, versions
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
    found: dict[str, list[Run]] = {name: [] for name in ways}
    loads = []
    for _ in range(rounds):
        for name, command in ways.items():
            loads.append(os.getloadavg()[0])
            found[name].append(run(command))
    shown = {one.out.splitlines()[0] for name in ways if "identify" in name for one in found[name]}
    assert len(shown) == 1, shown
    base, base_cpu = (_medians(found["sha256sum, file by file"], what) for what in ("wall", "cpu"))
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    has = "has" if "sha_ni" in flags else "has no"
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, the CPU {has} SHA instructions; hashlib alone on one core {a_core():.2f} GB/s")
    print(f"load {min(loads):.1f} to {max(loads):.1f}, medians of {rounds} rounds")
    print("\n| way | wall s | of sha256sum's | CPU s | of sha256sum's | anonymous MB |\n|---|---|---|---|---|---|")
    for name, taken in found.items():
        wall, cpu = _medians(taken, "wall"), _medians(taken, "cpu")
        cells = f"{wall:.2f} | {wall / base:.2f} | {cpu:.2f} | {cpu / base_cpu:.2f} | {taken[-1].anonymous / 1e6:.0f}"
        print(f"| {name} | {cells} |")


def _medians(taken: list[Run], what: str) -> float:
    return statistics.median(getattr(one, what) for one in taken)


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


# what `convert` is asked for, by the form's name
FORMS = {
    "hf, 50 MB a shard": ("hf", ["--to", "hf", "--shard-size", "50MB"]),
    "hf, one file": ("one.safetensors", ["--to", "hf"]),
    "DCP": ("dcp", ["--to", "dcp"]),
    "DCP under `model`, as flame": ("flame", ["--to", "dcp", "--root", "model"]),
    "DCP, torchtitan": ("titan", ["--to", "dcp", "--naming", "torchtitan"]),
    "DCP, torchtitan 0.2": ("titan02", ["--to", "dcp", "--naming", "torchtitan-0.2"]),
    "DCP, OLMo-core": ("olmo", ["--to", "dcp", "--naming", "olmo-core"]),
    "pth": ("a.pth", ["--to", "pth"]),
    "pth under `model`": ("nested.pth", ["--to", "pth", "--root", "model"]),
    "pth, minimind": ("minimind.pth", ["--to", "pth", "--naming", "minimind"]),
    "pth, nanotron": ("nanotron.pth", ["--to", "pth", "--naming", "nanotron"]),
    "GGUF": ("a.gguf", ["--to", "gguf"]),
    "GGUF and back": ("back", ["--to", "hf"]),
}


def forms(model: Path, folder: Path) -> None:
    """Write a model in many forms and identify each."""
    main = [sys.executable, "-m", "tensorkeep"]
    wanted = identify(model).identity
    print(f"\n{model}: {wanted}\n\n| form | the same identity |\n|---|---|")
    for name, (place, words) in FORMS.items():
        source, out = folder / "a.gguf" if name == "GGUF and back" else model, folder / place
        shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
        run([*main, "convert", "--quiet", "--overwrite", str(source), str(out), *words])
        found = run([*main, "identify", str(out), "--quiet", "--config", str(model)]).out.splitlines()[0]
        print(f"| {name} | {'yes' if found == wanted else f'NO: {found}'} |")


def architectures(folder: Path) -> None:
    """Identify every architecture's tiny model as files have it and as its live model is saved."""
    import torch
    import torch.distributed.checkpoint as dcp

    from benchmarks import families

    equal = 0
    for name in families.FAMILIES:
        shutil.rmtree(folder / "family", ignore_errors=True)
        place, live = folder / "family" / "hf", folder / "family" / "live"
        state = families.built(name, place).state_dict()
        live.mkdir()
        torch.save(state, live / "model.pth")
        dcp.save(dict(state), checkpoint_id=str(folder / "family" / "dcp"), no_dist=True)
        for other in (live, folder / "family" / "dcp"):
            shutil.copy(place / "config.json", other / "config.json")
        found = {identify(p).identity for p in (place, live / "model.pth", folder / "family" / "dcp")}
        equal += len(found) == 1
        if len(found) > 1:
            print(f"{name}: {len(found)} identities")
    print(f"\n{equal} of {len(families.FAMILIES)} architectures: files, live model's .pth and its DCP are one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("build/bench-convert"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-llama"))
    parser.add_argument("--forms", type=Path, help="an hf folder to write in many forms")
    parser.add_argument("--architectures", action="store_true")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    print(versions("tensorkeep", "numpy"))
    if arguments.rounds:
        cost(arguments.dir, arguments.rounds)
    if arguments.architectures:
        architectures(arguments.dir)
    if arguments.forms:
        forms(arguments.forms, arguments.dir)
    if arguments.flips:
        flips(arguments.model, arguments.dir, arguments.flips)


if __name__ == "__main__":
    main()
