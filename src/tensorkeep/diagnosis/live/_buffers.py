"""Compare every buffer that no checkpoint fills with what the config gives (B01)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped
from tensorkeep.models.adapter_names import is_adapter, parts_of
from tensorkeep.models.buffers import Buffer, buffers, fresh, rope_frequencies
from tensorkeep.models.repair import judge, without_dynamic
from tensorkeep.models.tensors import local

FIX = "from tensorkeep import repair_buffers; repair_buffers(model)"
_FILLED = "no checkpoint fills it: meta construction and to_empty() leave whatever lay in memory"


def buffer_findings(model: nn.Module, config: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """Report the non-persistent buffers that are wrong, were cast to 16 bits, or cannot be recomputed here.

    Args:
        model: A model in memory.
        config: The checkpoint's config, where it is known.

    Returns:
        At most one B01 for each of the three, and C01 for tables of angles with other frequencies than the config's.
    """
    right, adapters = fresh(model, config), parts_of(model)
    unknown: dict[str, str] = {}
    narrowed: list[Buffer] = []
    wrong: list[Finding] = []
    again = None
    for buffer in without_dynamic(buffers(model)):
        value, way = right[buffer.name]
        if value is None:
            if impossible(buffer):
                wrong.append(_wrong(buffer, None, "its values are none that RoPE can have"))
            elif not is_adapter(buffer.name, adapters):  # PEFT fills its own
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
        message = (
            f"{len(narrowed)} buffers of RoPE went through a cast to 16 bits (they are {', '.join(kinds)} now); "
            "the class computes them in float32"
        )
        yield Finding("B01", "warning", message, [b.name for b in narrowed], {"dtypes": kinds}, fix=FIX)
    if unknown:
        reasons = sorted(set(unknown.values()))
        message = (
            f"{len(unknown)} non-persistent buffers cannot be recomputed here, so nothing is said of their values: "
            f"{'; '.join(reasons)}"
        )
        yield Finding("B01", "warning", message, list(unknown), {"reasons": unknown})
    yield from _table_findings(model, config, {n for f in wrong for n in f.tensors})


def impossible(buffer: Buffer) -> bool:
    """Say whether RoPE's inv_freq has impossible values: it is finite, positive, and hardly ever above 1."""
    if not buffer.key.endswith("inv_freq") or not buffer.tensor.is_floating_point():
        return False
    if buffer.tensor.is_meta:
        return True
    values = local(buffer.tensor.detach())[0].float().cpu()
    return not bool((values.isfinite() & (values > 0) & (values <= 2.0)).all())


def _wrong(buffer: Buffer, right: Tensor | None, way: str) -> Finding:
    """Make the finding about one wrong buffer. `way`: how the right values were found, or what is impossible."""
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
    return Finding("B01", "error", f"{buffer.name} {said}; {_FILLED}", [buffer.name], evidence, fix=FIX)


def _first(values: Tensor, count: int = 4) -> Any:
    """Return the first few values as plain numbers, NaN and infinities as words."""
    flat = values.detach().cpu().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    numbers = [float(v) for v in flat[:count]]
    return [float(f"{n:.4g}") if abs(n) < float("inf") else str(n) for n in numbers]


def _odd(values: Tensor) -> dict[str, int]:
    """Count the values that are not finite or zero, for evidence."""
    flat = values.detach().cpu().reshape(-1)
    return {"not_finite": int((~flat.isfinite()).sum()), "zeros": int((flat == 0).sum()), "elements": flat.numel()}


# -- tables of other frameworks against the checkpoint's config -------------------------------------------------------


def _table_findings(
    model: nn.Module, config: Mapping[str, Any] | None, known: Collection[str] = ()
) -> Iterator[Finding]:
    """Report tables of angles (torchtitan's freqs_cis or cache) with other frequencies than the config's (C01).

    Architectures that come from a registry and not from config.json (torchtitan's flavours) go wrong in this way.
    """
    right = rope_frequencies(config) if config is not None else None
    if right is None:
        return
    odd: dict[str, Tensor] = {}
    for buffer in buffers(model):
        found = _table_frequencies(buffer.tensor, len(right)) if buffer.name not in known else None
        if found is not None and bool(((found - right).abs() > 1e-3 * right).any()):
            odd[buffer.name] = found
    if odd:
        name, found = next(iter(odd.items()))
        which = ((found - right).abs() > 1e-3 * right).nonzero().reshape(-1)
        at = int(which[0])
        message = (
            f"{name} turns by other angles than the checkpoint's config says: frequency {at} is "
            f"{float(found[at]):.6g} instead of {float(right[at]):.6g} ({len(which)} of {len(right)} differ, in "
            f"{len(odd)} tables)"
        )
        evidence = {
            "different": len(which),
            "frequencies": len(right),
            "holds": _first(found[which]),
            "expected": _first(right[which]),
        }
        yield Finding(
            "C01",
            "error",
            message,
            list(odd),
            evidence,
            fix="set rope theta and scaling of the model as in the checkpoint's config.json",
        )


def _table_frequencies(table: Tensor, half: int) -> Tensor | None:
    """Read the frequencies from a table of angles: complex [positions, half], or cos and sin [positions, 4 * half]."""
    if table.is_meta or hasattr(table, "to_local") or table.ndim != 2 or len(table) < 2:
        return None
    row = table[1].detach().cpu()
    if table.is_complex() and table.shape[1] == half:
        return row.angle().float()
    if table.is_floating_point() and table.shape[1] == 4 * half and table.dtype == torch.float32:
        return torch.atan2(row[2 * half : 3 * half], row[:half])
    return None
