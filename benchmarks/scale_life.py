"""Where the time of a sharded full fine-tune goes, from its launch to the end of its processes, and again on resume.

    python -m benchmarks.scale_life [--layers 3 8 16] [--ranks 2] [--background] [--folder DIR] [--json FILE]

A Llama 1024 wide in bf16 is written, and trained by the ordinary recipe under FSDP2 with AdamW and an average, through
torchrun over gloo: two updates, each saved. The same command then goes on for two more. Every stage is a function that
is replaced by one that notes seconds and CPU seconds (of the slowest rank, less those of the stages inside it), bytes
that its read calls returned and the peak of anonymous memory. Beside them, in the same processes, torch's own
`dcp.save` and `dcp.load` of what the run saves: weights, moments and average.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measure import anonymous, versions

WIDTH, VOCABULARY, LENGTH = 1024, 8192, 64
WORDS = ("one", "token", "follows", "another", "a", "small", "model", "learns", "from", "texts")
UPDATES = 2  # of a start
LITTLE = 0.1  # seconds; stages that took less at every size are left out of the tables
TITLE = "## From launch to end, by stage (`benchmarks.scale_life`)"
NOTHING = {"seconds": 0.0, "cpu": 0.0, "read": 0.0, "peak": 0.0}


class Stages:
    """Seconds, bytes read and peak memory of named stages; a stage within another is taken out of its seconds.

    Args:
        begun: when the command was launched, by the wall clock.
        tell: called with each stage's name and seconds when it is over.
        at: called with its name when it begins, so that a run that is cut off says where it was.
    """

    def __init__(
        self,
        begun: float,
        tell: Callable[[str, float], None] = lambda *_: None,
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.begun, self.tell, self.at = begun, tell, at
        self.found: dict[str, dict[str, float]] = {}
        self._inside: dict[int, list[tuple[float, ...]]] = {}
        self._high = 0
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self._high = max(self._high, anonymous(os.getpid()))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note what the body takes."""
        self.at(name)
        inside = self._inside.setdefault(threading.get_ident(), [])
        inside.append((0.0, 0.0, 0.0))
        self._high = anonymous(os.getpid())
        before = (time.perf_counter(), time.process_time(), returned())
        try:
            yield
        finally:
            now = (time.perf_counter(), time.process_time(), returned())
            took, other = [b - a for a, b in zip(before, now)], inside.pop()
            if inside:
                inside[-1] = tuple(a + b for a, b in zip(inside[-1], took))
            row = self.found.setdefault(name, dict(NOTHING))
            for key, all_of_it, within in zip(("seconds", "cpu", "read"), took, other):
                row[key] += all_of_it - within
            row["peak"] = max(row["peak"], self._high, anonymous(os.getpid()))
            self.tell(name, took[0] - other[0])

    def note(self, name: str, seconds: float) -> None:
        """Note seconds that were measured elsewhere."""
        self.found.setdefault(name, dict(NOTHING))["seconds"] += seconds
        self.tell(name, seconds)

    def of(self, owner: Any, name: str, label: str | Callable[[], str]) -> None:
        """Let every call of a function be a stage."""
        before = getattr(owner, name)

        @functools.wraps(before)
        def staged(*given: Any, **named: Any) -> Any:
            with self.stage(label if isinstance(label, str) else label()):
                return before(*given, **named)

        setattr(owner, name, staged)


