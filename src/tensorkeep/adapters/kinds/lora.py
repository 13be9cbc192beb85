"""LoRA, rsLoRA and DoRA: low-rank pairs on linears, convolutions and embeddings.

    W + s · B A                                      LoRA, rsLoRA
    m · V / |V|,  V = W + s · B A                    DoRA (arXiv 2402.09353)

The scale s is `Adapter.scale`. The sum of several DoRA updates is against the base, as PEFT's forward has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import Term, permuted, taken, whole
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.quantization.codes import Array

NAMES = ("LoRA", "rsLoRA", "DoRA")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])(\.default)?\Z")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?\Z")
_LONE = re.compile(r"(?P<module>.+)\.lora[._](?P<half>[AB])(\.default)?\.weight\Z")
_BIAS = re.compile(r"(?P<module>.+)\.lora_B(\.default)?\.bias\Z")
# fields of the config that change nothing about what is added to which weight, or that are read here
FIELDS = frozenset(
    """
    alpha_pattern arrow_config auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_bias
    lora_dropout megatron_config megatron_core modules_to_save peft_type peft_version qalora_group_size r
    rank_pattern revision target_modules task_type use_dora use_rslora runtime_config eva_config corda_config
    lora_ga_config velora_config kind quantization modules_to_tie target_modules_to_tie enable_lora
    target_parameters trainable_token_indices merge_weights quantize_aware
    """.split()
)
# starts that take something out of the base: the adapter fits only the rest, which is not what a checkpoint holds
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Put a tensor into the adapter where it is a part of one, besides the pairs on linears."""
    if match := _EMBEDDING.match(clean):
        adapter.parts.setdefault(match["module"], {})[match["half"]] = stored
    elif match := _MAGNITUDE.match(clean):
        adapter.magnitudes[match["module"]] = stored
    elif match := _BIAS.match(clean):
        adapter.biases[match["module"]] = stored
    elif _LONE.match(clean):
        adapter.lone.append(stored)
    else:
        return False
    return True


def finish(adapter: Adapter) -> None:
    """Pair the halves over embeddings; one without the other stands alone."""
    for module, halves in adapter.parts.items():
        if len(halves) == 2:
            adapter.embeddings[module] = (halves["A"], halves["B"])
        else:
            adapter.lone += halves.values()
    adapter.parts = {}


def spoken(adapter: Adapter) -> str:
    """Return LoRA, rsLoRA, DoRA or rsDoRA, with the rank.

    An adapter with several ranks says the range.
    """
    ranks = sorted({adapter.rank(m) for m in (*adapter.pairs, *adapter.embeddings)})
    said = adapter.document.get("r") if adapter.document.get("target_parameters") else None
    ranks = [said] if isinstance(said, int) else ranks
    name = ("rs" if adapter.rslora else "") + ("DoRA" if adapter.magnitudes else "LoRA")
    return f"{name} r {ranks[0]}" if len(ranks) == 1 else f"{name} r {ranks[0]}..{ranks[-1]}" if ranks else name


def reason(adapter: Adapter) -> tuple[str, str | None] | None:
    """Return why what the adapter does is no sum that can be added into weights, with a hint; None where it is one."""
    given = adapter.document
    start = residual_start(adapter)
    if start is not None:
        plain = "convert it to a plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        return f"was started by {start}, which changes the base too", None if given.get("loftq_config") else plain
    if given.get("arrow_config"):
        return "chooses between experts at run time (arrow_config)", None
    return None


