"""Every architecture, tiny: names in files and in memory, diagnosis, conversion, against transformers itself.

    python -m benchmarks.families                         # all of them, one line each, and a table in Markdown
    python -m benchmarks.families --only gpt2,qwen3_moe

Models have hidden size 64, two or three layers and random weights; nothing is downloaded. Of each: `live`: a file's
tensors as `to_live` arranges them are the loaded model's `state_dict()`, bit for bit; `file`: and back; `alone`:
`diagnose` without a reference finds no error; `saved`: `torch.save(model.state_dict())` equals its folder for `diff`
and `diagnose`; `dcp`: hf to dcp to hf gives the same logits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
N_EMBD = {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 128}
HEAD = {"head_dim": 16}
TOP = {"num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "moe_intermediate_size": 64, **TOP}
MIXTRAL = {"num_local_experts": 4, **TOP}
SHARED = {"shared_expert_intermediate_size": 64}
DEEP = {
    **{"n_routed_experts": 4, "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"n_group": 2, "topk_group": 1, **TOP},
}
LATENT = {
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "num_key_value_heads": 4,
}
KINDS = ("linear_attention", "full_attention", "linear_attention")
LINEAR = {
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "layer_types": list(KINDS),
}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 0}
SIGHT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
EYE = {**SIGHT, "image_size": 16, "patch_size": 4}
TEXT = {**BASE, "num_hidden_layers": 2, **HEAD}

# what a config says beside BASE, by name of the family; its model type is the name where `kind` says no other
FAMILIES: dict[str, dict[str, Any]] = {
    **{n: {} for n in "llama qwen2 phi phi3 olmo olmo2 smollm3 granite cohere gpt_neox stablelm starcoder2".split()},
    **{
        n: {}
        for n in "nemotron bitnet apertus arcee persimmon nanochat diffllama hyperclovax jetmoe nemotron_h".split()
    },
    **{n: HEAD for n in "mistral ministral3 qwen3 gemma glm glm4 hunyuan_v1_dense ernie4_5 seed_oss helium".split()},
    **{n: HEAD for n in ("vaultgemma", "cwm")},
    "llama_tied": {"kind": "llama", "tie_word_embeddings": True},
    "mixtral": MIXTRAL,
    "qwen2_moe": {**QWEN, **SHARED},
    "qwen3_moe": {**HEAD, **QWEN},
    "qwen3_next": {**HEAD, **QWEN, **SHARED, **LINEAR},
    "qwen3_5_text": {**HEAD, **LINEAR},
    "qwen3_5_moe_text": {**HEAD, **QWEN, **SHARED, **LINEAR},
    "gemma2": {**HEAD, "sliding_window": 64},
    "cohere2": {**HEAD, "sliding_window": 64},
    "gemma3_text": {**HEAD, **SLIDING},
    "gemma3n_text": {
        **{**HEAD, **PER_LAYER, "intermediate_size": [128] * 3, "activation_sparsity_pattern": [0.0] * 3},
        **{"laurel_rank": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    },
    "gemma4_text": {
        **{**HEAD, **PER_LAYER, "global_head_dim": 16},
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "phimoe": MIXTRAL,
    "olmo3": SLIDING,
    "exaone4": SLIDING,
    "olmoe": {"num_experts": 4, **TOP},
    "flex_olmo": {"num_experts": 4, **TOP},
    "gpt_oss": {**HEAD, **MIXTRAL, **SLIDING},
    "deepseek_v2": {**DEEP, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**DEEP, **LATENT},
    "deepseek_v32": {**DEEP, **LATENT, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16},
    "glm4_moe": {**HEAD, **DEEP},
    "glm4_moe_lite": {**DEEP, **LATENT},
    "dots1": {**HEAD, **DEEP, "layer_types": ["full_attention"] * 3},
    "granitemoe": MIXTRAL,
    "granitemoeshared": {**MIXTRAL, "shared_intermediate_size": 64},
    "granitemoehybrid": {
        **{**MIXTRAL, **MAMBA, "shared_intermediate_size": 64, "mamba_expand": 2},
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False},
    "falcon7b": {
        **{"kind": "falcon", "new_decoder_architecture": False, "multi_query": True, "alibi": False, "bias": False},
        "parallel_attn": True,
    },
    "gpt2": N_EMBD,
    "gpt_bigcode": N_EMBD,
    "gptj": {**N_EMBD, "rotary_dim": 8},
    "codegen": {**N_EMBD, "rotary_dim": 8},
    "gpt_neo": {
        **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256},
        **{"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
    },
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "mpt": {"vocab_size": 256, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "opt": {**BASE, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "xglm": {"vocab_size": 256, "d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 128},
    "mamba": {"state_size": 16, "conv_kernel": 4},
    "falcon_mamba": {"state_size": 16},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"num_experts": 4, **TOP, "mamba_d_state": 16, "use_mamba_kernels": False},
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, **HEAD, "mamba_d_ssm": 128},
    "zamba2": {
        **{"mamba_d_state": 16, "mamba_expand": 2, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1},
        **{"chunk_size": 16, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1},
    },
    "llama4_text": {
        **{**HEAD, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
        **{"interleave_moe_layer_step": 2, "attention_chunk_size": 64},
    },
    "hunyuan_v1_moe": {**HEAD, "num_experts": 4, "moe_topk": 2},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1},
        **{"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1},
    },
    "minimax": {**HEAD, **MIXTRAL, "layer_types": list(KINDS), "block_size": 16},
    "minimax_m2": {**HEAD, **MIXTRAL, "rotary_dim": 8},
    "lfm2": {**CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**QWEN, **CONV, "num_dense_layers": 1},
    "afmoe": {**HEAD, **QWEN, "num_dense_layers": 1},
    "recurrent_gemma": {
        **{"lru_width": 64, "attention_window_size": 64, "block_types": ["recurrent", "recurrent", "attention"]},
    },
    "qwen2_5_vl": {
        "text_config": {
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        "vision_config": {
            **{"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64},
            **{"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16},
        },
        **{"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252},
    },
    "qwen3_5": {
        "text_config": {**TEXT, **LINEAR, "layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {
            **{"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64},
            **{"patch_size": 4, "num_position_embeddings": 16},
        },
    },
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": EYE,
        **{"mm_tokens_per_image": 4, "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252},
    },
    "llama4": {
        "text_config": {
            **{**TEXT, "num_local_experts": 2, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2},
            "attention_chunk_size": 64,
        },
        "vision_config": {
            **{**EYE, "num_hidden_layers": 1, "projector_input_dim": 64, "projector_output_dim": 64},
            "vision_output_dim": 64,
        },
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**EYE, "num_hidden_layers": 1, "model_type": "pixtral", **HEAD},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**EYE, "model_type": "clip_vision_model", "projection_dim": 64},
        "image_token_index": 250,
    },
}
_OWN_SIZES = {"gpt2", "gpt_bigcode", "gptj", "codegen", "gpt_neo", "bloom", "mpt", "xglm"}
COLUMNS = ("live", "file", "alone", "saved", "dcp")


def model_of(name: str, seed: int = 0) -> Any:
    """A family's tiny model in float32, without dropout; norms and biases are drawn as well."""
    import torch
    import transformers

    given = dict(FAMILIES[name])
    kind = given.pop("kind", name)
    sees = "vision_config" in given
    base = {} if sees or kind in _OWN_SIZES else BASE
    if "bos_token_id" not in given and not sees:
        given |= {"bos_token_id": 1, "eos_token_id": 2, **({"pad_token_id": 0} if base else {})}
    config = transformers.AutoConfig.for_model(kind, **{**base, **given})
    for part in (config, config.get_text_config()):
        for key, value in list(vars(part).items()):
            if ("drop" in key or "jitter" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and (parameter.dim() < 2 or parameter.std() == 0):
                    parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


def built(name: str, folder: Path, seed: int = 0) -> Any:
    """Write a family's tiny model as a Hugging Face folder, and return it as transformers loads it from there."""
    import torch

    model = model_of(name, seed)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def raw(tensor: Any, views: Any) -> bytes:
    """The bytes of a tensor that is made of stored parts."""
    from tensorkeep.conversion.streams import pieces

    return b"".join(bytes(piece) for part in tensor.parts for piece in pieces(part, views[part.source]))


def opened(path: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's view, and its tensors under the names that its file has."""
    from tensorkeep.conversion import naming
    from tensorkeep.conversion.planning import to_hf_tensors
    from tensorkeep.formats.view import read

    view = read(path)
    return view, to_hf_tensors(view, 0, naming.identify(view, "hf"), config, [])


def told(*words: object) -> tuple[int, str]:
    """`tensorkeep WORDS` in this process: exit code, and what it said."""
    from tensorkeep.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = int(main([str(w) for w in words]) or 0)
        except SystemExit as left:
            code = int(left.code) if isinstance(left.code, int) else 1
    return code, out.getvalue()


def arranged(model: Any, folder: Path, saved: Path) -> Iterator[tuple[str, str]]:
    """What is wrong, '' for nothing, with the folder's tensors as live ones, and with the saved ones as the file's."""
    import torch
    from safetensors import safe_open

    from tensorkeep.formats.whole_config import complete
    from tensorkeep.models.names import to_file, to_live

    state = model.state_dict()
    view, hub = opened(folder, None)
    config = complete(view.config, view.companions)
    found = to_live(config, hub, [view])
    wrong = sorted(set(state) ^ set(found.tensors)) + list(found.unexpected)
    wrong += [n for n, t in found.tensors.items() if n in state and raw(t, [view]) != _bytes(state[n])]
    yield "live", ", ".join(wrong[:2])
    torch.save(state, saved)
    view, hub = opened(saved, config)
    back = to_file(config, hub, [view])
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
        wrong = sorted(names - set(back.tensors)) + list(back.missing)
        wrong += [n for n in names & set(back.tensors) if raw(back.tensors[n], [view]) != _bytes(stored.get_tensor(n))]
    yield "file", ", ".join(wrong[:2])


def _bytes(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def judged(name: str, work: Path) -> Iterator[tuple[str, str]]:
    """Each column of one family, with what is wrong; '' for nothing."""
    import torch

    folder, saved = work / "model", work / "saved.pth"
    model = built(name, folder)
    yield from arranged(model, folder, saved)
    code, said = told("diagnose", folder)
    yield "alone", "" if code == 0 else said.strip().splitlines()[-1]
    codes = {
        w: told(*w.split(), *p) for w, p in (("diff", (folder, saved)), ("diagnose", (saved, "--reference", folder)))
    }
    yield "saved", "; ".join(f"{w}: exit {code}" for w, (code, _) in codes.items() if code)
    code, said = told("convert", folder, work / "dcp", "--to", "dcp")
    code = code or told("convert", work / "dcp", work / "back", "--to", "hf")[0]
    if code:
        yield "dcp", f"exit {code}"
        return
    again = type(model).from_pretrained(work / "back", dtype=torch.float32).eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids, use_cache=False).logits, again(input_ids=ids, use_cache=False).logits)
    yield "dcp", "" if same else "other logits"


def main() -> int:
    """Print a line for each family, and the counts."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="these families, with commas")
    names = [n for n in parser.parse_args().only.split(",") if n] or sorted(FAMILIES)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    right = dict.fromkeys(COLUMNS, 0)
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            cells = dict(judged(name, Path(work)))
        for column, why in cells.items():
            right[column] += not why
        wrong = "; ".join(f"{c}: {w}" for c, w in cells.items() if w)
        print(f"{name:18} {wrong or 'ok'}   [{time.monotonic() - began:.1f} s]", flush=True)
    print(f"\ntransformers {transformers.__version__}, {len(names)} families\n\n| column | right |\n|---|---|")
    for column in COLUMNS:
        print(f"| {column} | {right[column]} of {len(names)} |")
    return 0 if all(count == len(names) for count in right.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
