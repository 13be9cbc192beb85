"""Let PEFT itself load an adapter that was written for it, and compare what it holds with the model that trained.

The base is built without weights, so this costs the adapter's memory alone.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorkeep.adapters.lora import layers
from tensorkeep.adapters.stacked import adapted_stacks
from tensorkeep.errors import TensorkeepError
from tensorkeep.models.language_model import silent
from tensorkeep.models.refusals import refusals, said

_PREFIX = "base_model.model."
_NAME = "default"  # PEFT's word for the adapter that is loaded first


@dataclass
class Loaded:
    """What PEFT makes of an adapter folder.

    Attributes:
        by: PEFT and its version.
        pairs: how many low-rank pairs it holds.
        left: adapted modules that it does not adapt.
        differing: module -> what is different there, of the others.
        refused: what it says where it refuses the folder.
    """

    by: str
    pairs: int = 0
    left: list[str] = field(default_factory=list)
    differing: dict[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def problem(self) -> str:
        """What is wrong, in a few words; empty where PEFT holds the same adapter bit for bit."""
        if self.refused:
            return f"refuses it: {self.refused}"
        if self.left:
            return f"does not adapt {self.left[0]}" + (f" and {len(self.left) - 1} more" if self.left[1:] else "")
        return next((f"{what} at {name}" for name, what in self.differing.items()), "")


def load_in_peft(folder: Path, model: nn.Module, dropout: bool = True) -> Loaded | None:
    """Load an adapter folder with PEFT onto the model's base, without the base's weights.

    Args:
        folder: as `write_adapter` made it.
        model: the live model with the same adapter on it.
        dropout: False leaves out the config's, to see what PEFT would do without.

    Returns:
        What came of it; None where PEFT is not installed.

    Raises:
        TensorkeepError: the model cannot be built without weights, so that nothing can be said.
    """
    try:
        with silent():  # PEFT imports bitsandbytes, which tells of kernels that it cannot load
            import peft
    except ImportError:
        return None
    out = Loaded(f"PEFT {peft.__version__}")
    live: Any = model
    try:
        with torch.device("meta"), silent():
            base: nn.Module = type(live)(copy.deepcopy(live.config))
    except refusals() as error:
        what = f"cannot be built without weights: {said(error)}"
        raise TensorkeepError(what, where=type(model).__name__, hint="load the folder with PEFT and compare") from None
    _without_memory(base)
    try:
        with warnings.catch_warnings(), silent():
            warnings.simplefilter("ignore")  # what they would tell is compared below
            config: Any = peft.PeftConfig.from_pretrained(str(folder))
            config.lora_dropout = config.lora_dropout if dropout else 0.0
            made = peft.PeftModel.from_pretrained(
                base, str(folder), config=config, low_cpu_mem_usage=True, torch_device="cpu"
            )
    except refusals() as error:
        out.refused = said(error)
        return out
    theirs = {n.removeprefix(_PREFIX): m for n, m in made.named_modules() if _NAME in getattr(m, "lora_A", ())}
    mine: dict[str, Any] = {**layers(model), **adapted_stacks(model)}
    for name in [n for n, m in theirs.items() if hasattr(m, "parameter_name")]:
        inner = f"{name.replace('.base_layer', '')}.{theirs[name].parameter_name}"
        if inner in mine:
            theirs[inner] = theirs.pop(name)
    out.pairs, out.left = len(theirs), [n for n in mine if n not in theirs]
    out.differing = {n: "it adapts what was not trained" for n in theirs if n not in mine}
    for name, layer in mine.items():
        if name in theirs and (what := _difference(layer, theirs[name])):
            out.differing[name] = what
    return out


def _without_memory(model: nn.Module) -> None:
    """Put one zero, stretched to the shape, in the place of every parameter: PEFT moves adapters to their base."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            hollow = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(hollow, requires_grad=False))


def _difference(mine: Any, theirs: Any) -> str:
    """Say how PEFT's layer differs from the one that trained; nothing where they are the same."""
    for half in ("lora_A", "lora_B"):
        own, found = getattr(mine, half).detach().cpu(), getattr(theirs, half)[_NAME].weight
        if found.is_meta:
            return f"{half} is not loaded"
        if not torch.equal(own.to(found.dtype), found.detach().cpu()):
            return f"{half} has other values"
    scale = theirs.scaling[_NAME]
    return "" if math.isclose(scale, mine.scale, rel_tol=1e-9) else f"it scales by {scale:g}, not {mine.scale:g}"
