"""What takes two GPUs, in one short visit: `python -m benchmarks.two_gpus --out DIR [--size 1b] [--only full_fsdp]`.

A checkpoint of random weights (Llama-3.2-1B's or Llama-3.1-8B's shape, bf16) and JSON lines are written first. Then
come the parts, each in processes of its own and with a budget of its own (`--limit`, or `--limits kills=60 ...`): for
LoRA over nf4 (`qlora`) and a full fine-tune with an average (`full`) one GPU (`_one`), two under DDP (`_ddp`), two
under FSDP2 (`_fsdp`), one that goes on from those shards (`_resume`), and two that go on from one (`_grow`); the
tests marked for two GPUs (`tests`); kills of ranks through NCCL (`kills`). `--cpu` runs every part over gloo on a
tiny model first, so that nothing is found out on the GPUs that two CPUs could have told.

What happens is printed as it happens: every stage of the first rank with its seconds, every torch save. A part that
runs out of its budget is ended, its ranks say where each thread stands, and its row has the stages and losses until
then. Rows go to OUT/two_gpus.jsonl one by one: tokens a second (median of the later updates), peaks of GPU and host,
seconds of each stage, what the update after each save took longer, bytes of a save; for two processes also the seconds
of `dcp.save`, of the same with `DurableWriter`, and of `dcp.async_save` of what trains with its moments, as many as fit
into what is left of the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.scale_life import Stages, watch

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
RUNS = {"one": (1, "ddp"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp"), "resume": (1, "ddp"), "grow": (2, "fsdp")}
FROM = {"resume": "fsdp", "grow": "one"}  # runs that go on from another's checkpoint
PARTS = (*(f"{way}_{run}" for way in ("qlora", "full") for run in RUNS), "tests", "kills")
MORE = 4  # updates of the run that goes on from shards
PATIENCE = 10.0  # seconds that a program has to end its own children
STACKS = 3.0  # seconds that the ranks of a part that is cut off have to say where they stand


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=list(SHAPES), default="1b")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--saves", type=int, default=3, help="of the run")
    parser.add_argument("--turns", type=int, default=2, help="how often torch's own saves are timed, at most")
    parser.add_argument("--savers", nargs="*", default=["dcp.save", "DurableWriter", "dcp.async_save"])
    parser.add_argument("--limit", type=float, default=110, help="seconds of a part")
    parser.add_argument("--limits", nargs="*", default=[], metavar="PART=SECONDS", help="of parts that have another")
    parser.add_argument("--kills", type=int, default=12, help="of each campaign")
    parser.add_argument("--cpu", action="store_true", help="a dry run: every part, tiny, over gloo")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    given.device = "cpu" if given.cpu else "cuda"
    if given.rank:
        return on_a_rank(given.rank, given.device)
    if given.cpu:
        given.size, given.length = "tiny", min(given.length, 64)
    given.limits = {part: float(seconds) for part, _, seconds in (pair.partition("=") for pair in given.limits)}
    given.out.mkdir(parents=True, exist_ok=True)
    place, cut = Path(tempfile.mkdtemp(prefix="two_gpus_")), 0
    try:
        if any(part.partition("_")[2] in RUNS for part in given.only):
            begun = time.perf_counter()
            write_model(place / "model", SHAPES[given.size], given.device)
            write_texts(place / "texts.jsonl", given.length)
            tell(given.out, {"part": "made", "seconds": round(time.perf_counter() - begun, 1), "size": given.size})
        for part in PARTS:
            if part in given.only:
                row = others(given, part) if part in ("tests", "kills") else measure(given, place, part)
                cut += bool(row["rc"])
                tell(given.out, row)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return min(cut, 1)


def write_model(folder: Path, shape: dict[str, int], device: str) -> None:
    """A checkpoint of random weights, drawn on a GPU where there is one, in bf16."""
    import torch
    from safetensors.torch import save_file
    from tests.language_files import save_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True)
    save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=32_768,
        num_key_value_heads=max(shape["num_attention_heads"] // 4, 1),
        tie_word_embeddings=False,
        **shape,
    )
    with torch.device("meta"):
        names = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    draw = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    for name, size in names.items():
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=draw)
        shards[-1][name] = (torch.ones_like(tensor) if "norm" in name else tensor).cpu()
        if sum(t.nbytes for t in shards[-1].values()) > 2 << 30:
            shards.append({})
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for k, shard in enumerate(s for s in shards if s):
        file = f"model-{k}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))


def write_texts(path: Path, length: int) -> None:
    """Enough text for every update of every run, in lines of one seed."""
    import random

    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "a", "tensor", "is", "kept"]
    with path.open("w") as file:
        for _ in range(1500):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=3 * length // 4))}) + "\n")


def recipe_of(given: Any, place: Path, way: str, run: str) -> dict[str, Any]:
    """The recipe of a run: four rows an update a GPU, saves in the middle."""
    training: dict[str, Any] = {
        "updates": given.updates + (MORE if run in FROM else 0),
        "epochs": None,
        "batch_size": 8,
        "micro_batch": 4,
        "precision": "bf16",
        "parallel": RUNS[run][1],
        "gradient_checkpointing": True,
        "log_every": 1,
        "save_every": given.updates // given.saves,
        "workers": 2,
        "background": True,
    }
    made: dict[str, Any] = {
        "version": 2,
        "model": str(place / "model"),
        "objective": "pretrain",
        "data": {"files": [str(place / "texts.jsonl")], "length": given.length, "packing": "concatenate"},
        "optimizer": {"lr": 1e-4},
        "schedule": {"kind": "constant"},
        "training": training,
    }
    made["data"]["cache"] = str(place / "cache")
    if way == "qlora":
        made["adapter"] = {"lora_r": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "*_proj"]}
        training["quantize_backbone"] = "nf4"
    else:
        training["ema"] = 0.999
    return made


# -- a part ------------------------------------------------------------------------------------------------------------


class Heard:
    """What a part's processes said until they ended or were ended, printed as it comes.

    Attributes:
        rc: the exit status, 124 where the budget ran out.
        wall: seconds.
        stages: seconds of the first rank's stages; `at` is the one that it was in last.
        ranks: what ranks found.
        dcp: seconds of torch's saves.
        errors: the end of what else was said; of a part that was cut off, the stacks.
    """

    def __init__(self, words: list[str], limit: float) -> None:
        self.stages: dict[str, float] = {}
        self.at, self.errors = "", ""
        self.ranks: list[dict[str, Any]] = []
        self.dcp: dict[str, float] = {}
        self._pids: list[int] = []
        self._lines: list[str] = []
        self._begun = time.perf_counter()
        going = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "TWO_GPUS_BEGUN": str(time.time()), "TWO_GPUS_LIMIT": str(limit)},
        )
        reader = threading.Thread(target=lambda: [self._hear(line) for line in going.stdout or ()], daemon=True)
        reader.start()
        try:
            self.rc = going.wait(limit)
        except subprocess.TimeoutExpired:
            self.rc = 124
            self._end(going)
        reader.join(5.0)
        self.wall = time.perf_counter() - self._begun
        self.errors = self.errors or ("\n".join(self._lines)[-6000:] if self.rc else "")

    def _end(self, going: subprocess.Popen[str]) -> None:
        """Let ranks say where they stand, then end them and who launched them."""
        for number in (signal.SIGUSR2, signal.SIGKILL):
            for pid in self._pids:  # ranks have sessions of their own, and their launcher still waits for them
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number == signal.SIGUSR2 and self._pids:
                time.sleep(STACKS)
                self.errors = "\n".join(self._lines)[-6000:]
        going.terminate()  # whoever has children of its own ends them
        try:
            going.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(going.pid, signal.SIGKILL)
            going.wait()

    def _hear(self, line: str) -> None:
        """Take one line."""
        kind, _, rest = line.strip().partition(" ")
        if kind == "PID":
            self._pids.append(int(rest))
        elif kind == "RANK":
            self.ranks.append(json.loads(rest))
        elif kind == "DCP":
            self.dcp |= json.loads(rest)
        elif kind == "AT":
            self.at = rest
        elif kind == "STAGE":
            name, seconds = json.loads(rest)
            self.stages[name] = round(self.stages.get(name, 0.0) + seconds, 3)
        else:
            self._lines.append(line.rstrip())
            return
        if kind in ("STAGE", "DCP"):
            print(f"{time.perf_counter() - self._begun:8.1f} s  {rest}", flush=True)


def others(given: Any, part: str) -> dict[str, Any]:
    """The tests for two GPUs, or kills of ranks: programs of their own, whose last lines are the row."""
    limit = given.limits.get(part, given.limit)
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_sharding.py"]
    words += ["-k", "one_as_shards" if given.cpu else "on_two_gpus_too"]
    if part == "kills":
        only = "fsdp, 2 ranks" if given.cpu else "gpus"
        words = [sys.executable, "-u", "-m", "benchmarks.kill_ranks", "--kills", str(given.kills), "--only", only]
        words += ["--seconds", str(limit * 0.4 if given.cpu else limit * 0.25)]  # of each campaign
    print(f"{part}: {limit:.0f} s at most", flush=True)
    heard = Heard(words, limit)
    return {"part": part, "rc": heard.rc, "wall": round(heard.wall, 1), "said": heard._lines[-12:]}


def measure(given: Any, place: Path, part: str) -> dict[str, Any]:
    """Make one run in processes of its own, and give what it showed, also where it was cut off."""
    import yaml

    way, _, name = part.partition("_")
    ranks, limit = RUNS[name][0], given.limits.get(part, given.limit)
    run = place / f"{way}_{FROM.get(name, name)}"
    if name in FROM and not (run / "checkpoints").is_dir():
        return {"part": part, "rc": 1, "error": f"there is no checkpoint to go on from: --only {run.name} {part}"}
    recipe, job = place / f"{part}.yaml", place / "job.json"
    recipe.write_text(yaml.safe_dump(recipe_of(given, place, way, name)))
    job.write_text(json.dumps({"recipe": str(recipe), "run": str(run), "turns": given.turns, "savers": given.savers}))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    own = ["--rank", str(job), "--out", str(given.out), *(["--cpu"] if given.cpu else [])]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    print(f"{part}: {limit:.0f} s at most", flush=True)
    heard = Heard([sys.executable, *launch, "-m", "benchmarks.two_gpus", *own], limit)
    row: dict[str, Any] = {"part": part, "ranks": ranks, "rc": heard.rc, "wall": round(heard.wall, 1)}
    row |= {"stages": heard.stages, "dcp": heard.dcp, **held(heard.ranks)}
    if heard.rc:
        row |= {"cut off" if heard.rc == 124 else "ended in": heard.at, "error": heard.errors}
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return row | of_updates(given, rows, given.updates if name in FROM else 0) | of_saves(run)


def held(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks found that came to the end of their run."""
    found = sorted(ranks, key=lambda r: int(r["rank"]))
    return {
        "peak GiB a GPU": [round(r["peak"] / 2**30, 2) for r in found],
        "host peak GiB": [round(r["host"] / 2**30, 2) for r in found],
        "start s": [round(r["start"], 1) for r in found],
        "read MB": [round(r["read"] / 1e6) for r in found],
        "stalls s": [r["stalls"] for r in found],
        "durable s": [r["durable"] for r in found],
        "how": sorted({r["how"] for r in found}),
    }


