"""F03 digest differs: content is not what its certificate, manifest or checksum says.

What it means
    The bytes of a tensor have another digest than was recorded when they were written: in `tensorkeep.json` (the
    certificate of a conversion), in the manifest of a training run's checkpoint, or as the CRC-32 in the tensor's own
    torch.save archive, which PyTorch writes and never checks.

How it happens
    A bad disk, cable or memory; or the file was edited or replaced after it was certified.

How it shows
    Not at all: the checkpoint loads.

What to do
    Copy it again from where it was certified. Other findings on the same tensors say what changed in them.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.proof import read_certificate
from tensorkeep.diagnosis.evidence.bytewise import SAME
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.verification import against_crc
from tensorkeep.findings import Finding, counted
from tensorkeep.formats.names import strip_root
from tensorkeep.storage import run_manifest
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.spreading import in_threads

CODE = "F03"
NEEDS = "the file as it was certified: copy it again; else move tensorkeep.json away and repair by the reference"


def check(case: Case) -> Iterator[Finding]:
    """Compare tensors with the certificate; without it and without a reference, archives with their own CRC-32.

    With a reference, only tensors that differ from it are digested: the others are proven already.
    """
    yield from case.from_reading(CODE)
    if case.view is None:
        return
    if "run" in case.view.metadata and isinstance(case.view.folder, LocalFolder):
        yield from run_manifest.findings(case.view.folder.path, case.progress)
        return
    certificate = read_certificate(case.view)
    if certificate is None:
        if case.reference is None:
            yield from against_crc(case.view, case.progress)
        return
    same = {case.stored(n) for n, found in case.comparisons.items() if found.status in SAME}
    tensors = certificate["tensors"]
    assert isinstance(tensors, dict)
    root = certificate.get("root")
    wanted = {n: tensors[c] for n in case.view if (c := _certified(n, root, tensors)) is not None and n not in same}
    view = case.view
    digests = dict(zip(wanted, in_threads(view.digest, list(wanted), lambda n: view[n].nbytes)))
    changed = [n for n, digest in digests.items() if digest != wanted[n].get("xxh3_128")]
    if changed:
        message = f"{counted(len(changed), 'tensor')} changed since the certificate was written"
        yield Finding(
            CODE,
            "error",
            message,
            changed,
            {"digested": len(wanted)},
            fix="copy the checkpoint again from where it was certified",
        )


def _certified(stored: str, root: object, tensors: dict[str, object]) -> str | None:
    """Return the certificate's name of a stored tensor; None where it does not list it."""
    bare = strip_root(stored, root) if isinstance(root, str) and root else None
    return next((n for n in (stored, bare) if n is not None and n in tensors), None)
