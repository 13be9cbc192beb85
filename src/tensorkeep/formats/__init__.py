"""Any checkpoint as named tensors: `read` opens every format as a `StateView`; one file per format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.formats.names import grouped as grouped
    from tensorkeep.formats.names import matches as matches
    from tensorkeep.formats.table import FORMATS as FORMATS
    from tensorkeep.formats.view import StateView as StateView
    from tensorkeep.formats.view import read as read

_WHERE = {
    "FORMATS": "table",
    "StateView": "view",
    "grouped": "names",
    "matches": "names",
    "read": "view",
}
__all__ = ["FORMATS", "StateView", "grouped", "matches", "read"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
