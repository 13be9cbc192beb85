"""A parameter that stacks one matrix an expert, as codes or floats, with or without a low-rank update.

The module that holds such a parameter becomes a subclass of itself in which a `Stack` stands in the parameter's place.
Its own forward then takes one expert after the other, `stack[expert]`, and multiplies by it: the expert's matrix is
made for that product and again in the backward, and never kept. A forward that does anything else with the parameter
gets all experts of the layer as one tensor, and is run again in the backward, so that this tensor is not kept either.
Codes are those of each expert's matrix [out, in] for itself: no block reaches from one expert into the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import digest_of
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, INT8_ROLES, compute_dtype, frozen_linear
from tensorkeep.quantization.packed import Kind, Layout, Packed, moved, pack
from tensorkeep.quantization.unpacking import unpack

_SHARED = ("quant_map", "nested_quant_map")  # tables that all experts have in common
_PRODUCTS = ("matmul", "__matmul__", "mm")


class _WholeWanted(AttributeError):
    """A forward does something else with an expert's matrix, or with the stack, than to multiply by it."""


class Stack(nn.Module):
    """The matrices of all experts of a layer: codes, or floats in the parameter `base_layer`.

    Args:
        shape: [experts, out, in] or, with `inward`, [experts, in, out].
        inward: how each matrix lies.
        dtype: what the parameter in whose place it stands has.
        weight: the floats; None for codes, which `put` then brings one expert after the other.

    Example:
        >>> stack = Stack((2, 32, 64), False, torch.float32)
        >>> for expert in range(2):
        ...     stack.put(expert, pack(torch.ones(32, 64)))
        >>> torch.nn.functional.linear(torch.ones(1, 64), stack[1]).shape
        torch.Size([1, 32])
    """

    frozen_state = True  # it belongs to the base: checkpoints of what trains leave it out
    ndim = 3
    watch: Callable[[int, Tensor], None] | None = None  # is told what each expert's matrix is multiplied by
    layout: Layout | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, shape: Sequence[int], inward: bool, dtype: torch.dtype, weight: Tensor | None = None) -> None:
        super().__init__()
        self.shape, self.inward, self.dtype, self.layout = torch.Size(shape), inward, dtype, None
        if weight is not None:
            self.base_layer = nn.Parameter(weight.detach(), requires_grad=False)
        self.lora_A = self.lora_B = None
        self.r, self.alpha, self.scale, self.rslora = 0, 0.0, 1.0, False

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Sizes [out, in] of one expert's matrix."""
        return (self.shape[2], self.shape[1]) if self.inward else (self.shape[1], self.shape[2])

    @property
    def device(self) -> torch.device:
        """Where the codes or floats are."""
        return next(t for t in (*self.parameters(), *self.buffers())).device

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its sizes.

        Args:
            dim: which; None for all.
        """
        return self.shape if dim is None else self.shape[dim]

    def put(self, expert: int, packed: Packed) -> None:
        """Take over one expert's codes; the first one decides how all of them lie.

        Args:
            expert: its number.
            packed: codes of its matrix [out, in].

        Raises:
            TensorkeepError: Q06 where they are of another form than the first expert's.
        """
        if self.layout is None:
            self.layout = packed.layout
            for role, tensor in packed.tensors.items():
                wide = tensor if role in _SHARED else tensor.new_empty((self.experts, *tensor.shape))
                self.register_buffer(role, wide)
        if packed.layout != self.layout:
            raise TensorkeepError(f"expert {expert} is quantized in another form than the first", code="Q06")
        for role, tensor in packed.tensors.items():
            if role not in _SHARED:
                self.get_buffer(role)[expert] = tensor

    def packed(self, expert: int) -> Packed:
        """Return one expert's codes and layout; the tensors are shared.

        Args:
            expert: its number.
        """
        assert self.layout is not None
        roles = INT8_ROLES if self.layout.kind == "int8" else FOUR_BIT_ROLES
        held = {r: t for r in roles if (t := self._buffers.get(r)) is not None}
        return Packed(self.layout, {r: t if r in _SHARED else t[expert] for r, t in held.items()})

    def factors(self, expert: int) -> tuple[Tensor, Tensor] | None:
        """Return A [r, in] and B [out, r] of one expert's update; None where nothing is adapted.

        PEFT holds A expert by expert and B rank by rank.

        Args:
            expert: its number.
        """
        if self.lora_A is None or self.lora_B is None:
            return None
        rows, columns = self.sizes
        return self.lora_A.view(self.experts, self.r, columns)[expert], self.lora_B.view(rows, self.r, -1)[:, :, expert]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return all matrices as the parameter had them, without the update.

        Args:
            dtype: of the result.
        """
        if self.layout is None:
            return self.base_layer.to(dtype)
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for expert in range(self.experts):
            packed = self.packed(expert)
            matrix = unpack(packed.layout, packed.tensors, dtype)
            out[expert] = matrix.T if self.inward else matrix
        return out

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return all matrices with the update in them; the gradient goes to the update alone.

        Args:
            dtype: of the result.
        """
        with torch.no_grad():
            base = self.dequantize(dtype)
        if self.lora_A is None or self.lora_B is None:
            return base
        rows, columns = self.sizes
        a = self.lora_A.view(self.experts, self.r, columns)
        change = torch.einsum("ore,eri->eio" if self.inward else "ore,eri->eoi", self.lora_B.view(rows, self.r, -1), a)
        return base + (change * self.scale).to(dtype)

    def digest(self) -> bytes:
        """Return a digest of everything that the base brings: codes, scales and tables, or the floats."""
        import xxhash

        held = {n: b for n, b in self._buffers.items() if b is not None} or {"base_layer": self.base_layer.detach()}
        return xxhash.xxh3_128_digest("".join(f"{n} {digest_of(held[n])}\n" for n in sorted(held)).encode())

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name) and not name.startswith("_"):
            raise _WholeWanted(name)
        return super().__getattr__(name)

    def __getitem__(self, expert: Any) -> Any:
        if isinstance(expert, Tensor) and expert.ndim == 0 and not expert.dtype.is_floating_point:
            expert = int(expert)
        if type(expert) is not int:
            raise _WholeWanted
        return _Expert(self, range(self.experts)[expert])

    def __len__(self) -> int:
        return self.experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stack:
        held = dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update({n: None if t is None else moved(t, fn) for n, t in held.items()})
        return self

    def extra_repr(self) -> str:
        """Sizes and kind, for torch's printout of a model."""
        kind = "floats" if self.layout is None else self.layout.kind
        return f"{', '.join(map(str, self.shape))}, {kind}" + (f", r={self.r}" if self.lora_A is not None else "")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse the stack as an operand: the forward then gets it as a tensor."""
        raise _WholeWanted


class _Expert:
    """One expert's matrix as an operand: it is multiplied by, and everything else asks for the whole stack."""

    bias: Tensor | None = None

    def __init__(self, stack: Stack, expert: int, turned: bool = False) -> None:
        self.stack, self.expert, self.turned = stack, expert, turned

    @property
    def shape(self) -> torch.Size:
        """As the forward sees it."""
        first, second = self.stack.shape[1:]
        return torch.Size((second, first) if self.turned else (first, second))

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameter."""
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        """Where the stack is."""
        return self.stack.device

    def t(self) -> _Expert:
        """Return the transpose."""
        return _Expert(self.stack, self.expert, not self.turned)

    T = mT = property(t)

    def transpose(self, first: int, second: int) -> _Expert:
        """Return the transpose, as `Tensor.transpose` does."""
        return self.T if {first % 2, second % 2} == {0, 1} else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "matrix":  # `frozen_linear` asks for codes
            raise AttributeError(name)
        raise _WholeWanted

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in] as floats, of a stack that holds floats; what `frozen_linear` multiplies by."""
        matrix = self.stack.base_layer[self.expert]
        return matrix.T if self.stack.inward else matrix

    def multiplied(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `x W^T + bias` over the matrix [out, in] with its update."""
        if self.stack.watch is not None:
            self.stack.watch(self.expert, x)
        held: Any = _Coded(self) if self.stack.layout is not None else self
        held.bias = bias
        a, b = self.stack.factors(self.expert) or (None, None)
        return frozen_linear(x, held, a, b, self.stack.scale)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the product that torch was asked for; anything else asks for the whole stack."""
        if kwargs and func is not F.linear:
            raise _WholeWanted
        if func is F.linear:
            given = {**dict(zip(("input", "weight", "bias"), args)), **(kwargs or {})}
            x, one, bias = given["input"], given["weight"], given.get("bias")
            if isinstance(one, _Expert) and isinstance(x, Tensor) and one.stack.inward == one.turned:
                return one.multiplied(x, bias)
        elif getattr(func, "__name__", "") in _PRODUCTS and len(args) == 2:
            x, one = args
            if isinstance(one, _Expert) and isinstance(x, Tensor) and one.stack.inward != one.turned:
                return one.multiplied(x)
        raise _WholeWanted


class _Coded:
    """The codes of one expert as `frozen_linear` takes a quantized layer."""

    def __init__(self, expert: _Expert) -> None:
        self._packed, self.bias = expert.stack.packed(expert.expert), None

    def _plain(self) -> tuple[Layout, dict[str, Tensor]]:
        return self._packed.layout, self._packed.tensors


class Stacked(nn.Module):
    """What a module with stacks is besides its own class: its forward takes experts one by one, or as a whole."""

    takes_whole: bool

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        kind: Any = type(self).__bases__[1]
        if not self.takes_whole:
            try:
                return kind.forward(self, *args, **kwargs)
            except _WholeWanted:
                self.takes_whole = True
        if torch.is_grad_enabled():
            return checkpoint(self._over_whole, *args, use_reentrant=False, **kwargs)
        return self._over_whole(*args, **kwargs)

    def _over_whole(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward over tensors of all experts."""
        kind: Any = type(self).__bases__[1]
        mine = {n: m for n, m in self._modules.items() if isinstance(m, Stack)}
        first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
        try:
            for name, stack in mine.items():
                self.__dict__[name] = stack.whole(compute_dtype(first))  # found before the module of that name
            return kind.forward(self, *args, **kwargs)
        finally:
            for name in mine:
                self.__dict__.pop(name, None)


@cache
def _class_over(kind: Any) -> Any:
    """Make the subclass of a class of modules; one for all its instances."""
    return type(f"Stacked{kind.__name__}", (Stacked, kind), {})


# -- putting them in ----------------------------------------------------------------------------------------------


def stacks(model: nn.Module) -> Iterator[tuple[str, Stack]]:
    """Yield the stacks of a model, under the names of the parameters that they stand for.

    Args:
        model: a live model.
    """
    for path, module in model.named_modules():
        if isinstance(module, Stack):
            yield path, module


def placed(module: Any, name: str, codes: bool = False) -> Stack:
    """Put a stack in the place of a parameter; the module becomes a subclass of itself.

    Args:
        module: that holds the parameter.
        name: the parameter's.
        codes: leave the floats behind: `put` brings codes.

    Returns:
        The stack, frozen.
    """
    parameter = module._parameters.pop(name)
    inward = bool(getattr(module, "is_transposed", False))
    stack = Stack(parameter.shape, inward, parameter.dtype, None if codes else parameter)
    module._modules[name] = stack.train(module.training)
    if not isinstance(module, Stacked):
        kind: Any = type(module)
        module.__class__ = _class_over(kind)
        module.takes_whole = False
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) not in (None, "eager"):
        module.config = copy.copy(config)  # this module alone takes its experts one by one
        module.config._experts_implementation = "eager"
    return stack


@torch.no_grad()
def quantize_stack(
    module: nn.Module,
    name: str,
    kind: Kind,
    double: bool,
    block: int,
    path: str,
    matrices: Iterator[Tensor | Packed] | None = None,
) -> Stack:
    """Quantize a stacked parameter, one expert's matrix after the other.

    Args:
        module: that holds it.
        name: the parameter's.
        kind: "nf4", "fp4" or "int8".
        double: quantize the scales as well (nf4, fp4).
        block: number of flat elements that share a scale (nf4, fp4).
        path: what messages call it.
        matrices: the experts' matrices as the parameter has them, or as codes already; None for the parameter's own.

    Returns:
        The stack.

    Raises:
        TensorkeepError: V01 where a weight is NaN or infinite.
    """
    held = module._parameters[name]
    assert held is not None
    stack = placed(module, name, codes=True)
    for expert, matrix in enumerate(held.detach() if matrices is None else matrices):
        if isinstance(matrix, Tensor):
            turned = matrix.T.contiguous() if stack.inward else matrix
            matrix = pack(turned, kind, double, block, f"{path}[{expert}]")
        stack.put(expert, matrix)
    return stack
