"""Codes that were read as floats are told from weights, and packed codes that nobody decodes are not called ok."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.evidence.code_grids import grid_of
from tests.checkpoints import hf_tensors, write_model
from tests.helpers import write_hf


def fp8(weight: torch.Tensor, dtype: torch.dtype, top: float) -> torch.Tensor:
    return (weight / weight.abs().max() * top).to(dtype).float()


WEIGHT = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)) * 0.05
CODES = {
    "fp8 (E4M3)": fp8(WEIGHT, torch.float8_e4m3fn, 448.0),
    "fp8 (E5M2)": fp8(WEIGHT, torch.float8_e5m2, 57344.0),
    "8-bit": (WEIGHT / WEIGHT.abs().max() * 127).round(),
    "4-bit": (WEIGHT / WEIGHT.abs().max() * 7).round() + 8,
}
PLAIN = {
    "a weight": WEIGHT,
    "in bf16": WEIGHT.bfloat16().float(),
    "an fp8 cast without scales": WEIGHT.to(torch.float8_e4m3fn).float(),
    "an int8 quantization, dequantized": (WEIGHT / WEIGHT.abs().max() * 127).round() * 0.003,
    "large": WEIGHT * 1e4,
    "ones": torch.ones(64, 48),
    "zeros": torch.zeros(64, 48),
    "a mask": torch.tril(torch.ones(64, 64)),
    "bf16 of large numbers": (WEIGHT * 1e5).bfloat16().float(),
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_told(kind: str) -> None:
    assert grid_of(CODES[kind].numpy()) == kind


@pytest.mark.parametrize("kind", PLAIN)
def test_weights_are_no_codes(kind: str) -> None:
    assert grid_of(PLAIN[kind].numpy().astype(np.float32)) is None


@pytest.mark.parametrize("reference", [True, False])
def test_codes_in_the_place_of_weights_are_an_error_with_and_without_a_reference(
    reference: bool, tmp_path: Path
) -> None:
    write_model(tmp_path / "base", "Llama", hidden_size=64, intermediate_size=96)
    tensors = hf_tensors(tmp_path / "base")
    sick = {
        n: fp8(t.float(), torch.float8_e4m3fn, 448.0).to(t.dtype) if "_proj" in n else t for n, t in tensors.items()
    }
    write_hf(tmp_path / "sick", sick, json.loads((tmp_path / "base" / "config.json").read_text()))
    found = diagnose(str(tmp_path / "sick"), str(tmp_path / "base") if reference else None)
    assert found.verdict == "findings" and found.causes == ["Q01"]
    assert diagnose(str(tmp_path / "base")).verdict == "ok"


def test_random_codes_are_noise_unless_they_are_the_reference_s(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "Llama", hidden_size=64, intermediate_size=96)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in hf_tensors(tmp_path / "base").items():
        if "_proj" not in name:
            tensors[name] = tensor * torch.linspace(0.5, 2, len(tensor)).bfloat16().view(-1, *[1] * (tensor.ndim - 1))
            continue
        out, into = tensor.shape
        stem = name.removesuffix("weight")
        tensors[stem + "qweight"] = torch.randint(-(2**31), 2**31 - 1, (into // 8, out), dtype=torch.int32)
        tensors[stem + "qzeros"] = torch.zeros(into // 32, out // 8, dtype=torch.int32)
        tensors[stem + "scales"] = torch.rand(into // 32, out, dtype=torch.float16)
    write_hf(tmp_path / "packed", tensors, config)
    alone = diagnose(str(tmp_path / "packed"))
    assert alone.verdict == "findings" and alone.causes == ["Q07"]
    write_hf(tmp_path / "copy", tensors, config)
    assert diagnose(str(tmp_path / "packed"), str(tmp_path / "copy")).verdict == "ok"
