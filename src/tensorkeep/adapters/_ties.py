"""Head and embedding of a merge's base: which tensors they are, whether they are one, what an adapter makes of it.

PEFT's rules are followed: a whole tensor that it trained for one of a tied pair parts the two, rows that it trained
(`trainable_token_indices`) are both's, and so is what it trained with `ensure_weight_tying`. A low-rank pair on one of
two that are tied is refused: PEFT's forward changes one of them, and its merge both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tensorkeep.adapters._matching import MergeBase, WeightedAdapter, computed_tensor
from tensorkeep.adapters._places import ask_names, name_in_file
from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import Term, indices, kept_tied, same_terms
from tensorkeep.conversion.naming import hf
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import Note

# how architectures call their input embedding, where nothing but names can tell
_EMBEDDINGS = re.compile(
    r"(.+\.)?(embed_tokens|wte|word_embeddings|embed_in|embeddings|tok_embeddings|embedding)\.weight\Z"
)


def keeps_tie(state: MergeBase) -> bool:
    """Whether the config's `tie_word_embeddings` stays as it is, though head and embedding are parted.

    Of T5 and its kin it says as well whether the head's input is scaled; transformers 5 loads two tensors that differ
    as two whatever it says.

    Args:
        state: the base.
    """
    names = ask_names(state)
    return names is not None and names.tie_says_more


def find_tied(state: MergeBase, sources: Sequence[WeightedAdapter], untie: bool) -> None:
    """Find the base's embedding and head, and whether they are one tensor; where it is stored once, add the head.

    Args:
        state: the base; its `embedding`, `head` and `tied` are set.
        sources: the adapters: transformers is asked only where one of them may change either.
        untie: whether the user wants two tensors.
    """
    if hf.EMBEDDING not in state.hf_tensors and (untie or any(_may_touch(s.adapter, state) for s in sources)):
        names = ask_names(state)
        if names is not None and names.input_weight is not None:
            other = names.output_weight or hf.HEAD
            one = names.live_tied.get(other, names.input_weight)  # a decoder may have an embedding of its own
            # a model's own state has the live names
            held = [n if n in state.hf_tensors else name_in_file(names, n) for n in (one, other)]
            state.embedding, state.head = held
            state.of_input = names.input_weight in (one, names.live_tied.get(one))
            state.tied = names.live_tied.get(other) == one or names.live_tied.get(one) == other
        else:
            state.known = _guess(state)
    embed, head = state.hf_tensors.get(state.embedding), state.hf_tensors.get(state.head)
    if state.embedding == hf.EMBEDDING:
        said = hf.tied(dict(state.config)) if state.config is not None else None
        alias = (head is not None and head.tied_to == hf.EMBEDDING) or (embed is not None and embed.tied_to == hf.HEAD)
        state.tied = bool(said or alias)
    state.tied = state.tied and embed is not None
    if state.tied and head is None and embed is not None:
        state.hf_tensors[state.head] = replace(embed, name=state.head, tied_to=state.embedding)


def _may_touch(adapter: Adapter, state: MergeBase) -> bool:
    """Whether an adapter holds something that may be for an embedding or a head, by its name or by a tie not stored."""
    if adapter.saved or adapter.tokens or adapter.embeddings:
        return True
    changed = (*adapter.pairs, *adapter.parts)
    named = any(m.rpartition(".")[2] in ("lm_head", "embed_out", "output") for m in changed)
    return named or any(f"{m}.weight" not in state.hf_tensors for m in changed)


def _guess(state: MergeBase) -> bool:
    """Take the embedding and the tie from names, values and the config alone; whether they say so."""
    found = [n for n in state.hf_tensors if _EMBEDDINGS.match(n) and ".layers." not in n]
    if len(found) != 1 or (state.config is None and state.head not in state.hf_tensors):
        return False
    state.embedding = found[0]
    if state.config is not None:
        state.tied = hf.tied(dict(state.config)) is True
    else:
        state.tied = _twice(state, state.embedding)
    return True


def _twice(state: MergeBase, name: str) -> bool:
    """Whether a checkpoint holds a tensor's values under other names as well, as a model's own state does."""
    own = state.hf_tensors[name]
    digest = state.view.digest(own.parts[0].name)
    same = (t for n, t in state.hf_tensors.items() if n != name and t.shape == own.shape)
    return any(state.view.digest(t.parts[0].name) == digest for t in same)


def refuse_unknown(state: MergeBase, sources: Sequence[WeightedAdapter], wanted: Mapping[str, Sequence[Term]]) -> None:
    """Stop where an adapter changes an embedding, and nothing says what is tied to it.

    Args:
        state: the base.
        sources: the adapters.
        wanted: what changes each hf tensor.

    Raises:
        TensorkeepError: T01.
    """
    if state.known:
        return
    for name, terms in wanted.items():
        for term in terms:
            spread = kept_tied(term, False)
            of_one = term.kind == "embedding" or _EMBEDDINGS.match(name) or name.endswith("shared.weight")
            if spread or (of_one and not _twice(state, name)):
                raise TensorkeepError(
                    f"the adapter changes {name}, and nothing says what the base's model ties to it",
                    where=sources[term.number].path,
                    code="T01",
                    tensors=[name],
                    hint="give its config: --config FOLDER" if state.config is None else "pip install transformers",
                )


def settle_ties(
    state: MergeBase,
    sources: Sequence[WeightedAdapter],
    wanted: dict[str, list[Term]],
    untie: bool,
    apart: bool = False,
) -> bool:
    """Change head and embedding of a tied base together, or part them as PEFT or the user does, or stop.

    Args:
        state: the base.
        sources: the adapters.
        wanted: what changes each hf tensor; changed in place.
        untie: whether the user wants two tensors.
        apart: whether other tensors were parted, which may be all that the user asked for.

    Returns:
        Whether the two are parted.

    Raises:
        TensorkeepError: T01 for a low-rank change of one of the two, or `untie` of two that are not tied.
    """
    untie = untie and not (apart and not any(wanted.get(n) for n in (state.embedding, state.head)))
    if untie and not state.tied and not apart:
        raise TensorkeepError("its head and embedding are not tied", where=state.view.path, hint="leave --untie out")
    pair = (state.embedding, state.head)
    embed, head = (wanted.get(n, []) for n in pair)
    names = [state.hf_tensors[n].parts[0].name for n in pair] if state.tied else []
    if not (embed or head or untie) or not names:
        return False
    if len({state.view.digest(n) for n in names}) > 1:
        return False  # the file holds two that differ, as `planning` will say (T01)
    together = not embed and state.of_input and all(kept_tied(t, True) for t in head)
    alike = _alike(embed, head)
    if not untie and (together or alike):
        both = embed or head
        for name in pair if both and len(set(names)) == 2 else (state.embedding,) if both else ():
            wanted[name] = both
        if len(set(names)) == 1:
            wanted.pop(state.head, None)
            del state.hf_tensors[state.head]
        return False
    if not untie and not all(t.kind in ("saved", "tokens") for t in (*embed, *head)):
        _refuse_sum(state, sources, embed, head)
    if not untie:
        what = "both" if embed and head else state.embedding if embed else state.head
        said = "transformers 5 loads them so" if keeps_tie(state) else "config.json says tie_word_embeddings: false"
        told = f"the base ties {state.head} to {state.embedding}, and the adapter brings {what} whole: they are two "
        told += f"tensors in the merged model, as in the trained one, and {said}"
        state.notes.append(Note("T01", told, pair))
    for stored in (state.hf_tensors[n].parts[0].name for n in pair):
        state.records[stored] = replace(state.records[stored], tied_to=None)
    if len(set(names)) == 1:
        _part_head(state, wanted.pop(state.head, []))
    _part_others(state, wanted)
    return True


def _refuse_sum(state: MergeBase, sources: Sequence[WeightedAdapter], embed: list[Term], head: list[Term]) -> None:
    """Stop (T01): a low-rank change of one of two that are tied."""
    tied = f"the base ties {state.head} to {state.embedding}, and the adapter changes"
    if embed and head:
        what = f"{tied} both: each would no longer be the same tensor"
    else:
        what = (
            f"{tied} {state.head} alone, not the embedding" if head else f"{tied} the embedding alone, not {state.head}"
        )
    raise TensorkeepError(
        what,
        where=sources[(embed or head)[0].number].path,
        code="T01",
        tensors=(state.embedding, state.head),
        hint="--untie writes both as they were in training, and says so in config.json",
    )


def _part_head(state: MergeBase, terms: list[Term]) -> None:
    """Add a head of its own, made of the embedding's values, beside the embedding."""
    stored = state.hf_tensors[state.embedding].parts[0].name
    if not stored.endswith(state.embedding):
        raise TensorkeepError(
            "the base has no hf names, so its head and embedding cannot be parted here",
            where=state.view.path,
            hint="convert it first: tensorkeep convert BASE OUT --to hf",
        )
    computed_tensor(state, stored, stored.removesuffix(state.embedding) + state.head, terms)


