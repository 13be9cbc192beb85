"""Resume files of MiniMind against its own runs: position, order, moments by name, and the losses that come after.

A folder with `traj.json` tells what the original did behind its resume file, without interruption and resumed by
itself. The file's weights are rounded to fp16, so the resumed trajectory is what a continuation must give, through
`fit`; the distance to the uninterrupted one is what rounding costs, and is said. A folder with `consumed.json` tells
which samples several ranks had consumed before the save.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tensorkeep.language.minimind._position import Batching, batchings, learning_rate
from tensorkeep.language.minimind._resume_file import Resume, read_resume
from tensorkeep.language.minimind.continue_from import Continuation, continue_from, order
from tensorkeep.training.batches import Stream
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.live_state import put_tensors
from tensorkeep.training.loop import fit
from tests.parity.minimind_model import MiniMind, config_of, cross_entropy
from tests.parity.outcome import Outcome, guarded, load_model, natural_key

LOSS = 2e-5  # 30 steps of the same arithmetic in another forward pass; the first loss agrees to 1e-6
ROUNDED = 1e-3  # relative L2 from the uninterrupted run's last weights: measured 2.35e-4 for MiniMind's own resume
WEIGHT = 5e-3  # the same for experts, where rounding flips routes


def resume_cases(folder: Path) -> Iterator[Outcome]:
    """Every resume file of a folder of fixtures."""
    torch.set_num_threads(1)  # the models are tiny, and threads only wait for each other
    for place in sorted((p for p in folder.iterdir() if (p / "config.json").exists()), key=natural_key):
        for file in sorted(place.glob("checkpoints/*_resume.pth")):
            name = file.relative_to(folder).as_posix().removesuffix(".pth")
            yield from guarded(name, lambda f=file, n=name: reading_cases(f, n))
            if "lora" not in file.stem and (place / "traj.json").exists() and (place / "data.safetensors").exists():
                yield from guarded(name, lambda f=file, n=name: trajectory_cases(f, n))
            if (place / "consumed.json").exists():
                yield from guarded(name, lambda f=file, n=name: consumed_cases(f, n))


def reading_cases(file: Path, name: str) -> Iterator[Outcome]:
    """Moments by name against torch's own view of the file: `named_parameters()` of the model, in order."""
    held, resume = torch.load(file, weights_only=True), read_resume(file)
    clean = {n.removeprefix("module.").removeprefix("_orig_mod."): t for n, t in held["model"].items()}
    model = native(file, clean)
    own = [n for n in clean if ".lora." in n] or [n for n, _ in model.named_parameters()]
    state = held["optimizer"]["state"]
    odd = [
        n
        for i, n in enumerate(own)
        if any(
            not torch.equal(resume.view.tensor(resume.moments[n][slot]), state[i][slot])
            for slot in ("exp_avg", "exp_avg_sq")
        )
    ]
    odd += sorted(set(resume.moments) ^ set(own))
    odd += [n for n, t in clean.items() if not torch.equal(resume.view.tensor(resume.weights[n]), t)]
    yield Outcome(f"{name} by name", len(odd), 0, f"of {len(own)} parameters have another's moments")
    kept = [k for k in held if k not in ("model", "optimizer", "epoch", "step", "world_size", "wandb_id", "scaler")]
    facts = (resume.epoch, resume.step, resume.world_size, resume.scaler) != (
        held["epoch"],
        held["step"],
        held["world_size"],
        held.get("scaler", {}),
    )
    yield Outcome(f"{name} facts", float(facts) + len(set(kept) ^ set(resume.extras)), 0, f"kept beside: {kept}")


def native(file: Path, weights: dict[str, Tensor]) -> MiniMind:
    """A fresh model for a fixture's weights."""
    known = json.loads((file.parent.parent / "config.json").read_text())
    shapes = {n: tuple(t.shape) for n, t in weights.items() if ".lora." not in n}
    return MiniMind(config_of(known, shapes))


# -- trajectories -------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The fixture's rows as a job's data: input ids and labels, `[n, t]` each."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {"ids": self.ids[index], "labels": self.labels[index], "index": index}

    def fingerprint(self) -> str:
        return f"rows {len(self)}"


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ids": torch.stack([s["ids"] for s in samples]),
        "labels": torch.stack([s["labels"] for s in samples]),
        "index": [s["index"] for s in samples],
    }


