"""Kill the training of a small language model at random instants, start it again until it ends, and count losses.

    python -m benchmarks.kill --kills 200 --peers 40 --json kill.json

Every update is saved, so that most kills land inside a save. Each start is a forked process (the imports are made
once), killed after a random time since its start; what it saved and heard acknowledged lies in memory shared with the
parent.
Counted: kills; those inside a save; starts that could not resume although a whole checkpoint was there (`stuck`; the
newest checkpoint is then removed by hand); acknowledged checkpoints that were lost; metric rows missing or twice; runs
that ended with other weights, moments, average or rows than the run nobody killed. For us the data is augmented at
random and worker counts change between starts; peers get neither.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import versions
from tensorkeep.errors import TensorkeepError
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.ema import Ema
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.saver import Saver

UPDATES, BATCH, LENGTH = 40, 4, 32
TEXT = " ".join(f"line {i}: {i * i % 997} follows {i * 7 % 101}." for i in range(400)).encode()


class Marks:
    """Shared memory in which a child tells whether it trains, whether it saves, and what was acknowledged."""

    def __init__(self) -> None:
        self.room = mmap.mmap(-1, 64)

    def get(self) -> tuple[int, int, int]:
        """Return (training, saving, acknowledged step)."""
        return struct.unpack_from("qqq", self.room)

    def set(self, index: int, value: int) -> None:
        struct.pack_into("q", self.room, 8 * index, value)


@dataclass
class System:
    """One tool: how it trains and resumes, how a finished run is digested, and which step it would resume from."""

    name: str
    train: Callable[[Path, Marks, int], None]  # folder, marks, number of the start
    result: Callable[[Path], Any]
    newest: Callable[[Path], int | None]
    drop_newest: Callable[[Path], None]


@dataclass
class Count:
    """Counts of what happened to one tool."""

    system: str
    kills: int = 0
    in_save: int = 0
    stuck: int = 0
    lost: int = 0
    runs: int = 0
    different: int = 0
    rows_wrong: int = 0
    notes: list[str] = field(default_factory=list)


# -- ours -------------------------------------------------------------------------------------------------------------


class Text:
    """Windows of a text; each begins at a place within its stretch that is drawn anew in every epoch."""

    def __init__(self, shift: bool = True) -> None:
        self.ids, self.shift = torch.tensor(list(TEXT)), shift

    def __len__(self) -> int:
        return 61

    def sample(self, index: int, generator: torch.Generator) -> Tensor:
        """Return a sample, int64 [LENGTH]."""
        start = index * 100 + (int(torch.randint(60, (), generator=generator)) if self.shift else 0)
        return self.ids[start : start + LENGTH]

    def fingerprint(self) -> str:
        return hashlib.sha256(TEXT).hexdigest()


def model() -> nn.Module:
    """A Llama of 0.1 million parameters with dropout in its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config)


def tokens_loss(model: nn.Module, ids: Tensor, divisor: float) -> dict[str, Tensor]:
    """`ids` int64 [B, LENGTH]; next-token cross-entropy, summed and divided by the tokens of the update."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / divisor}


def tokens(ids: Tensor) -> float:
    return float(ids[:, 1:].numel())


def cosine(update: int, base: float) -> float:
    return float(base * (0.5 + 0.5 * torch.cos(torch.tensor(update / UPDATES * 3.14159)).item()))


def job(device: str | torch.device = "cpu") -> Job:
    net = model().to(device)
    data = Text()
    held_out = torch.stack([data.ids[7000 + 40 * i : 7000 + 40 * i + LENGTH] for i in range(4)]).to(device)

    def evaluate(net: nn.Module) -> dict[str, float]:
        return {"loss": float(tokens_loss(net, held_out, tokens(held_out))["loss"])}

    return Job(
        model=net,
        optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3),
        data=data,
        collate=torch.stack,
        loss=tokens_loss,
        count=tokens,
        schedule=cosine,
        evaluate=evaluate,
        ema=Ema(net, 0.99),
        recipe={"text": "numbers"},
    )


def mark_saves(marks: Marks) -> None:
    """From here on this process tells when it saves, and which step was acknowledged."""
    save, finish = Saver.save, Saver._finish

    def saving(self: Saver, *given: Any) -> None:
        marks.set(1, 1)
        save(self, *given)

    def finished(self: Saver, work: Any, **options: Any) -> None:
        finish(self, work, **options)
        marks.set(2, int(self._path.name.removeprefix("step-")))  # from here on the caller may hear that it is durable
        marks.set(1, 0)

    Saver.save, Saver._finish = saving, finished  # type: ignore[method-assign]


def train_ours(run: Path, marks: Marks, start: int, workers: tuple[int, ...] = (0,)) -> None:
    mark_saves(marks)
    loop = Loop(
        updates=UPDATES,
        batch=BATCH,
        micro=2,
        save_every=1,
        log_every=1,
        evaluate_every=5,
        best="-loss",
        workers=workers[start % len(workers)],
    )
    made = job()
    marks.set(0, 1)
    fit(made, run, loop)


def result_ours(run: Path) -> Any:
    """Digests of the last checkpoint's tensors and documents, and every row without its time and memory."""
    found = checkpoint.newest(run)
    assert found is not None
    state = found[0]
    digest = hashlib.sha256(json.dumps(state.document, sort_keys=True).encode())
    for part in (state.model, state.optimizer, state.ema):
        for name, tensor in sorted(part.items()):
            digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    rows = metrics.comparable(run / metrics.METRICS)
    return {"digest": digest.hexdigest(), "rows": rows, "best": checkpoint.best(run)}


