"""Train LoRA and rsLoRA over any linear, dense or quantized: the layer becomes a subclass of itself.

Nothing is wrapped and no `forward` is patched, so `q_proj.weight` stays `q_proj.weight`, and deepcopy, pickle,
torch.compile, DDP and FSDP2 see an ordinary module with two more parameters, `lora_A [r, in]` and `lora_B [out, r]`.
LoRA: arXiv 2106.09685; rsLoRA scales by alpha / sqrt(r): arXiv 2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.adapters import kinds
from tensorkeep.adapters.stacked import adapt_stacks, refuse_dropout
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches, unwrap
from tensorkeep.quantization.frozen import compute_dtype, frozen_linear
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.linear_layers import dense, is_conv1d
from tensorkeep.quantization.modules import adopted, is_bitsandbytes
from tensorkeep.quantization.replacing import check_patterns, heads, replace_modules

ALL = "all-linear"
TRAINED = ("lora", "rslora")


class LowRank(nn.Module):
    """What `LoraLinear` and `LoraQuantLinear` add to their base: `scale · (drop(x) A^T) B^T`, with A and B trainable.

    A and B are float32 and are cast to the dtype of computation at use. Under `merge_`, `merged` holds the dense sum.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    merged: Tensor | None
    r: int
    alpha: float
    dropout: float
    rslora: bool

    @property
    def scale(self) -> float:
        """Return alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer, `[..., in] -> [..., out]`."""
        if self.merged is not None:
            if self.training and torch.is_grad_enabled():
                raise TensorkeepError(
                    "is merged: A and B would get no gradient", where="lora", hint="unmerge_(model) first"
                )
            dtype, bias = compute_dtype(x), getattr(self, "bias", None)
            return F.linear(x.to(dtype), self.merged.to(dtype), None if bias is None else bias.to(dtype))
        return low_rank(x, self, self.lora_A, self.lora_B, self.scale, self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        """Return the base's description with rank and alpha."""
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha:g}{', rslora' if self.rslora else ''}"


class LoraLinear(LowRank, nn.Linear):
    """A dense linear with a low-rank update; `add_lora` makes it out of an `nn.Linear`, whose parameters it keeps."""

    def over(self, base: QuantLinear) -> LoraQuantLinear:
        """Return a layer with the same update over a quantized form of this one."""
        return _over(self, base)


class LoraQuantLinear(LowRank, QuantLinear):
    """A quantized linear with a low-rank update; `add_lora` makes it out of a `QuantLinear`, whose codes it keeps."""


class LoraConv1D(LowRank):
    """transformers' Conv1D (GPT-2), whose weight is [in, out], with a low-rank update; A and B are as everywhere."""

    weight: nn.Parameter
    nx: int
    nf: int
    inward = True

    def over(self, base: QuantLinear) -> LoraQuantLinear:
        """Return a layer with the same update over a quantized form of this one."""
        return _over(self, base)

    @property
    def matrix(self) -> Tensor:
        """The weight as a linear has it, [out, in]."""
        return self.weight.T

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.nx

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.nf


def _over(layer: LowRank, base: QuantLinear) -> LoraQuantLinear:
    """Return a quantized layer with the update of another."""
    made = adapted(base, layer.r, layer.alpha, layer.dropout, layer.rslora)
    made.lora_A, made.lora_B = layer.lora_A, layer.lora_B
    assert isinstance(made, LoraQuantLinear)
    return made


