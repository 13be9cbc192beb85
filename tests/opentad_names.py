"""A detector's tensors under OpenTAD's names and back, for tests that hold both sides against each other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tensorkeep.conversion.naming import opentad
from tensorkeep.detection.model.weights import load_exactly
from tensorkeep.errors import TensorkeepError


def load_opentad(detector: nn.Module, tensors: Mapping[str, Tensor], where: str = "OpenTAD checkpoint") -> None:
    """Load a `state_dict` (or `state_dict_ema`) of OpenTAD into a detector of the same recipe."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = opentad.to_hf(opentad.strip_wrapper(name))
        if ours is None:
            raise TensorkeepError(f"unknown tensor {name!r}", where=where, hint="is this an ActionFormer detector?")
        renamed[ours] = tensor
    load_exactly(detector, renamed, where)


def to_opentad(detector: nn.Module) -> dict[str, Tensor]:
    """Return the detector's tensors under OpenTAD's names, sharing storage; OpenTAD loads them strictly.

    Raises:
        TensorkeepError: OpenTAD has no name for a tensor.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in detector.state_dict().items():
        theirs = opentad.from_hf(name)
        if theirs is None:
            raise TensorkeepError(
                f"OpenTAD has no tensor for {name!r}", where="detector", hint="merge LoRA into the weights first"
            )
        renamed[theirs] = tensor
    return renamed
