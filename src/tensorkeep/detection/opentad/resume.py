"""Going on from OpenTAD's checkpoints (`epoch_41.pth`): weights, average, moments and position in a run of ours.

What is special: OpenTAD keeps optimizer state by index. Names come back by building its groups again from the names in
the file, whose order is that of its modules, and every shape is compared. The position is in epochs, which both sides
mean alike: an epoch of OpenTAD may end with a smaller batch, ours never does. What the file cannot give is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming import opentad
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.groups import OptimizerConfig, parameter_groups
from tensorkeep.detection.model.schedule import ScheduleConfig
from tensorkeep.detection.opentad.averages import read_ema
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.names import grouped, unwrap
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.description import QuantizedWeight
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.packed import Packed, pack
from tensorkeep.quantization.reading import take
from tensorkeep.quantization.unpacking import unpack
from tensorkeep.storage.record import DTYPES
from tensorkeep.training.live_state import refuse_difference, stored_tensors
from tensorkeep.training.saver import State

LIVE, _AVERAGE = "state_dict", "state_dict_ema"
_BUFFERS = ("pos_embed", "loss_normalizer")  # of a detector; everything else in its state is a parameter
STATE = re.compile(r"optimizer\.state\.(?P<index>\d{1,9})\.(?P<slot>\w+)\Z")
GROUP = re.compile(r"optimizer\.param_groups\.(?P<group>\d{1,9})\.(?P<key>\w+)\Z")
BLOCK = re.compile(r"\.blocks\.(\d+)\.")
SLOTS = ("exp_avg", "exp_avg_sq")
Group = dict[str, Any]


@dataclass(frozen=True)
class Continuation:
    """What a run needs to go on: `fit(job, run, loop, resume=state)`. `epoch`: how many are over. `remarks`: what is
    lost, left or different, a line each."""

    state: State
    epoch: int
    remarks: list[str]


@dataclass(frozen=True)
class _File:
    """`state_dict` of a checkpoint: our name -> stored name in the file's order, and its quantized weights by stored
    name."""

    view: StateView
    names: dict[str, str]
    weights: Mapping[str, QuantizedWeight]
    epoch: int

    @property
    def parts(self) -> set[str]:
        """Stored names of scales and states, which stand for no tensor of their own."""
        return {stored for weight in self.weights.values() for stored in weight.parts.values()}


def continue_from(
    path: str | Path,
    detector: Detector,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    samples_per_epoch: int,
    batch: int,
    base: dict[str, Any] | None = None,
    ema: bool = True,
) -> Continuation:
    """Read OpenTAD's `path` for `detector`, whose weights stay as they are until `fit` resumes.

    `samples_per_epoch`: the length of the training data; `batch`: samples an update. `base`: `Job.base`, where frozen
    weights are not the checkpoint's: they must be the file's. `ema`: whether the run keeps an average.

    Raises TensorkeepError where the file has no epoch or weights (K01), belongs to another model (K01, K02), holds NaN
    or Inf (V01), was trained on another base (A04, Q01), or where its average cannot be used (Q03, see `read_ema`).
    Moments that cannot be named are left, and that is said.

    >>> on = continue_from("epoch_41.pth", detector, config, schedule, len(data), 2)       # doctest: +SKIP
    >>> on.epoch, on.state.document["samples"]                                             # doctest: +SKIP
    (42, 8400)
    """
    if min(samples_per_epoch, batch) < 1:
        raise TensorkeepError(f"{samples_per_epoch} samples, batch {batch}: at least 1", where="resume")
    file = _read(path)
    model = _weights(file, detector, base is not None)
    rounded = _compare_frozen(file, detector) if base is not None else 0
    moments, groups, remarks = _moments(file, detector, optimizer)
    averages, updates, said = _average(file, detector, ema)
    samples = file.epoch * samples_per_epoch
    parts = ["weights", *(["moments"] if moments else []), *(["average"] if averages else []), "epoch"]
    level = f"{', '.join(parts[:-1])} and {parts[-1]} from OpenTAD"
    if rounded:
        level += ", its frozen linears rounded"
        remarks.append(
            f"{rounded} frozen linears are rounded to codes here and were not there: expect a step in the loss"
        )
    document = {
        "schema": 1,
        "step": samples // batch,
        "samples": samples,
        "epoch": file.epoch,
        **({"optimizer": {"kind": "AdamW", "groups": [], "values": {}}} if moments else {}),
        **({"ema": {"updates": updates, "decay": None, "warmup": False}} if averages else {} if ema else {"ema": None}),
        "foreign": {"from": "OpenTAD", "level": level, "file": Path(path).name, "epoch": file.epoch - 1},
    }
    remarks = [
        f"{file.epoch} epochs of OpenTAD are {samples} samples, {samples // batch} updates of {batch}",
        *remarks,
        *said,
        *_schedule(file, groups, detector, optimizer, schedule, samples_per_epoch, batch),
        "R01 the file has no random states and no fp16 loss scale: both begin anew, epochs come in this run's order from here on",
    ]
    return Continuation(State(model, moments, averages, document, base), file.epoch, remarks)


# -- the file -----------------------------------------------------------------------------------------------------------


def _read(path: str | Path) -> _File:
    view = read(path)
    view.checked = True  # damage inside the archive is told where it is read
    names: dict[str, str] = {}
    for stored in view:
        if not stored.startswith(f"{LIVE}."):
            continue
        clean = unwrap(stored[len(LIVE) + 1 :])[0]
        ours = opentad.to_hf(clean)
        if ours is None:
            hint = "OpenTAD's ActionFormer and AdaTAD go on here, its other detectors do not"
            raise TensorkeepError(f"unknown tensor {clean!r}", where=view.path, code="K02", hint=hint)
        if ours in names:
            raise TensorkeepError(f"{stored} and {names[ours]} are one tensor", where=view.path, code="K03")
        names[ours] = stored
    epoch = view.entries.get("epoch")
    if not names or type(epoch) is not int or not 0 <= epoch < 1 << 30:
        lacking = [what for what, there in ((LIVE, names), ("epoch", type(epoch) is int)) if not there]
        what = f"{', '.join(lacking)} not in it" if lacking else f"its epoch is {shown(epoch)}"
        hint = "weights alone are a start, not a position: --training.pretrained FILE"
        raise TensorkeepError(f"is no checkpoint of OpenTAD: {what}", where=view.path, code="K01", hint=hint)
    return _File(view, names, quantized.find_quantized(view, {s: s for s in names.values()}), epoch + 1)


def _weights(file: _File, detector: Detector, base: bool) -> dict[str, Tensor]:
    """Tensors of the run's checkpoints out of the file, in the dtype they are trained in. Both sides must meet."""
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


