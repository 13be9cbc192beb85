"""Find out whether a model in memory was built from another config than its checkpoint's (C01, C04)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tensorkeep.findings import Finding
from tensorkeep.models.buffers import transformers_roots

# what changes the numbers a model computes while every tensor keeps its shape
_FIELDS = (
    "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act rms_norm_eps layer_norm_eps tie_word_embeddings attention_bias sliding_window "
    "num_experts_per_tok norm_topk_prob partial_rotary_factor attention_multiplier logit_scale "
    "final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar"
).split()


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that change results, in one spelling for transformers 4 and 5.

    >>> canonical({"rope_theta": 5e5}) == canonical({"rope_parameters": {"rope_theta": 5e5}})
    True
    """
    out = {f: config[f] for f in _FIELDS if config.get(f) is not None}
    nested = config.get("rope_parameters") or config.get("rope_scaling")
    rope: dict[str, Any] = dict(nested) if isinstance(nested, Mapping) else {}
    if any(isinstance(v, Mapping) for v in rope.values()):
        return out  # one set a kind of layer (Gemma 3): compared by its buffers
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    if theta is not None:
        out["rope_theta"] = float(theta)
    kind = rope.pop("rope_type", None) or rope.pop("type", None)
    if kind not in (None, "default"):
        out |= {
            "rope_type": kind,
            **{f"rope_{k}": v for k, v in rope.items() if isinstance(v, (int, float)) and k != "type"},
        }
    heads, hidden = out.get("num_attention_heads"), out.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        out.setdefault("head_dim", hidden // heads)
        out.setdefault("num_key_value_heads", heads)
    return out


def config_findings(model: nn.Module, config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Report the fields in which a transformers model's own config is not the checkpoint's."""
    root = next((root for _, root in transformers_roots(model)), None)
    own = getattr(root, "config", None)
    if config is None or own is None or "model_type" not in config:
        return
    mine, theirs = canonical(own.to_dict()), canonical(config)
    odd = {f: (mine.get(f), theirs[f]) for f in theirs if f in mine and not _alike(mine[f], theirs[f])}
    classes = config.get("architectures")
    if isinstance(classes, list) and type(root).__name__ in classes:
        odd.pop("model_type", None)  # transformers runs some kinds with another kind's class (InternLM3 with Llama's)
    if "rope_type" in theirs and "rope_type" not in mine:
        odd["rope_type"] = (None, theirs["rope_type"])
    if "rope_type" in mine and "rope_type" not in theirs:
        odd["rope_type"] = (mine["rope_type"], None)
    if not odd:
        return
    said = ", ".join(f"{f} {a!r} instead of {b!r}" for f, (a, b) in odd.items())
    newer = "rope_parameters" in config and "rope_theta" not in config and not hasattr(own, "rope_parameters")
    if newer and "rope_theta" in odd:
        message = f"the config was written by transformers 5 and read by 4, which does not know rope_parameters: {said}"
        evidence = {f: {"model": a, "checkpoint": b} for f, (a, b) in odd.items()}
        yield Finding("C04", "error", message, [], evidence, explains=("C01",))
        return
    message = f"the model was built from another config than the checkpoint's: {said}"
    yield Finding("C01", "error", message, [], {f: {"model": a, "checkpoint": b} for f, (a, b) in odd.items()})


def _alike(a: Any, b: Any) -> bool:
    """Say whether two values are equal, numbers up to rounding."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return abs(a - b) <= 1e-5 * max(abs(a), abs(b))
    return bool(a == b)
