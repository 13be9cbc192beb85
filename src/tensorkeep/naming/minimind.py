"""`minimind`: MiniMind's weight files, three generations that share file names.

mm2a (and v1) uses Meta's names and interleaved RoPE; mm2 has Llama's names and, with experts, shared ones that no
transformers class computes; mm3 has Qwen3's names. The generation is read off the tensors. The values of the config
stand in no weight file: what shapes give is taken from them, the rest is MiniMind's default and is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from tensorkeep.naming import hf
from tensorkeep.naming.table import Row, fits
from tensorkeep.naming.torchtitan import rows
from tensorkeep.record import TensorRecord
from tensorkeep.view import StateView

NAME = "minimind"
FILE = re.compile(r"(?P<stage>.+)_(?P<hidden>\d+)(?P<moe>_moe)?(?P<resume>_resume)?\.pth\Z")
META = [
    *rows("", "output", [], rope=True),
    Row("layers.{n}.feed_forward.gate", "model.layers.{n}.mlp.gate"),
    *(
        Row(f"layers.{{n}}.feed_forward.{own}.{w}", f"model.layers.{{n}}.mlp.{own}.{proj}")
        for own in ("experts.{e}", "shared_experts")
        for w, proj in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    ),
]
FAMILIES = {"mm2a": META}
COMPUTED = ("freqs_cos", "freqs_sin", "pos_cis")
GENERATIONS = {"mm3": "qwen3", "mm2": "llama", "mm2a": "llama"}


def recognise(name: str) -> bool:
    return fits(name, META) or hf.recognise(name)


def written_by_minimind(view: StateView, names: Iterable[str]) -> bool:
    """Whether the file's own name says so: `{stage}_{hidden_size}[_moe].pth` with this very hidden size."""
    match = FILE.match(PurePosixPath(view.path).name)
    if view.format != "pth" or not match:
        return False
    wanted = {"tok_embeddings.weight", hf.EMBEDDING}
    width = next((view[n].shape[-1] for n in view if n.endswith(tuple(wanted)) and view[n].shape), None)
    return width == int(match["hidden"])


def generation(names: Iterable[str]) -> str:
    """mm3, mm2 or mm2a, from the names."""
    names = set(names)
    if any(n.startswith("tok_embeddings.") for n in names):
        return "mm2a"
    return "mm3" if any(".self_attn.q_norm." in n for n in names) else "mm2"


def file_name(config: Mapping[str, Any] | None, names: Iterable[str], stage: str) -> str:
    """What MiniMind will look for: `{stage}_{hidden_size}{_moe}.pth`."""
    moe = any(".experts." in n for n in names)
    return f"{stage}_{(config or {}).get('hidden_size', 0)}{'_moe' if moe else ''}.pth"


def stage_of(path: str) -> str:
    """`full_sft` for `full_sft_512.pth`; MiniMind's first stage for anything else."""
    match = FILE.match(PurePosixPath(path).name)
    return match["stage"] if match else "pretrain"


def hf_config(found: Mapping[str, TensorRecord], config: Mapping[str, Any] | None, made: str) -> tuple[dict[str, Any], list[str]]:
    """A transformers config for weights of generation `made` (hf names in `found`), and the fields assumed.

    MiniMind's own config fields, where one lies beside the file, come first; then shapes; then MiniMind's defaults.
    """
    own = {**{old: (config or {})[new] for new, old in OLD_FIELDS.items() if new in (config or {})}, **(config or {})}
    shapes = {n: r.shape for n, r in found.items()}
    vocab, hidden = shapes[hf.EMBEDDING]
    first = "model.layers.0.self_attn."
    known: dict[str, Any] = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": _count(shapes, r"model\.layers\.(\d+)\.")}
    assumed: list[str] = []

    def take(name: str, default: Any) -> Any:
        if name in own and own[name] is not None:
            return own[name]
        assumed.append(f"{name}={default}")
        return default

    if f"{first}q_norm.weight" in shapes:
        known["head_dim"] = shapes[f"{first}q_norm.weight"][0]
        known["num_attention_heads"] = shapes[f"{first}q_proj.weight"][0] // known["head_dim"]
    else:
        known["num_attention_heads"] = take("num_attention_heads", 8)
        known["head_dim"] = shapes[f"{first}q_proj.weight"][0] // known["num_attention_heads"]
    known["num_key_value_heads"] = shapes[f"{first}k_proj.weight"][0] // known["head_dim"]
    moe = any(".mlp.experts." in n for n in shapes)
    dense = shapes.get("model.layers.0.mlp.gate_proj.weight")
    expert = shapes.get("model.layers.0.mlp.experts.0.gate_proj.weight")
    known["intermediate_size"] = dense[0] if dense else own.get("intermediate_size") or (expert[0] if expert else _default_width(hidden))
    known |= {
        "hidden_act": own.get("hidden_act", "silu"),
        "rms_norm_eps": take("rms_norm_eps", 1e-6 if made == "mm3" else 1e-5),
        "rope_theta": take("rope_theta", 1e6),
        "rope_parameters": {"rope_type": "default", "rope_theta": own.get("rope_theta", 1e6)},
        "rope_scaling": None,
        "max_position_embeddings": take("max_position_embeddings", 32768),
        "tie_word_embeddings": take("tie_word_embeddings", True),
        "bos_token_id": own.get("bos_token_id", 1),
        "eos_token_id": own.get("eos_token_id", 2),
        "pad_token_id": own.get("pad_token_id", 0),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    kind = GENERATIONS[made] + ("_moe" if moe and made == "mm3" else "")
    if moe and made == "mm3" and expert:
        count = _count(shapes, r"model\.layers\.0\.mlp\.experts\.(\d+)\.")
        known |= {
            "num_experts": count, "num_local_experts": count, "moe_intermediate_size": expert[0],
            "num_experts_per_tok": take("num_experts_per_tok", 1), "norm_topk_prob": take("norm_topk_prob", True),
            "router_aux_loss_coef": own.get("router_aux_loss_coef", 5e-4), "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    if moe and made != "mm3":
        kind = "minimind"  # shared experts beside Llama attention: no transformers class computes this
        known |= {k: own[k] for k in ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "scoring_func", "norm_topk_prob") if k in own}
    classes = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM", "minimind": "MiniMindForCausalLM"}
    return {"architectures": [classes[kind]], "model_type": kind, "minimind_generation": made, **known}, assumed


# mm2a's names of the same fields
OLD_FIELDS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "max_seq_len": "max_position_embeddings",
}  # fmt: skip


def _count(names: Iterable[str], pattern: str) -> int:
    return max((int(m.group(1)) for n in names if (m := re.match(pattern, n))), default=-1) + 1


def _default_width(hidden: int) -> int:
    return 64 * math.ceil(hidden * math.pi / 64)
