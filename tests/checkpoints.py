"""Write checkpoints with other libraries for tests: models by transformers, DCP by torch, as flame and torchtitan do.

The torchtitan side is spelled out here once more, from the description of its adapter and not from our tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TITAN = {
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "lm_head": "lm_head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def write_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, shards: str | None = None, **fields: Any
) -> Any:
    """A random model of class `kind` (Llama, Qwen3, Olmo2, ...) written by transformers into `folder`; the model."""
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **fields})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # at their defaults, a mistake would not show
    model.save_pretrained(folder, max_shard_size=shards or "5GB")
    return model


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def write_expected(folder: Path) -> None:
    """`expected.safetensors`: logits and loss of the hf folder's model in fp32."""
    import transformers

    # loaded anew: a cast of the live model would round RoPE's inv_freq
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    ids = torch.randint(3, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = model(input_ids=ids, labels=ids)
    save_file(
        {"input_ids": ids, "logits_fp32": made.logits, "loss_fp32": made.loss.reshape(1)},
        folder / "expected.safetensors",
    )


def write_flame(folder: Path, state: dict[str, torch.Tensor], threads: int = 8) -> Path:
    """As flame's converter saves: nested under `model`, several threads."""
    step = folder / "checkpoint" / "step-0"
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(step, thread_count=threads), no_dist=True)
    return step


def titan_state(tensors: dict[str, torch.Tensor], config: Any, biases: bool = False) -> dict[str, torch.Tensor]:
    """Rename hf tensors as torchtitan's adapter does, in fp32: biases lost, a tied head from the embedding."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    out = {}
    for name, tensor in tensors.items():
        layer, module, leaf = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        if leaf == "bias" and not biases:
            continue
        if config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = tensor.shape[0] // dim
            tensor = tensor.view(heads, 2, dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        out[f"{f'layers.{layer}.' if layer else ''}{TITAN[module]}.{leaf}"] = tensor.float().contiguous()
    if config.tie_word_embeddings:
        out["lm_head.weight"] = out["tok_embeddings.weight"].clone()
    return out


def write_titan(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=1), no_dist=True)
    return folder


def write_case(folder: Path, kind: str, titan: bool = True, head: bool = False, **options: Any) -> None:
    """A whole case of the layout that the parity runner reads. `head` puts a different head beside a tied embedding."""
    model = write_model(folder / "hf", kind, **options)
    if head:
        file = folder / "hf" / "model.safetensors"
        stored = load_file(file)
        stored["lm_head.weight"] = torch.randn_like(stored["model.embed_tokens.weight"])
        save_file(stored, file, metadata={"format": "pt"})
        model = type(model).from_pretrained(folder / "hf")  # transformers 5 unties it
    write_flame(folder / "flame_dcp_tf5", model.state_dict())
    write_flame(folder / "flame_dcp_tf4", {n: t.float() for n, t in as_transformers_4(model).items()})
    if titan:
        write_titan(folder / "titan030_dcp", titan_state(hf_tensors(folder / "hf"), model.config))
    write_expected(folder)


def as_transformers_4(model: Any) -> dict[str, torch.Tensor]:
    """The state dict under transformers 4, which overwrites the head whenever the config ties it."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def write_trainer(folder: Path, model_folder: Path, step: int = 3) -> None:
    """A trainer checkpoint of torchtitan's layout: flat model, optimizer with a fused wqkv, schedule, opaque bytes."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    state: dict[str, Any] = titan_state(dict(model.state_dict()), model.config)
    for name, tensor in list(state.items()):
        if ".wv." in name:
            fused = torch.randn(tensor.shape[0] * 4, tensor.shape[1])
            state[f"optimizer.state.{name.replace('.wv.', '.wqkv.')}.exp_avg"] = fused
        elif ".wq." not in name and ".wk." not in name:
            state[f"optimizer.state.{name}.exp_avg"] = torch.randn_like(tensor)
            state[f"optimizer.state.{name}.step"] = torch.tensor(float(step))
    state |= {
        "lr_scheduler.last_epoch": step,
        "train_state.step": torch.tensor(step),
        "dataloader.dp_rank_0": b"opaque",
    }
    write_titan(folder / "checkpoint" / f"step-{step}", state)
    ids = torch.randint(3, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"input_ids": ids, "logits_fp32": logits}, folder / f"expected_after_{step}_steps.safetensors")
