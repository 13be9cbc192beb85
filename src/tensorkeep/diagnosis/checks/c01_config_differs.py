"""C01 config differs: a field that changes what the model computes is not the reference's, or not the weights'.

What it means
    RoPE's theta or scaling, eps, heads, head size, activation, tie, vocabulary, number of experts used or attention
    windows differ. Spellings of transformers 4 and 5 count as equal; dtype, cache and version fields do not count.
    Or a field has a type that it cannot have (text for a number): transformers refuses to load it, and nothing is
    computed with it here.

How it happens
    The config of a similar model was copied; a default filled in what was not written; a program has its own table of
    sizes (torchtitan's llama3 1B and 3B have RoPE factor 8 where Llama 3.2 says 32).

How it shows
    Every tensor is equal, and the loss is not. Theta 1e4 for 1e5: +0.1 in short texts, more in long ones. Linear
    scaling by 4: +1.7. gelu for silu: +1.2. eps 1e-2: +0.4. Another number of heads: +6.

What to do
    Take the reference's config.json, unless the change is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.config_fields import against_shapes, differences
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.errors import TensorkeepError, shown, word
from tensorkeep.findings import Finding
from tensorkeep.formats.config_types import odd_fields
from tensorkeep.formats.view import StateView
from tensorkeep.storage.budget import check_config
from tensorkeep.storage.certificate import parse_json

CODE = "C01"


def check(case: Case) -> Iterator[Finding]:
    """Report fields that differ from the reference's config, and those that the weights contradict."""
    yield from case.from_reading(CODE)
    if case.view is not None:
        yield from _odd(case.view)
    if case.config is None or case.view is None:
        return
    found: dict[str, tuple[Any, Any]] = {}
    against = "the weights"
    shapes = {n: h.shape for n, h in case.tensors.items() if n not in case.packed}
    for field, sides in against_shapes(case.config, shapes).items():
        if field in ("vocab_size", "hidden_size") and _has_this_embedding(case, shapes):
            continue
        # a field that the reference's config has as well is right, and other checks say what is wrong with the weights
        if not _explained(case, field) and (
            case.reference_config is None or case.reference_config.get(field) != case.config.get(field)
        ):
            found[field] = sides
    if case.reference_config is not None:
        against = "the reference's" if not found else "the weights and the reference's"
        found |= {k: v for k, v in differences(case.config, case.reference_config).items() if not _explained(case, k)}
    if not found:
        yield from _unbelievable(case.config)
        return
    told = ", ".join(f"{k} {shown(mine)} (is {shown(theirs)})" for k, (mine, theirs) in list(found.items())[:4])
    copy = (
        f"cp {word(case.reference.path + '/config.json')} {word(case.path)}/"
        if case.reference is not None and case.reference_config is not None
        else None
    )
    message = f"config.json differs from {against} in {len(found)} fields: {told}"
    evidence = {"fields": {k: {"config": mine, "expected": theirs} for k, (mine, theirs) in found.items()}}
    yield Finding(CODE, "error", message, (), evidence, explains=["C02"], fix=copy)


def _odd(view: StateView) -> Iterator[Finding]:
    """Report fields of a type that they cannot have; nothing here believed them."""
    config = next((c for c in view.companions if c.name == "config.json"), None)
    document = parse_json(config.data, config.where) if config is not None else {}
    odd = list(odd_fields(document)) if isinstance(document, dict) else [("all of it", document, "an object")]
    if odd:
        told = ", ".join(f"{name} is {shown(value)}, not {wanted}" for name, value, wanted in odd[:4])
        evidence = {"fields": {name: {"config": shown(value), "expected": wanted} for name, value, wanted in odd}}
        yield Finding(CODE, "error", f"config.json cannot be loaded: {told}", (), evidence)


def _has_this_embedding(case: Case, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Say whether the config's own model has the stored embedding's shape: Mllama's has eight rows more."""
    return case.names is not None and case.names.file.get(hf.EMBEDDING) == shapes[hf.EMBEDDING]


def _unbelievable(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Report numbers of a model that nobody has: no other check builds it to compare.

    How much is stored says nothing: an adapter, a value head or a projector lies beside the config of its base.
    """
    try:
        check_config(config, "config.json")
    except TensorkeepError as error:
        yield Finding(CODE, "error", f"config.json cannot be loaded: {error.what}", (), fix=error.hint)


def _explained(case: Case, field: str) -> bool:
    """Say whether another check explains a difference in this field."""
    return f"config:{field}" in case.claims


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Take the reference's config."""
    out.companions.add("config.json")
    out.done[CODE] = "took the reference's"
