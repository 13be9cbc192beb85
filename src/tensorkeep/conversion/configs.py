"""Handle the configs that travel with weights: collect them, make MiniMind's, keep them true to what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.naming import Identity, hf, minimind
from tensorkeep.conversion.naming.minimind_config import hf_config
from tensorkeep.conversion.naming.table import from_own
from tensorkeep.conversion.plan import Plan
from tensorkeep.formats.companions import Companion, travelling
from tensorkeep.formats.view import Note, StateView
from tensorkeep.storage.budget import check_config
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.record import DTYPES, TensorRecord


def gather(sources: Sequence[StateView]) -> tuple[dict[str, Any] | None, list[Companion]]:
    """Return the first config found, and every companion file once, in the order of the sources.

    Args:
        sources: the checkpoints.

    Raises:
        TensorkeepError: C01 for a config of a model that nobody can have, of which no tensor could be missed.
    """
    companions: dict[str, Companion] = {}
    for view in sources:
        for companion in travelling(view.companions):
            companions.setdefault(companion.name, companion)
    config, where = next(((v.config, v.path) for v in sources if v.config is not None), (None, ""))
    if config is not None:
        check_config(config, f"the config of {where}")
    return config, list(companions.values())


def left_behind(view: StateView) -> list[Note]:
    """Return notes on what is said of a model beside its weights and not carried on.

    Args:
        view: the checkpoint.

    Returns:
        F06 on small files that are links out of their folder; C03 on a GGUF's metadata that no config is made of.
    """
    names = tuple(c.name for c in view.companions if c.led_out)
    notes = []
    if names:
        are = "is a link that leads" if len(names) == 1 else "are links that lead"
        what = f"{', '.join(names)} {are} out of the folder: not copied; copy what you trust yourself"
        notes.append(Note("F06", what, names))
    keys = view.metadata.get("not_in_config", ())
    if keys:
        what = f"no config is made of the metadata's {', '.join(keys[:6])}: llama.cpp may compute with it"
        notes.append(Note("C03", f"{what}; --config gives another config.json"))
    return notes


def minimind_config(
    view: StateView, identity: Identity, config: dict[str, Any] | None, companions: list[Companion], notes: list[Note]
) -> tuple[dict[str, Any] | None, list[Companion]]:
    """Make a transformers config for MiniMind's weights, and note which fields no file gave.

    Args:
        view: the checkpoint.
        identity: its naming and clean names; a naming that makes no config leaves config and companions as they are.
        config: what lies beside the weights; None for nothing.
        companions: the small files beside the weights.
        notes: gains what was assumed (C03), contradicted (C01) or has no transformers class (K07).

    Returns:
        The config, and the companions with config.json and generation_config.json made anew.
    """
    if identity.naming is None or not hasattr(namings.module(identity.naming), "MAKES_CONFIG"):
        return config, companions
    made = minimind.generation(identity.names.values())
    probe = {clean: view[stored] for stored, clean in identity.names.items()}
    if made == "mm2a":
        links = {clean: from_own(clean, minimind.META) for clean in probe}
        probe = {link[0].hf: probe[clean] for clean, link in links.items() if link}
    made_config, assumed, odd = hf_config(probe, config, made, _one_head(view, probe))
    if odd:
        notes.append(
            Note("C01", f"config.json is another model's, by the weights: {', '.join(odd)}; the weights were followed")
        )
    if assumed:
        notes.append(
            Note(
                "C03", f"no file says {', '.join(assumed)}: MiniMind's defaults of {made}; check them, or give --config"
            )
        )
    if made_config["model_type"] == "minimind":
        notes.append(
            Note(
                "K07",
                f"{made} with shared experts: no transformers class computes this model, "
                "the sink holds its weights only",
            )
        )
    rest = [c for c in companions if c.name not in ("config.json", "generation_config.json")]
    ids = {k: made_config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rest.append(companion("config.json", {**made_config, "dtype": torch_dtype(probe.values())}))
    rest.append(companion("generation_config.json", {"_from_model_config": True, **ids}))
    return made_config, rest


def _one_head(view: StateView, probe: Mapping[str, TensorRecord]) -> bool:
    """Whether MiniMind's head is its embedding, as far as the file shows: one tensor, or two of the same bytes."""
    head, embedding = probe.get(hf.HEAD), probe.get(hf.EMBEDDING)
    if head is None or embedding is None or head.tied_to is not None or embedding.tied_to is not None:
        return True
    return view.digest(head.name) == view.digest(embedding.name)


def missing_biases(config: Mapping[str, Any] | None, names: Collection[str]) -> list[Note]:
    """Note K01 where the config asks for biases that no source has: torchtitan's adapter drops them without a word."""
    asked = (("attention_bias", "self_attn.q_proj"), ("mlp_bias", "mlp.gate_proj"))
    return [
        Note(
            "K01",
            f"config.json says {field}, the source has no such bias: its writer dropped them, "
            "and the model would start with others",
        )
        for field, module in asked
        if (config or {}).get(field) is True
        and any(n.endswith(f".{module}.weight") for n in names)
        and not any(n.endswith(f".{module}.bias") for n in names)
    ]


def companion(name: str, document: Mapping[str, Any]) -> Companion:
    """Make a small JSON file that is written beside the weights.

    Args:
        name: the file's name.
        document: its content.

    Returns:
        The file, said to be made from the weights.
    """
    return Companion(name, (json.dumps(document, indent=2) + "\n").encode(), "made from the weights")


# scales and maps of quantized weights: float32 whatever the model's dtype is
_OF_CODES = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_scale(_inv)?)\Z")


def torch_dtype(records: Iterable[TensorRecord | SinkTensor]) -> str:
    """Return the float dtype that most tensors have, as torch spells it; quantized weights' tensors do not count."""
    floats = [r for r in records if r.dtype in ("F64", "F32", "F16", "BF16")]
    spelled = [str(DTYPES[r.dtype].torch) for r in [r for r in floats if not _OF_CODES.search(r.name)] or floats]
    return max(dict.fromkeys(spelled), key=spelled.count) if spelled else "float32"


def match_dtype(plan: Plan) -> None:
    """Correct the dtype that config.json names to that of the weights, or float32 files would be loaded as bfloat16."""
    if plan.naming == "gguf":  # such a file names no dtype
        return
    spelled = torch_dtype(plan.tensors)
    for at, stored in enumerate(plan.companions):
        if stored.name != "config.json":
            continue
        document = parse_json(stored.data, stored.where)
        if not isinstance(document, dict):
            continue
        key = next((k for k in ("dtype", "torch_dtype") if isinstance(document.get(k), str)), None)
        if key and document[key] != spelled:
            plan.notes.append(Note("C01", f"config.json: {key} {document[key]} becomes {spelled}, as the weights are"))
            document[key] = spelled
            plan.companions[at] = companion("config.json", document)._replace(where=stored.where)
