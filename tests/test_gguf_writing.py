"""What is written as GGUF is the same model to llama.cpp's own package, to transformers and to our reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.fit import by_table
from tensorkeep.conversion.planning import make_plan
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats._gguf_tokenizer import PRE, WHOLE_WORDS
from tensorkeep.formats.gguf_config import hf_config
from tensorkeep.formats.gguf_vocabulary import vocabulary_of
from tensorkeep.formats.view import read
from tensorkeep.storage.record import BLOCK_TYPES, PASSED_BLOCKS
from tests.gguf_files import write_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
PHI3: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.25, 1.5, 1.75, 2.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    },
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
LOCAL = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "max_position_embeddings": 65536},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen3": {"head_dim": 32},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "tie_word_embeddings": True,
    },
    "phi3": {"sliding_window": None, "pad_token_id": 0, "eos_token_id": 1},
    "phi3 with short texts": {**PHI3, "original_max_position_embeddings": 512, "max_position_embeddings": 1024},
    "phi3 with long texts": {**PHI3, "original_max_position_embeddings": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
IDS = torch.arange(2, 34)[None] * 2 % 96


def model(folder: Path, name: str, **changes: Any) -> torch.Tensor:
    """A tiny model with loud biases and norms in a folder, and its logits."""
    torch.manual_seed(3)
    kind = MODELS[name].get("model_type", name.split()[0])
    settings = {**SIZES, **MODELS[name], **changes}
    settings.pop("model_type", None)
    config = transformers.AutoConfig.for_model(kind, **settings)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.2
            else:
                parameter *= 4
        logits: torch.Tensor = made(IDS).logits
    made.save_pretrained(folder)
    return logits


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        found: torch.Tensor = loaded.eval()(IDS).logits
    return found


def written(source: Path, out: Path, dtype: str | None = None) -> Path:
    convert(make_plan([read(source)], "gguf", dtype=dtype), str(out), "gguf")
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bitwise(name: str, tmp_path: Path) -> None:
    logits = model(tmp_path / "hf", name)
    out = written(tmp_path / "hf", tmp_path / "m.gguf")
    convert(make_plan([read(out)], "hf"), str(tmp_path / "back"), "hf")
    first, again = read(tmp_path / "hf"), read(tmp_path / "back")
    gains = {n for n in first if name.startswith("gemma") and "norm" in n}  # stored as 1 + weight, in float32
    assert set(first) == set(again) and all(first.digest(n) == again.digest(n) for n in set(first) - gains)
    assert all(np.abs(first.array(n) - again.array(n)).max() < 2**-22 for n in gains)
    found = logits_of(tmp_path / "back")
    assert torch.equal(logits, found) or (gains and float((logits - found).norm() / logits.norm()) < 1e-5)
    assert not [note for note in read(out).notes if "no config" in note.message]
    reader = gguf.GGUFReader(out)
    assert {t.name for t in reader.tensors} == set(read(out))


@pytest.mark.parametrize("name", ["llama with biases", "mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_transformers_reads_it_as_the_model(name: str, tmp_path: Path) -> None:
    """Not qwen3, whose heads transformers takes for 128 wide whatever the file says; nor gemma, which it does not read.

    Of gemma2 and gemma3 it takes the queries' scale for 256 whatever the file says, of phi3 the pad token for 32000.
    """
    changes = {"attention_bias": False, "mlp_bias": False} if name.startswith("llama") else {}
    changes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    changes |= {"head_dim": 16} if name == "mistral" else {}
    if name.startswith("gemma"):
        changes |= {"head_dim": 256, "query_pre_attn_scalar": 256}
    if name == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 1e4}
        changes["rope_parameters"] = {"full_attention": changes["rope_parameters"], "sliding_attention": local}
    if name == "phi3":
        changes["vocab_size"] = 32064
    logits = model(tmp_path / "hf", name, **changes)
    written(tmp_path / "hf", tmp_path / "m.gguf")
    found = logits_of(tmp_path, gguf_file="m.gguf")
    assert float((found - logits).norm() / logits.norm()) < 1e-5


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_are_those_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    logits = model(tmp_path / "hf", "qwen3")
    out = written(tmp_path / "hf", tmp_path / "m.gguf", kind)
    stored = {t.name: t for t in gguf.GGUFReader(out).tensors}
    source = read(tmp_path / "hf")
    weight = source.array("model.layers.1.mlp.down_proj.weight")
    found = stored["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == kind and stored["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    assert np.array_equal(found.data, gguf.quantize(weight, found.tensor_type))
    convert(make_plan([read(out)], "hf", dtype="F32"), str(tmp_path / "back"), "hf")
    # half a step of the type, over weights of a normal distribution
    most = {"Q8_0": 0.02, "Q5_1": 0.15, "Q5_0": 0.2, "Q4_1": 0.3, "Q4_0": 0.4}[kind]
    assert 0 < float((logits_of(tmp_path / "back") - logits).norm() / logits.norm()) < most


def test_rows_that_are_no_whole_blocks_are_said(tmp_path: Path) -> None:
    model(tmp_path / "hf", "qwen3", intermediate_size=80)
    plan = make_plan([read(tmp_path / "hf")], "gguf", dtype="Q4_0")
    assert [n.names for n in plan.notes if n.code == "Q06"] == [("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")]
    convert(plan, str(tmp_path / "m.gguf"), "gguf")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("mistral", {"sliding_window": 64}, "a sliding window of 64"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma", {"attention_bias": True}, "attention_bias True"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3_text", {"rope_parameters": LOCAL}, "sliding_attention with RoPE"),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "Llama 3"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"rms_norm_eps": 1.23456789012e-5}, "float32 cannot hold"),
    ],
)
def test_what_the_metadata_cannot_say_is_refused(
    name: str, change: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path / "hf", name, **change)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "m.gguf"), "--to", "gguf"]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "m.gguf").exists()


def test_only_gguf_has_its_types_and_names(tmp_path: Path) -> None:
    model(tmp_path / "hf", "qwen3")
    for options in ({"to": "hf", "dtype": "Q8_0"}, {"to": "gguf", "naming": "hf"}, {"to": "pth", "naming": "gguf"}):
        with pytest.raises(TensorkeepError):
            make_plan([read(tmp_path / "hf")], **options)  # type: ignore[arg-type]


def test_a_missing_tensor_is_refused_before_writing(tmp_path: Path) -> None:
    model(tmp_path / "hf", "qwen3")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TensorkeepError, match="K01"):
        make_plan([read(tmp_path / "hf")], "gguf", ask=by_table)


def test_base_and_adapter_become_one_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model(tmp_path / "base", "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = adapted.eval()(IDS).logits
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "m.gguf"), "--to", "gguf"]
    assert main(command) == 0
    convert(make_plan([read(tmp_path / "m.gguf")], "hf"), str(tmp_path / "back"), "hf")
    assert float((logits_of(tmp_path / "back") - logits).norm() / logits.norm()) < 1e-5
    assert main([*command[:3], str(tmp_path / "q.gguf"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"


# -- blocks that are passed on, and those that are not made -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "F16"])
def test_blocks_that_nothing_changes_stay_as_they_are(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word in ("HIDDEN", "WIDE"):
        monkeypatch.setattr(f"tests.gguf_files.{word}", 256)
    monkeypatch.setattr("tests.gguf_files.HEAD_DIM", 64)
    source = write_model(tmp_path / "a.gguf", kind=kind)
    plan = make_plan([read(source)], "gguf")
    convert(plan, str(tmp_path / "b.gguf"), "gguf")
    first, again = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (source, tmp_path / "b.gguf"))
    assert {n: t.tensor_type for n, t in first.items()} == {n: t.tensor_type for n, t in again.items()}
    assert all(np.array_equal(t.data.view(np.uint8), again[n].data.view(np.uint8)) for n, t in first.items())
    assert not [n for n in plan.notes if n.code == "V02"]


def test_sizes_of_blocks_are_the_gguf_package_s() -> None:
    assert {k: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[k]] for k in PASSED_BLOCKS} == PASSED_BLOCKS


def test_a_merge_keeps_the_blocks_that_it_leaves_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    model(tmp_path / "hf", "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    written(tmp_path / "hf", tmp_path / "q.gguf", "Q8_0")
    words = ["merge", str(tmp_path / "q.gguf"), str(tmp_path / "adapter"), str(tmp_path / "m.gguf"), "--to", "gguf"]
    assert main(words) == 0 and "2 quantized weights that the merge changes are rounded" in capsys.readouterr().err
    first, again = ({t.name: t for t in gguf.GGUFReader(tmp_path / p).tensors} for p in ("q.gguf", "m.gguf"))
    for name, tensor in again.items():
        if "ffn_down" not in name:
            assert tensor.tensor_type == first[name].tensor_type and np.array_equal(tensor.data, first[name].data)
    assert {again[f"blk.{n}.ffn_down.weight"].tensor_type.name for n in range(2)} == {"BF16"}


def test_what_llama_cpp_leaves_out_of_phi3_is_said(tmp_path: Path) -> None:
    model(tmp_path / "hf", "phi3", sliding_window=64)
    plan = make_plan([read(tmp_path / "hf")], "gguf")
    assert [n for n in plan.notes if "see 64 tokens back" in n.message]
    convert(plan, str(tmp_path / "m.gguf"), "gguf")
    assert (read(tmp_path / "m.gguf").config or {})["sliding_window"] == 64


def test_a_file_that_does_not_say_its_window_asks_for_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = model(tmp_path / "hf", "gemma2")
    data = bytearray(written(tmp_path / "hf", tmp_path / "m.gguf").read_bytes())
    data[data.index(b"gemma2.attention.sliding_window") + 7] = ord("A")  # as a file without this key
    (tmp_path / "m.gguf").write_bytes(data)
    words = ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--to", "hf"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "C03" in said and "sliding_window" in said and "--config" in said
    model(tmp_path / "other", "qwen3")
    assert main([*words, "--config", str(tmp_path / "other")]) == 2
    assert "C01" in capsys.readouterr().err
    assert main([*words, "--config", str(tmp_path / "hf")]) == 0
    assert float((logits_of(tmp_path / "back") - logits).norm() / logits.norm()) < 1e-5


def test_a_config_of_the_users_stands_for_what_the_metadata_cannot_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As llama.cpp's converter writes Qwen3-MoE without normalised routing, which its metadata cannot say."""
    model(tmp_path / "hf", "qwen3_moe")
    written(tmp_path / "hf", tmp_path / "m.gguf")
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(document | {"norm_topk_prob": False}))
    wanted = logits_of(tmp_path / "hf")
    words = ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--to", "hf"]
    assert main([*words, "--config", str(tmp_path / "hf")]) == 0
    assert torch.equal(logits_of(tmp_path / "back"), wanted)
    assert "norm_topk_prob false comes back as true" in capsys.readouterr().err
    (tmp_path / "hf" / "config.json").write_text(json.dumps(document | {"model_type": "granite"}))
    assert main([*words, "--overwrite", "--config", str(tmp_path / "hf")]) == 2
    assert "no table for the model type 'granite'" in capsys.readouterr().err
    words[1] = str(tmp_path / "back")  # which has a config.json of its own
    (tmp_path / "hf" / "config.json").write_text(json.dumps(document))
    assert main([*words[:2], str(tmp_path / "on"), *words[3:], "--config", str(tmp_path / "hf")]) == 0
    assert "which says otherwise, is not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("olmo2", "attention.sliding_window", 16, "some layers see a window"),
        ("gemma2", "attention.sliding_window_pattern", 4, "its windows lie in other layers"),
        ("gemma2", "rope.freq_base_swa", 5e5, "a RoPE of their own"),
        ("gemma3_text", "attention.sliding_window_pattern", [True] * 7, "its windows lie in other layers"),
    ],
)
def test_windows_that_llama_cpp_computes_and_the_model_type_has_not_are_refused(
    name: str, key: str, value: Any, says: str, tmp_path: Path
) -> None:
    model(tmp_path / "hf", name)
    metadata = dict(read(written(tmp_path / "hf", tmp_path / "m.gguf")).metadata["gguf"])
    records = read(tmp_path / "m.gguf").records
    architecture = metadata["general.architecture"]
    with pytest.raises(TensorkeepError, match=says):
        hf_config({**metadata, f"{architecture}.{key}": value}, records)


