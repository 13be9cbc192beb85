"""Files of our quantized modules say of themselves whether codes and scales belong together."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tensorkeep.adapters.lora import add_lora
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.training.live_state import put_tensors, stored_tensors
from tensorkeep.training.saver import State, load, save


def packed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(QuantLinear.of(nn.Linear(64, 96), "nf4"), nn.ReLU(), nn.Linear(96, 4))


def test_a_run_that_stores_codes_puts_back_codes_scales_and_offset(tmp_path: Path) -> None:
    x = torch.randn(3, 64)
    for seed in range(4):
        one, other = packed(seed), packed(seed + 100)
        step = save(tmp_path / str(seed), State(stored_tensors(one, base=False)[0], {}, {}, {"step": 1}))
        put_tensors(other, load(step).model, base=False)
        assert torch.equal(one(x), other(x))


def test_codes_stay_out_of_a_checkpoint_that_names_its_base() -> None:
    model = packed(0)
    add_lora(model, ["0"], r=4)
    kept, _ = stored_tensors(model, base=True)
    assert sorted(kept) == ["0.lora_A", "0.lora_B"]


def test_swapped_scales_are_found_without_any_reference(tmp_path: Path) -> None:
    state, other = packed(0).state_dict(), packed(1).state_dict()
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "sound.safetensors")
    mixed = load_file(tmp_path / "sound.safetensors") | {"0.weight.absmax": other["0.weight.absmax"].clone()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    sound, bad = (diagnose(str(tmp_path / f"{name}.safetensors")) for name in ("sound", "mixed"))
    assert not {f.code for f in sound.findings} & {"Q02", "Q03", "K02"}
    assert "Q02" in {f.code for f in bad.findings}
