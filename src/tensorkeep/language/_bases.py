"""Load a base in the form in which people have it: floats, or codes of any kind that is read here.

Codes of bitsandbytes stay as they are, bit for bit, and the model computes with them. Of every other kind the floats
that they stand for are taken, one tensor in memory at a time, and quantized again where the recipe says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion.dequantizing import refuse_unread
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.formats.names import matches
from tensorkeep.formats.view import StateView
from tensorkeep.models.in_its_names import LiveView, in_its_names
from tensorkeep.models.repair import repair_buffers
from tensorkeep.quantization.linear_layers import stacked_parameters
from tensorkeep.quantization.loading import load_quantizing
from tensorkeep.quantization.replacing import clean_name, left_wide, quantizable, tied_parameters
from tensorkeep.quantization.stored import find_quantized

Remark = Callable[[str], None]
Build = Callable[[Mapping[str, Any]], nn.Module]


def is_quantized(view: StateView) -> bool:
    """Whether a checkpoint holds codes, or its config says so.

    Args:
        view: the checkpoint.
    """
    return "quantization_config" in (view.config or {}) or bool(find_quantized(view))


def in_codes(
    view: StateView,
    build: Build,
    kind: Any,
    device: torch.device,
    trains: bool = False,
    remark: Remark = lambda _: None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module | None:
    """Load a checkpoint's model, its weights as codes or floats, with the memory of the model and one tensor.

    Args:
        view: an hf checkpoint with its config.
        build: makes the model of a config on the meta device.
        kind: what float linears are quantized to on the way; None for nothing.
        device: where the model goes.
        trains: the weights themselves are to train: no codes stay.
        remark: is told which codes stay and which are dequantized.
        dtype: of what stays floats.

    Returns:
        The model, frozen; None for a float checkpoint whose tensors transformers rearranges in a way not known here.

    Raises:
        TensorkeepError: the checkpoint holds codes that cannot be read (with the way out), or does not fit its model.
    """
    way_out = f"if it can be read there: tensorkeep convert {word(view.path)} FLOATS --to hf --dtype bf16"
    refuse_unread(view, "dequantize it with the library that wrote it, save the floats, and give those as model")
    try:
        live = in_its_names(view)
        model = build(live.config or {})
        wide = left_wide(model)
        if not trains:
            tied = tied_parameters(model)
            linears: dict[str, Any] = {f"{clean_name(n)}.weight": m for n, m in model.named_modules() if quantizable(m)}
            held = {n for n, m in linears.items() if id(m.weight) not in tied}
            piles = stacked_parameters(model)
            held |= {clean_name(f"{p}.{n}") for p, m, n in piles if not getattr(m, "is_transposed", False)}
            live = in_its_names(
                view, lambda n, w: n in held and not matches(n.removesuffix(".weight"), wide) and w.held
            )
    except TensorkeepError as error:
        if error.code == "K06" and not is_quantized(view):
            return None
        raise TensorkeepError(error.what, where=error.where, code=error.code, hint=error.hint or way_out) from None
    _say(live, kind, trains, remark)
    load_quantizing(model, live, kind, exclude=wide, device=device, dtype=dtype, repair=repair_buffers)
    return model.eval()


def _say(live: LiveView, kind: Any, trains: bool, remark: Remark) -> None:
    """Say which codes stay as they are, and which give way to the floats that they stand for."""
    assert live.stored is not None
    kept = {w.name for w in live.kept.values()}
    found = list(find_quantized(live.stored).values())
    for held, count in Counter(w.kind for w in found if w.name in kept).items():
        other = f"; quantize_backbone: {kind} is for the other linears" if kind not in (None, held) else ""
        remark(f"{live.path}: {count} weights are {held} codes, which stay as they are{other}")
    for held, count in Counter(w.kind for w in found if w.name not in kept).items():
        then = "because they train" if trains else f"then quantized to {kind} where they are linears" if kind else ""
        remark(f"{live.path}: {count} {held} weights are dequantized to float32 one at a time{', ' * bool(then)}{then}")
