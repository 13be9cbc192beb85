"""One model in every form that programs keep it in, each by the program's own writer or layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests import folder_layouts
from tests.helpers import to

State = dict[str, torch.Tensor]


def config_beside(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "config.json", folder / "config.json")


def shards(model: Path, out: Path, state: State) -> Path:
    """hf in as many files as there are tensors, in another order."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    names, places = sorted(state, reverse=True), {}
    for number, name in enumerate(names, 1):
        places[name] = f"model-{number:05}-of-{len(names):05}.safetensors"
        save_file({name: state[name]}, out / places[name], metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out


def dcp_threads(model: Path, out: Path, state: State) -> Path:
    """DCP in eight files."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(out, thread_count=8), no_dist=True)
    config_beside(model, out)
    return out


def flame(model: Path, out: Path, state: State) -> Path:
    """DCP nested under `model`, beside an optimizer."""
    held = {"model": state, "optimizer": {"state": {k: {"exp_avg": v * 0} for k, v in state.items()}}}
    dcp.save(held, storage_writer=dcp.FileSystemWriter(out / "step-8"), no_dist=True)
    config_beside(model, out / "step-8")
    return out / "step-8"


def wrapped(model: Path, out: Path, state: State) -> Path:
    """torch.save of a compiled model under DDP, nested, with the step."""
    out.mkdir()
    torch.save(
        {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}, "step": 3},
        out / "model.pth",
    )
    config_beside(model, out)
    return out / "model.pth"


def live(model: Path, out: Path, state: State) -> Path:
    """torch.save of what transformers' model in memory calls its tensors: tied ones twice, experts in stacks."""
    from transformers import AutoModelForCausalLM

    out.mkdir()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=next(iter(state.values())).dtype)
    torch.save(network.state_dict(), out / "model.pth")
    config_beside(model, out)
    return out / "model.pth"


def of_a_program(write: Callable[[Path, Path, State], Path]) -> Callable[[Path, Path, State], Path]:
    """What `folder_layouts` writes, its arguments in the order of this module."""
    return lambda model, out, state: write(out, model, state)


def converted(form: str, **options: Any) -> Callable[[Path, Path, State], Path]:
    """What our own conversion makes."""

    def write(model: Path, out: Path, state: State) -> Path:
        end = {"pth": ".pth", "gguf": ".gguf"}.get(form, "")
        out.mkdir()
        config_beside(model, out)
        place = out / f"model{end}"
        to(model, place, form, **options)
        return place

    return write


FORMS: dict[str, Callable[[Path, Path, State], Path]] = {
    "shards": shards,
    "bin shards": of_a_program(folder_layouts.bin_shards),
    "dcp of threads": dcp_threads,
    "flame": flame,
    "wrapped": wrapped,
    "live": live,
    "three ranks of FSDP": of_a_program(folder_layouts.verl),
    "two ranks of DTensors": of_a_program(folder_layouts.torch_checkpointing),
    "Trainer under FSDP": of_a_program(folder_layouts.trainer_fsdp),
    "dcp": converted("dcp"),
    "dcp under a root": converted("dcp", root="model"),
    "pth": converted("pth"),
    "gguf": converted("gguf"),
}
DENSE = {
    **FORMS,
    "torchtitan": converted("dcp", naming="torchtitan"),
    "torchtitan 0.2": converted("dcp", naming="torchtitan-0.2"),
    "minimind": converted("pth", naming="minimind"),
    "OLMo-core": converted("dcp", naming="olmo-core"),
    "nanotron": converted("pth", naming="nanotron"),
}


def state_of(model: Path) -> State:
    """The tensors of an hf folder."""
    return {n: t for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}
