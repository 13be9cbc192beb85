"""Small tools that several tests share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.sink import Result
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView, read

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def write_hf(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """An hf folder written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def to(source: Path | StateView, out: Path, form: str, **options: Any) -> tuple[Plan, Result]:
    """Convert one source; what `make_plan` and `convert` gave."""
    plan = make_plan([source if isinstance(source, StateView) else read(source)], form, **options)
    return plan, convert(plan, str(out), form)


def with_config(path: Path, config: Mapping[str, Any]) -> StateView:
    """A view with a config that does not lie beside it."""
    view = read(path)
    view.config = dict(config)
    return view


@contextlib.contextmanager
def refused(code: str | None, *words: str) -> Iterator[None]:
    """Expect a TensorkeepError with this code whose text holds the words."""
    with pytest.raises(TensorkeepError) as caught:
        yield
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value), caught.value


def interleaved(tensor: torch.Tensor, dim: int, rotary: int | None = None) -> torch.Tensor:
    """Move rows of whole heads from half-split to interleaved RoPE, up to `rotary`: the reference for our tables."""
    rotary = dim if rotary is None else rotary
    heads = tensor.reshape(-1, dim, *tensor.shape[1:])
    turned = heads[:, :rotary].reshape(heads.shape[0], 2, rotary // 2, *tensor.shape[1:]).transpose(1, 2)
    return torch.cat([turned.reshape(heads.shape[0], rotary, *tensor.shape[1:]), heads[:, rotary:]], 1).reshape(
        tensor.shape
    )


def model_tensors(
    layers: int = 2,
    heads: int = 2,
    kv: int = 1,
    dim: int = 4,
    hidden: int = 8,
    width: int = 12,
    vocab: int = 10,
    *,
    bias: bool = False,
    norms: bool = False,
    experts: int = 0,
    head: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Distinct random tensors under hf names: a llama, or a qwen3 with `norms` and perhaps `experts`."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden), "model.norm.weight": (hidden,)}
    if head:
        shapes[HEAD] = (vocab, hidden)
    for n in range(layers):
        at = f"model.layers.{n}"
        rows = {
            "q": (heads * dim, hidden),
            "k": (kv * dim, hidden),
            "v": (kv * dim, hidden),
            "o": (hidden, heads * dim),
        }
        shapes |= {f"{at}.self_attn.{p}_proj.weight": s for p, s in rows.items()}
        shapes |= {f"{at}.self_attn.{p}_proj.bias": s[:1] for p, s in rows.items() if bias}
        shapes |= {f"{at}.self_attn.{p}_norm.weight": (dim,) for p in "qk" if norms}
        shapes |= {f"{at}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
        mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        places = [f"{at}.mlp.experts.{e}" for e in range(experts)] or [f"{at}.mlp"]
        shapes |= {f"{place}.{p}_proj.weight": s for place in places for p, s in mlp.items()}
        if experts:
            shapes[f"{at}.mlp.gate.weight"] = (experts, hidden)
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes, shapes and bits."""
    from tests.parity.outcome import different

    assert different(ours, theirs) == []


def held(path: Path) -> dict[str, torch.Tensor]:
    view = read(path)
    return {n: view.tensor(n) for n in view}
