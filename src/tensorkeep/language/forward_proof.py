"""Run a merged model beside its base with the adapter active in PEFT, layer by layer, and find where they part.

A merge can be equal to its plan and wrong all the same: programs pack experts, order rows and scale adapters in their
own ways. Both models get the same hidden states at every layer, those of the model with the active adapter, so a layer
that differs is at fault itself. Rounding of the merged weights lets a layer's output move by some steps of their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import torch_dtype
from tensorkeep.formats.view import StateView, read
from tensorkeep.language._as_trained import base_model, rows_of
from tensorkeep.language._rounding import recorded
from tensorkeep.language.start import Remark, loaded
from tensorkeep.quantization.replacing import clean_name
from tensorkeep.training.fsdp import blocks

_ROWS, _STEPS = 2, 4  # rows of text; steps of the merged dtype that rounding may move a layer's output by
_FLOAT = 1e-4  # of the output: float32 products summed in another order


class LayerCheck(NamedTuple):
    """How far a merged layer is from the same layer with the active adapter, both fed the same hidden states.

    Attributes:
        name: of the layer; "logits" for what follows the last one.
        difference: relative L2 of what the layer adds to its input.
        effect: the same between the layer with the active adapter and without it.
        allowed: what rounding may make of it.
    """

    name: str
    difference: float
    effect: float
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether the difference is rounding."""
        return self.difference <= self.allowed

    @property
    def told(self) -> bool:
        """Whether a layer without the adapter would have been noticed."""
        return self.effect > self.allowed


@torch.no_grad()
def prove_forward(
    merged: str,
    base: StateView,
    quantized: str | None,
    adapter: str,
    texts: Sequence[str],
    device: str | None = None,
    remark: Remark = lambda _: None,
) -> list[LayerCheck]:
    """Compare a merged model with its base under the adapter, as PEFT runs it.

    Args:
        merged: an hf folder with config and tokenizer.
        base: what the adapter was merged into.
        quantized: what a float base was quantized to for training, as "nf4 (double)"; None: nothing.
        adapter: PEFT's folder.
        texts: files as training reads them; two rows are taken.
        device: to compute on; None: a GPU where there is one.
        remark: is told what was left out of the texts.

    Returns:
        One check a layer, then one of the logits of both models on their own.

    Raises:
        TensorkeepError: PEFT is not installed or cannot load the adapter, or the models have other layers.

    Example:
        >>> checks = prove_forward("merged", read("base"), None, "adapter", ["texts.jsonl"])  # doctest: +SKIP
        >>> all(check.equal for check in checks)  # doctest: +SKIP
        True
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = rows_of(merged, texts, _ROWS, 1, remark).to(place)
    view = read(merged)
    live = with_adapter(base_model(base, quantized, place), adapter)
    model = loaded(view).float().to(place).eval()
    ours, theirs = blocks(model), blocks(live.get_base_model())
    if len(ours) != len(theirs) or not ours:
        raise TensorkeepError(f"{len(ours)} layers merged, {len(theirs)} with the adapter", where=merged)
    names = {id(module): clean_name(name) for name, module in model.named_modules()}
    calls, hidden = recorded(live, theirs, [rows])
    x, found = hidden[0], []
    for layer, active, (call,) in zip(ours, theirs, calls):
        want = call.of(active, x)
        with live.disable_adapter():
            without = call.of(active, x)
        made = call.of(layer, x)
        size = float((want - x).norm()) or 1.0
        found.append(
            LayerCheck(
                names[id(layer)],
                float((made - want).norm()) / size,
                float((without - want).norm()) / size,
                _allowed(view, names[id(layer)]),
            )
        )
        x = want
    return [*found, _logits(model, live, rows, max(check.allowed for check in found) * len(ours) ** 0.5)]


def _logits(model: nn.Module, live: Any, rows: Tensor, allowed: float) -> LayerCheck:
    """Compare what both models give as a whole."""
    want: Tensor = live(input_ids=rows, use_cache=False).logits.float()
    own = model(input_ids=rows, use_cache=False).logits.float()
    with live.disable_adapter():
        bare = live(input_ids=rows, use_cache=False).logits.float()
    size = float(want.norm()) or 1.0
    return LayerCheck("logits", float((own - want).norm()) / size, float((bare - want).norm()) / size, allowed)


def with_adapter(model: nn.Module, adapter: str) -> Any:
    """Load an adapter onto a model with PEFT.

    Args:
        model: the base.
        adapter: PEFT's folder.

    Raises:
        TensorkeepError: PEFT is not installed, or refuses the folder.
    """
    try:
        import peft
    except ImportError:
        raise TensorkeepError("PEFT is not installed: it runs the adapter", where="--prove-forward") from None
    if not (Path(adapter) / "adapter_config.json").is_file():  # PEFT would ask the hub for a folder of this name
        raise TensorkeepError("is no PEFT folder", where=adapter, hint="tensorkeep convert ADAPTER OUT --to peft")
    try:
        return peft.PeftModel.from_pretrained(model, adapter, local_files_only=True).eval()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        what = f"PEFT {peft.__version__} does not run it: {str(error).splitlines()[0][:200]}"
        raise TensorkeepError(what, where=adapter) from error


def _allowed(view: StateView, layer: str) -> float:
    """Return what rounding to the dtype of a layer's weights may make of its output."""
    dtypes = {torch_dtype(view, name) for name in view if name.startswith(f"{layer}.") and len(view[name].shape) > 1}
    steps = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    return max(_STEPS * max(steps, default=torch.finfo(torch.bfloat16).eps), _FLOAT)
