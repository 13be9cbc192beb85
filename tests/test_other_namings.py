"""OLMo-core's and nanotron's names go to hf and back, as their own converters pair them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tensorkeep.cli import main
from tensorkeep.conversion.naming import identify
from tensorkeep.diagnosis.comparison import compare
from tensorkeep.formats.view import read
from tests.helpers import LLAMA, assert_same, held, interleaved, model_tensors, refused, to, with_config, write_hf

QWEN2 = LLAMA | {"model_type": "qwen2"}
# hf names of a layer by OLMo-core's, after HF_TO_OLMO_CORE_WEIGHT_MAPPINGS and its overrides by model type
PLAIN = {
    "attention.w_q": "self_attn.q_proj",
    "attention.w_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
NORMS: dict[str, dict[str, str]] = {
    "olmo2": {"attention_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"},
    "qwen3": {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"},
    "gemma3_text": {
        "attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "post_feed_forward_norm": "post_feedforward_layernorm",
    },
}


def of_type(kind: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A small model of a type that OLMo-core names, and its config."""
    tensors = model_tensors(norms=True, dtype=dtype)
    made = {n: t for n, t in tensors.items() if "layernorm" not in n}
    for layer in range(2):
        for hf in NORMS[kind].values():
            made[f"model.layers.{layer}.{hf}.weight"] = torch.randn(8).to(dtype)
    return made, LLAMA | {"model_type": kind, "head_dim": 4}


@pytest.mark.parametrize("kind", NORMS)
def test_olmo_core_goes_to_hf_and_back(kind: str, tmp_path: Path) -> None:
    tensors, config = of_type(kind)
    source = write_hf(tmp_path / "hf", tensors, config)
    to(source, tmp_path / "own", "dcp", naming="olmo-core", root="model", ask=None)
    made = held(tmp_path / "own")
    plus = 1.0 if kind == "gemma3_text" else 0.0
    for own, hf in (PLAIN | NORMS[kind]).items():
        shift = plus if "norm" in own else 0.0
        assert torch.equal(made[f"model.blocks.1.{own}.weight"], tensors[f"model.layers.1.{hf}.weight"] + shift), own
    assert torch.equal(made["model.lm_head.norm.weight"], tensors["model.norm.weight"] + plus)
    assert torch.equal(made["model.embeddings.weight"], tensors["model.embed_tokens.weight"])
    view = with_config(tmp_path / "own", config)
    assert identify(view).naming == "olmo-core" and identify(view).root == "model"
    to(view, tmp_path / "back", "hf", ask=None)
    back = held(tmp_path / "back")
    if not plus:
        assert_same(back, tensors)
    for name, tensor in tensors.items():
        assert torch.allclose(back[name], tensor, atol=2**-22), name
    found = {d.status for d in compare(read(source), view)}
    assert found <= ({"equal", "values"} if plus else {"equal"})


def test_a_folder_of_olmo_core_opens_with_transformers_config(tmp_path: Path, capsys: Any) -> None:
    tensors, config = of_type("olmo2")
    to(write_hf(tmp_path / "hf", tensors, config), tmp_path / "own", "dcp", naming="olmo-core", root="model", ask=None)
    step = tmp_path / "step7"
    step.mkdir()
    dcp.save(held(tmp_path / "own"), checkpoint_id=str(step / "model_and_optim"), no_dist=True)
    (step / "config.json").write_text('{"model": {"d_model": 8}}')
    (step / ".metadata.json").write_text('{"version": "1"}')
    with refused("C03", "which norm is which", "--config"):
        to(step, tmp_path / "out", "hf")
    assert main(["diff", str(step), str(tmp_path / "hf")]) == 0
    assert main(["inspect", str(step)]) == 0 and "olmo-core" in capsys.readouterr().out
    words = [str(step), str(tmp_path / "out"), "--to", "hf", "--config", str(tmp_path / "hf"), "--json"]
    assert main(["convert", *words]) == 2  # the sizes of this config are no whole model's
    with refused("K06", "flex_olmo", "convert_checkpoint_to_hf.py"):
        to(with_config(step, config | {"model_type": "flex_olmo"}), tmp_path / "out", "hf")


def test_for_olmo_core_is_compared_with_its_table(tmp_path: Path, capsys: Any) -> None:
    config = LLAMA | {"num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 10}
    source = write_hf(tmp_path / "hf", model_tensors(dim=4), config)
    assert main(["convert", str(source), str(tmp_path / "own"), "--to", "dcp", "--for", "olmo-core"]) == 0
    assert "proven: loads in olmo-core" in capsys.readouterr().out
    assert all(n.startswith("model.") for n in read(tmp_path / "own"))
    words = [
        "convert",
        str(source),
        str(tmp_path / "x"),
        "--to",
        "dcp",
        "--for",
        "olmo-core",
        "--drop",
        "**mlp.up_proj*",
    ]
    assert main(words) == 2 and "K01" in capsys.readouterr().err


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_nanotron_goes_to_hf_and_back(bias: bool, turned: bool, tmp_path: Path) -> None:
    tensors = {n: t for n, t in model_tensors(bias=bias).items() if not n.endswith("o_proj.bias")}
    config = QWEN2 | ({"rope_interleaved": True} if turned else {})
    to(write_hf(tmp_path / "hf", tensors, config), tmp_path / "own.pth", "pth", naming="nanotron", ask=None)
    made = held(tmp_path / "own.pth")
    at, own = "model.layers.1.", "model.decoder.1.pp_block."
    for leaf in ("weight", "bias") if bias else ("weight",):
        q, k, v = (tensors[f"{at}self_attn.{w}_proj.{leaf}"] for w in "qkv")
        wanted = torch.cat([interleaved(q, 4), interleaved(k, 4), v] if turned else [q, k, v])
        assert torch.equal(made[f"{own}attn.qkv_proj.{leaf}"], wanted)
    wanted = torch.cat([tensors[f"{at}mlp.gate_proj.weight"], tensors[f"{at}mlp.up_proj.weight"]])
    assert torch.equal(made[f"{own}mlp.gate_up_proj.weight"], wanted)
    view = with_config(tmp_path / "own.pth", config)
    assert identify(view).naming == "nanotron"
    to(view, tmp_path / "back", "hf", ask=None)
    assert_same(held(tmp_path / "back"), tensors)
    assert {d.status for d in compare(view, read(tmp_path / "hf"))} == {"equal"}


def test_nanotron_asks_for_a_config_and_a_known_model(tmp_path: Path) -> None:
    to(write_hf(tmp_path / "hf", model_tensors(), QWEN2), tmp_path / "own.pth", "pth", naming="nanotron", ask=None)
    with refused("C03", "num_attention_heads", "--config"):
        to(tmp_path / "own.pth", tmp_path / "out", "hf")
    with refused("K06", "mixtral", "llama and qwen2"):
        to(with_config(tmp_path / "own.pth", QWEN2 | {"model_type": "mixtral"}), tmp_path / "out", "hf")
    state = {n: t for n, t in held(tmp_path / "own.pth").items()}
    state["model.decoder.0.pp_block.attn.qkv_proj.weight"] = torch.ones(12, 8)
    dcp.save(state, checkpoint_id=str(tmp_path / "odd"), no_dist=True)
    with refused("C01", "qkv_proj", "12 rows"):
        to(with_config(tmp_path / "odd", QWEN2), tmp_path / "out", "hf")
