"""`training.quantize_compute: fp8` in a detection run: how far the trunk is off, and what it leaves alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorkeep.detection.job import build
from tensorkeep.detection.model import _frozen
from tensorkeep.detection.model._linears import Narrow, NarrowLinear, narrow
from tensorkeep.detection.model.config import AdapterConfig, LoraConfig
from tensorkeep.detection.model.detector import video_features
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.detection.model.quantization import compute_in_float8, quantize_backbone
from tensorkeep.detection.model.vit import Block
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.training.loop import fit
from tests.detection import runs, tiny
from tests.detection.test_frozen import KEPT
from tests.detection.test_recorded import trained
from tests.gpu import DEVICES, needs_gpu
from tests.run_states import equal
from tests.training import assert_same_run, rows

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LADDER = AdapterConfig("ladder")


def backbone_of(codes: str | None = None, fp8: bool = True, device: str = "cpu", **changes: Any) -> Any:
    """A small frozen backbone in bfloat16, or such codes, that trains in float8."""
    torch.manual_seed(0)
    fields = {"frozen_dtype": "bfloat16", "checkpointing": "segments", **changes}
    backbone = tiny.detector(**fields).backbone
    assert backbone is not None
    if codes is not None:
        quantize_backbone(backbone, codes)  # type: ignore[arg-type]
    backbone.to(device).train()
    if fp8:
        assert compute_in_float8(backbone) == 8
    return backbone


def gradients(backbone: Any, device: str = "cpu") -> dict[str, Tensor]:
    """Features of a batch in training, and the gradients of what trains."""
    backbone.zero_grad()
    out = video_features(backbone, tiny.batch()[0].to(device), 8)
    (out * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum().backward()
    grads = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return {"features": out.detach(), **grads}


def off(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).norm() / exact.norm())


def wide_block(block: Block) -> Block:
    """The block in float64, codes dequantized."""
    made = copy.deepcopy(block).cpu()
    for target in LINEARS:
        parent, _, name = target.rpartition(".")
        linear = made.get_submodule(target)
        if isinstance(linear, QuantLinear):
            dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            dense.weight.data = linear.dequantize()
            if linear.bias is not None:
                dense.bias.data = linear.bias.data
            setattr(made.get_submodule(parent), name, dense)
    return made.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_output_and_input_gradient_of_a_trunk_are_near_float64s(device: str, kind: str | None) -> None:
    block = backbone_of(kind, device=device).blocks[0]
    shape = VideoShape(1, 2, 2, 2)
    drawn = [torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    x, grad = (t.to(device, torch.bfloat16) for t in drawn)
    kept = [KEPT.to(device, torch.bfloat16), None]
    leaf = x.cpu().double().requires_grad_()
    exact = wide_block(block).core(leaf, KEPT.double(), None, shape)
    (wanted,) = torch.autograd.grad(exact, leaf, grad.cpu().double())
    opening = block.frozen(x, shape)
    with torch.no_grad():
        trunk, out, back = opening(), torch.empty_like(x), torch.empty_like(x)
        assert trunk.in_float8 and isinstance(trunk.fc1, NarrowLinear)
        done = trunk.forward(x, None, kept, out, True)
        trunk.backward(x, None, kept, done, grad, back)
        again = torch.empty_like(x)
        opening().forward(x, None, kept, again, False)
    assert torch.equal(out, again)
    branch, below = off(out - x, exact - leaf), off(back - grad, wanted - grad.cpu().double())
    assert 0.01 < branch < 0.06 and 0.01 < below < 0.08, (branch, below)


@pytest.mark.parametrize("device", DEVICES)
def test_codes_and_the_floats_that_they_stand_for_give_the_same_bits(device: str) -> None:
    torch.manual_seed(0)
    coded = QuantLinear.of(nn.Linear(96, 160)).to(device)
    coded.compute_in_float8()
    floats = nn.Linear(96, 160, device=device)
    floats.weight.data = coded.dequantize()
    bias = torch.randn(160, device=device).bfloat16()
    one, other = NarrowLinear(coded, bias), NarrowLinear(floats, bias)
    x, grad = torch.randn(2, 5, 96, device=device).bfloat16(), torch.randn(2, 5, 160, device=device).bfloat16()
    assert torch.equal(one.forward(x), other.forward(x)) and torch.equal(one.back(grad), other.back(grad))
    assert torch.equal(one.forward(narrow(x)), one.forward(x))


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_however_a_block_is_recomputed_its_gradients_are_the_same(
    kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for part, checkpointing in ((0.0, "segments"), (1.0, "segments"), (0.0, "two_level"), (0.0, "offload")):
        monkeypatch.setattr("tensorkeep.detection.model.vit.attention_kept", lambda width, part=part: part)
        vit = replace(tiny.VIT, depth=4)
        torch.manual_seed(0)
        backbone: Any = tiny.detector(frozen_dtype="bfloat16", checkpointing=checkpointing, vit=vit).backbone
        if kind is not None:
            quantize_backbone(backbone, kind)  # type: ignore[arg-type]
        assert compute_in_float8(backbone.train()) == 16
        found.append(gradients(backbone))
    assert len(found[0]) > 20 and all(equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("adapter", [AdapterConfig(), LADDER], ids=["adapters", "ladder"])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_training_is_in_float8_and_evaluation_is_the_bases(kind: str | None, adapter: AdapterConfig) -> None:
    plain, narrowed = (backbone_of(kind, fp8, adapter=adapter) for fp8 in (False, True))
    exact, found = gradients(plain), gradients(narrowed)
    assert list(exact) == list(found) and len(found) > 5
    assert 0.002 < off(found["features"], exact["features"]) < 0.05
    frames = tiny.batch()[0]
    with torch.no_grad():
        assert torch.equal(video_features(narrowed, frames, 8), video_features(plain, frames, 8))
    state = plain.state_dict()
    assert list(narrowed.state_dict()) == list(state) and equal(dict(narrowed.state_dict()), dict(state))


def test_v_jepa_2_has_it_too() -> None:
    plain, narrowed = (backbone_of(None, fp8, kind="vjepa2") for fp8 in (False, True))
    assert 0.002 < off(gradients(narrowed)["features"], gradients(plain)["features"]) < 0.05


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    return runs.dataset(tmp_path_factory.mktemp("data"), videos=4, held_out=1)


def recipe_of(data: Path, **changes: Any) -> DetectionRecipe:
    fields = {"model__backbone__frozen_dtype": "bfloat16", "model__backbone__checkpointing": "segments"}
    training = {"training__precision": "bf16", "training__quantize_compute": "fp8"}
    return runs.recipe(data, **{**fields, **training, **changes})


@pytest.mark.parametrize("kind", ["null", "nf4"])
def test_a_run_goes_on_to_the_bit_and_not_with_other_products(data: Path, tmp_path: Path, kind: str) -> None:
    made = recipe_of(data, training__quantize_backbone=kind)
    said: list[str] = []
    job, loop = build(made, tmp_path / "whole", remark=said.append)
    fit(job, tmp_path / "whole", loop)
    assert "quantize_compute: 8 linears have products in fp8 while training" in said
    runs.killed(made, tmp_path / "broken", 4)
    other = recipe_of(data, training__quantize_backbone=kind, training__quantize_compute="null")
    with pytest.raises(TensorkeepError, match="quantize_compute"):
        runs.trained(other, tmp_path / "broken")
    runs.trained(made, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    runs.trained(other, tmp_path / "other")
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("whole", "other")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model__backbone__tuning": "all"}, "only frozen linears have float8 products"),
        ({"model__backbone__lora": {"lora_r": 4}}, "linears under low-rank updates have none"),
        ({"model__backbone__frozen_dtype": "float32"}, "computed in bf16, not float32"),
        ({"model__backbone__checkpointing": "blocks"}, "checkpointing blocks has no backward in float8"),
        ({"model__backbone__kind": "internvideo2"}, "blocks of internvideo2 have no backward in float8"),
        ({"training__quantize_backbone": "int8"}, "int8 codes have no float8 products"),
        ({"training__parallel": "fsdp", "model__backbone__checkpointing": "none"}, "sharded weights"),
        ({"training__compile": True}, "not compiled"),
    ],
)
def test_what_has_no_float8_products_is_refused_in_one_line(tmp_path: Path, changes: Any, what: str) -> None:
    with pytest.raises(TensorkeepError, match=what) as caught:
        recipe_of(tmp_path, **changes)
    assert "quantize_compute" in caught.value.line


def test_the_short_name_is_that_of_language_runs(tmp_path: Path) -> None:
    made = recipe_of(tmp_path, training__quantize_compute="null", quantize_compute="fp8")
    assert made.training.quantize_compute == "fp8"


def test_a_ladder_has_them_however_it_is_recomputed(tmp_path: Path) -> None:
    made = recipe_of(tmp_path, model__backbone__adapter={"kind": "ladder"}, model__backbone__checkpointing="none")
    assert made.training.quantize_compute == "fp8"


@pytest.mark.parametrize(
    ("changes", "kind", "what"),
    [
        ({"vit": replace(tiny.VIT, mlp_dim=72)}, None, r"blocks\.0\.mlp\.fc1 is of 72 x 32, no multiples of 16"),
        ({"tuning": "all"}, None, "trains"),
        ({"lora": LoraConfig(4)}, None, "holds low-rank updates"),
        ({"frozen_dtype": "float32"}, None, "computed in float32, not bfloat16"),
        ({}, "int8", "held in int8"),
        ({"checkpointing": "none"}, None, "under checkpointing none have no backward"),
    ],
)
def test_a_backbone_without_float8_products_stays_as_it_is(changes: Any, kind: str | None, what: str) -> None:
    backbone = backbone_of(kind, False, **changes)
    with pytest.raises(TensorkeepError, match=what):
        compute_in_float8(backbone)
    assert not any(block.in_float8 for block in backbone.blocks)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("width", [96, 1408])
def test_rounded_rows_are_those_of_two_passes(width: int) -> None:
    x, branch, grad = (torch.randn(3, 7, width, device="cuda").bfloat16() for _ in range(3))
    norm = nn.LayerNorm(width, eps=1e-6, device="cuda", dtype=torch.bfloat16)
    kept = KEPT.to("cuda", torch.bfloat16)
    with torch.no_grad():
        total, normed = _frozen.add_norm(x, branch, kept, norm)
        other, found = _frozen.add_norm(x, branch, kept, norm, True)
        wanted = narrow(normed)
        assert isinstance(found, Narrow) and torch.equal(total, other) and torch.equal(found.scale, wanted.scale)
        assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
        pairs = [
            (_frozen.gelu(x.clone(), True), _frozen.gelu(x.clone(), False)),
            (_frozen.gelu_backward(grad.clone(), x, True), _frozen.gelu_backward(grad.clone(), x, False)),
        ]
        shapes = [torch.randn(3, 7, width // 8, 8, device="cuda").bfloat16() for _ in range(3)]
        for lie in (lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2).contiguous()):
            thirds = [lie(t) for t in shapes]
            exact, made = narrow(_frozen.join(thirds, False)), _frozen.join(thirds, True)
            assert isinstance(made, Narrow) and torch.equal(made.scale, exact.scale)
            assert torch.equal(made.codes.view(torch.uint8), exact.codes.view(torch.uint8))
    for made, plain in pairs:
        assert isinstance(made, Narrow) and isinstance(plain, Tensor)
        wanted = narrow(plain)
        assert torch.allclose(made.scale, wanted.scale, rtol=2**-7)  # torch's GELU may round the last bit otherwise
        assert float((made.codes.view(torch.uint8) != wanted.codes.view(torch.uint8)).float().mean()) < 0.03


@needs_gpu
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_cpu_and_gpu_agree(kind: str | None) -> None:
    here = gradients(backbone_of(kind))
    there = gradients(backbone_of(kind, device="cuda"), "cuda")
    for name, value in here.items():
        assert off(there[name], value) < 0.05, name


@needs_gpu
@pytest.mark.parametrize("checkpointing", ["segments", "two_level", "offload"])
@pytest.mark.parametrize("kind", ["null", "nf4"])
def test_a_recorded_step_is_the_launched_one(data: Path, tmp_path: Path, kind: str, checkpointing: str) -> None:
    made = recipe_of(data, training__quantize_backbone=kind, model__backbone__checkpointing=checkpointing)
    trained(made, tmp_path / "launched", graph=False, deterministic=True)
    trained(made, tmp_path / "recorded", deterministic=True)
    assert rows(tmp_path / "launched") == rows(tmp_path / "recorded") != []
