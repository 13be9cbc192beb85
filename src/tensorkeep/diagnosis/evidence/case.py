"""The case that the checks look at: a checkpoint, perhaps a reference, their configs, and what was found so far.

Both sides are under Hugging Face names and in Hugging Face layout. `survey` compares them once, by bytes; anything
slower is computed when a check asks for it, and only for tensors that differ. A check that explains a tensor claims
it, and later checks see only what is left: so one fault gives one cause and not one finding for each check.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.adapters import Half
from tensorkeep.conversion.model_names import ModelNames
from tensorkeep.conversion.naming import Identity, hf
from tensorkeep.conversion.plan import HfTensor, Step
from tensorkeep.diagnosis.evidence.bytewise import SAME, Comparison, hf_bytes, size_of
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.findings import Finding
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.table import written_again
from tensorkeep.formats.view import StateView
from tensorkeep.formats.whole_config import complete
from tensorkeep.models.names import known
from tensorkeep.storage.files import Progress
from tensorkeep.storage.record import DTYPES

Array = np.ndarray[Any, Any]
Target = str  # a program that loads checkpoints, as `namings.loaders` lists them
CACHE = 128 << 20  # bytes of tensors kept between checks; one larger pair is held while it is looked at


@dataclass
class Case:
    """One diagnosis at work.

    `tensors` and `reference_tensors` are by Hugging Face name, and empty where that side could not be read.
    """

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
    read_error: TensorkeepError | None = None  # why the checkpoint could not be read, or not to its end
    left_out: list[Step] = field(default_factory=list)  # stored tensors that are no part of the model, with reasons
    reference_left_out: list[Step] = field(default_factory=list)
    tied: frozenset[str] = frozenset()  # heads that stand for an embedding on the side that leaves them out
    packed: frozenset[str] = frozenset()  # names of quantized weights and of the tensors that describe them
    adapter: dict[str, Half] = field(default_factory=dict)  # stored name -> half of a low-rank pair
    prefix: tuple[str, str] | None = None  # ("extra" or "lost", prefix) that all names have too much, or lack
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # name -> how it compares with the reference's
    broken: dict[str, TensorkeepError] = field(default_factory=dict)  # name -> why its data cannot be read
    claims: dict[str, str] = field(default_factory=dict)  # name (or config:FIELD) -> code of the check that explains it
    results: dict[str, Any] = field(default_factory=dict)  # what a check worked out, for later checks and for repair
    forward: Any = None  # what a forward pass showed (live.forward.Forward), where one was asked for
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: OrderedDict[tuple[int, str], Array] = OrderedDict()
        self._held = 0  # bytes of them
        self._names: tuple[ModelNames | None] | None = None  # empty until it was asked for

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def views(self) -> tuple[StateView, StateView]:
        """Checkpoint and reference, in the order of `Part.source`; the checkpoint twice where there is no reference."""
        assert self.view is not None
        return self.view, self.reference or self.view

    @property
    def model_config(self) -> dict[str, Any] | None:
        """The config that describes the model: the checkpoint's own, or else the reference's."""
        return self.config if self.config is not None else self.reference_config

    @property
    def two_models(self) -> bool:
        """Whether both sides hold a model: not an adapter alone, not a file without model tensors."""
        return self.reference is not None and bool(self.tensors) and bool(self.reference_tensors)

    def config_ties(self) -> bool | None:
        """Say whether the model's config ties head and embedding; None where nothing says."""
        config = self.model_config
        if config is None:
            return None
        return bool(self.names.tied) if self._asks() and self.names is not None else hf.tied(dict(config))

    def _asks(self) -> bool:
        """Whether nothing but transformers tells what embedding and head are called: they have not Llama's names."""
        named = hf.EMBEDDING in self.tensors or hf.EMBEDDING in self.reference_tensors
        return not named and bool(self.tensors) and self.model_config is not None

    @property
    def names(self) -> ModelNames | None:
        """What transformers says of the model; None where it does not know it, or is not installed.

        It is asked once, and only where no table here says as much.
        """
        if self._names is None:
            views = [v for v in (self.view, self.reference) if v is not None]
            stored = max((sum(r.nbytes for r in v.records.values()) for v in views), default=None)
            renamed = self.identity is not None and namings.renames(self.identity.naming)
            config = complete(self.model_config or {}, (c for v in views for c in v.companions))
            self._names = (None if renamed else known(config, stored),)
        return self._names[0]

    @property
    def ties(self) -> dict[str, str]:
        """The names that share another's tensor by the config, so that a file need not hold them."""
        if self._asks() and self.names is not None:
            return self.names.tied
        return {hf.HEAD: hf.EMBEDDING} if self.config_ties() else {}

    @property
    def embedding(self) -> str:
        """The name of the input embedding; of two (T5Gemma's encoder's, decoder's) the one that the head is tied to."""
        found = self.names.in_file(f"{self.names.embedding}.weight") if self._asks() and self.names else None
        return (self.names.tied.get(self.head) if found and self.names else None) or found or hf.EMBEDDING

    @property
    def head(self) -> str:
        """The name of the output head."""
        found = self.names.in_file(f"{self.names.head}.weight") if self._asks() and self.names else None
        return found or hf.HEAD

    def stored(self, name: str) -> str:
        """Return the name under which the checkpoint stores (the first part of) a tensor; `name` itself where none."""
        return self.tensors[name].parts[0].name if name in self.tensors else name

    def from_reading(self, code: str) -> Iterator[Finding]:
        """Yield what reading showed under `code`: the error that stopped it, tensors with broken data, notes."""
        error = self.read_error
        if error is not None and error.code == code:
            yield Finding(code, "error", message_of(error), error.tensors, fix=error.hint)
        broken = {n: e for n, e in self.broken.items() if e.code == code}
        if broken:
            first = next(iter(broken.values()))
            self.claim(broken, code)
            yield Finding(code, "error", message_of(first), sorted(broken), {"count": len(broken)}, fix=first.hint)
        for note in self.view.notes if self.view is not None else ():
            if note.code == code:
                yield Finding(code, "warning", note.message, note.names)

    # -- commands that a finding can offer as its fix ----------------------------------------------------------------

    def repair_command(self, take: Iterable[str] = ()) -> str | None:
        """Return the `tensorkeep repair` line for this case; None without a reference to repair from.

        Args:
            take: Tensors or files that only the reference has any more: the line asks for them by name.
        """
        if self.reference is None:
            return None
        asked = "".join(f" --take-from-reference {word(p)}" for p in patterns_for(take))
        return f"tensorkeep repair {word(self.path)} OUT --reference {word(self.reference.path)}{asked}"

    def convert_command(self) -> str:
        """Return the `tensorkeep convert` line that writes this checkpoint again, in its own format where possible."""
        form = written_again(self.view.format) if self.view is not None else "hf"
        return f"tensorkeep convert {word(self.path)} OUT --to {form}"

    # -- values --------------------------------------------------------------------------------------------------------

    def values(self, name: str) -> Array:
        """Return a tensor of the checkpoint in Hugging Face layout and its stored dtype."""
        return self._array(0, name)

    def reference_values(self, name: str) -> Array:
        """Return a tensor of the reference in Hugging Face layout and its stored dtype."""
        return self._array(1, name)

    def _array(self, side: int, name: str) -> Array:
        """Read a tensor of one side (0: checkpoint, 1: reference), or take it from the cache."""
        with self._lock:
            if (side, name) in self._arrays:
                self._arrays.move_to_end((side, name))
                return self._arrays[side, name]
        hub = (self.reference_tensors if side else self.tensors)[name]
        data, at = np.empty(size_of(hub), np.uint8), 0
        for piece in hf_bytes(hub, self.views):
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
        """Return a tensor of the checkpoint and one of the reference, both in the narrower dtype of the two.

        A cast thus hides no permutation: what was permuted and then rounded equals the rounded reference, permuted.

        Args:
            name: The checkpoint's tensor.
            other: The reference's; of the same name by default.
        """
        mine, theirs = self.values(name), self.reference_values(other or name)
        if mine.dtype == theirs.dtype:
            return mine, theirs
        with np.errstate(over="ignore", invalid="ignore"):
            if self.narrower(name, other or name) == self.tensors[name].dtype:
                return mine, theirs.astype(mine.dtype)
            return mine.astype(theirs.dtype), theirs

    def own_pair(self, name: str) -> tuple[Array, Array]:
        """Return a tensor of the checkpoint as stored, and the reference's of that name in the checkpoint's dtype.

        What was trained in a wider dtype than the reference's is seen so: in the narrower one it may round away.
        """
        mine, theirs = self.values(name), self.reference_values(name)
        with np.errstate(over="ignore", invalid="ignore"):
            return mine, theirs if mine.dtype == theirs.dtype else theirs.astype(mine.dtype)

    def narrower(self, name: str, other: str) -> str:
        """Return the dtype with fewer bits of the checkpoint's `name` and the reference's `other`."""
        mine, theirs = self.tensors[name].dtype, self.reference_tensors[other].dtype
        return mine if DTYPES[mine].bits <= DTYPES[theirs].bits else theirs

    # -- what is left to explain ---------------------------------------------------------------------------------------

    def shared(self) -> list[str]:
        """Return the names on both sides whose values can be compared, in the reference's order."""
        if not self.two_models:
            return []
        return [
            n for n in self.reference_tensors if n in self.tensors and n not in self.packed and n not in self.broken
        ]

    def changed(self, name: str) -> bool:
        """Say whether a tensor was compared, has the reference's shape, and differs in values beyond a cast."""
        return name in self.comparisons and self.comparisons[name].status not in (*SAME, "shape")

    def differing(self, floating: bool = True) -> list[str]:
        """Return the tensors that differ from the reference in values and that no check has explained yet.

        Args:
            floating: Leave integer tensors out.
        """
        return [
            n
            for n in self.shared()
            if n not in self.claims
            and self.changed(n)
            and np_dtype_known(self.tensors[n].dtype)
            and np_dtype_known(self.reference_tensors[n].dtype)
            and (not floating or DTYPES[self.tensors[n].dtype].floating)
        ]

    def claim(self, names: Iterable[str], code: str) -> None:
        """Say that `code` explains these tensors (or config fields, as `config:FIELD`); the first claim stays."""
        for name in names:
            self.claims.setdefault(name, code)


def patterns_for(names: Iterable[str], most: int = 4) -> list[str]:
    """Return patterns for a command line that fit these names: the names while they are few, else how they end.

    >>> patterns_for([f"model.layers.{n}.mlp.up_proj.weight" for n in range(9)])
    ['*.mlp.up_proj.weight']
    """
    names = list(dict.fromkeys(names))
    if len(names) <= most:
        return [re.sub(r"[*?[]", r"[\g<0>]", n) for n in names]
    ends = (re.split(r"\.\d+\.", n)[-1] for n in names)
    return list(dict.fromkeys(end if end in names else f"*.{end}" for end in ends))


def message_of(error: TensorkeepError) -> str:
    """Return the message of an error without its code, which the finding carries."""
    return error.line.removeprefix(f"{error.code} ")


def np_dtype_known(dtype: str) -> bool:
    """Say whether values of this dtype can be computed with (packed 4- and 6-bit types can only be copied)."""
    return DTYPES[dtype].numpy is not None
