"""pytorch_lightning, killed inside a save: `python examples/lightning_checkpoint.py`.

TensorkeepCheckpointIO writes `.ckpt` folders without pickle, durable and digested. A run is killed by SIGKILL while it
saves, a bit of its newest checkpoint flips, and fit goes on from the newest valid one: in the middle of an epoch, with
dropout and shuffled data, bitwise as if nothing had happened.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from tensorkeep import read
from tensorkeep.integrations.lightning import ExactResume, TensorkeepCheckpointIO, newest_valid
from tensorkeep.training.randomness import order

BATCH, ROWS, STEPS = 8, 40, 12


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 1))
        self.losses: list[str] = []

    def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        loss = (self.layers(x).squeeze(-1) - x.sum(-1)).square().mean()
        self.losses.append(loss.item().hex())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class InOrder:
    """Batches in an order that is a function of the epoch.

    Lightning tells it the epoch (it is its own sampler), and saves where it is, as it does for every loader that has a
    state.
    """

    def __init__(self) -> None:
        self.data = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
        self.sampler = self
        self.epoch = self.at = 0

    def __len__(self) -> int:
        return ROWS // BATCH

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = torch.from_numpy(order(0, self.epoch, ROWS))
        for batch in range(self.at, len(self)):
            self.at = (batch + 1) % len(self)
            yield self.data[rows[batch * BATCH :][:BATCH]]  # [BATCH, 4]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class DoomedIO(TensorkeepCheckpointIO):
    """Dies in the save of step 9, with everything written and nothing yet in place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] == 9:
            os.rename = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)


def fit(out: Path, io: TensorkeepCheckpointIO | None = None) -> Net:
    torch.manual_seed(0)
    model = Net()
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[io or TensorkeepCheckpointIO()],
        callbacks=[ModelCheckpoint(out, every_n_train_steps=1, save_top_k=-1), ExactResume()],
    )
    trainer.fit(model, InOrder(), ckpt_path=newest_valid(out))
    return model


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # a fork may not have other threads at work
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        pid = os.fork()
        if pid == 0:
            fit(out, DoomedIO())
            os._exit(1)  # not reached
        print("killed by signal", os.WTERMSIG(os.waitpid(pid, 0)[1]), "inside the save of step 9")
        newest = Path(str(newest_valid(out)))
        print(
            "newest:",
            newest.name,
            "holding",
            sorted(p.name for p in newest.iterdir()),
            "and",
            len(read(newest)),
            "weights",
        )
        blob = bytearray((newest / "model.safetensors").read_bytes())
        blob[-100] ^= 2
        (newest / "model.safetensors").write_bytes(blob)

        resumed, whole = fit(out), fit(Path(folder, "whole"))
        assert len(resumed.losses) == 5 and resumed.losses == whole.losses[7:]
        assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))
        print("went on at step 7; 5 losses and all weights bitwise those of a run never touched")


if __name__ == "__main__":
    main()
