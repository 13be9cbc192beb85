"""Chapter `detection`: find which motion happens when in a video, by QLoRA adapters on a frozen ViT in nf4.

All of it is made on the spot: mp4 files with scripted motions, a tiny ViT that learns to name motions in other clips
(as VideoMAE was fine-tuned on Kinetics), and adapters and head trained on two dozen videos that also show new
motions. The training is killed at a random instant and goes on by the same command; it must end bitwise where a run
ends that nobody touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tensorkeep.commands.demo.resume import TrainingProcess, empty, rows_of, same_end, shown_command, tell
from tensorkeep.commands.demo.story import Show
from tensorkeep.commands.report.run import PREDICTIONS, write_run_page
from tensorkeep.detection.data.annotations import read_annotations
from tensorkeep.detection.data.synthetic import ANNOTATIONS, CLASS_MAP, TINY, make_dataset
from tensorkeep.detection.data.synthetic import VIDEOS as FILES
from tensorkeep.detection.evaluate_run import evaluate_checkpoint, evaluate_untrained
from tensorkeep.detection.pretraining import PretrainingConfig, pretrain
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.detection.results.matching import overlaps
from tensorkeep.detection.results.results import read_detections
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import run_folder
from tensorkeep.training import metrics
from tensorkeep.training.shipped import shipped_recipe

VIDEOS, HELD_OUT, _SHOWN = 24, 16, 3
UNTRAINED, LEARNED = 0.05, 0.5  # average mAP: at most before, at least afterwards
_ENOUGH, FITS = 0.3, 0.3  # score of a detection that is told, IoU with the true segment that it stands beside


def chapter_detection(out: Path, show: Show) -> int:
    """Make, pretrain, train, kill, resume, evaluate, predict; return 0 if it learned and every promise held."""
    started = time.perf_counter()
    folder = empty(out / "detection")
    show(
        f"1/6  {VIDEOS} videos to learn from, {HELD_OUT} held out: drawn and encoded as mp4, "
        "scripted motions annotated:"
    )
    annotations = make_dataset(folder / "videos", videos=VIDEOS, held_out=HELD_OUT, config=TINY)
    actions = sum(len(video.labels) for video in annotations.videos.values())
    show(
        f"     {folder / 'videos'}: {actions} actions of {len(TINY.classes)} kinds ({', '.join(TINY.classes)}), "
        f"two may overlap; {time.perf_counter() - started:.0f} s"
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(detection_recipe(folder / "videos", folder / "pretrained"), sort_keys=False))
    with single_threaded():
        pretrained(recipe, folder / "pretrained", show)
        held = _trained_and_killed(recipe, folder, show, random.Random())
        held &= evaluated(recipe, folder / "run", show)
        held &= predicted(folder, show)
    show(f"{'All of it held' if held else 'NOT ALL OF IT HELD'}; {time.perf_counter() - started:.0f} s.")
    show(
        f"Try next:\n  tensorkeep eval detection {folder / 'run'} --no-ema\n  tensorkeep inspect {folder / 'run'}\n"
        f"  tensorkeep predict {folder / 'run'} {folder / 'videos' / FILES} --out {folder / 'all'}"
    )
    return 0 if held else 1


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Let this process and those it starts compute on one thread inside the block.

    So small a model gains nothing from a second thread, and waits for it most of the time where cores are shared.
    """
    before, named = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(before)
        del os.environ["OMP_NUM_THREADS"]
        if named is not None:
            os.environ["OMP_NUM_THREADS"] = named


def detection_recipe(data: Path, backbone: Path) -> dict[str, Any]:
    """Return the shipped recipe `synthetic_tiny` for a data set and a pretrained backbone."""
    recipe: dict[str, Any] = yaml.safe_load(shipped_recipe("synthetic_tiny").text)
    for split in ("train", "test"):
        recipe["data"][split] |= {"annotations": str(data / ANNOTATIONS), "folder": str(data / FILES)}
    recipe["data"]["class_map"] = str(data / CLASS_MAP)
    recipe["training"]["pretrained"] = str(backbone)
    return recipe


