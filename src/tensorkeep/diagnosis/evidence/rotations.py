"""Find rows of query and key projections that lie in the other RoPE layout: interleaved or half-split.

RoPE turns the rows of a head in pairs. Half-split layout pairs row i with row i + rotary / 2, interleaved layout row
2i with row 2i + 1. With a reference both rearrangements are tried on it; without one, the norms of the rows tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorkeep.conversion import architecture
from tensorkeep.conversion.naming.rope import partial_rotary
from tensorkeep.conversion.plan import RowPermutation
from tensorkeep.diagnosis.evidence.bytewise import bits_equal
from tensorkeep.diagnosis.evidence.orders import Index
from tensorkeep.diagnosis.evidence.originals import ALIKE, fits_better
from tensorkeep.diagnosis.evidence.statistics import Array, relation

_QUERY = re.compile(r"(?:^|[._])(q_proj|q_b_proj|q_norm|query|wq|q)\.(weight|bias)\Z")
KEY = re.compile(r"(?:^|[._])(k_proj|kv_a_proj_with_mqa|k_norm|key|wk|k)\.(weight|bias)\Z")
_FUSED = re.compile(r"(?:^|[._])(qkv_proj|qkv|query_key_value|c_attn|wqkv|Wqkv)\.(weight|bias)\Z")
DIRECTIONS = {
    "pairs": "interleaved, where half-split is expected",
    "half": "turned as if they had been interleaved (the wrong direction)",
}
OPPOSITE = {  # the same, of models whose RoPE turns neighbours (Cohere, GLM, DeepSeek)
    "half": "half-split, where interleaved is expected",
    "pairs": "turned as if they had been half-split (the wrong direction)",
}
HEADS = (64, 128, 32, 80, 96, 256, 16, 48, 8, 4, 72, 112, 160, 192)  # sizes of heads in use, tried where no config says


class Turn(NamedTuple):
    """How the rows of a query or key projection were rearranged.

    `to` is "pairs" (interleaved) or "half" (the inverse); `head` the rows of a head, `rotary` those of them that RoPE
    turns; `origin` the reference's row that each row holds. `exact`: the reference rearranged is the tensor, bit for
    bit. `which`: of a fused tensor, the part that was rearranged: "q", "k" or "q and k".
    """

    to: str
    head: int
    rotary: int
    origin: tuple[int, ...]
    exact: bool
    which: str = ""


def part_of(name: str) -> str | None:
    """Say by a tensor's name whether it is q, k or qkv (fused); None for anything else.

    >>> part_of("model.layers.0.self_attn.q_proj.weight"), part_of("blocks.0.attn.qkv.weight")
    ('q', 'qkv')
    """
    return "q" if _QUERY.search(name) else "k" if KEY.search(name) else "qkv" if _FUSED.search(name) else None


def find_turn(name: str, mine: Array, theirs: Array, config: Mapping[str, Any] | None) -> Turn | None:
    """Find the rearrangement that makes the reference's tensor into this one: exactly, or up to rounding and training.

    Args:
        name: The tensor's name; only query and key projections, their biases and norms can be rearranged.
        mine: The checkpoint's values, [rows] or [rows, columns].
        theirs: The reference's, of the same shape.
        config: The model's config, which gives the size of a head; without it, sizes in use are tried.
    """
    part, rows = part_of(name), mine.shape[0] if mine.ndim else 0
    if part is None or rows < 4 or mine.shape != theirs.shape:
        return None
    loose: Turn | None = None
    # a tensor that resembles its own reference was rearranged only where a rearrangement fits exactly
    own = relation(mine, theirs).correlation
    best = own
    for to, head, rotary, which, index in _orders(name, part, rows, config):
        if np.array_equal(index, np.arange(rows)):
            continue
        turned = theirs[index]
        if _same(mine, turned):
            return Turn(to, head, rotary, tuple(index.tolist()), True, which)
        if own > ALIKE or best > ALIKE or mine.ndim < 2:
            continue
        r = relation(mine, turned).correlation
        if r > best and fits_better(r, own):
            best, loose = r, Turn(to, head, rotary, tuple(index.tolist()), False, which)
    return loose


def _orders(
    name: str, part: str, rows: int, config: Mapping[str, Any] | None
) -> Iterator[tuple[str, int, int, str, Index]]:
    """Yield every order of rows to try: its direction, rows of a head, those that RoPE turns, and the part it moves."""
    for head, rotary in _sizes(rows, config):
        for to in ("pairs", "half"):
            for which, index in _indices(part, rows, RowPermutation(head, rotary, to), config):
                yield to, head, rotary, which, index
    for which, head, rotary, starts in _places(name, part, rows, config or {}):
        for to in ("pairs", "half"):
            one, index = np.asarray(RowPermutation(rotary, rotary, to).order(), np.int64), np.arange(rows)
            for start in starts:
                index[start : start + rotary] = start + one
            yield to, head, rotary, which, index


def _places(
    name: str, part: str, rows: int, config: Mapping[str, Any]
) -> Iterator[tuple[str, int, int, Sequence[int]]]:
    """Yield where rows that RoPE turns lie among others, as the config's sizes say: latent, gated and mixed q, k and v.

    Each with the part that it is of, the rows of a head, those that are turned, and their first rows.
    """
    rope, plain, latent = (config.get(k) for k in ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank"))
    if isinstance(rope, int) and isinstance(plain, int) and isinstance(latent, int) and rope > 2 and plain >= 0:
        if "kv_a_proj" in name and rows == latent + rope:
            yield "", rope, rope, [latent]
        elif part == "q" and rows % (plain + rope) == 0:
            yield "", plain + rope, rope, range(plain, rows, plain + rope)
    dim, heads, kv = architecture.head_dim(config), config.get("num_attention_heads"), architecture.kv_heads(config)
    given = config.get("num_kv_heads")  # Falcon's word for it
    counts = [kv, given] if isinstance(given, int) and not isinstance(given, bool) else [kv]
    if not dim or not isinstance(heads, int) or heads < 1:
        return
    turned = int(dim * partial_rotary(config))
    for rotary in dict.fromkeys(r for r in (turned, dim) if r > 2 and r % 2 == 0):
        if part == "q" and rows == 2 * heads * dim:  # beside each head's q its gate
            yield "", 2 * dim, rotary, range(0, rows, 2 * dim)
        for groups in dict.fromkeys([*counts, 1, heads]) if part == "qkv" else ():
            if groups > 0 and heads % groups == 0 and rows == (heads + 2 * groups) * dim:
                wide = heads // groups + 2  # of a group: its heads of q, then k, then v
                for which, low, high in (("q and k", 0, wide - 1), ("q", 0, wide - 2), ("k", wide - 2, wide - 1)):
                    starts = [(g * wide + i) * dim for g in range(groups) for i in range(low, high)]
                    yield which, dim, rotary, starts


def _same(a: Array, b: Array) -> bool:
    """Say whether two tensors are equal; the first rows rule out nearly every wrong rearrangement."""
    few = min(len(a), 8)
    return bits_equal(a[:few], b[:few]) and bits_equal(a, b)


def _sizes(rows: int, config: Mapping[str, Any] | None) -> Iterator[tuple[int, int]]:
    """Yield (rows of a head, rows of it that RoPE turns) to try: the config's first."""
    known = architecture.head_dim(config or {})
    part = partial_rotary(config or {})
    tried: set[tuple[int, int]] = set()
    for head in ((known,) if known else ()) + HEADS:
        for rotary in (int(head * part), head):
            if head and rows % head == 0 and rotary % 2 == 0 and 2 < rotary <= head and (head, rotary) not in tried:
                tried.add((head, rotary))
                yield head, rotary
        if head == known and tried and rows == head:
            return


