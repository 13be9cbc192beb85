"""Parameters that stack experts: 4 bits an element while loading, products of one expert at a time, LoRA as PEFT's."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import yaml
from benchmarks import families
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tensorkeep.adapters.files import load_adapter, save_adapter
from tensorkeep.adapters.lora import add_lora
from tensorkeep.adapters.stacked import adapted_stacks, in_peft
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.language.checkpoints import checkpoint_of, put_state
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import start_of
from tensorkeep.models.in_its_names import in_its_names
from tensorkeep.models.repair import repair_buffers
from tensorkeep.quantization.linear_layers import stacked_parameters
from tensorkeep.quantization.loading import load_quantizing
from tensorkeep.quantization.modules import check_ranks, model_sizes, quantize_
from tensorkeep.quantization.packed import pack
from tensorkeep.quantization.stacks import Stack, Stacked, quantize_stack, stacks
from tensorkeep.training.distributed import World
from tests.language_files import texts
from tests.test_families import words

IDS = torch.arange(3, 19)[None]
BOTH = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module", autouse=True)
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers is asked is kept in a folder of these tests."""
    patched = pytest.MonkeyPatch()
    patched.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub"))
    yield
    patched.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's model on disk, made once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            families.built(name, made[name])
        return made[name]

    return of


def loaded(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).requires_grad_(False)


def quantized(model: nn.Module) -> nn.Module:
    """A copy with its stacks, and nothing else, in 4 bits."""
    made = copy.deepcopy(model)
    for path, module, name in list(stacked_parameters(made)):
        quantize_stack(module, name, "nf4", True, 64, path)
    return made


def dense_of(model: nn.Module, packed: nn.Module) -> nn.Module:
    """A copy with the floats that the codes of `packed` stand for."""
    made = copy.deepcopy(model)
    for path, stack in stacks(packed):
        owner, _, name = path.rpartition(".")
        made.get_submodule(owner).get_parameter(name).data.copy_(stack.dequantize())
    return made


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_codes_are_bitsandbytes_own_of_each_expert_s_matrix(name: str, folder: Callable[[str], Path]) -> None:
    model = loaded(folder(name))
    made = quantized(model)
    for path, stack in stacks(made):
        owner, _, key = path.rpartition(".")
        floats = model.get_submodule(owner).get_parameter(key)
        assert stack.inward == (name == "gpt_oss")
        for expert in range(stack.experts):
            matrix = floats[expert].T if stack.inward else floats[expert]
            codes, state = bnb.functional.quantize_4bit(
                matrix.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
            )
            assert torch.equal(stack.packed(expert).tensors["weight"], codes)
            theirs = bnb.functional.dequantize_4bit(codes, state)
            ours = stack.dequantize()[expert]
            assert torch.equal(ours.T if stack.inward else ours, theirs.view(matrix.shape))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe", "llama4_text"])
def test_outputs_and_gradients_are_those_of_the_floats_that_the_codes_stand_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.model_of(name).float().eval().requires_grad_(False)
    made = quantized(model)
    dense = dense_of(model, made)
    seen: list[int] = []
    at_once = Stack.dequantize
    monkeypatch.setattr(Stack, "dequantize", lambda self, *a: seen.append(1) or at_once(self, *a))
    found = []
    for one in (dense, made):
        inputs = model.get_input_embeddings()(IDS).clone().requires_grad_(True)
        logits = one(inputs_embeds=inputs, use_cache=False).logits
        found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), inputs)))
    for mine, theirs in zip(found[1], found[0]):
        assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    # one expert at a time, unless the forward multiplies all of them at once: then one layer at a time
    assert bool(seen) == (name == "llama4_text")
    assert {m.takes_whole for m in made.modules() if isinstance(m, Stacked)} == {name == "llama4_text"}


def test_no_float_matrix_of_an_expert_is_kept_for_the_backward() -> None:
    model = families.model_of("qwen3_moe").float().eval().requires_grad_(False)
    kept: list[torch.Size] = []

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            kept.append(tensor.shape)
        return tensor

    made = quantized(model)
    inputs = model.get_input_embeddings()(IDS).clone().requires_grad_(True)
    linears = {tuple(m.weight.shape) for m in made.modules() if isinstance(m, nn.Linear)}
    matrices = {s.sizes for _, s in stacks(made)} - linears - {s[::-1] for s in linears}
    assert matrices
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        made(inputs_embeds=inputs, use_cache=False)
    assert kept and not matrices & {tuple(s) for s in kept} and not any(len(s) == 3 and s[0] == 4 for s in kept)


