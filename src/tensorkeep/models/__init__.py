"""A checkpoint as a live model: its names, tensors and buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.models.counterpart import StoredModel as StoredModel
    from tensorkeep.models.language_model import model_of as model_of
    from tensorkeep.models.repair import repair_buffers as repair_buffers
    from tensorkeep.models.tensors import held as held

_WHERE = {
    "StoredModel": "counterpart",
    "held": "tensors",
    "model_of": "language_model",
    "repair_buffers": "repair",
}
__all__ = ["StoredModel", "held", "model_of", "repair_buffers"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
