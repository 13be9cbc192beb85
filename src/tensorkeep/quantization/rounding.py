"""Choose 4-bit codes and scales of a weight by what it does to its inputs, where rounding each number alone loses it.

A small update of a weight that lies on a grid rounds back to where it was. What counts is the layer's output, so an
error is measured by the second moment H = E[x x'] of the inputs: the error of a row is e H e'. Codes are chosen column
by column, and what rounding one column does wrong is put right by those that follow (GPTQ, Frantar et al., arXiv
2210.17323, equations 2 and 3; the same as LDLQ). Scales are the largest magnitudes of blocks, or smaller ones where
that leaves less error. A row keeps the plain rounding where that is better.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.codes import SMALLEST_SCALE, TABLES
from tensorkeep.quantization.packed import Layout, Packed

FourBits = Literal["nf4", "fp4"]
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a block's largest magnitude
_DAMPING = 0.01  # of H's mean diagonal, added to it
_COLUMNS = 128  # are worked on before the rest is corrected


class Rounded(NamedTuple):
    """A weight in codes, not packed yet.

    Attributes:
        codes: [out, in], int64: places in the kind's table.
        scales: one for each block of flat elements, float32.
        kind: "nf4" or "fp4".
        block: flat elements that share a scale.
        error: e H e' over all rows, relative to W H W'.
        plain: the same of rounding each number alone.
    """

    codes: Tensor
    scales: Tensor
    kind: FourBits
    block: int
    error: float
    plain: float

    def weight(self, scales: Tensor | None = None) -> Tensor:
        """Return the numbers that the codes stand for, float32.

        Args:
            scales: others than the own; gradients flow through them.
        """
        levels = _grid(self.kind, self.codes.device)[0][self.codes]
        return levels * spread(self.scales if scales is None else scales, self.codes.shape, self.block)

    def packed(self, dtype: torch.dtype) -> Packed:
        """Return codes and scales as bitsandbytes stores them, scales in float32.

        Args:
            dtype: what the weight was.
        """
        flat = F.pad(self.codes.reshape(-1), (0, self.codes.numel() % 2)).to(torch.uint8)
        out, columns = self.codes.shape
        layout = Layout(self.kind, (out, columns), self.block, 0, str(dtype).removeprefix("torch."))
        table = torch.from_numpy(TABLES[self.kind] + 0).to(flat.device)
        tensors = {"weight": (flat[0::2] << 4 | flat[1::2]).view(-1, 1), "absmax": self.scales.clone()}
        return Packed(layout, tensors | {"quant_map": table})


def rounded(weight: Tensor, moment: Tensor, kind: FourBits = "nf4", block: int = 64, name: str = "weight") -> Rounded:
    """Choose codes and scales so that the outputs for inputs of this second moment change least.

    Args:
        weight: [out, in], on any device.
        moment: [in, in], the mean of x x' over the inputs, float32.
        kind: the table of codes.
        block: flat elements that share a scale.
        name: what messages call the weight.

    Returns:
        Codes and scales, never worse than plain rounding by the error above.

    Raises:
        TensorkeepError: V01 where weight or moment are not finite.

    Example:
        >>> w, x = torch.randn(8, 64), torch.randn(500, 64)
        >>> found = rounded(w, x.T @ x / 500)
        >>> found.error <= found.plain
        True
    """
    weight, moment = weight.detach().float(), moment.float()
    if not bool(torch.isfinite(weight).all() and torch.isfinite(moment).all()):
        raise TensorkeepError("holds NaN or infinity, or its inputs do", where=name, code="V01")
    size = float(_errors(weight, moment).sum()) or 1.0
    top = _largest(weight, block)
    plain = _nearest(weight, top, kind, block)
    plain_errors = _errors(_values(plain, top, kind, block) - weight, moment)
    best = Rounded(plain, top, kind, block, float(plain_errors.sum()) / size, float(plain_errors.sum()) / size)
    upper = _inverse_root(moment)
    for scales in (top, _shrunk(weight, moment.diagonal(), top, kind, block)):
        codes = _by_columns(weight, upper, scales, kind, block)
        errors = _errors(_values(codes, scales, kind, block) - weight, moment)
        alone = _nearest(weight, scales, kind, block)
        alone_errors = _errors(_values(alone, scales, kind, block) - weight, moment)
        codes = torch.where((alone_errors < errors)[:, None], alone, codes)
        error = float(torch.minimum(alone_errors, errors).sum()) / size
        if error < best.error:
            best = best._replace(codes=codes, scales=scales, error=error)
    return best


def spread(scales: Tensor, shape: torch.Size | tuple[int, ...], block: int) -> Tensor:
    """Give each element of a weight the scale of its block.

    Args:
        scales: one for each block of flat elements.
        shape: of the weight.
        block: flat elements that share a scale.
    """
    return scales.repeat_interleave(block)[: math.prod(shape)].view(shape)


@lru_cache(maxsize=8)
def _grid(kind: FourBits, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table, its places by size, and the borders between levels that lie beside each other."""
    table = torch.from_numpy(TABLES[kind] + 0).to(device)
    order = torch.argsort(table, stable=True)
    return table, order, (table[order[1:]] + table[order[:-1]]) / 2


