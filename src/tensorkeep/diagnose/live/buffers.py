"""B01 on a live model: every non-persistent buffer against what the config gives, and the repair in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.findings import Finding
from tensorkeep.models.buffers import Buffer, buffers, fresh, rope_frequencies
from tensorkeep.models.tensors import local
from tensorkeep.formats.names import grouped

EXACT = 1e-5  # relative; powers computed on another device differ in the last bits
TABLE = (
    2e-2  # of the largest entry, for tables computed on another device: position 1e5 times the last bit of a frequency
)
FIX = "from tensorkeep import repair_buffers; repair_buffers(model)"
FILLED = "no checkpoint fills it: meta construction and to_empty() leave whatever lay in memory"


def buffer_findings(model: nn.Module, config: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """B01 for every non-persistent buffer that is wrong, narrowed, or beyond what can be computed here."""
    right = fresh(model, config)
    unknown: dict[str, str] = {}
    narrowed: list[Buffer] = []
    wrong: list[Finding] = []
    again = None
    for buffer in _skipping_dynamic(buffers(model)):
        value, way = right[buffer.name]
        if value is None:
            if impossible(buffer):
                wrong.append(_wrong(buffer, None, "its values are none that RoPE can have"))
            else:
                unknown[buffer.name] = way
            continue
        state = judge(buffer.tensor, value)
        if state == "wrong":
            again = again or fresh(model, config, seed=1)
            other = again[buffer.name].value
            if other is not None and judge(value, other) == "wrong":
                unknown[buffer.name] = "its class draws it at random"
            else:
                wrong.append(_wrong(buffer, value, way))
        elif state == "narrowed" and buffer.key.endswith("inv_freq"):
            narrowed.append(buffer)
    if wrong:
        names = [f.tensors[0] for f in wrong]
        others = f" ({len(wrong)} buffers in all: {', '.join(grouped(names)[:4])})" if len(wrong) > 1 else ""
        yield Finding(
            "B01", "error", f"{wrong[0].message}{others}", names, {f.tensors[0]: f.evidence for f in wrong}, fix=FIX
        )
    if narrowed:
        kinds = sorted({str(b.tensor.dtype).removeprefix("torch.") for b in narrowed})
        yield Finding("B01", "warning", f"{len(narrowed)} buffers of RoPE went through a cast to 16 bits (they are {', '.join(kinds)} now); "
                      "the class computes them in float32", [b.name for b in narrowed], {"dtypes": kinds}, fix=FIX)  # fmt: skip
    if unknown:
        reasons = sorted(set(unknown.values()))
        yield Finding("B01", "warning", f"{len(unknown)} non-persistent buffers cannot be recomputed here, so nothing is said of their values: "
                      f"{'; '.join(reasons)}", list(unknown), {"reasons": unknown})  # fmt: skip
    yield from table_findings(model, config, {n for f in wrong for n in f.tensors})


def _skipping_dynamic(found: list[Buffer]) -> Iterator[Buffer]:
    """RoPE of types dynamic and longrope changes its inv_freq with the length it has seen; the original does not."""
    for buffer in found:
        kinds = getattr(buffer.module, "rope_type", None)
        dynamic = kinds in ("dynamic", "longrope") and not buffer.key.startswith("original")
        if (
            dynamic
            and isinstance(original := getattr(buffer.module, "original_inv_freq", None), Tensor)
            and not original.is_meta
        ):
            continue
        yield buffer


def judge(live: Tensor, right: Tensor) -> str:
    """`equal`, `narrowed` (equal once cast to the buffer's own dtype) or `wrong`; of a sharded buffer, this process's part."""
    if live.shape != right.shape or live.is_meta:
        return "wrong"
    mine, at = local(live.detach())
    theirs = (
        right[tuple(slice(o, o + n) for o, n in zip(at, mine.shape))] if any(at) or mine.shape != right.shape else right
    )
    elsewhere, mine = mine.device.type != "cpu", mine.cpu()
    if mine.dtype == theirs.dtype:
        if _close(mine, theirs, elsewhere):
            return "equal"
        through = [theirs.to(d).to(mine.dtype) for d in (torch.bfloat16, torch.float16) if mine.dtype == torch.float32]
        return "narrowed" if any(_close(mine, t, elsewhere) for t in through) else "wrong"
    if not (mine.is_floating_point() and theirs.is_floating_point()):
        return (
            "wrong"
            if mine.dtype.is_complex != theirs.dtype.is_complex or not torch.equal(mine, theirs.to(mine.dtype))
            else "equal"
        )
    return "narrowed" if _close(mine.double(), theirs.to(mine.dtype).double(), elsewhere) else "wrong"


def _close(a: Tensor, b: Tensor, elsewhere: bool) -> bool:
    if not (a.is_floating_point() or a.is_complex()) or torch.equal(a, b):
        return torch.equal(a, b)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(
        torch.nan_to_num(a[~finite].real), torch.nan_to_num(b[~finite].real)
    ):
        return False
    x, y = a[finite], b[finite]
    room = EXACT * y.abs()
    if y.ndim and b.ndim > 1 and y.numel():
        room = room + (TABLE if elsewhere else EXACT) * y.abs().max()
    return bool(((x - y).abs() <= room).all())


def impossible(buffer: Buffer) -> bool:
    """Whether an inv_freq cannot be one: frequencies are finite, positive, and 1 at most (a little more with scaling)."""
    if not buffer.key.endswith("inv_freq") or not buffer.tensor.is_floating_point():
        return False
    if buffer.tensor.is_meta:
        return True
    values = local(buffer.tensor.detach())[0].float().cpu()
    return not bool((values.isfinite() & (values > 0) & (values <= 2.0)).all())


def _wrong(buffer: Buffer, right: Tensor | None, way: str) -> Finding:
    live = buffer.tensor.detach()
    evidence: dict[str, Any] = {
        "shape": list(live.shape),
        "dtype": str(live.dtype).removeprefix("torch."),
        "expected_from": way,
    }
    if live.is_meta:
        evidence["holds"] = "nothing: it is still on the meta device"
    else:
        evidence |= {"holds": _first(local(live)[0]), **_odd(local(live)[0])}
    if right is not None:
        evidence["expected"] = _first(right)
        if right.shape != live.shape:
            evidence["expected_shape"] = list(right.shape)
    said = f"holds {evidence['holds']}" + (
        f", the config gives {evidence['expected']}" if right is not None else f": {way}"
    )
    return Finding("B01", "error", f"{buffer.name} {said}; {FILLED}", [buffer.name], evidence, fix=FIX)


def _first(values: Tensor, count: int = 4) -> Any:
    """The first few values for evidence, as plain numbers (NaN and infinities as words)."""
    flat = values.detach().cpu().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    numbers = [float(v) for v in flat[:count]]
    return [float(f"{n:.4g}") if abs(n) < float("inf") else str(n) for n in numbers]


def _odd(values: Tensor) -> dict[str, int]:
    flat = values.detach().cpu().reshape(-1)
    return {"not_finite": int((~flat.isfinite()).sum()), "zeros": int((flat == 0).sum()), "elements": flat.numel()}


# -- tables of other frameworks against the checkpoint's config -------------------------------------------------------


def table_findings(
    model: nn.Module, config: Mapping[str, Any] | None, known: Collection[str] = ()
) -> Iterator[Finding]:
    """C01 where a table of angles (torchtitan's freqs_cis or cache) has other frequencies than the checkpoint's config.

    Architectures that come from a registry and not from config.json (torchtitan's flavours) go wrong in this way.
    """
    right = rope_frequencies(config) if config is not None else None
    if right is None:
        return
    odd: dict[str, Tensor] = {}
    for buffer in buffers(model):
        found = table_frequencies(buffer.tensor, len(right)) if buffer.name not in known else None
        if found is not None and bool(((found - right).abs() > 1e-3 * right).any()):
            odd[buffer.name] = found
    if odd:
        name, found = next(iter(odd.items()))
        which = ((found - right).abs() > 1e-3 * right).nonzero().reshape(-1)
        at = int(which[0])
        yield Finding(
            "C01", "error", f"{name} turns by other angles than the checkpoint's config says: frequency {at} is {float(found[at]):.6g} instead of "
            f"{float(right[at]):.6g} ({len(which)} of {len(right)} differ, in {len(odd)} tables)", list(odd),
            {"different": len(which), "frequencies": len(right), "holds": _first(found[which]), "expected": _first(right[which])},
            fix="set rope theta and scaling of the model as in the checkpoint's config.json",
        )  # fmt: skip


def table_frequencies(table: Tensor, half: int) -> Tensor | None:
    """The frequencies in a table of angles: complex (positions, half), or cos and sin side by side (positions, 4 half)."""
    if table.is_meta or hasattr(table, "to_local") or table.ndim != 2 or len(table) < 2:
        return None
    row = table[1].detach().cpu()
    if table.is_complex() and table.shape[1] == half:
        return row.angle().float()
    if table.is_floating_point() and table.shape[1] == 4 * half and table.dtype == torch.float32:
        return torch.atan2(row[2 * half : 3 * half], row[:half])
    return None


# -- repair -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def repaired(model: nn.Module) -> list[str]:
    """Put the right value into every buffer that has not got it; the names of those changed."""
    right = fresh(model)
    changed = []
    for buffer in _skipping_dynamic(buffers(model)):
        value = right[buffer.name].value
        if value is None or judge(buffer.tensor, value) == "equal":
            continue
        rope = buffer.key.endswith("inv_freq")
        if judge(buffer.tensor, value) == "narrowed" and not rope:
            continue  # a scale or a table in the model's dtype, as from_pretrained leaves it
        _put(model, buffer, value, value.dtype if rope or buffer.tensor.is_meta else buffer.tensor.dtype)
        changed.append(buffer.name)
    return changed


def _put(model: nn.Module, buffer: Buffer, value: Tensor, dtype: torch.dtype) -> None:
    live: Any = buffer.tensor
    if not live.is_meta and live.dtype == dtype and live.shape == value.shape and not hasattr(live, "to_local"):
        live.copy_(value)  # in place: compiled graphs and captured ones keep its address
        return
    device = _device(model) if live.is_meta else live.device
    made = value.to(device=device, dtype=dtype, copy=True)
    if hasattr(live, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        made = distribute_tensor(made, live.device_mesh, live.placements)
    if buffer.plain:
        setattr(buffer.module, buffer.key, made)
    else:
        buffer.module._buffers[buffer.key] = made


def _device(model: nn.Module) -> torch.device:
    """Where the model lives: the device of its first parameter that is anywhere."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
