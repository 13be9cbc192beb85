"""Import paths that the documentation of version 0.1 printed: each still works and warns with the path it has now."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

# module of version 0.1 -> where its names are now; one that only held modules is empty
MOVED: dict[str, tuple[str, ...]] = {
    "tensorkeep.job": ("tensorkeep.training.job",),
    "tensorkeep.live": (),
    "tensorkeep.live.loaded": ("tensorkeep.diagnosis.live.loaded", "tensorkeep.models.repair"),
    "tensorkeep.loaded": ("tensorkeep.diagnosis.live.loaded", "tensorkeep.models.repair"),
    "tensorkeep.lora": ("tensorkeep.adapters.lora",),
    "tensorkeep.lora_files": ("tensorkeep.adapters.files",),
    "tensorkeep.merging": ("tensorkeep.adapters.merging",),
    "tensorkeep.planning": ("tensorkeep.conversion.planning",),
    "tensorkeep.randomness": ("tensorkeep.training.randomness",),
    "tensorkeep.train": ("tensorkeep.training.loop",),
    "tensorkeep.view": ("tensorkeep.formats.view",),
}


class _Finder:
    """Finds and loads a module of the table as one whose names come from where they are now.

    It has no base class: `importlib.abc` would load zipfile, tempfile and more, 20 ms of every start.
    """

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the making of the module to Python."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module of the table; None for any other."""
        if fullname not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=not MOVED[fullname])  # type: ignore[arg-type]

    def exec_module(self, module: types.ModuleType) -> None:
        """Give the module a `__getattr__` that warns and looks names up where they are now."""
        old = module.__name__
        homes = [importlib.import_module(name) for name in MOVED[old]]

        def find(name: str) -> object:
            home = next((h for h in homes if not name.startswith("__") and hasattr(h, name)), None)
            if home is None:
                raise AttributeError(f"module {old!r} has no attribute {name!r}")
            new = f"{home.__name__}.{name}"
            warnings.warn(f"{old}.{name} is {new} now; {old} goes with 0.3", DeprecationWarning, stacklevel=2)
            return getattr(home, name)

        module.__getattr__ = find  # type: ignore[method-assign]


def install() -> None:
    """Let the import system find the modules of the table; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
