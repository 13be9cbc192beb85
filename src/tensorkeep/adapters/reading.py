"""Read adapters: low-rank pairs by module, their scale, and what else PEFT keeps beside them.

One `Adapter` for PEFT's folder, ours (PEFT's, with the base's digest in the config) and MiniMind's file. The scale is
alpha / r, alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), each from the config or its patterns; the rank is what the
tensors say. What cannot be added into weights exactly is refused by name (`refuse_unmergeable`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import ModuleType
from typing import Any

from tensorkeep.adapters import kinds
from tensorkeep.adapters.terms import TIED
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.adapters import halves, hf_module
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.codes import Array
from tensorkeep.storage.certificate import digest_of_all

_WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|base_layer|token_adapter)(?=\.)")  # PEFT's, around a module
_COPY = re.compile(r"\.(original_module\.|token_adapter\.trainable_tokens_original|token_adapter\.token_indices)")
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?\Z")
_FOREIGN = re.compile(r"\.(lora_|vera_|oft_|boft_|ia3_|hada_|lokr_|trainable_tokens|token_adapter\.|[a-z0-9]+_lambda_)")

# how repositories of quantized weights are called
_PRECISION = re.compile(
    r"(?i)[-_.](?P<form>(unsloth-)?(bnb-)?[348]-?bits?|nf4|fp4|int[48]|w[48]a(8|16)|g?ptq|gptq(-int[48])?|awq(-int4)?|"
    r"fp8(-dynamic)?|mxfp4|nvfp4|hqq|aqlm|exl[23]|gguf)(?![a-z0-9])"
)

DIGEST = "base_digest"  # in the config: `manifest.digest_of_all` over the tensors of the base it was trained on


@dataclass
class Adapter:
    """An adapter as it is stored: its tensors' stored names, by module (hf names, without PEFT's prefix).

    Args:
        view: the checkpoint that holds it.
        document: its adapter_config.json; empty where there is none.
        pairs: module -> stored names of A and B.
        embeddings: module -> stored names of A and B over an embedding.
        magnitudes: module -> stored name of DoRA's magnitudes.
        biases: module -> stored name of B's bias (lora_bias).
        saved: clean name -> stored name of tensors that replace the base's.
        lone: stored names of halves without the other half.
        foreign: stored names that belong to another kind of adapter.
        turned: modules whose rows follow the other RoPE layout.
        parts: module -> part -> stored name, of a kind that has no field of its own here.
        called: module -> what the adapter's config calls it, where `renamed` gave it another name.
        tokens: module -> stored name of single rows that replace the base's (trainable_token_indices).
        copies: stored names of the base's own values, which PEFT keeps beside what it trained.
        kept: tensors read last, see `array`.
    """

    view: StateView
    document: dict[str, Any]
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)  # module -> stored names of A and B
    embeddings: dict[str, tuple[str, str]] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)  # DoRA
    biases: dict[str, str] = field(default_factory=dict)  # lora_bias: module -> stored name of B's bias
    saved: dict[str, str] = field(default_factory=dict)  # clean name -> stored name of whole tensors
    lone: list[str] = field(default_factory=list)  # halves without the other
    foreign: list[str] = field(default_factory=list)  # parts of another kind of adapter
    turned: set[str] = field(default_factory=set)  # modules whose rows follow the other RoPE layout
    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # of kinds other than LoRA
    called: dict[str, str] = field(default_factory=dict)  # in the config, where `renamed` changed it
    tokens: dict[str, str] = field(default_factory=dict)  # module -> stored name of rows that replace the base's
    copies: list[str] = field(default_factory=list)  # the base's own values before training
    kept: dict[str, Array] = field(default_factory=dict)  # the arrays read last, where experts share them

    @property
    def plug(self) -> ModuleType:
        """The module of its kind, see `kinds`."""
        return kinds.module(self.document)

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(r)."""
        return bool(self.document.get("use_rslora"))

    @property
    def unscaled(self) -> bool:
        """Whether these are PEFT's tensors, whose scale only PEFT's config says, without it."""
        return not self.document and any(a.startswith("base_model.model.") for a, _ in self.pairs.values())

    @property
    def residual_start(self) -> str | None:
        """The start (PiSSA, OLoRA, LoftQ, ...) that took something out of the base; None for any other adapter."""
        found: str | None = self.plug.residual_start(self) if hasattr(self.plug, "residual_start") else None
        return found

    def rank(self, module: str) -> int:
        """Return the rank of a module's pair: the rows of A; 0 where that is a number or empty."""
        return next(iter(self.view[(self.pairs.get(module) or self.embeddings[module])[0]].shape), 0)

    def scale(self, module: str, of: str | None = None, rank: int | None = None) -> float | None:
        """Return alpha / r, or alpha / sqrt(r) for rsLoRA; None for nonsense, or where PEFT's config is lost.

        Without a config it is 1 (MiniMind).

        Args:
            module: the module with the pair.
            of: the name that alpha_pattern is asked for, where that is a parameter's and not the module's.
            rank: the rank, where the pair holds several experts side by side.
        """
        rank, called = rank or self.rank(module), of or self.called.get(module, module)
        alpha: Any = pattern(self.document.get("alpha_pattern"), called) or self.document.get(
            "lora_alpha", None if self.document or self.unscaled else rank
        )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9 or not rank:
            return None
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)

    def array(self, stored: str, keep: bool = False) -> Array:
        """Read a tensor; `keep` holds it, and one more, for the next expert of the same stack."""
        if stored in self.kept:
            return self.kept[stored]
        values = self.view.array(stored)
        if keep:
            while len(self.kept) > 1:
                del self.kept[next(iter(self.kept))]
            self.kept[stored] = values
        return values

    def of_pattern(self, field: str, module: str) -> Any:
        """Return the entry of a pattern of the config that fits a module; None where none does."""
        return pattern(self.document.get(field), module)

    def said_rank(self, name: str) -> Any:
        """Return the rank that the config says for a module or parameter; None where it says none."""
        return pattern(self.document.get("rank_pattern"), name) or self.document.get("r")

    @property
    def stored(self) -> list[str]:
        """The stored names of the adapter's tensors; a model in the same file is not its own."""
        pairs = [n for pair in (*self.pairs.values(), *self.embeddings.values()) for n in pair]
        lone = [*self.magnitudes.values(), *self.biases.values(), *self.saved.values(), *self.lone]
        lone += self.tokens.values()
        return sorted([*pairs, *lone, *(n for parts in self.parts.values() for n in parts.values())])

    @property
    def kind(self) -> str:
        """The adapter's kind for people to read, with its rank where it has one."""
        return str(self.plug.spoken(self))

    def rename(self, names: Mapping[str, str]) -> None:
        """Call the weights of a live model what its files call them, in place.

        Args:
            names: live name -> the file's, of tensors (`X.weight`); those that are not in it stay, and so does a module
                whose weight the file calls otherwise.
        """
        modules = {
            n.rpartition(".")[0]: f.rpartition(".")[0]
            for n, f in names.items()
            if n.endswith(".weight") and f.endswith(".weight")
        }
        for of_modules in (self.pairs, self.embeddings, self.magnitudes, self.biases, self.parts):
            held: dict[str, Any] = dict(of_modules)
            of_modules.clear()
            of_modules.update({modules.get(n, n): v for n, v in held.items()})
            self.called |= {modules[n]: n for n in held if n in modules}
        self.saved = {names.get(n, n): v for n, v in self.saved.items()}
        self.turned = {modules.get(n, n) for n in self.turned}

    def digest(self) -> str:
        """Return the digest over the names and bytes of the adapter's own tensors."""
        return digest_of_all({name: self.view.digest(name) for name in self.stored})