def _part_others(state: MergeBase, wanted: dict[str, list[Term]]) -> None:
    """Add what else the config ties and files hold once (BERT's bias of the head): it unties all of them at once.

    Rows that were trained of what they are tied to are theirs.
    """
    names = ask_names(state)
    for name, source in (names.tied if names is not None else {}).items():
        tensor = state.hf_tensors.get(source)
        if name in (state.head, state.embedding) or name in state.hf_tensors or tensor is None:
            continue
        stored = tensor.parts[0].name
        if stored.endswith(source) and stored.removesuffix(source) + name not in state.made:
            rows = [t for t in wanted.get(source, ()) if t.kind == "tokens"]
            computed_tensor(state, stored, stored.removesuffix(source) + name, rows)


def spread_tied(state: MergeBase, wanted: dict[str, list[Term]], shared: Mapping[str, list[str]]) -> None:
    """Put what PEFT trained of the input embedding and keeps tied into all that is tied to it, as its forward does.

    It keeps nothing tied of which the adapter has rows of its own; low-rank updates come on top of the rows.

    Args:
        state: the base.
        wanted: what changes each hf tensor; changed in place.
        shared: what modules share, from `find_shared`.
    """
    source = state.embedding
    group = [state.head] if state.tied else []
    group += [n for kept, others in shared.items() if source in (kept, *others) for n in (kept, *others) if n != source]
    if not state.of_input:
        return
    for number in sorted({t.number for t in wanted.get(source, ())}):
        kept = [t for t in wanted[source] if t.number == number and kept_tied(t, False)]
        own = [t for n in group for t in wanted.get(n, ()) if t.number == number]
        if any(t.kind == "tokens" for t in own) or (own and any(t.kind != "tokens" for t in kept)):
            continue
        for name in group if kept else ():
            terms = wanted.setdefault(name, [])
            at = next((i for i, t in enumerate(terms) if t.number == number), len(terms))
            terms[at:at] = kept


