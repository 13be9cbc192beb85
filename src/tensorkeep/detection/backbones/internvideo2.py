"""InternVideo2's video encoder (single modality): a ViT with a class token, RMS norms, layer scale and normed q and k.

Sizes (`embed_dim`/`depth`/`heads`/`mlp_dim`): S 384/12/6/1536, B 768/12/12/3072, L 1024/24/16/4096, 1B 1408/40/16/6144,
6B 3200/48/25/12800; patch 14, tubelet 1, clips of 4 or 8 frames of 224.

Read are the original's files: fine-tuned, pre-trained (stage 1) and distilled ones, with a joint table of positions or
one each for space and time. Pooling (`clip_projector`), decoders and classifier have no place in a backbone. The
feature map is the last block's output without the class token. GELU is exact, as the original computes it without
flash-attention; flash-attention's fused MLP approximates it by tanh. The encoder of the multi-modality model nests the
same tensors under `vision_encoder.`, which is taken off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tensorkeep.detection.model.config import VitConfig
from tensorkeep.detection.model.layers import VideoShape, add_kept
from tensorkeep.detection.model.vit import Attention, Block, VisionTransformer

_OWN = re.compile(
    r"(cls_token|pos_embed(_spatial|_temporal|_cls)?)\Z|patch_embed\.proj\.(weight|bias)\Z"
    r"|blocks\.\d+\.(norm[12]\.weight|ls[12]\.gamma|attn\.(qkv\.weight|[qk]_norm\.weight|proj\.(weight|bias))"
    r"|mlp\.fc[12]\.(weight|bias))\Z"
)
_SEPARATE = ("pos_embed_spatial", "pos_embed_temporal", "pos_embed_cls")
_POOLING = "attentive pooling of the clip, after the feature map"
_DECODER = "decoder of the pre-training"
_DROPPED = {
    "clip_projector": _POOLING,
    "clip_decoder": _DECODER,
    "final_clip_decoder": _DECODER,
    "mae_decoder": _DECODER,
    "clip_pos_embed": _DECODER,
    "mae_pos_embed": _DECODER,
    "clip_img_pos_embed": _DECODER,
    "img_pos_embed": "positions of single images",
    "fc_norm": "norm before the classifier",
    "head": "classifier of an action recognition model; a detector has its own head",
}
_OF_OTHERS = ("text_encoder", "vision_proj", "text_proj", "itm_head", "temp", "audio_encoder")
_OTHER = "not of the vision encoder"


class RmsNorm(nn.Module):
    """Root-mean-square norm, computed in float32 at least."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed `x [..., C]` in its dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * out.to(x.dtype)


class LayerScale(nn.Module):
    """A learned factor for each channel, from 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x [..., C]`."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * self.gamma.to(wide.dtype)).to(x.dtype)


class NormedAttention(Attention):
    """Self-attention without biases of q, k and v; q and k are normed over all heads."""

    def __init__(self, config: VitConfig) -> None:
        nn.Module.__init__(self)
        self.heads = config.heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=False)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.q_norm = RmsNorm(config.embed_dim, config.eps)
        self.k_norm = RmsNorm(config.embed_dim, config.eps)

    def project(self, x: Tensor) -> Tensor:
        """Return q, k and v of `x [N, L, C]` side by side, `[N, L, 3C]`, q and k normed."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.cat([self.q_norm(q), self.k_norm(k), v], -1)


