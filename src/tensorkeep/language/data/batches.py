"""A sample of token rows, and batches of them as a model takes them: ids, labels, positions and segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError

IGNORED = -100  # a label that does not count, as everywhere in torch and transformers


def make_sample(ids: Any, counted: Any, lengths: list[int]) -> dict[str, Any]:
    """Make a sample of one row.

    Args:
        ids: token ids `[t]`.
        counted: for each token whether the loss counts it as a target `[t]`.
        lengths: tokens of each segment of the row, `t` in all.

    Returns:
        `input_ids` int64 `[t]`, `labels` int64 `[t]` (unshifted; -100 where the loss does not count) and `lengths`.
        The first token of a segment is no target, since nothing before it may be seen.
    """
    tokens = torch.from_numpy(np.asarray(ids, np.int64))
    labels = torch.where(torch.from_numpy(np.asarray(counted, bool)), tokens, IGNORED)
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
    return {"input_ids": tokens, "labels": labels, "lengths": lengths}


@dataclass(frozen=True)
class Collate:
    """Put samples into one batch, rows padded at the right to the longest, or on to a multiple.

    Called with samples as `make_sample` gives them, it returns `input_ids [b, t]` and `labels [b, t]`; where a row has
    several segments also `position_ids [b, t]`, which start again in each, and `segments [b, t]`, their numbers.
    Padding goes on with the last segment, none of whose tokens sees it; alone it would see nothing but the padding's
    embedding, often zeros, at which models have no gradient (Gemma 3n's root of a square: NaN). Rows of one segment
    need neither: under a causal mask no token sees what is at its right.

    Args:
        pad: the id that fills rows up.
        multiple: rows have a multiple of so many tokens: compiled layers are compiled anew for every other length.
    """

    pad: int = 0
    multiple: int = 1

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these samples."""
        longest = -(-max(len(s["input_ids"]) for s in samples) // self.multiple) * self.multiple
        ids = torch.full((len(samples), longest), self.pad, dtype=torch.int64)
        labels = torch.full((len(samples), longest), IGNORED, dtype=torch.int64)
        for at, sample in enumerate(samples):
            ids[at, : len(sample["input_ids"])] = sample["input_ids"]
            labels[at, : len(sample["labels"])] = sample["labels"]
        batch = {"input_ids": ids, "labels": labels}
        if any(len(s["lengths"]) > 1 for s in samples):
            positions, segments = zip(*(_positions_and_segments(s["lengths"], longest) for s in samples))
            batch |= {"position_ids": torch.stack(positions), "segments": torch.stack(segments)}
        return batch


def _positions_and_segments(lengths: list[int], longest: int) -> tuple[Tensor, Tensor]:
    """Position in its segment and number of the segment of each token of one row, padding included."""
    padded = [*lengths[:-1], lengths[-1] + longest - sum(lengths)]
    positions = torch.cat([torch.arange(n) for n in padded])
    return positions, torch.repeat_interleave(torch.arange(len(padded)), torch.tensor(padded))


def targets_of(batch: dict[str, Any]) -> float:
    """Count the tokens of a batch that are targets, which its loss is divided by."""
    labels: Tensor = batch["labels"]
    return float((labels[:, 1:] != IGNORED).sum())


def block_mask(segments: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make the attention mask under which a token sees itself and earlier tokens of its own segment.

    A mask of four dimensions is taken as it is by every version of transformers from 4.51 on.

    Args:
        segments: number of the segment of each token `[b, t]`.
        dtype: None for a boolean mask (True: seen); a floating type for 0 where seen and its lowest number elsewhere.

    Returns:
        The mask `[b, 1, t, t]`.
    """
    if segments.ndim != 2:
        raise TensorkeepError(f"segments have shape {tuple(segments.shape)} instead of (batch, length)", where="batch")
    t, device = segments.shape[1], segments.device
    earlier = torch.ones(t, t, dtype=torch.bool, device=device).tril()
    seen = (segments[:, :, None] == segments[:, None, :]) & earlier
    if dtype is None:
        return seen[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[:, None]
