"""Kinds of video networks under a detector: what their authors' code computes, frozen, quantized, adapted, resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tensorkeep import cli
from tensorkeep.conversion.naming import identify
from tensorkeep.detection.model.adapters import LoRALinear, cast_frozen
from tensorkeep.detection.model.config import AdapterConfig, BackboneConfig, LoraConfig, VitConfig
from tensorkeep.detection.model.detector import build_backbone, count_parameters, video_features
from tensorkeep.detection.model.quantization import quantize_backbone
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.detection.model.weights import load_backbone
from tensorkeep.detection.start import load_detector, open_detector
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.quantization.linear import QuantLinear
from tests.detection import runs, tiny
from tests.parity import backbones as parity
from tests.tools import ROOT

RECORDED = sorted((ROOT / "tests/data/backbones").glob("*.safetensors"))
SHAPES = {
    "videomae": tiny.VIT,
    "vjepa2": replace(tiny.VIT, embed_dim=40, heads=2),  # heads of 20: 6 channels an axis, 2 stay
    "internvideo2": replace(tiny.VIT, patch_size=14, image_size=28, tubelet=1),
}
KINDS = tuple(SHAPES)


def backbone(kind: str, checkpointing: str = "none", **more: Any) -> VisionTransformer:
    """A small backbone of a kind, every parameter off its start."""
    torch.manual_seed(0)
    more = {"adapter": AdapterConfig(), **more}
    made = build_backbone(BackboneConfig(SHAPES[kind], kind=kind, checkpointing=checkpointing, **more))  # type: ignore[arg-type]
    tiny.wake(made)
    return made


def gradients(vit: VisionTransformer) -> dict[str, Tensor]:
    vit.train().zero_grad()
    video_features(vit, tiny.batch()[0], 8).square().sum().backward()
    return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_the_authors_code_computed_comes_out_again(path: Path) -> None:
    found = list(parity.cases([path]))
    assert len(found) >= 2
    assert [case for case in found if not case[1] <= case[2]] == []


def test_v_jepa_2_is_transformers_class_with_the_same_adapters() -> None:
    pytest.importorskip("transformers")
    found = list(parity.vjepa2_cases())
    assert len(found) == 2 + 3 * len(parity.MODES)
    assert [case for case in found if not case[1] <= case[2]] == []


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("tuning", ["adapter", "all"])
def test_every_way_to_recompute_gives_the_same_gradients(kind: str, tuning: str) -> None:
    wanted = gradients(backbone(kind, tuning=tuning, lora=LoraConfig(lora_r=2)))
    trains = {
        n for n, p in backbone(kind, tuning=tuning, lora=LoraConfig(lora_r=2)).named_parameters() if p.requires_grad
    }
    assert wanted.keys() == trains
    for mode in parity.MODES[1:]:
        found = gradients(backbone(kind, mode, tuning=tuning, lora=LoraConfig(lora_r=2)))
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert torch.allclose(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), (mode, name)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_codes_stand_for_the_weights_they_were_made_of_and_stay_frozen(kind: str) -> None:
    vit = backbone(kind, "segments", lora=LoraConfig(lora_r=2))
    plain = backbone(kind, "segments", lora=LoraConfig(lora_r=2))
    assert quantize_backbone(vit, "nf4") == 8
    holders = [m for m in vit.modules() if isinstance(m, LoRALinear)]
    assert len(holders) == 8 and all(isinstance(h.base, QuantLinear) for h in holders)
    dense = [m for m in plain.modules() if isinstance(m, LoRALinear)]
    with torch.no_grad():
        for ours, theirs in zip(holders, dense):
            assert isinstance(ours.base, QuantLinear)
            theirs.base.weight.copy_(ours.base.dequantize())
    wanted, found = gradients(plain), gradients(vit)
    assert found.keys() == wanted.keys() and not any(".base." in name for name in found)
    for name, grad in wanted.items():
        assert torch.allclose(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max())), name


def test_the_rotary_positions_transpose_is_what_autograd_finds() -> None:
    from tensorkeep.detection.backbones.vjepa2 import turn_of

    turn = turn_of((2, 3, 2), 20, torch.device("cpu"), torch.float64)
    x, grad = torch.randn(2, 2, 3, 12, 20, dtype=torch.float64)
    x.requires_grad_()
    (turn(x) * grad).sum().backward()
    assert x.grad is not None and torch.allclose(turn.back(grad), x.grad, atol=1e-12)
    assert torch.equal(turn(x)[..., 18:], x[..., 18:])  # what is left over of a third for each axis
    assert torch.allclose(turn(x)[:, :, 0], x[:, :, 0])  # the first token does not turn


def test_a_class_token_is_never_adapted() -> None:
    vit = backbone("internvideo2").eval()
    block = vit.blocks[0]
    shape = parity.VideoShape(1, 4, 2, 2)
    x = torch.randn(2, 17, 32)
    out = block.adapt(x, shape)  # type: ignore[operator]
    assert torch.equal(out[:, 0], x[:, 0]) and not torch.allclose(out[:, 1:], x[:, 1:])
    added = block.branch(shape)  # type: ignore[operator]
    assert torch.allclose(x + added(x), out, atol=1e-6)


def test_a_ladder_keeps_nothing_of_the_blocks() -> None:
    """Bytes kept for the backward: with a ladder they do not grow with blocks that it does not read."""

    def kept(depth: int, adapter: AdapterConfig) -> int:
        torch.manual_seed(0)
        shape = replace(tiny.VIT, depth=depth)
        vit = build_backbone(BackboneConfig(shape, adapter, checkpointing="none")).train()
        own, held = {p.untyped_storage().data_ptr() for p in vit.parameters()}, dict[int, int]()

        def pack(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage()
            if place.data_ptr() not in own:
                held[place.data_ptr()] = place.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = video_features(vit, tiny.batch()[0], 8)
        assert out.requires_grad
        return sum(held.values())

    ladder = [kept(depth, AdapterConfig("ladder", blocks=(depth - 1,))) for depth in (2, 6)]
    inside = [kept(depth, AdapterConfig("tia", blocks=(0,))) for depth in (2, 6)]
    assert ladder[1] == ladder[0] and inside[1] > 2 * inside[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"lora": LoraConfig()}, "low-rank updates"), ({"tuning": "all"}, "tuning: all")],
)
def test_a_ladder_beside_what_it_cannot_train_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(TensorkeepError, match=re.escape(said)):
        BackboneConfig(tiny.VIT, AdapterConfig("ladder"), **change)


def test_positions_of_another_number_of_frames_are_resized_in_time() -> None:
    was = parity.recorded(ROOT / "tests/data/backbones/internvideo2.safetensors")
    weights, shape = was.under("weights/"), parity.vit_config(was.shape)  # four frames of four places
    longer = build_backbone(BackboneConfig(replace(shape, chunk_frames=8), kind="internvideo2"))
    load_backbone(longer, weights)
    stored, made = weights["pos_embed"], longer.pos_embed.detach()
    assert torch.equal(made[:, 0], stored[:, 0])  # the class token's
    wanted = [nn.functional.interpolate(stored[0, 1 + at :: 4].T[None], 8, mode="linear")[0].T for at in range(4)]
    assert torch.allclose(made[0, 1:].view(8, 4, -1), torch.stack(wanted, 1))
    assert torch.allclose(made[0, 1:5], stored[0, 1:5])  # the ends stay
    with torch.device("meta"):
        blank = build_backbone(BackboneConfig(replace(shape, chunk_frames=8), kind="internvideo2"))
    load_backbone(blank, {name: tensor.to("meta") for name, tensor in weights.items()})


def test_a_config_beside_the_weights_is_held_against_the_recipe(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_vjepa2(transformers)
    model.save_pretrained(tmp_path / "model")
    wrong = build_backbone(BackboneConfig(replace(VJEPA2, heads=4), kind="vjepa2"))
    with pytest.raises(TensorkeepError, match="heads 2, the recipe 4"):
        load_backbone(wrong, tmp_path / "model")
    load_backbone(build_backbone(BackboneConfig(VJEPA2, kind="vjepa2")), tmp_path / "model")
    with pytest.raises(TensorkeepError, match=r"another kind of backbone is named by model\.backbone\.kind"):
        load_backbone(build_backbone(BackboneConfig(VJEPA2)), tmp_path / "model")


def test_an_internvideo2_file_is_nobody_elses(tmp_path: Path) -> None:
    weights = parity.recorded(ROOT / "tests/data/backbones/internvideo2.safetensors").under("weights/")
    shape = parity.vit_config(parity.recorded(ROOT / "tests/data/backbones/internvideo2.safetensors").shape)
    for root in ("module", "model"):
        torch.save({root: weights, "epoch": 3}, tmp_path / "f.pth")
        assert identify(read(tmp_path / "f.pth")).naming in (None, "hf")  # `convert` keeps its names
        sink = build_backbone(BackboneConfig(shape, kind="internvideo2"))
        left = load_backbone(sink, tmp_path / "f.pth")
        assert left and all(name.startswith(("clip_projector.", "fc_norm.", "head.")) for name in left)
        assert torch.equal(sink.state_dict()["blocks.1.ls2.gamma"], weights["blocks.1.ls2.gamma"])


def test_metas_own_names_load_as_transformers_do() -> None:
    transformers = pytest.importorskip("transformers")
    state = small_vjepa2(transformers).state_dict()
    ours, theirs = (build_backbone(BackboneConfig(VJEPA2, kind="vjepa2")) for _ in range(2))
    load_backbone(ours, state)
    meta = {f"encoder.module.backbone.{name}": tensor for name, tensor in ours.state_dict().items()}
    meta |= {"predictor.module.backbone.predictor_norm.weight": torch.zeros(1), "target_encoder.x": torch.zeros(1)}
    left = load_backbone(theirs, meta)
    assert sorted(left) == ["predictor.module.backbone.predictor_norm.weight", "target_encoder.x"]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


# -- runs -------------------------------------------------------------------------------------------------------------

VJEPA2 = VitConfig(32, 16, 32, 2, 2, 64, 8, 2, 0.0)
WORDS = {"kind": "vjepa2", "checkpointing": "segments"}
LADDER = {"kind": "ladder", "ratio": 0.25, "blocks": [1]}


def small_vjepa2(transformers: Any) -> Any:
    """transformers' model of the shape of the runs' ViT."""
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        crop_size=32,
        frames_per_clip=8,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    model = transformers.VJEPA2Model(config)
    parity.wake(model)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small videos."""
    folder = tmp_path_factory.mktemp("backbones")
    runs.dataset(folder / "data", videos=2, held_out=1)
    return folder


