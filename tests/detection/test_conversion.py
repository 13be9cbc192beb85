"""OpenTAD, mmaction, VideoMAE and transformers files through `convert` and back, and into a detector."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tensorkeep.conversion.naming import identify, opentad, videomae
from tensorkeep.conversion.naming.opentad_recipe import read_off
from tensorkeep.conversion.planning import make_plan
from tensorkeep.detection.model.config import DetectorConfig
from tensorkeep.detection.model.detector import Detector, read_detector_config
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.detection.model.weights import load_videomae
from tensorkeep.detection.start import load_detector
from tensorkeep.formats.view import read
from tensorkeep.training.schema import from_mapping
from tests.detection import tiny
from tests.helpers import assert_same, held, refused, to
from tests.opentad_names import to_opentad
from tests.tools import ROOT


def checkpoint(path: Path, average: bool = True, **more: Any) -> Detector:
    """What OpenTAD's trainer writes, from a detector of ours; the average is half of the weights."""
    detector = tiny.detector()
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in to_opentad(detector).items())
    file: dict[str, Any] = {"epoch": 59, "state_dict": state, "scheduler": {"max_epoch": 100, "base_lrs": [1e-4]}}
    file["optimizer"] = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": []}
    if average:
        half = OrderedDict((name, tensor / 2) for name, tensor in state.items())
        half["module.rpn_head.loss_normalizer"] = torch.tensor(93)
        file["state_dict_ema"] = half
    torch.save({**file, **more}, path)
    return detector


def test_an_opentad_checkpoint_becomes_bare_safetensors_with_a_recipe(tmp_path: Path) -> None:
    detector = checkpoint(tmp_path / "epoch_59.pth")
    identity = identify(read(tmp_path / "epoch_59.pth"))
    assert (identity.naming, identity.root, identity.wrappers) == ("opentad", "state_dict", ("module.",))
    plan, _ = to(tmp_path / "epoch_59.pth", tmp_path / "out", "hf")
    assert_same(held(tmp_path / "out"), detector.state_dict())
    assert {step.reason for step in plan.dropped} == {"optimizer state", "EMA copy of the model"}
    assert any("--drop '^state_dict'" in note.message for note in plan.notes)
    section = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"]
    config = from_mapping(DetectorConfig, section, "recipe")
    assert (config.head.classes, config.projection.channels, config.head.strides) == (3, 16, (1, 2, 4))
    shapes = {n: t.shape for n, t in Detector(config).state_dict().items() if n != "backbone.pos_embed"}
    assert shapes == {n: t.shape for n, t in detector.state_dict().items() if n != "backbone.pos_embed"}
    assert identify(read(tmp_path / "out")).naming == "hf"


def test_the_average_is_taken_by_dropping_the_weights(tmp_path: Path) -> None:
    detector = checkpoint(tmp_path / "e.pth")
    plan, _ = to(tmp_path / "e.pth", tmp_path / "out", "hf", drop=["state_dict.*"])
    half = {name: tensor / 2 for name, tensor in detector.state_dict().items()}
    half["head.loss_normalizer"] = torch.tensor(93)
    assert_same(held(tmp_path / "out"), half)
    assert any("average under state_dict_ema is taken" in n.message and "truncates" in n.message for n in plan.notes)


def test_what_we_write_is_a_checkpoint_of_opentads_test_program(tmp_path: Path) -> None:
    detector = checkpoint(tmp_path / "e.pth")
    to(tmp_path / "e.pth", tmp_path / "out", "hf")
    to(tmp_path / "out", tmp_path / "back.pth", "pth", naming="opentad")
    file = torch.load(tmp_path / "back.pth", weights_only=True)
    wanted = {f"module.{name}": tensor for name, tensor in to_opentad(detector).items()}
    assert list(file) == ["epoch", "state_dict", "state_dict_ema"]
    for root in ("state_dict", "state_dict_ema"):
        assert_same(file[root], wanted)
    one, other = (file[root]["module.rpn_head.cls_head.weight"] for root in ("state_dict", "state_dict_ema"))
    assert one.data_ptr() == other.data_ptr()  # stored once
    to(tmp_path / "back.pth", tmp_path / "again", "hf")
    assert_same(held(tmp_path / "again"), detector.state_dict())
    plan, _ = to(tmp_path / "e.pth", tmp_path / "kept.pth", "pth", naming="opentad")
    assert torch.load(tmp_path / "kept.pth")["epoch"] == 59 and plan.naming == "opentad"