def returned() -> int:
    """What the read calls of this process returned, in bytes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def watch(stages: Stages) -> None:
    """Make the stages of a language run under FSDP2."""
    from tensorkeep.language import job as building
    from tensorkeep.training import _shard_plan, _shard_work, loop, saver

    updates, saves = iter(range(1, 1 << 30)), iter(range(1, 1 << 30))

    def numbered(what: str, numbers: Iterator[int]) -> Callable[[], str]:
        return lambda: f"{what} {number}" if (number := next(numbers)) < 3 else f"{what}s after"

    stages.of(building, "start_of", "config, tokenizer, model without values")
    stages.of(building, "_place", "shards made and read")
    stages.of(building, "make_data", "data")
    stages.of(building, "make_optimizer", "optimizer")
    stages.of(building, "Ema", "average")
    stages.of(loop, "_put_newest", "checkpoint found and put back")
    stages.of(loop, "check_room", "room on the disk")
    stages.of(loop, "update", numbered("update", updates))
    stages.of(loop, "_save", numbered("save", saves))
    stages.of(loop.resuming, "snapshot", "  of saves: state by name, random states")
    stages.of(_shard_plan.ShardPlan, "part", "  of saves: plan")
    stages.of(saver.Stage, "copy", "  of saves: copy")
    stages.of(_shard_work.ShardWork, "_written", "  of saves: own file written")
    stages.of(_shard_work, "complete", "  of saves: list and manifest (rank 0)")
    stages.of(_shard_work.ShardWork, "carry_out", "  of saves: waiting for each other")
    stages.of(_shard_work.ShardWork, "tidy", "  of saves: older ones deleted")
    stages.of(saver.Saver, "wait", "  of saves: waiting for the one before")


# -- a rank -----------------------------------------------------------------------------------------------------------


def rank(folder: Path, updates: int, background: bool) -> None:
    """One process of a start: build, fit, and torch's own saves of the same."""
    stages = Stages(float(os.environ["LIFE_BEGUN"]))
    stages.note("torchrun, interpreter", time.time() - stages.begun)
    with stages.stage("imports"):
        import torch
        import torch.distributed.checkpoint
        import transformers
        from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  what a start imports in any case

        from tensorkeep.language import job as building
        from tensorkeep.language.recipe_text import language_recipe
        from tensorkeep.training import distributed
        from tensorkeep.training import loop as looping
        from tensorkeep.training.fsdp import shard_modules  # noqa: F401

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
    empty = anonymous(os.getpid())
    watch(stages)
    with stages.stage("ranks meet"):
        world = distributed.start("cpu")
    with stages.stage("rest of the start"):
        recipe = language_recipe(recipe_of(folder, updates, background))
        job = building.build(recipe, folder / "run", world)
    with stages.stage("rest of the run"):
        loop = building.loop_of(recipe, len(job.data))
        looping.fit(job, folder / "run", loop, world=world, allow=("training*",))
    share = sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in job.model.parameters())
    state = saved(job)
    for turn in ("first", "second"):
        by_dcp(stages, turn, folder, state, world)
    found: dict[str, Any] = {"stages": stages.found, "share": share, "empty": empty}
    found["whole"] = sum(p.numel() for p in job.model.parameters()) * 4
    with stages.stage("group left"):
        distributed.stop()
    found["over"] = time.time()
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))


def saved(job: Any) -> dict[str, Any]:
    """What a run saves, for torch."""
    from tensorkeep.training.live_state import optimizer_state, stored_tensors

    tensors, _ = stored_tensors(job.model, base=False)
    return {"model": tensors, "optimizer": optimizer_state(job.model, job.optimizer)[0], "ema": job.ema.state_dict()}


def by_dcp(stages: Stages, turn: str, folder: Path, state: dict[str, Any], world: Any) -> None:
    """A save and a load by torch's own writer and reader, as torchtitan calls them."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    place = folder / f"dcp-{turn}"
    with stages.stage(f"dcp.save, {turn}"):
        dcp.save(state, checkpoint_id=place)
    with stages.stage(f"dcp.load, {turn}"):
        dcp.load(state, checkpoint_id=place)
    dist.barrier()
    if world.rank == 0:
        shutil.rmtree(place)


def recipe_of(folder: Path, updates: int, background: bool) -> dict[str, Any]:
    """The recipe of the run."""
    training: dict[str, Any] = {"updates": updates, "batch_size": 2, "parallel": "fsdp", "precision": "bf16"}
    training |= {"save_every": 1, "ema": 0.999, "keep_last": 1, "background": background}
    data = {"files": str(folder / "a.jsonl"), "length": LENGTH}
    return {"version": 2, "model": str(folder / "base"), "training": training, "data": data}


# -- the starts -------------------------------------------------------------------------------------------------------


def made(folder: Path, layers: int, width: int = WIDTH) -> int:
    """Write a Llama in bf16, a tokenizer and texts; returns its parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tensorkeep.language.start import from_config

    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    model: Any = from_config({"model_type": "llama", "tie_word_embeddings": False, **shape}, seed=1)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    split: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *WORDS])}, "<pad>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")
    fast.save_pretrained(folder / "base")
    (folder / "a.jsonl").write_text(8 * (json.dumps({"text": " ".join(6 * WORDS)}) + "\n"))
    return sum(p.numel() for p in model.parameters())


