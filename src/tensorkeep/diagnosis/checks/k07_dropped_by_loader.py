"""K07 dropped by the loader: the file holds tensors that the target's loader never asks for.

What it means
    torchtitan asks a file only for what its own model has. Attention biases, norms of q and k in a llama, or a head
    of its own under a config that ties it to the embedding are in the file and are never read.

How it happens
    The architecture in the file is richer than the program's model of that name.

How it shows
    No error. On tiny models logits are off by 0.86 (lost biases) or 4.6 (lost head).

What to do
    Train with a program that has these tensors (flame, torchtitan's transformers backend), or drop them on purpose,
    by name, when you convert.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import hf, torchtitan
from tensorkeep.diagnosis.evidence.adapters import adapter_and_base
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import same_tensor
from tensorkeep.findings import Finding

CODE = "K07"
NEEDS = "a program that has these tensors, or your --drop"


def check(case: Case) -> Iterator[Finding]:
    """Report tensors for which torchtitan's models have no place, in its own files and in those meant for it."""
    yield from case.from_reading(CODE)
    yield from _by_peft(case)
    own = case.identity is not None and case.identity.naming in ("torchtitan", "torchtitan-0.2")
    if not case.tensors or not (case.target == "torchtitan" or (own and case.target is None)):
        return
    kind = (case.model_config or {}).get("model_type")
    family = torchtitan.MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    lost = [n for n in case.tensors if family is not None and torchtitan.dropped_by_loader(n, family)]
    if family == "llama3":
        lost += [n for n in case.tensors if n.endswith(("q_norm.weight", "k_norm.weight"))]
    if lost:
        message = f"torchtitan's {family} has no place for {len(lost)} tensors and would not ask for them"
        yield Finding(CODE, "error", message, lost, {"family": family})
    both = hf.HEAD in case.tensors and hf.EMBEDDING in case.tensors and hf.HEAD not in case.tied
    if (own or family is not None) and case.config_ties() and both and not same_tensor(case):
        case.claim([hf.HEAD], CODE)
        message = "the config ties the head to the embedding and the file holds another head: torchtitan overwrites it"
        yield Finding(
            CODE,
            "error",
            message,
            [hf.HEAD],
            {"tied": True},
            explains=["T01"],
            fix='set "tie_word_embeddings": false in config.json if the head is meant',
        )


def _by_peft(case: Case) -> Iterator[Finding]:
    """Report what PEFT itself leaves out of an adapter when it loads it onto a mixture of experts."""
    found = adapter_and_base(case)
    base = None if found is None else case.reference if found[2] else case.view
    if found is None or base is None or not found[0].pairs:
        return
    try:
        from tensorkeep.models.peft_loading import left_out_by_peft
    except ImportError:
        return
    adapter = found[0]
    lost = left_out_by_peft(base, adapter.document, adapter.view, [n for p in adapter.pairs.values() for n in p])
    if lost is not None:
        message = (
            f"PEFT {lost[0]} leaves out {len(lost[1])} tensors of this adapter when it loads it, and does not say so"
        )
        yield Finding(CODE, "warning", message, lost[1], {"peft": lost[0]}, fix="tensorkeep merge takes all of it")
