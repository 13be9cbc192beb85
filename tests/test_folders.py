"""The folders that training programs leave: opened without being told, every part verified, joined or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tensorkeep.cli import main
from tensorkeep.conversion.naming import identify
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.inspection import document
from tensorkeep.diagnosis.verification import verify
from tensorkeep.formats.view import read
from tests import folder_layouts
from tests.checkpoints import hf_tensors, write_model
from tests.folder_layouts import LAYOUTS, megatron, megatron_state
from tests.helpers import refused
from tests.language_files import save_tokenizer, texts

UNNAMED = ("OLMo-core", "NeMo", "Megatron torch_dist")  # their own names have no table here: names stay as they are


class Made:
    """One model, and a folder of each layout with its values, written when first asked for."""

    def __init__(self, top: Path) -> None:
        self.top, self.model, self.places = top, top / "model", dict[str, Path]()
        write_model(self.model, "Llama", torch.float32)
        self.state = hf_tensors(self.model)

    def folder(self, name: str) -> Path:
        if name not in self.places:
            top = self.top / name.replace(" ", "-").lower()
            top.mkdir()
            self.places[name] = LAYOUTS[name](top, self.model, self.state)
        return self.places[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("folders"))


def inspected(path: Path) -> dict[str, Any]:
    view = read(path)
    identity = identify(view)
    return document(view, identity, list(identity.names), {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_opens_without_being_told_and_holds_the_models_values(layout: str, made: Made) -> None:
    folder = made.folder(layout)
    view = read(folder)
    names = {
        clean.removeprefix("model.") if clean not in made.state else clean: stored
        for stored, clean in identify(view).names.items()
    }
    for name, tensor in made.state.items():
        stored = names.get(name) or names[name.removeprefix("model.")]
        assert torch.equal(view.tensor(stored), tensor), name
        assert b"".join(bytes(p) for p in view.stream(stored, granule=4, chunk=64)) == tensor.numpy().tobytes()
        if tensor.dim() == 2:
            assert b"".join(bytes(p) for p in view.stream(stored, rows=(3, 7))) == tensor[3:7].numpy().tobytes()


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n not in UNNAMED])
def test_its_conversion_loads_as_the_model(layout: str, made: Made, tmp_path: Path) -> None:
    given = [str(made.folder(layout)), str(tmp_path / "out"), "--to", "hf", "--config", str(made.model)]
    drop = (
        ["--drop", "^alias.weight$", "--drop", "^rotary"]
        if "ZeRO" in layout or layout == "accelerate under DeepSpeed"
        else []
    )
    assert main(["convert", *given, *drop]) == 0
    found = hf_tensors(tmp_path / "out")
    assert found.keys() == made.state.keys() and all(torch.equal(found[n], t) for n, t in made.state.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_folder_verifies_and_a_cut_file_in_it_is_named(layout: str, made: Made, tmp_path: Path) -> None:
    folder = made.folder(layout)
    assert [f for f in verify(folder)[0] if f.severity != "info" and f.code != "F08"] == []
    assert not [f for f in diagnose(str(folder)).findings if f.severity == "error" and f.code[0] in "FR"]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    home = read(copy).home
    (place,) = [getattr(home, "path", copy)]
    saved = [p for p in sorted(place.rglob("*")) if p.suffix in (".pt", ".pth", ".bin", ".distcp", ".pkl", ".ckpt")]
    for file in [p for p in saved if p.is_file() and p.name != "metadata.pkl"][:: max(len(saved) // 6, 1)]:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        assert verdict(copy), file
        file.write_bytes(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diagnosis_tells_its_values_from_others(layout: str, made: Made, tmp_path: Path) -> None:
    plain = made.folder(layout)
    found = diagnose(str(plain), str(made.model)).findings
    extra = {"alias.weight", "rotary.inv_freq"}  # of DeepSpeed's layouts: a shared name and a buffer
    errors = [f for f in found if f.severity == "error" and not set(f.tensors) <= extra]
    assert {f.code for f in errors} <= {"K03", "K04"}, errors  # the word under which a program keeps the model
    if layout == "Trainer under FSDP":  # nested as that program keeps it, which is no fault of it
        assert errors == [] and [f.severity for f in found if f.code == "K04"] == ["info"]
    others = {n: t + 0.1 * torch.randn_like(t) if n.endswith("up_proj.weight") else t for n, t in made.state.items()}
    shutil.copytree(made.model, tmp_path / "others")
    save_file(others, tmp_path / "others" / "model.safetensors", {"format": "pt"})
    assert any("up_proj" in t for f in diagnose(str(plain), str(tmp_path / "others")).findings for t in f.tensors)


def verdict(folder: Path) -> list[str]:
    return [f.code for f in verify(folder)[0] if f.severity == "error"]


def test_inspect_says_which_part_was_read_and_what_lies_beside(made: Made) -> None:
    said = inspected(made.folder("Trainer under FSDP"))["folder"]
    assert said["read"] == "checkpoint-10/pytorch_model_fsdp_0" and "transformers' Trainer" in said["writers"]
    beside = {entry["name"]: entry["what"] for entry in said["beside"]}
    assert beside["optimizer_0"] == "optimizer" and beside["scheduler.pt"] == "schedule"
    assert beside["rng_state_0.pth"] == "random state" and "another save of" in beside["checkpoint-2"]
    zero = inspected(made.folder("ZeRO-3"))
    assert "3 ranks joined" in zero["folder"]["how"] and zero["run"]["step"] == 7 and zero["run"]["world_size"] == 3
    assert "deepspeed.runtime.fp16.loss_scaler.LossScaler" in zero["opaque"]
    assert inspected(made.folder("OLMo-core"))["folder"]["read"] == "model_and_optim"
    assert inspected(made.model)["folder"] is None


def test_a_parent_takes_the_save_that_its_program_names(made: Made) -> None:
    folder = made.folder("Megatron torch_dist")
    assert read(folder).metadata["taken"] == "iter_0000005"  # not the later one, which its pointer does not name
    assert torch.equal(read(folder).tensor("lm_head.weight"), made.state["lm_head.weight"])


def test_zeros_moments_lie_under_their_parameters_names(made: Made) -> None:
    for layout in ("ZeRO-2", "ZeRO-3", "DeepSpeed universal"):
        view = read(made.folder(layout))
        tensor = made.state["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(view.tensor("optimizer.state.model.layers.1.mlp.up_proj.weight.exp_avg"), tensor * 2)
    view = read(made.folder("ZeRO-2"))
    assert view["alias.weight"].tied_to and view["rotary.inv_freq"].shape == (4,)


def test_a_config_of_another_program_is_not_taken_for_the_models(made: Made) -> None:
    assert read(made.folder("OLMo-core")).config is None
    assert (read(made.folder("verl")).config or {})["model_type"] == "llama"


@pytest.mark.parametrize(
    ("layout", "lost", "code"),
    [
        ("ZeRO-2", "*_rank_1_*optim_states.pt", "F05"),
        ("ZeRO-3", "*rank_2_*optim_states.pt", "F05"),
        ("ZeRO-3", "*rank_1_*model_states.pt", "F05"),
        ("ZeRO-3", "*optim_states.pt", "F05"),
        ("verl", "model_world_size_3_rank_2.pt", "F05"),
        ("torch_checkpointing", "model_1.pt", "F05"),
        ("bin shards", "pytorch_model-00002-of-00003.bin", "F05"),
        ("bin shards", "*.index.json", "F05"),
    ],
)
def test_a_missing_part_is_one_error(layout: str, lost: str, code: str, made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder(layout), tmp_path / "x")
    for file in (tmp_path / "x").rglob(lost):
        file.unlink()
    with refused(code):
        read(tmp_path / "x")


def test_weights_beside_the_ones_that_are_read_are_said(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder("bin shards"), tmp_path / "x")
    torch.save({"w": torch.zeros(2)}, tmp_path / "x" / "pytorch_model-00009-of-00009.bin")
    (note,) = read(tmp_path / "x").notes
    assert note.code == "F07" and note.names == ("pytorch_model-00009-of-00009.bin",)
    torch.save({"w": torch.ones(2)}, tmp_path / "x" / "pytorch_model.bin")  # transformers prefers the single file
    view = read(tmp_path / "x")
    assert list(view) == ["w"] and len(view.notes[0].names) == 4


def test_one_ranks_file_alone_is_refused_and_names_the_folder(made: Made) -> None:
    with refused(None, "one rank's parts", "name the folder"):
        read(made.folder("verl") / "global_step_8" / "actor" / "model_world_size_3_rank_1.pt")
    file = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with refused(None, "one rank's part", "name its folder"):
        read(made.folder("ZeRO-2") / "global_step7" / file)


def test_ranks_of_different_saves_are_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder("ZeRO-2"), tmp_path / "x")
    file = tmp_path / "x" / "global_step7" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "other").mkdir()
    other = folder_layouts.zero(tmp_path / "other", made.model, {k: v for k, v in list(made.state.items())[2:]})
    shutil.copy(other / "global_step7" / file.name, file)
    with refused("F07"):
        read(tmp_path / "x")


# -- Megatron-LM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_megatrons_parts_are_joined_as_their_arguments_say(tp: int, pp: int, tmp_path: Path) -> None:
    view, whole = read(megatron(tmp_path, tp, pp)), megatron_state()
    assert set(view) == set(whole) and all(torch.equal(view.tensor(n), t) for n, t in whole.items())
    assert view.metadata["taken"] == "iter_0000009" and view.entries["iteration"] == 9 and verdict(tmp_path) == []


def test_one_of_megatrons_parts_alone_is_refused(tmp_path: Path) -> None:
    with refused(None, "one of Megatron-LM's 2 tensor-parallel x 2", "mp_rank_"):
        read(megatron(tmp_path) / "iter_0000009" / "mp_rank_01_000")


@pytest.mark.parametrize(
    ("folders", "newest"),
    [
        (["checkpoint-9", "checkpoint-100"], "checkpoint-100"),
        (["epoch=3-step=40-val=0.1", "epoch=9-step=4-val=0.9"], "epoch=3-step=40-val=0.1"),
        (["v0-20250101-000000/checkpoint-5", "v1-20250101-000000/checkpoint-2"], "v1-20250101-000000/checkpoint-2"),
        (["step-8", "step-11"], "step-11"),
        (["step1000", "step900"], "step1000"),
        (["checkpoints/checkpoint_3", "checkpoints/checkpoint_20"], "checkpoints/checkpoint_20"),
        (["epoch_0", "epoch_1"], "epoch_1"),
    ],
)
def test_of_several_saves_the_newest_is_read_and_the_others_are_said(
    folders: list[str], newest: str, tmp_path: Path
) -> None:
    for number, name in enumerate(folders):
        (tmp_path / name).mkdir(parents=True)
        save_file({"w": torch.full((2,), float(number))}, tmp_path / name / "model.safetensors")
    view = read(tmp_path)
    assert view.metadata["taken"] == newest and view.array("w")[0] == folders.index(newest)
    assert [n.code for n in view.notes] == ["F08"]


def test_ranks_of_two_dimensions_are_joined_as_torch_cuts_them(tmp_path: Path) -> None:
    """HSDP repeats parts; FSDP with tensor parallelism cuts two dimensions: every DTensor is torch's own."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = {"a": torch.arange(35.0).reshape(7, 5), "b": torch.arange(24.0).reshape(4, 6), "c": torch.arange(5.0)}
    cuts = {"a": (Replicate(), Shard(0)), "b": (Shard(0), Shard(1)), "c": (Shard(0), Shard(0))}
    for rank in range(6):
        dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
        mesh, held = init_device_mesh("cpu", (2, 3), mesh_dim_names=("outer", "inner")), {}
        for name, tensor in whole.items():
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, cuts[name])
            local = tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape))].clone()
            given = {"shape": tensor.shape, "stride": tensor.stride()}
            held[name] = DTensor.from_local(local, mesh, cuts[name], run_check=False, **given)
        torch.save(held, tmp_path / f"model_world_size_6_rank_{rank}.pt")
        dist.destroy_process_group()
    view = read(tmp_path)
    assert all(torch.equal(view.tensor(name), tensor) for name, tensor in whole.items())


