"""The power fails after any system call of a save: what was acknowledged is there and whole, what is there is whole."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tensorkeep.storage.run_folder import folder_of
from tensorkeep.storage.run_manifest import findings
from tensorkeep.training.saver import best, newest, steps
from tests.power_child import SIZE, STEPS
from tests.run_states import same, state
from tests.system_calls import MODELS, Call, Disk, build, record

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@needs_strace
def test_a_crash_after_any_system_call_loses_and_tears_nothing(tmp_path: Path) -> None:
    run, told = tmp_path / "run", tmp_path / "told"
    command = [sys.executable, "-m", "tests.power_child", str(run), str(told)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}
    calls = [c for c in record(command, tmp_path / "log", env=environment) if any(str(tmp_path) in p for p in c.paths)]
    assert sum(c.name == "fsync" for c in calls) > 8 * len(STEPS) and any("O_DIRECT" in c.text for c in calls)
    assert any("RENAME_EXCHANGE" in c.text for c in calls)
    states, taken = crash_everywhere(calls, str(run), str(told), tmp_path / "after")
    assert states > 100 and taken == {None, *STEPS}


def crash_everywhere(calls: list[Call], run: str, told: str, place: Path) -> tuple[int, set[int | None]]:
    """Rebuild what every crash leaves, resume, and judge; the states seen and the steps taken."""
    disk, acknowledged, marked = Disk(), 0, None
    seen: dict[frozenset[object], tuple[int | None, int | None]] = {}
    for call in calls:
        if call.name == "write" and call.paths[0] == told:
            word, number = call.data.decode().split()
            acknowledged, marked = (int(number), marked) if word == "step" else (acknowledged, int(number))
            continue
        disk.apply(call)
        for model in MODELS:
            left = {p: d for p, d in disk.after(model).items() if p.startswith(run)}
            key = frozenset(left.items())
            if key not in seen:
                seen[key] = resumed(left, run, place)
            step, named = seen[key]
            assert marked is None or named == marked, f"best is {named}, {marked} was acknowledged, {call}, {model}"
            assert step is not None or not acknowledged, (call, model)
            assert step is None or step >= acknowledged, (
                f"{step} after {acknowledged} was acknowledged, {call}, {model}"
            )
    return len(seen), {step for step, _ in seen.values()}


def resumed(left: dict[str, bytes | None], run: str, place: Path) -> tuple[int | None, int | None]:
    """Resume after a crash: the step taken, proven whole and right, and the best one; no step's folder may be torn."""
    shutil.rmtree(place, ignore_errors=True)
    build(left, run, place)
    found = newest(place)
    if found is None:
        return None, best(place)
    step = int(found[0].document["step"])
    assert found[2] == [] and same(found[0], state(step, size=SIZE))
    for older in steps(place):
        assert findings(folder_of(place, older)) == []
    return step, best(place)


@needs_strace
def test_the_model_finds_a_writer_that_does_not_fsync(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    source = f"import os; f = open('{new}', 'wb'); f.write(b'x' * 100); f.close(); os.rename('{new}', '{old}')"
    calls = [c for c in record([sys.executable, "-c", source], tmp_path / "log") if str(tmp_path) in c.paths[0]]
    disk = Disk()
    for call in calls:
        disk.apply(call)
    path = f"{tmp_path}/old"
    assert {m: disk.after(m).get(path) for m in MODELS} == {
        "kill": b"x" * 100,
        "drop": b"",
        "zero": bytes(100),
        "half": b"x" * 50,
        "lost": None,
        "strict": None,
        "mixed": b"",
    }
