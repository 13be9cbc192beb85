"""A tiny detection run on a few real video files: everything of the big ones, seconds instead of days."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tensorkeep.detection.data.synthetic import SyntheticConfig, make_dataset
from tensorkeep.detection.job import build
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.detection.recipe.text import detection_recipe
from tensorkeep.training.job import Job
from tensorkeep.training.loop import fit

CLIPS = SyntheticConfig(
    classes=("slide", "blink"),
    size=32,
    fps=8,
    seconds=(5.0, 7.0),
    actions=(2, 3),
    action_seconds=(1.0, 2.0),
    actors=1,
    distractors=1,
)


def dataset(folder: Path, videos: int = 4, held_out: int = 3, seed: int = 0) -> Path:
    make_dataset(folder, videos=videos, held_out=held_out, seed=seed, config=CLIPS)
    return folder


def document(data: Path) -> dict[str, Any]:
    """A recipe's document: adapters in a frozen ViT of two blocks, windows of 16 grid steps, two samples an update."""
    split = {"annotations": str(data / "annotations.json"), "folder": str(data / "videos")}
    return {
        "version": 2,
        "model": {
            "backbone": {
                "vit": {
                    "image_size": 32,
                    "patch_size": 16,
                    "embed_dim": 32,
                    "depth": 2,
                    "heads": 2,
                    "mlp_dim": 64,
                    "chunk_frames": 8,
                    "tubelet": 2,
                    "drop_path": 0.0,
                },
                "adapter": {"kind": "tia", "ratio": 0.25},
                "tuning": "adapter",
                "checkpointing": "none",
                "output_length": 16,
            },
            "projection": {
                "in_channels": 32,
                "channels": 16,
                "embed_layers": 1,
                "stem_layers": 1,
                "branch_layers": 1,
                "heads": 2,
                "windows": [-1],
                "drop_path": 0.0,
                "max_length": 16,
            },
            "head": {
                "classes": 2,
                "channels": 16,
                "convs": 1,
                "strides": [1, 2],
                "ranges": [[0, 4], [4, 99]],
                "loss_normalizer": 10,
            },
        },
        "optimizer": {"lr": 2e-3, "groups": [{"pattern": "adapter", "lr": 2e-3, "weight_decay": 0.05}]},
        "schedule": {"warmup": 1},
        "data": {
            "train": {**split, "subset": "training"},
            "test": {**split, "subset": "validation"},
            "class_map": str(data / "category_idx.txt"),
            "window_size": 16,
            "feature_stride": 2,
            "crop_size": 32,
            "augment": {"size": 32, "short_side": 32, "crop": "centre", "operations": 0},
        },
        "training": {
            "epochs": 4,
            "batch_size": 2,
            "seed": 3,
            "precision": "fp32",
            "ema": 0.9,
            "unit": "updates",
            "save_every": 2,
            "evaluate_every": 4,
            "workers": 0,
            "log_every": 1,
            "keep_last": 9,
        },
        "post_processing": {"nms": {"sigma": 0.5, "min_score": 0.001, "limit": 50}},
        "evaluation": {"thresholds": [0.3, 0.5]},
    }


def recipe(data: Path, **changes: Any) -> DetectionRecipe:
    """`training__ema=None` changes training.ema; texts are YAML, other values are taken as they are."""
    import json

    pairs = [(name.replace("__", "."), v if isinstance(v, str) else json.dumps(v)) for name, v in changes.items()]
    return detection_recipe(document(data), pairs)


def trained(made: DetectionRecipe, run: Path, **loop: Any) -> Any:
    """The recipe, to its end."""
    job, how = build(made, run)
    return fit(job, run, replace(how, **loop))


def killed(made: DetectionRecipe, run: Path, at: int) -> None:
    """Begin, or go on with, the run in a process that dies by SIGKILL in its `at`-th forward (from 1)."""
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            job, loop = build(made, run)
            fit(_dying(job, at), run, loop)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def _dying(job: Job, at: int) -> Job:
    calls = 0

    def loss(model: torch.nn.Module, batch: Any, divisor: float) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return job.loss(model, batch, divisor)

    return replace(job, loss=loss)


def listening(job: Job, heard: Callable[[Any], None]) -> Job:
    """The job; `heard` gets every batch before its forward."""

    def loss(model: torch.nn.Module, batch: Any, divisor: float) -> Any:
        heard(batch)
        return job.loss(model, batch, divisor)

    return replace(job, loss=loss)
