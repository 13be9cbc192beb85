"""The two scoring protocols (see `evaluation`) and the temporal IoU thresholds that each averages over."""

from __future__ import annotations

PROTOCOLS = {
    "activitynet": tuple(round(0.5 + 0.05 * step, 2) for step in range(10)),
    "thumos14": tuple(round(0.1 * step, 1) for step in range(1, 8)),
}
