"""A detector's run as one whole detector in plain floats: base, what trained, and the average, joined.

A run over a frozen backbone stores what trains; the backbone comes from the pretrained file or RUN/base, and may be
quantized. Elsewhere (OpenTAD, a file of its own) there is no such base: low-rank updates are added into their linears,
quantized linears become the floats that were trained against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tensorkeep.conversion.naming.opentad import DEQUANTIZED
from tensorkeep.conversion.naming.opentad_recipe import FILE
from tensorkeep.detection.model.adapters import LoRALinear, QLoRAAdapter
from tensorkeep.detection.model.config import without_updates
from tensorkeep.detection.start import open_detector, run_of
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.storage import run_folder
from tensorkeep.storage.placement import write_bytes
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.recipe import to_yaml

Remark = Callable[[str], None]


class Whole(NamedTuple):
    """A run's detector, written and opened.

    Attributes:
        view: every tensor of the detector, live weights or averaged ones.
        average: the tensors whose average is another than in `view`; None where the average was not asked for.
    """

    view: StateView
    average: StateView | None


def write_detector(
    path: str | Path, folder: Path, ema: bool = False, both: bool = False, remark: Remark = lambda _: None
) -> Whole:
    """Write the newest (or the named) checkpoint of a detector's run as a whole detector, with its recipe.

    Args:
        path: the run's folder, or one of its step folders.
        folder: made here.
        ema: write the averaged weights where there are some, not the live ones.
        both: write the live weights, and beside them the average.
        remark: is told of checkpoints that were passed over, and what had to be joined.

    Returns:
        What was written, opened.

    Raises:
        TensorkeepError: the run holds no valid checkpoint, or its base is another one or gone.
    """
    path = Path(path)
    step, epoch = _position(path, remark)
    live = open_detector(step, ema=ema and not both, best=False, remark=remark)
    tensors, changed = plain_state(live.detector)
    recipe = replace(live.recipe, model=without_updates(live.recipe.model))
    if recipe.training.quantize_backbone is not None:
        recipe = replace(recipe, training=replace(recipe.training, quantize_backbone=None))
    for what, count in changed.items():
        remark(f"note: {count} linears {what}")
    folder.mkdir()
    write_bytes(folder / FILE, to_yaml(recipe).encode())
    view = _written(tensors, folder / "model.safetensors", path)
    view.entries["epoch"] = epoch
    if live.recipe.training.quantize_backbone is not None:
        view.entries[DEQUANTIZED] = live.recipe.training.quantize_backbone
    if not both:
        return Whole(view, None)
    averaged = open_detector(step, ema=True, best=False)
    if not averaged.averaged:
        remark("note: K08 the run keeps no average: the live weights stand in its place too")
        return Whole(view, None)
    other = {n: t for n, t in plain_state(averaged.detector)[0].items() if not torch.equal(t, tensors[n])}
    (folder / "average").mkdir()
    return Whole(view, _written(other, folder / "average" / "model.safetensors", path) if other else None)


def _position(path: Path, remark: Remark) -> tuple[Path, int]:
    """Return the step folder that a path means, and OpenTAD's number of the epoch that it ends."""
    run = run_of(path)
    if run is None:
        raise TensorkeepError("is no run of a detector", where=path)
    if path.resolve() != run.resolve():
        state, step = checkpoint.load(path), path
    else:
        found = checkpoint.newest(run)
        if found is None:
            raise TensorkeepError("the run holds no checkpoint", where=run, hint="train it first")
        for finding in found[2]:
            remark(f"skipped: {finding.code} {finding.message}")
        state, step = found[0], run_folder.folder_of(run, int(found[0].document["step"]))
    return step, max(int(state.document.get("epoch", 0)) - 1, 0)


def _written(tensors: Mapping[str, Tensor], path: Path, named: Path) -> StateView:
    """Write tensors to a file and open it under the name of the run."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
    view = read(str(path.parent))
    view.path = str(named)
    return view


# -- plain floats -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_state(detector: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return a detector's tensors without low-rank updates and codes, and how many linears were changed for it, by how.

    A sum is computed in float32 and stays so; codes become the float32 numbers that they stand for.

    Args:
        detector: on the CPU.
    """
    made: dict[str, Tensor] = {}
    changed: dict[str, int] = {}
    taken: list[str] = []
    bottlenecks = {n for n, m in detector.named_modules() if isinstance(m, QLoRAAdapter)}
    for name, module in detector.named_modules():
        if any(name.startswith(f"{t}.") for t in taken):
            continue
        if isinstance(module, LoRALinear):
            what = "take in their low-rank update"
            weight = _dense(module.base) + module.scale * (module.lora_B.float() @ module.lora_A.float())
            bias: Tensor | None = module.base.bias
            if bias is None and name.rpartition(".")[0] in bottlenecks:
                bias = weight.new_zeros(len(weight))  # OpenTAD's adapters have one
        elif isinstance(module, QuantLinear):
            what, weight, bias = "are dequantized", module.dequantize(), module.bias
        else:
            continue
        taken.append(name)
        changed[what] = changed.get(what, 0) + 1
        made[f"{name}.weight"] = weight
        if bias is not None:
            made[f"{name}.bias"] = bias.detach()
    rest: dict[str, Any] = detector.state_dict()
    return {n: t for n, t in rest.items() if not any(n.startswith(f"{t}.") for t in taken)} | made, changed


def _dense(linear: nn.Linear | QuantLinear) -> Tensor:
    """Return a linear's weight in float32."""
    return linear.dequantize() if isinstance(linear, QuantLinear) else linear.weight.detach().float()
