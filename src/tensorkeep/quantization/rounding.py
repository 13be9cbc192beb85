"""Choose codes and scales of a weight by what it does to its inputs, where rounding each number alone loses it.

A small update of a weight that lies on a grid rounds back to where it was. What counts is the layer's output, so an
error is measured by the second moment H = E[x x'] of the inputs: the error of a row is e H e'. Codes are chosen column
by column, and what rounding one column does wrong is put right by those that follow (GPTQ, Frantar et al., arXiv
2210.17323, equations 2 and 3; the same as LDLQ). Scales are those of plain rounding, or others where that leaves less
error (`grids`). A row keeps the plain rounding where that is better.

mxfp4's scales are powers of two, which nothing can train. Each block's is the one of three whose codes leave the least
error where its columns' turn comes, and once all codes are set, each column is chosen again with the others as they
are (coordinate descent, as QuantEase, arXiv 2309.01885). What was rounded is kept beside the codes: from there training
moves codes (`_rounding` of language).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.codes import TABLES
from tensorkeep.quantization.grids import (
    BLOCK,
    ROW_BLOCK,
    Form,
    Numbers,
    exponents_near,
    level_of,
    levels,
    nearest,
    peaks,
    plain_numbers,
    powers,
    spread,
    tried_numbers,
    values,
)
from tensorkeep.quantization.packed import Layout, Packed

_DAMPING = 0.01  # of H's mean diagonal, added to it
_COLUMNS = 128  # are worked on before the rest is corrected
_SWEEPS, _TOGETHER = 2, 64  # of mxfp4's columns, once all codes are set; columns between two corrections of the rest


class Rounded(NamedTuple):
    """A weight in codes, not packed yet.

    Attributes:
        codes: [out, in], int64: places in the form's table.
        numbers: what a file keeps of scales and offsets.
        form: of the codes.
        error: e H e' over all rows, relative to W H W'.
        plain: the same of rounding each number alone.
        before: the numbers whose nearest levels the codes are, float32; None where nothing moves codes.
    """

    codes: Tensor
    numbers: Numbers
    form: Form
    error: float = 0.0
    plain: float = 0.0
    before: Tensor | None = None

    def weight(self, numbers: Numbers | None = None) -> Tensor:
        """Return the numbers that the codes stand for, float32.

        Args:
            numbers: others than the own; gradients flow through them.
        """
        return values(self.form, self.codes, self.numbers if numbers is None else numbers)

    def packed(self, dtype: torch.dtype) -> Packed:
        """Return nf4, fp4 or int8 as bitsandbytes stores them, scales in float32.

        Args:
            dtype: what the weight was.
        """
        shape, word = (self.codes.shape[0], self.codes.shape[1]), str(dtype).removeprefix("torch.")
        if self.form == "int8":
            held = {"weight": (self.codes - 127).to(torch.int8), "SCB": self.numbers["SCB"].clone()}
            return Packed(Layout("int8", shape, 0, 0, word), held)
        assert self.form in ("nf4", "fp4")
        flat = F.pad(self.codes.reshape(-1), (0, self.codes.numel() % 2)).to(torch.uint8)
        table = torch.from_numpy(TABLES[self.form] + 0).to(flat.device)
        tensors = {"weight": (flat[0::2] << 4 | flat[1::2]).view(-1, 1), "absmax": self.numbers["absmax"].clone()}
        return Packed(Layout(self.form, shape, BLOCK, 0, word), tensors | {"quant_map": table})


def plainly(weight: Tensor, form: Form) -> Rounded:
    """Round each number of a weight alone, with the scales that the format's own rounding takes.

    Args:
        weight: [out, in], on any device.
        form: of the codes.

    Returns:
        Codes and scales; their errors are not computed.
    """
    weight = weight.detach().float()
    numbers = plain_numbers(form, weight)
    return Rounded(_nearest(weight, form, numbers), numbers, form)


def rounded(weight: Tensor, moment: Tensor, form: Form = "nf4", name: str = "weight") -> Rounded:
    """Choose codes and scales so that the outputs for inputs of this second moment change least.

    Args:
        weight: [out, in], on any device.
        moment: [in, in], the mean of x x' over the inputs, float32.
        form: of the codes; its blocks divide the rows.
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
    best = plainly(weight, form)
    off = float(_errors(best.weight() - weight, moment).sum()) / size
    best = best._replace(error=off, plain=off)
    if form == "mxfp4":
        return _in_powers(weight, moment, size, best)
    forced = peaks(form, weight)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)  # the largest inputs first
    upper = _inverse_root(moment[order][:, order])
    for numbers in tried_numbers(form, weight, moment.diagonal()):
        codes = _by_columns(weight, upper, order, form, numbers, forced)
        errors = _errors(values(form, codes, numbers) - weight, moment)
        alone = _nearest(weight, form, numbers)
        alone_errors = _errors(values(form, alone, numbers) - weight, moment)
        codes = torch.where((alone_errors < errors)[:, None], alone, codes)
        error = float(torch.minimum(alone_errors, errors).sum()) / size
        if error < best.error:
            best = best._replace(codes=codes, numbers=numbers, error=error)
    return best


