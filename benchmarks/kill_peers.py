"""The peers of `benchmarks.kill`: the same model and text, saved every update, resumed by each tool's own rule.

transformers Trainer by `get_last_checkpoint`, accelerate by `load_state()` with automatic naming, pytorch-lightning by
`ckpt_path="last"`, plain DCP into a folder a step by the newest `.metadata` (what torchtitan does) and by the highest
number. Their data is not augmented, and each is written as its documentation shows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.kill import BATCH, UPDATES, Marks, System, Text, cosine, model, tokens_loss
from tensorkeep.training.randomness import seed_process


class Windows(Dataset[dict[str, Tensor]]):
    """The text's windows, where they always begin."""

    def __init__(self) -> None:
        self.text = Text(shift=False)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.text.sample(index, torch.Generator())
        return {"input_ids": ids, "labels": ids}


def digest(net: nn.Module) -> str:
    """Of every weight."""
    sha = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def finish(run: Path, net: nn.Module) -> None:
    (run / "result").write_text(digest(net))


def result(run: Path) -> Any:
    return {"digest": (run / "result").read_text()}


def numbered(run: Path, pattern: str, needs: str = "") -> list[tuple[int, Path]]:
    """Folders by the number at their end, newest first; only those that hold `needs`."""
    found = [(int(p.name.rpartition("-")[2].rpartition("_")[2]), p) for p in run.glob(pattern)]
    return sorted((f for f in found if not needs or (f[1] / needs).exists()), reverse=True)


def newest_by(pattern: str, needs: str = "") -> Callable[[Path], int | None]:
    return lambda run: next((n for n, _ in numbered(run, pattern, needs)), None)


def drop_by(pattern: str) -> Callable[[Path], None]:
    return lambda run: shutil.rmtree(numbered(run, pattern)[0][1])


# -- transformers -----------------------------------------------------------------------------------------------------


def train_transformers(run: Path, marks: Marks, start: int) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Ours(Trainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            marks.set(1, 1)
            super()._save_checkpoint(*args, **kwargs)
            marks.set(2, self.state.global_step)
            marks.set(1, 0)

    class Begun(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.set(0, 1)

    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=UPDATES,
        per_device_train_batch_size=BATCH,
        save_steps=1,
        logging_steps=1,
        save_total_limit=3,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
    )
    net = model()
    trainer = Ours(model=net, args=arguments, train_dataset=Windows(), callbacks=[Begun()])
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    finish(run, net)


# -- accelerate -------------------------------------------------------------------------------------------------------


def train_accelerate(run: Path, marks: Marks, start: int) -> None:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed

    set_seed(0)
    configuration = ProjectConfiguration(project_dir=str(run), automatic_checkpoint_naming=True, total_limit=3)
    accelerator = Accelerator(cpu=True, project_config=configuration)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: cosine(update, 1.0))
    loader = DataLoader(Windows(), batch_size=BATCH, shuffle=True, drop_last=True)  # type: ignore[var-annotated]
    net, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)
    step = 0
    if numbered(run, "checkpoints/checkpoint_*"):
        accelerator.load_state()
        step = int(schedule.state_dict()["last_epoch"])
        configuration.iteration = numbered(run, "checkpoints/checkpoint_*")[0][0] + 1
    marks.set(0, 1)
    while step < UPDATES:
        done = step % len(loader)
        for batch in accelerator.skip_first_batches(loader, done) if done else loader:
            loss = tokens_loss(net, batch["input_ids"], float(BATCH * (batch["input_ids"].shape[1] - 1)))["loss"]
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            marks.set(1, 1)
            accelerator.save_state()
            marks.set(2, step)
            marks.set(1, 0)
            if step == UPDATES:
                break
    finish(run, accelerator.unwrap_model(net))


# -- pytorch-lightning ------------------------------------------------------------------------------------------------


