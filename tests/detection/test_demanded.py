"""`training.pretrained: FILE@IDENTITY`: a detector starts from the weights that are demanded, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

pytest.importorskip("av")

from tensorkeep import identify
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.start import make_detector
from tests.helpers import refused

from . import runs


def test_pretrained_weights_can_be_demanded_by_identity(tmp_path: Path) -> None:
    data = runs.dataset(tmp_path / "data", videos=2, held_out=1)
    model = runs.recipe(data).model
    backbone = Detector(replace(model, backbone=replace(model.backbone, adapter=None, tuning="all"))).backbone
    state = {f"backbone.{name}": tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    file = tmp_path / "vit.safetensors"
    save_file(state, file)
    wanted = identify(file).identity
    detector, base = make_detector(runs.recipe(data, training__pretrained=f"{file}@{wanted}"), None)
    assert base is not None and base["path"] == str(file)
    plain, _ = make_detector(runs.recipe(data, training__pretrained=str(file)), None)
    assert all(bool((a == b).all()) for a, b in zip(detector.parameters(), plain.parameters(), strict=True))
    state["backbone.blocks.0.norm1.weight"] += 1
    save_file(state, file)
    with refused("F03", "is not the model that is demanded"):
        make_detector(runs.recipe(data, training__pretrained=f"{file}@{wanted}"), None)
    with refused("F07", "64 lower-case hex digits"):
        make_detector(runs.recipe(data, training__pretrained=f"{file}@{wanted[:-1]}"), None)
