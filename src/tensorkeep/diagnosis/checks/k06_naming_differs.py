"""K06 naming differs: all names fit another known naming.

What it means
    The tensors are there under the names of another program: those of torchtitan (`tok_embeddings.weight`,
    `attention.wq`), llama.cpp (`blk.0.attn_q`) or MiniMind where those of transformers are asked for, or the other
    way round.

How it happens
    A converted folder was given to the wrong loader, or a conversion stopped half-way.

How it shows
    Nothing is found by name. With torchtitan and llama.cpp the rows of q and k also lie in another order, so renaming
    alone is not enough.

What to do
    Convert it with the command below the finding: names and rows both follow.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import loaders, torchtitan
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.errors import word
from tensorkeep.findings import Finding
from tensorkeep.formats.table import read_only

CODE = "K06"


def check(case: Case) -> Iterator[Finding]:
    """Report a naming that the target does not load; a Hugging Face folder is meant for transformers."""
    if case.identity is None or case.view is None or not case.identity.naming:
        return
    found = case.identity.naming
    folder = case.view.format == "hf" and case.config is not None and "model_type" in case.config
    wanted = loaders().get(case.target or "", ["hf"] if folder else None)
    names = sorted(case.identity.names)
    if wanted is not None and found not in wanted and not read_only(case.view.format):
        message = f"all {len(names)} names are {found}'s, {case.target or 'transformers'} loads {wanted[0]}'s"
        evidence = {"naming": found, "wanted": wanted[0]}
        fix = (
            f"tensorkeep convert {word(case.path)} OUT --to {'hf' if wanted[0] == 'hf' else 'dcp'} --naming {wanted[0]}"
        )
        yield Finding(CODE, "error", message, names, evidence, explains=["K01", "K02", "K05", "O01"], fix=fix)
        return
    kind = (case.model_config or {}).get("model_type")
    if case.target == "torchtitan" and isinstance(kind, str) and kind not in torchtitan.MODEL_TYPES:
        known = ", ".join(torchtitan.MODEL_TYPES)
        message = (
            f"torchtitan has no model for {kind!r} (it has {known}); its transformers backend and flame load hf names"
        )
        yield Finding(
            CODE,
            "error",
            message,
            names,
            {"model_type": kind},
            fix=f"tensorkeep diagnose {word(case.path)} --for flame",
        )


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Reading already took the names apart; nothing is left to do."""
    out.done[CODE] = "names"
