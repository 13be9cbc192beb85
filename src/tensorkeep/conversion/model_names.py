"""What a config's model calls its tensors, in memory and in files, as plain data: `models.names` asks transformers.

An adapter speaks of the modules of the live model, and so does `torch.save(model.state_dict())`. In memory transformers
stacks experts, joins or parts projections and renames modules; files keep the names of the hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorkeep.conversion.fit import Offer
from tensorkeep.conversion.row_maps import Run

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelNames:
    """What transformers says of one config's model.

    Args:
        kind: its class.
        live: shapes by name, of the parameters and persistent buffers in memory.
        file: shapes by name, of what a file holds (a tied tensor once).
        saved: rows of live tensors that a file's tensor is made of, where it is not the whole one of its own name.
        made: rows of a file's tensors that a live one is made of, where it is not the whole one of its own name.
        odd: live names that no rows of a file's tensors make up.
        problem: why some are odd, or why nothing is known of files; '' for none.
        live_tied: live name -> live name whose tensor it shares.
        tied: the same under the file's names; a file need not hold the first.
        tied_as: live name of a tied tensor -> its name in a file that holds both.
        ignored: patterns of names that files may hold and the model has no use for.
        computed: buffers that are never stored.
        unsaved: parameters that files leave out, with the digest of what the model computes for each, by dtype.
        prefix: of the model without its head.
        inward: live stacks of experts that are [experts, in, out].
        linear: kind of each module that multiplies by a matrix, by path (`linear_layers`).
        positions: positions that its tables have; None for no table.
        rope: how RoPE pairs the rows of q and k, "half" or "pairs"; None for no RoPE.
        embedding: path of the input embedding.
        head: path of the output head.
        tie_says_more: whether `tie_word_embeddings` decides more than which tensors are one (T5 scales by it).
    """

    kind: str
    live: Shapes
    file: Shapes
    saved: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    made: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    odd: tuple[str, ...] = ()
    problem: str = ""
    live_tied: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    tied_as: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    unsaved: dict[str, dict[str, str]] = field(default_factory=dict)
    prefix: str = ""
    inward: tuple[str, ...] = ()
    linear: dict[str, str] = field(default_factory=dict)
    positions: int | None = None
    rope: str | None = None
    embedding: str | None = None
    head: str | None = None
    tie_says_more: bool = False

    def ignores(self, name: str) -> bool:
        """Whether a file may hold this name though the model has no use for it: computed buffers, other heads.

        Args:
            name: a file's.
        """
        return name in self.computed or name in self.unsaved or any(re.search(p, name) for p in self.ignored)

    @property
    def input_weight(self) -> str | None:
        """Live name of the input embedding's weight; None where there is none."""
        return f"{self.embedding}.weight" if self.embedding is not None else None

    @property
    def output_weight(self) -> str | None:
        """Live name of the output head's weight; None where there is none."""
        return f"{self.head}.weight" if self.head is not None else None

    def runs(self, live: str) -> tuple[Run, ...]:
        """Return the rows of a file's tensors that a live tensor is made of.

        Args:
            live: its name in memory.
        """
        own = self.tied_as.get(live, live)
        return self.made.get(live, (Run(own),))

    def in_file(self, live: str) -> str | None:
        """Return what files call a live tensor that they hold whole; None for one that they keep in pieces.

        Args:
            live: its name in memory.
        """
        (run, *more) = self.made.get(live, (Run(live),))
        found = self.tied_as.get(live) or (run.name if run.rows is None and not more and not run.turned else None)
        return found if found in self.file or found in self.tied else None


# (config, offers by hf name) -> what its model calls these tensors in memory; None where nothing can say
AskNames = Callable[[Mapping[str, Any], Mapping[str, Offer]], "ModelNames | None"]


def unknown(_config: Mapping[str, Any], _offers: Mapping[str, Offer]) -> ModelNames | None:
    """Say of no model what it calls its tensors.

    Returns:
        None.
    """
    return None
