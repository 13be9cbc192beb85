"""Put samples together into batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put B samples together into a batch for `Detector`.

    Returns:
        `inputs` (`[B, 3, T, H, W]` uint8, or `[B, C, T]`; a list where frames are uncut), `masks` `[B, T']` bool, and
        lists of length B: `segments`, `labels`, `meta`.
    """
    inputs = [sample["inputs"] for sample in samples]
    return {
        "inputs": torch.stack(inputs) if isinstance(inputs[0], torch.Tensor) else inputs,
        "masks": torch.stack([sample["mask"] for sample in samples]),
        "segments": [sample["segments"] for sample in samples],
        "labels": [sample["labels"] for sample in samples],
        "meta": [sample["meta"] for sample in samples],
    }
