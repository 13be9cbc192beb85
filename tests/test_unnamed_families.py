"""Families of transformers that no table here names: converted, adapted and checked by what they say themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import tensorkeep as tk
from tensorkeep.adapters.lora import add_lora
from tensorkeep.cli import main
from tensorkeep.conversion import naming
from tensorkeep.formats.view import read
from tensorkeep.quantization.replacing import heads

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TOKENS = {f"{n}_token_id": i for i, n in enumerate(("pad", "bos", "eos", "cls", "sep"))}


def saved(kind: str, folder: Path, auto: Any = transformers.AutoModelForCausalLM, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **more})
    model = auto.from_config(config).float().eval()
    model.save_pretrained(folder)
    return model


def test_an_untied_head_of_another_name_and_a_classifier_are_whole_without_lm_head(tmp_path: Path) -> None:
    saved("llama", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["head.weight"] = tensors.pop("lm_head.weight")  # as DeepSeek V4 has it
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other/model.safetensors")
    (tmp_path / "other/config.json").write_text((tmp_path / "hf/config.json").read_text())
    assert main(["convert", str(tmp_path / "other"), str(tmp_path / "other.dcp"), "--to", "dcp"]) == 0
    saved("llama", tmp_path / "judge", transformers.AutoModelForSequenceClassification, num_labels=3)
    for to, sink in (("dcp", "middle"), ("hf", "back")):
        source = "judge" if to == "dcp" else "middle"
        assert main(["convert", str(tmp_path / source), str(tmp_path / sink), "--to", to]) == 0
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )[1]
    assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_folder_of_transformers_has_its_names_whatever_they_begin_with(tmp_path: Path) -> None:
    saved("gpt_neox_japanese", tmp_path)
    assert naming.identify(read(tmp_path)).naming == "hf"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["output.weight"] = tensors.pop(
        next(n for n in tensors if n.endswith("final_layer_norm.weight"))
    )  # as GIT has it, and torchtitan
    save_file(tensors, tmp_path / "model.safetensors")
    assert naming.identify(read(tmp_path)).naming == "hf"


def test_a_head_is_what_the_model_says_it_is_and_a_tied_one_is_not_adapted(tmp_path: Path) -> None:
    model = saved("modernbert-decoder", tmp_path, **TOKENS)
    assert heads(model)[-1] == "^decoder$" and "decoder" not in add_lora(model, "all-linear", r=2)


def test_a_model_of_another_kinds_class_is_no_other_config(tmp_path: Path) -> None:
    model = saved("internlm3", tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.to_dict()["model_type"] == "llama"
    assert not [f for f in tk.check_loaded(model, tmp_path) if f.severity != "info"]


def test_an_embedding_trained_whole_parts_all_that_the_config_ties_and_not_the_head_alone(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "base", is_decoder=True, hidden_dropout_prob=0.0, pad_token_id=0)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    assert main(["merge", *(str(tmp_path / n) for n in ("base", "adapter", "out"))]) == 0
    found, gaps = transformers.BertLMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(gaps[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(8)[None]
    wanted = wrapped.merge_and_unload()(input_ids=tokens).logits
    assert (found.eval()(input_ids=tokens).logits - wanted).abs().max() < 1e-5


def test_an_embedding_with_more_rows_than_the_vocabulary_is_no_other_config(tmp_path: Path) -> None:
    config = transformers.MllamaConfig(text_config={**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}).text_config
    transformers.MllamaForCausalLM(config).save_pretrained(tmp_path)  # with eight rows more
    assert [f.code for f in tk.diagnose(str(tmp_path)).findings if f.severity == "error"] == []
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name][:-3]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "S02" in [f.code for f in tk.diagnose(str(tmp_path)).findings]


def test_a_vision_models_bare_norm_or_blocks_are_no_other_programs_names(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    boxes = {"coordinate_size": 4, "shape_size": 8, "input_size": 16, "patch_size": 8, "vocab_size": 64}
    sights: dict[str, Any] = {
        "layoutlmv3": transformers.LayoutLMv3Model(transformers.LayoutLMv3Config(**size, **boxes)),  # `norm.weight`
        "qwen3_5_vision": transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(
                "qwen3_5_vision", **{"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32},
                out_hidden_size=32, patch_size=4, num_position_embeddings=16,
            )
        ),  # `blocks.0.attn.qkv.weight`, a `patch_embed` of films
        "swin": transformers.MaskFormerSwinBackbone(
            transformers.MaskFormerSwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], out_features=["stage2"])
        ),  # `model.` beside `hidden_states_norms.`
    }  # fmt: skip
    for name, model in sights.items():
        model.save_pretrained(tmp_path / name)
        found = naming.identify(read(tmp_path / name))
        assert (found.naming, found.root, found.other) == ("hf", None, {}), name
        assert main(["convert", str(tmp_path / name), str(tmp_path / f"{name}.dcp"), "--to", "dcp"]) == 0
        back = str(tmp_path / f"{name}.back")
        assert main(["convert", str(tmp_path / f"{name}.dcp"), back, "--to", "hf"]) == 0
        assert set(read(Path(back))) == set(read(tmp_path / name))


def merged_as_peft_merges(model: Any, folder: Path, targets: list[str], words: tuple[str, ...] = ()) -> None:
    model.save_pretrained(folder / "base")
    kind = type(model)
    wrapped = get_peft_model(kind.from_pretrained(folder / "base"), LoraConfig(r=2, target_modules=targets))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder / "adapter")
    assert main(["merge", *(str(folder / n) for n in ("base", "adapter", "out")), *words]) == 0
    wanted, found = wrapped.merge_and_unload().state_dict(), kind.from_pretrained(folder / "out").state_dict()
    assert set(wanted) == set(found)
    assert all(torch.allclose(wanted[n], found[n], atol=1e-5) for n in wanted)


def test_how_a_matrix_lies_is_what_its_module_says_and_not_the_layer_that_peft_wrapped_last(tmp_path: Path) -> None:
    config = transformers.DecisionTransformerConfig(hidden_size=32, n_head=4, n_layer=1, n_positions=32)
    model = transformers.DecisionTransformerModel(config)
    # Conv1D (square and not) and linears, in this order and the other
    merged_as_peft_merges(model, tmp_path / "linear_last", ["c_attn", "attn.c_proj", "embed_state", "predict_action.0"])
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=False)
    gpt2 = transformers.GPT2LMHeadModel(config)
    merged_as_peft_merges(gpt2, tmp_path / "head_last", ["attn.c_proj", "lm_head"])


def test_an_embedding_in_the_models_own_model_and_a_tensor_without_weight_are_found(tmp_path: Path) -> None:
    bert = transformers.ModernBertConfig(**SMALL, **TOKENS, tie_word_embeddings=False)
    merged_as_peft_merges(transformers.ModernBertForMaskedLM(bert), tmp_path / "bert", ["tok_embeddings"])


def test_masks_that_a_model_keeps_are_no_codes(tmp_path: Path) -> None:
    part = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "block_size": 16, "input_vocab_size": 64}
    fine = transformers.BarkCoarseConfig(**part, output_vocab_size=64)
    model = transformers.BarkCoarseModel(fine)
    assert any(t.dtype == torch.bool for t in model.state_dict().values())
    model.save_pretrained(tmp_path / "model")
    for to, sink in (("dcp", "middle"), ("hf", "back")):
        source = "model" if to == "dcp" else "middle"
        assert main(["convert", str(tmp_path / source), str(tmp_path / sink), "--to", to]) == 0
    assert set(read(tmp_path / "back")) == set(read(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_booleans_where_a_weight_or_a_bias_belongs_are_no_mask(kind: str, tmp_path: Path) -> None:
    saved("qwen2", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{kind}"
    tensors[name] = tensors[name] > 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert [(f.code, list(f.tensors)) for f in tk.diagnose(str(tmp_path / "model")).findings] == [("Q01", [name])]
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "hf"]) == 2


@pytest.mark.parametrize("value", [1e300, 1e12, 2048.5, float("nan"), [], {}])
def test_positions_that_no_model_has_are_an_error(value: Any, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "max_position_embeddings": value}))
    assert [f.code for f in tk.diagnose(str(tmp_path)).findings if f.severity == "error"] == ["C01"]


def test_what_a_config_ties_beside_the_head_and_numbers_said_otherwise_are_no_fault(tmp_path: Path) -> None:
    luke = transformers.LukeConfig(**SMALL, **TOKENS, entity_vocab_size=16, entity_emb_size=8)
    transformers.LukeForMaskedLM(luke).save_pretrained(tmp_path / "luke")  # ties a bias and the entities' head alone
    part = {k: v for k, v in SMALL.items() if k != "num_hidden_layers"}
    lxmert = transformers.LxmertConfig(**part, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=8)
    transformers.LxmertModel(lxmert).save_pretrained(tmp_path / "lxmert")  # its number of layers is an object
    saved("llama", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(path.read_text().replace('"max_position_embeddings": 2048', '"max_position_embeddings": 2048.0'))
    for name in ("luke", "lxmert", "llama"):
        found = tk.diagnose(str(tmp_path / name)).findings
        assert [f.message for f in found if f.severity == "error"] == [], name


def test_updates_of_a_matrix_without_elements_are_merged(tmp_path: Path) -> None:
    size = {**SMALL, "embedding_size": 32, "intra_bottleneck_size": 16, "pad_token_id": 0}
    model = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**size))
    assert model.cls.predictions.dense.weight.numel() == 0
    merged_as_peft_merges(model, tmp_path, ["cls.predictions.dense", "query"])
