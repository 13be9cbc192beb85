"""Make a plan: read the sources' names, rename through hf names, settle ties and casts, refuse what would be lost.

This is where a conversion is decided; `plan.py` says what a plan is and `execution.py` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensorkeep.conversion import adapters, configs, dequantizing, fit, hub_links
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion._header import carry
from tensorkeep.conversion._no_place import no_place
from tensorkeep.conversion._stacking import stacked
from tensorkeep.conversion._ties import tie
from tensorkeep.conversion.coded_rows import refuse_moved_codes
from tensorkeep.conversion.gguf_types import dtypes_of, gguf_steps, refuse_types, remarks
from tensorkeep.conversion.naming import Identity
from tensorkeep.conversion.naming import detectors as renaming
from tensorkeep.conversion.naming.table import Link, from_hf, from_own
from tensorkeep.conversion.plan import BY_USER, HfTensor, Part, Plan, Step, ordered
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.names import grouped, matches, near_pattern
from tensorkeep.formats.view import Note, StateView
from tensorkeep.formats.whole_config import complete
from tensorkeep.quantization.stored import find_quantized, members
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.record import BLOCK_TYPES, DTYPES

# (config, tensors as files have them, the sources) -> the tensors as the model in memory has them
Live = Callable[[Mapping[str, Any], Mapping[str, HfTensor], Sequence[StateView]], dict[str, HfTensor]]


def make_plan(
    sources: Sequence[StateView],
    to: str,
    naming: str | None = None,
    root: str | None = None,
    dtype: str | None = None,
    drop: Sequence[str] = (),
    prefer: str | None = None,
    from_naming: str | None = None,
    ask: fit.Asker | None = fit.by_table,
    head_twice: bool = False,
    ties: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, str]] | None = None,
    live: Live | None = None,
) -> Plan:
    """Decide how every tensor of the sources reaches the output; only headers are read, and tied heads compared.

    Args:
        sources: opened checkpoints, usually one; several are combined.
        to: the output's format, a word of `formats.table.writable`.
        naming: the output's naming; None for hf, or for the names as they are where the sources' naming is unknown.
        root: the name to nest tensors under, in formats that know nesting.
        dtype: cast floats to this dtype ("BF16", for gguf also "Q8_0"), and dequantize what is quantized; None keeps
            both, and makes quantized GGUF weights bfloat16.
        drop: patterns of stored names to leave out.
        prefer: "first" or "last", which source wins where two hold the same tensor.
        from_naming: the sources' naming; None to tell it from their names.
        ask: who says which tensors an hf folder must have by its config; None where that is not compared.
        head_twice: write a tied head beside the embedding in every format but hf, as a live model's state dict has it.
        ties: who says which names share another's tensor, where they have not Llama's names.
        live: who gives tensors the names and shapes that the model in memory has; None leaves them as files have them.

    Returns:
        The plan, complete: every stored tensor is used or dropped with a reason.

    Raises:
        TensorkeepError: a tensor would be lost, made twice, misread or not found by its reader; a pattern fits none.

    Example:
        >>> make_plan([read("model")], "dcp", naming="torchtitan").naming  # doctest: +SKIP
        'torchtitan'
    """
    refuse_types(to, naming, dtype, sources)
    sources = dequantizing.all_decoded(sources, "F32" if dtype in BLOCK_TYPES else dtype)
    notes = [note for view in sources for note in (*view.notes, *configs.left_behind(view))]
    dropped: list[Step] = []
    identities = [namings.identify(view, from_naming) for view in _without(sources, drop, dropped)]
    if adapters.wanted(identities, to, naming):
        return _check_cover(adapters.adapter_plan(sources, identities, to, configs.gather(sources)[0], dtype, dropped))
    hub, config, companions = _gathered(sources, identities, to, prefer, dropped, notes)
    asker = ask if _target(to, naming, True, identities) in ("hf", "gguf") and to in ("hf", "gguf") else None
    hub, known = fit.settle(hub, config, sources, dropped, asker, _left_out(identities))
    target = _target(to, naming, known, identities)
    tie(hub, to, target, config, sources, dropped, notes, head_twice, ties)
    notes += configs.missing_biases(config, hub)
    hub = live(complete(config, companions), hub, sources) if live is not None and config is not None else hub
    own = _renamed(list(hub.values()), target, config, dropped, notes, to, sources)
    companions = renaming.with_recipe(hub, companions, notes) if _renames(identities) else companions
    steps = gguf_steps(_to_sink(own, dtypes_of(sources, to, dtype, notes)), to, dtype, notes, sources)
    _refuse_cast_of_scales(steps, sources)
    return _finished(Plan(list(sources), ordered([*steps, *dropped]), target, root, config, companions, notes), to)


def _finished(plan: Plan, to: str) -> Plan:
    """Return the plan with what its format and its config ask for, once nothing is lost by it."""
    if to == "pth" and plan.root is None:
        renaming.nest_checkpoint(plan)
    if to == "gguf":
        plan.notes += remarks(plan)
    _check_cover(plan)
    refuse_moved_codes([step.parts for step in plan.steps if step.sink is not None], plan.sources)
    configs.match_dtype(plan)
    carry(plan, to)
    dequantizing.told(plan)
    return plan


def _gathered(
    sources: Sequence[StateView],
    identities: Sequence[Identity],
    to: str,
    prefer: str | None,
    dropped: list[Step],
    notes: list[Note],
) -> tuple[dict[str, HfTensor], dict[str, Any] | None, list[Companion]]:
    """Return the model's tensors of all sources by hf name, its config, and the small files beside it."""
    config, companions = configs.gather(sources)
    hub: dict[str, HfTensor] = {}
    for index, (view, whole) in enumerate(zip(sources, identities)):
        identity = adapters.set_aside(view, whole, to, notes)
        config, companions = configs.minimind_config(view, identity, config, companions, notes)
        notes += renaming.average_notes(view, identity)
        _combine(hub, to_hf_tensors(view, index, identity, config, dropped), prefer, dropped)
    if not hub:
        raise TensorkeepError("no model tensor is left to convert", where=sources[0].path, code="K05")
    return hub, config, companions


