"""check_loaded in a flame-style script: `python examples/check_loaded_flame.py`.

flame builds the model on meta, then `to_empty`, `post_init`, shards it, and loads a DCP checkpoint with nested keys
(`model.model...`). The three lines marked below are all that is added. Runs on one CPU process, tiny and random.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig

from tensorkeep.diagnosis.live.loaded import check_loaded
from tensorkeep.models.repair import repair_buffers

TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # large enough for positions to matter in a random model
)


def construct() -> torch.nn.Module:
    """As flame's train.py does it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(TINY)
    for module in model.modules():
        module._is_hf_initialized = False
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.post_init()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 96, (1, 24))
    with tempfile.TemporaryDirectory() as folder:
        step = Path(folder) / "checkpoint" / "step-0"
        seed = AutoModelForCausalLM.from_config(TINY).eval()
        dcp.save({"model": seed.state_dict()}, checkpoint_id=step, no_dist=True)

        model = construct()
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=step, no_dist=True)

        findings = check_loaded(model, step)  # 1: every process calls it
        if any(f.code == "B01" for f in findings):
            print("repaired:", repair_buffers(model))  # 2: RoPE's frequencies are in no checkpoint
            findings = check_loaded(model, step)
        assert not [f for f in findings if f.severity == "error"], findings  # 3: do not train on a broken load

        loss, reference = (m(ids, labels=ids).loss.item() for m in (model, seed))
        print(f"loss {loss:.6f}, reference {reference:.6f}")
        assert loss == reference


if __name__ == "__main__":
    main()
