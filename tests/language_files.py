"""Tiny tokenizers, texts and models for the tests of language training: a few lines teach a tokenizer 300 tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A small model learns from small texts, one token after another.",
    "What is two plus two? Two plus two is four, said the assistant.",
    "Every sample comes once an epoch, whatever the number of workers.",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# what makes a small mixture of experts of a config of Mixtral or Qwen3 MoE, beside its sizes
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# thinking belongs to what follows the last question; earlier answers are rendered without it (Qwen3, MiniMind mm3)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "Four, said the dog."}],
    [
        {"role": "system", "content": "Be small."},
        {"role": "user", "content": "Where is the fox?"},
        {"role": "assistant", "content": "Near the river."},
        {"role": "user", "content": "And the model?"},
        {"role": "assistant", "content": "It learns from texts."},
    ],
    [{"role": "user", "content": "Who jumps?"}, {"role": "assistant", "content": "The quick brown fox."}],
]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return str(tokenizer.to_str())


def tokenizer(template: str | None = CHATML) -> Any:
    """A tokenizer as MiniMind's: bos <|im_start|> (1), eos <|im_end|> (2), pad <|endoftext|> (0)."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
    )
    made.chat_template = template
    return made


def save_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    tokenizer(template).save_pretrained(folder)
    return folder


def config(kind: str = "qwen3", **fields: Any) -> dict[str, Any]:
    """A tiny config: 2 layers of width 32."""
    return {
        "model_type": kind,
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": kind != "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **fields,
    }


def model(kind: str = "qwen3", **fields: Any) -> Any:
    """Make a tiny model with weights ten times as large as they are drawn, so that its logits differ."""
    from tensorkeep.language.start import from_config

    made: Any = from_config(config(kind, **fields), seed=1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(5)
    return made


def save_model(folder: Path, kind: str = "qwen3", template: str | None = CHATML, **fields: Any) -> Path:
    """An hf folder with tokenizer."""
    model(kind, **fields).save_pretrained(folder)
    return save_tokenizer(folder, template)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def texts(path: Path, count: int = 24) -> Path:
    return write_jsonl(path, ({"text": " ".join(LINES[(i + k) % 4] for k in range(1 + i % 3))} for i in range(count)))


def conversations(path: Path, key: str = "messages", times: int = 4) -> Path:
    return write_jsonl(path, ({key: one} for one in CONVERSATIONS * times))


def preferences(path: Path, count: int = 6) -> Path:
    question = {"role": "user", "content": "Who jumps?"}
    answers = [[question, {"role": "assistant", "content": LINES[i % 4][: 20 + i]}] for i in range(2 * count)]
    return write_jsonl(path, ({"chosen": answers[2 * i], "rejected": answers[2 * i + 1]} for i in range(count)))