def _compare_frozen(file: _File, detector: Detector) -> int:
    """What trained goes on over the frozen weights it trained on. Gives how many of them are rounded here alone."""
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
        drop = "" if any("adapter" in n.split(".") for n in differing) else " --drop '*.adapter.*'"
        raise TensorkeepError(
            f"trained over other frozen weights than the run's: {few} ({len(differing)})",
            where=file.view.path,
            code="A04",
            tensors=differing,
            hint=f"tensorkeep convert {file.view.path} BASE --to hf{drop}, then --training.pretrained BASE",
        )
    return rounded


def _stored(file: _File, name: str) -> str:
    if name not in file.names:
        raise TensorkeepError(f"has no {name}", where=file.view.path, code="K01", hint="is it of this recipe's model?")
    return file.names[name]


def _codes(file: _File, stored: str, like: QuantLinear) -> Packed:
    """The file's codes of a weight, or its floats quantized as the run quantized its own."""
    if stored in file.weights:
        return take(file.view, file.weights[stored])
    layout = like.layout
    return pack(
        file.view.tensor(stored).to(getattr(torch, layout.dtype)), layout.kind, bool(layout.nested), layout.block or 64
    )


# -- the optimizer, by name ---------------------------------------------------------------------------------------------


def optimizer_orders(shapes: Mapping[str, Sequence[int]], rules: Sequence[str]) -> Iterator[list[list[str]]]:
    """The groups that OpenTAD's `build_optimizer` may have made, likeliest first: lists of parameter names.

    `shapes`: parameters by OpenTAD's names, in the order of its modules. `rules`: words of `backbone.custom`; a name
    goes to the first it holds. Backbone parameters that no word fits come first, or, excluded, nowhere. The detector's
    are sorted: decayed ones, then the rest; without `paramwise` they are one group as they come.

    >>> names = {"backbone.x.adapter.w": (2, 2), "rpn_head.b.bias": (2,), "neck.a.weight": (2, 2), "backbone.x.w": (2,)}
    >>> next(optimizer_orders(names, ["adapter"]))
    [[], ['backbone.x.adapter.w'], ['neck.a.weight'], ['rpn_head.b.bias']]
    """
    backbone = [n for n in shapes if n.startswith("backbone")]
    rest = [n for n in shapes if not n.startswith("backbone")]
    decayed = sorted(n for n in rest if n.endswith("weight") and len(shapes[n]) > 1)
    detectors = [[decayed, sorted(set(rest) - set(decayed))], [rest]]
    for words in permutations([word for word in rules if word][:4]):
        fits = {n: next((w for w in words if w in n.removeprefix("backbone.")), None) for n in backbone}
        custom = [[n for n in backbone if fits[n] == word] for word in words]
        left = [n for n in backbone if fits[n] is None]
        for first in ([[], left] if words else [left, []]) if left else [[]]:
            for detector in detectors:
                yield [first, *custom, *detector]


