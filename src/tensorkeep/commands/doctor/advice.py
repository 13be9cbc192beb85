"""One line for each thing that is known not to work together, or not to be enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorkeep.output import size

_FILES, _ROOM = 1024, 2_000_000_000
_DRIVER = Path("/proc/driver/nvidia/version")


def advise(found: dict[str, Any]) -> list[str]:
    """Return what to do about what `doctor` found.

    Args:
        found: its document, without advice.
    """
    return [*_versions(found["packages"]), *_torch(found), *_machine(found)]


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without what follows them.

    >>> release("2.13.0+cpu") > release("2.4"), release("5.0rc1")
    (True, (5, 0))
    """
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _versions(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what is broken, too old, or not of one version with another."""
    versions = {row["name"]: row["version"] for row in rows if row["version"] is not None}
    for row in rows:
        if row["version"] is None:
            continue
        name, least = row["name"], row["least"]
        if least and release(row["version"]) < release(least):
            yield f"{name} {row['version']} is older than {least}: pip install --upgrade '{name}>={least}'"
        elif row["imports"] is False:
            yield f"{name} is installed and cannot be imported: pip install --force-reinstall {name}"
    ours = {name: versions.get(name) for name in ("s3fs", "fsspec")}
    if None not in ours.values() and ours["s3fs"] != ours["fsspec"]:
        yield f"s3fs {ours['s3fs']} asks for fsspec of its version, not {ours['fsspec']}: pip install --upgrade s3fs"


def _torch(found: dict[str, Any]) -> Iterator[str]:
    """Yield what torch's build and version do not do."""
    torch, set_ = found["torch"], found["environment"]
    if torch is None:
        return
    if not torch["gpus"] and "CUDA_VISIBLE_DEVICES" in set_ and not set_["CUDA_VISIBLE_DEVICES"].strip("-1 "):
        yield "CUDA_VISIBLE_DEVICES hides every GPU: unset it"
    elif not torch["gpus"] and _DRIVER.exists():
        why = "is built for CPU" if torch["build"] == "CPU" else f"({torch['build']}) does not get on with the driver"
        yield f"there is an NVIDIA driver, and torch {why}: install the build of torch that is made for it"
    if len(torch["gpus"]) > 1 and not any(way.startswith("nccl") for way in torch["distributed"]):
        yield "torch has no NCCL: training on several GPUs needs a build with it"
    if release(torch["version"]) < (2, 6):
        yield "training.parallel: fsdp needs torch 2.6 or newer, and 2.7 for parameters that stay whole"


def _machine(found: dict[str, Any]) -> Iterator[str]:
    """Yield what is short: open files, free disk."""
    limit = (found["machine"]["open_files"] or {}).get("soft")
    if isinstance(limit, int) and limit < _FILES:
        yield f"only {limit} files may be open at once, and a checkpoint can have more: ulimit -n 4096"
    for disk in found["disks"]:
        if disk["free"] is not None and disk["free"] < _ROOM:
            yield f"{size(disk['free'])} are free for {disk['name']} ({disk['path']})"
