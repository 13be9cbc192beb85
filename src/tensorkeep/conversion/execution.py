"""Carry out a plan: stream every tensor into its file, read the result back, leave a certificate.

All files are laid out before the first byte is written, so several threads fill one file at once, each holding one
chunk of a tensor. The output appears under its name only after it has been read back and the digest of every tensor
equals that of the bytes that were written.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.proof import certify, check_sources, prove
from tensorkeep.conversion.sink import THREADS, Progress, Result, placing, quiet, refuse_overlap, sink_files, stored
from tensorkeep.conversion.streams import Sums, with_ties, write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.earlier import CHECKPOINT
from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import explained, local_path
from tensorkeep.storage.layout import FileLayout, Fixed, Slot, Trailer
from tensorkeep.storage.overwriting import refuse_existing
from tensorkeep.storage.placement import write_bytes


def convert(
    plan: Plan, out: str, to: str, shard_size: int | None = None, overwrite: bool = False, progress: Progress = quiet
) -> Result:
    """Write a plan's tensors to a file, a folder or an object store, and prove that they are there.

    Args:
        plan: from `make_plan`.
        out: a local path or a URL (`s3://bucket/name`). A name that ends in .safetensors, .pth, .pt, .bin or .ckpt is
            one file, any other a folder.
        to: the format, "hf", "dcp", "pth" or "peft".
        shard_size: largest size of one weight file in bytes; None for the format's usual one.
        overwrite: replace what is there, if it is a checkpoint and nothing else.
        progress: called as `progress(what, done, total)` with bytes while it runs.

    Returns:
        Where the output is, the digest of each of its tensors, and how long it took.

    Raises:
        TensorkeepError: the output exists, overlaps a source or cannot be written; a source changed while it was read,
            or is not what its certificate says; the output read back differs (F03). Then nothing is left under `out`.

    Example:
        >>> convert(make_plan([read("model.gguf")], "hf"), "model", "hf").nbytes  # doctest: +SKIP
        269060552
    """
    for view in plan.sources:
        view.checked = True  # every byte passes through here anyway: notice what rotted
    out = out.removeprefix("file://")
    if "://" in out:
        from tensorkeep.conversion._remote import convert_remote

        return convert_remote(plan, out, to, shard_size, overwrite, progress)
    final = local_path(out)
    refuse_overlap(final, plan.sources)
    refuse_existing(final, overwrite, CHECKPOINT)
    layouts, single = sink_files(plan, final.name, to, shard_size)
    with placing(final, layouts, single, overwrite) as place:
        started = time.perf_counter()
        sums = write_files(place.layouts, place.folder, plan, progress)
        check_sources(plan, sums)
        written = time.perf_counter()
        prove(place.temporary, plan, sums, progress)
        proven = time.perf_counter()
        write_bytes(place.certificate, certify(plan, sums, to))
    casts = {n: s.cast for n, s in sums.items() if s.cast.overflowed or s.cast.vanished}
    seconds = {"write": written - started, "prove": proven - written, "sync": time.perf_counter() - proven}
    return Result(str(final), stored(layouts), {n: s.digest for n, s in sums.items()}, casts, seconds)


# -- writing ------------------------------------------------------------------------------------------------------


def write_files(layouts: Sequence[FileLayout], folder: Path, plan: Plan, progress: Progress = quiet) -> dict[str, Sums]:
    """Write and fsync every file of an output into a folder that is there already.

    Args:
        layouts: the files, and where each tensor lies in them.
        folder: where they are made; none of them may exist.
        plan: says what each tensor is made of.
        progress: called as `progress("write", done, total)` with bytes.

    Returns:
        The checksums of every tensor, by output name.

    Raises:
        TensorkeepError: a disk is full or fails, or a source gives other bytes than its header promised.
    """
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
    total = stored(layouts)
    done = 0
    sums: dict[str, Sums] = {}
    stop = threading.Event()

    def count(size: int) -> None:
        nonlocal done
        if stop.is_set():
            raise TensorkeepError("interrupted")  # by a failure elsewhere, which is the one that is told
        done += size
        progress("write", done, total)

    with ThreadPoolExecutor(THREADS) as pool:
        for layout in layouts:
            path = folder / layout.name
            jobs: list[Future[Sums]] = []
            with explained(path):
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)  # less the umask
                try:
                    jobs += [
                        pool.submit(_fill, handle, slot, steps[slot.tensor], plan.sources, count, layout.wants_crc)
                        for slot in layout.slots
                    ]
                    sums.update(_gather(jobs, layout.slots))
                    _write_rest(handle, layout, {n: s.crc for n, s in sums.items()})
                    os.fsync(handle)
                finally:
                    stop.set()
                    for job in jobs:
                        job.cancel()
                    wait(jobs)  # nobody may write to this number once it is closed: it can be another file's by then
                    os.close(handle)
                    stop.clear()
    return with_ties(sums, plan)


def _gather(jobs: list[Future[Sums]], slots: list[Slot]) -> dict[str, Sums]:
    """Wait for the threads of one file; raise what failed first, or return each tensor's checksums by name."""
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    for job in done:
        job.result()  # raises what failed first; the caller stops the others
    return {slot.tensor: job.result() for job, slot in zip(jobs, slots)}


def _fill(
    handle: int, slot: Slot, step: Step, sources: Sequence[StateView], count: Callable[[int], None], crc: bool
) -> Sums:
    """Write one tensor into its place in an open file."""
    at = slot.start

    def write(piece: memoryview) -> None:
        nonlocal at
        write_all(handle, piece, at)
        at += len(piece)
        count(len(piece))

    sums = write_tensor(step, sources, write, crc)
    if at != slot.start + slot.nbytes:
        raise TensorkeepError(
            f"{slot.tensor}: {at - slot.start} bytes instead of {slot.nbytes}",
            hint="the source changed while it was read",
        )
    return sums


def write_all(handle: int, data: memoryview | bytes, at: int) -> None:
    """Write all of `data` at a position of an open file, however many calls that takes."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


def _write_rest(handle: int, layout: FileLayout, crcs: dict[str, int]) -> None:
    """Write what lies between the tensors of a file: headers now known, and trailers that hold checksums."""
    for segment in layout.segments:
        if isinstance(segment, Fixed):
            write_all(handle, segment.data, segment.start)
        elif isinstance(segment, Trailer):
            write_all(handle, segment.make(crcs), segment.start)