def test_loading_takes_half_a_byte_a_parameter_and_one_expert_in_floats(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder("qwen3_moe")
    config = loaded(place).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes: list[int] = []
    from tensorkeep.quantization import stacks as module

    monkeypatch.setattr(module, "pack", lambda w, *a: sizes.append(w.numel()) or pack(w, *a))
    done = load_quantizing(model, in_its_names(read(place)), "nf4", repair=repair_buffers, dtype=torch.float32)
    piles = dict(stacks(model))
    assert len(piles) == 6 and set(piles) <= set(done.quantized)
    assert max(sizes) == max(s.shape[1] * s.shape[2] for s in piles.values())
    held = sum(b.numel() * b.element_size() for s in piles.values() for b in s.buffers())
    tables = sum(s.get_buffer("quant_map").nbytes + s.get_buffer("nested_quant_map").nbytes for s in piles.values())
    # 4 bits, a byte for every 64 elements, and for each of these tiny matrices a scale and an offset of its own
    assert held - tables < 0.53 * sum(s.shape.numel() for s in piles.values())
    memory = quantized(loaded(place))
    for path, stack in stacks(memory):
        assert torch.equal(stack.dequantize(), piles[path].dequantize())
    assert model_sizes(model).parameters == sum(p.numel() for p in loaded(place).parameters())
    check_ranks(model)


def test_everything_that_can_be_quantized_is_and_a_pattern_leaves_experts_out() -> None:
    model = families.model_of("qwen3_moe").requires_grad_(False)
    names = quantize_(copy.deepcopy(model), "nf4")
    assert sum(n.endswith(("gate_up_proj", "down_proj")) for n in names) == 6 and len(names) == 18
    assert len(quantize_(model, "nf4", exclude=["experts", "lm_head$"])) == 12
    assert not list(stacks(model))


def test_lora_on_stacks_trains_as_peft_s_over_floats_and_over_codes() -> None:
    model = families.model_of("qwen3_moe").float().eval().requires_grad_(False)
    for base in (model, dense_of(model, quantized(model))):
        mine = copy.deepcopy(model) if base is model else quantized(model)
        add_lora(mine, [], r=2, alpha=4, parameters=BOTH)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=list(BOTH))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
        modules = dict(theirs.named_modules())
        names = in_peft(list(adapted_stacks(mine)))
        pairs = []
        for name, stack in adapted_stacks(mine).items():
            wrapper = modules[f"base_model.model.{names[name]}"]
            for half, rows in (("lora_A", stack.lora_A), ("lora_B", stack.lora_B)):
                assert rows is not None
                with torch.no_grad():
                    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(len(pairs))) * 0.2)
                    getattr(wrapper, half)["default"].weight.copy_(rows)
                pairs.append((rows, getattr(wrapper, half)["default"].weight))
        losses = [m(input_ids=IDS, use_cache=False).logits.square().mean() for m in (mine, theirs)]
        assert torch.allclose(losses[0], losses[1], rtol=1e-5)
        for loss in losses:
            loss.backward()
        for own, other in pairs:
            assert own.grad is not None and own.grad.abs().max() > 0
            assert (own.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max()


def recipe_for(place: Path, work: Path, codes: str | None, updates: int = 2, **adapter: Any) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tok").exists():
        words(work / "tok")
    made = {
        "model": str(place),
        "tokenizer": str(work / "tok"),
        "data": {"files": [str(texts(work / "a.jsonl"))], "length": 24},
        "training": {"updates": updates, "batch_size": 2, "save_every": 2, "quantize_backbone": codes},
        "optimizer": {"lr": 1.0e-2},
        "schedule": {"kind": "constant"},
        "adapter": {"lora_r": 2, "lora_alpha": 8, "target_parameters": list(BOTH), **adapter},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(made))
    return work / "recipe.yaml"


def trained(run: Path) -> Any:
    recipe = read_language(run / "recipe.yaml")
    start = start_of(recipe, run, World())
    put_state(start, recipe, checkpoint_of(run, run, False), ema=False).__enter__()
    return start.model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(
    ("name", "codes", "pairs"),
    [("qwen3_moe", None, 18), ("qwen3_moe", "nf4", 18), ("gpt_oss", "nf4", 18), ("deepseek_v3", None, 28)],
)
def test_a_run_on_experts_exports_for_peft_and_merges_to_what_was_trained(
    name: str, codes: str | None, pairs: int, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base, run = folder(name), tmp_path / "run"
    code, said = families.told("train", "language", recipe_for(base, tmp_path, codes), "--out", run)
    assert code == 0, said
    assert "gate_up_proj," not in said and "experts.down_proj," not in said  # nothing of the experts' matrices is wide
    code, said = families.told("convert", run, tmp_path / "peft", "--to", "peft")
    assert code == 0 and f"loads it: {pairs} low-rank pairs" in said, said
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    stacked = [n for n in told["target_parameters"] if not n.endswith(".weight")]
    assert len(stacked) == (4 if name == "deepseek_v3" else 6) and told["lora_dropout"] == 0
    code, said = families.told("merge", base, run, tmp_path / "merged")
    assert code == 0 and "loads in transformers" in said, said
    wanted, found = logits(trained(run)), logits(loaded(tmp_path / "merged"))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (wanted - logits(loaded(base))).abs().max() > 1e-2 * wanted.abs().max()
    if codes is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(loaded(base), str(tmp_path / "peft")).merge_and_unload()
        ours = loaded(tmp_path / "merged").state_dict()
        assert all((ours[n] - t).abs().max() < 1e-6 for n, t in theirs.state_dict().items())


def test_a_run_on_experts_resumes_exactly(folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = folder("qwen3_moe")
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert families.told("train", "language", recipe_for(base, tmp_path, "nf4"), "--out", run)[0] == 0
    longer = recipe_for(base, tmp_path, "nf4", updates=4)
    code, said = families.told("train", "language", longer, "--out", run, "--allow", "training.updates")
    assert code == 0, said
    assert families.told("train", "language", longer, "--out", whole)[0] == 0
    ours, theirs = (adapted_stacks(trained(r)) for r in (run, whole))
    assert len(ours) == 6
    for name, stack in ours.items():
        for half in ("lora_A", "lora_B"):
            assert torch.equal(getattr(stack, half), getattr(theirs[name], half)), name


def test_an_adapter_on_experts_is_saved_and_loaded_and_bad_asks_are_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    made = []
    for _ in range(2):
        model = loaded(folder("mixtral"))
        add_lora(model, ["q_proj"], r=2, alpha=4, parameters=["experts.down_proj"])
        made.append(model)
    with torch.no_grad():
        for parameter in made[0].parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(made[0], tmp_path / "adapter")
    load_adapter(made[1], tmp_path / "adapter")
    assert torch.equal(logits(made[0].eval()), logits(made[1].eval()))
    with pytest.raises(TensorkeepError, match="fits no parameter that stacks experts"):
        add_lora(loaded(folder("mixtral")), ["q_proj"], parameters=["experts.gate_proj"])
    with pytest.raises(TensorkeepError, match="PEFT has none"):
        add_lora(loaded(folder("mixtral")), ["q_proj"], dropout=0.1, parameters=["experts.down_proj"])
    code, said = families.told(
        "train", "language", recipe_for(folder("mixtral"), tmp_path, None, lora_dropout=0.1), "--out", tmp_path / "run"
    )
    assert code == 2 and "adapter.lora_dropout" in said, said


def test_codes_of_bitsandbytes_for_each_expert_stay_as_they_are_in_the_stack(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    place, base = folder("qwen3_moe"), tmp_path / "base"
    base.mkdir()
    tensors, matrices = {}, {}
    for name, tensor in load_file(place / "model.safetensors").items():
        if ".experts." in name or "_proj.weight" in name:
            codes, state = bnb.functional.quantize_4bit(
                tensor, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            matrices[name] = bnb.functional.dequantize_4bit(codes, state)
            tensors |= {name: codes} | {f"{name}.{k}": t for k, t in state.as_dict(packed=True).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((place / "config.json").read_text()) | {"quantization_config": told}
    (base / "config.json").write_text(json.dumps(config))
    code, said = families.told("train", "language", recipe_for(base, tmp_path, None), "--out", tmp_path / "run")
    assert code == 0 and "48 weights are nf4 codes, which stay as they are" in said and "dequantized" not in said, said
    model = trained(tmp_path / "run")
    found = dict(stacks(model))
    assert len(found) == 6
    for path, stack in found.items():
        owner, _, key = path.rpartition(".")
        for expert in range(stack.experts):
            parts = ("gate_proj", "up_proj") if key == "gate_up_proj" else ("down_proj",)
            names = [f"{owner}.{expert}.{p}.weight" for p in parts]
            assert torch.equal(stack.dequantize()[expert], torch.cat([matrices[n] for n in names]))
            assert torch.equal(stack.packed(expert).tensors["weight"], torch.cat([tensors[n] for n in names]))
    code, said = families.told("merge", base, tmp_path / "run", tmp_path / "merged")
    assert code == 0, said
    wanted, merged = logits(model), logits(loaded(tmp_path / "merged"))
    assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()
