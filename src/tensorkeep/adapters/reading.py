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
from typing import Any

import numpy as np

from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.adapters import halves, hf_module
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.formats.view import StateView
from tensorkeep.storage.certificate import digest_of_all

_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])(\.default)?\Z")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?\Z")
_LONE = re.compile(r"(?P<module>.+)\.lora[._](?P<half>[AB])(\.default)?\.weight\Z")
_BIAS = re.compile(r"(?P<module>.+)\.lora_B(\.default)?\.bias\Z")
_SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save|\.base_layer)?(\.default)?\.(?P<last>weight|bias)\Z")
_FOREIGN = re.compile(r"\.(lora_|vera_|oft_|boft_|ia3_|hada_|lokr_|trainable_tokens|token_adapter\.|[a-z0-9]+_lambda_)")

DIGEST = "base_digest"  # in the config: `manifest.digest_of_all` over the tensors of the base it was trained on
TIED = "ensure_weight_tying"
# fields of a LoRA config that change nothing about what is added to which weight, or that are read here
_KNOWN = frozenset([TIED, DIGEST]) | frozenset(
    """
    alpha_pattern arrow_config auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_bias
    lora_dropout megatron_config megatron_core modules_to_save peft_type peft_version qalora_group_size r
    rank_pattern revision target_modules task_type use_dora use_rslora runtime_config eva_config corda_config
    lora_ga_config velora_config kind quantization modules_to_tie target_modules_to_tie enable_lora
    target_parameters trainable_token_indices merge_weights
    """.split()
)
# starts that take something out of the base: the adapter fits only the rest, which is not what a checkpoint holds
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


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

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(r)."""
        return bool(self.document.get("use_rslora"))

    def rank(self, module: str) -> int:
        """Return the rank of a module's pair: the rows of A."""
        return self.view[(self.pairs.get(module) or self.embeddings[module])[0]].shape[0]

    def scale(self, module: str) -> float | None:
        """Return alpha / r, or alpha / sqrt(r) for rsLoRA; 1 without a config (MiniMind), None for nonsense."""
        alpha: Any = pattern(self.document.get("alpha_pattern"), module) or self.document.get(
            "lora_alpha", None if self.document else self.rank(module)
        )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            return None
        return float(alpha) / (math.sqrt(self.rank(module)) if self.rslora else self.rank(module))

    @property
    def stored(self) -> list[str]:
        """The stored names of the adapter's tensors; a model in the same file is not its own."""
        both = [n for pair in (*self.pairs.values(), *self.embeddings.values()) for n in pair]
        return sorted([*both, *self.magnitudes.values(), *self.biases.values(), *self.saved.values(), *self.lone])

    @property
    def kind(self) -> str:
        """The adapter's kind for people to read: LoRA, rsLoRA or DoRA, with its rank."""
        ranks = sorted({self.rank(m) for m in (*self.pairs, *self.embeddings)})
        name = ("rs" if self.rslora else "") + ("DoRA" if self.magnitudes else "LoRA")
        return f"{name} r {ranks[0]}" if len(ranks) == 1 else f"{name} r {ranks[0]}..{ranks[-1]}" if ranks else name

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
    embeddings: dict[str, dict[str, str]] = {}
    for stored, clean in identity.names.items():
        if stored in found:
            continue
        if match := _EMBEDDING.match(clean):
            embeddings.setdefault(match["module"], {})[match["half"]] = stored
        elif match := _MAGNITUDE.match(clean):
            out.magnitudes[match["module"]] = stored
        elif match := _BIAS.match(clean):
            out.biases[match["module"]] = stored
        elif _LONE.match(clean):
            out.lone.append(stored)
        elif view.format == "peft" and _FOREIGN.search(f".{clean}"):
            out.foreign.append(stored)
        elif view.format == "peft" and (match := _SAVED.match(clean)):
            out.saved[f"{match['module']}.{match['last']}"] = stored
        elif view.format == "peft":
            out.foreign.append(stored)
    for module, both in embeddings.items():
        if len(both) == 2:
            out.embeddings[module] = (both["A"], both["B"])
        else:
            out.lone += both.values()
    return out


