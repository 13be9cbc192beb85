"""MiniMind's files of every generation, prefix and nesting go to hf, back and to PEFT; nothing is silently assumed.

`data/minimind` was written by MiniMind's own code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tensorkeep.conversion.naming import identify, minimind
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read
from tests.helpers import EMBEDDING, HEAD, assert_same, held, interleaved, model_tensors, refused, to, with_config

DATA = Path(__file__).parent / "data" / "minimind"
MM3 = {
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
MM2A = {"dim": 8, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5, "rope_theta": 1e6, "max_seq_len": 64}


def weights(generation: str, **sizes: Any) -> dict[str, torch.Tensor]:
    """A tiny model of a generation under its own names, head and embedding over one storage."""
    tensors = model_tensors(**sizes, norms=generation == "mm3", head=False)
    if generation == "mm2" and sizes.get("experts"):
        for name in [n for n in tensors if ".experts.0." in n]:
            tensors[name.replace(".experts.0.", ".shared_experts.0.")] = tensors[name] + 1
    if generation != "mm2a":
        return tensors | {HEAD: tensors[EMBEDDING]}
    own = {}
    for name, tensor in tensors.items():
        link = next(x for x in (minimind_name(name),) if x)
        turned = ".q_proj." in name or ".k_proj." in name
        own[link] = interleaved(tensor, 4) if turned else tensor
    return own | {"output.weight": own["tok_embeddings.weight"]}


def minimind_name(name: str) -> str:
    words = {
        "self_attn": "attention",
        "mlp": "feed_forward",
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
    }
    return ".".join(words.get(p, p) for p in name.removeprefix("model.").split("."))


def save(folder: Path, name: str, state: Any, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / name


def lora(module: str, rank: int = 2, rows: int = 8, columns: int = 8) -> dict[str, torch.Tensor]:
    return {f"{module}.lora.A.weight": torch.randn(rank, columns), f"{module}.lora.B.weight": torch.randn(rows, rank)}


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_file_goes_to_hf_and_back(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    state = {n: t.to(dtype) for n, t in weights("mm3").items()}
    state[HEAD] = state[EMBEDDING]
    file = save(tmp_path, "full_sft_8.pth", {prefix + n: t for n, t in state.items()}, MM3)
    assert identify(read(file)).naming == "minimind"
    plan, _ = to(file, tmp_path / "hf", "hf")
    assert (plan.config or {})["model_type"] == "qwen3" and plan.notes == []
    assert_same(held(tmp_path / "hf"), {n: t for n, t in state.items() if n != HEAD})
    to(file, tmp_path / "same", "pth", naming="minimind")
    to(tmp_path / "hf", tmp_path / "back", "pth", naming="minimind")
    for made in (tmp_path / "same" / "full_sft_8.pth", tmp_path / "back" / "pretrain_8.pth"):
        back = torch.load(made, weights_only=True)
        assert_same(back, state)
        assert back[HEAD].untyped_storage().data_ptr() == back[EMBEDDING].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("generation", "experts", "kind"),
    [
        ("mm3", 0, "qwen3"),
        ("mm3", 3, "qwen3_moe"),
        ("mm2", 0, "llama"),
        ("mm2", 3, "minimind"),
        ("mm2a", 0, "llama"),
    ],
)
def test_generations_are_told_apart(tmp_path: Path, generation: str, experts: int, kind: str) -> None:
    state = weights(generation, experts=experts)
    moe = "_moe" if experts else ""
    file = save(tmp_path, f"pretrain_8{moe}.pth", state, MM2A if generation == "mm2a" else MM3)
    plan, _ = to(file, tmp_path / "hf", "hf")
    assert plan.config is not None and (plan.config["model_type"], plan.config["minimind_generation"]) == (
        kind,
        generation,
    )
    assert ("K07" in [n.code for n in plan.notes]) == (kind == "minimind")
    reference = model_tensors(norms=generation == "mm3", head=False, experts=experts)
    made = held(tmp_path / "hf")
    assert_same({n: made[n] for n in reference}, reference)
    to(tmp_path / "hf", tmp_path / "back", "pth", naming="minimind")
    assert_same(torch.load(tmp_path / "back" / f"pretrain_8{moe}.pth", weights_only=True), state)


def test_a_resume_file_gives_its_model(tmp_path: Path) -> None:
    state = weights("mm3")
    resume = {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "epoch": 1,
        "step": 20,
        "world_size": 2,
        "wandb_id": None,
        "critic_model": {k: t + 1 for k, t in state.items()},
        "scaler": {},
    }
    plan, _ = to(save(tmp_path, "ppo_actor_8_resume.pth", resume, MM3), tmp_path / "hf", "hf")
    assert_same(held(tmp_path / "hf"), {n: t for n, t in state.items() if n != HEAD})
    assert {s.reason for s in plan.dropped if s.parts[0].name != f"model.{HEAD}"} == {
        "optimizer state",
        "critic of PPO",
    }


def test_what_no_file_says_is_said(tmp_path: Path) -> None:
    plan = make_plan([read(save(tmp_path / "a", "pretrain_8.pth", weights("mm2", heads=8, dim=1, kv=2)))], "hf")
    said = next(n.message for n in plan.notes if n.code == "C03")
    assert all(
        f"{word}=" in said for word in ("num_attention_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    )
    plan = make_plan([read(save(tmp_path / "b", "pretrain_8.pth", weights("mm3"), MM3))], "hf")
    assert plan.notes == [] and (plan.config or {})["rope_parameters"]["rope_type"] == "default"
    yarn = make_plan(
        [read(save(tmp_path / "c", "pretrain_8.pth", weights("mm3"), MM3 | {"inference_rope_scaling": True}))], "hf"
    )
    assert (yarn.config or {})["rope_parameters"]["factor"] == 16


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, "pretrain_8.pth", weights("mm2"))
    with refused("C01", "whole heads"):
        make_plan([with_config(file, MM3 | {"num_attention_heads": 3})], "hf")
    with refused("C01", "num_attention_heads"):
        make_plan([with_config(file, MM3 | {"num_attention_heads": "two"})], "hf")
    plan = make_plan([with_config(file, MM3 | {"num_hidden_layers": 4})], "hf")
    assert [n.code for n in plan.notes] == ["C01"] and (plan.config or {})["num_hidden_layers"] == 2
    broken = {n: t for n, t in weights("mm2").items() if ".q_proj." not in n}
    with refused("K01", "q_proj"):
        make_plan([read(save(tmp_path / "b", "pretrain_8.pth", broken))], "hf")


def test_a_head_that_differs_is_kept(tmp_path: Path) -> None:
    state = weights("mm3") | {HEAD: torch.zeros(10, 8)}
    plan, _ = to(save(tmp_path, "pretrain_8.pth", state, MM3), tmp_path / "hf", "hf")
    assert [n.code for n in plan.notes] == ["T01"]
    assert_same(held(tmp_path / "hf"), state)


def test_a_file_of_another_name_is_not_taken_for_minimind(tmp_path: Path) -> None:
    state = weights("mm2")
    for name in ("pretrain_16.pth", "model.pth"):
        assert identify(read(save(tmp_path, name, state))).naming == "hf"


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_lora_file_goes_to_peft_and_back(tmp_path: Path, prefix: str) -> None:
    state = {n: t for i in range(2) for p in "qo" for n, t in lora(f"model.layers.{i}.self_attn.{p}_proj").items()}
    file = save(tmp_path, "lora_x_8.pth", {prefix + n: t for n, t in state.items()})
    to(file, tmp_path / "peft", "peft")
    wanted = {
        f"base_model.model.{n.replace('.lora.A.', '.lora_A.').replace('.lora.B.', '.lora_B.')}": t
        for n, t in state.items()
    }
    assert_same(held(tmp_path / "peft"), wanted)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["o_proj", "q_proj"])
    assert (config["peft_type"], config["task_type"], config["base_model_name_or_path"]) == ("LORA", "CAUSAL_LM", None)
    to(tmp_path / "peft", tmp_path / "back", "pth", naming="minimind")
    assert_same(torch.load(tmp_path / "back" / "pretrain_8.pth", weights_only=True), state)
    to(tmp_path / "peft", tmp_path / "again", "peft")
    assert_same(held(tmp_path / "again"), wanted)


def test_an_adapter_of_early_2025_turns_the_rows_of_b(tmp_path: Path) -> None:
    state = lora("layers.0.attention.wq") | lora("layers.0.attention.wo") | lora("layers.0.feed_forward.w1")
    file = save(tmp_path, "lora_x_8.pth", state)
    with refused("C03", "wq"):
        to(file, tmp_path / "out", "peft")
    to(with_config(file, MM2A), tmp_path / "peft", "peft")
    made = held(tmp_path / "peft")
    at = "base_model.model.model.layers.0"
    assert torch.equal(
        interleaved(made[f"{at}.self_attn.q_proj.lora_B.weight"], 4), state["layers.0.attention.wq.lora.B.weight"]
    )
    assert torch.equal(made[f"{at}.self_attn.q_proj.lora_A.weight"], state["layers.0.attention.wq.lora.A.weight"])
    assert torch.equal(made[f"{at}.self_attn.o_proj.lora_B.weight"], state["layers.0.attention.wo.lora.B.weight"])
    assert f"{at}.mlp.gate_proj.lora_A.weight" in made


def test_keys_and_values_have_adapters_where_they_are_square(tmp_path: Path) -> None:
    state = {n: t for p in ("wq", "wk", "wv", "wo") for n, t in lora(f"layers.0.attention.{p}").items()}
    file = save(tmp_path, "lora_x_8.pth", state)
    to(with_config(file, MM2A | {"n_kv_heads": 2}), tmp_path / "peft", "peft")
    made = held(tmp_path / "peft")
    for own, proj in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj")):
        theirs = made[f"base_model.model.model.layers.0.self_attn.{proj}.lora_B.weight"]
        turned = theirs if own == "wv" else interleaved(theirs, 4)
        assert torch.equal(turned, state[f"layers.0.attention.{own}.lora.B.weight"])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_minimind_goes_straight_to_torchtitan(tmp_path: Path) -> None:
    file = save(tmp_path, "pretrain_8.pth", weights("mm3"), MM3)
    to(file, tmp_path / "dcp", "dcp", naming="torchtitan")
    made = held(tmp_path / "dcp")
    assert torch.equal(made["lm_head.weight"], made["tok_embeddings.weight"])
    assert torch.equal(
        made["layers.0.attention.qkv_linear.wq.weight"], weights("mm3")["model.layers.0.self_attn.q_proj.weight"]
    )
    with refused("K07", ".experts."):
        config = MM3 | {"n_shared_experts": 1}
        to(
            save(tmp_path, "pretrain_8_moe.pth", weights("mm2", experts=2), config),
            tmp_path / "out",
            "dcp",
            naming="torchtitan",
        )


def test_model_and_adapter_in_one_file_are_not_mixed(tmp_path: Path) -> None:
    model, adapter = weights("mm3"), lora("model.layers.0.self_attn.q_proj") | lora("model.layers.1.self_attn.q_proj")
    file = save(tmp_path, "lora_x_8.pth", model | adapter, MM3)
    plan, _ = to(file, tmp_path / "hf", "hf")
    assert_same(held(tmp_path / "hf"), {n: t for n, t in model.items() if n != HEAD})
    assert {s.parts[0].name for s in plan.dropped if "--to peft" in s.reason} == set(adapter)
    assert [n.code for n in plan.notes] == ["K02"]
    plan, _ = to(file, tmp_path / "peft", "peft")
    assert len(held(tmp_path / "peft")) == 4
    assert {s.parts[0].name for s in plan.dropped} == set(model) and {s.reason for s in plan.dropped} == {
        "the model, not the adapter"
    }


def test_an_adapter_is_no_model_and_a_model_no_adapter(tmp_path: Path) -> None:
    with refused("K08", "adapter", "--to peft"):
        to(save(tmp_path, "lora_x_8.pth", lora("model.layers.0.self_attn.q_proj")), tmp_path / "out", "hf")
    with refused("K05", "adapter"):
        to(save(tmp_path, "pretrain_8.pth", weights("mm3"), MM3), tmp_path / "out", "peft")


def test_an_adapter_folder_keeps_its_trained_modules(tmp_path: Path) -> None:
    to(save(tmp_path, "lora_x_8.pth", lora("model.layers.0.self_attn.q_proj")), tmp_path / "peft", "peft")
    whole = held(tmp_path / "peft") | {"base_model.model.lm_head.weight": torch.randn(10, 8)}
    save_file(whole, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "tensorkeep.json").unlink()
    to(tmp_path / "peft", tmp_path / "again", "peft")
    assert_same(held(tmp_path / "again"), whole)
    to(tmp_path / "peft", tmp_path / "dcp", "dcp")
    assert_same({f"base_model.model.{n}": t for n, t in held(tmp_path / "dcp").items()}, whole)


def test_modules_that_are_merely_called_lora_stay_in_the_model(tmp_path: Path) -> None:
    names = (
        "model.layers.0.attn.w_lora.lora.0.weight",
        "model.layers.0.attn.w_lora.lora.2.weight",
        "model.layers.0.x.lora.A.weight",
    )
    state = weights("mm3") | {n: torch.randn(2, 2) for n in names}
    to(save(tmp_path, "model.pth", state), tmp_path / "hf", "hf")
    assert set(names) <= set(held(tmp_path / "hf"))


def test_ranks_layers_and_scales_that_differ_are_kept_or_refused(tmp_path: Path) -> None:
    one, three = "model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj"
    to(save(tmp_path, "lora_x_8.pth", lora(one) | lora(three, rank=3)), tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == [one, three] and config["rank_pattern"] == config["alpha_pattern"] == {three: 3}
    with refused("A02", "scale"):
        to(tmp_path / "peft", tmp_path / "back", "pth", naming="minimind")
    broken = lora(one) | {f"{one}.lora.B.weight": torch.randn(8, 5)}
    with refused("A02", one):
        to(save(tmp_path, "lora_y_8.pth", broken), tmp_path / "out", "peft")


# -- names of files ---------------------------------------------------------------------------------------------------


def test_file_names() -> None:
    assert minimind.stage_of("out/full_sft_512_moe.pth") == "full_sft"
    assert minimind.stage_of("a/lora_x_768_resume.pth") == "lora_x" and minimind.stage_of("somewhere") == "pretrain"
    assert (
        minimind.file_name({"hidden_size": 640}, ["model.layers.0.mlp.experts.0.up_proj.weight"], "dpo")
        == "dpo_640_moe.pth"
    )


def test_a_hostile_file_is_refused_by_name(tmp_path: Path) -> None:
    with refused("F04", "posix.getcwd", "nothing was run"):
        read(DATA / "bad" / "pickle_call.pth")
    data = (DATA / "mm3_dense" / "out" / "pretrain_64.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with refused("F02", "cut.pth"):
        read(tmp_path / "cut.pth")


def test_a_source_is_never_written_to(tmp_path: Path) -> None:
    shutil.copytree(DATA / "mm3_dense", tmp_path / "in")
    before = {p: p.read_bytes() for p in (tmp_path / "in").rglob("*") if p.is_file()}
    to(tmp_path / "in" / "out" / "pretrain_64.pth", tmp_path / "hf", "hf")
    assert {p: p.read_bytes() for p in (tmp_path / "in").rglob("*") if p.is_file()} == before
