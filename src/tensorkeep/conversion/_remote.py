"""Carry out a plan into an object store.

What an object store can and cannot do decides how an output is written. One object appears whole or not at all;
several never appear at once, and there is no rename. So an output is first written, read back and proven under a
temporary prefix beside its place, and then copied by the store itself: data first, `.metadata` or the index after it,
the certificate last. A reader that finds the certificate finds everything; before that, a folder lacks its metadata.

With `overwrite`, a lone file is replaced in one step. A folder is not: its old metadata goes first, so that nobody
reads half of each. Where that copying fails, the proven copy stays under its temporary prefix and the error names it.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.proof import certify, check_sources, prove
from tensorkeep.conversion.sink import THREADS, Progress, Result, quiet, sink_files, stored
from tensorkeep.conversion.streams import Sums, with_ties, write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.earlier import CHECKPOINT, certified, reads, strangers_in
from tensorkeep.storage.files import CERTIFICATE, TEMPORARY, LocalFolder
from tensorkeep.storage.layout import FileLayout, Fixed, Slot
from tensorkeep.storage.leftovers import NAME
from tensorkeep.storage.overwriting import refuse_strangers
from tensorkeep.storage.remote import RemoteFolder, connect, explained_store, failures, parent_of
from tensorkeep.storage.signals import held

_MOST_PARTS = 9000  # S3 takes 10 000 parts of one object
_PART = 16 << 20  # bytes held of each file while it is sent
_LAST = (".metadata", ".index.json")  # names that make a folder readable end so


def convert_remote(
    plan: Plan, out: str, to: str, shard_size: int | None = None, overwrite: bool = False, progress: Progress = quiet
) -> Result:
    """Carry out a plan into an object store: write beside the place, read back, prove, then copy.

    Arguments, result and errors are those of `execution.convert`; the top of this file says what is atomic and what is
    not.
    """
    out = out.rstrip("/")
    system, final = connect(out)
    parent, name = parent_of(out), out.rpartition("/")[2]
    if "::" in out or not final.strip("/") or parent.endswith(":/"):
        raise TensorkeepError(
            "is not a place to write to", where=out, hint="give a folder or file below a bucket: s3://bucket/name"
        )
    _refuse_overlap(out, plan)
    stale = _stages(system, final, name)
    present = _refuse_existing(system, final, out, overwrite, list(stale))
    if plan.ranks is not None:
        hint = "write it to a disk, and copy the folder: aws s3 cp --recursive"
        raise TensorkeepError("ranks' files are not written into a store", where=out, hint=hint)
    layouts, single = sink_files(plan, name, to, shard_size)
    started = time.perf_counter()
    stage = f".{name}.{secrets.token_hex(4)}{TEMPORARY}"
    staged = f"{final.rpartition('/')[0]}/{stage}"
    keep = False
    try:
        sums = write_files(system, staged, layouts, plan, progress)
        check_sources(plan, sums)
        written = time.perf_counter()
        prove(f"{parent}/{stage}" + (f"/{name}" if single else ""), plan, sums, progress)
        proven = time.perf_counter()
        certificate = f"{name}.{CERTIFICATE}" if single else CERTIFICATE
        with explained_store(out):
            system.pipe_file(f"{staged}/{certificate}", certify(plan, sums, to))
        keep = bool(present) and not single
        names = [*(layout.name for layout in layouts), certificate]
        with _staged_copy_named(f"{parent}/{stage}", keep), explained_store(out):
            _put_in_place(system, staged, final.rpartition("/")[0] if single else final, names, present)
        keep = False
    finally:
        if not keep:
            with held(), contextlib.suppress(*failures()):
                system.rm(staged, recursive=True)
    cleared = _clear(system, final, name, stale)
    casts = {n: s.cast for n, s in sums.items() if s.cast.overflowed or s.cast.vanished}
    seconds = {"write": written - started, "prove": proven - written, "sync": time.perf_counter() - proven}
    return Result(out, stored(layouts), {n: s.digest for n, s in sums.items()}, casts, seconds, cleared)


def _refuse_overlap(out: str, plan: Plan) -> None:
    """Stop where the output is a source, lies in a source's folder, or holds a source."""
    for view in plan.sources:
        source, named = view.folder.url, view.path.rstrip("/")
        if isinstance(view.folder, LocalFolder):
            continue
        if out == named:
            raise TensorkeepError("the sink is the source", where=out, hint="write to another path")
        if named == source and out.startswith(f"{source}/"):
            raise TensorkeepError(
                f"the sink lies inside the source {source}", where=out, hint="write to a path outside it"
            )
        if named.startswith(f"{out}/"):
            raise TensorkeepError(f"the source {named} lies inside the sink", where=out, hint="write to another path")


