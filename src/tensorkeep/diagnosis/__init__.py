"""Say what a checkpoint holds, how two differ, what is wrong with one, and how to undo that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.diagnosis.comparison import compare as compare
    from tensorkeep.diagnosis.diagnosis import Diagnosis as Diagnosis
    from tensorkeep.diagnosis.diagnosis import diagnose as diagnose
    from tensorkeep.diagnosis.identity.identify import identify as identify
    from tensorkeep.diagnosis.live.loaded import check_loaded as check_loaded
    from tensorkeep.diagnosis.live.reported import explain_loss as explain_loss
    from tensorkeep.diagnosis.repairs import repair as repair
    from tensorkeep.diagnosis.verification import verify as verify

_WHERE = {
    "Diagnosis": "diagnosis",
    "check_loaded": "live.loaded",
    "compare": "comparison",
    "diagnose": "diagnosis",
    "explain_loss": "live.reported",
    "identify": "identity.identify",
    "repair": "repairs",
    "verify": "verification",
}
__all__ = ["Diagnosis", "check_loaded", "compare", "diagnose", "explain_loss", "identify", "repair", "verify"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
