"""The peers of `benchmarks.crash` that are frameworks, and the list of all writers.

Each saves as its documentation shows and resumes by its own rule: transformers Trainer by `get_last_checkpoint`,
accelerate by `load_state()` with automatic naming, pytorch-lightning by `ckpt_path="last"`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.crash_writers import (
    KEPT,
    Enough,
    Found,
    Net,
    Told,
    Writer,
    captured,
    files_ours,
    fill,
    numbered,
    randomness,
    replaced,
    resume_dcp,
    resume_ours,
    resume_safetensors,
    resume_torch,
    save_dcp,
    save_ours,
    write_safetensors,
    write_torch,
)

# -- transformers -----------------------------------------------------------------------------------------------------


def trainer(place: Path, callback: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=1_000_000,
        per_device_train_batch_size=1,
        save_steps=1,
        logging_steps=1000,
        save_total_limit=KEPT,
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 64
    return Trainer(model=Net(), args=arguments, train_dataset=data, callbacks=[callback])


def save_transformers(place: Path, steps: int, told: Told) -> None:
    from transformers import TrainerCallback

    class Filled(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
            fill(model, optimizer, state.global_step)
            control.should_training_stop = state.global_step >= steps

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told(state.global_step)

    trainer(place, Filled()).train()


def resume_transformers(place: Path) -> Found | None:
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    out: list[Found] = []

    class Looked(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any
        ) -> None:
            rest = (lr_scheduler.state_dict(), randomness(), dataclasses.asdict(state))
            out.append(captured(model, optimizer, state.global_step, *rest))
            raise Enough

    last = get_last_checkpoint(str(place))
    if last is None:
        return None
    with contextlib.suppress(Enough):
        trainer(place, Looked()).train(resume_from_checkpoint=last)
    return out[0]


# -- accelerate -------------------------------------------------------------------------------------------------------


class Count:
    """The step, as an object registered for checkpointing."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, held: dict[str, int]) -> None:
        self.step = held["step"]


def accelerated(place: Path) -> tuple[Any, Any, Any, Count]:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed

    set_seed(0)
    configuration = ProjectConfiguration(project_dir=str(place), automatic_checkpoint_naming=True, total_limit=KEPT)
    accelerator, count, net = Accelerator(cpu=True, project_config=configuration), Count(), Net()
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    accelerator.register_for_checkpointing(count)
    return accelerator, net, optimizer, count


def save_accelerate(place: Path, steps: int, told: Told) -> None:
    accelerator, net, optimizer, count = accelerated(place)
    for count.step in range(1, steps + 1):
        fill(net, optimizer.optimizer, count.step)
        accelerator.save_state()
        told(count.step)


def resume_accelerate(place: Path) -> Found | None:
    if not numbered(place, "checkpoints/checkpoint_*"):
        return None
    accelerator, net, optimizer, count = accelerated(place)
    accelerator.load_state()
    return captured(net, optimizer.optimizer, count.step, randomness())


# -- pytorch-lightning ------------------------------------------------------------------------------------------------


def lightning(place: Path, keeper: Any, *callbacks: Any) -> None:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    made = pl.Trainer(
        max_steps=-1,
        accelerator="cpu",
        callbacks=[*callbacks, keeper],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=place,
    )
    data = torch.utils.data.DataLoader([torch.ones(1)] * 64)  # type: ignore[arg-type,var-annotated]
    made.fit(Module(), data, ckpt_path="last", weights_only=False)


def keeper(place: Path, saved: Callable[[Any], None] = lambda trainer: None) -> Any:
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Marked(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(trainer, *args, **kwargs)
            saved(trainer)

    return Marked(dirpath=place, save_last=True, every_n_train_steps=1, save_top_k=1)


def save_lightning(place: Path, steps: int, told: Told) -> None:
    from pytorch_lightning import Callback

    class Filled(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
            fill(module, trainer.optimizers[0], trainer.global_step)
            trainer.should_stop = trainer.global_step >= steps

    lightning(place, keeper(place, lambda trainer: told(trainer.global_step)), Filled())


def resume_lightning(place: Path) -> Found | None:
    from pytorch_lightning import Callback

    out: list[Found] = []

    class Looked(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            loops = trainer.current_epoch, trainer.fit_loop.state_dict()
            out.append(captured(module, trainer.optimizers[0], trainer.global_step, loops))
            raise Enough

    with contextlib.suppress(Enough):
        lightning(place, keeper(place), Looked())
    return out[0] if out[0].step else None  # without "last" it starts over and says so in a warning


# -- all of them ------------------------------------------------------------------------------------------------------


def within(pattern: str) -> Callable[[Path], list[Path]]:
    return lambda place: sorted(p for p in numbered(place, pattern)[0][1].rglob("*") if p.is_file())


def writers() -> list[Writer]:
    """Ours, and the peers that are installed."""
    all_of_them = [
        Writer("tensorkeep", save_ours, resume_ours, files_ours),
        Writer("torch.save + replace", replaced("last.pt", write_torch), resume_torch, lambda p: [p / "last.pt"]),
        Writer(
            "safetensors + rename",
            replaced("last.safetensors", write_safetensors),
            resume_safetensors,
            lambda p: [p / "last.safetensors"],
            ("safetensors.torch",),
        ),
        Writer(
            "DCP step folders",
            save_dcp,
            resume_dcp,
            within("step-*"),
            ("torch.distributed.checkpoint",),
        ),
        Writer(
            "DCP, one tensor",
            partial(save_dcp, stacked=True),
            partial(resume_dcp, stacked=True),
            within("step-*"),
            ("torch.distributed.checkpoint",),
        ),
        Writer(
            "transformers Trainer",
            save_transformers,
            resume_transformers,
            within("checkpoint-*"),
            ("transformers.trainer", "accelerate"),
        ),
        Writer(
            "accelerate save_state",
            save_accelerate,
            resume_accelerate,
            within("checkpoints/checkpoint_*"),
            ("accelerate",),
        ),
        Writer(
            "pytorch-lightning last",
            save_lightning,
            resume_lightning,
            lambda p: [p / "last.ckpt"],
            ("pytorch_lightning",),
        ),
    ]
    return [w for w in all_of_them if all(importlib.util.find_spec(i.split(".")[0]) for i in w.imports)]


def prepare(writer: Writer) -> None:
    """Import what it needs, once and before the forks."""
    for name in writer.imports:
        importlib.import_module(name)
    for parameter in (net := Net()).parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(net.parameters()).step()  # what its first step imports
