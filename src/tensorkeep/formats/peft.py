"""Read and write adapter folders: `adapter_model.safetensors` or `.bin` with `adapter_config.json` (`peft`).

An adapter is never a model: its view carries the adapter config, and every name keeps PEFT's `base_model.model.`
prefix, which reading recognises as a wrapper. What our adapters say beside PEFT's fields (which base, how it was
quantized) is in the header of their weights, since PEFT warns of fields that it does not know. Adapters written before
0.2.0 have it in the config, and their weights in `adapter.safetensors`; both are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import pth, safetensors
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.view import StateView
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import Folder
from tensorkeep.storage.layout import FileLayout, SinkTensor

LOOKS = "a PEFT adapter folder"
ADAPTERS_ONLY = True
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_WEIGHT_FILES = (WEIGHTS, "adapter_model.bin", "adapter.safetensors")  # the last is ours before 0.2.0
OURS = ("kind", "base_digest", "quantization", "quantize_aware")  # what we say beside PEFT's fields
_ENTRY = "tensorkeep.adapter"  # of the safetensors header: these fields as JSON


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether these files are an adapter folder; `single`: they are one file named by the user."""
    return not single and CONFIG in names and any(w in names for w in _WEIGHT_FILES)


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """Open an adapter folder; `view.metadata["adapter"]` is its config, with what the weights' header says beside it.

    Args:
        folder: where the files lie.
        names: the files to look at.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: the config is none of PEFT's, or the weights' own format refuses them.
    """
    weights = next(w for w in _WEIGHT_FILES if w in names)
    form = safetensors if weights.endswith(".safetensors") else pth
    view: StateView = form.read(folder, [weights], path)
    add_config(view, weights)
    return view


def add_config(view: StateView, weights: str) -> None:
    """Give an opened file of an adapter's weights the config that lies beside it, if any: it says the scale.

    Args:
        view: of the weights.
        weights: their file.

    Raises:
        TensorkeepError: the config is none of PEFT's.
    """
    folder = view.folder
    if CONFIG not in folder.names():
        return
    data = read_small_from(folder, CONFIG)
    config = parse_json(data, f"{folder.url}/{CONFIG}")
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise TensorkeepError(
            "names no peft_type", where=f"{folder.url}/{CONFIG}", hint="is this PEFT's adapter_config.json?"
        )
    view.format = "peft"
    view.metadata["adapter"] = _beside(view, f"{folder.url}/{weights}") | config
    view.companions.append(Companion(CONFIG, data, f"{folder.url}/{CONFIG}"))


def _beside(view: StateView, where: str) -> dict[str, Any]:
    """Return our fields from the header of the weights; none where the file is not ours."""
    entry = view.metadata.pop(_ENTRY, None)
    if not isinstance(entry, str):
        return {}
    found = parse_json(entry.encode(), where)
    return {k: v for k, v in found.items() if k in OURS} if isinstance(found, dict) else {}


def header_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the header entry that says our fields of an adapter's config; none where there is nothing to say.

    Args:
        document: the config, with our fields or without.

    Returns:
        The entry by its name.
    """
    own = {k: document[k] for k in OURS if k in document}
    return {_ENTRY: json.dumps(own, sort_keys=True)} if own else {}


def layout(tensors: Sequence[SinkTensor], header: Mapping[str, str] | None = None, **_: Any) -> list[FileLayout]:
    """Lay out `adapter_model.safetensors`; the config travels as a companion.

    Args:
        tensors: the tensors to be written, under PEFT's names.
        header: what the weights' header says beside the tensors.

    Returns:
        The one file.

    Raises:
        TensorkeepError: some are no adapter tensors.
    """
    odd = [
        t.name
        for t in tensors
        if ".lora_" not in t.name and ".modules_to_save." not in t.name and "base_model." not in t.name
    ]
    if odd:
        raise TensorkeepError(
            f"{odd[0]} and {len(odd) - 1} more are no adapter tensors",
            hint="--to peft writes adapters; a full model goes --to hf",
        )
    return [safetensors.file_layout(WEIGHTS, tensors, header)]
