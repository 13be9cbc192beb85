"""Save and load accelerate's states whole or not at all.

accelerate writes in place, fsyncs nothing, and a resume that finds half a folder stops. Around its own calls:

    register(accelerator)                                    # trainable weights only, the frozen base by its digest
    save_state(accelerator, "out/step_100", keep_last=3)
    folder = load_state(accelerator, "out")                  # the newest valid one; None: start anew
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import seals
from tensorkeep.formats.memory import digest_of
from tensorkeep.integrations import _folders as folders
from tensorkeep.storage import run_manifest
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import digest_of_all, parse_json
from tensorkeep.storage.placement import replacing
from tensorkeep.storage.run_folder import ADAPTER, MODEL
from tensorkeep.storage.run_manifest import MANIFEST
from tensorkeep.training import distributed, live_state, randomness
from tensorkeep.training.distributed import World
from tensorkeep.training.waiting import first_works

log = logging.getLogger(__name__)
_NUMBERED = re.compile(r"(?!\.)(?:.*\D)?(\d+)")  # step_100, checkpoint-7, 12: as accelerate itself orders folders


def register(accelerator: Any, trainable_only: bool = True) -> tuple[Any, Any]:
    """Let our hooks save and load the models of `accelerator.save_state` and `accelerator.load_state`.

    Parameters that train and persistent buffers go by name into one safetensors file. A load is strict.

    Args:
        accelerator: accelerate's `Accelerator`, unsharded.
        trainable_only: leave frozen and quantized weights out of the file; their digest is kept and compared on load.

    Returns:
        accelerate's two handles, of the hooks for saving and for loading.

    Raises:
        TensorkeepError: the run is sharded. From a load: tensors are missing, unexpected or different (K01), or the
            base is another one (A04).
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise TensorkeepError(
            f"{kind} gives its hooks no weights",
            where="accelerate",
            hint="leave `register` out: save_state and load_state keep every process's files",
        )
    bases: dict[int, dict[str, Any]] = {}  # the frozen weights do not change, and reading them takes a while

    def base_of(models: list[nn.Module]) -> dict[str, Any] | None:
        if not trainable_only:
            return None
        key = hash(tuple(id(m) for m in models))
        if key not in bases:
            bases[key] = _frozen(models)
        return bases[key]

    def save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            tensors = {}
            for prefix, model in _unwrapped(accelerator, models):
                own, _ = live_state.stored_tensors(model, base=trainable_only)
                tensors.update({prefix + name: tensor for name, tensor in own.items()})
            _write(Path(output_dir), ADAPTER if trainable_only else MODEL, tensors, base_of(models))
        weights.clear()  # what is left in it accelerate saves too

    def load(models: list[nn.Module], input_dir: str) -> None:
        folder = Path(input_dir)
        saved = folders.read_tensors(folder, ADAPTER if trainable_only else MODEL)
        _compare_base(folder, base_of(models))
        parts = _unwrapped(accelerator, models)
        shares = [{n[len(p) :]: t for n, t in saved.items() if n.startswith(p)} for p, _ in parts]
        if sum(map(len, shares)) != len(saved):
            what = f"holds tensors of other models than the {len(models)} here"
            raise TensorkeepError(
                what, where=folder, code="K02", hint="prepare the models that were saved, in their order"
            )
        for (_, model), share in zip(parts, shares):
            live_state.put_tensors(model, share, base=trainable_only)
        models.clear()  # what is left in it accelerate loads too

    return accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)


def save_state(accelerator: Any, folder: str | Path, keep_last: int | None = None) -> Path:
    """Save an accelerator's state so that `folder` is whole and on the disk, or not there.

    `accelerator.save_state` writes into a temporary folder, which is sealed and renamed. Call it on every process.

    Args:
        accelerator: accelerate's `Accelerator`.
        folder: the new folder; its name ends in a number (`out/step_100`).
        keep_last: then keep only so many of the newest folders of that name; None for all.

    Returns:
        The folder.

    Raises:
        TensorkeepError: NaN or Inf in weights (V01), a name without a number, automatic_checkpoint_naming, a full or
            failing disk, a folder of that name that holds anything but a sealed checkpoint. What was there stays.
    """
    final, world = Path(folder), _world(accelerator)
    step = _number(final)
    siblings = re.compile(re.escape(final.name.rstrip("0123456789")) + r"(\d+)")
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise TensorkeepError(
            "automatic_checkpoint_naming saves elsewhere than it is told, and deletes first",
            where="accelerate",
            hint="leave it out of ProjectConfiguration; keep_last= deletes old ones",
        )
    with ExitStack() as stack:

        def begin() -> Path:
            folders.clear_remains(final.parent, siblings)
            return stack.enter_context(replacing(final, overwrite=True, kind=folders.SEALED))

        temporary = first_works(world, begin)
        accelerator.save_state(str(temporary))
        document = json.dumps(randomness.capture()).encode()
        distributed.together(world, lambda: folders.write_document(temporary, _random(world.rank), document))
        first_works(world, lambda: _seal(temporary, step))
        first_works(world, stack.close)  # renames
    if keep_last is not None and world.first:
        folders.prune_folders(folders.numbered(final.parent, siblings), step, keep_last, set())
    return final


