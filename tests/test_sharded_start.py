"""A sharded run begins from shards: a rank reads its own part of the checkpoint, and starts where a whole one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import fill, view_of
from tensorkeep.formats.view import StateView, read
from tensorkeep.language import start as starting
from tensorkeep.language._shards import prepare
from tensorkeep.language.export import exported
from tensorkeep.language.job import build, loop_of
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.language.start import StartingModel
from tensorkeep.models.sharded_loading import read_into
from tensorkeep.quantization import spreading
from tensorkeep.quantization.modules import quantized_layers
from tensorkeep.quantization.spreading import holds_codes
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.record import Block, TensorRecord
from tensorkeep.training import _sharding as sharding
from tensorkeep.training import fsdp
from tensorkeep.training.distributed import World
from tensorkeep.training.fsdp import is_sharded, materialise
from tensorkeep.training.job import Job
from tensorkeep.training.loop import fit
from tensorkeep.training.precision import GATHERED, autocast
from tests.language_files import save_model
from tests.test_language_recipe import newest, recipe_of, rows
from tests.training import ranks

Document = dict[str, Any]
LORA: Document = {"lora_r": 4, "lora_alpha": 8, "targets": ["all-linear"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "llama", "llama", vocab_size=321)
    save_model(folder / "qwen3")
    save_model(folder / "mixtral", "mixtral", num_local_experts=3, num_experts_per_tok=2)
    return folder


def document(tmp_path: Path, model: Path, **sections: Any) -> Document:
    made = recipe_of(tmp_path, config=None, model=str(model), **sections)
    made["training"] |= {"updates": 2, "parallel": "fsdp", "micro_batch": 1}
    return made


def whole(tensor: Tensor) -> Tensor:
    spread: Any = tensor
    if not hasattr(spread, "full_tensor"):
        return tensor
    if spread.dtype == torch.float8_e4m3fn:  # gloo takes no such floats
        local, shape, stride = spread.to_local().view(torch.uint8), spread.shape, spread.stride()
        how = {"run_check": False, "shape": shape, "stride": stride}
        spread = DTensor.from_local(local, spread.device_mesh, spread.placements, **how)
    whole: Tensor = spread.full_tensor()
    return whole


def begun(place: Path, made: Document, size: int = 2, trained: bool = False) -> list[dict[str, Any]]:
    """Begin on some ranks from shards, then from the whole model that is sharded afterwards, and compare.

    For each rank: what it read and was told, tensors that differ, the loss of the first batch and the gradient's norm
    both ways.
    """
    place.mkdir(parents=True, exist_ok=True)
    recipe = language_recipe(made)
    begins: dict[str, int] = {}
    for block in (block for record in read(made["model"]).records.values() for block in record.blocks):
        begins[block.file] = min(begins.get(block.file, block.start), block.start)

    def work(world: World) -> None:
        read_bytes, said = [0], list[str]()
        into = LocalFolder.read_into

        def counted(self: LocalFolder, name: str, start: int, out: memoryview) -> None:
            read_bytes[0] += len(out) if start >= begins.get(name, 1 << 60) else 0  # headers are no weights
            into(self, name, start, out)

        LocalFolder.read_into = counted  # type: ignore[method-assign]
        job = build(recipe, place / "run", world, said.append)
        LocalFolder.read_into = into  # type: ignore[method-assign]
        told: dict[str, Any] = {"read": read_bytes[0], "said": list(said), "sharded": is_sharded(job.model)}
        starting.why_whole = lambda *_: "told so"  # type: ignore[assignment]
        other = build(recipe, place / "other", world, said.append)
        assert not is_sharded(other.model)
        told["base"] = [job.base, other.base]
        theirs = {n: p.detach().clone() for n, p in other.model.named_parameters() if not holds_codes(p)}
        mine = {n: whole(p.detach()) for n, p in job.model.named_parameters() if not holds_codes(p)}
        told["names"] = mine.keys() == theirs.keys()
        told["differ"] = [n for n in mine if not torch.equal(mine[n], theirs[n])]
        other.model.eval()
        told["alone"] = first_loss(other, recipe, world).item()
        half = None if recipe.objective == "dpo" else GATHERED.get(recipe.training.precision)
        units, groups = fsdp.blocks(other.model), recipe.training.replicas
        sharding.shard(other.model, other.optimizer, {}, units, world, half, groups)
        told["steps"] = [step(job, recipe, world), step(other, recipe, world)]
        told["codes"] = [layer.spread_out for layer in quantized_layers(job.model).values()]
        told["kept"] = sum(
            p.to_local().numel() for p in job.model.parameters() if holds_codes(p) and hasattr(p, "to_local")
        )
        if trained:
            fit(job, place / "run", loop_of(recipe, len(job.data)), world=world)
        (place / f"told-{world.rank}.json").write_text(json.dumps(told))

    assert ranks(size, work) == [0] * size
    return [json.loads((place / f"told-{rank}.json").read_text()) for rank in range(size)]


def first_loss(job: Job, recipe: Any, world: World) -> Tensor:
    batch = job.collate([job.data.sample(world.rank, torch.Generator().manual_seed(0))])
    with autocast(loop_of(recipe, len(job.data)), world):
        return job.loss(job.model, batch, 1.0)["loss"]


def step(job: Job, recipe: Any, world: World) -> tuple[float, float]:
    """Loss and gradient norm of this rank's first batch; nothing is changed."""
    job.model.eval()
    loss = first_loss(job, recipe, world)
    loss.backward()
    norm = sharding.clipped([p for group in job.optimizer.param_groups for p in group["params"]], None, world)
    job.optimizer.zero_grad()
    return float(loss), float(norm)


