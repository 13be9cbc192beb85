"""Faults of files (F), which no tensor shows: a sound checkpoint is written and then damaged."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.fault_kinds.change import Change, kind
from tests.fault_kinds.writing import write_dcp
from tests.specimens import FP32, Specimen

Rng = np.random.Generator
HARMLESS = "1+1"
INDEX = "model.safetensors.index.json"


class Payload:
    """An object that pickles as a call of eval on a harmless sum; whoever unpickles it runs code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (HARMLESS,)


def damaged(m: Specimen, damage: Callable[[Path], Path | None], *forms: str, **more: Any) -> Change:
    return Change(m.tensors, forms=forms, damage=lambda place: damage(place) or place, **more)


def largest(place: Path) -> Path:
    """Return the largest file below a folder."""
    return max((p for p in place.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def with_metadata(place: Path, edit: Callable[[Any], None]) -> None:
    """Edit a DCP folder's `.metadata` through torch's own classes."""
    metadata = pickle.loads((place / ".metadata").read_bytes())
    edit(metadata)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))


@kind("F02")
def truncated(m: Specimen, rng: Rng) -> Change | None:
    part = float(rng.uniform(0.3, 0.95))

    def cut(place: Path) -> None:
        file = largest(place)
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])

    return damaged(m, cut, "hf", "hf-sharded", "dcp", "flame", "pth")


@kind("F05")
def file_missing(m: Specimen, rng: Rng) -> Change | None:
    return damaged(m, lambda place: largest(place).unlink(), "hf-sharded", "dcp")


@kind("F05")
def index_missing(m: Specimen, rng: Rng) -> Change | None:
    return damaged(m, lambda place: (place / INDEX).unlink(), "hf-sharded")


@kind("F01")
def metadata_missing(m: Specimen, rng: Rng) -> Change | None:
    return damaged(m, lambda place: (place / ".metadata").unlink(), "dcp")


@kind("F07")
def no_storage_entry(m: Specimen, rng: Rng) -> Change | None:
    name = str(rng.choice(list(m.tensors)))

    def forget(metadata: Any) -> None:
        metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != name}

    return damaged(m, lambda place: with_metadata(place, forget), "dcp", tensors=[name])


@kind("F07")
def ranges_overlap(m: Specimen, rng: Rng) -> Change | None:
    def overlap(metadata: Any) -> None:
        first, second = list(metadata.storage_data.values())[:2]
        second.relative_path, second.offset = first.relative_path, first.offset

    return damaged(m, lambda place: with_metadata(place, overlap), "dcp")


@kind("F07")
def header_overlaps(m: Specimen, rng: Rng) -> Change | None:
    def overlap(place: Path) -> None:
        file = place / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        shapes: dict[Any, str] = {}
        for name, entry in header.items():
            twin = (
                shapes.setdefault((entry.get("dtype"), str(entry.get("shape"))), name)
                if name != "__metadata__"
                else name
            )
            if twin != name:
                entry["data_offsets"] = header[twin]["data_offsets"]
                break
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damaged(m, overlap, "hf")


@kind("F07")
def in_two_shards(m: Specimen, rng: Rng) -> Change | None:
    def double(place: Path) -> None:
        first, second = sorted(place.glob("*.safetensors"))[:2]
        state, other = load_file(first), load_file(second)
        name = next(iter(state))
        save_file({**other, name: state[name]}, second, metadata={"format": "pt"})

    return damaged(m, double, "hf-sharded")


@kind("F07")
def index_wrong(m: Specimen, rng: Rng) -> Change | None:
    def wrong(place: Path) -> None:
        index = json.loads((place / INDEX).read_text())
        names = list(index["weight_map"])
        index["weight_map"][names[0]] = index["weight_map"][names[-1]]
        (place / INDEX).write_text(json.dumps(index))

    return damaged(m, wrong, "hf-sharded")


@kind("F07")
def stray_shard(m: Specimen, rng: Rng) -> Change | None:
    name = next(iter(m.tensors))
    stale = {name: np.zeros_like(m.tensors[name])}
    return damaged(m, lambda place: save_file(stale, place / "consolidated.safetensors"), "hf-sharded", lax=True)


@kind("F06")
def path_escapes(m: Specimen, rng: Rng) -> Change | None:
    def escape(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = f"../{info.relative_path}"

    return damaged(m, lambda place: with_metadata(place, escape), "dcp")


@kind("F06")
def index_escapes(m: Specimen, rng: Rng) -> Change | None:
    def escape(place: Path) -> None:
        index = json.loads((place / INDEX).read_text())
        index["weight_map"] = {n: f"../../{f}" for n, f in index["weight_map"].items()}
        (place / INDEX).write_text(json.dumps(index))

    return damaged(m, escape, "hf-sharded")


@kind("F04")
def malicious_metadata(m: Specimen, rng: Rng) -> Change | None:
    def poison(metadata: Any) -> None:
        metadata.planner_data = {**(metadata.planner_data or {}), "x": Payload()}

    return damaged(m, lambda place: with_metadata(place, poison), "dcp")


@kind("F04")
def malicious_pth(m: Specimen, rng: Rng) -> Change | None:
    import torch

    def poison(place: Path) -> None:
        torch.save({"model": torch.zeros(2), "hook": Payload()}, place / "pytorch_model.bin")

    return damaged(m, poison, "pth")


@kind("F08")
def stale_step(m: Specimen, rng: Rng) -> Change | None:
    """Leave step-7 of a first run beside: loaders take it instead of the step-0 that was converted afterwards."""
    old = {n: (t.astype(FP32) * 0 + rng.normal(0, 0.02, t.shape)).astype(t.dtype) for n, t in m.tensors.items()}
    return (
        damaged(m, lambda place: write_dcp({"model": old}, place.parent / "step-7"), "flame", target="flame")
        if m.language
        else None
    )


@kind("F03")
def digest_differs(m: Specimen, rng: Rng) -> Change | None:
    """Convert with a certificate, then change one byte of a tensor on disk."""
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    def change(place: Path) -> Path:
        out = place.parent / f"{place.name}-certified"
        convert(make_plan([read(place)], "hf"), str(out), "hf")
        shutil.rmtree(place)
        file = out / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-int(rng.integers(1, 4000))] ^= 1
        file.write_bytes(data)
        return out

    return damaged(m, change, "hf", also=("V07", "V06"))


@kind("K06")
def other_naming(m: Specimen, rng: Rng) -> Change | None:
    """Write torchtitan's names where Hugging Face's are asked for."""
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    if m.config["model_type"] not in ("llama", "qwen3"):
        return None

    def rename(place: Path) -> Path:
        out = place.parent / f"{place.name}-titan"
        convert(make_plan([read(place)], "dcp", naming="torchtitan"), str(out), "dcp")
        return out

    return damaged(m, rename, "hf", target="hf", lax=True)
