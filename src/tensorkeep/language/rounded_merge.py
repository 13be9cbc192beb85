"""Give a merged model quantized weights that still do what the adapter taught, and say how much of it they keep.

Rounded number by number, merged weights mostly fall back to the base's: its codes are the nearest. Here texts tell what
each layer reads, and codes and scales are chosen for that (`_rounding`). What is left of the update is measured on rows
of the same texts that took no part: the divergence KL(merged, rounded) of next-token probabilities, beside that of the
base, which has nothing of the update, and of plain rounding.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.conversion.plan import Plan
from tensorkeep.formats.view import StateView, read
from tensorkeep.language._as_trained import base_model, rows_of
from tensorkeep.language._matrices import Matrix, matrices, refuse_experts
from tensorkeep.language._rounded_files import planned
from tensorkeep.language._rounding import Progress, round_layers
from tensorkeep.language.start import Remark, loaded
from tensorkeep.quantization.grids import Bits, bits_of
from tensorkeep.quantization.rounding import Rounded, plainly
from tensorkeep.training.fsdp import blocks

__all__ = ["refuse_experts", "rounded_merge"]
_ROWS, _HELD = 128, 8  # most rows that layers are rounded by, and those that measure
_BATCH = {"cpu": 1, "cuda": 4}  # rows of a forward


def rounded_merge(
    merged: str,
    base: StateView,
    quantized: str | None,
    texts: Sequence[str],
    kind: Bits,
    folder: Path,
    device: str | None = None,
    progress: Progress = lambda *_: None,
    remark: Remark = lambda _: None,
) -> tuple[Plan, dict[str, Any]]:
    """Round a merged model to 4 or 8 bits for what it computes on some texts.

    Args:
        merged: the merged model in floats, an hf folder with config and tokenizer.
        base: what the adapter was merged into.
        quantized: what the adapter was trained on, as "nf4 (double)"; None: the base as it is.
        texts: files as training reads them.
        kind: of the codes.
        folder: is made, and holds the tensors until the plan has been carried out.
        device: to compute on; None: a GPU where there is one.
        progress: called as `progress(what, done, total)`.
        remark: is told what was left out of the texts.

    Returns:
        The plan of an hf sink as transformers loads it, or for q4_k of a GGUF file, and figures: `kl` and `loss` of
        "base", "plain" and "rounded" over held-out rows (`loss` of "merged" too), `kept` and `kept_plain` (1 - KL /
        KL of the base), `tokens`, `bits` a weight, `forms` (how many weights each form of codes has), `wide` (linears
        whose rows are no whole blocks), and `layers`: name, relative error of the outputs, the same of plain rounding.

    Raises:
        TensorkeepError: the texts are too few, the model cannot be rounded here, or its files name tensors otherwise
            than transformers' model does.

    Example:
        >>> plan, figures = rounded_merge("merged", read("base"), "nf4", ["texts.jsonl"], "nf4", Path("tmp"))
        ... # doctest: +SKIP
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    view = read(merged)
    rows = rows_of(merged, texts, _ROWS + _HELD, 2 * _HELD, remark)
    held, used = rows[-_HELD:], rows[: min(len(rows) - _HELD, _ROWS)]
    model = loaded(view).float().to(place).eval().requires_grad_(False)
    wanted = _probabilities(model, held, place)
    layers = [layer for layer in blocks(model) if isinstance(layer, nn.Module)]
    chosen, odd = matrices(model, layers, view, kind)
    plain = copy.deepcopy(model)
    batches = torch.split(used.to(place), _BATCH.get(place.type, 1))
    found = round_layers(model, layers, chosen, batches, progress)
    figures = {"rounded": _distance(model, held, wanted, place)}
    _round_plainly(plain, chosen)
    figures["plain"] = _distance(plain, held, wanted, place)
    del plain
    figures["base"] = _distance(base_model(base, quantized, place), held, wanted, place)
    wide = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in found]
    plan = planned(folder, view, base, kind, found, wide)
    own = sum(float(F.nll_loss(want[:-1], row[1:])) for row, want in zip(held, wanted)) / len(held)
    report = {"kind": kind, "tokens": int(held.numel()), "calibration_tokens": int(used.numel())}
    return plan, report | {"wide": odd} | _report(figures, found, own)


def _round_plainly(model: nn.Module, chosen: Sequence[Sequence[Matrix]]) -> None:
    """Round each number of a model's matrices alone."""
    for layer, mine in zip((one for one in blocks(model) if isinstance(one, nn.Module)), chosen):
        for matrix in mine:
            weight = matrix.of(layer)
            weight.copy_(plainly(weight, matrix.form).weight())


def _report(figures: Mapping[str, tuple[float, float]], found: Mapping[str, Rounded], own: float) -> dict[str, Any]:
    """Return what of the update is kept, and what each layer's outputs lost."""
    kept = {name: 1 - figures[name][0] / max(figures["base"][0], 1e-12) for name in ("rounded", "plain")}
    sizes = {n: one.codes.numel() for n, one in found.items()}
    taken = sum(bits_of(one.form, one.codes.shape[1]) * sizes[n] for n, one in found.items())
    return {
        "bits": taken / sum(sizes.values()),
        "forms": dict(Counter(one.form for one in found.values())),
        "kl": {name: kl for name, (kl, _) in figures.items()},
        "loss": {"merged": own, **{name: loss for name, (_, loss) in figures.items()}},
        "kept": kept["rounded"],
        "kept_plain": kept["plain"],
        "layers": [{"name": n, "error": one.error, "plain": one.plain} for n, one in found.items()],
    }


@torch.no_grad()
def _probabilities(model: nn.Module, rows: Tensor, device: torch.device) -> list[Tensor]:
    """Return log-probabilities of each row [length, vocabulary], float32 on the CPU."""
    logits = (model(input_ids=row[None].to(device), use_cache=False).logits[0] for row in rows)
    return [F.log_softmax(one.float(), -1).cpu() for one in logits]


@torch.no_grad()
def _distance(model: nn.Module, rows: Tensor, wanted: Sequence[Tensor], device: torch.device) -> tuple[float, float]:
    """Return KL(wanted, model) and the model's own loss, both in nats a token."""
    apart, loss = 0.0, 0.0
    for row, want in zip(rows, wanted):
        (found,) = _probabilities(model, row[None], device)
        apart += float((want.exp() * (want - found)).sum(-1).double().mean())
        loss += float(F.nll_loss(found[:-1], row[1:]))
    return apart / len(rows), loss / len(rows)