def assert_same_start(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["sharded"] and rank["names"] and rank["differ"] == [] and rank["steps"][0] == rank["steps"][1]
        assert rank["steps"][0][0] == rank["alone"]  # the whole model's first loss, to the bit
        assert rank["base"][0] == rank["base"][1] and not any("whole" in line for line in rank["said"])


def stored(model: Path) -> int:
    return sum(record.nbytes for record in read(model).records.values() if record.tied_to is None)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_every_rank_reads_its_own_part_and_starts_as_the_whole_model(base: Path, tmp_path: Path, kind: str) -> None:
    told = begun(tmp_path, document(tmp_path, base / kind))
    assert_same_start(told)
    assert sum(rank["read"] for rank in told) == stored(base / kind)
    assert max(rank["read"] for rank in told) < 0.51 * stored(base / kind)


def test_what_a_model_draws_for_itself_is_read_too(tmp_path: Path) -> None:
    """DiffLlama's lambdas are drawn on the CPU though the model is made on meta."""
    save_model(tmp_path, "diffllama")
    view = read(tmp_path)
    model = starting._hollow(view.config or {})
    tensors = prepare(view, model, None, World())
    assert not isinstance(tensors, str)
    read_into(model, materialise(model, torch.device("cpu")), tensors, [view])
    state, wanted = model.state_dict(), starting.loaded(view).state_dict()
    assert [n for n in wanted if not torch.equal(state[n], wanted[n])] == []


def test_rows_in_another_order_of_another_format_are_read_as_they_lie(base: Path, tmp_path: Path) -> None:
    """A torchtitan checkpoint in 16 bits, its heads interleaved, is not converted before; forwards are in bf16."""
    convert(make_plan([read(base / "llama")], "torchtitan", dtype="BF16"), str(tmp_path / "dcp"), "dcp")
    made = document(tmp_path, tmp_path / "dcp", tokenizer=str(tmp_path / "tok"), training={"precision": "bf16"})
    told = begun(tmp_path, made, trained=True)
    assert_same_start(told)
    assert set(read(exported(tmp_path / "run", tmp_path / "hf"))) == set(read(base / "llama"))
    # twice the weights if each rank read all; beside them, both ends of 40 archives, a kilobyte each
    assert sum(rank["read"] for rank in told) < 1.4 * stored(tmp_path / "dcp") + 40 * 2048


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_are_spread_and_are_those_of_the_whole_weight(base: Path, tmp_path: Path, kind: str) -> None:
    made = document(tmp_path, base / "llama", adapter=LORA, training={"quantize_backbone": kind})
    told = begun(tmp_path, made, trained=kind == "nf4")
    assert_same_start(told)
    assert told[0]["codes"] == [True] * 14
    weights = sum(r.elements for n, r in read(base / "llama").records.items() if n.endswith("_proj.weight"))
    held = (1 + 1 / 32) * weights / 2 if kind == "nf4" else weights  # with a scale for each 64, or for each row
    assert all(0.45 * held < rank["kept"] < 0.6 * held for rank in told)
    if kind == "nf4":  # what one process makes of it: the same base, and the adapter of the files
        recipe = language_recipe(made)
        job = build(recipe, tmp_path / "run")
        made["training"]["updates"] = 3
        longer = language_recipe(made)
        outcome = fit(job, tmp_path / "run", loop_of(longer, len(job.data)), allow=("updates",))
        assert (outcome.step, outcome.level) == (3, "sample-exact")
        export = exported(tmp_path / "run", tmp_path / "adapter")
        assert json.loads((export / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_called_floats_of_eight_bits_train_bit_for_bit_as_integers_do(
    base: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that FSDP2 of torch before 2.13 takes."""
    made = document(tmp_path, base / "llama", adapter=LORA, training={"quantize_backbone": kind})
    recipe = language_recipe(made)
    if spreading.OLD_TORCH:
        pytest.skip("FSDP2 of this torch takes no integers to compare with")
    ended = []
    for older in (False, True):
        monkeypatch.setattr(spreading, "OLD_TORCH", older)
        run = tmp_path / f"run {older}"

        def work(world: World, run: Path = run, older: bool = older) -> None:
            job = build(recipe, run, world)
            layers = quantized_layers(job.model).values()
            assert len(layers) == 14 and all(layer.spread_out for layer in layers)
            wanted = torch.float8_e4m3fn if older else torch.int8 if kind == "int8" else torch.uint8
            assert {layer._parameters["weight"].dtype for layer in layers} == {wanted}
            fit(job, run, loop_of(recipe, len(job.data)), world=world)

        assert ranks(2, work) == [0, 0]
        ended.append(newest(run).model)
    assert ended[0].keys() == ended[1].keys()
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


@pytest.mark.parametrize("objective", ["pretrain", "dpo"])
def test_two_groups_of_two_ranks_hold_all_shards_each(base: Path, tmp_path: Path, objective: str) -> None:
    """HSDP; a norm and the reference of dpo, which every rank computes over its shards, go with it."""
    more: Document = {"training": {"replicas": 2, "precision": "bf16", "gradient_checkpointing": True}}
    if objective == "dpo":
        more |= {"objective": "dpo", "data": {"files": str(tmp_path / "p.jsonl"), "packing": "none", "length": 48}}
    told = begun(tmp_path, document(tmp_path, base / "qwen3", **more), size=4)
    assert_same_start(told)
    read_by_all = sum(rank["read"] for rank in told) / stored(base / "qwen3")
    if objective == "pretrain":  # norms stay in float32, whole on every rank
        assert 2 < read_by_all < 2.02
    else:  # each group reads its shards; the digest, that the reference is kept by, all together
        assert read_by_all == 3


def test_sixteen_bits_over_shards_train_as_copies_do(base: Path, tmp_path: Path) -> None:
    """Norms among them, which stay whole in float32 beside the shards; losses are those of DDP but for rounding."""
    made = document(tmp_path, base / "llama", training={"precision": "bf16"}, optimizer={"lr": 3e-3})
    made["training"] |= {"updates": 4, "evaluate_every": 2}
    made["evaluation"] = {"files": made["data"]["files"], "rows": 3}

    def work(world: World) -> None:
        for parallel in ("ddp", "fsdp"):
            made["training"]["parallel"] = parallel
            recipe = language_recipe(made)
            job = build(recipe, tmp_path / parallel, world)
            fit(job, tmp_path / parallel, loop_of(recipe, len(job.data)), world=world)

    assert ranks(2, work) == [0, 0]
    begun_at = load_file(base / "llama/model.safetensors")
    copies, shards = (newest(tmp_path / name).model for name in ("ddp", "fsdp"))
    for name, start in begun_at.items():
        moved, off = copies[name] - start, copies[name] - shards[name]
        assert moved.norm() > 0 and off.norm() < 0.02 * moved.norm(), name
    one, other = (rows(tmp_path / name) for name in ("ddp", "fsdp"))
    assert [r["loss"] for r in one if "loss" in r] == pytest.approx([r["loss"] for r in other if "loss" in r], rel=1e-4)
    again = document(tmp_path, tmp_path / "fsdp", training={"precision": "bf16"})  # a run is a checkpoint like others
    assert_same_start(begun(tmp_path / "from the run", again))
    both = [[r["evaluation"]["loss"] for r in found if "evaluation" in r] for found in (one, other)]
    assert len(both[0]) == 2 and both[0] == pytest.approx(both[1], rel=1e-3)


def test_columns_of_other_ranks_are_not_read(tmp_path: Path) -> None:
    """A checkpoint of tensor-parallel ranks, cut by columns: the rows of a shard are put together from all of them."""
    weight = torch.arange(24.0).view(4, 6)
    parts = {"a.bin": weight[:, :2], "b.bin": weight[:, 2:]}
    for name, part in parts.items():
        (tmp_path / name).write_bytes(part.contiguous().numpy().tobytes())
    blocks = tuple(
        Block(name, 0, part.numel() * 4, (0, at), tuple(part.shape)) for (name, part), at in zip(parts.items(), (0, 2))
    )
    seen = list[tuple[str, int, int]]()

    class Watched(LocalFolder):
        def read_into(self, name: str, start: int, out: memoryview) -> None:
            seen.append((name, start, len(out)))
            super().read_into(name, start, out)

    record = TensorRecord("w", "F32", (4, 6), blocks)
    view = StateView(str(tmp_path), "dcp", Watched(tmp_path), {"w": record})
    mine = torch.empty(2, 6, dtype=torch.float64)
    fill(mine, view, "w", 6)
    assert torch.equal(mine, weight[1:3].double())
    assert seen == [("a.bin", 8, 16), ("b.bin", 16, 32)]
    odd = torch.empty(7)
    fill(odd, view, "w", 4)
    assert torch.equal(odd, weight.view(-1)[4:11])


@pytest.mark.parametrize("first", [0, 4, 9])
def test_elements_come_out_of_what_is_not_stored_in_their_order(base: Path, tmp_path: Path, first: int) -> None:
    """A tensor in memory, a transposed one in a .pth, and one in blocks of GGUF."""
    weight = torch.arange(96.0).view(32, 3).T
    torch.save({"w": weight}, tmp_path / "m.pth")
    for view in (view_of({"w": weight}), read(tmp_path / "m.pth")):
        out = torch.empty(11, dtype=torch.bfloat16)
        fill(out, view, "w", first)
        assert torch.equal(out, weight.reshape(-1)[first : first + 11].bfloat16())
    convert(make_plan([read(base / "qwen3")], "gguf", dtype="Q8_0"), str(tmp_path / "m.gguf"), "gguf")
    gguf = read(tmp_path / "m.gguf")
    out = torch.empty(70)
    fill(out, gguf, "blk.0.ffn_up.weight", 30 + first)
    assert torch.equal(out, gguf.tensor("blk.0.ffn_up.weight").view(-1)[30 + first : 100 + first])


def test_a_rank_that_cannot_read_its_part_ends_all_of_them(base: Path, tmp_path: Path) -> None:
    """And none waits for scales that never come."""
    made = document(tmp_path, base / "llama", adapter=LORA, training={"quantize_backbone": "nf4"})

    def work(world: World) -> None:
        into = LocalFolder.read_into

        def fails(self: LocalFolder, name: str, start: int, out: memoryview) -> None:
            into(self, name, start, out)
            if world.rank == 1 and start > 20000 and len(out) < 1 << 16:
                raise TensorkeepError("the disk is gone", where=name, code="F02")

        digest = StartingModel.digest
        StartingModel.digest = lambda *_: "0" * 32  # type: ignore[assignment, method-assign]
        LocalFolder.read_into = fails  # type: ignore[method-assign]
        with pytest.raises(TensorkeepError, match="F02"):
            build(language_recipe(made), tmp_path / "run", world)
        StartingModel.digest = digest  # type: ignore[method-assign]

    assert ranks(2, work, seconds=60) == [0, 0]