@dataclass
class Recorder:
    """MiniMind's loss, the mean of a micro-batch's tokens, and a note of every micro-batch."""

    seen: list[tuple[list[int], float]] = field(default_factory=list)

    def loss(self, model: nn.Module, batch: dict[str, Any], divisor: float) -> dict[str, Tensor]:
        out = model(batch["ids"])
        loss = cross_entropy(getattr(out, "logits", out), batch["labels"])
        self.seen.append((batch["index"], float(loss.detach())))
        aux = getattr(model, "aux", None)
        return {"loss": (loss + aux() if aux is not None else loss) / divisor}


def one(batch: Any) -> float:
    return 1.0  # every micro-batch counts the same, as MiniMind has it


def go_on(
    on: Continuation, model: nn.Module, data: Rows, run: Path, updates: int, seed: int = 0
) -> list[tuple[list[int], float]]:
    """Train through `fit` from a resume file up to update `updates`; the micro-batches, indices and losses."""
    recorder = Recorder()
    settings = {**on.optimizer, "lr": on.optimizer["lr"] or 0.0, "betas": tuple(on.optimizer["betas"])}
    assert on.schedule is not None
    job = Job(
        model,
        torch.optim.AdamW(model.parameters(), **settings),
        data,
        collate,
        recorder.loss,
        one,
        on.schedule,
        orders=on.orders,
        recipe={"continued_from": on.origin},
    )
    fit(job, run, Loop(updates, on.batch, on.micro, seed=seed), resume=on.state, allow=("updates",))
    return recorder.seen


def trajectory_cases(file: Path, name: str) -> Iterator[Outcome]:
    """Go on from the file through `fit`, and compare with the original's own resumed run."""
    place = file.parent.parent
    traj, held = json.loads((place / "traj.json").read_text()), load_file(place / "data.safetensors")
    data = Rows(held["input_ids"], held["labels"])
    whole, resumed = traj["uninterrupted"], traj["resumed_by_original"]
    batch, start = len(whole[0]["idx"]), traj["interrupted_after_microbatches"]
    resume = read_resume(file)
    iterations = math.ceil(len(data) / batch)
    epochs = math.ceil(len(whole) / iterations)
    every = accumulation_of(file, data, batch, epochs, resumed)
    models: list[tuple[str, nn.Module]] = [
        ("", native(file, {n: resume.view.tensor(s) for n, s in resume.weights.items()}))
    ]
    if ".experts." not in "".join(resume.weights):
        models.append((" in transformers", converted(file)))
    elif resume.generation == "mm3":  # there the balancing loss is another: the first loss must do
        yield first_loss(file, name, data, batch, every, resumed[0])
    for label, model in models:
        on = continue_from(file, model, len(data), batch, every, epochs=epochs)
        before = start - on.position.again // batch
        theirs = resumed if not on.position.again else whole[before:]
        wanted = [row["idx"] for row in theirs]
        # up to where the epoch in progress ends: their last step there is of what is left, ours of a whole batch
        full = resume.epoch * iterations + len(data) // batch - before  # micro-batches that are not cut short
        here = min(len(wanted), full) // on.batching.accumulation
        with tempfile.TemporaryDirectory() as run:
            seen = go_on(on, model, data, Path(run), on.state.document["step"] + here)
        got, count = seen[: len(wanted)], len(seen)
        odd = sum(a != b for (a, _), b in zip(got, wanted))
        yield Outcome(
            f"{name} continued{label}, samples",
            odd + abs(count - here * on.batching.accumulation),
            0,
            f"of {count} micro-batches are others",
        )
        worst = max((abs(a - b["loss"]) for (_, a), b in zip(got, theirs)), default=math.inf)
        gap = max((abs(a - b["loss"]) for (_, a), b in zip(got, whole[before:])), default=math.inf)
        tolerance = LOSS if theirs is resumed else 10 * ROUNDED
        yield Outcome(
            f"{name} continued{label}, losses",
            worst,
            tolerance,
            f"of {count}; {gap:.2g} from the uninterrupted run: fp16",
        )
        if on.position.again or here * on.batching.accumulation < len(wanted):
            yield replayed(file, name, data, on, epochs, resumed)
        last = place / "uninterrupted_final_fp32.safetensors"
        if last.exists() and resume.epoch == epochs - 1 and before + count == len(whole):
            final = load_file(last)
            tolerance = WEIGHT if any(".experts." in n for n in final) else ROUNDED
            yield Outcome(
                f"{name} continued{label}, last weights",
                distance(model, final),
                tolerance,
                "relative L2 from the uninterrupted run",
            )


