"""Sound variants with the same values in other files, formats, namings and precisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.fault_kinds.names import EMBEDDING, HEAD
from tests.fault_kinds.writing import to_torch, write, write_dcp, write_shards
from tests.sound_kinds.variant import variant
from tests.specimens import BF16, FP32, Specimen

Rng = np.random.Generator


@variant
def identical(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf", m.tensors, place, m.config)


@variant
def sharded(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf-sharded", m.tensors, place, m.config)


@variant
def sharded_otherwise(m: Specimen, place: Path, rng: Rng) -> Path:
    place.mkdir(parents=True)
    write_shards(m.tensors, place, 7)
    (place / "config.json").write_text(json.dumps(m.config))
    return place


@variant
def dcp_flat(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("dcp", m.tensors, place, None)


@variant
def dcp_of_eight_threads(m: Specimen, place: Path, rng: Rng) -> Path:
    write_dcp(m.tensors, place / "step-0", threads=8)
    return place / "step-0"


@variant
def dcp_nested_for_flame(m: Specimen, place: Path, rng: Rng) -> tuple[Path, str] | None:
    return (write("flame", m.tensors, place, None), "flame") if m.language else None


@variant
def pth(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("pth", m.tensors, place, m.config)


@variant
def pth_with_shared_storage(m: Specimen, place: Path, rng: Rng) -> Path | None:
    if not m.tied:
        return None
    place.mkdir(parents=True)
    state = {n: to_torch(t) for n, t in m.tensors.items()}
    state[HEAD] = state[EMBEDDING]
    torch.save(state, place / "model.pt")
    return place / "model.pt"


@variant
def tied_head_stored_twice(m: Specimen, place: Path, rng: Rng) -> Path | None:
    if not m.tied:
        return None
    state = {**m.tensors, HEAD: m.tensors[EMBEDDING].copy()}
    return write(str(rng.choice(["hf", "dcp"])), state, place, m.config)


@variant
def renamed_file(m: Specimen, place: Path, rng: Rng) -> Path:
    made = write("hf", m.tensors, place, m.config)
    return (made / "model.safetensors").rename(made / "consolidated.00.safetensors")


@variant
def bare_file(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf", m.tensors, place, None) / "model.safetensors"


def converted(m: Specimen, place: Path, to: str, **options: Any) -> Path:
    """Write the model through our own converter, with its certificate."""
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    source = write("hf", m.tensors, place / "source", m.config)
    convert(make_plan([read(source)], to, **options), str(place / "out"), to)
    return place / "out"


@variant
def converted_to_hf(m: Specimen, place: Path, rng: Rng) -> Path:
    return converted(m, place, "hf")


@variant
def converted_to_dcp(m: Specimen, place: Path, rng: Rng) -> Path:
    return converted(m, place, "dcp")


def in_torchtitan(m: Specimen) -> bool:
    return m.config["model_type"] in ("llama", "qwen3", "qwen3_moe") and not any(n.endswith(".bias") for n in m.tensors)


@variant
def torchtitan_names(m: Specimen, place: Path, rng: Rng) -> Path | None:
    return converted(m, place, "dcp", naming="torchtitan") if in_torchtitan(m) else None


@variant
def torchtitan_for_torchtitan(m: Specimen, place: Path, rng: Rng) -> tuple[Path, str] | None:
    return (converted(m, place, "dcp", naming="torchtitan"), "torchtitan") if in_torchtitan(m) else None


@variant
def older_torchtitan_names(m: Specimen, place: Path, rng: Rng) -> Path | None:
    return converted(m, place, "dcp", naming="torchtitan-0.2") if in_torchtitan(m) else None


@variant
def hf_for_hf(m: Specimen, place: Path, rng: Rng) -> tuple[Path, str]:
    return write("hf", m.tensors, place, m.config), "hf"


@variant
def trainer_state_beside(m: Specimen, place: Path, rng: Rng) -> Path:
    """Write a trainer's flat checkpoint: model, optimizer and step in one DCP."""
    state: dict[str, Any] = dict(m.tensors)
    for name, tensor in m.tensors.items():
        state[f"optimizer.state.{name}.exp_avg"] = np.zeros(tensor.shape, FP32)
        state[f"optimizer.state.{name}.step"] = np.array(3.0, FP32)
    write_dcp(state, place / "step-3")
    return place / "step-3"


# -- other precision ------------------------------------------------------------------------------------------------


@variant
def bf16_copy(m: Specimen, place: Path, rng: Rng) -> Path | None:
    if m.config["dtype"] != "float32":
        return None
    return write("hf", {n: t.astype(BF16) for n, t in m.tensors.items()}, place, {**m.config, "dtype": "bfloat16"})


@variant
def fp16_copy(m: Specimen, place: Path, rng: Rng) -> Path:
    return write(
        "hf",
        {n: t.astype(FP32).astype(np.float16) for n, t in m.tensors.items()},
        place,
        {**m.config, "dtype": "float16"},
    )


@variant
def fp32_copy(m: Specimen, place: Path, rng: Rng) -> Path | None:
    if m.config["dtype"] == "float32":
        return None
    return write("dcp", {n: t.astype(FP32) for n, t in m.tensors.items()}, place, None)


@variant
def norms_kept_in_fp32(m: Specimen, place: Path, rng: Rng) -> Path:
    state = {n: t.astype(FP32 if n in m.norms else BF16) for n, t in m.tensors.items()}
    return write("hf", state, place, m.config)
