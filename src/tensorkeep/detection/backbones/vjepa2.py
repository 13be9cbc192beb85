"""V-JEPA 2's encoder: a ViT whose attention turns q and k by time, row and column, and a norm after the last block.

Sizes (`embed_dim`/`depth`/`heads`/`mlp_dim`): L 1024/24/16/4096, H 1280/32/16/5120, g 1408/40/22/6144; patch 16,
tubelet 2, frames of 256 (g also 384), 64 in a clip, mean and deviation ImageNet's (this package's defaults).

Read are transformers' folders (`VJEPA2Model`, `VJEPA2ForVideoClassification`) and the names of Meta's own files, whose
`encoder` is taken; predictor, pooler and classifier have no place in a backbone. Names are Meta's, with transformers'
query, key and value as the three thirds of `attn.qkv`. transformers numbers tokens by `crop_size` whatever the frames
are; here rows and columns are those of the frames, which is the same where frames have `crop_size` pixels.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from torch import Tensor, nn

from tensorkeep.detection.model.config import VitConfig
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.detection.model.vit import Attention, Block, VisionTransformer

_BASE = 10000.0  # of the angles' geometric row
_PARTS = ("patch_embed.proj.", "norm.")
_BLOCK = re.compile(r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)")
_LAYER = re.compile(r"layer\.(\d+)\.(norm[12]|attention\.(?:query|key|value|proj)|mlp\.fc[12])\.(weight|bias)")
_THIRDS = ("query", "key", "value")
_DROPPED = {
    "predictor": "predictor of the masked pre-training",
    "target_encoder": "average of the encoder that pre-training aims at",
    "opt": "optimizer state",
    "pooler": "attentive pooling of an action recognition model",
    "classifier": "classifier of an action recognition model; a detector has its own head",
}


class Turn:
    """Rotary positions of a grid of tokens, as V-JEPA 2 computes them; see `Rotation`.

    Neighbouring channels are a pair `(a, b)`, but their two angles differ: the frequencies lie twice one after the
    other, not once for each pair. So `a' = a cos(p) - b sin(p)`, `b' = b cos(q) + a sin(q)` is no rotation where p is
    not q, and its transpose is not its inverse.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin  # [L, d]

    def __call__(self, x: Tensor) -> Tensor:
        """Return q or k `[N, heads, L, d]`, turned."""
        first, second = x[..., 0::2], x[..., 1::2]
        return x * self.cos + torch.stack((-second, first), -1).flatten(-2) * self.sin

    def back(self, grad: Tensor) -> Tensor:
        """Return the gradient of q or k for the gradient of what was turned, both `[N, heads, L, d]`."""
        scaled = grad * self.sin
        first, second = scaled[..., 0::2], scaled[..., 1::2]
        return grad * self.cos + torch.stack((second, -first), -1).flatten(-2)


