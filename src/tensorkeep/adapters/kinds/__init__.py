"""Kinds of adapters that can be merged: one file and one line in the table a kind.

A kind is a module under the word that PEFT's `adapter_config.json` has for it (`peft_type`):

| name | says | without it |
|---|---|---|
| `NAMES` | what people call it and its variants | needed |
| `FIELDS` | fields of the config that are understood; another that is set is refused | needed |
| `take(adapter, stored, clean)` | whether a tensor is a part of it; puts it into `adapter.parts` | needed |
| `finish(adapter)` | sorts the parts when all are taken | nothing is to sort |
| `spoken(adapter)` | what to call this adapter, with its rank | needed |
| `changes(adapter)` | which weights it changes: hf name -> (a word of its own, module) | needed |
| `shapes(adapter, word, module)` | shapes that fit (None: any), each with whether the weight is transposed | needed |
| `load(term, base_rows)` | what is needed to change rows, read once a tensor, in float64 | needed |
| `change(term, loaded, weights, rows)` | what is added to some rows of the weight, in float64 | needed |
| `told(term)` | the change in a few words, for a line of the plan | needed |
| `variant(term)` | what the change is called in a report | needed |
| `reason(adapter)` | why it cannot be added into weights, or None | it can |
| `refuse(adapter)` | raises for damaged or contradictory parts | they are sound |
| `check(term, shape)` | raises where a part does not fit a weight | shapes alone decide |
| `scale(adapter, word, module)` | what a report says of its scale | 1 |
| `MAY_LACK` | words of changes that are left out where the base has no such tensor | all are needed |
| `fixed(term)` | whether the update is the same whatever the weight, so that its share can be told | it is not |

Whole tensors and rows that replace the base's (PEFT's `modules_to_save`, `trainable_token_indices`) are of no kind:
every adapter may have them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

# PEFT's word in `peft_type` -> the module
ADAPTER_KINDS = {
    "LORA": "tensorkeep.adapters.kinds.lora",
    "LOHA": "tensorkeep.adapters.kinds.loha",
    "LOKR": "tensorkeep.adapters.kinds.lokr",
    "IA3": "tensorkeep.adapters.kinds.ia3",
    "OFT": "tensorkeep.adapters.kinds.oft",
    "VERA": "tensorkeep.adapters.kinds.vera",
    "TRAINABLE_TOKENS": "tensorkeep.adapters.kinds.trainable_tokens",
}


def word_of(document: Mapping[str, Any]) -> str:
    """Return the word of an adapter's kind; MiniMind's files have no config and are LoRA."""
    return str(document.get("peft_type", "LORA")).upper()


def module(document: Mapping[str, Any]) -> ModuleType:
    """Return the module of an adapter's kind, that of LoRA where the table has none (it is refused before a merge).

    Args:
        document: the adapter's config; empty where there is none.
    """
    return importlib.import_module(ADAPTER_KINDS.get(word_of(document), ADAPTER_KINDS["LORA"]))


def known() -> str:
    """Return the names of all kinds for a sentence: `LoRA, rsLoRA, DoRA, ... and VeRA`."""
    names = [name for place in ADAPTER_KINDS.values() for name in importlib.import_module(place).NAMES]
    return f"{', '.join(names[:-1])} and {names[-1]}"