# -- training ---------------------------------------------------------------------------------------------------------


def pretrained(recipe: Path, run: Path, show: Show) -> None:
    """Pretrain the backbone that the recipe freezes, as a run of its own."""
    started, backbone = time.perf_counter(), read_recipe(recipe).model.backbone
    assert backbone is not None and backbone.vit is not None
    config = PretrainingConfig(backbone.vit)
    show(
        f"2/6  A ViT of {backbone.vit.depth} blocks learns to name the motion in {config.clips:,} other clips: "
        f"{', '.join(config.motions.classes)} or rest;"
    )
    new = [name for name in TINY.classes if name not in config.motions.classes]
    show(f"     {' and '.join(new)} stay unknown to it, as a user's actions are to VideoMAE:")

    def told(row: dict[str, Any]) -> None:
        if "loss" in row and row["step"] % 250 == 0:
            show(f"       update {row['step']:5}: loss {row['loss']:.4f}")

    accuracy = pretrain(config, run, told).evaluation["accuracy"]
    show(
        f"     {time.perf_counter() - started:4.0f} s  {run}: it names {100 * accuracy:.0f} % of "
        f"{config.held_out} clips it has not seen (by chance: {100 / (len(config.motions.classes) + 1):.0f} %)"
    )


def _trained_and_killed(recipe: Path, folder: Path, show: Show, chance: random.Random) -> bool:
    """Train once untouched and once killed and resumed; return whether both ended alike and learned."""
    whole, run = folder / "whole", folder / "run"
    show("3/6  That ViT frozen and held in nf4; QLoRA adapters and the detection head train, by the command")
    show(f"     {' '.join(shown_command(recipe, whole, 'detection'))}")
    start = TrainingProcess(recipe, whole, "detection")
    start.finish()
    losses = [row["loss"] for row in rows_of(whole) if "loss" in row]
    show(f"     {start.seconds:4.0f} s  nobody touches it: loss {losses[0]:.2f} at first, {losses[-1]:.2f} at the end")

    show(
        "4/6  The same into another folder, killed (SIGKILL) at a random instant, "
        "and started again by the same command:"
    )
    killed = kill_at_random(recipe, run, chance.uniform(0, 0.4 * start.seconds), rows_of(whole)[-1]["step"], show)
    last = TrainingProcess(recipe, run, "detection")
    last.finish()
    show(f"     {last.seconds:4.0f} s  to the end")
    tell(last.said(), show)
    confirmed = any("exact resume confirmed" in s for s in last.said()) and not any(
        "not bitwise" in s for s in last.said()
    )
    return same_end(whole, run, show) and killed and confirmed and losses[-1] < losses[0]


def kill_at_random(recipe: Path, run: Path, seconds: float, updates: int, show: Show) -> bool:
    """Start a training and kill it some seconds after its first checkpoint.

    It is killed at the latest when three quarters of its updates are saved, and always once a loss after the newest
    checkpoint is noted, for the next start to compare with. Returns False where the run was over before.
    """
    start = TrainingProcess(recipe, run, "detection")
    start.until(lambda: bool(run_folder.steps(run)))
    first = time.perf_counter()

    def due() -> bool:
        newest = run_folder.steps(run)[0]
        late = time.perf_counter() - first >= seconds or newest >= 3 * updates // 4
        return late and any(
            row["checkpoint"] == newest for row in metrics.rows(run / run_folder.CHECKPOINTS / metrics.PROOF)
        )

    start.until(due)
    lived = time.perf_counter() - first
    start.kill()
    rows = rows_of(run)
    told = rows[-1]["step"] if rows else 0
    show(f"     {start.seconds:4.0f} s  killed {lived:.2f} s after its first checkpoint, {told} updates told of")
    return start.killed


