"""mxfp4's scales are powers of two: exponents and codes are chosen for the outputs; and experts that nothing loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensorkeep.cli import main
from tensorkeep.language import _rounding
from tensorkeep.language._matrices import Matrix
from tensorkeep.quantization.grids import exponents_near, levels, nearest, width_of
from tensorkeep.quantization.rounding import plainly, rounded
from tests.language_files import EXPERTS, save_model


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([32, 96, 160]), st.integers(-30, 20))
def test_codes_are_nearest_to_what_was_rounded_and_exponents_are_near_ocps(seed: int, columns: int, power: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, columns, generator=draw) * 2.0**power
    weight[1] = 0
    inputs = torch.randn(200, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    found = rounded(weight, inputs.T @ inputs / 200, "mxfp4")
    plain = plainly(weight, "mxfp4")
    assert found.error <= found.plain and found.before is not None and not found.weight()[1].any()
    scale = 2.0 ** (found.numbers["exponents"].repeat_interleave(32, 1).float() - 127)
    assert torch.equal(levels("mxfp4", weight.device).table[nearest(found.before / scale, "mxfp4")] * scale,
                       found.weight())  # fmt: skip
    assert set(plain.numbers["exponents"].flatten().tolist()) <= set(
        exponents_near(weight.view(5, -1, 32).abs().amax(2)).flatten().tolist()
    )


def test_correlated_inputs_lose_less_than_half_of_what_plain_rounding_does_to_them() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(256, 64, generator=draw) @ torch.randn(64, 256, generator=draw)
    inputs = mixed + 0.1 * torch.randn(256, 256, generator=draw)
    found = rounded(torch.randn(64, 256, generator=draw), inputs.T @ inputs / 256, "mxfp4")
    assert found.error < 0.5 * found.plain


def test_a_number_lies_between_levels_that_are_as_far_apart_as_its_width() -> None:
    unit = torch.tensor([-7.0, -4.5, -3.5, -0.2, 0.0, 0.7, 1.9, 2.1, 3.9, 5.0])
    assert width_of(unit, "mxfp4").tolist() == [2.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0]


class _Block(nn.Module):
    """Two linears with something between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = hidden + self.down(torch.nn.functional.silu(self.up(hidden)))
        return found


def test_training_moves_codes_to_a_nearer_output_and_each_by_one_level_at_most() -> None:
    torch.manual_seed(0)
    layer = _Block().requires_grad_(False)
    hidden = [torch.randn(1, 64, 64) @ torch.randn(64, 64) / 8 for _ in range(3)]
    wanted = [layer(x) for x in hidden]
    moments = {"up": hidden[0][0].T @ hidden[0][0] / 64, "down": torch.eye(96)}
    found = {n: rounded(layer.get_parameter(f"{n}.weight"), moments[n], "mxfp4", n) for n in moments}
    where = {n: Matrix(n, f"{n}.weight", "mxfp4") for n in found}
    asked = _rounding._Layer(copy.deepcopy(layer), where, [_rounding.Call((), {})] * 3, hidden, wanted)
    made = _rounding._codes_trained(asked, found)
    assert asked.whole(made) < 0.9 * asked.whole(found)
    grid = levels("mxfp4", torch.device("cpu"))
    for name, one in made.items():
        assert one.before is None and one.numbers is found[name].numbers
        assert torch.equal(asked.layer.get_parameter(f"{name}.weight"), one.weight())
        now, then = (torch.bucketize(grid.table[r.codes], grid.table[grid.order]) for r in (one, found[name]))
        assert int((now - then).abs().max()) == 1


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("bits", ["nf4", "int8", "mxfp4"])
def test_experts_are_refused_before_anything_is_merged(
    tmp_path: Path, kind: str, bits: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from tensorkeep.adapters import merging

    save_model(tmp_path / "base", kind, hidden_size=64, intermediate_size=64, head_dim=16, **EXPERTS)
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "t.txt").write_text("a model of rows " * 4000)
    monkeypatch.setattr(merging, "merge", lambda *_: pytest.fail("work began"))
    words = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"), "--to-bits", bits]
    assert main([*words, "--calibrate", str(tmp_path / "t.txt"), "--device", "cpu"]) == 2
    assert f"no {bits} codes of stacked experts" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_transformers_itself_leaves_experts_floats_beside_bitsandbytes_linears(tmp_path: Path, kind: str) -> None:
    """Where this fails, transformers has learned to hold experts in codes, and the refusal above may go."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_model(tmp_path / "base", kind, hidden_size=64, intermediate_size=64, head_dim=16, **EXPERTS)
    for how in (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        BitsAndBytesConfig(load_in_8bit=True),
    ):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, device_map="cpu")
        layer = model.model.layers[0]
        assert not layer.self_attn.q_proj.weight.is_floating_point()
        assert layer.mlp.experts.gate_up_proj.is_floating_point() and layer.mlp.experts.gate_up_proj.dim() == 3
