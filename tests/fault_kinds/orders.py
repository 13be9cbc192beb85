"""Faults of shape and order: shapes and transposition (S), RoPE (O01), layers (O02), swaps (O03), rows (O04)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.fault_kinds.change import Change, changed_names, kind, moved, some, some_layers
from tests.fault_kinds.names import EMBEDDING, HEAD
from tests.specimens import LAYER, Array, Specimen, State

Rng = np.random.Generator


def vocabulary(m: Specimen) -> list[str]:
    return [n for n in (EMBEDDING, HEAD) if n in m.tensors]


# -- shapes ---------------------------------------------------------------------------------------------------------


@kind("S01")
def shape_cut(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.matrices, 1, 2)
    cut = int(rng.integers(1, 9))
    return Change(moved(m, names, (lambda t: t[:-cut]) if rng.random() < 0.5 else (lambda t: t[:, cut:])), names)


@kind("S01")
def norm_of_another_width(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.norms)
    return Change(moved(m, names, lambda t: np.concatenate([t, t])), names)


@kind("S02")
def vocabulary_padded(m: Specimen, rng: Rng) -> Change | None:
    extra = int(rng.choice([1, 16, 64, 128]))
    noise = 0.02 if rng.random() < 0.5 else 0.0

    def pad(t: Array) -> Array:
        return np.concatenate([t, rng.normal(0, noise, (extra, t.shape[1])).astype(t.dtype)])

    return Change(moved(m, vocabulary(m), pad), vocabulary(m)) if m.language else None


@kind("S02")
def vocabulary_cut(m: Specimen, rng: Rng) -> Change | None:
    cut = int(rng.choice([1, 16, 50]))
    return Change(moved(m, vocabulary(m), lambda t: t[:-cut]), vocabulary(m)) if m.language else None


@kind("S03")
def transposed_square(m: Specimen, rng: Rng) -> Change | None:
    square = [n for n in m.matrices if len(set(m.tensors[n].shape)) == 1]
    names = some(rng, square, 1, 3)
    return Change(moved(m, names, lambda t: t.T), names) if names else None


@kind("S03")
def transposed_oblong(m: Specimen, rng: Rng) -> Change | None:
    oblong = [n for n in m.matrices if len(set(m.tensors[n].shape)) == 2]
    names = some(rng, oblong, 1, 3)
    return Change(moved(m, names, lambda t: t.T), names) if names else None


@kind("S03")
def transposed_all(m: Specimen, rng: Rng) -> Change | None:
    return Change(moved(m, m.matrices, lambda t: t.T), m.matrices)


# -- RoPE -----------------------------------------------------------------------------------------------------------


def to_pairs(head_dim: int) -> Callable[[Array], Array]:
    """Return a function that moves the rows of each head from half-split to interleaved layout."""
    return lambda t: t.reshape(-1, 2, head_dim // 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)


def to_halves(head_dim: int) -> Callable[[Array], Array]:
    """Return a function that moves rows from interleaved to half-split layout: wrong for Hugging Face weights."""
    return lambda t: t.reshape(-1, head_dim // 2, 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)


def rope(m: Specimen, letters: str, layers: list[int], back: bool = False, norms: bool = False) -> Change | None:
    if not m.language:
        return None
    names = [n for letter in letters for layer in layers for n in m.role(letter, layer)]
    if norms:
        added = [n for layer in layers for n in m.of_layer(layer) if n.endswith(("q_norm.weight", "k_norm.weight"))]
        if not added:
            return None
        names += added
    state = moved(m, names, to_halves(m.head_dim) if back else to_pairs(m.head_dim))
    return Change(state, names)


@kind("O01")
def rope_q_and_k(m: Specimen, rng: Rng) -> Change | None:
    return rope(m, "qk", list(range(m.layers)))


@kind("O01")
def rope_q_only(m: Specimen, rng: Rng) -> Change | None:
    return rope(m, "q", list(range(m.layers)))


@kind("O01")
def rope_k_only(m: Specimen, rng: Rng) -> Change | None:
    return rope(m, "k", list(range(m.layers)))


@kind("O01")
def rope_wrong_direction(m: Specimen, rng: Rng) -> Change | None:
    return rope(m, "qk", list(range(m.layers)), back=True)


@kind("O01")
def rope_some_layers(m: Specimen, rng: Rng) -> Change | None:
    return rope(m, "qk", some_layers(m, rng), back=bool(rng.random() < 0.5))


@kind("O01")
def rope_with_norms(m: Specimen, rng: Rng) -> Change | None:
    return rope(m, "qk", list(range(m.layers)), norms=True)


# -- layers ---------------------------------------------------------------------------------------------------------


def reordered(m: Specimen, order: list[int]) -> Change | None:
    """Write layer order[i] of the model as layer i of the checkpoint."""
    if order == sorted(order):
        return None
    state: State = {}
    for name, tensor in m.tensors.items():
        found = LAYER.match(name)
        original = f"{found['before']}{order[int(found['n'])]}.{found['rest']}" if found else name
        state[name] = m.tensors[original] if found else tensor
    return Change(state, layers=order)


@kind("O02")
def layers_swapped(m: Specimen, rng: Rng) -> Change | None:
    order = list(range(m.layers))
    a, b = (int(n) for n in rng.choice(m.layers, 2, replace=False))
    order[a], order[b] = order[b], order[a]
    return reordered(m, order)


@kind("O02")
def layers_shifted(m: Specimen, rng: Rng) -> Change | None:
    by = int(rng.choice([1, m.layers - 1]))
    return reordered(m, [(n + by) % m.layers for n in range(m.layers)])


@kind("O02")
def layers_reversed(m: Specimen, rng: Rng) -> Change | None:
    return reordered(m, list(range(m.layers))[::-1])


@kind("O02")
def layers_lexicographic(m: Specimen, rng: Rng) -> Change | None:
    return reordered(m, sorted(range(m.layers), key=str))


@kind("O02")
def layers_shuffled(m: Specimen, rng: Rng) -> Change | None:
    return reordered(m, [int(n) for n in rng.permutation(m.layers)])


@kind("O02")
def layer_written_twice(m: Specimen, rng: Rng) -> Change | None:
    order = list(range(m.layers))
    a, b = (int(n) for n in rng.choice(m.layers, 2, replace=False))
    order[a] = b
    return reordered(m, order)


# -- tensors swapped ------------------------------------------------------------------------------------------------


def swapped(m: Specimen, pairs: list[tuple[str, str]]) -> Change | None:
    fitting = [(a, b) for a, b in pairs if m.tensors[a].shape == m.tensors[b].shape]
    other = dict(fitting) | {b: a for a, b in fitting}
    state = {n: m.tensors[other.get(n, n)] for n in m.tensors}
    names = changed_names(m, state)
    return Change(state, names) if names else None


def role_pairs(m: Specimen, a: str, b: str, layers: list[int]) -> list[tuple[str, str]]:
    return [pair for layer in layers for pair in zip(m.role(a, layer), m.role(b, layer))]


@kind("O03")
def gate_up_swapped(m: Specimen, rng: Rng) -> Change | None:
    return swapped(m, role_pairs(m, "gate", "up", some_layers(m, rng)))


@kind("O03")
def k_v_swapped(m: Specimen, rng: Rng) -> Change | None:
    return swapped(m, role_pairs(m, "k", "v", some_layers(m, rng)))


@kind("O03")
def q_k_swapped(m: Specimen, rng: Rng) -> Change | None:
    return swapped(m, role_pairs(m, "q", "k", some_layers(m, rng)))


@kind("O03")
def norms_swapped(m: Specimen, rng: Rng) -> Change | None:
    pairs = []
    for layer in some_layers(m, rng):
        wide = [n for n in m.of_layer(layer) if n in m.norms and "q_norm" not in n and "k_norm" not in n]
        pairs.append((wide[0], wide[1]))
        bias = [n.replace(".weight", ".bias") for n in wide]
        pairs += [(bias[0], bias[1])] if bias[0] in m.tensors else []
    return swapped(m, pairs)


@kind("O03")
def experts_swapped(m: Specimen, rng: Rng) -> Change | None:
    experts = m.config.get("num_experts", 0)
    if experts < 2:
        return None
    layer = int(rng.integers(0, m.layers))
    a, b = (int(n) for n in rng.choice(experts, 2, replace=False))
    first = [n for n in m.of_layer(layer) if f".experts.{a}." in n]
    return swapped(m, [(n, n.replace(f".experts.{a}.", f".experts.{b}.")) for n in first])


@kind("O03", "O02")
def one_role_swapped_between_layers(m: Specimen, rng: Rng) -> Change | None:
    role = str(rng.choice(["q", "o", "down", "v"]))
    a, b = (int(n) for n in rng.choice(m.layers, 2, replace=False))
    return swapped(m, list(zip(m.role(role, a, "weight"), m.role(role, b, "weight"))))


# -- rows -----------------------------------------------------------------------------------------------------------


def rearranged(m: Specimen, names: list[str], move: Callable[[Array], Array]) -> Change | None:
    state = moved(m, names, move)
    return Change(state, changed_names(m, state)) if changed_names(m, state) else None


@kind("O04")
def vocabulary_shifted(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, vocabulary(m), 1, 2) if m.language else []
    by = int(rng.choice([1, -1, 3]))
    return rearranged(m, names, lambda t: np.roll(t, by, 0))


@kind("O04")
def vocabulary_permuted(m: Specimen, rng: Rng) -> Change | None:
    order = rng.permutation(m.config["vocab_size"]) if m.language else None
    return rearranged(m, vocabulary(m), lambda t: t[order]) if m.language else None


def blocks(t: Array, order: Array, axis: int) -> Array:
    parts = np.split(t, len(order), axis)
    return np.concatenate([parts[i] for i in order], axis)


@kind("O04")
def shard_order_of_rows(m: Specimen, rng: Rng) -> Change | None:
    shards = int(rng.choice([2, 4]))
    order = np.arange(shards)[::-1] if rng.random() < 0.5 else np.roll(np.arange(shards), 1)
    fitting = [n for n in m.matrices + (vocabulary(m) if m.language else []) if m.tensors[n].shape[0] % shards == 0]
    return rearranged(m, some(rng, fitting, 1, 4), lambda t: blocks(t, order, 0))


@kind("O04")
def shard_order_of_columns(m: Specimen, rng: Rng) -> Change | None:
    names = [n for layer in some_layers(m, rng) for n in m.role(str(rng.choice(["o", "down"])), layer, "weight")]
    shards = int(rng.choice([s for s in (2, 4) if all(m.tensors[n].shape[1] % s == 0 for n in names)]))
    return rearranged(m, names, lambda t: blocks(t, np.roll(np.arange(shards), 1), 1))


@kind("O04")
def heads_rolled(m: Specimen, rng: Rng) -> Change | None:
    letters = str(rng.choice(["q", "k", "v", "qkv"]))
    names = [n for layer in some_layers(m, rng) for letter in letters for n in m.role(letter, layer)]
    by = m.head_dim * int(rng.choice([1, -1]))
    return rearranged(m, names, lambda t: np.roll(t, by, 0))


@kind("O04")
def gqa_regrouped(m: Specimen, rng: Rng) -> Change | None:
    heads, groups = m.config["num_attention_heads"], m.config.get("num_key_value_heads", 0)
    if groups < 2 or heads // groups < 2:
        return None
    names = [n for layer in some_layers(m, rng) for n in m.role("q", layer)]
    return rearranged(
        m, names, lambda t: t.reshape(groups, heads // groups, m.head_dim, *t.shape[1:]).swapaxes(0, 1).reshape(t.shape)
    )
