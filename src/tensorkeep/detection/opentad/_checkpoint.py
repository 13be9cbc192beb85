"""Read the weights, names and position out of a checkpoint of OpenTAD (`epoch_41.pth`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tensorkeep.conversion.naming import opentad
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.names import unwrap
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.description import QuantizedWeight

LIVE = "state_dict"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint of OpenTAD and where its training stood.

    Attributes:
        view: the file.
        names: our name -> stored name of each weight, in the file's order.
        weights: its quantized weights by stored name.
        epoch: how many epochs are over.
    """

    view: StateView
    names: dict[str, str]
    weights: Mapping[str, QuantizedWeight]
    epoch: int

    @property
    def parts(self) -> set[str]:
        """Stored names of the scales and states of quantized weights."""
        return {stored for weight in self.weights.values() for stored in weight.parts.values()}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read names and position of a checkpoint; tensors are read when they are asked for.

    Raises:
        TensorkeepError: The file has no weights or no epoch (K01), or belongs to another model (K02, K03).
    """
    view = read(path)
    view.checked = True  # damage inside the archive is told where it is read
    names: dict[str, str] = {}
    for stored in view:
        if not stored.startswith(f"{LIVE}."):
            continue
        clean = unwrap(stored[len(LIVE) + 1 :])[0]
        ours = opentad.to_hf(clean)
        if ours is None:
            hint = "OpenTAD's ActionFormer, TriDet, TemporalMaxer and CausalTAD go on here, its other detectors do not"
            raise TensorkeepError(f"unknown tensor {clean!r}", where=view.path, code="K02", hint=hint)
        if ours in names:
            raise TensorkeepError(f"{stored} and {names[ours]} are one tensor", where=view.path, code="K03")
        names[ours] = stored
    epoch = view.entries.get("epoch")
    if not names or type(epoch) is not int or not 0 <= epoch < 1 << 30:
        lacking = [what for what, there in ((LIVE, names), ("epoch", type(epoch) is int)) if not there]
        what = f"{', '.join(lacking)} not in it" if lacking else f"its epoch is {shown(epoch)}"
        hint = "weights alone are a start, not a position: --training.pretrained FILE"
        raise TensorkeepError(f"is no checkpoint of OpenTAD: {what}", where=view.path, code="K01", hint=hint)
    return Checkpoint(view, names, quantized.find_quantized(view, {s: s for s in names.values()}), epoch + 1)


def whole_number(view: StateView, key: str) -> int | None:
    """Return a plain entry of the file as a whole number; None where it is none."""
    value = view.entries.get(key)
    return value if type(value) is int and 0 <= value < 1 << 53 else None
