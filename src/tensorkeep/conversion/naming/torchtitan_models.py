"""Tables of torchtitan 0.3 for deepseek_v3, gpt_oss, kimi, qwen3_5 and muse_glimmer, after its models and adapters.

Where a model of 0.3.0 and its own adapter differ, the model is followed, since its names and shapes are what a
checkpoint holds: gpt_oss's experts are called `mlp1_weight_EGD` there and its adapter looks for `mlp1_weight`, and
qwen3_5's adapter turns stacked experts that transformers and the model both keep as [experts, outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.conversion.naming.table import Cut, Row

_INNER = "layers.{n}.moe.routed_experts.inner_experts."
_WAYS = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
_NORMS = (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))


def _ends(text: str, head: str) -> list[Row]:
    """Return the rows outside of the layers."""
    return [
        Row("tok_embeddings", f"{text}embed_tokens"),
        Row("norm", f"{text}norm"),
        Row("lm_head", head),
    ]


def _layer(text: str, pairs: Mapping[str, str]) -> list[Row]:
    """Return the rows of one layer's modules, hf's names below `text`."""
    return [Row(f"layers.{{n}}.{own}", f"{text}layers.{{n}}.{hf}") for own, hf in pairs.items()]


# -- deepseek_v3, and kimi's text ------------------------------------------------------------------------------------

_LATENT = {
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wq": "self_attn.q_proj",
    "attention.wo": "self_attn.o_proj",
    "moe.router.gate": "mlp.gate",
    **{f"feed_forward.{own}": f"mlp.{hf}" for own, hf in _WAYS},
    **{f"moe.shared_experts.{own}": f"mlp.shared_experts.{hf}" for own, hf in _WAYS},
    **dict(_NORMS),
}
# of the layers that predict further tokens, which hf counts on after the others
_FURTHER = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "mtp_norm": "shared_head.norm"}


def _latent(text: str) -> list[Row]:
    """Return the rows of deepseek's layers."""
    return [
        Row("layers.{n}.moe.expert_bias_E", f"{text}layers.{{n}}.mlp.gate.e_score_correction_bias", exact=True),
        *_layer(text, _LATENT),
        *(
            Row(f"{_INNER}{own}", f"{text}layers.{{n}}.mlp.experts.{{e}}.{hf}", stacked=True)
            for own, hf in (("w1_EFD", "gate_proj"), ("w3_EFD", "up_proj"), ("w2_EDF", "down_proj"))
        ),
    ]


DEEPSEEK_V3 = [*_latent("model."), *_ends("model.", "lm_head")]


def further(rows: Sequence[Row], layers: int, count: int) -> list[Row]:
    """Return a table with the rows of the layers that predict further tokens before its own.

    Args:
        rows: the table.
        layers: how many layers come before them; hf counts on, torchtitan begins at 0.
        count: how many there are.
    """
    text = next(r.hf for r in rows if r.own == "norm").removesuffix("norm")
    templates = [r for r in rows if r.own.startswith("layers.")]
    templates += [Row(f"layers.{{n}}.{own}", f"{text}layers.{{n}}.{hf}") for own, hf in _FURTHER.items()]
    return [
        *(
            r._replace(
                own=r.own.replace("layers.{n}.", f"mtp_layers.{number}.", 1),
                hf=r.hf.replace("{n}", str(layers + number)),
            )
            for number in range(count)
            for r in templates
        ),
        *rows,
    ]


# -- towers that see -------------------------------------------------------------------------------------------------