def _largest(weight: Tensor, block: int) -> Tensor:
    """Return the largest magnitude of each block of flat elements."""
    flat = F.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)
    return flat.abs().amax(1).clamp(min=float(SMALLEST_SCALE))


def _levels(unit: Tensor, kind: FourBits) -> Tensor:
    """Return the place in the table of the level nearest to each number."""
    _, order, borders = _grid(kind, unit.device)
    places: Tensor = order[torch.bucketize(unit.contiguous(), borders)]
    return places


def _nearest(weight: Tensor, scales: Tensor, kind: FourBits, block: int) -> Tensor:
    return _levels(weight / spread(scales, weight.shape, block), kind)


def _values(codes: Tensor, scales: Tensor, kind: FourBits, block: int) -> Tensor:
    return _grid(kind, codes.device)[0][codes] * spread(scales, codes.shape, block)


def _errors(difference: Tensor, moment: Tensor) -> Tensor:
    """Return e H e' of each row."""
    return ((difference @ moment) * difference).sum(1)


def _shrunk(weight: Tensor, importance: Tensor, top: Tensor, kind: FourBits, block: int) -> Tensor:
    """Return for each block the share of its largest magnitude that leaves the least error, weighted by the inputs."""
    pad = (0, -weight.numel() % block)
    blocks = F.pad(weight.reshape(-1), pad).view(-1, block)
    heavy = F.pad(importance.expand(weight.shape).reshape(-1), pad).view(-1, block)
    table = _grid(kind, weight.device)[0]
    best, chosen = torch.full_like(top, math.inf), top.clone()
    for share in _SHRUNK:
        scales = top * share
        made = table[_levels(blocks / scales[:, None], kind)] * scales[:, None]
        error = ((made - blocks).square() * heavy).sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scales, chosen)
    return chosen


def _inverse_root(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped moment's inverse; damped more where it is not definite enough."""
    eye = torch.eye(moment.shape[0], device=moment.device)
    mean = float(moment.diagonal().mean()) or 1.0
    for times in (1, 10, 100):
        lower, failed = torch.linalg.cholesky_ex(moment + eye * (_DAMPING * times * mean))
        if not int(failed):
            root, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            upper: Tensor = root
            if not int(failed):
                return upper
    return eye


def _by_columns(weight: Tensor, upper: Tensor, scales: Tensor, kind: FourBits, block: int) -> Tensor:
    """Choose codes column by column, each error spread over the columns that follow."""
    rest, grid = weight.clone(), spread(scales, weight.shape, block)
    table, codes = _grid(kind, weight.device)[0], torch.empty(weight.shape, dtype=torch.int64, device=weight.device)
    columns = weight.shape[1]
    for first in range(0, columns, _COLUMNS):
        last = min(first + _COLUMNS, columns)
        wrong = torch.empty(weight.shape[0], last - first, device=weight.device)
        for at in range(first, last):
            codes[:, at] = _levels(rest[:, at] / grid[:, at], kind)
            wrong[:, at - first] = (rest[:, at] - table[codes[:, at]] * grid[:, at]) / upper[at, at]
            rest[:, at + 1 : last] -= wrong[:, at - first, None] * upper[at, at + 1 : last]
        rest[:, last:] -= wrong @ upper[first:last, last:]
    return codes
