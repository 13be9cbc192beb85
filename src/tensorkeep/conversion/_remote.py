"""Carry out a plan into an object store.

What an object store can and cannot do decides how an output is written. One object appears whole or not at all;
several never appear at once, and there is no rename. S3 takes objects in parts that nobody sees before they are put
together: `_multipart` writes that way. For any other store an output is first written, read back and proven under a
temporary prefix beside its place, and then copied by the store itself: data first, `.metadata` or the index after it,
the certificate last. A reader that finds the certificate finds everything; before that, a folder lacks its metadata.

With `overwrite`, a lone file is replaced in one step. A folder is not: its old metadata goes first, so that nobody
reads half of each. Where that copying fails, the proven copy stays under its temporary prefix and the error names it.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tensorkeep.conversion._multipart import place_parts
from tensorkeep.conversion._sending import LAST, Target, journals, send_files
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.proof import prove
from tensorkeep.conversion.sink import Checks, Progress, Result, quiet, result_of, sink_files
from tensorkeep.conversion.streams import Sums, with_ties
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.earlier import CHECKPOINT, certified, reads, strangers_in
from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import CERTIFICATE, TEMPORARY, LocalFolder
from tensorkeep.storage.layout import FileLayout
from tensorkeep.storage.leftovers import NAME
from tensorkeep.storage.overwriting import refuse_strangers
from tensorkeep.storage.remote import RemoteFolder, connect, explained_store, parent_of
from tensorkeep.storage.s3 import failures, speaks_s3
from tensorkeep.storage.signals import held

_MOST_PARTS = 9000  # S3 takes 10 000 parts of one object
_PART = 16 << 20  # bytes held of each file while it is sent


def carry_out_remote(
    plan: Plan,
    sources: Sequence[StateView],
    checks: Checks,
    out: str,
    to: str,
    shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Result:
    """Carry out a plan into an object store.

    Arguments, result and errors are those of `execution.carry_out`; the top of this file says what is atomic and what
    is not.
    """
    out = out.rstrip("/")
    system, final = connect(out)
    parent, name = parent_of(out), out.rpartition("/")[2]
    if "::" in out or not final.strip("/") or parent.endswith(":/"):
        raise TensorkeepError(
            "is not a place to write to", where=out, hint="give a folder or file below a bucket: s3://bucket/name"
        )
    _refuse_overlap(out, sources)
    stale = _stages(system, final, name)
    if plan.ranks is not None:
        hint = "write it to a disk, and copy the folder: aws s3 cp --recursive"
        raise TensorkeepError("ranks' files are not written into a store", where=out, hint=hint)
    begun = journals(system, list(stale)) if speaks_s3(system) else {}
    present = _refuse_existing(system, final, out, overwrite, list(stale), begun)
    layouts, single = sink_files(plan, name, to, shard_size)
    stage = f".{name}.{secrets.token_hex(4)}{TEMPORARY}"
    target = Target(system, out, final, f"{final.rpartition('/')[0]}/{stage}", single, present, begun)
    if speaks_s3(system):
        result = place_parts(target, layouts, plan, checks, progress)
    else:
        result = _staged(target, f"{parent}/{stage}", layouts, plan, checks, progress)
    result.cleared += _clear(system, final, name, stale)
    return result


def _staged(
    target: Target, stage: str, layouts: list[FileLayout], plan: Plan, checks: Checks, progress: Progress
) -> Result:
    """Write under a temporary prefix, read back, prove, let the store copy."""
    system, single, out = target.system, target.single, target.url
    name, staged, keep = out.rpartition("/")[2], target.stage, False
    started = time.perf_counter()
    try:
        sums = write_files(system, staged, layouts, plan, progress)
        checks.sources(sums)
        written = time.perf_counter()
        prove(stage + (f"/{name}" if single else ""), plan, sums, progress)
        checks.values(sums)
        proven = time.perf_counter()
        with explained_store(out):
            system.pipe_file(f"{staged}/{target.certificate}", checks.certificate(sums))
        keep = bool(target.present) and not single
        names = [*(layout.name for layout in layouts), target.certificate]
        with _staged_copy_named(stage, keep), explained_store(out):
            _put_in_place(system, staged, target.folder, names, target.present)
        keep = False
    finally:
        if not keep:
            with held(), contextlib.suppress(*failures()):
                system.rm(staged, recursive=True)
    seconds = {"write": written - started, "prove": proven - written, "sync": time.perf_counter() - proven}
    return result_of(out, layouts, sums, seconds)


def _refuse_overlap(out: str, sources: Sequence[StateView]) -> None:
    """Stop where the output is a source, lies in a source's folder, or holds a source."""
    for view in sources:
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


