"""C04 config written for another transformers version: `rope_parameters` against `rope_theta` and `rope_scaling`.

What it means
    transformers 5 writes RoPE's theta into `rope_parameters`. transformers 4 reads `rope_theta` only, so it silently
    uses 10,000 for such a config, where OLMo 2 and Llama 3 need 500,000. Where both places are there and say different
    things, the two versions make two models of one file: an error, since one of them is wrong.

How it happens
    A model saved by transformers 5 is loaded by a program that requires 4 (vLLM #42624, #44158). A config of one
    version was edited, or merged with another's, and only one place was changed.

How it shows
    +0.1 to +0.2 of loss in short texts, more in long ones. No warning.

What to do
    Write both fields: a config may have them side by side, if they agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.config_fields import THETA, said_twice
from tensorkeep.findings import Finding

CODE = "C04"


def check(case: Case) -> Iterator[Finding]:
    """Report a config out of which transformers 4 and 5 would read different thetas."""
    if case.config is None or not case.tensors:
        return
    apart = said_twice(case.config)
    if apart:
        said = ", ".join(f"{field} {old!r} and {new!r}" for field, (old, new) in list(apart.items())[:3])
        message = f"config.json says {said}: transformers 4 reads the first, 5 the second (in rope_parameters)"
        shown = {field: {"transformers 4": old, "transformers 5": new} for field, (old, new) in apart.items()}
        yield Finding(CODE, "error", message, (), {"fields": shown}, fix="correct one place or take it out")
    era, theta = _era(case.config)
    if era is None:
        return
    theirs = _era(case.reference_config)[0] if case.reference_config is not None else None
    version = str(case.config.get("transformers_version") or "")
    written = f", written by {version}" if version else ""
    evidence = {"era": era, "rope_theta": theta, "transformers_version": version or None, "reference_era": theirs}
    if era == 5 and theta not in (None, THETA):
        odd = version.startswith("4.") or theirs == 4
        message = f"rope_theta {theta:g} stands in rope_parameters alone{written}: transformers 4 would use {THETA:g}"
        fix = f'add "rope_theta": {theta} to config.json'
        yield Finding(CODE, "warning" if odd else "info", message, (), evidence, fix=fix)
    elif era == 4 and (version.startswith("5.") or theirs == 5):
        message = f"rope_theta {theta} in the words of transformers 4{written}; the other era reads it as well"
        yield Finding(CODE, "info", message, (), evidence)


def _era(config: dict[str, Any] | None) -> tuple[int | None, float | None]:
    """Return the major version of transformers in whose spelling theta is given (None: both or neither), and theta."""
    given = config or {}
    nested = given.get("rope_parameters")
    new = nested.get("rope_theta") if isinstance(nested, dict) else None
    old = given.get("rope_theta")
    if isinstance(new, (int, float)) and old is None:
        return 5, float(new)
    if isinstance(old, (int, float)) and new is None and nested is None:
        return 4, float(old)
    return None, None
