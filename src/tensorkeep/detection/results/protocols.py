"""The scoring protocols: what each counts, and the temporal IoU thresholds that it averages over.

| protocol | whose | segments that count | thresholds |
|---|---|---|---|
| `activitynet` | ActivityNet's script, also of HACS, FineAction | all, repeated and empty too | 0.5, 0.55 ... 0.95 |
| `opentad` | OpenTAD, ActionFormer, mmaction | repetitions once, empty ones not | 0.5, 0.55 ... 0.95 |
| `thumos14` | the kit of THUMOS'14 (TH14evalDet) | all; `Ambiguous` forgives | 0.1, 0.2 ... 0.7 |
| `epic` | EPIC-Kitchens-100's detection challenge | all; verbs, nouns and actions apart | 0.1, 0.2 ... 0.5 |
| `ego4d-mq` | Ego4D's moment queries | all; recall over all segments | 0.1, 0.2 ... 0.5 |
| `multithumos` | detection on MultiTHUMOS, as OpenTAD counts it | as `opentad` | 0.1, 0.2 ... 0.9 |

All but `thumos14` let a detection choose its segment; see `evaluation`.
"""

from __future__ import annotations

from typing import NamedTuple


class Protocol(NamedTuple):
    """What a protocol counts.

    Attributes:
        thresholds: temporal IoUs that it averages over.
        clean: whether segments without length, and repetitions (1 ms), are dropped first.
        kit: whether segments choose detections, as in the THUMOS'14 kit; else detections choose segments.
        pooled: whether recall is over all segments at once; else the mean of the classes' recalls.
    """

    thresholds: tuple[float, ...]
    clean: bool = False
    kit: bool = False
    pooled: bool = False


def _tenths(last: int) -> tuple[float, ...]:
    return tuple(round(0.1 * step, 1) for step in range(1, last + 1))


_FROM_HALF = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
PROTOCOLS = {
    "activitynet": Protocol(_FROM_HALF),
    "opentad": Protocol(_FROM_HALF, clean=True),
    "thumos14": Protocol(_tenths(7), kit=True),
    "epic": Protocol(_tenths(5)),
    "ego4d-mq": Protocol(_tenths(5), pooled=True),
    "multithumos": Protocol(_tenths(9), clean=True),
}
