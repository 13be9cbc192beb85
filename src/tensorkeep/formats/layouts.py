"""What training programs leave in a folder: tables of names, by which a folder is recognised without being told.

| table | a row says |
|---|---|
| `STATE` | a file that a resume reads beside the weights, and never weights |
| `PLACES` | a folder in which a program keeps the weights of one save, below the folder that people name |
| `STEPS` | folders of which each is one save: the newest is taken |
| `ELSEWHERE` | what cannot be joined here, and the program that can |

A new program is a new row. Names are regular expressions that fit from beginning to end.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import LocalFolder

if TYPE_CHECKING:
    from tensorkeep.formats.view import StateView


class State(NamedTuple):
    """A kind of file or folder beside the weights: its name, and what it is in a few words."""

    name: str
    what: str


_NUMBERS = r"([_-]?\d+)*"  # of processes, optimizers or steps
_SAVED = r"\.(pt|pth|bin|pkl|safetensors|json)"
STATE = (
    State(rf"(optimizer|optim|distrib_optim){_NUMBERS}{_SAVED}", "optimizer"),
    State(rf"optim_world_size_\d+_rank_\d+{_SAVED}", "optimizer"),
    State(rf"(scheduler|lr_scheduler){_NUMBERS}{_SAVED}", "schedule"),
    State(rf"(scaler){_NUMBERS}{_SAVED}", "loss scaler"),
    State(rf"(random_states|rng_state|rng|random){_NUMBERS}{_SAVED}", "random state"),
    State(rf"(sampler|dl_state_dict|dataloader){_NUMBERS}{_SAVED}", "position in the data"),
    State(
        rf"(trainer_state|train_state|extra_state|extra_state_world_size_\d+_rank){_NUMBERS}{_SAVED}", "trainer state"
    ),
    State(rf"(custom_checkpoint){_NUMBERS}{_SAVED}", "the user's own state"),
    State(r"recipe_state(\.pt)?", "trainer state"),
    State(r"training_args\.bin|args\.json|finetuning_args\.json", "arguments of the training"),
    State(r"meta\.pt|common\.pt|metadata\.(json|pkl)|\.metadata\.json|fsdp_config\.json", "description of the save"),
    State(r"latest|latest_universal|latest_checkpointed_iteration\.txt|progress\.txt", "name of the newest save"),
    State(r"zero_to_fp32\.py", "DeepSpeed's script that joins the ranks"),
    State(r"all_results\.json|train_results\.json|eval_results\.json|trainer_log\.jsonl|training_loss\.png", "results"),
    State(r"README\.md|runs|logs|wandb|hparams\.yaml|metrics\.csv|events\.out\..*|debug\.log", "log or card"),
)
_STATE = re.compile("|".join(f"(?:{row.name})" for row in STATE))
# kept in folders of their own, beside the weights
STATE_FOLDERS = (
    State(rf"optimizer{_NUMBERS}", "optimizer"),
    State(rf"(sampler|dataloader|train){_NUMBERS}", "trainer state"),
    State(r"critic", "the critic of PPO"),
    State(r"context", "NeMo's description of the model"),
    State(r"huggingface", "config and tokenizer"),
)


class Place(NamedTuple):
    """Where a program keeps the weights of a save: the folder's name, the program, a file that names the newest."""

    name: str
    writer: str
    pointer: str | None = None


PLACES = (
    Place(r"pytorch_model_fsdp(_\d+)?", "FSDP"),
    Place(r"global_step(\d+)_universal", "DeepSpeed (universal)", "latest_universal"),
    Place(r"global_step(\d+)", "DeepSpeed", "latest"),
    Place(r"pytorch_model(_\d+)?", "accelerate", "latest"),
    Place(r"checkpoint", "Lightning under DeepSpeed", "latest"),
    Place(r"model_and_optim", "OLMo-core"),
    Place(r"weights", "NeMo"),
    Place(r"_?actor", "verl or OpenRLHF"),
    Place(r"dist_ckpt", "verl under Megatron"),
)
STEPS = (
    Place(r"checkpoint-(\d+)", "transformers' Trainer"),
    Place(r"checkpoint_(\d+)", "accelerate"),
    Place(r"step-?(\d+)(-unsharded)?", "torchtitan or OLMo-core"),
    Place(r"iter_(\d+)|release()", "Megatron-LM", "latest_checkpointed_iteration.txt"),
    Place(r"global_step_(\d+)", "verl", "latest_checkpointed_iteration.txt"),
    Place(r"epoch_(\d+)", "torchtune"),
    Place(r"version_(\d+)", "Lightning"),
    Place(r"v(\d+-\d{8}-\d{6})", "ms-swift"),
    Place(r".*step=(\d+).*|.*-last()", "NeMo"),
    Place(r"checkpoints?()|lightning_logs()", "Lightning, torchtitan or accelerate"),
)