def train_lightning(run: Path, marks: Marks, start: int) -> None:
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Marked(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            marks.set(1, 1)
            super().on_train_batch_end(trainer, *args, **kwargs)
            marks.set(2, trainer.global_step)
            marks.set(1, 0)

        def on_train_start(self, *args: Any, **kwargs: Any) -> None:
            marks.set(0, 1)
            super().on_train_start(*args, **kwargs)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            ids = batch["input_ids"]
            return tokens_loss(self.net, ids, float(ids[:, 1:].numel()))["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: cosine(update, 1.0))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    lightning.seed_everything(0, verbose=False)
    module = Module()
    keeper = Marked(dirpath=run, save_last=True, every_n_train_steps=1, save_top_k=1)
    trainer = lightning.Trainer(
        max_steps=UPDATES,
        accelerator="cpu",
        callbacks=[keeper],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )
    loader = DataLoader(Windows(), batch_size=BATCH, shuffle=True, drop_last=True)  # type: ignore[var-annotated]
    trainer.fit(module, loader, ckpt_path="last", weights_only=False)
    finish(run, module.net)


def newest_lightning(run: Path) -> int | None:
    try:
        return int(torch.load(run / "last.ckpt", weights_only=False)["global_step"])
    except (OSError, RuntimeError, EOFError):
        return None


def drop_lightning(run: Path) -> None:
    (run / "last.ckpt").unlink()


# -- DCP --------------------------------------------------------------------------------------------------------------


def train_dcp(run: Path, marks: Marks, start: int, needs: str = ".metadata") -> None:
    import torch.distributed.checkpoint as dcp

    seed_process(0)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    windows, step = Windows(), 0
    for parameter in net.parameters():  # a load needs moments to load into
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    net = model()
    state = {p: {k: v * 0 for k, v in s.items()} for p, s in zip(net.parameters(), optimizer.state.values())}
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    optimizer.state.update(state)
    found = numbered(run, "step-*", needs)

    def everything() -> dict[str, Any]:
        return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}

    if found:
        step, held = found[0][0], everything()
        dcp.load(held, checkpoint_id=str(found[0][1]))
        net.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        torch.set_rng_state(held["rng"])
    marks.set(0, 1)
    while step < UPDATES:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(step * BATCH // len(windows)))
        picked = [int(order[(step * BATCH + i) % len(windows)]) for i in range(BATCH)]
        ids = torch.stack([windows[i]["input_ids"] for i in picked])
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, 3e-3)
        optimizer.zero_grad()
        tokens_loss(net, ids, float(ids[:, 1:].numel()))["loss"].backward()
        optimizer.step()
        step += 1
        marks.set(1, 1)
        dcp.save(everything(), checkpoint_id=str(run / f"step-{step}"))
        marks.set(2, step)
        marks.set(1, 0)
        for _, old in numbered(run, "step-*")[3:]:
            shutil.rmtree(old)
    finish(run, net)


def train_dcp_highest(run: Path, marks: Marks, start: int) -> None:
    train_dcp(run, marks, start, needs="")


def systems() -> list[System]:
    """The peers that can be imported."""
    out = [
        System("transformers Trainer", train_transformers, result, newest_by("checkpoint-*"), drop_by("checkpoint-*")),
        System(
            "accelerate save_state", train_accelerate, result, newest_accelerate, drop_by("checkpoints/checkpoint_*")
        ),
        System("DCP, newest .metadata", train_dcp, result, newest_by("step-*", ".metadata"), drop_by("step-*")),
        System("DCP, highest step", train_dcp_highest, result, newest_by("step-*"), drop_by("step-*")),
    ]
    if importlib.util.find_spec("pytorch_lightning"):
        out.append(System("pytorch-lightning last", train_lightning, result, newest_lightning, drop_lightning))
    return [s for s in out if importlib.util.find_spec(s.name.split()[0]) or s.name.startswith(("DCP", "pytorch"))]


def newest_accelerate(run: Path) -> int | None:
    """Folders count saves from 0, so the highest is one less than the updates."""
    found = numbered(run, "checkpoints/checkpoint_*")
    return found[0][0] + 1 if found else None
