"""OpenTAD's whole detector, strictly loaded from our export, against ours on the same frames.

`PYTHON whole.py CHECKOUT CONFIG RECIPE FRAMES SIDE FOLDER`, by the interpreter of benchmarks/envs/backbones.txt with
`src` on PYTHONPATH: a config of OpenTAD's with our recipe of the same model, random weights, a random clip of FRAMES
frames of SIDE pixels. Prints the largest difference of logits and offsets, relative to the largest number of a level.
Packages with compiled parts that OpenTAD imports and does not call here are empty.
"""

import sys
from pathlib import Path

import record  # empties the packages below

record.EMPTY = ("torchvision", "Align1D", "boundary_max_pooling_cuda", "nms_1d_cpu")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def exported(recipe, folder):
    """Write a random detector of a recipe and its OpenTAD file; return both paths."""
    from tensorkeep.cli import main as command
    from tensorkeep.detection import Detector, read_recipe
    from tensorkeep.training.recipe import to_yaml

    torch.manual_seed(0)
    made = read_recipe(recipe)
    detector = Detector(made.model)
    record.wake(detector, 0.02)
    held = folder / "ours"
    held.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in detector.state_dict().items()}, held / "model.safetensors")
    (held / "recipe.yaml").write_text(to_yaml(made))
    assert command(["convert", str(held), str(folder / "theirs.pth"), "--to", "pth", "--naming", "opentad"]) == 0
    return held / "recipe.yaml", folder / "theirs.pth"


def main(checkout, config, recipe, frames, side, folder):
    sys.path.insert(0, checkout)
    import opentad.datasets  # noqa: F401  # registers the pipelines
    from mmengine.config import Config
    from opentad.models import build_detector

    from tensorkeep.detection import load_detector

    recipe, file = exported(recipe, Path(folder))
    cfg = Config.fromfile(config)
    cfg.model.backbone.custom.pretrain = None
    theirs = build_detector(cfg.model)
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    theirs.load_state_dict({n.removeprefix("module."): t for n, t in state.items()}, strict=True)
    ours = load_detector(file, recipe)
    clip = torch.randint(0, 256, (1, 1, 3, int(frames), int(side), int(side)), dtype=torch.uint8)
    mask = torch.ones(1, ours.config.projection.max_length, dtype=torch.bool)
    logits, offsets = [], []
    theirs.rpn_head.cls_head.register_forward_hook(lambda _m, _i, out: logits.append(out))
    for scale in theirs.rpn_head.scale:
        scale.register_forward_hook(lambda _m, _i, out: offsets.append(F.relu(out)))
    with torch.no_grad():
        theirs.eval().forward_test(clip, mask, infer_cfg=cfg.inference)
        own = ours.eval()(clip[:, 0], mask)
    print(f"{len(state)} tensors, loaded strictly")
    for name, mine, other in (("logits", own.logits, logits), ("offsets", own.offsets, offsets)):
        far = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(mine, other))
        print(f"{'PASS' if far <= 1e-5 else 'FAIL'} {name} {far:.3g} 1e-05")


if __name__ == "__main__":
    main(*sys.argv[1:])
