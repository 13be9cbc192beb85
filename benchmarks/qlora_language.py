"""QLoRA training of a Llama-3.1-8B shape: ours beside PEFT + bitsandbytes, on one GPU, in one run.

    python -m benchmarks.qlora_language                        both, 4 x 2048 and 1 x 8192
    python -m benchmarks.qlora_language --tiny                 a check of the script, on any machine
    python -m benchmarks.qlora_language --modes least --shapes 1x131072 --documents 8192    packed rows

nf4 base (doubly quantized, blocks of 64), r 16 on all linears but the head, random tokens, no dropout, bf16 autocast,
AdamW on float32 LoRA weights, torch's SDPA, every layer's activations recomputed. Both models get the same seeded
weights and the same A, so losses must agree within the noise of bf16. Two forms of ours: `lean` keeps a layer's input
alone; `fast` keeps the products no wider than their input of every layer, and all products of as many layers as fit
into what PEFT needed. `least`, `balanced` and `most` are `training.memory` of a recipe; `start` keeps inputs of layers
alone, in main memory, as a plan for the longest rows does.

The floor is matrix work alone: forward, recomputation and input gradients of 6.98 G weights at 2 FLOP a weight and
token, the head forward and back, causal attention, at 790 TFLOP/s (measured on random data on an H200).
Prints a row a run: tokens/s, peak GiB, ratios to PEFT, share of the floor, losses; with $OUT set, also JSON there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RATE = 790e12  # FLOP/s
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def seeded(name: str, shape: tuple[int, ...], device: torch.device, std: float = 0.02) -> Tensor:
    """The weight of that name, bfloat16, the same in every build on one kind of device."""
    generator = torch.Generator(device).manual_seed(
        sum(ord(c) * 257**i for i, c in enumerate(name[-12:])) % (1 << 62) + len(name)
    )
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0.0, std, generator=generator)


def skeleton(
    shape: dict[str, Any], quantized: Callable[[nn.Linear, str], nn.Module], device: torch.device
) -> nn.Module:
    """transformers' Llama with seeded weights, every linear but the head through `quantized` as soon as it is made."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        for own, parameter in list(module.named_parameters(recurse=False)):
            norm = "norm" in name
            value = (
                torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
                if norm
                else seeded(f"{name}.{own}", tuple(parameter.shape), device)
            )
            setattr(module, own, nn.Parameter(value, requires_grad=False))
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized(module, name))
    # buffers that no file holds were made on the meta device: make the rotary embedding again
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.config.use_cache = False
    return model


def same_start(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Both sides' LoRA weights made equal: A by module name, B zero. Returns them."""
    trained = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            clean = name.removeprefix("base_model.model.").replace(".default.weight", "")
            with torch.no_grad():
                parameter.copy_(
                    seeded(clean, tuple(parameter.shape), device, 0.01)
                    if "lora_A" in clean
                    else torch.zeros_like(parameter)
                )
            trained.append(parameter)
    return trained


def peft_model(shape: dict[str, Any], device: torch.device) -> nn.Module:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    def packed(linear: nn.Linear, name: str) -> nn.Module:
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
        )
        made.weight = bnb.nn.Params4bit(
            linear.weight.data.cpu() if device.type == "cuda" else linear.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
        )
        return made.to(device)

    model = skeleton(shape, packed, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    )


def our_model(shape: dict[str, Any], device: torch.device, kept: list[Any], compiled: bool) -> nn.Module:
    from tensorkeep.adapters.lora import add_lora
    from tensorkeep.language._recompute import lean
    from tensorkeep.quantization.linear import QuantLinear

    model = skeleton(shape, lambda linear, name: QuantLinear.of(linear, "nf4", name=name), device)
    add_lora(model, ["*_proj"], r=16, alpha=32)
    for layer, what in zip(model.model.layers, kept):
        lean([layer], what if compiled else "input", compiled)
    return model


def arranged_model(
    shape: dict[str, Any], device: torch.device, memory: Any, compiled: bool, tokens: int, packed: bool = False
) -> nn.Module:
    """Ours under `training.memory`."""
    from tensorkeep.adapters.lora import add_lora
    from tensorkeep.language import _documents
    from tensorkeep.language._memory import arrange
    from tensorkeep.language._memory_plan import Way, main_memory
    from tensorkeep.quantization.linear import QuantLinear

    model = skeleton(shape, lambda linear, name: QuantLinear.of(linear, "nf4", name=name), device)
    add_lora(model, ["*_proj"], r=16, alpha=32)
    if packed and not _documents.use(model):
        raise SystemExit("this transformers takes no documents")
    if memory == "start":
        memory = Way(0, "start", main_memory(), True)
    print(arrange(model, list(model.model.layers), memory, compiled, tokens, True), flush=True)
    return model


