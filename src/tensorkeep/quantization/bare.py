"""fp8 weights beside which no scales lie: codes that have lost them, or floats that were cast, told by their values."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.description import FLOAT8, QuantizedWeight

SCALED_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")  # of quantization_config
_LARGEST_PLAIN = 100.0  # codes reach beyond, near the end of fp8's range; weights of models end near 10
_LARGE = 1.0  # most codes are larger, even where outliers are 100 times as large as usual; few weights of models are
_TABLE = re.compile(r"(.*\.)?(shared|wte|.*embed(ding)?s?(_tokens)?|.*embeddings)\.weight")  # T5's have 10


def without_scales(view: StateView, found: Mapping[str, QuantizedWeight]) -> list[str]:
    """Return the matrices stored as fp8 that are no quantized weight; tables of embeddings come last.

    Args:
        view: the checkpoint.
        found: its quantized weights.
    """
    bare = (
        n
        for n, r in view.items()
        if r.dtype in FLOAT8 and n.endswith(".weight") and n not in found and len(r.shape) > 1
    )
    return sorted(bare, key=lambda n: _TABLE.fullmatch(n) is not None)


def fills_range(view: StateView, name: str) -> bool:
    """Say whether an fp8 tensor holds codes: values that only scaling to the range of fp8 gives.

    One value beyond what weights reach is an outlier of a plain cast; rows of embeddings, which nobody scales, have
    large ones.

    Args:
        view: the checkpoint.
        name: of the stored tensor.

    Returns:
        True where some lie beyond what weights of models reach, and most are as large as most codes are.
    """
    if _TABLE.fullmatch(name):
        return False
    dtype, largest, large, count = np_dtype(view[name].dtype), 0.0, 0, 0
    for piece in view.stream(name):
        values = np.abs(np.nan_to_num(np.frombuffer(piece, dtype).astype(np.float32), posinf=0.0, neginf=0.0))
        largest = max(largest, float(values.max(initial=0.0)))
        large += int(np.count_nonzero(values > _LARGE))
        count += int(np.count_nonzero(values))
    return largest > _LARGEST_PLAIN and 2 * large > count