def first_loss(file: Path, name: str, data: Rows, batch: int, every: int, row: dict[str, Any]) -> Outcome:
    """Compare the first loss of the file's weights in transformers, experts stacked, with the original's."""
    model = converted(file)
    put_tensors(model, continue_from(file, model, len(data), batch, every).state.model, base=False)
    with torch.no_grad():
        first = cross_entropy(model(data.ids[row["idx"]]).logits, data.labels[row["idx"]])
    return Outcome(f"{name} in transformers, experts stacked, first loss", abs(float(first) - row["loss"]), LOSS)


def accumulation_of(file: Path, data: Rows, batch: int, epochs: int, resumed: list[Any]) -> int:
    """Find the accumulation, which the fixture does not tell: by Adam's counter, then by which one replays the run."""
    resume = read_resume(file)
    found = counted(resume, len(data), batch)
    if len(found) < 2:
        return found[0].accumulation if found else 1
    model = native(file, {n: resume.view.tensor(s) for n, s in resume.weights.items()})
    given = [(b, continue_from(file, model, len(data), batch, b.accumulation, epochs)) for b in found]
    return min(given, key=lambda one: replayed(file, "", data, one[1], epochs, resumed).figure)[0].accumulation


def replayed(file: Path, name: str, data: Rows, on: Continuation, epochs: int, resumed: list[Any]) -> Outcome:
    """The whole of the original's resumed run, with the gradients it loses and the epochs it orders itself."""
    held = torch.load(file, weights_only=True)
    model = native(file, {n.removeprefix("module.").removeprefix("_orig_mod."): t for n, t in held["model"].items()})
    rate, start = on.optimizer["lr"], (held["epoch"], held["step"])
    optimizer = load(held, model, rate)
    seen = replay(
        model, optimizer, data, on.micro, on.batching.accumulation, epochs, rate, start, early=on.batching.early
    )
    odd = sum(a != row["idx"] for (a, _), row in zip(seen, resumed)) + abs(len(seen) - len(resumed))
    worst = max((abs(a - row["loss"]) for (_, a), row in zip(seen, resumed)), default=0.0)
    return Outcome(
        f"{name} replayed", worst if not odd else math.inf, LOSS, f"{odd} of {len(resumed)} micro-batches are others"
    )


def counted(resume: Resume, length: int, batch: int) -> list[Batching]:
    old = resume.generation == "mm2"
    return batchings(length, batch, resume.world_size, resume.epoch, resume.step, resume.updates or 0, old=old)


def converted(file: Path) -> nn.Module:
    """The model of transformers for a resume file."""
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    with tempfile.TemporaryDirectory() as work:
        convert(make_plan([read(file)], "hf"), f"{work}/hf", "hf")
        return load_model(Path(work) / "hf")


def distance(model: nn.Module, final: dict[str, Tensor]) -> float:
    """Relative L2 between a model and weights by name."""
    mine = dict(model.named_parameters())
    pairs = [(mine[n].detach(), t) for n, t in final.items() if n in mine]
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return math.sqrt(apart / sum(float(b.double().square().sum()) for _, b in pairs))


def consumed_cases(file: Path, name: str) -> Iterator[Outcome]:
    """Several ranks: what each consumed is the order's share, and what comes next is what nobody had."""
    ranks = json.loads((file.parent.parent / "consumed.json").read_text())
    rows = [ranks[f"rank{r}"] for r in range(len(ranks))]
    resume, batch = read_resume(file), len(rows[0][0]["idx"])
    data = file.parent.parent / "data.safetensors"
    if not resume.epoch and not data.exists():
        yield Outcome(
            f"{name} order of ranks", math.inf, 0, "nothing tells the data's length: no epoch is over, no data here"
        )
        return
    iterations = (len(rows[0]) - resume.step) // resume.epoch if resume.epoch else len(rows[0])
    known = len({i for rank in rows for row in rank[:iterations] for i in row["idx"]})
    length = len(load_file(data)["input_ids"]) if data.exists() else known
    every = (counted(resume, length, batch) or [Batching(length, batch)])[0].accumulation
    held = {n: resume.view.tensor(s) for n, s in resume.weights.items()}
    on = continue_from(file, native(file, held), length, batch, every, epochs=resume.epoch + 1)
    odd = 0
    for epoch in range(resume.epoch + 1):
        permutation = order(epoch, length, distributed=True)
        permutation += permutation[: -length % len(rows)]  # DistributedSampler pads
        for r, rank in enumerate(rows):
            share = permutation[r :: len(rows)]
            for step, row in enumerate(rank[epoch * iterations : (epoch + 1) * iterations]):
                odd += row["idx"] != share[step * batch : (step + 1) * batch]
    yield Outcome(f"{name} order of {len(rows)} ranks", odd, 0, f"of {sum(map(len, rows))} micro-batches are others")
    here = {i for rank in rows for row in rank[resume.epoch * iterations :][: resume.step] for i in row["idx"]}
    left = (resume.epoch + 1) * length - on.position.samples
    rest = {i for _, i in Stream(0, length, on.orders).keys(on.position.samples, left)}
    wrong = len(rest & here) - on.position.again + len(set(range(length)) - rest - here)
    yield Outcome(
        f"{name} the epoch goes on", abs(wrong), 0, f"samples twice or never; {len(rest)} of {length} to come"
    )
    last = [row for rank in rows for row in rank[-on.batching.accumulation :]]
    if not on.position.again and (found := data_of(last, file, length, native(file, held), on)) is not None:
        model = native(file, held)
        put_tensors(model, on.state.model, base=False)
        undo(model, resume)
        worst = max(abs(loss_of(model, found, row["idx"]) - row["loss"]) for row in last)
        yield Outcome(
            f"{name} last losses of {len(rows)} ranks",
            worst,
            ROUNDED,
            "with the last optimizer step taken back by its moments",
        )


