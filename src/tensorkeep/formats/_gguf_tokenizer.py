"""Make a Hugging Face tokenizer of a GGUF file's vocabulary: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

tokenizer.json is written as data, so that neither tokenizers nor transformers is needed. How text is cut before the
merges is not in the file, only a name for it (`tokenizer.ggml.pre`): for names that are not in PRE no tokenizer is
made, since a wrong cut gives other ids without a word. Formats: https://huggingface.co/docs/tokenizers, cuts:
`llm_tokenizer_bpe` in llama.cpp's llama-vocab.cpp and the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ggml's token types
_LONGEST_TOKEN, _LETTERS_OF_MERGES = 1024, 16  # Llama 2: 61,249 merges of 32,000 tokens, twice the letters
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST


def _byte_level(cut: bool) -> dict[str, Any]:
    """Describe the step that spells bytes as letters; with `cut` it also cuts the text as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut}


def _split(regex: str) -> dict[str, Any]:
    """Describe the step that cuts text by a regular expression and then spells bytes as letters."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]}
# name in the file -> how text is cut
PRE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("gpt-2", "gpt2", "olmo", "default"), _byte_level(True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _split(_QWEN2)),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # words that are in the vocabulary are not taken apart


def tokenizer_files(metadata: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
    """Make the tokenizer's files from a GGUF file's metadata.

    Args:
        metadata: the metadata of the file's header.

    Returns:
        tokenizer.json, tokenizer_config.json and special_tokens_map.json by name, each as a document; and a remark
        about what had to be assumed, empty where nothing was.

    Raises:
        TensorkeepError: the file holds no tokenizer, or one that cannot be carried over faithfully.

    Example:
        >>> sorted(tokenizer_files(view.metadata["gguf"])[0])            # doctest: +SKIP
        ['special_tokens_map.json', 'tokenizer.json', 'tokenizer_config.json']
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    tokens = _strings(metadata, "tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise TensorkeepError(f"{len(tokens) - len(vocabulary)} tokens occur twice in the vocabulary")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        kinds = [NORMAL] * len(tokens)
    remark = ""
    if model == "gpt2" and isinstance(pre, str) and pre in PRE:
        document = _byte_level_bpe(metadata, vocabulary, pre)
        if pre == "default":
            remark = (
                "the file does not say how its tokenizer cuts text before the merges: GPT-2's way was assumed, "
                "check it against the original"
            )
    elif model == "llama":
        document = _sentencepiece(metadata, tokens, vocabulary, kinds)
    else:
        raise TensorkeepError(f"model {str(model)[:40]!r} with pre-tokenizer {str(pre)[:40]!r} is not known")
    special = _special(metadata, tokens)
    document["added_tokens"] = [
        _added(i, tokens[i], kind) for i, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL, USER)
    ]
    document["post_processor"] = _post_processor(metadata, str(pre), special, vocabulary)
    return {
        "tokenizer.json": {key: document[key] for key in _ORDER},
        "tokenizer_config.json": _config(metadata, special, document["added_tokens"]),
        "special_tokens_map.json": special,
    }, remark


# keys of tokenizer.json in the order in which the tokenizers library writes them
_ORDER = [
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
]


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of strings of the tokenizer's metadata; it must be there and proper text."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise TensorkeepError(f"the file has no tokenizer.ggml.{key}")
    if any("\ud800" <= c <= "\udfff" for v in values if not v.isascii() for c in v):
        raise TensorkeepError(f"tokenizer.ggml.{key} is not UTF-8 throughout")
    return values


