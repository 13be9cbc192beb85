"""Find the stored tensors that a model's tensor should equal, whatever naming, root and fusion lie between them.

A tensor of the model pairs with one stored tensor, or with rows of several where the model fuses what files keep
apart: torchtitan's wqkv, the stacked experts of transformers 5. What no table here pairs, the map of `names` may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tensorkeep.conversion import hub_links
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.fit import Offer
from tensorkeep.conversion.model_names import AskNames, ModelNames, unknown
from tensorkeep.conversion.naming.rope import rope_rows
from tensorkeep.conversion.naming.table import Link, from_own
from tensorkeep.conversion.plan import HfTensor, Part, Step
from tensorkeep.conversion.planning import to_hf_tensors
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.models.buffers import transformers_roots
from tensorkeep.models.names import joined
from tensorkeep.models.tensors import Held


@dataclass
class StoredModel:
    """The tensors of one checkpoint, opened to be looked up by the names that a live model uses.

    Args:
        view: the opened checkpoint.
        identity: its naming, and its names without root and wrappers.
        hf_tensors: its tensors by hf name; empty where they cannot be told.
        config: the model's config; None for none.
        stored: stored name by clean name.
        computed: stored names of buffers that a model computes anew.
        used: stored names that a model has asked for so far.
        problem: why the hf names cannot be told; matters only where the model does not use the file's own names.
    """

    view: StateView
    identity: namings.Identity
    hf_tensors: dict[str, HfTensor]
    config: Mapping[str, Any] | None
    stored: dict[str, str] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    problem: TensorkeepError | None = None

    @classmethod
    def of(cls, view: StateView, config: Mapping[str, Any] | None) -> StoredModel:
        """Open a checkpoint's names; a naming that no table knows for this config keeps its own names.

        Args:
            view: the opened checkpoint.
            config: the model's config; None for none.
        """
        identity = namings.identify(view)
        dropped: list[Step] = []
        hf_tensors: dict[str, HfTensor] = {}
        problem = None
        try:
            hf_tensors = to_hf_tensors(view, 0, identity, config, dropped)
        except TensorkeepError as error:
            problem = error  # matters only where the model does not use the file's own names
        made = cls(view, identity, hf_tensors, config, problem=problem)
        made.stored = {short: name for name, short in identity.names.items()}
        made.computed = {p.name for s in dropped for p in s.parts if p.name not in identity.other}
        return made

    def direct(self, name: str) -> tuple[Part, ...] | None:
        """Return the stored tensor of this very name; None where there is none."""
        return (Part(0, self.stored[name]),) if name in self.stored else None

    def through_hf(self, name: str, table: Any) -> tuple[Part, ...] | None:
        """Return the parts of a tensor that the model names otherwise than the file, in the model's RoPE layout."""
        links = from_own(name, table, experts=self._experts(name)) if table is not None else None
        links = links or [Link(name, name)]
        if not all(link.hf in self.hf_tensors for link in links):
            return None
        parts: list[Part] = []
        pieces: list[hub_links.Piece] = []
        for link in links:
            made = hub_links.to_own(link, self.hf_tensors[link.hf], self.config, [self.view])
            if isinstance(made, hub_links.Piece):
                pieces.append(made)
            else:
                parts += made.parts
        if pieces:
            return hub_links.put_together({name: pieces}, [self.view])[name].parts
        return tuple(parts)

    def _experts(self, name: str) -> int:
        """Return how many experts a layer has, by the hf names."""
        numbers = [int(m.group(1)) for n in self.hf_tensors if (m := re.search(r"\.experts\.(\d+)\.", n))]
        return max(numbers, default=-1) + 1