def pattern(patterns: Any, module: str) -> Any:
    """Return the entry of PEFT's rank_pattern or alpha_pattern that fits a module.

    Args:
        patterns: the config's field, whatever it holds; a key is a module's name, its end, or a regular expression.
        module: the module's hf name.

    Returns:
        The value of the first key that fits; None where none does.
    """
    for key, value in patterns.items() if isinstance(patterns, Mapping) else ():
        key = key.removesuffix(".weight") if isinstance(key, str) else key  # so where PEFT adapts the parameter
        if not isinstance(key, str) or (module != key and not module.endswith(f".{key}") and not _tame(key)):
            continue
        try:
            if module == key or module.endswith(f".{key}") or re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error:
            continue
    return None


def _tame(regex: str) -> bool:
    """Whether an expression out of an untrusted config cannot keep the matcher busy: few repeats, none of a group."""
    return len(regex) <= 200 and len(re.findall(r"[*+{]", regex)) <= 3 and not re.search(r"\)[*+?{]", regex)


def read_adapter(view: StateView) -> Adapter | None:
    """Read the adapter in a checkpoint: a PEFT folder, ours, or low-rank pairs beside a model.

    Args:
        view: the opened checkpoint.

    Returns:
        The adapter; None where there is none.

    Example:
        >>> read_adapter(read("adapter")).scale("model.layers.0.self_attn.q_proj")  # doctest: +SKIP
        2.0
    """
    try:
        identity = namings.identify(view)
    except TensorkeepError:
        return None
    found = halves(identity)
    document = view.metadata.get("adapter")
    if not found and view.format != "peft":
        return None
    out = Adapter(view, document if isinstance(document, dict) else {})
    modules: dict[str, dict[str, str]] = {}
    for stored, half in found.items():
        module, turned = hf_module(half.module)
        modules.setdefault(module, {})[half.half] = stored
        out.turned |= {module} if turned else set()
    out.pairs = {m: (h["A"], h["B"]) for m, h in modules.items()}
    for stored, clean in identity.names.items():
        if stored in found:
            continue
        if view.format == "peft" and _COPY.search(clean):
            out.copies.append(stored)
        elif view.format == "peft" and (match := _TOKENS.match(clean)):
            out.tokens[match["module"]] = stored
        elif out.plug.take(out, stored, clean):
            continue
        elif view.format == "peft" and not _FOREIGN.search(f".{clean}"):
            out.saved[_WRAPPER.sub("", clean)] = stored
        elif view.format == "peft":
            out.foreign.append(stored)
    if hasattr(out.plug, "finish"):
        out.plug.finish(out)
    return out


