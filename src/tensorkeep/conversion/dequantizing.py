"""A checkpoint with its quantized weights as floats: computed piece by piece while they are read.

Where `convert` is asked for a float dtype, codes and scales give way to the values that they stand for, under the name
that the weight has where it is not quantized. One tensor's codes are held at a time, its values never.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensorkeep.conversion.plan import Part, Plan, Step, ordered
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.companions import Companion, travelling
from tensorkeep.formats.view import STREAM_BYTES, Note, StateView
from tensorkeep.quantization.stored import QuantizedWeight, dequantize, find_quantized, members, refuse, stream_values
from tensorkeep.storage.record import TensorRecord

_CODES = ("U8", "I8", "U16", "I16", "U32", "I32", "F4", "F8_E4M3", "F8_E5M2")
# models whose layers are transformers' Conv1D, [inputs, outputs]; quantizers turn such a layer into a linear
_CONV1D = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
FLOATS = ("F64", "F32", "F16", "BF16")
_KEEP = "leave --dtype out: codes, scales and quantization_config are then kept as they are"
# beside quantized modules: scales of activations and of the cache, which no float model has
_ACTIVATIONS = frozenset(
    "input_scale input_scale_inv input_zero_point input_global_scale output_scale output_zero_point k_scale v_scale "
    "q_scale weight_zero_point activation_scale".split()
)


@dataclass(eq=False)
class DecodedView(StateView):
    """A checkpoint whose quantized weights, those in `made`, are floats; all other tensors are as they are stored.

    Attributes:
        base: the checkpoint with its codes.
        made: name of each float -> the weight that it stands for.
        turned: names of those whose float is stored transposed (Conv1D).
    """

    base: StateView | None = None
    made: dict[str, QuantizedWeight] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces, computed where it is quantized; arguments as of `StateView.stream`."""
        assert self.base is not None
        weight = self.made.get(name)
        if weight is None:
            yield from self.base.stream(name, rows, granule, chunk)
            return
        dtype, waiting = np_dtype(self.records[name].dtype), b""
        found = (v for _, v in stream_values(self.base, weight, rows))
        for values in _turned(self.base, weight, rows) if name in self.turned else found:
            data = memoryview(_cast(values, dtype)).cast("B")
            if waiting:
                data = memoryview(waiting + bytes(data))
            whole = len(data) // granule * granule
            if whole:
                yield data[:whole]
            waiting = bytes(data[whole:]) if whole < len(data) else b""
        if waiting:
            yield memoryview(waiting)


def _turned(view: StateView, weight: QuantizedWeight, rows: tuple[int, int] | None) -> Iterator[Any]:
    """Yield rows of a weight's transpose, for which its values are held."""
    import numpy as np

    whole = dequantize(view, weight.name, weight).T
    for row in whole[slice(*rows) if rows else slice(None)]:
        yield np.ascontiguousarray(row)


def turned(config: Mapping[str, Any] | None, name: str) -> bool:
    """Say whether a model keeps the transpose of what its quantized linears hold, as those of Conv1D layers do.

    Args:
        config: of the model.
        name: of the float weight.

    Returns:
        True where the float is [inputs, outputs] and the quantized weight [outputs, inputs].
    """
    module = name.removesuffix(".weight").rpartition(".")[2]
    return (config or {}).get("model_type") in _CONV1D and module in _CONV1D_LAYERS


def _cast(values: Any, dtype: Any) -> Any:
    """Round float32 values once to a dtype, as bytes."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values.astype(dtype, copy=False)).view(np.uint8)


def decoded(view: StateView, dtype: Callable[[str], str] | str) -> StateView:
    """Return a checkpoint with its quantized weights as floats; the view itself where it has none.

    Args:
        view: the checkpoint.
        dtype: of the floats, "F32" or "BF16", or a function that gives it by stored name.

    Raises:
        TensorkeepError: Q01 or Q06 where a weight cannot be dequantized, K02 where its float is stored too.
    """
    weights = find_quantized(view)
    if not weights:
        return view
    beside = members(weights)
    modules = {w.stands_for.rpartition(".")[0] for w in weights.values()}
    records: dict[str, TensorRecord] = {}
    made: dict[str, QuantizedWeight] = {}
    across: set[str] = set()
    for name, record in view.records.items():
        weight = weights.get(name)
        if weight is not None:
            refuse(weight, view.path)
            assert weight.shape is not None
            float_name = weight.stands_for
            if float_name != name and float_name in view:
                raise TensorkeepError(f"{name} and {float_name} are one weight twice", where=view.path, code="K02")
            wanted = dtype if isinstance(dtype, str) else dtype(float_name)
            back = turned(view.config, float_name) and len(weight.shape) == 2
            shape = weight.shape[::-1] if back else weight.shape
            records[float_name] = TensorRecord(float_name, wanted, shape, record.blocks, encoding=weight.kind)
            across |= {float_name} if back else set()
            made[float_name] = weight
        elif name not in beside and not _of_activations(name, modules):
            records[name] = record
    known = {key: value for key, value in view.metadata.items() if not isinstance(value, str) or key == "format"}
    config, companions = float_config(view)
    return DecodedView(
        view.path,
        view.format,
        view.folder,
        records,
        config,
        companions,
        view.entries,
        list(view.notes),
        known,
        checked=view.checked,
        base=view,
        made=made,
        turned=frozenset(across),
    )


def _of_activations(name: str, modules: set[str]) -> bool:
    """Say whether a tensor is a scale of the activations of a quantized module, or of the cache of its parent."""
    module, _, last = name.rpartition(".")
    return last in _ACTIVATIONS and (module in modules or any(m.startswith(f"{module}.") for m in modules))


def float_config(view: StateView) -> tuple[dict[str, Any] | None, list[Companion]]:
    """Return config and companions without a word of quantization.

    Args:
        view: the checkpoint.
    """
    companions = travelling(view.companions)
    if view.config is None:
        return None, companions
    config = _without_quantization(view.config)
    for at, found in enumerate(companions):
        if found.name == "config.json":
            text = (json.dumps(config, indent=2) + "\n").encode()
            companions[at] = Companion("config.json", text, found.where)
    return config, companions


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without `quantization_config`, its own and those of the models inside it."""
    out = {}
    for key, value in config.items():
        if key in ("quantization_config", "compression_config"):
            continue
        out[key] = _without_quantization(value) if isinstance(value, Mapping) and key.endswith("_config") else value
    return out


