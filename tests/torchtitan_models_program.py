"""Save small models of torchtitan 0.3.0 with what its adapters make of them, and load what is written back.

`python tests/torchtitan_models_program.py save|load FOLDER` in an environment of benchmarks/envs/torchtitan.txt; one
JSON object a model. qwen3_5 imports kernels of flash-linear-attention when it is loaded; names and shapes ask for none.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

KERNELS = ("", ".modules", ".modules.conv", ".modules.conv.triton", ".modules.conv.triton.ops", ".ops")
KERNELS += (".modules.conv.causal_conv1d", ".ops.gated_delta_rule", ".ops.gated_delta_rule.chunk")
KERNELS += (".ops.gated_delta_rule.fused_recurrent",)
MODELS = {
    "deepseek_v3": ("deepseek_v3", "debugmodel"),
    "gpt_oss": ("gpt_oss", "debugmodel"),
    "kimi": ("kimi_k2_7", "debugmodel"),
    "qwen3_5": ("qwen3_5", "debugmodel"),
    "qwen3_5_moe": ("qwen3_5", "debugmodel_moe"),
    "muse_glimmer": ("muse_glimmer", "debugmodel_mm"),
}


def model_of(name: str) -> tuple[Any, Any, Any]:
    """The model with few layers and words, its adapter and its config."""
    package, flavor = MODELS[name]
    spec = importlib.import_module(f"torchtitan.models.{package}").model_registry(flavor)
    made = spec.model
    made.layers = made.layers[: 4 if "qwen" in name else 2]
    made.vocab_size = made.lm_head.out_features = 64
    words = getattr(made.tok_embeddings, "embedding", made.tok_embeddings)
    words.num_embeddings = 64
    return made.build(), spec.state_dict_adapter(made, None), made


def config_of(name: str, made: Any) -> dict[str, Any]:
    """What a config.json has to say of the model for the tables: sizes of heads and of what is cut."""
    first = made.layers[0]
    sees = getattr(made, "vision_encoder", None)
    tower = {
        "patch_size": getattr(sees, "patch_size", 0),
        "temporal_patch_size": getattr(sees, "temporal_patch_size", 0),
        "in_channels": getattr(sees, "in_channels", 3),
        "num_attention_heads": getattr(sees, "num_heads", 0),
        "hidden_size": getattr(sees, "dim", 0),
    }
    text: dict[str, Any] = {"num_hidden_layers": len(made.layers), "hidden_size": made.dim}
    if name == "muse_glimmer":
        heads = first.attention
        text |= {"num_attention_heads": heads.n_heads, "num_key_value_heads": heads.n_kv_heads}
        text |= {"head_dim": heads.head_dim}
        tower["hidden_size"] = sees.ln_pre.normalized_shape if sees else 0
    if "qwen" in name:
        net = first.delta_net
        text |= {"linear_num_key_heads": 1, "linear_key_head_dim": net.in_proj_q.out_features}
        text |= {"linear_num_value_heads": 1, "linear_value_head_dim": net.in_proj_v.out_features}
    kind = {"kimi": "kimi_k25"}.get(name, name)
    head = {"model_type": kind, "tie_word_embeddings": False}
    if name in ("deepseek_v3", "gpt_oss"):
        return head | text
    return head | {"text_config": text, "vision_config": tower}


def main(word: str, top: Path) -> None:
    for part in KERNELS:
        sys.modules[f"fla{part}"] = MagicMock()
    for name in MODELS:
        model, adapter, made = model_of(name)
        generator = torch.Generator().manual_seed(0)
        state = {n: torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
        folder = top / name
        if word == "save":
            dcp.save(state, checkpoint_id=str(folder / "dcp"), no_dist=True)
            hub = {n: t.contiguous().clone() for n, t in adapter.to_hf(dict(state)).items()}
            save_file(hub, folder / "adapter.safetensors")
            print(json.dumps({"name": name, "config": config_of(name, made)}), flush=True)
            continue
        stored = dcp.FileSystemReader(str(folder / "back")).read_metadata().state_dict_metadata
        loaded = {n: torch.zeros_like(t) for n, t in state.items() if n in stored}
        dcp.load(loaded, checkpoint_id=str(folder / "back"), no_dist=True)
        differ = [n for n, t in loaded.items() if not torch.equal(t, state[n])]
        missing, unexpected = sorted(set(state) - set(stored)), sorted(set(stored) - set(state))
        model.load_state_dict(loaded, strict=False)
        print(json.dumps({"name": name, "missing": missing, "unexpected": unexpected, "differ": differ}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
