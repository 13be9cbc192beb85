"""check_loaded names what a load left wrong, says nothing of a sound one, and repair_buffers restores bit for bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from tensorkeep.diagnosis.live.loaded import check_loaded
from tensorkeep.errors import TensorkeepError
from tensorkeep.models.repair import repair_buffers
from tests import forked
from tests.checkpoints import TINY, hf_tensors, titan_state, write_flame, write_model, write_titan

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parent.parent
IDS = torch.randint(3, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Olmo2": {},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "Gemma2": {"head_dim": 8},
    "GPTNeoX": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mixtral": {"num_local_experts": 4},
    "Phi3": {},
    "Qwen2": {},
}


def codes(findings: list[Any], severity: str = "error") -> list[str]:
    return [f.code for f in findings if f.severity == severity]


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "hf", "Llama", dtype=torch.float32, initializer_range=0.3)
    return tmp_path / "hf"


# -- sound loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_load_gives_no_finding(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "hf", kind, **KINDS[kind])
    assert check_loaded(load(tmp_path / "hf"), tmp_path / "hf") == []


def test_every_format_and_naming_of_the_same_weights_is_sound(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "Llama", tie_word_embeddings=True)
    model = load(tmp_path / "hf")
    flame = write_flame(tmp_path / "flame", model.state_dict())
    titan = write_titan(tmp_path / "titan", titan_state(hf_tensors(tmp_path / "hf"), model.config))
    torch.save({f"module.{n}": t for n, t in model.state_dict().items()}, tmp_path / "wrapped.pth")
    for checkpoint in (flame, titan, tmp_path / "wrapped.pth"):
        assert check_loaded(model, checkpoint) == []


def test_wrappers_and_exact_casts_are_seen_through_and_lossy_ones_are_not_forgiven(folder: Path) -> None:
    model = load(folder)
    assert check_loaded(torch.compile(model, backend="eager"), folder) == []
    assert check_loaded(nn.ModuleDict({"module": model}), folder) == []
    assert check_loaded(nn.ModuleDict({"model": model}), folder) == []  # as Lightning modules hold it
    assert check_loaded(model.to(torch.float64).to(torch.float32), folder) == []
    found = check_loaded(model.half().float(), folder)
    assert codes(found) == ["V02"] and codes(found, "warning") == ["B01"]


def test_a_model_in_bfloat16_is_sound_and_its_narrowed_frequencies_are_a_warning(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert check_loaded(model, folder) == []
    cast = load(folder).to(torch.bfloat16)
    assert codes(check_loaded(cast, folder)) == [] and codes(check_loaded(cast, folder), "warning") == ["B01"]
    assert "model.rotary_emb.inv_freq" in repair_buffers(cast)
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32 and check_loaded(cast, folder) == []


def test_a_headless_model_warns_and_an_adapter_informs(folder: Path) -> None:
    body = transformers.AutoModel.from_pretrained(folder)
    assert [(f.code, f.severity) for f in check_loaded(body, folder)] == [("K07", "warning")]
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(folder), peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert [(f.code, f.severity) for f in check_loaded(model, folder)] == [("K01", "info")]


def test_checking_changes_neither_the_model_nor_the_random_state(folder: Path) -> None:
    model = load(folder)
    before = {n: t.clone() for n, t in [*model.state_dict().items(), *model.named_buffers()]}
    state = torch.get_rng_state()
    check_loaded(model, folder)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in [*model.state_dict().items(), *model.named_buffers()])


# -- buffers ----------------------------------------------------------------------------------------------------------


def meta_loaded(folder: Path, garbage: float) -> Any:
    """As flame builds and loads, with the memory that transformers 4 leaves in the buffers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.post_init()
        for buffer in model.buffers():
            buffer.fill_(garbage)
    step = write_flame(folder.parent / "flame", load(folder).state_dict())
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=step, no_dist=True)
    return model.eval()


@pytest.mark.parametrize("garbage", [0.0, 3e-41, -1.468e34, float("nan")])
@pytest.mark.parametrize(
    "rope",
    [{}, {"rope_parameters": LLAMA3}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}],
)
def test_the_buffer_that_no_checkpoint_fills_is_named_and_repaired_bitwise(
    tmp_path: Path, garbage: float, rope: dict[str, Any]
) -> None:
    write_model(tmp_path / "hf", "Llama", dtype=torch.float32, initializer_range=0.3, **rope)
    reference, model = load(tmp_path / "hf"), meta_loaded(tmp_path / "hf", garbage)
    assert all(
        torch.equal(t, reference.state_dict()[n]) for n, t in model.state_dict().items()
    )  # what everybody compares
    loss = reference(IDS, labels=IDS).loss
    assert not torch.equal(model(IDS, labels=IDS).loss, loss)
    found = check_loaded(model, tmp_path / "hf")
    assert codes(found) == ["B01"] and "model.rotary_emb.inv_freq" in found[0].tensors
    assert set(repair_buffers(model)) == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    assert torch.equal(model(IDS, labels=IDS).loss, loss) and check_loaded(model, tmp_path / "hf") == []
    assert repair_buffers(model) == []


