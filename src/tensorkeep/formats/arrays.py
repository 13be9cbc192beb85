"""Raw bytes as numpy arrays of the dtypes that checkpoints have, bfloat16 and 8-bit floats included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.record import DTYPES

if TYPE_CHECKING:
    import numpy as np


def np_dtype(dtype: str) -> np.dtype[Any]:
    """Return numpy's dtype for a record's, from ml_dtypes where numpy has none.

    Args:
        dtype: a dtype as safetensors spells it.

    Raises:
        TensorkeepError: neither has such a type.
    """
    import numpy as np

    spelled = DTYPES[dtype].numpy
    if spelled is None:
        raise TensorkeepError(f"{dtype} cannot be computed with here, only copied")
    if hasattr(np, spelled) or spelled == "bool":
        return np.dtype(spelled)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, spelled))
    return found


def np_frombuffer(data: bytes | bytearray | memoryview, dtype: str) -> np.ndarray[Any, Any]:
    """Return a flat numpy array over raw bytes, without a copy.

    Args:
        data: the bytes.
        dtype: their dtype as safetensors spells it.

    Raises:
        TensorkeepError: numpy and ml_dtypes have no such type.
    """
    import numpy as np

    return np.frombuffer(data, dtype=np_dtype(dtype))
