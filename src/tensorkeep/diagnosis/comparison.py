"""Compare two checkpoints of any format and naming, tensor by tensor, streamed.

Both sides are brought to Hugging Face names and layout first, so a torchtitan DCP and a Hugging Face folder of the
same model compare equal. Values are compared as stored bytes; only where those differ are numbers computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from tensorkeep.conversion import dequantizing
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.plan import HfTensor, Step
from tensorkeep.conversion.planning import to_hf_tensors
from tensorkeep.diagnosis.evidence.bytewise import aligned, as_float, hf_bytes, width
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.models.alignment import as_loaded, from_memory, tied_names, with_tied
from tensorkeep.storage.files import Progress
from tensorkeep.storage.record import DTYPES
from tensorkeep.storage.spreading import in_threads


@dataclass
class Difference:
    """How one tensor differs between two checkpoints, A and B.

    `status` is equal, values, dtype, shape, only_a or only_b; with "dtype", the numbers say whether the values differ
    too. `different` counts elements. `max_difference` is absolute, `relative` the Frobenius norm of the difference over
    that of B; both are None where there is nothing to subtract. `same_rows`: the same rows in another order.
    """

    name: str
    status: str
    a: HfTensor | None = None
    b: HfTensor | None = None
    different: int = 0
    max_difference: float | None = None
    relative: float | None = None
    same_rows: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the entry of `tensorkeep diff --json`."""
        out: dict[str, Any] = {"name": self.name, "status": self.status}
        for side, hub in (("a", self.a), ("b", self.b)):
            out[side] = (
                None if hub is None else {"name": hub.parts[0].name, "dtype": hub.dtype, "shape": list(hub.shape)}
            )
        numbers = {"max_difference": self.max_difference, "relative_difference": self.relative}
        finite = {k: v if v is None or math.isfinite(v) else str(v) for k, v in numbers.items()}
        return out | {"different_elements": self.different, **finite, "same_rows_in_another_order": self.same_rows}


@dataclass
class Pairing:
    """Two checkpoints side by side under Hugging Face names; `identities` says how each was read."""

    views: tuple[StateView, StateView]
    identities: tuple[namings.Identity, namings.Identity]
    hubs: tuple[dict[str, HfTensor], dict[str, HfTensor]]
    tied: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All names, those of A first."""
        a, b = self.hubs
        return [*a, *(n for n in b if n not in a)]


def pair(a: StateView, b: StateView) -> Pairing:
    """Bring both sides under Hugging Face names; a config on either side serves both, since it is the model's."""
    configs = [v.config for v in (a, b) if v.config is not None]
    config = next((c for c in configs if "model_type" in c), configs[0] if configs else None)
    identities = (namings.identify(a), namings.identify(b))
    if config is None and identities[0].naming == identities[1].naming:
        # both speak the same names: no translation, so no head sizes are needed either
        identities = (replace(identities[0], naming=None), replace(identities[1], naming=None))
    dropped: list[Step] = []
    hubs = tuple(
        to_hf_tensors(view, i, identity, config, dropped) for i, (view, identity) in enumerate(zip((a, b), identities))
    )
    sides = [dict(h) for h in hubs]
    if set(sides[0]) != set(sides[1]) and not any(namings.renames(i.naming) for i in identities):
        for translated in (from_memory, as_loaded):
            sides = [translated(config, side, (a, b)) for side in sides]
    pairing = Pairing((a, b), identities, (sides[0], sides[1]))
    if set(sides[0]) != set(sides[1]):
        ties = tied_names(config, {*sides[0], *sides[1]})
        for mine, other in ((sides[0], sides[1]), (sides[1], sides[0])):
            # a tied head may be stored once or twice; where one side leaves it out, its embedding stands for it
            pairing.tied += with_tied(mine, other, ties)
    return pairing


def compare(a: StateView, b: StateView, progress: Progress | None = None) -> list[Difference]:
    """Compare every tensor of two checkpoints; where one is quantized and the other is not, its floats are compared.

    Args:
        a: One checkpoint.
        b: The other, of any format and naming.
        progress: Called with "compare", the bytes done and the bytes in all.

    Returns:
        One entry for each tensor of either side, in the order of A, then what only B has.

    Raises:
        TensorkeepError: Where a file is damaged, or names cannot be translated without the config.

    Example:
        >>> [d.status for d in compare(read("hf"), read("dcp"))]      # doctest: +SKIP
        ['equal', 'equal', 'values']
    """
    a, b = dequantizing.beside(a, b), dequantizing.beside(b, a)
    pairing = pair(a, b)
    total = sum(
        h.parts[0].rows is None and v[h.parts[0].name].nbytes
        for v, side in zip(pairing.views, pairing.hubs)
        for h in side.values()
    )
    done, out = 0, []
    sides = list(zip(pairing.views, pairing.hubs))

    def size(name: str) -> int:
        return sum(v[side[name].parts[0].name].nbytes for v, side in sides if name in side)

    for found in in_threads(lambda name: difference(name, pairing), pairing.names, size):
        out.append(found)
        done += sum(v[h.parts[0].name].nbytes for v, h in zip(pairing.views, (found.a, found.b)) if h is not None)
        if progress:
            progress("compare", min(done, total), total)
    return out


