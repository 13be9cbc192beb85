"""R06 weights narrower than trained: half-precision weights beside single-precision moments.

What it means
    The optimizer worked in float32, and the weights were rounded to fp16 or bf16 when they were saved.

How it shows
    A resume starts from rounded weights: 99.99 % of the parameters differ and the run drifts (measured: by 2e-4 of
    its value after some 80 steps, up to 3e-3 in the loss of a model with experts). Small learning rates lose more: at
    4e-8, 83 % of the weights come back exactly as they were before training, and a run that restarts nine times keeps
    a fifth of its movement. fp16 also turns magnitudes above 65,504 into infinity.

What to do
    Save weights in the dtype they are trained in, and export a narrow copy beside. From such a file no exact resume
    is possible, only one that continues nearby.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import ResumeState, moments, resume_state
from tensorkeep.findings import Finding
from tensorkeep.formats.names import unwrap
from tensorkeep.storage.record import DTYPES, TensorRecord

CODE = "R06"
NARROW = ("F16", "BF16", "F8_E4M3", "F8_E5M2")


def check(case: Case) -> Iterator[Finding]:
    """Warn of trained weights that are stored narrower than their moments."""
    state = resume_state(case)
    if state is None or case.view is None or case.identity is None:
        return
    found = moments(state)
    wide = {n: r for n, r in found.items() if r.dtype in ("F32", "F64")}
    if not wide:
        return
    trained = _trained(case, state, wide)
    narrow = [n for n in trained if case.view[n].dtype in NARROW]
    if narrow:
        dtypes = sorted({case.view[n].dtype for n in narrow})
        lost = 24 - min({"F16": 11, "BF16": 8}.get(d, 4) for d in dtypes)
        message = (
            f"{len(narrow)} trained weights are stored as {', '.join(dtypes)}, their moments as F32: {lost} bits of "
            "every weight were rounded away"
        )
        evidence = {"weights": dtypes, "moments": sorted({r.dtype for r in wide.values()}), "tensors": len(narrow)}
        yield Finding(CODE, "warning", message, [case.stored(n) for n in narrow], evidence)


def _trained(case: Case, state: ResumeState, wide: dict[str, TensorRecord]) -> list[str]:
    """Return the stored names of the weights that the moments belong to: by name, else all floats of their shapes."""
    view, identity = case.view, case.identity
    assert view is not None and identity is not None
    stored = {**{clean: n for n, clean in identity.names.items()}, **{unwrap(n)[0]: n for n in case.adapter}}
    if not state.by_position:
        known = [re.split(r"[./][^./]*\Z", n)[0] for n in wide]  # `name.exp_avg`; `name/exp_avg` in our own files
        tails = {name: weight for name, weight in stored.items()}
        return [tails[t] for name in known if (t := _tail(name, tails)) is not None]
    shapes = {r.shape for r in wide.values()}
    return [
        n
        for n in stored.values()
        if view[n].shape in shapes and view[n].tied_to is None and DTYPES[view[n].dtype].floating
    ]


def _tail(name: str, weights: dict[str, str]) -> str | None:
    """Return the weight that a state's name ends with: `optimizer.state.layers.0.wq.weight` -> `layers.0.wq.weight`."""
    segments = unwrap(name)[0].split(".")
    for at in range(len(segments)):
        tail = ".".join(segments[at:])
        if tail in weights:
            return tail
    return None
