"""Trained through a 4-bit format: the forward is that of the file, bit for bit, and a merge writes just these codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tensorkeep.adapters.aware import aware_layers, make_aware
from tensorkeep.adapters.lora import add_lora, merged
from tensorkeep.cli import main
from tensorkeep.errors import TensorkeepError
from tensorkeep.language.checkpoints import checkpoint_of, put_state
from tensorkeep.language.recipe_text import language_recipe, read_language
from tensorkeep.language.start import start_of
from tensorkeep.quantization.aware import Aware, rounded
from tensorkeep.quantization.modules import quantize_
from tensorkeep.training.distributed import World
from tests.language_files import save_model, texts

Q4_0 = gguf.GGMLQuantizationType.Q4_0
IDS = torch.arange(3, 40)[None]
UPDATES = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 base, the same in doubly quantized nf4 as transformers saves it, and texts."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("aware")
    save_model(folder / "bf16", "llama", hidden_size=64, intermediate_size=128, head_dim=16, attention_bias=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16)
    whole.save_pretrained(folder / "bf16")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    coded: Any = AutoModelForCausalLM.from_pretrained(folder / "bf16", quantization_config=four, device_map="cpu")
    coded.save_pretrained(folder / "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "nf4" / name).write_bytes((folder / "bf16" / name).read_bytes())
    texts(folder / "texts.jsonl", 24)
    return folder


def train(place: Path, name: str, base: str, kind: Aware, *more: str, **training: Any) -> Path:
    """Train a few updates through a format, with an average; rates are high, so that codes change."""
    recipe = {
        "model": str(place / base),
        "data": {"files": [str(place / "texts.jsonl")], "length": 32},
        "optimizer": {"lr": 3e-2},
        "schedule": {"kind": "constant"},
        "adapter": {"lora_r": 4},
        "evaluation": {"files": [str(place / "texts.jsonl")]},
        "training": {"updates": UPDATES, "batch_size": 4, "ema": 0.5, "save_every": 2, **training},
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    words = ["train", "language", str(place / f"{name}.yaml"), "--out", str(place / name), "--device", "cpu"]
    assert main([*words, "--quiet", "--quantize-aware", kind, *more]) == 0
    return place / name


@pytest.fixture(scope="module")
def runs(place: Path) -> Mapping[str, Path]:
    """Runs over a bf16 base, over codes that it is loaded into, over a base of codes, and in the other format."""
    return {
        "floats": train(place, "floats", "bf16", "nf4", "--adapter.targets", "[q_proj, v_proj, down_proj]"),
        "loaded": train(place, "loaded", "bf16", "nf4", precision="bf16", quantize_backbone="nf4"),
        "codes": train(place, "codes", "nf4", "nf4", "--adapter.targets", "[o_proj, up_proj]"),
        "q4_0": train(place, "q4_0", "bf16", "q4_0"),
    }


def trained(run: Path, ema: bool = False) -> tuple[nn.Module, Any]:
    """The model of a run as evaluation has it; the average is on inside the context."""
    recipe = read_language(run / "recipe.yaml")
    start = start_of(recipe, run, World())
    return start.model.eval(), put_state(start, recipe, checkpoint_of(run, run, False), ema)


def equal_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(-12, 3), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_codes_are_those_of_bitsandbytes_and_of_the_gguf_package(
    rows: int, blocks: int, power: int, seed: int, ties: bool, empty: bool
) -> None:
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    if ties:  # the largest magnitude more than once, with either sign
        weight = (weight / weight.abs().max() * 4).round() / 4 * 10.0**power
    if empty:
        weight[0] = 0
    held = rounded(weight, "q4_0")
    theirs = gguf.quantize(weight.numpy(), Q4_0)
    assert held.blocks().numpy().tobytes() == theirs.tobytes()
    assert held.values().numpy().tobytes() == gguf.dequantize(theirs, Q4_0).tobytes()
    weight = weight.repeat(1, 2)  # bitsandbytes' CPU kernel takes other scales where rows are no whole blocks
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    mine = rounded(weight, "nf4")
    assert torch.equal(mine.codes, codes) and torch.equal(mine.scales, state.absmax)
    assert torch.equal(mine.values(), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", ["nf4", "q4_0"])
@pytest.mark.parametrize("coded", [False, True])
def test_a_layer_computes_with_the_rounded_sum_and_gradients_pass_the_rounding(kind: Aware, coded: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8, bias=False))
    if coded:
        quantize_(model.requires_grad_(False), "nf4", exclude=[])
    add_lora(model, ["0", "1"], r=4)
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.1)
    assert make_aware(model, kind) == ["0", "1"]
    x = torch.randn(5, 64, requires_grad=True)
    y, gradient = model(x), torch.randn(5, 8)
    y.backward(gradient)

    factors, weights = [], []
    for layer in model:
        a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        base = layer.dequantize() if coded else layer.weight
        whole = base + layer.scale * b @ a
        factors.append((a, b))
        weights.append(whole + (layer.held_weight() - whole).detach())
    again = x.detach().clone().requires_grad_()
    F.linear(F.linear(again, weights[0], model[0].bias), weights[1]).backward(gradient)
    with torch.no_grad():
        assert equal_bits(y, F.linear(F.linear(x, model[0].held_weight(), model[0].bias), model[1].held_weight()))
        with merged(model):
            assert equal_bits(y, model(x))
    assert again.grad is not None and torch.allclose(x.grad, again.grad, atol=1e-5)  # type: ignore[arg-type]
    for layer, (a, b) in zip(model, factors):
        assert torch.allclose(layer.lora_A.grad, a.grad, atol=1e-4)
        assert torch.allclose(layer.lora_B.grad, b.grad, atol=1e-4)


def test_over_nf4_codes_a_zero_update_leaves_every_value_as_it_is() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(96, 40))
    quantize_(model.requires_grad_(False), "nf4", exclude=[])
    base = model[0].dequantize()
    add_lora(model, ["0"], r=2)
    make_aware(model, "nf4")
    assert equal_bits(model[0].held_weight(), base)  # though its scales are doubly quantized there, and are not here


@pytest.mark.parametrize(("name", "ema"), [("floats", False), ("loaded", False), ("codes", False), ("codes", True)])
def test_transformers_and_bitsandbytes_compute_with_a_merge_what_the_run_computes(
    runs: Mapping[str, Path], name: str, ema: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    words = ["merge", str(runs[name]), str(tmp_path / "out"), "--to-bits", "nf4", "--json", *["--ema"][: int(ema)]]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    for parameter in loaded.parameters():
        if parameter.is_floating_point():  # transformers leaves what lies beside codes in the dtype of the file
            parameter.data = parameter.data.float()
    loaded.train()  # in eval mode bitsandbytes rounds weights to bfloat16 on some CPUs
    model, averaged = trained(runs[name], ema)
    layers = aware_layers(model)
    assert said["equal"] == len(layers) == {"floats": 6, "loaded": 14, "codes": 4}[name]
    assert said["averaged"] is ema and said["quantize_aware"] == "nf4"
    half = name == "loaded"
    with averaged, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for path, layer in layers.items():
            theirs = loaded.get_submodule(path)
            assert layer.lora_B.any()  # there was something to merge
            assert equal_bits(bnb.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state), layer.held_weight())
            x = torch.randn(3, layer.in_features).to(torch.bfloat16 if half else torch.float32)
            assert equal_bits(theirs(x), layer(x))
        if not half:  # under autocast their layers give the dtype that they are given, float32 after a norm
            assert equal_bits(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_gguf_file_holds_the_values_that_the_run_computes_with(
    runs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert main(["merge", str(runs["q4_0"]), str(out), "--to-bits", "q4_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] == 14
    model, _ = trained(runs["q4_0"])
    held = {n: layer.held_weight() for n, layer in aware_layers(model).items()}
    stored = {t.name: t for t in gguf.GGUFReader(out).tensors}
    for layer in range(2):
        for own, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up")):
            tensor = stored[f"blk.{layer}.{theirs}.weight"]
            assert tensor.tensor_type == Q4_0
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert values.tobytes() == held[f"model.layers.{layer}.{own}"].numpy().tobytes()
        query = stored[f"blk.{layer}.attn_q.weight"]  # rows of a head in the order of llama.cpp's RoPE
        values = torch.from_numpy(gguf.dequantize(query.data, query.tensor_type).copy())
        heads = held[f"model.layers.{layer}.self_attn.q_proj"].view(-1, 2, 8, 64)
        assert equal_bits(values, heads.transpose(1, 2).reshape(-1, 64).contiguous())
    assert stored["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16


def test_steps_made_again_from_a_checkpoint_are_equal(runs: Mapping[str, Path]) -> None:
    assert main(["replay", str(runs["loaded"]), "--steps", f"3..{UPDATES}", "--device", "cpu"]) == 0
    assert main(["replay", str(runs["q4_0"]), "--steps", f"3..{UPDATES}", "--device", "cpu"]) == 0


def test_evaluation_has_the_average_rounded(runs: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["floats"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    noted = [row["evaluation"]["loss"] for row in rows if "evaluation" in row][-1]
    words = ["eval", "language", str(run), "--data", str(run.parent / "texts.jsonl"), "--batch", "4", "--json"]
    losses = []
    for more in ([], ["--no-ema"]):
        capsys.readouterr()
        assert main([*words, *more]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    model, averaged = trained(run, ema=True)
    last = {n: layer.held_weight() for n, layer in aware_layers(model).items()}
    with averaged:
        assert any(not torch.equal(last[n], layer.held_weight()) for n, layer in aware_layers(model).items())
    assert losses[0] == pytest.approx(noted, rel=1e-6) != pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"adapter": {"lora_dropout": 0.1}}, "lora_dropout: 0"),
        ({"adapter": {"target_parameters": ["experts"]}}, "target_parameters"),
        ({"adapter": {"quantize_aware": "int8"}}, "q4_0"),
        ({"training": {"compile": True}}, "compile: false"),
        ({"training": {"parallel": "fsdp"}}, "parallel: ddp"),
        ({"training": {"memory": "least"}}, "memory: null"),
        ({"objective": "dpo"}, "reference"),
    ],
)
def test_what_has_no_merged_weight_in_the_format_is_refused(changes: dict[str, Any], text: str) -> None:
    document: dict[str, Any] = {"model": "m", "data": {"files": ["a"]}, **changes}
    document["training"] = {"updates": 1, **changes.get("training", {})}
    document["adapter"] = {"quantize_aware": "nf4", **changes.get("adapter", {})}
    with pytest.raises(TensorkeepError) as raised:
        language_recipe(document)
    assert text in f"{raised.value} {raised.value.hint}"


def test_layers_that_a_file_does_not_hold_in_4_bits_are_refused() -> None:
    model: Any = nn.Sequential()
    model.lm_head, model.narrow = nn.Linear(64, 8), nn.Linear(40, 8)
    add_lora(model, ["lm_head", "narrow"], r=2)
    with pytest.raises(TensorkeepError, match="lm_head stays floats"):
        make_aware(model, "nf4")
    del model.lm_head
    with pytest.raises(TensorkeepError, match="rows of 40"):
        make_aware(model, "q4_0")
    assert make_aware(model, "nf4") == ["narrow"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["@floats", "@out", "--to-bits", "q4_0"], "was trained for nf4"),
        (["@floats", "@out", "--to-bits", "nf4", "--calibrate", "@texts.jsonl"], "was trained for nf4"),
        (["@bf16", "@floats", "@out", "--to-bits", "nf4"], "was trained for nf4"),
        (["@q4_0", "@out", "--to-bits", "q4_0"], "q4_0 is GGUF's"),
        (["@floats", "@out", "--ema"], "--to-bits"),
    ],
)
def test_other_codes_than_those_it_was_trained_for_are_refused(
    place: Path, runs: Mapping[str, Path], words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *(str(place / w[1:]) if w[0] == "@" else w for w in words)]) == 2
    assert text in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_merge_in_floats_says_that_it_is_another_model(
    runs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(runs["floats"]), str(tmp_path / "out")]) == 0
    assert "was trained for nf4: floats are not what it computed with" in capsys.readouterr().err


def test_a_detector_is_not_trained_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "detection", "synthetic_tiny", "--out", str(tmp_path / "run"), "--quantize-aware", "nf4"]
    assert main(words) == 2
    assert "a detector is not trained through a 4-bit format" in capsys.readouterr().err
