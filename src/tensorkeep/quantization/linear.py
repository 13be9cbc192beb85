"""A linear layer over 4- or 8-bit codes, and the frozen linear with a low-rank update that LoRA runs on.

Codes and scales are buffers: DDP sends them, deepcopy and pickle keep them, no optimizer, EMA or weight decay sees
them, and `.half()` moves past them. `state_dict` spells them as bitsandbytes does (`weight.absmax`, ...) and adds
`weight_digest`, which proves that codes and scales belong together. The weight is dequantized at use, in the forward
and again in the backward, and is never kept or repacked: training and evaluation compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.description import QUANT_STATE
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

FOUR_BIT_ROLES = ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")
INT8_ROLES = ("weight", "SCB")
How = tuple[str, int, int, int, int]  # kind ("dense" for floats), rows, columns, block and nested of a frozen weight
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
        held = {role: self._buffers.pop(role) for role in HELD if role in self._buffers}
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


# -- computing ----------------------------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: autocast's where it is on (it leaves float64 alone), else that of `x`.

    Args:
        x: the input of a layer.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def frozen_linear(
    x: Tensor, base: nn.Module, lora_A: Tensor | None = None, lora_B: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Compute `x W^T + bias + scale · (x A^T) B^T` over a frozen dense or quantized W.

    Kept for the backward: x and x A^T; never the dequantized weight. With B = 0 the result is bitwise that of the base.

    Args:
        x: [..., in].
        base: a `QuantLinear`, an `nn.Linear` or a module with its `matrix` [out, in]; it gets no gradient.
        lora_A: [r, in], or None without an update.
        lora_B: [out, r], or None without an update.
        scale: factor of the update.

    Returns:
        [..., out].

    Raises:
        TensorkeepError: x and a dense weight have different dtypes, and autocast is off.
    """
    how, state = frozen_state(base)
    if how[0] == "dense" and x.dtype != state[0].dtype and not torch.is_autocast_enabled(x.device.type):
        what = f"input {x.dtype} on a weight of {state[0].dtype}"
        raise TensorkeepError(what, where="linear", hint="cast one, or use autocast")
    dtype = compute_dtype(x)
    run: Any = _FrozenLinear.apply
    out: Tensor = run(x, base.bias, lora_A, lora_B, scale, dtype, *how, *state)
    return out


def frozen_state(base: nn.Module) -> tuple[How, list[Any]]:
    """Return what a frozen linear's weight is made of: how its codes lie, and the tensors, for `dense_weight`.

    Args:
        base: a `QuantLinear` or what keeps codes like one, an `nn.Linear`, or a module with its `matrix` [out, in].

    Returns:
        How it lies, and one tensor (or None) a role.
    """
    if hasattr(base, "_plain"):
        quantized: Any = base
        layout, held = quantized._plain()
        roles = INT8_ROLES if layout.kind == "int8" else FOUR_BIT_ROLES
        return (layout.kind, *layout.shape, layout.block, layout.nested), [held.get(role) for role in roles]
    kept: Any = base
    matrix: Tensor = getattr(kept, "matrix", kept.weight)  # Conv1D keeps it transposed
    return ("dense", *matrix.shape, 0, 0), [matrix.detach()]


def dense_weight(how: How, state: Sequence[Any], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return a frozen linear's weight [rows, columns], dequantized where it is quantized.

    Args:
        how: as `frozen_state` gives it.
        state: likewise.
        dtype: of the result.
        out: is written and returned, where given; its rows may lie apart.
    """
    kind, rows, columns, block, nested = how
    if kind == "dense":
        return cast(Tensor, state[0].to(dtype)) if out is None else out.copy_(state[0])
    roles = INT8_ROLES if kind == "int8" else FOUR_BIT_ROLES
    spelled: Any = kind
    layout = Layout(spelled, (rows, columns), block, nested)
    return unpack(layout, {role: tensor for role, tensor in zip(roles, state) if tensor is not None}, dtype, out)


def products(left: Tensor, right: Tensor, low: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Compute `left right + scale · low up (+ bias)`, the second product added in the place of the first.

    `left [n, k]`, `right [k, m]`, `low [n, r]`, `up [r, m]`. Written out, a compiler would copy the first product
    before adding to it: a tenth of a training step's time on a large layer, so it sees one operation.
    """
    how = _products_op if torch.compiler.is_compiling() else _products
    out: Tensor = how(left, right, low, up, scale, bias)
    return out


def _products(left: Tensor, right: Tensor, low: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    out = left @ right if bias is None else torch.addmm(bias, left, right)
    return out.addmm_(low, up, alpha=scale)


_products_op = torch.library.custom_op(
    "tensorkeep::products",
    _products,
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor low, Tensor up, float scale, Tensor? bias=None) -> Tensor",
)


@_products_op.register_fake
def _(left: Tensor, right: Tensor, low: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


class _FrozenLinear(torch.autograd.Function):
    """The linear of `frozen_linear`: W gets no gradient and is dequantized again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        kind: str,
        rows: int,
        columns: int,
        block: int,
        nested: int,
        *state: Tensor | None,
    ) -> Tensor:
        ctx.x_dtype, x = x.dtype, x.to(dtype)
        weight = dense_weight((kind, rows, columns, block, nested), state, dtype)
        own = None if bias is None else bias.to(dtype)
        low = a_cast = b_cast = None
        if a is None or b is None:
            out = F.linear(x, weight, own)  # [..., out]
        else:
            a_cast, b_cast = a.to(dtype), b.to(dtype)
            flat = x.reshape(-1, columns)
            low = flat @ a_cast.T  # [n, r]
            made = products(flat, weight.T, low, b_cast.T, scale, own)
            # a plain view could not be changed in place, as Llama 4 does
            out = torch.ops.aten._unsafe_view.default(made, [*x.shape[:-1], rows])
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[2] else None, low if needs[3] else None, a_cast, b_cast, *state)
        ctx.scale, ctx.how = scale, (kind, rows, columns, block, nested)
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, a, b)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, low, a, b, *state = ctx.saved_tensors
        kind, rows, columns, block, nested = ctx.how
        bias_dtype, a_dtype, b_dtype = ctx.dtypes
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        flat = grad.reshape(-1, rows)  # [n, out]
        grad_x = grad_bias = grad_a = grad_b = down = None
        if b is not None and (need_x or need_a):
            down = (flat @ b).mul_(ctx.scale)  # [n, r]
        if need_x:
            weight = dense_weight((kind, rows, columns, block, nested), state, flat.dtype)
            grad_x = flat @ weight if down is None else products(flat, weight, down, a, 1.0)  # [n, in]
            grad_x = grad_x.view(*grad.shape[:-1], columns).to(ctx.x_dtype)
        if need_bias:
            grad_bias = flat.sum(0).to(bias_dtype)
        if need_a:
            grad_a = (down.T @ x.reshape(-1, columns)).to(a_dtype)  # type: ignore[union-attr]
        if need_b:
            grad_b = (flat.T @ low).mul_(ctx.scale).to(b_dtype)
        return (grad_x, grad_bias, grad_a, grad_b, *([None] * (7 + len(state))))
