"""A stand-in for OpenTAD: its engine's names and arguments, and a tool that binds them before it reads a config.

`installed` puts them into `sys.modules`, made anew each time, since a test replaces them everywhere.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.integrations._opentad_backbone import VisionTransformerQLoRA

MAIN = """
from opentad.cores import train_one_epoch, val_one_epoch, eval_one_epoch, build_optimizer
from opentad.utils import ModelEma, save_checkpoint, save_best_checkpoint
import torch

def main(read_config, model, work_dir, epochs, logger, resume=None, evaluate=True, lr=1e-2):
    read_config()
    model_ema = ModelEma(model)
    optimizer = build_optimizer({"lr": lr}, model, logger)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    first = 0
    if resume is not None:
        checkpoint = torch.load(resume)
        first = checkpoint["epoch"] + 1
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        model_ema.module.load_state_dict(checkpoint["state_dict_ema"])
    for epoch in range(first, epochs):
        train_one_epoch(None, model, optimizer, scheduler, epoch, logger, model_ema=model_ema)
        save_checkpoint(model, model_ema, optimizer, scheduler, epoch, work_dir=work_dir)
        if evaluate:
            eval_one_epoch(None, model, None, logger, 0, model_ema=model_ema)
    return model_ema
"""


class Net(nn.Module):
    """A backbone with adapters under a head, with dropout and the buffer that becomes a float in training."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        shape: Any = {"img_size": 32, "embed_dims": 64, "depth": 1, "num_heads": 2, "num_frames": 4, "total_frames": 8}
        self.backbone = VisionTransformerQLoRA(**shape, lora_r=4)
        self.head = nn.Linear(64, 3)
        self.register_buffer("loss_normalizer", torch.tensor(100))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.dropout(self.backbone(x).mean((2, 3, 4)), 0.2, self.training))
        if self.training:
            self.loss_normalizer = 0.9 * self.loss_normalizer + 0.1 * 7.3
        return (out - 1).square().sum() / self.loss_normalizer


def engine() -> dict[str, dict[str, Any]]:
    """Make OpenTAD's engine anew: module -> name -> object; what must be replaced fails when it is called."""

    def build_optimizer(cfg: Any, model: Any, logger: Any) -> Any:
        groups = [[p for n, p in model.named_parameters() if ("adapter" in n) == adapter] for adapter in (True, False)]
        return torch.optim.AdamW([{"params": group} for group in groups], lr=cfg["lr"])

    return {**_saving(), **_epochs(), "cores.optimizer": {"build_optimizer": build_optimizer}}


def _saving() -> dict[str, dict[str, Any]]:
    """OpenTAD's average and its two ways of saving, none of which may be called."""

    class ModelEma:
        def __init__(self, model: Any, decay: float = 0.999, device: Any = None) -> None:
            raise AssertionError("OpenTAD's own average")

    def save_checkpoint(
        model: Any, model_ema: Any, optimizer: Any, scheduler: Any, epoch: Any, work_dir: Any = None
    ) -> None:
        raise AssertionError("OpenTAD's own checkpoint")

    def save_best_checkpoint(model: Any, model_ema: Any, epoch: Any, work_dir: Any = None) -> None:
        raise AssertionError("OpenTAD's own checkpoint")

    return {
        "utils.ema": {"ModelEma": ModelEma},
        "utils.checkpoint": {"save_checkpoint": save_checkpoint, "save_best_checkpoint": save_best_checkpoint},
    }


def _epochs() -> dict[str, dict[str, Any]]:
    """OpenTAD's loops over an epoch, with its arguments."""

    def train_one_epoch(
        train_loader: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        curr_epoch: Any,
        logger: Any,
        model_ema: Any = None,
        clip_grad_l2norm: Any = -1,
        logging_interval: Any = 200,
        scaler: Any = None,
    ) -> None:
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            frames = torch.randn(2, 3, 4, 32, 32) + random.random()  # augmented by the process's own generators
            model(frames).backward()
            optimizer.step()
            scheduler.step()
            model_ema.update(model)

    def val_one_epoch(
        val_loader: Any,
        model: Any,
        logger: Any,
        rank: Any,
        curr_epoch: Any,
        model_ema: Any = None,
        use_amp: Any = False,
    ) -> dict[str, Any]:
        return _seen(model, model_ema)

    def eval_one_epoch(
        test_loader: Any,
        model: Any,
        cfg: Any,
        logger: Any,
        rank: Any,
        model_ema: Any = None,
        use_amp: Any = False,
        world_size: Any = 0,
        not_eval: Any = False,
    ) -> dict[str, Any]:
        found = _seen(model, model_ema)
        if cfg is not None:
            raise cfg
        return found

    return {
        "cores.train_engine": {"train_one_epoch": train_one_epoch, "val_one_epoch": val_one_epoch},
        "cores.test_engine": {"eval_one_epoch": eval_one_epoch},
    }


def _seen(model: Any, model_ema: Any) -> dict[str, Any]:
    """Evaluate: what the evaluation is given, and the model's weights meanwhile."""
    model.eval()
    torch.randn(random.randint(1, 9))  # a loader draws its seed
    return {"model_ema": model_ema, "weights": {n: t.clone() for n, t in model.state_dict().items()}}


def installed(put: Callable[[str, Any], None], objects: dict[str, dict[str, Any]]) -> ModuleType:
    """Put OpenTAD, mmengine's registry and a tool as `__main__` into `sys.modules` by `put(name, module)`; the tool."""
    for package in ("opentad", "opentad.utils", "opentad.cores", "mmengine", "mmengine.registry"):
        put(package, ModuleType(package))
    for name, members in objects.items():
        module = ModuleType(f"opentad.{name}")
        parent = sys.modules[f"opentad.{name.partition('.')[0]}"]
        for key, value in members.items():
            setattr(module, key, value)
            setattr(parent, key, value)
        put(module.__name__, module)
    registry: dict[str, Any] = {}

    def register_module(module: Any) -> None:
        if module.__name__ in registry:
            raise KeyError(f"{module.__name__} is already registered in models")
        registry[module.__name__] = module

    models = SimpleNamespace(register_module=register_module, built=registry)
    sys.modules["mmengine.registry"].MODELS = models  # type: ignore[attr-defined]
    main = ModuleType("__main__")
    exec(MAIN, vars(main))
    put("__main__", main)
    return main