def _refuse_existing(system: Any, final: str, out: str, overwrite: bool, stale: list[str]) -> list[str]:
    """Return the paths of the files that are at the place now; stop where they may not be replaced.

    What may be is what `storage.overwriting` says, for a store as for a disk. An overwrite that failed took the old
    metadata away first: its proven copy, in one of the prefixes `stale`, then says that the place is ours.
    """
    with explained_store(out):
        system.invalidate_cache()
        if not final.startswith("/") and not system.exists(final.partition("/")[0]):  # writing would create it
            raise TensorkeepError(
                "no such bucket", where=out, hint="check the URL, or create the bucket first", code="F05"
            )
        # some tools mark a folder by an empty object of its own name
        found = sorted(p for p in system.find(final) if not p.endswith("/"))
    if found and not overwrite:
        raise TensorkeepError("exists already", where=out, hint="choose another path, or add --overwrite")
    parent, name = parent_of(out), out.rpartition("/")[2]
    if [p.strip("/") for p in found] == [final.strip("/")]:
        beside = RemoteFolder(system, final.rpartition("/")[0], parent)
        others = [] if reads(out) or certified(beside, f"{name}.{CERTIFICATE}") else [name]
    else:
        inner = [p.strip("/").removeprefix(final.strip("/") + "/") for p in found]
        ours = any(certified(RemoteFolder(system, s, parent), CERTIFICATE) for s in stale)
        others = strangers_in(RemoteFolder(system, final, out), out, inner, ours) if found else []
    refuse_strangers(CHECKPOINT.word, others, name, out)
    return found


def _stages(system: Any, final: str, name: str) -> dict[str, list[tuple[str, Any]]]:
    """List the temporary prefixes of this output that are there now, each with its objects and their sizes."""
    found = {}
    with contextlib.suppress(*failures()):
        system.invalidate_cache()
        for entry in system.ls(final.rpartition("/")[0], detail=True):
            match = NAME.fullmatch(entry["name"].rstrip("/").rpartition("/")[2])
            if entry["type"] == "directory" and match and match["sink"] == name:
                inner = system.find(entry["name"], detail=True)
                found[entry["name"]] = sorted((path, inner[path].get("size")) for path in inner)
    return found


def _clear(system: Any, final: str, name: str, stale: dict[str, list[tuple[str, Any]]]) -> list[str]:
    """Remove the temporary prefixes that killed commands left, now that a whole output is in place.

    A store has no locks: one that changed while this command ran is another's at work, and stays.
    """
    cleared = []
    for place, objects in _stages(system, final, name).items():
        if stale.get(place) == objects:
            with contextlib.suppress(*failures()):
                system.rm(place, recursive=True)
                cleared.append(place.rstrip("/").rpartition("/")[2])
    return cleared


