"""Parts of a ViT whose linears are frozen, with a backward written by hand.

A frozen linear needs its weight for the backward, not its input. So nothing is kept of a block but the input of the
adapter before it (and, where memory allows, the attention output), and the backward recomputes only what it reads:
the norms, q, k, v, the sum after attention, and fc1's output; never fc2, and the attention output only if not kept.
Weights held as 4- or 8-bit codes are made numbers once a block and direction, before its pieces: 64 MB written and
read for a block of v2-g, 15 us in 5 ms, and one block's dense weights are all that exist at a time. In float8 they are
rounded instead, also those held as floats, and so are the rows that they are multiplied with (`_linears`).

Floor of one block of width C and MLP width m, for n tokens in chunks of L, at 790 TFLOP/s: forward
n (8 C^2 + 4 C m + 4 L C) FLOPs, backward the same with 10 L C, recomputation n (8 C^2 + 2 C m). The row operations and
GELU move about 68 n C elements more, at 4.3 TB/s, adapter included. For a whole ViT-L (24 blocks, n = 76,800) that is
197 + 60 ms; measured on an H200 (2026-11-21, torch 2.11): about 340 ms. Of the 83 ms between, attention is 50 (cuDNN's
kernel reaches 290 TFLOP/s at L = 800, d = 64), the matrix products 20 (690 TFLOP/s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model._attention import Attended, attend, attend_backward, choose_kernel
from tensorkeep.detection.model._linears import Linear, Narrow, Rows, narrow
from tensorkeep.detection.model._recompute import random_state, replay, slices
from tensorkeep.detection.model.layers import Rotation
from tensorkeep.quantization import float8

Branch = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FrozenTrunk:
    """Attention and MLP of one block, none of whose weights train.

    Attributes:
        norm1, norm2: the layer norms before attention and MLP.
        qkv, proj, fc1, fc2: the linears, ready for the pass.
        heads: of the attention.
        turn: what turns q and k by the positions of their tokens; None: nothing.
        in_float8: whether the products of the linears are in float8.
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear
    heads: int
    turn: Rotation | None = None
    in_float8: bool = False

    def heads_of(self, normed: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of `[n, L, C]`, each `[n, heads, L, d]`; views of one tensor where nothing turns them."""
        made = self.qkv.forward(normed)  # [n, L, 3C]
        q, k, v = made.view(*made.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return (q, k, v) if self.turn is None else (self.turn(q), self.turn(k), v)

    def forward(
        self, x: Tensor, branch: Tensor | None, kept: Sequence[Tensor | None], out: Tensor, keep: bool
    ) -> Attended | None:
        """Write the block's output for the input `x + branch` to `out`; all are `[n, L, C]`.

        `kept`: drop path's factors `[n, 1, 1]` of attention and MLP. Returns the attention where `keep` asks for it.
        """
        x, normed = add_norm(x, branch, None, self.norm1, self.in_float8)
        q, k, v = self.heads_of(normed)
        done = attend(q, k, v, choose_kernel(q))
        del q, k, v  # what is not read again is let go of at once: this is where the memory peaks
        x, normed = add_norm(x, self.proj.forward(_joined(done.out)), kept[0], self.norm2, self.in_float8)
        held = done if keep else None
        del done
        wide = self.fc1.forward(normed)
        del normed
        inner = gelu(wide, self.in_float8)
        del wide
        add_branch(x, self.fc2.forward(inner), kept[1], out)
        return held

    def backward(
        self,
        x: Tensor,
        branch: Tensor | None,
        kept: Sequence[Tensor | None],
        done: Attended | None,
        grad: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient of `x + branch` to `out`, from `grad` at the block's output; all are `[n, L, C]`.

        `done`: the attention that the forward kept, or None. `out` may be `grad`.
        """
        x, first = add_norm(x, branch, None, self.norm1, self.in_float8)
        heads = None
        if done is None:
            heads = self.heads_of(first)
            done = attend(*heads, choose_kernel(heads[0]))
        middle, second = add_norm(x, self.proj.forward(_joined(done.out)), kept[0], self.norm2, self.in_float8)
        wide = self.fc1.forward(second)
        del second
        back = gelu_backward(self.fc2.back(grad), wide, self.in_float8)  # [n, L, m]
        del wide
        norm_backward(self.fc1.back(back), middle, self.norm2, grad, kept[1], out)
        del back, middle
        q, k, v = heads or self.heads_of(first)
        del heads, first
        inner = self.proj.back(out).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        thirds = attend_backward(inner, q, k, v, done)
        del q, k, v, inner, done
        if self.turn is not None:
            thirds = (self.turn.back(thirds[0]), self.turn.back(thirds[1]), thirds[2])
        joined = join(thirds, self.in_float8)  # [n, L, 3C]
        del thirds
        norm_backward(self.qkv.back(joined), x, self.norm1, out, kept[0], out)


def attention_kept(width: int) -> float:
    """Return the part of the blocks whose attention output is kept, for a ViT of this width.

    Of all tensors the attention output saves the most time for its bytes. A narrow ViT keeps none: there it saves
    little, and the head already takes most of the memory.
    """
    return 0.6 if width > 512 else 0.0


def _joined(x: Tensor) -> Tensor:
    """Join the heads, `[n, heads, L, d] -> [n, L, C]`, without a copy for the layout that the kernels write."""
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class FrozenLink:
    """An adapter and the frozen attention and MLP after it: `trunk(x + branch(x))`, as a `Link` with its own backward.

    Attributes:
        branch: what the adapter adds, over all chunks at once; None: no adapter.
        trunk: makes the block's weights ready for one pass; None: nothing comes after the adapter.
        kept: drop path's factors `[N, 1, 1]` of attention and MLP.
        size: chunks that go through the trunk at a time.
        keep: whether the attention output is kept for the backward.
        random: whether `branch` draws random numbers.
    """

    branch: Branch | None
    trunk: Callable[[], FrozenTrunk] | None
    kept: tuple[Tensor | None, Tensor | None]
    size: int
    keep: bool
    random: bool

    def forward(self, x: Tensor) -> tuple[Tensor, list[Attended]]:
        """Return the output `[N, L, C]` for `x [N, L, C]`, and each piece's attention where it is to be kept."""
        branch = self.branch(x) if self.branch is not None else None
        if self.trunk is None:
            return x if branch is None else x + branch, []
        trunk, out, held = self.trunk(), torch.empty_like(x), []
        for part in slices(len(x), self.size):
            done = trunk.forward(x[part], _cut(branch, part), self._kept(part), out[part], self.keep)
            if done is not None:
                held.append(done)
        return out, held

    def backward(
        self, x: Tensor, parameters: Sequence[Tensor], held: Sequence[Attended], grad: Tensor, wants_x: bool, own: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of `x` and `parameters`, as `Link.backward` says."""
        with torch.autocast(x.device.type, enabled=False):
            if self.branch is None:
                return self._below(x, None, held, grad, own), []
            leaf = x.detach().requires_grad_(wants_x)
            with torch.enable_grad():
                branch = self.branch(leaf)
            back = self._below(x, branch.detach(), held, grad, own)
            wanted = [leaf, *parameters] if wants_x else parameters
            found: list[Tensor | None] = list(torch.autograd.grad(branch, wanted, back, allow_unused=True))
        if not wants_x:
            return None, found
        lead = found.pop(0)
        if lead is None:
            return back, found
        return (back.add_(lead) if own or back is not grad else lead.add_(back)), found

    def _below(self, x: Tensor, branch: Tensor | None, held: Sequence[Attended], grad: Tensor, own: bool) -> Tensor:
        """Return the gradient of `x + branch`; it overwrites `grad` where that is allowed."""
        if self.trunk is None:
            return grad
        trunk, out = self.trunk(), grad if own else torch.empty_like(x)
        for index, part in enumerate(slices(len(x), self.size)):
            done = held[index] if held else None
            trunk.backward(x[part], _cut(branch, part), self._kept(part), done, grad[part], out[part])
        return out

    def _kept(self, part: slice) -> list[Tensor | None]:
        """Return drop path's factors of some chunks."""
        return [_cut(factor, part) for factor in self.kept]


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    """Return some chunks of a tensor, or None."""
    return None if x is None else x[part]


def run_frozen(link: FrozenLink, x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Run `x [N, L, C]` through `link`; `parameters` are those of its adapter that may train."""
    trainable = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or trainable):
        with torch.no_grad():
            return link.forward(x)[0]
    out: Tensor = _Frozen.apply(link, x, *trainable)  # type: ignore[no-untyped-call]
    return out


class _Frozen(torch.autograd.Function):
    """A `FrozenLink` as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, link: FrozenLink, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.link = link
        ctx.random = random_state(x) if link.random else None
        ctx.save_for_backward(x, *parameters)
        out, ctx.held = link.forward(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with replay(x, ctx.random):
            grad = grads[0].contiguous()
            lead, found = ctx.link.backward(x, parameters, ctx.held, grad, ctx.needs_input_grad[1], False)
        return (None, lead, *found)


# -- row operations: residual add, drop path and layer norm in one pass over memory -----------------------------------
#
# The floor of each is its bytes: with u = the bytes of one `[N, L, C]`, `add_norm` moves 4 u, `add_branch` 3 u and
# `norm_backward` 4 u; torch's separate operations move 6 u, 3 u and 6 to 8 u. Rounding to e4m3 on the way writes half
# of a result's bytes and reads none of them again, as a pass of its own would. The GPU kernels are in `_row_kernels`;
# the plain torch form serves every other device and checks them.


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _on_gpu(*tensors: Tensor | None) -> bool:
    """Return whether the Triton kernels take these tensors: contiguous, on a GPU, with Triton installed."""
    present = [t for t in tensors if t is not None]
    return all(t.is_cuda and t.is_contiguous() for t in present) and _has_triton()


def add_norm(
    x: Tensor, branch: Tensor | None, kept: Tensor | None, norm: nn.LayerNorm, in_float8: bool = False
) -> tuple[Tensor, Rows]:
    """Return `total = x + kept * branch` and `norm(total)`, each `[n, L, C]`; `kept [n, 1, 1]`, None: 1.

    `in_float8`: the norm's rows are rounded to e4m3.
    """
    if _on_gpu(x, branch):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        total = x if branch is None else torch.empty_like(x)
        scale = x.new_empty(x.numel() // x.shape[-1], 1, dtype=torch.float32) if in_float8 else None
        normed = torch.empty_like(x, dtype=float8.FLOAT8 if in_float8 else None)
        row_kernels.add_norm(x, branch, kept, norm, total, normed, scale)
        return total, normed if scale is None else Narrow(normed, scale)
    if branch is not None:
        x = x + branch if kept is None else torch.addcmul(x, branch, kept)
    normed = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return x, narrow(normed) if in_float8 else normed


def gelu(x: Tensor, in_float8: bool) -> Rows:
    """Return GELU of `x [n, L, m]`, which may be overwritten; `in_float8`: its rows are rounded to e4m3."""
    if in_float8 and _on_gpu(x):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        if x.shape[-1] <= row_kernels.WIDEST:
            return Narrow(*row_kernels.gelu(x, None))
    made: Tensor = torch.ops.aten.gelu_(x)
    return narrow(made) if in_float8 else made


def gelu_backward(grad: Tensor, x: Tensor, in_float8: bool) -> Rows:
    """Return the gradient of GELU at `x [n, L, m]`, from `grad`, which may be overwritten; rows as in `gelu`."""
    if in_float8 and _on_gpu(grad, x):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        if x.shape[-1] <= row_kernels.WIDEST:
            return Narrow(*row_kernels.gelu(x, grad))
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return narrow(grad) if in_float8 else grad


def join(thirds: Sequence[Tensor], in_float8: bool) -> Rows:
    """Put q, k and v `[n, heads, L, d]` side by side, `[n, L, 3C]`; `in_float8`: rows are rounded to e4m3."""
    first = thirds[0]
    alike = all(t.is_cuda and t.stride() == first.stride() for t in thirds) and first.stride(-1) == 1
    if in_float8 and alike and _has_triton():
        from tensorkeep.detection.model import _row_kernels as row_kernels

        return Narrow(*row_kernels.join(*thirds))
    made = torch.cat([_joined(third) for third in thirds], -1)
    return narrow(made) if in_float8 else made


def add_branch(x: Tensor, branch: Tensor, kept: Tensor | None, out: Tensor) -> None:
    """Write `x + kept * branch` to `out`, each `[n, L, C]`; `kept [n, 1, 1]`, None: 1."""
    if _on_gpu(x, branch, out):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        row_kernels.add_norm(x, branch, kept, None, out, None)
    elif kept is None:
        torch.add(x, branch, out=out)
    else:
        torch.addcmul(x, branch, kept, out=out)


def norm_backward(
    grad: Tensor, x: Tensor, norm: nn.LayerNorm, residual: Tensor, kept: Tensor | None, out: Tensor
) -> None:
    """Write `residual + kept * (gradient of norm at x, from grad)` to `out`; the weights of `norm` get no gradient.

    All are `[n, L, C]`, `kept [n, 1, 1]`; `out` may be `residual`. Drop path's factor may stand here, at the end of a
    branch's backward, since the backward is linear.
    """
    if _on_gpu(grad, x, residual, out):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        row_kernels.norm_backward(grad, x, norm, residual, kept, out)
        return
    shape, weight, bias = list(norm.normalized_shape), norm.weight, norm.bias
    mean, scale = torch.native_layer_norm(x, shape, weight, bias, norm.eps)[1:]
    back = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, scale, weight, bias, [True, False, False])[0]
    torch.add(residual, back if kept is None else back * kept, out=out)
