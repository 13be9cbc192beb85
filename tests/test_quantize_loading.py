"""Checkpoints into quantized models: streamed, strict, all or nothing."""

from __future__ import annotations

import contextlib
import copy
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import digest_of
from tensorkeep.formats.view import StateView, read
from tensorkeep.quantization import _ahead
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.loading import load_quantized, load_quantizing
from tensorkeep.quantization.modules import quantize_
from tensorkeep.quantization.packed import pack, packed_digest
from tests.gpu import needs_gpu


class Model(nn.Module):
    """An embedding, two linears, a norm, a tied head and a buffer that no file holds."""

    def __init__(self, seed: int = 0, columns: int = 96) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.up, self.down = (
            nn.Embedding(20, 48),
            nn.Linear(48, columns),
            nn.Linear(columns, 48, bias=False),
        )
        self.norm, self.lm_head = nn.LayerNorm(48), nn.Linear(48, 20, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 48), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.get_buffer("scale")
        out: Tensor = self.lm_head(self.norm(x + self.down(torch.tanh(self.up(x)))))
        return out


IDS = torch.arange(12).view(2, 6)


def saved(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    state = {n: t.to(dtype).contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def on_meta(real_buffers: bool = True) -> Model:
    with torch.device("meta"):
        made = Model()
    # the device is named: where transformers was the first in the process to use a device context, torch remembers its
    # patched linspace as the one to redirect, and the real one stays on the CPU
    scale = torch.linspace(0.5, 1.5, 48) if real_buffers else torch.empty(48, device="meta")
    made.register_buffer("scale", scale, persistent=False)
    return made


def repaired(model: nn.Module) -> list[str]:
    model.get_buffer("scale").copy_(torch.linspace(0.5, 1.5, 48))
    return ["scale"]


@pytest.mark.parametrize("kind", ["nf4", "fp4", 8])
def test_quantizing_while_loading_gives_the_model_quantized_in_place(kind: Any, tmp_path: Path) -> None:
    dense = Model().requires_grad_(False)
    path = saved(tmp_path, dense)
    made = on_meta()
    loaded = load_quantizing(made, path, kind)
    quantize_(dense, kind)
    assert loaded.quantized == ["up", "down"] and loaded.unproven == []
    assert torch.equal(made(IDS), dense(IDS))
    assert made.lm_head.weight is made.embed.weight and not any(p.requires_grad for p in made.parameters())
    assert not any(t.is_meta for t in [*made.parameters(), *made.buffers()])


class Queue:
    """Stands for a stream and an event of CUDA where there is none: what is queued is done at once."""

    def __init__(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self) -> Queue:
        return self


def test_what_is_read_ahead_comes_in_order_whole_and_with_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Queue)
    monkeypatch.setattr(torch.cuda, "current_stream", Queue)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *given: None)
    monkeypatch.setattr(torch, "empty", lambda *given, pin_memory=False, **more: empty(*given, **more))
    monkeypatch.setattr(_ahead, "PIECE", 3001)
    monkeypatch.setattr(_ahead, "AHEAD", 200_000)
    tensors = {f"t{n:02d}": torch.randn(300 + 37 * n, 100).bfloat16() for n in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    names = list(tensors)
    ahead = _ahead.Ahead(read(tmp_path), names, names[:2], torch.device("cpu"))
    for name, tensor in tensors.items():
        found = ahead.take(name)
        assert torch.equal(found.tensor, tensor) and found.digest == digest_of(tensor)
    packed = pack(tensors["t01"])
    assert ahead.digest(packed).result() == packed_digest(packed)
    ahead.close()


@needs_gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_read_ahead_onto_a_gpu_gives_what_is_read_on_the_cpu(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ahead, "PIECE", 3000)  # several pieces a tensor, and of one that ends inside a piece
    monkeypatch.setattr(_ahead, "AHEAD", 40_000)
    path = saved(tmp_path, Model().requires_grad_(False), torch.bfloat16)
    host, made = on_meta(), on_meta()
    made.register_buffer("scale", torch.linspace(0.5, 1.5, 48, device="cuda"), persistent=False)
    first, second = load_quantizing(host, path, kind), load_quantizing(made, path, kind, device="cuda")
    assert first == second and second.base_digest is not None
    expected, found = host.state_dict(), made.state_dict()
    assert list(expected) == list(found) and all(torch.equal(t, found[n].cpu()) for n, t in expected.items())
    assert all(t.is_cuda for n, t in found.items() if "quant_state" not in n)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TensorkeepError):
        load_quantizing(on_meta(), read(path), kind, device="cuda")


