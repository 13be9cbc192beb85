"""`peft`: an adapter folder, `adapter_model.safetensors` (or .bin) with `adapter_config.json`; ours is `adapter.safetensors`.

An adapter is never a model: its view carries the adapter config, and every name keeps PEFT's `base_model.model.`
prefix, which reading recognises as a wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import pth, safetensors
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.view import StateView
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import Folder
from tensorkeep.storage.layout import FileLayout, SinkTensor

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter.safetensors")  # the last is ours


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    return not single and CONFIG in names and any(w in names for w in WEIGHTS)


def read(folder: Folder, names: list[str], path: str) -> StateView:
    """The view of an adapter folder; `view.metadata["adapter"]` is its config."""
    weights = next(w for w in WEIGHTS if w in names)
    form = safetensors if weights.endswith(".safetensors") else pth
    view: StateView = form.read(folder, [weights], path)
    config = parse_json(folder.read(CONFIG), f"{folder.url}/{CONFIG}")
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise TensorkeepError(
            "names no peft_type", where=f"{folder.url}/{CONFIG}", hint="is this PEFT's adapter_config.json?"
        )
    view.format = "peft"
    view.metadata["adapter"] = config
    view.companions.append(Companion(CONFIG, folder.read(CONFIG), f"{folder.url}/{CONFIG}"))
    return view


def layout(tensors: Sequence[SinkTensor], **_: Any) -> list[FileLayout]:
    """`adapter_model.safetensors`; the config travels as a companion."""
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
    return [safetensors.file_layout(WEIGHTS[0], tensors)]
