"""Rename the tensors of video detectors by functions, where tables of names are not enough.

The naming module of a detector has `to_hf`, `from_hf` through `renamer`, `dropped` (what has no place in a detector,
and why), and `third` where a source splits our fused q, k, v. No tensor passes unexplained: its name is mapped, it is
dropped with its reason, or the conversion stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.naming import EMA_ROOTS, Identity, opentad
from tensorkeep.conversion.naming import opentad_recipe as recipes
from tensorkeep.conversion.plan import HfTensor, Part, Plan, Step, ordered
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.names import drops
from tensorkeep.formats.view import Note, StateView


def detector_to_hf(view: StateView, index: int, identity: Identity, dropped: list[Step]) -> dict[str, HfTensor]:
    """Return one source's detector tensors under our names; what has no place in a detector goes to `dropped`.

    Raises:
        TensorkeepError: a name that no detector has (K02), a q, k or v without the others (K01), an average over
            quantized codes (Q03).
    """
    scheme = namings.module(str(identity.naming))
    _refuse_averaged_codes(view, identity)
    out: dict[str, HfTensor] = {}
    thirds: dict[str, dict[int, str]] = {}
    for stored, clean in identity.names.items():
        name, reason = scheme.to_hf(clean), scheme.dropped(clean)
        if name is None and reason is None:
            rest = [s for s, c in identity.names.items() if scheme.to_hf(c) is None and scheme.dropped(c) is None]
            more = f" ({len(rest)} such)" if len(rest) > 1 else ""
            raise TensorkeepError(
                f"{stored} is no tensor of a detector that is built here, or of a VideoMAE backbone{more}",
                where=view.path,
                code="K02",
                tensors=rest,
                hint=f"leave it out ({drops(rest, view)}), or keep every name as it is (--from-naming hf)",
            )
        part = _third(scheme, clean)
        if name is None:
            dropped.append(Step(("drop",), (Part(index, stored),), None, str(reason)))
        elif part is not None:
            thirds.setdefault(name, {})[part] = stored
        elif name in out:
            raise TensorkeepError(
                f"{stored} and another tensor both become {name}",
                where=view.path,
                code="K02",
                hint="leave one out with --drop",
            )
        else:
            record = view[stored]
            out[name] = HfTensor(name, record.dtype, record.shape, (Part(index, stored),), (), record.tied_to)
    out.update({name: _fused(view, index, name, parts) for name, parts in thirds.items()})
    names = {h.parts[0].name: h.name for h in out.values() if len(h.parts) == 1}
    return {n: replace(h, tied_to=names.get(h.tied_to) if h.tied_to else None) for n, h in out.items()}


def _third(scheme: ModuleType, name: str) -> int | None:
    """Return which third of a fused q, k, v a tensor is; None for a whole tensor."""
    found: int | None = scheme.third(name) if hasattr(scheme, "third") else None
    return found


def _fused(view: StateView, index: int, name: str, parts: Mapping[int, str]) -> HfTensor:
    """Stack q, k and v, in this order, as rows of one tensor."""
    records = [view[parts[i]] for i in sorted(parts)]
    if len(parts) != 3:
        raise TensorkeepError(
            f"{name} lacks its query, key or value", where=view.path, code="K01", hint="the source is incomplete"
        )
    if len({(r.dtype, r.shape) for r in records}) != 1 or not records[0].shape:
        raise TensorkeepError(f"{name}: its query, key and value differ in shape or dtype", where=view.path, code="S01")
    shape = (3 * records[0].shape[0], *records[0].shape[1:])
    return HfTensor(name, records[0].dtype, shape, tuple(Part(index, r.name) for r in records), ("fuse",))


def _refuse_averaged_codes(view: StateView, identity: Identity) -> None:
    """Stop at an average of quantized codes: OpenTAD averages them as if they were numbers."""
    if identity.root not in EMA_ROOTS:
        return
    codes = [s for s in identity.names if view[s].dtype in ("U8", "I8")]
    if codes:
        raise TensorkeepError(
            f"this average holds {len(codes)} tensors of quantized weights, first {codes[0]}: codes were averaged "
            "as if they were numbers",
            where=view.path,
            code="Q03",
            tensors=codes,
            hint="take the live weights (no --drop), or leave these out by name with --drop and load them from there",
        )


def average_notes(view: StateView, identity: Identity) -> list[Note]:
    """Note whether the conversion takes an OpenTAD checkpoint's weights or their average, and how to get the other."""
    averages = [n for n, what in identity.other.items() if what.startswith("EMA copy") and view[n].tied_to is None]
    if identity.naming is None or not hasattr(namings.module(identity.naming), "CHECKPOINT_ROOTS"):
        return []
    if averages:
        root = averages[0].partition(".")[0]
        return [
            Note(
                "K08",
                f"the weights under {identity.root} are taken; OpenTAD evaluates the average under {root}: to take "
                f"that instead, --drop '^{identity.root}'",
            )
        ]
    if identity.root in EMA_ROOTS:
        integers = [n for n in identity.names if view[n].dtype == "I64"]
        cut = (
            f"; OpenTAD truncates integers in it at each step: {integers[0]} matters to training only"
            if integers
            else ""
        )
        return [Note("K08", f"the average under {identity.root} is taken, not the live weights{cut}")]
    return []


