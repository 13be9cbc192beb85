"""`tensorkeep inspect` of a 2 GB checkpoint from the shell, beside listing its keys with safetensors and with torch.

python -m benchmarks.inspect [--dir DIR] [--rounds 5]
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run as a file: beside it lies inspect.py, which must not stand in for the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120

import argparse
import statistics
from pathlib import Path

from benchmarks.convert import build
from benchmarks.measure import run, versions

SAFETENSORS = """
import glob, sys
from safetensors import safe_open
for file in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(file, framework="{framework}") as stream:
        for name in stream.keys():
            print(name, stream.get_slice(name).get_shape())
"""
TORCH_DCP = """
import sys
from torch.distributed.checkpoint import FileSystemReader
for name, entry in FileSystemReader(sys.argv[1]).read_metadata().state_dict_metadata.items():
    print(name, entry.size)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("build/bench-convert"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    source, dcp = arguments.dir / "hf-2.0", arguments.dir / "dcp-2.0"
    build(source, 2 * 10**9)
    tensorkeep = str(Path(sys.executable).parent / "tensorkeep")
    if not dcp.exists():
        run([tensorkeep, "convert", "--quiet", str(source), str(dcp), "--to", "dcp"])
    rows = {
        "tensorkeep inspect HF": [tensorkeep, "inspect", str(source)],
        "tensorkeep inspect HF --json": [tensorkeep, "inspect", str(source), "--json"],
        "safetensors, numpy": [sys.executable, "-c", SAFETENSORS.format(framework="np"), str(source)],
        "safetensors, torch": [sys.executable, "-c", SAFETENSORS.format(framework="pt"), str(source)],
        "tensorkeep inspect DCP": [tensorkeep, "inspect", str(dcp)],
        "torch FileSystemReader (runs the pickle)": [sys.executable, "-c", TORCH_DCP, str(dcp)],
    }
    print(versions("tensorkeep", "torch", "safetensors"))
    print("\n| way | wall s | anonymous MB |\n|---|---|---|")
    for name, command in rows.items():
        runs = [run(command) for _ in range(arguments.rounds)]
        print(
            f"| {name} | {statistics.median(r.wall for r in runs):.2f} | {max(r.anonymous for r in runs) / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
