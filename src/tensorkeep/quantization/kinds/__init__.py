"""Kinds of quantized weights that lie packed in files, beside those that `stored` reads itself: one file a kind.

| name | says |
|---|---|
| `find(view, records)` | gives a description of each weight of this kind; headers and shapes alone decide |
| `values(view, weight, rows)` | yields its float32 values, flat: rows `rows[0]` to `rows[1]` of the first dimension |
| `scales(view, weight)` | its scales as float32, to tell whether they are numbers |
| `codes(view, weight)` | yields some of its codes as uint8, each below `2 ** bits`, to tell whether they are noise |

Values are computed in float32, each operation rounded once, in the order in which the reference implementation that the
kind's file names computes them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

KINDS = {
    "mxfp4": "tensorkeep.quantization.kinds.mxfp4",
    "nvfp4": "tensorkeep.quantization.kinds.fp4",
    "mxfp4-packed": "tensorkeep.quantization.kinds.fp4",
    "gptq": "tensorkeep.quantization.kinds.gptq",
    "awq": "tensorkeep.quantization.kinds.awq",
    "pack-quantized": "tensorkeep.quantization.kinds.compressed",
}

# ends of names without which there is nothing of these kinds
_LOOKS = (".qweight", ".weight_packed", "_blocks", ".weight_scale_2")


def module(kind: str) -> ModuleType | None:
    """Return the module that reads a kind; None for the kinds that `stored` reads itself.

    Args:
        kind: as in `QuantizedWeight.kind`.
    """
    return importlib.import_module(KINDS[kind]) if kind in KINDS else None


def modules(names: Iterable[str]) -> list[ModuleType]:
    """Return the modules of all kinds, each once; none where no name looks like packed codes.

    Args:
        names: of stored tensors.
    """
    if not any(name.endswith(_LOOKS) for name in names):
        return []
    return [importlib.import_module(name) for name in dict.fromkeys(KINDS.values())]
