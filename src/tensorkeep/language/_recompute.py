"""Gradient checkpointing of decoder layers: what of a forward is kept for the backward, compiled or not.

The layer becomes a subclass of itself, so names stay and nothing is patched. Kept, from least to most (bytes a token
of a Llama-3.1-8B layer in bf16): the `input` (8 kB; `start` where the layer is compiled as one), what `attention` gave
as well (16 kB), what it took, too (`queries`, 28 kB), the products no wider than what they are made of (`narrow`,
36 kB), all `products` (92 kB), or `all` of it. What is kept can wait in main memory (`training.offload`). With `input`
torch's non-reentrant checkpoint goes around the layer; between `start` and `all` it goes inside one compiled graph, in
which only what the backward needs is made again: a checkpoint around the layer repeats its last product for nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tensorkeep.language._documents
import tensorkeep.language._gated_float8
import tensorkeep.quantization.linear  # noqa: F401  these register the operations that stand for their products
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.offload import Offload

Kept = Literal["input", "start", "attention", "queries", "narrow", "products", "all"]
# kept -> how many times as wide as its input a product may be, before attention and behind it
INSIDE = {
    "start": (-1.0, -1.0),  # nor attention
    "attention": (0.0, 0.0),
    "queries": (1.0, 0.0),
    "narrow": (1.0, 1.0),
    "products": (float("inf"), float("inf")),
}

aten = torch.ops.aten
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.tensorkeep.documents.default,
)
_FORMS = 64  # of one layer's compiled code
_WIDEST = 2  # times a layer's input: what is larger stays on the GPU, since it takes longer to move than to keep busy
MATRIX = (
    aten.mm.default,
    aten.addmm.default,
    torch.ops.tensorkeep.products.default,
    torch.ops.tensorkeep.float8_products.default,
)
GATED = (torch.ops.tensorkeep.gated_mlp.default, torch.ops.tensorkeep.gated_mlp_float8.default)


def _contexts(widest: tuple[float, float]) -> Any:
    """Make the contexts of one checkpoint, whose policy sees a layer's operations in their order."""
    make: Any = create_selective_checkpoint_contexts
    return make(partial(_policy, widest, set()))


