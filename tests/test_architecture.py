"""The table of architectures beside what transformers itself builds."""

from __future__ import annotations

import pytest

from tensorkeep.conversion.architecture import FAMILIES, expected

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_names_and_shapes_are_what_transformers_builds(kind: str, biased: bool) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch

    options = {**SIZES, "attention_bias": biased, "mlp_bias": biased, "tie_word_embeddings": biased}
    config = transformers.AutoConfig.for_model(kind, **options)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    built = {n: tuple(t.shape) for n, t in model.state_dict().items() if not (biased and n == "lm_head.weight")}
    ours = expected({**config.to_dict(), "model_type": kind})
    assert ours is not None
    if any(".experts." in n for n in ours):
        # transformers 5 holds experts fused and writes them one by one
        built = {n: s for n, s in built.items() if ".mlp." not in n and "sparse_moe" not in n}
        ours = {n: s for n, s in ours.items() if ".mlp." not in n and "sparse_moe" not in n}
    assert ours == built


def test_an_unknown_or_hostile_config_gives_nothing() -> None:
    assert expected(None) is None
    assert expected({"model_type": "nobody"}) is None
    assert expected({"model_type": "llama", "hidden_size": "64"}) is None
    assert expected({"model_type": "llama", **SIZES, "num_hidden_layers": 10**9}) is None
    assert expected({"model_type": "llama", **SIZES, "num_attention_heads": 0}) is None
