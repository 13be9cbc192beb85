"""K07 dropped by the loader: the file holds tensors that the target's loader never asks for.

What it is: torchtitan asks a file only for what its own model has. Attention biases, q/k norms of a llama, another
head under a tied config are in the file and are never read, without a word.
How it happens: the architecture in the file is richer than the program's model of that name.
How it shows: no error; logits off by 0.86 (lost biases) or 4.6 (lost head), measured on tiny models.
What to do: train with a program that has these tensors (flame, torchtitan's transformers backend), or drop them on
purpose by name when converting.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import hf, torchtitan
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.survey import bits_equal
from tensorkeep.findings import Finding

CODE = "K07"


def check(case: Case) -> Iterator[Finding]:
    """What torchtitan's models have no place for, in its own files and in those meant for it."""
    yield from case.told(CODE)
    own = case.identity is not None and case.identity.naming in ("torchtitan", "torchtitan-0.2")
    if not case.tensors or not (case.target == "torchtitan" or (own and case.target is None)):
        return
    kind = (case.model_config or {}).get("model_type")
    family = torchtitan.MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if family is None and not own:
        return
    lost = [n for n in case.tensors if torchtitan.dropped_by_loader(n, family or "llama3")]
    if family == "llama3":
        lost += [n for n in case.tensors if n.endswith(("q_norm.weight", "k_norm.weight"))]
    if lost:
        yield Finding(
            CODE,
            "error",
            f"torchtitan's {family or 'model'} has no place for {len(lost)} tensors and would not ask for them",
            lost,
            {"family": family},
        )
    if case.tie() and hf.HEAD in case.tensors and hf.HEAD not in case.tied and _conflict(case):
        case.claim([hf.HEAD], CODE)
        yield Finding(
            CODE,
            "error",
            "the config ties the head to the embedding and the file holds another head: torchtitan overwrites it",
            [hf.HEAD],
            {"tied": True},
            explains=["T01"],
            fix='set "tie_word_embeddings": false in config.json if the head is meant',
        )


def _conflict(case: Case) -> bool:
    head, embed = case.values(hf.HEAD), case.values(hf.EMBEDDING)
    if head.shape != embed.shape or head.dtype != embed.dtype:
        return True
    return not bits_equal(head, embed)
