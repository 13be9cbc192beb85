"""Compare a tensor in memory with its bytes in the file, and find the one fault that explains a difference.

A process looks at its own shard of a tensor. Whether a tensor is transposed or its rows are permuted is looked at only
where the shard is all of it, or whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensorkeep.conversion.naming.rope import rope_rows
from tensorkeep.conversion.plan import Part
from tensorkeep.errors import TensorkeepError
from tensorkeep.models.counterpart import StoredModel
from tensorkeep.models.tensors import Held, expected, local, part_bytes
from tensorkeep.storage.record import DTYPES, nbytes

FEW = 16  # elements, or a ten-thousandth of the tensor: corruption rather than another tensor
NARROW = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_UNCORRELATED = 0.05
_CHANCE = 4.0  # standard errors of the correlation of independent values, 1 / sqrt(elements)


@dataclass
class Mismatch:
    """A tensor of the model that is not what the file holds: the code that fits, a few words, figures."""

    name: str
    code: str
    words: str
    evidence: dict[str, Any] = field(default_factory=dict)


def packed(tensor: Tensor) -> bool:
    """Say whether a tensor's values are codes (bitsandbytes, torchao) that cannot be compared with a weight."""
    base = type(tensor).__module__
    plain = (
        type(tensor) in (Tensor, torch.nn.Parameter)
        or hasattr(tensor, "to_local")
        or base.startswith("torch.nn.parameter")
    )
    return not plain or hasattr(tensor, "quant_state")


def mismatch(item: Held, parts: tuple[Part, ...], source: StoredModel) -> Mismatch | None:
    """Compare one tensor bit by bit, after the cast that its dtype implies.

    Args:
        item: The tensor in memory.
        parts: The stored tensors, or rows of them, that it is made of.
        source: The checkpoint.

    Returns:
        None where it is equal; otherwise what is wrong with it.
    """
    shape = tuple(item.tensor.shape)
    if item.tensor.is_meta:
        return Mismatch(item.name, "K01", "is still on the meta device: nothing was loaded into it")
    record = source.view[parts[0].name]
    whole = len(parts) == 1 and parts[0].rows is None
    if sum(part_bytes(p, source.view) for p in parts) != nbytes(record.dtype, shape) or (
        whole and record.shape != shape
    ):
        return _shapes(item.name, shape, parts, source)
    mine, at = local(item.tensor.detach())
    rows = (at[0], at[0] + mine.shape[0]) if shape else (0, 1)
    stored = expected(parts, source.view, shape, rows)
    if stored is None:
        return Mismatch(
            item.name, "V06", f"is stored as {record.dtype}, which torch cannot hold: not compared", {"compared": False}
        )
    if shape:
        stored = stored[(slice(None), *(slice(o, o + n) for o, n in zip(at[1:], mine.shape[1:])))]
    mine = mine.cpu()
    cast = stored.to(mine.dtype)
    if same(mine, cast):
        return None
    complete = mine.shape == item.tensor.shape
    return _explained(item.name, mine, cast, stored, complete, source.config)


def same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal in every bit, or in every value (NaN equals NaN, zero its negative)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.numel() == 0:
        return a.shape == b.shape and a.dtype == b.dtype
    if torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)):
        return True
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    x, y = a.float() if a.element_size() < 4 else a, b.float() if b.element_size() < 4 else b
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


def _shapes(name: str, shape: tuple[int, ...], parts: tuple[Part, ...], source: StoredModel) -> Mismatch:
    """Describe a difference in shape."""
    sizes = [list(source.view[p.name].shape) for p in parts]
    evidence = {"model": list(shape), "file": sizes[0] if len(sizes) == 1 else sizes[:4]}
    words = f"is {list(shape)} in the model and {evidence['file']} in the file"
    rows_only = len(sizes) == 1 and len(sizes[0]) == len(shape) and tuple(sizes[0][1:]) == shape[1:]
    vocabulary = rows_only and any(s in name for s in ("embed", "lm_head", "output.weight", "wte"))
    return Mismatch(name, "S02" if vocabulary else "S01", words, evidence)


