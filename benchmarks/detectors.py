"""Which detector finds more, on the same features with the same budget? mAP by seed, for every kind built here.

72 videos are made with four scripted motions of 1 to 6 s (48 to train on, 24 held out), a tiny ViT learns to name
motions in other clips, and its features are written once. On them each kind of detector trains with the same width,
levels, head, windows, batches, rate and number of updates, from five seeds. Each seed's run is scored with its averaged
weights; the second table holds each kind against ActionFormer, seed by seed.

    python -m benchmarks.detectors [--out FOLDER] [--seeds 5] [--only KIND ...] [--picture FILE.svg]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.detection_table import FULL, NONE, RECIPE, basis
from benchmarks.measure import versions
from tensorkeep.cli import main as tensorkeep
from tensorkeep.detection.data.synthetic import SyntheticConfig, make_dataset
from tensorkeep.detection.evaluate_run import evaluate_checkpoint
from tensorkeep.detection.job import run_detection
from tensorkeep.detection.model.detector import Detector, count_parameters
from tensorkeep.detection.pretraining import PretrainingConfig, pretrain
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe.text import detection_recipe, read_recipe
from tensorkeep.training.recipe import to_yaml

VIDEOS, HELD_OUT, SEED = 48, 24, 5
CLIPS = SyntheticConfig(
    classes=("slide", "pulse", "blink", "hop"),
    size=32,
    fps=10,
    seconds=(22.0, 30.0),
    actions=(4, 7),
    action_seconds=(1.0, 6.0),
    calm=True,
)
CHANNELS, WINDOW = 64, 128
SHARED = {"in_channels": 64, "channels": CHANNELS, "embed_layers": 1, "branch_layers": 4}
# each kind at its published proportions, as far as the shared width lets it
PROJECTIONS: dict[str, dict[str, Any]] = {
    "actionformer": {"stem_layers": 1, "heads": 4, "drop_path": 0.1, "max_length": WINDOW},
    "tridet": {"stem_layers": 1, "mlp_dim": 96, "windows": [1], "wide": 5.0, "drop_path": 0.1, "max_length": WINDOW},
    "temporalmaxer": {},
    "causaltad": {"stem_layers": 1, "heads": 4, "drop_path": 0.1},
}
HEADS: dict[str, dict[str, Any]] = {"tridet": {"bins": 16}}


def prepare(folder: Path) -> None:
    """Videos, pretrained ViT and features, where they are not there."""
    if (folder / "features" / "features.json").exists():
        return
    make_dataset(folder / "detection", videos=VIDEOS, held_out=HELD_OUT, seed=SEED, config=CLIPS)
    backbone = read_recipe(RECIPE).model.backbone
    assert backbone is not None
    pretrain(PretrainingConfig(backbone.vit), folder / "pretrained")
    recipe = read_recipe(RECIPE, [*basis(folder), *FULL, *NONE])
    (folder / "frozen.yaml").write_text(to_yaml(recipe))
    videos = sorted(map(str, (folder / "detection" / "videos").iterdir()))
    words = ["features", str(folder / "frozen.yaml"), *videos, "-o", str(folder / "features"), "--quiet"]
    if tensorkeep(words) != 0:
        raise SystemExit("the features could not be written")


def recipe_of(folder: Path, kind: str, seed: int, epochs: int) -> DetectionRecipe:
    """The same recipe for every kind, but for its projection and what its head has of its own."""
    document = yaml.safe_load(to_yaml(read_recipe(RECIPE, basis(folder))))
    head = document["model"]["head"] | HEADS.get(kind, {})
    head |= {"strides": [1, 2, 4, 8, 16], "ranges": [[0, 4], [4, 8], [8, 16], [16, 32], [32, 10000]]}
    document["model"] = {"kind": kind, "projection": {**SHARED, **PROJECTIONS[kind]}, "head": head}
    for part in ("train", "test"):
        document["data"][part]["folder"] = str(folder / "features")
    document["data"] |= {"inputs": "features", "file_pattern": "{video}.npy", "window_size": WINDOW, "scale_factor": 1}
    document["data"] |= {"augment": None, "feature_layout": "tc"}
    document["optimizer"] |= {"lr": 1e-3, "groups": []}
    document["training"] |= {"pretrained": None, "quantize_backbone": None, "seed": seed, "epochs": epochs}
    document["training"] |= {"evaluate_every": epochs, "save_every": epochs, "log_every": 100}
    return detection_recipe(document)


def measure(folder: Path, kind: str, seeds: int, epochs: int) -> dict[str, Any]:
    """Train and score one kind from every seed."""
    figures, at_least, seconds = [], [], []
    for seed in range(seeds):
        recipe, run = recipe_of(folder, kind, seed, epochs), folder / f"{kind}-{seed}"
        clock = time.process_time()
        run_detection(recipe, run)
        seconds.append(time.process_time() - clock)
        result = evaluate_checkpoint(run, best=False).result
        figures.append(100 * result.average)
        at_least.append(100 * float(result.map[-1]))
        print(f"{kind}, seed {seed}: {figures[-1]:.1f}, {seconds[-1]:.0f} s of processor", flush=True)
    count = count_parameters(Detector(recipe.model))["total"].total
    return {"mAP": figures, "mAP@0.7": at_least, "seconds": statistics.mean(seconds), "parameters": count}


def tables(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Both tables, in Markdown."""
    lines = ["| detector | mAP 0.3-0.7 | mAP at 0.7 | parameters | seconds of processor |", "|---|---|---|---|---|"]
    lines += [
        f"| {kind} | {spread(one['mAP'])} | {spread(one['mAP@0.7'])} | {one['parameters']:,} | {one['seconds']:.0f} |"
        for kind, one in found.items()
    ]
    if "actionformer" not in found or len(found) < 2:
        return "\n".join(lines)
    lines += ["", "| against ActionFormer | points of mAP, mean (least to most) | seeds ahead |", "|---|---|---|"]
    for kind, one in found.items():
        if kind != "actionformer":
            apart = [a - b for a, b in zip(one["mAP"], found["actionformer"]["mAP"], strict=True)]
            lines.append(f"| {kind} | {spread(apart)} | {sum(x > 0 for x in apart)} of {len(apart)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean (least to most)."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def picture(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a kind as SVG: a dot a seed, a line at the mean."""
    values = [value for one in found.values() for value in one["mAP"]]
    low, high = 5 * (min(values) // 5), 5 * (max(values) // 5 + 1)
    height, left, width = 40 + 34 * len(found), 130, 460

    def at(value: float) -> float:
        return left + width * (value - low) / (high - low)

    text = 'font-family="sans-serif" font-size="13" fill="#333"'
    rows = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}">']
    rows.append('<rect width="100%" height="100%" fill="#fff"/>')
    for step in range(int(high - low) // 5 + 1):
        x = at(low + 5 * step)
        rows.append(f'<path d="M{x:.1f} 10V{height - 26}" stroke="#ddd"/>')
        rows.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle" {text}>{low + 5 * step:.0f}</text>')
    for number, (kind, one) in enumerate(found.items()):
        y = 30 + 34 * number
        mean = at(statistics.mean(one["mAP"]))
        rows.append(f'<text x="{left - 12}" y="{y + 5}" text-anchor="end" {text}>{kind}</text>')
        rows.append(f'<path d="M{mean:.1f} {y - 11}V{y + 11}" stroke="#c33" stroke-width="2"/>')
        rows += [f'<circle cx="{at(v):.1f}" cy="{y}" r="5" fill="#369" fill-opacity="0.6"/>' for v in one["mAP"]]
    return "\n".join([*rows, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=list(PROJECTIONS), choices=list(PROJECTIONS))
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        found = {kind: measure(folder, kind, chosen.seeds, chosen.epochs) for kind in chosen.only}
        (folder / "figures.json").write_text(json.dumps(found))
    print(f"\n{VIDEOS} + {HELD_OUT} videos, {chosen.seeds} seeds, {versions('torch')}\n\n{tables(found)}")
    if chosen.picture:
        chosen.picture.write_text(picture(found))


if __name__ == "__main__":
    main()
