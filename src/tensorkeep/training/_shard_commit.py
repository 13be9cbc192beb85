"""The end of a sharded save: when every rank's file is on the disk the first rank makes them one checkpoint."""

from __future__ import annotations

import pickle
import socket
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable, run_manifest
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import sync_folder
from tensorkeep.storage.run_folder import METADATA
from tensorkeep.storage.run_manifest import MANIFEST
from tensorkeep.training._board import Board
from tensorkeep.training._dcp_metadata import pickled

if TYPE_CHECKING:
    from tensorkeep.training._shard_files import Report


class About(NamedTuple):
    """What the manifest says beside files and shards.

    Attributes:
        step: the optimizer step.
        base: what identifies frozen weights that are stored elsewhere.
        not_captured: names of what could not be saved.
        documents: further small files, by name.
        hosts: where every host keeps its own ranks' files: its name, and its ranks.
    """

    step: int = 0
    base: dict[str, Any] | None = None
    not_captured: tuple[str, ...] = ()
    documents: Mapping[str, bytes] = MappingProxyType({})
    hosts: tuple[tuple[str, tuple[int, ...]], ...] = ()


def described(metadata: Metadata, reports: Sequence[Report]) -> bytes:
    """Make the bytes of `.metadata`.

    Args:
        metadata: as the planner made it.
        reports: what each rank wrote, with places.
    """
    return pickled(metadata, {index: place for report in reports for index, place in report.places.items()})


def complete(folder: Path, description: bytes, reports: Sequence[Report], about: About) -> None:
    """Write `.metadata`, documents and manifest beside the files of all ranks; the folder is then whole and durable.

    Args:
        folder: where the ranks wrote, under its temporary name.
        description: the bytes of `.metadata`.
        reports: what each rank wrote.
        about: the rest.

    Raises:
        TensorkeepError: a file that a rank wrote is not to be seen from here, or the disk fails.
    """
    written: dict[str, durable.Written] = {}
    own = about.hosts[0][1] if about.hosts else range(len(reports))  # the first rank's host is the first one
    for rank, report in ((rank, reports[rank]) for rank in own):
        seen = {name: (folder / name).stat().st_size for name in report.files if (folder / name).is_file()}
        if seen != {name: entry.size for name, entry in report.files.items()}:
            raise TensorkeepError(
                f"rank {rank} wrote {report.file} on {report.host}, and {socket.gethostname()} does not see it whole",
                where=folder.parent,
                code="F05",
                hint="save into a folder that all hosts share",
            )
    for report in reports:
        written |= {name: durable.Written(entry.size, entry.chunks, {}, []) for name, entry in report.files.items()}
    kept = [(name, [file for rank in ranks for file in reports[rank].files]) for name, ranks in about.hosts]
    with explained(folder):
        for name, data in ((METADATA, description), *about.documents.items()):
            written[name] = durable.write_small(folder / name, data)
        manifest = run_manifest.make_manifest(about.step, written, {}, about.base, about.not_captured, kept)
        durable.write_small(folder / MANIFEST, manifest)
        sync_folder(folder)


def described_by(folder: Path, about: About) -> dict[str, bytes]:
    """Return what every host needs beside its ranks' files, as `complete` wrote it: metadata, documents, manifest.

    Args:
        folder: as `complete` left it.
        about: as `complete` took it.
    """
    with explained(folder):
        return {name: (folder / name).read_bytes() for name in (METADATA, *about.documents, MANIFEST)}


def completed(folder: Path, small: Mapping[str, bytes]) -> None:
    """Complete a host's own folder with what the first rank wrote beside its own.

    Args:
        folder: where this host's ranks wrote, under its temporary name.
        small: as `described_by` gave it; the manifest comes last.

    Raises:
        TensorkeepError: the disk fails.
    """
    with explained(folder):
        for name, data in small.items():
            durable.write_small(folder / name, data)
        sync_folder(folder)


def packed(value: Any) -> bytes:
    """Return a note for the other ranks, of this very job."""
    return zlib.compress(pickle.dumps(value), 1)


def unpacked(note: bytes) -> Any:
    """Return what a note of another rank of this job holds."""
    return pickle.loads(zlib.decompress(note))  # noqa: S301  from a process of this job, as in any collective


def gathered(board: Board, found: Report | TensorkeepError) -> list[Report] | TensorkeepError | None:
    """Collect what every rank wrote, without a collective.

    Args:
        board: of this save.
        found: what this rank wrote, or why it could not.

    Returns:
        On the first rank the reports, or the first error that a rank had; None on the others.

    Raises:
        TensorkeepError: a rank did not finish in time.
    """
    notes = board.gather(packed(found))
    if notes is None:
        return None
    all_found = [unpacked(note) for note in notes]
    failed = next((f for f in all_found if isinstance(f, TensorkeepError)), None)
    return failed if failed is not None else all_found
