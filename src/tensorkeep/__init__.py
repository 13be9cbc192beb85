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
    "diagnose": "tensorkeep.diagnosis",
    "check_loaded": "tensorkeep.live.loaded",
    "repair_buffers": "tensorkeep.live.loaded",
    "explain_loss": "tensorkeep.live.reported",
}
__all__ = [
    "Finding",
    "Plan",
    "StateView",
    "TensorRecord",
    "TensorkeepError",
    "__version__",
    "check_loaded",
    "compare",
    "convert",
    "diagnose",
    "explain_loss",
    "make_plan",
    "read",
    "repair_buffers",
    "verify",
]

if TYPE_CHECKING:
    from tensorkeep.comparison import compare
    from tensorkeep.conversion import convert
    from tensorkeep.diagnosis import diagnose
    from tensorkeep.errors import TensorkeepError
    from tensorkeep.findings import Finding
    from tensorkeep.live.loaded import check_loaded, repair_buffers
    from tensorkeep.live.reported import explain_loss
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
