"""Where a conversion writes: the format's files, their temporary place, and what may not be overwritten."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.streams import Cast, Sums
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import table as formats
from tensorkeep.formats.earlier import CHECKPOINT, LONE_CERTIFICATE
from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import CERTIFICATE, LocalFolder, explained, local_path
from tensorkeep.storage.files import Progress as Progress
from tensorkeep.storage.layout import FileLayout, small_file
from tensorkeep.storage.placement import replacing_all
from tensorkeep.storage.spreading import cores

THREADS = cores()
_MOST_RANKS = 4096


def quiet(_what: str, _done: int, _total: int) -> None:
    """Report no progress: the default of every `progress` argument."""


@dataclass
class Result:
    """What a conversion wrote.

    Args:
        path: the file, folder or URL.
        nbytes: bytes of tensor data.
        digests: xxh3_128 of each tensor's bytes in hex, by name.
        casts: what was lost, for each tensor whose cast lost something.
        seconds: how long each phase took ("write", "prove", "sync").
        cleared: what killed commands had left beside the place in a store, and is gone now.
        resumed: bytes that a killed command had sent to a store, and that were not sent again.
    """

    path: str
    nbytes: int
    digests: dict[str, str]
    casts: dict[str, Cast] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cleared: list[str] = field(default_factory=list)
    resumed: int = 0


class Checks(NamedTuple):
    """What is asked of an output before it gets its name, each called with the checksums of every tensor.

    Attributes:
        sources: raises where a source changed or is damaged.
        values: raises where what was computed is not to be trusted.
        certificate: gives the certificate's bytes.
    """

    sources: Callable[[dict[str, Sums]], None]
    values: Callable[[dict[str, Sums]], None]
    certificate: Callable[[dict[str, Sums]], bytes]


class Place(NamedTuple):
    """Where an output is written before it gets its name.

    Args:
        temporary: the file or folder that will be renamed.
        folder: the folder that the files go into.
        layouts: the files.
        certificate: the path of the certificate.
    """

    temporary: Path
    folder: Path
    layouts: list[FileLayout]
    certificate: Path


def result_of(path: str, layouts: Sequence[FileLayout], sums: dict[str, Sums], seconds: dict[str, float]) -> Result:
    """Say what was written.

    Args:
        path: where it is.
        layouts: its files.
        sums: the checksums of its tensors, by name.
        seconds: how long each phase took.
    """
    casts = {n: s.cast for n, s in sums.items() if s.cast.overflowed or s.cast.vanished}
    return Result(path, stored(layouts), {n: s.digest for n, s in sums.items()}, casts, seconds)


@contextlib.contextmanager
def placing(final: Path, layouts: list[FileLayout], single: bool, overwrite: bool) -> Iterator[Place]:
    """Give an output and its certificate a temporary place, and put both under their names when the block ends well.

    Args:
        final: the path that the output gets.
        layouts: the files.
        single: whether the output is one file; its certificate then lies beside it, and otherwise in its folder.
        overwrite: replace what is there, if it is a checkpoint.

    Yields:
        Where to write.

    Raises:
        TensorkeepError: the place exists or cannot be written; then nothing of the output is left.
    """
    finals, over = ([final, beside(final)], [overwrite, True]) if single else ([final], [overwrite])
    with replacing_all(finals, over, [CHECKPOINT, LONE_CERTIFICATE][: len(finals)]) as temporaries:
        temporary = temporaries[0]
        if single:
            lone = [FileLayout(temporary.name, layouts[0].segments)]
            yield Place(temporary, temporary.parent, lone, temporaries[1])
            return
        with explained(temporary):
            temporary.mkdir()
        yield Place(temporary, temporary, layouts, temporary / CERTIFICATE)


def beside(path: Path) -> Path:
    """Return where the certificate of a lone file lies.

    Args:
        path: the file.
    """
    return path.with_name(f"{path.name}.{CERTIFICATE}")


def refuse_overlap(final: Path, sources: Sequence[StateView]) -> None:
    """Stop where an output is a source, lies in a source's folder, or holds a source: writing it would change that.

    Args:
        final: the path to be written.
        sources: the checkpoints that are read.

    Raises:
        TensorkeepError: they overlap.
    """
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
    """Lay out all files of an output.

    Args:
        plan: the tensors and companions.
        name: the output's file or folder name, whose ending says whether it is one file.
        to: the format.
        shard_size: largest size of one weight file in bytes; None for the format's usual one.

    Returns:
        The files, metadata last, and whether the output is one file.

    Raises:
        TensorkeepError: the format cannot be written, or is a folder where `name` is a file's.
    """
    form = formats.writer(to)
    single = formats.names_a_file(to, name)
    options: dict[str, Any] = {
        "shard_size": shard_size,
        "root": plan.root,
        "config": plan.config,
        "companions": plan.companions,
        "roots": plan.roots,
        "beside": plan.beside,
        "header": plan.header,
        **_ranks(plan.ranks, to, shard_size),
    }
    if single:
        options |= {"name": name, "shard_size": 1 << 62}
    elif plan.naming and hasattr(scheme := namings.module(plan.naming), "sink_name"):
        shapes = {t.name: t.shape for t in plan.tensors}
        if name_there := scheme.sink_name(to, plan.config, shapes, plan.sources[0].path):
            options["name"] = name_there
    layouts = form.layout(plan.tensors, **options)
    if not single:
        layouts = [
            *[small_file(c.name, c.data) for c in plan.companions if c.name not in {f.name for f in layouts}],
            *layouts,
        ]
    return layouts, single


def _ranks(ranks: int | None, to: str, shard_size: int | None) -> dict[str, int]:
    """Return the option of formats that can be written as several ranks do; refuse it where it means nothing."""
    if ranks is None:
        return {}
    if not formats.fact(to, "RANKS"):
        raise TensorkeepError(f"{to} is not written by ranks", where="--ranks", hint="--to dcp")
    if not 1 <= ranks <= _MOST_RANKS:
        raise TensorkeepError(f"{ranks} is no number of ranks", where="--ranks", hint=f"1 to {_MOST_RANKS}")
    if shard_size is not None:
        raise TensorkeepError("every rank writes one file", where="--shard-size", hint="leave it out, or --ranks")
    return {"ranks": ranks}


def stored(layouts: Sequence[FileLayout]) -> int:
    """Return the bytes of tensor data in these files; tensors that share a storage count once.

    Args:
        layouts: the files.
    """
    return sum(slot.nbytes for layout in layouts for slot in layout.slots)
