"""Find what a checkpoint holds for resuming: optimizer state, position, random state, number of processes.

Known layouts: a dict saved by torch.save (`model`, `optimizer`, `epoch`, `step`: MiniMind, OpenTAD, many others),
torchtitan's and flame's DCP folders, transformers' Trainer and accelerate folders, and our own run folders. Values of
DCP's opaque entries are not unpickled, so a step number in there stays unknown; that it is there is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tensorkeep.conversion.naming import OTHER_STATE
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.run import read_part
from tensorkeep.formats.view import StateView, read
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.record import TensorRecord

_FOLDERS = ("hf", "dcp", "peft", "zero", "ranks", "megatron")  # formats that are folders, with files beside
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer.safetensors")
_BY_POSITION = re.compile(r"(.*\.)?state\.(?P<index>\d+)\.(?P<what>[^.]+)\Z")
_RANK_FILE = re.compile(r"(rng_state|random_states|extra_state_world_size_\d+_rank)(_(?P<rank>\d+))?\.(pth|pkl|pt)\Z")
_RANK_ENTRY = re.compile(r"dataloader\.(dp_rank_)?(?P<rank>\d+)(\.|\Z)")
_RANDOM = re.compile(r"(^|[._])(rng|random)(_?states?)?([._]|\Z)")
_OWN_STATE, _TRAINER_STATE = "state.json", "trainer_state.json"


@dataclass
class ResumeState:
    """What a checkpoint holds besides weights.

    `layout` is dict (a dict saved by torch.save), torchtitan, trainer or run. `optimizer` holds its tensors by stored
    name. `position` holds numbers by name (epoch, step, samples, ...), None where a number is there and cannot be read.
    `rng` and `loader` are names of entries or files. `world` is the number of processes, None where nothing says.
    `document` is the state.json or trainer_state.json beside the weights.
    """

    layout: str
    optimizer: dict[str, TensorRecord] = field(default_factory=dict)
    position: dict[str, int | None] = field(default_factory=dict)
    rng: list[str] = field(default_factory=list)
    loader: list[str] = field(default_factory=list)
    world: int | None = None
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def by_position(self) -> dict[int, dict[str, TensorRecord]]:
        """The optimizer state of each parameter by its number: index -> name of the state -> record.

        Of the model's optimizer, where there are several; empty where states go by name.
        """
        all_of: dict[str, dict[int, dict[str, TensorRecord]]] = {}
        for name, record in self.optimizer.items():
            if match := _BY_POSITION.match(name):
                all_of.setdefault(match[1] or "", {}).setdefault(int(match["index"]), {})[match["what"]] = record
        return all_of[min(all_of, key=lambda prefix: (len(prefix), prefix))] if all_of else {}


_POSITIONS = "step epoch samples global_step iteration iter ntokens_seen tokens consumed_samples".split()


def resume_state(case: Case) -> ResumeState | None:
    """Return the training state of the checkpoint, found once for all checks; None where it is a model alone."""
    if "resume state" not in case.results:
        case.results["resume state"] = find(case.view) if case.view is not None else None
    found: ResumeState | None = case.results["resume state"]
    return found


def reference_state(case: Case) -> ResumeState | None:
    """Return the training state of the reference, found once; None without a reference or where it is a model alone."""
    if "reference resume state" not in case.results:
        case.results["reference resume state"] = find(case.reference) if case.reference is not None else None
    found: ResumeState | None = case.results["reference resume state"]
    return found


def find(view: StateView) -> ResumeState | None:
    """Find training state in a checkpoint and in the files beside it.

    Args:
        view: The checkpoint.

    Returns:
        The state; None where there is no optimizer, no layout of a training program and no more than step numbers.
    """
    home = view.home
    names = home.names() if view.format in _FOLDERS or home is not view.folder else []
    layout = _layout(view, names)
    state = ResumeState(layout)
    state.optimizer = {n: r for n, r in view.items() if _optimizer_name(n)}
    for file in _OPTIMIZER_FILES:
        if file in names and not state.optimizer:
            state.optimizer = _beside(f"{home.url}/{file}")
    if not state.optimizer and isinstance(home, LocalFolder) and names:
        parts = sorted(p for p in home.path.iterdir() if re.fullmatch(r"optimizer(_\d+)?", p.name) and p.is_dir())
        state.optimizer = _beside(str(parts[0])) if parts else {}
    if not state.optimizer and layout == "run" and isinstance(home, LocalFolder):
        part = read_part(home.path, "optimizer")
        state.optimizer = dict(part.records) if part is not None else {}
    for name, value in view.entries.items():
        last = name.rpartition(".")[2]
        if last in _POSITIONS and not _optimizer_name(name) and "scheduler" not in name.partition(".")[0]:
            state.position[last] = value if type(value) is int else None
        elif name.partition(".")[0] in ("train_state", "trainer_state"):
            state.position.setdefault(last, None)  # opaque, but there
        if name == "world_size" and type(value) is int:
            state.world = value
    stored = [*view, *view.entries]
    state.rng = [n for n in stored if _RANDOM.search(n)] + [n for n in names if _RANK_FILE.match(n)]
    state.loader = [n for n in stored if n.partition(".")[0] == "dataloader"]
    ranks = {int(m["rank"]) for n in state.loader if (m := _RANK_ENTRY.match(n))} | {
        int(m["rank"]) for n in names if (m := _RANK_FILE.match(n)) and m["rank"]
    }
    state.world = state.world if state.world is not None or not ranks else max(ranks) + 1
    _read_documents(view, names, state)
    if not state.position:
        _count_by_optimizer(view, state)
    beside = any(n.partition(".")[0] in OTHER_STATE for n in view.entries)
    return state if state.optimizer or layout in ("run", "trainer") or (beside and state.position) else None


def _layout(view: StateView, names: list[str]) -> str:
    """Say which kind of program wrote the checkpoint."""
    if _OWN_STATE in names and "manifest.json" in names:
        return "run"
    if _TRAINER_STATE in names:
        return "trainer"
    return "torchtitan" if view.format == "dcp" else "dict"


def _count_by_optimizer(view: StateView, state: ResumeState) -> None:
    """Take the optimizer's own step counter as the position."""
    counter = next(
        (
            n
            for n, r in view.items()
            if _optimizer_name(n)
            and n.endswith(".step")
            and r.elements == 1
            and r.dtype in ("F32", "F64", "I64", "I32")
        ),
        None,
    )
    if counter is not None:
        state.position["optimizer_step"] = whole(float(view.array(counter).reshape(())))


