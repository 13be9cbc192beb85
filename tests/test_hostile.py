"""A sample of the hostile corpus through every command: nothing runs, hangs, crashes or takes out of proportion.

The whole corpus: `python -m benchmarks.hostile`. Each command runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests import forked
from tests.hostile import cases

ROOT = Path(__file__).parents[1]


def test_a_sample_of_the_corpus_does_no_harm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.hostile", "--each", "1", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = forked.run([*command, "--hangs", "600"], cwd=ROOT, env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())
    harm = [o for o in found if set(o["faults"]) - {"seconds"}]  # seconds are the benchmark's to judge
    assert not harm, done.stdout[-4000:]
    assert {o["case"].partition(":")[0] for o in found} == {c.kind for c in cases()}
    assert len(found) > 60 and {o["exit"] for o in found} >= {0, 1, 2}


def test_the_corpus_is_counted_and_its_names_are_unique() -> None:
    every = [f"{c.kind}: {c.name}" for c in cases()]
    assert len(every) == len(set(every)) > 400 and len({c.kind for c in cases()}) >= 15
    assert [(c.kind, c.name) for c in cases(1)] != [(c.kind, c.name) for c in cases(0)]
