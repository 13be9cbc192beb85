"""Read what MiniMind's resume files (`{stage}_{hidden_size}{_moe}_resume.pth`) say, without reading a weight.

Three things are special. Optimizer state goes by position, so its names come from the order in which that generation's
model registers its parameters. Weights are fp16 whatever was trained. `step` counts micro-batches of one rank in one
epoch (`_position` turns it into samples).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorkeep.conversion.naming import hf, minimind
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.names import grouped, natural, unwrap
from tensorkeep.formats.view import Note, StateView, read
from tensorkeep.storage.record import DTYPES

OWN = ("model", "optimizer", "epoch", "step", "world_size", "wandb_id", "scaler")
# modules of a layer in the order in which MiniMind's classes make them; experts before the gate in mm2, behind in mm3
ATTENTION = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "input_layernorm",
    "post_attention_layernorm",
)
_FORWARD = ("gate_proj", "down_proj", "up_proj")
LAYER = {
    "mm2": (*ATTENTION, *(f"mlp.{p}" for p in _FORWARD), "mlp.experts", "mlp.gate", "mlp.shared_experts"),
    "mm3": (*ATTENTION, *(f"mlp.{p}" for p in _FORWARD), "mlp.gate", "mlp.experts", "mlp.shared_experts"),
}
_ENDS = {"model.embed_tokens": 0, "model.norm": 2, "lm_head": 3}
NAME = re.compile(r"(?P<module>.+?)(?P<lora>\.lora\.[AB])?\.weight\Z")
_IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d{1,9})\.(?P<rest>.+)\Z")
EXPERT = re.compile(r"(?P<kind>mlp\.(?:shared_)?experts)\.(?P<expert>\d{1,9})\.(?P<leaf>\w+)\Z")
STATE = re.compile(r"optimizer\.state\.(?P<index>\d{1,9})\.(?P<slot>\w+)\Z")
GROUP = re.compile(r"optimizer\.param_groups\.(?P<group>\d{1,9})\.(?P<key>\w+)\Z")


@dataclass(frozen=True)
class Resume:
    """What a resume file says: where the run stood, and under which stored name each tensor lies.

    Args:
        view: the file, opened.
        generation: of MiniMind's model: `mm2` (2025) or `mm3` (2026).
        epoch: from 0.
        step: micro-batches of one rank in this epoch, from 1.
        world_size: ranks.
        wandb_id: the run's id at Weights & Biases.
        weights: parameter name (wrappers taken off) -> stored name.
        moments: parameter name -> slot (`step`, `exp_avg`, `exp_avg_sq`) -> stored name.
        groups: hyper-parameters of each parameter group, with the `names` of its parameters.
        updates: optimizer steps that Adam counted, None before the first.
        tied: whether head and embedding are one parameter.
        scaler: state of the gradient scaler, {} unless the run was in float16.
        extras: top-level keys that are none of the model's (schedules, PPO's critic) -> what is stored under them.
        notes: what a person should know.
    """

    view: StateView
    generation: str
    epoch: int
    step: int
    world_size: int
    wandb_id: str | None
    weights: dict[str, str]
    moments: dict[str, dict[str, str]]
    groups: list[dict[str, Any]]
    updates: int | None
    tied: bool
    scaler: dict[str, Any]
    extras: dict[str, list[str]]
    notes: list[Note] = field(default_factory=list)

    @property
    def adapter(self) -> bool:
        """Whether only LoRA weights were trained; the others are its base."""
        return any(".lora." in name for name in self.weights)


def read_resume(path: str | Path) -> Resume:
    """Open a resume file; headers and plain values are read, no weights.

    Args:
        path: the file.

    Raises:
        TensorkeepError: it is no resume file, lacks a part (K01, R05), a shape is not its parameter's (S01), or head
            and embedding differ though one optimizer state belongs to both (T01).

    Example:
        >>> resume = read_resume("checkpoints/pretrain_768_resume.pth")              # doctest: +SKIP
        >>> resume.epoch, resume.step, list(resume.moments)[0]                       # doctest: +SKIP
        (1, 2000, 'model.embed_tokens.weight')
    """
    view = read(path)
    view.checked = True  # damage inside the archive is told where it is read
    weights = _weights(view)
    made = minimind.generation(weights)
    if made == "mm2a":
        raise TensorkeepError(
            "holds names of early 2025, when MiniMind had no resume files",
            where=path,
            code="K06",
            hint="continue from the weights alone: tensorkeep convert FILE OUT --to hf",
        )
    notes: list[Note] = []
    groups, count = _groups(view)
    states = _states(view, count)
    trained, tied = _trained(view, weights, made, count, states, notes)
    moments = {trained[i]: states[i] for i in sorted(states)}
    _compare_shapes(view, weights, moments)
    if moments and len(moments) < count:
        lacking = [n for n in trained if n not in moments]
        notes.append(Note("R05", f"no optimizer state of {', '.join(grouped(lacking)[:3])}", tuple(lacking)))
    for group in groups:
        group["names"] = [trained[i] for i in group.pop("params")]
    extras: dict[str, list[str]] = {}
    for name in (*view, *view.entries):
        if (first := name.partition(".")[0]) not in OWN:
            extras.setdefault(first, []).append(name)
    notes += _remarks(view, weights, moments, extras)
    scaler = {n.removeprefix("scaler."): v for n, v in view.entries.items() if n.startswith("scaler.")}
    run = view.entries.get("wandb_id")
    return Resume(
        view,
        made,
        _whole(view, "epoch"),
        _whole(view, "step"),
        max(_whole(view, "world_size", 1), 1),
        run if isinstance(run, str) else None,
        weights,
        moments,
        groups,
        _updates(view, moments),
        tied,
        scaler,
        extras,
        notes,
    )


def _weights(view: StateView) -> dict[str, str]:
    """Find the model's tensors: parameter name -> stored name."""
    lacking = [key for key in ("epoch", "step") if key not in view.entries]
    found: dict[str, str] = {}
    for stored in view:
        name = unwrap(stored[len("model.") :])[0] if stored.startswith("model.") else ""
        if name and name.rpartition(".")[2] not in minimind.COMPUTED:
            if name in found:
                raise TensorkeepError(f"{stored} and {found[name]} are one parameter", where=view.path, code="K02")
            found[name] = stored
    lacking += [] if found else ["model"]
    lacking += [] if any(n.startswith("optimizer.") for n in (*view, *view.entries)) else ["optimizer"]
    if lacking or view.format != "pth" or not {hf.EMBEDDING, "tok_embeddings.weight"} & found.keys():
        what = f"{', '.join(lacking)} not in it" if lacking else f"no {hf.EMBEDDING} in it"
        raise TensorkeepError(
            f"is no resume file of MiniMind: {what}",
            where=view.path,
            code="K01",
            hint="weights alone are a start, not a position: tensorkeep convert FILE OUT --to hf",
        )
    return found


