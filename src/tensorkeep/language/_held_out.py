"""The loss of a model over held-out files, as a run evaluates it on the way and `eval language` afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.language._data import cache_of, make_data, multiple_of, pad_of
from tensorkeep.language._dpo import with_reference
from tensorkeep.language.data.batches import Collate, targets_of
from tensorkeep.language.data.conversations import Format
from tensorkeep.language.data.preferences import CollatePairs, Pairs, pairs_of
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.language.start import Remark, StartingModel
from tensorkeep.storage.files import Progress
from tensorkeep.training import distributed
from tensorkeep.training.batches import Data, to_device
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Loop, at_least_one
from tensorkeep.training.precision import autocast


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Loss over the first `rows` samples: every rank takes its share, every rank gets the numbers.

    Args:
        data: the held-out samples.
        collate: makes a batch of samples.
        loss: as `Job.loss`; called with divisor 1, so it gives sums.
        count: what a batch adds to the divisor (targets or pairs).
        loop: its batch, micro-batch and precision are used.
        world: this process among its peers.
        perplexity: also give `perplexity` and `count`.
        rows: how many samples are evaluated.
        progress: is told how many of them are done.
    """

    data: Data
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any, float], Mapping[str, Tensor]]
    count: Callable[[Any], float]
    loop: Loop
    world: World
    perplexity: bool
    rows: int
    progress: Progress = lambda what, done, total: None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Mean of each number that the loss gives, over everything counted on all ranks."""
        sums: dict[str, float] = {}
        counted, micro = 0.0, self.loop.micro or max(self.loop.batch // self.world.size, 1)
        every = self.world.size * micro
        for at in range(self.world.rank * micro, math.ceil(self.rows / every) * every, every):
            own = range(at, min(at + micro, self.rows))
            indices = own or range(1)  # a rank without rows runs along: under FSDP a forward takes all of them
            batch = self.collate([self.data.sample(i, torch.Generator().manual_seed(i)) for i in indices])
            counted += self.count(batch) if own else 0.0
            with autocast(self.loop, self.world):
                for name, value in self.loss(model, to_device(batch, self.world.device), 1.0).items():
                    sums[name] = sums.get(name, 0.0) + (float(value) if own else 0.0)
            self.progress("evaluate", min(at + every, self.rows), self.rows)
        names = sorted({n for theirs in distributed.gathered(self.world, list(sums)) for n in theirs})
        total, *values = distributed.total(self.world, counted, *(sums.get(n, 0.0) for n in names))
        out = {name: value / at_least_one(total) for name, value in zip(names, values)}
        if self.perplexity:
            out |= {"perplexity": math.exp(min(out["loss"], 700.0)), "count": total}
        return out


def evaluation_of(
    recipe: LanguageRecipe,
    files: tuple[str, ...],
    form: Format,
    start: StartingModel,
    run: Path,
    world: World,
    loss: Any,
    remark: Remark,
    rows: int | None = None,
) -> Evaluation:
    """Make the evaluation of some files, read as the recipe's training data but never augmented.

    Args:
        recipe: how the files are read, and batch and precision of the forwards.
        files: paths of the held-out files.
        form: their format.
        start: the model, whose weights are dpo's reference, and the tokenizer.
        run: folder for cached tokens, unless the recipe names one.
        world: this process among its peers.
        loss: a `TokenLoss` or `PreferenceLoss`.
        remark: is told what was left out.
        rows: at most so many samples (None: all).
    """
    config = replace(recipe.data, files=files, format=form, augmentation=None, streaming=False)
    data: Any = make_data(recipe, config, start.tokenizer, start.vocabulary, run, world, remark)
    pad, training = pad_of(start.tokenizer), recipe.training
    if isinstance(data, Pairs):
        digest, micro = str(start.digest(world)), training.micro_batch or training.batch_size
        folder = cache_of(recipe, run)
        data = with_reference(data, start.model, loss.plain, folder, digest, world, pad, micro, remark)
    loop = Loop(updates=0, batch=training.batch_size, micro=training.micro_batch, precision=training.precision)
    count = min(len(data), rows) if rows is not None else len(data)
    if recipe.objective == "dpo":
        return Evaluation(data, CollatePairs(pad, multiple_of(recipe)), loss, pairs_of, loop, world, False, count)
    return Evaluation(data, Collate(pad, multiple_of(recipe)), loss, targets_of, loop, world, True, count)
