"""Parity with OpenTAD's detectors: `python -m tests.parity.opentad_detectors OPENTAD MAMBA PYTHON`.

OPENTAD is a checkout of sming256/OpenTAD (3dd7b03), MAMBA one of state-spaces/mamba (one function of it is used), and
PYTHON an interpreter with torch, mmengine, einops, scipy, pandas, safetensors and OpenTAD's `nms_1d_cpu`
(`benchmarks/envs/opentad.txt`). For ActionFormer, TriDet, TemporalMaxer and CausalTAD, in several forms and `--seeds`:
levels, logits, offsets, detections after suppression, losses (evaluation and two steps), gradients, optimizer groups;
then a checkpoint of OpenTAD's goes through `convert` to our names and back, and OpenTAD loads it strictly. Last, of
every config of these detectors on features that imports, names and shapes of the whole model.
`--record DIR` writes the small files that the project's own tests read.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tensorkeep.conversion.naming import opentad as opentad_names
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.model.kinds import NAMES
from tensorkeep.detection.opentad.recipe import import_config
from tensorkeep.errors import TensorkeepError
from tests.helpers import to
from tests.parity.opentad_detectors import compare
from tests.parity.opentad_detectors.kinds import all_cases, small_cases
from tests.parity.opentad_fixtures import Fixture, unequal
from tests.parity.outcome import Outcome, be_quiet, guarded, report

PEER = Path(__file__).with_name("peer.py")


def peer(programs: Sequence[str], cases: list[Any], folder: Path, *options: str) -> None:
    """Run the original on the cases."""
    (folder / "cases.json").write_text(json.dumps(cases))
    opentad, mamba, python = programs
    words = [python, "-W", "ignore", str(PEER), opentad, mamba, str(folder / "cases.json"), str(folder), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    (folder / "cases.json").unlink()


def outcomes(programs: Sequence[str], seeds: int, folder: Path) -> Iterator[Outcome]:
    """Every comparison."""
    cases = list(all_cases(seeds))
    peer(programs, cases, folder)
    found = list(compare.recorded(folder))
    for fixture in found:
        yield from guarded(fixture.name, lambda f=fixture: _compared(f))  # type: ignore[misc]
        _there_and_back(fixture, folder)
    peer(programs, cases, folder, "--load")
    for fixture in found:
        theirs = load_file(folder / f"{fixture.name}.loaded.safetensors")
        wrong = sum(unequal(tensor, fixture.tensors[name]) for name, tensor in theirs.items())
        yield Outcome(f"{fixture.name}/loaded strictly, logits", float(wrong), 0)


def whole_models(opentad: Path, programs: Sequence[str], folder: Path) -> Iterator[Outcome]:
    """Names and shapes of the full-size models of every config that imports."""
    recipes = {}
    for path in sorted(p for kind in NAMES for p in (opentad / "configs" / kind).rglob("*.py")):
        with contextlib.suppress(TensorkeepError):  # which ones are refused, and why, is a page of the docs
            recipes[path.relative_to(opentad / "configs").as_posix()] = import_config(path).recipe
    peer(programs, list(recipes), folder, "--shapes")
    for name, theirs in json.loads((folder / "shapes.json").read_text()).items():
        with torch.device("meta"):
            state = Detector(recipes[name].model).state_dict()
        ours = {opentad_names.from_hf(key): list(tensor.shape) for key, tensor in state.items()}
        wrong = sum(ours.get(key) != theirs.get(key) for key in ours.keys() | theirs.keys())
        yield Outcome(f"configs/{name}, names and shapes", float(wrong), 0, f"{len(theirs)} tensors")


def _compared(fixture: Fixture) -> Iterator[Outcome]:
    for name, figure, tolerance in compare.cases(fixture):
        yield Outcome(f"{fixture.name}/{name}", figure, tolerance)


def _there_and_back(fixture: Fixture, folder: Path) -> None:
    """A checkpoint as OpenTAD's trainer writes it, converted to our names and back, as NAME.pth."""
    state = {f"module.{name}": tensor for name, tensor in fixture.under("weights/").items()}
    with tempfile.TemporaryDirectory() as work:
        torch.save({"epoch": 3, "state_dict": state}, Path(work) / "theirs.pth")
        to(Path(work) / "theirs.pth", Path(work) / "ours", "hf")
        to(Path(work) / "ours", folder / f"{fixture.name}.pth", "pth", naming="opentad")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("programs", nargs=3, metavar=("OPENTAD", "MAMBA", "PYTHON"))
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--record", type=Path)
chosen = parser.parse_args()
if chosen.record:
    chosen.record.mkdir(parents=True, exist_ok=True)
    peer(chosen.programs, list(small_cases()), chosen.record)
    sys.exit(0)
be_quiet()
with tempfile.TemporaryDirectory() as place:
    both = (
        outcomes(chosen.programs, chosen.seeds, Path(place)),
        whole_models(Path(chosen.programs[0]), chosen.programs, Path(place)),
    )
    sys.exit(report(itertools.chain(*both)))
