"""Next-token loss as a sum over targets, for models of transformers, without the logits of a whole batch.

The head is applied to the targets alone, a chunk at a time (`head_loss`; a head that is no plain matrix is applied once
more in the backward): what is held is one chunk of logits, not `batch x length x vocabulary`. That the head is a plain
linear is tried on the model itself before it is relied on; where it is not (soft-capped or scaled logits), the model's
own logits are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tensorkeep.errors import TensorkeepError
from tensorkeep.language import _documents
from tensorkeep.language._head_loss import head_loss
from tensorkeep.language.data.batches import IGNORED, block_mask, targets_of
from tensorkeep.models.language_model import text_config
from tensorkeep.models.refusals import said
from tensorkeep.quantization.spreading import holds_codes

CHUNK = 2048  # targets a chunk: of a vocabulary of 128,256 that is 1 GB of float32 logits


def cross_entropy_sum(hidden: Tensor, head: nn.Module | None, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum -log p over targets; only one chunk of float32 logits exists at a time, also in the backward.

    Args:
        hidden: last hidden state of each target `[n, width]`.
        head: makes logits of hidden states (None: `hidden` is logits already).
        targets: token ids, int64 `[n]`.
        chunk: so many targets at a time.

    Returns:
        A float32 scalar.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for at in range(0, len(targets), chunk):
        part, wanted = hidden[at : at + chunk], targets[at : at + chunk]
        if torch.is_grad_enabled() and len(targets) > chunk:
            total = total + checkpoint(_chunk_loss, part, head, wanted, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _chunk_loss(part, head, wanted)
    return total


def _chunk_loss(hidden: Tensor, head: nn.Module | None, targets: Tensor) -> Tensor:
    """Sum of -log p over one chunk of targets."""
    logits = hidden if head is None else head(hidden)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def log_probabilities(hidden: Tensor, head: nn.Module | None, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Compute log p of each target, float32 `[n]`, chunked as in `cross_entropy_sum`."""
    parts = []
    for at in range(0, len(targets), chunk):
        part, wanted = hidden[at : at + chunk], targets[at : at + chunk]
        if torch.is_grad_enabled() and len(targets) > chunk:
            parts.append(checkpoint(_chunk_log, part, head, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk_log(part, head, wanted))
    return torch.cat(parts) if parts else hidden.sum(-1).float()


def _chunk_log(hidden: Tensor, head: nn.Module | None, targets: Tensor) -> Tensor:
    """Return log p of each target of one chunk."""
    logits = hidden if head is None else head(hidden)
    return -F.cross_entropy(logits.float(), targets, reduction="none")


# -- models of transformers -------------------------------------------------------------------------------------------


def inner(model: nn.Module) -> Any:
    """Take DDP's wrapper off a transformers model, where there is one."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def headless(model: nn.Module, plain: bool) -> Iterator[nn.Module | None]:
    """Within it the model returns what goes into its head in place of logits; yields the head.

    With `plain` false (or a model without a head) it yields None and changes nothing.
    """
    owner = inner(model)
    head = owner.get_output_embeddings() if plain else None
    if head is None:
        yield None
        return
    path = next(name for name, module in owner.named_modules() if module is head)
    place, _, name = path.rpartition(".")
    holder = owner.get_submodule(place)
    setattr(holder, name, _THROUGH)
    try:
        yield head
    finally:
        setattr(holder, name, head)


class _Through(nn.Module):
    """Stands in the place of a head and returns its input: a copy, since FSDP2 wants no view of what it hooks."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


_THROUGH = _Through()  # one object: a compiled model sees the same module each time


class _First(nn.ModuleList):
    """Layers of which a forward that walks them meets the first alone; whoever walks the modules meets all."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[:1])

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList(self) if isinstance(index, slice) else super().__getitem__(index)


@contextmanager
def _one_layer(model: Any) -> Iterator[None]:
    """Within it a model of transformers runs its first layer alone: no other has to be gathered or dequantized.

    All layers stay in the model, for FSDP2 looks for its own in the first forward.
    """
    base: Any = getattr(model, "base_model", model)
    layers = getattr(base, "layers", None)
    if type(layers) is not nn.ModuleList:
        yield
        return
    base.layers = _First(list(layers))
    try:
        yield
    finally:
        base.layers = layers


def _capped(config: Any) -> bool:
    """Whether a config names a soft cap of the logits, which is too weak to show in four small ones.

    Gemma says `final_logit_softcapping`, RecurrentGemma `logits_soft_cap`, xLSTM `output_logit_soft_cap`.
    """
    held = vars(config).items()
    return any(value and "logit" in name and "cap" in name and "att" not in name for name, value in held)


@torch.no_grad()
def plain_head(model: nn.Module) -> bool:
    """Try on four tokens whether the logits are the head applied to the last hidden state and nothing more.

    What the layers before have made of the tokens is of no matter, so the first has to do.
    """
    with _one_layer(inner(model)):
        return _is_plain(model)


def _is_plain(model: nn.Module) -> bool:
    """Compare what a model makes of four tokens with what its head makes of its last hidden state."""
    owner, training = inner(model), model.training
    model.eval()
    try:
        head = owner.get_output_embeddings()
        config = text_config(owner.config)
        if head is None or _capped(config) or not any(module is head for module in owner.modules()):
            return False
        ids = torch.arange(4, device=next(model.parameters()).device)[None] % int(config.vocab_size)
        logits = _over_text(owner, input_ids=ids, use_cache=False).logits
        try:
            with headless(model, True):
                hidden = owner(input_ids=ids, use_cache=False).logits
        except AttributeError:  # the model looks at its head's weight as well (Mamba)
            return False
        made = head(hidden)
        return made.shape == logits.shape and bool(torch.allclose(made.float(), logits.float(), rtol=1e-5, atol=1e-6))
    finally:
        model.train(training)


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run the model on a batch; documents packed into one row see themselves only."""
    extra: dict[str, Any] = {}
    if "segments" in batch and takes_documents(inner(model), batch["input_ids"]):
        extra = _documents.arguments(batch["position_ids"])
    elif "segments" in batch:
        eager = getattr(inner(model).config, "_attn_implementation", "eager") == "eager"
        dtype = next(p.dtype for p in inner(model).parameters() if not holds_codes(p)) if eager else None
        extra = {"position_ids": batch["position_ids"], "attention_mask": block_mask(batch["segments"], dtype)}
    run = model if extra else partial(_over_text, model)  # what packed rows do to a model is for `refuse_rows` to say
    return run(input_ids=batch["input_ids"], use_cache=False, **extra)


def _over_text(model: nn.Module, **given: Any) -> Any:
    """Run a model on rows of text, or say that it asks for more than text."""
    try:
        return model(**given)
    except (TypeError, ValueError) as error:
        raise TensorkeepError(
            f"{type(inner(model)).__name__} does not take rows of text alone: {said(error)}",
            where="model",
            hint="models that need pictures or other inputs beside the text are not trained here",
        ) from error


def takes_documents(model: nn.Module, ids: Tensor) -> bool:
    """Whether a model takes packed documents without a mask; a GPU's kernel computes them in half precision.

    Args:
        model: of transformers.
        ids: token ids, on its device.
    """
    if not _documents.uses(model):
        return False
    if ids.device.type == "cpu" or torch.is_autocast_enabled(ids.device.type):
        return True
    return next(p.dtype for p in model.parameters() if p.is_floating_point()).itemsize == 2


@dataclass(frozen=True)
class TokenLoss:
    """The loss of `pretrain` and `sft`: -log p summed over targets, divided by the targets of the whole update.

    Args:
        plain: whether the model's head is a plain linear (`plain_head`).
        chunk: so many targets go at a time through a head that is a linear with a bias.
        router: weight of the load-balancing loss of a mixture of experts that computes one (`output_router_logits` in
            its config); it is a mean, so a micro-batch adds it by its share of the targets.
    """

    plain: bool
    chunk: int = CHUNK
    router: float = 0.0

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], divisor: float) -> dict[str, Tensor]:
        """Return this micro-batch's share of the loss, and its parts where a router adds to it."""
        with headless(model, self.plain) as head:
            out = forward(model, batch)
        labels = batch["labels"][:, 1:].flatten()
        counted = (labels != IGNORED).nonzero().squeeze(-1)
        hidden, wanted = out.logits[:, :-1].flatten(0, 1).index_select(0, counted), labels.index_select(0, counted)
        if type(head) is nn.Linear and getattr(head, "bias", None) is None:
            tokens = head_loss(hidden, head.weight, wanted, divisor)
        else:
            tokens = cross_entropy_sum(hidden, head, wanted, self.chunk) / divisor
        if len(counted) == 0:
            tokens = out.logits.sum() * 0.0  # every rank must have a backward
        if not self.router or getattr(out, "aux_loss", None) is None:
            return {"loss": tokens}
        balance = self.router * out.aux_loss * (targets_of(dict(batch)) / divisor)
        return {"loss": tokens + balance, "tokens": tokens, "balance": balance}


def refuse_packing(config: Any, length: int) -> None:
    """Refuse packing for a model whose documents would see each other: layers without a mask or with a short window.

    Args:
        config: of the transformers model.
        length: tokens of a row.

    Raises:
        TensorkeepError: the config names a kind of layer that takes no such mask, or a window below `length`.
    """
    config = text_config(config)
    kinds = getattr(config, "layer_types", None)
    odd = sorted(set(kinds or ()) - {"full_attention", "sliding_attention"})
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if isinstance(window, int) and window < length and slides:
        odd.append(f"a window of {window} tokens")
    if odd:
        raise TensorkeepError(
            f"documents cannot be packed for a model with {', '.join(odd)}", where="data.packing", hint="packing: none"
        )
