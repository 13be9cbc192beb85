"""Make faulty checkpoints on purpose, every kind on every model, and judge whether a diagnosis is right.

    >>> fault = make("rope_q_only", "llama_tied", seed=3, folder=Path("/tmp/x"))      # doctest: +SKIP
    >>> fault.path, fault.reference, fault.codes, sorted(fault.tensors)               # doctest: +SKIP

`python -m tests.faults KIND MODEL SEED FOLDER` writes one and prints it. `judge` compares a diagnosis with what is
right: named, wrong or missed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.fault_kinds import configs, files, names, orders, values  # noqa: F401  (they register their kinds)
from tests.fault_kinds.change import KINDS, Change
from tests.fault_kinds.names import EMBEDDING, HEAD
from tests.fault_kinds.writing import write
from tests.overlays import in_titan_names, overlaid
from tests.specimens import Specimen, State, specimen

Verdict = Literal["named", "wrong", "missed"]


@dataclass(frozen=True)
class Fault:
    """A faulty checkpoint on disk and what is right to say of it (see `fault_kinds.change.Change`).

    `before`: the tensors that it had before the fault.
    """

    kind: str
    model: str
    seed: int
    path: Path
    reference: Path | None
    target: str | None
    codes: tuple[str, ...]
    tensors: frozenset[str] | None
    layers: list[int] | None
    also: frozenset[str]
    lax: bool
    note: str
    before: State


def make(kind: str, model: str, seed: int, folder: Path, overlay: str | None = None) -> Fault | None:
    """Write a checkpoint with one fault under `folder`; return None where this model cannot have it.

    `overlay`: the fault is put into another copy of the reference, see tests/overlays.py.
    """
    rng = np.random.default_rng([seed, *kind.encode(), *model.encode()])
    m = overlaid(specimen(model), overlay, kind, rng, seed)
    change = KINDS[kind].make(m, rng) if m is not None else None
    if m is None or change is None:
        return None
    forms = [f for f in change.forms if f != "flame" or (m.language and change.target in (None, "flame"))]
    form = "hf" if overlay in ("titan", "alone") and "hf" in forms else str(rng.choice(forms))
    path = write(
        form, change.state, folder / f"{kind}-{model}-{seed}", config_beside(m, change, form, rng), change.companions
    )
    if overlay == "titan" and m.tied and change.tensors is not None and EMBEDDING in change.tensors:
        change.tensors = [*change.tensors, HEAD]  # torchtitan stores a tied head twice, so both are sick
    path = change.damage(path) if change.damage else in_titan_names(path) if overlay == "titan" else path
    return Fault(
        kind,
        model,
        seed,
        path,
        None if overlay == "alone" else reference(model, folder),
        change.target or ("flame" if form == "flame" else None),
        change.codes or KINDS[kind].codes,
        None if change.tensors is None else frozenset(change.tensors),
        change.layers,
        frozenset(change.also),
        change.lax,
        f"{form} {change.note}".strip(),
        m.tensors,
    )


def config_beside(m: Specimen, change: Change, form: str, rng: np.random.Generator) -> dict[str, Any] | None:
    """Return the config to write beside the weights; DCP folders often have none."""
    if not change.keep_config or (form not in ("hf", "hf-sharded") and rng.random() < 0.5):
        return None
    return change.config or m.config


def reference(model: str, folder: Path) -> Path:
    """Write the sound model as a Hugging Face folder, once."""
    place = folder / f"reference-{model}"
    if not (place / "model.safetensors").exists():
        m = specimen(model)
        write("hf", m.tensors, place, m.config)
    return place


# -- judging --------------------------------------------------------------------------------------------------------


def judge(fault: Fault, document: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Say whether a diagnosis (the JSON document) names the fault, something else, or nothing; and why."""
    findings = document["findings"]
    errors = [f for f in findings if f["severity"] == "error"]
    pool = findings if fault.lax else [f for f in findings if f["code"] in document["causes"]]
    right = [f for f in pool if f["code"] in fault.codes]
    if not fault.lax:  # beside the error an info of the same code may say what training moved
        right = [f for f in right if f["severity"] == "error"] or right
    if not right:
        said = ", ".join(f"{f['code']}({f['count']})" for f in errors) or document["verdict"]
        return ("wrong" if errors else "missed"), f"wanted {'/'.join(fault.codes)}, got {said}"
    if fault.tensors is not None:
        named = {n for f in right for n in f["tensors"]}
        odd = sorted(named ^ fault.tensors)
        if odd and not (fault.lax and not named):
            return (
                "wrong",
                f"{right[0]['code']}: {len(odd)} tensors differ, first {odd[0]} "
                f"({'extra' if odd[0] in named else 'lacking'})",
            )
    if fault.layers is not None and not any(has_permutation(f["evidence"], fault.layers) for f in right):
        return (
            "wrong",
            f"{right[0]['code']} without the permutation {fault.layers}: {json.dumps(right[0]['evidence'])[:200]}",
        )
    extra = unexplained(document, {*fault.codes, *fault.also})
    if extra:
        return "wrong", f"{right[0]['code']} named, and also {', '.join(extra)}"
    return "named", right[0]["message"]


def unexplained(document: Mapping[str, Any], expected: Collection[str]) -> list[str]:
    """Return the codes of errors that are neither expected nor in some cause's `explains`."""
    explained = {c for f in document["findings"] if f["code"] in document["causes"] for c in f["explains"]}
    codes = [f["code"] for f in document["findings"] if f["severity"] == "error"]
    return [c for c in dict.fromkeys(codes) if c not in explained and c not in expected]


def has_permutation(evidence: Any, order: list[int]) -> bool:
    """Say whether evidence holds this order of layers or its inverse, as a list or as a mapping."""
    inverse = [order.index(n) for n in range(len(order))] if sorted(order) == list(range(len(order))) else order
    if isinstance(evidence, list):
        return evidence in (order, inverse) or any(has_permutation(e, order) for e in evidence)
    if not isinstance(evidence, dict):
        return False
    if evidence and all(str(k).isdigit() and isinstance(v, int) for k, v in evidence.items()):
        full = [evidence.get(str(n), evidence.get(n, n)) for n in range(len(order))]
        return full in (order, inverse)
    return any(has_permutation(v, order) for v in evidence.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("model")
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--overlay")
    args = parser.parse_args(argv)
    fault = make(args.kind, args.model, args.seed, args.folder, args.overlay)
    if fault is None:
        print(f"{args.model} cannot have {args.kind}")
        return 1
    told = (f" --reference {fault.reference}" if fault.reference else "") + (
        f" --for {fault.target}" if fault.target else ""
    )
    print(
        f"right: {'/'.join(fault.codes)} {sorted(fault.tensors) if fault.tensors is not None else fault.layers or ''} "
        f"({fault.note})"
    )
    print(f"tensorkeep diagnose {fault.path}{told} --json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