def test_what_gemma3s_metadata_says_of_windows_and_caps_is_in_the_config(tmp_path: Path) -> None:
    model(tmp_path / "hf", "gemma3_text")
    view = read(written(tmp_path / "hf", tmp_path / "m.gguf"))
    more = {"gemma3.rope.freq_base_swa": 2e4, "gemma3.final_logit_softcapping": 30.0}
    more |= {"gemma3.attention.sliding_window_pattern": 6}
    config = hf_config({**view.metadata["gguf"], **more}, view.records)
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == config["rope_local_base_freq"] == 2e4
    assert config["final_logit_softcapping"] == 30.0


def test_metadata_that_no_config_is_made_of_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "m.gguf", extra=lambda writer: writer.add_attention_scale(0.5))
    assert main(["convert", str(source), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert "llama.attention.scale" in capsys.readouterr().err


def test_k_quants_are_refused_with_the_lines_that_make_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(tmp_path / "hf", "qwen3")
    out = tmp_path / "m.gguf"
    assert main(["convert", str(tmp_path / "hf"), str(out), "--to", "gguf", "--dtype", "q4_k_m"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'm-f16.gguf'} --to gguf --dtype fp16" in said and "no quantizer" in said
    assert f"llama-quantize {tmp_path / 'm-f16.gguf'} {out} Q4_K_M" in said and not out.exists()
    with pytest.raises(TensorkeepError, match=r"llama-quantize OUT-f16\.gguf OUT\.gguf Q6_K"):
        make_plan([read(tmp_path / "hf")], "gguf", dtype="Q6_K")


# -- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level(pre: str) -> dict[str, Any]:
    """A tokenizer.json of 256 bytes, a few merges and two special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "Ġ w", "1 2", "1 23"][:5]
    words = [*letters, *("".join(m.split()) for m in merges)]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(words))}
    special = [
        {"id": len(vocabulary) + i, "content": t, "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for i, t in enumerate(("<s>", "</s>"))
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": pre in WHOLE_WORDS}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": PRE[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }


@pytest.mark.parametrize("pre", sorted(set(PRE) - {"default"}))
def test_a_tokenizer_cuts_text_as_before(pre: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    document = byte_level(pre)
    size = len(document["model"]["vocab"]) + 8
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}
    entries = vocabulary_of({"tokenizer.json": document, "tokenizer_config.json": settings}, size)

    def extra(writer: Any) -> None:
        from tensorkeep.formats.gguf_metadata import put_metadata

        put_metadata(writer, entries)

    companions = {c.name: c.data for c in read(write_model(tmp_path / "m.gguf", extra=extra)).companions}
    again = Tokenizer.from_str(companions["tokenizer.json"].decode())
    first = Tokenizer.from_str(json.dumps(document))
    for text in ("hello world", " 1234 héllo\n\n  x", "<s>don't</s>", "", "你好 12"):
        assert again.encode(text).ids == first.encode(text).ids
    assert json.loads(companions["tokenizer_config.json"])["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts text"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
        ({"added_tokens": [{"id": 3, "content": "<s>"}]}, "the id 3"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(TensorkeepError, match=says) as caught:
        vocabulary_of({"tokenizer.json": {**byte_level("gpt-2"), **change}}, 400)
    assert caught.value.code == "C03"


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(TensorkeepError, match="the model 200 rows"):
        vocabulary_of({"tokenizer.json": byte_level("gpt-2")}, 200)


def sentencepiece() -> dict[str, Any]:
    """A tokenizer.json as transformers makes one of SentencePiece's BPE: ▁ for spaces, bytes for the unknown."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    merges = ["h e", "l o", "▁ he", "l lo", "▁he llo"]
    pieces = ["he", "lo", "▁he", "llo", "▁hello", "▁", "h", "e", "l", "o"]
    names = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*around, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    ahead = {"type": "Prepend", "prepend": "▁"}
    spell = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": [{**n, **flags} for n in names],
        "normalizer": {"type": "Sequence", "normalizers": [ahead, spell]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": around,
            "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate([*tokens, *pieces])},
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def test_a_sentencepiece_tokenizer_cuts_text_as_before(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from tensorkeep.formats._gguf_tokenizer import tokenizer_files

    document = sentencepiece()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    entries = vocabulary_of({"tokenizer.json": document, "tokenizer_config.json": settings}, 272)
    files, _ = tokenizer_files(entries | {"general.architecture": "llama"})
    first, again = (Tokenizer.from_str(json.dumps(d)) for d in (document, files["tokenizer.json"]))
    for text in ("hello", " hello llo", "hé", ""):
        assert again.encode(text).ids == first.encode(text).ids
    assert entries["tokenizer.ggml.add_bos_token"] is True and entries["tokenizer.ggml.model"] == "llama"


def test_merges_that_no_scores_can_say_are_refused() -> None:
    document = sentencepiece()
    document["model"]["merges"] = document["model"]["merges"][:-1]
    with pytest.raises(TensorkeepError, match="scores"):
        vocabulary_of({"tokenizer.json": document}, 272)


def test_what_is_rounded_or_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(tmp_path / "hf", "qwen3")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "q.gguf"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    assert "C03 no tokenizer lies beside the model" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "q.gguf"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert "Q8_0 weights, and the F32 ones beside them, are rounded to bfloat16" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "q.gguf"), str(tmp_path / "all"), "--to", "hf", "--dtype", "fp32"]) == 0
    assert "V02" not in capsys.readouterr().err


def test_a_size_of_shards_for_one_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(tmp_path / "hf", "qwen3")
    for to, name in (("hf", "m.safetensors"), ("gguf", "m.gguf"), ("pth", "m.pth")):
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / name), "--to", to, "--shard-size", "40kB"]) == 2
        assert "it has no shards" in capsys.readouterr().err and not (tmp_path / name).exists()


