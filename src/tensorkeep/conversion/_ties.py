"""Ties: whether head and embedding are one tensor, decided from the config and the data, never from values alone.

Both there and equal: hf stores one, other sinks keep both names over the same bytes. Both there and different: both
are kept and said (T01), none overwrites the other. One there and the config ties: DCP and MiniMind ask for both
names, so the other is made. The embedding alone and the config does not tie: the checkpoint is incomplete (K01).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import BY_USER, HfTensor, Step
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import Note, StateView

_HEADS = (hf.HEAD, "output.weight")  # the head in every naming


def tie(
    hub: dict[str, HfTensor],
    to: str,
    target: str | None,
    config: Mapping[str, Any] | None,
    sources: Sequence[StateView],
    dropped: list[Step],
    notes: list[Note],
) -> None:
    """Settle head and embedding of the tensors in `hub` (by hf name) for a sink of format `to` and naming `target`.

    Raises TensorkeepError K01 where an untied head is missing and the user did not drop it himself.
    """
    head, embed = hub.get(hf.HEAD), hub.get(hf.EMBEDDING)
    tied = hf.tied(dict(config)) if config is not None else None
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
        if tied and (to == "dcp" or target != "hf"):
            hub[hf.HEAD] = replace(embed, name=hf.HEAD, actions=(*embed.actions, "tie"), tied_to=hf.EMBEDDING)
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
    elif to == "hf":
        del hub[hf.HEAD]
        dropped += [
            Step(("drop",), (part,), None, "tied: the same bytes as the embedding, which hf stores once")
            for part in head.parts
        ]
    else:
        hub[hf.EMBEDDING] = replace(embed, tied_to=None)
        hub[hf.HEAD] = replace(head, actions=(*head.actions, "tie"), tied_to=hf.EMBEDDING)


def _equal(a: HfTensor, b: HfTensor, sources: Sequence[StateView]) -> bool:
    if (a.shape, a.dtype, len(a.parts), len(b.parts)) != (b.shape, b.dtype, 1, 1):
        return False
    streams = [sources[h.parts[0].source].stream(h.parts[0].name) for h in (a, b)]
    return all(x == y for x, y in zip(*streams, strict=True))