@lru_cache(maxsize=8)
def turn_of(grid: tuple[int, int, int], size: int, device: torch.device, dtype: torch.dtype) -> Turn:
    """Return the rotary positions of a grid (t, h, w) for heads of `size` channels.

    A third of the channels each turns by time, row and column; what is left over stays.
    """
    with torch.inference_mode(False), torch.no_grad():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        each = 2 * (size // 3 // 2)
        omega = torch.arange(each // 2, dtype=wide, device=device) / (each / 2.0)
        omega = 1.0 / _BASE**omega
        angles = []
        for axis, steps in enumerate(grid):
            sides = [1, 1, 1]
            sides[axis] = steps
            at = torch.arange(steps, dtype=wide, device=device).view(sides).expand(grid).flatten()
            angles.append((at[:, None] * omega).repeat(1, 2))  # [L, each]
        angle = torch.cat([*angles, torch.zeros(len(at), size - 3 * each, dtype=wide, device=device)], -1)
        return Turn(angle.cos().to(dtype), angle.sin().to(dtype))


class RotaryAttention(Attention):
    """Self-attention whose linear of q, k and v has a bias, and whose q and k turn by their tokens' positions."""

    def __init__(self, config: VitConfig) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_size = config.heads, config.embed_dim // config.heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def qkv_bias(self) -> Tensor:
        """Return the bias of q, k and v, `[3C]`."""
        base = getattr(self.qkv, "base", self.qkv)
        bias = base.bias
        assert isinstance(bias, Tensor)
        return bias

    def project(self, x: Tensor) -> Tensor:
        """Return q, k and v of `x [N, L, C]` side by side, `[N, L, 3C]`; the linear adds its own bias."""
        out: Tensor = self.qkv(x)
        return out

    def rotation(self, shape: VideoShape | None, like: Tensor) -> Turn:
        """Return the positions of the grid; arguments as in `Attention.rotation`."""
        assert shape is not None, "tokens of V-JEPA 2 need their grid"
        return turn_of((shape.t, shape.h, shape.w), self.head_size, like.device, like.dtype)


class RotaryBlock(Block):
    """A block of V-JEPA 2."""

    def __init__(self, config: VitConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        self.attn = RotaryAttention(config)


class Backbone(VisionTransformer):
    """V-JEPA 2's encoder, chunk by chunk.

    Example:
        >>> config = VitConfig(32, 16, embed_dim=48, depth=1, heads=2, mlp_dim=96, chunk_frames=4)
        >>> Backbone(config)(torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8), videos=1).shape
        torch.Size([2, 48, 2, 2, 2])
    """

    kind = "vjepa2"

    def make_positions(self) -> None:
        """Make no table: q and k turn instead."""

    def make_block(self, drop_path: float) -> Block:
        """Make one block; `drop_path` is its rate of stochastic depth."""
        return RotaryBlock(self.config, drop_path)

    def make_norm(self) -> None:
        """Make the norm after the last block; the feature map is its output."""
        self.norm = nn.LayerNorm(self.config.embed_dim, eps=self.config.eps)

    def begin(self, tokens: Tensor, shape: VideoShape) -> Tensor:
        """Return the tokens as they are."""
        return tokens

    def finish(self, x: Tensor) -> Tensor:
        """Return the norm of the last block's output, both `[N, L, C]`."""
        out: Tensor = self.norm(x)
        return out


def own_name(name: str) -> str | None:
    """Return the backbone's name of a file's tensor.

    Args:
        name: under transformers' or Meta's names.

    Example:
        >>> own_name("encoder.layer.3.attention.key.weight"), own_name("vjepa2.encoder.layernorm.bias")
        ('blocks.3.attn.qkv.weight', 'norm.bias')
        >>> own_name("encoder.module.backbone.blocks.3.mlp.fc1.bias")
        'blocks.3.mlp.fc1.bias'
    """
    bare = _bare(name)
    if bare is None:
        return None
    bare = bare.replace("embeddings.patch_embeddings.proj.", "patch_embed.proj.", 1).replace("layernorm.", "norm.", 1)
    if _BLOCK.fullmatch(bare) or bare.startswith(_PARTS):
        return bare
    found = _LAYER.fullmatch(bare)
    if found is None:
        return None
    number, part, last = found.groups()
    inner = {"attention.proj": "attn.proj"}.get(part, "attn.qkv" if part.startswith("attention.") else part)
    return f"blocks.{number}.{inner}.{last}"


def _bare(name: str) -> str | None:
    """Return a name below the encoder; None for what is not of it."""
    name = name.removeprefix("vjepa2.")
    if name.split(".")[0] in _DROPPED:
        return None
    return name.removeprefix("encoder.").removeprefix("module.").removeprefix("backbone.")


def dropped(name: str) -> str | None:
    """Return why a tensor of a file has no place in a backbone.

    Args:
        name: of the file's tensor.
    """
    return _DROPPED.get(name.removeprefix("vjepa2.").partition(".")[0])


def third(name: str) -> int | None:
    """Return which third of the rows of our `attn.qkv` a tensor of a transformers folder is; None for a whole one.

    Args:
        name: of the file's tensor.
    """
    found = re.search(r"\.attention\.(query|key|value)\.(weight|bias)\Z", name)
    return _THIRDS.index(found[1]) if found else None


STATED = {  # of transformers' config
    "patch_size": "patch_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "tubelet": "tubelet_size",
    "eps": "layer_norm_eps",
}
