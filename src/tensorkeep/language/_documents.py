"""Attention of rows that hold several documents, each of which sees itself alone, without a mask of the row.

A mask of a row of L tokens takes L x L bytes and its products L x L work; documents one by one take the sum of their
squares. On a GPU that is FlashAttention's variable-length kernel, as torch has it; on a CPU each document goes through
torch's own kernel. transformers hands the documents through to the attention function that `use` puts in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.frozen import compute_dtype

NAME = "tensorkeep_documents"  # of the attention function, among those of transformers
aten = torch.ops.aten
# FlashAttention's backward sums the gradients of queries in rows of float32, so many more for each document, and counts
# their numbers in 32 bits: beyond them it reads and writes elsewhere (github.com/Dao-AILab/flash-attention/pull/1500)
_ROWS_BETWEEN = 128
_NUMBERS = (1 << 31) - 1
_FREE = 1 << 26  # of these numbers in any case; where there are more, they are 5/4 of those of the queries at most
_DOCUMENTS = 1 << 15  # of a launch, whose grid counts them in 16 bits


class Documents(NamedTuple):
    """Where the documents of a batch lie.

    Attributes:
        bounds: document d is the tokens `bounds[d] : bounds[d + 1]` of the rows one after another; int32
            `[tokens + 1]`, so that every batch of a form has the same form here; what is beyond `count` is unused.
        sizes: how many documents, and the tokens of the longest; int64 `[2]`, on the CPU.
    """

    bounds: Tensor
    sizes: Tensor


def documents_of(positions: Tensor) -> Documents:
    """Find the documents of a batch.

    Args:
        positions: of each token in its document `[b, t]`; 0 is the first.
    """
    flat = positions.reshape(-1)
    starts = (flat == 0).nonzero().squeeze(1)
    starts = torch.cat([starts, starts.new_tensor([len(flat)])])
    bounds = starts.new_zeros(len(flat) + 1, dtype=torch.int32)
    bounds[: len(starts)] = starts
    sizes = torch.stack([torch.tensor(len(starts) - 1), starts.diff().max().cpu()])
    return Documents(bounds, sizes)


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None = None) -> Tensor:
    """Compute causal attention within each document.

    Args:
        query: `[b, h, t, d]`, on a GPU in half precision or under autocast.
        key: `[b, g, t, d]`; g divides h.
        value: `[b, g, t, d]`, or narrower.
        documents: of the batch.
        scale: of the products (None: 1 / sqrt(d)).

    Returns:
        `[b, t, h, d]`, as wide as the values.
    """
    dtype, (b, h, t, d), wide = compute_dtype(query), query.shape, value.shape[3]
    if wide < d:  # DeepSeek's; kernels want one width
        value = F.pad(value, (0, d - wide))
    flat = [x.to(dtype).transpose(1, 2).reshape(b * t, x.shape[1], x.shape[3]) for x in (query, key, value)]
    out, _ = torch.ops.tensorkeep.documents(*flat, *documents, d**-0.5 if scale is None else scale)
    return out.view(b, t, h, d)[..., :wide]  # type: ignore[no-any-return]


class Launch(NamedTuple):
    """One call of the kernel, over some documents and some heads.

    Attributes:
        tokens: of the batch.
        bounds: of the documents among these tokens, int32.
        heads: of the queries.
        groups: of keys and values, whose heads these are.
        first: whether no launch before it has these keys.
    """

    tokens: slice
    bounds: Tensor
    heads: slice
    groups: slice
    first: bool


def launches(query: Tensor, key: Tensor, bounds: Tensor, count: int) -> Iterator[Launch]:
    """Cut attention into as few calls as the kernel's counters and the memory it takes allow.

    Args:
        query: `[n, h, d]`.
        key: `[n, g, d]`; g divides h.
        bounds: of the documents, int32; `count + 1` of them are used.
        count: how many documents.
    """
    (_, heads, width), groups = query.shape, key.shape[1]
    for tokens, some in _pieces(bounds, count, len(query)):
        own = tokens.stop - tokens.start
        rows = own + _ROWS_BETWEEN * (len(some) - 1)
        most = min(max(_FREE, own * heads * width * 5 // 4), _NUMBERS)
        size, shared = max(most // (rows * width), 1), heads // groups
        size = min(size // shared * shared or size, heads)  # whole groups where one fits
        for group in range(0, groups, max(size // shared, 1)):
            several = slice(group, min(group + max(size // shared, 1), groups))
            for at in range(several.start * shared, several.stop * shared, size):
                end = min(at + size, several.stop * shared)
                yield Launch(tokens, some, slice(at, end), several, at == several.start * shared)


def _pieces(bounds: Tensor, count: int, n: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens and the bounds of as many documents as a launch takes."""
    if count <= _DOCUMENTS:
        yield slice(0, n), bounds[: count + 1]
        return
    for first in range(0, count, _DOCUMENTS):
        some = bounds[first : min(first + _DOCUMENTS, count) + 1]
        start, end = some[[0, -1]].tolist()
        yield slice(start, end), some - start


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, sizes: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output `[n, h, d]` and the logarithms of the sums, float32 `[h, n]`."""
    count, longest = sizes.tolist()
    todo = list(launches(query, key, bounds, count))
    if len(todo) == 1:
        return _launched(query, key, value, todo[0].bounds, longest, scale)
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=_sums_dtype(query))
    for tokens, some, heads, groups, _ in todo:
        taken = (query[tokens, heads], key[tokens, groups], value[tokens, groups])
        out[tokens, heads], sums[heads, tokens] = _launched(*taken, some, longest, scale)
    return out, sums


def _launched(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Do it in one call of the kernel."""
    if query.is_cuda:
        how: Any = (bounds, bounds, longest, longest, 0.0, True)
        made = aten._flash_attention_forward(query, key, value, *how, return_debug_mask=False, scale=scale)
        return made[0], made[1]
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=_sums_dtype(query))
    for part in _parts(bounds):
        q, k, v = _alike(*(x[part].transpose(0, 1)[None] for x in (query, key, value)))
        made, some = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        out[part], sums[:, part] = made[0].transpose(0, 1), some[0]
    return out, sums


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    sizes: Tensor,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of query, key and value."""
    count, longest = sizes.tolist()
    todo = list(launches(query, key, bounds, count))
    if len(todo) == 1:
        return _launched_back(grad, query, key, value, out, sums, todo[0].bounds, longest, scale)
    found = [torch.empty_like(x) for x in (query, key, value)]
    for tokens, some, heads, groups, first in todo:
        slope, q, made = (x[tokens, heads] for x in (grad, query, out))
        k, v = key[tokens, groups], value[tokens, groups]
        parts = _launched_back(slope, q, k, v, made, sums[heads, tokens].contiguous(), some, longest, scale)
        found[0][tokens, heads] = parts[0]
        for whole, one in zip(found[1:], parts[1:]):
            whole[tokens, groups] = one if first else whole[tokens, groups] + one
    return found


def _launched_back(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
) -> list[Tensor]:
    """Do it in one call of the kernel."""
    if query.is_cuda:
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        how: Any = (bounds, bounds, longest, longest, 0.0, True, state, state.new_empty(0))
        return list(aten._flash_attention_backward(grad.contiguous(), query, key, value, out, sums, *how, scale=scale))
    found = [torch.empty_like(x) for x in (query, key, value)]
    for part in _parts(bounds):
        slope, made = (x[part].transpose(0, 1)[None] for x in (grad, out))
        taken = _alike(*(x[part].transpose(0, 1)[None] for x in (query, key, value)))
        norms = sums[None, :, part].contiguous()
        how = (0.0, True)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(slope, *taken, made, norms, *how, scale=scale)
        for whole, one in zip(found, grads):  # heads that shared a key add up
            whole[part] = one[0].unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1)
    return found


def _parts(bounds: Tensor) -> list[slice]:
    """Return the tokens of each document."""
    return [slice(a, b) for a, b in pairwise(bounds.tolist())]


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat keys and values `[1, g, n, d]` for each query head of their group."""
    times = query.shape[1] // key.shape[1]
    return query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


