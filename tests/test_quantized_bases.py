"""Training on bases as people have them: codes of bitsandbytes stay, every other kind is dequantized or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks import families
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.language.checkpoints import checkpoint_of, put_state
from tensorkeep.language.recipe_text import read_language
from tensorkeep.language.start import loaded, start_of
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.modules import quantized_layers
from tensorkeep.training.distributed import World
from tests.language_files import save_model, texts, tokenizer
from tests.quant_kinds import awq, fp8, gptq, int8, mxfp4, pack_quantized
from tests.test_families import words


def torchao(w: torch.Tensor, stem: str = "m") -> Any:
    """int8 as torchao flattens it: one scale a row, beside the codes under names of its own."""
    tensors, values = int8(w, stem)
    names = {"weight": "_weight_qdata", "weight_scale": "_weight_scale"}
    return {f"{stem}.{names[n.removeprefix(f'{stem}.')]}": t for n, t in tensors.items()}, values


KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "packed": (pack_quantized, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "int8": (int8, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "torchao": (torchao, {"quant_method": "torchao"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 32]}),
}


@pytest.fixture(scope="module", autouse=True)
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers is asked is kept in a folder of these tests."""
    patched = pytest.MonkeyPatch()
    patched.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub"))
    yield
    patched.undo()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A base of a kind, and the floats that its codes stand for; made once. Both have the tokenizer."""
    made: dict[str, tuple[Path, Path]] = {}
    root = tmp_path_factory.mktemp("bases")
    plain = save_model(root / "plain", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    texts(root / "a.jsonl")

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            made[kind] = (
                _bitsandbytes(root, plain, kind) if kind in ("nf4", "fp4", "8bit") else _other(root, plain, kind)
            )
        return made[kind]

    return of


def _bitsandbytes(root: Path, plain: Path, kind: str) -> tuple[Path, Path]:
    """A folder as transformers and bitsandbytes save it; nf4 with double quantization."""
    how = BitsAndBytesConfig(load_in_8bit=True)
    if kind != "8bit":
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=kind == "nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map="cpu", dtype=torch.float32)
    model.save_pretrained(root / f"bnb-{kind}")
    tokenizer().save_pretrained(root / f"bnb-{kind}")
    return root / f"bnb-{kind}", plain


def _other(root: Path, plain: Path, kind: str) -> tuple[Path, Path]:
    """The plain model with its projections as codes, and with the floats that these stand for."""
    make, said = KINDS[kind]
    coded, floats = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj.weight" in name:
            parts, floats[name] = make(tensor, name.removesuffix(".weight"))
            coded |= parts
        else:
            coded[name] = floats[name] = tensor
    for folder, tensors in ((root / kind, coded), (root / f"{kind}-floats", floats)):
        shutil.copytree(plain, folder)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (root / kind / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return root / kind, root / f"{kind}-floats"


def recipe_for(folder: Path, work: Path, codes: str | None = None, adapter: bool = True, updates: int = 2) -> Path:
    """A recipe beside the texts."""
    work.mkdir(parents=True, exist_ok=True)
    made = {
        "model": str(folder),
        "tokenizer": str(folder) if (folder / "tokenizer.json").is_file() else str(work / "tok"),
        "data": {"files": [str(texts(work / "a.jsonl"))], "length": 24},
        "training": {"updates": updates, "batch": 2, "save_every": 2, "quantize_backbone": codes},
        "optimizer": {"lr": 5.0e-3},
        "schedule": {"kind": "constant"},
        "adapter": {"lora_r": 2, "lora_alpha": 4} if adapter else None,
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(made))
    return work / "recipe.yaml"


def trained(run: Path) -> Any:
    """The model of a run with its newest checkpoint in it."""
    recipe = read_language(run / "recipe.yaml")
    start = start_of(recipe, run, World())
    put_state(start, recipe, checkpoint_of(run, run, False), ema=False).__enter__()
    return start.model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(3, 19)[None]).logits
    return found


@pytest.mark.parametrize("kind", ["nf4", "fp4", "8bit"])
def test_codes_of_bitsandbytes_stay_bit_for_bit_whatever_the_recipe_asks_for_the_rest(
    kind: str, base: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, _ = base(kind)
    code, said = families.told("train", "language", recipe_for(folder, tmp_path, "nf4"), "--out", tmp_path / "run")
    assert code == 0 and "weights are " in said and "stay as they are" in said, said
    stored, layers = load_file(folder / "model.safetensors"), quantized_layers(trained(tmp_path / "run"))
    assert len(layers) == 14 and {m.kind for m in layers.values()} == {"int8" if kind == "8bit" else kind}
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            if not key.startswith(("lora_", "weight_digest")):
                assert torch.equal(tensor, stored[f"{name}.{key}"]), (name, key)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    near = logits(loaded(read(folder))) - logits(before)
    # bitsandbytes' kernels round the inputs as well: to bfloat16 on the CPU, int8's to 8 bits
    assert near.abs().max() < 5e-2 * logits(before).abs().max()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("codes", [None, "nf4"])
def test_other_codes_train_as_the_floats_that_they_stand_for_or_as_those_quantized_anew(
    kind: str, codes: str | None, base: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, floats = base(kind)
    code, said = families.told("train", "language", recipe_for(folder, tmp_path, codes), "--out", tmp_path / "run")
    assert code == 0 and "14 " in said and "dequantized to float32 one at a time" in said, said
    assert ("then quantized to nf4" in said) == (codes == "nf4")
    assert not (tmp_path / "run" / "base").exists()
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "quantization_config" not in told
    model: Any = trained(tmp_path / "run")
    plain: Any = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.dequantize(), QuantLinear.of(plain.get_submodule(name)).dequantize()), name
        elif isinstance(module, nn.Linear):
            assert torch.equal(module.weight, plain.get_submodule(name).weight), name
    assert len(quantized_layers(model)) == (14 if codes else 0)
    code, said = families.told("merge", folder, tmp_path / "run", tmp_path / "merged")
    assert code == 0, said
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    wanted = logits(model)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_run_goes_on_over_the_base_that_it_began_on_and_over_no_other(
    base: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, floats = base("fp8")
    run = tmp_path / "run"
    assert families.told("train", "language", recipe_for(folder, tmp_path, "nf4"), "--out", run)[0] == 0
    recipe = recipe_for(folder, tmp_path, "nf4", updates=4)
    code, said = families.told("train", "language", recipe, "--out", run, "--allow", "training.updates")
    assert code == 0, said
    whole = recipe_for(folder, tmp_path / "whole", "nf4", updates=4)
    (tmp_path / "whole" / "recipe.yaml").write_text(recipe.read_text())
    assert families.told("train", "language", whole, "--out", tmp_path / "whole" / "run")[0] == 0
    ours, theirs = (dict(trained(r).named_parameters()) for r in (run, tmp_path / "whole" / "run"))
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items() if "lora_" in n)
    other = recipe_for(floats, tmp_path, "nf4", updates=6)
    code, said = families.told(
        "train", "language", other, "--out", run, "--allow", "training.updates", "--allow", "model"
    )
    assert code == 2 and "base.digest" in said, said


def test_stacked_codes_of_mxfp4_train_and_merge(tmp_path: Path) -> None:
    families.built("gpt_oss", tmp_path / "plain")
    coded, floats = {}, {}
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parts, values = mxfp4(tensor.transpose(1, 2).contiguous(), name)
            coded |= parts
            floats[name] = values if values.shape == tensor.shape else values.transpose(1, 2)
        else:
            coded[name] = floats[name] = tensor
    for place, tensors in (("base", coded), ("floats", floats)):
        (tmp_path / place).mkdir()
        shutil.copy(tmp_path / "plain" / "config.json", tmp_path / place)
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / place / "model.safetensors")
    tokenizer().save_pretrained(tmp_path / "tok")
    found = loaded(read(tmp_path / "base"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
    assert all(torch.equal(t, dict(plain.named_parameters())[n]) for n, t in found.named_parameters())


def test_all_weights_train_where_no_adapter_is_asked_for_and_the_export_is_a_float_model(
    base: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, _ = base("nf4")
    recipe = recipe_for(folder, tmp_path, adapter=False)
    code, said = families.told("train", "language", recipe, "--out", tmp_path / "run")
    assert code == 0 and "dequantized to float32 one at a time, because they train" in said, said
    code, said = families.told("convert", tmp_path / "run", tmp_path / "out", "--to", "hf")
    assert code == 0, said
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(found), logits(trained(tmp_path / "run")))


def test_codes_of_an_unknown_layout_and_codes_without_scales_are_refused_with_the_way_out(
    base: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, _ = base("nf4")
    shutil.copytree(folder, tmp_path / "lost")
    tensors = load_file(folder / "model.safetensors")
    left = {n: t for n, t in tensors.items() if "layers.0.mlp.up_proj.weight.absmax" not in n}
    save_file(left, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    code, said = families.told("train", "language", recipe_for(tmp_path / "lost", tmp_path), "--out", tmp_path / "run")
    assert code == 2 and "Q01" in said and "Traceback" not in said, said
    odd = {n: t for n, t in tensors.items() if "up_proj" not in n}
    odd |= {f"{n}_q": torch.zeros(48, 8, dtype=torch.int32) for n in ("model.layers.0.mlp.up_proj.weight",)}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    save_file(odd, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    code, said = families.told("train", "language", recipe_for(tmp_path / "odd", tmp_path), "--out", tmp_path / "run")
    assert code == 2 and "layout of 'hqq'" in said and "save the floats" in said, said
    with pytest.raises(TensorkeepError, match="layout of 'hqq'"):
        loaded(read(tmp_path / "odd"))


def test_conv1d_is_quantized_as_bitsandbytes_does_and_merges_onto_either_form(tmp_path: Path) -> None:
    families.built("gpt2", tmp_path / "plain")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how, device_map="cpu")
    theirs.save_pretrained(tmp_path / "bnb")
    words(tmp_path / "tok")
    stored = load_file(tmp_path / "bnb" / "model.safetensors")
    for name in ("plain", "bnb"):
        work = tmp_path / f"work-{name}"
        work.mkdir()
        shutil.copytree(tmp_path / "tok", work / "tok")
        recipe = recipe_for(tmp_path / name, work, "nf4" if name == "plain" else None)
        code, said = families.told("train", "language", recipe, "--out", work / "run")
        assert code == 0, said
        model = trained(work / "run")
        layers = quantized_layers(model)
        assert len(layers) == 12
        for path, layer in layers.items():
            assert torch.equal(layer.weight, stored[f"{path}.weight"]), path
        code, said = families.told("merge", tmp_path / name, work / "run", work / "merged")
        assert code == 0 and "loads in transformers" in said, said
        found = logits(AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32))
        assert (found - logits(model)).abs().max() < 1e-5 * found.abs().max()
        code, said = families.told("convert", work / "run", work / "peft", "--to", "peft")
        assert code == 0 and "loads it: 12 low-rank pairs" in said, said
