"""Lay rounded weights out as files of blocks hold them: MXFP4 of compressed-tensors, Q4_K and Q4_1 of GGUF.

Layouts: `kinds/fp4` for MXFP4; ggml-common.h (`block_q4_K`, `block_q4_1`) and ggml-quants.c for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorkeep.quantization.rounding import Rounded

GGML_NAMES = {"q4_k": "Q4_K", "q4_1": "Q4_1"}


def mxfp4_tensors(found: Rounded) -> dict[str, Tensor]:
    """Return codes and exponents of MXFP4 as compressed-tensors names and packs them for a linear.

    Args:
        found: of the form "mxfp4".

    Returns:
        `weight_packed` uint8 [out, in/2], the low half first, and `weight_scale` uint8 [out, in/32].
    """
    codes = found.codes.to(torch.uint8)
    return {"weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": found.numbers["exponents"].clone()}


def ggml_blocks(found: Rounded) -> Tensor:
    """Return the blocks of a GGUF tensor, uint8 [out, bytes of a row].

    Args:
        found: of the form "q4_k" or "q4_1".
    """
    rows = len(found.codes)
    codes = found.codes.to(torch.uint8)
    if found.form == "q4_1":
        halves = codes.view(rows, -1, 2, 16)
        factors = torch.stack([found.numbers["d"], found.numbers["m"]], 2).contiguous().view(torch.uint8)
        return torch.cat([factors, halves[:, :, 0] | halves[:, :, 1] << 4], 2).reshape(rows, -1)
    halves = codes.view(rows, -1, 4, 2, 32)
    packed = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).reshape(rows, -1, 128)
    factors = torch.stack([found.numbers["d"], found.numbers["dmin"]], 2).contiguous().view(torch.uint8)
    scales, mins = (found.numbers[name].view(rows, -1, 8) for name in ("scales", "mins"))
    low, high = scales[:, :, :4], scales[:, :, 4:]
    low_min, high_min = mins[:, :, :4], mins[:, :, 4:]
    six = torch.cat(
        [low | (high >> 4) << 6, low_min | (high_min >> 4) << 6, (high & 15) | (high_min & 15) << 4],
        2,
    )
    return torch.cat([factors, six, packed], 2).reshape(rows, -1)
