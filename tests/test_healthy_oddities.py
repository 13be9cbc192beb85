"""Healthy files that look odd: numbers that size nothing, adapters beside a large config, fp8 outliers, own tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tensorkeep.cli import main
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.verification import verify
from tensorkeep.formats.view import read
from tensorkeep.storage.budget import believable
from tests.checkpoints import hf_tensors, write_model

LARGE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}


def codes(path: Path) -> set[str]:
    return {f.code for f in diagnose(str(path)).findings if f.severity == "error"}


@pytest.mark.parametrize(
    "field",
    [
        {"max_position_embeddings": 10_485_760},
        {"model_max_length": int(1e30)},
        {"seed": 2**40},
        {"n_params": 8_030_261_248},
        {"sliding_window": 2**62},
        {"max_position_embeddings": -1},
        {"num_experts": -1},
        {"pad_token_id": -1},
    ],
)
def test_a_number_that_sizes_nothing_may_be_large_and_minus_one_is_none(tmp_path: Path, field: dict[str, int]) -> None:
    write_model(tmp_path / "m", "Llama", torch.bfloat16)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | field))
    assert "C01" not in codes(tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "o"), "--to", "hf"]) == 0


@pytest.mark.parametrize(
    "config", [{"rope_theta": 3_580_165_449}, {"model_type": "doge", "num_hidden_layers": 32, "num_experts": 16384}]
)
def test_numbers_of_known_models_are_believed(config: dict[str, Any]) -> None:
    assert believable(config)
    assert not believable(config | {"model_type": "", "num_experts": 10**6})


def test_an_adapter_or_a_projector_is_not_measured_by_the_config_of_its_base(tmp_path: Path) -> None:
    pair = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    assert "C01" not in codes(tmp_path)
    (tmp_path / "p").mkdir()
    torch.save({"model.mm_projector.0.weight": torch.ones(4, 4)}, tmp_path / "p" / "mm_projector.bin")
    (tmp_path / "p" / "config.json").write_text(json.dumps(LARGE))
    assert "C01" not in codes(tmp_path / "p")


@pytest.mark.parametrize("odd", ["outlier", "embedding"])
def test_outliers_and_wide_embeddings_of_a_plain_cast_to_fp8_are_no_codes(tmp_path: Path, odd: str) -> None:
    write_model(tmp_path / "m", "Llama", torch.bfloat16)
    tensors = hf_tensors(tmp_path / "m")
    for name in [n for n in tensors if "proj" in n or "embed" in n]:
        wide = tensors[name].float()
        if odd == "outlier":
            wide[0, 0] = 160.0
        elif "embed" in name:
            wide = torch.full_like(wide, 160.0)  # T5's embeddings reach hundreds
        tensors[name] = wide.to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert "Q01" not in codes(tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "o"), "--to", "hf"]) == 0


@pytest.mark.parametrize("said", ["best", "./best/", "\ufeffbest\r\n"])
def test_a_save_of_deepspeed_under_a_name_of_the_users_own_is_found_by_latest(tmp_path: Path, said: str) -> None:
    for tag in ("best", "epoch-3"):
        (tmp_path / tag).mkdir()
        value = torch.full((2,), float(len(tag)))
        torch.save({"module": {"w": value}}, tmp_path / tag / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text(said, "utf-8")
    view = read(tmp_path)
    assert float(view.array(next(iter(view)))[0]) == 4.0


def test_no_flipped_bit_of_an_archive_that_torch_cannot_load_again_is_missed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    path = tmp_path / "optimizer.pt"
    torch.save({i: torch.full((3,), float(i)) for i in range(3)}, path)
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    missed = []
    for at in range(directory, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        try:
            loaded = [t.tolist() for t in torch.load(path).values()] == [[float(i)] * 3 for i in range(3)]
        except Exception:  # whatever torch raises
            loaded = False
        if not loaded and not [f for f in verify(tmp_path)[0] if f.severity == "error"]:
            missed.append(at - directory)
    assert not missed


def test_an_adapters_file_named_alone_takes_its_scale_from_the_config_beside_it_and_needs_one(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "Llama", torch.float32)
    weight = "model.layers.0.self_attn.q_proj.weight"
    rows, columns = hf_tensors(tmp_path / "base")[weight].shape
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {name.format("A"): torch.ones(2, columns), name.format("B"): torch.ones(rows, 2)}
    (tmp_path / "a").mkdir()
    save_file(pair, tmp_path / "a" / "best.safetensors")
    torch.save(pair, tmp_path / "a" / "adapter_model.bin")
    files = [tmp_path / "a" / "best.safetensors", tmp_path / "a" / "adapter_model.bin"]
    for file in files:
        assert main(["merge", str(tmp_path / "base"), str(file), str(tmp_path / "o")]) == 2
        assert codes(file) == {"A02"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    for at, file in enumerate([*files, tmp_path / "a"]):
        out = tmp_path / f"o{at}"
        assert main(["merge", str(tmp_path / "base"), str(file), str(out)]) == 0
        moved = hf_tensors(out)[weight] - hf_tensors(tmp_path / "base")[weight]
        assert torch.allclose(moved, torch.full_like(moved, 8.0), atol=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_values_of_an_adapter_that_are_not_finite_are_v01(tmp_path: Path, reference: bool) -> None:
    write_model(tmp_path / "base", "Llama", torch.float32)
    rows, columns = hf_tensors(tmp_path / "base")["model.layers.0.self_attn.q_proj.weight"].shape
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for value, expected in ((1.0, False), (float("nan"), True), (float("inf"), True)):
        pair = {name.format("A"): torch.ones(2, columns), name.format("B"): torch.full((rows, 2), value)}
        save_file(pair, tmp_path / "adapter_model.safetensors")
        found = diagnose(str(tmp_path), reference=str(tmp_path / "base") if reference else None)
        assert [f.code for f in found.findings if f.severity == "error"] == ["V01"] * expected
