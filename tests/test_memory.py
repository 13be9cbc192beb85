"""`training.memory` of a recipe: the same losses whatever it says, resumed exactly, refused where it says too much."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tensorkeep.errors import TensorkeepError
from tensorkeep.language import _documents, _gated_mlp, _recompute
from tensorkeep.language._data import multiple_of
from tensorkeep.language._gated_layers import Fused, fuse_mlps
from tensorkeep.language._memory import arrange, hold_frozen
from tensorkeep.language._recompute import Lean, lean
from tensorkeep.language.job import build, loop_of
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.loop import fit
from tests.gpu import DEVICES, needs_gpu
from tests.language_files import save_model, save_tokenizer, texts
from tests.test_gated_mlp import ALL, _layer, _results

CPU = World()


def _document(folder: Path, memory: str | None, **training: Any) -> dict[str, Any]:
    if not (folder / "tok").exists():
        save_tokenizer(folder / "tok")
        texts(folder / "a.jsonl")
        save_model(folder / "base", hidden_size=64, intermediate_size=64, head_dim=16)
    return {
        "version": 2,
        "model": str(folder / "base"),
        "tokenizer": str(folder / "tok"),
        "data": {"files": str(folder / "a.jsonl"), "length": 32},
        "adapter": {"lora_r": 4, "lora_alpha": 8},
        "training": {
            "updates": 4,
            "batch_size": 4,
            "micro_batch": 2,
            "log_every": 1,
            "save_every": 2,
            "quantize_backbone": "nf4",
            "memory": memory,
            **training,
        },
        "optimizer": {"lr": 1e-3},
    }


def _losses(document: dict[str, Any], run: Path, world: World = CPU, said: list[str] | None = None) -> list[float]:
    recipe = language_recipe(document)
    job = build(recipe, run, world, (said if said is not None else []).append)
    fit(job, run, loop_of(recipe, len(job.data)), world=world)
    return [row["loss"] for row in metrics.rows(run / metrics.METRICS)]


@pytest.mark.parametrize("device", DEVICES)
def test_every_word_gives_the_losses_of_no_word(tmp_path: Path, device: str) -> None:
    world, said = World(device=torch.device(device)), []
    expected = _losses(_document(tmp_path, None, updates=2), tmp_path / "plain", world)
    for memory in ("least", "balanced", "most"):
        found = _losses(_document(tmp_path, memory, updates=2), tmp_path / memory, world, said)
        assert found == pytest.approx(expected, rel=1e-4)
    words = [line for line in said if line.startswith("memory ")]
    assert [line.split(":")[0] for line in words] == ["memory least", "memory balanced", "memory most"]
    assert not any("embeddings" in line for line in words)  # this model's head shares them


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_in_the_least_memory_goes_on_exactly(tmp_path: Path, device: str) -> None:
    world = World(device=torch.device(device))
    precise = {"deterministic": True, "precision": "bf16"}
    document = _document(tmp_path, "least", **precise)
    whole = _losses(document, tmp_path / "whole", world)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    checkpoint.run_folder.delete(tmp_path / "cut", [4])
    recipe = language_recipe(document)
    job = build(recipe, tmp_path / "cut", world)
    outcome = fit(job, tmp_path / "cut", loop_of(recipe, len(job.data)), world=world)
    assert outcome.level == "exact" and len(whole) == 4
    found = [checkpoint.newest(tmp_path / name) for name in ("whole", "cut")]
    one, other = [state[0].model for state in found if state is not None]
    assert one and all(torch.equal(one[name], other[name]) for name in one)


def test_memory_says_alone_what_is_kept(tmp_path: Path) -> None:
    for training, word in (({"gradient_checkpointing": True}, "already"), ({"parallel": "fsdp"}, "sharded")):
        with pytest.raises(TensorkeepError, match=word):
            language_recipe(_document(tmp_path, "least", **training))


def test_what_is_frozen_is_held_in_the_dtype_that_is_computed_in() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    hold_frozen(model, "fp32")
    assert model[0].weight.dtype == torch.float32
    hold_frozen(model, "bf16")
    assert [layer.weight.dtype for layer in model] == [torch.bfloat16, torch.float32]  # type: ignore[union-attr]


class Model(nn.Module):
    """As much of a transformers model as `arrange` asks."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.table, self.head, self.layers = nn.Embedding(9, 64), nn.Linear(64, 9), nn.ModuleList(layers)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("fits", [True, False])
