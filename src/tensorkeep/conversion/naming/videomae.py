"""Naming `videomae`: VideoMAE's and VideoMAEv2's own files, and the way in from transformers' VideoMAE.

Our backbone uses the original's names below `backbone.`. A fine-tuned file adds a classifier (`head.*`); a
pre-training file puts `encoder.` in front and adds a decoder. Both store no position table: it is a fixed sinusoid,
made at build. Files nest the tensors under `model` or `module`.

transformers' files are `hf` files and stay so; read as `videomae` (`--from-naming videomae`) they become a backbone
of ours: query, key and value are the three thirds of the rows of `attn.qkv.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

NAME = "videomae"
_CLASSIFIER = "classifier of an action recognition model; a detector has its own head"
_DECODER = "decoder of the masked pre-training"
_LAST_NORM = "final norm of a model without mean pooling; no feature map passes through it"
DROPPED = {
    "head": _CLASSIFIER,
    "classifier": _CLASSIFIER,
    "decoder": _DECODER,
    "encoder_to_decoder": _DECODER,
    "mask_token": _DECODER,
    "norm": _LAST_NORM,
    "layernorm": _LAST_NORM,
}
OMITTED = {"backbone.pos_embed": "fixed sinusoid, made at build: VideoMAE's files have none"}
KNOWN = re.compile(
    r"(encoder\.)?(pos_embed\Z|patch_embed\.proj\.|fc_norm\.|norm\.(weight|bias)\Z"
    r"|blocks\.\d+\.(norm[12]\.|attn\.(qkv|q_bias|v_bias|proj)\b|mlp\.fc[12]\.))"
    r"|head\.(weight|bias)\Z|decoder\.(blocks\.\d+|norm|head)\.|encoder_to_decoder\.|mask_token\Z"
)
# tubelets make the patch embedding five-dimensional: an image model with the same names is another's
_PATCH_EMBEDS = (
    "patch_embed.proj.weight",
    "encoder.patch_embed.proj.weight",
    "videomae.embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.weight",
)
# transformers' name inside `encoder.layer.I` -> the original's name inside `blocks.I`
_TRANSFORMERS_LAYER = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.q_bias": "attn.q_bias",
    "attention.attention.v_bias": "attn.v_bias",
    # names of the live module since transformers 5; its files keep the two above
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.attention.query.weight": "attn.qkv.weight",
    "attention.attention.key.weight": "attn.qkv.weight",
    "attention.attention.value.weight": "attn.qkv.weight",
}
_TRANSFORMERS_EMBED = "embeddings.patch_embeddings.projection."
_THIRDS = ("query", "key", "value")  # rows of `attn.qkv.weight`


# image transformers, InternVideo2, Qwen's vision tower
_OTHERS = ("cls_token", "vision_encoder.cls_token", "pos_embed.weight", "merger.norm.weight")


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of an original VideoMAE file.

    >>> recognise("blocks.0.attn.q_bias"), recognise("blocks.0.att.key.weight")
    (True, False)
    """
    return KNOWN.match(name) is not None


def holds(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes are VideoMAE's: image transformers and InternVideo2 share most of the names."""
    others = any(n in shapes for n in _OTHERS)
    return not others and any(len(shapes.get(name, ())) == 5 for name in _PATCH_EMBEDS)


def dropped(name: str) -> str | None:
    """Return why a tensor of an original or transformers file has no place in a detector.

    Args:
        name: a clean name of the file.

    Returns:
        The reason; None where the tensor has a place.

    Example:
        >>> dropped("head.weight")
        'classifier of an action recognition model; a detector has its own head'
    """
    bare = name.removeprefix("videomae.")
    return DROPPED.get(bare.removeprefix("encoder.").partition(".")[0])


def to_hf(name: str) -> str | None:
    """Turn a name of an original or transformers file into ours.

    Args:
        name: a clean name of the file.

    Returns:
        Our name; None where the tensor is dropped or unknown.

    Example:
        >>> to_hf("encoder.blocks.0.attn.qkv.weight"), to_hf("videomae.encoder.layer.0.output.dense.bias")
        ('backbone.blocks.0.attn.qkv.weight', 'backbone.blocks.0.mlp.fc2.bias')
    """
    if recognise(name):
        return None if dropped(name) else f"backbone.{name.removeprefix('encoder.')}"
    bare = name.removeprefix("videomae.")
    if bare.startswith(_TRANSFORMERS_EMBED):
        return f"backbone.patch_embed.proj.{bare[len(_TRANSFORMERS_EMBED) :]}"
    found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", bare)
    for theirs, ours in _TRANSFORMERS_LAYER.items() if found else ():
        if found and (found[2] == theirs or found[2].startswith(theirs + ".")):
            return f"backbone.blocks.{found[1]}.{ours}{found[2][len(theirs) :]}"
    return None


def third(name: str) -> int | None:
    """Return which third of the rows of our fused `attn.qkv.weight` a tensor of a transformers file is.

    Args:
        name: a clean name of the file.

    Returns:
        0 for query, 1 for key, 2 for value; None for a whole tensor.

    Example:
        >>> third("videomae.encoder.layer.0.attention.attention.key.weight")
        1
    """
    found = re.search(r"\.attention\.attention\.(query|key|value)\.weight\Z", name)
    return _THIRDS.index(found[1]) if found else None


def from_hf(name: str) -> str | None:
    """Turn our name of a backbone tensor into the original's (of a fine-tuned file); None for anything else.

    >>> from_hf("backbone.patch_embed.proj.weight")
    'patch_embed.proj.weight'
    """
    bare = name.removeprefix("backbone.")
    return bare if bare != name and recognise(bare) and not dropped(bare) and name not in OMITTED else None


def renamer(_names: Iterable[str]) -> Any:
    """Return `from_hf`, which names a tensor whatever else is written."""
    return from_hf