def _target(to: str, naming: str | None, known: bool, identities: Sequence[Identity]) -> str | None:
    """Return the output's naming; None where the names stay as they are because nobody knows them."""
    if to == "gguf":
        return "gguf"
    return naming or ("hf" if known or any(i.naming for i in identities) else None)


def _renames(identities: Sequence[Identity]) -> bool:
    return any(namings.renames(i.naming) for i in identities)


def _left_out(identities: Sequence[Identity]) -> tuple[str, ...]:
    """Return what the programs that wrote the sources never write; `configs.missing_biases` notes it."""
    bare = (i.naming == "torchtitan" and not any(n.endswith(".bias") for n in i.names) for i in identities)
    return ("*.bias",) if any(bare) else ()


def _without(sources: Sequence[StateView], drop: Sequence[str], dropped: list[Step]) -> list[StateView]:
    """Return the views without the tensors that the user drops; a pattern that fits nothing is an error."""
    unused = [p for p in drop if not any(matches(n, [p]) for view in sources for n in view)]
    if unused:
        raise TensorkeepError(
            f"--drop {unused[0]!r} fits no tensor",
            where=sources[0].path,
            hint=near_pattern(unused[0], (n for view in sources for n in view))
            or "quote the pattern, or list names with: tensorkeep inspect",
        )
    left = []
    for index, view in enumerate(sources):
        gone = {n for n in view if matches(n, drop)}
        dropped += [Step(("drop",), (Part(index, n),), None, BY_USER) for n in view if n in gone]
        left.append(replace(view, records={n: r for n, r in view.records.items() if n not in gone}))
    return left


# -- source naming -> hf --------------------------------------------------------------------------------------------


