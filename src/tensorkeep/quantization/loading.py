"""Load checkpoints into models with quantized linears: strict, all or nothing, one tensor in memory at a time.

A model is compared with the file name by name before a byte of it changes: what fits exactly is loaded, whatever does
not is refused by name. Quantized weights go where a linear of their shape stands, whether it was quantized before,
otherwise or not at all; float weights are quantized on the way where that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tensorkeep.formats.memory import view_of
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization._load import Load
from tensorkeep.quantization._load_plan import Loaded, Repair, Settings
from tensorkeep.quantization.encoding import EXCLUDED
from tensorkeep.quantization.packed import Kind, kind_of
from tensorkeep.quantization.stacks import quantize_stack

CheckpointLike = Mapping[str, Tensor] | StateView | str | Path


def load_quantized(model: nn.Module, source: CheckpointLike, absent: Sequence[str] = ()) -> Loaded:
    """Load a quantized checkpoint into a model of the same architecture.

    Dense linears whose weight is quantized in the file become `QuantLinear`. Codes, scales and digests are proven
    before anything is copied.

    Args:
        model: the model; changed in place.
        source: a path, a view, or tensors by name.
        absent: patterns of the model's names that the file need not have (a new adapter's).

    Returns:
        What was loaded, by name.

    Raises:
        TensorkeepError: it lists what is missing (K01), unexpected (K02), of another shape (S01) or dtype (S04), not
            quantized, or damaged (Q01, Q02, Q03, Q06); the model is then untouched.

    Example:
        >>> from tensorkeep.quantization.linear import QuantLinear
        >>> layer = nn.Sequential(QuantLinear.of(nn.Linear(64, 8)))
        >>> load_quantized(nn.Sequential(nn.Linear(64, 8)), layer.state_dict()).quantized
        ['0']
    """
    return Load(model, _view(source), None, tuple(absent)).run(None, None)


def load_quantizing(
    model: nn.Module,
    source: CheckpointLike,
    kind: Kind | int | None = "nf4",
    double: bool = True,
    block: int = 64,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = EXCLUDED,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    repair: Repair | None = None,
    absent: Sequence[str] = (),
) -> Loaded:
    """Load a float checkpoint, quantizing linears and stacks of experts on the way; the model ends up frozen.

    Build `model` with its parameters on the meta device. Peak memory is the quantized model and one tensor. A weight
    that the file holds quantized already is taken as it is.

    Args:
        model: the model; changed in place.
        source: a path, a view, or tensors by name.
        kind: "nf4", "fp4", "int8", or 4 or 8 bits; None quantizes nothing that the file does not hold quantized.
        double: quantize the scales as well (nf4, fp4).
        block: number of flat elements that share a scale (nf4, fp4).
        include: patterns of the linears to quantize.
        exclude: patterns of those to leave.
        device: where parameters on meta go; the CPU where it is not given.
        dtype: for what is not quantized; its stored dtype where it is not given.
        repair: recomputes non-persistent buffers that are on meta (`tensorkeep.repair_buffers`) and returns their
            names; it is an error to leave one.
        absent: patterns of the model's names that the file need not have.

    Returns:
        What was loaded, by name.

    Raises:
        TensorkeepError: as `load_quantized`, before anything is changed.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(64, 8))
        >>> load_quantizing(model, nn.Sequential(nn.Linear(64, 8)).state_dict(), "nf4").quantized
        ['0']
    """
    chosen = () if kind is None else tuple(include)
    settings = Settings(kind_of(kind or "nf4"), double, block, chosen, tuple(exclude))
    place = None if device is None else torch.device(device)
    loaded = Load(model, _view(source), settings, tuple(absent), place, dtype, quantize_stack).run(repair, place)
    model.requires_grad_(False)
    return loaded


def _view(source: CheckpointLike) -> StateView:
    if isinstance(source, StateView):
        return source
    return read(source) if isinstance(source, (str, Path)) else view_of(source)
