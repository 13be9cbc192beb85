"""Say a Hugging Face tokenizer as GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

The way back from `_gguf_tokenizer`: a cut that has no name there, and merges that no scores can say, are refused,
since llama.cpp would give other ids without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats._gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE,
    UNKNOWN,
    UNUSED,
    USER,
    WHOLE_WORDS,
    merges_from_scores,
)


def vocabulary_of(documents: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Say a tokenizer as the metadata of a GGUF file.

    Args:
        documents: the tokenizer's files by name: tokenizer.json and tokenizer_config.json as data,
            chat_template.jinja as text.
        size: rows of the model's embedding; ids without a token get names of their own, `[PAD7]`.

    Returns:
        The entries `tokenizer.*`; without a tokenizer, the one that says so.

    Raises:
        TensorkeepError: C03 where llama.cpp would give other ids than this tokenizer.
    """
    document = documents.get("tokenizer.json")
    if document is None:
        if any(name in documents for name in ("tokenizer.model", "vocab.json")):
            raise _refused(
                "there is no tokenizer.json", "load and save the tokenizer with transformers, which makes one"
            )
        return {"tokenizer.ggml.model": "no_vocab"}
    model = document.get("model") if isinstance(document, Mapping) else None
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise _refused(f"the tokenizer is {str((model or {}).get('type'))[:40]!r} and not BPE")
    tokens, kinds = _tokens(document, model, size)
    if model.get("byte_fallback"):
        entries = _sentencepiece(document, model, tokens, kinds)
    else:
        entries = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(document, model)}
    entries |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])],
        **_special(document, documents.get("tokenizer_config.json") or {}, {t: i for i, t in enumerate(tokens)}),
    }
    if "tokenizer.ggml.scores" in entries:
        del entries["tokenizer.ggml.merges"]
    template = documents.get("chat_template.jinja") or (documents.get("tokenizer_config.json") or {}).get(
        "chat_template"
    )
    if isinstance(template, str):
        entries["tokenizer.chat_template"] = template
    return entries


def _tokens(document: Mapping[str, Any], model: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the token of every id and its ggml type."""
    by_id: dict[int, tuple[str, int]] = {}
    for token, i in model["vocab"].items():
        if type(i) is not int or i < 0 or i in by_id:
            raise _refused(f"the vocabulary gives {token[:40]!r} the id {i!r}")
        byte = bool(model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
        by_id[i] = (token, BYTE if byte else UNKNOWN if token == model.get("unk_token") else NORMAL)
    for added in document.get("added_tokens") or []:
        i, token = added.get("id"), added.get("content")
        if type(i) is not int or i < 0 or not isinstance(token, str) or by_id.get(i, (token, 0))[0] != token:
            raise _refused(f"the added token {str(token)[:40]!r} has the id {i!r}")
        kind = UNKNOWN if token == model.get("unk_token") else CONTROL if added.get("special") else USER
        by_id[i] = (token, kind)
    if by_id and max(by_id) >= size:
        raise _refused(f"the tokenizer has the id {max(by_id)}, the model {size} rows")
    made = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    if len({token for token, _ in made}) != size:
        raise _refused("two ids have the same token")
    return [token for token, _ in made], [kind for _, kind in made]


def _pre(document: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Name the way in which text is cut before the merges, as llama.cpp does."""
    normal = document.get("normalizer")
    if normal not in (None, {"type": "NFC"}):
        raise _refused(f"the tokenizer's normalizer {str((normal or {}).get('type'))[:40]!r} has no counterpart")
    cut, words = _plain(document.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    for name, known in PRE.items():
        if name != "default" and _plain(known) == cut and (name in WHOLE_WORDS) == words:
            return name
    raise _refused("llama.cpp's name for the way in which the tokenizer cuts text is not known here")


def _plain(part: Any) -> Any:
    """Return a pre-tokenizer without what changes no id: offsets, and steps that say nothing."""
    if isinstance(part, Mapping):
        return {k: _plain(v) for k, v in part.items() if k not in ("trim_offsets", "invert")}
    return [_plain(v) for v in part] if isinstance(part, list) else part


def _sentencepiece(
    document: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """Say merges as scores, and prove that the scores give the same merges."""
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges", [])]
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    lowest = -float(len(merges) + 1)
    scores = [-float(rank[t]) if t in rank else 0.0 if k != NORMAL else lowest for t, k in zip(tokens, kinds)]
    implied = {tuple(pair) for pair in merges_from_scores(tokens, scores, kinds)}
    if implied != {tuple(pair) for pair in merges}:
        raise _refused("the merges are not those that SentencePiece's scores would give")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _prefix(document),
    }


def _prefix(document: Mapping[str, Any]) -> bool:
    """Tell whether text gets a space ahead; refuse a normalizer that does anything but spell spaces as ▁."""
    steps: list[Mapping[str, Any]] = []
    for part in (document.get("normalizer"), document.get("pre_tokenizer")):
        if isinstance(part, Mapping):
            steps += part.get("normalizers") or part.get("pretokenizers") or [part]
    prefix = False
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == "▁":
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        elif kind != "Replace" or step.get("content") != "▁" or step.get("pattern") != {"String": " "}:
            raise _refused(f"the tokenizer's step {str(kind)[:40]!r} has no counterpart in llama.cpp")
    return prefix


def _special(document: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Name the special tokens' ids, and say which are put around a text."""
    out: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and token in ids:
            out[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    ahead, behind = _around(document)
    for name, key, found in (("bos", "bos", ahead), ("eos", "eos", behind)):
        if found is not None and ids.get(found) != out.get(f"tokenizer.ggml.{key}_token_id"):
            raise _refused(f"the tokenizer puts {found[:40]!r} around a text, and that is not its {name}_token")
        out[f"tokenizer.ggml.add_{name}_token"] = found is not None
    return out


def _around(document: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the tokens that the post-processor puts ahead of a text and behind it."""
    part = document.get("post_processor")
    parts = (part.get("processors") or [part]) if isinstance(part, Mapping) else []
    ahead = behind = None
    for step in parts:
        if step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing":
            raise _refused(f"the tokenizer's post-processor {str(step.get('type'))[:40]!r} has no counterpart")
        seen = False
        for item in step.get("single") or []:
            token = (item.get("SpecialToken") or {}).get("id")
            if "Sequence" in item:
                seen = True
            elif (behind if seen else ahead) is not None:
                raise _refused("the tokenizer puts several tokens around a text")
            elif seen:
                behind = token
            else:
                ahead = token
    return ahead, behind


def _refused(what: str, hint: str = "llama.cpp's convert_hf_to_gguf.py may know it") -> TensorkeepError:
    return TensorkeepError(f"{what}: llama.cpp would cut text into other ids", code="C03", hint=hint)
