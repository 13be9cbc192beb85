"""Tokenizers made from GGUF vocabularies, against plain implementations of what llama.cpp and SentencePiece do."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats._gguf_tokenizer import merges_from_scores, tokenizer_files

pytest.importorskip("transformers")

TEXTS = (
    "Hello  world",
    "  two\n\n\tthree   ",
    "12345 67,8 9",
    "naïve café 你好 🎉 \u200dx",
    "don't WE'LL it's",
    "a\r\n\r\nb",
    "",
    " ",
    "x=1;y=22 333  4444",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<s>abc</s>",
)


def byte_vocabulary(merges: list[str]) -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*bytes_to_unicode().values(), *("".join(m.split(" ")) for m in merges)]


def gpt2_metadata(pre: str) -> dict[str, Any]:
    merges = ["Ġ w", "Ġ Ġ", "o r", "Ġw or", "l d", "h e", "1 2", "3 3", "' s", "i t", "it 's"]
    tokens = [*byte_vocabulary(merges), "<|im_start|>", "<|im_end|>", "<think>"]
    kinds = [1] * (len(tokens) - 3) + [3, 3, 4]
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


def loaded(metadata: dict[str, Any], folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    for name, document in tokenizer_files(metadata)[0].items():
        (folder / name).write_text(json.dumps(document))
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_byte_level_tokenizers_cut_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    """Against a plain BPE over the cuts of llama.cpp's expressions, written out here with the regex package."""
    regex = pytest.importorskip("regex")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    modern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + ("{1,3}" if pre == "llama-bpe" else "") + rest
    )
    metadata = gpt2_metadata(pre)
    ours = loaded(metadata, tmp_path)
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spell = bytes_to_unicode()
    ahead = [metadata["tokenizer.ggml.bos_token_id"]] if pre == "llama-bpe" else []
    for text in TEXTS[:9]:
        chunks = [text]
        if pre == "smollm":
            chunks = [c for c in regex.split(r"(\p{N})", text) if c]
        cuts = [c for chunk in chunks for c in regex.findall(modern if pre in ("llama-bpe", "qwen2") else gpt2, chunk)]
        assert "".join(cuts) == text
        wanted: list[str] = []
        for cut in cuts:
            parts = [spell[b] for b in cut.encode()]
            while ranked := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
                _, i = min(ranked)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            wanted += parts
        found = ours(text)["input_ids"]
        assert found[: len(ahead)] == ahead and ours.convert_ids_to_tokens(found[len(ahead) :]) == wanted, text
        assert ours.decode(found[len(ahead) :]) == text


def test_special_and_added_tokens(tmp_path: Path) -> None:
    metadata = {
        **gpt2_metadata("smollm"),
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    ours = loaded(metadata, tmp_path)
    assert ours.tokenize("<|im_start|>it's<think>x<|im_end|>") == [
        "<|im_start|>",
        "it",
        "'s",
        "<think>",
        "x",
        "<|im_end|>",
    ]
    assert (ours.bos_token, ours.eos_token, ours.model_max_length) == ("<|im_start|>", "<|im_end|>", 128)
    assert set(ours.all_special_tokens) == {"<|im_start|>", "<|im_end|>"}
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert len(ours) == len(metadata["tokenizer.ggml.tokens"])


def sentencepiece_metadata() -> dict[str, Any]:
    pieces = [
        "▁",
        "a",
        "b",
        "c",
        "l",
        "o",
        "e",
        "h",
        "▁a",
        "ab",
        "he",
        "ll",
        "hell",
        "▁hell",
        "▁hello",
        "abc",
        "▁ab",
        "▁▁",
        "oo",
        "lo",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [float(-i) for i in range(len(pieces))]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece_by_hand(text: str, metadata: dict[str, Any]) -> list[str]:
    """SentencePiece's BPE: join the adjacent pair whose piece scores best, leftmost first; bytes for what is left."""
    score = {
        t: s
        for t, s, k in zip(*(metadata[f"tokenizer.ggml.{n}"] for n in ("tokens", "scores", "token_type")))
        if k == 1
    }
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while joins := [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]:
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [t for p in parts for t in ([p] if p in score else [f"<0x{b:02X}>" for b in p.encode()])]


def test_sentencepiece(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    ours, rng = loaded(metadata, tmp_path), random.Random(0)
    texts = [*TEXTS[:9], *("".join(rng.choice("abclohe é ") for _ in range(30)) for _ in range(200))]
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids[0] == 1 and ours.convert_ids_to_tokens(ids[1:]) == sentencepiece_by_hand(text, metadata), text
        assert ours.decode(ids[1:]) == text
    assert merges_from_scores(["a", "b", "ab", "</s>"], [0, -1, -2, -3], [1, 1, 1, 3]) == [["a", "b"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.pre": "unheard-of"}, "unheard-of"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "twice"),
        ({"tokenizer.ggml.tokens": 3}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "does not fit"),
        ({"tokenizer.ggml.merges": ["Q Q"]}, "does not fit"),
        ({"tokenizer.ggml.tokens": ["\udc80"]}, "not UTF-8"),
    ],
)
def test_a_tokenizer_that_cannot_be_carried_says_why(change: dict[str, Any], says: str) -> None:
    with pytest.raises(TensorkeepError, match=says):
        tokenizer_files({**gpt2_metadata("smollm"), **change})


def test_assumed_pre_tokenizer_is_said() -> None:
    assert "assumed" in tokenizer_files(gpt2_metadata("default"))[1] and not tokenizer_files(gpt2_metadata("qwen2"))[1]
