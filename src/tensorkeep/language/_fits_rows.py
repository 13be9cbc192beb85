"""Refuse rows that a model cannot take, and find out whether it can take packed documents without a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tensorkeep.conversion import architecture
from tensorkeep.errors import TensorkeepError
from tensorkeep.language import _documents
from tensorkeep.language.losses import forward, refuse_packing, takes_documents
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.models.meta_model import positions
from tensorkeep.models.refusals import refusals, said
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Loop
from tensorkeep.training.precision import autocast

_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_pdrop")  # of attention layers; floats, or modules with `p`
_TOKENS = 6  # of each of the two documents of a trial
_CLOSE = 1e-5  # of the largest logit; other documents in the row move it by rounding at most
_CLOSE_IN_HALF = 0.05  # the same where half precision is computed in


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


def pack_rows(model: Any, recipe: LanguageRecipe, world: World, remark: Callable[[str], None]) -> None:
    """Let a model take a recipe's packed rows without a mask, where it can; else say why not.

    Args:
        model: of transformers, on the device it computes on.
        recipe: its packing, length and precision count.
        world: this process among its peers.
        remark: is told why rows get a mask.
    """
    if recipe.data.packing == "none":
        return
    with autocast(Loop(0, 1, precision=recipe.training.precision), world):
        why = attend_documents(model)
    if why and world.first:
        remark(f"note: packed rows get a mask of {recipe.data.length} x {recipe.data.length}: {why}")


@torch.no_grad()
def attend_documents(model: Any) -> str:
    """Let attention take packed documents one by one, in place of a mask of the row, where the model's can.

    That it gives the logits of the mask is tried on the model, in the precision of the caller's autocast.

    Args:
        model: of transformers, on the device it trains on; its attention function is replaced.

    Returns:
        Why the mask stays; '' where it went.
    """
    drops = (getattr(module, name, 0) for module in model.modules() for name in _DROPOUTS)
    if any(getattr(drop, "p", drop) for drop in drops):
        return "its attention has dropout"
    device = next(model.parameters()).device
    positions = torch.arange(2 * _TOKENS, device=device)[None] % _TOKENS
    ids = torch.arange(2 * _TOKENS, device=device)[None] + 1
    batch = {"input_ids": ids, "position_ids": positions, "segments": (positions == 0).cumsum(1)}
    training = model.training
    model.eval()
    try:
        expected = forward(model, batch).logits.float()
        if not _documents.use(model):
            return "its attention function is not SDPA"
        if not takes_documents(model, ids):
            return _back(model, "a GPU takes them in half precision only")
        found = forward(model, batch).logits.float()
    except refusals() as error:
        return _back(model, f"they do not reach its attention ({said(error, 80)})")
    finally:
        model.train(training)
    close = _CLOSE if found.device.type == "cpu" and not torch.is_autocast_enabled("cpu") else _CLOSE_IN_HALF
    if not float((found - expected).abs().max()) <= close * float(expected.abs().max()):
        return _back(model, "its logits are not those of the mask")
    return ""


def _back(model: Any, why: str) -> str:
    """Give the model its attention function back; returns why."""
    if _documents.uses(model):
        _documents.unuse(model)
    return why