def test_megatrons_parts_that_cannot_be_joined_are_named_with_the_program_that_can(tmp_path: Path) -> None:
    for number, arguments in enumerate(
        ({"expert_model_parallel_size": 2}, {"virtual_pipeline_model_parallel_size": 2}, {"num_layers": 6})
    ):
        with refused(None, "Megatron"):
            read(megatron(tmp_path / str(number), **arguments))
    shutil.rmtree(megatron(tmp_path / "lost") / "iter_0000009" / "mp_rank_01_001")
    with refused("F05", "3 of 4 parts"):
        read(tmp_path / "lost")
    folder = megatron(tmp_path / "odd", 2, 1) / "iter_0000009"
    for rank in range(2):  # a tensor that no rule names and that differs between ranks
        saved = torch.load(folder / f"mp_rank_0{rank}" / "model_optim_rng.pt", weights_only=False)
        saved["model"]["decoder.layers.0.mixer.dt_bias"] = torch.full((3,), float(rank))
        torch.save(saved, folder / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    with refused(None, "dt_bias", "Megatron"):
        read(tmp_path / "odd")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_0_rank1.bin"], "FULL_STATE_DICT"),
        (["global_step4/layer_00-model_00-model_states.pt"], "ds_to_universal"),
        (["global_step4/mp_rank_00_model_states.pt", "global_step4/mp_rank_01_model_states.pt"], "ds_to_universal"),
        (["consolidated.00.pth", "consolidated.01.pth"], "convert_llama_weights_to_hf"),
        (["iter_0000001/decoder.zarr/.zarray"], "torch_dist"),
        (["model.nemo"], "tar xf"),
        (["checkpoint_0/_CHECKPOINT_METADATA"], "Orbax"),
    ],
)
def test_what_only_another_program_joins_is_named_with_it(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"PK, not looked into")
    with refused(None, said):
        read(tmp_path)


