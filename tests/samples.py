"""Small checkpoints of every format for tests: written by torch, by safetensors and by this package."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.sink import Result
from tensorkeep.formats.view import StateView, read

CONFIG = {"model_type": "toy", "hidden_size": 4}


def state() -> dict[str, torch.Tensor]:
    """Make tensors that are easily lost: bf16, 0-d, empty, transposed, integer, bool."""
    made = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4, generator=made),
        "b.weight": torch.randn(4, 6, generator=made).to(torch.bfloat16),
        "c.scale": torch.tensor(3.5),
        "d.empty": torch.zeros(0, 4),
        "e.turned": torch.randn(3, 5, generator=made).t(),
        "f.count": torch.tensor([1, 2, 3]),
        "g.mask": torch.tensor([True, False]),
    }


def write_hf(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in state().items()}, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_sharded(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(state()), {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({n: state()[n].contiguous() for n in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_dcp(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process
        dcp.save(state(), checkpoint_id=folder, no_dist=True)
    return folder


def write_pth(path: Path, legacy: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state(), "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    return path


def write_peft(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pair = {f"base_model.model.q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(pair, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


def everything(folder: Path) -> dict[str, Path]:
    """One checkpoint of each kind below `folder`, by kind."""
    return {
        "single": write_hf(folder / "single"),
        "sharded": write_sharded(folder / "sharded"),
        "dcp": write_dcp(folder / "dcp"),
        "pth": write_pth(folder / "pth" / "m.pth"),
        "legacy": write_pth(folder / "legacy" / "m.pth", legacy=True),
        "peft": write_peft(folder / "peft"),
    }


def read_all(path: str | Path) -> StateView:
    """Open a checkpoint and read the data of every tensor in it."""
    view = read(path)
    for name in view:
        view.digest(name)
    return view


def contents(path: str | Path) -> dict[str, torch.Tensor]:
    view = read(path)
    return {name: view.tensor(name) for name in view}


def plan_of(source: str | Path, to: str) -> Plan:
    return make_plan([read(source)], to)


def run(source: str | Path, out: str | Path, to: str, **options: object) -> Result:
    return convert(plan_of(source, to), str(out), to, **options)  # type: ignore[arg-type]
