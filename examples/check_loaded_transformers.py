"""check_loaded after transformers' own load: `python examples/check_loaded_transformers.py`.

A tiny random Llama is saved, loaded as usual (nothing to say), then loaded in the way that fails without a word: into
a model built on the meta device, whose RoPE frequencies no checkpoint fills.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


def main() -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 96, (1, 24))
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(TINY).save_pretrained(folder)

        model = LlamaForCausalLM.from_pretrained(folder).eval()
        print("from_pretrained:", check_loaded(model, folder) or "every tensor and every buffer is right")
        reference = model(ids, labels=ids).loss.item()

        # what scripts for large models do: no memory until the shards are there
        with torch.device("meta"):
            late = LlamaForCausalLM(TINY)
        late.to_empty(device="cpu").eval()
        late.load_state_dict(model.state_dict())  # strict, and content with what it did
        for name, buffer in late.named_buffers():
            buffer.fill_(0.0)  # fresh memory pages; other machines leave other values
            print(f"{name} as memory left it: {buffer[:3].tolist()}")
        print(f"loss {late(ids, labels=ids).loss.item():.6f}, reference {reference:.6f}")
        for finding in check_loaded(late, folder):
            print(finding.severity, finding.code, finding.message)
        print("repaired:", repair_buffers(late))
        print(f"loss {late(ids, labels=ids).loss.item():.6f}, reference {reference:.6f}")
        assert not check_loaded(late, folder) and late(ids, labels=ids).loss.item() == reference


if __name__ == "__main__":
    main()