@pytest.fixture(scope="module")
def run_of(place: Path) -> Callable[[str], Path]:
    """Trains a run of a kind once; V-JEPA 2 over transformers' folder in 4 bits."""
    short = {"training__epochs": 2, "training__ema": 0.5, "training__evaluate_every": 99}

    @cache
    def trained(kind: str) -> Path:
        runs.trained(recipe(kind, place, **short), place / kind)
        return place / kind

    return trained


def recipe(kind: str, place: Path, **changes: Any) -> Any:
    if kind == "ladder":
        groups = [{"pattern": "adapters", "lr": 2e-3, "weight_decay": 0.05}]
        own: dict[str, Any] = {
            "model__backbone__adapter": LADDER,
            "optimizer__groups": groups,
            "model__backbone__vit__chunk_frames": 16,
        }
    elif kind == "internvideo2":
        own = {"model__backbone__kind": kind, "model__backbone__vit__tubelet": 1}
    else:
        transformers = pytest.importorskip("transformers")
        if not (place / "vjepa2_model").exists():
            small_vjepa2(transformers).save_pretrained(place / "vjepa2_model")
        own = {f"model__backbone__{name}": value for name, value in WORDS.items()}
        own |= {"training__pretrained": str(place / "vjepa2_model"), "training__quantize_backbone": "nf4"}
    return runs.recipe(place / "data", **{**own, **changes})


