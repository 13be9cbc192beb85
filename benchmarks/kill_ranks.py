"""Kill ranks of a training under torchrun's agent at random instants, and count what its restarts lose.

    python -m benchmarks.kill_ranks --kills 30 --json kill_ranks.json

The agent is torchrun's own (`elastic_launch`, which the command calls, with a rendezvous of its own and unlimited
restarts); its workers are forked, so that a restart takes a second and not ten. The last campaign, a third as long,
runs the command itself. Model, text and job are those of `benchmarks.kill`; every update is saved, in shards (fsdp) or
whole (ddp), behind the training in every other start. A fork of the agent may take along a lock of glibc's resolver
that another thread holds; such a rank never comes, the others end after 20 seconds, and the agent starts all again.

A fifth of the kills takes all ranks at once, the others one at random; one of five comes while the ranks still start
and resume. Whoever is killed gets SIGKILL; the others hear of it by the agent and their broken connections alone.

Counted: kills; those inside a save; those before training; restarts that did not come to train (`stuck`: the whole job
is then ended and begun anew); acknowledged checkpoints that the next start did not resume from (`lost`); metric rows
missing or twice; runs that ended with other bits than the run nobody killed. With changing numbers of ranks the agent
is killed too, and a new one with another number goes on; there weights, moments and averages are compared by their
relative difference.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import mmap
import os
import random
import secrets
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.kill import UPDATES, drop_ours, job, result_ours
from benchmarks.measure import versions
from tensorkeep.training import _resume as resuming
from tensorkeep.training import distributed, metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.saver import Saver

START_WAIT = 20.0  # seconds that the ranks of a start wait for each other
PATIENCE = 120.0  # seconds that a start may take to train, and a run to end
MOST = 8  # ranks, and one more for what all are told
PID, START, TRAINS, SAVES, RESUMED, ACKNOWLEDGED = range(6)


class Marks:
    """Shared memory in which every rank tells its process, its start, and what it is at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(64 * MOST))
        with path.open("r+b") as file:
            self.room = mmap.mmap(file.fileno(), 64 * MOST)

    def get(self, rank: int, what: int) -> int:
        return int(struct.unpack_from("q", self.room, 64 * rank + 8 * what)[0])

    def set(self, rank: int, what: int, value: int) -> None:
        struct.pack_into("q", self.room, 64 * rank + 8 * what, value)


@dataclass
class Count:
    """Counts of what happened in one campaign."""

    system: str
    kills: int = 0
    in_save: int = 0
    in_resume: int = 0
    all_at_once: int = 0
    first: int = 0
    stuck: int = 0
    lost: int = 0
    runs: int = 0
    different: int = 0
    rows_wrong: int = 0
    relative: float = 0.0
    seconds: float = 0.0
    slowest_restart: float = 0.0
    again: float = 0.0  # seconds from a kill until all ranks are processes again, median
    trains: float = 0.0  # and from then until all train
    notes: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """One campaign: how many ranks in turn, how they share the state, and what they train."""

    name: str
    sizes: tuple[int, ...]
    parallel: Any
    make: Callable[..., Job] = job
    updates: int = UPDATES
    best: str | None = "-loss"
    command: bool = False  # torchrun itself, whose ranks import everything anew
    device: str = "cpu"


# -- a rank -----------------------------------------------------------------------------------------------------------


def work(run: str, marks: Marks, plan: Plan) -> None:
    """Be one rank of a start: what torchrun calls."""
    rank, start = int(os.environ["RANK"]), marks.get(7, START)
    for what in (TRAINS, SAVES, RESUMED):
        marks.set(rank, what, 0)
    marks.set(rank, PID, os.getpid())
    marks.set(rank, START, int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + start)
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # asked where it is stuck
    tell(rank, marks)
    world = distributed.start(plan.device, START_WAIT)
    made, even = plan.make(world.device), marks.get(rank, START) % 2 == 0
    loop = Loop(
        updates=plan.updates,
        batch=4,
        micro=2,
        save_every=1,
        log_every=1,
        evaluate_every=5,
        best=plan.best,
        parallel=plan.parallel,
        background=even,
        watchdog=60.0,
        deterministic=plan.device != "cpu",
    )
    fit(made, run, loop, world=world)
    if world.size > 1:
        torch.distributed.barrier()
    distributed.stop()