def _indices(
    part: str, rows: int, turn: RowPermutation, config: Mapping[str, Any] | None
) -> Iterator[tuple[str, Index]]:
    """Yield the orders of rows that a rearrangement means, with the part of a fused tensor that it moves."""
    one = np.asarray(turn.order(), np.int64)
    if part != "qkv":
        yield "", (np.arange(0, rows, turn.block)[:, None] + one).ravel()
        return
    dim = architecture.head_dim(config or {})
    heads, kv = (config or {}).get("num_attention_heads"), architecture.kv_heads(config or {})
    q, k = (
        (heads * dim, kv * dim)
        if isinstance(heads, int) and dim and heads * dim + 2 * kv * dim == rows
        else (rows // 3, rows // 3)
    )
    if (rows % 3 and (q, k) == (rows // 3, rows // 3)) or q % turn.block or k % turn.block:
        return
    for which, low, high in (("q and k", 0, q + k), ("q", 0, q), ("k", q, q + k)):
        index = np.arange(rows)
        index[low:high] = (np.arange(low, high, turn.block)[:, None] + one).ravel()
        yield which, index


# -- without a reference ----------------------------------------------------------------------------------------------


def norm_profile(weight: Array, head: int, rotary: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Average the log norm of the rows at each of the first `rotary` places of a head over the heads.

    The two rows that RoPE turns together have nearly equal norms, which shows in which layout the rows lie.

    [heads * head, in] -> [rotary]
    """
    norms = np.sqrt(np.square(weight.astype(np.float32)).sum(axis=1, dtype=np.float64)).reshape(-1, head)[:, :rotary]
    logs: np.ndarray[Any, np.dtype[np.float64]] = np.log(np.maximum(norms, 1e-12)).mean(axis=0)
    return logs


def pair_distances(profile: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """Measure how far apart the two rows of a RoPE pair are in log norm (root mean square over the pairs).

    Args:
        profile: Mean log norms of a head's rows, [rotary], from `norm_profile`.

    Returns:
        The distance of the rows as stored, under "", and with either rearrangement undone, under its name: "pairs"
        (they had been interleaved), "half" (the inverse had been applied).
    """
    half = profile.size // 2
    undone = {"": profile} | {
        to: profile[RowPermutation(profile.size, profile.size, to).inverse().order()] for to in ("pairs", "half")
    }
    return {to: float(np.sqrt(np.mean((rows[:half] - rows[half:]) ** 2))) for to, rows in undone.items()}