def test_what_is_not_quantized_keeps_its_stored_dtype_or_takes_the_one_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, Model(), torch.bfloat16)
    made, cast = on_meta(), on_meta()
    load_quantizing(made, path, exclude=["down", "lm_head"])
    load_quantizing(cast, path, dtype=torch.float32)
    assert made.down.weight.dtype == made.norm.weight.dtype == made.up.bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert isinstance(made.up, QuantLinear) and made.up.layout.dtype == "bfloat16"
    assert cast.norm.weight.dtype == torch.float32 and torch.equal(cast.up.dequantize(), made.up.dequantize())  # type: ignore[operator]


def test_a_quantized_file_loads_into_fresh_dense_quantized_and_meta_models(tmp_path: Path) -> None:
    origin = Model().requires_grad_(False)
    quantize_(origin)
    path = tmp_path / "quantized.safetensors"
    save_file({n: t for n, t in origin.state_dict().items() if n != "lm_head.weight"}, path)
    other = Model(seed=3).requires_grad_(False)
    quantize_(other, "int8")
    for made in (Model(seed=2), other, on_meta(), copy.deepcopy(origin)):
        assert load_quantized(made, path).quantized == ["up", "down"]
        assert torch.equal(made(IDS), origin(IDS))
    again = on_meta()
    load_quantizing(again, path, "int8")  # quantized already: taken as it is
    assert torch.equal(again(IDS), origin(IDS))


