"""B01 buffer uninitialised: a buffer that no checkpoint fills (RoPE's inv_freq, a mask) is not what the config gives.

What it means
    Non-persistent buffers are in no state_dict. A model built on the meta device gets them from `to_empty()` as
    whatever lay in memory, and only code that computes them again makes them right. transformers 4 does not:
    `post_init()` leaves RoPE's `inv_freq` alone (transformers 5 computes it). The models of fla and torchtitan do, as
    long as their init is called.

How it shows
    Every tensor equals the file, strict loads pass, and the loss is far off: SmolLM2 goes from 3.0 to between 5.4 and
    9.9 or NaN, depending on what lay in memory. Zeros (fresh pages) mean no RoPE at all: the loss is 5.5 and does not
    fall along the text. A table of frequencies that was cast to 16 bits did no harm to that model, and is a warning.

How it is found
    Only a running process can be asked. After the load, in every process:

        from tensorkeep import check_loaded, repair_buffers
        check_loaded(model, "checkpoint/step-0")      # names B01 and every other fault of the load
        repair_buffers(model)                         # recomputes them in place, in float32

    The right values come from a second model of the same class and config, with parameters on the meta device and
    buffers computed; those of other modules from their own methods (`_init_self_buffers`, `rope_init`,
    `reset_parameters` where there are no parameters, `_precompute_...`). What nothing can compute is a warning,
    unless its values are impossible. From a folder alone two things can be said: whether an inv_freq that is stored
    there is what the config gives, and whether the checkpoint is meant for a loader that builds on the meta device.

What to do
    Call `repair_buffers(model)` after the load and after any `.to(dtype)`, or move to transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensorkeep.conversion.naming.rope import partial_rotary
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "B01"
LIVE = True  # about live processes and forwards: others call it
FIX = "from tensorkeep import repair_buffers; repair_buffers(model)  # after the load"


def check(case: Case) -> Iterator[Finding]:
    """Report what a folder alone shows: stored frequencies that are wrong, and flame under transformers 4."""
    config = case.model_config
    if case.view is None or config is None:
        return
    right = frequencies(config)
    stored = [n for n in case.view if n.endswith("rotary_emb.inv_freq")] if right is not None else []
    wrong = [n for n in stored if not _equal(case.view.array(n), right)]
    if wrong and right is not None:
        message = (
            f"{len(wrong)} stored inv_freq are not what the config gives: programs that load them turn by other angles"
        )
        evidence = {"holds": _first(case.view.array(wrong[0])), "expected": _first(right)}
        yield Finding(CODE, "error", message, wrong, evidence, fix="write it again without them: tensorkeep convert")
    written = str(config.get("transformers_version", ""))
    if case.target == "flame" and written.startswith("4.") and right is not None:
        message = (
            f"flame builds on meta, and transformers {written} leaves RoPE's inv_freq uninitialised there: no "
            "checkpoint can fill it; check the live model"
        )
        yield Finding(CODE, "info", message, [], {"transformers_version": written}, fix=FIX)


def frequencies(config: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """Compute the inv_freq [rotary / 2] of a config with plain RoPE; None where it scales or says nothing.

    >>> frequencies({"rope_theta": 10000.0, "head_dim": 4}).tolist()
    [1.0, 0.01]
    """
    nested = config.get("rope_parameters") or config.get("rope_scaling")
    fields: dict[str, Any] = {**config, **(nested if isinstance(nested, Mapping) else {})}
    if (fields.get("rope_type") or fields.get("type") or "default") != "default":
        return None
    theta, heads, hidden = fields.get("rope_theta"), fields.get("num_attention_heads"), fields.get("hidden_size")
    size = fields.get("head_dim") or (
        hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0
    )
    if (
        not isinstance(theta, (int, float))
        or not math.isfinite(theta)
        or theta <= 0
        or not isinstance(size, int)
        or size < 2
    ):
        return None
    rotary = int(size * partial_rotary(config))
    made: np.ndarray[Any, Any] = float(theta) ** -(np.arange(0, rotary, 2) / rotary)
    return made


def _equal(values: np.ndarray[Any, Any], right: np.ndarray[Any, Any] | None) -> bool:
    """Say whether stored frequencies are right, up to rounding."""
    if right is None or values.shape != right.shape:
        return False
    # stored in 16 bits, it is rounded
    room = 1e-4 if values.dtype.itemsize > 2 else 1e-2
    return bool((np.abs(values.astype(np.float64) - right) <= room * right).all())


def _first(values: np.ndarray[Any, Any]) -> list[Any]:
    """Return the first values as plain numbers, NaN and infinities as words."""
    numbers = [float(v) for v in values.reshape(-1)[:4]]
    return [float(f"{n:.4g}") if math.isfinite(n) else str(n) for n in numbers]
