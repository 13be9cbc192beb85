"""What the backward of a backbone keeps, on a CPU: bytes of the tensors that autograd saves in one forward.

    python -m benchmarks.backbone_memory                 recipes of S, its side-tuning and the reversible Swin
    python -m benchmarks.backbone_memory --frames 32 RECIPE...

Frames are random; weights are random too, which changes no size. A row for each recipe and way of checkpointing: MiB
kept, weights left out, and MiB for each block of the network.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from tensorkeep.detection.model.detector import build_backbone, read_detector_config, video_features

RECIPES = ("adatad_thumos_videomae_s", "adatad_thumos_videomae_s_side", "re2tal_thumos_swin_tiny")


def kept(recipe: str, mode: str, frames: int, side: int) -> tuple[int, int]:
    """Bytes that autograd keeps beside weights, and the number of blocks."""
    config = read_detector_config(recipe).backbone
    assert config is not None
    net = build_backbone(replace(config, checkpointing=mode)).train()  # type: ignore[arg-type]
    own, held = {p.untyped_storage().data_ptr() for p in net.parameters()}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            held[place.data_ptr()] = place.nbytes()
        return tensor

    pixels = torch.randint(0, 256, (1, 3, frames, side, side), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = video_features(net, pixels, config.output_length)
    assert features.requires_grad
    return sum(held.values()), len(net.parts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--side", type=int, default=160)
    args = parser.parse_args()
    print(f"{args.frames} frames of {args.side} x {args.side}, one video, float32")
    for recipe in args.recipes:
        for mode in ("none", "reversible" if "_swin" in recipe else "segments"):
            size, blocks = kept(recipe, mode, args.frames, args.side)
            mib = size / 2**20
            print(f"{recipe:36} {mode:11} {mib:8.1f} MiB {mib / blocks:7.1f} a block", flush=True)


if __name__ == "__main__":
    main()
