"""The table of all kinds of faults, what each returns, and helpers to change some tensors of a model."""

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
    """A faulty state and what a diagnosis must say of it.

    `codes`: any of these is right. `tensors`: exactly those of the finding; None where names do not matter.
    `layers`: the permutation that O02 must give. `also`: codes whose errors may be there too, being true as well.
    `lax`: a warning or an info of that code is enough. `damage` edits the written folder and returns the path to
    diagnose.
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
class FaultKind:
    """A kind of fault: its name, the codes that name it, and how to make it (None: this model cannot have it)."""

    name: str
    codes: tuple[str, ...]
    make: Make


KINDS: dict[str, FaultKind] = {}


def kind(*codes: str) -> Callable[[Make], Make]:
    """Register a kind of fault under its function's name."""

    def register(make: Make) -> Make:
        name = getattr(make, "__name__", "")
        if name in KINDS:
            raise ValueError(f"two kinds are called {name}")
        KINDS[name] = FaultKind(name, codes, make)
        return make

    return register


def some(rng: np.random.Generator, items: Collection[str], least: int = 1, most: int = 1) -> list[str]:
    """Pick a few of `items`, in their order."""
    ordered = list(items)
    count = min(len(ordered), int(rng.integers(least, most + 1)))
    return [ordered[i] for i in sorted(rng.choice(len(ordered), count, replace=False))]


def some_layers(m: Specimen, rng: np.random.Generator) -> list[int]:
    """Pick one layer, a few, or all of them."""
    count = int(rng.choice([1, max(1, m.layers // 2), m.layers]))
    return sorted(int(n) for n in rng.choice(m.layers, count, replace=False))


def edited(m: Specimen, names: Collection[str], edit: Callable[[Array], Array]) -> State:
    """Return the state with `edit(float32 values)` for the named tensors, rounded to their dtype."""
    return {n: edit(t.astype(np.float32)).astype(t.dtype) if n in names else t for n, t in m.tensors.items()}


def moved(m: Specimen, names: Collection[str], move: Callable[[Array], Array]) -> State:
    """Return the state with `move(values)` for the named tensors: rearranged, never rounded."""
    return {n: np.ascontiguousarray(move(t)) if n in names else t for n, t in m.tensors.items()}


def changed_names(m: Specimen, state: State) -> list[str]:
    """Return the names whose bytes differ from the model's."""
    return [n for n, t in state.items() if n in m.tensors and t.tobytes() != m.tensors[n].tobytes()]
