"""Compare the tensors that a conversion would write with those that the config's model asks for, before it writes.

Names that nobody knows pass through a conversion as they are. In a folder that transformers is to load this is a model
of random values, so a plan for one must be what the config asks for: nothing missing, nothing more, no other shape.
Who says what is asked for is an `Asker`: the table of architectures here, or transformers itself (`models.loader`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tensorkeep.conversion import architecture
from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.plan import BY_USER, HfTensor, Part, Step
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import drops, grouped, matches
from tensorkeep.formats.view import StateView
from tensorkeep.formats.whole_config import complete
from tensorkeep.quantization.stored import find_quantized

Shape = tuple[int, ...]


class Offer(NamedTuple):
    """What a checkpoint has under one name.

    Args:
        dtype: as safetensors spells it.
        shape: of the tensor.
    """

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Misfit:
    """What a model's loader would have to say of a set of tensors.

    Attributes:
        by: who says so, for messages.
        asked: how many tensors the model has.
        missing: names that the model has and the checkpoint has not.
        unexpected: names that the model does not have.
        mismatched: name -> (shape in the checkpoint, shape in the model).
    """

    by: str
    asked: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many names are wrong; 0 where everything fits."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


# (config, offers by hf name) -> what does not fit; None where it cannot say which tensors this config's model has
Asker = Callable[[Mapping[str, Any], Mapping[str, Offer]], "Misfit | None"]


def by_table(config: Mapping[str, Any], offers: Mapping[str, Offer]) -> Misfit | None:
    """Compare tensors with the table of architectures; no torch is needed.

    Args:
        config: as config.json has it.
        offers: the tensors by hf name.

    Returns:
        What does not fit; None for a model type or a class that the table does not have.
    """
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and not str(classes[0]).endswith("ForCausalLM"):
        return None
    asked = architecture.expected(config)
    if asked is None:
        return None
    spare = {hf.HEAD} if hf.tied(dict(config)) else set()
    return Misfit(
        f"its config ({config.get('model_type')})",
        len(asked),
        tuple(n for n in asked if n not in offers),
        tuple(n for n in offers if n not in asked and n not in spare),
        {n: (o.shape, asked[n]) for n, o in offers.items() if n in asked and o.shape != asked[n]},
    )


# -- settling --------------------------------------------------------------------------------------------------------


def settle(
    hub: dict[str, HfTensor],
    config: Mapping[str, Any] | None,
    sources: Sequence[StateView],
    dropped: list[Step],
    ask: Asker | None,
    left_out: Sequence[str] = (),
) -> tuple[dict[str, HfTensor], bool]:
    """Return the tensors under the names that the config's model asks for, or refuse the conversion.

    A prefix that all of them share (of a wrapper: Lightning's `model.`, TRL's `pretrained_model.`) is taken away where
    the rest is then exactly what is asked for.

    Args:
        hub: the tensors by the names found so far.
        config: of the model; None, or one whose model nobody knows, leaves everything as it is.
        sources: the checkpoints.
        dropped: what is left out so far; gains what lies beside a prefixed model in the file.
        ask: who says which tensors the model has where the table of architectures does not say that all is well; None
            leaves everything as it is.
        left_out: patterns of hf names that the program that wrote the checkpoint never writes.

    Returns:
        The tensors, and whether they are what the config's model asks for.

    Raises:
        TensorkeepError: K01, K02, K05, K06, Q01 or S01: a loader would not find the model in these tensors; C03 where
            a GGUF file's metadata makes no config to compare them with.
    """
    if ask is None:
        return hub, False
    hollow = [n for n, h in hub.items() if 0 in h.shape]
    if len(hollow) * 2 > len(hub):
        raise empty(hollow, len(hub), sources[0].path)
    if config is None:
        return hub, False
    if "quantization_config" in config:
        _refuse_strangers(hub, config, sources[0].path)
        return hub, False
    if sources[0].format == "gguf" and set(config) == {"model_type"}:
        why = next((n.message for n in sources[0].notes if n.code == "C03"), "its metadata makes no config")
        raise TensorkeepError(why, where=sources[0].path, code="C03", hint="give the model's own: --config FOLDER")
    config = complete(config, (c for view in sources for c in view.companions))
    refused: tuple[Misfit, str] | None = None
    for who in dict.fromkeys((by_table, ask)):
        closest = _closest(hub, config, dropped, left_out, who)
        if closest is not None and not closest[0].count:
            prefix = closest[1]
            _set_aside([h for n, h in hub.items() if not n.startswith(prefix)], prefix, sources, dropped)
            return {n[len(prefix) :]: _without(h, prefix) for n, h in hub.items() if n.startswith(prefix)}, True
        refused = closest or refused
    if refused is None:
        return hub, False
    for view in sources:
        refuse_undescribed(view, refused[0].by)
    raise _refusal(*refused, hub, sources[0].path)


def _refuse_strangers(hub: Mapping[str, HfTensor], config: Mapping[str, Any], where: object) -> None:
    """Stop where quantized tensors lie in other modules than the model has; in a module every layout has its own."""
    asked = architecture.expected(config) or {}
    segments = [n.split(".") for n in hub]
    held = {".".join(s[:depth]) for s in segments for depth in range(1, len(s))}
    missing = tuple(n for n in asked if n.rpartition(".")[0] not in held)
    if len(missing) * 2 > len(asked):
        unexpected = tuple(n for n in hub if n not in asked)
        raise _refusal(
            Misfit(f"its config ({config.get('model_type')})", len(asked), missing, unexpected), "", hub, where
        )


def _closest(
    hub: Mapping[str, HfTensor],
    config: Mapping[str, Any],
    dropped: Sequence[Step],
    left_out: Sequence[str],
    ask: Asker,
) -> tuple[Misfit, str] | None:
    """Return what fits least badly, and the prefix that is taken away for it; None where the model is not known."""
    offers = {n: Offer(h.dtype, h.shape) for n, h in hub.items()}
    found = ask(config, offers)
    if found is None:
        return None
    best, prefix = _without_dropped(found, dropped, left_out), ""
    for lead in _leading(hub) if len(best.missing) * 2 > best.asked else ():
        tried = ask(config, {n[len(lead) :]: o for n, o in offers.items() if n.startswith(lead)})
        if tried is not None and (tried := _without_dropped(tried, dropped, left_out)).count < best.count:
            best, prefix = tried, lead
    return best, prefix


def _without(tensor: HfTensor, prefix: str) -> HfTensor:
    """Return a tensor under its name without the prefix."""
    tied = tensor.tied_to.removeprefix(prefix) if tensor.tied_to else None
    return replace(tensor, name=tensor.name[len(prefix) :], tied_to=tied)


def _without_dropped(found: Misfit, dropped: Iterable[Step], left_out: Sequence[str]) -> Misfit:
    """Return the misfit without missing names that the user, or the program that wrote them, left out."""
    gone = {p.name for s in dropped if s.reason == BY_USER for p in s.parts}
    left = tuple(
        n for n in found.missing if not matches(n, left_out) and not any(g == n or g.endswith(f".{n}") for g in gone)
    )
    return replace(found, missing=left)


def _leading(names: Iterable[str]) -> list[str]:
    """Return the prefixes of one to three segments that most of the names have, shortest first."""
    names = list(names)
    counts: Counter[str] = Counter()
    for name in names:
        segments = name.split(".")
        counts.update(".".join(segments[:depth]) + "." for depth in range(1, min(4, len(segments))))
    return sorted((p for p, n in counts.items() if n * 2 > len(names)), key=lambda p: (p.count("."), p))


def _set_aside(aside: list[HfTensor], prefix: str, sources: Sequence[StateView], dropped: list[Step]) -> None:
    """Leave out what another part of the file holds; refuse what the same part holds beside the prefix."""
    beside: list[Part] = []
    for tensor in aside:
        for part in tensor.parts:
            parts = sources[part.source].metadata.get("containers", ())
            if part.name.partition(".")[0] in parts and not prefix.startswith(part.name.partition(".")[0] + "."):
                dropped.append(Step(("drop",), (part,), None, f"not below {prefix.removesuffix('.')}"))
            else:
                beside.append(part)
    if beside:
        names = [p.name for p in beside]
        raise TensorkeepError(
            f"beside the model, which lies below {prefix.removesuffix('.')}, the same state dict has "
            f"{', '.join(grouped(names)[:3])}",
            where=sources[0].path,
            code="K02",
            hint=f"leave them out by name: {drops(names, [n for v in sources for n in v])}",
        )


# -- refusing --------------------------------------------------------------------------------------------------------

# programs whose names nobody here reads: how to tell them, and what makes hf files of theirs
_FOREIGN = (
    (r"\.(linear_qkv|linear_fc1|query_key_value)\.", "Megatron", "Megatron Bridge, or its tools/checkpoint/convert.py"),
    (r"transformer\.h\.\d+\.(norm_1|attn\.qkv|mlp\.fc_1)\.", "LitGPT", "litgpt convert_from_litgpt"),
    (r"(^|\.)v_head\.", "TRL (a model with a value head)", "its own save_pretrained of `.pretrained_model`"),
)


def empty(hollow: list[str], count: int, where: object) -> TensorkeepError:
    """Return the error for a checkpoint of empty tensors, as each process of ZeRO-3 has them.

    Args:
        hollow: names of the empty ones.
        count: number of all tensors.
        where: the checkpoint.
    """
    return TensorkeepError(
        f"{len(hollow)} of {count} tensors are empty, first {hollow[0]}: the weights are elsewhere, as when one "
        "process of DeepSpeed's ZeRO-3 saves what it holds",
        where=where,
        code="K05",
        hint="gather them: python zero_to_fp32.py CHECKPOINT OUT, or save with "
        "stage3_gather_16bit_weights_on_model_save",
    )


def refuse_undescribed(view: StateView, by: str) -> None:
    """Stop where weights are quantized and the config, which would have to say how, says nothing of it (Q01).

    Args:
        view: the checkpoint.
        by: whose config it is, for the message.
    """
    weights = [w for w in find_quantized(view).values() if w.parts]
    if not weights:
        return
    first = weights[0]
    settings = {
        "nf4": '{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}',
        "fp4": '{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}',
        "int8": '{"quant_method": "bitsandbytes", "load_in_8bit": true}' if "SCB" in first.parts else "",
        "fp8": f'{{"quant_method": "fp8", "weight_block_size": {list(first.block)}}}'
        if isinstance(first.block, tuple)
        else "",
    }.get(first.kind)
    says = f", such as {settings}" if settings else ""
    raise TensorkeepError(
        f"{len(weights)} weights are stored as {first.kind} codes with their scales beside them, and {by} has no "
        "quantization_config: a loader would take the codes for weights",
        where=view.path,
        code="Q01",
        hint=f"give a config.json that has it{says}: --config FOLDER",
    )


def _refusal(found: Misfit, prefix: str, hub: Mapping[str, HfTensor], where: object) -> TensorkeepError:
    """Make the error for tensors that the model's loader would not take, saying what they look like."""
    stored = {n.removeprefix(prefix): h.parts[0].name for n, h in hub.items()}
    program = next(((p, tool) for rule, p, tool in _FOREIGN if any(re.search(rule, n) for n in hub)), None)
    if len(found.missing) == found.asked and program is not None:
        what = f"its names are those of {program[0]}, not of {found.by}"
        return TensorkeepError(what, where=where, code="K06", hint=f"make an hf folder with {program[1]}")
    shards = _shards(found)
    if shards:
        name, (mine, theirs) = next(iter(found.mismatched.items()))
        return TensorkeepError(
            f"one of {shards} shards of a tensor-parallel model: {name} is {list(mine)}, {found.by} asks for "
            f"{list(theirs)}",
            where=where,
            code="S01",
            hint="gather the shards first, with the program that wrote them (Megatron: tools/checkpoint/convert.py; "
            "verl: python -m verl.model_merger)",
        )
    if found.mismatched and not found.missing:
        name, (mine, theirs) = next(iter(found.mismatched.items()))
        what = f"{len(found.mismatched)} tensors have another shape than {found.by} asks for, first {name}: "
        what += f"{list(mine)}, asked is {list(theirs)}"
        return TensorkeepError(what, where=where, code="S01", hint="give the weights' own config: --config FOLDER")
    if not found.missing:
        names = [stored.get(n, n) for n in found.unexpected]
        what = f"the model of {found.by} has no {', '.join(grouped(names)[:3])} ({len(names)} of {len(hub)} tensors)"
        hint = f"leave them out by name: {drops(names, [stored[n] for n in stored if n not in found.unexpected])}"
        return TensorkeepError(what, where=where, code="K02", hint=hint)
    joined = [n for n in found.unexpected if re.search(r"qkv|gate_up|c_attn|Wqkv|fc1|w13", n)]
    also = f"; {joined[0]} may be several of them in one, in an order that nothing says" if joined else ""
    others = found.unexpected
    extra = f"; it has no {others[0]}" + (f" and {len(others) - 1} more" if others[1:] else "") if others else ""
    lost = f"{len(found.missing)} of the {found.asked} tensors that {found.by} asks for are missing"
    what = f"{lost}, first {found.missing[0]}"
    how = (
        "make an hf folder with the program that wrote it; for other names: --from-naming; for another model: --config"
    )
    if program is not None:
        how = f"these are names of {program[0]}: make an hf folder with {program[1]}"
    return TensorkeepError(what + extra + also, where=where, code="K01", hint=how)


def _shards(found: Misfit) -> int:
    """Return into how many equal parts the mismatched tensors were cut, along one dimension each; 0 for none."""
    counts = set()
    for mine, theirs in found.mismatched.values():
        odd = [(a, b) for a, b in zip(mine, theirs) if a != b]
        if len(mine) != len(theirs) or len(odd) != 1 or not odd[0][0] or odd[0][1] % odd[0][0]:
            return 0
        counts.add(odd[0][1] // odd[0][0])
    return counts.pop() if len(counts) == 1 and len(found.mismatched) > 2 else 0
