"""torchtitan's further models: names that its own models gave go to hf, as transformers asks for them, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tensorkeep.cli import main
from tensorkeep.commands.programs import loads
from tensorkeep.conversion.naming import identify
from tensorkeep.diagnosis.comparison import compare
from tests.helpers import assert_same, held, interleaved, refused, to, with_config
from tests.tools import ROOT

NAMES: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "torchtitan_names.json").read_text())
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
QWEN_TEXT = {
    "model_type": "qwen3_5_text",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
}
QWEN_SEES = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 4,
    "intermediate_size": 32,
    "out_hidden_size": 16,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 64,
    "spatial_merge_size": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3 with a further layer": DEEPSEEK | {"num_nextn_predict_layers": 1},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 360,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_local_experts": 8,
        "tie_word_embeddings": False,
    },
    "kimi": {
        "model_type": "kimi_k25",
        "text_config": DEEPSEEK | {"model_type": "kimi_k2"},
        "vision_config": {"patch_size": 14, "num_attention_heads": 4, "hidden_size": 16},
        "tie_word_embeddings": False,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_SEES,
        "tie_word_embeddings": False,
    },
    "qwen3_5 with experts": {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": QWEN_TEXT
        | {
            "model_type": "qwen3_5_moe_text",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "vision_config": QWEN_SEES,
        "tie_word_embeddings": False,
    },
    "muse_glimmer": {
        "model_type": "muse_glimmer",
        "architectures": ["MuseGlimmerForConditionalGeneration"],
        "text_config": {
            "model_type": "muse_glimmer_text",
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "patch_size": 14,
            "pos_emb_height": 2,
            "pos_emb_width": 2,
        },
        "out_hidden_size": 128,
        "projector_hidden_size": 64,
        "tie_word_embeddings": False,
    },
}
UNASKED = ("deepseek_v3 with a further layer",)  # transformers' class leaves that layer out
BIAS = "moe.expert_bias_E"


def written(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """A torchtitan checkpoint of random values under its model's names, without the experts' load where hf has none."""
    generator = torch.Generator().manual_seed(1)
    made = {n: torch.randn(s, generator=generator) for n, s in NAMES[name].items()}
    if "deepseek" not in name and name != "kimi":
        made = {n: t for n, t in made.items() if not n.endswith(BIAS)}
    dcp.save(made, checkpoint_id=str(folder), no_dist=True)
    return made


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("titan")
    made = written(request.param, folder / "dcp")
    view = with_config(folder / "dcp", CONFIGS[request.param])
    to(view, folder / "hf", "hf", ask=None if request.param in UNASKED else loads)
    return request.param, folder, made


def test_names_go_to_hf_and_back(case: tuple[str, Path, dict[str, Any]], tmp_path: Path) -> None:
    name, folder, made = case
    assert identify(with_config(folder / "dcp", CONFIGS[name])).naming == "torchtitan"
    back = with_config(folder / "hf", CONFIGS[name])
    assert identify(back).naming == "hf"
    plan, _ = to(back, tmp_path / "back", "dcp", naming="torchtitan")
    assert plan.dropped == []
    assert_same(held(tmp_path / "back"), made)
    assert {d.status for d in compare(with_config(folder / "dcp", CONFIGS[name]), back)} == {"equal"}


def test_what_is_fused_split_turned_and_permuted(case: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, own = case
    hub = held(folder / "hf")
    inner = "moe.routed_experts.inner_experts."
    if name.startswith("deepseek") or name == "kimi":
        at = "language_model.model.layers.1." if name == "kimi" else "model.layers.1."
        assert torch.equal(hub[f"{at}mlp.experts.3.down_proj.weight"], own[f"layers.1.{inner}w2_EDF"][3])
        assert torch.equal(hub[f"{at}mlp.gate.e_score_correction_bias"], own[f"layers.1.{BIAS}"])
    if "further" in name:
        assert torch.equal(hub["model.layers.2.enorm.weight"], own["mtp_layers.0.enorm.weight"])
        assert torch.equal(hub["model.layers.2.mlp.experts.0.up_proj.weight"], own[f"mtp_layers.0.{inner}w3_EFD"][0])
    if name == "kimi":
        wanted = torch.cat([own[f"vision_encoder.layers.0.attn.w{w}.weight"] for w in "qkv"])
        assert torch.equal(hub["vision_tower.encoder.blocks.0.wqkv.weight"], wanted)
        assert hub["vision_tower.patch_embed.proj.weight"].shape == (16, 3, 14, 14)
    if name == "gpt_oss":  # transformers keeps these as [experts, inputs, outputs]
        turned = own[f"layers.0.{inner}mlp1_weight_EGD"].transpose(1, 2)
        assert torch.equal(hub["model.layers.0.mlp.experts.gate_up_proj"], turned)
    if name.startswith("qwen3_5"):
        at = "model.language_model.layers.0.linear_attn."
        for fused, parts in (("in_proj_qkv", "in_proj_"), ("conv1d", "conv_")):
            wanted = torch.cat([own[f"layers.0.attn.{parts}{w}.weight"] for w in "qkv"])
            assert torch.equal(hub[f"{at}{fused}.weight"], wanted)
        assert hub["model.visual.patch_embed.proj.weight"].shape == (16, 3, 2, 4, 4)
    if name == "qwen3_5 with experts":
        wanted = torch.cat([own[f"layers.0.{inner}w{w}_EFD"] for w in "13"], 1)
        assert torch.equal(hub["model.language_model.layers.0.mlp.experts.gate_up_proj"], wanted)
    if name == "muse_glimmer":
        at = "model.language_model.layers.0.self_attn."
        assert torch.equal(own["layers.0.attention.qkv_linear.wk.weight"], interleaved(hub[f"{at}k_proj.weight"], 32))
        assert torch.equal(
            own["vision_encoder.layers.0.attn.wq.bias"],
            interleaved(hub["model.vision_tower.layers.0.attn.q_proj.bias"], 8),
        )


def test_diagnose_finds_the_whole_model_under_its_names(tmp_path: Path, capsys: Any) -> None:
    for name in ("qwen3_5 with experts", "gpt_oss", "muse_glimmer"):
        written(name, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIGS[name]))
        assert main(["diagnose", str(tmp_path / name), "--for", "torchtitan"]) == 0, capsys.readouterr().out


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    written("qwen3_5", tmp_path / "dcp")
    to(with_config(tmp_path / "dcp", CONFIGS["qwen3_5"]), tmp_path / "hf", "hf", ask=None)
    text = {k: v for k, v in QWEN_TEXT.items() if k != "linear_num_value_heads"}
    with refused("C03", "linear_num_value_heads", "--config"):
        odd = CONFIGS["qwen3_5"] | {"text_config": text}
        to(with_config(tmp_path / "hf", odd), tmp_path / "out", "dcp", naming="torchtitan")
    with refused("C01", "linear_attn", "another model"):
        odd = CONFIGS["qwen3_5"] | {"text_config": QWEN_TEXT | {"linear_num_value_heads": 3}}
        to(with_config(tmp_path / "hf", odd), tmp_path / "out", "dcp", naming="torchtitan")
    with refused("C01", "patch_embed"):
        odd = CONFIGS["qwen3_5"] | {"vision_config": QWEN_SEES | {"patch_size": 2}}
        to(with_config(tmp_path / "dcp", odd), tmp_path / "out", "hf", ask=None)


def test_a_missing_piece_and_the_experts_load_are_said(tmp_path: Path) -> None:
    made = written("qwen3_5", tmp_path / "dcp")
    del made["layers.1.attn.in_proj_k.weight"]
    dcp.save(made, checkpoint_id=str(tmp_path / "less"), no_dist=True)
    with refused("K01", "in_proj_qkv", "3 tensors, and 2 are there"):
        to(with_config(tmp_path / "less", CONFIGS["qwen3_5"]), tmp_path / "out", "hf")
    names = {n: torch.zeros(s) for n, s in NAMES["gpt_oss"].items()}
    dcp.save(names, checkpoint_id=str(tmp_path / "gpt"), no_dist=True)
    with refused("K02", BIAS, "--drop"):
        to(with_config(tmp_path / "gpt", CONFIGS["gpt_oss"]), tmp_path / "out", "hf", ask=loads)


def test_the_older_naming_has_no_table_of_them(tmp_path: Path) -> None:
    written("gpt_oss", tmp_path / "dcp")
    to(with_config(tmp_path / "dcp", CONFIGS["gpt_oss"]), tmp_path / "hf", "hf")
    with refused(None, "torchtitan 0.2", "gpt_oss", "--naming torchtitan"):
        to(with_config(tmp_path / "hf", CONFIGS["gpt_oss"]), tmp_path / "out", "dcp", naming="torchtitan-0.2")


def test_an_hf_folder_that_its_adapter_would_misread_is_refused(tmp_path: Path, capsys: Any) -> None:
    for name in ("gpt_oss", "qwen3_5 with experts", "deepseek_v3"):
        written(name, tmp_path / name / "dcp")
        to(with_config(tmp_path / name / "dcp", CONFIGS[name]), tmp_path / name / "hf", "hf")
        (tmp_path / name / "hf" / "config.json").write_text(json.dumps(CONFIGS[name]))
        words = ["convert", str(tmp_path / name / "hf"), str(tmp_path / name / "out"), "--for", "torchtitan", "--to"]
        assert main([*words, "hf"]) == (0 if name == "deepseek_v3" else 2), name
        said = capsys.readouterr()
        assert ("adapter" in said.err) == (name != "deepseek_v3")
        assert main([*words, "dcp", "--overwrite"]) == 0 and "not known here" in capsys.readouterr().out


@pytest.mark.skipif("TENSORKEEP_TORCHTITAN" not in os.environ, reason="torchtitan is installed apart")
def test_its_own_models_and_adapters_agree(tmp_path: Path) -> None:
    """Its adapters differ from its models in two places: gpt_oss's experts, and qwen3_5's stacked ones."""
    program = [sys.executable, str(ROOT / "tests" / "torchtitan_models_program.py")]
    place = {"PYTHONPATH": os.environ["TENSORKEEP_TORCHTITAN"]}

    def run(word: str) -> list[dict[str, Any]]:
        words = [*program, word, str(tmp_path)]
        done = subprocess.run(words, env=os.environ | place, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    for made in run("save"):
        folder, config = tmp_path / made["name"], made["config"]
        drop = ["**moe.expert_bias_E"] if made["name"] in ("gpt_oss", "qwen3_5_moe") else []
        to(with_config(folder / "dcp", config), folder / "hf", "hf", ask=None, drop=drop)
        ours, theirs = held(folder / "hf"), held(folder / "adapter.safetensors")
        odd = sorted({n.split(".mlp.")[-1] for n in set(ours) ^ set(theirs)})
        lost = ["experts.down_proj", "experts.down_proj_bias", "experts.gate_up_proj", "experts.gate_up_proj_bias"]
        assert odd == (lost if made["name"] == "gpt_oss" else []), made["name"]
        differ = {n.split(".mlp.")[-1] for n in set(ours) & set(theirs) if not torch.equal(ours[n], theirs[n])}
        turned = {"experts.down_proj", "experts.gate_up_proj"}
        assert differ == (turned if made["name"] == "qwen3_5_moe" else set()), made["name"]
        to(with_config(folder / "hf", config), folder / "back", "dcp", naming="torchtitan")
    found = run("load")
    biases = [f for f in found if f["missing"]]
    assert [f["name"] for f in found] == ["deepseek_v3", "gpt_oss", "kimi", "qwen3_5", "qwen3_5_moe", "muse_glimmer"]
    assert all(n.endswith(BIAS) for f in biases for n in f["missing"]), biases
    assert [f for f in found if f["unexpected"] or f["differ"]] == []