def refuse_unmergeable(adapter: Adapter) -> None:
    """Stop where what the adapter does is not a sum that can be added into weights, and say why.

    Unknown fields of the config that are set to something count: an option not known here may change the sum.

    Raises:
        TensorkeepError: A01 for another kind of adapter, A02 for damaged or contradictory pairs.
    """
    given, where = adapter.document, adapter.view.path
    kind = str(given.get("peft_type", "LORA")).upper()
    unknown = {k: v for k, v in given.items() if k not in _KNOWN and v not in (None, False, [], {}, "", 0)}
    start = str(given.get("init_lora_weights")).lower()
    reason = None
    if kind != "LORA":
        reason = f"is a {kind} adapter"
    elif start.startswith(_RESIDUAL) or given.get("loftq_config"):
        reason = f"was started by {'loftq' if given.get('loftq_config') else start}, which changes the base too"
    elif given.get("trainable_token_indices") is not None:
        reason = "trains single rows of an embedding (trainable_token_indices)"
    elif given.get("target_parameters"):
        reason = "targets bare parameters (target_parameters)"
    elif given.get("arrow_config"):
        reason = "chooses between experts at run time (arrow_config)"
    elif unknown:
        reason = f"uses {', '.join(sorted(unknown)[:4])}"
    elif adapter.foreign:
        reason = f"holds {adapter.foreign[0]}, which no LoRA has"
    if reason:
        hint = "merge it with the library that trained it: PeftModel.merge_and_unload()"
        if start.startswith(_RESIDUAL):
            hint = (
                "convert it to a plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        raise TensorkeepError(f"{reason}: merge adds LoRA, rsLoRA and DoRA", where=where, code="A01", hint=hint)
    _refuse_damaged_pairs(adapter)


def _refuse_damaged_pairs(adapter: Adapter) -> None:
    """Stop (A02) where pairs lack a half, a common rank or a scale, or their config says otherwise than the tensors."""
    where = adapter.view.path
    if adapter.lone:
        raise TensorkeepError(
            f"{len(adapter.lone)} halves of low-rank pairs lack the other half, first {adapter.lone[0]}",
            where=where,
            code="A02",
            tensors=adapter.lone,
            hint="get the adapter again: it was saved in part",
        )
    for module, (a, b) in {**adapter.pairs, **adapter.embeddings}.items():
        first, second = adapter.view[a].shape, adapter.view[b].shape
        if len(first) < 2 or len(second) < 2 or first[0] != second[1]:
            raise TensorkeepError(
                f"{module}: A {list(first)} and B {list(second)} have no rank in common",
                where=where,
                code="A02",
                hint="get the adapter again; its tensors are not of one training",
            )
        said = pattern(adapter.document.get("rank_pattern"), module) or adapter.document.get("r", first[0])
        if said != first[0]:
            raise TensorkeepError(
                f"{module} has rank {first[0]}, the config says {shown(said)}",
                where=where,
                code="A02",
                hint="take the config that was saved with these weights: the scale depends on it",
            )
        if not adapter.scale(module):
            raise TensorkeepError(
                f"{module} is scaled by nothing: lora_alpha {shown(adapter.document.get('lora_alpha'))}",
                where=where,
                code="A02",
                hint="take the config that was saved with these weights",
            )
    if adapter.document.get("use_dora") and not adapter.magnitudes:
        raise TensorkeepError(
            "the config says use_dora, and no magnitude is there", where=where, code="A02", hint="get the adapter again"
        )
    absent = sorted(set(adapter.magnitudes) - set(adapter.pairs) - set(adapter.embeddings))
    if absent or (adapter.magnitudes and not adapter.document.get("use_dora", True)):
        raise TensorkeepError(
            f"DoRA magnitudes {'without a pair: ' + absent[0] if absent else 'beside use_dora: false'}",
            where=where,
            code="A02",
            hint="take the config that was saved with these weights",
        )


# -- whether a weight holds an update already -----------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How much of one module's update its weight already holds, measured on the values.

    Args:
        module: the module's hf name.
        coefficient: of the update in the weight: 0 not merged, 1 merged once.
        noise: standard deviation of that figure.
        relative: |update| / |weight|.
    """

    module: str
    coefficient: float
    noise: float
    relative: float


def times_merged(shares: list[Share]) -> tuple[int | None, dict[str, Any]]:
    """Tell how often an adapter was merged into a base already.

    A module's agreement is judged by its noise; pooling over modules weighs them by the size of their update.

    Args:
        shares: one for each adapted module.

    Returns:
        0, 1 or 2, None where it cannot be told; and the figures behind it.
    """
    if not shares:
        return None, {}
    weights = np.array([1 / s.noise**2 for s in shares])
    values = np.array([s.coefficient for s in shares])
    pooled, noise = float((values * weights).sum() / weights.sum()), float(1 / np.sqrt(weights.sum()))
    figures = {
        "coefficient": round(pooled, 4),
        "noise": round(noise, 4),
        "modules": len(shares),
        "update_relative_to_weight": round(float(np.median([s.relative for s in shares])), 5),
    }
    for times in (0, 1, 2):
        agree = np.mean([abs(s.coefficient - times) < 0.15 + 4 * s.noise for s in shares])
        if noise < 0.1 and abs(pooled - times) < 0.1 + 3 * noise and agree >= 0.9:
            return times, figures
    return None, figures
