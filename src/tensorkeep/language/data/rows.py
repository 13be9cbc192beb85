"""Samples of token rows, and batches of them: the data of `pretrain` and `sft`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.chat import Augmentation, Chat
from tensorkeep.language.data.packing import Rows
from tensorkeep.language.data.texts import Conversation, conversation
from tensorkeep.language.data.tokens import Tokens

IGNORED = -100


@dataclass(frozen=True, eq=False)
class PackedData:
    """Rows of cached tokens. A sample: `input_ids [t]`, `labels [t]` (-100 where the loss does not count, unshifted),
    `lengths`, the tokens of each segment."""

    tokens: Tokens
    rows: Rows
    settings: str  # how rows were made; part of the fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Row `index`; nothing is drawn."""
        segments = self.rows.segments(index)
        ids = np.concatenate([self.tokens.ids[a:b].astype(np.int64) for a, b in segments])
        lengths = [b - a for a, b in segments]
        counted = np.ones(len(ids), bool)
        if self.tokens.marks is not None:
            counted = np.concatenate([self.tokens.marks[a:b] for a, b in segments]).astype(bool)
        return row(ids, counted, lengths)

    def fingerprint(self) -> str:
        """Changes with the sources, the tokenizer and the way rows are made."""
        return f"{self.tokens.fingerprint} {self.settings}"


def row(ids: Any, counted: Any, lengths: list[int]) -> dict[str, Any]:
    """A sample: the first token of a segment is no target, since nothing before it may be seen."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))
    labels = torch.where(torch.from_numpy(np.asarray(counted, bool)), tokens, IGNORED)
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
    return {"input_ids": tokens, "labels": labels, "lengths": lengths}


@dataclass(frozen=True, eq=False)
class LiveConversations:
    """Conversations that are augmented, so they are rendered and tokenised when they are asked for, never cached.

    `lines`: bytes of one JSON line each as `uint8`, with `offsets [n + 1]` (what `Tokens` is for ids).
    """

    lines: Tokens
    chat: Chat
    augmentation: Augmentation
    length: int
    digest: str

    def __len__(self) -> int:
        return len(self.lines)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Conversation `index` with what `generator` draws."""
        a, b = int(self.lines.offsets[index]), int(self.lines.offsets[index + 1])
        document = json.loads(self.lines.ids[a:b].astype(np.uint8).tobytes())
        made = conversation(document["messages"], document["tools"], f"conversation {index}")
        ids, marks = self.chat.encode(made, self.augmentation, generator)
        return row(ids[: self.length], marks[: self.length], [len(ids[: self.length])])

    def fingerprint(self) -> str:
        """Changes with the sources, the tokenizer and the augmentation."""
        return self.digest


def as_line(one: Conversation) -> bytes:
    """A conversation as one JSON line."""
    return json.dumps({"messages": one.messages, "tools": one.tools}).encode()


@dataclass(frozen=True)
class Collate:
    """Samples into a batch: rows padded at the right to the longest.

    `input_ids [b, t]`, `labels [b, t]`; where a row has several segments also `position_ids [b, t]`, which start again
    in each, and `segments [b, t]`, their numbers. Padding is a segment of its own. Rows of one segment need neither:
    under a causal mask nothing sees what is at its right.
    """

    pad: int = 0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(s["input_ids"]) for s in samples)
        ids = torch.full((len(samples), longest), self.pad, dtype=torch.int64)
        labels = torch.full((len(samples), longest), IGNORED, dtype=torch.int64)
        for at, sample in enumerate(samples):
            ids[at, : len(sample["input_ids"])] = sample["input_ids"]
            labels[at, : len(sample["labels"])] = sample["labels"]
        batch = {"input_ids": ids, "labels": labels}
        if any(len(s["lengths"]) > 1 for s in samples):
            positions, segments = zip(*(_places(s["lengths"], longest) for s in samples))
            batch |= {"position_ids": torch.stack(positions), "segments": torch.stack(segments)}
        return batch


def _places(lengths: list[int], longest: int) -> tuple[Tensor, Tensor]:
    """Position and segment number of each token of one row, padding included."""
    whole = [*lengths, *([longest - sum(lengths)] if longest > sum(lengths) else [])]
    positions = torch.cat([torch.arange(n) for n in whole])
    return positions, torch.repeat_interleave(torch.arange(len(whole)), torch.tensor(whole))


def targets_of(batch: dict[str, Any]) -> float:
    """How many tokens of a batch are targets: what its loss is divided by."""
    labels: Tensor = batch["labels"]
    return float((labels[:, 1:] != IGNORED).sum())


def block_mask(segments: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`[b, 1, t, t]`: a token sees earlier ones of its own segment. Boolean, or with `dtype` 0 and the lowest number.

    A mask of four dimensions is taken as it is by every version of transformers from 4.51 on.
    """
    if segments.ndim != 2:
        raise TensorkeepError(f"segments have shape {tuple(segments.shape)} instead of (batch, length)", where="batch")
    t = segments.shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(
        t, t, dtype=torch.bool, device=segments.device
    ).tril()
    if dtype is None:
        return seen[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=segments.device).masked_fill_(~seen, torch.finfo(dtype).min)[
        :, None
    ]
