"""Decide whether head and embedding are one tensor, from the config and the data, never from equal values alone.

Both there and equal: hf stores one, other formats keep both names over the same bytes. Both there and different: both
are kept and said (T01), none overwrites the other. One there and the config ties them: DCP and MiniMind ask for both
names, so the other is made. The embedding alone and the config does not tie: the checkpoint is incomplete (K01).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import BY_USER, HfTensor, Step
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import table as formats
from tensorkeep.formats.view import Note, StateView

_HEADS = (hf.HEAD, "output.weight")  # the head in every naming


def tie(
    tensors: dict[str, HfTensor],
    to: str,
    target: str | None,
    config: Mapping[str, Any] | None,
    sources: Sequence[StateView],
    dropped: list[Step],
    notes: list[Note],
    twice: bool = False,
) -> None:
    """Give a plan one tensor or two for head and embedding, as its config, its data and the output's format ask.

    Args:
        tensors: the tensors by hf name; changed in place.
        to: the output's format.
        target: the output's naming; None where names are unknown, and nothing is tied.
        config: the model's config; None where no source has one.
        sources: the views that the tensors come from.
        dropped: gains the head where hf stores it once.
        notes: gains T01 where the two differ though the config ties them.
        twice: whether the reader asks for both names.

    Raises:
        TensorkeepError: K01 where an untied head is missing and the user did not drop it.
    """
    head, embed, tied = tensors.get(hf.HEAD), tensors.get(hf.EMBEDDING), hf.tied(dict(config) if config else None)
    if embed is None or target is None:
        return
    if head is None:
        by_user = any(p.name.endswith(_HEADS) for s in dropped if s.reason == BY_USER for p in s.parts)
        if tied is False and not by_user:
            raise TensorkeepError(
                "lm_head.weight is missing and the config says that it is not tied to the embedding",
                code="K01",
                where=sources[0].path,
                hint='get the full checkpoint, or set "tie_word_embeddings": true if the head is tied',
            )
        if tied and (twice or formats.fact(to, "TIED") == "both" or target not in ("hf", "gguf")):
            tensors[hf.HEAD] = replace(embed, name=hf.HEAD, actions=(*embed.actions, "tie"), tied_to=hf.EMBEDDING)
        return
    if not tied:
        return
    if not _equal(head, embed, sources):
        notes.append(
            Note(
                "T01",
                "the config ties lm_head to the embedding, but the file holds a different lm_head: both are kept; "
                "transformers 5 unties them with a warning, torchtitan overwrites the head",
                (hf.HEAD, hf.EMBEDDING),
            )
        )
    elif formats.fact(to, "TIED") == "one":
        del tensors[hf.HEAD]
        dropped += [
            Step(("drop",), (part,), None, "tied: the same bytes as the embedding, which hf stores once")
            for part in head.parts
        ]
    else:
        tensors[hf.EMBEDDING] = replace(embed, tied_to=None)
        tensors[hf.HEAD] = replace(head, actions=(*head.actions, "tie"), tied_to=hf.EMBEDDING)


def _equal(a: HfTensor, b: HfTensor, sources: Sequence[StateView]) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (a.shape, a.dtype, len(a.parts), len(b.parts)) != (b.shape, b.dtype, 1, 1):
        return False
    streams = [sources[h.parts[0].source].stream(h.parts[0].name) for h in (a, b)]
    return all(x == y for x, y in zip(*streams, strict=True))