def to_hf_tensors(
    view: StateView, index: int, identity: Identity, config: Mapping[str, Any] | None, dropped: list[Step]
) -> dict[str, HfTensor]:
    """Return one source's model tensors under hf names; what is not the model's goes to `dropped` with its reason.

    Args:
        view: the opened checkpoint.
        index: its number among the plan's sources.
        identity: its naming and clean names, from `naming.identify`.
        config: the model's config; needed where rows or experts follow it.
        dropped: gains a step for each tensor that is left out.

    Returns:
        The tensors by hf name.

    Raises:
        TensorkeepError: two tensors become one name (K02), a name has no place (K07), or the config that the naming
            needs is missing or another model's (C01, C03).
    """
    dropped += [Step(("drop",), (Part(index, n),), None, what) for n, what in identity.other.items()]
    if namings.renames(identity.naming):
        return renaming.detector_to_hf(view, index, identity, dropped)
    table = namings.rows(identity.naming, identity.names.values(), config)
    complete = identity.naming is not None and hasattr(namings.module(identity.naming), "COMPLETE")
    out: dict[str, HfTensor] = {}
    pieces: dict[str, list[hub_links.Piece]] = {}
    views = [view] * (index + 1)
    for stored, clean in identity.names.items():
        record = view[stored]
        if _computed(clean, identity.naming):
            dropped.append(
                Step(("drop",), (Part(index, stored),), None, "a buffer that the model computes from its config")
            )
            continue
        links = from_own(clean, table, experts=record.shape[0] if record.shape else 0) if table is not None else None
        if links is None and complete:
            mine = [s for s, c in identity.names.items() if not _computed(c, identity.naming)]
            rest = [s for s in mine if table is None or from_own(identity.names[s], table) is None]
            raise no_place(rest, f"{(config or {}).get('model_type')}, as transformers has it", view, view.path)
        own = HfTensor(stored, record.dtype, record.shape, (Part(index, stored),), tied_to=record.tied_to)
        for link in links or [Link(clean, clean)]:
            made = hub_links.to_hf(link, own, config, views)
            if isinstance(made, hub_links.Piece):
                pieces.setdefault(made.name, []).append(made)
                continue
            if made.name in out:
                raise TensorkeepError(
                    f"{stored} and another tensor both become {made.name}",
                    where=view.path,
                    code="K02",
                    hint="leave one out with --drop",
                )
            out[made.name] = made
    out |= hub_links.put_together(pieces, views)
    names = {h.parts[0].name: h.name for h in out.values() if h.parts[0].rows is None}
    return {n: replace(h, tied_to=names.get(h.tied_to)) if h.tied_to else h for n, h in out.items()}


def _computed(name: str, scheme: str | None) -> bool:
    """Whether a stored tensor is a buffer that the model computes anew from its config, such as RoPE's frequencies."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return scheme is not None and name in getattr(namings.module(scheme), "COMPUTED", ())


def _combine(hub: dict[str, HfTensor], found: dict[str, HfTensor], prefer: str | None, dropped: list[Step]) -> None:
    """Add another source's tensors; where both have one, `prefer` decides or the plan is refused."""
    twice = sorted(set(hub) & set(found))
    if twice and prefer not in ("first", "last"):
        raise TensorkeepError(
            f"{len(twice)} tensors are in two sources: {', '.join(grouped(twice)[:4])}",
            hint="say which wins: --prefer first or --prefer last; or leave some out with --drop",
        )
    for name, item in found.items():
        loser = item if prefer == "first" else hub.get(name)
        if name in hub and loser is not None:
            dropped += [
                Step(("drop",), (part,), None, f"another source has {name} and is preferred") for part in loser.parts
            ]
            if prefer == "first":
                continue
        hub[name] = item


# -- hf -> sink naming ----------------------------------------------------------------------------------------------


def _to_sink(own: list[HfTensor], dtypes: Sequence[str | None]) -> list[Step]:
    """Return one step for each output tensor, with the actions that led to it."""
    by_name = {h.name: h for h in own}
    steps = []
    for hub in own:
        dtype = dtypes[hub.parts[0].source]
        actions = [a for a in dict.fromkeys(hub.actions) if a != "permute" or any(p.permutes for p in hub.parts)]
        if hub.name not in [p.name for p in hub.parts] and "tie" not in actions:
            actions.insert(0, "rename")
        made = hub.dtype
        if dtype is not None and DTYPES[hub.dtype].floating and hub.dtype != dtype:
            made = dtype
            actions.append("cast")
        sink = SinkTensor(
            hub.name, made, hub.shape, hub.tied_to if _alike(hub, by_name.get(hub.tied_to or "")) else None
        )
        steps.append(Step(tuple(actions) or ("keep",), hub.parts, sink))
    return steps


def _refuse_cast_of_scales(steps: Sequence[Step], sources: Sequence[StateView]) -> None:
    """Stop at a cast that would round scales away from their codes, or fp8 codes away from their scale (Q01)."""
    cast = {(p.source, p.name): s for s in steps if "cast" in s.actions for p in s.parts}
    for index, view in enumerate(sources if cast else ()):
        weights = find_quantized(view)
        packed = [n for n in (*weights, *members(weights)) if (index, n) in cast]
        scales = [n for n in view if n.endswith(("weight_scale_inv", "weight_scale", ".scale"))]
        if scales and any(r.dtype.startswith("F8") for r in view.values()):
            packed += scales
        if packed:
            raise TensorkeepError(
                f"{packed[0]} and {len(packed) - 1} more belong to quantized weights: "
                "a cast would part codes and scales",
                where=view.path,
                code="Q01",
                hint="leave --dtype out",
            )


