"""An accelerate loop, killed inside a save: `python examples/accelerate_hooks.py`.

A frozen base under a trained head with dropout. `register` leaves the base out of the checkpoints (its digest stays),
`save_state` puts each in place whole, `load_state` takes the newest valid one; the run ends bitwise where one that was
never killed ends.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from tensorkeep.integrations.accelerate import load_state, register, save_state
from tensorkeep.training.randomness import order

BATCH, ROWS, STEPS = 8, 64, 24


def train(out: Path, die_at: int | None = None) -> tuple[list[str], dict[str, torch.Tensor]]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    base = nn.Linear(16, 256).requires_grad_(False)
    model = nn.Sequential(base, nn.Tanh(), nn.Dropout(0.2), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    data = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))
    register(accelerator)

    folder = load_state(accelerator, out)  # None: nothing there, start anew
    step = int(folder.name.split("_")[1]) if folder else 0
    losses = []
    while step < STEPS:
        # the order is a function of seed and epoch, the position of the step: nothing to skip after a resume
        epoch, at = divmod(step * BATCH, ROWS)
        x = data[torch.from_numpy(order(0, epoch, ROWS)[at : at + BATCH])]  # [BATCH, 16]
        loss = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        losses.append(loss.item().hex())
        if step == die_at:
            torch.save = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)  # accelerate writes the optimizer with it
        if step % 4 == 0:
            save_state(accelerator, out / f"step_{step}", keep_last=2)
    return losses, {n: t.clone() for n, t in accelerator.unwrap_model(model).state_dict().items()}


def main() -> None:
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)  # a fork may not have other threads at work
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        pid = os.fork()
        if pid == 0:
            train(out, die_at=16)
            os._exit(1)  # not reached
        print("killed by signal", os.WTERMSIG(os.waitpid(pid, 0)[1]), "inside the save of step 16")
        print("on the disk:", sorted(p.name for p in out.iterdir()))

        losses, weights = train(out)
        whole, same = train(Path(folder, "whole"))
        assert len(losses) == 12 and losses == whole[12:]
        assert all(torch.equal(weights[n], same[n]) for n in same)
        kept = sorted(p.name for p in out.iterdir())
        size = sum(p.stat().st_size for p in (out / "step_24").glob("adapter*"))
        print(f"went on at step 12; 12 losses and all weights bitwise those of a run never killed; kept {kept}")
        print(f"weights in a checkpoint: {size} bytes, the model has {sum(t.nbytes for t in same.values())}")


if __name__ == "__main__":
    main()
