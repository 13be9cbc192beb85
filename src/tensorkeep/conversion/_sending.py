"""Send the files of an output front to back, several at once; what a killed command had begun to put in its place."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.streams import Sums, write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import CERTIFICATE, Progress
from tensorkeep.storage.layout import FileLayout, Fixed, Slot
from tensorkeep.storage.s3 import failures
from tensorkeep.storage.spreading import cores

LAST = (".metadata", ".index.json")  # names that make a folder readable end so
JOURNAL = "placing.json"  # below the temporary prefix: what is about to appear, by path, with its ETag
_FILES = 4  # sent side by side at most: each holds a part
_LARGEST = 64 << 20


class Target(NamedTuple):
    """Where in a store an output goes.

    Attributes:
        system: fsspec's file system.
        url: the place as the user wrote it.
        final: the same on the file system.
        stage: a temporary prefix beside it, there.
        single: whether the output is one file.
        present: the files that are there now and are replaced.
        begun: path -> ETag of what a killed command was putting there.
    """

    system: Any
    url: str
    final: str
    stage: str
    single: bool
    present: list[str]
    begun: dict[str, str]

    @property
    def folder(self) -> str:
        """What the files go into, on the file system."""
        return self.final.rpartition("/")[0] if self.single else self.final

    @property
    def certificate(self) -> str:
        """The certificate's name."""
        return f"{self.url.rpartition('/')[2]}.{CERTIFICATE}" if self.single else CERTIFICATE


def journals(system: Any, stages: Sequence[str]) -> dict[str, str]:
    """Return what killed commands were putting in its place, as they noted it: path -> ETag."""
    found: dict[str, str] = {}
    for stage in stages:
        with contextlib.suppress(*failures()):
            document = json.loads(system.cat_file(f"{stage}/{JOURNAL}", start=0, end=_LARGEST))
            if isinstance(document, dict):
                found |= {str(path): str(etag) for path, etag in document.items()}
    return found


class Sink(Protocol):
    """A file that is sent front to back."""

    def write(self, data: Any, /) -> Any:
        """Take the next bytes."""

    def end(self) -> None:
        """All bytes were written."""

    def give_up(self) -> None:
        """Leave nothing of it; called where `write` or `end` failed."""


def send_files(
    layouts: Sequence[FileLayout], opened: Callable[[FileLayout], Sink], plan: Plan, progress: Progress
) -> dict[str, Sums]:
    """Send files side by side.

    Args:
        layouts: the files.
        opened: begins one.
        plan: says what each tensor is made of.
        progress: called as `progress("write", done, total)` with bytes.

    Returns:
        The checksums of every tensor, by output name.
    """
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
    total, sent, stop = sum(s.nbytes for f in layouts for s in f.slots), [0], threading.Event()

    def count(size: int) -> None:
        if stop.is_set():
            raise TensorkeepError("interrupted")  # by a failure elsewhere, which is the one that is told
        sent[0] += size
        progress("write", sent[0], total)

    sums: dict[str, Sums] = {}
    with ThreadPoolExecutor(min(cores(), _FILES)) as pool:
        try:
            jobs = [pool.submit(_send, opened, layout, steps, plan, count) for layout in layouts]
            wait(jobs, return_when=FIRST_EXCEPTION)
            failed = [e for job in jobs if job.done() and (e := job.exception()) is not None]
            if failed:
                raise failed[0]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for job in jobs:
        sums.update(job.result())
    return sums


def _send(
    opened: Callable[[FileLayout], Sink], layout: FileLayout, steps: dict[str, Step], plan: Plan, count: Any
) -> dict[str, Sums]:
    """Send one file from its first byte to its last: checksums are known when the bytes that hold them are due."""
    sums: dict[str, Sums] = {}
    file = opened(layout)
    try:
        for segment in layout.segments:
            if isinstance(segment, Fixed):
                file.write(segment.data)
            elif isinstance(segment, Slot):
                sums[segment.tensor] = _send_tensor(file, segment, steps[segment.tensor], plan, count, layout.wants_crc)
            else:
                file.write(segment.make({name: made.crc for name, made in sums.items()}))
        file.end()
    except BaseException:
        file.give_up()
        raise
    return sums


def _send_tensor(file: Sink, slot: Slot, step: Step, plan: Plan, count: Any, crc: bool) -> Sums:
    """Send the bytes of one tensor, and stop where they are not as many as its header promises."""
    sent = 0

    def write(piece: memoryview) -> None:
        nonlocal sent
        file.write(piece)
        sent += len(piece)
        count(len(piece))

    sums = write_tensor(step, plan.sources, write, crc)
    if sent != slot.nbytes:
        raise TensorkeepError(
            f"{slot.tensor}: {sent} bytes instead of {slot.nbytes}", hint="the source changed while it was read"
        )
    return sums


def small(layout: FileLayout) -> bytes:
    """Return the bytes of a file that holds no tensors."""
    return b"".join(s.data if isinstance(s, Fixed) else s.make({}) for s in layout.segments if not isinstance(s, Slot))
