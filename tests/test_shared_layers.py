"""What transformers does with weights beyond names: layers that share them, stacks taken whole, ties that say more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.conversion.plan import HfTensor, Part, RowPermutation
from tensorkeep.conversion.rows import Run, taken
from tensorkeep.conversion.streams import pieces
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.language.losses import forward
from tensorkeep.language.start import loaded
from tensorkeep.models.language_model import model_of
from tensorkeep.models.meta_model import positions
from tensorkeep.quantization._load_plan import meta_buffers, repair_all
from tensorkeep.quantization.stacks import Stack, quantize_stack

CAUSAL = transformers.AutoModelForCausalLM
SEQ2SEQ = transformers.AutoModelForSeq2SeqLM
IDS = torch.arange(3, 19)[None]
ZAMBA: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 2, "pad_token_id": 0},
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
}
T5: dict[str, Any] = {
    **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0},
    "decoder_start_token_id": 0,
}
INKLING2: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "n_shared_experts": 1},
}


def saved(kind: str, folder: Path, auto: Any = CAUSAL, **sizes: Any) -> Any:
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.for_model(kind, **sizes)).float().eval()
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :7]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False, **more).logits
    return found


def again(kind: Any, folder: Path) -> Any:
    model, told = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def adapted(model: Any, folder: Path, **config: Any) -> Any:
    """An adapter of PEFT's own with loud values, saved; the wrapped model."""
    wrapped = get_peft_model(model, LoraConfig(r=2, **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    wrapped.eval().save_pretrained(folder)
    return wrapped


# -- layers that share their weights ----------------------------------------------------------------------------------


def test_weights_that_layers_share_are_stored_once_and_stand_for_each_other(tmp_path: Path) -> None:
    model = saved("zamba", tmp_path / "model", **ZAMBA)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    assert len(read(tmp_path / "saved.pth")) > len(read(tmp_path / "model"))
    assert {d.status for d in tk.compare(read(tmp_path / "model"), read(tmp_path / "saved.pth"))} == {"equal"}
    assert tk.diagnose(str(tmp_path / "saved.pth"), reference=str(tmp_path / "model")).exit_code == 0
    words = [str(tmp_path / n) for n in ("saved.pth", "back")]
    assert main(["convert", *words, "--to", "hf", "--config", str(tmp_path / "model")]) == 0
    assert set(read(tmp_path / "back")) == set(read(tmp_path / "model"))
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    assert set(model.state_dict()) == set(read(tmp_path / "dcp"))


def test_updates_of_weights_that_layers_share_are_refused_or_parted_as_they_were_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("zamba", tmp_path / "model", **ZAMBA)
    model = again(CAUSAL, tmp_path / "model")
    wrapped = adapted(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "up_proj"])
    wanted = logits(wrapped)
    words = ["merge", *(str(tmp_path / n) for n in ("model", "adapter", "out"))]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "T01" in said and "modules share" in said and "--untie" in said
    assert main([*words, "--untie"]) == 0
    found = again(CAUSAL, tmp_path / "out")
    assert (logits(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert (logits(wrapped.merge_and_unload()) - wanted).abs().max() > 1e-4 * wanted.abs().max()  # PEFT adds both


def test_a_head_tied_to_the_decoders_embedding_is_not_compared_with_the_encoders(tmp_path: Path) -> None:
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    part |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "layer_types": ["full_attention"]}
    model = saved("t5gemma", tmp_path / "model", SEQ2SEQ, encoder=part, decoder=part, vocab_size=64)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    found = tk.diagnose(str(tmp_path / "saved.pth"), reference=str(tmp_path / "model"))
    assert found.exit_code == 0, [f.message for f in found.findings]


def test_an_encoder_decoder_is_refused_for_training_by_its_name(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    sizes |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    saved("bart", tmp_path, SEQ2SEQ, **sizes)
    assert tk.diagnose(str(tmp_path)).exit_code == 0  # its bias of the logits is [1, 64] zeros
    with pytest.raises(TensorkeepError, match="BartForConditionalGeneration has an encoder"):
        loaded(read(tmp_path))


# -- stacks -----------------------------------------------------------------------------------------------------------


def test_rows_are_reordered_inside_each_matrix_of_a_stack(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stack = torch.arange(3 * 8 * 5, dtype=torch.float32).view(3, 8, 5)
    save_file({"w": stack}, tmp_path / "model.safetensors")
    view = read(tmp_path)
    turn = RowPermutation(8, 8, "pairs")
    whole = Part(0, "w").permuted(turn)
    wanted = stack[:, turn.order()].numpy()
    assert b"".join(bytes(p) for p in pieces(whole, view)) == wanted.tobytes()
    tensor = HfTensor("w", "F32", (3, 8, 5), (whole,))
    one = taken(Run("w", (8, 16)), tensor, [view])
    assert b"".join(bytes(p) for part in one for p in pieces(part, view)) == np.ascontiguousarray(wanted[1]).tobytes()
    with pytest.raises(TensorkeepError, match="across their edges"):
        taken(Run("w", (4, 12)), tensor, [view])


def test_experts_whose_gates_are_interleaved_in_files_are_the_live_ones(tmp_path: Path) -> None:
    model = saved("inkling2_text", tmp_path / "model", **INKLING2)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    assert main(["diff", str(tmp_path / "model"), str(tmp_path / "saved.pth")]) == 0
    assert not [f for f in tk.check_loaded(model, tmp_path / "model") if f.severity != "info"]


class SharedExperts(nn.Module):
    """As Inkling's: the stack itself is turned, and no expert is taken alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 32, 64) * 0.1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.bmm(hidden_states.expand(2, -1, -1), self.up_proj.transpose(1, 2)).sum(0)


def test_a_stack_that_a_forward_turns_whole_is_given_as_a_tensor() -> None:
    torch.manual_seed(0)
    module = SharedExperts()
    x = torch.randn(3, 64, requires_grad=True)
    stack = quantize_stack(module, "up_proj", "nf4", False, 64, "up_proj")
    assert isinstance(module.up_proj, Stack)
    wanted = torch.bmm(x.expand(2, -1, -1), stack.dequantize().transpose(1, 2)).sum(0)
    for found in (module(x), module(hidden_states=x)):
        assert torch.allclose(found, wanted, atol=1e-6) and found.grad_fn is not None
    assert not hasattr(stack, "nothing_of_a_tensor") and not hasattr(stack, "transpose")


# -- weights and buffers that a model changes or computes itself ------------------------------------------------------


def test_rwkv_leaves_the_weights_alone_that_it_would_divide_when_it_evaluates(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 8, "intermediate_size": 64, "context_length": 32}
    model = saved("rwkv", tmp_path, **sizes)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = model.train()(input_ids=IDS, use_cache=False).logits
    logits(model)
    assert not all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # transformers itself
    kept = model_of(read(tmp_path))[0]
    assert torch.equal(logits(kept), trained)
    assert all(torch.equal(t, before[n]) for n, t in kept.state_dict().items())


def test_a_buffer_of_zeros_counts_as_recomputed() -> None:
    module = nn.Module()
    for name in ("ids", "table"):
        module.register_buffer(name, torch.empty(4, dtype=torch.int64, device="meta"), persistent=False)
    right = {"ids": torch.zeros(4, dtype=torch.int64), "table": torch.arange(4)}

    def repair(model: nn.Module) -> list[str]:
        wrong = [n for n, value in right.items() if not torch.equal(model.get_buffer(n), value)]
        for name in wrong:
            model._buffers[name] = right[name]
        return wrong

    repair_all(module, meta_buffers(module), repair, None)
    assert all(torch.equal(module.get_buffer(n), value) for n, value in right.items())
    module.register_buffer("lost", torch.empty(2, dtype=torch.int64, device="meta"), persistent=False)
    with pytest.raises(TensorkeepError, match="lost is in no file"):
        repair_all(module, meta_buffers(module), repair, None)


def test_peft_opens_what_is_exported_for_layers_that_share(tmp_path: Path) -> None:
    saved("zamba", tmp_path / "model", **ZAMBA)
    wrapped = adapted(again(CAUSAL, tmp_path / "model"), tmp_path / "adapter", target_modules=["q_proj"])
    assert main(["convert", *(str(tmp_path / n) for n in ("adapter", "copy")), "--to", "peft"]) == 0
    found = PeftModel.from_pretrained(again(CAUSAL, tmp_path / "model"), str(tmp_path / "copy"))
    assert torch.equal(logits(found), logits(wrapped))


class OwnHead(nn.Module):
    """A model that asks for more than tokens when it trains, as Molmo 2 does."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        raise ValueError("`mm_token_type_ids` is required")


def test_a_model_that_asks_for_more_than_text_is_refused_in_one_line() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    with pytest.raises(TensorkeepError, match="OwnHead does not take rows of text alone: ValueError"):
        forward(OwnHead(), batch)


def test_a_tied_head_of_another_name_is_no_weight_of_its_own_where_an_adapter_was_trained_on_four_bits(
    tmp_path: Path,
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    saved("biogpt", tmp_path / "model", **sizes, intermediate_size=64)
    adapted(again(CAUSAL, tmp_path / "model"), tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    quantization = {"kind": "nf4", "block": 64, "double": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": quantization}))
    assert main(["merge", *(str(tmp_path / n) for n in ("model", "adapter", "out"))]) == 0
    first, found = (read(tmp_path / n) for n in ("model", "out"))
    assert first.digest("biogpt.embed_tokens.weight") == found.digest("biogpt.embed_tokens.weight")


def test_positions_of_a_tower_that_sees_are_not_those_of_the_text() -> None:
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower = {**sight, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "projection_dim": 32}
    text = {**sight, "model_type": "llama", "vocab_size": 64}
    ids = {"image_token_index": 60, "video_token_index": 61}
    config = transformers.AutoConfig.for_model("video_llava", text_config=text, vision_config=tower, **ids)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    assert any(n.endswith("position_embedding") for n, _ in model.named_modules()) and positions(model) is None


def test_positions_that_transformers_leaves_out_of_files_are_not_missed(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    sizes |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
    model = saved("marian", tmp_path / "model", SEQ2SEQ, **sizes, decoder_start_token_id=0, max_position_embeddings=32)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    assert "model.encoder.embed_positions.weight" not in read(tmp_path / "model")
    assert main(["diff", str(tmp_path / "model"), str(tmp_path / "saved.pth")]) == 0
    found = tk.check_loaded(model, tmp_path / "model")
    assert [f.code for f in found] == ["K01"] and {f.severity for f in found} == {"info"}


@pytest.mark.parametrize("value", [0.0, float("nan"), 0.5])
def test_positions_that_are_not_what_the_model_computes_are_neither_equal_nor_healthy(
    value: float, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    sizes |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
    model = saved("marian", tmp_path / "model", SEQ2SEQ, **sizes, decoder_start_token_id=0, max_position_embeddings=32)
    name = "model.encoder.embed_positions.weight"
    with torch.no_grad():
        model.get_parameter(name).fill_(value)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    words = [str(tmp_path / n) for n in ("model", "saved.pth")]
    assert main(["diff", *words]) == 1
    assert tk.diagnose(words[1], reference=words[0]).exit_code == 1
    found = {f.code: (f.severity, list(f.tensors)) for f in tk.check_loaded(model, words[0])}
    assert found["B01"] == ("error", [name]) and found["K01"][0] == "info"
    assert main(["convert", words[1], str(tmp_path / "copy"), "--to", "hf", "--config", words[0]]) == 0
    assert main(["diff", words[0], str(tmp_path / "copy")]) == 1  # transformers takes them from the file


def test_a_tensor_that_is_left_out_of_files_and_drawn_is_missed(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = saved("llama", tmp_path, **sizes, num_attention_heads=4, tie_word_embeddings=False)
    path = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({n: t for n, t in load_file(path).items() if n != "lm_head.weight"}, path, metadata={"format": "pt"})
    model._keys_to_ignore_on_save = {"lm_head.weight"}  # as code of older models has it, for its tie
    assert [(f.code, f.severity) for f in tk.check_loaded(model, tmp_path)] == [("K01", "error")]


def test_layers_whose_tie_is_broken_are_told_without_a_reference(tmp_path: Path) -> None:
    model = saved("zamba", tmp_path / "model", **ZAMBA)
    assert tk.diagnose(str(tmp_path / "model")).findings == []
    name = "model.layers.3.shared_transf.self_attn.q_proj"
    model.get_submodule(name).weight = nn.Parameter(model.get_submodule(name).weight.detach() + 1)
    model.save_pretrained(tmp_path / "parted")
    found = [(f.code, f.severity, list(f.tensors)) for f in tk.diagnose(str(tmp_path / "parted")).findings]
    assert len(found) == 1 and found[0][:2] == ("T01", "warning") and len(found[0][2]) == 1


def test_a_reward_head_of_zeros_was_never_written_and_one_type_of_token_may_be_zeros(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 1}
    kind = transformers.AutoModelForSequenceClassification
    model = saved("llama", tmp_path / "reward", kind, **sizes, num_attention_heads=4, pad_token_id=0)
    first = tk.diagnose(str(tmp_path / "reward"))
    print(first.findings)
    assert "V05" not in {f.code for f in first.findings}
    nn.init.zeros_(model.score.weight)
    model.save_pretrained(tmp_path / "dead")
    found = [(f.code, list(f.tensors)) for f in tk.diagnose(str(tmp_path / "dead")).findings]
    assert ("V05", ["score.weight"]) in found
    kind = transformers.AutoModelForMaskedLM
    model = saved("roberta", tmp_path / "roberta", kind, **sizes, num_attention_heads=4, type_vocab_size=1)
    nn.init.zeros_(model.roberta.embeddings.token_type_embeddings.weight)  # as RoBERTa's own conversion does
    model.save_pretrained(tmp_path / "roberta")
    assert "V05" not in {f.code for f in tk.diagnose(str(tmp_path / "roberta")).findings}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_reward_model_of_a_known_family_misses_no_head(kind: str, tmp_path: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    saved(kind, tmp_path, auto, **sizes)
    found = tk.diagnose(str(tmp_path))
    assert found.exit_code == 0, found.findings
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != "score.weight"}, path, metadata={"format": "pt"})
    assert [(f.code, list(f.tensors)) for f in tk.diagnose(str(tmp_path)).findings] == [("K01", ["score.weight"])]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_without_head_is_whole_and_its_state_is_not_torchtitans(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = saved(kind, tmp_path / "model", transformers.AutoModel, **sizes, num_attention_heads=4)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    assert tk.diagnose(str(tmp_path / "model")).exit_code == 0
    assert main(["diff", str(tmp_path / "model"), str(tmp_path / "saved.pth")]) == 0
    assert tk.diagnose(str(tmp_path / "saved.pth"), reference=str(tmp_path / "model")).exit_code == 0
