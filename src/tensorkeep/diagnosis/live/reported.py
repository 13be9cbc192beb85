"""Explain a wrong loss of a model whose tensors are all right: find the way of computing it that gives that number.

The right loss and each known mistake are computed on one batch with the very same model; a mistake is named when it,
and no other, gives the reported number to three digits. Otherwise the answer is Inconclusive, with all numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensorkeep.diagnosis.live.forward import at_offset
from tensorkeep.errors import Inconclusive
from tensorkeep.findings import Finding
from tensorkeep.models.buffers import REFUSALS

_FITS = 1e-3  # of the right loss, or of 1
_IGNORED = -100
_ACCUMULATED = (2, 4, 8, 16, 32)

_FIXES = {
    "shift": "shift once: either the data gives labels = ids[1:], or the loss shifts, never both and never neither",
    "mask": "set the labels of padding (and of the prompt) to -100, and divide by the tokens that count",
    "attention": "pass attention_mask, and keep is_causal",
    "softmax": "cross_entropy takes logits: leave the softmax out",
    "smoothing": "log the plain cross-entropy beside the smoothed loss",
    "scale": "divide by the number of tokens of the whole accumulated batch, once, and report nats a token",
    "bos": "build inputs with the tokenizer that the model was trained with; it decides on BOS",
    "packing": "give each document its own positions and attention (position_ids, or a block-diagonal mask)",
}


def explain_loss(model: nn.Module, batch: Mapping[str, Any] | Tensor, reported_loss: float) -> list[Finding]:
    """Find the mistake by which a training run computed a wrong loss on one batch.

    Args:
        model: The language model, as the run has it.
        batch: input_ids [batch, length] alone, or a dict with input_ids and, where the run has them, labels (shifted
            or not: both are recognised), attention_mask and position_ids, of the same shape.
        reported_loss: The loss that the run reports for this batch.

    Returns:
        [] where it is the right loss; otherwise one L01 that names the mistake, with all losses as evidence.

    Raises:
        Inconclusive: Where no known mistake gives that number to three digits, or several do.

    Example:
        >>> explain_loss(model, batch, 9.66)[0].evidence["fits"]       # doctest: +SKIP
        'labels shifted twice'
    """
    given = (
        {"input_ids": batch} if isinstance(batch, Tensor) else {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    )
    if "input_ids" not in given or given["input_ids"].ndim != 2:
        raise Inconclusive("the batch has no input_ids of shape (batch, length)")
    with _evaluating(model), torch.no_grad():
        right, ways = _candidates(model, given)
    if _near(reported_loss, right):
        return []
    fits = {name: value for name, (value, _) in ways.items() if _near(reported_loss, value) and not _near(value, right)}
    if len({round(v, 9) for v in fits.values()}) != 1:
        table = ", ".join(f"{name} {value:.4f}" for name, (value, _) in ways.items())
        which = f"several fit ({', '.join(fits)})" if fits else "none of the known mistakes gives it"
        raise Inconclusive(f"the reported loss is {reported_loss:.4f}, the right one {right:.4f}; {which}: {table}")
    name = " or ".join(fits)
    value, kind = ways[next(iter(fits))]
    return [
        Finding(
            "L01",
            "error",
            f"the reported loss {reported_loss:.4f} is what {name} gives ({value:.4f}); the model's loss on this "
            f"batch is {right:.4f}",
            [],
            {
                "reported": reported_loss,
                "right": right,
                "fits": name,
                "value": value,
                "candidates": {n: v for n, (v, _) in ways.items()},
            },
            fix=_FIXES[kind],
        )
    ]


def _near(a: float, b: float) -> bool:
    """Say whether two losses are equal to about three digits."""
    return abs(a - b) <= _FITS * max(1.0, abs(b))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _candidates(model: Any, given: dict[str, Tensor]) -> tuple[float, dict[str, tuple[float, str]]]:
    """Compute the right loss, and for every mistake that this batch can show (loss, key of its fix)."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    extra: dict[str, Tensor] = {k: given[k] for k in ("attention_mask", "position_ids") if k in given}
    labels, counts = _labels_of(given)
    logits = _run(model, ids, **extra)
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    counted = counts[:, 1:]
    right = float(losses[counted].mean())
    number = int(counted.sum())
    ways = {
        f"labels {words}": (float(at_offset(logits, labels, k)[_at(counts, k)].mean()), "shift")
        for k, words in (
            (0, "not shifted"),
            (2, "shifted twice"),
            (3, "shifted three times"),
            (-1, "shifted backwards"),
        )
    }
    flat, wanted = logits[:, :-1][counted], labels[:, 1:][counted]
    ways["label smoothing 0.1"] = float(functional.cross_entropy(flat, wanted, label_smoothing=0.1)), "smoothing"
    ways["softmax applied twice"] = float(functional.cross_entropy(flat.softmax(-1), wanted)), "softmax"
    ways["the sum over tokens instead of the mean"] = right * number, "scale"
    ways["the sum over tokens, divided by sequences"] = right * number / len(ids), "scale"
    ways["bits instead of nats"] = right / math.log(2), "scale"
    ways["perplexity instead of loss"] = math.exp(min(right, 700.0)), "scale"
    for k in _ACCUMULATED:
        ways[f"{k} accumulated losses, not divided"] = right * k, "scale"
        ways[f"a division by {k} too many"] = right / k, "scale"
    if not bool(counted.all()):
        ways["padding (or the prompt) counted in the loss"] = float(losses.mean()), "mask"
        ways["the sum over real tokens, divided by all"] = right * number / counted.numel(), "scale"
        rows = [float(r[c].mean()) for r, c in zip(losses, counted) if bool(c.any())]
        ways["the mean over sequences of their means"] = sum(rows) / len(rows), "scale"
    return right, ways | _other_inputs(model, ids, mask, extra, labels, counts)


