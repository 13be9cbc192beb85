"""The video transformer: frames in chunks of 16 become a feature map; adapters may be put on its blocks.

As it stands it is VideoMAE's, VideoMAEv2's and InternVideo's; what another kind does otherwise it overrides
(`detection/backbones`).

Attention stays inside a chunk; only an adapter (`Block.adapter`) sees a whole video. Weight names are those of
the original VideoMAE files (`patch_embed.proj`, `blocks.I.attn.{q_bias,v_bias,qkv,proj}`, `blocks.I.mlp.fc1`, ...).
Sizes (`embed_dim`/`depth`/`heads`): S 384/12/6, B 768/12/12, L 1024/24/16, H 1280/32/16, v2-g 1408/40/16 with patch 14
and `mlp_dim` 6144.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from tensorkeep.detection.model._chain import KeptInputs, run_chain
from tensorkeep.detection.model._frozen import FrozenLink, FrozenTrunk, attention_kept, run_frozen
from tensorkeep.detection.model._linears import opened
from tensorkeep.detection.model._positions import PatchEmbed, resize_positions, sinusoid_table
from tensorkeep.detection.model._recompute import AutogradLink, Link, keep_attention, part_size, run_segment
from tensorkeep.detection.model.adapters import Ladder
from tensorkeep.detection.model.config import Checkpointing, VitConfig
from tensorkeep.detection.model.layers import Rotation, VideoBackbone, VideoShape, add_kept, draw_kept, normalise_frames
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.frozen import in_float8
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.training.offload import HostStore

_EMBED_CHUNKS = 16  # chunks normalised at a time: the float copy of a whole batch of frames would be the memory peak


class Attention(nn.Module):
    """Self-attention within a chunk; the bias of q, k, v is stored as `q_bias` and `v_bias` (k has none)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.heads = config.heads
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim, bias=False)
        self.proj: nn.Module = nn.Linear(dim, dim)

    def qkv_bias(self) -> Tensor:
        """Return the bias of q, k and v, `[3C]`."""
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def rotation(self, shape: VideoShape | None, like: Tensor) -> Rotation | None:
        """Return what turns q and k by the grid of their tokens, with the device and dtype of `like`; None: nothing."""
        return None

    def project(self, x: Tensor) -> Tensor:
        """Return q, k and v of `x [N, L, C]` side by side, `[N, L, 3C]`.

        A quantized or low-rank `qkv` is called as it is and gets the bias afterwards.
        """
        bias = self.qkv_bias()
        if type(self.qkv) is nn.Linear:
            return F.linear(x, self.qkv.weight, bias)
        out: Tensor = self.qkv(x)
        return out + bias.to(out.dtype)

    def forward(self, x: Tensor, shape: VideoShape | None = None) -> Tensor:
        """Return the attention of `x [N, L, C]` within each chunk, `[N, L, C]`; the tokens lie as `shape` says."""
        n, length, _ = x.shape
        qkv = self.project(x).view(n, length, 3, self.heads, -1)  # [N, L, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, L, d]
        turn = self.rotation(shape, q)
        if turn is not None:
            q, k = turn(q), turn(k)
        out = F.scaled_dot_product_attention(q, k, v)  # [N, heads, L, d]
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(n, length, -1))
        return mixed  # [N, L, C]


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1: nn.Module = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2: nn.Module = nn.Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return `fc2(gelu(fc1(x)))` for `x [N, L, C]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out  # [N, L, C]


class Block(nn.Module):
    """Pre-norm transformer block, with `adapter(x, shape)` at its end where one is set."""

    def __init__(self, config: VitConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.LayerNorm(config.embed_dim, eps=config.eps)
        self.attn = Attention(config)
        self.norm2: nn.Module = nn.LayerNorm(config.embed_dim, eps=config.eps)
        self.mlp = Mlp(config)
        self.drop_path = drop_path
        self.in_float8 = False  # whether products of `frozen` are, in training
        self.adapter: nn.Module | None = None

    def trunk(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Apply attention and MLP with their residuals to `x [N, L, C]`."""
        kept = [draw_kept(x, self.drop_path, self.training) for _ in range(2)]
        return self.core(x, kept[0], kept[1], shape)

    def core(self, x: Tensor, kept_attn: Tensor | None, kept_mlp: Tensor | None, shape: VideoShape) -> Tensor:
        """Do what `trunk` does, with drop path's factors `[N, 1, 1]` given: the part worth compiling."""
        x = add_kept(x, self.attn(self.norm1(x), shape), kept_attn)  # [N, L, C]
        return add_kept(x, self.mlp(self.norm2(x)), kept_mlp)  # [N, L, C]

    def frozen(self, x: Tensor, shape: VideoShape) -> Callable[[], FrozenTrunk] | None:
        """Return a function that makes attention and MLP ready for `run_frozen`; it dequantizes weights at each call.

        None where one of their weights trains, has another dtype than `x`, or is not a plain or quantized linear's.
        """
        linears = [self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2]
        plain = all(type(linear) in (nn.Linear, QuantLinear) for linear in linears)
        if not plain or any(p.requires_grad or p.dtype != x.dtype for p in _trunk_parameters(self)):
            return None
        turn = self.attn.rotation(shape, x)
        return partial(self._open, x.dtype, turn, self.in_float8 and in_float8(x.dtype))

    def _open(self, dtype: torch.dtype, turn: Rotation | None, narrow: bool) -> FrozenTrunk:
        """Make the linears of attention and MLP ready: dequantized to `dtype`, or `narrow`, in float8."""
        linears = (self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        proj, fc1, fc2 = (opened(linear, linear.get_parameter("bias"), dtype, narrow) for linear in linears)
        qkv = opened(self.attn.qkv, self.attn.qkv_bias(), dtype, narrow)
        assert isinstance(self.norm1, nn.LayerNorm) and isinstance(self.norm2, nn.LayerNorm)
        return FrozenTrunk(self.norm1, self.norm2, qkv, proj, fc1, fc2, self.attn.heads, turn, narrow)

    def branch(self, shape: VideoShape) -> Callable[[Tensor], Tensor] | None:
        """Return the function that gives what the adapter adds to all of `x [N, L, C]`; None where it has no such."""
        added = getattr(self.adapter, "branch", None)
        return None if added is None else partial(added, shape=shape)

    def adapt(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Apply the adapter, where there is one, to `x [N, L, C]`."""
        if self.adapter is None:
            return x
        out: Tensor = self.adapter(x, shape)
        return out

    def forward(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Apply attention, MLP and adapter to `x [N, L, C]`."""
        return self.adapt(self.trunk(x, shape), shape)  # [N, L, C]


class VisionTransformer(VideoBackbone):
    """Video encoder, chunk by chunk: VideoMAE's, and with other parts (`make_block` and its like) another's.

    Args:
        config: its shape.
        checkpointing: which activations are kept for the backward.

            - `none` keeps every one.
            - `blocks` recomputes each block from its input.
            - `attention` does too, but keeps the attention outputs: more memory, no second attention kernel.
            - `segments` keeps one tensor a block, and in a wide ViT the attention output of some; it recomputes a part
              of the chunks at a time, with a backward written by hand where attention and MLP are frozen (the fastest
              of those that recompute, on an H200).
            - `two_level` is `segments` that keeps the input of only about sqrt(2 depth) blocks, and runs most of the
              forward twice.
            - `offload` keeps the inputs in pinned main memory: least GPU memory, and no slower than `segments` where
              the bus is fast enough.

    Example:
        >>> config = VitConfig(image_size=32, embed_dim=48, depth=1, heads=3, mlp_dim=96, chunk_frames=4)
        >>> VisionTransformer(config)(torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8), videos=1).shape
        torch.Size([2, 48, 2, 2, 2])
    """

    kind = "videomae"  # its line in `detection/backbones`
    by_hand = True

    def __init__(self, config: VitConfig, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = checkpointing
        side = config.image_size // config.patch_size
        self.stored_grid = (config.chunk_frames // config.tubelet, side, side)
        self.patch_embed = PatchEmbed(config)
        self._resized: tuple[Any, Tensor] | None = None
        self._host = HostStore()
        self.ladders = None
        self.fc_norm = None
        self.make_positions()
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(self.make_block(rate) for rate in rates)
        self.make_norm()
        self.apply(_initialise)

    def parts(self) -> list[nn.Module]:
        """Return the blocks, first to last."""
        return list(self.blocks)

    def make_positions(self) -> None:
        """Make the table of positions, a buffer or parameter `pos_embed`; a kind without a table makes none."""
        side = self.stored_grid[0] * self.stored_grid[1] * self.stored_grid[2]
        # persistent, as in OpenTAD's files: what we train loads there strictly
        self.register_buffer("pos_embed", sinusoid_table(side, self.config.embed_dim))

    def make_block(self, drop_path: float) -> Block:
        """Make one block; `drop_path` is its rate of stochastic depth."""
        return Block(self.config, drop_path)

    def make_norm(self) -> None:
        """Make the norm after the last block."""
        self.fc_norm = nn.LayerNorm(self.config.embed_dim, eps=self.config.eps)  # in every file; no map needs it

    def begin(self, tokens: Tensor, shape: VideoShape) -> Tensor:
        """Return the input of the first block, for tokens without positions; both are `[N, L, C]`."""
        return tokens + self.positions(shape).to(tokens.dtype)

    def finish(self, x: Tensor) -> Tensor:
        """Return the tokens of the feature map `[N, t*h*w, C]`, for the output of the last block."""
        return x

    def embed(self, chunks: Tensor) -> Tensor:
        """Return tokens `[N, L, C]`, without positions, of raw frames `[N, 3, t, H, W]` (0..255, uint8 or float)."""
        mean, std = self.config.mean, self.config.std
        parts = [self.patch_embed(normalise_frames(part, mean, std)) for part in torch.split(chunks, _EMBED_CHUNKS)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def positions(self, shape: VideoShape) -> Tensor:
        """Return the position table `[1, t*h*w, C]` for the grid of `shape`; it is resized once for each grid."""
        return self.resized(self.get_buffer("pos_embed"), shape)

    def resized(self, table: Tensor, shape: VideoShape) -> Tensor:
        """Resize a position table `[1, t*h*w, C]` of the stored grid to that of `shape`; the last answer is kept."""
        grid = (shape.t, shape.h, shape.w)
        # loading writes in place and moving makes another tensor: both must be seen
        key = (grid, table.data_ptr(), table._version, table.device, table.dtype)
        if self._resized is None or self._resized[0] != key:
            self._resized = (key, resize_positions(table, self.stored_grid, grid))
        return self._resized[1]

    def encode(self, tokens: Tensor, shape: VideoShape) -> Tensor:
        """Run tokens without positions `[N, L, C]` through all blocks: `[N, L, C]`."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        stream = [self.begin(tokens, shape)]
        del tokens
        if isinstance(self.ladders, Ladder):
            return self.finish(self._climb(self.ladders, blocks, stream.pop(), shape))
        if self.checkpointing == "segments":
            return self.finish(self._run_segments(blocks, stream.pop(), shape))
        if self.checkpointing in ("two_level", "offload"):
            return self.finish(self._run_chain(blocks, stream, shape))  # it alone decides how long its input lives
        x = stream.pop()
        for block in blocks:
            x = self._run(block, x, shape)
        return self.finish(x)

    def forward(self, chunks: Tensor, videos: int) -> Tensor:
        """Encode raw frames.

        Args:
            chunks: `[videos * chunks, 3, t, H, W]`, 0..255; chunks of one video lie side by side.
            videos: how many videos share the first axis.

        Returns:
            Feature maps `[videos * chunks, C, t/2, h, w]`, with h and w in patches.

        Raises:
            TensorkeepError: `videos` does not divide the chunks, or a frame is smaller than a patch.
        """
        if chunks.shape[0] % videos:
            raise TensorkeepError(f"{chunks.shape[0]} chunks cannot belong to {videos} videos", where="vit")
        t, h, w = (size // step for size, step in zip(chunks.shape[2:], self.patch_embed.kernel))
        x = self.encode(self.embed(chunks), VideoShape(videos, t, h, w))  # [N, L, C]
        return x.transpose(1, 2).reshape(len(x), -1, t, h, w)  # [N, C, t, h, w]

    def _run_segments(self, blocks: list[Block], x: Tensor, shape: VideoShape) -> Tensor:
        """Run the blocks link by link: link i is the adapter of block i - 1 with the attention and MLP of block i."""
        for index, (before, after) in enumerate(zip([None, *blocks], [*blocks, None])):
            part = attention_kept(self.config.embed_dim)
            keep = int((index + 1) * part) > int(index * part)
            link, parameters = _link(before, after, x, shape, part_size(x, len(blocks) - index), keep)
            if isinstance(link, FrozenLink) and link.trunk is not None:
                x = run_frozen(link, x, parameters)
            else:
                x = run_segment(link, x, parameters)
        return x

    def _run_chain(self, blocks: list[Block], stream: list[Tensor], shape: VideoShape) -> Tensor:
        """Run the same links as one operation, but for the last adapter (see `_chain`); `stream` is emptied."""
        x = stream[0]
        size = part_size(x, 1)
        pairs = [_link(*pair, x, shape, size, False) for pair in zip([None, *blocks], blocks)]
        last, parameters = _link(blocks[-1], None, x, shape, size, False)
        del x
        kept = KeptInputs(self._host if self.checkpointing == "offload" else None)
        adapted = blocks[-1].adapter is not None
        out = run_chain(pairs, stream, kept, own=adapted)
        return run_segment(last, out, parameters) if adapted else out

    def _run(self, block: Block, x: Tensor, shape: VideoShape) -> Tensor:
        """Run one block, recomputed in the backward as `checkpointing` says: `none`, `blocks` or `attention`."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            out: Tensor = block(x, shape)
            return out
        if not x.requires_grad and not any(p.requires_grad for p in _trunk_parameters(block)):
            # nothing before the adapter has a gradient (block 0 of a frozen ViT): recomputing it would be waste
            x = block.trunk(x, shape)
            return x if block.adapter is None else self._checkpoint(block.adapt, x, shape)
        return self._checkpoint(block, x, shape)

    def _climb(self, ladder: Ladder, blocks: list[Block], x: Tensor, shape: VideoShape) -> Tensor:
        """Run the frozen blocks without gradients and keep what the ladder reads, then climb it."""
        rungs = []
        for index, block in enumerate(blocks[: ladder.rungs[-1] + 1]):
            link = _link(None, block, x, shape, part_size(x, 1), False)[0]  # made here, it knows of training
            with torch.no_grad():
                x = link.forward(x)[0]
            if index in ladder.rungs:
                rungs.append(x)
        again = self.checkpointing != "none" and torch.is_grad_enabled()
        out: Tensor = ladder(rungs, shape, self._checkpoint if again else None)
        return out

    def _checkpoint(self, module: Callable[[Tensor, VideoShape], Tensor], x: Tensor, shape: VideoShape) -> Tensor:
        """Run a module by torch's checkpointing."""
        extra: dict[str, Any] = {"context_fn": keep_attention} if self.checkpointing == "attention" else {}
        # random numbers are drawn in training only (drop path, LoRA dropout); saving their state costs a sync
        out: Tensor = checkpoint(module, x, shape, use_reentrant=False, preserve_rng_state=self.training, **extra)
        return out


def _unchanged(x: Tensor) -> Tensor:
    return x


def _link(
    before: Block | None, after: Block | None, x: Tensor, shape: VideoShape, size: int, keep: bool
) -> tuple[Link, list[nn.Parameter]]:
    """Make the link of `before`'s adapter and `after`'s attention and MLP, and list the parameters of both that train.

    It is a `FrozenLink` where attention and MLP are frozen, the adapter offers its `branch` and autocast is off.
    """
    adapter = None if before is None else before.adapter
    inner = () if after is None else _trunk_parameters(after)
    parameters = [p for p in [*_adapter_parameters(before), *inner] if p.requires_grad]
    kept: tuple[Tensor | None, Tensor | None] = (None, None)
    if after is not None:  # drawn here, for all chunks at once: the parts run twice
        kept = (draw_kept(x, after.drop_path, after.training), draw_kept(x, after.drop_path, after.training))
    branch = None if before is None else before.branch(shape)
    trunk = None if after is None else after.frozen(x, shape)
    by_hand = (after is None or trunk is not None) and (adapter is None or branch is not None)
    if by_hand and not torch.is_autocast_enabled(x.device.type):
        return FrozenLink(branch, trunk, kept, size, keep, _draws(adapter)), parameters
    whole = _unchanged if before is None else partial(before.adapt, shape=shape)
    parts = _same_part if after is None else partial(_core_part, after, kept, shape)
    modules = [adapter, *([] if after is None else [after.attn, after.mlp])]
    return AutogradLink(whole, parts, size, any(map(_draws, modules)), x.device.type), parameters


def _draws(module: nn.Module | None) -> bool:
    """Return whether `module` draws random numbers: dropout, by the names of this package or torch's."""
    if module is None or not module.training:
        return False
    return any(getattr(m, "dropout", 0.0) or isinstance(m, _DropoutNd) for m in module.modules())


def _core_part(
    block: Block, kept: tuple[Tensor | None, Tensor | None], shape: VideoShape, x: Tensor, part: slice
) -> Tensor:
    """Apply attention and MLP to some chunks."""
    attention, mlp = (None if factor is None else factor[part] for factor in kept)
    return block.core(x, attention, mlp, shape)


def _same_part(x: Tensor, _part: slice) -> Tensor:
    return x


def _adapter_parameters(block: Block | None) -> Iterable[nn.Parameter]:
    """Return the parameters of a block's adapter."""
    return () if block is None or block.adapter is None else block.adapter.parameters()


def _trunk_parameters(block: Block) -> Iterable[nn.Parameter]:
    """Return the parameters of a block but for its adapter's."""
    return (p for name, p in block.named_parameters() if not name.startswith("adapter."))


def _initialise(module: nn.Module) -> None:
    """Set a linear's weights as VideoMAE trains from scratch; pretrained ones overwrite them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
