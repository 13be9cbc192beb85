"""Checks: one file and one line in the table a code.

| name | says | without it |
|---|---|---|
| the docstring | the page that `tensorkeep explain CODE` prints, its first line `CODE title: sentence` | needed |
| `CODE` | the code | needed |
| `check(case)` | yields findings | needed |
| `repair(case, names, out)` | how `tensorkeep repair` undoes it, or that it is lost | it is refused |
| `NEEDS` | what a refused repair needs | the finding's fix |
| `ALWAYS` | that it is repaired though another cause explains it | causes alone are repaired |
| `LIVE` | that it is about a process or a forward, and others call it | `diagnose` calls it |

The order of CODES is the order in which codes speak where two could fit: a check claims the tensors that it explains,
and later checks see only what is left. Within a letter, what changes all names speaks before single names, and what
changes a shape on purpose before a shape that merely differs.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from tensorkeep.errors import TensorkeepError, near_misses

_WORDS = {
    "F01": "incomplete",
    "F02": "truncated",
    "F05": "file_missing",
    "F06": "path_escapes",
    "F04": "unsafe_pickle",
    "F07": "index_disagrees",
    "F03": "digest_differs",
    "F08": "another_step",
    "K08": "wrong_state",
    "K03": "wrapper_prefix",
    "K04": "root_differs",
    "K06": "naming_differs",
    "K05": "nothing_would_load",
    "K07": "dropped_by_loader",
    "K01": "missing_tensor",
    "K02": "unexpected_tensor",
    "S02": "vocabulary",
    "S03": "transposed",
    "S01": "shape_differs",
    "S04": "dtype_differs",
    "T02": "wrongly_tied",
    "T01": "tied_apart",
    "O01": "rope_layout",
    "O02": "layer_order",
    "O03": "tensors_swapped",
    "O04": "rows_reordered",
    "V03": "freshly_initialised",
    "V04": "norm_default",
    "A05": "does_nothing",
    "V05": "all_zeros",
    "V01": "not_finite",
    "V07": "corrupted_elements",
    "V02": "precision_lost",
    "V06": "values_differ",
    "C01": "config_differs",
    "C02": "tokenizer",
    "C03": "config_missing",
    "C04": "config_version",
    "Q01": "state_missing",
    "Q02": "state_of_another",
    "Q03": "codes_averaged",
    "Q04": "frozen_random",
    "Q05": "geometry_unsafe",
    "Q06": "state_malformed",
    "Q07": "codes_noise",
    "A01": "does_not_fit",
    "A02": "rank_alpha",
    "A03": "merged_already",
    "A04": "another_base",
    "E01": "equals_model",
    "E02": "holds_frozen",
    "E03": "lags",
    "R01": "rng_missing",
    "R02": "data_position",
    "R03": "world_size",
    "R04": "recipe_changed",
    "R05": "optimizer_state",
    "R06": "narrower_weights",
    "B01": "buffer_uninitialised",
    "L01": "loss_too_high",
}
CODES: dict[str, str] = {code: f"tensorkeep.diagnosis.checks.{code.lower()}_{word}" for code, word in _WORDS.items()}


def _spans() -> str:
    """The codes, those of one letter as a span: `A01-A05, B01, ...`."""
    by_letter = [sorted(code for code in CODES if code[0] == letter) for letter in sorted({c[0] for c in CODES})]
    return ", ".join(codes[0] if len(codes) == 1 else f"{codes[0]}-{codes[-1]}" for codes in by_letter)


def module(code: str) -> ModuleType:
    """Return the module of a code's check.

    Args:
        code: A finding code, in either case.

    Raises:
        TensorkeepError: Where there is no such code; the hint names the nearest.
    """
    wanted = code.upper()
    if wanted not in CODES:
        raise TensorkeepError(f"no code {code!r}", hint=near_misses(wanted, CODES) or f"codes: {_spans()}")
    return importlib.import_module(CODES[wanted])


def rank(code: str) -> int:
    """Return the place of a code in the order of precedence; unknown codes come last."""
    return list(CODES).index(code) if code in CODES else len(CODES)


def explain(code: str) -> str:
    """Return the page of a code: what it means, how it happens, how it shows, what to do.

    Args:
        code: A code in upper or lower case, such as "K01".

    Raises:
        TensorkeepError: For a code that does not exist; the hint names similar ones.

    Example:
        >>> explain("K01").splitlines()[0].split(":")[0]
        'K01 missing tensor'
    """
    return inspect.cleandoc(module(code).__doc__ or "")


def title(code: str) -> str:
    """Return the few words that name a code, from the first line of its page.

    Args:
        code: A code in upper case.

    Example:
        >>> title("K01")
        'missing tensor'
    """
    first = explain(code).splitlines()[0]
    return first.removeprefix(code).partition(":")[0].strip()
