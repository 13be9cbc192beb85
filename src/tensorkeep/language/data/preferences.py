"""Pairs of answers to one question, the better one chosen: the samples of `dpo`, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.batches import Collate, make_sample
from tensorkeep.language.data.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a chosen and a rejected answer to the same question.

    Args:
        tokens: pair k is the documents 2k (chosen) and 2k + 1 (rejected).
        reference: sums of log p of both answers under the start weights, float32 `[pairs, 2]` (None: not computed).
        settings: a part of the fingerprint.
        digests: of each source file, as `parts.file_digests` gives them.
    """

    tokens: Tokens
    reference: np.ndarray[Any, Any] | None
    settings: str
    digests: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens) // 2

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Pair `index`: `chosen` and `rejected` as samples, `reference [2]`; nothing is drawn from the generator."""
        chosen, rejected = (self._row(document) for document in (2 * index, 2 * index + 1))
        reference = np.zeros(2, np.float32) if self.reference is None else np.array(self.reference[index], np.float32)
        return {"chosen": chosen, "rejected": rejected, "reference": torch.from_numpy(reference)}

    def _row(self, document: int) -> dict[str, Any]:
        """One answer with its question, as a sample of one segment."""
        a, b = int(self.tokens.offsets[document]), int(self.tokens.offsets[document + 1])
        if self.tokens.marks is None:
            raise TensorkeepError("preferences without marks", where="data")
        return make_sample(self.tokens.ids[a:b].astype(np.int64), self.tokens.marks[a:b], [b - a])

    def fingerprint(self) -> str:
        """A text that changes with the source files, the tokenizer and the reference."""
        digest = "" if self.reference is None else xxhash.xxh3_64(self.reference.tobytes()).hexdigest()
        return f"{self.tokens.fingerprint} {self.settings} {digest}"


@dataclass(frozen=True)
class CollatePairs:
    """Put pairs into one batch: first all chosen rows, then all rejected ones, and `reference [pairs, 2]`."""

    pad: int = 0
    multiple: int = 1

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these pairs."""
        rows = [s["chosen"] for s in samples] + [s["rejected"] for s in samples]
        return Collate(self.pad, self.multiple)(rows) | {"reference": torch.stack([s["reference"] for s in samples])}


def pairs_of(batch: Mapping[str, Any]) -> float:
    """Count the pairs of a batch, which its loss is divided by."""
    return float(len(batch["reference"]))
