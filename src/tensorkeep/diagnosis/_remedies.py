"""Find the inverse of each proven cause, as a recipe for every tensor that it claimed.

A recipe gives a tensor in Hugging Face layout and the checkpoint's dtype when it is asked for; nothing is computed
before. What a cause destroyed is `lost`: only the reference can hold it, and `repairs` decides whether it may be
taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.diagnosis import Diagnosis
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.tensor_names import layer_of
from tensorkeep.formats.arrays import np_dtype

Recipe = Callable[[], Array]
# causes that only change names: reading already took them away
NAMES = ("K03", "K04", "K06")
# causes whose tensors are gone from the checkpoint
_DESTROYED = {"K01", "S01", "V03", "V05", "V02"}
_NEEDS = {
    "F01": "a complete checkpoint",
    "F02": "the whole file: its end is missing",
    "F03": "the file as it was certified",
    "F04": "a file without code in it",
    "F05": "the missing file",
    "F06": "a checkpoint written by an honest program",
    "F07": "a save whose metadata and data agree",
    "F08": "your decision which step is meant: move the others away",
    "K05": "the checkpoint of this model",
    "K07": "a program that has these tensors, or your --drop",
    "K08": "the model's own file",
}


@dataclass
class Remedies:
    """What is to be done: recipes by name, names to leave out, names lost, files to take from the reference."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)  # hf name -> code
    companions: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)  # code -> what it needs
    done: dict[str, str] = field(default_factory=dict)  # code -> what was done

    def lose(self, names: Iterable[str], code: str) -> None:
        self.lost.update(dict.fromkeys(names, code))


def remedies(diagnosis: Diagnosis) -> Remedies:
    """Collect the inverse of every error of a diagnosis that was made with a reference."""
    case = diagnosis.case
    assert case is not None
    out = Remedies()
    for finding in diagnosis.findings:
        code, names = finding.code, list(finding.tensors)
        if finding.severity != "error" or (code not in diagnosis.causes and code != "S02"):
            continue
        if code in NAMES:
            out.done[code] = "names"
        elif code in _DESTROYED:
            out.lose(names, code)
        elif code == "K02":
            out.dropped |= set(names)
            out.done[code] = f"left out {len(names)} tensors"
        elif code in REMEDIES:
            REMEDIES[code](case, names, out)
        elif code in ("C01", "C02"):
            out.companions |= (
                {"config.json"}
                if code == "C01"
                else {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
            )
            out.done[code] = "took the reference's"
        else:
            out.refused[code] = _NEEDS.get(code, finding.fix or f"see: tensorkeep explain {code}")
    return out


def _transposed(case: Case, names: list[str], out: Remedies) -> None:
    for name in names:
        out.recipes[name] = lambda name=name: np.ascontiguousarray(case.values(name).T)  # type: ignore[misc]
        out.shapes[name] = case.tensors[name].shape[::-1]
    out.done["S03"] = f"transposed {len(names)} matrices"


def _vocabulary(case: Case, names: list[str], out: Remedies) -> None:
    for name in names:
        rows = case.reference_tensors[name].shape[0]
        if rows > case.tensors[name].shape[0]:
            out.lose([name], "S02")
        else:
            out.recipes[name] = lambda name=name, rows=rows: case.values(name)[:rows]  # type: ignore[misc]
            out.shapes[name] = case.reference_tensors[name].shape
    out.done["S02"] = f"{len(names)} tensors to the reference's number of rows"


def _tied_apart(case: Case, names: list[str], out: Remedies) -> None:
    if names == [hf.HEAD] and hf.HEAD in case.tensors:
        out.dropped.add(hf.HEAD)
        out.done["T01"] = "left the odd head out: the embedding is the reference's, and the config ties them"
    else:
        out.refused["T01"] = "your decision which of head and embedding is meant (--drop it when converting)"


def _turned(case: Case, names: list[str], out: Remedies) -> None:
    turns = case.results["turns"]
    for name in names:
        back = np.argsort(np.asarray(turns[name].origin))
        out.recipes[name] = lambda name=name, back=back: case.values(name)[back]  # type: ignore[misc]
    out.done["O01"] = f"turned the rows of {len(names)} tensors back"


def _layers(case: Case, names: list[str], out: Remedies) -> None:
    for stack, holds in case.results["layers"].items():
        mine = [n for n in names if (at := layer_of(n)) is not None and at[0] == stack]
        places = {content: layer for layer, content in holds.items()}
        for name in mine:
            found = layer_of(name)
            assert found is not None
            _, layer, kind = found
            # a layer that was not overwritten may still be where it was
            at = places.get(layer, layer if layer not in holds else None)
            source = f"{stack}{at}.{kind}" if at is not None else None
            if source is None or source not in case.tensors:
                out.lose([name], "O02")
            else:
                out.recipes[name] = lambda source=source: case.values(source)  # type: ignore[misc]
    out.done["O02"] = f"put {len(names)} tensors back into their layers"


def _swapped(case: Case, names: list[str], out: Remedies) -> None:
    places = {content: name for name, content in case.results["swaps"].items()}
    for name in names:
        if name in places:
            out.recipes[name] = lambda source=places[name]: case.values(source)  # type: ignore[misc]
        else:
            out.lose([name], "O03")
    out.done["O03"] = f"put {len(names)} tensors back under their names"


def _rows(case: Case, names: list[str], out: Remedies) -> None:
    for name in names:
        order = case.results["rows"][name]
        if not order.invertible:
            out.lose([name], "O04")
            continue
        out.recipes[name] = lambda name=name, order=order: _reordered(case.values(name), order.inverse, order.axis)  # type: ignore[misc]
    out.done["O04"] = f"put the rows of {len(names)} tensors back"


def _reordered(values: Array, back: Any, axis: int) -> Array:
    if axis:
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, back]).reshape(values.shape)
    made: Array = values[back]
    return made


