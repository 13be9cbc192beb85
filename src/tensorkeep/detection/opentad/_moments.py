"""Give the optimizer state of OpenTAD's checkpoints, which is kept by index, its parameter names back.

The groups that OpenTAD builds are built again from the names in the file, whose order is that of its modules, and every
shape is compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.detection.opentad._checkpoint import LIVE, Checkpoint
from tensorkeep.formats.names import grouped, unwrap
from tensorkeep.formats.view import StateView
from tensorkeep.storage.record import DTYPES
from tensorkeep.training.migration import backbone_word
from tensorkeep.training.sections import OptimizerConfig

_BUFFERS = ("pos_embed", "loss_normalizer")  # of a detector; everything else in its state is a parameter
_STATE_SPACE = (".A_log", ".D")  # of CausalTAD's mixers, which decay
STATE = re.compile(r"optimizer\.state\.(?P<index>\d{1,9})\.(?P<slot>\w+)\Z")
GROUP = re.compile(r"optimizer\.param_groups\.(?P<group>\d{1,9})\.(?P<key>\w+)\Z")
BLOCK = re.compile(r"\.blocks\.(\d+)\.")
SLOTS = ("exp_avg", "exp_avg_sq")
Group = dict[str, Any]


def optimizer_orders(shapes: Mapping[str, Sequence[int]], rules: Sequence[str]) -> Iterator[list[list[str]]]:
    """List the groups of parameter names that OpenTAD's `build_optimizer` may have made, likeliest first.

    Backbone parameters that no word fits come first, or, excluded, nowhere. The detector's are sorted: decayed ones,
    then the rest; without `paramwise` they are one group as they come.

    Args:
        shapes: parameters by OpenTAD's names, in the order of its modules.
        rules: words of `backbone.custom`; a name goes to the first that it contains.

    Example:
        >>> names = {"backbone.x.adapter.w": (2, 2), "rpn_head.b.bias": (2,), "neck.a.weight": (2, 2)}
        >>> next(optimizer_orders({**names, "backbone.x.w": (2,)}, ["adapter"]))
        [[], ['backbone.x.adapter.w'], ['neck.a.weight'], ['rpn_head.b.bias']]
    """
    backbone = [n for n in shapes if n.startswith("backbone")]
    rest = [n for n in shapes if not n.startswith("backbone")]
    decayed = sorted(n for n in rest if (n.endswith("weight") and len(shapes[n]) > 1) or n.endswith(_STATE_SPACE))
    detectors = [[decayed, sorted(set(rest) - set(decayed))], [rest]]
    for words in permutations([word for word in rules if word][:4]):
        fits = {n: next((w for w in words if w in n.removeprefix("backbone.")), None) for n in backbone}
        custom = [[n for n in backbone if fits[n] == word] for word in words]
        left = [n for n in backbone if fits[n] is None]
        for first in ([[], left] if words else [left, []]) if left else [[]]:
            for detector in detectors:
                yield [first, *custom, *detector]


def read_moments(
    file: Checkpoint, detector: nn.Module, config: OptimizerConfig
) -> tuple[dict[str, Tensor], list[Group], list[str]]:
    """Read AdamW's state under our parameter names.

    Returns:
        `parameter/slot` -> tensor, the file's groups with our `names`, and sentences on what could not be read.
    """
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
    file: Checkpoint, groups: Sequence[Group], states: Mapping[int, Mapping[str, str]], config: OptimizerConfig
) -> list[str] | None:
    """Return our parameter names by the optimizer's index; None where no order fits every shape."""
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
    for made in optimizer_orders(shapes, [backbone_word(rule.pattern) for rule in config.groups]):
        flat = [name for group in made for name in group]
        if [len(g) for g in made if g] == sizes and all(
            i < len(flat) and _fits(file.view, slots, shapes[flat[i]]) for i, slots in states.items()
        ):
            return [ours[name] for name in flat]
    return None


def _fits(view: StateView, slots: Mapping[str, str], shape: Sequence[int]) -> bool:
    """Return whether one parameter's state is AdamW's and of this shape."""
    step = slots.get("step")
    if step is None or (step in view and view[step].elements != 1) or any(slots.get(s) not in view for s in SLOTS):
        return False
    return all(view[slots[s]].shape == tuple(shape) and DTYPES[view[slots[s]].dtype].floating for s in SLOTS)


def _step(view: StateView, stored: str) -> float:
    """Return Adam's counter of updates: a tensor, in files of older torch a plain number."""
    value = view.tensor(stored).reshape(-1)[0].item() if stored in view else view.entries[stored]
    return float(value) if isinstance(value, (int, float)) else math.nan


def _groups(view: StateView) -> list[Group]:
    """Return the optimizer's groups, each with its settings and the indices of its `params`."""
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
    """Map each parameter's index to the stored names of its slots."""
    found: dict[int, dict[str, str]] = {}
    for name in (*view, *view.entries):
        if match := STATE.match(name):
            found.setdefault(int(match["index"]), {})[match["slot"]] = name
    return found
