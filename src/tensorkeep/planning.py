"""From views to a plan: namings through the hf hub, ties, casts, combined sources, what the target would drop.

This is where a conversion is decided; `plan.py` says what a plan is and `conversion.py` carries it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensorkeep import naming as namings
from tensorkeep.errors import TensorkeepError
from tensorkeep.layout import SinkTensor
from tensorkeep.names import grouped, matches
from tensorkeep.naming import Identity, hf, minimind
from tensorkeep.naming.table import Link, from_hf, from_own
from tensorkeep.plan import Part, Plan, Rows, Step, ordered
from tensorkeep.record import DTYPES, TensorRecord
from tensorkeep.view import Companion, Note, StateView


@dataclass(frozen=True)
class Hub:
    """A tensor under its hf name: dtype, shape, the parts it is made of, and what was done on the way."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    actions: tuple[str, ...] = ()
    tied_to: str | None = None


def make_plan(
    sources: Sequence[StateView],
    to: str,
    naming: str | None = None,
    root: str | None = None,
    dtype: str | None = None,
    drop: Sequence[str] = (),
    prefer: str | None = None,
    from_naming: str | None = None,
) -> Plan:
    """Decide how every tensor of `sources` reaches a sink of format `to`; nothing but headers is read.

    `naming` None keeps the names where the source's scheme is unknown, and means hf otherwise. The one exception to
    "headers only": where the config ties head and embedding and both are stored, their bytes are compared.

    Raises TensorkeepError where a tensor would be lost, made twice or misread by the target.
    """
    notes = [note for view in sources for note in view.notes]
    config, companions = _configs(sources, notes)
    dropped: list[Step] = []
    hub: dict[str, Hub] = {}
    schemes: list[str | None] = []
    for index, view in enumerate(sources):
        identity = namings.identify(_without(view, drop, index, dropped), from_naming)
        schemes.append(identity.naming)
        config, companions = _minimind_config(view, identity, config, companions, notes)
        found = to_hub(view, index, identity, config, dropped)
        _combine(hub, found, prefer, sources, dropped)
    if not hub:
        raise TensorkeepError("no model tensor is left to convert", where=sources[0].path if sources else None, code="K05")
    target = naming or next((s for s in schemes if s), None) and "hf"
    _tie(hub, to, target, config, sources, dropped, notes)
    steps = _to_sink(list(hub.values()), to, target, config, dtype, notes)
    plan = Plan(list(sources), ordered([*steps, *dropped]), target, root, config, companions, notes)
    _check_cover(plan)
    _match_config_dtype(plan)
    return plan


def _without(view: StateView, drop: Sequence[str], index: int, dropped: list[Step]) -> StateView:
    """The view less the tensors that the user drops; a pattern that fits nothing is a mistake worth stopping for."""
    if not drop:
        return view
    gone = [n for n in view if matches(n, drop)]
    unused = [p for p in drop if not any(matches(n, [p]) for n in view)]
    if unused and index == 0 and not gone:
        raise TensorkeepError(f"--drop {unused[0]!r} fits no tensor", where=view.path, hint="quote the pattern, or list names with: tensorkeep inspect")
    dropped += [Step(("drop",), (Part(index, n),), None, "dropped by the user") for n in gone]
    return replace(view, records={n: r for n, r in view.records.items() if n not in set(gone)})


def _configs(sources: Sequence[StateView], notes: list[Note]) -> tuple[dict[str, Any] | None, list[Companion]]:
    companions: dict[str, Companion] = {}
    for view in sources:
        for companion in view.companions:
            companions.setdefault(companion.name, companion)
    config = next((v.config for v in sources if v.config is not None), None)
    return config, list(companions.values())


# -- source naming -> hf --------------------------------------------------------------------------------------------


def to_hub(view: StateView, index: int, identity: Identity, config: Mapping[str, Any] | None, dropped: list[Step]) -> dict[str, Hub]:
    """The model tensors of one source under hf names. What is not the model's goes to `dropped` with its reason."""
    dropped += [Step(("drop",), (Part(index, n),), None, what) for n, what in identity.other.items()]
    table = _table(identity, config)
    out: dict[str, Hub] = {}
    for stored, clean in identity.names.items():
        record = view[stored]
        if _computed(clean, identity.naming):
            dropped.append(Step(("drop",), (Part(index, stored),), None, "a buffer that the model computes from its config"))
            continue
        links = from_own(clean, table, experts=record.shape[0] if record.shape else 0) if table is not None else None
        if links is None:
            links = [Link(clean, clean)]
        for link in links:
            made = _from_link(link, record, index, identity, config)
            if made.name in out:
                raise TensorkeepError(f"{stored} and another tensor both become {made.name}", where=view.path, code="K02", hint="leave one out with --drop")
            out[made.name] = made
    return out


