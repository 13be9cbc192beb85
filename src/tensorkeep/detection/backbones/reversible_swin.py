"""Re2TAL's backbone: a video Swin transformer whose blocks are run backwards, so that training keeps none of them.

A stage carries two streams, both its input at first: `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)` with attention F and MLP G,
and ends with their mean. From a block's output its input follows, `x2 = y2 - G(y1)`, `x1 = y1 - F(x2)`, up to rounding;
so a stage keeps its two output streams and what lies between two stages, however many blocks it has. The streams are
float32 whatever autocast does in F and G, so that what was added is what is subtracted.

Names and numbers are those of OpenTAD's `SwinTransformer3D_inv`, but for two things: stochastic depth is drawn anew in
every update (OpenTAD seeds torch's generator with one number in every block of every update), and gradients go through
autograd. A window that is as large as the grid takes its biases by the place in the whole window, as there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model.config import Checkpointing, SwinConfig
from tensorkeep.detection.model.layers import VideoBackbone, draw_kept, normalise_frames

Grid = tuple[int, int, int]
_FRAMES = 64  # normalised at a time
_APART = -100.0  # added between tokens that a shifted window brought together
_OWN = re.compile(
    r"patch_embed\.(proj|norm)\.|norm3\.|layers\.\d+\.(downsample\.(norm|reduction)\."
    r"|blocks\.\d+\.inv_block\.(Fm\.(norm1|attn)|Gm\.(norm2|mlp\.fc[12]))\.)"
)


class PatchEmbed(nn.Module):
    """Tubelets to normed tokens; frames are filled up with zeros to whole patches."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, config.channels, config.patch, stride=config.patch)
        self.norm = nn.LayerNorm(config.channels, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens `[N, t', h, w, C]` of normalised frames `[N, 3, t, H, W]`."""
        more = [-size % step for size, step in zip(x.shape[2:], self.proj.kernel_size)]
        x = F.pad(x, (0, more[2], 0, more[1], 0, more[0])).to(self.proj.weight.dtype)
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 4, 1))
        return out


class WindowAttention(nn.Module):
    """Self-attention within windows of tokens, with a learned bias for each offset between two tokens.

    Args:
        channels: of a token.
        heads: of the attention.
        window: time steps, rows and columns of a window.
    """

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: Grid) -> None:
        super().__init__()
        self.heads = heads
        sides = [2 * size - 1 for size in window]
        self.relative_position_bias_table = nn.Parameter(torch.zeros(sides[0] * sides[1] * sides[2], heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        places = torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in window)).view(-1, 3)  # [n, 3]
        apart = places[:, None] - places[None] + torch.tensor(window, device="cpu") - 1  # [n, n, 3]
        index = (apart * torch.tensor([sides[1] * sides[2], sides[2], 1], device="cpu")).sum(-1)
        self.register_buffer("relative_position_index", index)  # in every file
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, window: Grid, shift: Grid) -> Tensor:
        """Return the attention of windows `x [B, nt, nh, nw, n, C]` of `window` tokens, the same shape.

        `shift`: how far the grid was rolled along each axis; the last window along it then holds tokens of both ends,
        which do not see each other.
        """
        n = x.shape[-2]
        index = self.relative_position_index[:n, :n].reshape(-1)
        bias = self.relative_position_bias_table[index].view(n, n, -1).permute(2, 0, 1)  # [heads, n, n]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, nt, nh, nw, n, 3, heads, d]
        cuts = [_cuts(count, rolled > 0) for count, rolled in zip(x.shape[1:4], shift)]
        pieces = []
        for chosen in product(*cuts):  # windows that share a mask: at most eight kinds
            mask = _apart(bias, window, shift, [last for _, last in chosen])
            part = qkv[(slice(None), *(place for place, _ in chosen))]
            q, k, v = part.flatten(0, 3).permute(2, 0, 3, 1, 4)  # each [windows, heads, n, d]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)[None])
            pieces.append(mixed.transpose(1, 2).flatten(2).view(*part.shape[:5], -1))  # [B, .., .., .., n, C]
        for axis in (2, 1, 0):  # the last axis of the grid of windows runs fastest
            size = len(cuts[axis])
            pieces = [torch.cat(pieces[at : at + size], axis + 1) for at in range(0, len(pieces), size)]
        out: Tensor = self.proj(pieces[0])
        return out


def _cuts(count: int, rolled: bool) -> list[tuple[slice, bool]]:
    """Return the windows along an axis by kind: those of one end, and the last one where it holds tokens of both."""
    if not rolled:
        return [(slice(0, count), False)]
    first = [(slice(0, count - 1), False)] if count > 1 else []
    return [*first, (slice(count - 1, count), True)]


def _apart(bias: Tensor, window: Grid, shift: Grid, last: list[bool]) -> Tensor:
    """Return the bias `[heads, n, n]`, far less between tokens that a roll brought together along the axes `last`."""
    if not any(last):
        return bias
    sides = [
        torch.arange(size, device=bias.device) >= (size - by if both else size)
        for size, by, both in zip(window, shift, last)
    ]
    ends = torch.cartesian_prod(*(side.long() for side in sides)).view(-1, 3)  # [n, 3]
    far = (ends[:, None] != ends[None]).any(-1)  # [n, n]
    return bias + torch.where(far, _APART, 0.0).to(bias.dtype)


class AttentionBranch(nn.Module):
    """F: norm, attention in windows of a grid that may be rolled by half a window."""

    def __init__(self, channels: int, heads: int, config: SwinConfig, shifted: bool) -> None:
        super().__init__()
        self.window = config.window
        self.shift = tuple(size // 2 for size in config.window) if shifted else (0, 0, 0)
        self.norm1 = nn.LayerNorm(channels, eps=config.eps)
        self.attn = WindowAttention(channels, heads, config.window)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added for the stream `x [B, t, h, w, C]`."""
        sizes = x.shape[1:4]
        window = tuple(min(size, most) for size, most in zip(sizes, self.window))
        shift = tuple(by if size > most else 0 for size, most, by in zip(sizes, self.window, self.shift))
        more = [-size % step for size, step in zip(sizes, window)]
        x = F.pad(self.norm1(x), (0, 0, 0, more[2], 0, more[1], 0, more[0]))
        if any(shift):
            x = x.roll([-by for by in shift], (1, 2, 3))
        counts = [size // step for size, step in zip(x.shape[1:4], window)]
        x = x.view(len(x), counts[0], window[0], counts[1], window[1], counts[2], window[2], -1)
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6)  # [B, nt, nh, nw, n, C]
        x = self.attn(x, (window[0], window[1], window[2]), (shift[0], shift[1], shift[2]))
        x = x.view(*x.shape[:4], *window, -1).permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        return x[:, : sizes[0], : sizes[1], : sizes[2]]


class MlpBranch(nn.Module):
    """G: norm, linear, exact GELU, linear."""

    def __init__(self, channels: int, config: SwinConfig) -> None:
        super().__init__()
        width = int(channels * config.mlp_ratio)
        self.norm2 = nn.LayerNorm(channels, eps=config.eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(channels, width), "fc2": nn.Linear(width, channels)})

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added for the stream `x [B, t, h, w, C]`."""
        out: Tensor = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return out


class Block(nn.Module):
    """A reversible block; F and G lie below `inv_block`, as in the original's files."""

    def __init__(self, channels: int, heads: int, config: SwinConfig, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        branches = {"Fm": AttentionBranch(channels, heads, config, shifted), "Gm": MlpBranch(channels, config)}
        self.inv_block = nn.ModuleDict(branches)


class Merging(nn.Module):
    """Four neighbours become one token of twice the channels."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, eps=eps)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, t, h / 2, w / 2, 2 C]` for `x [B, t, h, w, C]`, filled up to even sides."""
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


class Stage(nn.Module):
    """Blocks over two streams, and what makes the next stage's tokens of their mean."""

    def __init__(self, config: SwinConfig, stage: int, rates: list[float]) -> None:
        super().__init__()
        channels, heads = config.channels << stage, config.heads[stage]
        self.blocks = nn.ModuleList(
            Block(channels, heads, config, index % 2 == 1, rate) for index, rate in enumerate(rates)
        )
        last = stage == len(config.depths) - 1
        self.downsample = None if last else Merging(channels, config.eps)

    def forward(self, x: Tensor, reversible: bool) -> Tensor:
        """Return the next stage's input for `x [B, t, h, w, C]`."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        steps = [_step(block, x) for block in self.blocks]
        parameters = [p for p in self.blocks.parameters() if p.requires_grad]
        if reversible and torch.is_grad_enabled() and (x.requires_grad or parameters):
            first, second = _Reversed.apply(steps, x, *parameters)  # type: ignore[no-untyped-call]
        else:
            first = second = x
            for step in steps:
                first, second = step.forward(first, second)
        x = (first + second) / 2
        return x if self.downsample is None else self.downsample(x)


@dataclass(frozen=True)
class Step:
    """One block of one forward: its branches with what was drawn for them, and the autocast that was on."""

    block: Block
    kept: tuple[Tensor | None, Tensor | None]
    casting: tuple[str, torch.dtype, bool]

    def branch(self, index: int, x: Tensor) -> Tensor:
        """Return F (0) or G (1) of a stream, in the stream's dtype."""
        device, dtype, enabled = self.casting
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            out: Tensor = self.block.inv_block[("Fm", "Gm")[index]](x).to(x.dtype)
        factor = self.kept[index]
        return out if factor is None else out * factor

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams after the block."""
        first = first + self.branch(0, second)
        return first, second + self.branch(1, first)


def _step(block: nn.Module, x: Tensor) -> Step:
    """Draw stochastic depth's factors for one block."""
    assert isinstance(block, Block)
    device, kept = x.device.type, [draw_kept(x, block.drop_path, block.training) for _ in range(2)]
    casting = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    return Step(block, (kept[0], kept[1]), casting)


class _Reversed(torch.autograd.Function):
    """Blocks as one operation that keeps only the streams after the last of them."""

    @staticmethod
    def forward(ctx: Any, steps: list[Step], x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x, x
        for step in steps:
            first, second = step.forward(first, second)
        ctx.steps, ctx.parameters = steps, parameters
        ctx.save_for_backward(first, second)
        return first, second

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second = (stream.detach() for stream in ctx.saved_tensors)
        to_first, to_second = grads
        found: dict[int, Tensor] = {}
        for step in reversed(ctx.steps):
            to_first, second = _back(step, 1, first, second, to_second, to_first, found)
            to_second, first = _back(step, 0, second, first, to_first, to_second, found)
        wanted = [found.get(id(parameter)) for parameter in ctx.parameters]
        return (None, to_first + to_second if ctx.needs_input_grad[1] else None, *wanted)


def _back(
    step: Step, index: int, source: Tensor, sum_: Tensor, grad: Tensor, to_source: Tensor, found: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Go back through `sum = before + branch(source)`: the gradient of `source` with what came for it, and `before`.

    Gradients of the branch's parameters are added to `found`, by `id`.
    """
    own = [p for p in step.block.inv_block[("Fm", "Gm")[index]].parameters() if p.requires_grad]
    leaf = source.detach().requires_grad_()
    with torch.enable_grad():
        out = step.branch(index, leaf)
    lead, *rest = torch.autograd.grad(out, [leaf, *own], grad, allow_unused=True)
    for parameter, gradient in zip(own, rest):
        if gradient is not None:
            known = found.get(id(parameter))
            found[id(parameter)] = gradient if known is None else known + gradient
    return to_source + lead, sum_ - out.detach()


class Backbone(VideoBackbone):
    """Re2TAL's reversible Swin transformer.

    Args:
        config: its shape.
        checkpointing: "reversible" keeps no block's activations, "none" all of them.

    Example:
        >>> config = SwinConfig(channels=8, depths=(2, 2), heads=(2, 2), window=(2, 2, 2))
        >>> Backbone(config)(torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8), videos=1).shape
        torch.Size([1, 16, 2, 2, 2])
    """

    kind = "reversible_swin"

    def __init__(self, config: SwinConfig, checkpointing: Checkpointing = "reversible") -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.ladders = self.fc_norm = None
        self.patch_embed = PatchEmbed(config)
        rates = iter(torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist())
        self.layers = nn.ModuleList(
            Stage(config, stage, [next(rates) for _ in range(depth)]) for stage, depth in enumerate(config.depths)
        )
        self.norm3 = nn.LayerNorm(config.embed_dim, eps=config.eps)

    def parts(self) -> list[nn.Module]:
        """Return the blocks of all stages, first to last."""
        return [block for stage in self.layers if isinstance(stage, Stage) for block in stage.blocks]

    def forward(self, chunks: Tensor, videos: int) -> Tensor:
        """Encode raw frames.

        Args:
            chunks: `[videos, 3, t, H, W]`, 0..255.
            videos: how many share the first axis.

        Returns:
            Feature maps `[videos, C, t/2, h, w]`.
        """
        mean, std = self.config.mean, self.config.std
        size = max(_FRAMES // self.config.patch[0], 1) * self.config.patch[0]
        pieces = [self.patch_embed(normalise_frames(piece, mean, std)) for piece in torch.split(chunks, size, 2)]
        x = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]  # [N, t, h, w, C]
        for stage in self.layers:
            x = stage(x, self.checkpointing == "reversible")
        out: Tensor = self.norm3(x).permute(0, 4, 1, 2, 3)
        return out


def own_name(name: str) -> str | None:
    """Return the backbone's name of a file's tensor.

    Args:
        name: under Re2TAL's, mmaction's or OpenTAD's names.

    Example:
        >>> own_name("backbone.layers.0.blocks.1.inv_block.Gm.mlp.fc1.bias")
        'layers.0.blocks.1.inv_block.Gm.mlp.fc1.bias'
    """
    bare = name.removeprefix("backbone.").removeprefix("model.backbone.")
    return bare if _OWN.match(bare) else None


def dropped(name: str) -> str | None:
    """Return why a tensor of a file has no place in a backbone.

    Args:
        name: of the file's tensor.
    """
    classifier = "classifier of an action recognition model; a detector has its own head"
    return classifier if name.split(".")[0] == "cls_head" else None
