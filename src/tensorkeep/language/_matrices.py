"""The matrices of a model's layers that codes take the place of, and where they lie in its files.

A linear is one matrix under one name. Experts lie stacked in one parameter in memory and, in the files, as a matrix
each, in other orders and under other names: which rows of the parameter a file's tensor is, its values say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import tensor_of
from tensorkeep.formats.names import matches
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.grids import Bits, Form, form_of
from tensorkeep.quantization.linear_layers import dense, stacked_parameters
from tensorkeep.quantization.replacing import clean_name, left_wide, tied_parameters

_EXPERT = re.compile(r"\.(\d+)\.[^.]+\.weight\Z")


class Matrix(NamedTuple):
    """A matrix that becomes codes.

    Attributes:
        name: in the files, without ".weight".
        parameter: its name inside the layer.
        form: of its codes.
        expert: its place in a stacked parameter; None for a linear.
        rows: which of the parameter's rows; None for all.
        turned: the parameter holds it as [in, out].
    """

    name: str
    parameter: str
    form: Form
    expert: int | None = None
    rows: tuple[int, int] | None = None
    turned: bool = False

    def of(self, layer: nn.Module) -> Tensor:
        """Return the matrix [out, in] as it lies in a layer's parameter; what is written to it stays there."""
        whole = layer.get_parameter(self.parameter).data
        one = whole if self.expert is None else whole[self.expert]
        one = one.T if self.turned else one
        return one if self.rows is None else one[slice(*self.rows)]


def matrices(
    model: nn.Module, layers: Sequence[nn.Module], view: StateView, bits: Bits
) -> tuple[list[list[Matrix]], list[str]]:
    """List what becomes codes, layer by layer.

    Args:
        model: a causal language model of transformers.
        layers: its layers.
        view: the files that it was loaded from, in floats.
        bits: the kind of codes.

    Returns:
        The matrices of each layer, and the names of linears in the layers whose rows are no whole blocks.

    Raises:
        TensorkeepError: a layer holds large weights that are no linears or experts, the files name a linear otherwise
            (K01), or they stack experts too.
    """
    names = {id(module): clean_name(name) for name, module in model.named_modules()}
    wide, tied = left_wide(model), tied_parameters(model)
    found: list[list[Matrix]] = []
    odd: list[str] = []
    for layer in layers:
        mine: list[Matrix] = []
        stacked = {f"{path}.{key}" if path else key for path, _, key in stacked_parameters(layer)}
        for path, module in layer.named_modules():
            name = names[id(module)]
            if dense(module) and id(module.weight) not in tied and not any(matches(name, [w]) for w in wide):
                mine += _linear(name, path, module, view, bits, odd)
                continue
            for key, parameter in module._parameters.items():
                whole = f"{path}.{key}" if path else key
                if whole in stacked and parameter is not None:
                    mine += _experts(names[id(layer)], name, whole, module, parameter, view, bits)
                elif parameter is not None and parameter.dim() > 2:
                    raise TensorkeepError(
                        f"{name}.{key} is no linear: its merge is not rounded here", where="--to-bits"
                    )
        found.append(mine)
    if not any(found):
        what = f"{type(model).__name__} has no layers of linears" + (" with rows of whole blocks" if odd else "")
        raise TensorkeepError(f"{what}: its merge is not rounded here", where="--to-bits")
    return found, odd


def refuse_experts(view: StateView, bits: Bits) -> None:
    """Refuse a mixture of experts whose codes nothing would load, by the names of its files alone.

    Args:
        view: the base.
        bits: the kind of codes.

    Raises:
        TensorkeepError: it has experts, and these are no codes of llama.cpp.
    """
    expert = next((name for name in view if "experts" in name.split(".")), None)
    if expert is None or bits == "q4_k":
        return
    why = "bitsandbytes' layers take the place of linears alone, and experts are loaded as one stack of floats"
    if bits == "mxfp4":
        why = "it is written in compressed-tensors' layout of linears, and GPT-OSS's layout of experts is not written"
    what = f"transformers loads no {bits} codes of stacked experts, as {expert}: {why}"
    raise TensorkeepError(what, where="--to-bits", hint="--to-bits q4_k, or merge without --to-bits")


def _linear(name: str, path: str, module: Any, view: StateView, bits: Bits, odd: list[str]) -> list[Matrix]:
    """Return a linear's matrix; note one whose rows are no whole blocks."""
    if f"{name}.weight" not in view:
        hint = "merge without --to-bits"
        what = f"transformers calls {name} otherwise than the files do"
        raise TensorkeepError(what, where=view.path, hint=hint, code="K01")
    form = form_of(bits, module.in_features)
    if form is None:
        odd.append(name)
        return []
    return [Matrix(name, f"{path}.weight" if path else "weight", form)]


def _experts(
    layer: str, name: str, path: str, module: nn.Module, parameter: Tensor, view: StateView, bits: Bits
) -> list[Matrix]:
    """Find the matrices of the files that make up a stacked parameter."""
    if bits != "q4_k":
        what = f"transformers loads no {bits} codes of stacked experts, as in {name}"
        raise TensorkeepError(what, where="--to-bits", hint="--to-bits q4_k, or merge without --to-bits")
    turned = bool(getattr(module, "is_transposed", False))
    rows, columns = (parameter.shape[2], parameter.shape[1]) if turned else (parameter.shape[1], parameter.shape[2])
    form = form_of(bits, columns)
    beside: dict[int, list[str]] = {}
    for file_name, record in view.items():
        one = _EXPERT.search(file_name)
        if one and file_name.startswith(f"{layer}.") and len(record.shape) == 2 and record.shape[1] == columns:
            beside.setdefault(int(one[1]), []).append(file_name)
    found: list[Matrix] = []
    for expert in range(len(parameter)):
        whole = parameter.data[expert].T if turned else parameter.data[expert]
        mine, left = _rows_of(whole, beside.get(expert, ()), view)
        if left or form is None:
            what = f"{name}.{path.rpartition('.')[2]}"
            why = f"rows of {columns} are no whole blocks" if form is None else "its experts are stacked in the files"
            raise TensorkeepError(f"{what}: {why}: they are not rounded here", where="--to-bits")
        found += [Matrix(n.removesuffix(".weight"), path, form, expert, place, turned) for n, place in mine.items()]
    assert sum(m.rows[1] - m.rows[0] for m in found if m.rows) == rows * len(parameter)
    return found


def _rows_of(whole: Tensor, names: Sequence[str], view: StateView) -> tuple[dict[str, tuple[int, int]], int]:
    """Find the tensors whose values are rows of a matrix, one below the other; how many rows are left without one."""
    held: Mapping[str, Tensor] = {n: tensor_of(view, n).to(whole.device, whole.dtype) for n in names}
    found: dict[str, tuple[int, int]] = {}
    at = 0
    while at < len(whole):
        fits = (n for n, t in held.items() if n not in found and torch.equal(t, whole[at : at + len(t)]))
        name = next(fits, None)
        if name is None:
            return found, len(whole) - at
        found[name] = (at, at + len(held[name]))
        at += len(held[name])
    return found, 0
