"""Go on from OpenTAD's checkpoints (`epoch_41.pth`): weights, average, moments and position for a run of ours.

The position is in epochs, which both sides mean alike: an epoch of OpenTAD may end with a smaller batch, ours never
does. What the file does not hold is named in a remark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.groups import detector_groups
from tensorkeep.detection.opentad._checkpoint import Checkpoint, read_checkpoint, whole_number
from tensorkeep.detection.opentad._moments import Group, read_moments
from tensorkeep.detection.opentad.averages import read_ema
from tensorkeep.errors import TensorkeepError, shown, word
from tensorkeep.formats.names import grouped
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.packed import Packed, pack
from tensorkeep.quantization.reading import take
from tensorkeep.quantization.unpacking import unpack
from tensorkeep.training.live_state import refuse_difference, stored_tensors
from tensorkeep.training.saver import State
from tensorkeep.training.sections import OptimizerConfig, ScheduleConfig, TrainingConfig

_AVERAGE = "state_dict_ema"
_ANEW = (
    "R01 the file has no random states and no fp16 loss scale: both begin anew, epochs come in this run's order "
    "from here on"
)


@dataclass(frozen=True)
class Continuation:
    """What a run needs to go on: `fit(job, run, loop, resume=state)`.

    Attributes:
        state: weights, moments, average and position.
        epoch: how many epochs are over.
        remarks: what is lost, left or different, a line each.
    """

    state: State
    epoch: int
    remarks: list[str]


def continue_from(
    path: str | Path,
    detector: Detector,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    samples_per_epoch: int,
    training: TrainingConfig,
    base: dict[str, Any] | None = None,
    ema: bool = True,
) -> Continuation:
    """Read a checkpoint of OpenTAD for a detector, whose weights stay as they are until `fit` resumes.

    Moments that cannot be named are left, with a remark.

    Args:
        path: the checkpoint.
        detector: the run's detector.
        optimizer: the recipe's optimizer.
        schedule: the recipe's schedule.
        samples_per_epoch: length of the training data.
        training: how long the run is, and its batch.
        base: `Job.base`; where it is given, the run's frozen weights must be those of the file.
        ema: whether the run keeps an average.

    Raises:
        TensorkeepError: The file has no epoch or weights (K01), belongs to another model (K01, K02), holds NaN or Inf
            (V01) or was trained on another base (A04, Q01), or its average cannot be used (Q03, see `read_ema`).

    Example:
        >>> on = continue_from("epoch_41.pth", detector, config, schedule, len(data), training)  # doctest: +SKIP
    """
    batch = training.batch_size
    if min(samples_per_epoch, batch) < 1:
        raise TensorkeepError(f"{samples_per_epoch} samples, batch {batch}: at least 1", where="resume")
    file = read_checkpoint(path)
    model = _weights(file, detector, base is not None)
    rounded = _compare_frozen(file, detector) if base is not None else 0
    moments, groups, remarks = read_moments(file, detector, optimizer)
    averages, updates, on_average = _average(file, detector, ema)
    samples = file.epoch * samples_per_epoch
    if rounded:
        text = "frozen linears are rounded to codes here and were not there: expect a step in the loss"
        remarks.append(f"{rounded} {text}")
    document = {
        "schema": 1,
        "step": samples // batch,
        "samples": samples,
        "epoch": file.epoch,
        **({"optimizer": {"kind": "AdamW", "groups": [], "values": {}}} if moments else {}),
        **({"ema": {"updates": updates, "decay": None, "warmup": False}} if averages else {} if ema else {"ema": None}),
        "foreign": _origin(path, file.epoch, moments, averages, rounded),
    }
    remarks = [
        f"{file.epoch} epochs of OpenTAD are {samples} samples, {samples // batch} updates of {batch}",
        *remarks,
        *on_average,
        *_schedule(file, groups, detector, optimizer, schedule, samples_per_epoch, training),
        _ANEW,
    ]
    return Continuation(State(model, moments, averages, document, base), file.epoch, remarks)


def _origin(
    path: str | Path, epoch: int, moments: dict[str, Tensor], averages: dict[str, Tensor], rounded: int
) -> dict[str, Any]:
    """Say for the run's checkpoints where they began, and what was taken over."""
    parts = ["weights", *(["moments"] if moments else []), *(["average"] if averages else [])]
    level = f"{', '.join(parts)} and epoch from OpenTAD" + (", its frozen linears rounded" if rounded else "")
    return {"from": "OpenTAD", "level": level, "file": Path(path).name, "epoch": epoch - 1}


