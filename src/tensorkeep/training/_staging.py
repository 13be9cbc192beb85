"""Staging: copy a run's tensors out of the way of training, into images of the files they will become.

On a GPU the copy goes into page-locked memory, allocated once, on a stream of its own: the caller gets back at once and
the next optimizer step waits for the copy alone. Each image is laid out like its file, so that the writer puts it on
the disk with direct I/O and no further copy. DCP's stagers are not used: the default one stages into ordinary memory
(seconds for 8 GiB), the pinned one of torch 2.11 fails from the second save on, and both copy tensor by tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable
from tensorkeep.storage.layout import FileLayout, Fixed, Slot
from tensorkeep.training._pinned import PinnedPages, pinned_memory

GATHERED = 1 << 20  # bytes; tensors up to this size are gathered on the device, thousands of copies become a few
SCRATCH = 64 << 20  # bytes of device memory for one gathering
GAP = 4096  # bytes between tensors that one gathering may span: what frames a tensor in a sharded file
_ALIGNED = 16  # bytes: a gathering has tensors of every dtype
SAMPLED = 64  # bytes of each copy off a device that are compared with what arrived, evenly spread


class Stage:
    """Page-locked memory for the images, one a file, kept from save to save; one save at a time may use it.

    Example:
        >>> stage = Stage()
        >>> staged = stage.copy([(layout, {"w": tensor})])          # doctest: +SKIP
        >>> staged.before_step(); optimizer.step()                  # doctest: +SKIP
        >>> images = staged.wait()                                  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._images: dict[str, memoryview] = {}
        self._laid: dict[str, FileLayout] = {}  # whose fixed bytes lie in each image
        self.refused = ""  # why the newest image is not page-locked
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, files: Sequence[tuple[FileLayout, Mapping[str, Tensor]]], steady: frozenset[str]) -> Staged:
        """Copy tensors into images; returns when those on the CPU are copied and the others are on their way.

        Args:
            files: each file's layout with its tensors by name.
            steady: tensors of the first file that change in optimizer steps only. The current stream waits here for all
                others of that file (running statistics change in the next forward), and for these in `before_step`.
        """
        staged = Staged()
        with torch.no_grad():
            for index, (layout, tensors) in enumerate(files):
                image = self._image(layout, cuda=any(t.is_cuda for t in tensors.values()))
                staged.images[layout.name] = image
                target = torch.frombuffer(image, dtype=torch.uint8)
                if self._laid.get(layout.name) is not layout:
                    for segment in layout.segments:
                        if isinstance(segment, Fixed):
                            image[segment.start : segment.start + len(segment.data)] = segment.data
                    self._laid[layout.name] = layout
                place = Places(target)
                for slot in layout.slots:  # before what is gathered around them
                    source = tensors[slot.tensor]
                    if slot.nbytes and not source.is_cuda:
                        place.of(slot.start, source).copy_(source)
                parts = _groups(layout.slots, tensors, frozenset(tensors) if index else steady)
                staged.at_once += self._enqueue(target, tensors, parts[True], staged)
                staged.later += self._enqueue(target, tensors, parts[False], staged)
        for event in staged.at_once:
            torch.cuda.current_stream().wait_event(event)
        return staged

    def _enqueue(
        self, target: Tensor, tensors: Mapping[str, Tensor], groups: Sequence[list[Slot]], staged: Staged
    ) -> list[torch.cuda.Event]:
        """Begin to copy some tensors on GPUs into the image; returns an event for each GPU."""
        by_device: dict[torch.device, list[list[Slot]]] = {}
        for group in groups:
            by_device.setdefault(tensors[group[0].tensor].device, []).append(group)
        events = []
        for device, own in by_device.items():
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            staged.sources += [tensors[slot.tensor] for run in own for slot in run]
            with torch.cuda.device(device), torch.cuda.stream(stream):
                samples = [_copy_run(target, run, tensors) for run in own]
                staged.samples.append(
                    Samples(target, [at for at, _ in samples], torch.cat([s for _, s in samples]), stream)
                )
                event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                event.record(stream)
            events.append(event)
        return events

    def _image(self, layout: FileLayout, cuda: bool) -> memoryview:
        """Give memory for one file: what is there already, where that is large enough."""
        room = self._images.get(layout.name)
        known = room is not None and isinstance(room.obj, PinnedPages)
        if room is None or len(room) < durable.padded(layout.size) or (cuda and not known):
            del room
            self._images.pop(layout.name, None)
            self._laid.pop(layout.name, None)
            made, why = pinned_memory(layout.size) if cuda else (durable.allocate(layout.size), "")
            room, self.refused = made, why or self.refused
            self._images[layout.name] = room
        end = durable.padded(layout.size)
        room[layout.size : end] = bytes(end - layout.size)
        return room[:end]

    @property
    def pinned(self) -> bool:
        """Whether every image is page-locked; if not, each save stalls for the whole copy."""
        return all(isinstance(i.obj, PinnedPages) and i.obj.registered for i in self._images.values())

    def close(self) -> None:
        """Give the memory back; it goes once nothing refers to it."""
        self._images.clear()
        self._laid.clear()


@dataclass
class Samples:
    """Bytes of what was copied off a device, taken there at the same time as the copy.

    Attributes:
        target: the image that the copies went into.
        places: for each copy, where in the image its sampled bytes belong.
        values: the bytes on the device, one copy's after another's.
        stream: the stream of the copies.
    """

    target: Tensor
    places: list[Tensor]
    values: Tensor
    stream: torch.cuda.Stream | None

    def wrong(self) -> int:
        """Count the bytes that are not what the device had; call it once the copies are done."""
        with torch.cuda.stream(self.stream):
            there = self.values.cpu()  # into ordinary memory: not the way that is being checked
        return int((there != self.target[torch.cat(self.places)]).sum())


