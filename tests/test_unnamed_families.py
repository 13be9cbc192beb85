"""Families of transformers that no table here names: converted, adapted and checked by what they say themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