class Elsewhere(NamedTuple):
    """Files or folders that only another program can join: their names, what they are, that program."""

    name: str
    what: str
    tool: str


ELSEWHERE = (
    Elsewhere(
        r"pytorch_model_fsdp(_\d+)?_rank\d+(_of_\d+)?\.(bin|pt)|pytorch_model_rank\d+\.bin",
        "flat shards of FSDP1 (LOCAL_STATE_DICT), which do not say how their parameters lie in them",
        "load them with the program that wrote them, on as many processes, and save with "
        "FULL_STATE_DICT or SHARDED_STATE_DICT",
    ),
    Elsewhere(
        r"layer_\d+-model(_\d+)?-model_states\.pt",
        "layers of DeepSpeed's pipeline",
        "join them with DeepSpeed's ds_to_universal.py (deepspeed/checkpoint) and name its output",
    ),
    Elsewhere(
        r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim_states\.pt",
        "experts of DeepSpeed-MoE, each on a rank of its own",
        "join them with DeepSpeed's ds_to_universal.py (deepspeed/checkpoint) and name its output",
    ),
    Elsewhere(
        r"consolidated\.(0[1-9]|[1-9]\d)\.pth",
        "tensor-parallel shards of Meta's llama",
        "join them with transformers' convert_llama_weights_to_hf.py",
    ),
    Elsewhere(
        r"\.zarray|.*\.zarr",
        "Megatron's zarr arrays",
        "save again with --ckpt-format torch_dist (Megatron-LM), or convert with Megatron-Bridge",
    ),
    Elsewhere(
        r".*\.nemo",
        "a NeMo archive (a tar of Megatron's files)",
        "unpack it (tar xf) and name the folder, or export it with NeMo's llm.export_ckpt",
    ),
    Elsewhere(
        r"_CHECKPOINT_METADATA|orbax\.checkpoint|checkpoint\.orbax",
        "an Orbax checkpoint of JAX",
        "export it to safetensors with the library that wrote it",
    ),
)


def part_of_a_save(name: str) -> bool:
    """Tell whether a folder below a save is a part of it: weights or state, by its name.

    Args:
        name: the folder's name.

    >>> part_of_a_save("optimizer_0"), part_of_a_save("checkpoint-20")
    (True, False)
    """
    return any(re.fullmatch(row.name, name) for row in (*STATE_FOLDERS, *PLACES))


def is_state(name: str) -> bool:
    """Tell whether a file is one that a resume reads beside the weights, by its name.

    Args:
        name: the file's name.

    >>> is_state("rng_state_3.pth"), is_state("model_3.pth")
    (True, False)
    """
    return _STATE.fullmatch(name) is not None


def elsewhere(names: Iterable[str]) -> Elsewhere | None:
    """Return the row of what only another program can join, where such a file is among these.

    Args:
        names: files or folders of one folder.
    """
    names = list(names)
    return next((row for row in ELSEWHERE if any(re.fullmatch(row.name, n) for n in names)), None)


def place_in(folder: Path, rows: Iterable[Place]) -> tuple[Place, Path, int] | None:
    """Find the folder in which the weights lie: the one that a pointer names, else that of the highest number.

    Args:
        folder: a local folder.
        rows: PLACES or STEPS.

    Returns:
        The row that fits, the folder, and how many there are to choose from; None where none is there.

    Raises:
        TensorkeepError: F05 where there are several, and the pointer names another that is not there.
    """
    below = [entry for entry in folder.iterdir() if entry.is_dir()]
    for row in rows:
        fitting = [entry for entry in below if re.fullmatch(row.name, entry.name) and any(entry.iterdir())]
        if not fitting:
            continue
        said, newest = pointed(folder, row), max(fitting, key=partial(_number, row))
        named = named_by(said, row, [*fitting, *below]) if said else newest
        if named is None and len(fitting) > 1:
            names = ", ".join(sorted(entry.name for entry in fitting)[:4])
            raise TensorkeepError(
                f"{row.pointer} names {said[:60]!r}, which is none of the {len(fitting)} saves there: {names}",
                where=str(folder),
                code="F05",
                hint=f"name the one that you mean, such as {shlex.quote(str(newest))}",
            )
        return row, named or newest, len(fitting)
    return _of_own_name(folder) if rows is PLACES else None