class Staged:
    """A copy under way; it keeps the tensors alive until it is done."""

    def __init__(self) -> None:
        self.images: dict[str, memoryview] = {}
        self.sources: list[Tensor] = []
        self.at_once: list[torch.cuda.Event] = []
        self.later: list[torch.cuda.Event] = []
        self.samples: list[Samples] = []
        self.seconds = 0.0  # from the call until every byte was in the images
        self._started = time.perf_counter()

    def before_step(self) -> None:
        """Make the current stream wait for the copy; costs the caller nothing but its place in the queue."""
        for event in self.later:
            torch.cuda.current_stream().wait_event(event)

    def wait(self) -> dict[str, memoryview]:
        """Wait until every byte is copied, and compare a sample of them with the device's.

        Returns:
            The images by file name.

        Raises:
            TensorkeepError: bytes did not arrive; nothing may be made of the images then.
        """
        for event in (*self.at_once, *self.later):
            event.synchronize()
        wrong, looked = sum(s.wrong() for s in self.samples), sum(s.values.numel() for s in self.samples)
        self.samples.clear()
        self.sources.clear()
        if wrong:
            what = f"the copy off the GPU did not arrive: {wrong} of {looked} sampled bytes differ; not saved"
            raise TensorkeepError(what, where="checkpoint", hint="start again: the run goes on from the one before it")
        self.seconds = time.perf_counter() - self._started
        return self.images


def _groups(
    slots: Sequence[Slot], tensors: Mapping[str, Tensor], steady: frozenset[str]
) -> dict[bool, list[list[Slot]]]:
    """Group what lies on GPUs into copies: under True what is not steady. No copy spans tensors of another one."""
    groups: dict[bool, list[list[Slot]]] = {True: [], False: []}
    own = [slot for slot in slots if slot.nbytes and tensors[slot.tensor].is_cuda]
    gap = GAP if len({tensors[slot.tensor].device for slot in own}) == 1 else 0  # one stream for all of the file
    for (waits, _), some in groupby(own, lambda s: (s.tensor not in steady, tensors[s.tensor].device)):
        groups[waits] += runs(list(some), gap)
    return groups


def runs(slots: Sequence[Slot], gap: int = 0) -> Iterator[list[Slot]]:
    """Group neighbours of up to GATHERED bytes each, up to SCRATCH bytes a group; a larger tensor is its own group.

    Args:
        slots: in the order of the file.
        gap: bytes that may lie between neighbours.
    """
    group: list[Slot] = []
    for slot in slots:
        apart = slot.start - (group[-1].start + group[-1].nbytes) if group else 0
        near = group and (not apart or (apart <= gap and (slot.start - group[0].start) % _ALIGNED == 0))
        small = slot.nbytes <= GATHERED
        if group and not (near and small and slot.start + slot.nbytes - group[0].start <= SCRATCH):
            yield group
            group = []
        if small:
            group.append(slot)
        else:
            yield [slot]
    if group:
        yield group


def _copy_run(target: Tensor, run: Sequence[Slot], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Copy one tensor straight to the host, several through one scratch buffer on the device, dtype by dtype.

    Returns:
        Where in the image the sampled bytes belong, and those bytes on the device.
    """
    start, end = run[0].start, run[-1].start + run[-1].nbytes
    if len(run) == 1:
        source = tensors[run[0].tensor]
        Places(target).of(start, source).copy_(source, non_blocking=True)
        return _sample(source.contiguous().reshape(-1).view(torch.uint8), start)
    whole = -(-(end - start) // _ALIGNED) * _ALIGNED
    scratch = torch.empty(whole, dtype=torch.uint8, device=tensors[run[0].tensor].device)
    place, scratch = Places(scratch), scratch[: end - start]
    if sum(slot.nbytes for slot in run) < end - start:  # what lies between is in the image already
        scratch.copy_(target[start:end], non_blocking=True)
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for slot in run:
        source = tensors[slot.tensor]
        into, out = by_dtype.setdefault(source.dtype, ([], []))
        into.append(place.of(slot.start - start, source))
        out.append(source)
    copy_all: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_
    for into, out in by_dtype.values():
        copy_all(into, out)
    target[start:end].copy_(scratch, non_blocking=True)
    return _sample(scratch, start)


def _sample(raw: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Take some bytes of a flat tensor on its device, the first and the last among them.

    Args:
        raw: shape (bytes,), uint8.
        start: where its first byte lies in the image.

    Returns:
        Places in the image, on the CPU, and the bytes, on the device; both of shape (at most SAMPLED,).
    """
    count = min(SAMPLED, len(raw))

    def places(device: torch.device) -> Tensor:  # made on the device: a copy to it would wait for the copies before
        return torch.arange(count, device=device) * (len(raw) - 1) // max(count - 1, 1)

    return places(torch.device("cpu")) + start, raw[places(raw.device)]


class Places:
    """Places of tensors in memory, with the tensors' own dtypes and shapes.

    Args:
        memory: shape (bytes,), uint8; bytes are a multiple of every dtype's size.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._typed: dict[torch.dtype, Tensor] = {}

    def of(self, start: int, like: Tensor) -> Tensor:
        """Give the place of a tensor like another that begins at a byte."""
        memory = self._typed.get(like.dtype)
        if memory is None:
            memory = self._typed[like.dtype] = self._memory.view(like.dtype)
        if start % like.itemsize:
            return self._memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
        if like.is_contiguous():
            at = memory.storage_offset() + start // like.itemsize
            return memory.as_strided(like.shape, like.stride(), at)  # one call; slicing and viewing are three
        return memory.narrow(0, start // like.itemsize, like.numel()).view(like.shape)