def _whole(view: StateView, key: str, default: int = 0) -> int:
    """A plain value of the file that must be a whole number, not negative."""
    value = view.entries.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise TensorkeepError(f"{key} is {shown(value)}, not a count", where=view.path, code="F07")
    return value


# -- the optimizer, by name ---------------------------------------------------------------------------------------


def _groups(view: StateView) -> tuple[list[dict[str, Any]], int]:
    """Read the parameter groups as saved, and how many parameters they have; torch numbers them in a row."""
    found: dict[int, dict[str, Any]] = {}
    for name, value in view.entries.items():
        if match := GROUP.match(name):
            plain = list(value) if isinstance(value, (tuple, list)) else value
            values = plain if isinstance(plain, list) else [plain]
            if not all(v is None or isinstance(v, (bool, int, float, str)) for v in values):
                raise TensorkeepError(f"{name} is {shown(value)}", where=view.path, code="F07")
            found.setdefault(int(match["group"]), {})[match["key"]] = plain
    groups = [found[i] for i in sorted(found)]
    lengths = {"lr": 0, "eps": 0, "weight_decay": 0, "betas": 2}
    odd = [key for group in groups for key, length in lengths.items() if not _real(group.get(key), length)]
    if odd:
        raise TensorkeepError(f"{odd[0]} of a parameter group is not AdamW's", where=view.path, code="R05")
    numbers = [i for group in groups for i in group.get("params") or ()]
    if not numbers or numbers != list(range(len(numbers))):
        raise TensorkeepError(
            f"the optimizer's groups name the parameters {shown(numbers)}, not 0, 1, 2 and so on",
            where=view.path,
            code="R05",
            hint="continue from the weights alone: tensorkeep convert FILE OUT --to hf",
        )
    return groups, len(numbers)


