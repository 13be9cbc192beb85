"""What a live model holds, and which bytes of a checkpoint each of its tensors should equal.

Names lose the wrappers of DDP, torch.compile, activation checkpointing and PEFT. A tensor of the model pairs with one
stored tensor, or with rows of several where the model fuses what files keep apart (torchtitan's wqkv, the stacked
experts of transformers 5). A sharded tensor (DTensor) pairs with its own rectangle only: nothing is gathered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep import naming as namings
from tensorkeep.errors import TensorkeepError
from tensorkeep.names import unwrap
from tensorkeep.naming.table import from_own
from tensorkeep.plan import Hub, Part, Step
from tensorkeep.planning import to_hub
from tensorkeep.record import DTYPES, nbytes
from tensorkeep.rope import rope_rows
from tensorkeep.streams import pieces
from tensorkeep.view import StateView


class Held(NamedTuple):
    """One tensor of a model: its clean name, where it hangs, the tensor, and the clean names of the same tensor."""

    name: str
    module: nn.Module
    tensor: Tensor
    aliases: tuple[str, ...] = ()


def clean(name: str) -> str:
    """A parameter's name without wrappers, and without the segment that PEFT puts before a wrapped layer's own.

    >>> clean("base_model.model.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    """
    return ".".join(s for s in unwrap(name)[0].split(".") if s != "base_layer")


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """Every tensor slot as (raw name, module, key, tensor, stored): stored tells a state_dict would have it."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{key}" if path else key, module, key, tensor, key not in module._non_persistent_buffers_set


def held(model: nn.Module) -> list[Held]:
    """Parameters and persistent buffers, each once; a tied tensor lists its other names."""
    found: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for raw, module, _, tensor, stored in slots(model):
        if stored:
            found.setdefault(id(tensor), []).append((clean(raw), module, tensor))
    out = []
    for same in found.values():
        names = list(dict.fromkeys(name for name, _, _ in same))
        out.append(Held(names[0], same[0][1], same[0][2], tuple(names[1:])))
    return out


@dataclass
class Source:
    """A checkpoint as a model would ask it: stored names by clean name, hf tensors, and which of either were asked for."""

    view: StateView
    identity: namings.Identity
    hubs: dict[str, Hub]
    config: Mapping[str, Any] | None
    stored: dict[str, str] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    problem: TensorkeepError | None = None

    @classmethod
    def of(cls, view: StateView, config: Mapping[str, Any] | None) -> Source:
        """Names of a view; a naming that no table knows for this config keeps its own names."""
        identity = namings.identify(view)
        dropped: list[Step] = []
        hubs: dict[str, Hub] = {}
        problem = None
        try:
            hubs = to_hub(view, 0, identity, config, dropped)
        except TensorkeepError as error:
            problem = error  # matters only where the model does not use the file's own names
        made = cls(view, identity, hubs, config, problem=problem)
        made.stored = {short: name for name, short in identity.names.items()}
        made.computed = {p.name for s in dropped for p in s.parts if p.name not in identity.other}
        return made

    def direct(self, name: str) -> tuple[Part, ...] | None:
        """The stored tensor of this very name."""
        return (Part(0, self.stored[name]),) if name in self.stored else None

    def through_hf(self, name: str, table: Any, rope: bool) -> tuple[Part, ...] | None:
        """The parts of a tensor named by another naming than the file's, in that naming's layout."""
        links = from_own(name, table, experts=self._experts(name)) if table is not None else None
        wanted = [(link.hf, link.rope) for link in links] if links else [(name, False)]
        if not all(hf in self.hubs for hf, _ in wanted):
            return None
        parts: list[Part] = []
        for hf, turned in wanted:
            hub = self.hubs[hf]
            rows = rope_rows(self.config, "pairs", hf, hub.shape) if turned and rope else None
            parts += [p.permuted(rows) if rows else p for p in hub.parts]
        return tuple(parts)

    def _experts(self, name: str) -> int:
        numbers = [int(m.group(1)) for n in self.hubs if (m := re.search(r"\.experts\.(\d+)\.", n))]
        return max(numbers, default=-1) + 1


# what a model fuses: its name -> the names that files use, `{e}` standing for an expert, in the order of their rows
EXPERTS = (
    (re.compile(r"(?P<at>.+)\.(?P<moe>mlp|block_sparse_moe|feed_forward)\.experts\.gate_up_proj"), (
        ("{at}.{moe}.experts.{e}.gate_proj.weight", "{at}.{moe}.experts.{e}.up_proj.weight"),
        ("{at}.block_sparse_moe.experts.{e}.w1.weight", "{at}.block_sparse_moe.experts.{e}.w3.weight"),
    )),
    (re.compile(r"(?P<at>.+)\.(?P<moe>mlp|block_sparse_moe|feed_forward)\.experts\.down_proj"), (
        ("{at}.{moe}.experts.{e}.down_proj.weight",),
        ("{at}.block_sparse_moe.experts.{e}.w2.weight",),
    )),
)  # fmt: skip
RENAMED = ((re.compile(r"(?P<at>.+)\.mlp\.gate\.weight"), "{at}.block_sparse_moe.gate.weight"),)


Renamed = Callable[[nn.Module, str, Tensor], "str | None"]  # a framework's own name for a tensor in files


class Asker:
    """How one model asks one file: which root its names lose or gain, and through which naming they lead."""

    def __init__(self, model: nn.Module, tensors: list[Held], source: Source, renamed: Renamed | None = None) -> None:
        self.source, self.renamed, self.model = source, renamed, model
        names = [n for t in tensors for n in (t.name, *t.aliases)]
        known = [*source.stored, *source.hubs]
        prefixes = ["", "model.", *(f"{p}." for p in [getattr(model, "base_model_prefix", "")] if p)]
        shapes = [(cut, add) for cut in prefixes for add in prefixes if not (cut and add)]
        best = max(shapes, key=lambda s: (len(set(known) & {_moved(n, *s) for n in names}), not any(s)))
        self.cut, self.add = best
        moved = [_moved(n, *best) for n in names]
        self.table, self.rope = _table(moved, source)
        plain = sum(n in source.stored for n in moved)
        self.straight = plain >= sum(source.through_hf(n, self.table, self.rope) is not None for n in moved)

    def parts(self, tensor: Held, name: str) -> tuple[Part, ...] | None:
        """What `tensor`, under one of its names, should be made of; None where the file has nothing of the kind."""
        moved = _moved(name, self.cut, self.add)
        found = self._one(moved) or self._fused(tensor, moved) or self._experts(tensor, moved)
        for pattern, other in RENAMED:
            match = pattern.fullmatch(moved)
            found = found or (self._one(other.format(**match.groupdict())) if match else None)
        if found is None and self.renamed is not None:
            other_name = self.renamed(self.model, name, tensor.tensor)
            found = self._one(_moved(other_name, self.cut, self.add)) or self._one(other_name) if other_name else None
        self.source.used.update(p.name for p in found or ())
        return found

    def _one(self, name: str) -> tuple[Part, ...] | None:
        if self.straight:
            return self.source.direct(name)
        return self.source.through_hf(name, self.table, self.rope)

    def _fused(self, tensor: Held, name: str) -> tuple[Part, ...] | None:
        """torchtitan's fused wqkv: for each group of heads its q rows, then k, then v; files keep wq, wk, wv."""
        head, _, leaf = name.rpartition(".")
        if not head.endswith(".wqkv"):
            return None
        found = [self._one(f"{head[:-4]}{w}.{leaf}") for w in ("wq", "wk", "wv")]
        q, k, v = (f[0] if f and len(f) == 1 and f[0].rows is None else None for f in found)
        if q is None or k is None or v is None:
            return None
        rows = [self.source.view[p.name].shape[0] for p in (q, k)]
        size = self._head(rows[1])
        if not size or rows[0] % rows[1] or rows[1] % size:
            return None
        per = rows[0] // rows[1] * size
        parts: list[Part] = []
        for group in range(rows[1] // size):
            at = (group * size, (group + 1) * size)
            parts += [q._replace(rows=(group * per, (group + 1) * per)), k._replace(rows=at), v._replace(rows=at)]
        return tuple(parts)

    def _head(self, rows: int) -> int:
        try:
            return rope_rows(self.source.config, "pairs", "wqkv", (rows,)).block
        except TensorkeepError:
            return 0

    def _experts(self, tensor: Held, name: str) -> tuple[Part, ...] | None:
        """transformers 5 stacks the experts that files keep apart."""
        for pattern, layouts in EXPERTS:
            match = pattern.fullmatch(name)
            if match is None or tensor.tensor.ndim != 3:
                continue
            for layout in layouts:
                names = [text.format(e=e, **match.groupdict()) for e in range(tensor.tensor.shape[0]) for text in layout]
                found = [self._one(n) for n in names]
                if all(found):
                    return tuple(p for f in found if f for p in f)
        return None


def _moved(name: str, cut: str, add: str) -> str:
    return add + (name[len(cut) :] if cut and name.startswith(cut) else name)


def _table(names: list[str], source: Source) -> tuple[Any, bool]:
    """The table of the naming that the model's own names follow, and whether its q/k rows are interleaved."""
    for word in ("torchtitan", "torchtitan-0.2"):
        scheme = namings.module(word)
        if sum(scheme.recognise(n) for n in names) * 2 > len(names):
            try:
                family = scheme.family(names, dict(source.config) if source.config else None)
            except TensorkeepError:
                return None, False
            return scheme.FAMILIES[family], family == "llama3"
    return None, False


# -- data -----------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This process's rectangle of a tensor and where it lies in the whole; the whole tensor where it is not sharded."""
    if hasattr(tensor, "to_local"):
        chunk = tensor.__create_chunk_list__()[0]  # type: ignore[attr-defined]
        return tensor.to_local(), tuple(chunk.offsets)
    return tensor, (0,) * tensor.ndim


def expected(parts: tuple[Part, ...], view: StateView, shape: tuple[int, ...], rows: tuple[int, int]) -> Tensor | None:
    """Rows of the tensor that `parts` make up, `shape` being the whole; None where the sizes do not fit.

    Returns a tensor of the stored dtype, (rows[1] - rows[0], *shape[1:]).
    """
    dtype = view[parts[0].name].dtype
    spelled = DTYPES[dtype].torch
    sizes = [part_bytes(p, view) for p in parts]
    if spelled is None or not hasattr(torch, spelled) or sum(sizes) != nbytes(dtype, shape):
        return None
    row = nbytes(dtype, shape[1:]) if shape else sizes[0]
    first, last = (rows[0] * row, rows[1] * row) if shape else (0, row)
    out, at = bytearray(), 0
    for part, size in zip(parts, sizes):
        low, high = max(first - at, 0), min(last - at, size)
        if low < high:
            out += _cut(part, view, low, high)
        at += size
    whole = (rows[1] - rows[0], *shape[1:]) if shape else shape
    if not out:
        return torch.empty(whole, dtype=getattr(torch, spelled))
    return torch.frombuffer(out, dtype=getattr(torch, spelled)).reshape(whole)


def part_bytes(part: Part, view: StateView) -> int:
    record = view[part.name]
    if part.rows is None or not record.shape:
        return record.nbytes
    return nbytes(record.dtype, (part.rows[1] - part.rows[0], *record.shape[1:]))


def _cut(part: Part, view: StateView, low: int, high: int) -> bytearray:
    """Bytes of a part from `low` to `high`; whole rows are asked for by number, so that a shard reads its own alone."""
    record = view[part.name]
    row = nbytes(record.dtype, record.shape[1:]) if record.shape else 0
    if row and not part.permutes and low % row == 0 and high % row == 0:
        start = part.rows[0] if part.rows else 0
        part, low, high = part._replace(rows=(start + low // row, start + high // row)), 0, high - low
    out, at = bytearray(), 0
    for piece in pieces(part, view):
        out += piece[max(low - at, 0) : max(high - at, 0)]
        at += len(piece)
    return out
