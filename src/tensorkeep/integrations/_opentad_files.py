"""Write OpenTAD's checkpoint files under our rules, and compare what is loaded.

A file stays OpenTAD's own `epoch_N.pth`: its tools and a stock OpenTAD read it. It is written beside its place, read
back and compared tensor by tensor, and renamed; its certificate (`tensorkeep verify`) lies beside it. One more entry,
`tensorkeep`, holds what OpenTAD does not save and an exact resume needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.conversion.sink import beside
from tensorkeep.diagnosis.verification import against_crc, verify
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import digest_of
from tensorkeep.formats.seals import not_finite
from tensorkeep.formats.view import read
from tensorkeep.integrations._folders import clear_remains
from tensorkeep.storage import certificate as manifest
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import replacing_all, write_bytes
from tensorkeep.training import randomness
from tensorkeep.training.live_state import refuse_difference

_ENTRY = "tensorkeep"
_FILES = re.compile(r"(epoch_\d+|best)\.pth.*")


@dataclass
class Run:
    """What a process knows beside OpenTAD's own variables.

    Args:
        resumed: our entry of the file that it goes on from, empty for a file of OpenTAD's; None for a new run.
        scaler: OpenTAD's loss scaler; None without one.
    """

    resumed: dict[str, Any] | None = None
    scaler: Any = None


# -- saving -------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: nn.Module,
    model_ema: Any,
    optimizer: Optimizer,
    scheduler: Any,
    epoch: int,
    work_dir: str | None = None,
    *,
    run: Run,
) -> None:
    """Write OpenTAD's `checkpoint/epoch_N.pth`, whole or not there, proven and certified.

    Raises:
        TensorkeepError: NaN or Inf (V01), the disk gives back something else (F03), or it is full or fails. Older files
            stay.
    """
    states = _weights(model, model_ema, epoch)
    states |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    document = {
        "schema": 1,
        "ema": None if model_ema is None else {"updates": model_ema.ema.updates, "decay": model_ema.ema.decay},
        "optimizer": group_names(model, optimizer),
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        "randomness": randomness.capture(),
        "world_size": _world_size(),
    }
    _write(Path(work_dir or ".") / "checkpoint" / f"epoch_{epoch}.pth", states | {_ENTRY: json.dumps(document)})


def save_best_checkpoint(model: nn.Module, model_ema: Any, epoch: int, work_dir: str | None = None) -> None:
    """Write OpenTAD's `checkpoint/best.pth`: weights alone, under the same rules."""
    _write(Path(work_dir or ".") / "checkpoint" / "best.pth", _weights(model, model_ema, epoch))


def _weights(model: nn.Module, model_ema: Any, epoch: int) -> dict[str, Any]:
    """Return the entries of a file that hold weights."""
    average = {} if model_ema is None else {"state_dict_ema": model_ema.state_dict()}
    return {"epoch": epoch, "state_dict": model.state_dict(), **average}