def launched(folder: Path, ranks: int, updates: int, background: bool) -> dict[str, Any]:
    """Run one start; each stage with the most that a rank had, in the order of the first rank."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words += ["-m", "benchmarks.scale_life", "--folder", str(folder), "--updates", str(updates)]
    words += ["--background"] if background else []
    begun = time.time()
    done = subprocess.run(
        [*words, "--rank"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIFE_BEGUN": str(begun)},
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(done.stderr[-5000:])
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(ranks)]
    out: dict[str, Any] = {"share": max(f["share"] for f in found), "whole": found[0]["whole"], "stages": {}}
    for name in found[0]["stages"]:
        rows = [f["stages"][name] for f in found if name in f["stages"]]
        out["stages"][name] = {key: max(row[key] for row in rows) for key in rows[0]}
        out["stages"][name]["peak"] -= min(f["empty"] for f in found)
    last = {**NOTHING, "seconds": ended - max(f["over"] for f in found)}
    out["stages"] |= {"processes end": last, "wall": {**NOTHING, "seconds": ended - begun}}
    return out


def table(title: str, sizes: dict[Any, list[dict[str, Any]]]) -> list[str]:
    """One table: a row for each stage, columns for each size: seconds, MB read, peak MB of a rank; medians of turns."""
    heads = [f"{int(count) / 1e6:.0f} M: s (CPU s) | MB read | peak MB" for count in sizes]
    lines = [f"### {title}", "", f"| stage | {' | '.join(heads)} |", "|---" * (1 + 3 * len(sizes)) + "|"]
    first = next(iter(sizes.values()))[0]
    lines.append(
        "| *float32 weights, whole / a rank* | "
        + " | ".join(f"| | {s[0]['whole'] / 1e6:,.0f} / {s[0]['share'] / 1e6:,.0f}" for s in sizes.values())
        + " |"
    )
    for name in first["stages"]:
        cells = []
        if max(t["stages"].get(name, NOTHING)["seconds"] for turns in sizes.values() for t in turns) < LITTLE:
            continue
        for turns in sizes.values():
            rows = [turn["stages"][name] for turn in turns if name in turn["stages"]]
            middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]} if rows else {}
            if not middle:
                cells.append("| |")
                continue
            read = f"{middle['read'] / 1e6:,.0f}" if middle["read"] > 1e6 else ""
            peak = f"{middle['peak'] / 1e6:,.0f}" if middle["peak"] > 0 else ""
            cpu = f" ({middle['cpu']:.2f})" if middle["cpu"] else ""
            cells.append(f"{middle['seconds']:.2f}{cpu} | {read} | {peak}")
        lines.append(f"| {name.strip()} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[3, 8, 16])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--background", action="store_true", help="write behind the training, as on a GPU")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, help="print the tables of a --json of before, run nothing")
    parser.add_argument("--into", type=Path, help="put the tables into this page, in place of those of before")
    parser.add_argument("--updates", type=int, default=UPDATES, help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.folder, options.updates, options.background)
        return
    if options.show:
        told(json.loads(options.show.read_text()), options)
        return
    starts: dict[str, dict[int, list[dict[str, Any]]]] = {"A new run": {}, "Gone on": {}}
    for layers in options.layers:
        for _ in range(options.turns):
            folder = Path(tempfile.mkdtemp(prefix="life-", dir=options.folder))
            try:
                count = made(folder, layers)
                for number, turns in enumerate(starts.values(), 1):
                    found = launched(folder, options.ranks, number * UPDATES, options.background)
                    turns.setdefault(count, []).append(found)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        if options.json:
            options.json.write_text(json.dumps(starts, indent=1) + "\n")
    told(starts, options)


def told(starts: dict[str, dict[Any, list[dict[str, Any]]]], options: argparse.Namespace) -> None:
    """Print the tables, and put them into a page."""
    head = f"{date.today()}, {versions('torch', 'transformers')}, {options.ranks} ranks over gloo."
    lines = [head, "", *(line for title, sizes in starts.items() for line in table(title, sizes))]
    print("\n".join(lines))
    if options.into:
        page = options.into.read_text()
        begun = page.find(f"{TITLE}\n")
        before, rest = (page[:begun], page[begun + len(TITLE) :]) if begun >= 0 else (f"{page.rstrip()}\n\n", "")
        after = re.search(r"^(## |### Shown)", rest, re.MULTILINE)
        kept = rest[after.start() :] if after else ""
        options.into.write_text(f"{before}{TITLE}\n\n" + "\n".join(lines) + (f"\n{kept}" if kept else ""))


if __name__ == "__main__":
    main()