def _from_link(link: Link, record: TensorRecord, index: int, identity: Identity, config: Mapping[str, Any] | None) -> Hub:
    part, shape, actions = Part(index, record.name), record.shape, ()
    if link.expert is not None:
        part, shape, actions = part._replace(rows=(link.expert, link.expert + 1)), record.shape[1:], ("split",)
    if link.rope:
        part = part.permuted(rope_rows(config, "half", record, identity.naming))
        actions = (*actions, "permute")
    return Hub(link.hf, record.dtype, shape, (part,), actions, record.tied_to)


def _table(identity: Identity, config: Mapping[str, Any] | None) -> Any:
    if identity.naming in (None, "hf"):
        return None
    scheme = namings.module(str(identity.naming))
    if identity.naming == "minimind":
        return scheme.FAMILIES["mm2a"] if minimind.generation(identity.names.values()) == "mm2a" else None
    if identity.naming == "gguf":
        return scheme.table(config)
    return scheme.FAMILIES[scheme.family(identity.names.values(), config)]


def _computed(name: str, scheme: str | None) -> bool:
    """Buffers that eras before 2025-08 stored; every program computes them anew (facts: never write them)."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return scheme not in (None, "hf") and name in getattr(namings.module(str(scheme)), "COMPUTED", ())


def rope_rows(config: Mapping[str, Any] | None, to: str, record: TensorRecord, scheme: str | None) -> Rows:
    """The row permutation of q/k for this config. head_dim is read where the config has it, derived otherwise.

    Raises TensorkeepError (C03) without a config: shapes alone do not tell the size of a head.
    """
    own = {**(config or {}), **{new: (config or {})[old] for old, new in minimind.OLD_FIELDS.items() if old in (config or {})}}
    heads = own.get("num_attention_heads")
    head_dim = own.get("head_dim") or (own.get("hidden_size", 0) // heads if heads else 0)
    if not isinstance(head_dim, int) or head_dim <= 0:
        raise TensorkeepError(
            f"{record.name}: its rows follow another RoPE layout, and without a config.json the size of a head is unknown",
            code="C03", hint="add the model's folder or config: --config DIR_OR_FILE",
        )  # fmt: skip
    rotary = int(head_dim * (own.get("partial_rotary_factor") or 1.0))
    if rotary % 2 or not record.shape or record.shape[0] % head_dim:
        raise TensorkeepError(
            f"{record.name}: {record.shape[0] if record.shape else 0} rows are not whole heads of {head_dim} (rotary {rotary})", code="C01",
            hint="is this the config of another model?",
        )  # fmt: skip
    return Rows(head_dim, rotary, to)


def _combine(hub: dict[str, Hub], found: dict[str, Hub], prefer: str | None, sources: Sequence[StateView], dropped: list[Step]) -> None:
    twice = sorted(set(hub) & set(found))
    if twice and prefer not in ("first", "last"):
        raise TensorkeepError(
            f"{len(twice)} tensors are in two sources: {', '.join(grouped(twice)[:4])}",
            hint="say which wins: --prefer first or --prefer last; or leave some out with --drop",
        )
    for name, item in found.items():
        loser = item if prefer == "first" else hub.get(name)
        if name in hub and loser is not None:
            dropped += [Step(("drop",), (part,), None, f"another source has {name} and is preferred") for part in loser.parts]
            if prefer == "first":
                continue
        hub[name] = item


def _minimind_config(
    view: StateView, identity: Identity, config: dict[str, Any] | None, companions: list[Companion], notes: list[Note]
) -> tuple[dict[str, Any] | None, list[Companion]]:
    """MiniMind's config is not transformers': make one, and say which fields nothing gave."""
    if identity.naming != "minimind":
        return config, companions
    made = minimind.generation(identity.names.values())
    probe = {clean: view[stored] for stored, clean in identity.names.items()}
    if made == "mm2a":
        links = {clean: from_own(clean, minimind.META) for clean in probe}
        probe = {link[0].hf: probe[clean] for clean, link in links.items() if link}
    made_config, assumed = minimind.hf_config(probe, config, made)
    if assumed:
        notes.append(Note("C03", f"no file says {', '.join(assumed)}: MiniMind's defaults of {made}; check them, or give --config"))
    if made_config["model_type"] == "minimind":
        notes.append(Note("K07", f"{made} with shared experts: no transformers class computes this model, the sink holds its weights only"))
    rest = [c for c in companions if c.name not in ("config.json", "generation_config.json")]
    ids = {k: made_config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rest.append(_companion("config.json", {**made_config, "dtype": _torch_dtype(probe.values())}))
    rest.append(_companion("generation_config.json", {"_from_model_config": True, **ids}))
    return made_config, rest


def _companion(name: str, document: Mapping[str, Any]) -> Companion:
    return Companion(name, (json.dumps(document, indent=2) + "\n").encode(), "made from the weights")


def _torch_dtype(records: Any) -> str:
    widths = [DTYPES[r.dtype].torch for r in records if DTYPES[r.dtype].floating]
    return max(set(widths), key=widths.count) if widths else "float32"  # type: ignore[arg-type]


# -- ties -----------------------------------------------------------------------------------------------------------


def _tie(
    hub: dict[str, Hub], to: str, target: str | None, config: Mapping[str, Any] | None, sources: Sequence[StateView],
    dropped: list[Step], notes: list[Note],
) -> None:  # fmt: skip
    """Head and embedding: decided from config and data, never from equality of values alone (facts §7)."""
    head, embed = hub.get(hf.HEAD), hub.get(hf.EMBEDDING)
    tied = hf.tied(dict(config)) if config is not None else None
    if embed is None or target is None:
        return
    if head is None:
        if tied is False:
            raise TensorkeepError(
                "lm_head.weight is missing and the config says that it is not tied to the embedding", code="K01",
                where=sources[0].path, hint='get the full checkpoint, or set "tie_word_embeddings": true if the head is tied',
            )  # fmt: skip
        if tied and (to == "dcp" or target == "minimind"):
            hub[hf.HEAD] = replace(embed, name=hf.HEAD, actions=("tie",), tied_to=hf.EMBEDDING)
        return
    if not tied:
        return
    if not _equal(head, embed, sources):
        notes.append(Note(
            "T01", "the config ties lm_head to the embedding, but the file holds a different lm_head: both are kept; "
            "transformers 5 unties them with a warning, torchtitan overwrites the head", (hf.HEAD, hf.EMBEDDING),
        ))  # fmt: skip
    elif to == "hf":
        del hub[hf.HEAD]
        dropped += [Step(("drop",), (part,), None, "tied: the same bytes as the embedding, which hf stores once") for part in head.parts]
    else:
        hub[hf.HEAD] = replace(head, actions=(*head.actions, "tie"), tied_to=hf.EMBEDDING)


def _equal(a: Hub, b: Hub, sources: Sequence[StateView]) -> bool:
    if (a.shape, a.dtype, len(a.parts), len(b.parts)) != (b.shape, b.dtype, 1, 1):
        return False
    streams = [sources[h.parts[0].source].stream(h.parts[0].name) for h in (a, b)]
    return all(x == y for x, y in zip(*streams, strict=True))


# -- hf -> sink naming ----------------------------------------------------------------------------------------------


def _to_sink(
    items: list[Hub], to: str, target: str | None, config: Mapping[str, Any] | None, dtype: str | None, notes: list[Note]
) -> list[Step]:
    own = _named(items, target, config, notes)
    steps = []
    for hub in own:
        actions = [a for a in dict.fromkeys(hub.actions) if a != "permute" or any(p.permutes for p in hub.parts)]
        if hub.name not in [p.name for p in hub.parts] and "tie" not in actions:
            actions.insert(0, "rename")
        made = hub.dtype
        if dtype is not None and DTYPES[hub.dtype].floating and hub.dtype != dtype:
            made = dtype
            actions.append("cast")
        sink = SinkTensor(hub.name, made, hub.shape, hub.tied_to)
        steps.append(Step(tuple(actions) or ("keep",), hub.parts, sink))
    scales = [h.name for h in own if h.name.endswith(("weight_scale_inv", "weight_scale", ".scale"))]
    if dtype is not None and scales and any(h.dtype.startswith("F8") for h in own):
        raise TensorkeepError(
            f"these are fp8 weights with scales ({scales[0]}): a cast would strip the scale from the weight", code="Q01",
            hint="leave --dtype out, or dequantise first",
        )  # fmt: skip
    return steps


def _named(items: list[Hub], target: str | None, config: Mapping[str, Any] | None, notes: list[Note]) -> list[Hub]:
    """The tensors under the sink naming's names: renamed, rows permuted, experts stacked."""
    made_as = (config or {}).get("minimind_generation")
    if target in (None, "hf") or (target == "minimind" and made_as != "mm2a"):
        return items
    scheme = namings.module(str(target))
    if target == "minimind":
        table, family = scheme.FAMILIES["mm2a"], "mm2a"
    elif target == "gguf":
        raise TensorkeepError("gguf is read-only", hint="write hf, and convert with llama.cpp's own tools")
    else:
        family = scheme.family([i.name for i in items], dict(config or {}))
        table = scheme.FAMILIES[family]
    out: list[Hub] = []
    stacks: dict[str, dict[int, Hub]] = {}
    for item in items:
        link = from_hf(item.name, table)
        if link is None:
            raise TensorkeepError(
                f"{item.name} has no place in naming {target} ({family}): its loader would drop it", code="K07",
                hint=f"leave it out by name (--drop '{item.name}'), or keep the hf names (--naming hf)",
            )  # fmt: skip
        if link.rope:
            probe = TensorRecord(item.name, item.dtype, item.shape, ())
            rows = rope_rows(config, "pairs", probe, target)
            item = replace(item, parts=tuple(p.permuted(rows) for p in item.parts), actions=(*item.actions, "permute"))
        if link.expert is not None:
            stacks.setdefault(link.own, {})[link.expert] = item
        else:
            tied = from_hf(item.tied_to, table) if item.tied_to else None
            out.append(replace(item, name=link.own, tied_to=tied.own if tied else item.tied_to))
    out += [_stack(name, members, config) for name, members in stacks.items()]
    lost = [h.name for h in out if hasattr(scheme, "dropped_by_loader") and scheme.dropped_by_loader(h.name, family)]
    if lost:
        notes.append(Note(
            "K07", f"torchtitan's {family} has no place for {len(lost)} of these tensors and its loader would not ask for "
            f"them, without a word: {', '.join(grouped(lost)[:4])}", tuple(lost),
        ))  # fmt: skip
    return out