def test_the_word_decides_how_many_layers_keep_what(fits: bool) -> None:
    layers: list[nn.Module] = [_layer("nf4", ALL) if fits else nn.Sequential(nn.Linear(4, 4)) for _ in range(4)]
    for memory, wide in (("least", 0), ("balanced", 3), ("most", 4)):
        said = arrange(Model(layers), layers, memory, True, 64, True)  # type: ignore[arg-type]
        assert f"of 4 layers {wide} keep their wide products" in said
        assert all(isinstance(layer, Lean) for layer in layers)
        kinds = {layer.kept for layer in layers if isinstance(layer, Lean)}
        if fits:
            keeps = [m.keeps for layer in layers for m in layer.modules() if isinstance(m, Fused)]
            assert keeps == [False] * (4 - wide) + [True] * wide and len(kinds) == 1
        else:
            assert (
                "no gated MLP" in said
                and kinds == {"least": {"queries"}, "balanced": {"queries", "products"}, "most": {"products"}}[memory]
            )
    assert "attention" in arrange(Model(layers), layers, "least", True, 1 << 20, True)
    assert "(input)" in arrange(Model(layers), layers, "balanced", False, 64, True)
    assert [layer.kept for layer in layers if isinstance(layer, Lean)] == ["input", "all", "all", "all"]


@needs_gpu
def test_embeddings_of_their_own_stay_in_main_memory() -> None:
    model = Model([_layer("nf4", ALL)]).cuda().requires_grad_(False)
    ids = torch.tensor([[1, 8, 1], [0, 3, 2]], device="cuda")
    expected = model.table(ids)
    assert "so do the embeddings" in arrange(model, list(model.layers), "least", False, 64, True)
    found = model.table(ids)
    assert model.table.weight.device.type == "cpu" and found.is_cuda and torch.equal(found, expected)
    assert list(model.state_dict()) == list(Model([_layer("nf4", ALL)]).state_dict())
    model.cuda()  # and back
    assert torch.equal(model.table(ids), expected)


def test_layers_are_compiled_for_few_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = _document(tmp_path, "least", updates=3)
    document["data"] |= {"packing": "first_fit", "length": 96}
    expected = _losses(document, tmp_path / "plain")
    backend = CompileCounterWithBackend("aot_eager")  # graphs and what they keep, without code of their own
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    attended: list[int] = []
    parts = _documents._parts
    monkeypatch.setattr(_documents, "_parts", lambda bounds: attended.append(len(bounds)) or parts(bounds))
    _recompute._compiled_forward.cache_clear()
    document["training"]["compile"] = True
    found = _losses(document, tmp_path / "compiled")
    _recompute._compiled_forward.cache_clear()
    assert found == pytest.approx(expected, rel=1e-4)
    assert backend.frame_count == 1  # one form of packed rows, whichever layer comes first
    # two layers in the trial, then three updates of two micro-batches, forward and backward: attended once each
    assert len(attended) == 2 + 3 * 2 * 2 * 2
    recipe = language_recipe(document)
    assert multiple_of(recipe) == 96
    document["data"]["packing"] = "none"
    assert multiple_of(language_recipe(document)) == 12
    document["training"]["compile"] = False
    assert multiple_of(language_recipe(document)) == 1


def test_where_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/the/user")
    _recompute._set_compiler()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/of/the/user"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    _recompute._set_compiler()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "tensorkeep" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_me"))
    _recompute._set_compiler()  # as torch leaves it when its compiler is imported
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "tensorkeep" / "compiled")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made: torch's own
    _recompute._set_compiler()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    names = {_recompute._named_contexts(kept).cache_hash for kept in _recompute.INSIDE}
    assert len(names) == len(set(_recompute.INSIDE.values()))


@pytest.mark.slow
def test_compiled_a_layer_agrees_and_its_mlp_runs_forward_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _recompute._compiled_forward.cache_clear()
    plain = _layer("nf4", ALL)
    expected = _results(plain)
    weights: list[str] = []
    made = _gated_mlp.dense_weight
    monkeypatch.setattr(_gated_mlp, "dense_weight", lambda *given: weights.append(given[0][0]) or made(*given))
    fuse_mlps([plain], [False])
    lean([plain], "queries", compiled=True)
    found = _results(plain)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    weights.clear()
    _results(plain)
    assert len(weights) == 6  # three forward, three backward: no third time for a recomputation
    assert list((tmp_path / "tensorkeep" / "compiled").iterdir())
    torch._dynamo.reset()  # another process would find traced and compiled code, too
    _recompute._compiled_forward.cache_clear()
    counters.clear()
    again = _results(plain)
    if hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):
        assert counters["aot_autograd"]["autograd_cache_hit"] and not counters["aot_autograd"]["autograd_cache_bypass"]
    for name, value in found.items():
        assert torch.equal(again[name], value), name
