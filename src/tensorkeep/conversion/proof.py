"""Check before and after writing: sources are what their certificates say, and the output is what the plan made.

Digests are of a tensor's raw bytes; where no arithmetic was asked for, equal digests are equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.streams import Sums
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import table as formats
from tensorkeep.formats.view import StateView, read
from tensorkeep.storage import certificate as manifest
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.files import CERTIFICATE, damaged, refuse_changed
from tensorkeep.storage.spreading import in_threads


def stored_name(name: str, root: Any, form: str) -> str:
    """Return the name that a format gives a tensor below a root.

    Args:
        name: the tensor's name in the model.
        root: what the file nests its tensors under ("model"); None for nothing.
        form: the format; some know no nesting.

    Returns:
        `root.name`, or `name` alone.
    """
    return f"{root}.{name}" if root and formats.fact(form, "NESTS") else name


def read_certificate(view: StateView) -> dict[str, Any] | None:
    """Read the certificate that lies beside a checkpoint.

    Args:
        view: the opened checkpoint; of a folder its own certificate, of a lone file the one named after the file.

    Returns:
        The certificate as plain data; None where there is none.

    Raises:
        TensorkeepError: the certificate is damaged or of an unknown version.
    """
    names = view.folder.names()
    lone = Path(view.path).name
    name = f"{lone}.{CERTIFICATE}" if lone in names else CERTIFICATE
    return (
        manifest.parse_certificate(read_small_from(view.folder, name), f"{view.folder.url}/{name}")
        if name in names
        else None
    )


def check_sources(plan: Plan, sums: dict[str, Sums]) -> None:
    """Stop where a source changed while it was read, or is not what its own certificate says.

    Args:
        plan: whose sources were read.
        sums: the checksums that the writing gave, by output name.

    Raises:
        TensorkeepError: F03, and the tensors that differ.
    """
    for index, view in enumerate(plan.sources):
        refuse_changed(view.folder)
        refuse_damaged(view, index, sums)


def refuse_damaged(view: StateView, index: int, sums: dict[str, Sums]) -> None:
    """Stop where a source, as it was just read, is not what its own certificate says; a source without one passes.

    Args:
        view: the source.
        index: its number in the plan.
        sums: the checksums that the reading gave.

    Raises:
        TensorkeepError: F03, and the tensors that differ.
    """
    certificate = None if view.computed else read_certificate(view)
    if certificate is None:
        return
    wanted = {
        stored_name(n, certificate.get("root"), view.format): e["xxh3_128"] for n, e in certificate["tensors"].items()
    }
    found = {
        name: digest for item in sums.values() for (source, name), digest in item.sources.items() if source == index
    }
    plain = {n for n, record in view.items() if record.encoding == "plain"}  # what is decoded has no digest of its own
    wrong = sorted(n for n, digest in found.items() if n in plain and n in wanted and digest != wanted[n])
    if wrong:
        raise damaged(view.path, wrong)


def prove(
    sink: str | Path | StateView,
    plan: Plan,
    sums: dict[str, Sums],
    progress: Callable[[str, int, int], None],
    read_back: Mapping[tuple[str, int, int], str] | None = None,
) -> None:
    """Open what was written as a stranger would, and compare names, dtypes, shapes and digests with the plan.

    Args:
        sink: a path or a URL, or what one reads as.
        plan: what should be there.
        sums: the checksums of what was written, by output name.
        progress: called as `progress("prove", done, total)` with bytes.
        read_back: (file, first byte, bytes) -> digest, of what was read back from the disk already; a tensor that lies
            in such a place, as the output's own headers say, is not read again.

    Raises:
        TensorkeepError: F03 at the first difference; the caller then leaves nothing behind.
    """
    view = sink if isinstance(sink, StateView) else read(sink)
    sink = view.path
    wanted = {stored_name(t.name, plan.root, view.format): t for t in plan.tensors}
    computed = namings.computed(plan.naming)
    if set(view) - set(computed) != set(wanted):
        odd = sorted(set(view) - set(computed) ^ set(wanted))
        raise TensorkeepError(f"read back, the sink differs in names: {', '.join(odd[:5])}", where=sink, code="F03")
    total, done = plan.nbytes, 0
    known = read_back or {}

    def digest(name: str) -> str:
        spans = view.spans(name) if known else None
        there = known.get(spans[0][:3]) if spans is not None and len(spans) == 1 else None
        return there if there is not None else view.digest(name)

    names = list(wanted)
    for name, found in zip(names, in_threads(digest, names, lambda name: 0 if known else wanted[name].nbytes)):
        tensor, record = wanted[name], view[name]
        made, asked = (record.dtype, record.shape, record.encoding), (tensor.dtype, tensor.shape, tensor.encoding)
        if made != asked or found != sums[tensor.name].digest:
            raise TensorkeepError(
                f"read back, {name} is not what the plan made",
                where=sink,
                code="F03",
                hint="check the disk, then run again",
            )
        done += tensor.nbytes
        progress("prove", done, total)


def certify(plan: Plan, sums: dict[str, Sums], to: str) -> bytes:
    """Make the certificate of an output: the digest of every tensor, the steps, and what was dropped and why.

    It holds no path and no time, so that equal conversions give equal certificates.

    Args:
        plan: what was carried out.
        sums: the checksums of what was written, by output name.
        to: the format.

    Returns:
        The certificate as JSON in UTF-8.
    """
    tensors: dict[str, dict[str, Any]] = {
        t.name: {"dtype": t.dtype, "shape": list(t.shape), "xxh3_128": sums[t.name].digest}
        for t in sorted(plan.tensors, key=lambda t: t.name)
    }
    return manifest.dump(
        {
            "schema": manifest.SCHEMA,
            "format": to,
            "naming": plan.naming,
            "root": plan.root,
            "digest": manifest.digest_of_all({n: e["xxh3_128"] for n, e in tensors.items()}),
            "source": [{"format": v.format, "digest": _kept(plan, sums, i)} for i, v in enumerate(plan.sources)],
            "notes": [{"code": n.code, "message": n.message} for n in plan.notes],
            "tensors": tensors,
            "steps": plan.to_json(),
        }
    )


def _kept(plan: Plan, sums: dict[str, Sums], index: int) -> str:
    """Return a digest over a source's tensors as they were read, before any permutation and cast."""
    digests: dict[str, str] = {}
    for item in sums.values():
        digests.update({name: d for (source, name), d in item.sources.items() if source == index})
    return manifest.digest_of_all(digests)