def data_of(last: list[Any], file: Path, length: int, model: nn.Module, on: Continuation) -> Rows | None:
    """The rows these ranks trained on: of this folder or of one beside it, where the saved weights know them."""
    put_tensors(model, on.state.model, base=False)
    for place in [file.parent.parent, *sorted(file.parent.parent.parent.iterdir())]:
        if (place / "data.safetensors").exists():
            held = load_file(place / "data.safetensors")
            rows = Rows(held["input_ids"], held["labels"])
            fits = len(rows) == length and int(rows.ids.max()) < model.lm_head.weight.shape[0]
            if fits and all(abs(loss_of(model, rows, row["idx"]) - row["loss"]) < 0.1 for row in last):
                return rows
    return None


@torch.no_grad()
def loss_of(model: nn.Module, data: Rows, index: list[int]) -> float:
    return float(cross_entropy(model(data.ids[index]), data.labels[index]))


@torch.no_grad()
def undo(model: nn.Module, resume: Resume) -> None:
    """Take AdamW's last step back: w was (w' + lr m / (sqrt(v) + eps)) / (1 - lr decay), m and v without their bias."""
    group = resume.groups[0]
    one, two = group["betas"]
    for name, weight in model.named_parameters():
        kept = {slot: resume.view.tensor(stored) for slot, stored in resume.moments[name].items()}
        mean, square = (
            kept["exp_avg"] / (1 - one ** float(kept["step"])),
            kept["exp_avg_sq"] / (1 - two ** float(kept["step"])),
        )
        moved = group["lr"] * mean / (square.sqrt() + group["eps"])
        weight.copy_((weight + moved) / (1 - group["lr"] * group["weight_decay"]))


# -- MiniMind's own loop, from its description ------------------------------------------------------------------------


def load(held: dict[str, Any], model: MiniMind, rate: float) -> torch.optim.Optimizer:
    """What MiniMind loads of a resume file, all of it strictly."""
    model.load_state_dict({n.removeprefix("module.").removeprefix("_orig_mod."): t for n, t in held["model"].items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    optimizer.load_state_dict(held["optimizer"])
    return optimizer


def replay(
    model: MiniMind,
    optimizer: torch.optim.Optimizer,
    data: Rows,
    batch: int,
    accumulation: int,
    epochs: int,
    rate: float,
    start: tuple[int, int] = (0, 0),
    stop: tuple[int, int] | None = None,
    early: bool = False,
) -> list[tuple[list[int], float]]:
    """Train as MiniMind does on one process, from (epoch, step) on.

    Batches before the step are skipped, the rate is set each micro-batch, a step is made every `accumulation`, and one
    of what is left after the epoch. `stop`: killed behind that (epoch, step).
    """
    iterations = math.ceil(len(data) / batch)
    seen: list[tuple[list[int], float]] = []

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for epoch in range(start[0], epochs):
        indices = order(epoch, len(data), distributed=False)
        first = start[1] if epoch == start[0] else 0
        for number in range(first + 1, iterations + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(rate, epoch * iterations + number, epochs * iterations)
            rows = indices[(number - 1) * batch : number * batch]
            loss = cross_entropy(model(data.ids[rows]), data.labels[rows])
            ((loss + model.aux()) / accumulation).backward()
            seen.append((rows, float(loss.detach())))
            if (number + early) % accumulation == 0:
                step()
            if stop == (epoch, number):
                return seen
        if (iterations + early) % accumulation and iterations > first:
            step()
    return seen
