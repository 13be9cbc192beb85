"""Parity with known faults: `python -m tests.parity.sick DIR`, one line a case.

DIR holds `sick_*` folders, each with `answers.json` beside its cases: the fault of every case, its tensors, and the
sound model as `reference_hf`. A case passes when its code is among the causes, its tensors (where the answers list
names) are exactly the finding's, and no other error stands that no cause explains. A healthy case passes without
errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.errors import TensorkeepError
from tests.faults import has_permutation, unexplained
from tests.parity.outcome import Outcome, natural_key, report

# by the name of a fault in answers.json, up to the first space or colon
CODES = {
    "none": None,
    "healthy": None,
    "missing_key": "K01",
    "rope_layout_interleaved": "O01",
    "layer_order": "O02",
    "reinitialised_tensor": "V03",
    "prefix": "K03",
    "norm_reset_to_ones": "V04",
    "precision_loss_fp8_e4m3": "V02",
    "transposed": "S03",
    "swapped_gate_up": "O03",
    "nan": "V01",
    "unexpected_key": "K02",
    "truncated_data_file": "F02",
    "bit_flip": "V07",
    "metadata_without_storage_entry": "F07",
    "lm_head_overwritten_by_embedding": "T02",
    "malicious_metadata_pickle": "F04",
    "path_traversal_in_metadata": "F06",
    "missing_data_file": "F05",
    "small_value_drift": "V06",
}


def expected_code(fault: str) -> str | None:
    """The code of a fault; None for a healthy case.

    >>> expected_code("prefix:module."), expected_code('prefix:model. (nested {"model": sd})'), expected_code("none")
    ('K03', 'K04', None)
    """
    word = fault.replace(":", " ").split()[0]
    if word.startswith("vocab_padded"):
        return "S02"
    if word == "prefix" and fault.partition(":")[2].strip().startswith("model."):
        return "K04"
    if word not in CODES:
        raise KeyError(f"answers.json names a fault unknown here: {fault}")
    return CODES[word]


def judge(fault: str, tensors: list[str], document: dict[str, Any]) -> tuple[int, str]:
    """How many things are wrong with a diagnosis of this fault, and what was said."""
    code = expected_code(fault)
    causes = document["causes"] if document["verdict"] != "ok" else []
    said = f"wanted {code or 'nothing'}, causes {' '.join(causes) or 'none'}"
    extra = unexplained(document, {code} if code else set())
    if code is None:
        return len(extra), said
    found = [f for f in document["findings"] if f["code"] == code]
    if code not in causes or not found:
        return 1 + len(extra), said
    listed = [n for n in tensors if not n.startswith("layers [")]
    odd = {n for f in found for n in f["tensors"]} ^ set(listed) if listed else set()
    orders = [json.loads(n.removeprefix("layers ")) for n in tensors if n.startswith("layers [")]
    lost = [o for o in orders if not any(has_permutation(f["evidence"], o) for f in found)]
    more = [f"{len(odd)} tensors otherwise: {', '.join(sorted(odd)[:3])}"] * bool(odd) + [
        f"permutation {o} not given" for o in lost
    ]
    more += [f"{c} besides" for c in extra]
    return len(extra) + len(odd) + len(lost), "; ".join([said, f"{sum(f['count'] for f in found)} tensors", *more])


def cases(folder: Path) -> Iterator[Outcome]:
    """Every case of every `sick_*` folder (or of the folder itself, where answers.json lies in it)."""
    places = [folder] if (folder / "answers.json").exists() else sorted(folder.glob("**/sick_*"), key=natural_key)
    for place in places:
        answers = json.loads((place / "answers.json").read_text())
        reference = str((place / answers["reference_hf"]).resolve())
        for name, answer in answers["cases"].items():
            yield one(f"{place.name}/{name}", place / name, reference, answer)


def one(name: str, place: Path, reference: str, answer: dict[str, Any]) -> Outcome:
    steps = sorted(place.glob("step-*"), key=natural_key)
    try:
        document = diagnose(str(steps[0] if steps else place), reference).to_json()
        wrong, said = judge(answer["fault"], answer.get("tensors", []), document)
    except (TensorkeepError, KeyError, ValueError, OSError) as error:
        return Outcome(name, float("inf"), 0, f"{answer['fault']}: {type(error).__name__}: {error}")
    return Outcome(name, wrong, 0, f"{answer['fault']}: {said}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    return report(cases(parser.parse_args(argv).folder))


if __name__ == "__main__":
    sys.exit(main())
