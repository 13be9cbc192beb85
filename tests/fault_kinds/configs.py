"""Faults of the files beside the weights: config.json and the tokenizer (C)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.fault_kinds.change import Change, kind
from tests.specimens import Specimen

Rng = np.random.Generator
HF = ("hf", "hf-sharded")


def reconfigured(m: Specimen, **own: Any) -> Change:
    return Change(m.tensors, config={**m.config, **own}, forms=HF, note=str(own))


@kind("C01")
def rope_theta(m: Specimen, rng: Rng) -> Change | None:
    theta = float(rng.choice([1e4, 1e6]))
    old = m.config.get("rope_parameters", {}).get("rope_theta")
    if old is None or old == theta:
        return None
    own: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return reconfigured(m, **own, **({"rope_theta": theta} if "rope_theta" in m.config else {}))


@kind("C01")
def rope_scaling(m: Specimen, rng: Rng) -> Change | None:
    if not m.language:
        return None
    own = {**m.config["rope_parameters"], "rope_type": "linear", "factor": float(rng.choice([2.0, 4.0]))}
    return reconfigured(m, rope_parameters=own)


@kind("C01")
def norm_epsilon(m: Specimen, rng: Rng) -> Change | None:
    word = "rms_norm_eps" if m.language else "layer_norm_eps"
    return reconfigured(m, **{word: 1e-2})


@kind("C01")
def activation(m: Specimen, rng: Rng) -> Change | None:
    return reconfigured(m, hidden_act="relu")


@kind("C01")
def heads(m: Specimen, rng: Rng) -> Change | None:
    if m.config.get("head_dim"):
        return None  # the shapes would show it
    count = m.config["num_attention_heads"]
    if m.language and m.config["num_key_value_heads"] == count:
        return reconfigured(m, num_attention_heads=count // 2, num_key_value_heads=count // 2)
    return reconfigured(m, num_attention_heads=count // 2) if not m.language else None


@kind("C01", "K01", "T01")
def tie(m: Specimen, rng: Rng) -> Change | None:
    if not m.language:
        return None
    change = reconfigured(m, tie_word_embeddings=not m.tied)
    change.also = ("C01", "K01", "K07", "T01")
    return change


@kind("C01")
def vocabulary_size(m: Specimen, rng: Rng) -> Change | None:
    return reconfigured(m, vocab_size=m.config["vocab_size"] + 128) if m.language else None


@kind("C01")
def experts_chosen(m: Specimen, rng: Rng) -> Change | None:
    return reconfigured(m, num_experts_per_tok=1) if m.config.get("num_experts") else None


@kind("C02")
def tokenizer_too_large(m: Specimen, rng: Rng) -> Change | None:
    if not m.language:
        return None
    vocab = {f"<w{i}>": i for i in range(m.config["vocab_size"] + 7)}
    document = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    return Change(m.tensors, forms=HF, lax=True, companions={"tokenizer.json": json.dumps(document).encode()})


@kind("C03")
def config_missing(m: Specimen, rng: Rng) -> Change | None:
    return Change(m.tensors, keep_config=False, forms=("hf", "hf-sharded", "pth"), lax=True)


@kind("C04")
def config_of_another_era(m: Specimen, rng: Rng) -> Change | None:
    """rope_theta at the top and no rope_parameters, with another theta in effect for whoever reads the other field."""
    if not m.language or "rope_theta" in m.config:
        return None
    config = {k: v for k, v in m.config.items() if k != "rope_parameters"}
    config |= {"rope_theta": m.config["rope_parameters"]["rope_theta"], "transformers_version": "4.57.3"}
    return Change(m.tensors, config=config, forms=HF, lax=True)