def _laid(form: Form, numbers: Numbers, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, one over it (a scale of 0 has 0) and offset of each element."""
    scale, offset = spread(form, numbers, (weight.shape[0], weight.shape[1]))
    over = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
    return scale.expand(weight.shape), over.expand(weight.shape), torch.zeros_like(weight) if offset is None else offset


def _nearest(weight: Tensor, form: Form, numbers: Numbers) -> Tensor:
    _, over, offset = _laid(form, numbers, weight)
    return nearest((weight - offset) * over, form)


def _errors(difference: Tensor, moment: Tensor) -> Tensor:
    """Return e H e' of each row."""
    return ((difference @ moment) * difference).sum(1)


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


def _by_columns(
    weight: Tensor, upper: Tensor, order: Tensor, form: Form, numbers: Numbers, forced: Tensor | None
) -> Tensor:
    """Choose codes column by column in an order, each error spread over the columns that follow."""
    rest, (scale, over, offset) = weight[:, order], (part[:, order] for part in _laid(form, numbers, weight))
    table = levels(form, weight.device).table
    codes = torch.empty(weight.shape, dtype=torch.int64, device=weight.device)
    columns, forced = weight.shape[1], None if forced is None else forced[:, order]
    for first in range(0, columns, _COLUMNS):
        last = min(first + _COLUMNS, columns)
        wrong = torch.empty(weight.shape[0], last - first, device=weight.device)
        for at in range(first, last):
            codes[:, at] = nearest((rest[:, at] - offset[:, at]) * over[:, at], form)
            if forced is not None:
                codes[:, at] = torch.where(forced[:, at] < 0, codes[:, at], forced[:, at])
            made = table[codes[:, at]] * scale[:, at] + offset[:, at]
            wrong[:, at - first] = (rest[:, at] - made) / upper[at, at]
            rest[:, at + 1 : last] -= wrong[:, at - first, None] * upper[at, at + 1 : last]
        rest[:, last:] -= wrong @ upper[first:last, last:]
    return codes[:, torch.argsort(order)]


# -- mxfp4 ----------------------------------------------------------------------------------------------------------


def _in_powers(weight: Tensor, moment: Tensor, size: float, plain: Rounded) -> Rounded:
    """Choose exponents and codes of mxfp4; plain rounding where that is better."""
    before, numbers = _by_groups(weight, moment)
    for _ in range(_SWEEPS):
        before = _again(weight, moment, before, numbers)
    codes = _nearest(before, "mxfp4", numbers)
    error = float(_errors(values("mxfp4", codes, numbers) - weight, moment).sum()) / size
    if error < plain.error:
        return plain._replace(codes=codes, numbers=numbers, error=error, before=before)
    return plain._replace(before=weight)


def _by_groups(weight: Tensor, moment: Tensor) -> tuple[Tensor, Numbers]:
    """Choose exponents block by block with the errors of those before spread over them, the largest inputs first.

    Returns:
        What each element was when its turn came, [out, in], and the exponents.
    """
    rows, diagonal = len(weight), moment.diagonal().view(-1, ROW_BLOCK)
    groups = torch.argsort(diagonal.sum(1), descending=True, stable=True)
    inside = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    order = (groups[:, None] * ROW_BLOCK + inside[groups]).view(-1)
    upper = _inverse_root(moment[order][:, order])
    rest, before = weight[:, order], torch.empty_like(weight)
    exponents = torch.empty(rows, len(groups), dtype=torch.uint8, device=weight.device)
    every = torch.arange(rows, device=weight.device)
    for at, group in enumerate(groups.tolist()):
        first, last = at * ROW_BLOCK, (at + 1) * ROW_BLOCK
        tried = exponents_near(rest[:, first:last].abs().amax(1))  # [tried, out]
        scales = powers(tried)[..., None]
        left, wrong = rest[None, :, first:last].repeat(len(tried), 1, 1), rest.new_empty(len(tried), rows, ROW_BLOCK)
        for column in range(ROW_BLOCK):
            made = level_of(left[..., column, None] / scales, "mxfp4") * scales
            wrong[..., column] = (left[..., column] - made[..., 0]) / upper[first + column, first + column]
            after = upper[first + column, first + column + 1 : last]
            left[..., column + 1 :] -= wrong[..., column, None] * after
        best = wrong.square().sum(2).argmin(0)
        exponents[:, group], before[:, first:last] = tried[best, every], left[best, every]
        rest[:, last:] -= wrong[best, every] @ upper[first:last, last:]
    return before[:, torch.argsort(order)], {"exponents": exponents}


def _again(weight: Tensor, moment: Tensor, before: Tensor, numbers: Numbers) -> Tensor:
    """Choose each column's codes anew with all others as they are, the largest inputs first."""
    scale = _laid("mxfp4", numbers, weight)[0]
    over, before = 1 / scale, before.clone()
    made = level_of(before * over, "mxfp4") * scale
    pull = (made - weight) @ moment
    diagonal = moment.diagonal() + _DAMPING * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for some in torch.split(torch.argsort(diagonal, descending=True, stable=True), _TOGETHER):
        near, turned = moment[some][:, some], pull[:, some]
        moved = torch.zeros_like(turned)
        for at, column in enumerate(some.tolist()):
            before[:, column] = made[:, column] - turned[:, at] / diagonal[column]
            new = level_of(before[:, column] * over[:, column], "mxfp4") * scale[:, column]
            moved[:, at] = new - made[:, column]
            made[:, column] = new
            turned += moved[:, at, None] * near[at]
        pull += moved @ moment[some]
    return before
