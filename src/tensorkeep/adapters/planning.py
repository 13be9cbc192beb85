"""Plan a merge: find the one weight of the base that each low-rank pair belongs to, or refuse.

An adapter trained on a quantized base fits those weights, dequantized, and not the float original: measured on a small
Llama, logits are then off by 6e-7 against 0.29. So `onto="trained"` means what the adapter was trained against: a
quantized BASE dequantized, a float BASE through the quantization that the adapter's config names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensorkeep.adapters._inner_ties import find_shared, settle_shared
from tensorkeep.adapters._matching import MergeBase, WeightedAdapter, computed_tensor, terms_of
from tensorkeep.adapters._through import sent_through
from tensorkeep.adapters._ties import find_tied, keeps_tie, refuse_unknown, settle_sizes, settle_ties, spread_tied
from tensorkeep.adapters._view import MergedView
from tensorkeep.adapters.reading import DIGEST, read_adapter, refuse_unmergeable, said_precision
from tensorkeep.adapters.terms import Term
from tensorkeep.conversion import configs
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.adapters import halves
from tensorkeep.conversion.dequantizing import decoded, turned
from tensorkeep.conversion.model_names import AskNames, unknown
from tensorkeep.conversion.plan import Part, Plan, Step, ordered
from tensorkeep.conversion.planning import make_plan, to_hf_tensors
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.companions import travelling
from tensorkeep.formats.view import Note, StateView
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.encoding import Forms, forms_of
from tensorkeep.quantization.stored import QuantizedWeight
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.record import BLOCK_TYPES


@dataclass
class MergePlan:
    """A conversion plan whose source is the merged view, and what a report or a certificate says of it.

    Args:
        plan: how the output is made of the merged view.
        view: the base with the adapters added in.
        sources: the adapters.
        onto: "trained" or "original", see `plan_merge`.
        kind: the quantization of the weights merged onto; None where they are plain floats.
        terms: what is added, by output name.
    """

    plan: Plan
    view: MergedView
    sources: list[WeightedAdapter]
    onto: str
    kind: str | None  # the quantization of the weights merged onto, None where they are plain floats
    terms: dict[str, list[Term]] = field(default_factory=dict)  # sink name -> what is added


def open_adapters(views: Sequence[tuple[StateView, float]]) -> list[WeightedAdapter]:
    """Read adapters for a merge and check each on its own.

    Args:
        views: opened adapters, each with what it is multiplied by.

    Returns:
        The adapters, with their digests.

    Raises:
        TensorkeepError: a view holds no adapter (K05) or one that cannot be merged (A01, A02), or one is given twice
            (A03).
    """
    out = []
    for view, weight in views:
        adapter = read_adapter(view)
        if adapter is None or not (adapter.stored or adapter.foreign or adapter.copies):
            raise TensorkeepError(
                "holds no adapter",
                where=view.path,
                code="K05",
                hint="tensorkeep merge BASE ADAPTER OUT; see what is in it with: tensorkeep inspect",
            )
        refuse_unmergeable(adapter)
        out.append(WeightedAdapter(adapter, weight, adapter.digest()))
    for at, source in enumerate(out):
        if source.digest in [s.digest for s in out[:at]]:
            raise TensorkeepError(
                "is given twice", where=source.path, code="A03", hint=f"give it once, with a weight: {source.path}=2"
            )
    return out


def plan_merge(
    base: StateView,
    sources: list[WeightedAdapter],
    to: str = "hf",
    *,
    onto: str = "trained",
    naming: str | None = None,
    root: str | None = None,
    dtype: str | None = None,
    untie: bool = False,
    ask: AskNames = unknown,
) -> MergePlan:
    """Decide what every tensor of the merged model is made of; only headers and the adapters' configs are read.

    Args:
        base: the checkpoint to merge into.
        sources: from `open_adapters`.
        to: the output's format, "hf", "dcp" or "pth".
        onto: "trained" adds to the weights as the adapter was trained on them (dequantized, or sent through the
            quantization that its config names), "original" to the float weights as they are.
        naming: the output's naming; None for hf.
        root: the name to nest tensors under in a DCP or .pth.
        dtype: round the result to this dtype ("BF16"); None for the base's own.
        untie: write head and embedding as two tensors.
        ask: who says what the base's model calls its tensors in memory, where an adapter's names are not the file's.

    Returns:
        The plan, for `merge`.

    Raises:
        TensorkeepError: a pair fits no weight of the base (A01), an adapter was trained on another form of it (A04),
            or a tie would be broken without `untie` (T01).
    """
    exact = "F32" if dtype in BLOCK_TYPES else dtype  # blocks are made of the sums, in float32
    view, kind = _merged_view(base, sources, onto, exact, untie, ask)
    plan = make_plan([view], to, naming=naming, root=root, dtype=dtype)
    terms: dict[str, list[Term]] = {}
    steps = []
    for step in plan.steps:
        made = [view.made[p.name] for p in step.parts if p.name in view.made]
        if step.sink is None or not made:
            steps.append(step)
            continue
        actions = tuple(a for a in step.actions if a != "keep")
        found = [t for m in made for t in m.terms]
        if found:
            terms[step.sink.name] = found
        first = "merge" if found else "cast"
        said = [_spoken(t) for t in found] or [f"dequantized {m.weight.kind if m.weight else kind}" for m in made[:1]]
        steps.append(replace(step, actions=(first, *(a for a in actions if a != first)), reason=", ".join(said)))
    gone = [n for n in base if n not in view.records and n not in {m.source for m in view.made.values()}]
    steps += [Step(("drop",), (Part(0, n),), None, _gone(base, n)) for n in gone]
    plan.steps = ordered(steps)
    widened = [n for n, m in view.made.items() if m.source in base and base[m.source].encoding != "plain"]
    if to == "gguf" and dtype is None and widened:
        what = f"{len(widened)} quantized weights that the merge changes are rounded to bfloat16, first {widened[0]}"
        plan.notes.append(Note("V02", f"{what}; --dtype says another type", tuple(widened)))
    return MergePlan(plan, view, sources, onto, kind, terms)


def _spoken(term: Term) -> str:
    """Say what a term adds, for the plan's line."""
    whole = {"saved": "replaced", "tokens": "rows replaced"}
    what = whole[term.kind] if term.kind in whole else term.adapter.plug.told(term)
    return what + (f", weight {term.weight:g}" if term.weight != 1 else "")


