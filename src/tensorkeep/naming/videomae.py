"""Names in VideoMAE's and VideoMAEv2's own files, and in transformers' VideoMAE, to ours and back.

Our backbone uses the original's names below `backbone.`. A fine-tuned file adds a classifier (`head.*`); a
pre-training file puts `encoder.` in front and adds a decoder. Both store no position table: it is a fixed sinusoid,
made at build. Files nest the tensors under `model` or `module`.
"""

from __future__ import annotations

import re

NAME = "videomae"
DROPPED = {
    "head": "classifier of an action recognition model; a detector has its own head",
    "decoder": "decoder of the masked pre-training",
    "encoder_to_decoder": "decoder of the masked pre-training",
    "mask_token": "decoder of the masked pre-training",
    "norm": "final norm of a model without mean pooling; no feature map passes through it",
}
ABSENT = {
    "backbone.pos_embed": "fixed sinusoid, made at build",
    "backbone.fc_norm": "a pre-training file has none, and no feature map passes through it",
}
# transformers' name inside `encoder.layer.I` -> the original's name inside `blocks.I`
TRANSFORMERS_LAYER = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.q_bias": "attn.q_bias",
    "attention.attention.v_bias": "attn.v_bias",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# names of the live module since transformers 5; its files keep the ones above
TRANSFORMERS_LIVE = {"attention.attention.query.bias": "attn.q_bias", "attention.attention.value.bias": "attn.v_bias"}
QKV_ORDER = ("query", "key", "value")  # rows of `attn.qkv.weight`, one third each
TRANSFORMERS_EMBED = "embeddings.patch_embeddings.projection"


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of an original VideoMAE file."""
    return to_hf(name) is not None or dropped(name) is not None


def dropped(name: str) -> str | None:
    """Why a tensor of an original file has no place in a detector, or None where it has one.

    >>> dropped("head.weight")
    'classifier of an action recognition model; a detector has its own head'
    """
    return DROPPED.get(name.removeprefix("encoder.").split(".")[0])


def to_hf(name: str) -> str | None:
    """A name of an original file to ours; None where it is dropped or unknown.

    >>> to_hf("encoder.blocks.0.attn.qkv.weight")
    'backbone.blocks.0.attn.qkv.weight'
    """
    bare = name.removeprefix("encoder.")
    known = bare.split(".")[0] in ("patch_embed", "blocks", "fc_norm", "pos_embed")
    return f"backbone.{bare}" if known else None


def from_hf(name: str) -> str | None:
    """Our name of a backbone tensor to the original's (fine-tuned layout); None for anything else.

    >>> from_hf("backbone.patch_embed.proj.weight")
    'patch_embed.proj.weight'
    """
    bare = name.removeprefix("backbone.")
    known = bare.split(".")[0] in ("patch_embed", "blocks", "fc_norm")
    return bare if name.startswith("backbone.") and known and ".adapter." not in bare else None


def from_transformers(name: str) -> tuple[str, int | None] | None:
    """A name of transformers' VideoMAE to ours, and which third of our fused `qkv` it is (None: the whole tensor).

    None where a detector has no such tensor (the classifier, the final layernorm).

    >>> from_transformers("videomae.encoder.layer.0.attention.attention.key.weight")
    ('backbone.blocks.0.attn.qkv.weight', 1)
    """
    bare = name.removeprefix("videomae.")
    if bare.startswith("fc_norm."):
        return f"backbone.{bare}", None
    if bare.startswith(TRANSFORMERS_EMBED + "."):
        return f"backbone.patch_embed.proj{bare[len(TRANSFORMERS_EMBED) :]}", None
    found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", bare)
    if found is None:
        return None
    block, rest = found.groups()
    part = re.fullmatch(r"attention\.attention\.(query|key|value)\.weight", rest)
    if part is not None:
        return f"backbone.blocks.{block}.attn.qkv.weight", QKV_ORDER.index(part[1])
    for theirs, ours in {**TRANSFORMERS_LAYER, **TRANSFORMERS_LIVE}.items():
        if rest == theirs or rest.startswith(theirs + "."):
            return f"backbone.blocks.{block}.{ours}{rest[len(theirs) :]}", None
    return None


def to_transformers(name: str) -> tuple[str, ...] | None:
    """Our name to transformers': three names where our `qkv` is cut into thirds of its rows; None for anything else.

    >>> to_transformers("backbone.blocks.0.mlp.fc2.bias")
    ('videomae.encoder.layer.0.output.dense.bias',)
    """
    bare = name.removeprefix("backbone.")
    if bare == name:
        return None
    if bare.startswith("fc_norm."):
        return (bare,)
    if bare.startswith("patch_embed.proj."):
        return (f"videomae.{TRANSFORMERS_EMBED}{bare[len('patch_embed.proj') :]}",)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", bare)
    if found is None:
        return None
    layer = f"videomae.encoder.layer.{found[1]}"
    if found[2] == "attn.qkv.weight":
        return tuple(f"{layer}.attention.attention.{part}.weight" for part in QKV_ORDER)
    for theirs, ours in TRANSFORMERS_LAYER.items():
        if found[2] == ours or found[2].startswith(ours + "."):
            return (f"{layer}.{theirs}{found[2][len(ours) :]}",)
    return None
