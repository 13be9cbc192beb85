"""Low-rank adapters: read from files, put on a model, merged into the base they were trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.adapters.files import load_adapter as load_adapter
    from tensorkeep.adapters.files import save_adapter as save_adapter
    from tensorkeep.adapters.lora import add_lora as add_lora
    from tensorkeep.adapters.merging import merge as merge
    from tensorkeep.adapters.planning import plan_merge as plan_merge
    from tensorkeep.adapters.reading import Adapter as Adapter
    from tensorkeep.adapters.reading import read_adapter as read_adapter

_WHERE = {
    "Adapter": "reading",
    "add_lora": "lora",
    "load_adapter": "files",
    "merge": "merging",
    "plan_merge": "planning",
    "read_adapter": "reading",
    "save_adapter": "files",
}
__all__ = ["Adapter", "add_lora", "load_adapter", "merge", "plan_merge", "read_adapter", "save_adapter"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
