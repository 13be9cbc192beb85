"""K06 naming differs: all names fit another known naming.

What it is: the tensors are there under the names of another program: torchtitan's `tok_embeddings.weight` and
`attention.wq`, llama.cpp's `blk.0.attn_q`, MiniMind's, where transformers' are asked for, or the other way round.
How it happens: a converted folder was given to the wrong loader; the conversion stopped half-way.
How it shows: nothing is found by name. In torchtitan's and llama.cpp's layout the rows of q and k lie in another order
as well, so renaming alone is not enough.
What to do: convert (the fix below): names and rows both follow.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import torchtitan
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "K06"
OWN = {"hf": ("hf",), "flame": ("hf",), "torchtitan": ("torchtitan", "torchtitan-0.2", "hf")}


def check(case: Case) -> Iterator[Finding]:
    """The naming beside the one that the target loads; a Hugging Face folder is meant for transformers."""
    if case.identity is None or case.view is None or not case.identity.naming:
        return
    found = case.identity.naming
    folder = case.view.format == "hf" and case.config is not None and "model_type" in case.config
    wanted = OWN.get(case.target or "", ("hf",) if folder else None)
    names = sorted(case.identity.names)
    if wanted is not None and found not in wanted and case.view.format != "gguf":
        yield Finding(
            CODE,
            "error",
            f"all {len(names)} names are {found}'s, {case.target or 'transformers'} loads {wanted[0]}'s",
            names,
            {"naming": found, "wanted": wanted[0]},
            explains=["K01", "K02", "K05", "O01"],
            fix=f"tensorkeep convert {case.path} OUT --to {'hf' if wanted[0] == 'hf' else 'dcp'} --naming {wanted[0]}",
        )
        return
    kind = (case.model_config or {}).get("model_type")
    if case.target == "torchtitan" and isinstance(kind, str) and kind not in torchtitan.MODEL_TYPES:
        known = ", ".join(torchtitan.MODEL_TYPES)
        yield Finding(
            CODE,
            "error",
            f"torchtitan has no model for {kind!r} (it has {known}); its transformers backend and flame load hf names",
            names,
            {"model_type": kind},
            fix=f"tensorkeep diagnose {case.path} --for flame",
        )
