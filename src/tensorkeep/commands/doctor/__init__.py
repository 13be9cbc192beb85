"""`tensorkeep doctor`: what is installed here and works, and what of this machine matters to a training."""

from __future__ import annotations

import sys
from typing import Any

from tensorkeep.commands.doctor.advice import advise
from tensorkeep.commands.doctor.environment import variables, without_home
from tensorkeep.commands.doctor.machine import caches, disks, hardware, python
from tensorkeep.commands.doctor.packages import every_package
from tensorkeep.commands.shared import Say
from tensorkeep.output import Output, size


def doctor(*, say: Say = Say()) -> int:
    """Say what is installed here and works: packages, GPUs, memory, caches, disk, limits. For a report of a bug.

    Every package that is installed is imported, in a process of its own. Tokens, keys, passwords and what looks like
    one are masked, and your home folder is `~`. Exit code 1 where something is installed and cannot be imported.
    """
    out = say.output()
    out.remark("importing every package that is installed, in a process of its own ...")
    with out.progress("packages") as progress:
        listed, torch = every_package(progress)
    document: dict[str, Any] = {
        "tensorkeep": sys.modules["tensorkeep"].__version__,
        "python": python(),
        "packages": listed,
        "torch": torch,
        "machine": hardware(),
        "caches": caches(),
        "disks": disks(),
        "environment": variables(),
    }
    document["advice"] = advise(document)
    document = without_home(document)
    if say.json:
        out.document(document)
    else:
        _show(out, document)
    return 1 if any(row["imports"] is False for row in listed) else 0


def _show(out: Output, found: dict[str, Any]) -> None:
    """Print what was found for people."""
    own = found["python"]
    out.line(f"tensorkeep {found['tensorkeep']}, Python {own['version']} ({own['executable']}), {own['platform']}")
    out.line("\npackages")
    for row in found["packages"]:
        if row["version"] is None:
            state = f"not installed: {row['install']}"
        elif row["imports"]:
            state = f"{row['version']:<16} imports"
        else:
            state = f"{row['version']:<16} cannot be imported: {row['error']}"
        out.line(f"  {row['name']:<18} {state}")
    out.line("\nmachine")
    for name, value in [*_machine(found["machine"]), *_torch(found["torch"])]:
        out.line(f"  {name:<18} {value}")
    out.line("\ncaches and disk")
    for cache in found["caches"]:
        held = size(cache["bytes"]) if cache["counted"] else f"more than {size(cache['bytes'])} (counted for 0.5 s)"
        out.line(f"  {cache['name']:<18} {cache['path']}: {held if cache['exists'] else 'not there'}")
    for disk in found["disks"]:
        free = "cannot be asked" if disk["free"] is None else f"{size(disk['free'])} free of {size(disk['total'])}"
        out.line(f"  {disk['name']:<18} {disk['path']}: {free}")
    out.line("\nenvironment" if found["environment"] else "\nenvironment: none of the variables that matter is set")
    for name, value in found["environment"].items():
        out.line(f"  {name}={value}")
    out.line()
    for line in found["advice"]:
        out.line(f"advice: {line}")
    broken = sum(row["imports"] is False for row in found["packages"])
    works = sum(row["imports"] is True for row in found["packages"])
    out.line(f"{works} packages import" + (f", {broken} installed but broken" if broken else ", none is broken"))


def _machine(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines about processors, memory and limits."""
    quota = f", {found['cpu_limit']:g} by this container's limit" if found["cpu_limit"] else ""
    sha = {True: "yes", False: "no", None: "not known"}[found["sha_instructions"]]
    memory = "not known" if found["memory"] is None else size(found["memory"], memory=True)
    if found["memory_available"] is not None:
        memory += f", {size(found['memory_available'], memory=True)} available"
    if found["memory_limit"] is not None:
        memory += f", {size(found['memory_limit'], memory=True)} by this container's limit"
    limit = found["open_files"]
    files = "not known" if limit is None else f"{limit['soft']} (may be raised to {limit['hard']})"
    return [
        ("processors", f"{found['cpus_usable']} usable of {found['cpus']}{quota}; SHA instructions: {sha}"),
        ("memory", memory),
        ("open files", files),
        ("C compiler", found["compiler"] or "none found"),
    ]


def _torch(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Lines about torch's build, GPUs and what its processes can talk through."""
    if found is None:
        return [("GPUs", "not asked: torch is not there")]
    lines = [("torch is built for", found["build"])]
    for gpu in found["gpus"]:
        held = size(gpu["memory"], memory=True)
        lines.append((f"GPU {gpu['index']}", f"{gpu['name']}, {held}, capability {gpu['capability']}"))
    if not found["gpus"]:
        lines.append(("GPUs", "torch finds none"))
    if len(found["gpus"]) > 1:
        lines.append(("between GPUs", "direct (peer) access" if found["peer_access"] else "no direct access"))
    lines.append(("distributed", ", ".join(found["distributed"]) or "torch is built without it"))
    return lines
