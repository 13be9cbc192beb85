"""Merged weights in 4 and 8 bits keep what the adapter taught: codes chosen for what the layers compute."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.formats.view import read
from tensorkeep.language.forward_proof import prove_forward
from tensorkeep.language.start import loaded
from tensorkeep.quantization.block_bytes import GGML_NAMES, ggml_blocks, mxfp4_tensors
from tensorkeep.quantization.grids import Bits, Form, form_of
from tensorkeep.quantization.packed import averaged_blocks
from tensorkeep.quantization.rounding import plainly, rounded
from tensorkeep.quantization.unpacking import unpack
from tests.language_files import EXPERTS, save_model, write_jsonl

WORDS = "a the layer tensor weight scale code row text loss model update keeps loses base merged".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter that PEFT trained for some steps, texts."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("merge")
    save_model(folder / "base", "llama", hidden_size=64, intermediate_size=256, head_dim=16)
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=60)) for _ in range(120)]
    write_jsonl(folder / "texts.jsonl", ({"text": line} for line in lines))
    write_jsonl(folder / "short-texts.jsonl", ({"text": line} for line in lines[:60]))
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
@given(
    st.sampled_from([1, 9]),
    st.sampled_from([1, 33, 100]),
    st.integers(0, 10**6),
    st.sampled_from(["nf4", "fp4"]),
    st.booleans(),
)
def test_it_is_never_worse_than_plain_rounding_and_its_codes_are_bitsandbytes_own(
    rows: int, columns: int, seed: int, kind: Form, flat: bool
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
    assert averaged_blocks(packed) == 0  # readers take a block without a code of 1 or -1 for an altered one
    state = bnb.QuantState(  # one row: 0.50.2's kernel on the CPU takes wrong scales where rows are shorter than blocks
        absmax=packed.tensors["absmax"],
        shape=torch.Size([1, rows * columns]),
        code=packed.tensors["quant_map"],
        blocksize=64,
        quant_type=kind,
        dtype=torch.float32,
    )
    with torch.compiler.set_stance("force_eager"):  # it would compile itself for every shape
        made = bnb.dequantize_4bit(packed.tensors["weight"], state)
    assert torch.equal(made.view(rows, columns), found.weight())


@pytest.mark.parametrize("columns", [96, 512])
@pytest.mark.parametrize("bits", ["int8", "mxfp4", "q4_k"])
def test_every_form_is_what_its_readers_make_of_the_bytes(bits: Bits, columns: int) -> None:
    form = form_of(bits, columns)
    assert form is not None
    draw = torch.Generator().manual_seed(columns)
    weight = torch.randn(6, columns, generator=draw) * torch.logspace(-6, 3, 6)[:, None]
    weight[2], weight[3, :40] = 0, 0
    weight[4] = weight[4].abs() + 1  # no element below zero
    inputs = torch.randn(300, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    moment = inputs.T @ inputs / 300
    for found in (rounded(weight, moment, form), plainly(weight, form)):
        assert found.error <= found.plain and found.weight()[2].abs().max() < 1e-6
        assert float((found.weight() - weight).norm() / weight.norm()) < (0.02 if bits == "int8" else 0.6)
        if bits == "q4_k":
            made = gguf.dequantize(ggml_blocks(found).numpy(), gguf.GGMLQuantizationType[GGML_NAMES[form]])
            assert np.array_equal(made, found.weight().numpy())
        elif bits == "int8":
            packed = found.packed(torch.float32)
            assert torch.equal(bnb.int8_vectorwise_dequant(packed.tensors["weight"], packed.tensors["SCB"]),
                               found.weight())  # fmt: skip
            assert torch.equal(unpack(packed.layout, packed.tensors, torch.float32), found.weight())


def test_mxfp4_is_bitwise_what_compressed_tensors_makes_of_it() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, 64, generator=draw)
    found = rounded(torch.randn(32, 64, generator=draw), inputs.T @ inputs / 300, "mxfp4")
    words = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=words)
    wanted = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").decompress(mxfp4_tensors(found), scheme)
    assert torch.equal(found.weight().to(wanted["weight"].dtype), wanted["weight"])


def test_errors_of_correlated_inputs_are_halved_at_least() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(256, 64, generator=draw) @ torch.randn(64, 256, generator=draw)
    inputs = mixed + 0.1 * torch.randn(256, 256, generator=draw)
    found = rounded(torch.randn(64, 256, generator=draw), inputs.T @ inputs / 256)
    assert found.error < 0.5 * found.plain


@pytest.fixture(scope="module")
def merged(place: Path) -> dict[str, Any]:
    """Merges in every kind of codes, once each, and what the command says of them."""
    made: dict[str, Any] = {}

    def of(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in made:
            out = place / ("out.gguf" if kind == "q4_k" else f"out-{kind}")
            words = ["merge", str(place / "base"), str(place / "adapter"), str(out), "--to-bits", kind]
            words += ["--calibrate", str(place / "short-texts.jsonl"), "--device", "cpu", "--json"]
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert main(words) == 0
            made[kind] = out, json.loads(said.getvalue())
        found: tuple[Path, dict[str, Any]] = made[kind]
        return found

    return {"of": of}


@pytest.mark.parametrize("kind", ["nf4", "int8", "mxfp4", "q4_k"])
def test_a_merge_keeps_more_than_plain_rounding_and_the_tools_find_the_files_sound(
    place: Path, merged: dict[str, Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, said = merged["of"](kind)
    kl = said["rounded"]["kl"]
    assert kl["rounded"] < kl["plain"] < kl["base"] and said["rounded"]["kept"] > 0.9
    assert said["rounded"]["kept"] == pytest.approx(1 - kl["rounded"] / kl["base"])
    assert {row["name"].split(".")[-1] for row in said["rounded"]["layers"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    forms = {"q4_1": 12, "q4_k": 2} if kind == "q4_k" else {kind: 14}
    assert said["rounded"]["forms"] == forms and said["rounded"]["wide"] == []
    for command in ("verify", "diagnose", "inspect"):
        assert main([command, str(out)]) == 0, capsys.readouterr()


def test_transformers_loads_nf4_and_int8_as_bitsandbytes_layers(merged: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    for kind, layer, far in (("nf4", "Linear4bit", 0.02), ("int8", "Linear8bitLt", 0.05)):
        out, said = merged["of"](kind)
        assert said["proof"]["target"] == "transformers" and "quantization_config" in said["proof"]["checked"]
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu")
        assert type(model.model.layers[1].mlp.down_proj).__name__ == layer
        assert load_file(out / "model.safetensors")["lm_head.weight"].is_floating_point()
        want = loaded(read(out)).float()(input_ids=ids).logits.detach()
        # they multiply in bfloat16, and int8 rounds the inputs to eight bits too
        assert float((model(input_ids=ids).logits.detach() - want).norm() / want.norm()) < far


def test_transformers_loads_mxfp4_by_compressed_tensors(merged: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out, _ = merged["of"]("mxfp4")
    how, ids = CompressedTensorsConfig(dequantize=True), torch.arange(3, 40)[None]
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=how)
    want = loaded(read(out)).float()(input_ids=ids).logits.detach()
    assert torch.equal(model(input_ids=ids).logits, want)


def test_the_gguf_packages_reader_finds_the_blocks_where_llama_cpp_has_its_rows(merged: dict[str, Any]) -> None:
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan

    out, _ = merged["of"]("q4_k")
    tensors = {t.name: t for t in gguf.GGUFReader(out).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.1.ffn_down.weight"] == "Q4_K" and kinds["blk.1.attn_q.weight"] == "Q4_1"
    assert kinds["token_embd.weight"] == kinds["output_norm.weight"] == "F32"
    convert(make_plan([read(out)], "hf", dtype="F32"), str(out.parent / "back"), "hf")
    back: Any = loaded(read(out.parent / "back")).float()
    row = gguf.dequantize(tensors["blk.1.ffn_down.weight"].data, gguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(back.model.layers[1].mlp.down_proj.weight.detach().numpy(), row)
    floats: Any = loaded(read(out.parent / "base")).float()
    q = back.model.layers[1].self_attn.q_proj.weight, floats.model.layers[1].self_attn.q_proj.weight
    assert float((q[0] - q[1]).norm() / q[1].norm()) < 0.3  # rows in another order would be further off


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--to-bits", "nf4"], "rounds by texts"),
        (["--to-bits", "nf4", "--calibrate", "short"], "too few"),
        (["--to-bits", "nf4", "--to", "pth", "--calibrate", "texts.jsonl"], "hf folder alone"),
        (["--to-bits", "q4_k", "--to", "dcp", "--calibrate", "texts.jsonl"], "a GGUF file alone"),
        (["--to-bits", "q4_k_m", "--calibrate", "texts.jsonl"], "to-bits"),
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


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose adapter moves every expert, and texts."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder / "base", request.param, hidden_size=64, intermediate_size=64, head_dim=16, **EXPERTS)
    draw = random.Random(0)
    write_jsonl(folder / "t.jsonl", ({"text": " ".join(draw.choices(WORDS, k=200))} for _ in range(18)))
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    torch.manual_seed(0)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    live: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks))
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    live.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("bits", ["nf4", "int8", "mxfp4"])
def test_codes_of_experts_that_transformers_would_not_load_are_refused(
    mixture: Path, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(mixture / "base"), str(mixture / "adapter"), str(mixture / "out"), "--to-bits", bits]
    assert main([*words, "--calibrate", str(mixture / "t.jsonl"), "--device", "cpu"]) == 2
    assert f"no {bits} codes of stacked experts" in capsys.readouterr().err and not (mixture / "out").exists()


def test_llama_cpp_s_stacks_are_the_experts_blocks_one_after_the_other(
    mixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan

    out = mixture / "m.gguf"
    words = ["merge", str(mixture / "base"), str(mixture / "adapter"), str(out), "--to-bits", "q4_k", "--to", "gguf"]
    assert main([*words, "--calibrate", str(mixture / "t.jsonl"), "--device", "cpu", "--json"]) == 0
    kl = json.loads(capsys.readouterr().out)["rounded"]["kl"]
    assert kl["rounded"] < kl["plain"] and kl["rounded"] < 0.2 * kl["base"]
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q4_1" and kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    floats = mixture / "floats"
    assert main([*words[:3], str(floats)]) == 0
    convert(make_plan([read(out)], "hf", dtype="F32"), str(mixture / "back"), "hf")
    for name, record in read(floats).items():
        if len(record.shape) == 2:
            one, other = (torch.from_numpy(read(p).array(name)).float() for p in (floats, mixture / "back"))
            assert float((one - other).norm() / one.norm()) < 0.2, name


# -- texts ------------------------------------------------------------------------------------------------------------


def test_conversations_are_read_in_the_chat_template_and_parquet_as_the_trainer_reads_it(place: Path) -> None:
    from tensorkeep.errors import TensorkeepError
    from tensorkeep.language._as_trained import rows_of
    from tests.language_files import CONVERSATIONS, tokenizer

    said = [{"messages": messages} for messages in CONVERSATIONS]
    write_jsonl(place / "chat.jsonl", said * 60)
    rows = rows_of(str(place / "base"), [str(place / "chat.jsonl")], 8, 2, print)
    text = tokenizer().decode(rows[0])
    assert "<|im_start|>assistant" in text and any(m["content"] in text for m in CONVERSATIONS[1])
    pairs = [{"chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[2]}]
    write_jsonl(place / "pairs.jsonl", pairs)
    with pytest.raises(TensorkeepError, match="preferences are no texts"):
        rows_of(str(place / "base"), [str(place / "pairs.jsonl")], 8, 2, print)
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["a model of rows and text " * 40] * 30}), place / "t.parquet")
    assert len(rows_of(str(place / "base"), [str(place / "t.parquet")], 8, 2, print)) == 8
