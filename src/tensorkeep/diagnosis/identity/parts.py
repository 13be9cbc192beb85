"""The canonical form of what lies beside the weights: config, tokenizer, chat template, generation, processor.

Each is canonical JSON, so that spacing, order and the release of transformers that wrote it make no difference. What
does not count is listed here and in docs/reference/identity.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion
from tensorkeep.storage.canonical_json import canonical
from tensorkeep.storage.certificate import parse_json

# who wrote a config and where it lay; the dtype is each tensor's own
NOT_COUNTED = (
    "transformers_version _name_or_path _commit_hash torch_dtype dtype _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal"
).split()
# an attention of this name comes with transformers; any other is code from elsewhere, and counts
_OWN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# null here is no attention window, no cap, no low rank, where several models have one by default: it is not left out
NULL_COUNTS = (
    "sliding_window sliding_window_pattern attention_chunk_size attn_logit_softcapping final_logit_softcapping "
    "logits_soft_cap q_lora_rank n_group topk_group"
).split()
_NOT_OF_TOKENIZER = ("chat_template", "name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local")
_NOT_OF_GENERATION = ("transformers_version", "_from_model_config")
_NOT_OF_ADAPTER = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")
_TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model"
).split()
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
KINDS = ("config", "adapter", "tokenizer", "chat_template", "generation", "processor", "code")
FILES = {  # file -> the part that it belongs to
    "config.json": "config",
    "adapter_config.json": "adapter",
    "generation_config.json": "generation",
    "chat_template.jinja": "chat_template",
    "chat_template.json": "chat_template",
    **dict.fromkeys(_TOKENIZER, "tokenizer"),
    **dict.fromkeys(_PROCESSOR, "processor"),
}


def part_of(name: str) -> str | None:
    """Return the part that a file beside the weights belongs to; Python files are the code that a config may call.

    Args:
        name: of the file.

    >>> part_of("config.json"), part_of("modeling_x.py"), part_of("README.md")
    ('config', 'code', None)
    """
    return "code" if name.endswith(".py") else FILES.get(name)


def canonical_parts(
    companions: Sequence[Companion], code: Mapping[str, str] = MappingProxyType({})
) -> dict[str, bytes]:
    """Return the canonical bytes of each part that the files beside the weights make up.

    Args:
        companions: the small files beside the weights.
        code: SHA-256 of each Python file beside them, in hex.

    Returns:
        Bytes by kind, a key of KINDS; kinds of which no file is there are left out.

    Raises:
        TensorkeepError: F07 where a file is no JSON, or holds what JSON does not.
    """
    files = {c.name: c for c in companions if c.name in FILES}
    found: dict[str, Any] = {}
    for name, kind in (("config.json", "config"), ("generation_config.json", "generation")):
        if name in files:
            found[kind] = counted(_object(files[name]), _NOT_OF_GENERATION if kind == "generation" else ())
    if "adapter_config.json" in files:
        found["adapter"] = _without(_object(files["adapter_config.json"]), _NOT_OF_ADAPTER)
    tokenizer = {n: _of_tokenizer(files[n]) for n in _TOKENIZER if n in files}
    if tokenizer:
        found["tokenizer"] = tokenizer
    if template := _templates(files):
        found["chat_template"] = template
    processor = {n: _without(_object(files[n]), NOT_COUNTED) for n in _PROCESSOR if n in files}
    if processor:
        found["processor"] = processor
    if code:
        found["code"] = {name: {"sha256": sha256} for name, sha256 in code.items()}
    return {kind: _spelled(found[kind], kind) for kind in KINDS if kind in found}


def counted(config: Mapping[str, Any], also: Sequence[str] = ()) -> dict[str, Any]:
    """Return what counts of a config: few nulls, nothing of who wrote it, RoPE spelled as transformers 5 does.

    Args:
        config: as config.json has it.
        also: members that do not count either.

    Example:
        >>> counted({"rope_theta": 1e4, "rope_scaling": None, "transformers_version": "4.51.0"})
        {'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0}}
    """
    kept = {k: v for k, v in config.items() if (v is not None or k in NULL_COUNTS) and k not in also}
    kept = {k: v for k, v in kept.items() if k not in NOT_COUNTED or _from_elsewhere(k, v)}
    kept = {k: counted(v) if k.endswith("_config") and isinstance(v, Mapping) else v for k, v in kept.items()}
    return _rope(kept)


def _from_elsewhere(name: str, value: Any) -> bool:
    """Say whether a config's member asks for an attention that does not come with transformers."""
    given = list(value.values()) if isinstance(value, Mapping) else [value]
    return name.startswith("_attn_implementation") and any(
        not isinstance(one, bool) and one is not None and one not in _OWN_ATTENTION for one in given
    )


def without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what versions before 0.3 counted of a config: no null at all.

    Args:
        config: from `counted`.
    """
    kept = {k: v for k, v in config.items() if v is not None}
    return {k: without_nulls(v) if k.endswith("_config") and isinstance(v, Mapping) else v for k, v in kept.items()}


def not_counted(name: str) -> tuple[str, ...]:
    """Return the members of a file that do not count, for people.

    Args:
        name: of the file.
    """
    found = {"adapter_config.json": _NOT_OF_ADAPTER, "tokenizer_config.json": _NOT_OF_TOKENIZER[1:]}
    return tuple(found.get(name, NOT_COUNTED[:6] if name.endswith("config.json") else ()))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with RoPE in `rope_parameters`; one that says it twice and differently stays as it is."""
    scaling = config.get("rope_scaling", {})
    if not isinstance(scaling, Mapping) or not ({"rope_theta", "rope_scaling"} & set(config)):
        return config
    old = {k: config[k] for k in ("rope_theta",) if k in config} | dict(scaling)
    kind = old.pop("type", None)
    old.setdefault("rope_type", kind or "default")
    if kind not in (None, old["rope_type"]):
        return config
    new = config.get("rope_parameters")
    if isinstance(new, Mapping) and any(new.get(k) != v for k, v in old.items()):
        return config
    made = dict(new) if isinstance(new, Mapping) else {"rope_type": old.pop("rope_type"), **old}
    rest = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    return rest | {"rope_parameters": made}


def _of_tokenizer(companion: Companion) -> Any:
    if not companion.name.endswith(".json"):
        return {"sha256": hashlib.sha256(companion.data).hexdigest()}
    document = _read(companion)
    if companion.name == "tokenizer_config.json" and isinstance(document, dict):
        return {k: v for k, v in _without(document, _NOT_OF_TOKENIZER).items() if v is not None}
    return document


def _templates(files: Mapping[str, Companion]) -> dict[str, Any]:
    """Return the chat templates by name, wherever they stand; one that an older file has otherwise stays beside."""
    found: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        document = _read(files[name]) if name in files else None
        given = document.get("chat_template") if isinstance(document, dict) else None
        if isinstance(given, list):
            named = {e["name"]: e["template"] for e in given if isinstance(e, dict) and {"name", "template"} <= set(e)}
            given = named if len(named) == len(given) else {"default": given}
        elif given is not None:
            given = {"default": given}
        found = {**found, **(given or {})}
    if "chat_template.jinja" in files:
        text = _text(files["chat_template.jinja"])
        older = found.get("default")
        found["default"] = text
        if older not in (None, text):
            found["default of older files"] = older
    return found


def _text(companion: Companion) -> str:
    try:
        return companion.data.decode("utf-8")
    except UnicodeDecodeError:
        raise TensorkeepError("is no UTF-8 text", where=companion.where, code="F07") from None


def _object(companion: Companion) -> dict[str, Any]:
    document = _read(companion)
    if not isinstance(document, dict):
        raise TensorkeepError("is no JSON object", where=companion.where, code="F07")
    return document


def _read(companion: Companion) -> Any:
    try:
        return parse_json(companion.data, companion.where)
    except TensorkeepError as error:
        raise TensorkeepError(error.what, where=error.where, hint=error.hint, code=error.code or "F07") from None


def _without(document: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {k: v for k, v in document.items() if k not in names}


def _spelled(value: Any, kind: str) -> bytes:
    try:
        return canonical(value)
    except (ValueError, TypeError) as error:
        raise TensorkeepError(f"the {kind} has no canonical form: {error}", code="F07") from None
