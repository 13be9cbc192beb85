"""C04 config written for another transformers version: `rope_parameters` against `rope_theta`.

What it is: transformers 5 writes theta into `rope_parameters`; transformers 4 reads `rope_theta` and knows nothing of
the other, so it silently uses 10000. OLMo 2 needs 500000, Llama 3 too.
How it happens: save_pretrained of transformers 5, loaded by a program that pins 4 (vLLM #42624, #44158).
How it shows: +0.1 to +0.2 of loss in short texts, worse with length. No warning.
What to do: write both fields; a config may hold them side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.config_fields import THETA
from tensorkeep.findings import Finding

CODE = "C04"


def check(case: Case) -> Iterator[Finding]:
    """Where the two eras of transformers would read different thetas out of one config."""
    if case.config is None or not case.tensors:
        return
    era, theta = _era(case.config)
    if era is None:
        return
    theirs = _era(case.reference_config)[0] if case.reference_config is not None else None
    version = str(case.config.get("transformers_version") or "")
    written = f", written by {version}" if version else ""
    evidence = {"era": era, "rope_theta": theta, "transformers_version": version or None, "reference_era": theirs}
    if era == 5 and theta not in (None, THETA):
        odd = version.startswith("4.") or theirs == 4
        yield Finding(
            CODE,
            "warning" if odd else "info",
            f"rope_theta {theta:g} stands in rope_parameters alone{written}: transformers 4 would use {THETA:g}",
            (),
            evidence,
            fix=f'add "rope_theta": {theta} to config.json',
        )
    elif era == 4 and (version.startswith("5.") or theirs == 5):
        yield Finding(
            CODE,
            "info",
            f"rope_theta {theta} in the words of transformers 4{written}; the other era reads it as well",
            (),
            evidence,
        )


def _era(config: dict[str, Any] | None) -> tuple[int | None, float | None]:
    """Which era's words give theta: 4, 5, or None for both or neither; and the theta."""
    given = config or {}
    nested = given.get("rope_parameters")
    new = nested.get("rope_theta") if isinstance(nested, dict) else None
    old = given.get("rope_theta")
    if isinstance(new, (int, float)) and old is None:
        return 5, float(new)
    if isinstance(old, (int, float)) and new is None and nested is None:
        return 4, float(old)
    return None, None