class ScaledBlock(Block):
    """A block of InternVideo2; its first token is the class token, which an adapter does not see."""

    def __init__(self, config: VitConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        self.norm1 = RmsNorm(config.embed_dim, config.eps)
        self.norm2 = RmsNorm(config.embed_dim, config.eps)
        self.attn = NormedAttention(config)
        self.ls1, self.ls2 = LayerScale(config.embed_dim), LayerScale(config.embed_dim)

    def core(self, x: Tensor, kept_attn: Tensor | None, kept_mlp: Tensor | None, shape: VideoShape) -> Tensor:
        """Apply attention and MLP with their scaled residuals; arguments as in `Block.core`."""
        x = add_kept(x, self.ls1(self.attn(self.norm1(x), shape)), kept_attn)  # [N, 1 + L, C]
        return add_kept(x, self.ls2(self.mlp(self.norm2(x))), kept_mlp)  # [N, 1 + L, C]

    def frozen(self, x: Tensor, shape: VideoShape) -> None:
        """Return None: there is no backward by hand for these norms and scales."""

    def branch(self, shape: VideoShape) -> Callable[[Tensor], Tensor] | None:
        """Return what the adapter adds to all of `x [N, 1 + L, C]`: nothing to the class token."""
        added = super().branch(shape)
        return None if added is None else lambda x: nn.functional.pad(added(x[:, 1:]), (0, 0, 1, 0))

    def adapt(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Apply the adapter, where there is one, to all but the class token of `x [N, 1 + L, C]`."""
        if self.adapter is None:
            return x
        return torch.cat([x[:, :1], self.adapter(x[:, 1:], shape)], 1)


class Backbone(VisionTransformer):
    """InternVideo2's encoder, chunk by chunk.

    Example:
        >>> config = VitConfig(28, 14, embed_dim=48, depth=1, heads=2, mlp_dim=96, chunk_frames=4, tubelet=1)
        >>> Backbone(config)(torch.zeros(2, 3, 4, 28, 28, dtype=torch.uint8), videos=1).shape
        torch.Size([2, 48, 4, 2, 2])
    """

    kind = "internvideo2"
    by_hand = False

    def make_positions(self) -> None:
        """Make class token and table of positions: learned, and in the file."""
        t, h, w = self.stored_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + t * h * w, self.config.embed_dim))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def make_block(self, drop_path: float) -> Block:
        """Make one block; `drop_path` is its rate of stochastic depth."""
        return ScaledBlock(self.config, drop_path)

    def make_norm(self) -> None:
        """Make no norm: none comes before the feature map."""

    def begin(self, tokens: Tensor, shape: VideoShape) -> Tensor:
        """Return the class token and the tokens `[N, 1 + L, C]`, with positions, for tokens `[N, L, C]`."""
        table = self.pos_embed.detach()
        rest = self.resized(table[:, 1:], shape).to(tokens.dtype)
        first = (self.cls_token + table[:, :1]).to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([first, tokens + rest], 1)

    def finish(self, x: Tensor) -> Tensor:
        """Return `x [N, 1 + L, C]` without the class token."""
        return x[:, 1:]


def own_name(name: str) -> str | None:
    """Return the backbone's name of a file's tensor; a separate table's three parts keep theirs, for `joined`.

    Args:
        name: of the file's tensor.

    Example:
        >>> own_name("vision_encoder.blocks.3.ls1.gamma")
        'blocks.3.ls1.gamma'
    """
    bare = name.removeprefix("vision_encoder.")
    return bare if _OWN.match(bare) else None


def dropped(name: str) -> str | None:
    """Return why a tensor of a file has no place in a backbone.

    Args:
        name: of the file's tensor.
    """
    first = name.removeprefix("vision_encoder.").partition(".")[0]
    return _DROPPED.get(first) or (_OTHER if first in _OF_OTHERS else None)


def joined(tensors: Mapping[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
    """Return the tensors with one table of positions, for as many time steps as the backbone's clips have.

    Separate tables for space and time become one; a table of twice or half as many steps is resized linearly in time,
    as the original does. Others are left to be refused: they may be of other pixels than `image_size` says.

    Args:
        tensors: by the backbone's names.
        config: the backbone's shape.
    """
    made = dict(tensors)
    if all(name in tensors for name in _SEPARATE):
        space, time, first = (made.pop(name) for name in _SEPARATE)
        table = space.repeat(1, time.shape[1], 1) + time.repeat_interleave(space.shape[1], 1)
        made["pos_embed"] = torch.cat([first, table], 1)
    places, steps = (config.image_size // config.patch_size) ** 2, config.chunk_frames // config.tubelet
    stored = made.get("pos_embed")
    if stored is None or stored.ndim != 3 or stored.shape[1] - 1 not in (2 * places * steps, places * steps // 2):
        return made
    table = stored[0, 1:].view(-1, places, stored.shape[-1]).permute(1, 2, 0)  # [h*w, C, t]
    if stored.device.type != "meta":
        table = nn.functional.interpolate(table.float(), size=steps, mode="linear").to(stored.dtype)
    else:
        table = table[..., :1].expand(-1, -1, steps)
    table = table.permute(2, 0, 1).flatten(0, 1)[None]  # [1, t*h*w, C]
    return {**made, "pos_embed": torch.cat([stored[:, :1], table], 1)}
