"""What tensorkeep writes, loaded by the oldest torch supported.

python -m venv build/env24 && build/env24/bin/pip install -r benchmarks/envs/torch24.txt
python -m benchmarks.oldest_torch build/env24/bin/python
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
LOAD = """
import hashlib, json, sys, torch
import torch.distributed.checkpoint as dcp
folder, shapes = sys.argv[1], json.loads(sys.argv[2])
digest = lambda t: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
out = {"torch": torch.__version__}
for kind in ("flat", "nested"):
    state = {n: torch.empty(s, dtype=torch.bfloat16) for n, s in shapes.items()}
    asked = {"model": state} if kind == "nested" else state
    alone = {"no_dist": True} if "no_dist" in dcp.load.__wrapped__.__code__.co_varnames else {}  # 2.4 finds out itself
    dcp.load(asked, storage_reader=dcp.FileSystemReader(f"{folder}/{kind}"), **alone)
    out[kind] = {n: digest(t) for n, t in state.items()}
saved = torch.load(f"{folder}/model.pth", weights_only=True, mmap=True)
out["pth"] = {n: digest(t) for n, t in saved.items()}
print(json.dumps(out))
"""


def main() -> None:
    import hashlib

    view = read(TINY)
    wanted = {n: hashlib.sha256(view.bytes(n)).hexdigest() for n in view}
    wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    shapes = {n: list(r.shape) for n, r in view.items()} | {
        "lm_head.weight": list(view["model.embed_tokens.weight"].shape)
    }
    with tempfile.TemporaryDirectory() as place:
        convert(make_plan([view], "dcp"), f"{place}/flat", "dcp")
        convert(make_plan([view], "dcp", root="model"), f"{place}/nested", "dcp")
        convert(make_plan([view], "pth"), f"{place}/model.pth", "pth")
        for python in sys.argv[1:] or [sys.executable]:
            command = [python, "-c", LOAD, place, json.dumps(shapes)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            for kind in ("flat", "nested", "pth"):
                equal = found[kind] == {n: wanted[n] for n in found[kind]}
                verdict = "equal" if equal else "DIFFERENT"
                print(f"torch {found['torch']}: {kind}: {verdict}, {len(found[kind])} tensors")


if __name__ == "__main__":
    main()