@pytest.mark.parametrize("average", [False, True])
def test_a_detector_loads_from_opentads_file_in_one_call(tmp_path: Path, average: bool) -> None:
    detector = checkpoint(tmp_path / "e.pth").eval()
    document = {"model": {"backbone": {"vit": {**vars(tiny.VIT)}, "adapter": {}, "output_length": 8}}}
    document["model"]["projection"] = vars(tiny.projection())
    document["model"]["head"] = vars(tiny.HEAD)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(_plain(document)))
    loaded = load_detector(tmp_path / "e.pth", tmp_path / "r.yaml", average=average)
    if average:
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.div_(2)
        detector.backbone.get_buffer("pos_embed").div_(2)
    frames, mask, _, _ = tiny.batch()
    assert all(torch.equal(a, b) for a, b in zip(loaded(frames, mask).logits, detector(frames, mask).logits))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def test_a_folder_without_a_recipe_is_refused(tmp_path: Path) -> None:
    detector = checkpoint(tmp_path / "e.pth")
    to(tmp_path / "e.pth", tmp_path / "model.safetensors", "hf")
    with refused(None, "no recipe.yaml", "give the recipe"):
        load_detector(tmp_path / "model.safetensors")
    assert detector is not None


def test_averaged_codes_are_refused_and_live_ones_kept(tmp_path: Path) -> None:
    checkpoint(tmp_path / "e.pth")
    file = torch.load(tmp_path / "e.pth")
    at = "module.backbone.model.backbone.blocks.0.adapter.down_proj.weight"
    for root in ("state_dict", "state_dict_ema"):
        file[root][at] = torch.zeros(128, 1, dtype=torch.uint8)
        file[root][f"{at}.absmax"] = torch.zeros(4)
        file[root][f"{at}.quant_state.bitsandbytes__fp4"] = torch.zeros(80, dtype=torch.uint8)
    torch.save(file, tmp_path / "q.pth")
    to(tmp_path / "q.pth", tmp_path / "live", "hf")
    assert "backbone.blocks.0.adapter.down_proj.weight.absmax" in held(tmp_path / "live")
    with refused("Q03", at, "codes were averaged"):
        make_plan([read(tmp_path / "q.pth")], "hf", drop=["state_dict.*"])


def test_a_tensor_of_another_detector_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "e.pth")
    file = torch.load(tmp_path / "e.pth")
    file["state_dict"]["module.rpn_head.boundary.weight"] = torch.zeros(2)
    torch.save(file, tmp_path / "x.pth")
    with refused("K02", "rpn_head.boundary.weight", "--from-naming hf"):
        make_plan([read(tmp_path / "x.pth")], "hf")
    kept = make_plan([read(tmp_path / "x.pth")], "hf", from_naming="hf")
    assert "rpn_head.boundary.weight" in {t.name for t in kept.tensors}


def test_lora_has_no_place_in_opentad(tmp_path: Path) -> None:
    from tensorkeep.detection.model.config import LoraConfig
    from tests.helpers import write_hf

    write_hf(tmp_path, tiny.detector(lora=LoraConfig(lora_r=2)).state_dict())
    with refused("K07", "attn.proj.base.bias", "merge it"):
        make_plan([read(tmp_path)], "pth", naming="opentad")


# -- backbones -----------------------------------------------------------------------------------------------------


def backbone() -> tuple[VisionTransformer, dict[str, Tensor]]:
    vit = VisionTransformer(tiny.VIT)
    tiny.wake(vit)
    return vit, {f"backbone.{n}": t.clone() for n, t in vit.state_dict().items() if n != "pos_embed"}


