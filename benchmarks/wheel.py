"""The wheel, installed alone under each Python that is named: a language run killed and resumed, a first detector.

    pip install uv build hatchling
    python -m benchmarks.wheel python3.10 python3.11 python3.12 python3.13 --write docs/reference/versions.md

For each interpreter: a new environment with `tensorkeep[language,detection]` from the wheel and the newest versions
that the package index has, nothing pinned; then every command runs in a temporary folder with an empty environment,
another HOME and no clone on the path. uv keeps what it downloads (`UV_CACHE_DIR`): torch's CUDA build is some 3 GB.
The table lies between two comments of the page; rows of interpreters that are not named again stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- wheel: benchmarks/wheel.py -->", "<!-- end -->"
NAMED = ("torch", "transformers", "peft", "av")  # packages whose versions stand in the table
HEAD = f"| Python | {' | '.join(NAMED)} | doctor | language: killed, resumed | detection | processor minutes | date |"
UPDATES, KILLED_AT = 30, 8
MODEL = """
import json, sys
from pathlib import Path
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
torch.manual_seed(0)
lines = [f"The number {n} is followed by {n + 1}, and that by {n + 2}." for n in range(400)]
Path("text.txt").write_text("\\n".join(lines))
own = Tokenizer(models.BPE())
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False)
own.train_from_iterator(lines, trainer)
PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<e>", eos_token="<e>", pad_token="<e>").save_pretrained("base")
LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)).save_pretrained("base")
"""
RECIPE = f"""version: 2
model: base
objective: pretrain
data: {{files: [text.txt], length: 64, packing: concatenate}}
optimizer: {{lr: 1.0e-3}}
schedule: {{kind: cosine, warmup: 0.1, final: 0.1}}
training: {{updates: {UPDATES}, batch_size: 4, micro_batch: 4, save_every: 5, log_every: 1}}
"""
Ran = Callable[..., subprocess.CompletedProcess[str]]


def built(out: Path) -> Path:
    """The wheel of this checkout."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", out, ROOT], check=True)
    return next(out.glob("*.whl"))


def environment(uv: str, python: str, wheel: Path, place: Path, extras: str = "language,detection") -> Path:
    """A new environment of `python` that holds the wheel and what it asks for; its programs' folder."""
    subprocess.run([uv, "venv", "--quiet", "--python", python, place], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", place, f"{wheel}[{extras}]"], check=True)
    return place / "bin"


def alone(programs: Path, home: Path) -> dict[str, str]:
    """All the environment that a command gets."""
    return {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1"}


def runner(programs: Path, home: Path, folder: Path) -> Ran:
    """What runs a command there and stops at an exit code that is not expected."""

    def run(*words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, cwd=folder, env=alone(programs, home), capture_output=True, text=True)
        if code is not None and done.returncode != code:
            raise SystemExit(
                f"exit code {done.returncode}: {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        return done

    return run


def checkup(run: Ran) -> tuple[dict[str, str], str]:
    """What `tensorkeep doctor` finds installed, and how many of these it imports; those that it cannot end the run."""
    packages = [
        p for p in json.loads(run("tensorkeep", "doctor", "--json", code=None).stdout)["packages"] if p["version"]
    ]
    broken = {p["name"]: p["error"] for p in packages if not p["imports"]}
    if not all("was not over" in error for error in broken.values()):  # which a busy machine brings about
        raise SystemExit(f"tensorkeep doctor: {broken}")
    told = "".join(f"; {name} {error}" for name, error in broken.items())
    return {p["name"]: p["version"] for p in packages}, f"{len(packages) - len(broken)} packages import{told}"


def newest(run: Path) -> int:
    """The step of the newest line of a run's metrics; 0 where there is none."""
    file = run / "metrics.jsonl"
    whole = file.read_text().splitlines()[:-1] if file.exists() else []
    return max((json.loads(line).get("step", 0) for line in whole), default=0)


def killed(programs: Path, home: Path, folder: Path) -> int:
    """Start the training, SIGKILL it behind a step, and return that step."""
    words = ["tensorkeep", "train", "language", "recipe.yaml", "--out", "killed"]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(words, cwd=folder, env=alone(programs, home), stdout=said, stderr=said)
        while newest(folder / "killed") < KILLED_AT:
            if process.poll() is not None:
                raise SystemExit(f"the training ended before it was killed: {(folder / 'said.txt').read_text()}")
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return newest(folder / "killed")


def language(run: Ran, programs: Path, home: Path, folder: Path) -> str:
    """A run that is killed and resumed ends bitwise where one ends that nobody touched."""
    run("python", "-c", MODEL)
    (folder / "recipe.yaml").write_text(RECIPE)
    run("tensorkeep", "train", "language", "recipe.yaml", "--out", "whole")
    step = killed(programs, home, folder)
    run("tensorkeep", "train", "language", "recipe.yaml", "--out", "killed")
    run("tensorkeep", "diff", "whole", "killed")
    run("tensorkeep", "verify", "killed")
    return f"at step {step} of {UPDATES}; bitwise; ok"


def detection(run: Ran) -> str:
    """From videos and a table of times to a timeline, in few updates."""
    run("tensorkeep", "demo", "samples", "--out", "data/own")
    run(*"tensorkeep annotate data/own/times.csv --videos data/own/videos -o data/own/annotations.json".split())
    few = "--model.head.classes 2 --training.epochs 2 --out runs/own"
    run(*f"tensorkeep train detection own_small {few}".split())
    run(*"tensorkeep predict runs/own data/own/videos/clip_5.mp4 -o found".split())
    run("tensorkeep", "verify", "runs/own")
    return "trained, predicted, verified"


def row(uv: str, python: str, wheel: Path) -> list[str]:
    """The cells of one interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        home, folder = place / "home", place / "work"
        home.mkdir()
        folder.mkdir()
        programs = environment(uv, python, wheel, place / "env")
        run = runner(programs, home, folder)
        where = run("python", "-c", "import tensorkeep, sys; print(tensorkeep.__file__, sys.version.split()[0])").stdout
        assert where.startswith(str(place)), where
        trained, detected = language(run, programs, home, folder), detection(run)
        found, told = checkup(run)
        cells = [where.split()[-1], *(found[name] for name in NAMED), told, trained, detected]
    date = datetime.datetime.now(tz=datetime.timezone.utc).date()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [*cells, f"{spent / 60:.1f}", str(date)]


def written(page: Path, rows: list[list[str]]) -> None:
    """Put rows into a page's table, in the order of versions; a row replaces the one of the same minor version."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in old.strip().splitlines()[2:]]
    by_minor = {tuple(map(int, cells[0].split(".")[:2])): cells for cells in [*kept, *rows]}
    lines = [
        HEAD,
        "|" + "---|" * HEAD.count(" | ") + "---|",
        *(f"| {' | '.join(by_minor[k])} |" for k in sorted(by_minor)),
    ]
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Each interpreter in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="+", help="interpreters, by name or path")
    parser.add_argument("--wheel", type=Path, help="an own wheel instead of one that is built here")
    parser.add_argument("--write", type=Path, help="the page that holds the table")
    given = parser.parse_args()
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = given.wheel.resolve() if given.wheel else built(Path(temporary))
        for python in given.python:
            cells = row(uv, python, wheel)
            print(f"| {' | '.join(cells)} |", flush=True)
            if given.write:
                written(given.write, [cells])


if __name__ == "__main__":
    main()
