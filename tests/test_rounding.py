"""Merged weights in 4 bits keep what the adapter taught: codes chosen for what the layers compute."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.formats.view import read
from tensorkeep.language.forward_proof import prove_forward
from tensorkeep.quantization.rounding import FourBits, rounded
from tensorkeep.quantization.unpacking import unpack
from tests.language_files import save_model, write_jsonl

WORDS = "a the layer tensor weight scale code row text loss model update keeps loses base merged".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter that PEFT trained for some steps, texts."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("merge")
    save_model(folder / "base", "llama", hidden_size=64, intermediate_size=96, head_dim=16)
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=60)) for _ in range(120)]
    write_jsonl(folder / "texts.jsonl", ({"text": line} for line in lines))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    torch.manual_seed(0)
    live: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], 2e-3)
    ids = torch.tensor(tokenizer(" ".join(lines))["input_ids"])
    for step in range(12):
        rows = ids[step * 512 : (step + 1) * 512].view(4, 128)
        live(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live.save_pretrained(folder / "adapter")
    return folder


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 100), st.integers(0, 10**6), st.sampled_from(["nf4", "fp4"]), st.booleans())
def test_it_is_never_worse_than_plain_rounding_and_its_codes_are_bitsandbytes_own(
    rows: int, columns: int, seed: int, kind: FourBits, flat: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    inputs = torch.randn(columns if flat else 2, columns, generator=draw) @ torch.randn(
        columns, columns, generator=draw
    )
    found = rounded(weight, inputs.T @ inputs / len(inputs), kind)
    assert found.error <= found.plain
    packed = found.packed(torch.float32)
    assert torch.equal(unpack(packed.layout, packed.tensors, torch.float32), found.weight())
    state = bnb.QuantState(
        absmax=packed.tensors["absmax"],
        shape=torch.Size([rows, columns]),
        code=packed.tensors["quant_map"],
        blocksize=64,
        quant_type=kind,
        dtype=torch.float32,
    )
    assert torch.equal(bnb.dequantize_4bit(packed.tensors["weight"], state), found.weight())


def test_errors_of_correlated_inputs_are_halved_at_least() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(256, 64, generator=draw) @ torch.randn(64, 256, generator=draw)
    inputs = mixed + 0.1 * torch.randn(256, 256, generator=draw)
    found = rounded(torch.randn(64, 256, generator=draw), inputs.T @ inputs / 256)
    assert found.error < 0.5 * found.plain


def test_a_merge_in_4_bits_keeps_more_than_plain_rounding_and_transformers_loads_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out, texts = place / "out", place / "texts.jsonl"
    words = ["merge", str(place / "base"), str(place / "adapter"), str(out), "--to-bits", "nf4"]
    assert main([*words, "--calibrate", str(texts), "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    kl = said["rounded"]["kl"]
    assert kl["rounded"] < kl["plain"] < kl["base"]
    assert said["rounded"]["kept"] == pytest.approx(1 - kl["rounded"] / kl["base"])
    assert {row["name"].split(".")[-1] for row in said["rounded"]["layers"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert said["proof"]["target"] == "transformers" and "quantization_config" in said["proof"]["checked"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu")
    layer = loaded.model.layers[1].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_state.absmax.dtype == torch.float32
    assert load_file(out / "model.safetensors")["lm_head.weight"].is_floating_point()
    ids = torch.arange(3, 40)[None]
    assert torch.isfinite(loaded(input_ids=ids).logits).all()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--to-bits", "nf4"], "needs texts"),
        (["--to-bits", "nf4", "--calibrate", "short"], "too few"),
        (["--to-bits", "nf4", "--to", "pth", "--calibrate", "texts.jsonl"], "hf folder alone"),
        (["--to-bits", "q4_k", "--calibrate", "texts.jsonl"], "to-bits"),
    ],
)
def test_what_cannot_be_rounded_is_refused_and_nothing_is_left(
    place: Path, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(place / "short.jsonl", [{"text": "a word"}])
    given = [str(place / "short.jsonl") if w == "short" else str(place / w) if w == "texts.jsonl" else w for w in words]
    before = sorted(path.name for path in place.iterdir())
    assert main(["merge", str(place / "base"), str(place / "adapter"), str(place / "none"), *given]) == 2
    assert text in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_merge_computes_what_peft_computes_with_the_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", str(place / "base"), str(place / "adapter"), str(place / "floats")]
    assert main([*words, "--prove-forward", str(place / "texts.jsonl"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "forward: 2 layers compute what PEFT computes with the adapter" in said
    checks = prove_forward(
        str(place / "floats"), read(place / "base"), None, str(place / "adapter"), [str(place / "texts.jsonl")], "cpu"
    )
    assert [check.name for check in checks] == ["model.layers.0", "model.layers.1", "logits"]
    assert all(check.equal and check.told for check in checks)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_a_merger_packed_otherwise_are_found_and_the_layer_is_named(tmp_path: Path, kind: str) -> None:
    """The failure of programs that put up_proj where gate_proj belongs: every shape fits, and no key is missing."""
    import peft
    from transformers import AutoModelForCausalLM

    more: dict[str, Any] = {
        "num_local_experts": 4,
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "num_experts_per_tok": 2,
    }
    save_model(tmp_path / "base", kind, tie_word_embeddings=False, decoder_sparse_step=1, mlp_only_layers=[], **more)
    draw = random.Random(0)
    write_jsonl(tmp_path / "texts.jsonl", ({"text": " ".join(draw.choices(WORDS, k=200))} for _ in range(20)))
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    live: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    live.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    given = (read(tmp_path / "base"), None, str(tmp_path / "adapter"), [str(tmp_path / "texts.jsonl")], "cpu")
    assert all(check.equal for check in prove_forward(str(tmp_path / "out"), *given))
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    experts = [n for n in tensors if "layers.1." in n and ".experts.2." in n]
    (gate,) = [n for n in experts if n.endswith(("w1.weight", "gate_proj.weight"))]
    up = gate.replace("w1", "w3").replace("gate_proj", "up_proj")
    save_file(tensors | {gate: tensors[up], up: tensors[gate]}, file, {"format": "pt"})
    (tmp_path / "out" / "tensorkeep.json").unlink()
    checks = prove_forward(str(tmp_path / "out"), *given)
    assert [check.name for check in checks if not check.equal] == ["model.layers.1", "logits"]


def test_a_runs_adapter_is_run_by_peft_from_its_own_files_and_no_hub_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorkeep.language.job import build, loop_of
    from tensorkeep.language.recipe_text import language_recipe
    from tensorkeep.training.loop import fit

    save_model(tmp_path / "base", "llama")
    draw = random.Random(0)
    write_jsonl(tmp_path / "t.jsonl", ({"text": " ".join(draw.choices(WORDS, k=200))} for _ in range(20)))
    recipe = language_recipe(
        {
            "version": 2,
            "model": str(tmp_path / "base"),
            "data": {"files": str(tmp_path / "t.jsonl"), "length": 64},
            "adapter": {"lora_r": 4, "targets": ["*_proj"]},
            "optimizer": {"lr": 1e-2},
            "training": {"updates": 2, "batch_size": 2, "quantize_backbone": "nf4"},
        }
    )
    job = build(recipe, tmp_path / "run")
    fit(job, tmp_path / "run", loop_of(recipe, len(job.data)))
    words = ["merge", str(tmp_path / "run"), str(tmp_path / "out"), "--prove-forward", str(tmp_path / "t.jsonl")]
    assert main([*words, "--device", "cpu"]) == 0
    assert "layers compute what PEFT computes" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "o"), "--calibrate", str(tmp_path / "t.jsonl")]) == 2
    assert "is for --to-bits" in capsys.readouterr().err