def said_precision(document: Mapping[str, Any]) -> str | None:
    """Return the word for a quantized form in the name of an adapter's base, as PEFT's config has it; None without one.

    PEFT records no more than this name of what the adapter was trained on.

    Args:
        document: the adapter's config.

    Example:
        >>> said_precision({"base_model_name_or_path": "unsloth/Llama-3.2-1B-bnb-4bit"})
        'bnb-4bit'
    """
    named = document.get("base_model_name_or_path")
    match = _PRECISION.search(PurePath(named).name) if isinstance(named, str) and len(named) < 4096 else None
    return match["form"] if match else None


# PEFT's kinds that add tokens or layers and change no weight
_BESIDE = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA"}


def refuse_unmergeable(adapter: Adapter) -> None:
    """Stop where what the adapter does is not a sum that can be added into weights, and say why.

    Unknown fields of the config that are set to something count: an option not known here may change the sum.

    Raises:
        TensorkeepError: A01 for another kind of adapter, A02 for damaged or contradictory parts.
    """
    given, where, plug = adapter.document, adapter.view.path, adapter.plug
    unknown = {
        k for k, v in given.items() if k not in plug.FIELDS | {TIED, DIGEST} and v not in (None, False, [], {}, "", 0)
    }
    hint = "merge it with the library that trained it: PeftModel.merge_and_unload()"
    reason = None
    if kinds.word_of(given) not in kinds.ADAPTER_KINDS:
        reason = f"is a {kinds.word_of(given)} adapter"
        if kinds.word_of(given) in _BESIDE:
            hint = "no weights hold what it does: load it with PEFT beside its base"
    elif hasattr(plug, "reason") and (found := plug.reason(adapter)) is not None:
        reason, hint = found[0], found[1] or hint
    elif unknown:
        reason = f"uses {', '.join(sorted(unknown)[:4])}"
    elif adapter.foreign:
        reason = f"holds {adapter.foreign[0]}, which no {plug.NAMES[0]} has"
    if reason:
        raise TensorkeepError(f"{reason}: merge adds {kinds.known()}", where=where, code="A01", hint=hint)
    if hasattr(plug, "refuse"):
        plug.refuse(adapter)
