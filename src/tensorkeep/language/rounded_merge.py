"""Give a merged model 4-bit weights that still do what the adapter taught, and say how much of it they keep.

Rounded number by number, merged weights mostly fall back to the base's: its codes are the nearest. Here texts tell what
each layer reads, and codes and scales are chosen for that (`_rounding`). What is left of the update is measured on rows
of the same texts that took no part: the divergence KL(merged, rounded) of next-token probabilities, beside that of the
base, which has nothing of the update, and of plain rounding.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import tensor_of, torch_dtype
from tensorkeep.formats.view import StateView, read
from tensorkeep.language._as_trained import base_model, round_plainly, rows_of
from tensorkeep.language._rounding import Progress, round_layers
from tensorkeep.language.start import Remark, loaded
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.packed import WEIGHT_DIGEST
from tensorkeep.quantization.rounding import FourBits, Rounded
from tensorkeep.storage.files import CERTIFICATE

_ROWS, _HELD, _BATCH = 128, 8, 4  # most rows that layers are rounded by, those that measure, rows of a forward


def rounded_merge(
    merged: str,
    base: StateView,
    quantized: str | None,
    texts: Sequence[str],
    kind: FourBits,
    folder: Path,
    device: str | None = None,
    progress: Progress = lambda *_: None,
    remark: Remark = lambda _: None,
) -> tuple[Plan, dict[str, Any]]:
    """Round a merged model to 4 bits for what it computes on some texts.

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
        The plan of an hf sink as bitsandbytes' and transformers' 4-bit models are, and figures: `kl` and `loss` of
        "base", "plain" and "rounded" over held-out rows (`loss` of "merged" too), `kept` and `kept_plain` (1 - KL /
        KL of the base), `tokens`, `bits` a weight, and `layers`: name, relative error of the outputs, the same of
        plain rounding.

    Raises:
        TensorkeepError: the texts are too few, the model cannot be rounded here, or its files name tensors otherwise
            than transformers' model does.

    Example:
        >>> plan, figures = rounded_merge("merged", read("base"), "nf4", ["texts.jsonl"], "nf4", Path("tmp"))
        ... # doctest: +SKIP
        >>> round(figures["kept"], 2)  # doctest: +SKIP
        0.93
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    view = read(merged)
    rows = rows_of(merged, texts, _ROWS + _HELD, 2 * _HELD, remark)
    held, used = rows[-_HELD:], rows[: min(len(rows) - _HELD, _ROWS)]
    model = loaded(view).float().to(place).eval().requires_grad_(False)
    wanted = _probabilities(model, held, place)
    plain = copy.deepcopy(model)
    batches = [used[at : at + _BATCH].to(place) for at in range(0, len(used), _BATCH)]
    found = round_layers(model, batches, kind, progress)
    figures = {"rounded": _distance(model, held, wanted, place)}
    for name in found:
        round_plainly(plain, name, kind)
    figures["plain"] = _distance(plain, held, wanted, place)
    del plain
    figures["base"] = _distance(base_model(base, quantized, place), held, wanted, place)
    _write(folder, view, base, model, found)
    own = sum(float(F.nll_loss(want[:-1], row[1:])) for row, want in zip(held, wanted)) / len(held)
    report = {"kind": kind, "tokens": int(held.numel()), "calibration_tokens": int(used.numel())}
    return make_plan([read(str(folder))], "hf"), report | _report(figures, found, own)


def _report(figures: Mapping[str, tuple[float, float]], found: Mapping[str, Rounded], own: float) -> dict[str, Any]:
    """Return what of the update is kept, and what each layer's outputs lost."""
    kept = {name: 1 - figures[name][0] / max(figures["base"][0], 1e-12) for name in ("rounded", "plain")}
    return {
        "bits": 4 + 32 / next(iter(found.values())).block,
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


def _write(folder: Path, view: StateView, base: StateView, model: nn.Module, found: Mapping[str, Rounded]) -> None:
    """Write the merged model's files with codes in the place of the rounded weights."""
    missing = [n for n in found if f"{n}.weight" not in view]
    if missing:
        what = f"transformers calls {missing[0]} otherwise than the files do"
        raise TensorkeepError(what, where=view.path, hint="merge without --to-bits", code="K01")
    tensors: dict[str, Tensor] = {}
    for name in view:
        module = name.removesuffix(".weight")
        if module not in found:
            tensors[name] = tensor_of(view, name).to(_dtype_of(base, name)).contiguous()
            continue
        layer = QuantLinear(found[module].packed(_dtype_of(base, name)), None)
        held = {k: t.detach().cpu().contiguous() for k, t in layer.state_dict().items() if k != WEIGHT_DIGEST}
        tensors |= {f"{module}.{key}": tensor for key, tensor in held.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in found]
    kind = next(iter(found.values())).kind
    document = {
        **(view.config or {}),
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense or ["lm_head"],
        },
    }
    for path in Path(view.folder.url).iterdir() if view.folder is not None else ():
        weights = "safetensors" in path.name or path.name == CERTIFICATE
        if path.suffix in (".json", ".jinja", ".model", ".txt") and not weights:
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(document, indent=2))


def _dtype_of(base: StateView, name: str) -> torch.dtype:
    """Return what the base holds a tensor in; bfloat16 where it calls it otherwise, or holds codes."""
    found = torch_dtype(base, name) if name in base else torch.bfloat16
    return found if found.is_floating_point and found.itemsize >= 2 else torch.bfloat16
