"""Sick folders for `tests.parity.sick`: 23 single faults of a plain random model, in the form of the fixtures.

`python -m tests.sick_folders FOLDER [MODEL ...]` writes `MODEL/hf`, and `sick_MODEL/cNN/step-0` with answers.json.
"Plain" means N(0, 0.08) everywhere and norms of 1 ± 0.18: none of the statistics that a trained model has, so whatever
is named is named by comparison.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.fault_kinds import values
from tests.fault_kinds.change import edited, moved
from tests.fault_kinds.files import Payload, with_metadata
from tests.fault_kinds.names import EMBEDDING, HEAD, renamed
from tests.fault_kinds.orders import reordered, role_pairs, swapped, to_pairs
from tests.fault_kinds.writing import write, write_dcp
from tests.specimens import CONFIGS, FP32, NORM, Specimen, State, specimen

Rng = np.random.Generator
Sick = tuple[str, State, list[str], "Callable[[Path], Any] | None"]


def plain(name: str, seed: int) -> Specimen:
    """The architecture of a specimen with plain random values."""
    m = specimen(name)
    rng = np.random.default_rng([seed, *name.encode()])
    made = {
        n: (rng.normal(1, 0.18, t.shape) if NORM.search(n) else rng.normal(0, 0.08, t.shape)).astype(t.dtype)
        for n, t in m.tensors.items()
    }
    return Specimen(name, m.config, made)


def faults(m: Specimen, rng: Rng) -> list[Sick]:
    """Every fault that this model can have: name, state, tensors, what happens to the files."""
    layer = int(rng.integers(0, m.layers))
    down, up, o = (m.role(r, layer, "weight")[0] for r in ("down", "up", "o"))
    v = m.role("v", None, "weight")
    norm = str(rng.choice([n for n in m.norms if n != "model.norm.weight"]))
    q_and_k = [n for letter in "qk" for n in m.role(letter, None, "weight")]
    swap = swapped(m, [p for n in range(m.layers) for p in role_pairs(m, "gate", "up", [n])])
    order = list(range(m.layers))
    order[layer], order[layer - 1] = order[layer - 1], order[layer]
    layers = reordered(m, order)
    assert swap is not None and layers is not None
    inv = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(m.head_dim // 2, FP32)}
    head = [HEAD] if HEAD in m.tensors else []
    vocabulary = [EMBEDDING, *head]
    e4m3 = np.dtype(ml_dtypes.float8_e4m3fn)
    nan = edited(m, [down], lambda t: np.where(np.arange(t.size).reshape(t.shape) == t.size // 2, np.nan, t))
    size = m.config["vocab_size"]
    out: list[Sick] = [
        ("none", m.tensors, [], None),
        ("missing_key", {n: t for n, t in m.tensors.items() if n != norm}, [norm], None),
        ("rope_layout_interleaved", moved(m, q_and_k, to_pairs(m.head_dim)), q_and_k, None),
        ("layer_order", layers.state, [f"layers {order}"], None),
        ("reinitialised_tensor", edited(m, [o], lambda t: rng.normal(0, 0.02, t.shape)), [o], None),
        ("prefix:_orig_mod.", renamed(m, "_orig_mod."), [], None),
        ("prefix:module.", renamed(m, "module."), [], None),
        ('prefix:model. (nested {"model": sd})', renamed(m, "model."), [], None),
        ("norm_reset_to_ones", edited(m, [norm], np.ones_like), [norm], None),
        ("precision_loss_fp8_e4m3", edited(m, m.matrices, lambda t: t.astype(e4m3).astype(FP32)), m.matrices, None),
        ("swapped_gate_up", swap.state, list(swap.tensors or []), None),
        ("nan", nan, [down], None),
        ("unexpected_key", {**m.tensors, **inv}, list(inv), None),
        (
            f"vocab_padded_{size}_to_{size + 128}",
            moved(m, vocabulary, lambda t: np.concatenate([t, np.zeros((128, t.shape[1]), t.dtype)])),
            vocabulary,
            None,
        ),
        ("truncated_data_file", m.tensors, [], lambda p: truncate(p / "__0_0.distcp")),
        ("bit_flip", moved(m, [up], lambda t: values.flip(rng, t, [8 * t.itemsize - 2], 1)), [up], None),
        ("metadata_without_storage_entry", m.tensors, [up], lambda p: with_metadata(p, lambda meta: forget(meta, up))),
        ('malicious_metadata_pickle (harmless payload eval("1+1"))', m.tensors, [], lambda p: with_metadata(p, poison)),
        ("path_traversal_in_metadata", m.tensors, [], lambda p: with_metadata(p, escape)),
        ("missing_data_file", m.tensors, [], lambda p: (p / "__0_0.distcp").unlink()),
        ("small_value_drift (x1.01 on v_proj)", edited(m, v, lambda t: t * np.float32(1.01)), v, None),
    ]
    if len(set(m.tensors[o].shape)) == 1:
        out.append(("transposed", moved(m, [o], np.transpose), [o], None))
    if head:
        out.append(
            ("lm_head_overwritten_by_embedding (wrongly tied)", {**m.tensors, HEAD: m.tensors[EMBEDDING]}, head, None)
        )
    return out


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def forget(metadata: Any, name: str) -> None:
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != name}


def poison(metadata: Any) -> None:
    metadata.storage_meta = Payload()


def escape(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"


def make(folder: Path, name: str, seed: int = 0) -> Path:
    """Write the model and its sick folder."""
    m = plain(name, seed)
    rng = np.random.default_rng([seed + 1, *name.encode()])
    write("hf", m.tensors, folder / name / "hf", m.config)
    place = folder / f"sick_{name}"
    shutil.rmtree(place, ignore_errors=True)
    made = faults(m, rng)
    answers: dict[str, Any] = {"reference_hf": f"../{name}/hf", "cases": {}}
    for number, index in enumerate(rng.permutation(len(made))):
        fault, state, tensors, damage = made[index]
        step = place / f"c{number:02}" / "step-0"
        write_dcp({n: np.ascontiguousarray(t) for n, t in state.items()}, step, threads=1)
        if damage:
            damage(step)
        answers["cases"][f"c{number:02}"] = {"fault": fault, "tensors": sorted(tensors)}
    (place / "answers.json").write_text(json.dumps(answers, indent=1))
    return place


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=[n for n in CONFIGS if n != "qwen3_moe"])
    words = parser.parse_args(argv)
    for name in words.models:
        print(make(words.folder, name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
