"""Companions: the small files beside the weights (config, tokenizer, recipe) that go wherever the weights go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import Folder, LocalFolder

if TYPE_CHECKING:
    from tensorkeep.formats.view import StateView

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
_OLMO_CORE = ".metadata.json"  # beside it config.json is the whole run's of OLMo-core, not a model's
_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # git's name for a file, or its SHA-256
_LARGEST, _LARGEST_CONFIG = 256 << 20, 16 << 20  # bytes; the largest tokenizers have 40 MB, configs some 100 kB


class Companion(NamedTuple):
    """A small file that goes with the weights.

    Attributes:
        name: its name.
        data: its bytes.
        where: where it came from, for messages.
        led_out: it is a link out of its folder: read like any file, but never copied into a sink.
    """

    name: str
    data: bytes
    where: str
    led_out: bool = False


def travelling(companions: Iterable[Companion]) -> list[Companion]:
    """Return those that are copied beside the weights: all but links that lead out of their folder.

    Args:
        companions: the small files of a checkpoint.
    """
    return [companion for companion in companions if not companion.led_out]


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
        if place is not folder and ("config.json" not in present or _OLMO_CORE in present):
            continue
        have = {companion.name for companion in (*known, *found)}
        found += [read_companion(place, name) for name in COMPANIONS if name in present - have]
        if "config.json" in present:
            break
    return found


def read_companion(place: Folder, name: str) -> Companion:
    """Return one small file beside the weights, read whole.

    Args:
        place: its folder.
        name: its name.

    Raises:
        TensorkeepError: it is too large to be a config or a tokenizer, or cannot be read.
    """
    where = f"{place.url}/{name}"
    most = _LARGEST_CONFIG if name.endswith("config.json") or name == "recipe.yaml" else _LARGEST
    led_out = isinstance(place, LocalFolder) and leads_out(place.path / name)
    return Companion(name, read_small_from(place, name, most), where, led_out)


def leads_out(path: Path) -> bool:
    """Tell whether a file is a link to one outside its folder.

    The Hub's cache is made of such links, `snapshots/COMMIT/config.json` to `blobs/HASH` of the same model: those do
    not lead out.

    Args:
        path: the file.
    """
    folder, target = path.parent.resolve(), path.resolve()
    if not path.is_symlink() or folder in target.parents:
        return False
    models = [place.parent for place in folder.parents if place.name == "snapshots"]
    return not (target.parent in [model / "blobs" for model in models] and _BLOB.fullmatch(target.name))


def add_companions(view: StateView, believed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put the configs and tokenizer that belong to the weights into a view, and its config as far as it is believed."""
    view.companions += find_companions(view.folder, view.companions, described=view.config is not None)
    config = next((c for c in view.companions if c.name == "config.json"), None)
    if view.config is None and config is not None:
        document = parse_json(config.data, config.where)
        view.config = believed(document) if isinstance(document, dict) else None
