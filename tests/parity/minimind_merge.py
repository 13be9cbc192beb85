"""Merge MiniMind's LoRA files, and compare with its logits under the LoRA and with its own merged file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tensorkeep.adapters.merging import merge
from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.formats.view import read
from tests.parity.outcome import Outcome, bitwise, largest, load_model, tensors

LOGITS = 1e-5


def merge_cases(
    file: Path, name: str, base: Path, place: Path, expected: dict[str, torch.Tensor], work: Path, shared: bool
) -> Iterator[Outcome]:
    """Into hf in fp32 and into MiniMind's own file; `shared` experts have no class in transformers, so no logits."""
    merge(plan_merge(read(base), open_adapters([(read(file), 1.0)]), dtype="F32"), str(work / "merged"))
    job = plan_merge(read(base), open_adapters([(read(file), 1.0)]), "pth", naming="minimind", dtype="F32")
    merge(job, str(work / "merged.pth"), "pth")
    again = plan_merge(read(base), open_adapters([(read(file), 1.0)]), dtype="F16")
    merge(again, str(work / "half"))
    exact = {n: merged_by_hand(base, file, n) for n in torch.load(work / "merged.pth", weights_only=True)}
    yield bitwise(
        f"{name} merged to minimind", torch.load(work / "merged.pth", weights_only=True), exact, "against float64"
    )
    if not shared:
        for key in ("logits_lora", "logits_merged_exact_fp32"):
            if key in expected:
                with torch.no_grad():
                    made = load_model(work / "merged")(input_ids=expected["input_ids"]).logits
                yield Outcome(f"{name} merged to hf, {key}", largest(made, expected[key]), LOGITS)
    theirs = sorted(place.glob(f"out/{file.name.replace('lora_', 'merge_', 1)}"))
    if theirs:
        ours, original = tensors(read(work / "half")), torch.load(theirs[0], weights_only=True)
        touched = [n for n in ours if not torch.equal(exact[n], _clean(base)[n].float())]
        mine, other = (sum(_off(held[n], exact[n]) for n in touched) for held in (ours, original))
        yield Outcome(
            f"{name} merged to fp16, rounding",
            mine / max(other, 1e-30),
            1.0,
            f"of the original's error, {other / max(mine, 1e-30):.2f} times ours, which rounds twice",
        )


def _off(made: torch.Tensor, exact: torch.Tensor) -> float:
    return float((made.double() - exact.double()).square().sum())


def _clean(file: Path) -> dict[str, Any]:
    state = torch.load(file, weights_only=True)
    state = state.get("model", state)
    return {n.removeprefix("module.").removeprefix("_orig_mod."): t for n, t in state.items()}


def merged_by_hand(base: Path, file: Path, name: str) -> torch.Tensor:
    """W + B A in float64, rounded to float32: MiniMind scales by 1, and its file's rows lie as its model's."""
    weight, adapter = _clean(base)[name], _clean(file)
    stem = name.removesuffix(".weight")
    if f"{stem}.lora.A.weight" not in adapter:
        return weight.float()
    a, b = (adapter[f"{stem}.lora.{half}.weight"].double() for half in "AB")
    return (weight.double() + b @ a).float()