def _alike(tied: HfTensor, other: HfTensor | None) -> bool:
    """Whether two tensors that shared their bytes still do: permuted alike, and the other not tied to a third."""
    if other is None or other.tied_to is not None or (tied.dtype, tied.shape) != (other.dtype, other.shape):
        return False
    return [p._replace(name="") for p in tied.parts] == [p._replace(name="") for p in other.parts]


def _renamed(
    items: list[HfTensor],
    target: str | None,
    config: Mapping[str, Any] | None,
    dropped: list[Step],
    notes: list[Note],
    to: str,
    sources: Sequence[StateView],
) -> list[HfTensor]:
    """Return the tensors under the output naming's names, by its functions or by its tables."""
    if target is not None and namings.renames(target):
        return renaming.to_sink(items, target, dropped)
    if target is not None and target != to and hasattr(scheme := namings.module(target), "READ_ONLY"):
        raise TensorkeepError(f"{target} is read-only", hint=scheme.READ_ONLY)
    return _named(items, target, config, notes, sources)


def _named(
    items: list[HfTensor],
    target: str | None,
    config: Mapping[str, Any] | None,
    notes: list[Note],
    sources: Sequence[StateView],
) -> list[HfTensor]:
    """Return the tensors under the output naming's names: renamed, rows permuted, experts stacked."""
    scheme = namings.module(target) if target is not None else None
    table = namings.rows(target, [i.name for i in items], config)
    if scheme is None or table is None:
        return items
    family = str(target)
    if hasattr(scheme, "family"):
        family = scheme.family([i.name for i in items], config)
    elif (config or {}).get("model_type") in scheme.FAMILIES:
        family = str((config or {})["model_type"])
    out: list[HfTensor] = []
    stacks: dict[str, dict[int, HfTensor]] = {}
    pieces: dict[str, list[hub_links.Piece]] = {}
    for item in items:
        links = from_hf(item.name, table)
        if links is None:
            names = [i.name for i in items]
            rest = [n for n in names if from_hf(n, table) is None]
            place = f"naming {target} ({family}), whose loader would drop it"
            raise no_place(rest, place, names, more="keep the hf names (--naming hf)")
        tied = from_hf(item.tied_to, table) if item.tied_to else None
        for link in links:
            made = hub_links.to_own(link, item, config, sources)
            if isinstance(made, hub_links.Piece):
                pieces.setdefault(made.name, []).append(made)
            elif link.expert is not None:
                stacks.setdefault(link.own, {})[link.expert] = made
            else:
                out.append(replace(made, tied_to=tied[0].own if tied else made.tied_to))
    out += hub_links.put_together(pieces, sources).values()
    out += [stacked(name, members, config) for name, members in stacks.items()]
    lost = [h.name for h in out if hasattr(scheme, "dropped_by_loader") and scheme.dropped_by_loader(h.name, family)]
    if lost:
        notes.append(
            Note(
                "K07",
                f"{scheme.LOADERS[0]}'s {family} has no place for {len(lost)} of these tensors and its loader would "
                f"not ask for them, without a word: {', '.join(grouped(lost)[:4])}",
                tuple(lost),
            )
        )
    return out


# -- proof of the plan ----------------------------------------------------------------------------------------------


def _check_cover(plan: Plan) -> Plan:
    """Return the plan, or stop: every stored tensor occurs in a step and every output name occurs once."""
    used = {(p.source, p.name) for step in plan.steps for p in step.parts}
    lost = [n for i, v in enumerate(plan.sources) for n in v if (i, n) not in used]
    if lost:
        raise TensorkeepError(
            f"the plan loses {len(lost)} tensors: {', '.join(lost[:5])}",
            hint="this is a defect of tensorkeep, please report it",
        )
    names = [t.name for t in plan.tensors]
    if len(names) != len(set(names)):
        raise TensorkeepError("the plan makes a tensor twice", hint="this is a defect of tensorkeep, please report it")
    return plan
