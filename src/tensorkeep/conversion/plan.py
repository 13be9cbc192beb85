"""What a conversion plan is: how every tensor of the output is made, decided before any weight is read.

A plan is a list of steps. A step makes one output tensor out of parts (ranges of rows of stored tensors, whose rows
may be permuted), or drops a stored tensor and says why. Every stored tensor must occur in a step; a plan that forgets
one is refused (`planning.make_plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tensorkeep.formats.companions import Companion
from tensorkeep.formats.names import natural
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.record import DTYPES, TensorRecord, nbytes

BY_USER = "dropped by the user"


class RowPermutation(NamedTuple):
    """A reordering of the rows within every attention head, which turns one RoPE layout into the other.

    In the layout "half" (transformers) RoPE turns row i together with row i + rotary/2; in "pairs" (Meta, torchtitan)
    it turns row 2i together with row 2i + 1. Rows from `rotary` on are not turned by RoPE and stay where they are.

    Args:
        block: rows of one head.
        rotary: rows of a head that RoPE turns; even, at most `block`.
        to: the layout that the rows are brought into, "pairs" or "half".
    """

    block: int
    rotary: int
    to: str

    def inverse(self) -> RowPermutation:
        """Return the permutation that undoes this one."""
        return RowPermutation(self.block, self.rotary, "half" if self.to == "pairs" else "pairs")

    def order(self) -> list[int]:
        """Return, for each row of a permuted head, the number of the row it is taken from.

        >>> RowPermutation(6, 4, "pairs").order()
        [0, 2, 1, 3, 4, 5]
        """
        half = self.rotary // 2
        if self.to == "pairs":
            turned = [k * half + j for j in range(half) for k in range(2)]
        else:
            turned = [2 * j + k for k in range(2) for j in range(half)]
        return turned + list(range(self.rotary, self.block))


def row_bytes(record: TensorRecord) -> int:
    """Return the bytes of one of the rows that a permutation reorders.

    Of stacked experts these are the rows of each one's matrix; codes of such a stack have more dimensions below them.

    Args:
        record: the stored tensor.
    """
    shape = record.shape
    deep = 1 if len(shape) < 3 else 2 if not DTYPES[record.dtype].floating else len(shape) - 1
    return nbytes(record.dtype, shape[deep:])


class Part(NamedTuple):
    """A range of rows of one stored tensor, which becomes all or some of the rows of an output tensor.

    Args:
        source: index of the view in `Plan.sources`.
        name: the tensor's stored name in that view.
        rows: first row and the one after the last; None for the whole tensor.
        permutes: permutations of the rows of each head, applied in this order.
        inner: where `rows` is a single one and a matrix (one of stacked experts): first row of that matrix and the one
            after the last; None for all.
        turned: whether rows and columns change places, in each matrix of a stack.
        plus: what is added to every value.
    """

    source: int  # index of the view
    name: str
    rows: tuple[int, int] | None = None
    permutes: tuple[RowPermutation, ...] = ()
    inner: tuple[int, int] | None = None
    turned: bool = False
    plus: int = 0

    @property
    def plain(self) -> bool:
        """Whether the rows are taken as they lie, and none of their values changes."""
        return not (self.permutes or self.turned or self.plus)

    @property
    def key(self) -> str:
        """The part as certificates and plans spell it: `w1`, `w1[0:8]`, `w1[3:4][0:128]`."""
        return self.name + "".join(f"[{r[0]}:{r[1]}]" for r in (self.rows, self.inner) if r is not None)

    def permuted(self, rows: RowPermutation) -> Part:
        """Return the part with one more permutation of its rows; two that undo each other are both left out."""
        if self.permutes and self.permutes[-1] == rows.inverse():
            return self._replace(permutes=self.permutes[:-1])
        return self._replace(permutes=(*self.permutes, rows))


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a checkpoint under its transformers (`hf`) name, on its way from one naming to another.

    Args:
        name: the hf name.
        dtype: as stored, in safetensors' spelling ("F32", "BF16", ...).
        shape: of the tensor under its hf name.
        parts: the stored rows that it is made of, in order.
        actions: what was done on the way ("split", "permute", "turn", "add", "fuse", "tie").
        tied_to: the hf name of another tensor over the same bytes, in the same source.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    actions: tuple[str, ...] = ()
    tied_to: str | None = None  # the name, in this source, of a tensor over the same bytes


@dataclass(frozen=True)
class Step:
    """One line of a plan: what is done, with which stored tensors, and what comes of it.

    Args:
        actions: any of keep, rename, cast, permute, turn, add, split, fuse, tie, merge, drop.
        parts: the stored rows that go in.
        sink: the output tensor; None where the stored tensors are dropped.
        reason: why they are dropped, or what a merge added.
    """

    actions: tuple[str, ...]
    parts: tuple[Part, ...]
    sink: SinkTensor | None
    reason: str = ""

    @property
    def line(self) -> str:
        """The step for people to read: `permute rename  wq.weight -> q_proj.weight`."""
        return self.told(())

    def told(self, sources: Sequence[StateView]) -> str:
        """Say the step with its dtypes: `cast             wq.weight -> q_proj.weight  (BF16 to F32)`.

        Args:
            sources: the views that tensors are read from; without them dtypes are left out.
        """
        names = [p.key for p in self.parts]
        shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        target = f" -> {self.sink.name}" if self.sink and self.sink.name != shown else ""
        told = "; ".join(said for said in (self._cast(sources), self.reason) if said)
        return f"{' '.join(self.actions):<16} {shown}{target}{f'  ({told})' if told else ''}"

    def _cast(self, sources: Sequence[StateView]) -> str:
        """From which dtypes to which one the values are cast; '' where they keep theirs."""
        if not sources or self.sink is None or not {"cast", "quantize"} & set(self.actions):
            return ""
        stored = [sources[p.source][p.name] for p in self.parts]
        before = dict.fromkeys(r.dtype if r.encoding == "plain" else r.encoding.upper() for r in stored)
        made = self.sink.dtype if self.sink.encoding == "plain" else self.sink.encoding.upper()
        return f"{' and '.join(before)} to {made}" if made not in before else ""


@dataclass
class Plan:
    """A whole conversion, decided: the steps, what travels beside the weights, and what to tell the user first.

    Args:
        sources: the views that tensors are read from.
        steps: one for each output tensor and each dropped tensor, in a fixed order.
        naming: the naming of the output ("hf", "torchtitan", ...); None where names stay as they were.
        root: the name that a DCP or .pth nests its tensors under; None for none.
        config: the model's config, as transformers' config.json has it.
        companions: small files written beside the weights (config, tokenizer).
        notes: what the user should know: losses, assumptions, oddities.
        roots: first segments of the output's names that a .pth keeps as nested dicts.
        beside: plain values that a .pth keeps next to its tensors.
        header: entries of the safetensors header beside `format`.
        ranks: write as so many ranks would, each its rows of every tensor (dcp); None: every tensor whole.
    """

    sources: list[StateView]
    steps: list[Step]
    naming: str | None
    root: str | None
    config: dict[str, Any] | None = None
    companions: list[Companion] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    roots: tuple[str, ...] = ()  # first segments of the sink's names that pth turns into dicts
    beside: dict[str, Any] = field(default_factory=dict)  # plain values that pth keeps next to them
    header: dict[str, str] = field(default_factory=dict)  # what safetensors keeps in its header beside the tensors
    ranks: int | None = None

    @property
    def tensors(self) -> list[SinkTensor]:
        """The tensors that the plan writes."""
        return [s.sink for s in self.steps if s.sink is not None]

    @property
    def dropped(self) -> list[Step]:
        """The steps that drop a stored tensor."""
        return [s for s in self.steps if s.sink is None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the plan writes."""
        return sum(t.nbytes for t in self.tensors)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the steps as plain data, for `--json` and the certificate."""
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
    """Sort steps by the name they write (2 before 10), drops last, so that the same source always gives the same bytes.

    Args:
        steps: in any order.

    Returns:
        The same steps, in the order in which a plan keeps them.
    """
    return sorted(steps, key=lambda s: (s.sink is None, natural(s.sink.name if s.sink else s.parts[0].name)))
