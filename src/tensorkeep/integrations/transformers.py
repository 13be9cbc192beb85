"""Give transformers' Trainer checkpoints that can be trusted.

Trainer writes `checkpoint-N` in place, fsyncs nothing and takes the highest N on resume, whole or not. The callback
seals each folder after Trainer wrote it; `newest_valid` gives the path to resume from:

    trainer = Trainer(..., callbacks=[TensorkeepCallback(keep_last=3)])
    trainer.train(resume_from_checkpoint=newest_valid(args.output_dir))
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import seals
from tensorkeep.integrations import _folders as folders
from tensorkeep.storage import run_manifest
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.run_folder import EMA
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.waiting import first_works

log = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_EMA_STATE = "ema.json"


def newest_valid(output_dir: str | Path) -> str | None:
    """Find the newest checkpoint of a Trainer whose every byte is what it was when it was sealed.

    Reads every file. Checkpoints passed over stay in place and are named in a warning.

    Args:
        output_dir: the Trainer's folder.

    Returns:
        The path; None where there is none, to start anew.

    Raises:
        TensorkeepError: there are checkpoints and none is valid.

    Example:
        >>> trainer.train(resume_from_checkpoint=newest_valid("out"))  # doctest: +SKIP
    """
    found = folders.newest_sealed([path for _, path in folders.numbered(Path(output_dir), CHECKPOINT)], log)
    return None if found is None else str(found)


def seal(checkpoint: str | Path) -> None:
    """Vouch for a checkpoint that a Trainer without the callback wrote: digest what is there now.

    Args:
        checkpoint: a folder `checkpoint-N`.

    Raises:
        TensorkeepError: it is no checkpoint of a Trainer, holds NaN or Inf (V01), or the disk is full or fails.
    """
    path = Path(checkpoint)
    match = CHECKPOINT.fullmatch(path.name)
    if match is None:
        raise TensorkeepError("is no checkpoint-N of a Trainer", where=path)
    seals.seal(path, int(match[1]))


def load_ema(model: nn.Module, checkpoint: str | Path) -> None:
    """Copy the averages saved in a checkpoint into the model's weights, for evaluation elsewhere or export.

    Args:
        model: the model, with the same parameters set to train.
        checkpoint: a sealed folder `checkpoint-N` that holds `ema.safetensors`.

    Raises:
        TensorkeepError: the file is damaged or holds other tensors than the model trains.
    """
    average = Ema(model)
    average.load_state_dict(folders.read_tensors(Path(checkpoint), EMA), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in average.tensors:
                parameter.copy_(average.tensors[name])


class TensorkeepCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Seals every checkpoint of a Trainer, keeps the newest and the best, and averages weights if asked.

    Args:
        keep_last: how many of the newest checkpoints stay, besides the best; None for all.
        ema_decay: average the trainable weights after each update; None for no average. Every forward in evaluation
            mode runs on the average, whoever asks for it, and `ema.safetensors` lies in every checkpoint. Outside of
            such a forward the model holds the trained weights, so nothing else can save the average by mistake.

    Raises:
        TensorkeepError: `save_total_limit` is set, since Trainer deletes before the new checkpoint is durable. From a
            save: weights with NaN or Inf (V01), a full or failing disk. Older checkpoints stay in all cases.
    """

    def __init__(self, keep_last: int | None = 3, ema_decay: float | None = None) -> None:
        if keep_last is not None and keep_last < 1:
            raise TensorkeepError(f"keep_last must be at least 1, got {keep_last}", where="TensorkeepCallback")
        self.keep_last, self.ema_decay = keep_last, ema_decay
        self.ema: Ema | None = None
        self._hooks: list[Any] = []
        self._depth = 0
        self._stack = ExitStack()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where the Trainer's arguments contradict the callback."""
        if args.save_total_limit is not None:
            raise TensorkeepError(
                f"save_total_limit={args.save_total_limit} deletes checkpoints before the new one is durable",
                where="TrainingArguments",
                hint="leave it out, and use TensorkeepCallback(keep_last=...)",
            )
        if self.ema_decay is not None and (args.fsdp or args.deepspeed):
            raise TensorkeepError(
                f"an average needs whole weights, and {'FSDP' if args.fsdp else 'DeepSpeed'} may shard them",
                where="TrainingArguments",
                hint="leave ema_decay out",
            )
        if self.ema_decay is not None and (args.torch_compile or args.n_gpu > 1):
            what = "torch_compile" if args.torch_compile else "DataParallel over several GPUs of one process"
            raise TensorkeepError(
                f"averages cannot be put in for a forward under {what}",
                where="TrainingArguments",
                hint="leave ema_decay out, or train without it (several GPUs: torchrun)",
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove what a killed save left, and begin or resume the average."""
        if args.should_save:
            folders.clear_remains(Path(args.output_dir), CHECKPOINT)
        if self.ema_decay is None:
            return
        model = kwargs["model"]
        self.ema = Ema(model, self.ema_decay)
        if state.global_step:
            self._resume_ema(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._attach(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the new weights in."""
        if self.ema is not None:
            self.ema.update(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the average that belongs to the best checkpoint, where Trainer loaded that one."""
        if self.ema is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._resume_ema(Path(state.best_model_checkpoint))  # Trainer has loaded the weights that belong to it

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write our files beside Trainer's, seal the folder, and only then delete older ones."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
        # each rank writes its random states, and Trainer waits for none
        first_works(world, lambda: self._seal(folder, state))

    def _seal(self, folder: Path, state: Any) -> None:
        """Write the average into a checkpoint, seal it, and delete older ones."""
        if self.ema is not None:
            folders.write_tensors(folder, EMA, self.ema.state_dict())
            text = json.dumps({"decay": self.ema.decay, "updates": self.ema.updates})
            folders.write_document(folder, _EMA_STATE, text.encode())
        seals.seal(folder, state.global_step)
        if self.keep_last is not None:
            best = CHECKPOINT.fullmatch(Path(state.best_model_checkpoint or "").name)
            found = folders.numbered(folder.parent, CHECKPOINT)
            folders.prune_folders(found, state.global_step, self.keep_last, {int(best[1])} if best else set())

    # -- the average ----------------------------------------------------------------------------------------------

    def _resume_ema(self, folder: Path) -> None:
        """Load the average of the checkpoint that Trainer resumed from.

        Trainer does not say which that was; a checkpoint of this step must be where it saves them.
        """
        assert self.ema is not None
        try:
            tensors = folders.read_tensors(folder, EMA)
            run_manifest.read_whole(folder, _EMA_STATE, run_manifest.read_manifest(folder))
        except TensorkeepError as error:
            raise TensorkeepError(
                f"the average cannot go on: {error.line}",
                where=folder,
                code=error.code,
                hint="copy the checkpoint you resume from into output_dir; "
                "without ema_decay training goes on without it",
            ) from None
        document = parse_json(read_small(folder / _EMA_STATE), folder / _EMA_STATE)
        if document["decay"] != self.ema.decay:
            log.warning("ema_decay was %s, from here it is %s", document["decay"], self.ema.decay)
        self.ema.load_state_dict(tensors, int(document["updates"]))

    def _attach(self, model: nn.Module) -> None:
        """Put the average in for single forwards in evaluation mode.

        Trainer has no event before an evaluation, only after it; and what runs in between may also save. An adapter's
        generate() calls the model inside: both have the hooks.
        """
        for hook in self._hooks:
            hook.remove()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        for module in dict.fromkeys((model, inner)):
            self._hooks += [
                module.register_forward_pre_hook(lambda module, _: self._enter(model)),
                module.register_forward_hook(lambda module, _, out: self._leave(), always_call=True),
            ]

    def _enter(self, model: nn.Module) -> None:
        """Put the average in at the outermost forward in evaluation mode."""
        if self._depth == 0 and self.ema is not None and not model.training:
            self._stack.enter_context(self.ema.applied(model))
        self._depth += 1

    def _leave(self) -> None:
        """Put the trained weights back after the outermost forward."""
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()
