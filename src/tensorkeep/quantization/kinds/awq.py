"""AWQ in the order of its GEMM kernel: 4-bit codes of a transposed weight, packed along its outputs.

codes: `X.qweight` int32 [K, N/8]; K inputs, N outputs, the weight is [N, K]
beside: `X.scales` [groups, N], `X.qzeros` int32 [groups, N/8]
values: (code - zero) · scale, of the group of the input

Eight codes of a word belong to outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight, lowest bits first. Formula and order:
AutoAWQ's `dequantize_gemm`. The orders of its other kernels (gemv, marlin) are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from tensorkeep.formats.view import StateView
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.description import QuantizedWeight, WeightProblem
from tensorkeep.quantization.kinds import packing
from tensorkeep.storage.record import TensorRecord

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which code of a word each of its eight outputs has


def find(view: StateView, records: Mapping[str, TensorRecord]) -> Iterator[QuantizedWeight]:
    """Describe every weight whose words are packed along the outputs."""
    said = packing.settings(view)
    version = said.get("version") if said.get("quant_method") == "awq" else None
    for name, record in records.items():
        stem = name.removesuffix(".qweight")
        if stem == name or record.dtype not in packing.WORDS or len(record.shape) != 2:
            continue
        parts = {r: f"{stem}.{r}" for r in ("scales", "qzeros") if f"{stem}.{r}" in records}
        scales = records[parts["scales"]].shape if "scales" in parts else ()
        if said.get("quant_method") != "awq" and (len(scales) != 2 or scales[1] == record.shape[1]):
            continue  # packed along the inputs: GPTQ's
        yield _described(view, name, record, parts, version)


def _described(
    view: StateView, name: str, record: TensorRecord, parts: Mapping[str, str], version: object
) -> QuantizedWeight:
    absent = [r for r in ("scales", "qzeros") if r not in parts]
    if absent:
        problem = WeightProblem("Q01", f"AWQ codes without {', '.join(absent)}")
        return QuantizedWeight(name, "awq", None, parts, problems=(problem,))
    inputs, words = record.shape
    scales, zeros, wrong = view[parts["scales"]], view[parts["qzeros"]], ""
    if isinstance(version, str) and version.lower() not in ("gemm", "exllama"):
        wrong = f"AWQ codes in the order of its {version.lower()} kernel, which is not read here"
    elif not packing.floating(scales) or len(scales.shape) != 2 or scales.shape[1] != words * 8:
        wrong = f"AWQ scales {scales.dtype}{list(scales.shape)} do not fit qweight {list(record.shape)} of 4 bits"
    elif not scales.shape[0] or inputs % scales.shape[0]:
        wrong = f"{scales.shape[0]} groups of scales do not divide {inputs} inputs"
    elif zeros.dtype not in packing.WORDS or zeros.shape != (scales.shape[0], words):
        wrong = f"qzeros {zeros.dtype}{list(zeros.shape)} do not fit scales {list(scales.shape)}"
    if wrong:
        return QuantizedWeight(name, "awq", None, parts, problems=(WeightProblem("Q06", wrong),))
    return QuantizedWeight(name, "awq", (words * 8, inputs), parts, (1, inputs // scales.shape[0]), bits=4)


def _unpacked(words: Array) -> Array:
    """Return uint8 [rows, 8 · words] in the order of the outputs."""
    codes = packing.unpack(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
    return codes[:, :, ORDER].reshape(len(words), -1)


def values(view: StateView, weight: QuantizedWeight, rows: tuple[int, int]) -> Iterator[Array]:
    """Yield (code - zero) · scale of rows of the weight."""
    assert weight.shape is not None and isinstance(weight.block, tuple)
    words = view.array(weight.name)
    scales = packing.wide(view, weight.parts["scales"])
    zeros = _unpacked(view.array(weight.parts["qzeros"])).astype(np.float32)
    for at, end in packing.rows_at_once(weight.shape[1], rows, 8):
        first = at // 8
        codes = _unpacked(words[:, first : -(-end // 8)])[:, at - first * 8 : end - first * 8]
        made = codes.T.astype(np.float32)
        made -= np.repeat(zeros[:, at:end].T, weight.block[1], axis=1)
        packing.times(made, np.repeat(scales[:, at:end].T, weight.block[1], axis=1))
        yield np.ascontiguousarray(made).reshape(-1)


def scales(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the scales [groups, N]."""
    return packing.wide(view, weight.parts["scales"])


def codes(view: StateView, weight: QuantizedWeight) -> Iterator[Array]:
    """Yield codes of rows spread over the weight."""
    words = view.array(weight.name)
    for at, end in packing.sampled(words.shape[1], 8 * words.shape[0]):
        yield np.ascontiguousarray(_unpacked(words[:, at:end]).T).reshape(-1)