_BLOCK = ("norm1", "norm2", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")


def _tower(hf: str, names: Sequence[str], qkv: str) -> list[Row]:
    """Return the rows of a tower's blocks, whose q, k and v are one tensor in hf."""
    own = "vision_encoder.layers.{n}."
    return [
        *(Row(f"{own}{mine}", f"{hf}{theirs}") for mine, theirs in zip(_BLOCK, names, strict=True)),
        *(Row(f"{own}attn.w{w}", f"{hf}{qkv}", piece=Cut("thirds", i)) for i, w in enumerate("qkv")),
    ]


_KIMI_TOWER = "vision_tower."
KIMI = [
    *_latent("language_model.model."),
    *_ends("language_model.model.", "language_model.lm_head"),
    *_tower(f"{_KIMI_TOWER}encoder.blocks.{{n}}.", ("norm0", "norm1", "wo", "mlp.fc0", "mlp.fc1"), "wqkv"),
    Row("vision_encoder.pos_embed", f"{_KIMI_TOWER}patch_embed.pos_emb.weight", exact=True),
    Row(
        "vision_encoder.patch_embed.weight",
        f"{_KIMI_TOWER}patch_embed.proj.weight",
        exact=True,
        flat="patch",
        scope="vision_config",
    ),
    Row("vision_encoder.patch_embed", f"{_KIMI_TOWER}patch_embed.proj"),
    Row("vision_encoder.final_norm", f"{_KIMI_TOWER}encoder.final_layernorm"),
    Row("vision_encoder.projector.pre_norm", "mm_projector.pre_norm"),
    Row("vision_encoder.projector.linear_1", "mm_projector.proj.0"),
    Row("vision_encoder.projector.linear_2", "mm_projector.proj.2"),
]
# Kimi-VL's folders call the projector otherwise
KIMI_VL = [
    r._replace(hf=r.hf.replace("mm_projector", "multi_modal_projector").replace("proj.0", "linear_1"))
    for r in (row._replace(hf=row.hf.replace("mm_projector.proj.2", "mm_projector.linear_2")) for row in KIMI)
]

# -- gpt_oss ---------------------------------------------------------------------------------------------------------

_GPT = {
    **{f"attention.qkv_linear.w{w}": f"self_attn.{w}_proj" for w in "qkv"},
    "attention.wo": "self_attn.o_proj",
    "moe.router.gate": "mlp.router",
    **dict(_NORMS),
}
_GPT_EXPERTS = (
    ("mlp1_weight_EGD", "gate_up_proj", True),
    ("mlp1_bias_EG", "gate_up_proj_bias", False),
    ("mlp2_weight_EDF", "down_proj", True),
    ("mlp2_bias_ED", "down_proj_bias", False),
)
GPT_OSS = [
    Row("layers.{n}.attention.sinks", "model.layers.{n}.self_attn.sinks", exact=True),
    *_layer("model.", _GPT),
    *(
        Row(f"{_INNER}{own}", f"model.layers.{{n}}.mlp.experts.{hf}", exact=True, turned=turned)
        for own, hf, turned in _GPT_EXPERTS
    ),
    *_ends("model.", "lm_head"),
]

# -- qwen3_5 ---------------------------------------------------------------------------------------------------------

_QWEN = {
    **{f"attn.w{w}": f"self_attn.{w}_proj" for w in "qkvo"},
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    **{f"attn.{name}": f"linear_attn.{name}" for name in ("in_proj_z", "in_proj_a", "in_proj_b", "norm", "out_proj")},
    **{f"feed_forward.{own}": f"mlp.{hf}" for own, hf in _WAYS},
    "moe.router.gate": "mlp.gate",
    **{f"moe.shared_experts.{own}": f"mlp.shared_expert.{hf}" for own, hf in _WAYS},
    "moe.shared_experts.gate": "mlp.shared_expert_gate",
    **dict(_NORMS),
}


def _qwen(text: str) -> list[Row]:
    """Return the rows of qwen3_5's text."""
    at = f"{text}layers.{{n}}."
    experts = f"{at}mlp.experts.gate_up_proj"
    return [
        *(Row(f"layers.{{n}}.attn.{name}", f"{at}linear_attn.{name}", exact=True) for name in ("A_log", "dt_bias")),
        *(
            Row(f"layers.{{n}}.attn.{own}{w}", f"{at}linear_attn.{hf}", piece=Cut("delta net", i))
            for own, hf in (("in_proj_", "in_proj_qkv"), ("conv_", "conv1d"))
            for i, w in enumerate("qkv")
        ),
        *_layer(text, _QWEN),
        Row(f"{_INNER}w1_EFD", experts, exact=True, piece=Cut("halves", 0, 1)),
        Row(f"{_INNER}w3_EFD", experts, exact=True, piece=Cut("halves", 1, 1)),
        Row(f"{_INNER}w2_EDF", f"{at}mlp.experts.down_proj", exact=True),
        *_ends(text, "lm_head"),
    ]


_QWEN_BLOCKS = "model.visual.blocks.{n}."
QWEN3_5 = [
    *_qwen("model.language_model."),
    *_tower(_QWEN_BLOCKS, _BLOCK, "attn.qkv"),
    Row("vision_encoder.pos_embed", "model.visual.pos_embed.weight", exact=True),
    Row(
        "vision_encoder.patch_embed.weight",
        "model.visual.patch_embed.proj.weight",
        exact=True,
        flat="video patch",
        scope="vision_config",
    ),
    Row("vision_encoder.patch_embed", "model.visual.patch_embed.proj"),
    *(Row(f"vision_encoder.merger.{n}", f"model.visual.merger.{n}") for n in ("norm", "linear_fc1", "linear_fc2")),
]
QWEN3_5_TEXT = _qwen("model.")

# -- muse_glimmer ----------------------------------------------------------------------------------------------------

_MUSE = "model.language_model.layers.{n}."
_MUSE_TOWER = "model.vision_tower."
_SEES = "vision_config"
MUSE_GLIMMER = [
    Row("tok_embeddings.embedding", "model.language_model.embed_tokens"),
    *(Row(f"layers.{{n}}.attention.qkv_linear.w{w}", f"{_MUSE}self_attn.{w}_proj", rope=w != "v") for w in "qkv"),
    Row("layers.{n}.attention.wo", f"{_MUSE}self_attn.o_proj"),
    Row("layers.{n}.attention.o_gate", f"{_MUSE}self_attn.gate_proj"),
    *(Row(f"layers.{{n}}.feed_forward.{own}", f"{_MUSE}mlp.{hf}") for own, hf in _WAYS),
    Row("layers.{n}.attention_norm", f"{_MUSE}input_layernorm"),
    Row("layers.{n}.post_attention_norm", f"{_MUSE}post_attention_layernorm"),
    Row("layers.{n}.ffn_norm", f"{_MUSE}pre_feedforward_layernorm"),
    Row("layers.{n}.post_ffn_norm", f"{_MUSE}post_feedforward_layernorm"),
    Row("norm", "model.language_model.norm"),
    Row("lm_head", "lm_head"),
    Row("vision_encoder.conv1_linear", f"{_MUSE_TOWER}patch_embedder.patch_embedding"),
    Row(
        "vision_encoder.positional_embedding_vlm",
        f"{_MUSE_TOWER}patch_embedder.position_embedding_table.weight",
        exact=True,
    ),
    *(Row(f"vision_encoder.{n}", f"{_MUSE_TOWER}{n}") for n in ("ln_pre", "ln_post")),
    *(
        Row(
            f"vision_encoder.layers.{{n}}.attn.w{w}",
            f"{_MUSE_TOWER}layers.{{n}}.attn.{w}_proj",
            rope=w != "v",
            scope=_SEES,
        )
        for w in "qkv"
    ),
    *(
        Row(f"vision_encoder.layers.{{n}}.{own}", f"{_MUSE_TOWER}layers.{{n}}.{hf}")
        for own, hf in zip(_BLOCK, ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"), strict=True)
    ),
    Row("vision_adapter.c_fc", "model.vision_adapter.fc1"),
    Row("vision_adapter.c_proj", "model.vision_adapter.fc2"),
    Row("vision_projection", "model.vision_projection"),
]

FAMILIES = {
    "deepseek_v3": DEEPSEEK_V3,
    "kimi": KIMI,
    "kimi_vl": KIMI_VL,
    "gpt_oss": GPT_OSS,
    "qwen3_5": QWEN3_5,
    "qwen3_5_text": QWEN3_5_TEXT,
    "muse_glimmer": MUSE_GLIMMER,
}
MODEL_TYPES = {
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "kimi",
    "kimi_vl": "kimi_vl",
    "gpt_oss": "gpt_oss",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_5_text": "qwen3_5_text",
    "qwen3_5_moe_text": "qwen3_5_text",
    "muse_glimmer": "muse_glimmer",
}


def further_layers(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """Return how many layers a deepseek has, and how many that predict further tokens come after them; 0 for unknown.

    Args:
        config: as config.json has it, with the text model's in `text_config` or not.
    """
    nested = (config or {}).get("text_config")
    text = nested if isinstance(nested, Mapping) else config or {}
    layers, count = (text.get(k) for k in ("num_hidden_layers", "num_nextn_predict_layers"))
    return (layers, count) if isinstance(layers, int) and isinstance(count, int) and 0 <= count <= 64 else (0, 0)
