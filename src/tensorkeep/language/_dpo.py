"""Direct preference optimization (DPO, Rafailov et al. 2023, arXiv 2305.18290): its loss, and its reference.

The reference model is the weights the run starts from. Its log-probabilities never change, so they are computed once,
before the first update, and kept beside the tokens under a name made of those weights' digest: no second model is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.batches import IGNORED
from tensorkeep.language.data.preferences import CollatePairs, Pairs
from tensorkeep.language.losses import CHUNK, forward, headless, log_probabilities
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World
from tensorkeep.training.fsdp import forget_whole


def answer_sums(model: nn.Module, batch: Mapping[str, Any], plain: bool, chunk: int = CHUNK) -> Tensor:
    """Sum log p over the targets of each row.

    Args:
        model: a causal language model of transformers, perhaps under DDP.
        batch: `input_ids` and `labels`, both `[rows, t]`.
        plain: whether the model's head is a plain linear (`losses.plain_head`).
        chunk: so many targets go through the head at a time.

    Returns:
        log p of each row's answer, float32 `[rows]`.
    """
    with headless(model, plain) as head:
        out = forward(model, batch)
    wanted = batch["labels"][:, 1:]
    rows, places = (wanted != IGNORED).nonzero(as_tuple=True)
    logs = log_probabilities(out.logits[rows, places], head, wanted[rows, places], chunk)
    return logs.new_zeros(len(wanted)).index_add(0, rows, logs)


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of DPO (arXiv 2305.18290, eq. 7), divided by the pairs of the whole update.

    For each pair it is -log sigmoid(beta ((log p(chosen) - log p(rejected)) - (the same under the reference))). Beside
    `loss` come `accuracy`, the share of pairs whose chosen answer gained more, and `margin`, the mean of what stands
    in the sigmoid.

    Args:
        plain: whether the model's head is a plain linear (`losses.plain_head`).
        beta: how far the model may move from the reference; smaller is farther.
        chunk: so many targets go through the head at a time.
    """

    plain: bool
    beta: float = 0.1
    chunk: int = CHUNK

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], divisor: float) -> dict[str, Tensor]:
        chosen, rejected = answer_sums(model, batch, self.plain, self.chunk).chunk(2)
        reference = batch["reference"]
        margin = self.beta * ((chosen - rejected) - (reference[:, 0] - reference[:, 1]))
        return {
            "loss": -F.logsigmoid(margin).sum() / divisor,
            "accuracy": (margin.detach() > 0).float().sum() / divisor,
            "margin": margin.detach().sum() / divisor,
        }


def with_reference(
    data: Pairs,
    model: nn.Module,
    plain: bool,
    folder: Path,
    weights: str,
    world: World,
    pad: int,
    micro: int,
    remark: Callable[[str], None] = lambda _: None,
) -> Pairs:
    """Give pairs their reference: read from `folder`, or computed with `model` by all ranks and kept there.

    Args:
        data: the pairs.
        model: holds the start weights.
        plain: whether its head is a plain linear (`losses.plain_head`).
        folder: where references are kept.
        weights: digest of the model's weights, a part of the file's name.
        world: this process among its peers.
        pad: the id that fills rows up.
        micro: pairs a forward.
        remark: is told when a damaged file is computed again.

    Raises:
        TensorkeepError: the file that was just written cannot be read back (F03).
    """
    name = xxhash.xxh3_128(f"{weights} {data.fingerprint()}".encode()).hexdigest()
    path = folder / f"reference-{name}.bin"
    found = not world.makes or _stored(path, len(data), remark) is not None
    if not all(distributed.gathered(world, found)):
        made = _computed(data, model, plain, world, pad, micro)
        if world.makes:
            body = made.astype("<f4").tobytes()
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, overwrite=True) as temporary:
                write_bytes(temporary, body + xxhash.xxh3_128(body).digest())
    distributed.gathered(world, None)  # the file is there for everybody
    reference = _stored(path, len(data), remark)
    if reference is None:
        raise TensorkeepError("cannot be read back", where=path, code="F03")
    return Pairs(data.tokens, reference, data.settings, data.digests)


def _stored(path: Path, pairs: int, remark: Callable[[str], None]) -> np.ndarray[Any, Any] | None:
    """The reference in a file, float32 `[pairs, 2]`; None where there is none, or it is damaged."""
    with explained(path):
        if not path.is_file():
            return None
        data = path.read_bytes()
    body, digest = data[:-16], data[-16:]
    if len(body) != pairs * 8 or xxhash.xxh3_128(body).digest() != digest:
        remark(f"warning: the reference is computed again: F03 {path}: is damaged")
        return None
    return np.frombuffer(body, "<f4").reshape(pairs, 2)


@torch.no_grad()
def _computed(
    data: Pairs, model: nn.Module, plain: bool, world: World, pad: int, micro: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Sums of log p of both answers of every pair, float32 `[pairs, 2]`; every rank takes its share."""
    training, collate = model.training, CollatePairs(pad)
    model.eval()
    mine: dict[int, np.ndarray[Any, Any]] = {}
    try:
        every = world.size * micro
        for at in range(world.rank * micro, math.ceil(len(data) / every) * every, every):
            own = range(at, min(at + micro, len(data)))
            indices = own or range(1)  # a rank without pairs runs along: under FSDP a forward takes all of them
            batch = collate([data.sample(i, torch.Generator()) for i in indices])
            sums = answer_sums(model, {k: v.to(world.device) for k, v in batch.items()}, plain)
            if own:
                mine[at] = torch.stack(sums.chunk(2), dim=1).float().cpu().numpy()
    finally:
        forget_whole(model)
        model.train(training)
    parts = {at: part for theirs in distributed.gathered(world, mine) for at, part in theirs.items()}
    return np.concatenate([parts[at] for at in sorted(parts)]).astype(np.float32)
