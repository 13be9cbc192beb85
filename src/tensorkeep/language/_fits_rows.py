"""Refuse rows that a model cannot take: longer than its positions, or of documents that it lets see each other."""

from __future__ import annotations

from typing import Any

import torch

from tensorkeep.conversion import architecture
from tensorkeep.errors import TensorkeepError
from tensorkeep.language.losses import forward, refuse_packing
from tensorkeep.models.meta_model import positions
from tensorkeep.models.refusals import refusals, said

_TOKENS = 6  # of each of the two documents of a trial
_CLOSE = 1e-5  # of the largest logit; other documents in the row move it by rounding at most


def refuse_rows(model: Any, length: int, packed: bool) -> None:
    """Refuse rows of this length, or of several documents, for a model that would misread them.

    Args:
        model: of transformers.
        length: tokens of a row.
        packed: whether several documents lie in a row.

    Raises:
        TensorkeepError: the table of positions ends before the row, or documents see each other.
    """
    most = positions(model)
    if most is not None and length > most:
        what = f"rows of {length} tokens; {type(model).__name__} has {most} positions"
        raise TensorkeepError(what, where="data.length", hint=f"length: {most}")
    if not packed:
        return
    refuse_packing(model.config.get_text_config(), length)
    if getattr(model.config, "model_type", None) not in architecture.FAMILIES and (why := _mixes(model)):
        what = f"documents cannot be packed for {type(model).__name__}: {why}"
        raise TensorkeepError(what, where="data.packing", hint="packing: none")


@torch.no_grad()
def _mixes(model: Any) -> str:
    """Say how a document's logits depend on what lies before it in its row, tried on few tokens; '' for not at all."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    at = torch.arange(2 * _TOKENS, device=device) % _TOKENS
    own = torch.arange(_TOKENS, device=device) + 1
    segments = torch.arange(2, device=device).repeat_interleave(_TOKENS)[None]

    def last(before: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([before, own])[None]
        found = forward(model, {"input_ids": ids, "segments": segments, "position_ids": at[None]})
        logits: torch.Tensor = found.logits[0, _TOKENS:].float()
        return logits

    try:
        first, second = last(own + 1), last(own.flip(0) + _TOKENS)
        alone = model(input_ids=own[None], use_cache=False).logits[0].float()
    except refusals() as error:
        return f"it takes no mask of documents ({said(error, 120)})"
    finally:
        model.train(training)
    top = float(alone.abs().max())
    if not float((first - second).abs().max()) <= _CLOSE * top:
        return "its logits change with the document before (tried on the model)"
    return "" if float((first - alone).abs().max()) <= 100 * _CLOSE * top else "its logits are not those of a row alone"
