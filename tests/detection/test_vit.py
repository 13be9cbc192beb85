from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tensorkeep.detection.model.config import LoraConfig, VitConfig
from tensorkeep.detection.model.detector import build_backbone, video_features
from tensorkeep.detection.model.layers import VideoShape, add_kept, draw_kept
from tensorkeep.detection.model.vit import PatchEmbed, VisionTransformer
from tensorkeep.errors import TensorkeepError
from tests.detection import tiny


@pytest.mark.parametrize("size", [(4, 32, 48), (2, 33, 47), (5, 16, 16)])
def test_patch_embedding_equals_a_strided_convolution(size: tuple[int, ...]) -> None:
    embed = PatchEmbed(tiny.VIT)
    x = torch.randn(2, 3, *size)
    wanted = F.conv3d(x, embed.proj.weight, embed.proj.bias, stride=embed.kernel).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(x), wanted, atol=1e-5)


def test_frames_smaller_than_a_patch_are_refused_by_size() -> None:
    with pytest.raises(TensorkeepError, match=r"\(4, 15, 32\)"):
        PatchEmbed(tiny.VIT)(torch.zeros(1, 3, 4, 15, 32))


@pytest.mark.parametrize("mode", ["blocks", "attention", "segments"])
def test_recomputation_changes_no_bit_even_with_drop_path(mode: str) -> None:
    grads = []
    for checkpointing in ("none", mode):
        torch.manual_seed(0)
        backbone = tiny.detector(checkpointing=checkpointing, vit=replace(tiny.VIT, drop_path=0.5)).backbone
        assert backbone is not None
        torch.manual_seed(3)
        video_features(backbone.train(), tiny.batch()[0], 8).square().sum().backward()
        grads.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 18
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("tuning", ["adapter", "all"])
def test_segments_of_single_chunks_sum_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch, tuning: str) -> None:
    monkeypatch.setattr("tensorkeep.detection.model._recompute.SEGMENT_ELEMENTS", 1)
    grads = []
    for checkpointing in ("none", "segments"):
        torch.manual_seed(0)
        backbone = tiny.detector(checkpointing=checkpointing, tuning=tuning, lora=LoraConfig(lora_r=2)).backbone
        assert backbone is not None
        video_features(backbone.train(), tiny.batch()[0], 8).square().sum().backward()
        grads.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


def test_segments_replay_dropout_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorkeep.detection.model._recompute.SEGMENT_ELEMENTS", 1)
    lora = LoraConfig(lora_r=2, lora_dropout=0.5)
    backbone = tiny.detector(checkpointing="segments", lora=lora, vit=replace(tiny.VIT, drop_path=0.5)).backbone
    assert backbone is not None
    weight = backbone.blocks[1].attn.proj.lora_B
    direction = torch.randn(weight.shape)

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return video_features(backbone.train(), tiny.batch()[0], 8).square().mean()

    loss().backward()
    around = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            around.append(loss().item())
    slope = (around[0] - around[1]) / 2e-3
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        video_features(backbone, tiny.batch()[0], 8).square().mean().backward()
    assert torch.isfinite(weight.grad).all()


def test_of_the_first_block_only_the_adapter_is_recomputed() -> None:
    backbone = tiny.detector(checkpointing="blocks").backbone
    assert backbone is not None
    calls = {path: 0 for path in ("blocks.0.mlp", "blocks.0.adapter", "blocks.1.mlp", "blocks.1.adapter")}

    def count(path: str) -> None:
        calls[path] += 1

    for path in calls:
        backbone.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: count(path))
    video_features(backbone.train(), tiny.batch()[0], 8).sum().backward()
    # nothing before adapter 0 has a gradient
    assert list(calls.values()) == [1, 2, 2, 2]


def test_nothing_is_kept_for_a_frozen_backbone() -> None:
    backbone = tiny.detector(tuning="none", checkpointing="blocks").backbone
    assert backbone is not None
    assert not video_features(backbone.train(), tiny.batch()[0], 8).requires_grad


def test_the_q_and_v_bias_survive_a_replaced_qkv() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    vit = VisionTransformer(tiny.VIT)
    tiny.wake(vit)
    attention = vit.blocks[0].attn
    x = torch.randn(2, 5, 32)
    before = attention(x)
    attention.qkv = Wrapped(attention.qkv)
    assert torch.allclose(attention(x), before, atol=1e-6)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    x = torch.ones(20000, 2)
    dropped = add_kept(torch.zeros_like(x), x, draw_kept(x, 0.25, training=True))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert draw_kept(x, 0.25, training=False) is None


def test_positions_follow_a_table_that_was_loaded_or_moved() -> None:
    vit = VisionTransformer(tiny.VIT)
    shape = VideoShape(1, 2, 3, 4)
    first = vit.positions(shape)
    assert vit.positions(shape) is first
    vit.load_state_dict({**vit.state_dict(), "pos_embed": vit.get_buffer("pos_embed") * 2})
    assert torch.allclose(vit.positions(shape), first * 2)
    assert vit.double().positions(shape).dtype == torch.float64


def test_chunks_are_independent_without_adapters() -> None:
    vit = VisionTransformer(tiny.VIT).eval()
    chunks = torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8)
    whole = vit(chunks, videos=2)
    parts = torch.cat([vit(chunk[None], videos=1) for chunk in chunks])
    assert torch.allclose(whole, parts, atol=1e-5)


def test_uint8_and_float_frames_give_the_same_features() -> None:
    backbone = build_backbone(tiny.detector().config.backbone).eval()  # type: ignore[arg-type]
    frames = tiny.batch()[0]
    assert torch.equal(video_features(backbone, frames, 8), video_features(backbone, frames.float(), 8))


def test_another_number_of_frames_in_a_chunk_is_refused() -> None:
    vit = VisionTransformer(tiny.VIT)
    with pytest.raises(TensorkeepError, match="1 tubelets"):
        vit.positions(VideoShape(1, 1, 2, 2))


def test_impossible_shapes_are_refused_at_build() -> None:
    with pytest.raises(TensorkeepError, match="heads"):
        VitConfig(embed_dim=30, heads=4)
    with pytest.raises(TensorkeepError, match="tubelet"):
        VitConfig(chunk_frames=5)
