"""What does each way to train a frozen backbone give? mAP with the average and without, as means over seeds.

A tiny ViT is trained whole on one set of synthetic videos, then frozen, as a user would start from VideoMAE; adapters and
head are trained on other videos, and scored on videos nobody has seen. `untrained` is the detector before its first
update. The recipes are recipes/pretraining/synthetic_tiny.yaml and recipes/detection/synthetic_tiny.yaml.

    python -m benchmarks.detection_table [--out FOLDER] [--seeds 3] [--only NAME ...]
    python -m benchmarks.detection_table --data-only data/synthetic
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tensorkeep.detection.synthetic import SyntheticConfig, make_dataset
from tensorkeep.distributed import World
from tensorkeep.recipes.detection import run_detection
from tensorkeep.recipes.detection_data import evaluation_of, read_classes
from tensorkeep.recipes.detection_evaluation import evaluate_checkpoint
from tensorkeep.recipes.detection_schema import DetectionRecipe
from tensorkeep.recipes.detection_start import make_detector
from tensorkeep.recipes.texts import read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = RECIPES / "detection" / "synthetic_tiny.yaml"
CLIPS = SyntheticConfig(
    classes=("slide", "blink", "spin"), size=32, fps=10, seconds=(12.0, 14.0), actors=1, distractors=1, actions=(2, 3),
    action_seconds=(2.0, 4.0),
)  # fmt: skip
SETS = {"pretrain": (200, 8, 100), "main": (24, 16, 0)}  # videos to train on, held out, seed
LORA_ALONE = [
    ("model.backbone.adapter", "null"), ("model.backbone.lora", "{lora_r: 8, lora_alpha: 16}"),
    ("optimizer.backbone", "[{name: lora, lr: 0.002, weight_decay: 0.05}]"),
]  # fmt: skip
SEEDS_FORM = [
    (
        "model.backbone.adapter",
        "{kind: qlora, ratio: 0.25, lora_r: 8, lora_alpha: 16, lora_dropout: 0.1, quantize_bits: 4}",
    )
]
VARIANTS: dict[str, list[tuple[str, str]]] = {
    "full adapter": [("training.quantize_backbone", "null")],
    "full adapter, nf4 backbone": [],
    "LoRA": [("training.quantize_backbone", "null"), *LORA_ALONE],
    "LoRA, nf4 backbone (QLoRA)": LORA_ALONE,
    "the seeds' QLoRA form": [("training.quantize_backbone", "null"), *SEEDS_FORM],
}


def make_data(folder: Path) -> None:
    """Both sets of videos, where they are not there."""
    for name, (videos, held_out, seed) in SETS.items():
        if not (folder / name).exists():
            make_dataset(folder / name, videos=videos, held_out=held_out, seed=seed, config=CLIPS)


def moved(data: Path, name: str) -> list[tuple[str, str]]:
    """What points a recipe's paths to another folder."""
    place = data / name
    found = [(f"data.{part}.annotations", str(place / "annotations.json")) for part in ("train", "test")]
    found += [(f"data.{part}.folder", str(place / "videos")) for part in ("train", "test")]
    return [*found, ("data.class_map", str(place / "category_idx.txt"))]


def untrained(recipe: DetectionRecipe) -> float:
    """Average mAP of the detector as it starts."""
    import contextlib

    evaluation = evaluation_of(recipe, read_classes(recipe), World(), contextlib.nullcontext)
    return evaluation(make_detector(recipe, None)[0].eval())["average_mAP"]


def timed_run(recipe: DetectionRecipe, run: Path) -> tuple[float, float]:
    """Seconds on the clock and of the processor to train a recipe."""
    clock, cpu = time.perf_counter(), time.process_time()
    run_detection(recipe, run)
    return time.perf_counter() - clock, time.process_time() - cpu


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data-only", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), metavar="NAME")
    chosen = parser.parse_args()
    if chosen.data_only:
        make_data(chosen.data_only)
        return
    with tempfile.TemporaryDirectory() as scratch:
        measure(chosen.out or Path(scratch), chosen.seeds, chosen.only)


def measure(out: Path, seeds: int, variants: Sequence[str]) -> None:
    """Train and score everything, one line each, then the table."""
    make_data(out / "data")
    pretrain = out / "pretrain"
    clock, cpu = timed_run(
        read_recipe(RECIPES / "pretraining" / "synthetic_tiny.yaml", moved(out / "data", "pretrain")), pretrain
    )
    print(f"pretraining: {clock:.0f} s, {cpu:.0f} s of processor, load {os.getloadavg()[0]:.1f}", flush=True)
    basis = [*moved(out / "data", "main"), ("training.pretrained", str(pretrain))]
    rows = [["trained", "mAP 0.3-0.7, averaged weights", "live weights", "trainable in the backbone", "seconds"]]
    start = read_recipe(TINY, basis)
    rows.append(["untrained", f"{100 * untrained(start):.1f}", "", "", ""])
    for name in variants:
        recipe = read_recipe(TINY, [*basis, *VARIANTS[name]])
        figures: dict[bool, list[float]] = {True: [], False: []}
        seconds = []
        for seed in range(seeds):
            run = out / f"{'-'.join(name.replace(',', '').split())}-{seed}"
            seconds.append(timed_run(replace(recipe, training=replace(recipe.training, seed=seed)), run)[0])
            for ema in figures:
                figures[ema].append(evaluate_checkpoint(run, ema=ema, best=False).result.average)
            print(
                f"{name}, seed {seed}: {figures[True][-1]:.3f}, live {figures[False][-1]:.3f}, {seconds[-1]:.0f} s",
                flush=True,
            )
        shown = [f"{100 * statistics.mean(v):.1f} ({100 * min(v):.1f} to {100 * max(v):.1f})" for v in figures.values()]
        backbone = make_detector(recipe, None)[0].backbone
        assert backbone is not None
        count = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        rows.append([name, *shown, f"{count:,}", f"{statistics.mean(seconds):.0f}"])
    print(f"{seeds} seeds, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
