"""What does each way to train a frozen backbone give? mAP with the average and without, as means over seeds.

A tiny ViT learns to name the motions in clips, then it is frozen, as a user would start from VideoMAE; adapters and
head are trained on videos of which two motions are new to it, and scored on videos that no training has seen.
`untrained` is the detector before its first update. Two rows are controls: the head alone on frozen features, and
adapters on a backbone that learnt nothing. The recipe is the shipped `synthetic_tiny`; `--prepare` makes
what it reads.

    python -m benchmarks.detection_table [--out FOLDER] [--seeds 3] [--only NAME ...]
    python -m benchmarks.detection_table --prepare data/synthetic
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import versions
from tensorkeep.detection.data.synthetic import TINY, make_dataset
from tensorkeep.detection.evaluate_run import evaluate_checkpoint, evaluate_untrained
from tensorkeep.detection.job import run_detection
from tensorkeep.detection.pretraining import PretrainingConfig, pretrain
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.detection.start import make_detector

RECIPE = "synthetic_tiny"
VIDEOS, HELD_OUT, SEED = 24, 24, 0
Changes = list[tuple[str, str]]
FULL: Changes = [("training.quantize_backbone", "null")]
TIA: Changes = [("model.backbone.adapter", "{kind: tia, ratio: 0.25}")]
LORA: Changes = [
    ("model.backbone.adapter", "null"),
    ("model.backbone.lora", "{lora_r: 8, lora_alpha: 16}"),
    ("optimizer.groups", "[{pattern: lora_*, lr: 0.01, weight_decay: 0.05}]"),
]
NONE: Changes = [("model.backbone.adapter", "null"), ("model.backbone.tuning", "none"), ("optimizer.groups", "[]")]
# the trunk held in bf16, which fp8 products are beside; the rest of a run stays in float32
BF16: Changes = [("model.backbone.frozen_dtype", "bfloat16"), ("model.backbone.checkpointing", "segments")]
FP8: Changes = [*BF16, ("training.quantize_compute", "fp8")]
VARIANTS: dict[str, Changes] = {
    "full adapter": FULL + TIA,
    "full adapter, nf4 backbone": TIA,
    "full adapter, bf16 backbone": FULL + TIA + BF16,
    "full adapter, bf16 backbone, fp8 products": FULL + TIA + FP8,
    "full adapter, nf4 backbone in bf16": TIA + BF16,
    "full adapter, nf4 backbone in bf16, fp8 products": TIA + FP8,
    "LoRA": FULL + LORA,
    "LoRA, nf4 backbone": LORA,
    "`kind: qlora` adapters": FULL,
    "`kind: qlora` adapters, nf4 backbone": [],
    "no adapter": FULL + NONE,
    "full adapter, backbone not pretrained": [*FULL, *TIA, ("training.pretrained", "null")],
}


def prepare(folder: Path) -> float:
    """Videos and pretrained ViT in `folder`, where they are not there; the ViT's accuracy on clips it has not seen."""
    if not (folder / "detection").exists():
        make_dataset(folder / "detection", videos=VIDEOS, held_out=HELD_OUT, seed=SEED, config=TINY)
    backbone = read_recipe(RECIPE).model.backbone
    assert backbone is not None
    return pretrain(PretrainingConfig(backbone.vit), folder / "pretrained").evaluation["accuracy"]


def basis(folder: Path) -> Changes:
    """What points the recipe to another folder than data/synthetic."""
    place = folder / "detection"
    found = [(f"data.{part}.annotations", str(place / "annotations.json")) for part in ("train", "test")]
    found += [(f"data.{part}.folder", str(place / "videos")) for part in ("train", "test")]
    return [
        *found,
        ("data.class_map", str(place / "category_idx.txt")),
        ("training.pretrained", str(folder / "pretrained")),
    ]


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """What it gives, seconds on the clock and of the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - clock, time.process_time() - cpu


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), metavar="NAME")
    chosen = parser.parse_args()
    if chosen.prepare:
        print(f"{chosen.prepare}: {100 * prepare(chosen.prepare):.1f} % of the clips it has not seen named rightly")
        return
    with tempfile.TemporaryDirectory() as scratch:
        measure(chosen.out or Path(scratch), chosen.seeds, chosen.only)


def measure(out: Path, seeds: int, variants: Sequence[str]) -> None:
    """Train and score everything, one line each, then the table."""
    accuracy, clock, cpu = timed(lambda: prepare(out))
    print(
        f"pretraining: accuracy {accuracy:.3f}, {clock:.0f} s, {cpu:.0f} s of processor, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    rows = [
        [
            "trained",
            "mAP 0.3-0.7, averaged weights",
            "live weights",
            "trainable in the backbone",
            "seconds of processor",
        ]
    ]
    starts = [evaluate_untrained(seeded(read_recipe(RECIPE, basis(out)), seed)).average for seed in range(seeds)]
    rows.append(["untrained", shown(starts), "", "", ""])
    for name in variants:
        recipe = read_recipe(RECIPE, [*basis(out), *VARIANTS[name]])
        figures: dict[bool, list[float]] = {True: [], False: []}
        seconds = []
        for seed in range(seeds):
            run = out / f"{'-'.join(name.replace(',', '').split())}-{seed}"
            _, clock, cpu = timed(lambda: run_detection(seeded(recipe, seed), run))  # noqa: B023 (called at once)
            seconds.append(cpu)
            for ema in figures:
                figures[ema].append(evaluate_checkpoint(run, ema=ema, best=False).result.average)
            print(
                f"{name}, seed {seed}: {figures[True][-1]:.3f}, live {figures[False][-1]:.3f}, {clock:.0f} s, "
                f"{cpu:.0f} s of processor",
                flush=True,
            )
        backbone = make_detector(recipe, None)[0].backbone
        assert backbone is not None
        count = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        rows.append(
            [name, shown(figures[True]), shown(figures[False]), f"{count:,}", f"{statistics.mean(seconds):.0f}"]
        )
    print(f"\n{seeds} seeds; {versions('torch', 'av')}\n\n{table(rows)}")


def seeded(recipe: DetectionRecipe, seed: int) -> DetectionRecipe:
    return replace(recipe, training=replace(recipe.training, seed=seed))


def shown(values: Sequence[float]) -> str:
    """Mean (least to most), in percent."""
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    main()
