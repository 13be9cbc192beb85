"""`--forward`: run the model a checkpoint holds, on the CPU and in float32, and read its loss like a symptom.

`measure` loads the model exactly as the checkpoint says: an hf folder by transformers itself, every other format by
its tensors under hf names, through transformers' own loader. It reads at most `tokens` tokens (1024: seconds for 135M
parameters). What cannot be run is `Inconclusive`, never a guess. Losses that somebody reports: `explain_loss`.
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
    """The text as pieces: ids (pieces, length), the id of BOS, and whether the tokenizer itself puts it in front."""

    ids: Tensor
    bos: int | None
    adds_bos: bool


@dataclass(frozen=True)
class Forward:
    """What one forward showed. Losses are means in nats over the next token.

    `early` and `late`: positions before 32 and from 192 on (None in shorter pieces). `offsets`: loss against the token
    at another distance. `leak`: how far logits move when only later tokens change, in standard deviations of a logit;
    0 in a causal model. `bos`: the loss of the first piece with BOS in front less that without.
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
        """The `forward` of `diagnose --json`; numbers that are not finite are words."""
        return {k: _plain(v) for k, v in asdict(self).items()} | {"symptoms": symptoms(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measure(view: StateView, text: str | Path, reference: StateView | None = None, tokens: int = 1024) -> Forward:
    """Loss of a checkpoint on a text (a Path is read, a str is the text), and its logits against a reference's.

    A side without config or tokenizer borrows the other's. Raises Inconclusive where there is no language model to
    run, no tokenizer, or too little text.

    >>> measure(read("out"), Path("text.txt")).loss             # doctest: +SKIP
    5.36
    """
    views = [v for v in (view, reference) if v is not None]
    model, loading = model_of(view, sibling(views))
    words = _tokens_of(text, tokenizer_of(views), tokens, model.config)
    with torch.no_grad():
        logits = _logits(model, words)
        found = _figures(model, logits, words)
        del model
        if reference is not None:
            other, _ = model_of(reference, sibling(views))
            theirs = _logits(other, words)
            found |= _against(logits, theirs, words)
    return Forward(**found, loading=loading)


def _tokens_of(text: str | Path, tokenizer: Any, most: int, config: Any) -> Tokens:
    """At most `most` tokens in pieces of equal length, spread over the text; nothing is drawn at random."""
    try:
        words = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    except (OSError, UnicodeDecodeError) as error:
        raise Inconclusive(f"the text cannot be read: {error}") from None
    words = words[: most * 64]  # 64 characters a token are beyond any text; a huge file is not tokenised whole
    ids = tokenizer.encode(words, add_special_tokens=False).ids
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


def _logits(model: Any, words: Tokens) -> Tensor:
    """(pieces, length, vocabulary) in float32; a BOS that the tokenizer adds goes in front and is cut off again."""
    rows = [_run(model, row[None], words.bos if words.adds_bos else None) for row in words.ids]
    return torch.cat(rows)


def _run(model: Any, ids: Tensor, bos: int | None = None) -> Tensor:
    given = ids if bos is None else torch.cat([torch.full((len(ids), 1), bos), ids], dim=1)
    try:
        made: Tensor = model(input_ids=given, use_cache=False).logits.float()
    except REFUSALS as error:
        raise Inconclusive(
            f"the model does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    return made if bos is None else made[:, 1:]


def at_offset(logits: Tensor, ids: Tensor, offset: int) -> Tensor:
    """Cross-entropy (pieces, positions) of each position's logits against the token `offset` places on."""
    length = ids.shape[1]
    first, last = max(0, -offset), min(length, length - offset)
    target = ids[:, first + offset : last + offset]
    return functional.cross_entropy(logits[:, first:last].transpose(1, 2), target, reduction="none")


def _figures(model: Any, logits: Tensor, words: Tokens) -> dict[str, Any]:
    def against(offset: int) -> Tensor:
        return _by_piece(lambda i: at_offset(logits[i : i + 1], words.ids[i : i + 1], offset), len(logits))

    losses = against(1)
    found: dict[str, Any] = {
        "loss": float(losses.mean()),
        "tokens": words.ids.numel(),
        "uniform": math.log(logits.shape[-1]),
        "offsets": {str(k): float(against(k).mean()) for k in OFFSETS},
        "entropy": float(_by_piece(lambda i: entropy(logits[i]), len(logits)).mean()),
        "top1": float((logits[:, :-1].argmax(-1) == words.ids[:, 1:]).float().mean()),
    }
    if losses.shape[1] > _LATE:
        found |= {"early": float(losses[:, :_EARLY].mean()), "late": float(losses[:, _LATE:].mean())}
    first = words.ids[:1, :_FEWEST]
    changed = first.clone()
    changed[:, _FEWEST // 2 :] = changed[:, _FEWEST // 2 :].flip(1)
    a, b = (_run(model, ids)[:, : _FEWEST // 2] for ids in (first, changed))
    found["leak"] = float((a - b).abs().max() / a.std().clamp_min(1e-30))
    if words.bos is not None:
        with_bos, without = (float(at_offset(_run(model, first, bos), first, 1).mean()) for bos in (words.bos, None))
        found["bos"] = with_bos - without
    return found


def _against(logits: Tensor, theirs: Tensor, words: Tokens) -> dict[str, Any]:
    """Figures against the reference's logits, over the vocabulary that both have."""
    rows = min(logits.shape[-1], theirs.shape[-1])

    def divergence(i: int) -> Tensor:
        p, q = theirs[i, :, :rows].log_softmax(-1), logits[i, :, :rows].log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)[None]

    count = len(logits)
    return {
        "reference_loss": float(
            _by_piece(lambda i: at_offset(theirs[i : i + 1], words.ids[i : i + 1], 1), count).mean()
        ),
        "max_logit_difference": float(
            _by_piece(lambda i: (logits[i, :, :rows] - theirs[i, :, :rows]).abs().amax(-1)[None], count).max()
        ),
        "kl": float(_by_piece(divergence, count).mean()),
    }


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each position, (1, positions), of logits (positions, vocabulary)."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)[None]


def _by_piece(figure: Callable[[int], Tensor], count: int) -> Tensor:
    """(count, positions) of a figure, a piece at a time: the whole would take several times the logits."""
    return torch.cat([figure(i) for i in range(count)])


def symptoms(seen: Forward) -> list[str]:
    """What the pattern of a forward fits, in words; hints for a reader, not proofs.

    Thresholds are from faults put into SmolLM2 one at a time.
    """
    said = []
    if not math.isfinite(seen.loss):
        return ["the loss is not finite: look for V01, B01, or activations that overflow"]
    if abs(seen.loss - seen.uniform) < 1e-3 and abs(seen.entropy - seen.uniform) < 1e-3:
        return [
            f"the loss is ln V = {seen.uniform:.2f} exactly: every logit is equal, as with a zero head or zero final norm"
        ]
    if abs(seen.loss - seen.uniform) < 0.3 and seen.top1 < 0.01:
        said.append(f"about ln V = {seen.uniform:.2f} and no token right: a fresh start, or a fresh head")
    elif seen.loss > seen.uniform + 1:
        said.append("worse than knowing nothing: tensors swapped or out of order, not something missing at random")
    if (
        seen.early is not None
        and seen.late is not None
        and seen.late > seen.early - 0.1
        and seen.loss < seen.uniform - 2
    ):
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
