from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensorkeep.detection.model.adapters import Adapter, LoRALinear, PlainAdapter, QLoRAAdapter, add_lora, cast_frozen
from tensorkeep.detection.model.backbones import VisionTransformerAdapter, VisionTransformerQLoRA
from tensorkeep.detection.model.config import AdapterConfig, LoraConfig
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.errors import TensorkeepError
from tests.detection import tiny

SHAPE = VideoShape(videos=2, t=3, h=2, w=4)


def _tokens(dim: int) -> torch.Tensor:
    return torch.randn(2 * 5, 3 * 2 * 4, dim)  # five chunks a video


@pytest.mark.parametrize("kernel", [3, 5])
def test_temporal_convolution_equals_conv1d_over_the_whole_video(kernel: int) -> None:
    adapter = Adapter(16, 8, kernel)
    z = _tokens(8)
    sequences = z.view(2, 15, 2, 4, 8).permute(0, 2, 3, 4, 1).flatten(0, 2)  # [videos*h*w, r, T]
    wanted = adapter.conv(adapter.dwconv(sequences)).unflatten(0, (2, 2, 4)).permute(0, 4, 1, 2, 3).reshape(z.shape)
    assert torch.allclose(adapter.temporal(z, SHAPE), z + wanted, atol=1e-5)


@pytest.mark.parametrize("adapter", [Adapter(16, 4), PlainAdapter(16, 4), QLoRAAdapter(16, 4, lora_r=2)])
def test_an_adapter_starts_as_the_identity(adapter: nn.Module) -> None:
    x = _tokens(16)
    assert torch.equal(adapter.eval()(x, SHAPE), x)


def test_adapter_parameters_follow_the_published_formula() -> None:
    for c, r in ((384, 96), (1408, 352)):
        assert sum(p.numel() for p in Adapter(c, r).parameters()) == 2 * c * r + r * r + 6 * r + c + 1


def test_qlora_adapter_has_the_seeds_parameters() -> None:
    adapter = QLoRAAdapter(384, 96, lora_r=16, lora_alpha=32, lora_dropout=0.1, quantize_bits=4)
    assert 12 * sum(p.numel() for p in adapter.parameters()) == 1_185_420
    assert 12 * sum(p.numel() for p in adapter.parameters() if p.requires_grad) == 300_684


def test_qlora_backbone_takes_the_names_users_know() -> None:
    vit = VisionTransformerQLoRA(
        tiny.VIT, lora_r=4, lora_alpha=8, lora_dropout=0.0, quantize_bits=8, use_plain_adapter=False, blocks=[1]
    )
    assert vit.blocks[0].adapter is None
    assert isinstance(vit.blocks[1].adapter, QLoRAAdapter) and vit.blocks[1].adapter.quantize_bits == 8
    plain = VisionTransformerQLoRA(tiny.VIT, use_plain_adapter=True)
    assert all(isinstance(block.adapter, PlainAdapter) for block in plain.blocks)
    with pytest.raises(TensorkeepError, match="4 or 8"):
        QLoRAAdapter(8, 2, quantize_bits=3)


def test_only_adapters_train() -> None:
    vit = VisionTransformerAdapter(tiny.VIT, AdapterConfig(blocks=(1,)))
    trainable = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert trainable == {f"blocks.1.adapter.{n}" for n, _ in vit.blocks[1].adapter.named_parameters()}
    frozen = {name for name, p in VisionTransformerQLoRA(tiny.VIT).named_parameters() if not p.requires_grad}
    assert {name for name in frozen if "adapter" in name} == {
        f"blocks.{i}.adapter.{side}_proj.base.weight" for i in range(2) for side in ("down", "up")
    }


def test_a_missing_block_is_refused_by_number() -> None:
    with pytest.raises(TensorkeepError, match="no block 2"):
        VisionTransformerAdapter(tiny.VIT, AdapterConfig(blocks=(0, 2)))


def test_lora_leaves_the_first_forward_bitwise_unchanged() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(tiny.VIT).eval()
    tiny.wake(vit)
    chunks = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    before = vit(chunks, 1)
    add_lora(vit, LoraConfig(lora_r=4))
    after = vit.eval()(chunks, 1)
    # the biases of q and v are added after the product instead of within it: rounding only
    assert torch.allclose(before, after, atol=1e-5)
    linear = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    assert torch.equal(LoRALinear(linear, 2, 4)(x), linear(x))


def test_lora_counts_as_published_for_vit_s() -> None:
    with torch.device("meta"):
        added = [LoRALinear(nn.Linear(i, o), 16, 32) for i, o in ((384, 1152), (384, 384), (384, 1536), (1536, 384))]
    assert 12 * sum(p.numel() for layer in added for p in (layer.lora_A, layer.lora_B)) == 1_179_648


def test_lora_update_is_scaled_by_alpha_over_r() -> None:
    layer = LoRALinear(nn.Linear(8, 4, bias=False), r=2, alpha=6)
    tiny.wake(layer)
    x = torch.randn(3, 8)
    merged = layer.base.weight + 3.0 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer(x), F.linear(x, merged), atol=1e-5)


def test_an_unknown_lora_target_is_refused_with_a_near_miss() -> None:
    with pytest.raises(TensorkeepError, match=r"attn\.qkv"):
        add_lora(VisionTransformer(tiny.VIT), LoraConfig(targets=("attn.qvk",)))


def test_half_precision_backbone_keeps_adapters_and_gradients_in_float32() -> None:
    detector = tiny.detector(frozen_dtype="bfloat16")
    full = tiny.detector()
    full.load_state_dict(detector.state_dict())
    frames, mask, segments, labels = tiny.batch()
    assert detector.backbone is not None and detector.backbone.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    losses = detector.loss(detector.train()(frames, mask), segments, labels)
    losses.cost.backward()
    wanted = full.loss(full.train()(frames, mask), segments, labels)
    assert losses.cost.item() == pytest.approx(wanted.cost.item(), rel=0.05)
    grads = {p.grad.dtype for p in detector.parameters() if p.grad is not None}
    assert grads == {torch.float32}
    assert detector.backbone.get_buffer("pos_embed").dtype == torch.float32


def test_casting_leaves_trainable_parameters_alone() -> None:
    vit = VisionTransformerAdapter(tiny.VIT)
    cast_frozen(vit, torch.float16)
    assert {p.dtype for p in vit.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in vit.parameters() if not p.requires_grad} == {torch.float16}