def _moments(
    file: _File, detector: Detector, config: OptimizerConfig
) -> tuple[dict[str, Tensor], list[Group], list[str]]:
    """`parameter/slot` -> tensor, the file's groups with our `names`, and what could not be given."""
    groups, states = _groups(file.view), _states(file.view)
    if not groups or not states:
        return {}, [], ["R05 the file has no optimizer state: moments begin at zero"]
    order = _order(file, groups, states, config)
    if order is None:
        count = sum(len(g["params"]) for g in groups)
        text = f"R05 no order of OpenTAD's groups fits the {count} parameters of the optimizer, shape by shape"
        return {}, [], [f"{text}: its moments are left, ours begin at zero"]
    for group in groups:
        group["names"] = [order[index] for index in group["params"]]
    trained = {n for n, p in detector.named_parameters() if p.requires_grad}
    kept = {order[i]: slots for i, slots in states.items() if order[i] in trained}
    remarks = []
    for names, text in (
        (sorted({order[i] for i in states} - trained), "moments of what does not train here are left"),
        (sorted(trained - kept.keys()), "trained parameters have no moments in the file: theirs begin at zero"),
    ):
        remarks += [f"R05 {len(names)} {text} ({', '.join(grouped(names)[:2])})"] if names else []
    made: dict[str, Tensor] = {}
    for name, slots in kept.items():
        for slot in SLOTS:
            made[f"{name}/{slot}"] = file.view.tensor(slots[slot])
        made[f"{name}/step"] = torch.tensor(_step(file.view, slots["step"]), dtype=torch.float32)
    if bad := [n for n, t in made.items() if not bool(torch.isfinite(t).all())]:
        return {}, groups, [*remarks, f"V01 {bad[0]} holds NaN or Inf: all moments are left, ours begin at zero"]
    return made, groups, remarks


def _order(
    file: _File, groups: Sequence[Group], states: Mapping[int, Mapping[str, str]], config: OptimizerConfig
) -> list[str] | None:
    """Our parameter names by the optimizer's index; None where no order fits every shape."""
    parts = file.parts
    ours = {
        unwrap(s[len(LIVE) + 1 :])[0]: n
        for n, s in file.names.items()
        if s not in parts and n.rpartition(".")[2] not in (*_BUFFERS, "weight_format", "weight_digest")
    }
    shapes = {theirs: file.view[file.names[n]].shape for theirs, n in ours.items()}
    blocks = [int(found[1]) for n in shapes if (found := BLOCK.search(n))]
    sizes = [len(g["params"]) for g in groups if g["params"]]
    if blocks != sorted(blocks) or [i for g in groups for i in g["params"]] != list(range(sum(sizes))):
        return None  # somebody put the file in another order
    for made in optimizer_orders(shapes, [rule.name for rule in config.backbone]):
        flat = [name for group in made for name in group]
        if [len(g) for g in made if g] == sizes and all(
            i < len(flat) and _fits(file.view, slots, shapes[flat[i]]) for i, slots in states.items()
        ):
            return [ours[name] for name in flat]
    return None


