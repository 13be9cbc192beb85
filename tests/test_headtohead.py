"""The comparison of systems: what did not run has a row that says why, and the picture shows what did."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from benchmarks.headtohead import apart, call, floor_of, one, picture, table, together
from benchmarks.headtohead_systems import BUILD, WAYS, axolotl_patches

ROOT = Path(__file__).parent.parent


def _row(system: str, way: str, gib: float, rate: float, losses: list[float]) -> dict[str, Any]:
    times = {"load_s": 2.5, "first_step_s": 9.0, "of_floor": 0.8}
    memory = {"peak_gib": gib, "held_gib": gib + 1}
    return {"system": system, "way": way, "shape": "4x2048", "tokens_per_s": rate, "losses": losses} | times | memory


def test_what_is_not_installed_or_not_over_says_so(tmp_path: Path) -> None:
    missing = one("unsloth", "none", tmp_path, "1x8", (1, 0), {"unsloth": str(tmp_path)}, 60)
    assert "No module named 'unsloth'" in missing["not_run"] and missing["versions"]["torch"]
    assert one("peft", "checkpointing", tmp_path, "1x8", (1, 0), {}, 0.01)["not_run"] == "not over in 0 s"
    rows = [_row("tensorkeep", "least", 6.8, 13000.0, [1.0, 2.0]) | {"beside": ["peft:checkpointing"]}, missing]
    apart(rows)
    lines = table(rows).splitlines()
    assert "| least (beside peft:checkpointing) |" in lines[2]
    assert "13,000 | 6.80 | 7.80 | 80%" in lines[2] and "not run: ModuleNotFoundError" in lines[3]
    assert {line.count("|") for line in lines} == {11}


def test_processes_that_start_together_have_a_row_each(tmp_path: Path) -> None:
    ways = [("unsloth", "none"), ("unsloth", "device")]
    rows = together(ways, tmp_path, "1x8", (1, 0), {}, 60)
    assert [(row["system"], row["way"]) for row in rows] == ways
    assert all("No module named" in row["not_run"] for row in rows)
    rows = together(ways[:1], tmp_path, "1x8", (1, 0), {}, 0.0)
    assert rows[0]["not_run"] == "not over in 0 s" and "said" in rows[0]


def test_a_process_gets_its_steps_and_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "src")
    command, env = call("axolotl", "liger", tmp_path, "1x8", (3, 1), {"axolotl": f"a{os.pathsep}b"})
    assert command[-4:] == ["--steps", "3", "--untimed", "1"]
    assert env["PYTHONPATH"] == os.pathsep.join(["a", "b", "src"])


def test_of_axolotl_only_what_its_kernels_need_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "__init__": "",
        "utils/__init__": "",
        "utils/callbacks/__init__": "import evaluate_and_wandb",
        "utils/callbacks/models": "prefix = 'Llama'",
        "monkeypatch/__init__": "",
        "monkeypatch/lora_kernels": "from axolotl.utils.callbacks.models import prefix",
    }
    for name, text in files.items():
        path = tmp_path / "axolotl" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert axolotl_patches().prefix == "Llama"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "axolotl"]:
            del sys.modules[name]


def test_the_picture_has_a_line_a_system_and_a_point_a_way() -> None:
    rows = [
        _row("tensorkeep", "most", 30.0, 16000.0, [1.0]),
        _row("tensorkeep", "least", 6.8, 13000.0, [1.0]),
        _row("a & b", "none", 36.0, 15000.0, [1.5]),
        {"system": "peft", "way": "checkpointing", "shape": "4x2048", "not_run": "no"},
    ]
    apart([row for row in rows if "losses" in row])
    assert [row.get("losses_apart") for row in rows] == [0.0, 0.0, 0.5, None]
    drawn = ET.fromstring(picture(rows, "4x2048"))
    names = [element.tag.rpartition("}")[2] for element in drawn]
    assert names.count("polyline") == 2 and names.count("circle") == 3
    lines = [e.get("points", "").split() for e in drawn if e.tag.endswith("polyline")]
    assert len(lines[0]) == 2 and float(lines[0][0].split(",")[0]) < float(lines[0][1].split(",")[0])


def test_every_system_has_ways_and_what_is_not_in_the_project_an_environment(tmp_path: Path) -> None:
    assert BUILD.keys() == WAYS.keys()
    envs = {path.stem.removeprefix("headtohead-") for path in (ROOT / "benchmarks" / "envs").glob("headtohead-*.txt")}
    assert envs == {"unsloth", "peft", "peft-liger", "axolotl"}
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2, "vocab_size": 100}))
    assert floor_of(tmp_path, "1x64") > floor_of(tmp_path, "1x4096")  # attention grows with the square
