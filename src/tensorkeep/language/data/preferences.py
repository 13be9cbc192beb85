"""DPO (arXiv 2305.18290): preferences between two answers, against the weights the run starts from.

What the reference thinks never changes, so it is computed once, before the first update, and kept beside the tokens:
no second model is held. It belongs to the start weights, which name it.
"""

from __future__ import annotations

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
from tensorkeep.language.data.rows import IGNORED, Collate, row
from tensorkeep.language.data.tokens import Tokens
from tensorkeep.language.losses import CHUNK, headless, log_probabilities, run
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of answers: documents 2k (chosen) and 2k + 1 (rejected) of the tokens, and `reference [pairs, 2]`, the sums
    of log p under the start weights (None: not computed yet)."""

    tokens: Tokens
    reference: np.ndarray[Any, Any] | None
    settings: str

    def __len__(self) -> int:
        return len(self.tokens) // 2

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """`chosen` and `rejected` as rows, `reference [2]`; nothing is drawn."""
        chosen, rejected = (self._row(document) for document in (2 * index, 2 * index + 1))
        reference = np.zeros(2, np.float32) if self.reference is None else np.array(self.reference[index], np.float32)
        return {"chosen": chosen, "rejected": rejected, "reference": torch.from_numpy(reference)}

    def _row(self, document: int) -> dict[str, Any]:
        a, b = int(self.tokens.offsets[document]), int(self.tokens.offsets[document + 1])
        if self.tokens.marks is None:
            raise TensorkeepError("preferences without marks", where="data")
        return row(self.tokens.ids[a:b].astype(np.int64), self.tokens.marks[a:b], [b - a])

    def fingerprint(self) -> str:
        """Changes with the sources, the tokenizer and the reference."""
        digest = "" if self.reference is None else xxhash.xxh3_64(self.reference.tobytes()).hexdigest()
        return f"{self.tokens.fingerprint} {self.settings} {digest}"


@dataclass(frozen=True)
class CollatePairs:
    """Pairs into one batch: first all chosen rows, then all rejected ones, and `reference [pairs, 2]`."""

    pad: int = 0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [s["chosen"] for s in samples] + [s["rejected"] for s in samples]
        return Collate(self.pad)(rows) | {"reference": torch.stack([s["reference"] for s in samples])}


def pairs_of(batch: Mapping[str, Any]) -> float:
    """How many pairs a batch holds: what its loss is divided by."""
    return float(len(batch["reference"]))


def answer_sums(model: nn.Module, batch: Mapping[str, Any], plain: bool, chunk: int = CHUNK) -> Tensor:
    """log p of each row's answer, summed over its targets: float32 `[rows]`."""
    with headless(model, plain) as head:
        out = run(model, batch)
    wanted = batch["labels"][:, 1:]
    rows, places = (wanted != IGNORED).nonzero(as_tuple=True)
    logs = log_probabilities(out.logits[rows, places], head, wanted[rows, places], chunk)
    return logs.new_zeros(len(wanted)).index_add(0, rows, logs)


@dataclass(frozen=True)
class PreferenceLoss:
    """-log sigmoid(beta (policy margin - reference margin)), summed over pairs, divided by the pairs of the update.

    Also gives `accuracy`, the share of pairs in which the chosen answer gained more, and `margin`, the mean of
    beta times the difference.
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
    """The pairs with what `model` gives to each answer, float32 `[pairs, 2]`: from `folder`, or computed by all ranks.

    `weights` is the digest of the model's weights. A file of another size or content is computed again, loudly.
    """
    name = xxhash.xxh3_128(f"{weights} {data.fingerprint()}".encode()).hexdigest()
    path = folder / f"reference-{name}.bin"
    found = _stored(path, len(data), remark) if world.first else None
    (there, *_) = distributed.gathered(world, found is not None)
    if not there:
        made = _computed(data, model, plain, world, pad, micro)
        if world.first:
            body = made.astype("<f4").tobytes()
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, overwrite=True) as temporary:
                write_bytes(temporary, body + xxhash.xxh3_128(body).digest())
    distributed.gathered(world, None)  # the file is there for everybody
    reference = _stored(path, len(data), remark)
    if reference is None:
        raise TensorkeepError("cannot be read back", where=path, code="F03")
    return Pairs(data.tokens, reference, data.settings)


def _stored(path: Path, pairs: int, remark: Callable[[str], None]) -> np.ndarray[Any, Any] | None:
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
    training, collate = model.training, CollatePairs(pad)
    model.eval()
    mine: dict[int, np.ndarray[Any, Any]] = {}
    try:
        for at in range(world.rank * micro, len(data), world.size * micro):
            indices = range(at, min(at + micro, len(data)))
            batch = collate([data.sample(i, torch.Generator()) for i in indices])
            sums = answer_sums(model, {k: v.to(world.device) for k, v in batch.items()}, plain)
            mine[at] = torch.stack(sums.chunk(2), dim=1).float().cpu().numpy()
    finally:
        model.train(training)
    parts = {at: part for theirs in distributed.gathered(world, mine) for at, part in theirs.items()}
    return np.concatenate([parts[at] for at in sorted(parts)]).astype(np.float32)