def _explained(
    name: str, mine: Tensor, cast: Tensor, stored: Tensor, complete: bool, config: Mapping[str, Any] | None
) -> Mismatch:
    """Find the code of a difference, trying S, O, V04, V05, V03, V01, V07, V02 and V06 in this order."""
    if not mine.dtype.is_floating_point:
        return Mismatch(name, "V06", "integers differ", {"different": int((mine != cast).sum())})
    found = _moved(name, mine, cast, complete, config)
    if found:
        return found
    a, b = mine.double().reshape(-1), cast.double().reshape(-1)
    evidence = _numbers(a, b)
    if mine.ndim == 1 and a.numel() > 1 and bool((a == a[0]).all()) and float(a[0]) in (0.0, 1.0):
        return Mismatch(name, "V04", f"is {float(a[0]):g} throughout: at its default, never loaded", evidence)
    if bool((a == 0).all()):
        return Mismatch(name, "V05", "is all zeros: never written", evidence)
    if evidence["not_finite"] and evidence["different"] > evidence["not_finite"]:
        return Mismatch(name, "V01", "holds values that are not finite", evidence)
    few = evidence["different"] <= max(FEW, a.numel() // 10000)
    if evidence["not_finite"]:
        return Mismatch(name, "V01", "holds values that are not finite", evidence)
    correlation = evidence.get("correlation")
    chance = max(_UNCORRELATED, _CHANCE / a.numel() ** 0.5)
    if a.numel() >= 64 and not few and correlation is not None and abs(correlation) < chance:
        return Mismatch(
            name, "V03", "has nothing in common with the file: what an initialiser gave, or old memory", evidence
        )
    if few and a.numel() > FEW:
        return Mismatch(name, "V07", f"differs in {evidence['different']} elements only", evidence)
    for spelled in NARROW:
        if same(stored.to(getattr(torch, spelled)).to(mine.dtype), mine):
            return Mismatch(name, "V02", f"went through {spelled}", {**evidence, "through": spelled})
    ratio = float((a * b).sum() / (b * b).sum()) if bool((b != 0).any()) else 0.0
    scaled = float((a - ratio * b).norm()) <= 1e-3 * float(a.norm())
    words = f"is {ratio:.6g} times the file's" if scaled else f"differs by {evidence['relative']:.3g} of its norm"
    return Mismatch(name, "V06", words, {**evidence, **({"scale": ratio} if scaled else {})})


def _moved(name: str, mine: Tensor, cast: Tensor, complete: bool, config: Mapping[str, Any] | None) -> Mismatch | None:
    """Say whether a tensor is transposed, or has its rows in the other RoPE layout; None otherwise."""
    if complete and mine.ndim == 2 and mine.shape[0] == mine.shape[1] and same(mine, cast.T):
        return Mismatch(name, "S03", "is transposed")
    if any(s in name for s in ("q_proj", "k_proj", ".wq.", ".wk.", "q_norm", "k_norm")) and mine.ndim:
        for to, words in (("pairs", "interleaved"), ("half", "half-split")):
            try:
                rows = rope_rows(config, to, name, tuple(mine.shape))
            except TensorkeepError:
                return None
            turned = cast.reshape(-1, rows.block, *cast.shape[1:])[:, rows.order()].reshape(cast.shape)
            if same(mine, turned):
                return Mismatch(name, "O01", f"has its rows in the {words} RoPE layout, the file in the other")
    return None


def _numbers(a: Tensor, b: Tensor) -> dict[str, Any]:
    """Measure a difference. a, b: [elements], float64."""
    bad = ~a.isfinite() & b.isfinite()
    both = a.isfinite() & b.isfinite()
    x, y = a[both], b[both]
    out: dict[str, Any] = {
        "different": int((x != y).sum() + (~both).sum()),
        "elements": a.numel(),
        "not_finite": int(bad.sum()),
    }
    if x.numel():
        norm = float(y.norm())
        out["max_difference"] = float((x - y).abs().max())
        out["relative"] = float((x - y).norm()) / norm if norm else float("inf")
        p, q = x - x.mean(), y - y.mean()
        scale = float(p.norm() * q.norm())
        out["correlation"] = float((p * q).sum()) / scale if scale else None
        out["std"] = float(x.std(unbiased=False))
    return out


def twin(item: Held, source: StoredModel) -> str | None:
    """Find another stored tensor of the same shape whose values the model holds under this name; None for none.

    First rows are compared before whole tensors are read. Unsharded tensors only.
    """
    shape = tuple(item.tensor.shape)
    if hasattr(item.tensor, "to_local") or not shape or item.tensor.is_meta or shape[0] == 0:
        return None
    mine = item.tensor.detach().cpu()
    for stored in source.stored.values():
        record = source.view[stored]
        if record.shape != shape or not DTYPES[record.dtype].floating:
            continue
        first = expected((Part(0, stored),), source.view, shape, (0, 1))
        if first is None or not same(mine[:1], first.to(mine.dtype)):
            continue
        whole = expected((Part(0, stored),), source.view, shape, (0, shape[0]))
        if whole is not None and same(mine, whole.to(mine.dtype)):
            return stored
    return None
