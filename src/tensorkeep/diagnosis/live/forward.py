"""Run the model of a checkpoint on a text, on the CPU in float32, and measure its loss (`diagnose --forward`).

`measure` loads the model exactly as the checkpoint says: a Hugging Face folder by transformers itself, every other
format by its tensors under Hugging Face names, through transformers' own loader. It reads at most `tokens` tokens
(1024 take seconds with 135 M parameters). What cannot be run is `Inconclusive`, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tensorkeep.errors import Inconclusive
from tensorkeep.formats.view import StateView
from tensorkeep.models.buffers import REFUSALS
from tensorkeep.models.language_model import model_of, sibling, tokenizer_of

PIECE = 256  # tokens of one piece of text
_EARLY, _LATE = 32, 192  # positions before and from which the early and the late loss are taken
OFFSETS = (-1, 0, 2, 3)  # labels at these distances; 1 is the right one
_FEWEST = 64


class Tokens(NamedTuple):
    """A text as ids [pieces, length], the id of BOS, and whether the tokenizer itself puts it in front."""

    ids: Tensor
    bos: int | None
    adds_bos: bool


@dataclass(frozen=True)
class Forward:
    """What one forward pass showed. Losses are means over the tokens, in nats, against the next token.

    `early` and `late`: losses at positions before 32 and from 192 on (None in shorter pieces). `offsets`: losses
    against the token at another distance. `uniform`: ln of the vocabulary's size, the loss of a model that knows
    nothing. `entropy`: of the predictions, in nats. `top1`: part of the tokens predicted right. `leak`: how far logits
    move when only later tokens change, in standard deviations of a logit; 0 in a causal model. `bos`: the loss of the
    first piece with BOS in front less that without. `kl`: divergence from the reference's predictions, in nats.
    `tokens`: how many were read. `loading`: names that the load missed, did not expect or could not fit.
    """

    loss: float
    reference_loss: float | None = None
    max_logit_difference: float | None = None
    early: float | None = None
    late: float | None = None
    offsets: dict[str, float] = field(default_factory=dict)
    uniform: float = 0.0
    entropy: float = 0.0
    top1: float = 0.0
    leak: float = 0.0
    bos: float | None = None
    kl: float | None = None
    tokens: int = 0
    loading: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the `forward` of `diagnose --json`; numbers that are not finite are words."""
        return {k: _plain(v) for k, v in asdict(self).items()} | {"symptoms": symptoms(self)}


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measure(view: StateView, text: str | Path, reference: StateView | None = None, tokens: int = 1024) -> Forward:
    """Measure the loss of a checkpoint on a text, and its logits against a reference's.

    A side without config or tokenizer borrows the other's.

    Args:
        view: The checkpoint.
        text: A text file as a Path, or the text itself as a str.
        reference: A sound checkpoint of the same model, or None.
        tokens: At most this many tokens of the text are read.

    Returns:
        The figures of the forward pass, losses in nats a token.

    Raises:
        Inconclusive: Where there is no language model to run, no tokenizer, or too little text.

    Example:
        >>> measure(read("out"), Path("text.txt")).loss             # doctest: +SKIP
        5.36
    """
    views = [v for v in (view, reference) if v is not None]
    model, loading = model_of(view, sibling(views))
    pieces = _tokens_of(text, tokenizer_of(views), tokens, model.config)
    with torch.no_grad():
        logits = _logits(model, pieces)
        found = _figures(model, logits, pieces)
        del model
        if reference is not None:
            other, _ = model_of(reference, sibling(views))
            theirs = _logits(other, pieces)
            found |= _against(logits, theirs, pieces)
    return Forward(**found, loading=loading)


