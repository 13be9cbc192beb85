"""`training.memory_limit_gib`: what a GPU is planned to hold, how it is made to fit, and when a run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._memory import arrange, fitted
from tensorkeep.language._memory_plan import GIB, LONG, Plan, Sizes, Way, kept, main_memory, needed, planned, said
from tensorkeep.language._recompute import Lean, lean
from tensorkeep.language.job import build, loop_of
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job
from tensorkeep.training.loop import fit
from tensorkeep.training.offload import Offload
from tests.gpu import needs_gpu
from tests.test_gated_mlp import ALL, _layer, _results
from tests.test_memory import _document

HOST = 100 * GIB
LEAST = r"GiB are needed at the least, 6\.0 are allowed: weights 4\.6, training"
# Llama-3.1-8B over nf4 with embeddings and head in bfloat16, r 16 on all linears
LLAMA = Sizes(32, 4096, 14336, 4096, 1024, 128256, 5_990_000_000, 1_050_673_152, 41_943_040 * 12)


@pytest.mark.parametrize(
    ("samples", "length", "way", "measured"),
    [  # GiB that torch had allocated at most, on an H200 (benchmarks/results/qlora.md)
        (4, 2048, Way(0, "queries", rows=True), 6.76),
        (4, 2048, Way(24, "queries"), 18.00),
        (4, 2048, Way(32, None), 30.01),
        (1, 32768, Way(0, "queries", rows=True), 8.97),
        (1, 131072, Way(0, "attention", rows=True), 20.18),
        (1, 2048, Way(12, "queries", rows=True), 6.915),  # these three under a limit, through the recipe
        (1, 32768, Way(1, "queries", rows=True), 10.513),
        (1, 131072, Way(0, "attention", rows=True), 20.219),
        (1, 524288, Way(0, "start", 108_100_000_000, rows=True), 83.483),
    ],
)
def test_the_need_is_what_was_measured(samples: int, length: int, way: Way, measured: float) -> None:
    found = sum(needed(LLAMA, samples * length, way).values()) / GIB
    assert measured * 0.97 < found < measured * 1.08


@pytest.mark.parametrize(
    ("limit", "samples", "length"), [(7.5, 1, 2048), (12, 1, 32768), (24, 1, 131072), (40, 4, 2048)]
)
def test_a_plan_keeps_as_much_as_fits(limit: float, samples: int, length: int) -> None:
    plan = planned(LLAMA, samples, length, round(limit * GIB), HOST)
    assert plan.total <= limit * GIB and plan.micro == samples
    tokens = samples * length
    if plan.way.little is not None:
        more = needed(LLAMA, tokens, plan.way._replace(wide=plan.way.wide + 1))
        assert sum(more.values()) * 1.03 > limit * GIB
        assert plan.way.little == ("queries" if tokens <= LONG else "attention")
    words = said(plan, length, 32, round(limit * GIB))
    assert f"{limit:g} GiB" in words and f"{plan.way.wide} of 32 layers" in words and "weights" in words


def test_samples_are_split_only_where_nothing_else_fits() -> None:
    least = sum(needed(LLAMA, 8 * 8192, Way(0, "queries", HOST, True)).values()) * 1.03
    assert planned(LLAMA, 8, 8192, round(least), HOST).micro == 8
    split = planned(LLAMA, 8, 8192, round(least) - GIB // 8, HOST)
    assert split.micro == 4 and split.total < least


def test_what_main_memory_cannot_take_is_made_again_or_stays() -> None:
    tokens = 1 << 19
    assert planned(LLAMA, 1, tokens, 200 * GIB, 300 * GIB).way.little == "attention"
    start = planned(LLAMA, 1, tokens, 200 * GIB, 130 * GIB)
    assert start.way.little == "start" and start.host == 32 * kept(LLAMA, tokens, "start") == 128 * GIB
    short = planned(LLAMA, 1, tokens, 200 * GIB, 100 * GIB)
    wide = short.way.wide * 4 * tokens * LLAMA.wide
    assert short.host == 100 * GIB and short.need["kept for the backward"] == wide + 28 * GIB


def test_where_nothing_else_fits_one_of_a_few_layers_keeps_its_input() -> None:
    tokens, limit, host = 1 << 19, 62 * GIB, 48 * GIB
    plan = planned(LLAMA, 1, tokens, limit, host)
    assert plan.way == Way(0, "start", host, True, every=4) and plan.total <= limit
    assert plan.host == (32 // 4 + 3) * kept(LLAMA, tokens, "start")
    assert "one of 4 layers keeps its input" in said(plan, tokens, 32, limit)
    assert planned(LLAMA, 2, tokens // 2, limit, host).way.every == 1  # one sample at a time is faster


def test_rows_of_more_numbers_than_were_seen_to_train_are_refused() -> None:
    with pytest.raises(TensorkeepError, match="rows of 524289 tokens are too long") as e:
        planned(LLAMA, 1, (1 << 19) + 1, 137 * GIB, HOST)
    assert e.value.where == "data.length"
    assert planned(LLAMA, 4, 1 << 18, 137 * GIB, HOST).micro == 2
    assert planned(LLAMA, 4, 1 << 18, 500 * GIB, HOST, packed=True).micro == 4
    with pytest.raises(TensorkeepError, match="rows of 1048577 tokens are too long"):
        planned(LLAMA, 1, (1 << 20) + 1, 500 * GIB, HOST, packed=True)


@pytest.mark.parametrize("length", [2048, 65536, 131072, 250000])
@pytest.mark.parametrize("host", [0, 8, 64, 4000])
def test_nothing_is_refused_that_fits_by_making_more_again(length: int, host: int) -> None:
    """Where main memory has room for attention's outputs, layers may still have to make them again."""
    wide = LLAMA._replace(hidden=5120, queries=8192)
    for every in (1, 4):
        limit = Plan(1, way := Way(0, "start", host * GIB, True, every), needed(wide, length, way), 0).total
        assert planned(wide, 1, length, limit, host * GIB).total <= limit


