"""Plans: how every sink tensor is made from source records, decided before any weight is read.

A plan is a list of steps. A step makes one sink tensor out of parts (byte ranges of source records, whose rows may
be permuted), or drops a source record with its reason. Every source record occurs in a step, or the plan is refused:
that is what `complete` means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tensorkeep.formats.names import natural
from tensorkeep.formats.view import Companion, Note, StateView
from tensorkeep.storage.layout import SinkTensor

BY_USER = "dropped by the user"


class RowPermutation(NamedTuple):
    """A permutation of rows within each block of `block` rows (a head): between RoPE layouts.

    "pairs": half-split (rotary row i pairs with i + rotary/2) becomes interleaved (2i with 2i + 1); "half" is the
    inverse. Rows from `rotary` on, which RoPE does not turn, stay.
    """

    block: int
    rotary: int
    to: str

    def inverse(self) -> RowPermutation:
        return RowPermutation(self.block, self.rotary, "half" if self.to == "pairs" else "pairs")

    def order(self) -> list[int]:
        """Source row of each row of the result.

        >>> RowPermutation(6, 4, "pairs").order()
        [0, 2, 1, 3, 4, 5]
        """
        half = self.rotary // 2
        if self.to == "pairs":
            turned = [k * half + j for j in range(half) for k in range(2)]
        else:
            turned = [2 * j + k for k in range(2) for j in range(half)]
        return turned + list(range(self.rotary, self.block))


class Part(NamedTuple):
    """A run of rows of one source record (all of it where `rows` is None), after `permutes` in turn."""

    source: int  # index of the view
    name: str
    rows: tuple[int, int] | None = None
    permutes: tuple[RowPermutation, ...] = ()

    def permuted(self, rows: RowPermutation) -> Part:
        if self.permutes and self.permutes[-1] == rows.inverse():
            return self._replace(permutes=self.permutes[:-1])
        return self._replace(permutes=(*self.permutes, rows))


@dataclass(frozen=True)
class HfTensor:
    """A tensor under its hf name: dtype, shape, the parts it is made of, and what was done on the way."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    actions: tuple[str, ...] = ()
    tied_to: str | None = None  # the name, in this source, of a tensor over the same bytes


@dataclass(frozen=True)
class Step:
    """One line of a plan: what is done (keep, rename, cast, permute, split, fuse, tie, drop), from what, to what."""

    actions: tuple[str, ...]
    parts: tuple[Part, ...]
    sink: SinkTensor | None
    reason: str = ""

    @property
    def line(self) -> str:
        """For people: `permute rename  wq.weight -> q_proj.weight`."""
        names = [p.name if p.rows is None else f"{p.name}[{p.rows[0]}:{p.rows[1]}]" for p in self.parts]
        shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        target = f" -> {self.sink.name}" if self.sink and self.sink.name != shown else ""
        return f"{' '.join(self.actions):<16} {shown}{target}{f'  ({self.reason})' if self.reason else ''}"


@dataclass
class Plan:
    """Steps, what travels beside the weights, and what the user should know before it runs."""

    sources: list[StateView]
    steps: list[Step]
    naming: str | None
    root: str | None
    config: dict[str, Any] | None = None
    companions: list[Companion] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    roots: tuple[str, ...] = ()  # first segments of the sink's names that pth turns into dicts
    beside: dict[str, Any] = field(default_factory=dict)  # plain values that pth keeps next to them

    @property
    def tensors(self) -> list[SinkTensor]:
        return [s.sink for s in self.steps if s.sink is not None]

    @property
    def dropped(self) -> list[Step]:
        return [s for s in self.steps if s.sink is None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def to_json(self) -> list[dict[str, Any]]:
        """The steps as plain data, for `--json` and the certificate."""
        return [
            {
                "actions": list(s.actions),
                "sources": list(dict.fromkeys(p.name for p in s.parts)),
                "sink": s.sink.name if s.sink else None,
                **({"reason": s.reason} if s.reason else {}),
            }
            for s in self.steps
        ]


def ordered(steps: Sequence[Step]) -> list[Step]:
    """Steps in a fixed order (natural by sink name, drops last), so that the same source gives the same bytes."""
    return sorted(steps, key=lambda s: (s.sink is None, natural(s.sink.name if s.sink else s.parts[0].name)))
