"""tensorkeep: fine-tune with quantized low-rank adapters, and keep every tensor right.

Public names are resolved when first used, so that `import tensorkeep` loads neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy
from tensorkeep._moved import install

__version__ = "0.2.0"

_WHERE = {
    "TensorkeepError": "tensorkeep.errors",
    "TensorRecord": "tensorkeep.storage.record",
    "StateView": "tensorkeep.formats.view",
    "read": "tensorkeep.formats.view",
    "DurableWriter": "tensorkeep.training.durable_writer",
    "DurableReader": "tensorkeep.training.durable_reader",
    "Plan": "tensorkeep.conversion.plan",
    "make_plan": "tensorkeep.conversion.planning",
    "convert": "tensorkeep.conversion.execution",
    "compare": "tensorkeep.diagnosis.comparison",
    "verify": "tensorkeep.diagnosis.verification",
    "identify": "tensorkeep.diagnosis.identity.identify",
    "Finding": "tensorkeep.findings",
    "diagnose": "tensorkeep.diagnosis.diagnosis",
    "check_loaded": "tensorkeep.diagnosis.live.loaded",
    "repair_buffers": "tensorkeep.models.repair",
    "explain_loss": "tensorkeep.diagnosis.live.reported",
    "guard": "tensorkeep.integrations.guard",
}
__all__ = [
    "DurableReader",
    "DurableWriter",
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
    "guard",
    "identify",
    "make_plan",
    "read",
    "repair_buffers",
    "verify",
]

if TYPE_CHECKING:
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.plan import Plan
    from tensorkeep.conversion.planning import make_plan
    from tensorkeep.diagnosis.comparison import compare
    from tensorkeep.diagnosis.diagnosis import diagnose
    from tensorkeep.diagnosis.identity.identify import identify
    from tensorkeep.diagnosis.live.loaded import check_loaded
    from tensorkeep.diagnosis.live.reported import explain_loss
    from tensorkeep.diagnosis.verification import verify
    from tensorkeep.errors import TensorkeepError
    from tensorkeep.findings import Finding
    from tensorkeep.formats.view import StateView, read
    from tensorkeep.integrations.guard import guard
    from tensorkeep.models.repair import repair_buffers
    from tensorkeep.storage.record import TensorRecord
    from tensorkeep.training.durable_reader import DurableReader
    from tensorkeep.training.durable_writer import DurableWriter


__getattr__, __dir__ = lazy(__name__, _WHERE)
install()
