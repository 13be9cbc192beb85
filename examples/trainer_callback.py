"""transformers' Trainer, killed inside a save: `python examples/trainer_callback.py`.

A tiny Llama is trained with TensorkeepCallback, killed by SIGKILL while Trainer writes its newest checkpoint, and loses
a bit of the one before to the disk. The same script goes on from the newest valid one and ends, bitwise, where a run
that was never touched ends.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging as theirs

from tensorkeep.integrations.transformers import TensorkeepCallback, newest_valid

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_dropout=0.1,
)


class Doomed(Trainer):
    """Dies in the middle of the save of step 6: the weights are written, the rest is not."""

    def _save_optimizer_and_scheduler(self, folder: str) -> None:
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(folder)


def trainer(out: Path, kind: type[Trainer] = Trainer) -> tuple[Trainer, TensorkeepCallback]:
    torch.manual_seed(0)
    ids = torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        str(out),
        max_steps=8,
        save_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    callback = TensorkeepCallback(keep_last=3, ema_decay=0.9)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return kind(LlamaForCausalLM(TINY), arguments, train_dataset=rows, callbacks=[callback]), callback


def killed(out: Path) -> int:
    """Train in a process of its own; the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        trainer(out, Doomed)[0].train()
        os._exit(1)  # not reached
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def flip_a_bit(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 16
    path.write_bytes(blob)


def main() -> None:
    logging.basicConfig(format="%(message)s")
    theirs.disable_progress_bar()
    torch.set_num_threads(1)  # a fork may not have other threads at work
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        print("killed by signal", killed(out), "inside a save; on the disk:", sorted(p.name for p in out.iterdir()))
        flip_a_bit(out / "checkpoint-5" / "model.safetensors")
        found = newest_valid(out)
        print("newest valid:", found and Path(found).name)
        assert found == str(out / "checkpoint-4")

        resumed, average = trainer(out)
        resumed.train(resume_from_checkpoint=found)
        whole, other = trainer(Path(folder, "whole"))
        whole.train()

        weights = zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
        assert all(torch.equal(a, b) for a, b in weights)
        assert average.ema and other.ema
        assert all(torch.equal(a, b) for a, b in zip(average.ema.tensors.values(), other.ema.tensors.values()))
        losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (resumed, whole)]
        assert losses[0] == losses[1]
        print(
            f"8 losses, all weights and their average: bitwise those of a run never touched (last {losses[0][-1]:.6f})"
        )


if __name__ == "__main__":
    main()
