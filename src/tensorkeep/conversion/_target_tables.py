"""The rules of programs that are not asked but described: torchtitan's and MiniMind's tables, OpenTAD's detector."""

from __future__ import annotations

from typing import Any

from tensorkeep.conversion import architecture
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion._target_rules import Proof, Shapes, Sink, compared
from tensorkeep.conversion.hub_links import own_shape
from tensorkeep.conversion.naming import hf, minimind, opentad
from tensorkeep.conversion.naming.table import from_hf
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped, matches


def by_torchtitan(sink: Sink) -> Proof:
    """torchtitan's model of the config's family, by its adapter's tables; every key that it asks for, and no other."""
    if sink.config is None:
        return Proof(why="no config.json says which model it is")
    if sink.plan.root is not None:
        raise TensorkeepError(
            f"torchtitan asks for flat names, not below {sink.plan.root}",
            where=sink.plan.sources[0].path,
            code="K04",
            hint="--root none",
        )
    naming = str(sink.plan.naming)
    scheme = namings.module(naming if naming != "hf" else "torchtitan")
    expected = architecture.expected(sink.config) or {}
    family = scheme.family(expected, sink.config)
    if naming == "hf":
        _refuse_adapter(sink, family)
    if not expected:
        return Proof(why=f"which tensors torchtitan's {family} of these sizes has is not known here")
    lost = sorted(n for n in (*expected, *sink.offers) if n.endswith(".bias"))
    if lost:
        raise TensorkeepError(
            f"torchtitan's {family} has no place for {', '.join(grouped(lost)[:3])} ({len(lost)}): its loader would "
            "not ask for them",
            where=sink.plan.sources[0].path,
            code="K07",
            hint="keep the hf names for flame or transformers: --for transformers",
        )
    asked = dict(expected)
    if naming != "hf":
        asked.setdefault(hf.HEAD, asked[hf.EMBEDDING])
        asked = _own_shapes(asked, scheme.FAMILIES[family]) | _expert_biases(expected, scheme.EXPERT_BIAS)
    compared(sink, asked, hint="--to hf: torchtitan reads it through its adapter, which asks for hf's tensors alone")
    on = " (checkpoint.initial_load_in_hf)" if naming == "hf" else ""
    return Proof("torchtitan", scheme.VERSION, ("names", "shapes", "ties"), on)


# what torchtitan 0.3.0's own adapters read otherwise than transformers writes it
_ADAPTERS = {
    "gpt_oss": ("**mlp.experts.*_proj", "its gpt_oss adapter asks for MXFP4's names and for its experts the other way"),
    "qwen3_5": ("**mlp.experts.*_proj", "its qwen3_5 adapter takes stacked experts for their transpose"),
}


def _refuse_adapter(sink: Sink, family: str) -> None:
    """Stop at an hf folder that torchtitan's own adapter would misread (K06)."""
    pattern, why = _ADAPTERS.get(family.removesuffix("_text"), ("", ""))
    if pattern and any(matches(n, [pattern]) for n in sink.offers):
        where = sink.plan.sources[0].path
        raise TensorkeepError(f"torchtitan 0.3.0: {why}", where=where, code="K06", hint="--to dcp --for torchtitan")


def by_olmo_core(sink: Sink) -> Proof:
    """OLMo-core's strict load of `model` from `model_and_optim`: its table's names, below `model`."""
    where = sink.plan.sources[0].path
    if sink.config is None:
        return Proof(why="no config.json says which model it is")
    if sink.plan.root != "model":
        raise TensorkeepError("OLMo-core asks for names below model", where=where, code="K04", hint="--root model")
    expected = architecture.expected(sink.config)
    table = namings.rows("olmo-core", sink.offers, sink.config)
    if expected is None or table is None:
        return Proof(why="config.json does not say which tensors OLMo-core's model has")
    asked = dict(expected)
    asked.setdefault(hf.HEAD, asked[hf.EMBEDDING])
    compared(sink, _own_shapes(asked, table, sink.config))
    return Proof("olmo-core", "", ("names", "shapes", "ties"), " (strict, its model alone)")


