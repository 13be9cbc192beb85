"""Proof: sources are what their certificates say, the sink is what the plan made, and a certificate says so.

Digests are of a tensor's raw bytes; where no arithmetic was asked for, equal digests are equal bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.streams import Sums
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView, damaged, read
from tensorkeep.storage import certificate as manifest
from tensorkeep.storage.files import CERTIFICATE, refuse_changed

THREADS = min(4, os.cpu_count() or 1)


def stored_name(name: str, root: Any, form: str) -> str:
    """How a sink of format `form` spells a name under `root`; safetensors knows no nesting."""
    return f"{root}.{name}" if root and form != "hf" else name


def read_certificate(view: StateView) -> dict[str, Any] | None:
    """The certificate beside a checkpoint: in its folder, or next to a lone file under the file's own name."""
    names = view.folder.names()
    lone = Path(view.path).name
    name = f"{lone}.{CERTIFICATE}" if lone in names else CERTIFICATE
    return manifest.load(view.folder.read(name), f"{view.folder.url}/{name}") if name in names else None


def check_sources(plan: Plan, sums: dict[str, Sums]) -> None:
    """Stop where a source changed while it was read, or is not what its certificate says."""
    for index, view in enumerate(plan.sources):
        refuse_changed(view.folder)
        refuse_damaged(view, index, sums)


def refuse_damaged(view: StateView, index: int, sums: dict[str, Sums]) -> None:
    """Stop (F03) where a source, as it was just read, is not what its own certificate says."""
    certificate = None if view.computed else read_certificate(view)
    if certificate is None:
        return
    wanted = {
        stored_name(n, certificate.get("root"), view.format): e["xxh3_128"] for n, e in certificate["tensors"].items()
    }
    found = {
        name: digest for item in sums.values() for (source, name), digest in item.sources.items() if source == index
    }
    wrong = sorted(n for n, digest in found.items() if n in wanted and digest != wanted[n])
    if wrong:
        raise damaged(view.path, wrong)


def prove(sink: str | Path, plan: Plan, sums: dict[str, Sums], progress: Callable[[str, int, int], None]) -> None:
    """Open the sink (a path or a URL) as a stranger would and compare names, dtypes, shapes and digests with the plan.

    Raises TensorkeepError F03 at the first difference; the caller then leaves no sink behind.
    """
    view = read(sink)
    wanted = {stored_name(t.name, plan.root, view.format): t for t in plan.tensors}
    if set(view) != set(wanted):
        odd = sorted(set(view) ^ set(wanted))
        raise TensorkeepError(f"read back, the sink differs in names: {', '.join(odd[:5])}", where=sink, code="F03")
    total, done = plan.nbytes, 0
    with ThreadPoolExecutor(THREADS) as pool:
        for name, digest in zip(wanted, pool.map(view.digest, wanted)):
            tensor, record = wanted[name], view[name]
            if (record.dtype, record.shape) != (tensor.dtype, tensor.shape) or digest != sums[tensor.name].digest:
                raise TensorkeepError(
                    f"read back, {name} is not what the plan made",
                    where=sink,
                    code="F03",
                    hint="check the disk, then run again",
                )
            done += tensor.nbytes
            progress("prove", done, total)


def certify(plan: Plan, sums: dict[str, Sums], to: str) -> bytes:
    """The certificate: digests of every tensor, the steps, what was dropped and why. No path, no time."""
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
    """A digest of the source's tensors as they were read (before permutation and cast)."""
    digests: dict[str, str] = {}
    for item in sums.values():
        digests.update({name: d for (source, name), d in item.sources.items() if source == index})
    return manifest.digest_of_all(digests)
