"""Naming `minimind`: MiniMind's weight files, three generations that share file names.

mm2a (and v1) uses Meta's names and interleaved RoPE; mm2 has Llama's names and, with experts, shared ones that no
transformers class computes; mm3 has Qwen3's names. The generation is read off the tensors; `minimind_config` makes
the config. LoRA files (`X.lora.A.weight`) are adapters and treated as such, see `adapters`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.naming.meta_rows import rows
from tensorkeep.conversion.naming.table import Row, matcher
from tensorkeep.formats.view import StateView

NAME = "minimind"
FILE = re.compile(r"(?P<stage>.+)_(?P<hidden>\d+)(?P<moe>_moe)?(?P<resume>_resume)?\.pth\Z")
META = [
    Row("layers.{n}.feed_forward.gate", "model.layers.{n}.mlp.gate"),
    *(row for row in rows("", "output", [], rope=True) if ".moe." not in row.own),
    *(
        Row(f"layers.{{n}}.feed_forward.{own}.{w}", f"model.layers.{{n}}.mlp.{own}.{proj}")
        for own in ("experts.{e}", "shared_experts")
        for w, proj in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    ),
]
FAMILIES = {"mm2a": META}
MAKES_CONFIG = True
COMPUTED = ("freqs_cos", "freqs_sin", "pos_cis")
GENERATIONS = {"mm3": "qwen3", "mm2": "llama", "mm2a": "llama"}


_fits = matcher(META)


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of MiniMind's, of any generation."""
    return _fits(name) or hf.recognise(name)


def holds(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether names that are Meta's alone are the rule: a model of the hub may have a `norm.weight` (LayoutLMv3).

    Args:
        shapes: by clean name.
    """
    hub = {n for n in shapes if hf.recognise(n)}
    own = [n for n in shapes if n not in hub and _fits(n)]
    return not own or len(own) >= len(hub)


def table(names: Collection[str], config: Mapping[str, Any] | None) -> list[Row] | None:
    """Return Meta's rows for the oldest generation, by the names or by what the config was made as; None for others."""
    made_as = (config or {}).get("minimind_generation")
    return META if "mm2a" in (generation(names), made_as) else None


def claims(view: StateView, naming: str) -> bool:
    """Whether the file is named as MiniMind names it, `{stage}_{hidden_size}[_moe].pth`, with its tensors' size."""
    match = FILE.match(PurePosixPath(view.path).name)
    if naming not in ("hf", "torchtitan-0.2") or view.format != "pth" or not match:
        return False
    wanted = {"tok_embeddings.weight", hf.EMBEDDING}
    width = next((view[n].shape[-1] for n in view if n.endswith(tuple(wanted)) and view[n].shape), None)
    return width == int(match["hidden"])


def generation(names: Iterable[str]) -> str:
    """Tell MiniMind's generation from its names.

    Args:
        names: clean names of all tensors.

    Returns:
        "mm2a" for Meta's names, "mm3" for Llama's names with norms on q, "mm2" for those without.
    """
    names = set(names)
    if any(n.startswith("tok_embeddings.") for n in names):
        return "mm2a"
    return "mm3" if any(".self_attn.q_norm." in n for n in names) else "mm2"


def file_name(config: Mapping[str, Any] | None, names: Iterable[str], stage: str) -> str:
    """Return the name that MiniMind will look for, `{stage}_{hidden_size}{_moe}.pth`."""
    moe = any(".experts." in n for n in names)
    return f"{stage}_{(config or {}).get('hidden_size', 0)}{'_moe' if moe else ''}.pth"


def sink_name(
    to: str, config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], source: str
) -> str | None:
    """Return the file name that MiniMind looks for, the hidden size from the shapes where no config says it."""
    if to != "pth":
        return None
    embeddings = ("model.embed_tokens.weight", "tok_embeddings.weight")
    width = next((shapes[n][-1] for n in embeddings if n in shapes), 0)
    return file_name({"hidden_size": width, **(config or {})}, shapes, stage_of(source))


def stage_of(path: str) -> str:
    """Return the stage in a file's name: `full_sft` for `full_sft_512.pth`; "pretrain" where there is none."""
    match = FILE.match(PurePosixPath(path).name)
    return match["stage"] if match else "pretrain"
