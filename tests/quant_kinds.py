"""Write quantized weights of every packed kind from the formats' descriptions, with other code than the reader's.

Codes are packed one bit at a time; values are what each format's formula says, element by element in float32.
`trained` gives values as training leaves them: many small, few large, rows of different size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Made = tuple[dict[str, Tensor], Tensor]  # the stored tensors by name, and the values that they stand for
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # which output each code of a word belongs to


def trained(*shape: int, seed: int = 0) -> Tensor:
    """Heavy-tailed values whose rows differ in size."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(6, shape) * 0.02 * np.exp(rng.normal(0, 0.3, (*shape[:-1], 1)))
    return torch.from_numpy(values.astype(np.float32))


def packed(codes: Any, bits: int) -> Tensor:
    """Whole numbers [rows, n] as int32 words, each code's bits after those of the one before, lowest first."""
    codes = np.asarray(codes, np.int64)
    words = np.zeros((len(codes), -(-codes.shape[1] * bits // 32)), np.uint32)
    for place in range(codes.shape[1]):
        for bit in range(bits):
            at = place * bits + bit
            words[:, at // 32] |= ((codes[:, place] >> bit & 1) << (at % 32)).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32).copy())


def _affine(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and scales of rows of groups, rounded to the nearest; zero points are at least 1."""
    some = w.reshape(len(w), -1, group)
    low, high = some.amin(-1).clamp(max=0), some.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).half().float()
    zero = (-low / scale).round().clamp(1, 2**bits - 1)
    codes = ((some / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    return codes.reshape(w.shape).long(), zero.long(), scale


def gptq(
    w: Tensor | None,
    stem: str = "m",
    bits: int = 4,
    group: int = 32,
    v2: bool = False,
    order: bool = False,
    seed: int = 0,
) -> Made:
    """GPTQ: with `order` the inputs of a group lie apart, and g_idx says where. None gives random codes."""
    w, random = (trained(64, 96, seed=seed), True) if w is None else (w, False)
    columns = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1)) if order else None
    codes, zero, scale = _affine(w if columns is None else w[:, columns], bits, group)
    g_idx = torch.arange(w.shape[1]) // group
    if columns is not None:
        back = columns.argsort()
        codes, g_idx = codes[:, back], g_idx[back]
    if random:
        codes = torch.randint(0, 2**bits, codes.shape, generator=torch.Generator().manual_seed(seed))
    tensors = {
        f"{stem}.qweight": packed(codes, bits).T.contiguous(),
        f"{stem}.qzeros": packed(zero.T - (0 if v2 else 1), bits),
        f"{stem}.scales": scale.T.contiguous().half(),
        f"{stem}.g_idx": g_idx.int(),
    }
    return tensors, (codes.float() - zero.float()[:, g_idx]) * scale[:, g_idx]


def awq(w: Tensor | None, stem: str = "m", group: int = 32, seed: int = 0) -> Made:
    """AWQ in the order of its GEMM kernel."""
    w, random = (trained(64, 96, seed=seed), True) if w is None else (w, False)
    codes, zero, scale = _affine(w, 4, group)
    if random:
        codes = torch.randint(0, 16, codes.shape, generator=torch.Generator().manual_seed(seed))

    def words(of: Tensor) -> Tensor:
        return packed(of.reshape(len(of), -1, 8)[:, :, list(AWQ)].reshape(len(of), -1), 4)

    tensors = {f"{stem}.qweight": words(codes.T), f"{stem}.qzeros": words(zero.T)}
    spread = scale.repeat_interleave(group, 1)
    values = (codes.float() - zero.float().repeat_interleave(group, 1)) * spread
    return tensors | {f"{stem}.scales": scale.T.contiguous().half()}, values


def pack_quantized(
    w: Tensor | None, stem: str = "m", bits: int = 4, group: int = 32, zeros: bool = False, seed: int = 0
) -> Made:
    """compressed-tensors' pack-quantized, symmetric or with packed zero points."""
    w, random = (trained(64, 96, seed=seed), True) if w is None else (w, False)
    half = 2 ** (bits - 1)
    if zeros:
        codes, zero, scale = _affine(w, bits, group)
    else:
        scale = (w.reshape(len(w), -1, group).abs().amax(-1) / (half - 1)).clamp(min=1e-8).half().float()
        zero = torch.full(scale.shape, half)
        spread = scale.repeat_interleave(group, 1)
        codes = ((w / spread).round() + half).clamp(0, 2 * half - 1).long()
    if random:
        codes = torch.randint(0, 2**bits, codes.shape, generator=torch.Generator().manual_seed(seed))
    tensors = {
        f"{stem}.weight_packed": packed(codes, bits),
        f"{stem}.weight_scale": scale.half(),
        f"{stem}.weight_shape": torch.tensor(w.shape),
    }
    if zeros:
        tensors[f"{stem}.weight_zero_point"] = packed(zero.T, bits).T.contiguous()
    values = (codes.float() - zero.float().repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    return tensors, values


def _e2m1(unit: Tensor) -> Tensor:
    """The nearest e2m1 code of each value."""
    return (unit[..., None] - E2M1).abs().argmin(-1)


def _halves(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def mxfp4(w: Tensor | None, stem: str = "m.experts.down_proj", seed: int = 0) -> Made:
    """MXFP4 of experts [E, N, K] as gpt-oss stores it; the values are [E, K, N]."""
    w, random = (trained(2, 64, 96, seed=seed), True) if w is None else (w, False)
    some = w.reshape(*w.shape[:-1], -1, 32)
    power = some.abs().amax(-1).clamp(min=1e-20).log2().floor() - 2
    codes = _e2m1(some / torch.exp2(power)[..., None])
    if random:
        codes = torch.randint(0, 16, codes.shape, generator=torch.Generator().manual_seed(seed))
    values = (E2M1[codes] * torch.exp2(power)[..., None]).reshape(w.shape)
    stored = {f"{stem}_blocks": _halves(codes), f"{stem}_scales": (power + 127).to(torch.uint8)}
    return stored, values.transpose(1, 2).contiguous()


def nvfp4(w: Tensor | None, stem: str = "m", modelopt: bool = False, seed: int = 0) -> Made:
    """NVFP4 of compressed-tensors (the global scale divides) or of ModelOpt (it multiplies)."""
    w, random = (trained(64, 96, seed=seed), True) if w is None else (w, False)
    some = w.reshape(len(w), -1, 16)
    whole = (448 * 6 / w.abs().max()).float()
    scale = (some.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    two = 1 / whole
    one = scale.float() * two if modelopt else scale.float() / whole
    codes = _e2m1(some / one.clamp(min=1e-20)[..., None])
    if random:
        codes = torch.randint(0, 16, codes.shape, generator=torch.Generator().manual_seed(seed))
    values = (E2M1[codes] * one[..., None]).reshape(w.shape)
    lies = _halves(codes).reshape(len(w), -1)
    if modelopt:
        return {f"{stem}.weight": lies, f"{stem}.weight_scale": scale, f"{stem}.weight_scale_2": two}, values
    return {
        f"{stem}.weight_packed": lies,
        f"{stem}.weight_scale": scale,
        f"{stem}.weight_global_scale": whole[None],
    }, values


def fp8(
    w: Tensor | None, stem: str = "m", block: tuple[int, int] = (16, 32), name: str = "weight", seed: int = 0
) -> Made:
    """fp8 in blocks as DeepSeek publishes it, of one matrix or of stacked experts."""
    w, random = (trained(64, 96, seed=seed), True) if w is None else (w, False)
    key = f"{stem}.{name}" if name else stem
    rows, columns = (-(-n // b) for n, b in zip(w.shape[-2:], block))
    scale = torch.zeros(*w.shape[:-2], rows, columns)
    codes, values = torch.zeros(w.shape).to(torch.float8_e4m3fn), torch.zeros(w.shape)
    for i in range(rows):
        for j in range(columns):
            at = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[..., i, j] = w[at].abs().amax((-2, -1)) / 448
            one = scale[..., i, j][..., None, None]
            codes[at] = (w[at] / one).to(torch.float8_e4m3fn)
            if random:
                bits = torch.randint(0, 126, w[at].shape, generator=torch.Generator().manual_seed(seed + i))
                sign = torch.randint(0, 2, bits.shape, generator=torch.Generator().manual_seed(seed + j)) * 128
                codes[at] = (bits + sign).to(torch.uint8).view(torch.float8_e4m3fn)
            values[at] = codes[at].float() * one
    return {key: codes, f"{key}_scale_inv": scale}, values


def int8(w: Tensor | None, stem: str = "m", seed: int = 0) -> Made:
    """compressed-tensors' int8, one scale a row."""
    w, random = (trained(64, 96, seed=seed), True) if w is None else (w, False)
    scale = (w.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (w / scale.float()).round().clamp(-127, 127).to(torch.int8)
    if random:
        codes = torch.randint(-128, 128, w.shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    return {f"{stem}.weight": codes, f"{stem}.weight_scale": scale}, codes.float() * scale.float()


# every layout: how it is made of float weights (None: of random codes), and the kind that it is found as
LAYOUTS: dict[str, tuple[Callable[..., Made], dict[str, Any], str]] = {
    "fp8": (fp8, {}, "fp8"),
    "int8": (int8, {}, "int8"),
    "mxfp4": (mxfp4, {}, "mxfp4"),
    "nvfp4": (nvfp4, {}, "nvfp4"),
    "nvfp4-modelopt": (nvfp4, {"modelopt": True}, "nvfp4"),
    "gptq": (gptq, {}, "gptq"),
    "gptq-v2": (gptq, {"v2": True}, "gptq"),
    "gptq-desc-act": (gptq, {"order": True}, "gptq"),
    "gptq-3bit": (gptq, {"bits": 3}, "gptq"),
    "gptq-2bit": (gptq, {"bits": 2}, "gptq"),
    "gptq-8bit": (gptq, {"bits": 8}, "gptq"),
    "awq": (awq, {}, "awq"),
    "packed": (pack_quantized, {}, "pack-quantized"),
    "packed-zeros": (pack_quantized, {"zeros": True}, "pack-quantized"),
    "packed-8bit": (pack_quantized, {"bits": 8}, "pack-quantized"),
    "packed-3bit": (pack_quantized, {"bits": 3}, "pack-quantized"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"},
    "gptq-v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32},
}


def made(layout: str, w: Tensor | None, **options: Any) -> Made:
    """The tensors and values of one layout."""
    make, usual, _ = LAYOUTS[layout]
    return make(w, **usual, **options)