def _gone(base: StateView, name: str) -> str:
    """Say why a stored tensor of the base is not in the output."""
    return "adapter, merged or left out" if ".lora" in name else "belongs to codes that were dequantized"


# -- the view ---------------------------------------------------------------------------------------------------------


def _merged_view(
    base: StateView, sources: list[WeightedAdapter], onto: str, dtype: str | None, untie: bool, ask: AskNames
) -> tuple[MergedView, str | None]:
    """Return the view of the merged model over the base's own names, and the quantization that it is merged onto."""
    identity = namings.identify(base)
    config = configs.minimind_config(base, identity, base.config, [], [])[0]
    own = set(halves(identity)) if base.format != "peft" else set()
    identity = replace(identity, names={n: c for n, c in identity.names.items() if n not in own})
    weights = quantized.find_quantized(base, identity.names)
    for weight in weights.values():
        quantized.refuse(weight, base.path)
    forms, coded = _wanted_quantization(base, sources, onto, weights), weights
    if _needs_floats(base, weights, forms):
        base, weights = decoded(base, "F32"), {}
        identity = namings.identify(base)
    gone = own | set(quantized.members(weights)) | {f"{w.stands_for}_digest" for w in weights.values()}
    records = {n: r for n, r in base.records.items() if n not in gone}
    state = MergeBase(base, config, to_hf_tensors(base, 0, identity, config, []), weights, records, dtype, ask=ask)
    state.coded = {w.stands_for for w in coded.values() if w.held}
    find_tied(state, sources, untie)
    shared = find_shared(state)
    if forms is not None:
        state.through, state.joined = sent_through(state, forms)
    wanted: dict[str, list[Term]] = {}
    for number, source in enumerate(sources):
        for name, found in terms_of(state, number, source).items():
            wanted.setdefault(name, []).extend(found)
    refuse_unknown(state, sources, wanted)
    spread_tied(state, wanted, shared)
    sizes = settle_sizes(state, sources, wanted)
    apart = settle_shared(state, sources, wanted, shared, untie)
    parted = settle_ties(state, sources, wanted, untie, apart)
    state.notes += _base_notes(sources, coded, onto)
    for stored in [
        *weights,
        *getattr(base, "made", ()),
        *(state.hf_tensors[n].parts[0].name for n in (*state.through, *state.joined)),
    ]:
        computed_tensor(state, stored)
    for name, terms in wanted.items():
        part = state.hf_tensors[name].parts[0]
        computed_tensor(state, part.name, None, terms)
    view = MergedView(
        base.path,
        base.format,
        base.folder,
        state.records,
        base.config,
        travelling(base.companions),
        base.entries,
        [*base.notes, *configs.left_behind(base), *state.notes],
        base.metadata,
        computed=True,
        base=base,
        made=state.made,
    )
    if weights or parted or sizes is not None:
        _keep_config_true(view, state, bool(weights), parted, sizes)
    spoken = sorted({m.requantized.spoken for m in state.made.values() if (m.weight or m.through) and m.requantized})
    return view, ", ".join(spoken) or None


def _needs_floats(base: StateView, weights: Mapping[str, QuantizedWeight], forms: Forms | None) -> bool:
    """Whether a base's codes give way to floats before anything is added, as they did when the adapter was trained.

    So it is with codes that lie under other names than their weights or the other way round (Conv1D), and where the
    adapter was trained on those floats quantized anew.
    """
    if forms is not None and weights and not any(w.held for w in weights.values()):
        return True
    return any(w.stands_for != w.name or turned(base.config, w.stands_for) for w in weights.values())