def originals(ours: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The same backbone as each program stores it: file content by kind."""
    bare = {videomae.from_hf(name): tensor for name, tensor in ours.items()}
    fine = {**bare, "head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)}
    trained = {f"encoder.{n}": t for n, t in bare.items() if not str(n).startswith("fc_norm")}
    trained |= {
        "decoder.blocks.0.norm1.weight": torch.zeros(4),
        "mask_token": torch.zeros(1),
        "encoder.norm.bias": torch.zeros(32),
    }
    action = {opentad.from_hf(name, backbone_only=True): tensor for name, tensor in ours.items()}
    return {
        "videomae": {"model": fine},
        "videomae v2": {"module": fine},
        "pre-training": {"model": trained},
        "mmaction": {"meta": {"epoch": 1}, "state_dict": {**action, "cls_head.fc_cls.weight": torch.zeros(7, 32)}},
    }


@pytest.mark.parametrize("kind", ["videomae", "videomae v2", "pre-training", "mmaction"])
def test_pretrained_backbones_get_our_names_and_say_what_they_leave(tmp_path: Path, kind: str) -> None:
    vit, ours = backbone()
    torch.save(originals(ours)[kind], tmp_path / "f.pth")
    assert identify(read(tmp_path / "f.pth")).naming == ("opentad" if kind == "mmaction" else "videomae")
    plan, _ = to(tmp_path / "f.pth", tmp_path / "out", "hf")
    wanted = {n: t for n, t in ours.items() if kind != "pre-training" or "fc_norm" not in n}
    assert_same(held(tmp_path / "out"), wanted)
    assert plan.dropped and all(step.reason for step in plan.dropped)
    fresh = VisionTransformer(tiny.VIT)
    assert len(load_videomae(fresh, tmp_path / "f.pth")) == len(plan.dropped)
    assert all(torch.equal(t, vit.state_dict()[n]) for n, t in fresh.state_dict().items() if "fc_norm" not in n)


def test_a_backbone_goes_back_to_videomae_and_to_what_opentad_starts_from(tmp_path: Path) -> None:
    vit, ours = backbone()
    from tests.helpers import write_hf

    write_hf(tmp_path / "ours", {f"backbone.{n}": t for n, t in vit.state_dict().items()})
    plan, _ = to(tmp_path / "ours", tmp_path / "v.pth", "pth", naming="videomae")
    assert_same(torch.load(tmp_path / "v.pth"), {str(videomae.from_hf(n)): t for n, t in ours.items()})
    assert [step.reason for step in plan.dropped] == ["fixed sinusoid, made at build: VideoMAE's files have none"]
    to(tmp_path / "v.pth", tmp_path / "m.pth", "pth", naming="opentad")
    stored = torch.load(tmp_path / "m.pth")
    assert list(stored) == ["state_dict"]
    assert_same(stored["state_dict"], {str(opentad.from_hf(n, backbone_only=True)): t for n, t in ours.items()})


def test_transformers_videomae_stays_hf_or_becomes_ours(tmp_path: Path) -> None:
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
        qkv_bias=True,
        use_mean_pooling=True,
    )
    model = transformers.VideoMAEForVideoClassification(config)
    tiny.wake(model)
    model.save_pretrained(tmp_path / "theirs")
    assert identify(read(tmp_path / "theirs")).naming == "hf"
    to(tmp_path / "theirs", tmp_path / "same", "hf")
    assert_same(held(tmp_path / "same"), held(tmp_path / "theirs"))
    with refused("K07", "--from-naming videomae"):
        make_plan([read(tmp_path / "theirs")], "pth", naming="videomae")
    plan, _ = to(tmp_path / "theirs", tmp_path / "ours", "hf", from_naming="videomae")
    assert not (tmp_path / "ours" / "config.json").exists()
    fresh = VisionTransformer(tiny.VIT)
    load_videomae(fresh, tmp_path / "theirs")
    assert_same(
        held(tmp_path / "ours"), {f"backbone.{n}": t for n, t in fresh.state_dict().items() if n != "pos_embed"}
    )
    assert {step.parts[0].name for step in plan.dropped} == {"classifier.weight", "classifier.bias"}


def test_half_of_a_fused_tensor_is_refused(tmp_path: Path) -> None:
    file = {"embeddings.patch_embeddings.projection.weight": torch.zeros(4, 3, 2, 2, 2), "fc_norm.bias": torch.zeros(4)}
    torch.save({**file, "encoder.layer.0.attention.attention.key.weight": torch.zeros(4, 4)}, tmp_path / "f.pth")
    with refused("K01", "lacks its query, key or value"):
        make_plan([read(tmp_path / "f.pth")], "hf", from_naming="videomae")


@pytest.mark.parametrize(
    "names",
    [
        {
            "blocks.0.norm1.weight": (4,),
            "blocks.0.attn.qkv.weight": (12, 4),
            "patch_embed.proj.weight": (4, 3, 2, 2),
            "head.weight": (2, 4),
        },
        {"blocks.0.att.key.weight": (4, 4), "blocks.0.ln1.weight": (4,), "head.weight": (9, 4), "emb.weight": (9, 4)},
        {
            "backbone.layer1.0.conv1.weight": (4, 3, 3, 3),
            "neck.fpn_convs.0.conv.weight": (4, 4, 3, 3),
            "rpn_head.rpn_cls.weight": (3, 4, 1, 1),
        },
        {"projection.embed.0.conv.weight": (4, 4, 3), "classifier.weight": (2, 4)},
    ],
    ids=["image ViT", "RWKV", "mmdet", "a projection of anybody"],
)
def test_other_models_are_not_taken_for_detectors(tmp_path: Path, names: dict[str, tuple[int, ...]]) -> None:
    torch.save({n: torch.zeros(shape) for n, shape in names.items()}, tmp_path / "f.pth")
    assert identify(read(tmp_path / "f.pth")).naming in (None, "hf")
    plan, _ = to(tmp_path / "f.pth", tmp_path / "out", "hf")
    assert set(held(tmp_path / "out")) == set(names) and not plan.dropped


RECIPES = ROOT / "src" / "tensorkeep" / "recipes" / "detection"


# LoRA and Swins are not read off, and the small ones have another drop path than the published ones
FULL = [p.stem for p in sorted(RECIPES.glob("*.yaml")) if not re.search("_lora|_swin|synthetic_tiny|own_small", p.stem)]


@pytest.mark.parametrize("name", FULL)
def test_the_recipe_read_off_a_full_size_model_is_the_one_it_was_built_from(name: str) -> None:
    config = read_detector_config(RECIPES / f"{name}.yaml")
    assert config.backbone is not None  # in which dtype frozen weights are held is no matter of the file
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, frozen_dtype="float32"))
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in Detector(config).state_dict().items()}
    text, assumed = read_off(shapes)
    assert from_mapping(DetectorConfig, yaml.safe_load(text)["model"], name) == config
    assert all(word in text for word in assumed)
