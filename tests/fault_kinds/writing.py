"""Write checkpoints with the libraries that people use: safetensors, torch.save, torch's DCP."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.specimens import Array, State

SAFETENSORS = {"hf", "hf-sharded"}


def to_torch(array: Array) -> torch.Tensor:
    """Return the same bits as a torch tensor."""
    array = np.ascontiguousarray(array)
    name = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "bfloat16": torch.bfloat16}.get(
        array.dtype.name
    )
    if name is None:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(f"u{array.dtype.itemsize}").copy()).view(name)


def write(
    form: str, state: State, folder: Path, config: dict[str, Any] | None, companions: dict[str, bytes] | None = None
) -> Path:
    """Write `state` under `folder` and return the path to diagnose.

    Forms: hf, hf-sharded, dcp, dcp-nested (`flame` is the same), pth, pth-nested.
    """
    place = folder / ("checkpoint/step-0" if form == "flame" else "step-0" if form.startswith("dcp") else "")
    place.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (place / "config.json").write_text(json.dumps(config, indent=2))
    for name, data in (companions or {}).items():
        (place / name).write_bytes(data)
    if form == "hf":
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    elif form == "hf-sharded":
        write_shards(state, place, 3)
    elif form.startswith("pth"):
        tensors = {n: to_torch(t) for n, t in state.items()}
        torch.save({"model": tensors, "epoch": 3} if form == "pth-nested" else tensors, place / "pytorch_model.bin")
    else:
        write_dcp({"model": state} if form in ("dcp-nested", "flame") else state, place)
    return place


def write_shards(state: State, place: Path, count: int) -> None:
    """Write safetensors shards with an index, as transformers does."""
    names = sorted(state)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {n: files[i * count // len(names)] for i, n in enumerate(names)}
    for file in files:
        save_file({n: state[n] for n in names if weight_map[n] == file}, place / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_dcp(state: dict[str, Any], place: Path, threads: int = 2) -> None:
    """Write a DCP folder with torch's own writer."""
    import torch.distributed.checkpoint as dcp

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            _torched(state),
            storage_writer=dcp.FileSystemWriter(place, thread_count=threads, sync_files=False),
            no_dist=True,
        )


def _torched(state: dict[str, Any]) -> dict[str, Any]:
    return {k: _torched(v) if isinstance(v, dict) else to_torch(v) for k, v in state.items()}
