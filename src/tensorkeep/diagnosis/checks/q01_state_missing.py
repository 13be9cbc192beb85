"""Q01 quantization state missing: codes are there, the scales that give them a meaning are not.

What it means
    A quantized weight is stored as small integers (codes) and, beside them, scales (`absmax`, `SCB`, `weight_scale`),
    the value of each code and a short description (`quant_state`). Without these the codes cannot be turned into
    weights.

How it happens
    4-bit layers of bitsandbytes write this state but do not read it when a state dict is loaded, so a model cannot
    strictly load its own state dict: "Unexpected key(s) ... absmax, quant_map, quant_state". The usual "fix" is to
    filter those keys out, or to load with `strict=False`. A file saved from the filtered dict has the codes alone.

How it shows
    A model that was quantized from other floats loads it without an error, and its weights are wrong by 20 to 230 %.
    Integer codes taken for floats are wrong by a factor of hundreds.

What to do
    The scales are not in the file and cannot be computed from the codes. Take them from another save of the same
    quantized model, or quantize the original float weights again. Save every key, and load with a loader that reads
    the state.

Also found
    Codes that were read as floats and saved in a float dtype: every value lies on the grid of one code and the largest
    fills its range, which no trained weight does. Codes whose scales are there while the config has no
    `quantization_config`, so that a loader takes them for weights. Packed codes of layouts that nothing here can decode
    (GPTQ, AWQ) are said to be undecided unless they are the reference's, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensorkeep.diagnosis.evidence import code_grids
from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import Inconclusive
from tensorkeep.findings import Finding
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.bare import SCALED_METHODS, fills_range, without_scales
from tensorkeep.storage.record import DTYPES

CODE = "Q01"
_NUMBERS = ("BOOL", "I16", "I32", "I64")


def check(case: Case) -> Iterator[Finding]:
    """Report codes without scales, incomplete states, codes that pass for floats and codes without a config."""
    if case.view is None:
        return
    yield from _without_scales(case)
    yield from _as_floats(case)
    yield from _without_config(case)
    unknown = code_grids.undecoded(case)
    if unknown:
        raise Inconclusive(
            f"{len(unknown)} tensors hold packed codes of a layout that is not decoded here, first {unknown[0]}: "
            "nothing was said of their values; give the same file from where it is whole with --reference"
        )


def _as_floats(case: Case) -> Iterator[Finding]:
    """Report codes that were read as numbers and saved in a float dtype, their scales gone."""
    found = code_grids.codes_as_floats(case)
    for kind in dict.fromkeys(found.values()):
        names = [n for n, k in found.items() if k == kind]
        case.claim(names, CODE)
        message = f"{len(names)} weights hold {kind} codes as {case.tensors[names[0]].dtype}: read as numbers, without"
        explains = ("V02", "V06", "V07", "L01")
        yield Finding(CODE, "error", f"{message} their scales", names, {"codes": kind}, explains=explains)


def _without_config(case: Case) -> Iterator[Finding]:
    """Report codes with their scales where the config does not say that there are any."""
    config = case.config or {}
    found = [w for w in quant_evidence.weights(case).values() if w.parts and not w.problems]
    assert case.view is not None
    if not found or case.view.format != "hf" or "model_type" not in config or _settings(case):
        return
    names = [quant_evidence.hf_name(case, w) for w in found]
    message = (
        f"{len(names)} weights are stored as {found[0].kind} codes with their scales, and config.json has no "
        "quantization_config: a loader takes the codes for weights"
    )
    yield Finding(CODE, "error", message, names, {"kind": found[0].kind}, fix="put the quantization_config back")


def _without_scales(case: Case) -> Iterator[Finding]:
    """Report codes without scales, and incomplete states."""
    assert case.view is not None
    found = quant_evidence.weights(case)
    broken = {n: [p.message for p in w.problems if p.code == CODE] for n, w in found.items()}
    broken = {n: messages for n, messages in broken.items() if messages}
    for name in (*_float8(case, found), *_typed_storage(case, found)):
        broken[name] = [
            "packed codes without scales, map and state"
            if case.view[name].shape[1:] == (1,)
            else "fp8 codes without their scales"
        ]
    broken |= {n: ["integers or booleans where a weight belongs"] for n in _numbers(case, found) if n not in broken}
    if not broken:
        return
    names = [quant_evidence.hf_name(case, found[n]) if n in found else _clean(case, n) for n in broken]
    case.claim(names, CODE)
    reasons = sorted({m for messages in broken.values() for m in messages})
    message = f"{len(names)} quantized weights cannot be dequantized: {'; '.join(reasons[:3])}"
    evidence = {
        "reasons": reasons,
        "quantized_weights": len(found),
        "bytes_of_codes": sum(case.view[n].nbytes for n in broken if n in case.view),
    }
    yield Finding(CODE, "error", message, names, evidence, explains=("S01", "S04", "K08"))


def _settings(case: Case) -> Mapping[str, Any]:
    """Return the config's `quantization_config`."""
    found = (case.config or {}).get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def _clean(case: Case, name: str) -> str:
    """Return the Hugging Face name of a stored tensor."""
    return case.identity.names.get(name, name) if case.identity is not None else name


def _float8(case: Case, found: dict[str, quantized.QuantizedWeight]) -> list[str]:
    """Find fp8 weights that lack scales: other weights or the config have some, or their values are scaled ones."""
    assert case.view is not None
    bare = without_scales(case.view, found)
    if not bare:
        return []
    method = _settings(case).get("quant_method")
    if method in SCALED_METHODS or any(w.kind == "fp8" for w in found.values()):
        return bare
    return [n for n in bare if fills_range(case.view, n)]


def _numbers(case: Case, found: dict[str, quantized.QuantizedWeight]) -> list[str]:
    """Find matrices that are no codes of a known kind and no floats either; masks are called otherwise."""
    assert case.view is not None
    held = set(found) | set(quantized.members(found))
    return [
        n
        for n, r in case.view.items()
        if r.dtype in _NUMBERS
        and n not in held
        and ((len(r.shape) > 1 and n.endswith(".weight")) or (len(r.shape) == 1 and n.endswith(".bias")))
    ]


def _typed_storage(case: Case, found: dict[str, quantized.QuantizedWeight]) -> list[str]:
    """Find packed codes stored as bf16, fp16 or fp32 (quant_storage): a column of floats where a matrix belongs."""
    assert case.view is not None
    settings = _settings(case)
    announced = settings.get("load_in_4bit") is True and settings.get("bnb_4bit_quant_storage", "uint8") != "uint8"
    out = []
    for name, record in case.view.items():
        if (
            not name.endswith(".weight")
            or name in found
            or len(record.shape) != 2
            or record.shape[1] != 1
            or not DTYPES[record.dtype].floating
        ):
            continue
        wanted = case.reference_tensors.get(_clean(case, name))
        elements = int(np.prod(wanted.shape)) if wanted is not None else None
        if elements == 2 * record.nbytes or (announced and elements is None):
            out.append(name)
    return out
