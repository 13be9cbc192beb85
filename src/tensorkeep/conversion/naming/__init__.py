"""Namings: which scheme names the tensors. Every scheme leads to the `hf` names and back.

Conversion goes source naming -> hf -> sink naming. A naming is one file and one line in NAMINGS:

| name | says | without it |
|---|---|---|
| `NAME` | the word on the command line | needed |
| `recognise(name)` | whether a tensor's name is one of this scheme | needed |
| `FAMILIES` | tables of `Row`s, by family | `to_hf` and `renamer` are needed |
| `family(names, config)` | which family holds, by own or hf names | the first |
| `table(names, config)` | the rows themselves, None where names are hf's | `FAMILIES[family(...)]` |
| `to_hf`, `renamer`, `dropped` | functions in the place of tables (see `detectors`) | tables |
| `holds(shapes)` | whether these tensors are really this scheme's | names alone decide |
| `claims(view, naming)` | whether a file is this scheme's though its names are another's | names decide |
| `COMPUTED` | buffers that are never written | none |
| `COMPLETE` | whether a name without a row is an error | it keeps its name |
| `READ_ONLY` | what to do instead of writing these names | they can be written |
| `LOADERS` | programs (`--for`) that load these names, the first of them naming the scheme | none |
| `dropped_by_loader(name, family)` | whether that program would leave a tensor out | it takes all |
| `MAKES_CONFIG` | whether the config beside it is not transformers' and is made from the weights | `False` |
| `sink_name(to, config, shapes, source)` | the name of the one file in a sink's folder | the format's own |
| `CHECKPOINT_ROOTS` | roots under which its `.pth` holds the weights and their average | one state |
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from tensorkeep.conversion.naming.table import Row
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.formats.names import strip_root, unwrap
from tensorkeep.formats.view import StateView

NAMINGS = {
    "hf": "tensorkeep.conversion.naming.hf",
    "torchtitan": "tensorkeep.conversion.naming.torchtitan",
    "torchtitan-0.2": "tensorkeep.conversion.naming.torchtitan02",
    "olmo-core": "tensorkeep.conversion.naming.olmo_core",
    "nanotron": "tensorkeep.conversion.naming.nanotron",
    "minimind": "tensorkeep.conversion.naming.minimind",
    "gguf": "tensorkeep.conversion.naming.gguf",
    "opentad": "tensorkeep.conversion.naming.opentad",
    "videomae": "tensorkeep.conversion.naming.videomae",
}
# names under which training programs keep a model's state, best first
ROOTS = (
    "model",
    "state_dict",
    "module",
    "model_state_dict",
    "net",
    "state_dict_ema",
    "ema",
    "model_ema",
    "ema_state_dict",
)
EMA_ROOTS = frozenset(r for r in ROOTS if "ema" in r)
# what training programs keep beside it, by first segment
OTHER_STATE = {
    "optimizer": "optimizer state",
    "optim": "optimizer state",
    "lr_scheduler": "schedule",
    "lr_schedulers": "schedule",
    "scheduler": "schedule",
    "scaler": "loss scaler",
    "dataloader": "data position",
    "train_state": "trainer state",
    "critic_model": "critic of PPO",
    "critic_optimizer": "optimizer state",
    "critic_scheduler": "schedule",
    "critic_scaler": "loss scaler",
    "rng": "random state",
    "rng_state": "random state",
}


@dataclass(frozen=True)
class Identity:
    """Which naming a checkpoint's tensors follow, and each tensor's name without root and wrappers.

    Args:
        naming: the naming's word on the command line; None where the names are of no known scheme.
        root: what the file nests the model under ("model", "state_dict"); None for nothing.
        wrappers: prefixes of DDP, torch.compile and others that were removed.
        names: clean name by stored name, for every tensor of the model.
        other: what it is, by stored name, for every tensor that is not the model's.
    """

    naming: str | None
    root: str | None
    wrappers: tuple[str, ...]
    names: dict[str, str]
    other: dict[str, str] = field(default_factory=dict)


def module(name: str) -> ModuleType:
    """Return the module of a naming.

    Args:
        name: The naming's word on the command line, a key of NAMINGS.

    Raises:
        TensorkeepError: Where no naming has that word; the hint names the nearest.
    """
    if name not in NAMINGS:
        raise TensorkeepError(f"no naming {name!r}", hint=near_misses(name, NAMINGS) or f"known: {', '.join(NAMINGS)}")
    return importlib.import_module(NAMINGS[name])


def renames(naming: str | None) -> bool:
    """Return whether a naming is functions and not tables, as those of detectors are.

    Args:
        naming: the naming's word; None where the names are nobody's.
    """
    return naming is not None and hasattr(module(naming), "to_hf")


def rows(naming: str | None, names: Collection[str], config: Mapping[str, Any] | None) -> list[Row] | None:
    """Return the table of a naming for one model.

    Args:
        naming: The naming's word; None where the names are nobody's.
        names: The model's tensors, under their own names or hf's.
        config: Its config, where one is there.

    Returns:
        The rows, or None where own names are hf's.

    Raises:
        TensorkeepError: Where the naming has no table for such a model.
    """
    scheme = module(naming) if naming is not None else None
    if scheme is None or hasattr(scheme, "table"):
        found: list[Row] | None = scheme.table(names, config) if scheme is not None else None
        return found
    tables: dict[str, list[Row]] = scheme.FAMILIES
    return tables[scheme.family(names, config)] if hasattr(scheme, "family") else next(iter(tables.values()))


def computed(naming: str | None) -> tuple[str, ...]:
    """Return the names of buffers that a naming's files hold and no model stores."""
    return getattr(module(naming), "COMPUTED", ()) if naming is not None else ()