def test_repair_keeps_the_address_of_a_buffer(folder: Path) -> None:
    model = meta_loaded(folder, 0.0)
    address = model.model.rotary_emb.inv_freq.data_ptr()
    repair_buffers(torch.compile(model, backend="eager"))
    assert model.model.rotary_emb.inv_freq.data_ptr() == address and float(model.model.rotary_emb.inv_freq[0]) == 1.0


def test_a_buffer_still_on_meta_is_named_and_made(folder: Path) -> None:
    model = load(folder)
    model.model.rotary_emb.inv_freq = torch.empty(4, device="meta")
    assert codes(check_loaded(model, folder)) == ["B01"]
    repair_buffers(model)
    assert check_loaded(model, folder) == []


class Plain(nn.Module):
    """A module of nobody's library: `own` names the method that knows its buffer, if any."""

    def __init__(self, own: str) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.rope = nn.Module()
        inverse = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
        self.rope.register_buffer("inv_freq", inverse.clone(), persistent=False)

        def put() -> None:
            raise AssertionError("replaced below")

        if own:
            kind = type("Rope", (nn.Module,), {own: lambda self: self.inv_freq.copy_(inverse), "__doc__": put.__doc__})
            self.rope.__class__ = kind


@pytest.mark.parametrize("own", ["reset_parameters", "rope_init", "_init_self_buffers"])
def test_a_module_of_another_framework_recomputes_its_buffer_in_its_own_way(tmp_path: Path, own: str) -> None:
    model = Plain(own)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert check_loaded(model, tmp_path / "model.pth") == []
    model.rope.inv_freq.fill_(7.0)
    found = check_loaded(model, tmp_path / "model.pth")
    assert codes(found) == ["B01"] and float(model.rope.inv_freq[0]) == 7.0
    assert repair_buffers(model) == ["rope.inv_freq"] and check_loaded(model, tmp_path / "model.pth") == []


def test_a_buffer_nobody_can_compute_is_a_warning_unless_its_values_are_impossible(tmp_path: Path) -> None:
    model = Plain("")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert [(f.code, f.severity) for f in check_loaded(model, tmp_path / "model.pth")] == [("B01", "warning")]
    assert check_loaded(model, tmp_path / "model.pth", config={"hidden_size": 16, "num_attention_heads": 2}) == []
    model.rope.inv_freq.fill_(-1e30)
    assert codes(check_loaded(model, tmp_path / "model.pth")) == ["B01"] and repair_buffers(model) == []