def _listed(value: object) -> list[object]:
    """Return what a field of the config lists; one word is a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def residual_start(adapter: Adapter) -> str | None:
    """Return the start that took something out of the base, so that the update holds it from the first step on."""
    if adapter.document.get("loftq_config"):
        return "loftq"
    start = str(adapter.document.get("init_lora_weights")).lower()
    return start if start.startswith(_RESIDUAL) else None


def refuse(adapter: Adapter) -> None:
    """Stop (A02) where pairs lack a half, a common rank or a scale, or their config says otherwise than the tensors."""
    where = adapter.view.path
    if adapter.lone:
        raise TensorkeepError(
            f"{len(adapter.lone)} halves of low-rank pairs lack the other half, first {adapter.lone[0]}",
            where=where,
            code="A02",
            tensors=adapter.lone,
            hint="get the adapter again: it was saved in part",
        )
    for module, (a, b) in {**adapter.pairs, **adapter.embeddings}.items():
        first, second = adapter.view[a].shape, adapter.view[b].shape
        if len(first) < 2 or len(second) < 2 or first[0] != second[1]:
            raise TensorkeepError(
                f"{module}: A {list(first)} and B {list(second)} have no rank in common",
                where=where,
                code="A02",
                hint="get the adapter again; its tensors are not of one training",
            )
        said = adapter.said_rank(module) or (None if "r" in adapter.document else first[0])
        if said != first[0] and not adapter.document.get("target_parameters"):  # of experts side by side: see `scale`
            raise TensorkeepError(
                f"{module} has rank {first[0]}, the config says {shown(said)}",
                where=where,
                code="A02",
                hint="take the config that was saved with these weights: the scale depends on it",
            )
        if not adapter.scale(module):
            raise _unscaled(adapter, module)
    if adapter.document.get("use_dora") and not adapter.magnitudes:
        raise TensorkeepError(
            "the config says use_dora, and no magnitude is there", where=where, code="A02", hint="get the adapter again"
        )
    absent = sorted(set(adapter.magnitudes) - set(adapter.pairs) - set(adapter.embeddings))
    if absent or (adapter.magnitudes and not adapter.document.get("use_dora", True)):
        raise TensorkeepError(
            f"DoRA magnitudes {'without a pair: ' + absent[0] if absent else 'beside use_dora: false'}",
            where=where,
            code="A02",
            hint="take the config that was saved with these weights",
        )


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the weights that pairs change, and the biases that `lora_bias` adds to."""
    wanted = {f"{m}.weight": ("pair", m) for m in adapter.pairs}
    wanted |= {f"{m}.weight": ("embedding", m) for m in adapter.embeddings}
    return wanted | {f"{m}.bias": ("bias", m) for m in adapter.biases}


def scale(adapter: Adapter, word: str, module: str, parameter: str | None = None, experts: int = 0) -> float | None:
    """Return what B A, and a bias beside it, is multiplied by.

    Args:
        adapter: the adapter.
        word: "pair", "embedding" or "bias".
        module: the module.
        parameter: the live name of the parameter that the pair is for, where it is not the module's weight.
        experts: how many experts the pair holds side by side; 0 for one weight.

    Raises:
        TensorkeepError: A02 where the pair's rank is not what the config says for it.
    """
    if word == "bias":
        return adapter.scale(module) if module in adapter.pairs else 1.0
    rank, name = adapter.rank(module), parameter or module
    said = adapter.said_rank(name) or (None if adapter.document.get("r") is not None else rank // max(experts, 1))
    if not isinstance(said, int) or said * max(experts, 1) != rank:
        many = f" for {experts} experts" if experts else ""
        raise TensorkeepError(
            f"{name} has rank {rank}{many}, the config says {shown(said)}",
            where=adapter.view.path,
            code="A02",
            hint="take the config that was saved with these weights: the scale depends on it",
        )
    found = adapter.scale(module, name, said)
    if not found:
        raise _unscaled(adapter, name)
    return found


def _unscaled(adapter: Adapter, name: str) -> TensorkeepError:
    """Make the error for a pair whose scale nothing says."""
    said = f"lora_alpha {shown(adapter.document.get('lora_alpha'))}"
    return TensorkeepError(
        f"{name} is scaled by nothing: {'no adapter_config.json is there' if adapter.unscaled else said}",
        where=adapter.view.path,
        code="A02",
        hint="put the adapter_config.json that was saved with these weights beside them",
    )


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int, ...], bool]]:
    """Return the shape of the weight that a pair was made for; [in, out] first where the config says so."""
    view = adapter.view
    if word == "bias":
        return [(view[adapter.biases[module]].shape, False)]
    a, b = (view[n].shape for n in (adapter.pairs if word == "pair" else adapter.embeddings)[module])
    if word == "embedding":
        return [((a[1], b[0]), True)]
    made = (b[0], *a[1:])
    # square ones too, as the config says
    return [*([(made[::-1], True)] if adapter.document.get("fan_in_fan_out") else []), (made, False)]