def writable() -> list[str]:
    """Return the words of the namings that a sink's tensors can be given."""
    return [naming for naming in NAMINGS if not hasattr(module(naming), "READ_ONLY")]


def loaders() -> dict[str, list[str]]:
    """Return the programs that load checkpoints (`--for`), each with the namings that it loads, its own first."""
    of: dict[str, tuple[str, ...]] = {naming: getattr(module(naming), "LOADERS", ()) for naming in NAMINGS}
    words = dict.fromkeys(word for loaded in of.values() for word in loaded)
    return {word: sorted((n for n in of if word in of[n]), key=lambda n: of[n][0] != word) for word in words}


def identify(view: StateView, naming: str | None = None) -> Identity:
    """Tell from a checkpoint's names which naming, root and wrappers they follow.

    The naming and root that explain most tensors are chosen. Where nothing is recognised, names stay as they are: hf's
    where a config of transformers lies beside them (and less than half would be another's), else nobody's.

    Args:
        view: the opened checkpoint.
        naming: the user's choice; None to try all.

    Returns:
        The naming found, and the clean names.

    Raises:
        TensorkeepError: K06 where the names do not fit the user's choice, K03 where two names are equal once cleaned.
    """
    paths: Mapping[str, tuple[Any, ...]] = view.metadata.get("paths", {})
    candidates = [module(naming)] if naming else [module(n) for n in NAMINGS]
    best: tuple[tuple[int, int, int], Identity] | None = None
    ours = view.format in ("hf", "dcp", "pth") and isinstance((view.config or {}).get("model_type"), str)
    flat = ours and view.format != "pth" and all(len(p) <= 1 for p in paths.values())
    for order, root in enumerate(_roots(view, paths)):
        clean, wrappers, other = _under(view, root)
        if root and flat and any(why == _outside(root) for why in other.values()):
            continue  # a module called `model` beside others of the model (MaskFormer's Swin)
        shapes = {name: view[stored].shape for stored, name in clean.items()}
        # names that differ in numbers alone are one kind to every scheme
        kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "0", name) for name in clean.values())
        for rank, scheme in enumerate(candidates):
            if hasattr(scheme, "holds") and not scheme.holds(shapes):
                continue
            known = sum(count for kind, count in kinds.items() if scheme.recognise(kind))
            if root and "." in root and scheme.NAME != "hf" and 2 * known <= len(clean):
                continue  # a few of others' names may be what is left of hf's
            score = (known, -order, -rank)
            if known and (best is None or score > best[0]):
                best = score, Identity(scheme.NAME, root, wrappers, clean, other)
    least = 2 if ours else 10
    if best is not None and naming is None and least * best[0][0] < len(best[1].names):
        best = None  # two or three names that happen to be another scheme's (GIT's `output.weight`, any `norm.weight`)
    if best is not None:
        found = best[1]
        return _claimed(view, found) if naming is None else found
    if naming and naming != "hf":
        first = next(iter(view), "no tensor at all")
        raise TensorkeepError(
            f"the names do not fit naming {naming}, e.g. {first}",
            where=view.path,
            code="K06",
            hint="leave --from-naming out to let it be detected",
        )
    root = _container(view, paths)
    clean, wrappers, other = _under(view, root)
    return Identity("hf" if ours else naming, root, wrappers, clean, other)


