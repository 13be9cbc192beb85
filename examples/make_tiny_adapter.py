"""Write `examples/tiny-adapter`: a LoRA adapter for `examples/tiny-llama`, as tensorkeep writes one after training.

    python examples/make_tiny_adapter.py

Random but seeded: rank 4 on q_proj and v_proj of both layers, B drawn as if something had been learned.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tensorkeep.adapters.files import save_adapter
from tensorkeep.adapters.lora import add_lora, layers
from tensorkeep.adapters.merging import base_digests
from tensorkeep.formats.view import read

HERE = Path(__file__).parent


def main() -> None:
    base = HERE / "tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    add_lora(model, ["q_proj", "v_proj"], r=4, alpha=8)
    for layer in layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    digest = next(iter(base_digests(read(base))))
    save_adapter(model, HERE / "tiny-adapter", base_digest=digest, base="examples/tiny-llama", overwrite=True)


if __name__ == "__main__":
    main()