def all_decoded(sources: Sequence[StateView], dtype: str | None) -> list[StateView]:
    """Return the sources of a plan with their quantized weights as floats, where a float dtype is asked for.

    Args:
        sources: the checkpoints.
        dtype: what `--dtype` asks for. For float16 values stay float32 here: the plan's own cast counts what is lost.
    """
    if dtype not in FLOATS:
        return list(sources)
    for view in sources:
        refuse_unread(view, _KEEP)
    return [decoded(view, dtype if dtype in ("F32", "BF16") else "F32") for view in sources]


def refuse_unread(view: StateView, hint: str) -> None:
    """Stop where a checkpoint that says it is quantized holds codes of a layout that is not read here.

    Args:
        view: the checkpoint.
        hint: what to do then.

    Raises:
        TensorkeepError: it names the layout and the first tensor.
    """
    said = (view.config or {}).get("quantization_config")
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    flattened = any("._weight_" in name for name in view)  # torchao's way to write the parts of a tensor
    if not isinstance(said, Mapping) and not flattened:
        return
    weights = find_quantized(view)
    known = {*weights, *members(weights)}
    odd = [n for n, r in view.items() if r.dtype in _CODES and len(r.shape) > 1 and n not in known]
    if odd:
        name = shown(method) if method else "torchao" if flattened else "its config"
        raise TensorkeepError(
            f"{len(odd)} tensors hold codes in a layout of {name} that is not read here, first {odd[0]} "
            f"({view[odd[0]].dtype} {list(view[odd[0]].shape)})",
            where=view.path,
            hint=hint,
        )


def beside(view: StateView, other: StateView) -> StateView:
    """Return a checkpoint as floats where it is quantized and another, that it is compared with, is not.

    Args:
        view: the checkpoint; one whose codes lack or contradict their description stays as it is.
        other: what it is compared with; each weight gets the dtype that it has there, if a float one.

    Returns:
        The checkpoint, or its decoded view, whose values are those of `convert --dtype`.
    """
    weights = find_quantized(view)
    if not weights or any(w.problems for w in weights.values()) or find_quantized(other):
        return view
    floats = Counter(r.dtype for r in other.values() if r.dtype in FLOATS)
    usual = floats.most_common(1)[0][0] if floats else "F32"

    def dtype(name: str) -> str:
        return other[name].dtype if name in other and other[name].dtype in FLOATS else usual

    return decoded(view, dtype)


def told(plan: Plan) -> None:
    """Say in a plan what was dequantized, what gave way to it, and what is left out of the header.

    Args:
        plan: made from `all_decoded` sources; its steps gain reasons and those that drop codes' companions.
    """
    if not any(isinstance(view, DecodedView) for view in plan.sources):
        return
    for number, step in enumerate(plan.steps):
        kinds = {
            view.made[p.name].kind
            for p in step.parts
            if isinstance(view := plan.sources[p.source], DecodedView) and p.name in view.made
        }
        if kinds and step.sink is not None:
            actions = ("cast", *(a for a in step.actions if a not in ("cast", "keep")))
            plan.steps[number] = replace(step, actions=actions, reason=f"dequantized {', '.join(sorted(kinds))}")
    for index, view in enumerate(plan.sources):
        if not isinstance(view, DecodedView) or view.base is None:
            continue
        used = {w.name for w in view.made.values()}
        gone = [n for n in view.base if n not in view.records and n not in used]
        why = "belongs to codes that are dequantized"
        plan.steps += [Step(("drop",), (Part(index, n),), None, why) for n in gone]
        lost = tuple(k for k, v in view.base.metadata.items() if isinstance(v, str) and k != "format")
        if lost:
            what = f"{len(lost)} entries of the safetensors header describe codes and are left out with them"
            plan.notes.append(Note("K07", what, lost))
    plan.steps = ordered(plan.steps)
