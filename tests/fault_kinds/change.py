"""What a kind of fault returns, and the table in which kinds register."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.specimens import Array, Specimen, State

VALUE_FORMS = ("hf", "hf-sharded", "dcp", "flame", "pth")


@dataclass
class Change:
    """A sick state and what a diagnosis must say of it.

    `codes`: any of these is right. `tensors`: exactly those of the finding; None where names do not matter.
    `layers`: the permutation that O02 must give. `also`: codes whose errors may stand beside, being true as well.
    `lax`: a warning or an info of that code is enough. `damage` edits the written folder and gives the path to diagnose.
    """

    state: State
    tensors: Collection[str] | None = None
    codes: tuple[str, ...] = ()
    layers: list[int] | None = None
    also: tuple[str, ...] = ()
    lax: bool = False
    config: dict[str, Any] | None = None
    keep_config: bool = True
    forms: tuple[str, ...] = VALUE_FORMS
    target: str | None = None
    companions: dict[str, bytes] = field(default_factory=dict)
    damage: Callable[[Path], Path] | None = None
    note: str = ""


Make = Callable[[Specimen, np.random.Generator], "Change | None"]


@dataclass(frozen=True)
class Kind:
    """A fault: its name, the codes that name it, and how to make it (None: this model cannot have it)."""

    name: str
    codes: tuple[str, ...]
    make: Make


KINDS: dict[str, Kind] = {}


def kind(*codes: str) -> Callable[[Make], Make]:
    """Register a kind under its function's name."""

    def register(make: Make) -> Make:
        name = getattr(make, "__name__", "")
        if name in KINDS:
            raise ValueError(f"two kinds are called {name}")
        KINDS[name] = Kind(name, codes, make)
        return make

    return register


def some(rng: np.random.Generator, items: Collection[str], least: int = 1, most: int = 1) -> list[str]:
    """A few of `items` in their order."""
    ordered = list(items)
    count = min(len(ordered), int(rng.integers(least, most + 1)))
    return [ordered[i] for i in sorted(rng.choice(len(ordered), count, replace=False))]


def some_layers(m: Specimen, rng: np.random.Generator) -> list[int]:
    """One layer, a few, or all of them."""
    count = int(rng.choice([1, max(1, m.layers // 2), m.layers]))
    return sorted(int(n) for n in rng.choice(m.layers, count, replace=False))


def edited(m: Specimen, names: Collection[str], edit: Callable[[Array], Array]) -> State:
    """The state with `edit(float32 values)` in place of the named tensors, rounded to the dtype stored."""
    return {n: edit(t.astype(np.float32)).astype(t.dtype) if n in names else t for n, t in m.tensors.items()}


def moved(m: Specimen, names: Collection[str], move: Callable[[Array], Array]) -> State:
    """The state with `move(values)` in place of the named tensors: rearranged, never rounded."""
    return {n: np.ascontiguousarray(move(t)) if n in names else t for n, t in m.tensors.items()}


def really(m: Specimen, state: State) -> list[str]:
    """Names whose bytes differ from the model's."""
    return [n for n, t in state.items() if n in m.tensors and t.tobytes() != m.tensors[n].tobytes()]