def _refuse_existing(
    system: Any, final: str, out: str, overwrite: bool, stale: list[str], begun: dict[str, str]
) -> list[str]:
    """Return the paths of the files that are at the place now; stop where they may not be replaced.

    What may be is what `storage.overwriting` says, for a store as for a disk. An overwrite that failed took the old
    metadata away first: its proven copy, in one of the prefixes `stale`, then says that the place is ours. So does the
    list `begun` of a command that was killed while it put files in their place: those alone are gone on with.
    """
    with explained_store(out):
        system.invalidate_cache()
        if not final.startswith("/") and not _bucket_there(system, final.partition("/")[0]):
            raise TensorkeepError(
                "no such bucket", where=out, hint="check the URL, or create the bucket first", code="F05"
            )
        # some tools mark a folder by an empty object of its own name
        there = system.find(final, detail=True)
        found = sorted(p for p in there if not p.endswith("/"))
    if begun and all(begun.get(p) == str(there[p].get("ETag")).strip('"') for p in found):
        return found
    if found and not overwrite:
        raise TensorkeepError("exists already", where=out, hint="choose another path, or add --overwrite")
    parent, name = parent_of(out), out.rpartition("/")[2]
    if [p.strip("/") for p in found] == [final.strip("/")]:
        beside = RemoteFolder(system, final.rpartition("/")[0], parent)
        others = [] if reads(out) or certified(beside, f"{name}.{CERTIFICATE}") else [name]
    else:
        inner = [p.strip("/").removeprefix(final.strip("/") + "/") for p in found]
        ours = bool(begun) or any(certified(RemoteFolder(system, s, parent), CERTIFICATE) for s in stale)
        others = strangers_in(RemoteFolder(system, final, out), out, inner, ours) if found else []
    refuse_strangers(CHECKPOINT.word, others, name, out)
    return found


def _bucket_there(system: Any, bucket: str) -> bool:
    """Whether a bucket exists, as far as one may know: writing would create one that does not."""
    if not speaks_s3(system):
        return bool(system.exists(bucket))
    try:
        system.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        return False
    except PermissionError:
        pass  # who may not look may still write
    return True


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

    def opened(layout: FileLayout) -> _Sent:
        return _Sent(system.open(f"{folder}/{layout.name}", "wb", block_size=max(_PART, layout.size // _MOST_PARTS)))

    with explained_store(folder):
        system.makedirs(folder, exist_ok=True)
        sums = send_files([f for f in layouts if not f.name.endswith(LAST)], opened, plan, progress)
        sums |= send_files([f for f in layouts if f.name.endswith(LAST)], opened, plan, progress)
    return with_ties(sums, plan)


class _Sent:
    """A file of fsspec on its way into a store."""

    def __init__(self, file: Any) -> None:
        self.file, self.write = file, file.write

    def end(self) -> None:
        self.file.close()

    def give_up(self) -> None:
        """Give up an unfinished object: closing it would publish what was sent so far."""
        with contextlib.suppress(AttributeError, *failures()):
            self.file.discard()
        with contextlib.suppress(AttributeError, *failures()):
            self.file.closed = True  # or the garbage collector closes it


def _put_in_place(system: Any, staged: str, folder: str, names: list[str], present: list[str]) -> None:
    """Let the store copy the proven files to their place, in order, and compare the sizes.

    Files that were there and are not overwritten are deleted first, their metadata before their data. Where there was
    nothing before, a failure leaves nothing.
    """
    wanted = {f"{folder}/{name}" for name in names}
    gone = [p for p in present if p not in wanted or p.endswith((*LAST, f"/{CERTIFICATE}"))]
    for path in sorted(gone, key=lambda p: not p.endswith((*LAST, CERTIFICATE))):
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
