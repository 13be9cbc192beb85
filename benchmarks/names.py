"""What it costs to learn a model's names: asked of transformers for the first time, and kept from then on.

    python -m benchmarks.names

Each architecture has the size that transformers' own config gives it. Every time a new process asks; processor seconds
are counted, of the whole process, since other work on the machine stretches the clock alone.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile

from benchmarks.measure import versions

KINDS = "llama gpt2 qwen3 phi3 mixtral qwen3_moe deepseek_v3 nemotron_h gemma3 qwen3_vl_moe".split()
CONFIG = """
import json, sys, transformers
print(json.dumps(transformers.AutoConfig.for_model(sys.argv[1]).to_dict()))
"""
ASK = """
import json, sys
from tensorkeep.models.names import model_names
names = model_names(json.load(sys.stdin))
print(len(names.live), len(names.file), "torch" in sys.modules)
"""


def seconds(code: str, given: str, home: str, *words: str) -> tuple[float, list[str]]:
    """Processor seconds of a new process, and the words that it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], input=given, env=environment, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, done.stdout.splitlines()[-1:]


def main() -> None:
    print(versions("tensorkeep", "torch", "transformers"))
    print("\n| architecture | names in memory | in files | first time, s | kept, s |\n|---|---|---|---|---|")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as home:
            _, (config,) = seconds(CONFIG, "", home, kind)
            config = json.dumps(json.loads(config))
            first, (said,) = seconds(ASK, config, home)
            again, (kept,) = seconds(ASK, config, home)
        live, files, _ = said.split()
        assert kept == f"{live} {files} False", kept
        print(f"| {kind} | {int(live):,} | {int(files):,} | {first:.2f} | {again:.2f} |")


if __name__ == "__main__":
    main()