def _claimed(view: StateView, found: Identity) -> Identity:
    """The identity under the scheme whose file it is, where the names alone are another scheme's."""
    for naming in NAMINGS:
        claims = getattr(module(naming), "claims", None)
        if claims is not None and claims(view, str(found.naming)):
            return replace(found, naming=naming)
    return found


def _roots(view: StateView, paths: Mapping[str, tuple[Any, ...]]) -> list[str | None]:
    """Return the roots to try: none first, then those that the file's nesting or its names suggest, averages last.

    What PEFT wrote is called as the model calls its modules.
    """
    if view.format == "peft":
        return [None]
    heads = {str(p[0]) for p in paths.values() if len(p) > 1} | {_first(n) for n in view}
    heads |= {_first(unwrap(n)[0]) for n in view}
    roots = [r for r in ROOTS if r in heads]
    nests = [r for r in roots if r not in EMA_ROOTS and view.format in ("pth", "dcp")]
    inner = {r: dict.fromkeys(_first(n[len(r) + 1 :]) for n in view if n.startswith(f"{r}.")) for r in nests}
    # Lightning's `state_dict` over a module that keeps the model as `self.model`, beside weights of a loss or a teacher
    held = {r: words if len(words) == 1 else [w for w in ROOTS if w in words] for r, words in inner.items()}
    return [None, *roots, *(f"{r}.{word}" for r, words in held.items() for word in words if word not in EMA_ROOTS)]


def _first(name: str) -> str:
    return name.partition(".")[0]


def _under(view: StateView, root: str | None) -> tuple[dict[str, str], tuple[str, ...], dict[str, str]]:
    """Return the clean names of the tensors below `root`, the wrappers found, and what the other tensors are."""
    clean: dict[str, str] = {}
    wrappers: dict[str, None] = {}
    other: dict[str, str] = {}
    for name in view:
        reason = other_state(name, root)
        inner, outer = (name, ()) if root else unwrap(name)
        rest = strip_root(inner, root) if root else inner
        if rest is None and root:
            bare, outer = unwrap(name)
            rest = strip_root(bare, root)
        if reason or rest is None:
            other[name] = reason or _outside(root)
            continue
        short, found = unwrap(rest)
        wrappers.update(dict.fromkeys((*outer, *found)))
        clean[name] = short
    doubled = len(clean) - len(set(clean.values()))
    if doubled:
        first = Counter(clean.values()).most_common(1)[0][0]
        raise TensorkeepError(
            f"{doubled} names are equal once wrapper prefixes are removed, first {first}", where=view.path, code="K03"
        )
    return clean, tuple(wrappers), other


def _outside(root: str | None) -> str:
    """Say of a tensor that it is not below a root."""
    return f"not below {root}"


def other_state(name: str, root: str | None) -> str | None:
    """Return what a tensor is that belongs to training and not to the model, by its first segment; else None."""
    return _other_state(_first(name), _first(root) if root else root)


@lru_cache(1 << 14)
def _other_state(first: str, root: str | None) -> str | None:
    if first == root:
        return None
    if first in ROOTS and root is not None:
        return "another copy of the model" if first not in EMA_ROOTS else "EMA copy of the model"
    if first in OTHER_STATE:
        return OTHER_STATE[first]
    if not _numbered_state().fullmatch(first):
        return None
    return next((what for word, what in OTHER_STATE.items() if re.fullmatch(rf"{word}s?[-_]?\d*", first)), None)


@cache
def _numbered_state() -> re.Pattern[str]:
    """Return the expression of all words of `OTHER_STATE`, with a plural and a number."""
    return re.compile(rf"(?:{'|'.join(OTHER_STATE)})s?[-_]?\d*")


def _container(view: StateView, paths: Mapping[str, tuple[Any, ...]]) -> str | None:
    """Return the name that the file itself nests its tensors under, for a model whose names nobody knows."""
    nested = {str(paths[n][0]) for n in view if len(paths.get(n, ())) > 1}
    flat = [n for n in view if len(paths.get(n, ())) <= 1 and not other_state(n, None)]
    if flat:
        return None
    return next((r for r in ROOTS if r in nested), None)


def layer_count(names: Iterable[str]) -> int:
    """Return one more than the highest layer number in hf names.

    Args:
        names: hf names (`model.layers.3...`).

    Returns:
        The number of layers; 0 where no name has one.
    """
    found = [int(m.group(1)) for n in names if (m := re.match(r"model\.layers\.(\d+)\.", n))]
    return max(found, default=-1) + 1
