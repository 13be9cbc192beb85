"""A04 base is not the one it was trained on: the adapter fits in names and shapes, and belongs to other weights.

What it means
    An update learnt on one set of base weights is put onto another: another model of equal shapes, a later version,
    or the float original of a quantized base (or the other way round).

How it happens
    An adapter's config names a path or a Hub id, nothing else, and what lies there may change. No loader in use
    compares contents.

How it shows
    No error at all. For one adapter trained on an nf4 base, logits were off by 0.30 on the float original, 0.49 on an
    fp4 base, and 1.4 on another model of equal shapes.

How it is found
    By the digest of the base, where the adapter carries one. A DoRA adapter also remembers the length of every weight
    row: its magnitudes begin as these lengths and move little. A plain LoRA adapter from PEFT holds no trace of its
    base, and then the finding says that it cannot be known;
    but where its config names a repository of quantized weights (`...-bnb-4bit`) and this base is in floats, it warns.

What to do
    Take the base whose digest the adapter names; merge onto the weights that it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np

from tensorkeep.adapters.reading import Adapter, said_precision
from tensorkeep.conversion.proof import read_certificate
from tensorkeep.diagnosis.evidence.adapters import Base, adapter_and_base, checkpoint_adapter
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.findings import Finding
from tensorkeep.formats.view import StateView
from tensorkeep.storage.certificate import digest_of_all

CODE = "A04"
DIGEST = "base_digest"  # in the adapter's config or its safetensors metadata: digest_of_all over the base's tensors
STRANGE = 0.3  # correlation of magnitudes and row lengths; of other weights it is near 0, of its own well above 0.9


def check(case: Case) -> Iterator[Finding]:
    """Compare the base's digest, or its row lengths with DoRA's magnitudes; an info where nothing can be known."""
    adapter, found = checkpoint_adapter(case), adapter_and_base(case)
    if adapter is None or found is None or found[0] is not adapter:
        return
    _, base, model_is_reference = found
    view = case.reference if model_is_reference else case.view
    assert view is not None
    named = adapter.document.get("base_model_name_or_path")
    recorded = adapter.document.get(DIGEST) or adapter.view.metadata.get(DIGEST)
    if isinstance(recorded, str):
        actual = base_digest(view)
        if recorded != actual and recorded != _certified(view):
            message = f"the adapter was trained on the base {recorded}, this one is {actual}"
            yield Finding(CODE, "error", message, (), {"trained_on": recorded, "here": actual})
        return
    rows = _rows(adapter, base)
    if rows:
        correlation, ratio = float(np.median([r[0] for r in rows])), float(np.median([r[1] for r in rows]))
        figures: dict[str, Any] = {
            "correlation": round(correlation, 4),
            "length_ratio": round(ratio, 4),
            "modules": len(rows),
        }
        if correlation < STRANGE or not 0.5 < ratio < 2:
            message = (
                f"DoRA's magnitudes are not the lengths of this base's rows (correlation {correlation:.2f}, ratio "
                f"{ratio:.2f}): it was trained on other weights"
            )
            yield Finding(CODE, "error", message, list(adapter.magnitudes), figures)
        return
    said = said_precision(adapter.document)
    if said is not None and not base.quantized:
        message = (
            f"the adapter's config names a base in {said} ({shown(named)}), this one is in floats: it was trained on "
            "other values than these"
        )
        yield Finding(CODE, "warning", message, (), {"base_model_name_or_path": named, "here": view.path})
        return
    evidence = {"base_model_name_or_path": named, "here": view.path}
    differs = isinstance(named, str) and named and PurePath(named).name != PurePath(view.path).name
    message = (
        "the adapter carries no digest of its base, so whether this is the one it was trained on cannot be known"
        + (f" (its config names {shown(named)})" if differs else "")
    )
    yield Finding(CODE, "info", message, (), evidence)


def base_digest(view: StateView) -> str:
    """Return the digest of a base over the names and bytes of all its stored tensors, as certificates have it."""
    return digest_of_all({name: view.digest(name) for name in view})


def _certified(view: StateView) -> str | None:
    """Return the digest in the base's certificate, where it has a readable one."""
    try:
        certificate = read_certificate(view)
    except TensorkeepError:
        return None
    return (certificate or {}).get("digest")


def _rows(adapter: Adapter, base: Base) -> list[tuple[float, float]]:
    """Compare DoRA's magnitudes with the row lengths of W + s·B·A: (correlation, ratio) of each module.

    DoRA (arXiv 2402.09353): W' = m · (W + s·B·A) / |W + s·B·A|, row by row, with m = |W| at the start.
    """
    out = []
    for module, stored in adapter.magnitudes.items():
        name, scale = f"{module}.weight", adapter.scale(module) if module in adapter.pairs else None
        if scale is None or not base.shape(name):
            continue
        a, b = (adapter.view.array(n).astype(np.float32) for n in adapter.pairs[module])
        weight, magnitude = base.values(name), adapter.view.array(stored).astype(np.float32).reshape(-1)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            continue  # A02 says so
        if weight.shape != (b.shape[0], a.shape[1]) or magnitude.shape != weight.shape[:1] or magnitude.size < 16:
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # V01 says what is not finite
            lengths = np.sqrt(np.sum(np.square(weight + scale * (b @ a)), axis=1))
        if lengths.std() > 0 and magnitude.std() > 0:
            out.append(
                (float(np.corrcoef(magnitude, lengths)[0, 1]), float(np.median(magnitude / np.maximum(lengths, 1e-12))))
            )
    return out
