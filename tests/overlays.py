"""Apply a fault to another copy of the model than the reference, as it happens in practice.

`narrow`: a bf16 copy of an fp32 model. `wide`: an fp32 copy of a bf16 model. `trained`: every tensor moved by 1 % of
noise. `fine_tuned`: a copy that AdamW trained, in a way of `tests.fine_tuned` that the seed chooses; `fine_tuned_any`:
the same for every kind of fault; `fine_tuned_briefly`: 20 steps of everything, which takes a second. The seed of the
fault is that of the training. `titan`: written in torchtitan's names, its q/k rows interleaved on the way. `alone`:
there is no reference, only the config beside. Only faults that stay what they are under the overlay take part.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.fault_kinds.change import KINDS
from tests.fine_tuned import DTYPES, WAYS, Way, fine_tuned_copy
from tests.specimens import BF16, FP32, Specimen

OVERLAYS = ("narrow", "wide", "trained", "fine_tuned", "fine_tuned_any", "fine_tuned_briefly", "titan", "alone")
STRUCTURAL = {"K01", "K02", "K03", "S01", "S02", "S03", "O01", "O02", "O03", "O04", "V03", "V04", "V05", "V01", "T02"}
# exactly: a factor, a cast and a flip are still themselves where the rest is equal up to a cast
CASTABLE = STRUCTURAL | {"V06"}
TITAN = {"O01", "O02", "O03", "O04", "V03", "V04", "V05", "V01", "T02", "V06", "V07", "V02"}
ALONE = {
    "missing_tensor",
    "missing_few",
    "missing_layer",
    "missing_norms",
    "missing_head",
    "missing_biases",
    "unexpected_layer",
    "unexpected_tensor",
    "wrapper_in_front",
    "wrapper_in_the_middle",
    "optimizer_only",
    "flat_parameters",
    "no_name_in_common",
    "empty",
    "shape_cut",
    "norm_of_another_width",
    "vocabulary_padded",
    "vocabulary_cut",
    "transposed_oblong",
    "tied_stored_apart",
    "norm_ones",
    "norm_zeros",
    "zero_tensor",
    "zero_head",
    "nan",
    "infinite",
    "nan_everywhere",
    "reinitialised_tensor",
    "reinitialised_layer",
    "rope_q_and_k",
    "rope_q_only",
    "rope_k_only",
    "through_e4m3",
    "through_e5m2",
    "digest_differs",
    "tokenizer_too_large",
}
LOST = {
    "drift_one_percent",
    "noise_three_percent",
    "norm_scaled",
}  # near or below what bf16 rounds away, or training moves


def overlaid(m: Specimen, overlay: str | None, kind: str, rng: np.random.Generator, seed: int = 0) -> Specimen | None:
    """The model that the fault befalls; None where fault and overlay do not go together."""
    codes = set(KINDS[kind].codes)
    if overlay is None or overlay == "alone":
        return m if overlay is None or kind in ALONE else None
    if overlay in ("narrow", "wide"):
        ours, theirs = (FP32, BF16) if overlay == "narrow" else (BF16, FP32)
        words = {BF16: "bfloat16", FP32: "float32"}
        if not codes <= CASTABLE or kind in LOST or m.config["dtype"] != words[ours]:
            return None
        return Specimen(
            m.name, {**m.config, "dtype": words[theirs]}, {n: t.astype(theirs) for n, t in m.tensors.items()}
        )
    if overlay == "trained":
        return trained(m, rng) if codes <= STRUCTURAL else None
    if overlay == "fine_tuned_briefly":
        way = Way(str(rng.choice(list(DTYPES))), "all", 1e-3, 20)
        return fine_tuned_copy(m.name, way, seed, steps=(20,)) if codes <= STRUCTURAL else None
    if overlay in ("fine_tuned", "fine_tuned_any"):
        fitting = overlay == "fine_tuned_any" or codes <= STRUCTURAL
        return fine_tuned_copy(m.name, WAYS[int(rng.integers(len(WAYS)))], seed) if fitting else None
    if m.config["model_type"] not in ("llama", "qwen3", "qwen3_moe") or any(n.endswith(".bias") for n in m.tensors):
        return None
    return m if codes <= TITAN and kind != "stored_narrower" else None


def trained(m: Specimen, rng: np.random.Generator) -> Specimen:
    moved = {}
    for name, tensor in m.tensors.items():
        values = tensor.astype(FP32)
        moved[name] = (values + 0.01 * values.std() * rng.normal(size=values.shape)).astype(tensor.dtype)
    return Specimen(m.name, m.config, moved)


def in_titan_names(place: Path) -> Path:
    """An hf folder as torchtitan's DCP, config beside."""
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.formats.view import read

    out = place.parent / f"{place.name}-titan"
    convert(make_plan([read(place)], "dcp", naming="torchtitan"), str(out), "dcp", overwrite=True)
    return out
