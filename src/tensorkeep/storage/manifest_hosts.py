"""Checkpoints of which every host keeps its own ranks' files: who kept what, and what a part of one lacks."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError, printable

Held = tuple[tuple[str, tuple[str, ...]], ...]  # a host's name, and its ranks' files
PART = "is a part of a checkpoint"
_RANK = re.compile(r"__(\d{1,9})_\d{1,9}\.")


def hosts_in(entries: Any, files: Collection[str]) -> Held | None:
    """Check what a manifest says of hosts; None where it cannot be.

    Args:
        entries: as the manifest has them.
        files: the checkpoint's files.
    """
    out = []
    for entry in entries if isinstance(entries, list) else [None]:
        name, own = (entry.get("name"), entry.get("files")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(own, list):
            return None
        if not all(isinstance(file, str) and file in files for file in own):
            return None
        out.append((name, tuple(own)))
    return tuple(out)


def part_of(folder: Path, files: Collection[str], hosts: Held) -> TensorkeepError | None:
    """Say what a folder lacks that holds the files of one of several hosts; None for any other lack.

    Args:
        folder: the step folder.
        files: the checkpoint's files.
        hosts: who kept which.
    """
    here = {name for name in files if os.path.lexists(folder / name)}
    if not set(files) - here or not {name for _, own in hosts for name in own} >= set(files) - here:
        return None
    there = [name for _, own in hosts for name in own if name in here]
    kept = f"the shards of rank {ranks_of(there)}" if there else "no shards"
    away = lacking(hosts, here)
    return TensorkeepError(
        f"{PART}, of which every host keeps its own: it holds {kept}, and lacks those of {away}",
        where=folder,
        code="F05",
        hint=f"copy the folder {folder.name} of all hosts into one; a resume on these hosts fetches what it needs",
    )


def lacking(hosts: Held, here: Collection[str]) -> str:
    """Name the ranks whose files are not there, and the hosts that kept them.

    Args:
        hosts: who kept which.
        here: the files that are there.

    Returns:
        As the rest of a sentence; "" where nothing is lacking.
    """
    lost = [(name, [file for file in own if file not in here]) for name, own in hosts]
    return "; ".join(f"rank {ranks_of(gone)}, which {printable(name)} kept" for name, gone in lost if gone)


def ranks_of(files: Sequence[str]) -> str:
    """Name the ranks that wrote some files, at most eight.

    Args:
        files: their names.

    Example:
        >>> ranks_of(["__0_0.distcp", "__0_0.shards.json", "__12_0.distcp"])
        '0, 12'
    """
    found = sorted({int(m[1]) for file in files if (m := _RANK.match(file))})
    return ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
