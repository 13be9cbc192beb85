"""Runs in OpenTAD's environment: `probe.py CONFIG CHECKPOINT`.

OpenTAD's detector around our backbone against our own detector, both with the saved average, on every test window: the
largest difference of logits and offsets as JSON.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

import torch
import torch.nn.functional as F
from mmengine.config import Config
from opentad.datasets import build_dataloader, build_dataset
from opentad.models import build_detector

from tensorkeep.conversion.naming import opentad
from tensorkeep.detection.model.config import AdapterConfig
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.quantization import quantize_adapters
from tensorkeep.detection.opentad._model_section import detector_config


def main(config, checkpoint):
    cfg = Config.fromfile(config)
    inner = cfg.model.backbone.backbone
    theirs = build_detector(cfg.model)
    state = torch.load(checkpoint)["state_dict_ema"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    theirs.load_state_dict(state)
    section = Config.fromfile(config).model.to_dict()
    section["backbone"]["backbone"]["type"] = "VisionTransformerAdapter"
    built = detector_config(section)
    adapter = AdapterConfig("qlora", blocks=tuple(inner.adapter_index), lora_r=inner.lora_r)
    ours = Detector(replace(built, backbone=replace(built.backbone, adapter=adapter)))
    quantize_adapters(ours.backbone)
    ours.load_state_dict({opentad.to_hf(name): tensor for name, tensor in state.items()})
    logits, offsets = [], []
    theirs.rpn_head.cls_head.register_forward_hook(lambda m, i, out: logits.append(out))
    for scale in theirs.rpn_head.scale:
        scale.register_forward_hook(lambda m, i, out: offsets.append(F.relu(out)))
    worst, windows = {"logits": 0.0, "offsets": 0.0}, 0
    loader = build_dataloader(build_dataset(cfg.dataset.test), 1, 0, 1)
    with torch.no_grad():
        for data in loader:
            logits.clear(), offsets.clear()
            theirs.eval().forward_test(data["inputs"], data["masks"], infer_cfg=cfg.inference)
            own = ours.eval()(data["inputs"][:, 0], data["masks"])
            for key, mine, other in (("logits", own.logits, logits), ("offsets", own.offsets, offsets)):
                assert len(mine) == len(other) == 3
                worst[key] = max(worst[key], *(float((a - b).abs().max()) for a, b in zip(mine, other)))
            windows += 1
    print("PROBE", json.dumps({**worst, "windows": windows, "spread": float(own.logits[0].std())}))


main(*sys.argv[1:])
