"""A linear layer over 4- or 8-bit codes, and the frozen linear with a low-rank update that LoRA runs on.

Codes and scales are buffers: DDP sends them, deepcopy and pickle keep them, no optimizer, EMA or weight decay sees
them, and `.half()` moves past them. `state_dict` spells them as bitsandbytes does (`weight.absmax`, ...) and adds
`weight_digest`, which proves that codes and scales belong together. The weight is dequantized at use, in the forward
and again in the backward, and is never kept or repacked: training and evaluation compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization import float8
from tensorkeep.quantization.description import QUANT_STATE
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, INT8_ROLES, frozen_linear
from tensorkeep.quantization.linear_layers import turned
from tensorkeep.quantization.packed import (
    WEIGHT_DIGEST,
    Kind,
    Layout,
    Mover,
    Packed,
    moved,
    pack,
    packed_digest,
    state_text,
)
from tensorkeep.quantization.reading import read_packed
from tensorkeep.quantization.spreading import ROLES, as_parameters, as_tensors
from tensorkeep.quantization.unpacking import unpack

HELD = (*FOUR_BIT_ROLES, "SCB", "weight_format", WEIGHT_DIGEST)  # every buffer a QuantLinear may have


class QuantLinear(nn.Module):
    """`y = x W^T + bias` over a quantized, frozen W: nf4, fp4 or int8.

    `weight` is the tensor of codes; `dequantize()` gives the numbers. The bias is a parameter in its own dtype, frozen
    by default. Build it from a dense linear with `QuantLinear.of`, or over codes that exist.

    Args:
        packed: codes, scales and their layout.
        bias: [out], or None.
        digest: of codes and scales, where it is known.

    Example:
        >>> layer = QuantLinear.of(nn.Linear(64, 32), "nf4")
        >>> layer(torch.ones(2, 64)).shape, layer.kind, [n for n, p in layer.named_parameters() if p.requires_grad]
        (torch.Size([2, 32]), 'nf4', [])
    """

    frozen_state = True  # codes belong to the base: checkpoints of what trains leave them out
    inward = False  # the layer in whose place it stands keeps its matrix as [in, out] (Conv1D)
    spread_out = False
    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, digest: bytes | None = None) -> None:
        super().__init__()
        self.fill(packed, digest)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
            self.bias.requires_grad_(False)

    @classmethod
    def of(
        cls, linear: nn.Module, kind: Kind = "nf4", double: bool = True, block: int = 64, name: str = "linear"
    ) -> QuantLinear:
        """Quantize a dense linear, on its device; the bias is taken over as it is.

        Args:
            linear: the dense layer, in float32, bfloat16 or float16; of a Conv1D the transpose is quantized.
            kind: "nf4", "fp4" or "int8".
            double: quantize the scales as well (nf4, fp4).
            block: number of flat elements that share a scale (nf4, fp4).
            name: what messages call the layer.

        Raises:
            TensorkeepError: V01 where the weight holds NaN or infinity.
        """
        weight: Any = linear.weight
        return cls.instead_of(linear, pack(weight.T if turned(linear) else weight, kind, double, block, name))

    @classmethod
    def instead_of(cls, linear: nn.Module, packed: Packed, digest: bytes | None = None) -> QuantLinear:
        """Return a quantized linear for the place of a dense one, whose bias it takes over.

        Args:
            linear: an `nn.Linear` or Conv1D.
            packed: codes of its matrix [out, in].
            digest: of the codes; None: it is taken.
        """
        bias: Any = linear.bias
        made = cls(packed, bias, digest)
        made.inward = turned(linear)
        return made.train(linear.training)

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.layout.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.layout.shape[0]

    @property
    def kind(self) -> Kind:
        """Return "nf4", "fp4" or "int8"."""
        return self.layout.kind

    @property
    def packed(self) -> Packed:
        """Layout and tensors as they are now; the tensors are shared."""
        roles, held = INT8_ROLES if self.kind == "int8" else FOUR_BIT_ROLES, self._plain()[1]
        return Packed(self.layout, {role: held[role] for role in roles if role in held})

    def spread(self) -> None:
        """Hold codes and scales as parameters, which FSDP2 shards and gathers; state dicts then leave them out."""
        if not self.spread_out:
            held: Any = {role: self._buffers.pop(role) for role in ROLES if role in self._buffers}
            self._buffers.pop(WEIGHT_DIGEST, None)  # no rank has all that it is about
            self._parameters.update(as_parameters(self.layout, held))
            self.spread_out = True

    def fill(self, packed: Packed, digest: bytes | None = None) -> None:
        """Take over another weight's codes and layout, and make their digest; what was held before is gone."""
        self.layout = packed.layout
        tensors = dict(packed.tensors)
        device = tensors["weight"].device
        if packed.layout.kind == "int8":
            tensors["weight_format"] = torch.zeros((), dtype=torch.uint8, device=device)  # 0: codes by rows
        raw = bytearray(16 if device.type == "meta" else digest or packed_digest(packed))
        tensors[WEIGHT_DIGEST] = torch.frombuffer(raw, dtype=torch.uint8).to(device)
        for role in HELD:
            self._buffers.pop(role, None)
            self._parameters.pop(role, None)
        self.spread_out = False
        for role, tensor in tensors.items():
            self.register_buffer(role, tensor)
        if float8.ROLES[0] in self._buffers:
            self.compute_in_float8()

    def compute_in_float8(self) -> None:
        """Let products of training be in float8 from now on; the scales that this takes are in no state dict."""
        for role, scale in zip(float8.ROLES, float8.scales(self.dequantize())):
            self.register_buffer(role, scale, persistent=False)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in] as numbers, rounded once to `dtype`."""
        return unpack(*self._plain(), dtype)

    def _plain(self) -> tuple[Layout, Mapping[str, Tensor]]:
        held: Any = self._buffers  # no cast: old dynamo cannot trace one
        if self.spread_out:
            held = {**held, **as_tensors(self.layout, self._parameters)}
        return self.layout, held

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`, in the dtype of `x`, or autocast's."""
        return frozen_linear(x, self)

    def extra_repr(self) -> str:
        """Sizes, bias and kind, for torch's printout of a model."""
        double = ", double" if self.layout.nested else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}{double}"

    # -- moving ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _state_apart(self) -> Iterator[dict[str, Tensor | None]]:
        """Take the quantized state out of the module for the body; what stands in the dict given is put back."""
        held = {role: self._buffers.pop(role) for role in (*HELD, *float8.ROLES) if role in self._buffers}
        try:
            yield held
        finally:
            self._buffers = {**held, **self._buffers}

    def _apply(self, fn: Mover, recurse: bool = True) -> QuantLinear:
        with self._state_apart() as held:
            held.update({role: moved(tensor, fn) for role, tensor in held.items() if tensor is not None})
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._state_apart() as held:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.spread_out:
            for role in ROLES:
                destination.pop(prefix + role, None)
            return
        for key, tensor in self._stored(held).items():
            destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def _stored(self, held: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Return the tensors under the names of bitsandbytes' files."""
        nested = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        out = {f"weight.{r}" if r in nested else r: t for r, t in held.items() if t is not None and r in HELD}
        offset = out.pop("nested_offset", None)
        if self.kind != "int8":
            meta = offset is not None and offset.is_meta
            text = b"" if meta else state_text(self.layout, float(offset.item()) if offset is not None else 0.0)
            out[f"weight{QUANT_STATE}{self.kind}"] = (
                torch.empty(0, dtype=torch.uint8, device="meta")
                if meta
                else torch.tensor(list(text), dtype=torch.uint8)
            )
        return out

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {k: v for k, v in state_dict.items() if k.startswith(prefix) and _ours(k[len(prefix) :])}
        loaded = None
        if mine and self.spread_out:
            error_msgs.append(f"{prefix}weight: codes that are spread over ranks are not loaded from a state dict")
            return
        if mine:
            try:
                loaded = read_packed({f"layer.{k[len(prefix) :]}": v for k, v in mine.items()}, self.layout.shape)
            except TensorkeepError as error:  # torch gathers the messages and raises; nothing of this layer is copied
                error_msgs.append(f"{prefix}weight: {error.code or ''} {error.what.removeprefix('layer.weight: ')}")
                return
        elif not self.spread_out:
            missing_keys += [prefix + key for key in self._stored(self._buffers) if key != WEIGHT_DIGEST]
        with self._state_apart():
            away = {role: self._parameters.pop(role) for role in ROLES if role in self._parameters}
            rest = {k: v for k, v in state_dict.items() if k not in mine}
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self._parameters.update(away)
        if loaded is not None:
            device = None if self.weight.is_meta else self.weight.device
            self.fill(Packed(loaded.layout, {r: t.to(device, copy=True) for r, t in loaded.tensors.items()}))

    def _fqn_modifiers(self) -> dict[str, str]:
        """Tell torch.distributed.checkpoint where keys lead: it follows `weight.absmax` through attributes."""
        return {"weight": "_by_key"}

    @property
    def _by_key(self) -> SimpleNamespace:
        known = {role: self._buffers.get(role) for role in FOUR_BIT_ROLES}
        state = SimpleNamespace(**{f"bitsandbytes__{self.kind}": self.layout})
        return SimpleNamespace(weight=SimpleNamespace(**known, quant_state=state))


def _ours(key: str) -> bool:
    return key in ("weight", "SCB", "weight_format", WEIGHT_DIGEST) or key.startswith("weight.")
