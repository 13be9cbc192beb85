"""A checkpoint as a live model: its names, tensors and buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.models.counterpart import StoredModel as StoredModel
    from tensorkeep.models.language_model import model_of as model_of
    from tensorkeep.models.names import model_names as model_names
    from tensorkeep.models.names import to_file as to_file
    from tensorkeep.models.names import to_live as to_live
    from tensorkeep.models.repair import repair_buffers as repair_buffers
    from tensorkeep.models.tensors import held as held

_WHERE = {
    "StoredModel": "counterpart",
    "held": "tensors",
    "model_names": "names",
    "model_of": "language_model",
    "repair_buffers": "repair",
    "to_file": "names",
    "to_live": "names",
}
__all__ = ["StoredModel", "held", "model_names", "model_of", "repair_buffers", "to_file", "to_live"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
