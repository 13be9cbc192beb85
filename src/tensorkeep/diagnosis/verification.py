"""Verify that a checkpoint is complete and that every byte is what its certificate says.

Structure is checked by opening it. Content is checked against our certificate where there is one, and against the
zip's own CRC-32 in torch.save archives, which torch writes and never reads.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorkeep.conversion import fit
from tensorkeep.conversion.proof import read_certificate, stored_name
from tensorkeep.diagnosis.evidence.resume_files import bad_entries, damaged_files, opaque_objects
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding, counted
from tensorkeep.formats import seals
from tensorkeep.formats import table as formats
from tensorkeep.formats.saves import Save, saves_in
from tensorkeep.formats.view import StateView, read
from tensorkeep.storage import run_folder, run_manifest
from tensorkeep.storage.files import LocalFolder, Progress, left_over, local_path


def verify(path: str | Path, progress: Progress | None = None) -> tuple[list[Finding], StateView | None, bool]:
    """Check that a checkpoint is whole and unchanged.

    Its structure is checked by opening it, and so are the files beside it that a resume reads. Its content is compared
    with the manifest of a run's checkpoint, or the seal of another program's save, or else with its certificate
    (tensorkeep.json), or else with the CRC-32 in torch.save archives.

    Args:
        path: A checkpoint, or a run's folder: then its newest whole checkpoint. Of another program's saves those newer
            than the newest whole one are findings.
        progress: Called with what is being done, the bytes done and the bytes in all.

    Returns:
        The findings (F codes, K01, K02 and K05), the checkpoint's view (None where it cannot be read), and whether
        there was a manifest or certificate to compare with.

    Raises:
        TensorkeepError: Where `path` is no checkpoint at all.

    Example:
        >>> findings, view, certified = verify("out")              # doctest: +SKIP
    """
    if (step := _step(path)) is not None:
        return *_verify_step(*step, progress), True
    saves = [] if "://" in str(path) else saves_in(path)
    if any(seals.is_sealed(save.path) for save in saves):
        return *_verify_saves(saves, progress), True
    findings = interrupted(path)
    try:
        view = read(path)
    except TensorkeepError as error:
        gone = "://" not in str(path) and not os.path.lexists(local_path(path))
        if gone or error.code is None or not error.code.startswith("F"):
            raise
        return [*findings, Finding(error.code, "error", f"{error.where}: {error.what}", fix=error.hint)], None, False
    findings += [Finding(n.code, "warning", n.message, n.names) for n in view.notes]
    findings += opaque_objects(view)
    certificate = read_certificate(view)
    try:
        if certificate is not None:
            findings += _against_certificate(view, certificate, progress)
        else:
            findings += against_crc(view, progress)
    except TensorkeepError as error:
        if error.code is None or not error.code.startswith("F"):
            raise
        findings.append(Finding(error.code, "error", f"{error.where}: {error.what}", fix=error.hint))
    hollow = [n for n, r in view.items() if 0 in r.shape]
    if len(hollow) * 2 > len(view):
        nothing = fit.empty(hollow, len(view), path)
        findings.append(Finding("K05", "error", nothing.what, hollow, fix=nothing.hint))
    findings += damaged_files(view, whole=True)
    return findings, view, certificate is not None


def _step(path: str | Path) -> tuple[Path, list[Finding]] | None:
    """Find the checkpoint of one of our runs that a path means, and findings about newer ones; None for other paths."""
    if "://" in str(path) or not (folder := local_path(path)).exists():
        return None
    try:
        if folder.is_dir() and (found := run_folder.find_checkpoint(folder.resolve())) is not None:
            return found
        return (folder, []) if seals.is_sealed(folder) else None
    except TensorkeepError as error:  # no step of the run is whole: say what is wrong with each
        if error.code is None:
            raise
        run = folder.parent if folder.name == run_folder.CHECKPOINTS else folder
        newest, *older = (run_folder.folder_of(run, s) for s in run_folder.steps(run))
        return newest, [f for step in older for f in run_manifest.findings(step)]


def _verify_saves(saves: list[Save], progress: Progress | None) -> tuple[list[Finding], StateView | None]:
    """Compare the saves of a training with their seals, newest first, down to the first that is whole.

    One without a seal is a warning: its writing may go on. Damage in a sealed one is an error, though an older one is
    whole.
    """
    passed: list[Finding] = []
    for save in saves:
        sealed = seals.is_sealed(save.path)
        wrong = [f for f in seals.findings(save.path, progress) if f.severity == "error"]
        if not wrong:
            findings, view = _opened(save.path)
            return [*passed, *interrupted(save.path), *findings], view
        passed += wrong if sealed else [replace(f, severity="warning") for f in wrong]
    return passed, None


def _opened(save: Path) -> tuple[list[Finding], StateView | None]:
    """Open what is whole; where only its own program can, that is an info."""
    try:
        return [], read(save)
    except TensorkeepError as error:
        what = f"{save}: its bytes are its seal's; it cannot be opened here: {error.what}"
        return [Finding(error.code or "F07", "info", what, fix=error.hint)], None


def _verify_step(
    folder: Path, passed: list[Finding], progress: Progress | None
) -> tuple[list[Finding], StateView | None]:
    """Compare every byte of a checkpoint with its manifest; the view is None where an error was found."""
    findings = [*passed, *interrupted(folder), *seals.findings(folder, progress)]
    if any(f.severity == "error" for f in findings):
        return findings, None
    more, view = _opened(folder)
    return [*findings, *more], view


def interrupted(path: str | Path) -> list[Finding]:
    """Report temporary files that an interrupted write left behind.

    Args:
        path: A local checkpoint.

    Returns:
        One warning (F01) that lists them, since no reader takes them; [] where there is none.
    """
    folder = Path(path)
    found = left_over(folder) + [n for n in left_over(folder.parent) if n.startswith(f".{folder.name}.")]
    if not found:
        return []
    return [Finding("F01", "warning", f"an interrupted write left {', '.join(found)}", found, fix="delete them")]


def _against_certificate(view: StateView, certificate: dict[str, Any], progress: Progress | None) -> list[Finding]:
    """Report tensors whose bytes, dtype or shape are not what the certificate says (F03), and names (K01, K02)."""
    wanted = {
        stored_name(n, certificate.get("root"), view.format): entry for n, entry in certificate["tensors"].items()
    }
    findings = []
    missing, extra = sorted(set(wanted) - set(view)), sorted(set(view) - set(wanted))
    if missing:
        findings.append(Finding("K01", "error", f"{len(missing)} tensors of the certificate are missing", missing))
    if extra:
        findings.append(Finding("K02", "error", f"{len(extra)} tensors are not in the certificate", extra))
    names = [n for n in wanted if n in view]
    total, done, damaged = sum(view[n].nbytes for n in names), 0, []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(view.digest, names)):
            entry, record = wanted[name], view[name]
            if (digest, record.dtype, list(record.shape)) != (
                entry["xxh3_128"],
                entry.get("dtype"),
                entry.get("shape"),
            ):
                damaged.append(name)
            done += record.nbytes
            if progress:
                progress("verify", done, total)
    if damaged:
        findings.append(
            Finding(
                "F03",
                "error",
                f"{counted(len(damaged), 'tensor')} changed since the certificate was written",
                damaged,
                fix="copy the checkpoint again from where it was whole",
            )
        )
    return findings


def against_crc(view: StateView, progress: Progress | None) -> list[Finding]:
    """Report entries of torch.save archives whose bytes do not fit the CRC-32 in the zip.

    Args:
        view: The checkpoint. Only local archives have checksums; anything else gives no finding.
        progress: Called with "verify", the bytes done and the bytes in all.

    Returns:
        One error (F03) that names the tensors, or [].
    """
    if not isinstance(view.folder, LocalFolder):
        return []
    ranges = {}
    for record in view.values():
        for block in record.blocks:
            if block.archive:
                ranges[block.file, block.start, block.nbytes] = record.name
            elif formats.fact(view.format, "ARCHIVED") and view.folder.read(block.file, 0, 2) == b"PK":
                ranges[block.file, 0, view.folder.size(block.file)] = block.file
    damaged, done, total = [], 0, sum(length for _, _, length in ranges)
    for (file, start, length), name in ranges.items():
        bad = bad_entries(view.folder, file, start, length)
        damaged += [name if name != file else f"{file}: {entry}" for entry in bad]
        done += length
        if progress:
            progress("verify", done, total)
    if not damaged:
        return []
    return [
        Finding(
            "F03",
            "error",
            f"the bytes of {len(damaged)} tensors do not fit the file's own CRC-32",
            damaged,
            fix="copy the file again",
        )
    ]
