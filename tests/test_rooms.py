"""The house: what a run loads, how deep imports go, what a room shows."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from benchmarks import structure

import tensorkeep
from tests import forked
from tests.language_files import config, save_tokenizer, texts

ROOT = Path(__file__).parent.parent
ROOMS = sorted(m.name for m in pkgutil.iter_modules(tensorkeep.__path__) if m.ispkg)


@pytest.fixture(scope="module")
def between() -> Iterator[structure.Graph]:
    yield structure.graph(ROOT)
    structure.parsed.cache_clear()


def test_there_are_twelve_rooms_and_few_files_beside_them() -> None:
    rooms = {"storage", "formats", "quantization", "conversion", "adapters", "models", "training", "diagnosis"}
    assert set(ROOMS) == rooms | {"language", "detection", "integrations", "commands"}
    beside = {m.name for m in pkgutil.iter_modules(tensorkeep.__path__) if not m.ispkg}
    assert beside == {"__main__", "_face", "_moved", "cli", "errors", "findings", "output"}


def test_no_imports_go_in_a_circle_and_chains_between_rooms_are_short(between: structure.Graph) -> None:
    assert [part for part in structure.components(between) if len(part) > 1] == []
    rooms = structure.grouped(between, structure.room)
    assert [part for part in structure.components(rooms) if len(part) > 1] == []
    assert len(chain := structure.longest(rooms)) <= 9, chain


@pytest.mark.parametrize("room", ROOMS)
def test_chains_inside_a_room_are_short(room: str, between: structure.Graph) -> None:
    own = structure.grouped(between, lambda m: m if m.startswith(f"tensorkeep.{room}.") else None)
    assert len(chain := structure.longest(own)) <= 6, chain


@pytest.mark.parametrize("room", [r for r in ROOMS if r not in ("commands", "integrations")])
def test_a_rooms_public_names_exist_and_importing_it_loads_nothing_heavy(room: str) -> None:
    module = importlib.import_module(f"tensorkeep.{room}")
    assert module.__all__ == sorted(module.__all__) and all(
        getattr(module, name) is not None for name in module.__all__
    )
    code = f"import sys, tensorkeep.{room}; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_module_imports_what_is_private_to_another_folder(between: structure.Graph) -> None:
    packages = {m for m, path in structure.modules(ROOT).items() if path.name == "__init__.py"}
    wrong = [
        (name, target)
        for name, targets in between.items()
        for target in targets
        if target.rpartition(".")[2].startswith("_")
        and target.count(".") > 1
        and target.rpartition(".")[0] not in (name if name in packages else name.rpartition(".")[0],)
    ]
    assert wrong == []


def test_no_module_takes_a_private_name_from_another(between: structure.Graph) -> None:
    wrong, known = [], structure.modules(ROOT)
    for name, path in known.items():
        for node in ast.walk(structure.parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorkeep."):
                wrong += [
                    (name, f"{node.module}.{a.name}")
                    for a in node.names
                    if a.name.startswith("_") and f"{node.module}.{a.name}" not in known
                ]
    assert wrong == []


LOADED = """
import json, sys
from tensorkeep.cli import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
print(*sorted(m for m in sys.modules if m.startswith("tensorkeep.")), sep="\\n")
"""


def loaded_by(*commands: list[object]) -> set[str]:
    """The package's modules that are loaded once these commands have run in a process of their own."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = forked.run([sys.executable, "-c", LOADED, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line for line in done.stdout.splitlines() if line.startswith("tensorkeep.")}


def test_a_language_run_loads_no_detection(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tok")
    document = {
        "config": config(),
        "tokenizer": str(tmp_path / "tok"),
        "data": {"files": [str(texts(tmp_path / "a.jsonl"))], "length": 32},
        "training": {"updates": 1, "batch": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    loaded = loaded_by(
        ["train", "language", tmp_path / "recipe.yaml", "--out", tmp_path / "run"],
        ["eval", "language", tmp_path / "run", "--data", tmp_path / "a.jsonl"],
    )
    assert "tensorkeep.language.job" in loaded
    assert [m for m in sorted(loaded) if m.startswith("tensorkeep.detection")] == []


def test_a_detection_run_loads_no_language(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.detection.runs import dataset, document

    made = document(dataset(tmp_path / "data", videos=2, held_out=1))
    made["training"]["epochs"], made["schedule"] = 1, {"warmup": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    loaded = loaded_by(
        ["train", "detection", tmp_path / "recipe.yaml", "--out", tmp_path / "run"],
        ["eval", "detection", tmp_path / "run"],
    )
    assert "tensorkeep.detection.job" in loaded
    assert [m for m in sorted(loaded) if m.startswith("tensorkeep.language")] == []
