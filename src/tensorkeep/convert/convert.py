"""Convert: carry out a plan by streaming, prove what was written, leave a certificate.

Layouts are known beforehand, so several threads fill one file at once; each holds one chunk. The sink appears under
its name only after it has been read back and every tensor's digest equals that of the bytes the plan made.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import CERTIFICATE, LocalFolder, explained, local_path
from tensorkeep.storage.layout import FileLayout, Fixed, Slot, Trailer, small_file
from tensorkeep.convert.naming import minimind
from tensorkeep.storage.placement import refuse_existing, replacing_all, write_bytes
from tensorkeep.convert.plan import Plan, Step
from tensorkeep.convert.proof import certify, check_sources, prove
from tensorkeep.convert.streams import Cast, Sums, with_ties, write_tensor
from tensorkeep.formats.view import FORMATS, StateView

THREADS = min(4, os.cpu_count() or 1)
Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


def quiet(_what: str, _done: int, _total: int) -> None:
    """The progress callback of those who do not watch."""


@dataclass
class Result:
    """What a conversion did: the sink's path, bytes, digests by tensor, casts that lost values, seconds by phase."""

    path: str
    nbytes: int
    digests: dict[str, str]
    casts: dict[str, Cast] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def sink_format(to: str) -> Any:
    """The module of a writable format."""
    module = importlib.import_module(FORMATS[to]) if to in FORMATS else None
    if module is None or not hasattr(module, "layout"):
        raise TensorkeepError(f"cannot write {to!r}", hint="--to hf, dcp, pth or peft")
    return module


def convert(
    plan: Plan, out: str, to: str, shard_size: int | None = None, overwrite: bool = False, progress: Progress = quiet
) -> Result:
    """Write the plan to `out` (a folder; a file for a name ending in .safetensors, .pth, .pt or .bin) and prove it.

    Returns digests of every tensor of the sink. Raises TensorkeepError, and leaves no sink, where anything fails.
    """
    for view in plan.sources:
        view.checked = True  # every byte passes through here anyway: notice what rotted
    out = out.removeprefix("file://")
    if "://" in out:
        from tensorkeep.convert.remote import convert_remote

        return convert_remote(plan, out, to, shard_size, overwrite, progress)
    final = local_path(out)
    refuse_overlap(final, plan.sources)
    refuse_existing(final, overwrite)
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


class Place(NamedTuple):
    """Where a sink is written before it gets its name: the file or folder, the folder its files go into, its files."""

    temporary: Path
    folder: Path
    layouts: list[FileLayout]
    certificate: Path


@contextlib.contextmanager
def placing(final: Path, layouts: list[FileLayout], single: bool, overwrite: bool) -> Iterator[Place]:
    """`replacing` for a sink and its certificate: in a folder beside the data, of a lone file under a name beside it."""
    finals, over = ([final, beside(final)], [overwrite, True]) if single else ([final], [overwrite])
    with replacing_all(finals, over) as temporaries:
        temporary = temporaries[0]
        if single:
            lone = [FileLayout(temporary.name, layouts[0].segments)]
            yield Place(temporary, temporary.parent, lone, temporaries[1])
            return
        with explained(temporary):
            temporary.mkdir()
        yield Place(temporary, temporary, layouts, temporary / CERTIFICATE)


def beside(path: Path) -> Path:
    """Where the certificate of a lone file lies."""
    return path.with_name(f"{path.name}.{CERTIFICATE}")


def refuse_overlap(final: Path, sources: Sequence[StateView]) -> None:
    """Stop where the sink is a source, lies in a source's folder, or holds a source: writing it would change that."""
    sink = final.resolve()
    for view in sources:
        if not isinstance(view.folder, LocalFolder):
            continue
        folder, named = view.folder.path.resolve(), local_path(view.path)
        source = folder if named.is_dir() or not named.exists() else folder / named.name  # a Hub id names no path
        if sink in (source, source.resolve()):
            raise TensorkeepError("the sink is the source", where=final, hint="write to another path")
        if source == folder and folder in sink.parents:
            raise TensorkeepError(
                f"the sink lies inside the source {folder}", where=final, hint="write to a path outside it"
            )
        if sink in source.parents:
            raise TensorkeepError(
                f"the source {source} lies inside the sink", where=final, hint="write to another path"
            )


def sink_files(plan: Plan, name: str, to: str, shard_size: int | None) -> tuple[list[FileLayout], bool]:
    """The layouts of all files of a sink, metadata last, and whether the sink is a lone file."""
    form = sink_format(to)
    single = name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt"))
    if single and to not in ("hf", "pth"):
        raise TensorkeepError(f"{to} is a folder, {name} names a file", hint="leave the ending out")
    options: dict[str, Any] = {
        "shard_size": shard_size,
        "root": plan.root,
        "config": plan.config,
        "roots": plan.roots,
        "beside": plan.beside,
    }
    if single:
        options |= {"name": name, "shard_size": 1 << 62}
    elif to == "pth" and plan.naming == "minimind":
        embeddings = ("model.embed_tokens.weight", "tok_embeddings.weight")
        width = next((t.shape[-1] for t in plan.tensors if t.name in embeddings), 0)  # where no config says it
        options["name"] = minimind.file_name(
            {"hidden_size": width, **(plan.config or {})},
            [t.name for t in plan.tensors],
            minimind.stage_of(plan.sources[0].path),
        )
    layouts = form.layout(plan.tensors, **options)
    if not single:
        layouts = [
            *[small_file(c.name, c.data) for c in plan.companions if c.name not in {f.name for f in layouts}],
            *layouts,
        ]
    return layouts, single


def stored(layouts: Sequence[FileLayout]) -> int:
    """Bytes of tensor data in these files; tensors that share a storage count once."""
    return sum(slot.nbytes for layout in layouts for slot in layout.slots)


# -- writing ------------------------------------------------------------------------------------------------------


def write_files(layouts: Sequence[FileLayout], folder: Path, plan: Plan, progress: Progress = quiet) -> dict[str, Sums]:
    """Write and fsync every file of a sink; the checksums of each tensor come back by name."""
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
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    for job in done:
        job.result()  # raises what failed first; the caller stops the others
    return {slot.tensor: job.result() for job, slot in zip(jobs, slots)}


def _fill(
    handle: int, slot: Slot, step: Step, sources: Sequence[StateView], count: Callable[[int], None], crc: bool
) -> Sums:
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
    """pwrite until everything is written."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


def _write_rest(handle: int, layout: FileLayout, crcs: dict[str, int]) -> None:
    for segment in layout.segments:
        if isinstance(segment, Fixed):
            write_all(handle, segment.data, segment.start)
        elif isinstance(segment, Trailer):
            write_all(handle, segment.make(crcs), segment.start)