# -- evaluation and prediction ----------------------------------------------------------------------------------------


def evaluated(recipe: Path, run: Path, show: Show) -> bool:
    """Show the mAP of the detector as it began, of its last weights and of their average; return whether it learned."""
    before = evaluate_untrained(read_recipe(recipe))
    live, averaged = (evaluate_checkpoint(run, ema=ema, best=False).result for ema in (False, True))
    show(f"5/6  mAP on the {HELD_OUT} held-out videos, in percent, by temporal IoU:")
    show(f"     {'  '.join(f'{limit:5.1f}' for limit in averaged.thresholds)}     mean")
    for what, found in (
        ("untrained", before),
        ("trained, last weights", live),
        ("trained, averaged weights", averaged),
    ):
        show(f"     {'  '.join(f'{100 * value:5.1f}' for value in found.map)}    {100 * found.average:5.1f}  {what}")
    means = zip(averaged.classes, averaged.ap.mean(1), strict=True)
    show(f"     the last line by class: {', '.join(f'{name} {100 * value:.0f}' for name, value in means)}")
    return before.average < UNTRAINED and averaged.average >= LEARNED


def predicted(folder: Path, show: Show) -> bool:
    """Run `tensorkeep predict` on held-out videos and write the run's page; return whether the page shows both."""
    run, data = folder / "run", folder / "videos"
    annotations = read_annotations(data / ANNOTATIONS)
    names = [video.name for video in annotations.of_subset("validation")][:_SHOWN]
    out = run / Path(PREDICTIONS).parent
    words = [
        "tensorkeep",
        "predict",
        str(run),
        *(str(data / FILES / f"{name}.mp4") for name in names),
        "--annotations",
        str(data / ANNOTATIONS),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    show(f"6/6  What happens when in {_SHOWN} of them:\n     {' '.join(words)}")
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TensorkeepError(f"predict failed: {done.stderr.strip()[-300:]}", where=run)
    for name in names:
        for line in against_truth(name, folder):
            show(f"       {line}")
    page = folder / "page.html"
    write_run_page(run, page, overwrite=True)
    text = page.read_text("utf-8")
    drawn = text.count("aria-roledescription='timeline'") == _SHOWN and all(
        part in text for part in ('class="p"', 'class="t"', "<img ")
    )
    show(f"     {page}: curves, evaluations, and these {_SHOWN} videos with pictures, true and predicted")
    return drawn


def against_truth(name: str, folder: Path) -> Sequence[str]:
    """Return a line for each true segment of a video, with the detection of its class that fits it best.

    The last line says how many detections are found besides.
    """
    video = read_annotations(folder / "videos" / ANNOTATIONS).videos[name]
    table = read_detections(folder / "run" / PREDICTIONS)
    own = np.flatnonzero((table.videos == table.video_names.index(name)) & (table.scores >= _ENOUGH))
    labels = np.array([table.label_names[i] for i in table.labels[own]])
    used: set[int] = set()
    lines = [f"{name}, {video.duration:.1f} s"]
    for (start, end), label in zip(video.segments, video.labels, strict=True):
        same = own[labels == label]
        keys = np.zeros(len(same), dtype=np.int64)
        pairs = overlaps(np.array([[start, end]]), np.zeros(1, dtype=np.int64), table.segments[same], keys, FITS)
        line = f"  {label:6} {start:5.2f} to {end:5.2f} s   "
        if not len(pairs.iou):
            lines.append(f"{line}nothing that fits scores {_ENOUGH:g}")
            continue
        best = int(np.argmax(pairs.iou))
        chosen = int(same[pairs.right[best]])
        used.add(chosen)
        first, last = table.segments[chosen]
        lines.append(
            f"{line}found {first:5.2f} to {last:5.2f} s, IoU {pairs.iou[best]:.2f}, score {table.scores[chosen]:.2f}"
        )
    return [*lines, f"  and {len(own) - len(used)} detections more that score {_ENOUGH:g} or better"]
