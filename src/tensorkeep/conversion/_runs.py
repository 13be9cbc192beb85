"""Small tensors that lie near each other in a source and are written as they are: read in one go, written in one go."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import xxhash

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.streams import Cast, Sums
from tensorkeep.formats.view import StateView
from tensorkeep.storage.layout import Slot

_SMALL = 256 << 10  # bytes of a tensor up to which a read and a write of its own cost more than its bytes
_GAP = 64 << 10  # bytes between two tensors that are read along, as long as they are fewer than those of the tensors


class Run(NamedTuple):
    """Tensors that lie near each other in a file of a source.

    Attributes:
        view: the source.
        file: its file.
        slots: where each begins in the file, and where it is written, in the order of the file.
    """

    view: StateView
    file: str
    slots: list[tuple[int, Slot]]


def runs(slots: Sequence[Slot], steps: dict[str, Step], plan: Plan) -> tuple[list[Run], list[Slot]]:
    """Find the runs among tensors that are written near each other.

    Args:
        slots: their places.
        steps: output name -> what the tensor is made of.
        plan: has the sources.

    Returns:
        The runs, and the slots that are in none.
    """
    alone: list[Slot] = []
    files: dict[tuple[int, str], list[tuple[int, Slot]]] = {}
    for slot in slots:
        place = _plain_place(steps[slot.tensor], plan, slot) if 0 < slot.nbytes <= _SMALL else None
        if place is None:
            alone.append(slot)
        else:
            files.setdefault(place[:2], []).append((place[2], slot))
    found: list[Run] = []
    for (source, file), mine in files.items():
        mine.sort()
        end = held = passed = 0
        for start, slot in mine:
            gap = start - end
            if not end or not 0 <= gap <= _GAP or passed + gap > held:
                found.append(Run(plan.sources[source], file, []))
                gap = held = passed = 0
            found[-1].slots.append((start, slot))
            end, held, passed = start + slot.nbytes, held + slot.nbytes, passed + gap
    return found, alone


def _plain_place(step: Step, plan: Plan, slot: Slot) -> tuple[int, str, int] | None:
    """Return source, file and first byte of a tensor that is one range of a file and is written as it lies."""
    if len(step.parts) != 1:
        return None
    part, sink = step.parts[0], step.sink
    view = plan.sources[part.source]
    if part.rows is not None or part.inner is not None or not part.plain or type(view) is not StateView or sink is None:
        return None
    record = view.records[part.name]
    if record.encoding != "plain" or sink.encoding != "plain" or len(record.blocks) != 1:
        return None
    block = record.blocks[0]
    whole = block.shape == record.shape and block.strides is None and not block.archive and block.crc is None
    if not whole or record.dtype != sink.dtype or not slot.nbytes == block.nbytes == record.nbytes:
        return None
    return part.source, block.file, block.start


def copy(
    found: Sequence[Run], steps: dict[str, Step], write: Callable[[list[memoryview], int], None], crc_wanted: bool
) -> dict[str, Sums]:
    """Read runs, digest each of their tensors, write them.

    Args:
        found: the runs.
        steps: output name -> what the tensor is made of.
        write: called with pieces that lie together and where the first begins.
        crc_wanted: whether to take the CRC-32 of each.

    Returns:
        The checksums by output name.
    """
    sums: dict[str, Sums] = {}
    pieces: list[tuple[int, memoryview]] = []
    for run in found:
        first, (last, end) = run.slots[0][0], run.slots[-1]
        data = memoryview(bytearray(last + end.nbytes - first))
        run.view.folder.read_into(run.file, first, data)
        for start, slot in run.slots:
            piece = data[start - first : start - first + slot.nbytes]
            digest = xxhash.xxh3_128_hexdigest(piece)
            part = steps[slot.tensor].parts[0]
            crc = zlib.crc32(piece) if crc_wanted else 0
            sums[slot.tensor] = Sums(crc, digest, {(part.source, part.name): digest}, Cast())
            pieces.append((slot.start, piece))
    pieces.sort(key=lambda piece: piece[0])
    together: list[memoryview] = []
    begun = at = 0
    for start, piece in pieces:
        if together and start != at:
            write(together, begun)
            together = []
        begun = begun if together else start
        together.append(piece)
        at = start + len(piece)
    if together:
        write(together, begun)
    return sums
