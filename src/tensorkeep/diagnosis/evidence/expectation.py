"""What the names of a checkpoint are held against: the reference's tensors, or those of the config's architecture."""

from __future__ import annotations

from dataclasses import dataclass

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence import architecture
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.storage.run_folder import ADAPTER


@dataclass(frozen=True)
class Expectation:
    """Names and shapes that a model of this kind has; `by` says who says so."""

    shapes: dict[str, tuple[int, ...]]
    by: str


def expectation(case: Case) -> Expectation | None:
    """The reference's tensors where there is a reference, or else the config's; None where neither is known."""
    if case.reference is not None:
        shapes = {n: h.shape for n, h in case.reference_tensors.items() if n not in case.packed or n in case.tensors}
        return Expectation(shapes, "the reference") if shapes else None
    shapes_of = architecture.expected(case.config)
    return (
        Expectation(shapes_of, f"the config ({(case.config or {}).get('model_type')})")
        if shapes_of is not None
        else None
    )


def model_stored(case: Case) -> bool:
    """Whether the checkpoint is meant to hold a model: an adapter alone is not, nor what trained over a frozen base."""
    if case.view is None or case.read_error is not None or (case.adapter and not case.tensors):
        return False
    return "run" not in case.view.metadata or any(record.file != ADAPTER for record in case.view.values())


def missing(case: Case) -> list[str]:
    """Expected names that the checkpoint lacks. A tied head may be left out."""
    wanted = expectation(case)
    if wanted is None or not model_stored(case):
        return []
    have = set(case.tensors) | set(_weights_of_parts(case))
    lost = [n for n in wanted.shapes if n not in have]
    return [n for n in lost if n != hf.HEAD or not case.tie()]


def unexpected(case: Case) -> list[str]:
    """Names of the checkpoint that are not expected; parts beside a quantized weight belong to it."""
    wanted = expectation(case)
    if wanted is None or not model_stored(case):
        return []
    extra = [n for n in case.tensors if n not in wanted.shapes and n not in case.packed]
    # a tied head stored twice is no surprise; T01 looks whether both copies agree
    return [n for n in extra if n != hf.HEAD or not case.tie()]


def _weights_of_parts(case: Case) -> list[str]:
    """Weights that a file holds under other names: `x.qweight` and its scales stand for `x.weight`."""
    stems = {n.rpartition(".")[0] for n in case.packed if n in case.tensors}
    return [f"{stem}.weight" for stem in stems]