def low_rank(x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Compute a linear with a low-rank update: `base(x) + scale · (drop(x) A^T) B^T`.

    Without dropout and with a frozen base it is one operation that keeps x and x A^T for the backward, nothing else.

    Args:
        x: `[..., in]`.
        base: a dense or quantized linear.
        a: `[r, in]`.
        b: `[out, r]`.
        scale: what the update is multiplied by.
        dropout: probability with which elements of x are zeroed for the update.

    Returns:
        `[..., out]`, in the dtype of computation.
    """
    weight: Any = getattr(base, "matrix", base.weight)
    if not weight.requires_grad and not dropout:
        return frozen_linear(x, base, a, b, scale)
    if weight.requires_grad:
        bias: Any = base.bias
        out = F.linear(x, weight, bias)
    else:
        out = frozen_linear(x, base)
    low = F.linear(F.dropout(x, dropout).to(out.dtype), a.to(out.dtype))  # [..., r]
    update = b.to(out.dtype).T  # [r, out]
    return torch.addmm(out.reshape(-1, out.shape[-1]), low.reshape(-1, len(update)), update, alpha=scale).view(
        out.shape
    )


AnyLora = LoraLinear | LoraQuantLinear | LoraConv1D


# -- putting it on -------------------------------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    targets: Sequence[str] | str,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    kind: str = "lora",
    parameters: Sequence[str] = (),
) -> list[str]:
    """Give the named linears of a model a low-rank update and freeze all else, in place.

    Args:
        model: its linears may be dense, quantized, or bitsandbytes', which are made ours on the way.
        targets: patterns of module names (docs/concepts/patterns.md); "all-linear" takes every linear but the heads.
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: probability with which an element of the update's input is zeroed while training, in [0, 1).
        rslora: scale by alpha / sqrt(r) instead.
        rank_pattern: other ranks, by pattern of module names.
        alpha_pattern: other alphas, by pattern of module names.
        exclude: patterns of module names to leave out.
        kind: "lora", or "rslora", which sets `rslora`.
        parameters: patterns of parameters that stack experts, each of which gets an update of its own.

    Returns:
        The names of the adapted modules, and of the parameters.

    Raises:
        TensorkeepError: a pattern fits no linear, no linear is left, or the kind is not trained here.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> add_lora(model, ["0"], r=4), sorted(n for n, p in model.named_parameters() if p.requires_grad)
        (['0'], ['0.lora_A', '0.lora_B'])
    """
    _refuse_other_kinds(kind)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    linears, last = adaptable(model), heads(model)
    chosen = [n for n in linears if any(_fits(n, p, last) for p in wanted) and not matches(n, exclude)]
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    check_patterns(linears, [p for p in wanted if p != ALL], "lora.targets")
    check_patterns(linears, exclude, "lora.exclude")
    refuse_dropout(dropout, parameters)
    check_patterns(dict.fromkeys([*chosen, *parameters]), [*ranks, *alphas], "lora.rank_pattern, alpha_pattern")
    if not chosen and not parameters:
        raise TensorkeepError(f"no linear is left to adapt after exclude {list(exclude)}", where="lora.targets")
    model.requires_grad_(False)
    made = {}
    for name in chosen:
        base = adopted(linears[name]) if is_bitsandbytes(linears[name]) else linears[name]
        rank = _first(name, ranks, r)
        made[linears[name]] = adapted(
            base, rank, _first(name, alphas, alpha), dropout, rslora or kind == "rslora", name
        )
    replace_modules(model, made)
    return chosen + adapt_stacks(model, parameters, r, alpha, rslora or kind == "rslora", ranks, alphas)


def adapted(
    base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False, name: str = "linear"
) -> AnyLora:
    """Return a layer with a low-rank update: the same parameters, buffers and hooks, under the subclass.

    A is drawn as `nn.Linear` draws its weight (Kaiming, uniform), B is zero: the first forward is that of the base.

    Args:
        base: an `nn.Linear`, `QuantLinear` or Conv1D; its parameters are frozen.
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: probability in [0, 1).
        rslora: scale by alpha / sqrt(r) instead.
        name: the layer's name, for errors.

    Returns:
        The new layer.

    Raises:
        TensorkeepError: r is below 1, or dropout outside of [0, 1).
    """
    if not isinstance(r, int) or r < 1 or not 0 <= dropout < 1:
        raise TensorkeepError(f"r={r}, dropout={dropout}: r is at least 1, dropout in [0, 1)", where=name)
    kind: type[AnyLora] = LoraConv1D if is_conv1d(base) else LoraLinear
    kind = LoraQuantLinear if isinstance(base, QuantLinear) else kind
    made: AnyLora = kind.__new__(kind)
    own = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(base).items()}
    made.__dict__.update(own)
    made.r, made.alpha, made.dropout, made.rslora = r, float(alpha), dropout, rslora
    weight: Any = base.weight
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    draw(made, weight.device)
    made.register_buffer("merged", None, persistent=False)
    return made


def draw(layer: AnyLora, device: torch.device) -> None:
    """Draw the first A and B of a layer anew.

    Args:
        layer: with a low-rank update.
        device: where they go.
    """
    layer.lora_A = nn.Parameter(torch.empty(layer.r, layer.in_features, device=device, dtype=torch.float32))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, layer.r, device=device, dtype=torch.float32))
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can have an update, by name without wrappers; those that have one already are none.

    Args:
        model: the model.
    """
    return {_clean(n): m for n, m in model.named_modules() if _adaptable(m)}


def _refuse_other_kinds(kind: str) -> None:
    """Stop at a kind of adapter that is not trained here."""
    if kind.lower() not in TRAINED:
        hint = f"kinds: {', '.join(TRAINED)}; others through PEFT's get_peft_model (merge adds {kinds.known()})"
        raise TensorkeepError(f"{kind!r} is not trained here", where="lora", hint=hint)


def _adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear that can have an update: nothing that has one already."""
    return dense(module) or type(module) is QuantLinear or is_bitsandbytes(module) or is_conv1d(module)


def _clean(name: str) -> str:
    """Return a module's name without wrappers."""
    return unwrap(name)[0]


def _fits(name: str, pattern: str, last: Sequence[str]) -> bool:
    """Whether a module's name fits a target; "all-linear" fits all but heads."""
    return not matches(name, last) if pattern == ALL else matches(name, [pattern])


def _first(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first pattern that fits a name."""
    return next((value for pattern, value in patterns.items() if matches(name, [pattern])), default)


# -- merging -------------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> dict[str, AnyLora]:
    """Return the adapted layers by name, without the wrappers of DDP, FSDP2 and torch.compile.

    Args:
        model: with LoRA layers or without.

    Returns:
        The layers, in the model's order.
    """
    return {_clean(n): m for n, m in model.named_modules() if isinstance(m, AnyLora)}


@torch.no_grad()
def merge_(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Run on `W + scale · B A` from now on, computed in float32 and rounded once to `dtype` (None: the weight's own).

    The base is not touched (a quantized one gets a dense copy beside it), so `unmerge_` is exact, and the state dict
    stays that of base and adapter. Layers that round their merged weight at every use (`aware`) keep it rounded, in
    float32.

    Args:
        model: with LoRA layers.
        dtype: of the sums; None: the weight's own.

    Returns:
        The merged names.

    Raises:
        TensorkeepError: there are no LoRA layers, or one is merged already or sharded.
    """
    found = layers(model)
    _refuse(found, [n for n, layer in found.items() if layer.merged is not None], "is merged already")
    _refuse(
        found,
        [n for n, layer in found.items() if hasattr(layer.lora_A, "to_local")],
        "is sharded: merge the saved files",
    )
    for layer in found.values():
        rounds: Any = getattr(layer, "held_weight", None)  # in 4 bits at every use (`aware`)
        if rounds is not None:
            layer.merged = rounds()
            continue
        quantized = isinstance(layer, LoraQuantLinear)
        base = layer.dequantize() if isinstance(layer, LoraQuantLinear) else getattr(layer, "matrix", layer.weight)
        base = base.float()
        own = getattr(torch, layer.layout.dtype) if isinstance(layer, LoraQuantLinear) else layer.weight.dtype
        total = torch.addmm(base, layer.lora_B.float(), layer.lora_A.float(), alpha=layer.scale)
        layer.merged = total.to(dtype or own, copy=not quantized)
    return list(found)


def unmerge_(model: nn.Module) -> list[str]:
    """Run on base and adapter again, bitwise as before; return the names that were merged."""
    merged_layers = {n: layer for n, layer in layers(model).items() if layer.merged is not None}
    for layer in merged_layers.values():
        layer.merged = None
    return list(merged_layers)


@contextmanager
def merged(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run the model merged inside the block; afterwards, also after an error, as before.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = add_lora(model, "0", r=2)
    >>> with merged(model.eval()), torch.no_grad():
    ...     _ = model(torch.zeros(1, 4))
    """
    merge_(model, dtype)
    try:
        yield
    finally:
        unmerge_(model)


def _refuse(found: Mapping[str, nn.Module], bad: Sequence[str], what: str) -> None:
    """Stop where there are no LoRA layers, or where some are in the state that `what` says."""
    if not found:
        raise TensorkeepError("the model has no LoRA layers", where="lora", hint="add_lora(model, targets) adds them")
    if bad:
        raise TensorkeepError(f"{bad[0]} {what} ({len(bad)} of {len(found)})", where="lora", tensors=bad)
