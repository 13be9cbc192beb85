"""What comes before a video transformer's first block: tokens of tubelets, and the table of positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model.config import VitConfig
from tensorkeep.errors import TensorkeepError


class PatchEmbed(nn.Module):
    """Tubelets to tokens: a Conv3d whose stride is its kernel, computed as one matrix product."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.kernel = (config.tubelet, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.embed_dim, self.kernel, stride=self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens `[N, t/2 * H/16 * W/16, C]` for normalised `x [N, 3, t, H, W]`.

        Pixels right and below that fill no patch are cut off.

        Raises:
            TensorkeepError: The frames are smaller than a patch.
        """
        n, channels = x.shape[:2]
        a, p, q = self.kernel
        t, h, w = (size // step for size, step in zip(x.shape[2:], self.kernel))
        if not t * h * w:
            what = f"frames {tuple(x.shape[2:])} (t, H, W) are smaller than a patch {self.kernel}"
            raise TensorkeepError(what, where="vit.patch_embed", hint="resize the frames")
        # as a convolution would: v2-g's patch of 14 leaves 6 of 160 pixels over
        x = x[:, :, : t * a, : h * p, : w * q].to(self.proj.weight.dtype)
        x = x.reshape(n, channels, t, a, h, p, w, q)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n, t * h * w, -1)  # [N, L, 3*2*16*16]
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # [N, L, C]


def sinusoid_table(length: int, channels: int) -> Tensor:
    """Compute a fixed position table `[1, length, channels]`, float32, by way of float64.

    Angle `n / 10000^((j - j mod 2) / channels)`; even j sine, odd j cosine ("Attention is all you need", 3.5).

    Example:
        >>> sinusoid_table(2, 4)[0, 1]
        tensor([0.8415, 0.5403, 0.0100, 0.9999])
    """
    j = torch.arange(channels, dtype=torch.float64, device="cpu")
    n = torch.arange(length, dtype=torch.float64, device="cpu")
    angle = n[:, None] / torch.pow(10000.0, (j - j % 2) / channels)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()[None]


def resize_positions(table: Tensor, stored: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Resize a position table to another grid, each time slice bicubically (align_corners False).

    Runs without gradients: the table is fixed, and bicubic has no deterministic backward on CUDA.

    Args:
        table: `[1, t * h' * w', C]`.
        stored: its grid (t, h', w').
        grid: the grid (t, h, w) that is wanted.

    Returns:
        `[1, t * h * w, C]`.

    Raises:
        TensorkeepError: The two grids differ in t.
    """
    if stored == grid:
        return table
    if stored[0] != grid[0]:
        raise TensorkeepError(
            f"a chunk has {grid[0]} tubelets, the position table {stored[0]}",
            where="vit",
            hint="feed chunks of `chunk_frames` frames",
        )
    with torch.no_grad():
        planes = table.view(*stored, -1).permute(0, 3, 1, 2)  # [t, C, g, g]
        planes = F.interpolate(planes, size=grid[1:], mode="bicubic", align_corners=False)
        return planes.permute(0, 2, 3, 1).reshape(1, -1, table.shape[-1])  # [1, t*h*w, C]