def _fits(view: StateView, slots: Mapping[str, str], shape: Sequence[int]) -> bool:
    """Whether one parameter's state is AdamW's and of this shape."""
    step = slots.get("step")
    if step is None or (step in view and view[step].elements != 1) or any(slots.get(s) not in view for s in SLOTS):
        return False
    return all(view[slots[s]].shape == tuple(shape) and DTYPES[view[slots[s]].dtype].floating for s in SLOTS)


def _step(view: StateView, stored: str) -> float:
    """Adam's counter: a tensor, in files of older torch a plain number."""
    value = view.tensor(stored).reshape(-1)[0].item() if stored in view else view.entries[stored]
    return float(value) if isinstance(value, (int, float)) else math.nan


def _groups(view: StateView) -> list[Group]:
    found: dict[int, Group] = {}
    for name, value in view.entries.items():
        if match := GROUP.match(name):
            found.setdefault(int(match["group"]), {})[match["key"]] = value
    groups = [found[number] for number in sorted(found)]
    for group in groups:
        params = group.get("params", ())
        group["params"] = [i for i in params if type(i) is int] if isinstance(params, (list, tuple)) else []
    return groups


def _states(view: StateView) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    for name in (*view, *view.entries):
        if match := STATE.match(name):
            found.setdefault(int(match["index"]), {})[match["slot"]] = name
    return found


# -- average and schedule -----------------------------------------------------------------------------------------------


def _average(file: _File, detector: nn.Module, wanted: bool) -> tuple[dict[str, Tensor], int, list[str]]:
    """The average of what trains, its updates, and what is to be said of it."""
    there = any(name.startswith(f"{_AVERAGE}.") for name in file.view)
    if not there or not wanted:
        text = "K08 the file has no average: the run's begins at its weights" if wanted else "K08 its average is left"
        return {}, 0, [text] if there or wanted else []
    found = read_ema(file.view, detector, _AVERAGE)
    updates = found.updates if found.updates is not None else _number(file.view, "scheduler.last_epoch") or 0
    return found.tensors, updates, [f"{note.code} {note.message}" for note in found.notes]


def _number(view: StateView, key: str) -> int | None:
    value = view.entries.get(key)
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def _schedule(
    file: _File,
    groups: Sequence[Group],
    detector: Detector,
    optimizer: OptimizerConfig,
    config: ScheduleConfig,
    samples: int,
    batch: int,
) -> list[str]:
    """Where the file's updates and rates are not what the recipe makes of the same epochs; the recipe's hold."""
    said = []
    done = _number(file.view, "scheduler.last_epoch")
    if done is None:
        said.append("R02 the file has no schedule: the learning rates are the recipe's at this epoch")
    else:
        each = done / file.epoch
        worlds = [w for w in range(1, batch + 1) if batch % w == 0]
        if each not in {math.ceil(samples // w / (batch // w)) for w in worlds}:  # its loader, on w processes
            said.append(
                f"R02 OpenTAD made {each:g} updates an epoch, these data and this batch make {samples / batch:g}: is it the same data?"
            )
        elif each * batch != samples:
            said.append(
                f"OpenTAD made {each:g} updates an epoch, its last one smaller; ours are all of {batch} ({samples / batch:g})"
            )
        for key, mine in (("warmup_epoch", config.warmup_epochs), ("max_epoch", config.epochs)):
            theirs = _number(file.view, f"scheduler.{key}")
            if theirs is not None and each and theirs / each != mine:
                said.append(f"R04 {key} was {theirs / each:g} epochs, the recipe says {mine}: the recipe's holds")
    rates = {n: (g["base_lr"], g["weight_decay"]) for g in parameter_groups(detector, optimizer) for n in g["names"]}
    for number, group in enumerate(groups):
        then = (group.get("initial_lr", group.get("lr")), group.get("weight_decay"))
        changed = [n for n in group.get("names", ()) if n in rates and rates[n] != then]
        if changed:
            text = f"R04 group {number} ({changed[0]} ...) had lr {shown(then[0])}, decay {shown(then[1])}"
            said.append(f"{text}; the recipe's {rates[changed[0]]} hold")
    if file.epoch >= config.epochs_run:
        said.append(
            f"the recipe ends after {config.epochs_run} epochs: nothing is left to train (--schedule.stop_epoch)"
        )
    return said
