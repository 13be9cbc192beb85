"""Ask PEFT itself what its loader makes of an adapter's tensors: on modules of the adapter's own names and shapes.

The base is not needed: the modules that the tensors belong to are built on the meta device, PEFT puts the adapter that
the config describes on them, and loads. What it misses then, or has no place for, it would with any base of these
modules.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion.fit import Misfit, Offer
from tensorkeep.errors import TensorkeepError
from tensorkeep.models.refusals import refusals, said

_PREFIX = "base_model.model."
_VOCABULARY = 1 << 20  # rows of an embedding of which only a few are in the file; they cost nothing on meta
_INSIDE = ".base_layer"
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(A|B|embedding_A|embedding_B|magnitude_vector)|token_adapter\.\w+)(\.weight)?\Z"
)


def by_peft(document: Mapping[str, Any], offers: Mapping[str, Offer]) -> Misfit | None:
    """Let PEFT load an adapter of these names and shapes, without values, and return what it reports.

    Args:
        document: as adapter_config.json has it.
        offers: the adapter's tensors, by the names of PEFT's files.

    Returns:
        What does not fit; None where PEFT is not installed, the adapter is not LoRA, or its modules cannot be told,
            as of bare parameters (`target_parameters`).

    Raises:
        TensorkeepError: A01 where PEFT refuses the config or the tensors.
    """
    from tensorkeep.models.language_model import silent

    try:
        with silent():
            import peft
            from peft.utils.save_and_load import set_peft_model_state_dict
    except ImportError:
        return None
    base = _base(offers)
    if document.get("peft_type") != "LORA" or base is None or document.get("target_parameters"):
        return None
    given = {k: v for k, v in document.items() if k not in ("base_model_name_or_path", "auto_mapping", "task_type")}
    try:
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (Path(place) / "adapter_config.json").write_text(json.dumps(given), encoding="utf-8")
            config = peft.PeftConfig.from_pretrained(place)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            warnings.simplefilter("ignore")
            config.init_lora_weights = False
            model = peft.PeftModel(base, config)
            wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            state = {n: torch.empty(o.shape) for n, o in offers.items()}
            report = set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    except ValueError as error:  # what PEFT says of configs and of modules that it does not find
        raise TensorkeepError(f"peft would not load it: {said(error)}", code="A01") from None
    except refusals():
        return None  # a kind of adapter whose modules need more than these tensors tell
    asked = {n: tuple(t.shape) for n, t in wanted.items()}
    odd = {n: (o.shape, asked[n]) for n, o in offers.items() if n in asked and o.shape != asked[n]}
    missing = tuple(n for n in wanted if n not in offers)
    return Misfit("peft", len(wanted), missing, tuple(map(str, report.unexpected_keys)), odd)


def _base(offers: Mapping[str, Offer]) -> nn.Module | None:
    """Return a tree of the modules that these tensors belong to; None where a name or a shape is of no known kind."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, offer in offers.items():
        if not name.startswith(_PREFIX):
            return None
        found = _PART.match(name[len(_PREFIX) :])
        if found is None:
            module, _, leaf = name[len(_PREFIX) :].rpartition(".")
            parts.setdefault(module.removesuffix(_INSIDE), {})[leaf] = offer.shape
        else:
            parts.setdefault(found["module"], {})[found["part"]] = offer.shape
    root = nn.Module()
    for module, shapes in parts.items():
        layer = _layer(shapes)
        if layer is None:
            return None
        *above, last = module.split(".")
        place = root
        for segment in above:
            if not hasattr(place, segment):
                place.add_module(segment, nn.Module())
            place = getattr(place, segment)
        place.add_module(last, layer)
    return root


def _layer(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module | None:
    """Return the layer that tensors of these shapes adapt, or hold whole (`modules_to_save`)."""
    a, b = shapes.get("lora_A", ()), shapes.get("lora_B", ())
    with torch.device("meta"):
        if len(a) == 2 and len(b) == 2:
            return nn.Linear(a[1], b[0], bias="bias" in shapes)
        if len(a) == 4 and len(b) == 4:
            return nn.Conv2d(a[1], b[0], a[2:], bias="bias" in shapes)
        if len(a) == 3 and len(b) == 3:
            return nn.Conv1d(a[1], b[0], a[2], bias="bias" in shapes)
        if "lora_embedding_A" in shapes and "lora_embedding_B" in shapes:
            return nn.Embedding(shapes["lora_embedding_A"][1], shapes["lora_embedding_B"][0])
        if tokens := shapes.get("token_adapter.trainable_tokens_delta"):
            return nn.Embedding(_VOCABULARY, tokens[-1])
        if not any(part.startswith("lora_") for part in shapes):
            whole = nn.Module()
            for leaf, shape in shapes.items():
                whole.register_parameter(leaf, nn.Parameter(torch.empty(shape)))
            return whole
    return None