def _document(model: dict[str, Any], normalizer: Any, pre_tokenizer: Any, decoder: Any) -> dict[str, Any]:
    """Put the parts of tokenizer.json together."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
        },
    }


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: dict[str, int], pre: str) -> dict[str, Any]:
    """Make tokenizer.json's content for a vocabulary of bytes spelled as letters, as GPT-2's."""
    merges = _strings(metadata, "merges")
    pairs = (merge.split(" ") for merge in merges)
    odd = next((p for p in pairs if len(p) != 2 or any(part not in vocabulary for part in (*p, "".join(p)))), None)
    if odd is not None:
        raise TensorkeepError(f"the merge {' '.join(odd)[:40]!r} does not fit the vocabulary")
    normalizer = {"type": "NFC"} if pre in ("qwen2", "deepseek-r1-qwen") else None
    model = {"vocab": vocabulary, "merges": merges, "ignore_merges": pre in WHOLE_WORDS}
    return _document(model, normalizer, PRE[pre], _byte_level(True))


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], vocabulary: dict[str, int], kinds: Sequence[int]
) -> dict[str, Any]:
    """Make tokenizer.json's content for a vocabulary with ▁ for a space; unknown characters become byte tokens."""
    scores = metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(s, int | float) for s in scores)
    ):
        raise TensorkeepError("the file has no tokenizer.ggml.scores for its tokens")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    unknown = next((t for t, kind in zip(tokens, kinds) if kind == UNKNOWN), None)
    to_piece = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_text = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    ahead = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {
        "vocab": vocabulary,
        "merges": merges_from_scores(tokens, scores, kinds),
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    decoder = {"type": "Sequence", "decoders": [to_text, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    return _document(model, {"type": "Sequence", "normalizers": [*ahead, to_piece]}, None, decoder)


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[list[str]]:
    """Derive the merges that SentencePiece's scores imply: every way to make a piece of two, best score first.

    >>> merges_from_scores(["a", "b", "ab"], [0, -1, -2], [1, 1, 1])
    [['a', 'b']]
    """
    rank = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind in (NORMAL, USER, UNUSED)}
    longest = max((len(t) for t in rank), default=0)
    if longest > _LONGEST_TOKEN:
        raise TensorkeepError(f"a token of {longest} characters")
    letters = sum(len(t) for t in rank)
    most = _LETTERS_OF_MERGES * letters + (1 << 20)
    found = []
    for piece, i in rank.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in rank and right in rank:
                found.append((-scores[i], i, rank[left], rank[right]))
                most -= len(piece)
                if most < 0:  # tokens that begin or end with each other: the merges outgrow the file without bound
                    raise TensorkeepError(
                        f"its {letters} letters of tokens make more than {_LETTERS_OF_MERGES} times as many of merges"
                    )
    found.sort()
    return [[tokens[left], tokens[right]] for _, _, left, right in found]


def _special(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """Name the special tokens: {"bos_token": "<s>", ...}."""
    out = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(value) is int and 0 <= value < len(tokens):
            out[f"{name}_token"] = tokens[value]
    return out


def _added(i: int, token: str, kind: int) -> dict[str, Any]:
    """Make an entry of tokenizer.json's added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": kind != USER}
    return {"id": i, "content": token, **flags}


def _post_processor(
    metadata: Mapping[str, Any], pre: str, special: Mapping[str, str], vocabulary: Mapping[str, int]
) -> dict[str, Any] | None:
    """Describe what is put around the ids; without a flag llama.cpp adds bos for SentencePiece and Llama 3."""
    by_default = metadata.get("tokenizer.ggml.model") == "llama" or pre in WHOLE_WORDS
    ahead = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", by_default) is True else None
    behind = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token") is True else None
    if ahead is None and behind is None:
        return None

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = [{"SpecialToken": {"id": ahead, "type_id": kind}}] if ahead else []
        items.append({"Sequence": {"id": name, "type_id": kind}})
        return [*items, {"SpecialToken": {"id": behind, "type_id": kind}}] if behind else items

    used = {t: {"id": t, "ids": [vocabulary[t]], "tokens": [t]} for t in (ahead, behind) if t}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": used,
    }


def _config(
    metadata: Mapping[str, Any], special: Mapping[str, str], added: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Make tokenizer_config.json."""
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    template = metadata.get("tokenizer.chat_template")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # both transformers 4 and 5 know it
        **special,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
    }
    if type(length) is int:
        config["model_max_length"] = length
    if isinstance(template, str) and not any("\ud800" <= c <= "\udfff" for c in template):
        config["chat_template"] = template
    return config
