"""Small runs of MiniMind for tests: a model, its rows, and resume files as torch.save makes them.

Model and loop are written from MiniMind's description (tests/parity).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.parity.minimind_model import MiniMind
from tests.parity.minimind_resume import Rows, replay

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SIZES = {
    "vocab": 24,
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "head_dim": 8,
    "kv_heads": 1,
    "theta": 1e6,
    "eps": 1e-6,
    "width": 24,
    "moe_width": 12,
    "shared": 1,
    "norm_topk": True,
    "aux": 5e-4,
    "top": 1,
}


def small(made: str = "mm3", experts: int = 0, seed: int = 0) -> MiniMind:
    torch.manual_seed(seed)
    return MiniMind({**SIZES, "experts": experts, "qk_norm": made == "mm3", "top": 1 if made == "mm3" else 2})


def rows(length: int = 26, width: int = 10) -> Rows:
    ids = torch.randint(3, 24, (length, width), generator=torch.Generator().manual_seed(5))
    return Rows(ids, torch.where(torch.arange(width) < width - torch.arange(length)[:, None] % 4, ids, -100))


def held_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    step: int,
    dtype: torch.dtype = torch.float16,
    prefix: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Build a resume file's content as MiniMind makes it."""
    state = {prefix + n: t.detach().to(dtype).clone() for n, t in model.state_dict().items()}
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": step,
        "world_size": 1,
        "wandb_id": None,
        "scaler": {},
        **more,
    }


def save(folder: Path, held: dict[str, Any], name: str = "pretrain_16_resume.pth") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(held, folder / name)
    return folder / name


def trained(model: nn.Module, parameters: list[nn.Parameter] | None = None) -> torch.optim.Optimizer:
    """Make an AdamW whose state differs from parameter to parameter."""
    optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=1e-3)
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = torch.full_like(p, 1.0 + i)
    optimizer.step()
    return optimizer


def stopped(
    folder: Path,
    at: tuple[int, int],
    batch: int = 3,
    accumulation: int = 2,
    epochs: int = 2,
    kind: tuple[str, int] = ("mm3", 0),
    dtype: torch.dtype = torch.float32,
    early: bool = False,
) -> tuple[Path, list[tuple[list[int], float]], MiniMind]:
    """Stop a run of MiniMind behind micro-batch `at`: its resume file, and what the run does uninterrupted."""
    whole, model, data = small(*kind), small(*kind), rows()
    after = replay(
        whole, torch.optim.AdamW(whole.parameters(), lr=2e-3), data, batch, accumulation, epochs, 2e-3, early=early
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = replay(model, optimizer, data, batch, accumulation, epochs, 2e-3, stop=at, early=early)
    file = save(folder, held_of(model, optimizer, *at, dtype))
    return file, after[len(before) :], whole
