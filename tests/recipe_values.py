"""Hypothesis strategies for the sections that both kinds of recipe share, and for texts that YAML reads otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

from tensorkeep.training.sections import GroupRule, OptimizerConfig, ScheduleConfig, TrainingConfig

T = TypeVar("T", bound=TrainingConfig)
# what YAML takes for something else, or drops, unless it is written with care
WORDS = (
    "null ~ yes No on true 1e3 1_000 0x1f 0o7 1:30 .inf .nan 2024-01-01 = << *a &a !a %a @a `a a: # ' \" \\ {a [a | >"
)
SPACED = ("", " ", " a", "a ", "- a", "a: b", "a #b", "\t", "\n", "a\nb", "a\n\n", "\r", "a\r\nb")
UNSEEN = ("\x85", "a\x85b", "\u2028", "a\u2029", "\ufeff", "\U0001f600")
ODD = (*WORDS.split(), *SPACED, *UNSEEN)
texts = st.one_of(st.sampled_from(ODD), st.text(st.characters(codec="utf-8"), max_size=12))
counts = st.integers(1, 2**40)
positive = st.floats(0, 1e300, exclude_min=True)
rates = st.floats(0, 1e3)
shares = st.floats(0, 1)

# what a forward pass leaves for the backward: said field by field, or by one word
KEPT_BY_HAND = {
    "gradient_checkpointing": st.booleans(),
    "kept": st.sampled_from(["input", "narrow", "products"]),
    "memory": st.none(),
    "memory_limit_gib": st.none(),
}
KEPT_BY_MEMORY = {
    "gradient_checkpointing": st.just(False),
    "kept": st.just("input"),
    "memory": st.sampled_from(["least", "balanced", "most"]),
    "memory_limit_gib": st.none(),
}
KEPT_BY_LIMIT = KEPT_BY_MEMORY | {"memory": st.none(), "memory_limit_gib": positive}


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


def several(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(strategy, max_size=3).map(tuple)


@st.composite
def trainings(draw: st.DrawFn, kind: type[T], refused: Sequence[str]) -> T:
    """A section `training` with every field drawn but those that the kind of run refuses."""
    micro, by_epochs, best = draw(st.integers(1, 64)), draw(st.booleans()), draw(optional(st.just("-loss")))
    values: dict[str, Any] = {
        "updates": None if by_epochs else draw(counts),
        "epochs": draw(positive) if by_epochs else None,
        "batch_size": micro * draw(counts),
        "micro_batch": draw(optional(st.just(micro))),
        "seed": draw(st.integers()),
        "workers": draw(st.integers(0, 99)),
        "precision": draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        "clip": draw(optional(positive)),
        "ema": draw(optional(st.floats(0, 1, exclude_max=True))),
        "quantize_backbone": draw(st.sampled_from([None, "nf4", "fp4", "int8"])),
        "quantize_compute": None,  # asks for more than one section holds
        "pretrained": draw(optional(texts)),
        **draw(st.one_of(*map(st.fixed_dictionaries, (KEPT_BY_HAND, KEPT_BY_MEMORY, KEPT_BY_LIMIT)))),
        "compile": draw(st.booleans()),
        "graph": draw(st.booleans()),
        "deterministic": draw(st.booleans()),
        "parallel": "ddp",
        "replicas": draw(counts),
        "unit": draw(st.sampled_from(["updates", "epochs"])),
        "log_every": draw(counts),
        "save_every": draw(optional(counts)),
        "evaluate_every": draw(optional(counts)),
        "evaluate_from": draw(st.integers(0, 9)),
        "keep_last": draw(counts),
        "keep_every": draw(optional(counts)),
        "background": draw(optional(st.booleans())),
        "best": best,
        "patience": None if best is None else draw(optional(counts)),
        "watchdog": draw(optional(positive)),
        "trackers": draw(several(st.sampled_from(["tensorboard", "wandb"]))),
    }
    assert values.keys() == {field.name for field in dataclasses.fields(TrainingConfig)}
    return kind(**{name: value for name, value in values.items() if name not in refused})


optimizers = st.builds(
    OptimizerConfig,
    rates,
    rates,
    st.tuples(shares, shares),
    rates,
    st.booleans(),
    several(st.builds(GroupRule, texts, rates, optional(rates))),
)
schedules = st.builds(
    ScheduleConfig,
    st.sampled_from(["cosine", "constant", "wsd", "opentad"]),
    st.sampled_from(["updates", "epochs"]),
    rates,
    rates,
    shares,
    rates,
    optional(positive),
)