def _real(value: Any, count: int) -> bool:
    """Whether a hyper-parameter is a finite number (`count` 0), or a list of `count` of them."""
    if count:
        return isinstance(value, list) and len(value) == count and all(_real(v, 0) for v in value)
    return type(value) in (int, float) and math.isfinite(value)


def _states(view: StateView, count: int) -> dict[int, dict[str, str]]:
    """Find the optimizer state by position: index -> slot -> stored name."""
    found: dict[int, dict[str, str]] = {}
    for stored in view:
        if match := STATE.match(stored):
            found.setdefault(int(match["index"]), {})[match["slot"]] = stored
    for index, slots in found.items():
        if index >= count:
            raise TensorkeepError(
                f"optimizer.state.{index}: the groups name {count} parameters", where=view.path, code="R05"
            )
        lacking = {"step", "exp_avg", "exp_avg_sq"} - slots.keys()
        if lacking:
            raise TensorkeepError(
                f"optimizer.state.{index} has no {', '.join(sorted(lacking))}: not AdamW's", where=view.path, code="R05"
            )
    return found


def _trained(
    view: StateView,
    weights: Mapping[str, str],
    made: str,
    count: int,
    states: Mapping[int, Mapping[str, str]],
    notes: list[Note],
) -> tuple[list[str], bool]:
    """List the parameters that train in the optimizer's order; also whether head and embedding are one of them."""
    lora = [n for n in weights if ".lora." in n]
    names = lora or list(weights)
    tied = hf.HEAD in weights and hf.EMBEDDING in weights
    if not lora and tied:
        tied = count == len(names) - 1  # named_parameters() gives a tied tensor once, at the embedding
        names = [n for n in names if not (tied and n == hf.HEAD)]
    if count != len(names):
        raise TensorkeepError(
            f"the optimizer has {count} parameters, the weights of a {made} model {len(names)}"
            f"{' of LoRA' if lora else ''}: no way to tell which is which",
            where=view.path,
            code="R05",
            hint="continue from the weights alone: tensorkeep convert FILE OUT --to hf",
        )
    same = hf.HEAD not in weights or view.digest(weights[hf.HEAD]) == view.digest(weights[hf.EMBEDDING])
    if tied and not lora and not same:
        raise TensorkeepError(
            "lm_head and embedding differ, but one optimizer state belongs to both",
            where=view.path,
            code="T01",
            hint="one of the two was changed after training: see tensorkeep diagnose FILE",
        )
    order = registered(names, made)
    if order != names:  # the file's own order is torch.save's, so somebody sorted it, or it is a model of their own
        fits = {
            key: all(view[s["exp_avg"]].shape == view[weights[o[i]]].shape for i, s in states.items())
            for key, o in (("ours", order), ("file", names))
        }
        order = names if fits["file"] and not fits["ours"] else order
        used = "the file's own order" if order is names else f"the order of {made}'s modules"
        notes.append(
            Note("R05", f"the weights do not lie in the order of {made}'s modules; moments are named by {used}")
        )
    return order, tied and (not lora or same)


