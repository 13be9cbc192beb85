from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorkeep.conversion.naming import opentad, videomae
from tensorkeep.detection.model.config import LoraConfig
from tensorkeep.detection.model.detector import video_features
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.detection.model.weights import load_videomae
from tensorkeep.errors import TensorkeepError
from tests.detection import tiny
from tests.opentad_names import load_opentad, to_opentad


def test_opentad_names_are_the_originals_and_come_back() -> None:
    detector = tiny.detector()
    theirs = to_opentad(detector)
    assert {
        "backbone.model.backbone.pos_embed",
        "backbone.model.backbone.patch_embed.projection.weight",
        "backbone.model.backbone.blocks.1.mlp.layers.0.0.weight",
        "backbone.model.backbone.blocks.1.mlp.layers.1.bias",
        "neck.fpn_norms.2.weight",
        "rpn_head.scale.0.scale",
        "projection.branch.0.drop_path_attn.scale",
    } <= theirs.keys()
    assert {opentad.to_hf(name) for name in theirs} == detector.state_dict().keys()


def test_an_opentad_checkpoint_loads_with_its_wrapper_and_its_integer_normaliser() -> None:
    source, sink = tiny.detector(), tiny.detector()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(2)
    checkpoint = {f"module.{name}": tensor for name, tensor in to_opentad(source).items()}
    checkpoint["module.rpn_head.loss_normalizer"] = torch.tensor(77)
    load_opentad(sink, checkpoint)
    assert sink.head.get_buffer("loss_normalizer") == 77.0
    frames, mask, _, _ = tiny.batch()
    ours, theirs = sink.eval()(frames, mask), source.eval()(frames, mask)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))


def test_a_checkpoint_of_another_recipe_is_refused_by_name_and_changes_nothing() -> None:
    detector = tiny.detector()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    checkpoint = to_opentad(tiny.detector())
    checkpoint = {name: tensor + 1 for name, tensor in checkpoint.items()}
    del checkpoint["rpn_head.cls_head.bias"]
    checkpoint["neck.fpn_norms.9.bias"] = torch.zeros(16)
    checkpoint["rpn_head.cls_head.weight"] = torch.zeros(5, 16, 3)
    with pytest.raises(TensorkeepError) as caught:
        load_opentad(detector, checkpoint)
    for said in ("missing: head.cls_head.bias", "unexpected: neck.norms.9.bias", "(5, 16, 3) instead of (3, 16, 3)"):
        assert said in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    with pytest.raises(TensorkeepError, match=r"unknown tensor 'backbone\.stem\.weight'"):
        load_opentad(detector, {"backbone.stem.weight": torch.zeros(1)})


def _original(vit: VisionTransformer) -> dict[str, Tensor]:
    names = {name: videomae.from_hf(f"backbone.{name}") for name in vit.state_dict()}
    tensors = {new: vit.state_dict()[name].clone() for name, new in names.items() if new is not None}
    return {**tensors, "head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)}


@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_original_files_load_into_an_adapted_backbone(prefix: str) -> None:
    source = VisionTransformer(tiny.VIT)
    tiny.wake(source)
    file = {prefix + name: tensor for name, tensor in _original(source).items()}
    sink = tiny.detector(lora=LoraConfig(lora_r=2)).backbone
    assert sink is not None
    kept = {name: tensor.clone() for name, tensor in sink.state_dict().items() if "adapter" in name or "lora" in name}
    left = load_videomae(sink, file)
    assert len(left) == 2 and all("head" in name for name in left)
    assert torch.equal(sink.blocks[1].attn.qkv.base.weight, source.blocks[1].attn.qkv.weight)
    assert all(torch.equal(sink.state_dict()[name], tensor) for name, tensor in kept.items())


def test_a_pre_training_file_without_the_last_norm_loads_and_names_its_decoder() -> None:
    source = VisionTransformer(tiny.VIT)
    file = {f"encoder.{n}": t for n, t in _original(source).items() if not n.startswith(("head", "fc_norm"))}
    file |= {
        "decoder.blocks.0.norm1.weight": torch.zeros(4),
        "mask_token": torch.zeros(1),
        "encoder.norm.bias": torch.zeros(32),
    }
    assert sorted(load_videomae(VisionTransformer(tiny.VIT), file)) == [
        "decoder.blocks.0.norm1.weight",
        "encoder.norm.bias",
        "mask_token",
    ]


def test_mmaction_files_load() -> None:
    source, sink = VisionTransformer(tiny.VIT), VisionTransformer(tiny.VIT)
    tiny.wake(source)
    file = {
        opentad.from_hf(f"backbone.{n}", backbone_only=True) or "": t
        for n, t in source.state_dict().items()
        if n != "pos_embed"
    }
    file |= {"cls_head.fc_cls.weight": torch.zeros(7, 32)}
    assert "backbone.blocks.0.mlp.layers.0.0.weight" in file
    assert load_videomae(sink, file) == ["cls_head.fc_cls.weight"]
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in sink.state_dict().items())


def test_a_file_that_is_no_encoder_or_lacks_a_tensor_is_refused() -> None:
    vit = VisionTransformer(tiny.VIT)
    with pytest.raises(TensorkeepError, match=r"unknown tensor 'layer1\.0\.conv\.weight'"):
        load_videomae(vit, {"layer1.0.conv.weight": torch.zeros(1)})
    file = _original(vit)
    del file["blocks.1.attn.q_bias"]
    with pytest.raises(TensorkeepError, match=r"missing: blocks\.1\.attn\.q_bias"):
        load_videomae(vit, file)


def test_transformers_videomae_gives_the_same_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        tubelet_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        layer_norm_eps=1e-6,
        qkv_bias=True,
        use_mean_pooling=True,
        attn_implementation="sdpa",
    )
    model = transformers.VideoMAEForVideoClassification(config).eval()
    tiny.wake(model)
    vit = VisionTransformer(tiny.VIT).eval()
    left = load_videomae(vit, model.state_dict())
    assert sorted(left) == ["classifier.bias", "classifier.weight"]
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        theirs = model.videomae(pixel_values=video.transpose(1, 2)).last_hidden_state
        ours = vit.encode(vit.patch_embed(video), VideoShape(2, 2, 2, 2))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_names_of_other_models_are_nobodys() -> None:
    for name in ("model.layers.0.self_attn.q_proj.weight", "backbone", "head", "lm_head.weight"):
        assert opentad.to_hf(name) is None
    assert opentad.from_hf("lm_head.weight") is None and opentad.to_hf("cls_head.fc_cls.bias") is None
    assert videomae.from_hf("head.cls_head.bias") is None and videomae.to_hf("videomae.layernorm.bias") is None
    assert opentad.recognise("rpn_head.cls_head.bias") and not opentad.recognise("head.weight")
    assert videomae.recognise("blocks.0.norm1.weight") and not videomae.recognise("model.norm.weight")


def test_loaded_weights_reach_the_features() -> None:
    source = tiny.detector().backbone
    sink = tiny.detector().backbone
    assert source is not None and sink is not None
    with torch.no_grad():
        source.blocks[0].attn.proj.weight.add_(1)
    sink.load_state_dict(source.state_dict())
    frames = tiny.batch()[0]
    assert torch.equal(video_features(sink.eval(), frames, 8), video_features(source.eval(), frames, 8))