def test_a_plan_of_no_samples_ends() -> None:
    with pytest.raises(TensorkeepError, match="are needed at the least"):
        planned(LLAMA, 0, 2048, GIB, HOST)


def test_what_cannot_fit_is_refused_with_what_it_needs() -> None:
    with pytest.raises(TensorkeepError, match=LEAST) as e:
        planned(LLAMA, 4, 2048, 6 * GIB, HOST)
    assert e.value.where == "training.memory_limit_gib" and "memory_limit_gib: 7" in str(e.value.hint)
    least = planned(LLAMA, 1, 2048, 7 * GIB, HOST)
    assert f"{least._replace(way=Way(0, 'queries', HOST, True)).need['weights'] / GIB:.1f}" in e.value.what


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = main_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < whole < 1 << 50 and main_memory() == pytest.approx(whole / 4, abs=1)


class Model(nn.Module):
    """As much of a transformers model as `fitted` asks."""

    def __init__(self, layers: list[nn.Module], **config: Any) -> None:
        super().__init__()
        from transformers import LlamaConfig

        sizes = {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": 9,
            "num_hidden_layers": len(layers),
            **config,
        }
        self.config = LlamaConfig(**sizes)
        self.table, self.head, self.layers = nn.Embedding(9, 64), nn.Linear(64, 9), nn.ModuleList(layers)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_sizes_come_from_the_model_and_other_layers_are_refused() -> None:
    layers: list[nn.Module] = [_layer("nf4", ALL) for _ in range(2)]
    model = Model(layers).requires_grad_(False)
    trains = [p.requires_grad_() for name, p in model.named_parameters() if "lora" in name]
    plan = fitted(model, layers, 2, 16, 1.0, True)
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert plan.need["training"] == 12 * sum(p.numel() for p in trains) > 0
    assert plan.need["weights"] == sum(held.values()) and plan.way.little is None
    assert fitted(model, layers, 2, 16, 1.0, True, True).need["training"] == 16 * sum(p.numel() for p in trains)
    arrange(model, layers, Way(1, "start", 1 << 20, True), True, 32, True)
    assert [layer.kept for layer in layers if isinstance(layer, Lean)] == ["start", "start"]
    stores = {id(layer.offload): layer.offload for layer in layers if isinstance(layer, Lean)}
    assert [offload.store.most for offload in stores.values() if offload is not None] == [1 << 20]
    with pytest.raises(TensorkeepError, match="without a gated MLP"):
        fitted(Model([nn.Linear(4, 4)]), [nn.Linear(4, 4)], 1, 16, 1.0, True)