def of_updates(given: Any, rows: list[dict[str, Any]], begun: int) -> dict[str, Any]:
    """Tokens a second and the updates after saves, of as many as there are."""
    steps = [r for r in rows if "loss" in r and r["step"] > begun]
    after = {r["step"]: r["seconds"] for r in steps}
    out: dict[str, Any] = {"updates": len(steps), "losses": [r["loss"] for r in steps]}
    every = given.updates // given.saves
    later = [s for n, s in after.items() if n > begun + 2 and (n - 1) % every] or list(after.values())
    if later:
        usual = statistics.median(later)
        out["tokens/s"] = round(8 * given.length / usual)
        out["updates after saves took more s"] = [
            round(after[n + 1] - usual, 3) for n in range(every, begun + given.updates, every) if n + 1 in after
        ]
    return out


def of_saves(run: Path) -> dict[str, Any]:
    """Bytes of the newest checkpoint that is whole."""
    steps = sorted(run.glob("checkpoints/step-*"))
    return {"save bytes": sum(p.stat().st_size for p in steps[-1].rglob("*") if p.is_file()) if steps else None}


# -- a rank ------------------------------------------------------------------------------------------------------------


def say(kind: str, what: Any) -> None:
    """Tell the process that measures."""
    os.write(1, f"{kind} {what if isinstance(what, str) else json.dumps(what)}\n".encode())