def test_folders_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(tmp_path)
    with refused("F05"):
        read(tmp_path)


def test_a_save_of_another_program_is_never_overwritten(made: Made, tmp_path: Path) -> None:
    for layout in ("ZeRO-2", "verl", "Trainer under FSDP"):
        shutil.copytree(made.folder(layout), tmp_path / layout)
        before = sorted(p.name for p in (tmp_path / layout).rglob("*"))
        for place in (
            tmp_path / layout,
            next(p.parent for p in (tmp_path / layout).rglob("*_states.pt"))
            if layout == "ZeRO-2"
            else tmp_path / layout,
        ):
            assert main(["convert", str(made.model), str(place), "--to", "hf", "--overwrite"]) == 2
        assert sorted(p.name for p in (tmp_path / layout).rglob("*")) == before


def test_an_adapter_at_the_top_is_what_the_folder_is(made: Made, tmp_path: Path) -> None:
    """LLaMA-Factory, axolotl, TRL and Unsloth: an adapter, saves below it, results beside."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    for place in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-10", tmp_path):
        network = AutoModelForCausalLM.from_pretrained(made.model)
        adapter = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        adapter.save_pretrained(place)
        folder_layouts.trainer_files(place)
    (tmp_path / "all_results.json").write_text("{}")
    view = read(tmp_path)
    said = {e["name"]: e["what"] for e in inspected(tmp_path)["folder"]["beside"]}
    assert (
        view.format == "peft" and "another save of" in said["checkpoint-10"] and said["all_results.json"] == "results"
    )
    for entry in [p for p in tmp_path.iterdir() if p.is_file() and p.name.startswith(("adapter", "README"))]:
        entry.unlink()
    assert read(tmp_path).metadata["taken"] == "checkpoint-10" and read(tmp_path).format == "peft"


def test_lightnings_folder_takes_the_last_of_its_files(made: Made, tmp_path: Path) -> None:
    """The keys that pytorch_lightning's Trainer writes, with an object of the user's own beside."""
    pl = pytest.importorskip("pytorch_lightning")
    place = tmp_path / "lightning_logs" / "version_1" / "checkpoints"
    place.mkdir(parents=True)
    for step, factor in ((5, 0.0), (12, 1.0)):
        held = {f"model.{k}": v * factor for k, v in made.state.items()}
        saved = {"state_dict": held, "global_step": step, "epoch": 0, "pytorch-lightning_version": pl.__version__}
        torch.save(saved, place / f"epoch=0-step={step}.ckpt")
    view = read(tmp_path)
    assert view.metadata["taken"] == "lightning_logs/version_1/checkpoints/epoch=0-step=12.ckpt"
    assert torch.equal(view.tensor("state_dict.model.lm_head.weight"), made.state["lm_head.weight"])
    beside = {e["name"] for e in inspected(tmp_path)["folder"]["beside"]}
    assert "epoch=0-step=5.ckpt" in beside
    (place / "last.ckpt").write_bytes((place / "epoch=0-step=5.ckpt").read_bytes())
    assert read(place).metadata["taken"] == "last.ckpt"


def test_inspect_prints_the_part_and_what_lies_beside(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made.folder("ZeRO-2"))]) == 0
    out = capsys.readouterr().out
    assert "read: global_step7" in out and "ZeRO-2, 3 ranks joined" in out and "stay opaque" in out
    assert main(["inspect", str(made.folder("verl")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"]["read"] == "global_step_8/actor"


def test_the_page_names_every_layout_and_how_it_was_tested() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "folders.md").read_text()
    table = page.partition("<!-- folders -->")[2].partition("<!-- end -->")[0]
    rows = {cells[1]: cells for line in table.splitlines() if (cells := [c.strip() for c in line.split("|")])[1:2]}
    assert set(LAYOUTS) <= set(rows)
    for name in LAYOUTS:
        assert rows[name][3].startswith("written by it" if name in folder_layouts.REAL else "by layout")
        assert rows[name][4:7] == ["yes"] * 3 and (rows[name][7] == "yes") == (name not in UNNAMED)


def test_trainers_own_output_folder_opens(tmp_path: Path) -> None:
    """transformers' Trainer writes two saves; its folder is read as the newer one, all of it whole."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    write_model(tmp_path / "model", "Llama", torch.float32)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    told = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
    )
    data = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}] * 2
    Trainer(model=network, args=told, train_dataset=data).train()
    view = read(tmp_path / "out")
    assert make_plan([view], "hf").header == {}  # which part was read is no entry of the file's own
    assert view.metadata["taken"] == "checkpoint-2" and verify(tmp_path / "out" / "checkpoint-2")[0] == []
    (note,) = verify(tmp_path / "out")[0]  # the other save is said
    assert (note.code, note.severity) == ("F08", "warning") and "checkpoint-2 is read, of 2" in note.message
    assert torch.equal(view.tensor("lm_head.weight"), network.state_dict()["lm_head.weight"])
    file = tmp_path / "out" / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert verdict(tmp_path / "out") and "optimizer.pt" in verify(tmp_path / "out")[0][-1].message
    assert "F02" in diagnose(str(tmp_path / "out")).causes


def test_training_starts_from_the_weights_of_a_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "Llama", torch.float32, vocab_size=320)
    folder = folder_layouts.verl(tmp_path / "verl", tmp_path / "model", hf_tensors(tmp_path / "model"))
    save_tokenizer(tmp_path / "tok")
    document = {
        "model": str(folder),
        "tokenizer": str(tmp_path / "tok"),
        "data": {"files": [str(texts(tmp_path / "a.jsonl"))], "length": 32},
        "training": {"updates": 1, "batch_size": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"version": 2, **document}))
    assert main(["train", "language", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    base = read(tmp_path / "run" / "base")
    assert torch.equal(base.tensor("lm_head.weight"), hf_tensors(tmp_path / "model")["lm_head.weight"])