@pytest.mark.parametrize("kind", ["vjepa2", "internvideo2", "ladder"])
def test_a_run_goes_on_bit_for_bit_and_leaves_whole_as_hf(
    run_of: Callable[[str], Path], place: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(kind)
    made = recipe(kind, place, training__epochs=2, training__ema=0.5, training__evaluate_every=99)
    runs.killed(made, tmp_path / "again", at=2)
    runs.trained(made, tmp_path / "again")
    last = sorted((run / "checkpoints").glob("step-*"))[-1].name
    for name in ("adapter.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (place_ / "checkpoints" / last / name for place_ in (run, tmp_path / "again"))
        assert one.read_bytes() == other.read_bytes(), name
    assert cli.main(["convert", str(run), str(tmp_path / "out"), "--to", "hf"]) == 0, capsys.readouterr().err
    ours, theirs = open_detector(run, ema=False, best=False).detector, load_detector(tmp_path / "out")
    frames, mask = torch.randint(0, 256, (1, 3, 16, 32, 32), dtype=torch.uint8), torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        for a, b in zip(ours(frames, mask).logits, theirs(frames, mask).logits):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_ladders_run_becomes_opentads_file_name_by_name(
    run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("ladder")
    words = ["convert", run, tmp_path / "out.pth", "--to", "pth", "--naming", "opentad"]
    assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
    file = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    prefix = "module.backbone.model.backbone."
    names = {n.removeprefix(prefix) for n in file if n.startswith(prefix)}
    theirs = parity.recorded(ROOT / "tests/data/backbones/ladder.safetensors").under("weights/")
    wanted = {n for n in theirs if "blocks.2." not in n and "ladders.adapters.1." not in n}  # it has a block more
    assert names == wanted
    again = load_detector(tmp_path / "out.pth")  # its recipe is read off the shapes
    assert again.config.backbone is not None
    assert again.config.backbone.adapter == AdapterConfig("ladder", 0.25, (1,))
    back = open_detector(tmp_path / "out.pth", run / "recipe.yaml", ema=False).detector
    ours = open_detector(run, ema=False, best=False).detector
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values()))
    assert count_parameters(ours)["adapter"].trainable == count_parameters(ours)["adapter"].total > 0


def test_opentad_gets_no_v_jepa_2(
    run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", run_of("vjepa2"), tmp_path / "out.pth", "--to", "pth", "--naming", "opentad"]
    assert cli.main([str(word) for word in words]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "K07" in shown and "has no such backbone" in shown


def test_features_are_the_pretrained_backbones(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorkeep.training.recipe import to_yaml

    made = recipe("vjepa2", place, training__quantize_backbone=None)
    (tmp_path / "recipe.yaml").write_text(to_yaml(made), encoding="utf-8")
    film = next(iter(sorted((place / "data" / "videos").iterdir())))
    code = cli.main(["features", str(tmp_path / "recipe.yaml"), str(film), "-o", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    rows = np.load(tmp_path / "out" / f"{film.stem}.npy")
    assert rows.shape[1] == 32 and np.isfinite(rows).all() and rows.std() > 0.1


def test_check_tells_of_random_and_of_unfit_weights(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorkeep.training.recipe import to_yaml

    def checked(made: Any) -> tuple[int, Any, str]:
        (tmp_path / "recipe.yaml").write_text(to_yaml(made), encoding="utf-8")
        code = cli.main(["check", "detection", str(tmp_path / "recipe.yaml"), "--json"])
        shown = capsys.readouterr()
        return code, json.loads(shown.out)["weights"], " ".join(shown.err.split())

    code, weights, note = checked(recipe("internvideo2", place))
    assert weights is None and "RANDOM weights" in note and "internvideo2" in note
    assert checked(recipe("vjepa2", place))[1:] == (None, "")
    code, weights, _ = checked(recipe("vjepa2", place, model__backbone__vit__heads=4))
    assert code == 1 and "heads 2, the recipe 4" in weights
    code, weights, _ = checked(recipe("vjepa2", place, training__pretrained=str(tmp_path / "none.pth")))
    assert code == 1 and "none.pth" in weights
    code, weights, _ = checked(recipe("vjepa2", place, model__backbone__kind="videomae"))
    assert code == 1 and "unknown tensor" in weights


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_backbone_held_in_bfloat16_trains_its_adapters_nearly_the_same_way(kind: str) -> None:
    wanted = gradients(backbone(kind, "segments"))
    vit = backbone(kind, "segments")
    cast_frozen(vit, torch.bfloat16)
    found = gradients(vit)
    assert found.keys() == wanted.keys() and all(grad.dtype == torch.float32 for grad in found.values())
    ours, theirs = (torch.cat([side[name].flatten() for name in wanted]) for side in (found, wanted))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
