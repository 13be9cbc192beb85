"""Ties of embeddings and heads where one name says more than it seems, merged as PEFT trained them: T5's, GPT-2's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensorkeep.cli import main
from tensorkeep.models.names import model_names
from tests.test_shared_layers import CAUSAL, SEQ2SEQ, T5, adapted, again, logits, saved

GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}


@pytest.mark.parametrize("kind", ["t5", "switch_transformers", "umt5", "longt5"])
def test_a_tie_that_also_says_a_scale_stays_where_head_and_embedding_are_parted(kind: str, tmp_path: Path) -> None:
    more = {"num_experts": 2} if kind.startswith("switch") else {}
    saved(kind, tmp_path / "model", SEQ2SEQ, **T5, **more)
    document = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in ("tie_word_embeddings", "scale_decoder_outputs"):  # as the hub's older ones have it
        document.pop(key, None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(document))
    model = again(SEQ2SEQ, tmp_path / "model")
    wanted = logits(adapted(model, tmp_path / "adapter", target_modules=["q"], modules_to_save=["shared"]))
    assert main(["merge", *(str(tmp_path / n) for n in ("model", "adapter", "out"))]) == 0
    found = logits(again(SEQ2SEQ, tmp_path / "out"))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_model_says_itself_whether_its_tie_is_a_scale_as_well() -> None:
    scaled = {k: model_names({"model_type": k, **T5}).tie_says_more for k in ("t5", "umt5", "longt5", "mt5", "llama")}
    assert scaled == {"t5": True, "umt5": True, "longt5": True, "mt5": False, "llama": False}


TRAINED: dict[str, tuple[dict[str, Any], int]] = {
    "shared whole": ({"modules_to_save": ["shared"]}, 0),
    "both embeddings whole": ({"modules_to_save": ["embed_tokens"]}, 0),
    "rows of shared, which PEFT ties": ({"trainable_token_indices": {"shared": [3, 4]}}, 0),
    "rows of both embeddings": ({"trainable_token_indices": {"embed_tokens": [3, 4]}}, 0),
    "rows of the head, which PEFT does not tie": ({"trainable_token_indices": {"lm_head": [3, 4]}}, 0),
    "rows of shared and others of the head, which PEFT does not tie": (
        {"trainable_token_indices": {"shared": [3, 4], "lm_head": [5, 6]}},
        0,
    ),
    "a tie that PEFT does not know": ({"modules_to_save": ["shared"], "ensure_weight_tying": True}, 0),
    "updates of both embeddings": ({"target_modules": ["embed_tokens"]}, 2),
}


@pytest.mark.parametrize("own", [False, True], ids=["tied", "head of its own"])
@pytest.mark.parametrize("how", TRAINED)
def test_t5s_three_embeddings_and_its_head_are_merged_as_they_were_trained(
    how: str, own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved("t5", tmp_path / "model", SEQ2SEQ, **T5, tie_word_embeddings=not own)
    if own:  # as T5 1.1 and Flan-T5
        model.lm_head.weight = nn.Parameter(torch.randn(64, 32) * 0.1)
        model.save_pretrained(tmp_path / "model")
    given, code = TRAINED[how]
    trained = adapted(again(SEQ2SEQ, tmp_path / "model"), tmp_path / "adapter", **{"target_modules": ["q"], **given})
    wanted = logits(trained)
    words = ["merge", *(str(tmp_path / n) for n in ("model", "adapter", "out"))]
    assert main(words) == code, capsys.readouterr().err
    assert not code or "modules share" in capsys.readouterr().err
    untied = ["--untie", *(() if code else ("--overwrite",))]
    assert not (code or not own) or main([*words, *untied]) == 0
    found = logits(again(SEQ2SEQ, tmp_path / "out"))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("more", [{"modules_to_save": ["wte"]}, {"target_modules": ["c_attn", "wte"]}])
def test_a_tie_that_peft_is_asked_to_keep_and_does_not_know_is_broken_as_it_breaks_it(
    more: dict[str, Any], tmp_path: Path
) -> None:
    saved("gpt2", tmp_path / "model", **GPT2)
    model = again(CAUSAL, tmp_path / "model")
    given = {"target_modules": ["c_attn"], "ensure_weight_tying": True, "fan_in_fan_out": True, **more}
    wanted = logits(adapted(model, tmp_path / "adapter", **given))
    words = ["merge", *(str(tmp_path / n) for n in ("model", "adapter", "out"))]
    if "modules_to_save" not in more:
        assert main(words) == 2  # it was both that were changed before: logits off by a factor of 200
        words.append("--untie")
    assert main(words) == 0
    assert (logits(again(CAUSAL, tmp_path / "out")) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_rows_of_a_tied_embedding_lie_below_an_update_of_the_head(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "model", **GPT2)
    given = {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}
    model = adapted(again(CAUSAL, tmp_path / "model"), tmp_path / "a", trainable_token_indices={"wte": [3, 4]}, **given)
    words = ["merge", *(str(tmp_path / n) for n in ("model", "a", "out"))]
    assert main(words) == 2
    assert main([*words, "--untie"]) == 0
    found, wanted = logits(again(CAUSAL, tmp_path / "out")), logits(model)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()  # the head lacked the rows: off by 0.4


PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
OF_THE_DECODER: dict[str, tuple[dict[str, Any], int]] = {
    "rows of both embeddings": ({"trainable_token_indices": {"embed_tokens": [3, 4]}}, 0),
    "updates": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, 2),
    "an update of the head": ({"target_modules": ["q_proj", "lm_head.out_proj"], "ensure_weight_tying": True}, 2),
    "embeddings whole": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 0),
    "the head whole": ({"modules_to_save": ["lm_head.out_proj"], "ensure_weight_tying": True}, 0),
}


@pytest.mark.parametrize("how", OF_THE_DECODER)
def test_a_head_tied_to_the_decoders_embedding_is_not_tied_by_peft_which_asks_for_the_inputs(
    how: str, tmp_path: Path
) -> None:
    part = {**PART, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    saved("t5gemma", tmp_path / "model", SEQ2SEQ, encoder=dict(part), decoder=dict(part), vocab_size=64)
    given, code = OF_THE_DECODER[how]
    trained = adapted(again(SEQ2SEQ, tmp_path / "model"), tmp_path / "a", **{"target_modules": ["q_proj"], **given})
    wanted = logits(trained)
    words = ["merge", *(str(tmp_path / n) for n in ("model", "a", "out"))]
    assert main(words) == code
    assert not code or main([*words, "--untie"]) == 0
    found = logits(again(SEQ2SEQ, tmp_path / "out"))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()  # it was off by 3 to 99, without a word


@pytest.mark.parametrize("own", [True, False], ids=["its state", "a folder"])
def test_what_nobody_says_of_ties_is_not_guessed(own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("t5", tmp_path / "model", SEQ2SEQ, **T5)
    given: dict[str, Any] = {"trainable_token_indices": {"shared": [3, 4]}} if own else {"modules_to_save": ["shared"]}
    adapted(again(SEQ2SEQ, tmp_path / "model"), tmp_path / "a", target_modules=["q"], **given)
    if own:
        torch.save(again(SEQ2SEQ, tmp_path / "model").state_dict(), tmp_path / "base")
    else:  # as where transformers is not installed
        state = tmp_path / "model" / "config.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "model_type": "nobodys", "architectures": []}))
        (tmp_path / "model").rename(tmp_path / "base")
    assert main(["merge", *(str(tmp_path / n) for n in ("base", "a", "out"))]) == 2  # logits were off by 0.3 to 5
    assert "nothing says what the base's model ties" in capsys.readouterr().err


def test_a_models_own_state_that_calls_its_head_otherwise_than_files_do_is_changed_as_one(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = saved("gpt_neox", tmp_path / "model", **sizes, num_attention_heads=4, tie_word_embeddings=True)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    given = {"target_modules": ["query_key_value"], "trainable_token_indices": {"embed_in": [3, 4]}}
    wanted = logits(adapted(again(CAUSAL, tmp_path / "model"), tmp_path / "a", **given))
    words = ["merge", *(str(tmp_path / n) for n in ("base.pth", "a", "out")), "--config", str(tmp_path / "model")]
    assert main(words) == 0
    assert (logits(again(CAUSAL, tmp_path / "out")) - wanted).abs().max() < 1e-5 * wanted.abs().max()