def test_without_transformers_the_check_still_works(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["transformers"] = None
import torch
from tensorkeep import check_loaded
model = torch.nn.Linear(3, 3)
torch.save(model.state_dict(), sys.argv[1])
assert check_loaded(model, sys.argv[1]) == []
torch.nn.init.normal_(model.weight)
print([f.code for f in check_loaded(model, sys.argv[1])])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m.pth")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "['V06']", done.stderr


# -- tensors ----------------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


def turned(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, list[str]]] = {
    "fresh": (lambda p: p[Q].normal_(0, 0.02), "V03", [Q]),
    "zero": (lambda p: p[Q].zero_(), "V05", [Q]),
    "ones": (lambda p: p["model.norm.weight"].fill_(1.0), "V04", ["model.norm.weight"]),
    "nan": (lambda p: p[Q][0, 0].fill_(float("nan")), "V01", [Q]),
    "flip": (lambda p: p[Q][3, 3].mul_(2.0**40), "V07", [Q]),
    "scaled": (lambda p: p[Q].mul_(0.5), "V06", [Q]),
    "bf16": (lambda p: p[Q].copy_(p[Q].bfloat16()), "V02", [Q]),
    "fp8": (lambda p: p[Q].copy_(p[Q].to(torch.float8_e4m3fn).float()), "V02", [Q]),
    "rope": (lambda p: p[Q].copy_(turned(p[Q])), "O01", [Q]),
    "transposed": (lambda p: p[Q].copy_(p[Q].T.clone()), "S03", [Q]),
    "layer": (lambda p: p[Q].copy_(p[Q.replace("1", "0", 1)]), "O02", [Q]),
    "gate": (
        lambda p: p["model.layers.0.mlp.gate_proj.weight"].copy_(p["model.layers.0.mlp.up_proj.weight"]),
        "O03",
        ["model.layers.0.mlp.gate_proj.weight"],
    ),
    "head": (lambda p: p["lm_head.weight"].copy_(p["model.embed_tokens.weight"]), "T02", ["lm_head.weight"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_not_the_files_is_named_with_its_fault(folder: Path, fault: str) -> None:
    model = load(folder)
    spoil, code, names = FAULTS[fault]
    with torch.no_grad():
        spoil(dict(model.named_parameters()))
    found = check_loaded(model, folder)
    assert codes(found) == [code] and list(found[0].tensors) == names


def test_missing_dropped_and_resized_tensors_are_named(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.norm.weight"]
    stored["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    model = load(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    found = {f.code: list(f.tensors) for f in check_loaded(model, folder)}
    assert found == {"K01": ["model.norm.weight"], "K07": ["model.layers.0.self_attn.q_proj.bias"]}
    model.resize_token_embeddings(100)
    assert "S02" in codes(check_loaded(model, folder))


def test_a_load_that_found_no_name_says_why(folder: Path, tmp_path: Path) -> None:
    state = load(folder).state_dict()
    fresh = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    for prefix, code in (("_orig_mod.", "K03"), ("model.", "K04")):
        torch.save({prefix + n: t for n, t in state.items()}, tmp_path / "p.pth")
        fresh.load_state_dict(torch.load(tmp_path / "p.pth"), strict=False)
        cause = next(f for f in check_loaded(fresh, tmp_path / "p.pth") if f.code == code)
        assert "V03" in cause.explains
    torch.save({"nothing": torch.ones(3)}, tmp_path / "n.pth")
    assert codes(check_loaded(fresh, tmp_path / "n.pth")) == ["K05"]


def test_a_broken_tie_and_another_config_are_named(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "Llama", dtype=torch.float32, tie_word_embeddings=True)
    model = load(tmp_path / "hf")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert [(f.code, f.severity) for f in check_loaded(model, tmp_path / "hf")] == [("T01", "warning")]
    model.lm_head.weight = nn.Parameter(torch.randn(96, 32))
    assert codes(check_loaded(model, tmp_path / "hf")) == ["T01"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    found = check_loaded(load(tmp_path / "hf"), tmp_path / "hf", config=config)
    assert codes(found) == ["C01"] and "rope_theta" in found[0].evidence


def test_an_unreadable_checkpoint_is_an_error_and_not_a_finding(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TensorkeepError):
        check_loaded(load(folder), tmp_path / "empty")


# -- sharded ----------------------------------------------------------------------------------------------------------

SHARDED = """
import json, os, sys
import torch, torch.distributed as dist, transformers
from torch.distributed.fsdp import fully_shard
from tensorkeep.diagnosis.live import loaded
from tensorkeep.models import tensors as live
from tensorkeep.models.repair import repair_buffers
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-store", rank=rank, world_size=2)
torch.Tensor.full_tensor = None
torch.distributed.tensor.DTensor.full_tensor = lambda *a, **k: 1 / 0  # nothing may be gathered
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    out = [[f.code for f in loaded.check_loaded(model, folder)]]
    with torch.no_grad():
        for b in model.buffers():
            b.zero_()
        if rank == 1:  # only one process sees it
            model.model.layers[1].mlp.up_proj.weight.to_local().normal_()
    found = loaded.check_loaded(model, folder)
    out.append(sorted((f.code, list(f.tensors)) for f in found))
    out.append(sorted(repair_buffers(model)))
    out.append([f.code for f in loaded.check_loaded(model, folder)])
    out.append([f.code for f in loaded.check_loaded(torch.compile(model, backend="eager"), folder)])
    with open(f"{folder}-{rank}.json", "w") as file:
        file.write(json.dumps(out))
dist.barrier()
os._exit(0)  # taking a gloo group down ends some processes by a signal now and then: torch's own threads race
"""


def test_shards_are_compared_where_they_lie_and_every_process_says_the_same(tmp_path: Path) -> None:
    folders = {tied: tmp_path / ("tied" if tied else "apart") for tied in (False, True)}
    for tied, folder in folders.items():  # uneven shards
        write_model(folder, "Llama", dtype=torch.float32, intermediate_size=45, tie_word_embeddings=tied)
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        forked.Popen(
            [sys.executable, script, *folders.values()],
            env=shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    up = "model.layers.1.mlp.up_proj.weight"
    buffers = ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]
    for folder in folders.values():
        for rank in (0, 1):
            said = json.loads(Path(f"{folder}-{rank}.json").read_text())
            assert said == [[], [["B01", buffers], ["V03", [up]]], buffers, ["V03"], ["V03"]]


# -- torchtitan -------------------------------------------------------------------------------------------------------


def test_torchtitans_fused_weight_and_table_are_checked_against_hf_and_dcp(tmp_path: Path) -> None:
    from examples import check_loaded_torchtitan as titan

    torch.manual_seed(0)
    model = titan.Model()
    write_titan(tmp_path / "dcp", model.state_dict())
    assert check_loaded(model, tmp_path / "dcp", config=titan.CONFIG) == []
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers["0"]["attention"]["qkv_linear"].wqkv.weight[-1] += 1  # the last row of v
    assert codes(check_loaded(other, tmp_path / "dcp", config=titan.CONFIG)) == ["V06"]
    found = check_loaded(model, tmp_path / "dcp", config={**titan.CONFIG, "rope_theta": 5e5})
    assert codes(found) == ["C01"] and list(found[0].tensors) == ["freqs_cis"]
    model.freqs_cis.zero_()
    assert "B01" in codes(check_loaded(model, tmp_path / "dcp", config=titan.CONFIG))
    repair_buffers(model)
    assert check_loaded(model, tmp_path / "dcp", config=titan.CONFIG) == []


def test_a_titan_model_is_checked_against_an_hf_folder(tmp_path: Path) -> None:
    from examples import check_loaded_torchtitan as titan

    write_model(tmp_path / "hf", "Llama", dtype=torch.float32, num_hidden_layers=1)
    model = titan.Model()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    model.load_state_dict(titan_state(hf_tensors(tmp_path / "hf"), config))
    assert check_loaded(model, tmp_path / "hf") == []


@pytest.mark.parametrize("name", ["transformers", "flame", "torchtitan"])
def test_the_examples_run(name: str) -> None:
    done = forked.run(
        [sys.executable, str(ROOT / "examples" / f"check_loaded_{name}.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- PEFT's adapters and quantized models ------------------------------------------------------------------------------


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_model_under_an_adapter_is_sound_against_base_and_adapter(folder: Path, kind: str, name: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "r": 2, **ADAPTERS[kind]}
    made = peft.get_peft_model(load(folder), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    made.save_pretrained(folder.parent / "adapter")
    model = peft.PeftModel.from_pretrained(load(folder), folder.parent / "adapter", adapter_name=name)
    for place in (folder, folder.parent / "adapter"):
        found = check_loaded(model, place)
        assert not codes(found) and not codes(found, "warning"), [f.message for f in found]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if f"lora_B.{name}" in n).add_(0.1)
    assert codes(check_loaded(model, folder.parent / "adapter")) == ["V06"]
    assert not codes(check_loaded(model, folder))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.weight.add_(0.1)
    assert codes(check_loaded(model, folder)) == ["V06"]


def test_an_adapter_that_is_not_on_the_model_is_an_error(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    peft.get_peft_model(load(folder), config).save_pretrained(folder.parent / "adapter")
    assert codes(check_loaded(load(folder), folder.parent / "adapter")) == ["K05"]


@pytest.mark.parametrize("kind", ["nf4", "fp4 twice", "int8"])
def test_a_quantized_model_is_compared_with_floats_and_with_codes(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    write_model(tmp_path / "hf", "Llama", hidden_size=64, intermediate_size=128, initializer_range=0.3)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": "twice" in kind}
    options = {"load_in_8bit": True} if kind == "int8" else four
    settings = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=settings)
    model.save_pretrained(tmp_path / "codes")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "codes")
    for live, place in ((model, "hf"), (loaded, "hf"), (loaded, "codes")):
        found = check_loaded(live, tmp_path / place)
        assert not codes(found) and not codes(found, "warning"), [f.message for f in found]
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.flip(0)  # another tensor of the same codes
    for place in ("hf", "codes"):
        found = [f for f in check_loaded(model, tmp_path / place) if f.severity == "error"]
        assert [(f.code, list(f.tensors)) for f in found] == [("V06", ["model.layers.1.mlp.up_proj.weight"])]


def test_a_quantized_model_that_shares_nothing_with_the_file_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write_model(tmp_path / "hf", "Llama", hidden_size=64, intermediate_size=128)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=settings)
    save_file({f"other.{n}": t for n, t in hf_tensors(tmp_path / "hf").items()}, tmp_path / "x.safetensors")
    assert codes(check_loaded(model, tmp_path / "x.safetensors"))