def load_state(accelerator: Any, root: str | Path) -> Path | None:
    """Load an accelerator's state from the newest valid folder in `root`.

    Folders passed over stay and are named in a warning. Random states are put back last; accelerate itself goes on
    without a word where it cannot, and so can a run on more processes than saved: that is a warning here. Call it on
    every process.

    Args:
        accelerator: accelerate's `Accelerator`.
        root: the folder that holds the saved ones.

    Returns:
        The folder loaded; None where there is none, to start anew.

    Raises:
        TensorkeepError: there are folders and none is valid; and as `register` says.
    """
    world = _world(accelerator)

    def search() -> Path | None:
        paths = [path for _, path in folders.numbered(Path(root), _NUMBERED)]
        return folders.newest_sealed(paths, log)

    folder = first_works(world, search)  # it reads every byte
    if folder is None:
        return None
    accelerator.load_state(str(folder))
    name = _random(world.rank)
    if name in run_manifest.read_manifest(folder).files:
        randomness.restore(parse_json(read_small(folder / name), folder / name))
    else:
        log.warning("%s: no random states of process %s: it draws other numbers than it would have", folder, world.rank)
    return folder


def _seal(folder: Path, step: int) -> None:
    """Seal a folder that accelerate filled, over what the hook's own manifest says of the base."""
    known = (folder / MANIFEST).is_file()  # of the hook, which covers its own file
    seals.seal(folder, step, run_manifest.read_manifest(folder).base if known else None)


def _number(folder: Path) -> int:
    """Return the number that a folder's name ends in."""
    match = _NUMBERED.fullmatch(folder.name)
    if match is None:
        raise TensorkeepError("its name does not end in a number", where=folder, hint="name it like step_100")
    return int(match[1])


def _world(accelerator: Any) -> World:
    """Return this process's rank and how many there are."""
    return World(accelerator.process_index, accelerator.num_processes)


def _random(rank: int) -> str:
    """Return the name of a process's file of random states."""
    return f"random_{rank}.json"


# -- models -------------------------------------------------------------------------------------------------------


def _unwrapped(accelerator: Any, models: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return each model under DDP and torch.compile, and what its names begin with in the one file."""
    return [(f"{i}." if len(models) > 1 else "", accelerator.unwrap_model(m)) for i, m in enumerate(models)]


def _write(folder: Path, name: str, tensors: dict[str, Tensor], base: dict[str, Any] | None) -> None:
    """Write our file and its manifest; other processes write beside it, so `save_state` seals again, over all files."""
    folders.write_tensors(folder, name, tensors)
    match = _NUMBERED.fullmatch(folder.name)
    seals.seal(folder, int(match[1]) if match else 0, base, only={name})


def _frozen(models: list[nn.Module]) -> dict[str, Any]:
    """Return the digest and number of the tensors that `trainable_only` leaves out."""
    digests: dict[str, str] = {}
    for index, model in enumerate(models):
        stored, ties = live_state.stored_tensors(model, base=True)
        for name, value in model.state_dict().items():
            if name not in stored and name not in ties and isinstance(value, Tensor):
                digests[f"{index}.{name}"] = digest_of(value)
    return {"digest": digest_of_all(digests), "tensors": len(digests)}


def _compare_base(folder: Path, now: dict[str, Any] | None) -> None:
    """Stop (A04) where a folder was saved over other frozen weights."""
    then = run_manifest.read_manifest(folder).base
    if then != now:
        raise TensorkeepError(
            f"was trained on frozen weights {_told(then)}, here are {_told(now)}",
            where=folder,
            code="A04",
            hint="load the base and quantize it as in that run",
        )


def _told(base: dict[str, Any] | None) -> str:
    """Describe frozen weights for an error."""
    return "that were saved too" if base is None else f"{str(base.get('digest'))[:12]} ({base.get('tensors')} tensors)"