def difference(name: str, pairing: Pairing) -> Difference:
    """Compare one tensor."""
    a, b = (side.get(name) for side in pairing.hubs)
    if a is None or b is None:
        return Difference(name, "only_b" if a is None else "only_a", a, b)
    if a.shape != b.shape:
        return Difference(name, "shape", a, b)
    found = Difference(name, "equal" if a.dtype == b.dtype else "dtype", a, b)
    sums = _Sums()
    for x, y in aligned(hf_bytes(a, pairing.views), hf_bytes(b, pairing.views), width(a.dtype), width(b.dtype)):
        if a.dtype != b.dtype or not np.array_equal(np.frombuffer(x, np.uint8), np.frombuffer(y, np.uint8)):
            sums.add(x, a.dtype, y, b.dtype)
    if a.dtype == b.dtype and not sums.touched:
        found.max_difference = found.relative = 0.0
        return found
    found.status = found.status if found.status == "dtype" else "values"
    found.different, found.max_difference, found.relative = sums.result(lambda: hf_bytes(b, pairing.views), b.dtype)
    if found.status == "values" and len(a.shape) == 2 and a.dtype == b.dtype:
        found.same_rows = row_digests(a, pairing.views) == row_digests(b, pairing.views)
    return found


@dataclass
class _Sums:
    """Running figures of a difference. The norm of B is completed only where something differs."""

    touched: bool = False
    different: int = 0
    largest: float = 0.0
    squares: float = 0.0

    def add(self, x: memoryview, dtype_x: str, y: memoryview, dtype_y: str) -> None:
        """Add pieces that hold the same elements of both sides."""
        self.touched = True
        if _np_dtype_or_none(dtype_x) is None or _np_dtype_or_none(dtype_y) is None:
            self.different += int(np.count_nonzero(np.frombuffer(x, np.uint8) != np.frombuffer(y, np.uint8)))
            self.largest = self.squares = math.nan
            return
        first, second = as_float(x, dtype_x), as_float(y, dtype_y)
        with np.errstate(invalid="ignore", over="ignore"):
            delta = np.abs(first - second)
            same = (first == second) | (np.isnan(first) & np.isnan(second))
            delta[same] = 0.0
            self.different += int(delta.size - np.count_nonzero(same))
            # max of an array with NaN is NaN, which is what a person should see
            self.largest = float(np.maximum(self.largest, delta.max())) if delta.size else self.largest
            self.squares += float(np.square(delta).sum())

    def result(self, again: Callable[[], Iterator[memoryview]], dtype: str) -> tuple[int, float, float]:
        """Return elements that differ, the largest difference and the relative one; `again` streams B once more."""
        norm = 0.0
        if _np_dtype_or_none(dtype) is not None:
            for piece in again():
                with np.errstate(invalid="ignore", over="ignore"):
                    norm += float(np.square(as_float(piece, dtype)).sum())
        if norm > 0 and self.squares >= 0:
            return self.different, self.largest, math.sqrt(self.squares / norm)
        return self.different, self.largest, 0.0 if self.squares == 0 else math.inf


def _np_dtype_or_none(dtype: str) -> np.dtype[Any] | None:
    """Return numpy's dtype, or None for packed types that can only be copied."""
    return np_dtype(dtype) if DTYPES[dtype].numpy else None


def row_digests(hub: HfTensor, views: Sequence[StateView]) -> list[int]:
    """Return the sorted 64-bit digests of a matrix's rows: equal lists mean the same rows, in whatever order."""
    row = hub.shape[1] * width(hub.dtype)
    rest, out = b"", []
    if not row:
        return []
    for piece in hf_bytes(hub, views):
        data = memoryview(rest + bytes(piece))
        whole = len(data) // row * row
        out += [xxhash.xxh3_64_intdigest(data[at : at + row]) for at in range(0, whole, row)]
        rest = bytes(data[whole:])
    return sorted(out)
