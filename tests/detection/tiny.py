"""Small detectors for tests: everything of the real ones, a thousandth of the size."""

from __future__ import annotations

import torch

from tensorkeep.detection.model.config import (
    AdapterConfig,
    BackboneConfig,
    DetectorConfig,
    HeadConfig,
    ProjectionConfig,
    VitConfig,
)
from tensorkeep.detection.model.detector import Detector

VIT = VitConfig(image_size=32, embed_dim=32, depth=2, heads=2, mlp_dim=64, chunk_frames=4, drop_path=0.0)
HEAD = HeadConfig(classes=3, channels=16, strides=(1, 2, 4), ranges=((0, 4), (4, 8), (8, 99)))


def projection(**changes: object) -> ProjectionConfig:
    fields = {"in_channels": 32, "channels": 16, "heads": 2, "embed_layers": 1, "stem_layers": 1, "branch_layers": 2}
    return ProjectionConfig(**{**fields, "drop_path": 0.0, "max_length": 8, **changes})  # type: ignore[arg-type]


def detector(**backbone: object) -> Detector:
    fields: dict[str, object] = {"vit": VIT, "adapter": AdapterConfig(), "output_length": 8, **backbone}
    made = Detector(DetectorConfig(projection(), HEAD, BackboneConfig(**fields)))  # type: ignore[arg-type]
    wake(made)
    return made


def wake(module: torch.nn.Module) -> None:
    """Move every parameter off its start (zero up-projections, layer scales of 1e-4), so that each one matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Frames `[2, 3, 8, 32, 32]` uint8, mask `[2, 8]`, segments and labels; the second video is shorter."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False
    segments = [torch.tensor([[0.5, 3.0], [2.0, 7.5]]), torch.tensor([[1.0, 4.0]])]
    return frames, mask, segments, [torch.tensor([0, 2]), torch.tensor([1])]