def _write(path: Path, states: dict[str, Any]) -> None:
    """Write a file beside its place, read it back, compare every tensor, and rename it with its certificate."""
    tensors = dict(_flat(states))
    spoiled = sorted(n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all()))
    if spoiled:
        raise not_finite(path, spoiled)
    clear_remains(path.parent, _FILES)
    with replacing_all([path, beside(path)], [True, True], [None, None]) as (temporary, certificate):
        with explained(path), temporary.open("xb") as file:
            torch.save(states, file)
        view = read(temporary)
        digests = {name: digest_of(tensor) for name, tensor in tensors.items()}
        wrong = sorted(view.keys() ^ digests.keys()) or [n for n in view if view.digest(n) != digests[n]]
        if wrong:
            raise TensorkeepError(
                f"read back, {wrong[0]} is not what was saved ({len(wrong)} tensors)",
                where=path,
                code="F03",
                hint="check the disk; the checkpoints before it stay",
                tensors=wrong,
            )
        entries = {n: {"dtype": r.dtype, "shape": list(r.shape), "xxh3_128": digests[n]} for n, r in view.items()}
        document = {
            "schema": manifest.SCHEMA,
            "format": "pth",
            "root": None,
            "digest": manifest.digest_of_all(digests),
            "tensors": entries,
        }
        write_bytes(certificate, manifest.dump(document))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of nested dicts and lists, by joined keys, as `read` names those of a file."""
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, (Mapping, list, tuple)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of each optimizer group's parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# -- resuming -----------------------------------------------------------------------------------------------------


def read_resumed(path: str | Path) -> dict[str, Any]:
    """Verify the file that a run goes on from, before torch reads it, and return our entry; empty for OpenTAD's own.

    Raises:
        TensorkeepError: damage: tensors are held against the certificate, the rest against the archive's own checksums,
            which torch writes and never reads.
    """
    findings, view, certified = verify(path)
    if certified and view is not None:
        findings = [*findings, *against_crc(view, None)]
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors or view is None:
        first = errors[0]
        raise TensorkeepError(
            first.message.removeprefix(f"{path}: "),
            where=path,
            code=first.code,
            tensors=first.tensors,
            hint="resume from the epoch before it (--resume), or copy the file again",
        )
    text = view.entries.get(_ENTRY)
    document = manifest.parse_json(text.encode(), path) if isinstance(text, str) else {}
    if text is not None and (not isinstance(document, dict) or document.get("schema") != 1):
        raise TensorkeepError(f"its entry {_ENTRY!r} is of a version unknown here", where=path, code="F07")
    return dict(document)


def keep_kinds(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded, make a buffer a float that training has made one (`loss_normalizer`).

    torch would cut the saved value to an integer without a word. Any other change of dtype is refused (S04).
    """
    own = model.state_dict(keep_vars=True, prefix=prefix)
    places = {id(b): (m, n) for m in model.modules() for n, b in m._buffers.items()}
    for name, saved in state.items():
        mine = own.get(name)
        if mine is None or mine.dtype == saved.dtype:
            continue
        module, buffer = places.get(id(mine), (None, ""))
        if module is None or mine.is_floating_point() or not saved.is_floating_point():
            what = f"{name} is {saved.dtype}, the model's {mine.dtype}"
            raise TensorkeepError(
                what, where="state_dict", code="S04", hint="convert the file, or resume as it was run"
            )
        module._buffers[buffer] = mine.to(saved.dtype)  # codes under floats are made anew by the load itself


def compare_moments(optimizer: Optimizer, state: Mapping[str, Any], names: list[list[str]], run: Run) -> None:
    """Compare the optimizer's state with its parameters: the names, where the file has ours, and each shape.

    OpenTAD gives moments back by number alone.
    """
    saved = (run.resumed or {}).get("optimizer")
    flat = [name for group in names for name in group]
    if saved is not None:
        then = [name for group in saved for name in group]
        refuse_difference("optimizer", {n: "trained" for n in flat}, {n: "trained" for n in then})
        if then != flat or list(map(len, saved)) != list(map(len, names)):
            raise TensorkeepError(
                "the same parameters in other groups or another order",
                where="optimizer",
                code="R05",
                hint="resume with the optimizer section of the run",
            )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [index for group in state["param_groups"] for index in group["params"]]
    known = {index: (name, p.shape) for index, name, p in zip(numbers, flat, parameters)}
    wrong = []
    for index, slots in state["state"].items():
        name, shape = known.get(index, (f"parameter {index}", None))
        shapes = {tuple(v.shape) for v in slots.values() if isinstance(v, Tensor) and v.ndim}
        wrong += [f"{name} {list(other)}" for other in shapes if other != shape]
    if wrong:
        raise TensorkeepError(
            f"moments that do not fit their parameters: {wrong[0]} ({len(wrong)})",
            where="optimizer",
            code="R05",
            hint="resume with the model and optimizer sections of the run",
        )


def restore_run(saved: Mapping[str, Any], scaler: Any, logger: Any) -> None:
    """Put random states and loss scale back, and log what cannot be."""
    if not saved:
        logger.warning("tensorkeep: R01 the file is OpenTAD's own: random states and loss scale begin anew")
        return
    if (saved["scaler"] is None) != (scaler is None):
        logger.warning("tensorkeep: R04 solver.amp is another than the file was saved with: the loss scale begins anew")
    elif scaler is not None and saved["scaler"]:  # empty where there was no GPU
        scaler.load_state_dict(saved["scaler"])
    if saved["world_size"] == _world_size() == 1 and randomness.fits(saved["randomness"]):
        randomness.restore(saved["randomness"])
        logger.info("tensorkeep: resumed exactly, random states included")
    else:
        logger.warning("tensorkeep: R01 random states begin anew: they are kept for one process on the same devices")
