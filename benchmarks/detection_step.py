"""One training step of AdaTAD, ours, beside what OpenTAD was measured at on an H200.

    python -m benchmarks.detection_step                        every size, on the GPU
    python -m benchmarks.detection_step --quantize nf4 --checkpointing segments two_level offload
    python -m benchmarks.detection_step --sizes v2_g --quantize nf4 --checkpointing offload --limit-gib 6
    python -m benchmarks.detection_step --sizes s b l v2_g --quantize none nf4 --compute bf16 fp8
    python -m benchmarks.detection_step --sizes s --deterministic
    python -m benchmarks.detection_step --sizes s b v2_g --detectors actionformer tridet temporalmaxer causaltad
    python -m benchmarks.detection_step --tiny                 a check of the script, on any machine

A step is forward, loss, backward, gradient clipping, AdamW and EMA on 768 frames of 160 x 160 a video, random data,
frozen weights in bfloat16 or (`--quantize`) codes, their products in bfloat16 or (`--compute fp8`) float8, trainable
ones in float32 (adapters, with `--lora` low-rank updates of every backbone linear too), recorded once as a CUDA graph
and replayed (`--eager`: launched one by one). The peaks are torch's, recording included: what tensors took, and what
the allocator held (on a small card set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, and the second comes within a
tenth of the first). `--train` runs as many steps on the one batch and prints losses on the way. The figures of the
original (fp16, activation checkpointing, same batch) are constants: it needs its own environment. Prints a row a size
and way of checkpointing: seconds, peak GiB, both ratios, and the first three losses, with `--reference` beside those of
the same steps in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch

from tensorkeep.detection.model import kinds
from tensorkeep.detection.model.config import BackboneConfig, Checkpointing, DetectorConfig, LoraConfig
from tensorkeep.detection.model.detector import Detector, build_detector, read_detector_config
from tensorkeep.detection.model.groups import OptimizerConfig, make_optimizer
from tensorkeep.detection.model.quantization import compute_in_float8, quantize_backbone
from tensorkeep.training._graphs import capture_step
from tensorkeep.training.ema import Ema
from tensorkeep.training.recipe import plain, read_section
from tensorkeep.training.schema import from_mapping
from tensorkeep.training.sections import GroupRule


@dataclass(frozen=True)
class Original:
    """What OpenTAD needed on an H200: videos in a batch, seconds, GiB."""

    batch: int
    seconds: float
    gib: float


BATCH = {"s": 2, "b": 2, "l": 2, "h": 2, "v2_g": 1}
ORIGINAL = {  # H was not measured
    "s": Original(2, 0.167, 3.57),
    "b": Original(2, 0.283, 6.80),
    "l": Original(2, 0.693, 13.9),
    "v2_g": Original(1, 1.145, 21.95),
}


# what the detectors' projections have beside the widths and depths that all share; heads as in their recipes
PROJECTIONS: dict[str, dict[str, Any]] = {
    "tridet": {"stem_layers": 2, "mlp_dim": 768, "windows": [1], "wide": 5.0},
    "temporalmaxer": {},
    "causaltad": {"stem_layers": 2, "heads": 4, "drop_path": 0.1},
}


def with_kind(config: DetectorConfig, kind: str) -> DetectorConfig:
    """Another detector on the same backbone."""
    if kind == config.kind:
        return config
    document: dict[str, Any] = plain(config)
    projection = document["projection"]
    kept = ("in_channels", "channels", "embed_layers", "branch_layers", "max_length")
    document |= {"kind": kind, "projection": {key: projection[key] for key in kept} | PROJECTIONS[kind]}
    made: DetectorConfig = from_mapping(DetectorConfig, document, "model")
    return made


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


def configure(size: str, mode: str, args: argparse.Namespace, half: bool) -> DetectorConfig:
    config = read_detector_config(f"adatad_thumos_videomae_{size}")
    config = shrink(config) if args.tiny else config
    assert config.backbone is not None
    changes: dict[str, Any] = {"checkpointing": mode, "frozen_dtype": "bfloat16" if half else "float32"}
    if args.lora:
        changes["lora"] = LoraConfig(lora_r=16, lora_alpha=32)
    if not args.tiny:
        changes["output_length"] = args.frames
        config = replace(config, projection=replace(config.projection, max_length=args.frames))
    return replace(config, backbone=BackboneConfig(**{**vars(config.backbone), **changes}))


def build(
    size: str, mode: str, kind: str, args: argparse.Namespace, half: bool, backbone: Any = None
) -> tuple[Detector, torch.optim.Optimizer]:
    """A detector and its optimizer; `backbone`: one that was made for another kind of detector."""
    config = with_kind(configure(size, mode, args, half), kind)
    detector = build_detector(config if backbone is None else replace(config, backbone=None), args.device).train()
    if backbone is not None:
        detector.backbone, detector.config = backbone, config
    elif args.quantize is not None:
        assert detector.backbone is not None
        quantize_backbone(detector.backbone, args.quantize)
    if args.compute == "fp8" and half and backbone is None:
        assert detector.backbone is not None
        compute_in_float8(detector.backbone)
    options = read_section(f"adatad_thumos_videomae_{size}", "optimizer", OptimizerConfig)
    options = replace(options, groups=(GroupRule("^backbone", 1e-4, 0.05),)) if args.lora else options
    return detector, make_optimizer(detector, options)


def hold_at_most(gib: float | None) -> None:
    if torch.cuda.is_available():
        whole = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * 2**30 / whole)


def timed(step: Any, steps: int, cuda: bool) -> list[float]:
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure(
    size: str, mode: str, args: argparse.Namespace, half: bool, kind: str = "actionformer", backbone: Any = None
) -> tuple[dict[str, Any], Any]:
    """One row of the table, and the backbone, for the next detector."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    hold_at_most(None)  # dense weights are made before they are packed: the limit is the step's
    detector, optimizer = build(size, mode, kind, args, half, backbone)
    count = 1 if args.tiny else args.batch or BATCH[size]
    frames, side = (64, 32) if args.tiny else (args.frames, args.side)
    batch = make_batch(detector.config, count, frames, side, device)
    recorded = cuda and half and not args.eager
    if recorded:
        for group in optimizer.param_groups:
            group |= {"capturable": True, "lr": torch.tensor(group["lr"], device=device)}
    if cuda:  # building and packing may take more than a step
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        hold_at_most(args.limit_gib)
    step = make_step(detector, optimizer, Ema(detector), batch, half)
    row: dict[str, Any] = {"size": size, "kind": kind, "checkpointing": mode, "batch": count}
    row |= {"frames": frames, "side": side}
    row["losses"] = [float(step()) for _ in range(3)]
    if recorded:
        torch.cuda.empty_cache()  # the graph has a pool of its own
        torch.cuda.reset_peak_memory_stats()
        step = capture_step(step, warmup=1)
    row["seconds"] = statistics.median(timed(step, args.steps, cuda))
    if args.train:
        losses = [float(step()) for _ in range(args.train)]
        row |= {"finite": all(map(math.isfinite, losses)), "trained": losses[:: max(1, args.train // 20)]}
        row["last"] = statistics.fmean(losses[-10:])
    trainable = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    row |= {"quantize": args.quantize, "compute": args.compute, "lora": args.lora, "trainable": trainable}
    row["gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    row["held_gib"] = torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0
    return row, detector.backbone


def numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def report(row: dict[str, Any], args: argparse.Namespace) -> str:
    size, seconds, gib = str(row["size"]), float(row["seconds"]), float(row["gib"])
    line = f"{size:5} {row['kind']:13} {row['checkpointing']:9} {row['quantize'] or 'bf16':4} {row['compute']:4}"
    line += f" {seconds:7.3f} s {gib:6.2f} GiB"
    line += f" (held {row['held_gib']:.2f})"
    line += f"  loss {numbers(row['losses'])}"
    usual = row["kind"] == "actionformer" and (args.frames, args.side, args.batch or BATCH[size]) == (
        768,
        160,
        BATCH[size],
    )
    if not args.tiny and args.device == "cuda" and size in ORIGINAL and usual:
        peer = ORIGINAL[size]
        line += f"   OpenTAD {peer.seconds:.3f} s {peer.gib:.2f} GiB:"
        line += f" {peer.seconds / seconds:.2f} x its speed, {gib / peer.gib:.0%} of its memory"
    more = f"\n      trained on: loss {numbers(row['trained'])}; finite: {row['finite']}" if args.train else ""
    return line + more


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--detectors", nargs="+", default=["actionformer"], choices=kinds.NAMES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", nargs="+", default=["segments"], choices=get_args(Checkpointing))
    parser.add_argument(
        "--quantize",
        nargs="+",
        default=["none"],
        choices=["none", "nf4", "fp4", "int8"],
        help="codes for the frozen linears, a row each",
    )
    parser.add_argument(
        "--compute", nargs="+", default=["bf16"], choices=["bf16", "fp8"], help="products of frozen linears, a row each"
    )
    parser.add_argument("--lora", action="store_true", help="low-rank updates of every backbone linear too")
    parser.add_argument("--batch", type=int, help="videos; otherwise as many as the original was measured with")
    parser.add_argument("--frames", type=int, default=768)
    parser.add_argument("--side", type=int, default=160, help="pixels")
    parser.add_argument("--limit-gib", type=float, help="let the allocator hold no more than this in a step")
    parser.add_argument("--train", type=int, default=0, help="steps to run on the one batch after the timed ones")
    parser.add_argument("--eager", action="store_true", help="launch every kernel instead of replaying a CUDA graph")
    parser.add_argument("--deterministic", action="store_true", help="refuse operations without a deterministic form")
    parser.add_argument("--reference", action="store_true", help="also the first losses of the same steps in float32")
    parser.add_argument("--tiny", action="store_true", help="a small model and clip, to check this script")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.use_deterministic_algorithms(args.deterministic)
    sizes = args.sizes[:1] if args.tiny else args.sizes
    for size, mode, held, compute in product(sizes, args.checkpointing, args.quantize, args.compute):
        chosen = argparse.Namespace(**vars(args) | {"quantize": None if held == "none" else held, "compute": compute})
        backbone: Any = None
        for kind in args.detectors:
            row, backbone = measure(size, mode, chosen, True, kind, backbone)
            if args.reference:
                row["float32_losses"] = measure(size, mode, chosen, False, kind)[0]["losses"]
            print(json.dumps(row) if args.json else report(row, args), flush=True)
            if args.reference and not args.json:
                print(f"      the same step in float32: loss {numbers(row['float32_losses'])}", flush=True)


if __name__ == "__main__":
    main()