def write_files(
    system: Any, folder: str, layouts: Sequence[FileLayout], plan: Plan, progress: Progress
) -> dict[str, Sums]:
    """Send every file front to back, several at once; the files that make a folder readable come last."""
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
    total, sent, stop = sum(s.nbytes for f in layouts for s in f.slots), [0], threading.Event()

    def count(size: int) -> None:
        if stop.is_set():
            raise TensorkeepError("interrupted")  # by a failure elsewhere, which is the one that is told
        sent[0] += size
        progress("write", sent[0], total)

    sums: dict[str, Sums] = {}
    data = [f for f in layouts if not f.name.endswith(_LAST)]
    with explained_store(folder), ThreadPoolExecutor(THREADS) as pool:
        system.makedirs(folder, exist_ok=True)
        try:
            jobs = [pool.submit(_send, system, folder, layout, steps, plan, count) for layout in data]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in done:
                sums.update(job.result())
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        stop.clear()
        for layout in layouts:
            if layout.name.endswith(_LAST):
                sums.update(_send(system, folder, layout, steps, plan, count))
    return with_ties(sums, plan)


def _send(
    system: Any, folder: str, layout: FileLayout, steps: dict[str, Step], plan: Plan, count: Any
) -> dict[str, Sums]:
    """Send one file from its first byte to its last: checksums are known when the bytes that hold them are due."""
    sums: dict[str, Sums] = {}
    file = system.open(f"{folder}/{layout.name}", "wb", block_size=max(_PART, layout.size // _MOST_PARTS))
    try:
        for segment in layout.segments:
            if isinstance(segment, Fixed):
                file.write(segment.data)
            elif isinstance(segment, Slot):
                sums[segment.tensor] = _send_tensor(file, segment, steps[segment.tensor], plan, count)
            else:
                file.write(segment.make({name: made.crc for name, made in sums.items()}))
    except BaseException:
        _discard(file)
        raise
    file.close()
    return sums


def _send_tensor(file: Any, slot: Slot, step: Step, plan: Plan, count: Any) -> Sums:
    """Send the bytes of one tensor, and stop where they are not as many as its header promises."""
    sent = 0

    def write(piece: memoryview) -> None:
        nonlocal sent
        file.write(piece)
        sent += len(piece)
        count(len(piece))

    sums = write_tensor(step, plan.sources, write)
    if sent != slot.nbytes:
        raise TensorkeepError(
            f"{slot.tensor}: {sent} bytes instead of {slot.nbytes}", hint="the source changed while it was read"
        )
    return sums


def _discard(file: Any) -> None:
    """Give up an unfinished object: closing it would publish what was sent so far."""
    with contextlib.suppress(AttributeError, *failures()):
        file.discard()
    with contextlib.suppress(AttributeError, *failures()):
        file.closed = True  # or the garbage collector closes it


def _put_in_place(system: Any, staged: str, folder: str, names: list[str], present: list[str]) -> None:
    """Let the store copy the proven files to their place, in order, and compare the sizes.

    Files that were there and are not overwritten are deleted first, their metadata before their data. Where there was
    nothing before, a failure leaves nothing.
    """
    wanted = {f"{folder}/{name}" for name in names}
    gone = [p for p in present if p not in wanted or p.endswith((*_LAST, f"/{CERTIFICATE}"))]
    for path in sorted(gone, key=lambda p: not p.endswith((*_LAST, CERTIFICATE))):
        system.rm_file(path)
    try:
        for name in names:
            system.cp_file(f"{staged}/{name}", f"{folder}/{name}")
        system.invalidate_cache()
        for name in names:
            if system.info(f"{staged}/{name}")["size"] != system.info(f"{folder}/{name}")["size"]:
                raise TensorkeepError(f"{name} was not copied whole", where=folder, code="F03", hint="run again")
    except BaseException:
        for path in sorted(wanted, reverse=True) if not present else ():
            with contextlib.suppress(*failures()):
                system.rm_file(path)
        raise


@contextlib.contextmanager
def _staged_copy_named(stage: str, kept: bool) -> Iterator[None]:
    """Say in an error where the proven copy is, if it stays."""
    try:
        yield
    except TensorkeepError as error:
        if kept:
            error.hint = f"the new checkpoint is whole in {stage}: run again with --overwrite, or copy it by hand"
        raise