def to_sink(items: list[HfTensor], target: str, dropped: list[Step]) -> list[HfTensor]:
    """Return the tensors under the names of `target`; what its files never hold goes to `dropped`.

    Raises:
        TensorkeepError: K07 for a tensor that `target` has no name for.
    """
    scheme = namings.module(target)
    rename, omitted = scheme.renamer([i.name for i in items]), getattr(scheme, "OMITTED", {})
    out = []
    for item in items:
        name = rename(item.name)
        if name is None and item.name in omitted:
            dropped += [Step(("drop",), (part,), None, omitted[item.name]) for part in item.parts]
        elif name is None:
            raise TensorkeepError(
                f"{item.name} has no place in naming {target}: its loader would drop it",
                code="K07",
                hint=_way_out(item.name, target, [i.name for i in items if rename(i.name) is None], items),
            )
        else:
            out.append(replace(item, name=name, tied_to=rename(item.tied_to) if item.tied_to else None))
    return out


def _way_out(name: str, target: str, strangers: list[str], items: list[HfTensor]) -> str:
    """Return a hint for a tensor that the target naming has no name for."""
    if name.startswith(("videomae.", "encoder.layer.", "classifier.")):
        return "transformers' VideoMAE: add --from-naming videomae"
    if name in ("backbone.norm.weight", "backbone.norm.bias", "backbone.cls_token"):
        return f"{target} has no such backbone: keep the hf names (--naming hf)"
    if name.endswith((".lora_A", ".lora_B")) or ".base." in name:
        return f"{target} knows no LoRA: merge it into the weights, as the conversion of its run does"
    return f"leave it out by name ({drops(strangers, [i.name for i in items])}), or keep the hf names (--naming hf)"


def nest_checkpoint(plan: Plan) -> None:
    """Make the plan of an OpenTAD sink write a file that OpenTAD loads; any other plan stays as it is.

    The file is a checkpoint for its test.py, or a backbone that it starts from. test.py reads `epoch`, and `state_dict`
    or `state_dict_ema` by its config: both are there, over the same bytes, unless `put_average` gives the second
    bytes of its own.
    """
    scheme = namings.module(plan.naming) if plan.naming is not None else None
    if not hasattr(scheme, "CHECKPOINT_ROOTS"):
        return
    pretrained = all(t.name.startswith("backbone.") and not t.name.startswith("backbone.model.") for t in plan.tensors)
    first, *copies = opentad.PRETRAINED_ROOTS if pretrained else opentad.CHECKPOINT_ROOTS
    steps = []
    for step in plan.steps:
        if step.sink is None:
            steps.append(step)
            continue
        name, tied = f"{first}.{step.sink.name}", step.sink.tied_to
        sink = step.sink._replace(name=name, tied_to=f"{first}.{tied}" if tied else None)
        actions = tuple("rename" if a == "keep" else a for a in step.actions)
        steps.append(replace(step, actions=actions, sink=sink))
        steps += [
            Step(("tie",), step.parts, sink._replace(name=f"{root}.{step.sink.name}", tied_to=sink.tied_to or name))
            for root in copies
        ]
    plan.steps = ordered(steps)
    plan.roots = tuple(root.partition(".")[0] for root in (first, *copies))
    epoch = next((v.entries["epoch"] for v in plan.sources if type(v.entries.get("epoch")) is int), 0)
    said = {k: v for view in plan.sources for k, v in view.entries.items() if k == opentad.DEQUANTIZED}
    plan.beside = {} if pretrained else {"epoch": epoch, **said}


def put_average(plan: Plan, average: StateView) -> None:
    """Let the second state of an OpenTAD checkpoint hold the average of a run.

    Args:
        plan: of a checkpoint, its states over the same bytes; changed in place.
        average: the tensors whose average differs, under the names that the live ones have in the plan's first source.

    Raises:
        TensorkeepError: K02 for an average of something that the plan does not write.
    """
    index, root = len(plan.sources), opentad.CHECKPOINT_ROOTS[1]
    plan.sources.append(average)
    taken = set()
    for at, step in enumerate(plan.steps):
        if step.sink is None or not step.sink.name.startswith(f"{root}.") or step.parts[0].name not in average:
            continue
        (part,) = step.parts
        taken.add(part.name)
        plan.steps[at] = Step(("rename",), (part._replace(source=index),), step.sink._replace(tied_to=None))
    if odd := sorted(set(average) - taken):
        raise TensorkeepError(f"{odd[0]} has an average and no place", where=average.path, code="K02", tensors=odd)


def with_recipe(tensors: Mapping[str, HfTensor], companions: list[Companion], notes: list[Note]) -> list[Companion]:
    """Return the companions of a detector, with a recipe read off its shapes where none lies beside the source.

    A config.json is transformers' and describes other names: it stays behind.
    """
    companions = [c for c in companions if c.name != "config.json"]
    shapes = {name: item.shape for name, item in tensors.items()}
    if recipes.FILE in [c.name for c in companions] or not recipes.readable(shapes):
        return companions
    text, assumed = recipes.read_off(shapes)
    notes.append(
        Note(
            "C03",
            f"recipe.yaml is read off the shapes; no shape shows {', '.join(assumed)}: they are AdaTAD's, "
            "compare them with OpenTAD's config",
        )
    )
    return [*companions, Companion(recipes.FILE, text.encode(), "made from the weights")]
