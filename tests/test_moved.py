"""Import paths that the documentation of 0.1 printed still work, and say where their names are now."""

from __future__ import annotations

import importlib
import sys

import pytest

from tensorkeep._moved import MOVED
from tests import forked

PRINTED = {
    "tensorkeep.job": ["Job", "Loop"],
    "tensorkeep.live.loaded": ["check_loaded", "repair_buffers"],
    "tensorkeep.loaded": ["check_loaded", "repair_buffers"],
    "tensorkeep.lora": ["add_lora", "layers"],
    "tensorkeep.lora_files": ["save_adapter"],
    "tensorkeep.merging": ["base_digests"],
    "tensorkeep.planning": ["make_plan"],
    "tensorkeep.randomness": ["order", "generator"],
    "tensorkeep.train": ["fit"],
    "tensorkeep.view": ["read"],
}


def test_the_table_is_what_was_printed() -> None:
    assert {name for name, homes in MOVED.items() if homes} == set(PRINTED)


@pytest.mark.parametrize("old", sorted(PRINTED))
def test_an_old_path_gives_the_same_object_and_names_the_new_path(old: str) -> None:
    module = importlib.import_module(old)
    for name in PRINTED[old]:
        with pytest.warns(DeprecationWarning, match=rf"{old}\.{name} is tensorkeep\.\S+\.{name} now"):
            found = getattr(module, name)
        assert any(found is getattr(importlib.import_module(home), name, None) for home in MOVED[old])
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_an_old_import_statement_works_in_a_fresh_process() -> None:
    code = "from tensorkeep.live.loaded import check_loaded; from tensorkeep.conversion import convert; print(convert)"
    done = forked.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "check_loaded is tensorkeep.diagnosis.live.loaded.check_loaded now" in done.stderr