def registered(names: Iterable[str], made: str) -> list[str]:
    """Sort parameter names as `named_parameters()` of a model of generation `made` gives them.

    >>> registered(["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"], "mm3")
    ['model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight']
    """
    return sorted(names, key=lambda name: _place(name, made))


def _place(name: str, made: str) -> tuple[int, ...]:
    """Compute the key that sorts parameters in the order in which their model registers them."""
    match = NAME.match(name)
    module, lora = (match["module"], match["lora"] or "") if match else (name, "")
    part = (".lora.A", ".lora.B").index(lora) + 1 if lora else 0
    if match and module in _ENDS:
        return (_ENDS[module], 0, 0, 0, 0, part)
    inside = _IN_LAYER.match(module)
    rest = inside["rest"] if inside else ""
    expert = EXPERT.match(rest)
    kind, leaf = (expert["kind"], expert["leaf"]) if expert else (rest, "")
    unknown = not match or kind not in LAYER[made] or (bool(leaf) != kind.endswith("experts"))
    if unknown or inside is None or (leaf and leaf not in _FORWARD):
        raise TensorkeepError(
            f"{name} has no place in a model of MiniMind ({made})",
            code="K02",
            hint="continue from the weights alone: tensorkeep convert FILE OUT --to hf",
        )
    number = int(expert["expert"]) if expert else 0
    return (1, int(inside["layer"]), LAYER[made].index(kind), number, _FORWARD.index(leaf) if leaf else 0, part)


def _compare_shapes(view: StateView, weights: Mapping[str, str], moments: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse moments that have not their parameter's shape and a floating dtype, and counters of several numbers."""
    for name, slots in moments.items():
        shape = view[weights[name]].shape
        for slot, stored in slots.items():
            record = view[stored]
            if record.shape != (() if slot == "step" else shape) or not DTYPES[record.dtype].floating:
                raise TensorkeepError(
                    f"{stored} is {record.dtype} {list(record.shape)}, {name} is {list(shape)}",
                    where=view.path,
                    code="S01",
                    hint="this optimizer state belongs to another model",
                    tensors=[stored, weights[name]],
                )


def _updates(view: StateView, moments: Mapping[str, Mapping[str, str]]) -> int | None:
    """Read how many optimizer steps Adam counted, None where it has no state."""
    counts = [float(view.array(slots["step"]).reshape(())) for slots in moments.values()]
    if any(not 0 <= c < 1 << 40 or c != int(c) for c in counts):
        raise TensorkeepError("Adam's counter is no count", where=view.path, code="F07")
    return int(max(counts)) if counts else None


def _remarks(
    view: StateView, weights: Mapping[str, str], moments: Mapping[str, Any], extras: Mapping[str, Sequence[str]]
) -> list[Note]:
    """Note what the file lost or holds beside the model: rounding, other tensors, random states."""
    notes = []
    widths = {DTYPES[view[weights[n]].dtype].bits for n in weights}
    widest = {DTYPES[view[s["exp_avg"]].dtype].bits for s in moments.values()}
    dtypes = sorted({view[s].dtype for s in weights.values()})
    if widest and min(widths) < max(widest):
        text = f"the weights are {', '.join(dtypes)} beside moments of {max(widest)} bits"
        notes.append(Note("R06", f"{text}: they were rounded when saved, and what was lost stays lost"))
    if moments and (lost := [s for n, s in weights.items() if not DTYPES[view[s].dtype].floating]):
        raise TensorkeepError(f"{lost[0]} is {view[lost[0]].dtype}", where=view.path, code="S04")
    for key in sorted(extras, key=natural):
        stored = sum(n in view for n in extras[key])
        held = f"{stored} tensors, {len(extras[key]) - stored} values"
        notes.append(Note("K08", f"{key} is not the model's ({held}): it stays in the file"))
    notes.append(Note("R01", "no state of any random generator is in the file"))
    return notes
