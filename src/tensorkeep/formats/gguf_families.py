"""What GGUF's metadata says, and what llama.cpp assumes, of gemma, gemma2, gemma3 (text) and phi3.

gemma's gains are stored as 1 + weight (the naming's table does it); its layers that see a window only follow a fixed
pattern, and the scale of its queries the number of layers. phi3's factors of RoPE's frequencies, for short and for long
texts, are tensors of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError

ACTIVATION = "gelu_pytorch_tanh"
GEMMAS = ("gemma", "gemma2", "gemma3_text")
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
LOCAL_THETA = 10000.0  # of gemma3's layers with a window
_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # the last layer of each period sees everything
_BY_WIDTH = {("gemma2", 46), ("gemma3_text", 62)}  # the 27B models, whose queries are scaled by hidden size over heads


def unsaid(what: str) -> TensorkeepError:
    """Return the error for a config that asks for what the metadata cannot say.

    Args:
        what: it asks for.
    """
    return TensorkeepError(
        f"config.json asks for {what}, which GGUF's metadata cannot say for this model type",
        code="C03",
        hint="llama.cpp would compute another model; keep hf, dcp or pth",
    )


def layer_types(kind: str, layers: int) -> list[str] | None:
    """Return what each layer sees, as llama.cpp has it for a model type; None where all see everything.

    Args:
        kind: transformers' model type.
        layers: how many there are.
    """
    period = _PERIOD.get(kind)
    if period is None:
        return None
    return ["full_attention" if (n + 1) % period == 0 else "sliding_attention" for n in range(layers)]


def query_scale(kind: str, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """Return the number whose root llama.cpp divides the queries by.

    Args:
        kind: transformers' model type.
        layers: how many there are.
        hidden: the width of the model.
        heads: how many there are.
        head_dim: the size of one.
    """
    return hidden // heads if (kind, layers) in _BY_WIDTH else head_dim


def refuse_gemma(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Stop where a gemma's config asks for what llama.cpp computes otherwise.

    Args:
        config: as config.json has it.
        sizes: what the metadata says of the model: counts and widths.

    Raises:
        TensorkeepError: C03, with the first such field.
    """
    kind = str(config.get("model_type"))
    layers, hidden, heads = sizes["block_count"], sizes["embedding_length"], sizes["attention.head_count"]
    scale = query_scale(kind, layers, hidden, heads, sizes["attention.key_length"])
    assumed: dict[str, Any] = {
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "layer_types": layer_types(kind, layers),
        "query_pre_attn_scalar": scale if kind != "gemma" else None,
        "rope_local_base_freq": LOCAL_THETA,
    }
    if kind == "gemma3_text":
        assumed |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    for key, value in assumed.items():
        given = config.get(key)
        if given is not None and given != value:
            raise unsaid(f"{key} {str(given)[:60]}")


def gemma_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what only some gemmas have: the window, and where scores are capped.

    Args:
        config: as config.json has it.

    Returns:
        The entries, without the architecture's name before them.

    Raises:
        TensorkeepError: C03 where the config lacks one that llama.cpp reads.
    """
    kind = config.get("model_type")
    out: dict[str, Any] = {}
    if kind in _PERIOD:
        window = config.get("sliding_window")
        if type(window) is not int or window <= 0:
            raise unsaid(f"sliding_window {str(window)[:40]}")
        out["attention.sliding_window"] = window
    if kind == "gemma2":
        for key, entry in (("attn_logit_softcapping", "attn"), ("final_logit_softcapping", "final")):
            value = config.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
                raise unsaid(f"{key} {str(value)[:40]}")
            out[f"{entry}_logit_softcapping"] = float(value)
    return out


def gemma_config(kind: str, fields: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Make the config's entries that only gemmas have.

    Args:
        kind: transformers' model type.
        fields: the metadata, `gguf_config.Fields`.
        sizes: `num_hidden_layers`, `hidden_size`, `num_attention_heads` and `head_dim`.

    Raises:
        TensorkeepError: C03 where the file does not say its window or caps: another model's would be computed.
    """
    if kind not in GEMMAS:
        return {}
    out: dict[str, Any] = {"hidden_act": ACTIVATION, "hidden_activation": ACTIVATION}
    _refuse_pattern(kind, fields, sizes["num_hidden_layers"])
    if kind in _PERIOD:
        layers = sizes["num_hidden_layers"]
        width = (sizes["hidden_size"], sizes["num_attention_heads"], sizes["head_dim"])
        out["query_pre_attn_scalar"] = query_scale(kind, layers, *width)
        out["sliding_window"] = fields.whole("attention.sliding_window")
        out["layer_types"] = layer_types(kind, layers)
    if kind == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            out[key] = fields.number(key)
    if kind == "gemma3_text":
        cap = fields.number("final_logit_softcapping", 0.0)
        out |= {"attn_logit_softcapping": None, "final_logit_softcapping": cap or None}
        out["rope_local_base_freq"] = local_theta(fields)
    return out


def local_theta(fields: Any) -> float:
    """Return RoPE's base in the layers that see a window: what the metadata says, or else what llama.cpp assumes.

    Args:
        fields: the metadata, `gguf_config.Fields`.
    """
    value: float = fields.number("rope.freq_base_swa", LOCAL_THETA, 1.0)
    return value


def _refuse_pattern(kind: str, fields: Any, layers: int) -> None:
    """Stop where the metadata has its windows in other layers than this model type's, or with a RoPE of their own."""
    given, assumed = fields.get("attention.sliding_window_pattern"), layer_types(kind, layers) or []
    windowed = [what == "sliding_attention" for what in assumed]
    if type(given) is int and given > 0:
        given = [(n + 1) % given != 0 for n in range(layers)]
    if given is not None and (not isinstance(given, list) or [bool(g) for g in given] != windowed):
        raise TensorkeepError(f"its windows lie in other layers than {kind}'s", code="C03")
    own, usual = fields.get("rope.freq_base_swa"), fields.number("rope.freq_base", LOCAL_THETA, 1.0)
    if kind == "gemma2" and own is not None and own != usual:
        raise TensorkeepError("its layers with a window have a RoPE of their own, which gemma2 has not", code="C03")


def refuse_windows(kind: str, fields: Any) -> None:
    """Stop at a window that llama.cpp computes with and the model type has not: OLMo 3 is written as OLMo 2 with one.

    Args:
        kind: transformers' model type.
        fields: the metadata, `gguf_config.Fields`.

    Raises:
        TensorkeepError: C03 where the file says one.
    """
    if kind == "olmo2" and fields.whole("attention.sliding_window", 0, 0):
        raise TensorkeepError("some layers see a window, as in OLMo 3, for which there is no table here", code="C03")


def attention_factor(longest: int, original: int) -> float:
    """Return what LongRoPE multiplies cosine and sine by, as transformers and llama.cpp's converter compute it.

    Args:
        longest: the longest text.
        original: the longest text of the first training.
    """
    scale = longest / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def long_factors(rope: Mapping[str, Any], count: int) -> dict[str, list[float]]:
    """Return the two tensors of LongRoPE's factors, by name.

    Args:
        rope: the config's RoPE parameters.
        count: how many factors each must have.

    Raises:
        TensorkeepError: C03 where a list is missing or of another length.
    """
    out = {}
    for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
        values = rope.get(key)
        sound = isinstance(values, Sequence) and len(values) == count
        if not sound or not all(type(v) in (int, float) and 0 < v < 1e6 for v in values or ()):
            raise unsaid(f"{key} that is no list of {count} numbers")
        out[name] = [float(v) for v in values or ()]
    return out
