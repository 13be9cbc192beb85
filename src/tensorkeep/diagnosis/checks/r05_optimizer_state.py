"""R05 optimizer state missing or by position: moments that are not there, or that only their number ties to a weight.

What it means
    torch's `optimizer.state_dict()` numbers its states in the order in which the parameters were given. The names of
    the parameters are in another part of the file, or nowhere.

How it shows
    Missing: Adam starts with zero moments, and its first steps are too large. By position: a model built in another
    order (a new layer, another list of LoRA targets, groups sorted otherwise) takes the moments of other weights, and
    where shapes agree nothing complains (in one case a moment of 0.1 became 10.0).

What to do
    Save moments by parameter name. To continue from such a file, build the model and its groups exactly as they were.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import ResumeState, resume_state
from tensorkeep.findings import Finding

CODE = "R05"
HEADS = (hf.HEAD, "output.weight")


def check(case: Case) -> Iterator[Finding]:
    """Warn of missing optimizer state, and of states by position whose shapes do not fit the weights in order."""
    state = resume_state(case)
    if state is None:
        return
    evidence: dict[str, object] = {"layout": state.layout, **state.position}
    if not state.optimizer:
        yield Finding(
            CODE, "warning", "training state without an optimizer's: moments would start at zero", (), evidence
        )
        return
    numbered = state.by_position
    if numbered:
        fits, alike, weights = _in_order(case, state)
        evidence |= {"states": len(numbered), "weights": weights, "shapes_fit_in_order": fits, "shapes_fit": alike}
        if alike:
            order = "in the file's own order" if fits else "in another order, as where weights without decay come last"
            said = (
                f"{len(numbered)} optimizer states go by position, as torch saves them, and not by name. Their shapes "
                f"are those of the weights, {order}: a resume that builds the same parameter groups is right, and "
                "nothing would tell of another"
            )
        else:
            why = "number is not that" if fits is None else "shapes are not those"
            said = f"{len(numbered)} optimizer states go by position, not by name, and their {why} of the weights"
        yield Finding(CODE, "warning", said, (), evidence)


def _in_order(case: Case, state: ResumeState) -> tuple[bool | None, bool, int]:
    """Say whether the moments have the shapes of the weights (or of the adapter) in order, and whether in any order.

    The first is None where their numbers differ.
    """
    assert case.view is not None and case.identity is not None
    shapes = [next((r.shape for r in s.values() if r.shape), ()) for _, s in sorted(state.by_position.items())]
    own = [n for n in case.identity.names if case.view[n].tied_to is None]
    untied = [n for n in own if not _repeats_embedding(case, n)]
    candidates = [
        own,
        untied,
        [n for n in case.view if n in case.adapter],
        [n for n in case.view if n in own or n in case.adapter],
    ]
    for names in candidates:
        if len(names) == len(shapes):
            theirs = [case.view[n].shape for n in names]
            return theirs == shapes, sorted(theirs) == sorted(shapes), len(names)
    return None, False, len(own)


def _repeats_embedding(case: Case, stored: str) -> bool:
    """Say whether this is a head of the embedding's shape, which has no state of its own where it is tied."""
    assert case.view is not None and case.identity is not None
    shapes = {clean: case.view[n].shape for n, clean in case.identity.names.items()}
    embedding = next((shapes[n] for n in (hf.EMBEDDING, "tok_embeddings.weight") if n in shapes), None)
    return case.identity.names.get(stored) in HEADS and case.view[stored].shape == embedding
