"""Turn one checkpoint into another: make a plan, carry it out by streaming, and prove the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.conversion.execution import convert as convert
    from tensorkeep.conversion.plan import Plan as Plan
    from tensorkeep.conversion.planning import make_plan as make_plan
    from tensorkeep.conversion.sink import Result as Result

_WHERE = {
    "Plan": "plan",
    "Result": "sink",
    "convert": "execution",
    "make_plan": "planning",
}
__all__ = ["Plan", "Result", "convert", "make_plan"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