def _labels_of(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the label of each position and whether its loss counts, [batch, length]; labels may be shifted or not."""
    ids, labels, mask = given["input_ids"], given.get("labels"), given.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.ndim != 2 else mask.bool()
    if labels is None:
        return ids, counts
    real = labels[:, :-1] != _IGNORED
    agree = (labels[:, :-1] == ids[:, 1:])[real]
    if (
        bool(real.any())
        and float(agree.float().mean()) > 0.99
        and not torch.equal(labels[:, 1:][real], ids[:, 1:][real])
    ):
        shifted = torch.ones_like(counts)
        shifted[:, 1:] = real
        return ids, counts & shifted  # the data has shifted them already: bring the marks back to their tokens
    return ids, counts & (labels != _IGNORED)


def _at(counts: Tensor, offset: int) -> Tensor:
    """Cut `counts` to the losses of `at_offset`: a loss counts where its label does."""
    length = counts.shape[1]
    return counts[:, max(0, offset) : min(length, length + offset)] if offset < 0 else counts[:, offset:]


def _other_inputs(
    model: Any, ids: Tensor, mask: Tensor | None, extra: dict[str, Tensor], labels: Tensor, counts: Tensor
) -> dict[str, tuple[float, str]]:
    """Compute the losses of mistakes in the model's inputs: masks, BOS, positions; not what the model refuses."""
    ways: dict[str, tuple[float, str]] = {}

    def add(name: str, kind: str, inputs: Tensor, given: Mapping[str, Tensor], cut: int = 0) -> None:
        try:
            logits = _run(model, inputs, **given)[:, cut:]
        except Inconclusive:
            return
        at = labels[:, labels.shape[1] - logits.shape[1] :]
        which = counts[:, counts.shape[1] - logits.shape[1] :]
        ways[name] = float(at_offset(logits, at, 1)[which[:, 1:]].mean()), kind

    count, length = ids.shape
    everything = torch.zeros(count, 1, length, length, dtype=next(model.parameters()).dtype, device=ids.device)
    add("attention without the causal mask", "attention", ids, {**extra, "attention_mask": everything})
    if mask is not None and not bool(mask.all()):
        add("attention to padding", "attention", ids, {k: v for k, v in extra.items() if k != "attention_mask"})
    if "position_ids" in extra and bool((extra["position_ids"].diff(dim=1) != 1).any()):
        add(
            "packed documents that see each other",
            "packing",
            ids,
            {k: v for k, v in extra.items() if k != "position_ids"},
        )
    bos = getattr(getattr(model, "config", None), "bos_token_id", None)
    if isinstance(bos, int) and mask is None:
        if bool((ids[:, 0] == bos).all()):
            add("a missing BOS", "bos", ids[:, 1:], {})
        else:
            add("a BOS put in front", "bos", torch.cat([torch.full_like(ids[:, :1], bos), ids], dim=1), {}, cut=1)
    return ways


def _run(model: Any, ids: Tensor, **extra: Tensor) -> Tensor:
    """Return the logits [batch, length, vocabulary] in float32."""
    try:
        made = model(input_ids=ids, **extra)
    except REFUSALS as error:
        raise Inconclusive(
            f"the model does not run on this batch: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    logits: Tensor = made.logits if hasattr(made, "logits") else made[0] if isinstance(made, tuple) else made
    return logits.float()