def tell(rank: int, marks: Marks) -> None:
    """From here on this process tells what it resumed from, when it trains and saves, and what was acknowledged."""
    put_back, save, finish, snapshot = resuming.put_back, Saver.save, Saver._finish, resuming.data_facts

    def putting(job: Any, loop: Any, world: Any, state: Any, *more: Any, **named: Any) -> Any:
        marks.set(rank, RESUMED, int(state.document["step"]))
        return put_back(job, loop, world, state, *more, **named)

    def saving(self: Saver, *given: Any) -> None:
        marks.set(rank, SAVES, 1)
        save(self, *given)

    def finished(self: Saver, work: Any, **options: Any) -> None:
        finish(self, work, **options)
        assert self._path is not None
        marks.set(rank, ACKNOWLEDGED, int(self._path.name.removeprefix("step-")))
        marks.set(rank, SAVES, 0)

    def facts(job: Job) -> Any:
        schedule = job.schedule

        def scheduled(update: int, base: float) -> float:  # asked at the first update, and at every other
            marks.set(rank, TRAINS, 1)
            return schedule(update, base)

        job.schedule = scheduled
        return snapshot(job)

    resuming.put_back, resuming.data_facts = putting, facts
    Saver.save, Saver._finish = saving, finished  # type: ignore[method-assign]


def small(device: str | torch.device = "cpu") -> Job:
    """The job without dropout, whose numbers do not depend on how many ranks there are but for rounding."""
    made = job(device)
    for module in made.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


# -- the agent --------------------------------------------------------------------------------------------------------


