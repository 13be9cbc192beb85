"""One training step of AdaTAD, ours, beside what OpenTAD was measured at on an H200.

    python -m benchmarks.detection_step                        every size, on the GPU
    python -m benchmarks.detection_step --sizes s --deterministic
    python -m benchmarks.detection_step --tiny                 a check of the script, on any machine

A step is forward, loss, backward, gradient clipping, AdamW and EMA on 768 frames of 160 x 160 a video, random data,
frozen weights in bfloat16, trainable ones in float32, recorded once as a CUDA graph and replayed (`--eager`: launched
one by one); the peak includes the recording. The figures of the original (fp16, activation checkpointing, same batch)
are constants: it needs its own environment. Prints a row a size: seconds, peak GiB, both ratios, and the first three
losses, with `--reference` beside those of the same steps in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensorkeep.detection.config import read_section
from tensorkeep.detection.detector import BackboneConfig, Detector, DetectorConfig, build_detector, read_detector_config
from tensorkeep.detection.graphs import capture_step, make_capturable
from tensorkeep.detection.groups import OptimizerConfig, make_optimizer
from tensorkeep.ema import Ema

RECIPES = Path(__file__).parents[1] / "recipes" / "detection"


@dataclass(frozen=True)
class Original:
    """What OpenTAD needed on an H200: videos in a batch, seconds, GiB."""

    batch: int
    seconds: float
    gib: float


ORIGINAL = {
    "s": Original(2, 0.167, 3.57),
    "b": Original(2, 0.283, 6.80),
    "l": Original(2, 0.693, 13.9),
    "v2_g": Original(1, 1.145, 21.95),
}


def shrink(config: DetectorConfig) -> DetectorConfig:
    """A model of the same form that takes a second on a CPU."""
    assert config.backbone is not None
    vit = replace(config.backbone.vit, embed_dim=32, depth=2, heads=2, mlp_dim=64, image_size=32)
    backbone = replace(config.backbone, vit=vit, output_length=64)
    projection = replace(config.projection, in_channels=32, channels=32, max_length=64)
    return DetectorConfig(projection, replace(config.head, channels=32), backbone)


def make_batch(config: DetectorConfig, batch: int, frames: int, side: int, device: torch.device) -> tuple[object, ...]:
    """Random frames `[B, 3, T, H, W]` uint8, a full mask, six segments a video."""
    assert config.backbone is not None
    generator = torch.Generator().manual_seed(0)
    length = config.backbone.output_length
    pixels = torch.randint(0, 256, (batch, 3, frames, side, side), dtype=torch.uint8, generator=generator)
    starts = torch.rand(batch, 6, generator=generator) * length * 0.8
    lengths = 2 + torch.rand(batch, 6, generator=generator) * length * 0.15
    segments = torch.stack([starts, starts + lengths], -1)
    labels = torch.randint(0, config.head.classes, (batch, 6), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.bool)
    moved = (pixels.to(device), mask.to(device), list(segments.to(device)), list(labels.to(device)))
    return moved


def make_step(detector: Detector, optimizer: torch.optim.Optimizer, ema: Ema, batch: tuple, half: bool):  # type: ignore[no-untyped-def, type-arg]
    frames, mask, segments, labels = batch
    trainable = [p for p in detector.parameters() if p.requires_grad]

    def step() -> torch.Tensor:
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=half):
            predictions = detector(frames, mask)
        loss = detector.loss(predictions, segments, labels).cost
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(detector)
        return loss.detach()

    return step


def configure(size: str, args: argparse.Namespace, half: bool) -> DetectorConfig:
    config = read_detector_config(RECIPES / f"adatad_thumos_videomae_{size}.yaml")
    config = shrink(config) if args.tiny else config
    assert config.backbone is not None
    changes = {"checkpointing": args.checkpointing, "frozen_dtype": "bfloat16" if half else "float32"}
    return replace(config, backbone=BackboneConfig(**{**vars(config.backbone), **changes}))


def measure(size: str, args: argparse.Namespace, half: bool) -> dict[str, Any]:
    device = torch.device(args.device)
    config = configure(size, args, half)
    torch.manual_seed(0)
    detector = build_detector(config, device).train()
    options = read_section(RECIPES / f"adatad_thumos_videomae_{size}.yaml", "optimizer", OptimizerConfig)
    batch_size = 1 if args.tiny else ORIGINAL[size].batch
    frames, side = (64, 32) if args.tiny else (768, 160)
    batch = make_batch(config, batch_size, frames, side, device)
    optimizer = make_optimizer(detector, options)
    recorded = device.type == "cuda" and half and not args.eager
    if recorded:
        make_capturable(optimizer)
    step = make_step(detector, optimizer, Ema(detector), batch, half)
    losses = [float(step()) for _ in range(3)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if recorded:
        step = capture_step(step, warmup=1)
    seconds = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"size": size, "seconds": statistics.median(seconds), "gib": peak, "losses": losses}


def numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def report(row: dict[str, Any], args: argparse.Namespace) -> str:
    size, seconds, gib = str(row["size"]), float(row["seconds"]), float(row["gib"])
    line = f"{size:5} {seconds:7.3f} s {gib:6.2f} GiB  loss {numbers(row['losses'])}"
    if not args.tiny and args.device == "cuda":
        peer = ORIGINAL[size]
        line += f"   OpenTAD {peer.seconds:.3f} s {peer.gib:.2f} GiB:"
        line += f" {peer.seconds / seconds:.2f} x its speed, {gib / peer.gib:.0%} of its memory"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(ORIGINAL), choices=list(ORIGINAL))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", default="segments", choices=["none", "blocks", "attention", "segments"])
    parser.add_argument("--eager", action="store_true", help="launch every kernel instead of replaying a CUDA graph")
    parser.add_argument("--deterministic", action="store_true", help="refuse operations without a deterministic form")
    parser.add_argument("--reference", action="store_true", help="also the first losses of the same steps in float32")
    parser.add_argument("--tiny", action="store_true", help="a small model and clip, to check this script")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(args.deterministic)
    for size in args.sizes[:1] if args.tiny else args.sizes:
        row = measure(size, args, half=True)
        if args.reference:
            row["float32_losses"] = measure(size, args, half=False)["losses"]
        print(json.dumps(row) if args.json else report(row, args), flush=True)
        if args.reference and not args.json:
            print(f"      the same step in float32: loss {numbers(row['float32_losses'])}", flush=True)


if __name__ == "__main__":
    main()
