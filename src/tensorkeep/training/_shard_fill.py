"""Read each rank's own part of a checkpoint, sharded or whole, straight into its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.errors import TensorkeepError
from tensorkeep.training._board import Board
from tensorkeep.training.distributed import World, together
from tensorkeep.training.live_state import check_tensors, stored_tensors
from tensorkeep.training.state_files import State

_meetings = itertools.count()  # of the ranks, which all come to each


def filled(state: State, model: nn.Module, optimizer: Optimizer, averages: Mapping[str, Tensor], world: World) -> State:
    """Read this rank's part of a checkpoint: weights and averages straight into the live tensors, moments beside them.

    Names, shapes and dtypes of the weights are compared first. Ranks wait for each other outside of any collective.

    Args:
        state: as it was opened, with `shards`.
        model: its tensors change in place.
        optimizer: names the parameters that moments are laid out like.
        averages: live averages by name, changed in place.
        world: this process among its peers; every rank must call this.

    Returns:
        The state with its tensors: those that were filled, and new ones.

    Raises:
        TensorkeepError: on every rank: the tensors are not the model's (K01), or damaged on disk (an F code).
    """
    shards = state.shards

    def rooms() -> dict[str, dict[str, Tensor]]:
        check_tensors(model, shards.parts["model"], base=state.base is not None)
        live, _ = stored_tensors(model, base=state.base is not None)
        parameters = dict(model.named_parameters())
        return {
            "model": {n: _room(t, live.get(n), fill=True) for n, t in shards.parts["model"].items()},
            "optimizer": {
                n: _room(t, parameters.get(n.rpartition("/")[0]), fill=False)
                for n, t in shards.parts["optimizer"].items()
            },
            "ema": {n: _room(t, averages.get(n), fill=True) for n, t in shards.parts["ema"].items()},
        }

    into = together(world, rooms)
    if shards.fetch is not None:
        shards.fetch(into)

    def read() -> State:
        shards.read(into)
        return State(into["model"], into["optimizer"], into["ema"], state.document, state.base, state.not_captured)

    def waited() -> State:
        error: TensorkeepError | None = None
        try:
            found = read()
        except TensorkeepError as caught:
            error = caught
        board = Board(f"load/{next(_meetings)}", world.rank, world.size)
        board.gather(b"")
        board.tell(b"")
        if error is not None:
            raise error
        return found

    return together(world, waited)


def _room(stored: Tensor, live: Tensor | None, fill: bool) -> Tensor:
    """Give the tensor that a stored one is read into: the live one, or a new one spread like it, or a whole one."""
    if live is None or live.shape != stored.shape or live.dim() == 0 or not live.is_contiguous():
        return torch.empty_like(stored, device="cpu")
    if fill and live.dtype == stored.dtype:
        return live.detach()
    return torch.empty_like(live.detach(), dtype=stored.dtype)