def begin(run: Path, marks: Marks, plan: Plan, size: int) -> int:
    """Fork torchrun's agent; its process id. It leaves with 0 at the end of training, with 3 after an error."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        os.dup2(os.open(run.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
        os.dup2(2, 1)
        if plan.command:
            words = (
                f"--standalone --nproc-per-node {size} --max-restarts 1000000 -m benchmarks.kill_ranks --rank".split()
            )
            more = [str(run), str(marks.path), plan.name]
            os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words, *more])
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=secrets.token_hex(8),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # threads look a name up, under a lock that a fork keeps
            local_addr="127.0.0.1",
            max_restarts=10**6,
            start_method="fork",
        )
        elastic_launch(config, work)(str(run), marks, plan)
        os._exit(0)
    except BaseException:  # noqa: BLE001  the parent reads what it was
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)


def ended(pid: int) -> int | None:
    """The agent's exit status, None while it lives."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def kill_all(agent: int, marks: Marks, size: int) -> None:
    """End an agent and its ranks, as a host that loses power."""
    for pid in (agent, *(marks.get(rank, PID) for rank in range(size))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(agent, 0)
    while any(Path(f"/proc/{marks.get(rank, PID)}").exists() for rank in range(size)):
        time.sleep(0.01)


# -- the protocol -----------------------------------------------------------------------------------------------------


class Killer:
    """Kills ranks of one campaign, and counts."""

    def __init__(self, plan: Plan, kills: int, seed: int, longest: float, place: Path, seconds: float = 1e9) -> None:
        self.plan, self.kills, self.longest, self.place = plan, kills, longest, place
        self.end = time.monotonic() + seconds
        self.restarts: list[tuple[float, float]] = []
        self.living: tuple[int, Marks, int] | None = None
        self.chance, self.count = random.Random(seed), Count(plan.name)

    def campaign(self) -> Count:
        """Run until so many were killed; the run that nobody kills comes first."""
        began = time.monotonic()
        whole = self.whole()
        print(f"  {self.plan.name}: whole in {time.monotonic() - began:.1f} s", file=sys.stderr)
        while self.count.kills < self.kills and time.monotonic() < self.end:
            run = self.place / f"run-{self.count.runs}"
            self.one_run(run)
            self.compare(run, whole)
            shutil.rmtree(run)
            self.count.runs += 1
            self.count.seconds = time.monotonic() - began
            print(f"  {self.count}", file=sys.stderr)
        return self.count

    def whole(self) -> Path:
        """The run that nobody kills."""
        run, marks, size = self.place / "whole", Marks(self.place / "whole.marks"), self.plan.sizes[0]
        agent = begin(run, marks, self.plan, size)
        self.living = agent, marks, size
        if (status := self.waited(agent, PATIENCE)) is None:
            kill_all(agent, marks, size)
        if status != 0:
            raise SystemExit(f"fails without a kill:\n{(self.place / 'output').read_text()[-3000:]}")
        return run

    def one_run(self, run: Path) -> None:
        """One run to its end, killed on the way; after the last kill it may go on in peace."""
        marks, sizes, number = Marks(run.with_suffix(".marks")), self.plan.sizes, 0
        while True:
            size = sizes[number % len(sizes)]
            marks.set(7, START, 1000 * number)  # starts are numbered on from here
            for rank in range(size):
                marks.set(rank, START, -1)
            agent = begin(run, marks, self.plan, size)
            self.living = agent, marks, size
            if self.one_agent(agent, marks, size, 1000 * number, run):
                return
            number += 1

    def one_agent(self, agent: int, marks: Marks, size: int, start: int, run: Path) -> bool:
        """Kill ranks of one agent; whether the run came to its end."""
        acknowledged, most = 0, self.chance.randint(2, 4) if len(self.plan.sizes) > 1 else 10**9
        while True:
            since = time.monotonic()
            early = self.chance.random() < 1 / 5
            came = self.reached(agent, marks, size, start, PID)
            processes = time.monotonic() - since
            if not came or not (early or self.reached(agent, marks, size, start, TRAINS)):
                return ended(agent) == 0 or self.is_stuck(agent, marks, size, run)
            if not early:
                self.count.slowest_restart = max(self.count.slowest_restart, time.monotonic() - since)
                self.note_restart(start, processes, time.monotonic() - since - processes)
                resumed = {marks.get(rank, RESUMED) for rank in range(size)}
                self.count.lost += min(resumed) < acknowledged or len(resumed) > 1
            if self.count.kills >= self.kills or time.monotonic() > self.end:
                return self.to_the_end(agent) or self.is_stuck(agent, marks, size, run)
            status = self.waited(agent, self.chance.uniform(0, 0.5 if early else self.longest * size / 2))
            if status is not None:
                return status == 0 or self.is_stuck(agent, marks, size, run)
            acknowledged = max(acknowledged, *(marks.get(rank, ACKNOWLEDGED) for rank in range(8)))
            if most <= 1:
                self.note_kill(marks, range(size))
                kill_all(agent, marks, size)
                return False
            most -= 1
            every = self.chance.random() < 0.2
            self.kill(marks, range(size) if every else [self.chance.randrange(size)])
            start += 1

    def note_restart(self, start: int, again: float, trains: float) -> None:
        """Note how long a start took that a kill made necessary."""
        if start % 1000:  # the first of an agent came after no kill of a rank
            self.restarts.append((again, trains))
            self.count.again, self.count.trains = (statistics.median(times) for times in zip(*self.restarts))
            print(f"  again after {again:.1f} s, training {trains:.1f} s later", file=sys.stderr)

    def reached(self, agent: int, marks: Marks, size: int, start: int, what: int) -> bool:
        """Wait until all ranks of a start have come so far; False where the agent ended, or they do not come."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if all(marks.get(r, START) >= start and (what == PID or marks.get(r, what)) for r in range(size)):
                return True
            if os.waitid(os.P_PID, agent, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.001)
        return False

    def waited(self, agent: int, seconds: float) -> int | None:
        """Wait; the agent's status where it ended meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (status := ended(agent)) is not None:
                return status
            time.sleep(0.001)
        return None

    def to_the_end(self, agent: int) -> bool:
        """Let a run go on in peace; whether it ended well."""
        return self.waited(agent, PATIENCE) == 0

    def note_kill(self, marks: Marks, victims: Sequence[int]) -> None:
        count = self.count
        count.kills += 1
        count.in_save += any(marks.get(rank, SAVES) for rank in victims)
        count.in_resume += not all(marks.get(rank, TRAINS) for rank in victims)
        count.all_at_once += len(victims) > 1
        count.first += list(victims) == [0]

    def kill(self, marks: Marks, victims: Sequence[int]) -> None:
        """SIGKILL to ranks."""
        self.note_kill(marks, victims)
        for rank in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(marks.get(rank, PID), signal.SIGKILL)

    def is_stuck(self, agent: int, marks: Marks, size: int, run: Path) -> bool:
        """Count a job that does not go on, end it, and let another begin, after ten without the newest checkpoint."""
        self.count.stuck += 1
        for rank in range(size):
            with contextlib.suppress(ProcessLookupError):
                os.kill(marks.get(rank, PID), signal.SIGUSR2)
        time.sleep(1.0)
        kept = Path(tempfile.gettempdir()) / f"stuck-{self.count.stuck}-{secrets.token_hex(2)}.txt"
        shutil.copy(self.place / "output", kept)
        told = [[marks.get(rank, what) for what in range(6)] for rank in range(size)]
        self.count.notes.append(f"kills {self.count.kills}, marks {told}, stacks in {kept}")
        kill_all(agent, marks, size)
        if self.count.stuck % 10 == 0:
            drop_ours(run)
        return False

    def compare(self, run: Path, whole: Path) -> None:
        """Compare the end of a run with that of the run nobody killed."""
        rows = [[r["step"] for r in metrics.rows(p / metrics.METRICS) if "evaluation" not in r] for p in (run, whole)]
        self.count.rows_wrong += rows[0] != rows[1]
        if len(self.plan.sizes) == 1:
            self.count.different += result_ours(run) != result_ours(whole)
            return
        by = relative(run, whole)
        self.count.relative = max(self.count.relative, by)
        self.count.different += by >= 1e-5


def relative(one: Path, other: Path) -> float:
    """How far the weights, moments and averages of two runs are apart: the largest of the three, in L2."""
    a, b = (found[0] for run in (one, other) if (found := checkpoint.newest(run)) is not None)
    out = 0.0
    for part in ("model", "optimizer", "ema"):
        mine, theirs = getattr(a, part), getattr(b, part)
        if set(mine) != set(theirs):
            return float("inf")
        x, y = (torch.cat([t.double().flatten() for _, t in sorted(held.items())]) for held in (mine, theirs))
        out = max(out, float((x - y).norm() / y.norm()))
    return out


PLANS = (
    Plan("fsdp, 2 ranks", (2,), "fsdp"),
    Plan("fsdp, 4 ranks", (4,), "fsdp"),
    Plan("ddp, 2 ranks", (2,), "ddp"),
    Plan("fsdp, 2, 4 and 1 ranks in turn", (2, 4, 2, 1), "fsdp", small),
    Plan("fsdp, 2 ranks, the command torchrun", (2,), "fsdp", command=True),
)


GPUS = tuple(  # through NCCL, a GPU a rank; CUDA that the agent has touched does not outlive a fork
    replace(plan, name=f"gpus: {plan.name}", device="cuda", command=True)
    for plan in (PLANS[0], PLANS[2], Plan("fsdp, 2 and 1 ranks in turn", (2, 1), "fsdp", small))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each campaign")
    parser.add_argument("--only", default="", help="campaigns whose name holds this; `gpus`: those through NCCL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds from the first update to a kill")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which a campaign lets its run end in peace")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", nargs=3, help="be a rank: what torchrun itself is told")
    options = parser.parse_args()
    if options.rank:
        run, marks, name = options.rank
        work(run, Marks(Path(marks)), next(plan for plan in (*PLANS, *GPUS) if plan.name == name))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)  # a forked rank must not inherit a pool of threads
    job()  # what it imports is imported once, before the forks
    counts = []
    for plan in (*PLANS, *GPUS):
        if options.only in plan.name and (plan.device == "cpu" or "gpus" in options.only):
            with tempfile.TemporaryDirectory(prefix="kill-") as place:
                kills = options.kills // (3 if plan.command and plan.device == "cpu" else 1)
                killer = Killer(plan, kills, options.seed, options.longest, Path(place), options.seconds)
                try:
                    counts.append(killer.campaign())
                except SystemExit:
                    if killer.living is not None:
                        kill_all(*killer.living)
                    print(f"cut off: {killer.count}", file=sys.stderr)
                    raise
    print(f"{versions('torch', 'transformers')}; {UPDATES} updates, each saved\n")
    columns = [name for name in asdict(Count("")) if name != "notes"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for count in counts:
        shown = [getattr(count, c) for c in columns]
        print("| " + " | ".join(f"{v:.2g}" if isinstance(v, float) else str(v) for v in shown) + " |")
    for count in counts:
        for note in count.notes:
            print(f"{count.system}: {note}")
    if options.json:
        options.json.write_text(json.dumps([asdict(c) for c in counts], indent=1) + "\n")


if __name__ == "__main__":
    main()
