"""Weights that modules share, such as Zamba's attention or T5's embeddings: what a merge makes of adapters there.

PEFT wraps each module apart, so that its forward adds each one's own update, while its merge adds all of them to the
one tensor that they share. A low-rank change is therefore refused, as of a tied head, unless the user asks for the
tensors apart; whole tensors part them as PEFT does. transformers loads them so where a file holds both and they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorkeep.adapters._matching import MergeBase, WeightedAdapter, computed_tensor
from tensorkeep.adapters._places import ask_names
from tensorkeep.adapters.terms import Term, same_terms
from tensorkeep.conversion import architecture
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import Note

Groups = dict[str, list[str]]
_WHOLE = ("saved", "tokens")


def find_shared(state: MergeBase) -> Groups:
    """Find the tensors that layers share, and let those that are not stored stand for the one that is.

    Args:
        state: the base; its tensors gain the names that files leave out.

    Returns:
        The stored name, and the others that share it. Nothing of a family whose tables say that it has none.
    """
    kind = (state.config or {}).get("model_type")
    names = None if kind in architecture.FAMILIES else ask_names(state)
    if names is None:
        return {}
    out: Groups = {}
    head = names.output_weight or state.head
    apart = {state.head, names.tied_as.get(head, head)}  # `_ties` has these
    for name, source in names.tied.items():
        kept = source if source in state.hf_tensors else name
        other = name if kept == source else source
        tensor = state.hf_tensors.get(kept)
        if tensor is None or apart & {name, source}:
            continue
        if other not in state.hf_tensors:
            state.hf_tensors[other] = replace(tensor, name=other, tied_to=kept)
        elif len({state.view.digest(state.hf_tensors[n].parts[0].name) for n in (kept, other)}) > 1:
            continue  # parted before
        out.setdefault(kept, []).append(other)
    return out


def settle_shared(
    state: MergeBase,
    sources: Sequence[WeightedAdapter],
    wanted: dict[str, list[Term]],
    shared: Groups,
    untie: bool,
) -> bool:
    """Part the shared tensors that adapters change where the user asks for it, or stop.

    Args:
        state: the base.
        sources: the adapters.
        wanted: what changes each hf tensor; changed in place.
        shared: from `find_shared`.
        untie: whether the user wants each tensor apart.

    Returns:
        Whether some are parted.

    Raises:
        TensorkeepError: T01 for a change of tensors that are shared.
    """
    touched = {kept: [n for n in (kept, *others) if wanted.get(n)] for kept, others in shared.items()}
    for kept, names in touched.items():
        if all(same_terms(wanted.get(n, ()), wanted.get(kept, ())) for n in shared[kept]):
            names.clear()  # all of them change alike
    changed = [n for names in touched.values() for n in names]
    summed = [kept for kept, names in touched.items() if any(t.kind not in _WHOLE for n in names for t in wanted[n])]
    if summed and not untie:
        (first, *_) = summed
        changed = touched[first]
        raise TensorkeepError(
            f"the base's modules share {', '.join(grouped([first, *shared[first]])[:3])}, and the adapter changes "
            f"{', '.join(grouped(changed)[:3])}: no longer one tensor, and PEFT's merge would add every change to it",
            where=sources[wanted[changed[0]][0].number].path,
            code="T01",
            tensors=changed,
            hint="--untie writes each module's own, as they were in training",
        )
    for kept, others in shared.items():
        stored = state.hf_tensors[kept].parts[0].name
        for other in others:
            if state.hf_tensors[other].parts[0].name != stored:
                continue  # the file holds it itself
            del state.hf_tensors[other]
            terms = wanted.pop(other, [])
            if touched[kept]:
                if not stored.endswith(kept):
                    what, hint = "the base has no hf names", "convert it first: tensorkeep convert BASE OUT --to hf"
                    raise TensorkeepError(f"{what}, so {kept} cannot be parted", where=state.view.path, hint=hint)
                computed_tensor(state, stored, stored.removesuffix(kept) + other, terms)
    if changed and not untie:
        told = f"the base's modules share one tensor, and the adapter brings {', '.join(grouped(changed)[:3])} whole: "
        told += "each has its own in the merged model, as in the trained one"
        state.notes.append(Note("T01", told, tuple(changed)))
    return bool(changed)
