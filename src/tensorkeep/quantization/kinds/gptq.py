"""GPTQ (AutoGPTQ, GPTQModel, auto-round): 2- to 8-bit codes of a transposed weight, packed along its inputs.

codes: `X.qweight` int32 [K·bits/32, N]; K inputs, N outputs, the weight is [N, K]
beside: `X.scales` [groups, N], `X.qzeros` int32 [groups, N·bits/32], `X.g_idx` [K], the group of each input
values: (code - zero) · scale, of the group of the input

Version 1 of the format, which files have unless their config says `checkpoint_format: gptq_v2`, stores each zero point
less one; as in exllama's kernels one is added without cutting it off, so a stored 15 is 16. With `desc_act` inputs of
one group lie apart and only `g_idx` says where. Formula: AutoGPTQ's qlinear_cuda (`scales * (weight - zeros)`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from tensorkeep.formats.view import StateView
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.description import QuantizedWeight, WeightProblem
from tensorkeep.quantization.kinds import packing
from tensorkeep.storage.record import TensorRecord


def find(view: StateView, records: Mapping[str, TensorRecord]) -> Iterator[QuantizedWeight]:
    """Describe every weight whose words are packed along the inputs."""
    said = packing.settings(view)
    for name, record in records.items():
        stem = name.removesuffix(".qweight")
        if stem == name or record.dtype not in packing.WORDS or len(record.shape) != 2:
            continue
        parts = {r: f"{stem}.{r}" for r in ("scales", "qzeros", "g_idx") if f"{stem}.{r}" in records}
        scales = records[parts["scales"]].shape if "scales" in parts else ()
        if said.get("quant_method") == "awq" or (len(scales) == 2 and scales[1] != record.shape[1]):
            continue  # packed along the outputs: AWQ's
        yield _described(view, name, record, parts)


def _described(view: StateView, name: str, record: TensorRecord, parts: Mapping[str, str]) -> QuantizedWeight:
    said, problems = packing.settings(view), []
    words, outputs = record.shape
    absent = [r for r in ("scales", "qzeros") if r not in parts]
    if absent:
        problems.append(WeightProblem("Q01", f"GPTQ codes without {', '.join(absent)}"))
        return QuantizedWeight(name, "gptq", None, parts, problems=tuple(problems))
    scales, zeros = view[parts["scales"]], view[parts["qzeros"]]
    bits = packing.bits_of(outputs, zeros.shape[1]) if len(zeros.shape) == 2 else None
    told = packing.number(said, "bits")
    if bits is None or (told is not None and packing.words_for(outputs, told) == zeros.shape[1]):
        bits = told if told in range(1, 9) else bits
    inputs = words * 32 // bits if bits else 0
    wrong = []
    if not bits or zeros.dtype not in packing.WORDS:
        wrong.append(f"qzeros {zeros.dtype}{list(zeros.shape)} fit no number of bits for {outputs} outputs")
    elif not packing.floating(scales) or len(scales.shape) != 2 or scales.shape[1] != outputs or not scales.shape[0]:
        wrong.append(f"scales {scales.dtype}{list(scales.shape)} do not fit qweight {list(record.shape)}")
    elif zeros.shape != (scales.shape[0], packing.words_for(outputs, bits)):
        wrong.append(f"qzeros {list(zeros.shape)} do not fit scales {list(scales.shape)}")
    elif packing.words_for(inputs, bits) != words or ("g_idx" in parts and view[parts["g_idx"]].elements != inputs):
        wrong.append(f"g_idx does not fit qweight {list(record.shape)} of {bits} bits")
    group = -(-inputs // scales.shape[0]) if not wrong else 1
    version = 2 if said.get("checkpoint_format") == "gptq_v2" else 1
    problems += [WeightProblem("Q06", w) for w in wrong]
    shape = (outputs, inputs) if not wrong else None
    return QuantizedWeight(
        name, "gptq", shape, parts, (1, group), bits=bits or 0, version=version, problems=tuple(problems)
    )


def values(view: StateView, weight: QuantizedWeight, rows: tuple[int, int]) -> Iterator[Array]:
    """Yield (code - zero) · scale of rows of the weight."""
    assert weight.shape is not None
    outputs, inputs = weight.shape
    words = view.array(weight.name)
    scales = packing.wide(view, weight.parts["scales"])
    zeros = packing.unpack(view.array(weight.parts["qzeros"]), weight.bits, outputs).astype(np.float32)
    zeros += np.float32(weight.version == 1)
    groups = group_of(view, weight)
    for at, end in packing.rows_at_once(inputs, rows):
        codes = packing.unpack(words[:, at:end].T, weight.bits, inputs).astype(np.float32)
        codes -= zeros[:, at:end].T.take(groups, axis=1)
        packing.times(codes, scales[:, at:end].T.take(groups, axis=1))
        yield codes.reshape(-1)


def group_of(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the group of each input: `g_idx`, or one group after the other; numbers out of range are cut to it."""
    assert weight.shape is not None and isinstance(weight.block, tuple)
    count = view[weight.parts["scales"]].shape[0]
    if "g_idx" in weight.parts:
        found = view.array(weight.parts["g_idx"]).reshape(-1)[: weight.shape[1]].astype(np.int64)
    else:
        found = np.arange(weight.shape[1]) // weight.block[1]
    return np.asarray(np.clip(found, 0, count - 1))


def scales(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the scales [groups, N]."""
    return packing.wide(view, weight.parts["scales"])


def codes(view: StateView, weight: QuantizedWeight) -> Iterator[Array]:
    """Yield codes of rows spread over the weight."""
    assert weight.shape is not None
    outputs, inputs = weight.shape
    words = view.array(weight.name)
    for at, end in packing.sampled(outputs, inputs):
        yield packing.unpack(words[:, at:end].T, weight.bits, inputs).reshape(-1)
