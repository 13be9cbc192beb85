"""Say which tensors a checkpoint should have: the reference's, or those of the architecture in its config."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from tensorkeep.conversion import architecture
from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence.bytewise import bits_equal
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.formats.table import fact


@dataclass(frozen=True)
class Expectation:
    """Names and shapes that the model should have; `by` says in words who says so."""

    shapes: dict[str, tuple[int, ...]]
    by: str


def expectation(case: Case) -> Expectation | None:
    """Return the tensors that the model should have.

    Returns:
        Those of the reference where there is one that is no adapter (whose names are not its model's), else those of
        the config's architecture; None where neither is known.
    """
    if case.reference is not None and not fact(case.reference.format, "ADAPTERS_ONLY"):
        shapes = {n: h.shape for n, h in case.reference_tensors.items() if n not in case.packed or n in case.tensors}
        return Expectation(shapes, "the reference") if shapes else None
    expected = _by_table(case)
    if expected is None and case.config is not None and case.names is not None:
        expected = case.names.file
    if expected is None:
        return None
    return Expectation(expected, f"the config ({(case.config or {}).get('model_type')})")


def _by_table(case: Case) -> architecture.Shapes | None:
    """Return what the tables here say of the config's model: they know no reward models, for instance."""
    classes = (case.config or {}).get("architectures")
    first = str(classes[0]) if isinstance(classes, list) and classes else ""
    other = re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w+\Z", first)
    if other and case.names is not None:
        return None
    asked = architecture.expected(case.config)
    headless = re.search(r"(?<!LMHead)(?<!DoubleHeads)Model\Z", first)
    return {n: s for n, s in asked.items() if n != hf.HEAD} if asked is not None and headless else asked


def model_stored(case: Case) -> bool:
    """Say whether the checkpoint is meant to hold a whole model: not an adapter alone, nor a run over a frozen base."""
    if case.view is None or case.read_error is not None or (is_adapter(case) and not case.tensors):
        return False
    return not case.view.metadata.get("over a base", False)


def is_adapter(case: Case) -> bool:
    """Whether the checkpoint holds an adapter, of whatever kind."""
    return bool(case.adapter) or (case.view is not None and bool(fact(case.view.format, "ADAPTERS_ONLY")))


def missing(case: Case) -> list[str]:
    """Return the expected names that the checkpoint lacks; a tied head may be left out."""
    wanted = expectation(case)
    if wanted is None or not model_stored(case):
        return []
    have = set(case.tensors) | set(_weights_of_parts(case))
    lost = [n for n in wanted.shapes if n not in have]
    return [n for n in lost if n not in case.ties]


def unexpected(case: Case) -> list[str]:
    """Return the names that are not expected; a quantized weight's scales and other parts belong to it."""
    wanted = expectation(case)
    if wanted is None or not model_stored(case):
        return []
    extra = [n for n in case.tensors if n not in wanted.shapes and n not in case.packed]
    # a tied head stored twice is no surprise; T01 looks whether both copies agree
    extra = [n for n in extra if n not in case.ties]
    known = case.names if extra and case.reference is None and _by_table(case) is None else None
    return [n for n in extra if known is None or not (known.ignores(n) or n in known.tied)]


def same_tensor(case: Case) -> bool:
    """Say whether the checkpoint's head holds the embedding's values, as stored or once cast to the narrower dtype."""
    head, embed = case.values(case.head), case.values(case.embedding)
    if head.shape != embed.shape:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return bits_equal(head, embed.astype(head.dtype)) or bits_equal(embed, head.astype(embed.dtype))


def _weights_of_parts(case: Case) -> list[str]:
    """Return weights that a file holds under other names: `x.qweight` and its scales stand for `x.weight`.

    Of experts in one tensor, `x_blocks` and `x_scales` stand for `x`.
    """
    parts = [n for n in case.packed if n in case.tensors]
    stems = {n.removesuffix(end) for n in parts for end in ("_blocks", "_scales") if n.endswith(end)}
    return [*stems, *(f"{n.rpartition('.')[0]}.weight" for n in parts)]
