"""Load DCP and hf folders into torchtitan's own models, and compare with the hf folders they were made from.

`python tests/torchtitan_program.py SINK HF [SINK HF ...]` in an environment with torchtitan 0.3.0 or 0.2.2
(benchmarks/envs/torchtitan.txt); one JSON object a pair: what `torch.distributed.checkpoint.load` said, the names that
torchtitan's adapter gives for hf and the file has not, and those whose bits differ.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file


def model_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """torchtitan's model of the sizes that a config.json gives, and its adapter, in either of two versions."""
    return model_of_03(config) if importlib.metadata.version("torchtitan") >= "0.3" else model_of_02(config)


def model_of_02(config: dict[str, Any]) -> tuple[Any, Any]:
    """0.2: a model is built of its arguments."""
    sizes = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "max_seq_len": 64,
    }
    if config["model_type"] == "llama":
        from torchtitan.models.llama3.model.args import TransformerModelArgs
        from torchtitan.models.llama3.model.model import Transformer
        from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

        wanted, plain = config["intermediate_size"], int(8 * config["hidden_size"] / 3)
        args = TransformerModelArgs(**sizes, multiple_of=wanted, ffn_dim_multiplier=min(1, wanted / plain))
        return Transformer(args), Llama3StateDictAdapter(args, None)
    from torchtitan.models.moe.moe import MoEArgs
    from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
    from torchtitan.models.qwen3.model.model import Qwen3Model
    from torchtitan.models.qwen3.model.state_dict_adapter import Qwen3StateDictAdapter

    sizes |= {"head_dim": config["head_dim"], "hidden_dim": config["intermediate_size"]}
    sizes["enable_weight_tying"] = config["tie_word_embeddings"]
    if config["model_type"] == "qwen3_moe":
        count = config.get("num_experts") or config["num_local_experts"]
        sizes |= {"moe_enabled": True, "moe_inter_dim": config["moe_intermediate_size"]}
        sizes["moe_args"] = MoEArgs(num_experts=count, num_shared_experts=0, top_k=config["num_experts_per_tok"])
    args = Qwen3ModelArgs(**sizes)
    return Qwen3Model(args), Qwen3StateDictAdapter(args, None)


def model_of_03(config: dict[str, Any]) -> tuple[Any, Any]:
    """0.3: a model is built of a config that holds every layer's."""
    from torchtitan.models import llama3, qwen3
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE

    titan = llama3 if config["model_type"] == "llama" else qwen3
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or dim // heads
    made = titan.llama3_configs["debugmodel"] if titan is llama3 else titan.qwen3_configs["debugmodel"]
    made = made(attn_backend="flex")
    made.dim, made.vocab_size = dim, config["vocab_size"]
    made.enable_weight_tying = config["tie_word_embeddings"]
    made.tok_embeddings.num_embeddings = made.lm_head.out_features = config["vocab_size"]
    made.tok_embeddings.embedding_dim = made.lm_head.in_features = made.norm.normalized_shape = dim
    sizes = {
        "n_layers": config["num_hidden_layers"],
        "dim": dim,
        "n_heads": heads,
        "n_kv_heads": config["num_key_value_heads"],
        "attn_backend": "flex",
    }
    if titan is llama3:
        rope = ComplexRoPE.Config(dim=head_dim, max_seq_len=64, theta=10000.0)
        layers = llama3._build_llama3_layers(**sizes, hidden_dim=config["intermediate_size"], rope=rope)
    else:
        sizes |= {"head_dim": head_dim, "rope": CosSinRoPE.Config(dim=head_dim, max_seq_len=64, theta=1e6)}
        if config["model_type"] == "qwen3_moe":
            layers = qwen3._build_qwen3_moe_layers(
                **sizes,
                moe_hidden_dim=config["moe_intermediate_size"],
                num_experts=config.get("num_experts") or config["num_local_experts"],
                top_k=config["num_experts_per_tok"],
                moe_comm_backend="standard",
            )
        else:
            layers = qwen3._build_qwen3_layers(**sizes, hidden_dim=config["intermediate_size"])
    made.layers = layers
    adapter = {llama3: "Llama3StateDictAdapter", qwen3: "Qwen3StateDictAdapter"}[titan]
    return made.build(), getattr(titan, adapter)(made, None)


def outcome(folder: str, source: str) -> dict[str, Any]:
    config = json.loads((Path(source) / "config.json").read_text())
    wanted = load_file(Path(source) / "model.safetensors")
    torch.set_default_dtype(next(iter(wanted.values())).dtype)
    model, adapter = model_of(config)
    hub = not (Path(folder) / ".metadata").exists()
    state = adapter.to_hf(model.state_dict()) if hub else model.state_dict()
    try:
        dcp.load(
            state,
            checkpoint_id=folder,
            storage_reader=dcp.HuggingFaceStorageReader(folder) if hub else None,
            no_dist=True,
        )
    except BaseException as error:
        return {"error": str(error).strip().splitlines()[-1]}
    report = model.load_state_dict(adapter.from_hf(state) if hub else state, strict=False)
    lost = [
        n for n in report.missing_keys if not n.endswith(("expert_bias_E", "expert_bias"))
    ]  # hf has no such tensor: drawn as zeros
    odd = [*(lost if hub else report.missing_keys), *report.unexpected_keys]
    made = adapter.to_hf(model.state_dict())
    missing = sorted(set(wanted) ^ set(made))
    return {
        "missing": missing + odd,
        "differ": [n for n in wanted if n in made and not torch.equal(made[n], wanted[n])],
    }


if __name__ == "__main__":
    for folder, source in zip(sys.argv[1::2], sys.argv[2::2]):
        print(json.dumps(outcome(folder, source)))