def newest_ours(run: Path) -> int | None:
    """The step that a resume would take, every byte of it compared with its digest."""
    try:
        found = checkpoint.newest(run)
    except TensorkeepError:
        return None
    return None if found is None else int(found[0].document["step"])


def drop_ours(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{checkpoint.steps(run)[0]:06}")


# -- the protocol -----------------------------------------------------------------------------------------------------


def begin(system: System, run: Path, marks: Marks, start: int) -> int:
    """Fork a start; its process id. It leaves with 0 at the end of training, with 3 after an error."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(os.open(run.parent / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
        system.train(run, marks, start)
        os._exit(0)
    except BaseException:  # noqa: BLE001  the parent reads what it was
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)


def wait(pid: int, seconds: float | None) -> int | None:
    """The exit status, None where the process was killed after `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return None if code == -signal.SIGKILL else code
        time.sleep(0.001)


def campaign(system: System, kills: int, seed: int, longest: float) -> Count:
    """Run one tool until it was killed so often; kills come up to `longest` seconds after a start begins to train."""
    chance, count = random.Random(seed), Count(system.name)
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        place = Path(temporary)
        marks = Marks()
        status = wait(begin(system, place / "whole", marks, 0), None)
        if status != 0:
            raise SystemExit(f"{system.name} fails without a kill:\n{(place / 'stderr').read_text()[-2000:]}")
        whole = system.result(place / "whole")
        while count.kills < kills:
            one_run(system, place / f"run-{count.runs}", whole, count, kills, chance, longest)
            shutil.rmtree(place / f"run-{count.runs}", ignore_errors=True)
            count.runs += 1
            print(f"  {count}", file=sys.stderr)
    return count


def one_run(
    system: System, run: Path, whole: Any, count: Count, kills: int, chance: random.Random, longest: float
) -> None:
    """One run to its end, killed on the way; after the last kill it may go on in peace."""
    marks, start = Marks(), 0
    while True:
        marks.set(0, 0)
        marks.set(1, 0)
        start += 1
        pid = begin(system, run, marks, start)
        early = chance.random() < 0.1  # some while it still loads
        while not early and not marks.get()[0] and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.001)
        status = wait(pid, chance.uniform(0, longest) if count.kills < kills else None)
        _, saving, acknowledged = marks.get()
        if status is None:
            count.kills += 1
            count.in_save += saving
            picked = system.newest(run)
            if acknowledged and (picked is None or picked < acknowledged):
                count.lost += 1
        elif status == 0:
            break
        else:
            count.stuck += 1
            note = (run.parent / "stderr").read_text().strip().splitlines()[-1:]
            if note and note[0][:160] not in count.notes and len(count.notes) < 4:
                count.notes.append(note[0][:160])
            system.drop_newest(run)
    compare(system.result(run), whole, count)


def compare(result: Any, whole: Any, count: Count) -> None:
    rows = [row["step"] for row in result.get("rows", []) if "evaluation" not in row]
    wanted = [row["step"] for row in whole.get("rows", []) if "evaluation" not in row]
    count.rows_wrong += rows != wanted
    count.different += result != whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--peers", type=int, default=40, help="kills of each peer, 0 for none")
    parser.add_argument("--only", default="", help="systems whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    job()  # what it imports is imported once, before the forks
    tools = [
        (System("tensorkeep", train_ours, result_ours, newest_ours, drop_ours), options.kills),
        (System("tensorkeep, 0/1/2 workers in turn", mixed, result_ours, newest_ours, drop_ours), options.kills // 2),
    ]
    if options.peers:
        from benchmarks import kill_peers

        tools += [(system, options.peers) for system in kill_peers.systems()]
    counts = [campaign(s, n, options.seed, options.longest) for s, n in tools if options.only in s.name]
    print(f"{versions('torch', 'transformers', 'accelerate', 'pytorch-lightning')}; {UPDATES} updates, each saved\n")
    columns = ("system", "kills", "in_save", "stuck", "lost", "runs", "different", "rows_wrong")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for count in counts:
        print("| " + " | ".join(str(getattr(count, c)) for c in columns) + " |")
    for count in counts:
        for note in count.notes:
            print(f"{count.system}: {note}")
    if options.json:
        options.json.write_text(json.dumps([asdict(c) for c in counts], indent=1) + "\n")


def mixed(run: Path, marks: Marks, start: int) -> None:
    train_ours(run, marks, start, workers=(0, 1, 2))


if __name__ == "__main__":
    main()
