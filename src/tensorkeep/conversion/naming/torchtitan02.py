"""Naming `torchtitan-0.2`: torchtitan's names up to v0.2.2 (`attention.wq.weight`, `output.weight`), also Meta's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensorkeep.conversion.naming import torchtitan
from tensorkeep.conversion.naming.meta_rows import experts, rows
from tensorkeep.conversion.naming.table import matcher
from tensorkeep.conversion.naming.torchtitan import COMPUTED, dropped_by_loader
from tensorkeep.errors import TensorkeepError

__all__ = [
    "COMPUTED",
    "EXPERT_BIAS",
    "FAMILIES",
    "LOADERS",
    "NAME",
    "VERSION",
    "dropped_by_loader",
    "family",
    "recognise",
]

NAME = "torchtitan-0.2"
LOADERS = ("torchtitan",)
VERSION = "0.2"
EXPERT_BIAS = "moe.expert_bias"
EXPERTS = experts("experts", "w1", "w2", "w3")
FAMILIES = {"llama3": rows("", "output", [], rope=True), "qwen3": rows("", "output", EXPERTS, rope=False)}


_fits = matcher(FAMILIES["qwen3"])


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of torchtitan's before 0.3, or of Meta's."""
    return name in COMPUTED or _fits(name)


def family(names: Iterable[str], config: dict[str, Any] | None) -> str:
    """Tell which family's table holds, as 0.3's does.

    Raises:
        TensorkeepError: as of 0.3, and where this table has not the family that 0.3 has.
    """
    found = torchtitan.family(names, config)
    if found not in FAMILIES:
        raise TensorkeepError(
            f"the tables of torchtitan 0.2 here have no {found} (they have {', '.join(FAMILIES)})",
            hint="--naming torchtitan, which is 0.3's",
        )
    return found
