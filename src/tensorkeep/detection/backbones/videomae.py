"""VideoMAE's ViT, which VideoMAEv2 and InternVideo (the first) train too: S, B, L, H and v2-g differ in size alone.

Sizes (`embed_dim`/`depth`/`heads`): S 384/12/6, B 768/12/12, L 1024/24/16, H 1280/32/16, v2-g 1408/40/16 with patch 14
and `mlp_dim` 6144. Read are the originals' files (VideoMAE, VideoMAEv2, InternVideo's VideoMAE folder), mmaction's and
OpenTAD's, and transformers' folders. Layer scale (`init_values`, tensors `gamma_1`) and cosine attention (`cos_attn`,
tensors `attn.scale`), which are off by default there, are not built: such a file is refused by these names.
"""

from __future__ import annotations

from tensorkeep.conversion.naming import opentad, videomae
from tensorkeep.detection.model.vit import VisionTransformer

Backbone = VisionTransformer
third = videomae.third


def own_name(name: str) -> str | None:
    """Return the backbone's name of a file's tensor.

    Args:
        name: under VideoMAE's, mmaction's, OpenTAD's or transformers' names.

    Example:
        >>> own_name("backbone.blocks.0.mlp.layers.1.bias")
        'blocks.0.mlp.fc2.bias'
    """
    found = opentad.to_hf(name) or videomae.to_hf(name)
    return None if found is None else found.removeprefix("backbone.")


def dropped(name: str) -> str | None:
    """Return why a tensor of a file has no place in a backbone.

    Args:
        name: of the file's tensor.
    """
    return opentad.dropped(name) or videomae.dropped(name)


STATED = {  # of transformers' config; its eps of norms, 1e-12, is not the original's
    "patch_size": "patch_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "tubelet": "tubelet_size",
}