# what a model fuses: its name -> the names that files use, `{e}` standing for an expert, in the order of their rows
_EXPERTS = (
    (
        re.compile(r"(?P<at>.+)\.(?P<moe>mlp|block_sparse_moe|feed_forward)\.experts\.gate_up_proj"),
        (
            ("{at}.{moe}.experts.{e}.gate_proj.weight", "{at}.{moe}.experts.{e}.up_proj.weight"),
            ("{at}.block_sparse_moe.experts.{e}.w1.weight", "{at}.block_sparse_moe.experts.{e}.w3.weight"),
        ),
    ),
    (
        re.compile(r"(?P<at>.+)\.(?P<moe>mlp|block_sparse_moe|feed_forward)\.experts\.down_proj"),
        (
            ("{at}.{moe}.experts.{e}.down_proj.weight",),
            ("{at}.block_sparse_moe.experts.{e}.w2.weight",),
        ),
    ),
)
_RENAMED = ((re.compile(r"(?P<at>.+)\.mlp\.gate\.weight"), "{at}.block_sparse_moe.gate.weight"),)


class CounterpartFinder:
    """Finds, for each tensor of one model, the rows of one checkpoint that it should equal.

    It tells once which root the model's names lose or gain, and which naming they follow.

    Args:
        model: the live model.
        tensors: its tensors, from `held`.
        source: the checkpoint.
        ask: who says what a transformers model's tensors are called in this file; where no table knows, it is asked
            once.
    """

    def __init__(self, model: nn.Module, tensors: list[Held], source: StoredModel, ask: AskNames = unknown) -> None:
        self.source, self.model, self._ask = source, model, ask
        self._names: list[ModelNames | None] = []  # once it was asked
        self.turned: set[str] = set()  # names of the model whose stored matrices have columns for rows
        names = [n for t in tensors for n in (t.name, *t.aliases)]
        known = [*source.stored, *source.hf_tensors]
        prefixes = ["", "model.", *(f"{p}." for p in [getattr(model, "base_model_prefix", "")] if p)]
        shapes = [(cut, add) for cut in prefixes for add in prefixes if not (cut and add)]
        best = max(shapes, key=lambda s: (len(set(known) & {_moved(n, *s) for n in names}), not any(s)))
        self.cut, self.add = best
        moved = [_moved(n, *best) for n in names]
        self.table = _table(moved, source)
        plain = sum(n in source.stored for n in moved)
        self.straight = plain >= sum(source.through_hf(n, self.table) is not None for n in moved)

    def parts(self, tensor: Held, name: str) -> tuple[Part, ...] | None:
        """Return the stored rows that a tensor should equal.

        Args:
            tensor: the model's tensor.
            name: one of its names.

        Returns:
            The parts in the order of the tensor's rows; None where the checkpoint has nothing of the kind.
        """
        moved = _moved(name, self.cut, self.add)
        found = self._one(moved) or self._fused(tensor, moved) or self._experts(tensor, moved)
        for pattern, other in _RENAMED:
            match = pattern.fullmatch(moved)
            found = found or (self._one(other.format(**match.groupdict())) if match else None)
        if found is None or self._turned(tensor, found):
            found = self._in_memory(tensor, name) or found
        self.source.used.update(p.name for p in found or ())
        return found

    def _one(self, name: str) -> tuple[Part, ...] | None:
        """Return the stored tensor of one name, directly or through hf names."""
        if self.straight:
            return self.source.direct(name)
        return self.source.through_hf(name, self.table)

    def _turned(self, tensor: Held, parts: tuple[Part, ...]) -> bool:
        """Whether a stack of matrices may be stored with rows for columns."""
        shape, stored = tuple(tensor.tensor.shape), self.source.view[parts[0].name].shape
        return len(shape) == 3 and len(parts) == 1 and shape != stored == (shape[0], shape[2], shape[1])

    def _in_memory(self, tensor: Held, name: str) -> tuple[Part, ...] | None:
        """Return the parts of a tensor that transformers renames or rearranges between the file and memory."""
        if not self._names:
            self._names.append(_names_of(self.model, self.source, self._ask))
        (names,) = self._names
        runs = names.runs(name) if names is not None and name in names.live and name not in names.odd else ()
        if not runs or any(r.name not in self.source.hf_tensors for r in runs):
            return None
        if runs[0].turned:
            self.turned.add(name)
            return self.source.hf_tensors[runs[0].name].parts
        shape = tuple(tensor.tensor.shape)
        try:
            return joined(name, shape, runs, self.source.hf_tensors, [self.source.view]).parts
        except TensorkeepError:
            return None  # other rows than these were loaded

    def _fused(self, tensor: Held, name: str) -> tuple[Part, ...] | None:
        """Return the parts of torchtitan's fused wqkv: for each group of heads its q rows, then k, then v."""
        head, _, leaf = name.rpartition(".")
        if not head.endswith(".wqkv"):
            return None
        found = [self._one(f"{head[:-4]}{w}.{leaf}") for w in ("wq", "wk", "wv")]
        q, k, v = (f[0] if f and len(f) == 1 and f[0].rows is None else None for f in found)
        if q is None or k is None or v is None:
            return None
        rows = [self.source.view[p.name].shape[0] for p in (q, k)]
        size = self._head(tensor, rows[1])
        if not size or rows[0] % rows[1] or rows[1] % size:
            return None
        per = rows[0] // rows[1] * size
        parts: list[Part] = []
        for group in range(rows[1] // size):
            at = (group * size, (group + 1) * size)
            parts += [q._replace(rows=(group * per, (group + 1) * per)), k._replace(rows=at), v._replace(rows=at)]
        return tuple(parts)

    def _head(self, tensor: Held, rows: int) -> int:
        """Return the rows of a head, as the module around the weight or else the config says; 0 where neither does."""
        around = next((m for m in self.model.modules() if any(c is tensor.module for c in m.children())), None)
        own = getattr(around, "head_dim", None)
        if isinstance(own, int) and own > 0:
            return own
        try:
            return rope_rows(self.source.config, "pairs", "wqkv", (rows,)).block
        except TensorkeepError:
            return 0

    def _experts(self, tensor: Held, name: str) -> tuple[Part, ...] | None:
        """Return the parts of stacked experts (transformers 5), which files keep apart."""
        for pattern, layouts in _EXPERTS:
            match = pattern.fullmatch(name)
            if match is None or tensor.tensor.ndim != 3:
                continue
            for layout in layouts:
                names = [
                    text.format(e=e, **match.groupdict()) for e in range(tensor.tensor.shape[0]) for text in layout
                ]
                found = [self._one(n) for n in names]
                if all(found):
                    return tuple(p for f in found if f for p in f)
        return None


def _names_of(model: nn.Module, source: StoredModel, ask: AskNames) -> ModelNames | None:
    """Return what a transformers model calls the tensors of a checkpoint; None for another model."""
    found: tuple[str, Any] | None = next(transformers_roots(model), None)
    path, root = found or ("", None)
    if root is None or path:
        return None
    kind = next(k.__name__ for k in type(root).__mro__ if k.__module__.startswith("transformers."))
    config = {k: v for k, v in root.config.to_dict().items() if k != "quantization_config"}
    offers = {n: Offer(t.dtype, tuple(t.shape)) for n, t in source.hf_tensors.items()}
    return ask({**config, "architectures": [kind]}, offers)


def _moved(name: str, cut: str, add: str) -> str:
    """Return a name with a prefix cut off or put in front."""
    return add + (name[len(cut) :] if cut and name.startswith(cut) else name)


def _table(names: list[str], source: StoredModel) -> Any:
    """Return the table of the naming that the model's own names follow; None for hf's and for those nobody knows."""
    for word in namings.NAMINGS:
        scheme = namings.module(word)
        if hasattr(scheme, "family") and sum(scheme.recognise(n) for n in names) * 2 > len(names):
            try:
                return namings.rows(word, names, dict(source.config) if source.config else None)
            except TensorkeepError:
                return None
    return None
