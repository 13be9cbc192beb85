"""The state that `benchmarks.crash` saves (every value follows from the step), and the plain ways of saving it.

Ours; `torch.save` and safetensors into one file that is replaced; DCP into a folder a step, resumed from the newest
that has its `.metadata` (the rule of torchtitan). DCP saves the state twice, with 25 tensors and stacked into one: it
fsyncs `.metadata` before Python's buffer is flushed, which leaves a small one (here below 4 KiB) empty.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep.storage import run_folder
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.saver import Keep, Saver, State

LAYERS, SHAPE = 8, (64, 1024)  # 2 MiB of weights, 4 MiB of moments
PARTS = ("exp_avg", "exp_avg_sq")
KEPT = 3
Told = Callable[[int], None]


class Found(NamedTuple):
    """What a resume loaded. `rest`: a digest of all that is loaded beside the tensors."""

    step: int
    tensors: dict[str, Tensor]
    rest: str = ""


class Writer(NamedTuple):
    """A way of saving and resuming.

    `save(place, steps, told)` saves steps 1, 2, ... and tells of each that is saved; `resume(place)` is the tool's own
    rule and None where it finds nothing; `files(place)` are those of the newest checkpoint.
    """

    name: str
    save: Callable[[Path, int, Told], None]
    resume: Callable[[Path], Found | None]
    files: Callable[[Path], list[Path]]
    imports: tuple[str, ...] = ()


# -- the state --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SHAPE))


class Net(nn.Module):
    """Nothing but parameters; its loss is good for a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": x.mean() * sum((layer.w * layer.w).mean() for layer in self.layers)}  # type: ignore[operator]


def value(name: str, step: int) -> Tensor:
    """float32 of SHAPE, in [0, 1) but for the first element, which is the step."""
    made = base(name).roll(step % SHAPE[1], 1)
    made[0, 0] = step
    return made


@functools.cache
def base(name: str) -> Tensor:
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def names() -> list[str]:
    return [f"layers.{i}.w" for i in range(LAYERS)]


def fill(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            name = name[name.index("layers") :]
            parameter.copy_(value(name, step))
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(step))
            for part in PARTS:
                state[part] = value(f"{name}/{part}", step)


def captured(net: nn.Module, optimizer: torch.optim.Optimizer, step: int, *rest: Any) -> Found:
    """Collect everything a tool has loaded into these objects."""
    tensors, steps = {}, []
    for name, parameter in net.named_parameters():
        name = name[name.index("layers") :]
        tensors[name] = parameter.detach().clone()
        state = optimizer.state.get(parameter, {})
        steps.append(float(state.get("step", -1)))
        tensors |= {f"{name}/{part}": state[part].clone() for part in PARTS if part in state}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return Found(step, tensors, digest_of(groups, steps, *rest))


def randomness() -> tuple[Any, ...]:
    import numpy as np

    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def digest_of(*things: Any) -> str:
    return hashlib.sha256(repr(things).encode()).hexdigest()


def whole(found: Found) -> bool:
    """Whether every tensor there must be is there and of this step, bit for bit."""
    wanted = {f"{n}{p}" for n in names() for p in ("", *(f"/{part}" for part in PARTS))}
    return wanted <= set(found.tensors) and all(same(t, value(n, found.step)) for n, t in found.tensors.items())


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


class Enough(Exception):
    """Raised out of a tool's training loop once it has loaded what it resumes from."""


# -- ours -------------------------------------------------------------------------------------------------------------


def state(step: int) -> State:
    model = {n: value(n, step) for n in names()}
    moments = {f"{n}/{p}": value(f"{n}/{p}", step) for n in names() for p in PARTS}
    document = {"step": step, "samples": 8 * step, "epoch": 0, "world_size": 1, "rng": {"torch": "00" * 5000}}
    return State(model, moments, {n: value(f"{n}/ema", step) for n in names()}, document)


def save_ours(place: Path, steps: int, told: Told) -> None:
    saver = Saver(place, Keep(KEPT), background=os.getpid() % 2 == 0)
    for step in range(1, steps + 1):
        saver.save(state(step))
        if saver.background:
            saver.wait()
        told(step)
        if step % 5 == 0:
            checkpoint.mark_best(place, step)
    saver.close()


def resume_ours(place: Path) -> Found | None:
    found = checkpoint.newest(place)
    if found is None:
        return None
    loaded = found[0]
    ema = {f"{n}/ema": t for n, t in loaded.ema.items()}
    rest = digest_of(loaded.document, loaded.base, loaded.not_captured)
    return Found(loaded.document["step"], loaded.model | loaded.optimizer | ema, rest)


def files_ours(place: Path) -> list[Path]:
    return sorted(run_folder.folder_of(place, checkpoint.steps(place)[0]).iterdir())


# -- one file, replaced -----------------------------------------------------------------------------------------------


def flat(step: int) -> dict[str, Tensor]:
    tensors = {n: value(n, step) for n in names()}
    return tensors | {f"{n}/{p}": value(f"{n}/{p}", step) for n in names() for p in PARTS}


def replaced(name: str, write: Callable[[dict[str, Tensor], Path], None]) -> Callable[[Path, int, Told], None]:
    """Written under another name, then renamed over the one before."""

    def save(place: Path, steps: int, told: Told) -> None:
        for step in range(1, steps + 1):
            write(flat(step), place / f"{name}.tmp")
            (place / f"{name}.tmp").replace(place / name)
            told(step)

    return save


def write_torch(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save({"step": int(tensors[names()[0]][0, 0]), "tensors": tensors}, path)


def resume_torch(place: Path) -> Found | None:
    if not (place / "last.pt").exists():
        return None
    held = torch.load(place / "last.pt", weights_only=True)
    return Found(held["step"], held["tensors"])


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"step": str(int(tensors[names()[0]][0, 0]))})


def resume_safetensors(place: Path) -> Found | None:
    from safetensors import safe_open

    if not (place / "last.safetensors").exists():
        return None
    with safe_open(place / "last.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        return Found(int(file.metadata()["step"]), tensors)


# -- DCP --------------------------------------------------------------------------------------------------------------


def numbered(place: Path, pattern: str, needs: str = "") -> list[tuple[int, Path]]:
    """Folders by the number at their end, newest first; only those that hold `needs`."""
    found = [(int(p.name.replace("_", "-").rpartition("-")[2]), p) for p in place.glob(pattern)]
    return sorted((f for f in found if not needs or (f[1] / needs).exists()), reverse=True)


def save_dcp(place: Path, steps: int, told: Told, stacked: bool = False) -> None:
    import torch.distributed.checkpoint as dcp

    for step in range(1, steps + 1):
        writer = dcp.FileSystemWriter(place / f"step-{step}", sync_files=True)
        dcp.save(for_dcp(step, stacked), storage_writer=writer, no_dist=True)
        told(step)
        for _, old in numbered(place, "step-*")[KEPT:]:
            shutil.rmtree(old)


def resume_dcp(place: Path, stacked: bool = False) -> Found | None:
    import torch.distributed.checkpoint as dcp

    found = numbered(place, "step-*", ".metadata")
    if not found:
        return None
    held = for_dcp(0, stacked)
    dcp.load(held, checkpoint_id=str(found[0][1]), no_dist=True)
    step = held.pop("step")
    return Found(step, dict(zip(flat(0), held["all"])) if stacked else held)


def for_dcp(step: int, stacked: bool) -> dict[str, Any]:
    tensors = flat(step)
    return {"step": step, **({"all": torch.stack(list(tensors.values()))} if stacked else tensors)}