_forward_op = torch.library.custom_op(
    "tensorkeep::documents",
    _forward,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor bounds, Tensor sizes, float scale) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "tensorkeep::documents_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor sums, Tensor bounds, "
    "Tensor sizes, float scale) -> Tensor[]",
)


@_forward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, sizes: Tensor, scale: float) -> Any:
    return torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=_sums_dtype(query))


@_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_rest: Any) -> Any:
    return [torch.empty_like(x) for x in (query, key, value)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, sizes, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, sizes)


def _gradients(ctx: Any, grad: Tensor, _sums: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.tensorkeep.documents_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None)


_forward_op.register_autograd(_gradients, setup_context=_keep)


# -- among transformers' own ------------------------------------------------------------------------------------------


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    sizes: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: documents where there are some, else SDPA as ever."""
    if bounds is None or sizes is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        made: Any = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return made  # type: ignore[no-any-return]
    if dropout:
        what = f"attention dropout {dropout:g} is not computed for packed documents"
        raise TensorkeepError(what, where="data.packing", hint="attention_dropout: 0 in the model's config.json")
    return attend(query, key, value, Documents(bounds, sizes), scaling), None


def use(model: Any) -> bool:
    """Let a transformers model take documents in place of a mask; False where its attention is not transformers' SDPA.

    Args:
        model: one whose config says `sdpa`; `unuse` takes it back.
    """
    settable: Any = getattr(model, "_can_set_attn_implementation", lambda: hasattr(model, "set_attn_implementation"))
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not settable():
        return False
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError:  # before 4.53
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return uses(model)


def unuse(model: Any) -> None:
    """Give a model its own attention function back."""
    model.set_attn_implementation("sdpa")


def uses(model: Any) -> bool:
    """Whether a model takes documents."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def arguments(positions: Tensor) -> dict[str, Any]:
    """Return what a model that `uses` documents is called with: an argument that reaches no attention is an error.

    Args:
        positions: `[b, t]`, on the model's device.
    """
    bounds, sizes = documents_of(positions)
    # an attention that did not get the documents fails at this mask; transformers makes none in its place
    fails = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=positions.device)
    return {"position_ids": positions, "attention_mask": fails, "bounds": bounds, "sizes": sizes}
