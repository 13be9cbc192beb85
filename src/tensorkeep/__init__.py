"""tensorkeep: fine-tune with quantised low-rank adapters, and keep every tensor right.

Public names are resolved when first used, so that `import tensorkeep` loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "TensorkeepError": "tensorkeep.errors",
    "TensorRecord": "tensorkeep.storage.record",
    "StateView": "tensorkeep.formats.view",
    "read": "tensorkeep.formats.view",
    "Plan": "tensorkeep.convert.plan",
    "make_plan": "tensorkeep.convert.planning",
    "convert": "tensorkeep.convert.convert",
    "compare": "tensorkeep.diagnose.compare",
    "verify": "tensorkeep.diagnose.verify",
    "Finding": "tensorkeep.findings",
    "diagnose": "tensorkeep.diagnose.diagnosis",
    "check_loaded": "tensorkeep.diagnose.live.loaded",
    "repair_buffers": "tensorkeep.diagnose.live.loaded",
    "explain_loss": "tensorkeep.diagnose.live.reported",
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
    from tensorkeep.diagnose.compare import compare
    from tensorkeep.convert.convert import convert
    from tensorkeep.diagnose.diagnosis import diagnose
    from tensorkeep.errors import TensorkeepError
    from tensorkeep.findings import Finding
    from tensorkeep.diagnose.live.loaded import check_loaded, repair_buffers
    from tensorkeep.diagnose.live.reported import explain_loss
    from tensorkeep.convert.plan import Plan
    from tensorkeep.convert.planning import make_plan
    from tensorkeep.storage.record import TensorRecord
    from tensorkeep.diagnose.verify import verify
    from tensorkeep.formats.view import StateView, read


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'tensorkeep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