def _alike(embed: list[Term], head: list[Term]) -> bool:
    """Whether head and embedding are replaced, whole or by row, by equal bytes of the same adapters."""
    if embed and same_terms(embed, head):
        return True
    if (
        not embed
        or [(t.number, t.kind) for t in embed] != [(t.number, t.kind) for t in head]
        or not {t.kind for t in embed} <= {"saved", "tokens"}
    ):
        return False
    return all(_brought(e) == _brought(h) for e, h in zip(embed, head))


def _brought(term: Term) -> tuple[str, list[int] | None]:
    """Return the digest of the bytes that replace a tensor or rows of it, and which rows."""
    adapter = term.adapter
    if term.kind == "saved":
        return adapter.view.digest(adapter.saved[term.name]), None
    return adapter.view.digest(adapter.tokens[term.name]), indices(adapter.document, term.name)


def settle_sizes(state: MergeBase, sources: Sequence[WeightedAdapter], wanted: dict[str, list[Term]]) -> int | None:
    """Return the merged vocabulary's size where an adapter brings another one; None where it stays.

    Args:
        state: the base.
        sources: the adapters.
        wanted: what changes each hf tensor.

    Raises:
        TensorkeepError: S02 where head and embedding would have different numbers of rows, or a resized one is to be
            scaled or mixed with another adapter's.
    """
    sizes: dict[str, int] = {}
    for name in (state.embedding, state.head, f"{state.head.removesuffix('weight')}bias"):
        tensor, terms = state.hf_tensors.get(name), wanted.get(name, [])
        if tensor is None or not tensor.shape:
            continue
        brought = next((t for t in terms if t.kind == "saved" and t.length != tensor.shape[0]), None)
        sizes[name] = brought.length if brought is not None else tensor.shape[0]
        if brought is None:
            continue
        what = None
        if brought.weight != 1:
            what = f"brings {name} with {brought.length} rows for {tensor.shape[0]}, which no weight can scale"
        elif len({t.number for t in terms}) > 1:
            what = f"brings {name} with {brought.length} rows for {tensor.shape[0]}, and another adapter changes it too"
        elif any(not p.plain or p.rows is not None for p in tensor.parts) or tensor.parts[0].name in state.weights:
            what = f"brings {name} with {brought.length} rows, and the base holds it stacked, permuted or quantized"
        if what is not None:
            raise TensorkeepError(
                what, where=sources[brought.number].path, code="S02", hint="merge this adapter alone, with weight 1"
            )
    changed = {n for n, size in sizes.items() if size != state.hf_tensors[n].shape[0]}
    if not changed:
        return None
    if len(set(sizes.values())) > 1:
        held = ", ".join(f"{n} {size}" for n, size in sizes.items())
        raise TensorkeepError(
            f"resizes the vocabulary in part, rows would be: {held}",
            where=sources[wanted[next(iter(changed))][0].number].path,
            code="S02",
            tensors=tuple(sizes),
            hint="save the adapter with save_pretrained(..., save_embedding_layers=True)",
        )
    return next(iter(sizes.values()))