def _tokens_of(text: str | Path, tokenizer: Any, most: int, config: Any) -> Tokens:
    """Cut a text into pieces of equal length, spread over it, of at most `most` tokens in all; not at random."""
    try:
        read = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    except (OSError, UnicodeDecodeError) as error:
        raise Inconclusive(f"the text cannot be read: {error}") from None
    # no text has 64 characters a token: a huge file is not tokenized whole
    ids = tokenizer.encode(read[: most * 64], add_special_tokens=False).ids
    probe = tokenizer.encode("a").ids
    bos = getattr(config, "bos_token_id", None)
    bos = bos if isinstance(bos, int) else None
    longest = getattr(config, "max_position_embeddings", None)
    length = min(PIECE, longest if isinstance(longest, int) and longest > 0 else PIECE, len(ids), most)
    if length < _FEWEST:
        raise Inconclusive(f"the text has {len(ids)} tokens; {_FEWEST} are the fewest that say anything")
    count = min(most, len(ids)) // length
    starts = [i * (len(ids) - length) // max(count - 1, 1) for i in range(count)]
    top = max(max(ids), 0)
    if top >= int(getattr(config, "vocab_size", top + 1)):
        raise Inconclusive(
            f"the tokenizer gives id {top}, the model has {config.vocab_size} rows: it is another model's tokenizer"
        )
    return Tokens(torch.tensor([ids[s : s + length] for s in starts]), bos, bos is not None and probe[:1] == [bos])


def _logits(model: Any, text: Tokens) -> Tensor:
    """Return logits [pieces, length, vocabulary], float32; a BOS that the tokenizer adds is cut off again."""
    rows = [_run(model, row[None], text.bos if text.adds_bos else None) for row in text.ids]
    return torch.cat(rows)


def _run(model: Any, ids: Tensor, bos: int | None = None) -> Tensor:
    """Run the model on ids [batch, length]; the logits of a BOS put in front are cut off."""
    given = ids if bos is None else torch.cat([torch.full((len(ids), 1), bos), ids], dim=1)
    try:
        made: Tensor = model(input_ids=given, use_cache=False).logits.float()
    except REFUSALS as error:
        raise Inconclusive(
            f"the model does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    return made if bos is None else made[:, 1:]


def at_offset(logits: Tensor, ids: Tensor, offset: int) -> Tensor:
    """Compute the cross-entropy of each position's logits against the token `offset` places on.

    Args:
        logits: [pieces, length, vocabulary].
        ids: [pieces, length].
        offset: 1 for the next token; negative for earlier ones.

    Returns:
        Losses in nats, [pieces, length - |offset|].
    """
    length = ids.shape[1]
    first, last = max(0, -offset), min(length, length - offset)
    target = ids[:, first + offset : last + offset]
    return functional.cross_entropy(logits[:, first:last].transpose(1, 2), target, reduction="none")


def _figures(model: Any, logits: Tensor, text: Tokens) -> dict[str, Any]:
    """Measure what one model shows by itself, as fields of a Forward."""

    def against(offset: int) -> Tensor:
        return _by_piece(lambda i: at_offset(logits[i : i + 1], text.ids[i : i + 1], offset), len(logits))

    losses = against(1)
    found: dict[str, Any] = {
        "loss": float(losses.mean()),
        "tokens": text.ids.numel(),
        "uniform": math.log(logits.shape[-1]),
        "offsets": {str(k): float(against(k).mean()) for k in OFFSETS},
        "entropy": float(_by_piece(lambda i: entropy(logits[i]), len(logits)).mean()),
        "top1": float((logits[:, :-1].argmax(-1) == text.ids[:, 1:]).float().mean()),
    }
    if losses.shape[1] > _LATE:
        found |= {"early": float(losses[:, :_EARLY].mean()), "late": float(losses[:, _LATE:].mean())}
    first = text.ids[:1, :_FEWEST]
    changed = first.clone()
    changed[:, _FEWEST // 2 :] = changed[:, _FEWEST // 2 :].flip(1)
    a, b = (_run(model, ids)[:, : _FEWEST // 2] for ids in (first, changed))
    found["leak"] = float((a - b).abs().max() / a.std().clamp_min(1e-30))
    if text.bos is not None:
        with_bos, without = (float(at_offset(_run(model, first, bos), first, 1).mean()) for bos in (text.bos, None))
        found["bos"] = with_bos - without
    return found


def _against(logits: Tensor, theirs: Tensor, text: Tokens) -> dict[str, Any]:
    """Compare logits with the reference's over the vocabulary that both have, as fields of a Forward."""
    rows = min(logits.shape[-1], theirs.shape[-1])

    def divergence(i: int) -> Tensor:
        p, q = theirs[i, :, :rows].log_softmax(-1), logits[i, :, :rows].log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)[None]

    count = len(logits)
    return {
        "reference_loss": float(
            _by_piece(lambda i: at_offset(theirs[i : i + 1], text.ids[i : i + 1], 1), count).mean()
        ),
        "max_logit_difference": float(
            _by_piece(lambda i: (logits[i, :, :rows] - theirs[i, :, :rows]).abs().amax(-1)[None], count).max()
        ),
        "kl": float(_by_piece(divergence, count).mean()),
    }


def entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of each position in nats: [positions, vocabulary] -> [1, positions]."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)[None]


def _by_piece(figure: Callable[[int], Tensor], count: int) -> Tensor:
    """Stack a figure of each piece, [count, positions], one at a time: all at once takes several times the memory."""
    return torch.cat([figure(i) for i in range(count)])


def symptoms(seen: Forward) -> list[str]:
    """Say in words what the figures of a forward pass look like; hints for a reader, not proofs.

    Thresholds come from faults that were put into SmolLM2 (135 M) one at a time.
    """
    said = []
    if not math.isfinite(seen.loss):
        return ["the loss is not finite: look for V01, B01, or activations that overflow"]
    if abs(seen.loss - seen.uniform) < 1e-3 and abs(seen.entropy - seen.uniform) < 1e-3:
        return [
            f"the loss is ln V = {seen.uniform:.2f} exactly: every logit is equal, "
            "as with a zero head or zero final norm"
        ]
    if abs(seen.loss - seen.uniform) < 0.3 and seen.top1 < 0.01:
        said.append(f"about ln V = {seen.uniform:.2f} and no token right: a fresh start, or a fresh head")
    elif seen.loss > seen.uniform + 1:
        said.append("worse than knowing nothing: tensors swapped or out of order, not something missing at random")
    flat = seen.early is not None and seen.late is not None and seen.late > seen.early - 0.1
    if flat and seen.loss < seen.uniform - 2:
        said.append(
            "the loss does not fall with position: RoPE is off, or q and k are in the other layout (B01, O01, C01)"
        )
    offset, lowest = min(seen.offsets.items(), key=lambda item: item[1], default=("1", math.inf))
    if lowest < seen.loss - 1 and lowest < seen.uniform - 1:
        said.append(
            f"it predicts the token at distance {offset} rather than the next: it was trained with shifted labels"
        )
    if seen.leak > 1e-2:
        said.append("positions see what comes after them: the causal mask is lost, and losses come out too low")
    if seen.bos is not None and seen.bos < -0.5:
        said.append(f"with BOS in front the loss is {-seen.bos:.2f} lower: the model expects it")
    if seen.reference_loss is not None and seen.loss < seen.reference_loss - 0.3:
        said.append("lower than the reference: a lost mask or padding in the loss makes losses look good")
    return said
