"""One system of `benchmarks.headtohead`, in a process of its own: load a folder, train some steps, print JSON.

Every system loads the same folder, takes the same tokens, starts from the same A (B is zero), trains r 16 on all seven
linears in bfloat16 autocast with torch's fused AdamW on float32, and calls the same loop. What a system needs and is
not there is said in its result, with the error.
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# system -> its ways, from the least memory to the most
WAYS = {
    "tensorkeep": ("least", "balanced", "most"),
    "unsloth": ("unsloth", "device", "none"),
    "peft": ("checkpointing",),
    "peft-liger": ("checkpointing",),
    "axolotl": ("liger", "checkpointing"),
}
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "bitsandbytes"),
    *("unsloth", "unsloth_zoo", "trl", "liger_kernel", "axolotl"),
)
Made = tuple[Any, Callable[[Any, Any], Any]]  # a model, and its loss of some ids


def tensorkeep(folder: Path, way: str, batch: int, length: int, device: Any) -> Made:
    """The ordinary recipe's own steps: `start_of`, `choose_trainable`, `arrange` and `TokenLoss`."""
    import tempfile

    import torch

    from tensorkeep.language._memory import arrange, hold_frozen
    from tensorkeep.language._optimizer import choose_trainable
    from tensorkeep.language.job import decoder_layers
    from tensorkeep.language.losses import TokenLoss
    from tensorkeep.language.recipe_text import language_recipe
    from tensorkeep.language.start import start_of
    from tensorkeep.training.distributed import World

    compiled = device.type == "cuda"
    training = {"updates": 1, "precision": "bf16", "quantize_backbone": "nf4", "memory": way, "compile": compiled}
    recipe = language_recipe(
        {
            "version": 2,
            "model": str(folder),
            "data": {"files": "none.txt", "length": length},
            "training": training,
            "adapter": {"lora_r": 16, "lora_alpha": 32},
        }
    )
    with tempfile.TemporaryDirectory() as run:
        start = start_of(recipe, Path(run), World(device=device))
    model: Any = start.model
    choose_trainable(model, recipe)
    hold_frozen(model, "bf16")
    model.to(device)
    model.config.use_cache = False
    arrange(model, decoder_layers(model), recipe.training.memory or "least", compiled, batch * length, True)
    loss = TokenLoss(True)

    def loss_of(model: Any, ids: Any) -> Any:
        targets = float(ids.numel() - len(ids))
        return loss(model, {"input_ids": ids, "labels": torch.clone(ids)}, targets)["loss"]

    return model, loss_of


def _theirs(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def peft(folder: Path, way: str, batch: int, length: int, device: Any) -> Made:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, device_map={"": str(device)}, dtype=torch.bfloat16
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config), _theirs


def peft_liger(folder: Path, way: str, batch: int, length: int, device: Any) -> Made:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
    return peft(folder, way, batch, length, device)


def axolotl(folder: Path, way: str, batch: int, length: int, device: Any) -> Made:
    """axolotl's kernels on PEFT's model, as its loader does: the attention's class, then the layers of the model.

    `liger` has Liger's rope, norms and loss beside them, as axolotl's own plugin; SwiGLU is axolotl's in both.
    """
    if way == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=False, fused_linear_cross_entropy=True)
    patches = axolotl_patches()
    from axolotl.utils.dict import DictDefault

    kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), True)
    settings = DictDefault({"base_model": str(folder), **kernels})
    patches.patch_self_attn_lora(settings)
    model, loss_of = peft(folder, way, batch, length, device)
    return patches.apply_lora_kernel_patches(model, settings), loss_of


def axolotl_patches() -> Any:
    """`axolotl.monkeypatch.lora_kernels`, without trainers and trackers (evaluate, wandb) of a package on its way."""
    from importlib import import_module
    from types import ModuleType

    import axolotl.utils

    bare = ModuleType("axolotl.utils.callbacks")  # its models.py is wanted, its __init__ is not run
    bare.__path__ = [str(Path(folder) / "callbacks") for folder in axolotl.utils.__path__]
    sys.modules.setdefault(bare.__name__, bare)
    return import_module("axolotl.monkeypatch.lora_kernels")


