"""Convert adapters between MiniMind's files (`X.lora.A.weight`) and PEFT's folders (`X.lora_A.weight`).

An adapter is never a model. Files that hold both (MiniMind's own LoRA checkpoints, under the name of the LoRA file)
are taken apart: the model goes to hf, dcp and pth, the adapter to peft, and what is left out is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tensorkeep.conversion.naming import Identity, hf, minimind
from tensorkeep.conversion.naming.rope import rope_rows
from tensorkeep.conversion.naming.table import from_own
from tensorkeep.conversion.plan import HfTensor, Part, Plan, Step, ordered
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import peft
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.record import DTYPES

# both halves of a pair; `lora` alone is not enough, since models have modules of that name (RWKV's `w_lora.lora.0`)
_HALF = re.compile(r"(?P<module>.+)\.lora[._](?P<half>[AB])(\.default)?\.weight\Z")
_PREFIX = "base_model.model."
_CONFIG = "adapter_config.json"


class Half(NamedTuple):
    """One half of a low-rank pair.

    Args:
        module: name of the module that is adapted.
        half: "A" [rank, in] or "B" [out, rank].
    """

    module: str
    half: str


def halves(identity: Identity) -> dict[str, Half]:
    """Find the low-rank pairs among a checkpoint's tensors; a half whose other half is missing is left out.

    Args:
        identity: the checkpoint's names, cleaned of roots and wrappers.

    Returns:
        The halves by stored name.

    Example:
        >>> names = {"a.lora.A.weight": "a.lora.A.weight", "a.lora.B.weight": "a.lora.B.weight"}
        >>> halves(Identity("hf", None, (), names))["a.lora.B.weight"]
        Half(module='a', half='B')
    """
    found = {n: Half(m["module"], m["half"]) for n, clean in identity.names.items() if (m := _HALF.match(clean))}
    present = set(found.values())
    return {n: h for n, h in found.items() if Half(h.module, "B" if h.half == "A" else "A") in present}


def wanted(identities: Sequence[Identity], to: str, naming: str | None) -> bool:
    """Whether the output is to be an adapter: PEFT's folder, or MiniMind's file made from nothing but an adapter."""
    pure = all(len(halves(i)) == len(i.names) for i in identities)
    return to == "peft" or (to == "pth" and naming == "minimind" and pure and any(i.names for i in identities))


def set_aside(view: StateView, identity: Identity, to: str, notes: list[Note]) -> Identity:
    """Leave the adapter's tensors out of a model's conversion and note that they were.

    Raises:
        TensorkeepError: K08 where nothing but an adapter is there and the output is to be a model.
    """
    found = halves(identity)
    if to in ("hf", "gguf") and identity.names and (len(found) == len(identity.names) or view.format == "peft"):
        raise TensorkeepError(
            f"holds an adapter ({len(found)} tensors of it), not a model",
            where=view.path,
            code="K08",
            hint="--to peft writes an adapter folder; tensorkeep merge BASE ADAPTER OUT adds it into its base"
            if to == "hf"
            else "tensorkeep merge BASE ADAPTER OUT --to gguf; its own GGUF: llama.cpp's convert_lora_to_gguf.py",
        )
    if not found or len(found) == len(identity.names) or view.format == "peft":
        return identity  # all of one kind: PEFT's folder may hold trained modules beside the pairs
    notes.append(
        Note(
            "K02",
            f"{len(found)} adapter tensors beside the model are left out: convert them with --to peft",
            tuple(found),
        )
    )
    rest = {n: clean for n, clean in identity.names.items() if n not in found}
    return replace(
        identity, names=rest, other={**identity.other, **dict.fromkeys(found, "adapter, convert it with --to peft")}
    )


def adapter_plan(
    sources: Sequence[StateView],
    identities: Sequence[Identity],
    to: str,
    config: Mapping[str, Any] | None,
    dtype: str | None,
    dropped: list[Step],
) -> Plan:
    """Plan the conversion of one adapter, of MiniMind or of PEFT, to PEFT's folder or MiniMind's file."""
    if len(sources) != 1:
        raise TensorkeepError(
            f"an adapter is made from one source, not {len(sources)}", hint="convert each to a folder of its own"
        )
    view, identity = sources[0], identities[0]
    found = halves(identity)
    if not found and view.format != "peft":
        raise TensorkeepError(
            "holds no adapter tensors", where=view.path, code="K05", hint="a full model goes --to hf, dcp or pth"
        )
    dropped += [Step(("drop",), (Part(0, n),), None, what) for n, what in identity.other.items()]
    notes, document = list(view.notes), view.metadata.get("adapter")
    header: dict[str, str] = {}
    if to == "peft" and view.format == "peft":
        items = [HfTensor(n, view[n].dtype, view[n].shape, (Part(0, n),)) for n in identity.names]
        header = peft.header_of(document or {})
        document = {k: v for k, v in (document or {}).items() if k not in peft.OURS}
    else:
        dropped += [
            Step(("drop",), (Part(0, n),), None, "the model, not the adapter") for n in identity.names if n not in found
        ]
        items = [_half(view, stored, half, config, to) for stored, half in found.items()]
        ranks = _ranks(view, found)
        if to == "pth":
            _refuse_scale(view, document, ranks)
        else:
            document = peft_config({hf_module(m)[0]: r for m, r in ranks.items()})
            if any(n.startswith(_PREFIX) for n in found):
                notes.append(Note("A02", "no adapter_config.json beside PEFT's tensors: lora_alpha is written as r"))
    steps = [_step(item, dtype) for item in items]
    if any(".experts." in item.name for item in items) and not (document or {}).get("target_parameters"):
        notes.append(
            Note("K07", "adapters on single experts: transformers 5 fuses the experts, PEFT finds no such module there")
        )
    width = next((view[n].shape[-1] for n, h in found.items() if h.half == "A"), 0)
    companions = [_document(document or {})] if to == "peft" else []
    plan_config = None if to == "peft" else {"hidden_size": width}
    naming = "minimind" if to == "pth" else "hf"
    return Plan([view], ordered([*steps, *dropped]), naming, None, plan_config, companions, notes, header=header)


def _half(view: StateView, stored: str, half: Half, config: Mapping[str, Any] | None, to: str) -> HfTensor:
    """Give one half its output name. Rows of B follow the RoPE layout as the weight's rows do; A's columns do not."""
    record, part = view[stored], Part(0, stored)
    module, rope = hf_module(half.module)
    if rope and half.half == "B":
        part = part.permuted(rope_rows(config, "half", stored, record.shape))
    name = f"{_PREFIX}{module}.lora_{half.half}.weight" if to == "peft" else f"{module}.lora.{half.half}.weight"
    return HfTensor(name, record.dtype, record.shape, (part,))


def hf_module(module: str) -> tuple[str, bool]:
    """Return the hf name of an adapted module, and whether its rows follow the other RoPE layout (Meta's names).

    Args:
        module: as the adapter's file names it, in Meta's or in hf names.

    Returns:
        The hf name; True where rows of B are in the layout "pairs".

    Example:
        >>> hf_module("layers.0.attention.wq"), hf_module("model.layers.0.mlp.up_proj")
        (('model.layers.0.self_attn.q_proj', True), ('model.layers.0.mlp.up_proj', False))
    """
    name = f"{module}.weight"
    links = None if hf.recognise(name) else from_own(name, minimind.META)
    return (links[0].hf.removesuffix(".weight"), links[0].rope) if links else (module, False)


def _ranks(view: StateView, found: Mapping[str, Half]) -> dict[str, int]:
    """Return the rank of each adapted module; stop where the two halves disagree."""
    shapes = {half: view[n].shape for n, half in found.items()}
    ranks: dict[str, int] = {}
    for (module, half), shape in shapes.items():
        if half == "A":
            other = shapes[Half(module, "B")]
            if len(shape) != 2 or len(other) != 2 or shape[0] != other[1]:
                raise TensorkeepError(
                    f"{module}: A {shape} and B {other} have no rank in common", where=view.path, code="A02"
                )
            ranks[module] = shape[0]
    return ranks


def _refuse_scale(view: StateView, document: Mapping[str, Any] | None, ranks: Mapping[str, int]) -> None:
    """Stop where the adapter's scale is not 1: MiniMind's file holds no alpha, and its code scales by 1."""
    given = document or {}
    alphas = {given.get("lora_alpha", rank) for rank in ranks.values()}
    if (
        given.get("use_rslora")
        or given.get("alpha_pattern")
        or len(set(ranks.values())) > 1
        or alphas != set(ranks.values())
    ):
        raise TensorkeepError(
            f"the adapter scales by another factor than 1 (rank {sorted(set(ranks.values()))}, "
            f"alpha {given.get('lora_alpha')}), and MiniMind's file cannot say so",
            where=view.path,
            code="A02",
            hint="merge it: tensorkeep merge BASE ADAPTER OUT",
        )


def peft_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Make PEFT's config for these modules (hf names) and ranks; alpha equals r, since MiniMind scales by 1.

    Targets are last name parts where every layer has them all, full module names otherwise.
    """
    most = max(ranks.values(), key=list(ranks.values()).count)
    layers: dict[str, set[str]] = {}
    for module in ranks:
        layers.setdefault(module.rpartition(".")[2], set()).add(module.rpartition(".layers.")[2].partition(".")[0])
    numbers = {n for found in layers.values() for n in found}
    everywhere = all(found == {str(i) for i in range(len(numbers))} for found in layers.values())
    odd = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(layers if everywhere else ranks),
        **({"rank_pattern": odd, "alpha_pattern": odd} if odd else {}),
    }


def _step(item: HfTensor, dtype: str | None) -> Step:
    """Make the step that writes one half, cast to `dtype` where that is given."""
    actions = ["rename"] if item.name != item.parts[0].name else []
    actions += ["permute"] if item.parts[0].permutes else []
    made = dtype if dtype is not None and DTYPES[item.dtype].floating else item.dtype
    actions += ["cast"] if made != item.dtype else []
    return Step(tuple(actions) or ("keep",), item.parts, SinkTensor(item.name, made, item.shape))


def _document(config: Mapping[str, Any]) -> Companion:
    """Make adapter_config.json out of a config."""
    return Companion(_CONFIG, (json.dumps(config, indent=2) + "\n").encode(), "made from the weights")