def our_loss(model: nn.Module, ids: Tensor, documents: int = 0, masked: bool = False) -> Tensor:
    """With `documents`, rows are packed with documents of so many tokens: without a mask, or `masked`."""
    from tensorkeep.language import _documents
    from tensorkeep.language._head_loss import head_loss
    from tensorkeep.language.data.batches import block_mask

    labels, extra = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100), {}
    if documents:
        positions = (torch.arange(ids.shape[1], device=ids.device) % documents)[None].expand_as(ids).contiguous()
        labels[:, :-1][positions[:, 1:] == 0] = -100
        if masked:
            extra = {"position_ids": positions, "attention_mask": block_mask((positions == 0).cumsum(1))}
        else:
            extra = _documents.arguments(positions)
    hidden = model.model(input_ids=ids, **extra).last_hidden_state  # [B, L, C]
    return head_loss(hidden, model.lm_head.weight, labels, float((labels != -100).sum()))


def peft_loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def floor_seconds(shape: dict[str, Any], batch: int, length: int) -> float:
    """Seconds of matrix work: see the head of this file."""
    h, i, layers, kv = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["num_hidden_layers"],
        shape["num_key_value_heads"],
    )
    width = kv * h // shape["num_attention_heads"]
    linear = layers * (2 * h * h + 2 * h * width + 3 * h * i)
    tokens = batch * length
    attention = layers * 2 * 2 * batch * length * length * h / 2  # two products, half of them masked
    return (tokens * (3 * 2 * linear + 2 * 2 * h * shape["vocab_size"]) + attention * (2 + 2.5)) / RATE


def train(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    vocab: int,
    batch: int,
    length: int,
    device: torch.device,
    steps: int,
    timed: int,
) -> dict[str, Any]:
    started = time.perf_counter()
    model = build()
    trained = same_start(model, device)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(0)
    built = time.perf_counter() - started
    held = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    losses, seconds = [], []
    for step in range(steps):
        if step == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(0, vocab, (batch, length), device=device, generator=generator)
        before = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    reserved = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0
    result = {
        "reserved_gib": reserved,  # by torch's allocator, of which `peak_gib` was in use
        "tokens_per_s": batch * length / statistics.median((seconds[1:] or seconds)[-timed:]),
        "peak_gib": peak,
        "held_gib": held,
        "built_s": built,
        "first_step_s": seconds[0],
        "losses": [round(x, 4) for x in losses],
    }
    del model, optimizer, trained, loss
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--modes", default="peft,lean,fast,least,balanced,most")
    parser.add_argument("--shapes", default="4x2048,1x8192")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--products", type=int, default=6, help="layers of `fast` that keep all their products, the others narrow ones"
    )
    parser.add_argument("--documents", type=int, default=0, help="rows are packed with documents of so many tokens")
    parser.add_argument("--mask", action="store_true", help="and attended under a mask of the row")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--layers", type=int, help="fewer than the model has: for what one layer takes of long rows")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = TINY if arguments.tiny else LLAMA_8B
    shape = shape | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    results = []
    loss_of = partial(our_loss, documents=arguments.documents, masked=arguments.mask)
    for size in ("2x64",) if arguments.tiny else arguments.shapes.split(","):
        batch, length = map(int, size.split("x"))
        floor = batch * length / floor_seconds(shape, batch, length)
        for mode in arguments.modes.split(","):
            count = shape["num_hidden_layers"]
            wide = min(arguments.products, count)
            kept = ["narrow"] * (count - wide) + ["products"] * wide if mode == "fast" else ["input"] * count
            build: Callable[[], nn.Module]
            if mode == "peft":
                build = partial(peft_model, shape, device)
            elif mode in ("start", "least", "balanced", "most"):
                packed = arguments.documents > 0 and not arguments.mask
                build = partial(arranged_model, shape, device, mode, not arguments.eager, batch * length, packed)
            else:
                build = partial(our_model, shape, device, kept, not arguments.eager)
            made = train(
                build,
                peft_loss if mode == "peft" else loss_of,
                shape["vocab_size"],
                batch,
                length,
                device,
                arguments.steps,
                5,
            )
            made |= {
                "mode": mode,
                "shape": size,
                "floor_tokens_per_s": floor,
                "products": wide if mode == "fast" else None,
            }
            results.append(made)
            peer = next((r for r in results if r["mode"] == "peft" and r["shape"] == size), None)
            ratios = ""
            if peer is not None and mode != "peft":
                speed, memory = (
                    made["tokens_per_s"] / peer["tokens_per_s"],
                    made["peak_gib"] / max(peer["peak_gib"], 1e-9),
                )
                apart = max(abs(a - b) for a, b in zip(made["losses"], peer["losses"]))
                ratios = f"{speed:.2f}x speed, {memory:.0%} memory, losses apart {apart:.4f}"
            print(
                f"{size} {mode:8} {made['tokens_per_s']:8.0f} tokens/s {made['peak_gib']:6.2f} GiB "
                f"{made['tokens_per_s'] / floor:.0%} of the floor  first step {made['first_step_s']:.1f} s  {ratios}",
                flush=True,
            )
            if "OUT" in os.environ:
                Path(os.environ["OUT"], "qlora_language.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
