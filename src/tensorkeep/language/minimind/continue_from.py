"""Going on from MiniMind's resume files: their weights, moments, position and data order in a run of ours.

The model is any with the same tensors under hf names: transformers' Qwen3, Qwen3Moe or Llama of a converted folder
(experts may be stacked), or one of MiniMind's own names; mm2's shared experts have no class in transformers. A run
goes on behind the last optimizer step, whose weights the file holds; the epoch in progress ends in MiniMind's order,
the next comes in ours. What MiniMind rounded when it saved is lost, so the run is the same but for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import Part
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import read
from tensorkeep.language.minimind._position import Batching, Position, batchings, first_rate, learning_rate, position
from tensorkeep.language.minimind._resume_file import Resume, read_resume
from tensorkeep.models.counterpart import CounterpartFinder, StoredModel
from tensorkeep.models.tensors import Held, clean, expected
from tensorkeep.training.live_state import refuse_difference, stored_tensors
from tensorkeep.training.saver import State

_OLD_SHUFFLE = (
    "before 2026-01-18 one process shuffled in an order that no file tells: the epoch in progress is then another"
)


@dataclass(frozen=True)
class CosinePerMicroBatch:
    """MiniMind's learning rate as a schedule of ours: update `step`, `step` + 1, ... begin at `samples`, `samples` + `batch`, ..."""

    step: int
    samples: int
    batch: int
    batching: Batching
    epochs: int

    def __call__(self, update: int, base: float) -> float:
        """The rate at the micro-batch whose backward completes the update."""
        epoch, within = divmod(self.samples + (update - self.step + 1) * self.batch - 1, self.batching.length)
        wide, total = self.batching.batch * self.batching.world_size, self.epochs * self.batching.iterations
        return learning_rate(base, min(epoch * self.batching.iterations + within // wide + 1, total), total)


@dataclass(frozen=True)
class Continuation:
    """What a job needs to go on. `orders` goes into `Job.orders`, `batch` and `micro` are the loop's, `updates` the
    step that ends the planned epochs, `optimizer` the keywords of AdamW. `origin` belongs into the recipe, so that
    the run's own checkpoints know what they came from. `remarks`: what is lost or left, a line each."""

    state: State
    orders: dict[int, Sequence[int]]
    batching: Batching
    position: Position
    batch: int
    micro: int
    optimizer: dict[str, Any]
    schedule: CosinePerMicroBatch | None
    updates: int | None
    origin: dict[str, Any]
    remarks: list[str]


def continue_from(
    path: str | Path,
    model: nn.Module,
    length: int,
    batch: int,
    accumulation: int | None = None,
    epochs: int | None = None,
    rate: float | None = None,
    global_batch: int | None = None,
    base: dict[str, Any] | None = None,
    distributed: bool | None = None,
) -> Continuation:
    """Read a resume file for `model`, whose weights stay as they are until `fit` resumes.

    `length`: samples of the data; `batch`, `accumulation`, `epochs`, `rate`: MiniMind's flags of that run, where the
    accumulation is told by Adam's counter and the rate by the file if `epochs` is given. `global_batch`: ours, where
    it is to be another. `base`: `Job.base` where only LoRA weights are the run's; its weights must be those in the file. `distributed`: one process started by
    torchrun shuffles as several do.

    Raises TensorkeepError where the file is no whole resume file, belongs to another model (K01, K02, S01, A02, A04),
    holds NaN or Inf (V01), or has no such position (R02).

    >>> on = continue_from("pretrain_768_resume.pth", model, len(data), 32, epochs=2)      # doctest: +SKIP
    >>> fit(job, "runs/one", Loop(on.updates, on.batch, on.micro), resume=on.state)        # doctest: +SKIP
    """
    resume = read_resume(path)
    batching, remarks = _batching(resume, length, batch, accumulation)
    where = position(resume.epoch, resume.step, batching)
    parts = _counterparts(resume, model, base is not None)
    weights = _weights(resume, model, parts, base is not None)
    moments = _moments(resume, parts, {n: tuple(t.shape) for n, t in weights.items()})
    several = resume.world_size > 1 if distributed is None else distributed
    steps = resume.updates if resume.updates is not None else 0
    size = global_batch or batching.update
    begun = where.samples // length
    theirs = begun == resume.epoch and where.samples + where.again > begun * length  # it was under way
    if theirs and resume.generation == "mm2" and not several:
        remarks.append(_OLD_SHUFFLE)
    known = resume.groups[0]
    if epochs and rate is None and isinstance(known.get("lr"), float):
        rate = known.get("initial_lr") or first_rate(known["lr"], resume.epoch, resume.step, epochs, batching)
    origin = {
        "file": Path(path).name,
        "generation": resume.generation,
        "epoch": resume.epoch,
        "step": resume.step,
        "world_size": resume.world_size,
        "batch": batch,
        "accumulation": batching.accumulation,
        "samples": where.samples,
        "order": "sampler" if several else "process",
    }
    document = {
        "schema": 1,
        "step": steps,
        "samples": where.samples,
        "epoch": begun,
        "world_size": resume.world_size,
        "scaler": resume.scaler,
        "wandb_id": resume.wandb_id,
        **({"optimizer": {"kind": "AdamW", "groups": [], "values": {}}} if moments else {}),
        "foreign": {
            "from": "MiniMind",
            "level": _level(resume),
            **origin,
            "extras": {k: len(v) for k, v in resume.extras.items()},
        },
    }
    keys = ("betas", "eps", "weight_decay")
    return Continuation(
        State(weights, moments, {}, document, base),
        {begun: order(begun, length, several)} if theirs else {},
        batching,
        where,
        size,
        batch,
        {"lr": rate, **{k: known[k] for k in keys if k in known}},
        CosinePerMicroBatch(steps, where.samples, size, batching, epochs) if epochs else None,
        steps + math.ceil(max(epochs * length - where.samples, 0) / size) if epochs else None,
        origin,
        [*remarks, *_said(resume, batching, where)],
    )


def model_config(path: str | Path) -> dict[str, Any]:
    """The transformers config of the model in one of MiniMind's files, from its shapes and the config.json beside it.

    Raises TensorkeepError K07 where transformers has no class that computes it.

    >>> AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config("a_512_resume.pth")))    # doctest: +SKIP
    """
    config = make_plan([read(path)], "hf").config or {}
    if config.get("model_type") in (None, "minimind"):
        raise TensorkeepError(
            "no class of transformers computes MiniMind's shared experts of 2025",
            where=path,
            code="K07",
            hint="go on in MiniMind, or train a module with its own names through continue_from",
        )
    return dict(config)


def order(epoch: int, length: int, distributed: bool) -> list[int]:
    """MiniMind's permutation of an epoch. With several ranks r trains on [r::W]: a micro-batch of all of them is a run
    of this list, as a global batch of ours is."""
    seed = epoch if distributed else 42 + epoch  # DistributedSampler's own generator, or the process's anew
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def _batching(resume: Resume, length: int, batch: int, accumulation: int | None) -> tuple[Batching, list[str]]:
    """How the data was cut, as given or as Adam's counter tells."""
    if min(length, batch, accumulation or 1) < 1:
        raise TensorkeepError(
            f"length {length}, batch {batch}, accumulation {accumulation}: at least 1", where="resume"
        )
    plain = Batching(length, batch, accumulation or 1, resume.world_size)
    position(resume.epoch, resume.step, plain)  # a step beyond the epoch is told as that
    fitting = batchings(
        length,
        batch,
        resume.world_size,
        resume.epoch,
        resume.step,
        resume.updates or 0,
        accumulation,
        old=resume.generation == "mm2",
    )
    if len(fitting) == 1:
        return fitting[0], []
    if accumulation:
        text = (
            f"Adam counted {resume.updates or 0} steps, which is not what accumulation {accumulation} makes of epoch "
        )
        return plain, [text + f"{resume.epoch} step {resume.step}: the position is by step alone"]
    found = f"any of {[b.accumulation for b in fitting]}" if fitting else "none"
    raise TensorkeepError(
        f"Adam counted {resume.updates or 0} steps by epoch {resume.epoch} step {resume.step}: {found} fits as accumulation",
        where=resume.view.path,
        code="R02",
        hint="say which one that run used (its --accumulation_steps)",
    )


# -- tensors ------------------------------------------------------------------------------------------------------


def _in_file(name: str) -> str:
    """The file's name of an adapter's weight: `q_proj.lora_A` is `q_proj.lora.A.weight` there."""
    name = clean(name)
    module, _, leaf = name.rpartition(".")
    return f"{module}.lora.{leaf[-1]}.weight" if leaf in ("lora_A", "lora_B") else name


def _counterparts(resume: Resume, model: nn.Module, base: bool) -> dict[str, tuple[Part, ...]]:
    """What each tensor of the run is made of: stored weights by the model's own names. Both sides must be used up."""
    stored = set(resume.weights.values())
    view = replace(resume.view, records={n: r for n, r in resume.view.records.items() if n in stored})
    source = StoredModel.of(view, view.config)
    mine, _ = stored_tensors(model, base)
    held = {n: Held(_in_file(n), model, t) for n, t in mine.items()}
    asker = CounterpartFinder(model, list(held.values()), source)
    found = {n: asker.parts(h, h.name) for n, h in held.items()}
    made = {n: p for n, p in found.items() if p}
    used = {p.name for parts in made.values() for p in parts}
    unused = [n for n, s in resume.weights.items() if s not in used and not (base and ".lora." not in n)]
    unused = [n for n in unused if not (resume.tied and n == hf.HEAD)]
    if any(".shared_experts." in n for n in unused):
        raise TensorkeepError(
            "holds shared experts, which this model lacks: no class of transformers computes MiniMind's of 2025",
            where=resume.view.path,
            code="K02",
            hint="train it in a module with MiniMind's own names, or go on in MiniMind",
        )
    lacking = {n: "tensor" for n in mine if n not in made}
    refuse_difference(
        "model", {**dict.fromkeys(made, ""), **lacking}, {**dict.fromkeys(made, ""), **dict.fromkeys(unused, "")}
    )
    known = {resume.weights[n] for n in resume.moments} or stored
    if rest := [n for n, parts in made.items() if any(p.name not in known for p in parts)]:
        raise TensorkeepError(
            f"the file has no optimizer state of {', '.join(grouped(rest)[:3])} ({len(rest)})",
            where=resume.view.path,
            code="R05",
            hint="make the model as that run had it: tied head, LoRA on the same layers",
        )
    if base:
        _compare_base(resume, model)
    return made


def _built(resume: Resume, name: str, parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor:
    """A tensor of the model put together from the file, in the dtype it is stored in."""
    sizes = [resume.view[p.name].shape for p in parts]
    fits = sizes[0] == shape if len(sizes) == 1 else all(s[-1:] == shape[-1:] for s in sizes)
    made = expected(parts, resume.view, shape, (0, shape[0]) if shape else (0, 1)) if fits else None
    if made is None:
        raise TensorkeepError(
            f"{name} is {list(shape)}, {parts[0].name} is {list(sizes[0])}",
            where=resume.view.path,
            code="S01",
            hint="build the model from the config of these weights",
            tensors=[parts[0].name],
        )
    if not bool(torch.isfinite(made).all()):
        raise TensorkeepError(
            f"{parts[0].name} holds NaN or Inf",
            where=resume.view.path,
            code="V01",
            hint="continue from an earlier file; fp16 ends at 65504",
            tensors=[p.name for p in parts],
        )
    return made


def _weights(resume: Resume, model: nn.Module, parts: dict[str, tuple[Part, ...]], base: bool) -> dict[str, Tensor]:
    """The weights in the dtype the model trains them in."""
    mine, _ = stored_tensors(model, base)
    return {n: _built(resume, n, parts[n], tuple(t.shape)).to(t.dtype) for n, t in mine.items()}


def _moments(
    resume: Resume, parts: dict[str, tuple[Part, ...]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Optimizer state under the model's names, `parameter/slot`; stacked experts get stacked moments."""
    own = {stored: name for name, stored in resume.weights.items()}
    out: dict[str, Tensor] = {}
    for name, made in parts.items():
        slots = [resume.moments.get(own[p.name], {}) for p in made]
        if not any(slots):
            continue
        counts = {float(resume.view.array(s["step"]).reshape(())) for s in slots if s}
        if len(counts) > 1 or not all(slots):
            raise TensorkeepError(
                f"the experts that make up {name} took {sorted(counts)} optimizer steps: they cannot share one counter",
                where=resume.view.path,
                code="R05",
            )
        for slot in sorted(slots[0].keys() - {"step"}):
            moved = tuple(p._replace(name=s[slot]) for p, s in zip(made, slots))
            out[f"{name}/{slot}"] = _built(resume, f"{name}/{slot}", moved, shapes[name])
        out[f"{name}/step"] = torch.tensor(counts.pop(), dtype=torch.float32)
    return out


def _compare_base(resume: Resume, model: nn.Module) -> None:
    """An adapter goes on over the base it was trained on, at MiniMind's scale, which is 1."""
    scales = {n: m.scale for n, m in model.named_modules() if isinstance(getattr(m, "scale", None), float)}
    if odd := [n for n, scale in scales.items() if scale != 1.0 and hasattr(model.get_submodule(n), "lora_A")]:
        raise TensorkeepError(
            f"{odd[0]} scales its update by {scales[odd[0]]:g}, MiniMind by 1",
            where="lora",
            code="A02",
            hint="alpha = r",
        )
    live = {clean(n): p for n, p in model.named_parameters()}
    for name, stored in resume.weights.items():
        mine = live.get(name)
        if mine is None or not mine.is_floating_point() or tuple(mine.shape) != resume.view[stored].shape:
            continue  # quantized, or stacked: its codes are compared by the base's digest
        theirs = resume.view.tensor(stored)
        if ".lora." not in name and not torch.equal(mine.detach().cpu().to(theirs.dtype), theirs):
            raise TensorkeepError(
                f"{name} of the model is not the base's that this adapter was trained on",
                where=resume.view.path,
                code="A04",
                hint="tensorkeep convert the resume file itself to hf, and take that as the base",
            )


# -- words --------------------------------------------------------------------------------------------------------


def _level(resume: Resume) -> str:
    rounded = any(n.code == "R06" for n in resume.notes)
    what = "weights, moments and data order from MiniMind" if resume.moments else "weights and data order from MiniMind"
    return f"{what}{', its rounding to fp16 stays' if rounded else ''}"


def _said(resume: Resume, batching: Batching, where: Position) -> list[str]:
    """The position, and what the file's reader noticed."""
    text = f"epoch {resume.epoch}, step {resume.step} of {batching.iterations} on {resume.world_size} ranks: {where.samples} samples in"
    if where.again:
        text += f"; {where.again} more were trained on, but their gradients were not saved, so they come again"
    return [text, *(f"{note.code} {note.message}" for note in resume.notes)]
