"""Companions: the small files beside the weights (config, tokenizer, recipe) that go wherever the weights go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.files import Folder, LocalFolder

# what travels beside the weights, in the order in which it is written; nothing else in a folder is copied
COMPANIONS = tuple(
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
        "processor_config.json",
        "recipe.yaml",
    ]
)
_LARGEST, _LARGEST_CONFIG = 256 << 20, 16 << 20  # bytes; the largest tokenizers have 40 MB, configs some 100 kB


class Companion(NamedTuple):
    """A small file that goes with the weights.

    Attributes:
        name: its name.
        data: its bytes.
        where: where it came from, for messages.
    """

    name: str
    data: bytes
    where: str


def find_companions(folder: Folder, known: Sequence[Companion], described: bool) -> list[Companion]:
    """Find the configs and tokenizer beside the weights; for a bare weight file, also up to two folders above.

    A run keeps them there: the weights lie in out/step-N/, the config in out/.

    Args:
        folder: where the weights lie.
        known: companions that the weights' own format gave already; these names are not looked for.
        described: the file holds its own config (GGUF does), so a folder above says nothing about it.

    Returns:
        The companions found, in the order of COMPANIONS.

    Raises:
        TensorkeepError: a file of such a name is too large to be a config or a tokenizer.
    """
    places: list[Folder] = [folder]
    if not described and isinstance(folder, LocalFolder) and "config.json" not in folder.names():
        places += [LocalFolder(parent) for parent in list(folder.path.resolve().parents)[:2]]
    found: list[Companion] = []
    for place in places:
        try:
            present = set(place.names())
        except TensorkeepError:
            if place is folder:
                raise
            continue  # a folder above that we may not list says nothing about this checkpoint
        if "config.json" not in present and place is not folder:
            continue
        have = {companion.name for companion in (*known, *found)}
        found += [_read(place, name) for name in COMPANIONS if name in present - have]
        if "config.json" in present:
            break
    return found


def _read(place: Folder, name: str) -> Companion:
    where = f"{place.url}/{name}"
    most = _LARGEST_CONFIG if name.endswith("config.json") or name == "recipe.yaml" else _LARGEST
    return Companion(name, read_small_from(place, name, most), where)
