"""The table of all sound variants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.specimens import Specimen

Write = Callable[[Specimen, Path, np.random.Generator], "Path | tuple[Path, str] | None"]
VARIANTS: dict[str, Write] = {}
ALONE = {"without_reference", "fine_tuned_without_reference", "dcp_without_reference"}  # diagnosed by themselves


def variant(make: Write) -> Write:
    """Register a writer under its name. It returns the path, and the target where it is meant for one."""
    VARIANTS[getattr(make, "__name__", "")] = make
    return make
