"""The package's surface: what it exports, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import tensorkeep

PUBLIC = {
    *("Finding", "Plan", "StateView", "TensorRecord", "TensorkeepError", "__version__", "check_loaded", "compare"),
    *("DurableReader", "DurableWriter"),
    *("convert", "diagnose", "explain_loss", "guard", "identify", "make_plan", "read", "repair_buffers", "verify"),
}


def test_the_public_names_are_exactly_these_and_resolve() -> None:
    assert set(tensorkeep.__all__) == PUBLIC
    assert all(getattr(tensorkeep, name) is not None for name in PUBLIC)


def test_importing_the_package_loads_no_heavy_module() -> None:
    code = (
        "import sys, tensorkeep; print([m for m in ('torch', 'numpy', 'rich', 'cyclopts', 'yaml') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
