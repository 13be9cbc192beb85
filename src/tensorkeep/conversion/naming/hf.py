"""Naming `hf`: transformers' names, through which every other naming goes. Names stay as they are.

A detector has no transformers class: its `hf` names are those of `tensorkeep.detection` (DETECTOR).
"""

from __future__ import annotations

import re

NAME = "hf"
LOADERS = ("hf", "flame", "torchtitan")

# how transformers' models begin their names; a name that fits none may still be a Hugging Face model's
KNOWN = re.compile(
    r"model\.(embed_tokens|norm|rotary_emb|\w+norm\w*|layers\.\d+\.(?!attention\.)\w+)\."
    r"|(model\.)?(language_model|visual|vision_tower|vision_model|multi_modal_projector)\."
    r"|model\.(decoder|encoder|shared)\.|lm_head\.|score\."
    r"|transformer\.(wte|wpe|h\.\d+|ln_f)\.|gpt_neox\.|backbone\.layers\."
    r"|(bert|roberta|distilbert|vit|videomae|deit|dinov2|clip|t5|encoder|decoder|embeddings)\.(embeddings|encoder|layer|block|\w+)\."
)
# tensors and modules of `tensorkeep.detection`
PROJECTION = r"projection\.(proj|embed|stem|branch)\.\d+\b"
HEAD_PARTS = r"((cls(_start|_end)?_convs|reg_convs|scale)\.\d+|cls(_start|_end)?_head|reg_head|loss_normalizer)\b"
DETECTOR = re.compile(
    r"backbone\.(pos_embed|cls_token|patch_embed\.proj|fc_norm|norm\.(weight|bias)"
    r"|ladders\.adapters\.\d+\.(gamma|\w+\.(weight|bias|lora_[AB]))"
    r"|patch_embed\.norm|norm3\.(weight|bias)|layers\.\d+\.(blocks\.\d+\.inv_block|downsample)"
    r"|blocks\.\d+\.(norm[12]|attn|ls[12]\.gamma|mlp\.fc[12]|adapter))\b"
    rf"|{PROJECTION}|neck\.norms\.\d+\b|head\.{HEAD_PARTS}"
)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# model types whose config class ties the head to the embedding when config.json does not say
_TIED_BY_DEFAULT = frozenset(
    """
    bart bert biogpt bloom cohere cohere2 ctrl ernie4_5 ernie4_5_moe falcon falcon_mamba gemma gemma2 gemma3
    gemma3_text gemma3n gemma3n_text gpt2 gpt_bigcode gpt_neo jetmoe lfm2 lfm2_moe mamba marian mbart minicpm3
    modernbert-decoder mpt openai-gpt opt pegasus recurrent_gemma roberta smollm3 starcoder2 vaultgemma whisper xglm
    xlm-roberta zamba zamba2
    """.split()
)


def table(_names: object, _config: object) -> None:
    """Return no rows: these names are the hub's own."""


def recognise(name: str) -> bool:
    """Whether this looks like a transformers name, or one of our detector's.

    >>> recognise("model.layers.0.self_attn.q_proj.weight"), recognise("layers.0.attention.wq.weight")
    (True, False)
    """
    return KNOWN.match(name) is not None or DETECTOR.match(name) is not None


def tied(config: dict[str, object] | None) -> bool | None:
    """Whether a config ties head and embedding to one tensor.

    Args:
        config: as config.json has it; None for no config.

    Returns:
        What `tie_word_embeddings` says, or else the model type's default; None where neither says.
    """
    if config is None:
        return None
    value = config.get("tie_word_embeddings")
    if isinstance(value, bool):
        return value
    kind = config.get("model_type")
    return None if kind is None else kind in _TIED_BY_DEFAULT
