"""RoPE hypotheses: the two layouts of a head's rows, applied to the reference's q and k, and the residual measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tensorkeep.conversion.naming.rope import partial_rotary
from tensorkeep.conversion.plan import RowPermutation
from tensorkeep.diagnosis.evidence import architecture
from tensorkeep.diagnosis.evidence.orders import Index
from tensorkeep.diagnosis.evidence.sources import ALIKE
from tensorkeep.diagnosis.evidence.statistics import Array, relation
from tensorkeep.diagnosis.evidence.survey import bits_equal

_QUERY = re.compile(r"(?:^|[._])(q_proj|q_norm|query|wq|q)\.(weight|bias)\Z")
KEY = re.compile(r"(?:^|[._])(k_proj|k_norm|key|wk|k)\.(weight|bias)\Z")
_FUSED = re.compile(r"(?:^|[._])(qkv_proj|qkv|query_key_value|c_attn|wqkv)\.(weight|bias)\Z")
WORDS = {
    "pairs": "interleaved, where half-split is expected",
    "half": "turned as if they had been interleaved (the wrong direction)",
}
HEADS = (64, 128, 32, 80, 96, 256, 16, 48, 8, 4, 72, 112, 160, 192)  # sizes of heads in use, tried where no config says


class Turn(NamedTuple):
    """How the rows of q or k were turned: RowPermutation.to ("pairs" or "half"), size of a head, rows of it that RoPE turns."""

    to: str
    head: int
    rotary: int
    source: tuple[int, ...]  # reference row of each row
    exact: bool
    which: str = ""  # of a fused tensor: q, k or q and k


def part_of(name: str) -> str | None:
    """q, k, qkv (fused) or None, by the module's name.

    >>> part_of("model.layers.0.self_attn.q_proj.weight"), part_of("blocks.0.attn.qkv.weight"), part_of("a.v_proj.weight")
    ('q', 'qkv', None)
    """
    return "q" if _QUERY.search(name) else "k" if KEY.search(name) else "qkv" if _FUSED.search(name) else None


def find_turn(name: str, mine: Array, theirs: Array, config: Mapping[str, Any] | None) -> Turn | None:
    """The turn that makes the reference's tensor into this one: exactly, or up to rounding and training."""
    part, rows = part_of(name), mine.shape[0] if mine.ndim else 0
    if part is None or rows < 4 or mine.shape != theirs.shape:
        return None
    loose: Turn | None = None
    own = (
        mine.ndim > 1 and relation(mine, theirs).correlation > ALIKE
    )  # then only a turn that fits exactly can be meant
    for head, rotary in _sizes(rows, config):
        for to in ("pairs", "half"):
            for which, index in _indices(part, rows, RowPermutation(head, rotary, to), config):
                if np.array_equal(index, np.arange(rows)):
                    continue
                turned = theirs[index]
                if _same(mine, turned):
                    return Turn(to, head, rotary, tuple(index.tolist()), True, which)
                if loose is None and mine.ndim > 1 and not own and relation(mine, turned).correlation > ALIKE:
                    loose = Turn(to, head, rotary, tuple(index.tolist()), False, which)
    return loose


def _same(a: Array, b: Array) -> bool:
    """Equal; the first rows decide against nearly every wrong hypothesis."""
    few = min(len(a), 8)
    return bits_equal(a[:few], b[:few]) and bits_equal(a, b)


def _sizes(rows: int, config: Mapping[str, Any] | None) -> Iterator[tuple[int, int]]:
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


def pairing(weight: Array, head: int, rotary: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean over heads of the log row norm at each of the first `rotary` places of a head.  [heads * head, in] -> [rotary]

    The two rows that RoPE turns together are alike in norm: at i and i + rotary / 2 in the half-split layout, at 2i
    and 2i + 1 in the interleaved one (facts §2.5).
    """
    norms = np.sqrt(np.square(weight.astype(np.float32)).sum(axis=1, dtype=np.float64)).reshape(-1, head)[:, :rotary]
    logs: np.ndarray[Any, np.dtype[np.float64]] = np.log(np.maximum(norms, 1e-12)).mean(axis=0)
    return logs


def apart(profile: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """How far apart the rows of a pair are (root mean square): as stored, and with either turn undone.

    The key of a turn is what was done to the rows: "pairs" (interleaved), "half" (the wrong direction).
    """
    half = profile.size // 2
    undone = {"": profile} | {
        to: profile[RowPermutation(profile.size, profile.size, to).inverse().order()] for to in ("pairs", "half")
    }
    return {to: float(np.sqrt(np.mean((rows[:half] - rows[half:]) ** 2))) for to, rows in undone.items()}
