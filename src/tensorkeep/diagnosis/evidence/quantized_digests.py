"""Compare quantized weights with digests that were recorded for them, which needs no reference (Q02 and Q03)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import xxhash

from tensorkeep.conversion.proof import read_certificate, stored_name
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.quantized import model_weights
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization.stored import QuantizedWeight

# the key in safetensors metadata, spelled as files have it: {name of codes: {"codes": xxh3_128, "state": xxh3_128}}
RECORD = "tensorkeep.quantised"


def digests(view: StateView, weight: QuantizedWeight) -> dict[str, str]:
    """Return the digests of a weight's codes and of its state (scales, map, description), which prove their unity."""
    state = xxhash.xxh3_128()
    for role in sorted(weight.parts):
        state.update(f"{role} {view.digest(weight.parts[role])}\n".encode())
    return {"codes": view.digest(weight.name), "state": state.hexdigest()}


def against_record(case: Case) -> dict[str, dict[str, bool]]:
    """Compare quantized weights with the digests recorded for them, once for all checks.

    Args:
        case: The case.

    Returns:
        {"codes": as recorded, "state": as recorded} by stored name, of each weight that a digest covers: one stored
        beside it, one in the file's metadata, or the certificate's.
    """
    if "quantized record" not in case.results:
        case.results["quantized record"] = dict(_against_record(case)) if case.view is not None else {}
    found: dict[str, dict[str, bool]] = case.results["quantized record"]
    return found


def _against_record(case: Case) -> Iterator[tuple[str, dict[str, bool]]]:
    """Yield the comparison of each weight that a digest covers, by stored name."""
    view = case.view
    assert view is not None
    tensors = _certified(view)
    try:
        recorded = json.loads(view.metadata.get(RECORD, "{}"))
    except (ValueError, TypeError, RecursionError):
        recorded = {}
    for name, weight in model_weights(case).items():
        entry = recorded.get(name) if isinstance(recorded, dict) else None
        if weight.problems:
            continue
        fits = _fits_digest_beside(view, weight)
        if fits is not None:
            yield name, {"codes": fits, "state": fits}
        elif isinstance(entry, dict):
            now = digests(view, weight)
            yield name, {part: entry.get(part) == now[part] for part in ("codes", "state")}
        elif all(n in tensors for n in weight.stored):
            same = {n: tensors[n] == view.digest(n) for n in weight.stored}
            yield name, {"codes": same[name], "state": all(same[n] for n in weight.parts.values())}


def _fits_digest_beside(view: StateView, weight: QuantizedWeight) -> bool | None:
    """Say whether codes and scales fit the digest that is stored beside them; None where there is none."""
    beside = f"{weight.name}_digest"
    if beside not in view or view[beside].dtype != "U8" or view[beside].shape != (16,):
        return None
    parts = {role: view.digest(n) for role, n in weight.parts.items() if role != "weight_format"}
    return bytes(view.bytes(beside)) == quant_codes.joint_digest({"weight": view.digest(weight.name), **parts})


def _certified(view: StateView) -> dict[str, str]:
    """Return the certificate's digest of each stored tensor; {} without a readable certificate (F03 reports that)."""
    try:
        certificate = read_certificate(view) or {"tensors": {}}
    except TensorkeepError:
        return {}
    return {
        stored_name(n, certificate.get("root"), view.format): e["xxh3_128"] for n, e in certificate["tensors"].items()
    }


def undecided(case: Case, count: int) -> str:
    """Say why codes and scales could not be compared with anything."""
    if case.reference is None:
        return (
            f"{count} quantized weights, no digest that ties codes to scales, and no reference: "
            "give the float weights with --reference"
        )
    return (
        f"{count} quantized weights have no counterpart in the reference (or one quantized in another way), "
        "and no digest ties codes to scales"
    )
