"""The reversible Swin: nothing of its blocks is kept, what is computed back is what was there, and runs of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorkeep import cli
from tensorkeep.detection.backbones import reversible_swin
from tensorkeep.detection.model.config import AdapterConfig, BackboneConfig, SwinConfig
from tensorkeep.detection.model.detector import build_backbone, video_features
from tensorkeep.detection.model.quantization import quantize_backbone
from tensorkeep.detection.start import open_detector
from tensorkeep.errors import TensorkeepError
from tests.detection import runs, tiny
from tests.parity import backbones as parity
from tests.tools import ROOT

SWIN = SwinConfig(channels=8, depths=(2, 2), heads=(2, 2), window=(2, 3, 3), drop_path=0.0)
FRAMES = torch.randint(0, 256, (2, 3, 8, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network(mode: str, config: SwinConfig = SWIN, **more: Any) -> Any:
    torch.manual_seed(0)
    made = build_backbone(
        BackboneConfig(kind="reversible_swin", swin=config, **{"tuning": "all", "checkpointing": mode, **more})
    )
    tiny.wake(made)
    return made.train()


def gradients(net: Any, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    video_features(net, FRAMES, 4).square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_computing_back_gives_autograds_gradients_drop_path_included(drop_path: float) -> None:
    config = replace(SWIN, drop_path=drop_path)
    wanted, found = gradients(network("none", config)), gradients(network("reversible", config))
    assert wanted.keys() == found.keys() == {n for n, _ in network("none").named_parameters()}
    for name, grad in wanted.items():
        assert torch.allclose(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max())), name


def test_what_is_kept_does_not_grow_with_depth() -> None:
    def kept(mode: str, depth: int) -> int:
        net = network(mode, replace(SWIN, depths=(depth, 2)))
        own, held = {p.untyped_storage().data_ptr() for p in net.parameters()}, dict[int, int]()

        def pack(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage()
            if place.data_ptr() not in own:
                held[place.data_ptr()] = place.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert video_features(net, FRAMES, 4).requires_grad
        return sum(held.values())

    assert kept("reversible", 8) == kept("reversible", 2)
    assert kept("none", 8) > 2 * kept("none", 2) and kept("none", 2) > 2 * kept("reversible", 2)


@pytest.mark.parametrize("casting", [False, True], ids=["float32", "autocast"])
def test_the_input_of_twelve_blocks_comes_back(casting: bool) -> None:
    """Up to rounding of float32, whatever autocast does inside of a block."""
    stage = network("reversible", replace(SWIN, depths=(12, 2))).layers[0]
    x = torch.randn(1, 4, 7, 7, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=casting):
        steps = [reversible_swin._step(block, x) for block in stage.blocks]
    with torch.no_grad():
        streams = x, x
        for step in steps:
            streams = step.forward(*streams)
    first, second = streams
    for step in reversed(steps):
        _, second = reversible_swin._back(step, 1, first, second, torch.zeros_like(x), torch.zeros_like(x), {})
        _, first = reversible_swin._back(step, 0, second, first, torch.zeros_like(x), torch.zeros_like(x), {})
    scale = float(torch.stack(streams).abs().max())
    # the kernels with and without gradients round differently in bfloat16
    assert max(float((first - x).abs().max()), float((second - x).abs().max())) < (0.05 if casting else 1e-5) * scale


def test_norms_can_be_left_as_they_are() -> None:
    found = gradients(network("reversible", freeze_norms=True))
    everything = {n for n, _ in network("none").named_parameters()}
    assert everything - found.keys() == {n for n in everything if "norm" in n}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpointing": "segments"}, "segments is a ViT's"),
        ({"adapter": AdapterConfig()}, "adapters and low-rank updates are for ViTs"),
        ({"vit": tiny.VIT}, "needs swin and no vit"),
        ({"kind": "videomae"}, "needs vit and no swin"),
    ],
)
def test_what_belongs_to_a_vit_is_refused(change: dict[str, Any], said: str) -> None:
    fields = {"kind": "reversible_swin", "swin": SWIN, "checkpointing": "reversible", **change}
    with pytest.raises(TensorkeepError, match=said):
        BackboneConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(TensorkeepError, match="not reversible"):
        BackboneConfig(tiny.VIT, checkpointing="reversible")
    with pytest.raises(TensorkeepError, match="are not quantized"):
        quantize_backbone(network("none"))


def test_a_run_goes_on_and_becomes_opentads_file_name_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = runs.dataset(tmp_path / "data", videos=2, held_out=1)
    swin = {"channels": 8, "depths": [2, 2], "heads": [2, 2], "window": [2, 3, 3], "drop_path": 0.1}
    backbone = {"kind": "reversible_swin", "swin": swin, "tuning": "all", "output_length": 16, "freeze_norms": True}
    made = runs.recipe(
        data,
        model__backbone={**backbone, "checkpointing": "reversible"},
        model__projection__in_channels=16,
        optimizer__groups=[{"pattern": "^backbone.*", "lr": 1e-3, "weight_decay": 0.05}],
        training__epochs=2,
        training__evaluate_every=99,
    )
    runs.trained(made, tmp_path / "run")
    runs.killed(made, tmp_path / "again", at=2)
    runs.trained(made, tmp_path / "again")
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1].name
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (tmp_path / run / "checkpoints" / last / name for run in ("run", "again"))
        assert one.read_bytes() == other.read_bytes(), name

    words = ["convert", tmp_path / "run", tmp_path / "out.pth", "--to", "pth", "--naming", "opentad"]
    assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
    state = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    prefix = "module.backbone.model.backbone."
    theirs = parity.recorded(ROOT / "tests/data/backbones/re2tal.safetensors").under("weights/")
    assert {n.removeprefix(prefix) for n in state if n.startswith(prefix)} == theirs.keys()
    (tmp_path / "recipe.yaml").write_text((tmp_path / "run" / "recipe.yaml").read_text())
    back = open_detector(tmp_path / "out.pth", tmp_path / "recipe.yaml", ema=False).detector.state_dict()
    ours = open_detector(tmp_path / "run", ema=False, best=False).detector.state_dict()
    assert ours.keys() == back.keys() and all(torch.equal(tensor, back[name]) for name, tensor in ours.items())
    words = ["convert", tmp_path / "run", tmp_path / "hf", "--to", "hf"]
    assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
