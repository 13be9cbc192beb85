"""tensorkeep: fine-tune with quantised low-rank adapters, and keep every tensor right.

Public names are resolved when first used, so that `import tensorkeep` loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "TensorkeepError": "tensorkeep.errors",
    "TensorRecord": "tensorkeep.record",
    "StateView": "tensorkeep.view",
    "read": "tensorkeep.view",
    "Plan": "tensorkeep.plan",
    "make_plan": "tensorkeep.planning",
    "convert": "tensorkeep.conversion",
    "compare": "tensorkeep.comparison",
    "verify": "tensorkeep.verification",
    "Finding": "tensorkeep.findings",
}
__all__ = [
    "Finding",
    "Plan",
    "StateView",
    "TensorRecord",
    "TensorkeepError",
    "__version__",
    "compare",
    "convert",
    "make_plan",
    "read",
    "verify",
]

if TYPE_CHECKING:
    from tensorkeep.comparison import compare
    from tensorkeep.conversion import convert
    from tensorkeep.errors import TensorkeepError
    from tensorkeep.findings import Finding
    from tensorkeep.plan import Plan
    from tensorkeep.planning import make_plan
    from tensorkeep.record import TensorRecord
    from tensorkeep.verification import verify
    from tensorkeep.view import StateView, read


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'tensorkeep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