def whole(value: float) -> int | None:
    """Return a number out of a file as a whole one; None for what is no count."""
    return int(value) if 0 <= value < 1 << 62 else None


def _optimizer_name(name: str) -> bool:
    """Say whether a stored name is optimizer state (also `critic_optimizer`, `optimizers_0`)."""
    first = name.partition(".")[0]
    return OTHER_STATE.get(first) == "optimizer state" or re.fullmatch(r"optim(izer)?s?[-_]?\d*", first) is not None


def _beside(path: str) -> dict[str, TensorRecord]:
    """Read the headers of an optimizer's file or folder beside the weights; {} where it cannot be read safely."""
    try:
        return dict(read(path))
    except TensorkeepError:
        return {}


def _read_documents(view: StateView, names: list[str], state: ResumeState) -> None:
    """Add what state.json or trainer_state.json says."""
    for file in (_OWN_STATE, _TRAINER_STATE):
        if file not in names:
            continue
        try:
            document = parse_json(read_small_from(view.home, file), f"{view.home.url}/{file}")
        except TensorkeepError:
            continue
        if not isinstance(document, dict):
            continue
        state.document = document
        for key in _POSITIONS:
            if type(document.get(key)) in (int, float):
                state.position[key] = whole(document[key])
        if type(document.get("world_size")) is int:
            state.world = document["world_size"]
        state.rng += [key for key in document if _RANDOM.search(key)]


def moments(state: ResumeState) -> dict[str, TensorRecord]:
    """Return the optimizer's first moments by stored name, whatever it calls them."""
    return {
        n: r
        for n, r in state.optimizer.items()
        if re.split("[./]", n)[-1] in ("exp_avg", "momentum_buffer", "square_avg", "m")
    }
