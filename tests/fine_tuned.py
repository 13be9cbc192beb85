"""Fine-tune specimens for real: transformers' model, AdamW, text with something to learn; kept as a trainer saves them.

    >>> fine_tuned_copy("llama_mha", Way("bf16", "norms", 1e-5, 20)).tensors          # doctest: +SKIP

Noise added to weights is no training: AdamW moves elements by about the same amount, most of them in bf16 not at all,
and an adapter's update has a low rank. Diagnosis and repair are tested on both.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.fault_kinds.writing import write
from tests.specimens import Specimen, State, specimen

STEPS = (1, 20, 200)
RATES = (1e-6, 1e-5, 1e-4, 1e-3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("all", "norms", "head", "lora")
RANK = 4


@dataclass(frozen=True)
class Way:
    """How a copy is trained: in which dtype, which part of the model, at which rate, and for how many steps."""

    dtype: str
    part: str
    rate: float
    steps: int

    def __str__(self) -> str:
        return f"{self.dtype}, {self.part}, lr {self.rate:.0e}, {self.steps} steps"


WAYS = [Way(d, p, r, s) for d in DTYPES for p in PARTS for r in RATES for s in STEPS]


def fine_tuned(model: str, seed: int = 0, ways: Iterable[Way] = WAYS) -> Iterator[tuple[Way, Specimen]]:
    """Yield copies of a specimen, each trained in one of the given ways.

    Ways that differ only in their number of steps come from one training.
    """
    m, wanted = specimen(model), list(ways)
    for dtype, part, rate in dict.fromkeys((w.dtype, w.part, w.rate) for w in wanted):
        steps = sorted({w.steps for w in wanted if (w.dtype, w.part, w.rate) == (dtype, part, rate)})
        for step, state in _trained(m, dtype, part, rate, steps, seed):
            words = {"fp32": "float32", "bf16": "bfloat16"}
            yield Way(dtype, part, rate, step), Specimen(m.name, {**m.config, "dtype": words[dtype]}, state)


@cache
def fine_tuned_copy(model: str, way: Way, seed: int = 0, steps: tuple[int, ...] = STEPS) -> Specimen:
    """Return a copy of a specimen, trained in one way; the others that come of the same training are kept too."""
    return _copies(model, (way.dtype, way.part, way.rate), seed, steps)[way.steps]


@cache
def _copies(model: str, like: tuple[str, str, float], seed: int, steps: tuple[int, ...]) -> dict[int, Specimen]:
    return {way.steps: copy for way, copy in fine_tuned(model, seed, [Way(*like, n) for n in steps])}


def _trained(
    m: Specimen, dtype: str, part: str, rate: float, steps: list[int], seed: int
) -> Iterator[tuple[int, State]]:
    """Train a copy and yield its tensors, under the specimen's names, after each of the given numbers of steps."""
    torch.manual_seed(seed)
    model = _load(m, DTYPES[dtype])
    model.requires_grad_(False)
    pairs = _low_rank(model) if part == "lora" else {}
    chosen = [t for pair in pairs.values() for t in pair] if pairs else _parameters(model, part)
    for parameter in chosen:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(chosen, lr=rate)
    for step in range(1, steps[-1] + 1):
        _loss(model, m, pairs, step, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            yield step, _saved(m, model, pairs)


def _load(m: Specimen, dtype: torch.dtype) -> Any:
    """Return transformers' model with the specimen's tensors, loaded from a folder as users do."""
    import transformers

    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        place = write("hf", m.tensors, Path(work), m.config)
        kind = getattr(transformers, m.config["architectures"][0])
        model, report = kind.from_pretrained(place, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.train()


def _parameters(model: Any, part: str) -> list[Any]:
    """Return the parameters of a part: all, the norms, or the head alone."""
    named = dict(model.named_parameters())
    if part == "norms":
        return [p for n, p in named.items() if "norm" in n]
    if part == "head":
        head = model.get_output_embeddings() if hasattr(model, "lm_head") else model.classifier
        return list(head.parameters())
    return list(named.values())


def _low_rank(model: Any) -> dict[str, tuple[Any, Any]]:
    """Return a fresh low-rank pair (A [r, in], B [out, r] of zeros) for q and v of every layer, by weight name."""
    wanted = ("q_proj.weight", "v_proj.weight", "query.weight", "value.weight")
    pairs = {}
    for name, parameter in model.named_parameters():
        if name.endswith(wanted):
            rows, columns = parameter.shape
            a = torch.nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
            pairs[name] = (a, torch.nn.Parameter(torch.zeros(rows, RANK)))
    return pairs


def _merged(weight: Any, pair: tuple[Any, Any]) -> Any:
    """Return a weight with the update 2·B·A in it, computed in float32 and rounded once."""
    a, b = pair
    return (weight.float() + 2 * b @ a).to(weight.dtype)


def _loss(model: Any, m: Specimen, pairs: dict[str, tuple[Any, Any]], step: int, seed: int) -> Any:
    """Return the loss of one batch: the next token of texts that count on, or the class of bright corners."""
    rng = torch.Generator().manual_seed(seed * 100_003 + step)
    if m.language:
        vocabulary = int(m.config["vocab_size"])
        start = torch.randint(0, vocabulary, (4, 1), generator=rng)
        ids = (start + torch.randint(1, 4, (4, 1), generator=rng) * torch.arange(32)) % vocabulary
        batch = {"input_ids": ids, "labels": ids}
    else:
        size = m.config["image_size"]
        labels = torch.randint(0, m.config["num_labels"], (4,), generator=rng)
        pixels = torch.randn(4, 3, size, size, generator=rng)
        pixels[torch.arange(4), 0, 0] += labels[:, None].float()
        batch = {"pixel_values": pixels.to(model.dtype), "labels": labels}
    tensors = {n: _merged(model.get_parameter(n), pair) for n, pair in pairs.items()}
    loss: Any = torch.func.functional_call(model, tensors, (), batch).loss
    return loss


def _saved(m: Specimen, model: Any, pairs: dict[str, tuple[Any, Any]]) -> State:
    """Return the tensors as `save_pretrained` writes them."""
    from safetensors.numpy import load_file

    with torch.no_grad():
        state = model.state_dict()
        state |= {n: _merged(model.get_parameter(n), pair) for n, pair in pairs.items()}
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work, state_dict=state)
        saved = load_file(Path(work) / "model.safetensors")
    return {n: np.ascontiguousarray(saved[n]) for n in m.tensors}