def _stack(name: str, members: dict[int, Hub], config: Mapping[str, Any] | None) -> Hub:
    count = len(members)
    wanted = (config or {}).get("num_experts") or (config or {}).get("num_local_experts") or count
    first = members[min(members)]
    if sorted(members) != list(range(count)) or count != wanted:
        raise TensorkeepError(f"{name}: experts {sorted(members)} of {wanted}", code="K01", hint="the source is incomplete")
    if any(m.shape != first.shape or m.dtype != first.dtype for m in members.values()):
        raise TensorkeepError(f"{name}: its experts differ in shape or dtype", code="S01")
    parts = tuple(part for e in range(count) for part in members[e].parts)
    whole = _contiguous(parts, count)
    return Hub(name, first.dtype, (count, *first.shape), whole, ("fuse",) if len(whole) > 1 else ())


def _contiguous(parts: tuple[Part, ...], count: int) -> tuple[Part, ...]:
    """All slices of one stacked tensor in order are that tensor again."""
    if len({(p.source, p.name) for p in parts}) == 1 and [p.rows for p in parts] == [(e, e + 1) for e in range(count)]:
        return (parts[0]._replace(rows=None),)
    return parts


# -- proof of the plan ----------------------------------------------------------------------------------------------


def _check_cover(plan: Plan) -> None:
    """Every source record occurs in a step and every sink name once: the plan is complete, or it is refused."""
    used = {(p.source, p.name) for step in plan.steps for p in step.parts}
    lost = [n for i, v in enumerate(plan.sources) for n in v if (i, n) not in used]
    if lost:
        raise TensorkeepError(f"the plan loses {len(lost)} tensors: {', '.join(lost[:5])}", hint="this is a defect of tensorkeep, please report it")
    names = [t.name for t in plan.tensors]
    if len(names) != len(set(names)):
        raise TensorkeepError("the plan makes a tensor twice", hint="this is a defect of tensorkeep, please report it")


def _match_config_dtype(plan: Plan) -> None:
    """config.json says which dtype transformers loads in: keep it true, or a float32 sink is read as bfloat16."""
    spelled = _torch_dtype(plan.tensors)
    for at, companion in enumerate(plan.companions):
        if companion.name != "config.json":
            continue
        document = json.loads(companion.data)
        key = next((k for k in ("dtype", "torch_dtype") if isinstance(document.get(k), str)), None)
        if key and document[key] != spelled:
            plan.notes.append(Note("C01", f"config.json: {key} {document[key]} becomes {spelled}, as the weights are"))
            document[key] = spelled
            plan.companions[at] = _companion("config.json", document)._replace(where=companion.where)
