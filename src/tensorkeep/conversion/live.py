"""How a model's tensors lie in memory, where that is not how files hold them: data alone, made by `models.in_memory`.

An adapter speaks of the modules of the live model. In memory transformers stacks experts, joins or parts projections
and renames modules; files keep the names of the hub. Ties, too, are the live model's: which head is which embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tensorkeep.conversion.fit import Offer

Shape = tuple[int, ...]
Lines = range | tuple[int, ...]  # which rows or columns, in order


class Piece(NamedTuple):
    """Some rows of a stored tensor, and where in a live tensor they come from.

    Args:
        stored: the tensor's name in the file, without roots and wrappers.
        first: the first of these rows; a stored stack of experts counts the rows of all of them.
        expert: which slice of a live stack of experts; None where the live tensor has two dimensions or one.
        rows: the live tensor's (or its slice's) rows.
        columns: the live columns.
        turned: whether the stored rows are the live columns.
    """

    stored: str
    first: int
    expert: int | None
    rows: Lines
    columns: Lines
    turned: bool = False


@dataclass
class Live:
    """The tensors of one config's model in memory.

    Args:
        shapes: live name -> shape, in the model's own order.
        pieces: live name -> its pieces in files, for those that files hold in another way or under another name.
        odd: live names that are made of stored tensors by more than taking rows and columns.
        embedding: the live name of the input embedding's weight; None where there is none.
        head: the live name of the output head's weight; None where there is none.
        tied: whether the config makes the two one tensor.
        ties: live name of each tied tensor -> that of the tensor it is.
        inward: live stacks of experts that are [experts, in, out].
    """

    shapes: dict[str, Shape]
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    odd: set[str] = field(default_factory=set)
    embedding: str | None = None
    head: str | None = None
    tied: bool = False
    ties: dict[str, str] = field(default_factory=dict)
    inward: set[str] = field(default_factory=set)


# (config, offers by hf name) -> how its model lies in memory; None where nothing can say
AskLive = Callable[[Mapping[str, Any], Mapping[str, Offer]], "Live | None"]


def unknown(_config: Mapping[str, Any], _offers: Mapping[str, Offer]) -> Live | None:
    """Say of no model how it lies in memory.

    Returns:
        None.
    """
    return None
