"""Go on from MiniMind's resume files: their weights, moments, position and data order in a run of ours.

The model is any with the same tensors under hf names: transformers' Qwen3, Qwen3Moe or Llama of a converted folder
(experts may be stacked), or one with MiniMind's own names; mm2's shared experts have no class in transformers. A run
goes on behind the last optimizer step, whose weights the file holds; the epoch in progress ends in MiniMind's order,
the next comes in ours. What MiniMind rounded when it saved is lost, so the run is the same but for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.language.minimind._model_state import model_state
from tensorkeep.language.minimind._position import Batching, Position, batchings, first_rate, learning_rate, position
from tensorkeep.language.minimind._resume_file import Resume, read_resume
from tensorkeep.training.saver import State

_OLD_SHUFFLE = (
    "before 2026-01-18 one process shuffled in an order that no file tells: the epoch in progress is then another"
)


@dataclass(frozen=True)
class CosinePerMicroBatch:
    """MiniMind's learning rate as a schedule of ours.

    Args:
        step: the first update of ours.
        samples: where it begins; each update takes `batch` samples.
        batch: samples of an update, over all ranks.
        batching: how MiniMind cut its data.
        epochs: of the whole run.
    """

    step: int
    samples: int
    batch: int
    batching: Batching
    epochs: int

    def __call__(self, update: int, base: float) -> float:
        """Rate of an update: MiniMind's at the micro-batch whose backward completes it."""
        epoch, within = divmod(self.samples + (update - self.step + 1) * self.batch - 1, self.batching.length)
        wide, total = self.batching.batch * self.batching.world_size, self.epochs * self.batching.iterations
        return learning_rate(base, min(epoch * self.batching.iterations + within // wide + 1, total), total)


@dataclass(frozen=True)
class Continuation:
    """What a job needs to go on from a resume file.

    Args:
        state: for `fit`'s `resume`.
        orders: for `Job.orders`: the order of the epoch in progress.
        batching: how MiniMind cut its data.
        position: where the run stood, in samples.
        batch: for `Loop.batch`, samples of an update.
        micro: for `Loop.micro`, samples of a micro-batch.
        optimizer: the keywords of AdamW.
        schedule: for `Job.schedule`, None where the epochs are not known.
        updates: for `Loop.updates`, the update that ends the planned epochs (None: not known).
        origin: belongs into the recipe, so that the run's own checkpoints know what they came from.
        remarks: what is lost or left, a line each.
    """

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

    Args:
        path: the resume file.
        model: any with the file's tensors, under hf names or MiniMind's own.
        length: samples of the data.
        batch: MiniMind's --batch_size: samples of a micro-batch on one rank.
        accumulation: micro-batches of an optimizer step (None: read off Adam's counter).
        epochs: MiniMind's --epochs, which the learning rate follows (None: no schedule and no end are given).
        rate: MiniMind's --learning_rate (None: computed from the file, where `epochs` is given).
        global_batch: samples of an update of ours (None: as many as MiniMind's optimizer step took).
        base: `Job.base`, where only LoRA weights are the run's; the base's weights must be those in the file.
        distributed: whether MiniMind shuffled as under torchrun (None: whether several ranks wrote the file).

    Raises:
        TensorkeepError: the file is no whole resume file, belongs to another model (K01, K02, S01, A02, A04), holds
            NaN or Inf (V01), or has no such position (R02).

    Example:
        >>> on = continue_from("pretrain_768_resume.pth", model, len(data), 32, epochs=2)      # doctest: +SKIP
        >>> fit(job, "runs/one", Loop(on.updates, on.batch, on.micro), resume=on.state)        # doctest: +SKIP
    """
    resume = read_resume(path)
    batching, remarks = _batching(resume, length, batch, accumulation)
    where = position(resume.epoch, resume.step, batching)
    weights, moments = model_state(resume, model, base is not None)
    several = resume.world_size > 1 if distributed is None else distributed
    begun = where.samples // length
    under_way = begun == resume.epoch and where.samples + where.again > begun * length
    if under_way and resume.generation == "mm2" and not several:
        remarks.append(_OLD_SHUFFLE)
    origin = _origin(Path(path).name, resume, batching, where, several)
    size, steps = global_batch or batching.update, resume.updates or 0
    return Continuation(
        state=State(weights, moments, {}, _document(resume, where, begun, bool(moments), origin), base),
        orders={begun: order(begun, length, several)} if under_way else {},
        batching=batching,
        position=where,
        batch=size,
        micro=batch,
        optimizer=_adamw(resume, batching, epochs, rate),
        schedule=CosinePerMicroBatch(steps, where.samples, size, batching, epochs) if epochs else None,
        updates=steps + math.ceil(max(epochs * length - where.samples, 0) / size) if epochs else None,
        origin=origin,
        remarks=[*remarks, *_said(resume, batching, where)],
    )


def _origin(file: str, resume: Resume, batching: Batching, where: Position, several: bool) -> dict[str, Any]:
    """What a run notes of the file it went on from."""
    return {
        "file": file,
        "generation": resume.generation,
        "epoch": resume.epoch,
        "step": resume.step,
        "world_size": resume.world_size,
        "batch": batching.batch,
        "accumulation": batching.accumulation,
        "samples": where.samples,
        "order": "sampler" if several else "process",
    }


def _document(resume: Resume, where: Position, epoch: int, moments: bool, origin: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's state.json says, as far as the file tells it."""
    return {
        "schema": 1,
        "step": resume.updates or 0,
        "samples": where.samples,
        "epoch": epoch,
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


def _adamw(resume: Resume, batching: Batching, epochs: int | None, rate: float | None) -> dict[str, Any]:
    """The keywords of AdamW: the rate the run began with (None: not known), and what else the file says."""
    known = resume.groups[0]
    if epochs and rate is None and isinstance(known.get("lr"), float):
        rate = known.get("initial_lr") or first_rate(known["lr"], resume.epoch, resume.step, epochs, batching)
    return {"lr": rate, **{k: known[k] for k in ("betas", "eps", "weight_decay") if k in known}}


def model_config(path: str | Path) -> dict[str, Any]:
    """Make the transformers config of one of MiniMind's files, from its shapes and the config.json beside it.

    Args:
        path: weights or a resume file of MiniMind.

    Raises:
        TensorkeepError: transformers has no class that computes the model (K07).

    Example:
        >>> config = model_config("a_512_resume.pth")                                        # doctest: +SKIP
        >>> AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))                 # doctest: +SKIP
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
    """Make MiniMind's permutation of an epoch.

    Of several ranks, rank r of W trains on `[r::W]` of the list, so the micro-batches of all ranks are consecutive
    entries of it, as a global batch of ours is.

    Args:
        epoch: from 0.
        length: samples of the data.
        distributed: shuffle as under torchrun.
    """
    seed = epoch if distributed else 42 + epoch  # DistributedSampler's own generator, or the process's anew
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def _batching(resume: Resume, length: int, batch: int, accumulation: int | None) -> tuple[Batching, list[str]]:
    """Find out how the data was cut, as given or as Adam's counter tells; with what a person should know of it."""
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
    counted, at = f"Adam counted {resume.updates or 0} steps", f"epoch {resume.epoch} step {resume.step}"
    if accumulation:
        text = f"{counted}, which is not what accumulation {accumulation} makes of {at}"
        return plain, [f"{text}: the position is by step alone"]
    found = f"any of {[b.accumulation for b in fitting]}" if fitting else "none"
    raise TensorkeepError(
        f"{counted} by {at}: {found} fits as accumulation",
        where=resume.view.path,
        code="R02",
        hint="say which one that run used (its --accumulation_steps)",
    )


def _level(resume: Resume) -> str:
    """What a run that goes on from the file says of how exact that is."""
    rounded = any(n.code == "R06" for n in resume.notes)
    what = "weights, moments and data order from MiniMind" if resume.moments else "weights and data order from MiniMind"
    return f"{what}{', its rounding to fp16 stays' if rounded else ''}"


def _said(resume: Resume, batching: Batching, where: Position) -> list[str]:
    """Say the position and what the file's reader noted, a line each."""
    text = f"epoch {resume.epoch}, step {resume.step} of {batching.iterations} on {resume.world_size} ranks"
    text += f": {where.samples} samples in"
    if where.again:
        text += f"; {where.again} more were trained on, but their gradients were not saved, so they come again"
    return [text, *(f"{note.code} {note.message}" for note in resume.notes)]