def _policy(
    widest: tuple[float, float], behind: set[bool], context: Any, operation: Any, *args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    """Keep attention, and products that are not wider than `widest` says, before attention and `behind` it."""
    if operation in ATTENTION:
        behind.add(context.is_recompute)
    most = widest[context.is_recompute in behind]
    if most < 0:
        return CheckpointPolicy.MUST_RECOMPUTE
    if operation in ATTENTION or (operation in GATED and args[-1]):
        return CheckpointPolicy.MUST_SAVE
    if operation in MATRIX:
        left, right = args[1:3] if operation is aten.addmm.default else args[:2]
        if right.shape[1] <= most * left.shape[1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Lean(nn.Module):
    """The class `lean` puts over a layer's own: a forward that keeps only `kept`, and runs compiled if `compiled`."""

    kept: Kept
    compiled: bool
    offload: Offload | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kinds: Any = type(self).__mro__  # FSDP2 may have put a class of its own over this one
        kind = kinds[kinds.index(Lean) + 1]
        wanted = self.kept if self.training and torch.is_grad_enabled() else "all"
        run = _compiled_forward(kind, wanted if wanted in INSIDE else "all") if self.compiled else kind.forward
        if self.compiled and wanted in INSIDE and args:
            args = (_needing(args[0]), *args[1:])
        if self.offload is None or wanted == "all":
            return self._run(run, wanted, args, kwargs)
        shared = [*self.parameters(), *self.buffers(), *flat_tensors(kwargs)]
        largest = _WIDEST * max((t.nbytes for t in flat_tensors(args)), default=0)
        place = self.offload.place(args[0]) if self.compiled and wanted == "start" and args else None
        with self.offload.saving({t.data_ptr() for t in shared}, largest, place):
            out = self._run(run, wanted, args, kwargs)
        if place is not None:
            place.done(lambda *args, **kwargs: self._run(run, wanted, args, kwargs), out, args[1:], kwargs)
        return out

    def _run(self, run: Any, wanted: Kept, args: Any, kwargs: Any) -> Any:
        if wanted == "input":
            return checkpoint(run, self, *args, use_reentrant=False, **kwargs)
        return run(self, *args, **kwargs)


class _Needing(torch.autograd.Function):
    """A tensor as it is, needing a gradient because a second one does; what comes back is dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _other: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[None, None]:
        return None, None


def _needing(x: Any) -> Any:
    """Return a layer's input as one that needs a gradient: the first layer's does not, and would be compiled apart."""
    if not isinstance(x, Tensor) or x.requires_grad or not x.is_floating_point():
        return x
    apply: Any = _Needing.apply
    return apply(x, torch.zeros((), device=x.device, requires_grad=True))


def flat_tensors(value: Any) -> Iterator[Tensor]:
    """List the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from flat_tensors(one)


@cache
def _lean_class(kind: Any) -> Any:
    """Make the subclass of a layer's class; one for all its instances, or each would be compiled on its own."""
    return type(f"Lean{kind.__name__}", (Lean, kind), {})


_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def _set_compiler() -> None:
    """Let a layer be compiled for as many forms as rows, ways to keep and evaluation make, and keep what is compiled.

    Beyond its limit, eight forms, torch runs the layer uncompiled. Compiled code is kept in the user's cache, not where
    the system clears it, and whole: by default torch traces layers with operations of our own anew in every process.
    Their backward is part of the key that code is found by.
    """
    with suppress(OSError, RuntimeError):  # no home, or none that can be written: torch's own folder
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tensorkeep", "compiled")
        folder.mkdir(parents=True, exist_ok=True)
        named = Path(os.environ.get(_CACHE, tempfile.gettempdir() + "/torchinductor_"))
        # torch writes its own folder there when its compiler is imported: that is nobody's choice
        by_torch = named.parent == Path(tempfile.gettempdir()) and named.name.startswith("torchinductor_")
        if by_torch and os.access(folder, os.W_OK):
            os.environ[_CACHE] = str(folder)
    traced: Any = torch._functorch.config
    if hasattr(traced, "autograd_cache_allow_custom_autograd_functions"):  # from torch 2.6
        traced.autograd_cache_allow_custom_autograd_functions = True
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    setattr(config, name, max(getattr(config, name), _FORMS))


_OWN = (__name__, *(f"tensorkeep.{n}" for n in ("language._documents", "language._gated_mlp", "quantization.frozen")))


@cache
def _source() -> str:
    """Digest what decides what a compiled layer keeps, and its operations: another source must find no graph of this.

    Raises:
        OSError: there is no source.
    """
    return hashlib.sha256("".join(inspect.getsource(sys.modules[name]) for name in _OWN).encode()).hexdigest()


def _named_contexts(kept: Kept) -> Any:
    """Make what makes the contexts of checkpoints that keep so much, with the name that compiled code is kept under."""
    contexts: Any = partial(_contexts, INSIDE[kept])
    with suppress(OSError):  # without a source there is no name, and torch traces the layer anew in every process
        contexts.cache_hash = f"{_source()} {INSIDE[kept]}"
    return contexts


@cache
def _compiled_forward(kind: Any, kept: Kept) -> Any:
    """Compile the forward of a class: its instances share one graph, whose inputs are their parameters."""
    _set_compiler()
    if kept == "all":
        return torch.compile(kind.forward, dynamic=False)
    contexts = _named_contexts(kept)

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return checkpoint(kind.forward, layer, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        _told_uncompiled(kind.__name__)  # torch gave this form up: what is kept inside would be changed in place
        return checkpoint(kind.forward, layer, *args, use_reentrant=False, **kwargs)

    # torch counts forms by code object: a class and a way to keep must not use up the forms of another
    forward.__code__ = forward.__code__.replace(co_name=f"{kind.__name__}_{kept}")
    return torch.compile(forward, dynamic=False)


@cache
def _told_uncompiled(name: str) -> None:
    """Warn, once for a class, that torch does not compile its layers any more."""
    warnings.warn(
        f"torch runs {name} uncompiled: slower, and only the layer's input is kept. TORCH_LOGS=recompiles says why",
        stacklevel=2,
    )


def lean(
    layers: Iterable[nn.Module], kept: Kept = "input", compiled: bool = False, offload: Offload | None = None
) -> int:
    """Make these layers keep no more than `kept` for the backward and, with `compiled`, run compiled.

    Called again it changes both. Uncompiled, outputs and gradients are bitwise those of the plain layer; torch replays
    dropout from the saved random state.

    Args:
        layers: changed in place; their names and parameters stay.
        kept: what is kept, from least to most: see the head of this module.
        compiled: run the layers through torch.compile.
        offload: keeps it in main memory, of layers on a GPU; one for all layers of a model.

    Returns:
        How many layers there are.

    Raises:
        TensorkeepError: what is kept inside a layer, without `compiled`.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> lean([block]), type(block).__name__, [name for name, _ in block.named_parameters()]
        (1, 'LeanSequential', ['0.weight', '0.bias'])
    """
    if kept in INSIDE and not compiled:
        raise TensorkeepError(
            f"keeping {kept!r} needs a compiled layer", where="recompute", hint="compile: true, or keep the input"
        )
    count = 0
    for layer in layers:
        if not isinstance(layer, Lean):
            kind: Any = type(layer)
            layer.__class__ = _lean_class(kind)
        layer.kept, layer.compiled, layer.offload = kept, compiled, offload  # type: ignore[assignment]
        count += 1
    return count