def _of_own_name(folder: Path) -> tuple[Place, Path, int] | None:
    """Find the save that DeepSpeed's pointer names by a tag of the user's own: `save_checkpoint(path, tag="best")`."""
    place = Place(r".+", "DeepSpeed", "latest")
    said = pointed(folder, place)
    if said in ("", ".", "..") or "/" in said or not (folder / said).is_dir():
        return None
    written = any(entry.name.endswith("_model_states.pt") for entry in (folder / said).iterdir())
    return (place, folder / said, 1) if written else None


def _number(row: Place, path: Path) -> tuple[int, str]:
    match = re.fullmatch(row.name, path.name)
    found = (match[1] if match and match.re.groups else None) or "0"
    return int(re.sub(r"\D", "", found)[:18] or "0"), path.name


def pointed(folder: Path, row: Place) -> str:
    """Return what a program's own pointer file says, "" where there is none.

    Args:
        folder: in which the saves lie.
        row: of the program.
    """
    pointer = folder / row.pointer if row.pointer else None
    if pointer is None or not pointer.is_file() or pointer.stat().st_size > 1024:
        return ""
    said = pointer.read_text("utf-8-sig", "replace").strip()
    return posixpath.normpath(said) if said else said  # DeepSpeed joins it to the folder: ./global_step5/ is one


def named_by(said: str, row: Place, folders: Iterable[Path]) -> Path | None:
    """Return the folder that a pointer names, by its name or its number; None where it is none of them.

    Args:
        said: what the pointer says.
        row: of the program.
        folders: to choose from.
    """
    return next(
        (
            p
            for p in folders
            if p.name == said
            or (said.isdecimal() and re.fullmatch(row.name, p.name) and _number(row, p)[0] == int(said[:18]))
        ),
        None,
    )


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp")


class Beside(NamedTuple):
    """Something that lies in a folder beside what was read: its name and what it is."""

    name: str
    what: str


def beside(folder: Path, taken: Iterable[str]) -> list[Beside]:
    """List what lies in a folder beside the part that was read.

    Args:
        folder: a local folder.
        taken: names that were read, which are left out.

    Returns:
        What the tables know, in the order of names; other files are left out.
    """
    out, read = [], set(taken)
    rows = [*STATE, *STATE_FOLDERS]
    places = [*PLACES, *STEPS]
    for entry in sorted(folder.iterdir(), key=lambda p: p.name):
        if entry.name in read:
            continue
        what = next((r.what for r in rows if re.fullmatch(r.name, entry.name)), None)
        if what is None and entry.is_dir():
            place = next((r for r in places if re.fullmatch(r.name, entry.name)), None)
            what = f"another save of {place.writer}" if place is not None else None
        if what is None:
            found = elsewhere([entry.name])
            what = found.what if found is not None else None
        if what is None and entry.is_file() and entry.name.endswith(_WEIGHTS):
            what = "weights that are not read"
        if what is not None:
            out.append(Beside(entry.name, what))
    return out


def surroundings(view: StateView) -> list[Beside]:
    """List what lies beside the part of a folder that a view is of.

    Args:
        view: the opened checkpoint.

    Returns:
        What the tables know, of the folder that was named and of the save in it; [] where a file was named, or a place
        in a store, whose other objects are nobody's business.
    """
    named = view.metadata.get("named") or (view.folder.path if isinstance(view.folder, LocalFolder) else None)
    if named is None or Path(view.path).name in view.folder.names():
        return []
    out: list[Beside] = []
    files = {b.file.partition("/")[0] for r in view.values() for b in r.blocks} | {c.name for c in view.companions}
    files |= view.metadata.get("files", set())
    for place in dict.fromkeys([named, view.metadata.get("home", named)]):
        below = view.folder.path if isinstance(view.folder, LocalFolder) else place
        taken = {below.relative_to(place).parts[0]} if below != place and below.is_relative_to(place) else files
        out += [entry for entry in beside(place, taken) if entry not in out]
    return out