def on_a_rank(job_file: Path, device: str) -> int:
    """One process of a run: build and fit, then say what this process held."""
    import faulthandler

    faulthandler.register(signal.SIGUSR2, all_threads=True)
    say("PID", str(os.getpid()))
    first = os.environ.get("RANK") == "0"
    stages = Stages(
        float(os.environ["TWO_GPUS_BEGUN"]),
        (lambda name, seconds: say("STAGE", [name.strip(), round(seconds, 3)])) if first else lambda *_: None,
        (lambda name: say("AT", name.strip())) if first else lambda _: None,
    )
    stages.note("torchrun, interpreter", time.time() - stages.begun)
    with stages.stage("imports"):
        import torch

        from tensorkeep.training import distributed

        watch(stages)
    with stages.stage("ranks meet"):
        world = distributed.start(device)
    try:
        job = trained(stages, world, json.loads(job_file.read_text()))
        if world.size > 1:
            stages.at("torch's own saves")
            saved_by_dcp(job, job_file.parent, world, json.loads(job_file.read_text()), stages.begun)
        if device == "cuda":
            torch.cuda.synchronize()
    finally:
        with stages.stage("group left"):
            distributed.stop()
    return 0


def trained(stages: Stages, world: Any, asked: dict[str, Any]) -> Any:
    """Build and fit; returns the job when all that the run itself shows has been said."""
    import resource

    import torch

    from benchmarks.scale_life import returned
    from tensorkeep.language.job import build, loop_of
    from tensorkeep.language.recipe_text import read_language
    from tensorkeep.output import Output
    from tensorkeep.training.loop import fit
    from tensorkeep.training.saver import Saver

    savers: list[Saver] = []
    made = Saver.__init__

    def noted(self: Saver, *given: Any, **named: Any) -> None:
        savers.append(self)
        made(self, *given, **named)

    Saver.__init__ = noted  # type: ignore[method-assign]
    begun, read = time.perf_counter(), returned()
    with stages.stage("rest of the start"):
        recipe = read_language(asked["recipe"])
        job = build(recipe, asked["run"], world)
    found: dict[str, Any] = {"rank": world.rank, "start": time.perf_counter() - begun, "read": returned() - read}
    with stages.stage("rest of the run"):
        loop = loop_of(recipe, len(job.data))
        outcome = fit(job, asked["run"], loop, world=world, allow=("training*",), say=Output(quiet=True))
    found["peak"] = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["how"] = str(outcome.level)
    for name, times in (("stalls", "stalls"), ("durable", "durations")):
        found[name] = [round(s, 3) for saver in savers for s in getattr(saver, times)]
    say("RANK", found)
    return job


