"""The case that checks look at: a checkpoint, an optional reference, their configs, and who has explained what.

Both sides are under hf names and in hf layout. `survey` compares them once, by bytes, in threads; everything dearer
is computed when a check asks for it and only for tensors that differ. A check that explains a tensor claims it, and
later checks see what is left: that is how causes absorb the findings they explain.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tensorkeep.conversion.adapters import Half
from tensorkeep.conversion.naming import Identity, hf
from tensorkeep.conversion.plan import HfTensor, Step
from tensorkeep.diagnosis import comparison
from tensorkeep.diagnosis.evidence.survey import SAME, Sight, size_of
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.storage.record import DTYPES

Array = np.ndarray[Any, Any]
Target = Literal["hf", "flame", "torchtitan"]
Progress = Callable[[str, int, int], None]
CACHE = 128 << 20  # bytes of tensors kept between checks; one larger pair is held while it is looked at


@dataclass
class Case:
    """One diagnosis at work. `tensors` and `reference_tensors` are by hf name; empty where a side is unreadable."""

    path: str
    view: StateView | None = None
    reference: StateView | None = None
    target: Target | None = None
    identity: Identity | None = None
    reference_identity: Identity | None = None
    tensors: dict[str, HfTensor] = field(default_factory=dict)
    reference_tensors: dict[str, HfTensor] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    reference_config: dict[str, Any] | None = None
    read_error: TensorkeepError | None = None
    left_out: list[Step] = field(default_factory=list)  # stored tensors that are no part of the model, with reasons
    reference_left_out: list[Step] = field(default_factory=list)
    tied: frozenset[str] = frozenset()  # heads that stand for an embedding on the side that leaves them out
    packed: frozenset[str] = frozenset()  # hf names that are codes, scales or the weight of a quantized tensor
    adapter: dict[str, Half] = field(default_factory=dict)  # stored name -> half of a low-rank pair
    prefix: tuple[str, str] | None = None  # ("extra" or "lost", prefix): what the names differ by as a whole
    sights: dict[str, Sight] = field(default_factory=dict)  # hf name -> what the survey saw
    broken: dict[str, TensorkeepError] = field(default_factory=dict)  # hf name -> why its data cannot be read
    claims: dict[str, str] = field(default_factory=dict)  # hf name -> code that explains it
    orders: dict[str, Any] = field(default_factory=dict)  # what checks found out, for later checks and for repair
    forward: Any = None  # what a forward pass showed (forward.Forward), where one was asked for
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: OrderedDict[tuple[int, str], Array] = OrderedDict()
        self._held = 0  # bytes of them
        self._differences: dict[str, comparison.Difference] = {}

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def views(self) -> tuple[StateView, StateView]:
        """Checkpoint and reference, as the parts of hubs number them; the checkpoint twice where there is no reference."""
        assert self.view is not None
        return self.view, self.reference or self.view

    @property
    def model_config(self) -> dict[str, Any] | None:
        """The config that describes the model: the checkpoint's own, or else the reference's."""
        return self.config if self.config is not None else self.reference_config

    @property
    def compared(self) -> bool:
        """Whether two models stand side by side (not an adapter, not a file without model tensors)."""
        return self.reference is not None and bool(self.tensors) and bool(self.reference_tensors)

    def stored(self, name: str) -> str:
        """The name under which the checkpoint stores (the first part of) an hf tensor; the name itself where it has none."""
        hub = self.tensors.get(name) or self.reference_tensors.get(name)
        return hub.parts[0].name if hub is not None and name in self.tensors else name

    def told(self, code: str) -> Iterator[Finding]:
        """What reading already said with this code: the error that stopped it, tensors whose data is broken, notes."""
        error = self.read_error
        if error is not None and error.code == code:
            yield Finding(code, "error", said(error), error.tensors, fix=error.hint)
        broken = {n: e for n, e in self.broken.items() if e.code == code}
        if broken:
            first = next(iter(broken.values()))
            self.claim(broken, code)
            yield Finding(code, "error", said(first), sorted(broken), {"count": len(broken)}, fix=first.hint)
        for note in self.view.notes if self.view is not None else ():
            if note.code == code:
                yield Finding(code, "warning", note.message, note.names)

    # -- values --------------------------------------------------------------------------------------------------------

    def values(self, name: str) -> Array:
        """A tensor of the checkpoint in hf layout and stored dtype."""
        return self._array(0, name)

    def reference_values(self, name: str) -> Array:
        """A tensor of the reference in hf layout and stored dtype."""
        return self._array(1, name)

    def _array(self, side: int, name: str) -> Array:
        with self._lock:
            if (side, name) in self._arrays:
                self._arrays.move_to_end((side, name))
                return self._arrays[side, name]
        hub = (self.reference_tensors if side else self.tensors)[name]
        data, at = np.empty(size_of(hub), np.uint8), 0
        for piece in comparison.hub_bytes(hub, self.views):
            data[at : at + len(piece)] = piece
            at += len(piece)
        made = data.view(np_dtype(hub.dtype)).reshape(hub.shape)
        with self._lock:
            self._held += made.nbytes if (side, name) not in self._arrays else 0
            self._arrays[side, name] = made
            while len(self._arrays) > 2 and self._held > CACHE:
                self._held -= self._arrays.popitem(last=False)[1].nbytes
        return made

    def pair(self, name: str, other: str | None = None) -> tuple[Array, Array]:
        """The checkpoint's `name` and the reference's `other` (the same name), both in the narrower dtype of the two.

        A cast thus hides no permutation: what was permuted and then rounded equals the rounded reference, permuted.
        """
        mine, theirs = self.values(name), self.reference_values(other or name)
        if mine.dtype == theirs.dtype:
            return mine, theirs
        with np.errstate(over="ignore", invalid="ignore"):
            if self.narrower(name, other or name) == self.tensors[name].dtype:
                return mine, theirs.astype(mine.dtype)
            return mine.astype(theirs.dtype), theirs

    def narrower(self, name: str, other: str) -> str:
        mine, theirs = self.tensors[name].dtype, self.reference_tensors[other].dtype
        return mine if DTYPES[mine].bits <= DTYPES[theirs].bits else theirs

    def difference(self, name: str) -> comparison.Difference:
        """How a tensor differs from the reference's of its name, in exact numbers."""
        if name not in self._differences:
            pairing = comparison.Pairing(self.views, self._identities(), (self.tensors, self.reference_tensors))
            self._differences[name] = comparison.difference(name, pairing)
        return self._differences[name]

    def _identities(self) -> tuple[Identity, Identity]:
        assert self.identity is not None and self.reference_identity is not None
        return self.identity, self.reference_identity

    # -- what is left to explain ---------------------------------------------------------------------------------------

    def shared(self) -> list[str]:
        """Names on both sides whose values can be compared, in the reference's order."""
        if not self.compared:
            return []
        return [
            n for n in self.reference_tensors if n in self.tensors and n not in self.packed and n not in self.broken
        ]

    def differing(self, floating: bool = True) -> list[str]:
        """Tensors of equal shape whose values differ from the reference and which nothing has explained yet."""
        return [
            n
            for n in self.shared()
            if n not in self.claims
            and n in self.sights
            and self.sights[n].status not in (*SAME, "shape")
            and np_dtype_known(self.tensors[n].dtype)
            and np_dtype_known(self.reference_tensors[n].dtype)
            and (not floating or DTYPES[self.tensors[n].dtype].floating)
        ]

    def claim(self, names: Iterable[str], code: str) -> None:
        """Say that `code` explains these tensors (or config fields, as `config:FIELD`); the first claim stays."""
        for name in names:
            self.claims.setdefault(name, code)

    def tie(self) -> bool | None:
        """Whether the model's config ties head and embedding; None where nothing says."""
        config = self.model_config
        return hf.tied(dict(config)) if config is not None else None


def said(error: TensorkeepError) -> str:
    """The message of an error without its code, which the finding carries."""
    return error.line.removeprefix(f"{error.code} ")


def np_dtype_known(dtype: str) -> bool:
    """Whether values of this dtype can be computed with (packed 4- and 6-bit types can only be copied)."""
    return DTYPES[dtype].numpy is not None


__all__ = ["Array", "Case", "Target", "np_dtype", "np_dtype_known", "said"]