def _weights(file: Checkpoint, detector: Detector, base: bool) -> dict[str, Tensor]:
    """Read the tensors of the run's checkpoints, in the dtype they are trained in; each side must have all names."""
    mine, _ = stored_tensors(detector, base)
    own, parts = detector.state_dict().keys(), file.parts
    theirs = {n: s for n, s in file.names.items() if n in mine or (n not in own and s not in parts)}
    trained = {n for n, t in mine.items() if t.is_floating_point()}
    refuse_difference(
        "model",
        {n: str(list(t.shape)) for n, t in mine.items()},
        {
            n: f"{file.weights[s].kind} codes"
            if s in file.weights and (n in trained or n not in mine)
            else str(list(file.view[s].shape))
            for n, s in theirs.items()
        },
    )
    made = {n: file.view.tensor(theirs[n]).to(t.dtype) for n, t in mine.items()}
    bad = [n for n, t in made.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        what = f"{bad[0]} holds NaN or Inf ({len(bad)} tensors)"
        raise TensorkeepError(what, where=file.view.path, code="V01", tensors=bad, hint="take an earlier epoch_N.pth")
    return made


def _compare_frozen(file: Checkpoint, detector: Detector) -> int:
    """Check that the run's frozen weights are those of the file; returns how many are quantized here alone."""
    differing, rounded = [], 0
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad or "fc_norm" in name.split("."):  # nothing passes through fc_norm
            continue
        stored = _stored(file, name)
        if stored in file.weights:
            kind = file.weights[stored].kind
            what = f"{name} is {kind} codes in the file and full precision in the run"
            raise TensorkeepError(what, where=file.view.path, code="Q01", hint=f"--quantize-backbone {kind}")
        mine = parameter.detach().cpu()
        differing += [] if torch.equal(file.view.tensor(stored).to(mine.dtype), mine) else [name]
    for path, module in detector.named_modules():
        if isinstance(module, QuantLinear):
            stored = _stored(file, f"{path}.weight")
            theirs = _codes(file, stored, module)
            held = {role: t.cpu() for role, t in module.packed.tensors.items()}
            rounded += stored not in file.weights
            same = theirs.layout.shape == module.layout.shape
            if not same or not torch.equal(unpack(module.layout, held), unpack(theirs.layout, theirs.tensors)):
                differing.append(f"{path}.weight")
    if differing:
        few = ", ".join(grouped(differing)[:2])
        drop = "" if any("adapter" in n.split(".") for n in differing) else " --drop adapter"
        raise TensorkeepError(
            f"trained over other frozen weights than the run's: {few} ({len(differing)})",
            where=file.view.path,
            code="A04",
            tensors=differing,
            hint=f"tensorkeep convert {word(file.view.path)} BASE --to hf{drop}, then --training.pretrained BASE",
        )
    return rounded


def _stored(file: Checkpoint, name: str) -> str:
    """Return the stored name of a weight of ours."""
    if name not in file.names:
        raise TensorkeepError(f"has no {name}", where=file.view.path, code="K01", hint="is it of this recipe's model?")
    return file.names[name]


def _codes(file: Checkpoint, stored: str, like: QuantLinear) -> Packed:
    """Return the file's codes of a weight, or its floats quantized as the run quantized its own."""
    if stored in file.weights:
        return take(file.view, file.weights[stored])
    layout = like.layout
    return pack(
        file.view.tensor(stored).to(getattr(torch, layout.dtype)), layout.kind, bool(layout.nested), layout.block or 64
    )


# -- average and schedule ---------------------------------------------------------------------------------------------


def _average(file: Checkpoint, detector: nn.Module, wanted: bool) -> tuple[dict[str, Tensor], int, list[str]]:
    """Read the average of what trains, the number of its updates, and remarks on it."""
    there = any(name.startswith(f"{_AVERAGE}.") for name in file.view)
    if not there or not wanted:
        text = "K08 the file has no average: the run's begins at its weights" if wanted else "K08 its average is left"
        return {}, 0, [text] if there or wanted else []
    found = read_ema(file.view, detector, _AVERAGE)
    updates = found.updates if found.updates is not None else whole_number(file.view, "scheduler.last_epoch") or 0
    return found.tensors, updates, [f"{note.code} {note.message}" for note in found.notes]


def _schedule(
    file: Checkpoint,
    groups: Sequence[Group],
    detector: Detector,
    optimizer: OptimizerConfig,
    config: ScheduleConfig,
    samples: int,
    training: TrainingConfig,
) -> list[str]:
    """List where the file's updates and rates are not what the recipe makes of the same epochs; the recipe holds."""
    remarks, batch = [], training.batch_size
    epochs = training.epochs if training.epochs is not None else (training.updates or 0) * batch / samples
    warmup, ends = (
        number if number is None or config.unit == "epochs" else number * batch / samples
        for number in (config.warmup, config.ends_at)
    )
    done = whole_number(file.view, "scheduler.last_epoch")
    if done is None:
        remarks.append("R02 the file has no schedule: the learning rates are the recipe's at this epoch")
    else:
        each = done / file.epoch
        worlds = [w for w in range(1, batch + 1) if batch % w == 0]
        if each not in {math.ceil(samples // w / (batch // w)) for w in worlds}:  # its loader, on w processes
            remarks.append(
                f"R02 OpenTAD made {each:g} updates an epoch, these data and this batch make {samples / batch:g}: "
                "is it the same data?"
            )
        elif each * batch != samples:
            remarks.append(
                f"OpenTAD made {each:g} updates an epoch, its last one smaller; ours are all of {batch} "
                f"({samples / batch:g})"
            )
        for key, mine in (("warmup_epoch", warmup or 0.0), ("max_epoch", ends or epochs)):
            theirs = whole_number(file.view, f"scheduler.{key}")
            if theirs is not None and each and theirs / each != mine:
                remarks.append(f"R04 {key} was {theirs / each:g} epochs, the recipe says {mine:g}: the recipe's holds")
    rates = {n: (g["base_lr"], g["weight_decay"]) for g in detector_groups(detector, optimizer) for n in g["names"]}
    for number, group in enumerate(groups):
        then = (group.get("initial_lr", group.get("lr")), group.get("weight_decay"))
        changed = [n for n in group.get("names", ()) if n in rates and rates[n] != then]
        if changed:
            text = f"R04 group {number} ({changed[0]} ...) had lr {shown(then[0])}, decay {shown(then[1])}"
            remarks.append(f"{text}; the recipe's {rates[changed[0]]} hold")
    if file.epoch >= epochs:
        remarks.append(f"the recipe ends after {epochs:g} epochs: nothing is left to train (--training.epochs)")
    return remarks
