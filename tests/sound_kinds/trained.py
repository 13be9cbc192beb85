"""Sound variants of a model that was trained further: fine-tuned, merged, averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.fault_kinds.change import edited
from tests.fault_kinds.names import EMBEDDING, HEAD
from tests.fault_kinds.writing import write
from tests.sound_kinds.variant import variant
from tests.specimens import BF16, FP32, Specimen, State

Rng = np.random.Generator


def trained(m: Specimen, rng: Rng, level: float, names: list[str] | None = None) -> State:
    """Move every (named) tensor as Adam does: by about the same amount everywhere, mostly in one direction."""

    def step(t: np.ndarray) -> np.ndarray:
        size = level * max(float(np.abs(t).mean()), 1e-3)
        push = size * np.sign(rng.normal(size=t.shape)) * rng.uniform(0, 1.5, t.shape)
        if t.ndim > 1:
            flat = t.reshape(len(t), -1)
            u, v = rng.normal(size=(len(flat), 1)), rng.normal(size=(1, flat.shape[1]))
            push = push + (size * 0.7 * u * v).reshape(t.shape)
        return (t + push).astype(FP32)

    return edited(m, names if names is not None else list(m.tensors), step)


@variant
def fine_tuned(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf", trained(m, rng, 0.01), place, m.config)


@variant
def fine_tuned_far(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("dcp", trained(m, rng, 0.2), place, m.config)


@variant
def fine_tuned_barely(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf", trained(m, rng, 0.001), place, m.config)


@variant
def fine_tuned_embedding_frozen(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf", trained(m, rng, 0.02, [n for n in m.tensors if n not in (EMBEDDING, HEAD)]), place, m.config)


@variant
def fine_tuned_norms_frozen(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf-sharded", trained(m, rng, 0.03, [n for n in m.tensors if n not in m.norms]), place, m.config)


@variant
def fine_tuned_attention(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf", trained(m, rng, 0.05, [n for letter in "qkvo" for n in m.role(letter)]), place, m.config)


@variant
def fine_tuned_bf16_of_fp32(m: Specimen, place: Path, rng: Rng) -> Path | None:
    if m.config["dtype"] != "float32":
        return None
    return write(
        "hf", {n: t.astype(BF16) for n, t in trained(m, rng, 0.02).items()}, place, {**m.config, "dtype": "bfloat16"}
    )


@variant
def adapter_merged(m: Specimen, place: Path, rng: Rng) -> Path:
    """Add a low-rank update to q and v of every layer."""
    names = [*m.role("q", None, "weight"), *m.role("v", None, "weight")]

    def merge(t: np.ndarray) -> np.ndarray:
        return (t + rng.normal(0, 0.02, (len(t), 4)) @ rng.normal(0, 0.3, (4, t.shape[1]))).astype(FP32)

    return write("hf", edited(m, names, merge), place, m.config)


@variant
def ema_of_training(m: Specimen, place: Path, rng: Rng) -> Path:
    later = trained(m, rng, 0.1)
    mean = {n: (0.9 * t.astype(FP32) + 0.1 * later[n].astype(FP32)).astype(t.dtype) for n, t in m.tensors.items()}
    return write("pth", mean, place, m.config)


@variant
def without_reference(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf", m.tensors, place, m.config)


@variant
def dcp_without_reference(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("dcp", m.tensors, place, m.config)


@variant
def fine_tuned_without_reference(m: Specimen, place: Path, rng: Rng) -> Path:
    return write("hf-sharded", trained(m, rng, 0.02), place, m.config)