@pytest.mark.parametrize(
    ("training", "adapter", "why"),
    [
        ({}, {"lora_r": 4}, "on a CPU"),
        ({"memory": "least"}, {"lora_r": 4}, "both memory and"),
        ({"gradient_checkpointing": True}, {"lora_r": 4}, "plans what is kept"),
        ({"memory_limit_gib": 0}, {"lora_r": 4}, "must be positive"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(tmp_path: Path, training: Any, adapter: Any, why: str) -> None:
    document = _document(tmp_path, None, memory_limit_gib=8, precision="bf16", compile=True)
    document["training"] |= training
    with pytest.raises(TensorkeepError, match=why):
        build(language_recipe(document), tmp_path / "run")


def test_a_planned_split_is_the_loops(tmp_path: Path) -> None:
    document = _document(tmp_path, None, updates=1, micro_batch=4)
    recipe = language_recipe(document)
    job = build(recipe, tmp_path / "run")
    assert job.micro is None
    sizes: list[int] = []
    collate = job.collate
    job.collate, job.micro = lambda some: sizes.append(len(some)) or collate(some), 3  # type: ignore[func-returns-value]
    fit(job, tmp_path / "run", loop_of(recipe, len(job.data)))
    assert sizes == [2, 2] and isinstance(job, Job)  # a batch of 4, at most 3 at a time


def test_a_store_pins_no_more_than_it_may() -> None:
    store = Offload(3 << 20).store
    assert store.fits(3 << 20) and not store.fits((3 << 20) + 1)
    store.free.append(torch.empty(5 << 20, dtype=torch.uint8))
    store.pinned = 3 << 20
    assert store.fits(4 << 20) and not store.fits(6 << 20)  # what is free is used again


def test_a_layer_that_keeps_its_start_alone_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from tensorkeep.language import _recompute

    layer = _layer("nf4", ALL)
    expected = _results(layer)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _recompute._compiled_forward.cache_clear()
    lean([layer], "start", compiled=True)
    for name, value in _results(layer).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    layers = nn.Sequential(*(_layer("nf4", ALL) for _ in range(7)))
    lean(layers, "start", compiled=True, offload=Offload())
    alone = _results(layers)
    lean(layers, "start", compiled=True, offload=Offload(every=3))
    for name, value in _results(layers).items():
        assert torch.equal(value, alone[name]), name
    _recompute._compiled_forward.cache_clear()


def test_a_layer_that_torch_gives_up_compiling_keeps_its_input_and_says_so() -> None:
    from tensorkeep.language import _recompute

    layer = _layer("nf4", ALL)
    expected = _results(layer)
    _recompute._told_uncompiled.cache_clear()
    lean([layer], "narrow", compiled=True)
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="uncompiled"):
        found = _results(layer)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    one, other = (_recompute._compiled_forward(type(layer).__mro__[2], kept) for kept in ("narrow", "queries"))
    assert one._torchdynamo_orig_callable.__code__ is not other._torchdynamo_orig_callable.__code__


@needs_gpu
def test_a_run_keeps_to_its_limit(tmp_path: Path) -> None:
    world, lines = World(device=torch.device("cuda")), list[str]()
    document = _document(tmp_path, None, updates=2, memory_limit_gib=1, precision="bf16", compile=True)
    try:
        recipe = language_recipe(document)
        job = build(recipe, tmp_path / "run", world, lines.append)
        torch.cuda.reset_peak_memory_stats()
        fit(job, tmp_path / "run", loop_of(recipe, len(job.data)), world=world)
        assert any(line.startswith("memory plan for 1 GiB: 2 x 32 tokens") for line in lines)
        assert torch.cuda.max_memory_allocated() < GIB
        whole = torch.cuda.get_device_properties(0).total_memory
        assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(GIB / whole)
        torch.cuda.set_per_process_memory_fraction(1.0)
        document["training"]["memory_limit_gib"] = 0.1
        with pytest.raises(TensorkeepError, match="are needed at the least"):
            build(language_recipe(document), tmp_path / "other", world)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_stretch_longer_than_a_model_counts_its_layers_and_no_width_divides_by_zero() -> None:
    small = LLAMA._replace(layers=2)
    tokens = 4096
    two, six = (needed(small, tokens, Way(0, "start", 0, True, every)) for every in (2, 6))
    assert two["kept for the backward"] == six["kept for the backward"] == 2 * kept(small, tokens, "start")
    assert sum(needed(LLAMA._replace(wide=0), tokens, Way(0, "queries")).values()) > 0
