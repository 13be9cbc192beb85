"""Decide whether head and embedding are one tensor, from the config and the data, never from equal values alone.

So it is with whatever else a model ties, such as the layers of Zamba that share their attention.

Both there and equal: hf stores one, other formats keep both names over the same bytes. Both there and different: both
are kept and said (T01), none overwrites the other. One there and the config ties them: DCP and MiniMind ask for both
names, so the other is made. The embedding alone and the config does not tie: the checkpoint is incomplete (K01).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import BY_USER, HfTensor, Step
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import table as formats
from tensorkeep.formats.view import Note, StateView

_HEADS = (hf.HEAD, "output.weight")  # the head in every naming
# (config, names) -> which of the model's names share another's tensor: head -> embedding
Asker = Callable[[Mapping[str, Any], Collection[str]], Mapping[str, str]]


def tie(
    tensors: dict[str, HfTensor],
    to: str,
    target: str | None,
    config: Mapping[str, Any] | None,
    sources: Sequence[StateView],
    dropped: list[Step],
    notes: list[Note],
    twice: bool = False,
    ask: Asker | None = None,
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
        ask: who says what the two are called where they have not Llama's names; None leaves them as they are.

    Raises:
        TensorkeepError: K01 where an untied head is missing and the user did not drop it.
    """
    tied = hf.tied(dict(config)) if config is not None else None
    if target is None or (hf.HEAD not in tensors and _headless(config)):
        return
    own = hf.EMBEDDING in tensors
    named = ask(config, tensors) if ask is not None and config is not None and (own or tied is not False) else {}
    pairs = {n: s for n, s in named.items() if not own or n != hf.HEAD}  # a layer's weights may be another layer's
    for name, source in pairs.items():
        _one_or_two((name, source), True, tensors, to, target, sources, dropped, notes, twice)
    if own:
        _one_or_two((hf.HEAD, hf.EMBEDDING), tied, tensors, to, target, sources, dropped, notes, twice)


def _one_or_two(
    names: tuple[str, str],
    tied: bool | None,
    tensors: dict[str, HfTensor],
    to: str,
    target: str | None,
    sources: Sequence[StateView],
    dropped: list[Step],
    notes: list[Note],
    twice: bool,
) -> None:
    """Settle one head and its embedding; `tie` says how."""
    own, other = names
    head, embed = tensors.get(own), tensors.get(other)
    if embed is None:
        return
    if head is None:
        by_user = any(p.name.endswith(_HEADS) for s in dropped if s.reason == BY_USER for p in s.parts)
        if tied is False and not by_user and not _headed(tensors, embed):
            raise TensorkeepError(
                f"{own} is missing and the config says that it is not tied to the embedding",
                code="K01",
                where=sources[0].path,
                hint='get the full checkpoint, or set "tie_word_embeddings": true if the head is tied',
            )
        if tied and (twice or formats.fact(to, "TIED") == "both" or target not in ("hf", "gguf")):
            tensors[own] = replace(embed, name=own, actions=(*embed.actions, "tie"), tied_to=other)
        return
    if not tied:
        return
    if not _equal(head, embed, sources):
        notes.append(
            Note(
                "T01",
                f"the config ties {own.removesuffix('.weight')} to {_spoken(other)}, but the file holds a different "
                f"one: both are kept; transformers 5 unties them with a warning{_titan(own)}",
                (own, other),
            )
        )
    elif formats.fact(to, "TIED") == "one":
        del tensors[own]
        dropped += [
            Step(("drop",), (part,), None, f"tied: the same bytes as {_spoken(other)}, which hf stores once")
            for part in head.parts
        ]
    else:
        tensors[other] = replace(embed, tied_to=None)
        tensors[own] = replace(head, actions=(*head.actions, "tie"), tied_to=other)


def _spoken(name: str) -> str:
    """Return what messages call the tensor that another one is tied to."""
    return name.removesuffix(".weight") if re.search(r"\.\d+\.", name) else "the embedding"


def _titan(own: str) -> str:
    """Return what torchtitan does with two that differ: it has ties of a head alone."""
    return ", torchtitan overwrites the head" if own == hf.HEAD else ""


def _headless(config: Mapping[str, Any] | None) -> bool:
    """Whether the config's class predicts no tokens: a classifier, a reward model, a model without a head."""
    classes = (config or {}).get("architectures")
    if not isinstance(classes, list) or not classes:
        return False
    return not any(re.search(r"LM|ConditionalGeneration|PreTraining|ImageTextToText", str(c)) for c in classes)


def _headed(tensors: Mapping[str, HfTensor], embed: HfTensor) -> bool:
    """Whether the file has a head of another name: of the embedding's shape, outside of the layers."""
    return any(
        t.shape == embed.shape and t is not embed and re.fullmatch(r"(?:[A-Za-z_]+\.)*\w*(?:head|out)\w*\.weight", name)
        for name, t in tensors.items()
    )


def _equal(a: HfTensor, b: HfTensor, sources: Sequence[StateView]) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (a.shape, a.dtype, len(a.parts), len(b.parts)) != (b.shape, b.dtype, 1, 1):
        return False
    streams = [sources[h.parts[0].source].stream(h.parts[0].name) for h in (a, b)]
    return all(x == y for x, y in zip(*streams, strict=True))
