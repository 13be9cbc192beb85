from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from tensorkeep.detection.model.backbones import VisionTransformerAdapter, VisionTransformerQLoRA
from tensorkeep.detection.model.config import LoraConfig, VitConfig
from tensorkeep.detection.model.quantization import quantize_adapters, quantize_backbone
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.loading import load_quantized
from tensorkeep.quantization.modules import model_sizes
from tests.detection import tiny

WIDE = VitConfig(image_size=32, embed_dim=128, depth=2, heads=2, mlp_dim=256, chunk_frames=4, drop_path=0.0)
FRAMES = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_quantizing_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantize_adapters(VisionTransformerQLoRA(tiny.VIT)) == 4
    assert quantize_backbone(VisionTransformerAdapter(tiny.VIT)) == 8
    assert quantize_adapters(VisionTransformerAdapter(tiny.VIT)) == 0


def test_the_seeds_adapters_have_the_published_counts_when_packed() -> None:
    vit = VisionTransformerQLoRA(VitConfig(image_size=32), lora_r=16, lora_alpha=32, lora_dropout=0.1, quantize_bits=4)
    assert quantize_adapters(vit) == 24
    found = model_sizes(nn.ModuleList(block.adapter for block in vit.blocks))
    assert (found.parameters, found.trainable, found.quantized) == (1_185_420, 300_684, 884_736)
    assert found.bytes < 4 * 300_684 + 884_736 * 0.55


def test_a_quantized_backbone_round_trips_strictly_into_a_fresh_one() -> None:
    vit = VisionTransformerAdapter(WIDE, lora=LoraConfig(lora_r=4)).eval()
    tiny.wake(vit)
    quantize_backbone(vit)
    fresh = VisionTransformerAdapter(WIDE, lora=LoraConfig(lora_r=4)).eval()
    assert len(load_quantized(fresh, vit.state_dict()).quantized) == 8
    with torch.no_grad():
        assert torch.equal(fresh(FRAMES, 1), vit(FRAMES, 1))
    assert fresh.load_state_dict(vit.state_dict(), strict=True)


def test_what_trains_is_not_quantized() -> None:
    with pytest.raises(TensorkeepError, match=r"attn\.qkv trains"):
        quantize_backbone(VisionTransformer(tiny.VIT))


@pytest.mark.parametrize("lora", [None, LoraConfig(lora_r=4)], ids=["adapters", "adapters and LoRA"])
def test_a_quantized_backbone_keeps_its_biases_and_trains(lora: LoraConfig | None) -> None:
    vit = VisionTransformerAdapter(WIDE, lora=lora).eval()
    tiny.wake(vit)
    with torch.no_grad():
        full = vit(FRAMES, 1)
        trainable = {n for n, p in vit.named_parameters() if p.requires_grad}
        assert quantize_backbone(vit) == 8
        quantized = vit(FRAMES, 1)
        assert 0 < (quantized - full).norm() < 0.3 * full.norm()
        for block in vit.blocks:
            held = block.mlp.fc1 if lora is None else block.mlp.fc1.base
            assert held.weight.dtype == torch.uint8 and held.bias.dtype == torch.float32
        moved = vit.blocks[0].attn.v_bias
        moved += 1
        assert (vit(FRAMES, 1) - quantized).norm() > 0.05 * quantized.norm()
    vit.train()(FRAMES, 1).sum().backward()
    assert {n for n, p in vit.named_parameters() if p.grad is not None} == trainable


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.uint8), (8, torch.int8)])
def test_frozen_projections_of_the_adapters_are_packed(bits: int, dtype: torch.dtype) -> None:
    vit = VisionTransformerQLoRA(tiny.VIT, quantize_bits=bits)  # type: ignore[arg-type]
    assert quantize_adapters(vit) == 4
    base = vit.blocks[1].adapter.up_proj.base
    assert isinstance(base, QuantLinear) and base.weight.dtype == dtype and base.bias is None
    assert vit(FRAMES, 1).shape == (2, 32, 2, 2, 2)
