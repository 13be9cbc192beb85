"""fp8 weights beside which no scales lie: codes that have lost them, or floats that were cast, told by their values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.description import FLOAT8, QuantizedWeight

SCALED_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")  # of quantization_config
_LARGEST_PLAIN = 100.0  # a weight above this was scaled to fill fp8's range; weights of models end near 10


def without_scales(view: StateView, found: Mapping[str, QuantizedWeight]) -> list[str]:
    """Return the matrices stored as fp8 that are no quantized weight.

    Args:
        view: the checkpoint.
        found: its quantized weights.
    """
    return [
        n
        for n, r in view.items()
        if r.dtype in FLOAT8 and n.endswith(".weight") and n not in found and len(r.shape) > 1
    ]


def fills_range(view: StateView, name: str) -> bool:
    """Say whether an fp8 tensor has values that only scaling to the range of fp8 gives.

    Args:
        view: the checkpoint.
        name: of the stored tensor.

    Returns:
        True where one lies beyond what weights of models reach.
    """
    dtype = np_dtype(view[name].dtype)
    pieces = (np.frombuffer(p, dtype).astype(np.float32) for p in view.stream(name) if len(p))
    return any(bool((np.abs(values) > _LARGEST_PLAIN).any()) for values in pieces)