def test_a_root_that_a_format_has_no_place_for_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(tmp_path / "hf", "qwen3")
    for to in ("hf", "gguf"):
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", to, "--root", "model"]) == 2
        assert "leave --root out" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_config_with_other_heads_than_the_file_was_written_with_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path / "hf", "llama")
    written(tmp_path / "hf", tmp_path / "m.gguf")
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    words = ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--to", "hf", "--config", str(tmp_path / "c")]
    (tmp_path / "c").mkdir()
    heads = {k: 2 * document[k] for k in ("num_attention_heads", "num_key_value_heads")}
    yarn = {"rope_type": "longrope", "rope_theta": 1e4}  # which the metadata cannot say
    for more in ({}, {"rope_parameters": yarn}):
        other = {**document, **heads, "head_dim": document["head_dim"] // 2, **more}
        (tmp_path / "c" / "config.json").write_text(json.dumps(other))
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "C01" in said and f"num_attention_heads {heads['num_attention_heads']} for" in said


@pytest.mark.parametrize(
    "more", [{"rms_norm_eps": 1e-3}, {"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e6}}]
)
def test_a_config_with_another_number_than_the_metadata_says_is_refused(
    more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path / "hf", "llama")
    written(tmp_path / "hf", tmp_path / "m.gguf")
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    words = ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--to", "hf", "--config"]
    assert main([*words, str(tmp_path / "hf")]) == 0
    if "rope_theta" in more:
        document.pop("rope_parameters", None)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps({**document, **more}))
    words[2] = str(tmp_path / "other")
    assert main([*words, str(tmp_path / "c")]) == 2
    said = capsys.readouterr().err
    assert "C01" in said and "llama.cpp computes with" in said and not (tmp_path / "other").exists()


def test_an_adapter_is_no_gguf_model_and_what_makes_one_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"base_model.model.model.norm.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "a.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a.gguf"), "--to", "gguf"]) == 2
    said = capsys.readouterr().err
    assert "merge BASE ADAPTER OUT --to gguf" in said and "convert_lora_to_gguf.py" in said


def test_a_window_that_only_the_users_config_says_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(tmp_path / "hf", "llama")
    written(tmp_path / "hf", tmp_path / "m.gguf")
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
    (tmp_path / "config.json").write_text(json.dumps(document | mistral))
    words = ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--to", "hf", "--config", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "C01" in said and "a sliding window of 4 in a context" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "None for factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "None for factor"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ],
)
def test_a_config_that_leaves_numbers_out_or_asks_for_too_many_is_one_line(
    change: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path / "hf", "llama")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "m.gguf"), "--to", "gguf"]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