def saved_by_dcp(job: Any, place: Path, world: Any, asked: Any, begun_at: float) -> None:
    """Time torch's own saves of what trains and its moments, and one through `DurableWriter`, in turns.

    None is begun that would not be over within the budget, by what the longest before it took.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import tensorkeep as tk
    from tensorkeep.training import distributed

    state: dict[str, Any] = {}
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad:
            moments = job.optimizer.state.get(parameter, {})
            state |= {name: parameter.detach(), **{f"{name}.{k}": t for k, t in moments.items() if torch.is_tensor(t)}}
    group = dist.new_group(backend="gloo")  # async_save wants one of CPUs
    took: dict[str, float] = {}
    for turn in ("first", "second", "third")[: asked["turns"]]:
        for name in asked["savers"]:
            folder = place / f"{turn}_{name}"
            left = float(os.environ["TWO_GPUS_LIMIT"]) - (time.time() - begun_at) - 10.0
            if max(distributed.gathered(world, max([*took.values(), 0.0]) > left)):
                return
            took = {}
            begun = time.perf_counter()
            if name == "dcp.save":
                dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
            elif name == "DurableWriter":
                dcp.save(state, storage_writer=tk.DurableWriter(folder))
            else:
                future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
                took[f"{turn} {name} returned"] = round(time.perf_counter() - begun, 3)
                future.result()
            took[f"{turn} {name}"] = round(time.perf_counter() - begun, 3)
            dist.barrier()
            if world.rank == 0:
                say("DCP", took)
                shutil.rmtree(folder)


def tell(out: Path, row: dict[str, Any]) -> None:
    with (out / "two_gpus.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    for name, value in row.items():
        print(f"    {name}: {value}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