def _expert_biases(expected: Shapes, name: str) -> dict[str, tuple[int, ...]]:
    """Return the buffers that balance the experts' load: torchtitan keeps them with the weights, hf has none."""
    gates = {n: shape for n, shape in expected.items() if n.endswith(".mlp.gate.weight")}
    return {f"layers.{n.split('.')[2]}.{name}": shape[:1] for n, shape in gates.items()}


def _own_shapes(expected: Shapes, table: Any, config: Any = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes under a naming's own names, experts stacked, pieces cut and joined."""
    out: dict[str, tuple[int, ...]] = {}
    for name, given in expected.items():
        links = from_hf(name, table)
        if links is None:
            raise TensorkeepError(f"{name} has no place in the naming", code="K07", hint="keep the hf names")
        for link in links:
            shape, known = own_shape(link, given, config), out.get(link.own)
            if link.expert is not None:
                shape = (max(known[0] if known else 0, link.expert + 1), *shape)
            elif link.row.joined is not None and known is not None:
                axis = link.row.joined.axis
                shape = (*shape[:axis], shape[axis] + known[axis], *shape[axis + 1 :])
            out[link.own] = shape
    return out


def by_minimind(sink: Sink) -> Proof:
    """MiniMind's strict load of its model: the names of its generation, the head beside the embedding, the file's name.

    The config is made from the weights, so the model is asked for what they make it.
    """
    if all(t.name.endswith((".lora.A.weight", ".lora.B.weight")) for t in sink.plan.tensors):
        return Proof(why="MiniMind's load_lora takes what it finds in a file, and asks for nothing")
    if sink.config is None:
        return Proof(why="no config.json says which model it is")
    kind, where = str(sink.config.get("model_type")), sink.plan.sources[0].path
    if kind == "minimind":
        return Proof(why="MiniMind's shared experts are in no table here")
    expected = {n: s for n, s in (architecture.expected(sink.config) or {}).items() if not n.endswith(".bias")}
    if kind not in ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral") or not expected:
        raise TensorkeepError(f"MiniMind has no model for {kind!r}", where=where, code="K06", hint="keep the hf names")
    if hf.HEAD in expected:
        raise TensorkeepError(
            "MiniMind ties head and embedding, and the config does not: its loader would overwrite one with the other",
            where=where,
            code="T01",
            hint="keep the hf names: --to hf",
        )
    if sink.single and minimind.FILE.match(sink.name) is None:
        wanted = minimind.file_name(sink.config, expected, "full_sft")
        what = f"MiniMind looks for STAGE_SIZE.pth, such as {wanted}"
        raise TensorkeepError(what, where=sink.name, code="F05", hint=f"name it {wanted}")
    asked = dict(expected)
    asked.setdefault(hf.HEAD, asked[hf.EMBEDDING])
    table = minimind.table(sink.offers, sink.config)
    generation = minimind.generation(sink.offers)
    compared(sink, _own_shapes(asked, table) if table is not None else asked)
    return Proof("minimind", f"({generation})", ("names", "shapes", "ties", "file name"))


def by_detector(sink: Sink) -> Proof:
    """OpenTAD's strict load of `state_dict` (or of the average) into the detector that the shapes are of."""
    roots = {r.partition(".")[0] for r in opentad.CHECKPOINT_ROOTS}
    if not roots <= set(sink.plan.roots):
        return Proof(why="a backbone alone: mmaction's loader takes what fits and says the rest")
    for root in opentad.CHECKPOINT_ROOTS:
        offers = {n[len(root) + 1 :]: o for n, o in sink.offers.items() if n.startswith(f"{root}.")}
        shapes = {opentad.to_hf(n) or n: o.shape for n, o in offers.items()}
        asked = sink.programs.detects(shapes) if sink.programs.detects is not None else None
        if asked is None:
            return Proof(why="no shapes tell which detector it is, or torch is not installed")
        names = {n: opentad.from_hf(n) for n in asked}
        compared(sink, {str(names[n] or n): shape for n, shape in asked.items()}, offers)
    return Proof("opentad", "", ("names", "shapes", "both state dicts"), " (strict, the weights and their average)")