def _norms(case: Case, names: list[str], out: Remedies) -> None:
    """Take norms from the reference: one that is off by one was rounded there, so subtracting does not restore it."""
    out.lose(names, "V04")


def _elements(code: str) -> Callable[[Case, list[str], Remedies], None]:
    def heal(case: Case, names: list[str], out: Remedies) -> None:
        for name in names:
            out.recipes[name] = lambda name=name: _healed(case, name)  # type: ignore[misc]
        out.done[code] = f"took the damaged elements of {len(names)} tensors from the reference"

    return heal


def _healed(case: Case, name: str) -> Array:
    """Return a tensor with its damaged elements (not finite, or differing among equal ones) from the reference."""
    mine = case.values(name).copy()
    theirs = case.reference_values(name).astype(mine.dtype)
    word = f"u{mine.itemsize}"
    differs = mine.reshape(-1).view(word) != np.ascontiguousarray(theirs).reshape(-1).view(word)
    flat = mine.reshape(-1)
    if differs.mean() < 0.5:
        flat[differs] = theirs.reshape(-1)[differs]
    else:
        wrong = ~np.isfinite(flat.astype(np.float32))
        flat[wrong] = theirs.reshape(-1)[wrong]
    return mine


def _scaled(case: Case, names: list[str], out: Remedies) -> None:
    fits: Mapping[str, Any] = case.results.get("fits", {})
    for name in names:
        found = fits.get(name)
        if found is None or found.kind not in ("scale", "offset") or not found.number:
            out.lose([name], "V06")
            continue
        out.recipes[name] = lambda name=name, found=found: _unscaled(case, name, found.kind, found.number)  # type: ignore[misc]
    out.done["V06"] = "divided a factor out"


def _unscaled(case: Case, name: str, kind: str, number: float) -> Array:
    """Undo a factor or an offset; return the reference's own values where they are that up to rounding."""
    mine = case.values(name)
    wide = mine.astype(np.float64)
    made: Array = (wide / number if kind == "scale" else wide - number).astype(np_dtype(case.tensors[name].dtype))
    theirs = case.reference_values(name).astype(mine.dtype)
    close = (
        np.abs(made.astype(np.float64) - theirs.astype(np.float64))
        <= 2.0**-7 * np.abs(theirs.astype(np.float64)) + 1e-30
    )
    return theirs if bool(close.all()) else made


REMEDIES: dict[str, Callable[[Case, list[str], Remedies], None]] = {
    "S02": _vocabulary,
    "S03": _transposed,
    "T01": _tied_apart,
    "T02": lambda case, names, out: out.lose(names, "T02"),
    "O01": _turned,
    "O02": _layers,
    "O03": _swapped,
    "O04": _rows,
    "V04": _norms,
    "V01": _elements("V01"),
    "V07": _elements("V07"),
    "V06": _scaled,
}