def broken(how: str) -> dict[str, Tensor]:
    origin = Model().requires_grad_(False)
    quantize_(origin)
    state = dict(origin.state_dict())
    another = Model(seed=9).requires_grad_(False)
    quantize_(another)
    if how == "scales of another":
        state["down.weight.absmax"] = another.state_dict()["down.weight.absmax"]
    elif how == "averaged":
        codes, other = state["down.weight"], another.state_dict()["down.weight"]
        state["down.weight"] = ((codes.int() + other.int()) // 2).to(torch.uint8)
        del state["down.weight_digest"]
    elif how == "no state":
        state = {n: t for n, t in state.items() if not n.startswith("down.weight.")}
    elif how == "missing":
        del state["norm.weight"]
    elif how == "unexpected":
        state["extra"] = torch.ones(3)
    elif how == "shape":
        state["norm.weight"] = torch.ones(47)
    elif how == "wider":
        state["norm.weight"] = torch.ones(48, dtype=torch.float64)
    elif how == "two heads":
        state["lm_head.weight"] = state["lm_head.weight"] + 1
    elif how == "geometry":
        wide = Model(columns=64).requires_grad_(False)
        quantize_(wide)
        state = dict(wide.state_dict())
    return state


CASES = [
    ("scales of another", "Q02 .*down.weight"),
    ("averaged", "Q03 .*down.weight"),
    ("no state", "Q01 .*down.weight"),
    ("missing", "K01 .*norm.weight"),
    ("unexpected", "K02 .*extra"),
    ("shape", "S01 .*norm.weight"),
    ("wider", "S04 .*norm.weight"),
    ("two heads", "T01 "),
    ("geometry", "S01 .*up.weight"),
]


@pytest.mark.parametrize(("how", "match"), CASES)
def test_whatever_does_not_fit_is_refused_by_name_and_the_model_stays(how: str, match: str) -> None:
    made = Model(seed=4)
    before = {n: t.clone() for n, t in made.state_dict().items()}
    with pytest.raises(TensorkeepError, match=match):
        load_quantized(made, broken(how))
    assert type(made.up) is nn.Linear
    assert all(torch.equal(t, before[n]) for n, t in made.state_dict().items())


def test_files_without_a_digest_load_and_are_named() -> None:
    state = {n: t for n, t in broken("").items() if not n.endswith("weight_digest")}
    made = Model(seed=4)
    assert load_quantized(made, state).unproven == ["up", "down"]
    assert "down.weight_digest" in made.state_dict()


def test_float_weights_for_a_quantized_model_name_the_call_that_quantizes() -> None:
    made = Model().requires_grad_(False)
    quantize_(made)
    with pytest.raises(TensorkeepError, match=r"Q01 .*up\.weight.*load_quantizing"):
        load_quantized(made, Model(seed=1).state_dict())


def test_names_allowed_to_be_absent_keep_their_values() -> None:
    state = {n: t for n, t in broken("").items() if not n.startswith("norm.")}
    made = Model(seed=4)
    load_quantized(made, state, absent=["norm.*"])
    with pytest.raises(TensorkeepError, match="K01"):
        load_quantized(made, state, absent=["norm.weight"])


def test_a_buffer_that_no_file_holds_is_repaired_or_named(tmp_path: Path) -> None:
    path = saved(tmp_path, Model())
    with pytest.raises(TensorkeepError, match=r"B01 .*scale"):
        load_quantizing(on_meta(real_buffers=False), path)
    with pytest.raises(TensorkeepError, match="cannot be recomputed"):
        load_quantizing(on_meta(real_buffers=False), path, repair=lambda model: [])
    made, wanted = on_meta(real_buffers=False), on_meta()
    load_quantizing(made, path, repair=repaired)
    load_quantizing(wanted, path)
    assert torch.equal(made(IDS), wanted(IDS))


def test_a_pattern_that_fits_nothing_and_a_trained_linear_are_errors(tmp_path: Path) -> None:
    path = saved(tmp_path, Model())
    with pytest.raises(TensorkeepError, match="'upp' fits no linear"):
        load_quantizing(on_meta(), path, include=["upp"])


def test_the_digest_of_the_base_is_the_one_that_checks_compute(tmp_path: Path) -> None:
    from tensorkeep.diagnosis.checks.a04_another_base import base_digest

    path = saved(tmp_path, Model())
    assert load_quantizing(on_meta(), path).base_digest == base_digest(read(path))


def test_one_tensor_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stored tensor is asked for before the one before it was put into codes and let go."""
    path = saved(tmp_path, Model())
    held: list[str] = []
    plain = StateView.stream

    def watched(self: StateView, name: str, *args: Any, **kwargs: Any) -> Any:
        held.append(name)
        return plain(self, name, *args, **kwargs)

    monkeypatch.setattr(StateView, "stream", watched)
    tracemalloc.start()
    load_quantizing(on_meta(), path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(held) == sorted(read(path)) and len(set(held)) == len(held)
    assert peak < 8 << 20  # the reader's own buffer, not the file


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_transformers_model_loads_from_meta_with_nothing_left_there(kind: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tensorkeep.diagnosis.live.loaded import check_loaded
    from tensorkeep.models.repair import repair_buffers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path)
    with torch.device("meta"):
        made = transformers.LlamaForCausalLM(config).eval()
    loaded = load_quantizing(made, tmp_path, kind, repair=repair_buffers)
    assert len(loaded.quantized) == 14 and not any(t.is_meta for t in [*made.parameters(), *made.buffers()])
    assert not [f for f in check_loaded(made, tmp_path) if f.code == "B01"]
    quantize_(dense.requires_grad_(False), kind)
    ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        assert torch.equal(made(ids).logits, dense(ids).logits)