def check(term: Term, shape: tuple[int, ...]) -> None:
    """Stop (A02) where DoRA's magnitudes are not one a row of the weight (of an embedding: a column)."""
    magnitude, view = term.magnitude, term.adapter.view
    wanted = shape[1] if term.transposed else shape[0]
    if magnitude is not None and view[magnitude].elements != wanted:
        raise TensorkeepError(
            f"{term.name}: {view[magnitude].elements} magnitudes for {list(shape)}",
            where=view.path,
            code="A02",
            hint="get the adapter again",
        )


def told(term: Term) -> str:
    """Return LoRA or DoRA with rank and scale, or that a bias is added."""
    if term.kind == "bias":
        return "lora_bias"
    dora = ", DoRA" if term.magnitude else ""
    return f"r {term.adapter.rank(term.name)}, scale {term.scale:.6g}{dora}"


def variant(term: Term) -> str:
    """Return what the change is called in a report."""
    return "bias" if term.kind == "bias" else "DoRA" if term.magnitude else "LoRA"


def fixed(term: Term) -> bool:
    """Return whether the update does not depend on the weight: DoRA's does."""
    return term.kind != "bias" and term.magnitude is None


# -- the numbers ----------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """An update in float64: left [rows, r] times the scale, right [r, width]; DoRA's m, and |V| where by column."""

    left: Array
    right: Array
    magnitude: Array | None = None
    lengths: Array | None = None


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> Factors:
    """Read the factors of an update.

    A of a convolution is [r, in, *kernel], B [out, r, 1...]; of an embedding A is [r, rows], B [width, r].
    """
    adapter, view = term.adapter, term.adapter.view
    if term.kind == "bias":
        return Factors(whole(term, adapter.biases[term.name]) * term.scale, np.ones((1, 1)))
    pairs = adapter.embeddings if term.kind == "embedding" else adapter.pairs
    a, b = (adapter.array(n, keep=term.experts > 0) for n in pairs[term.name])
    a, b = (x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in (a, b))
    if term.experts and term.piece is not None and term.piece.expert is not None:
        # PEFT holds A expert by expert, B rank by rank
        rank, expert = len(a) // term.experts, term.piece.expert
        a, b = a[expert * rank : (expert + 1) * rank], b[:, expert :: term.experts]
    b = permuted(b, term.permutes)
    left, right = (a.T, b.T) if term.transposed else (b, a)
    if term.piece is not None:
        left = left[taken(term.piece.rows)]
        left, right = (right.T, left.T) if term.piece.turned else (left, right)
    left, right = left.astype(np.float64), right.astype(np.float64)
    made = Factors(np.ascontiguousarray(left) * term.scale, np.ascontiguousarray(right))
    stored = term.magnitude
    if stored is None:
        return made
    magnitude = permuted(view.array(stored).astype(np.float64).reshape(-1)[:, None], term.permutes)[:, 0]
    return made._replace(magnitude=magnitude, lengths=_lengths(made, base_rows) if term.transposed else None)


def _lengths(made: Factors, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> Array:
    """Return |V| by column, which needs a pass of its own: DoRA where the base keeps [in, out] (Conv1D, embeddings)."""
    squares = np.zeros(made.right.shape[1])
    for at, values in base_rows():
        squares += np.sum(np.square(values.astype(np.float64) + made.left[at : at + len(values)] @ made.right), axis=0)
    return np.sqrt(squares)


def change(term: Term, loaded: Factors, weights: Array, rows: slice) -> Array:
    """Return s · B A for some rows, or m · V / |V| - W for DoRA."""
    update = loaded.left[rows] @ loaded.right
    if loaded.magnitude is None:
        return np.asarray(update)
    grown = weights + update
    if term.transposed:
        return np.asarray(grown * (loaded.magnitude / loaded.lengths) - weights)
    return np.asarray(grown * (loaded.magnitude[rows] / np.sqrt(np.sum(grown * grown, axis=1)))[:, None] - weights)
