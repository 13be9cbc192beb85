"""A checkpoint under the names that its model has in memory, made of its stored rows while they are read.

Nothing is held: what transformers' loader would rename, stack or split is streamed from the stored tensors, quantized
ones as floats, or as the codes that they are where the model can hold those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.dequantizing import decoded
from tensorkeep.conversion.plan import HfTensor, Step
from tensorkeep.conversion.planning import to_hf_tensors
from tensorkeep.conversion.rows import Run, row_count, taken
from tensorkeep.conversion.streams import pieces
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import STREAM_BYTES, StateView
from tensorkeep.formats.whole_config import complete
from tensorkeep.models.names import model_names, to_live
from tensorkeep.quantization.description import QuantizedWeight
from tensorkeep.quantization.stored import find_quantized
from tensorkeep.storage.record import TensorRecord

Keep = Callable[[str, QuantizedWeight], bool]


@dataclass(eq=False)
class LiveView(StateView):
    """A checkpoint by the names of its model in memory.

    Attributes:
        floats: the checkpoint with its quantized weights as floats.
        stored: the checkpoint as it is.
        made: live name -> the stored rows, of `floats`, that it is made of.
        codes: live name of a tensor of a weight that stays quantized -> its name in `stored`.
        kept: live name of each weight that stays quantized -> its description; of a stack of experts there is one for
            each piece that an expert's matrix has in the file, NAME.EXPERT.PIECE.weight.
    """

    floats: StateView | None = None
    stored: StateView | None = None
    made: dict[str, HfTensor] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    kept: dict[str, QuantizedWeight] = field(default_factory=dict)

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces, as `StateView.stream` does; pieces end where stored ones do."""
        assert self.floats is not None and self.stored is not None
        if name in self.codes:
            yield from self.stored.stream(self.codes[name], rows, granule, chunk)
            return
        tensor = self.made[name]
        parts = tensor.parts
        if rows is not None and rows != (0, tensor.shape[0]):
            deep = row_count(tensor.shape) // tensor.shape[0]
            parts = taken(Run(name, (rows[0] * deep, rows[1] * deep)), tensor, [self.floats])
        for part in parts:
            yield from pieces(part, self.floats)


def in_its_names(view: StateView, keep: Keep = lambda name, weight: False) -> LiveView:
    """Return a checkpoint under the names that its model has in memory; only headers and states are read.

    Args:
        view: an hf checkpoint with its config, quantized or not.
        keep: says by live name and description whether a weight's codes stay; other weights are float32 values.

    Returns:
        The view. Its config and companions say nothing of quantization.

    Raises:
        TensorkeepError: Q01 or Q06 for a weight that cannot be dequantized, K02 where the model has no place for a
            tensor, K06 where transformers rearranges tensors in a way that is not one of rows.
    """
    floats = decoded(view, "F32")
    config = complete(floats.config or {}, floats.companions)
    dropped: list[Step] = []
    tensors = to_hf_tensors(floats, 0, namings.identify(floats), config, dropped)
    found = to_live(config, tensors, [floats])
    odd = [n for n in found.unexpected if not model_names(config).ignores(n)]
    if odd:
        what = f"{config.get('model_type')} has no place for {', '.join(grouped(odd)[:4])} ({len(odd)} tensors)"
        raise TensorkeepError(what, where=view.path, code="K02", hint="tensorkeep diagnose names what does not fit")
    weights = {w.stands_for: w for w in find_quantized(view).values()}
    out = LiveView(view.path, view.format, view.folder, {}, config, floats.companions, computed=True)
    out.floats, out.stored, out.notes = floats, view, list(view.notes)
    for name, tensor in found.tensors.items():
        if tensor.tied_to is not None:
            continue
        experts = _experts(tensor, weights, floats)
        if experts and all(keep(name, w) for own in experts for w in own):
            for at, own in enumerate(experts):
                for piece, weight in enumerate(own):
                    _add(out, view, f"{name}.{at}.{piece}.weight", weight)
            continue
        part = tensor.parts[0]
        whole = len(tensor.parts) == 1 and (part.rows, part.inner, part.permutes) == (None, None, ())
        single = weights.get(part.name) if whole else None
        if single is not None and keep(name, single):
            _add(out, view, name, single)
            continue
        out.made[name] = tensor
        out.records[name] = TensorRecord(name, tensor.dtype, tuple(tensor.shape), ())
    return out


def _add(out: LiveView, view: StateView, name: str, weight: QuantizedWeight) -> None:
    """Add the tensors of a weight that stays quantized, under a live name."""
    out.kept[name] = weight
    digest = f"{weight.name}_digest"
    for stored in [*weight.stored, *([digest] if digest in view else [])]:
        own = stored.startswith(weight.name)  # `SCB` lies beside the weight, not under it
        end = stored.removeprefix(weight.name if own else weight.name.removesuffix("weight"))
        beside = (name if own else name.removesuffix("weight")) + end
        out.codes[beside] = stored
        out.records[beside] = replace(view[stored], name=beside)


def _experts(
    tensor: HfTensor, weights: Mapping[str, QuantizedWeight], floats: StateView
) -> list[list[QuantizedWeight]]:
    """Return the weights that each matrix of a stack is made of, whole and in order; nothing where it is otherwise."""
    if len(tensor.shape) != 3 or len(tensor.parts) < 2:
        return []
    out: list[list[QuantizedWeight]] = []
    rows = 0
    for part in tensor.parts:
        shape = floats[part.name].shape
        if part.name not in weights or (part.rows, part.inner, part.permutes) != (None, None, ()):
            return []
        if rows % tensor.shape[1] == 0:
            out.append([])
        rows += shape[0]
        out[-1].append(weights[part.name])
        block = weights[part.name].block
        cut = isinstance(block, int) and math.prod(shape) % block and rows % tensor.shape[1]
        if shape[1:] != tensor.shape[2:] or rows > len(out) * tensor.shape[1] or cut:
            return []
    return out if rows == tensor.shape[0] * tensor.shape[1] else []