def _wanted_quantization(
    base: StateView, sources: Sequence[WeightedAdapter], onto: str, weights: Mapping[str, QuantizedWeight]
) -> Forms | None:
    """Return the quantization to send a float base through; None where its values stay.

    Raises:
        TensorkeepError: A04 where the adapters were trained on other forms of the base than this one.
    """
    asked = {
        forms_of(s.adapter.document["quantization"], s.path): s.path
        for s in sources
        if s.adapter.document.get("quantization")
    }
    if weights:
        found = sorted({w.kind for w in weights.values()})
        if onto == "original":
            raise TensorkeepError(
                f"is quantized ({', '.join(found)}): the original weights are not in it",
                where=base.path,
                hint="give the float checkpoint that it was made from as BASE, with --allow-other-base",
            )
        mixed = [f for f in asked if f.modules and any(k.kind in found for k in f.kinds)]  # experts beside the codes
        odd = [(k, f) for f in asked if f not in mixed for k in f.kinds if k.kind not in found]
        if odd and not any(w.held for w in weights.values()):
            return _one_form(sources, asked)
        if odd:
            raise TensorkeepError(
                f"was trained on {odd[0][0].spoken}, the base {base.path} is {', '.join(found)}",
                where=asked[odd[0][1]],
                code="A04",
                hint=f"give the {odd[0][0].kind} base, or the float one it was made from",
            )
        return _one_form(sources, asked) if mixed else None
    return None if onto == "original" or not asked else _one_form(sources, asked)


def _one_form(sources: Sequence[WeightedAdapter], asked: Mapping[Forms, str]) -> Forms:
    """Return the one form of the base that all adapters were trained on; A04 where there are several."""
    if len(asked) > 1 or len({bool(s.adapter.document.get("quantization")) for s in sources}) > 1:
        raise TensorkeepError(
            "the adapters were trained on different forms of the base "
            f"({', '.join(k.spoken for f in asked for k in f.kinds)}, others on floats)",
            code="A04",
            hint="merge them one by one, or all onto the float weights: --onto original",
        )
    return next(iter(asked))


def _base_notes(
    sources: Sequence[WeightedAdapter], weights: Mapping[str, QuantizedWeight], onto: str
) -> Iterator[Note]:
    """Say (A04) where an adapter may have been trained on another base, or precision of it, than it is merged onto.

    Ours records both, and is refused where they differ; PEFT's records the base's name alone.
    """
    found = ", ".join(sorted({w.kind for w in weights.values()}))
    for source in sources:
        document = source.adapter.document
        if "quantization" in document:
            if document["quantization"] and onto == "original":
                yield Note(
                    "A04", f"{source.path} was trained on a quantized form of the base: its update fits that one"
                )
            elif not document["quantization"] and weights:
                same = document.get("base_digest") and not any(
                    w.held for w in weights.values()
                )  # training dequantized it
                if not same:
                    yield Note("A04", f"{source.path} was trained on float weights, this base is {found}, dequantized")
            continue
        said = said_precision(document)
        if said is not None and not weights:
            yield Note(
                "A04",
                f"{source.path} names a base in {said} ({shown(document['base_model_name_or_path'])}) as what it was "
                "trained on, and is merged onto other weights: give that folder to merge onto what it has learnt from",
            )
        elif said is None and weights and document:
            yield Note(
                "A04",
                f"{source.path} does not say which precision it was trained on: it is merged onto {found}, dequantized",
            )
        elif not (document.get(DIGEST) or source.adapter.view.metadata.get(DIGEST) or source.adapter.magnitudes):
            yield Note(
                "A04",
                f"{source.path} carries no digest of its base: its names and shapes fit this one, whether it was "
                "trained on it cannot be known from the files",
            )


def _keep_config_true(view: MergedView, state: MergeBase, floats: bool, parted: bool, rows: int | None) -> None:
    """Keep the config true: no quantization is left, head and embedding are two tensors, the vocabulary has `rows`."""
    before = state.hf_tensors[state.embedding].shape[0] if rows is not None else None
    parted = parted and not keeps_tie(state)

    def true(part: Mapping[str, Any], top: bool) -> dict[str, Any]:
        """One level of the config, and those of the language model inside it."""
        made = {k: v for k, v in part.items() if not (floats and top and k == "quantization_config")}
        if parted and (top or "tie_word_embeddings" in made):
            made["tie_word_embeddings"] = False
        if rows is not None and made.get("vocab_size") == before:
            made["vocab_size"] = rows
        inner = [k for k in ("text_config", "language_config", "llm_config") if isinstance(made.get(k), Mapping)]
        return {**made, **{k: true(made[k], False) for k in inner}}

    for at, found in enumerate(view.companions):
        document = parse_json(found.data, found.where) if found.name == "config.json" else None
        if isinstance(document, dict):  # the file's own text: what was read of it may leave something out
            view.companions[at] = configs.companion("config.json", true(document, True))._replace(where=found.where)
    view.config = true(view.config, True) if view.config is not None else None
