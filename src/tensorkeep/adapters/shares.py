"""Whether a weight holds an adapter's update already, from measures of its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Share:
    """How much of one module's update its weight already holds, measured on the values.

    Args:
        module: the module's hf name.
        coefficient: of the update in the weight: 0 not merged, 1 merged once.
        noise: standard deviation of that figure.
        relative: |update| / |weight|.
    """

    module: str
    coefficient: float
    noise: float
    relative: float


def times_merged(shares: list[Share]) -> tuple[int | None, dict[str, Any]]:
    """Tell how often an adapter was merged into a base already.

    A module's agreement is judged by its noise; pooling over modules weighs them by the size of their update.

    Args:
        shares: one for each adapted module.

    Returns:
        0, 1 or 2, None where it cannot be told; and the figures behind it.
    """
    if not shares:
        return None, {}
    weights = np.array([1 / s.noise**2 for s in shares])
    values = np.array([s.coefficient for s in shares])
    pooled, noise = float((values * weights).sum() / weights.sum()), float(1 / np.sqrt(weights.sum()))
    figures = {
        "coefficient": round(pooled, 4),
        "noise": round(noise, 4),
        "modules": len(shares),
        "update_relative_to_weight": round(float(np.median([s.relative for s in shares])), 5),
    }
    for times in (0, 1, 2):
        agree = np.mean([abs(s.coefficient - times) < 0.15 + 4 * s.noise for s in shares])
        if noise < 0.1 and abs(pooled - times) < 0.1 + 3 * noise and agree >= 0.9:
            return times, figures
    return None, figures