def unsloth(folder: Path, way: str, batch: int, length: int, device: Any) -> Made:
    from unsloth import FastLanguageModel  # before transformers

    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=length, load_in_4bit=True)
    checkpointing = {"unsloth": "unsloth", "device": True, "none": False}[way]
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
    )
    return FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing) or model, _theirs


BUILD: dict[str, Callable[[Path, str, int, int, Any], Made]] = {
    "tensorkeep": tensorkeep,
    "unsloth": unsloth,
    "peft": peft,
    "peft-liger": peft_liger,
    "axolotl": axolotl,
}


def same_start(model: Any, device: Any) -> list[Any]:
    """Every system's A made equal by name, B zero, both float32; returns them."""
    import torch

    from benchmarks.qlora_language import seeded

    trained = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        clean = name.replace("base_model.model.", "").replace(".default.weight", "")
        with torch.no_grad():
            parameter.data = parameter.data.float()
            if "lora_A" in clean:
                parameter.copy_(seeded(clean, tuple(parameter.shape), device, 0.01))
            else:
                parameter.zero_()
        trained.append(parameter)
    return trained


def turn_of(turns: Path, name: str) -> Any:
    """Say that the first steps are over, and wait for the turn; it ends when the file is closed."""
    (turns / f"{name}.ready").touch()
    lock = (turns / "turn").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def train(
    system: str,
    way: str,
    folder: Path,
    batch: int,
    length: int,
    steps: int,
    untimed: int = 2,
    turns: Path | None = None,
) -> dict[str, Any]:
    """Load and train; the numbers of one row. The first `untimed` steps compile and are not counted."""
    if system == "unsloth":
        import unsloth  # noqa: F401  it wants to be the first
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.zeros(1, device=device)
    before = time.perf_counter()  # imports and the GPU's start are every system's
    model, loss_of = BUILD[system](folder, way, batch, length, device)
    if cuda:
        torch.cuda.synchronize()
    loaded = time.perf_counter() - before
    trained = same_start(model, device)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=cuda)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator(device).manual_seed(0)
    losses, seconds, turn = [], [], None
    for step in range(steps):
        if step == untimed and turns is not None:
            turn = turn_of(turns, f"{system}-{way}")
        if step == untimed and cuda:
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(0, vocabulary, (batch, length), device=device, generator=generator)
        before = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))  # waits for the device
        seconds.append(time.perf_counter() - before)
    if turn is not None:
        turn.close()
    return {
        "load_s": round(loaded, 2),
        "first_step_s": round(seconds[0], 2),
        "steps_s": [round(s, 3) for s in seconds],
        "tokens_per_s": round(batch * length / statistics.median(seconds[untimed:] or seconds), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "held_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3) if cuda else None,
        "losses": losses,
        "trained": sum(p.numel() for p in trained),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
    }


def versions() -> dict[str, str]:
    """The versions of what is installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--system", choices=BUILD, required=True)
    parser.add_argument("--way", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", default="4x2048")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--untimed", type=int, default=2)
    parser.add_argument("--turns", type=Path, help="a folder whose lock is waited for before steps are timed")
    given = parser.parse_args()
    faulthandler.dump_traceback_later(90)  # where a system is that does not come to its steps
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    batch, length = map(int, given.shape.split("x"))
    row: dict[str, Any] = {"system": given.system, "way": given.way, "shape": given.shape, "versions": versions()}
    try:
        shape = (batch, length, given.steps, given.untimed)
        row |= train(given.system, given.way, given.folder, *shape, given.turns)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a system raises is its result
        last = traceback.extract_tb(error.__traceback__)[-1]
        row["not_run"] = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
