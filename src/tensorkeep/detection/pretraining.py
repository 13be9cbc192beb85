"""Pretrain a tiny ViT to name the motion in a synthetic clip, as VideoMAE is fine-tuned on Kinetics for real recipes.

Clips with one motion, or none, are drawn as arrays; a linear classifier reads the mean of the features. The run is like
any other, saved and resumable, and `training.pretrained` of a detection recipe takes it: names below `backbone.` are
the ViT's, as in mmaction's files, and the classifier is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.data.synthetic import TINY, SyntheticConfig, make_clip
from tensorkeep.detection.model.config import VitConfig
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.output import Output
from tensorkeep.storage.durable import digest
from tensorkeep.training.ema import Ema
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import Outcome, fit
from tensorkeep.training.randomness import derive
from tensorkeep.training.recipe import plain
from tensorkeep.training.saver import Keep
from tensorkeep.training.schedules import learning_rate

_WARMUP = 40  # updates
MOTIONS = replace(TINY, classes=("pulse", "blink", "spin"))  # of the four that TINY's videos show, two stay unseen


@dataclass(frozen=True)
class PretrainingConfig:
    """What is learned, from how many clips, and how.

    Attributes:
        vit: shape of the ViT.
        motions: what the clips show.
        clips: number of clips to learn from.
        held_out: number of clips to score on.
        updates: of the optimizer.
        batch: clips of an update.
        lr: learning rate.
        weight_decay: of all weights.
        ema: decay of the averaged weights.
        save_every: updates between two checkpoints.
        seed: of the clips and the weights.
    """

    vit: VitConfig
    motions: SyntheticConfig = MOTIONS
    clips: int = 2400
    held_out: int = 300
    updates: int = 1000
    batch: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.05
    ema: float = 0.98
    save_every: int = 250
    seed: int = 100


@dataclass(frozen=True)
class MotionClips:
    """Clips of motions: clip `i` shows class `i % (K + 1)`, the last of which is rest.

    A clip is drawn when it is first asked for and then held, 3 T H W bytes each.

    Attributes:
        config: what they show.
        number: how many there are.
        part: which of several sets that share no clip.
        held: those drawn so far.
    """

    config: PretrainingConfig
    number: int
    part: int
    held: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return self.number

    def clip(self, index: int) -> tuple[Tensor, int]:
        """Return the frames `[3, T, H, W]` uint8 of a clip, and its class."""
        names = (*self.config.motions.classes, None)
        label = index % len(names)
        if index not in self.held:
            rng = np.random.default_rng([self.config.seed, self.part, index])
            frames = make_clip(self.config.motions, names[label], self.config.vit.chunk_frames, rng)
            self.held[index] = torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()
        return self.held[index], label

    def sample(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """Return a clip, mirrored and run backwards by chance: neither changes what it shows."""
        frames, label = self.clip(index)
        mirrored, backwards = (torch.rand(2, generator=generator) < 0.5).tolist()
        axes = [axis for axis, turned in ((3, mirrored), (1, backwards)) if turned]
        return frames.flip(axes), label

    def fingerprint(self) -> str:
        """Return a digest of all that decides the clips."""
        return digest(
            repr((self.config.motions, self.config.vit.chunk_frames, self.config.seed, self.part, self.number)).encode()
        )


class MotionClassifier(nn.Module):
    """VideoMAE's classifier, under mmaction's names: ViT, mean over a clip's tokens, norm, linear."""

    def __init__(self, vit: VitConfig, classes: int) -> None:
        super().__init__()
        self.backbone = VisionTransformer(vit)
        self.cls_head = nn.ModuleDict({"fc_cls": nn.Linear(vit.embed_dim, classes)})

    def forward(self, clips: Tensor) -> Tensor:
        """Return logits `[N, K + 1]` of clips `[N, 3, T, H, W]` uint8."""
        norm = self.backbone.fc_norm
        assert norm is not None
        pooled = self.backbone(clips, len(clips)).mean((2, 3, 4))  # [N, C]
        logits: Tensor = self.cls_head["fc_cls"](norm(pooled))
        return logits  # [N, K + 1]


def collate(samples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Put N samples together: `clips [N, 3, T, H, W]`, `labels [N]`."""
    return {"clips": torch.stack([s[0] for s in samples]), "labels": torch.tensor([s[1] for s in samples])}


def loss(model: nn.Module, batch: Mapping[str, Tensor], divisor: float) -> dict[str, Tensor]:
    """Return this micro-batch's share of the cross entropy."""
    return {"loss": F.cross_entropy(model(batch["clips"]), batch["labels"], reduction="sum") / divisor}


def build(config: PretrainingConfig) -> tuple[Job, Loop]:
    """Make the job, on the CPU, and the settings of its loop."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(config.seed, 0))
        model = MotionClassifier(config.vit, len(config.motions.classes) + 1)
    unseen = MotionClips(config, config.held_out, part=1)
    job = Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay),
        data=MotionClips(config, config.clips, part=0),
        collate=collate,
        loss=loss,
        count=lambda batch: len(batch["labels"]),
        schedule=lambda update, base: learning_rate(update, base, min(_WARMUP, config.updates - 1), config.updates),
        evaluate=lambda model: {"accuracy": accuracy(model, unseen)},
        ema=Ema(model, config.ema),
        recipe=plain(config),
    )
    loop = Loop(
        config.updates,
        config.batch,
        seed=config.seed,
        log_every=25,
        save_every=config.save_every,
        keep=Keep(1),
        best="accuracy",
    )
    return job, loop


def accuracy(model: nn.Module, clips: MotionClips, batch: int = 50) -> float:
    """Return the share of the clips that are named rightly."""
    right = 0
    for first in range(0, len(clips), batch):
        shown = collate([clips.clip(index) for index in range(first, min(first + batch, len(clips)))])
        right += int((model(shown["clips"]).argmax(-1) == shown["labels"]).sum())
    return right / len(clips)


def pretrain(
    config: PretrainingConfig, run: str | Path, tell: Callable[[dict[str, Any]], None] = lambda _row: None
) -> Outcome:
    """Train in the folder `run`, or go on there.

    Args:
        config: what is learned and how.
        run: the run's folder.
        tell: gets each row of metrics.

    Returns:
        How the run ended.

    Example:
        >>> config = PretrainingConfig(VitConfig(32, 16, 64, 2, 4, 192))
        >>> pretrain(config, "runs/pretrained").evaluation  # doctest: +SKIP
        {'accuracy': 0.97}
    """
    job, loop = build(config)
    job.trackers = [tell]
    return fit(job, run, loop, say=Output(quiet=True))
